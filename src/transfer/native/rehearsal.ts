/**
 * Requests that this thread hands over to itself at its start: a consumer and a producer as they are on a core thread, joined by a page, with
 * launches and messages that are played here. Else the first requests of a process, and all of one that is asked now and then, meet code
 * that V8 has not compiled: some 15 ms for the first, 1 ms for each of the next dozens, 0.3 ms once it has (bench/transfer/stages.ts). Messages
 * are rehearsed where they are said and read, on the transfer thread (codec.ts).
 */
import { randomBytes } from 'node:crypto';
import { closeSync } from 'node:fs';
import { setImmediate } from 'node:timers/promises';
import { type Deferred, deferred } from '../../deferred.ts';
import { PdError } from '../../errors.ts';
import { createLogger } from '../../observability/log.ts';
import { MetricsPage } from '../../observability/metrics.ts';
import { OwnerPage, WriterPage } from '../../transport/direct/page.ts';
import { engineRequestId, proxyRequestId, type TransferId, transferIdOf } from '../../wire/ids.ts';
import type { FromWire, NativeInit, ToWire } from './channel.ts';
import type { LayerWrites } from './direct.ts';
import { HandOver, type HandOverOptions } from './hand-over.ts';
import type { LoadOutcome } from './hand-over-api.ts';
import type { CacheShape, HelloMessage, Nonce } from './messages.ts';

/** From here on more of them change little. */
const REQUESTS = 150;
/** For all of them: on a slow machine there are fewer. */
const MOST_MS = 200;
/** Nothing is late here, unless the process is stopped meanwhile. */
const DEADLINE_MS = 60_000;
const BLOCKS = 16;
const ADDRESSES = { producer: { host: '127.0.0.1', port: 1 }, consumer: { host: '127.0.0.1', port: 2 } };
const PEERS = { producer: '127.0.0.1:1', consumer: '127.0.0.1:2' };
const DIGEST = '00'.repeat(16);

/** Leaves nothing behind but a page of 64 KiB. Tells how many requests there were. Throws INTERNAL where one did not come. */
export async function rehearse(shape: CacheShape): Promise<number> {
  const stage = new Stage({ ...shape, blocks: BLOCKS });
  const until = performance.now() + MOST_MS;
  let requests = 0;
  try {
    for (; requests < REQUESTS && performance.now() < until; requests++) await stage.play(requests % 2 === 0);
  } finally {
    await stage.close();
  }
  return requests;
}

class Stage {
  readonly #shape: CacheShape;
  readonly #owner: OwnerPage;
  readonly #writer: WriterPage;
  readonly #producer: HandOver;
  readonly #consumer: HandOver;
  readonly #inits: Readonly<Record<'producer' | 'consumer', NativeInit>>;
  readonly #hear: Partial<Record<'producer' | 'consumer', (event: FromWire) => void>> = {};
  /** Answers, which come after the page has said the same. */
  #mail: FromWire[] = [];
  #loaded: Deferred<LoadOutcome> = deferred();

  constructor(shape: CacheShape) {
    this.#shape = shape;
    const { ref, descriptor } = OwnerPage.create();
    closeSync(descriptor);
    this.#owner = new OwnerPage(ref);
    this.#writer = new WriterPage(ref);
    const init = (): NativeInit => ({
      nonce: randomBytes(16).toString('hex') as Nonce,
      layers: [],
      shape,
      transports: ['direct'],
      direct: { bootId: 'this one', path: '' },
    });
    this.#inits = { producer: init(), consumer: init() };
    this.#producer = this.#start('producer');
    this.#consumer = this.#start('consumer');
  }

  /** One request. `kept`: its prompt is computed before it is asked for; else layer by layer, after that. */
  async play(kept: boolean): Promise<void> {
    const { blockSize, layers } = this.#shape;
    const uuid = randomBytes(16).toString('hex');
    const id = transferIdOf(`cmpl-${proxyRequestId(ADDRESSES.producer, ADDRESSES.consumer, uuid)}-0`);
    const blocks = Array.from({ length: BLOCKS }, (_, i) => i);
    const tokens = BLOCKS * blockSize;
    this.#loaded = deferred();
    if (!kept) this.#want(id, tokens, blocks);
    const producer = this.#producer;
    producer.begin({ transferId: id, promptDigest: DIGEST, tokens });
    producer.progress(id, tokens, blocks);
    for (let layer = 0; layer < layers; layer++) producer.layer(layer);
    await producer.stepEnded();
    producer.finish(id, { tokens: [1], samplingDigest: DIGEST });
    if (kept) this.#want(id, tokens, blocks);
    const outcome = await this.#loaded.promise;
    if (!outcome.ok) throw new PdError('INTERNAL', `the rehearsal of a hand-over: ${outcome.error.message}`);
    const mail = this.#mail;
    this.#mail = [];
    for (const event of mail) this.#hear.consumer?.(event);
    await setImmediate();
  }

  async close(): Promise<void> {
    await this.#consumer.close();
    await this.#producer.close();
  }

  #want(id: TransferId, tokens: number, blocks: readonly number[]): void {
    const digests = { promptDigest: DIGEST, samplingDigest: DIGEST };
    const of = { requestId: engineRequestId(id), transferId: id, peer: PEERS.producer };
    this.#consumer.want({ ...of, ...digests, tokens, skip: 0, blocks, withinMs: DEADLINE_MS });
  }

  #start(role: 'producer' | 'consumer'): HandOver {
    const nothing = () => {};
    const handOver = new HandOver({
      init: this.#inits[role],
      wire: (hear) => {
        this.#hear[role] = hear;
        return (command) => this.#carry(command);
      },
      role,
      rank: 0,
      busy: () => false,
      leaseMs: DEADLINE_MS,
      direct: this.#direct(),
      log: createLogger({ level: 'silent', format: 'json' }, 'rehearsal'),
      metrics: new MetricsPage(),
    });
    handOver.serve({
      books: {
        hold: nothing,
        unhold: nothing,
        expose: nothing,
        retract: nothing,
        lease: nothing,
        endLease: nothing,
      },
      loadEnded: (outcome) => this.#loaded.resolve(outcome),
      freed: nothing,
    });
    return handOver;
  }

  #carry(command: ToWire): void {
    const { producer, consumer } = PEERS;
    if (command.kind === 'connect') {
      this.#hear.producer?.({
        kind: 'introduced',
        way: 'from',
        peer: consumer,
        hello: this.#hello('consumer'),
      });
      this.#hear.consumer?.({
        kind: 'introduced',
        way: 'to',
        peer: producer,
        hello: this.#hello('producer'),
      });
    } else if (command.kind === 'ask') {
      this.#hear.producer?.({ kind: 'asked', peer: consumer, message: command.message });
    } else if (command.kind === 'answer') {
      this.#mail.push({ kind: 'answered', peer: producer, message: command.message });
    }
  }

  #hello(role: 'producer' | 'consumer'): HelloMessage {
    const { nonce, shape, transports, direct } = this.#inits[role];
    return {
      cmd: 'HELLO',
      from: nonce,
      hello: { version: 1, features: [], sendType: 'PUT_ASYNC' },
      cache: shape,
      transports,
      ...(direct && { direct }),
    };
  }

  #direct(): NonNullable<HandOverOptions['direct']> {
    const nothing = () => {};
    return {
      serve: nothing,
      expect: nothing,
      connect: nothing,
      release: nothing,
      mappings: () => [],
      pageOf: () => this.#owner,
      targetPage: () => this.#writer,
      begin: (_nonce, { slot, seq, last }): LayerWrites => {
        if (last) this.#writer.progress(slot, seq, 'last');
        return {
          layers: nothing,
          landed: async () => {
            if (last) this.#writer.play(slot, seq);
          },
        };
      },
    };
  }
}
