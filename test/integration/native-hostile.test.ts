/** A live end of the native hand-over and a peer that says what none should: each is answered for itself, and others notice nothing. */
import { randomBytes } from 'node:crypto';
import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { parseHostPort } from '../../src/net/address.ts';
import { decodeAnswered, decodeAsked, encodeNative } from '../../src/transfer/native/codec.ts';
import { identityOf } from '../../src/transfer/native/hello.ts';
import {
  type AnsweredMessage,
  type HelloMessage,
  type NativeMessage,
  type Nonce,
  type PartMessage,
  PROBE_ONLY,
  type Ticket,
  type WantMessage,
} from '../../src/transfer/native/messages.ts';
import { proxyRequestId, type TransferId, transferIdOf } from '../../src/wire/ids.ts';
import type { UniqueId } from '../../src/wire/messages.ts';
import { compute, type End, finish, idFor, LAYERS, makeEnd, outcomeOf, wantOf } from '../support/native.ts';
import { RawListener, RawPeer } from '../support/raw-peer.ts';
import { count, LAYOUT, testServices, until } from '../support/transfer.ts';

const services = testServices();

const BLOCKS = LAYOUT.numBlocks;
const LIMITS = { maxBlocks: BLOCKS };
const hex = () => randomBytes(16).toString('hex');
const SHAPE = { blocks: BLOCKS, blockSize: LAYOUT.blockSize, layers: LAYERS, blockBytes: 512 };
const helloOf = (from: Nonce, rest: Partial<HelloMessage> = {}): HelloMessage => ({
  cmd: 'HELLO',
  from,
  hello: { version: 1, features: ['native'], sendType: 'PUT_ASYNC' },
  cache: { ...SHAPE, family: LAYOUT.family },
  transports: ['host'],
  ...rest,
});

/** A whole hand-over between the two, as if nothing were. */
async function works(producer: End, consumer: End): Promise<void> {
  const used = producer.blocks.numUsed;
  const id = idFor(producer, consumer);
  consumer.handOver.want(wantOf(producer, consumer, id, 9));
  producer.blocks.allocate(id, 9);
  producer.handOver.begin({ transferId: id, promptDigest: 'prompt', tokens: 9 });
  await compute(producer, id, 9);
  finish(producer, id);
  expect(await outcomeOf(consumer)).toMatchObject({ ok: true, draw: { tokens: [7] } });
  consumer.blocks.free(id);
  await until('its blocks to be free', () => producer.blocks.numUsed + consumer.blocks.numUsed === used);
  expect([...producer.handOver.checkIntegrity(), ...consumer.handOver.checkIntegrity()]).toEqual([]);
}

/** Under the native name of an address, to a producer. */
class Hostile {
  readonly nonce = hex() as Nonce;
  readonly raw: RawPeer;
  readonly address: string;
  to = '' as Nonce;

  constructor(producer: End, address: string) {
    this.address = address;
    this.raw = services.add(new RawPeer(producer.service.address, identityOf(address)));
  }

  say(message: NativeMessage): Promise<void> {
    return this.raw.say(encodeNative(message, { maxBlocks: 2 ** 20 }));
  }

  /** The first answer that is so; answers are repeated. */
  async answer(what: string, is: (message: AnsweredMessage) => boolean): Promise<AnsweredMessage> {
    const found = () => this.all.find(is);
    await until(what, () => found() !== undefined);
    return found()!;
  }

  get all(): AnsweredMessage[] {
    return this.raw.answers.map((body) => decodeAnswered(body, LIMITS));
  }

  want(seq: number, id: TransferId, more: Partial<WantMessage> = {}): WantMessage {
    const of = { from: this.nonce, to: this.to, seq, ticket: hex() as Ticket, floor: 1, id };
    const digests = { promptDigest: 'prompt', samplingDigest: 'sampling' };
    return {
      cmd: 'WANT',
      ...of,
      ...digests,
      tokens: 9,
      skip: 0,
      blocks: [1, 2, 3],
      transport: 'host',
      ...more,
    };
  }
}

const idBetween = (producer: End, consumer: string) =>
  transferIdOf(`cmpl-${proxyRequestId(producer.service.address, parseHostPort(consumer), hex())}-0`);

it('a producer answers each of a hostile consumer’s messages, or counts it, and serves the others', async () => {
  const producer = await makeEnd(services, 'producer');
  const consumer = await makeEnd(services, 'consumer');
  const hostile = new Hostile(producer, '127.0.0.1:7');
  const mine = idBetween(producer, hostile.address);
  const theirs = idFor(producer, consumer);

  // before its hello it is asked for one
  await hostile.say({ ...hostile.want(1, mine), to: hex() as Nonce });
  await hostile.answer('HELLO', ({ cmd }) => cmd === 'HELLO');
  await hostile.say(helloOf(hostile.nonce, { cache: { ...SHAPE, blockSize: 8, family: LAYOUT.family } }));
  const refused = await hostile.answer(
    'a refusal',
    (one) => one.cmd === 'HELLO' && one.refused !== undefined,
  );
  expect(refused).toMatchObject({ refused: { code: 'FINGERPRINT_MISMATCH' } });
  await hostile.say(helloOf(hostile.nonce));
  hostile.to = refused.from;

  producer.blocks.allocate(mine, 9);
  producer.handOver.begin({ transferId: mine, promptDigest: 'prompt', tokens: 9 });
  const over = idBetween(producer, hostile.address);
  producer.handOver.begin({ transferId: over, promptDigest: 'prompt', tokens: 9 });
  producer.handOver.fail(over, 'REQUEST_ABORTED', 'its client went away');

  const failing: [what: string, want: Parameters<Hostile['want']>, code: string][] = [
    ['for KV of another’s id', [11, theirs], 'MESSAGE_INVALID'],
    ['for an id of nobody', [12, transferIdOf('cmpl-x-0')], 'MESSAGE_INVALID'],
    ['of blocks outside of its cache', [13, mine, { blocks: [1, 2, BLOCKS] }], 'KV_SHAPE_MISMATCH'],
    ['of fewer blocks than its tokens fill', [14, mine, { blocks: [1] }], 'KV_SHAPE_MISMATCH'],
    ['that skips more than there is', [15, mine, { skip: BLOCKS }], 'KV_SHAPE_MISMATCH'],
    ['of another prompt', [16, mine, { promptDigest: 'another' }], 'PROMPT_MISMATCH'],
    ['of another length', [17, mine, { tokens: 10 }], 'PROMPT_MISMATCH'],
    ['of an id that is over', [18, over], 'KV_SEND_FAILED'],
  ];
  for (const [, want] of failing) await hostile.say(hostile.want(...want));
  for (const [what, [seq], code] of failing) {
    const failed = await hostile.answer(what, (one) => one.cmd === 'FAIL' && one.seq === seq);
    expect([what, failed]).toMatchObject([what, { code }]);
  }

  // one that stands, and what would end it
  const good = hostile.want(20, mine);
  const of = { from: hostile.nonce, to: hostile.to, seq: 20, floor: 1 };
  const forged = { ...of, ticket: hex() as Ticket };
  const never = idBetween(producer, hostile.address);
  const before = producer.handOver.state().grants.ignored;
  await hostile.say(good);
  const ignored: NativeMessage[] = [
    { ...good, ticket: hex() as Ticket, blocks: [4, 5, 6] },
    { ...good, to: hex() as Nonce },
    { ...good, from: hex() as Nonce },
    { cmd: 'ACK', ...forged },
    { cmd: 'ACK', ...of, ticket: good.ticket },
    { cmd: 'DROP', ...of, id: mine, want: { seq: 20, ticket: hex() as Ticket } },
    { cmd: 'DROP', ...of, id: never, want: { seq: 20, ticket: good.ticket } },
    { cmd: 'DROP', ...of, id: theirs },
  ];
  for (const message of ignored) await hostile.say(message);
  // only a producer says these, and nobody that
  for (const message of [
    { cmd: 'DROPPED', ...forged },
    { cmd: 'HELD', ...forged, state: 'bound' },
  ] as const)
    await hostile.say(message);
  await hostile.say({ cmd: 'PAIR', ...of, uniqueId: new Uint8Array(128) as UniqueId });
  const marker = hostile.want(30, never, { blocks: [1] });
  await hostile.say(marker);
  await hostile.answer('the last', (one) => one.cmd === 'FAIL' && one.seq === 30);
  const after = producer.handOver.state().grants;
  expect(after.bound).toBe(1);
  const more = (kind: keyof typeof before) => after.ignored[kind] - before[kind];
  expect([more('forged'), more('misaddressed'), more('unintroduced')]).toEqual([6, 1, 1]);

  // a thousand of each that are broken
  for (const message of [helloOf(hostile.nonce), good, { cmd: 'ACK', ...forged }] as const)
    for (const body of broken(encodeNative(message, LIMITS))) await hostile.raw.say(body);
  await works(producer, consumer);
  producer.handOver.fail(mine, 'REQUEST_ABORTED', 'the test is over');
  producer.blocks.free(mine);
});

/** Bytes changed, or the end cut off. Its name stays: else it would be of the frozen wire (bad-input.test.ts). */
function broken(valid: Uint8Array): Uint8Array[] {
  const change = fc.tuple(fc.integer({ min: 12, max: valid.length - 1 }), fc.nat(255));
  const some = fc.tuple(fc.array(change, { minLength: 1, maxLength: 4 }), fc.nat(2));
  return fc.sample(some, { numRuns: 1_000, seed: 20_261 }).map(([changes, cut]) => {
    const bytes = Uint8Array.from(valid);
    for (const [at, byte] of changes) bytes[at] = byte;
    return cut === 0 ? bytes.subarray(0, changes[0]![0]) : bytes;
  });
}

it('a consumer whose name another takes for a moment is served again', async () => {
  const producer = await makeEnd(services, 'producer');
  const consumer = await makeEnd(services, 'consumer');
  await works(producer, consumer);
  const thief = new Hostile(producer, consumer.address);
  await thief.say(helloOf(thief.nonce));
  await thief.answer('HELLO', ({ cmd }) => cmd === 'HELLO');
  await thief.raw.dispose();
  await until('the connection to be known as lost', () => consumer.handOver.state().producers.length === 0);
  await works(producer, consumer);
});

/** What became of silences of a consumer's connections. */
const silencesOf = ({ service }: End) =>
  Object.fromEntries(
    (['answered', 'nobody', 'renewed'] as const).map((result) => [
      result,
      count(service, 'pd_native_silences_total', result),
    ]),
  );

it('a consumer whose name another has, and says nothing under, is served again', async () => {
  const producer = await makeEnd(services, 'producer');
  const consumer = await makeEnd(services, 'consumer', { timeouts: { load: 12_000 } });
  await works(producer, consumer);
  const thief = new Hostile(producer, consumer.address);
  // answered under that name, and without effect
  await thief.say(helloOf(thief.nonce, { probe: PROBE_ONLY }));
  await thief.answer('HELLO', ({ cmd }) => cmd === 'HELLO');
  await works(producer, consumer);
  expect(silencesOf(consumer)).toMatchObject({ renewed: 1 });
  // the name is its own again, while the other is still there
  await works(producer, consumer);
  expect(silencesOf(consumer)).toMatchObject({ renewed: 1 });
});

/** A producer that says what the test says. */
async function hostileProducer(
  onMessage: (
    message: NativeMessage,
    answer: (...messages: readonly NativeMessage[]) => void,
    nonce: Nonce,
  ) => void,
) {
  const nonce = hex() as Nonce;
  const heard: NativeMessage[] = [];
  const listener = services.add(
    await RawListener.listen((body, reply) => {
      const message = decodeAsked(body, LIMITS);
      heard.push(message);
      const say = (...messages: readonly NativeMessage[]) => {
        for (const one of messages) reply(encodeNative(one, { maxBlocks: 2 ** 20 }));
      };
      onMessage(message, say, nonce);
    }),
  );
  return { listener, heard, nonce, peer: `127.0.0.1:${listener.address.port}` };
}

/** What every answer to a WANT repeats. */
const backTo = ({ from, to, seq, ticket }: WantMessage) => ({ from: to, to: from, seq, ticket });

const FAIL = { cmd: 'FAIL', code: 'KV_SEND_FAILED', message: 'said by the test' } as const;

async function outcomeBeside(
  consumer: End,
  { peer }: { readonly peer: string },
  id = transferIdOf(`cmpl-${hex()}-0`),
) {
  consumer.handOver.want(wantOf(consumer, consumer, id, 9, { peer }));
  const outcome = await outcomeOf(consumer);
  consumer.blocks.free(id);
  await until('nothing is left', () => consumer.leftovers().length === 0);
  return outcome;
}

it('a consumer takes nothing that a producer forges, and goes on with what is true', async () => {
  const consumer = await makeEnd(services, 'consumer');
  const producer = await hostileProducer((message, answer, nonce) => {
    if (message.cmd === 'HELLO') answer(helloOf(nonce));
    if (message.cmd !== 'WANT') return;
    const of = backTo(message);
    const done = { cmd: 'DONE', drawn: [1], samplingDigest: 'sampling', promised: 3, written: 3 } as const;
    const [ticket, other] = [hex() as Ticket, hex() as Nonce];
    answer(
      { ...done, ...of, ticket },
      { ...FAIL, ...of, ticket },
      { cmd: 'DROPPED', ...of, ticket },
      { ...done, ...of, from: other },
      { ...done, ...of, to: other },
      { ...done, ...of, seq: message.seq + 1 },
      { cmd: 'HELD', ...of, ticket, state: 'writing' },
      { cmd: 'PAIR', from: other, to: of.to, uniqueId: new Uint8Array(128) as UniqueId },
      { ...FAIL, ...of },
    );
  });
  expect(await outcomeBeside(consumer, producer)).toMatchObject({
    ok: false,
    error: { cause: { code: 'KV_SEND_FAILED', message: expect.stringContaining('said by the test') } },
  });
  expect(consumer.handOver.state().wants.ignored).toMatchObject({
    forged: 5,
    unintroduced: 1,
    misaddressed: 1,
  });
});

it.each<[string, Omit<PartMessage, keyof ReturnType<typeof backTo>> | undefined, RegExp]>([
  ['says that all is written and announced none of it', undefined, /0 announced/],
  [
    'announces layers that there are not',
    { cmd: 'PART', part: 1, layer: 1, layers: 60_000, block: 0, blocks: 3 },
    /layers 1 to 60000 of 3/,
  ],
  [
    'announces out of step',
    { cmd: 'PART', part: 7, layer: 0, layers: 1, block: 0, blocks: 3 },
    /out of step/,
  ],
])('a consumer fails alone what a producer %s', async (_, part, why) => {
  const consumer = await makeEnd(services, 'consumer');
  const producer = await hostileProducer((message, answer, nonce) => {
    if (message.cmd === 'HELLO') answer(helloOf(nonce));
    if (message.cmd !== 'WANT') return;
    const of = backTo(message);
    const uniqueId = producer.listener.transport.createUniqueId();
    void producer.listener.transport
      .open({ uniqueId, rank: 0, peer: consumer.address, timeoutMs: 60_000 })
      .catch(() => undefined);
    answer({ cmd: 'PAIR', from: of.from, to: of.to, uniqueId });
    if (part) answer({ ...part, ...of });
    else answer({ cmd: 'DONE', ...of, drawn: [1], samplingDigest: 'sampling', promised: 3, written: 3 });
  });
  const outcome = await outcomeBeside(consumer, producer);
  expect(outcome.ok).toBe(false);
  expect(JSON.stringify(outcome)).toMatch(why);
});

it('what a producer said on the connection before ends nothing on the next', async () => {
  const consumer = await makeEnd(services, 'consumer');
  const wants: WantMessage[] = [];
  const producer = await hostileProducer((message, answer, nonce) => {
    if (message.cmd === 'WANT') {
      wants.push(message);
      // breaks the first connection, and answers on the second
      if (wants.length === 1) answer({ cmd: 'ACK', ...backTo(message), floor: 1 });
      else answer({ ...FAIL, ...backTo(message) });
    } else if (message.cmd === 'HELLO') {
      const [first] = wants;
      const late = first && { ...backTo(first), layer: 0, layers: 1, block: 0, blocks: 3 };
      answer(...(late ? [{ cmd: 'PART', ...late, part: 7 } as const] : []), helloOf(nonce));
    }
  });
  const outcome = await outcomeBeside(consumer, producer);
  expect(producer.heard.filter(({ cmd }) => cmd === 'HELLO')).toHaveLength(2);
  expect(JSON.stringify(outcome)).toContain('said by the test');
});

it('a producer that has forgotten its consumer is introduced to it again', async () => {
  const consumer = await makeEnd(services, 'consumer');
  let hellos = 0;
  const producer = await hostileProducer((message, answer, nonce) => {
    const hello = helloOf(nonce);
    if (message.cmd === 'HELLO') {
      hellos++;
      answer(hello);
    } else if (message.cmd === 'WANT') {
      // as to whoever has not said hello
      if (hellos === 1) answer(hello, hello);
      else answer({ ...FAIL, ...backTo(message) });
    }
  });
  expect(JSON.stringify(await outcomeBeside(consumer, producer))).toContain('said by the test');
  expect(hellos).toBe(2);
});

describe('a producer that says nothing of a WANT', () => {
  const plain = (heard: readonly NativeMessage[]) =>
    heard.filter((message) => message.cmd === 'HELLO' && message.probe === undefined).length;

  it('keeps its connection while its wire answers, as it may compute', async () => {
    const consumer = await makeEnd(services, 'consumer');
    let probes = 0;
    const producer = await hostileProducer((message, answer, nonce) => {
      if (message.cmd === 'HELLO') {
        if (message.probe !== undefined) probes++;
        answer(helloOf(nonce));
      } else if (message.cmd === 'WANT' && probes >= 2) answer({ ...FAIL, ...backTo(message) });
    });
    expect(JSON.stringify(await outcomeBeside(consumer, producer))).toContain('said by the test');
    expect([plain(producer.heard), silencesOf(consumer)]).toEqual([
      1,
      { answered: probes, nobody: 0, renewed: 0 },
    ]);
  });

  it('keeps its connection where it answers nobody, and goes on with what it was asked', async () => {
    const consumer = await makeEnd(services, 'consumer', { timeouts: { load: 12_000 } });
    const waiting: (() => void)[] = [];
    let probes = 0;
    const producer = await hostileProducer((message, answer, nonce) => {
      const reply = () => {
        if (message.cmd === 'HELLO') answer(helloOf(nonce));
        else if (message.cmd === 'WANT') answer({ ...FAIL, ...backTo(message) });
      };
      if (message.cmd === 'HELLO' && message.probe === undefined) {
        reply();
        return;
      }
      if (message.cmd === 'HELLO') probes++;
      waiting.push(reply);
      // then all at once, the new connection first
      if (probes > 1) for (const late of waiting.splice(0).reverse()) late();
    });
    expect(JSON.stringify(await outcomeBeside(consumer, producer))).toContain('said by the test');
    expect([probes, plain(producer.heard), silencesOf(consumer)]).toEqual([
      2,
      1,
      { answered: 1, nobody: 0, renewed: 0 },
    ]);
  });

  it('is connected with anew where it answers everything else', async () => {
    const consumer = await makeEnd(services, 'consumer', { timeouts: { load: 12_000 } });
    let probes = 0;
    const producer = await hostileProducer((message, answer, nonce) => {
      // neither what is asked on the first connection, nor the probe on it
      if (message.cmd === 'HELLO' && (message.probe === undefined || ++probes > 1)) answer(helloOf(nonce));
      if (message.cmd === 'WANT' && plain(producer.heard) > 1) answer({ ...FAIL, ...backTo(message) });
    });
    expect(JSON.stringify(await outcomeBeside(consumer, producer))).toContain('said by the test');
    expect(plain(producer.heard)).toBe(2);
    expect(silencesOf(consumer)).toMatchObject({ renewed: 1 });
  });
});
