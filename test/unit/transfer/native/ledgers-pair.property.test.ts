/**
 * Both ledgers where bytes come on a pair: parts that are announced by messages and come beside them, connections that end in between at
 * one end before the other, and producers and consumers that die without a word.
 */
import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { BlockManager } from '../../../../src/kv/block-manager.ts';
import type { Ask, GrantAction, WantAction } from '../../../../src/transfer/native/actions.ts';
import { decodeAnswered, decodeAsked, encodeNative } from '../../../../src/transfer/native/codec.ts';
import { Grants } from '../../../../src/transfer/native/grants.ts';
import type {
  AnsweredMessage,
  AskedMessage,
  Nonce,
  Ticket,
} from '../../../../src/transfer/native/messages.ts';
import { Wants } from '../../../../src/transfer/native/wants.ts';
import type { TransferId } from '../../../../src/wire/ids.ts';
import { propertyRuns } from '../../../support/property-runs.ts';

const BLOCK = 4;
const CACHE = 24;
const LAYERS = 2;
const limits = { maxBlocks: CACHE };
const P = 'producer';
const C = 'consumer';
const LOST = { code: 'PEER_LOST', message: 'the connection is gone', context: {} } as const;
const FAILED = { code: 'PEER_LOST', message: 'the pair is gone' } as const;
let serial = 0;
const hex = () => (serial++).toString(16).padStart(32, '0');

type Write = GrantAction & { kind: 'write' };
type Receive = WantAction & { kind: 'receive' };

/** By block, of which prompt the KV of each layer is. */
const emptyMemory = () => Array.from({ length: CACHE }, () => new Array<string>(LAYERS).fill(''));

class Consumer {
  readonly nonce = hex() as Nonce;
  readonly blocks = new BlockManager(CACHE, BLOCK);
  readonly memory = emptyMemory();
  readonly exposed = new Map<number, readonly number[]>();
  readonly owners = new Map<string, { readonly ask: Ask; seq?: number; outcome?: string; again: boolean }>();
  /** Receives under way, in order. */
  posted: Receive[] = [];
  /** Of connections that have ended: told that they failed when the test says so. */
  readonly failing: Receive[] = [];
  readonly wants = new Wants({
    nonce: this.nonce,
    cacheBlocks: CACHE,
    layers: LAYERS,
    newTicket: () => hex() as Ticket,
    slots: 8,
  });
}

/** A part on the pair. Without `bytes` it leaves from the blocks as they are when it is received, and its write has landed then. */
interface Part {
  readonly write: Write;
  readonly layer: number;
  readonly bytes: readonly string[] | undefined;
}

class Producer {
  readonly nonce = hex() as Nonce;
  readonly blocks = new BlockManager(CACHE, BLOCK);
  readonly memory = emptyMemory();
  readonly grants = new Grants({
    nonce: this.nonce,
    blockSize: BLOCK,
    names: () => true,
    unboundMs: 5_000,
    leaseMs: 4_000,
    endedMs: 20_000,
  });
  /** Layers of writes that have not been announced, in order. */
  waiting: { readonly write: Write; readonly layer: number }[] = [];
  readonly running = new Map<
    TransferId,
    { readonly prompt: string; readonly tokens: number; computed: number }
  >();
  /** Of each write that has not landed: its layers that have not been announced, or need their blocks still. */
  readonly open = new Map<number, number>();
  /** Parts announced on this connection. */
  parts = 0;
}

class World {
  now = 0;
  consumer = new Consumer();
  producer = new Producer();
  /** A GPU gathers what it sends; a host sends from where it lies. */
  readonly staged: boolean;
  connected = false;
  toProducer: AskedMessage[] = [];
  toConsumer: AnsweredMessage[] = [];
  pair: Part[] = [];
  readonly seen: Record<string, number>;
  #requests = 0;

  constructor(staged: boolean, seen: Record<string, number>) {
    this.staged = staged;
    this.seen = seen;
  }

  connect(): void {
    if (this.connected) return;
    const { consumer, producer, now } = this;
    this.connected = true;
    this.toProducer = [];
    this.toConsumer = [];
    producer.parts = 0;
    this.runGrants(producer.grants.introduced(C, consumer.nonce, CACHE, now));
    consumer.wants.pairOpened(P);
    this.runWants(consumer.wants.introduced(P, producer.nonce, now));
    for (const owner of consumer.owners.values())
      if (owner.outcome === undefined && owner.seq === undefined) this.askFor(owner.ask);
  }

  /** The connection and its pair end, which the consumer always sees, and the producer where an answer cannot be delivered. */
  cut(seenByProducer: boolean): void {
    if (!this.connected) return;
    const { consumer, producer, now } = this;
    this.connected = false;
    this.toProducer = [];
    this.toConsumer = [];
    this.seen['cut']! += this.pair.length > 0 || consumer.posted.length > 0 ? 1 : 0;
    consumer.failing.push(...consumer.posted.splice(0));
    this.pair = [];
    producer.waiting = [];
    if (seenByProducer) this.runGrants(producer.grants.unreachable(C, now));
    for (const launch of [...producer.open.keys()]) this.landed(launch, LAYERS, true);
    this.runWants(consumer.wants.unreachable(P, LOST, now));
  }

  runGrants(actions: readonly GrantAction[]): void {
    const { producer } = this;
    for (const action of actions) {
      if (action.kind === 'send') {
        if (this.connected)
          this.toConsumer.push(decodeAnswered(encodeNative(action.message, limits), limits));
        // as ZeroMQ tells of an answer to nobody
        else this.runGrants(producer.grants.unreachable(C, this.now));
      } else if (action.kind === 'write') {
        producer.blocks.hold(action.sources);
        producer.open.set(action.launch, LAYERS);
        if (!this.connected) this.landed(action.launch, LAYERS, true);
        else for (let layer = 0; layer < LAYERS; layer++) producer.waiting.push({ write: action, layer });
      } else if (action.kind === 'unhold') producer.blocks.unhold(action.sources);
      else if (action.kind === 'lease') producer.blocks.lease(action.id, producer.blocks.tableOf(action.id));
      else if (action.kind === 'release') producer.blocks.endLease(action.id);
    }
  }

  runWants(actions: readonly WantAction[]): void {
    const { consumer } = this;
    for (const action of actions) {
      switch (action.kind) {
        case 'send':
          if (this.connected) this.toProducer.push(decodeAsked(encodeNative(action.message, limits), limits));
          break;
        case 'expose':
          consumer.blocks.expose(`${action.seq}`, action.blocks);
          consumer.exposed.set(action.seq, action.blocks);
          break;
        case 'retract':
          consumer.blocks.retract(`${action.seq}`);
          consumer.exposed.delete(action.seq);
          break;
        case 'loaded':
        case 'failed': {
          const owner = consumer.owners.get(action.owner)!;
          expect(owner).toMatchObject({ seq: action.seq });
          expect(owner.outcome).toBeUndefined();
          if (action.kind === 'loaded') {
            const whole = new Array<string>(LAYERS).fill(owner.ask.promptDigest);
            for (const block of owner.ask.blocks) expect(consumer.memory[block]).toEqual(whole);
          }
          this.settle(action.owner, action.kind);
          break;
        }
        case 'again': {
          const owner = consumer.owners.get(action.owner)!;
          expect(owner.outcome).toBeUndefined();
          delete owner.seq;
          if (owner.again) this.settle(action.owner, 'failed');
          owner.again = true;
          this.seen['again']!++;
          break;
        }
        case 'receive':
          (this.connected ? consumer.posted : consumer.failing).push(action);
          if (action.into === 'scratch') this.seen['scratch']!++;
          break;
        case 'reset-pair':
          throw new Error('the ends have lost step');
        case 'grant':
          throw new Error('there is no page');
      }
    }
  }

  settle(name: string, outcome: string): void {
    this.consumer.owners.get(name)!.outcome = outcome;
    this.consumer.blocks.free(name);
    this.seen[outcome]!++;
  }

  ask(id: TransferId, promptDigest: string, tokens: number): void {
    const { consumer } = this;
    if (!consumer.blocks.canAllocate(tokens)) return;
    const owner = `${id}/${this.#requests++}`;
    const blocks = consumer.blocks.allocate(owner, tokens);
    for (const block of blocks) consumer.memory[block]!.fill('poison');
    const one = { peer: P, id, owner, promptDigest, samplingDigest: 's', tokens, skip: 0, blocks } as const;
    const ask: Ask = { ...one, transport: 'host', withinMs: 3_000 };
    consumer.owners.set(owner, { ask, again: false });
    if (this.connected) this.askFor(ask);
  }

  askFor(ask: Ask): void {
    const answer = this.consumer.wants.ask(ask, this.now);
    if (typeof answer === 'string') {
      this.settle(ask.owner, 'failed');
      return;
    }
    this.consumer.owners.get(ask.owner)!.seq = answer.seq;
    this.runWants(answer.actions);
  }

  abort(which: number): void {
    const open = [...this.consumer.owners].filter(([, { outcome }]) => outcome === undefined);
    const [name, owner] = open[which % Math.max(1, open.length)] ?? [];
    if (name === undefined || !owner) return;
    if (owner.seq !== undefined) this.runWants(this.consumer.wants.abort(owner.seq, this.now));
    this.settle(name, 'aborted');
  }

  begin(id: TransferId, prompt: string, tokens: number): void {
    const { producer } = this;
    const { blocks, running } = producer;
    if (running.has(id) || !blocks.canAllocate(tokens) || blocks.leaseOf(id)) return;
    blocks.allocate(id, tokens);
    running.set(id, { prompt, tokens, computed: 0 });
    this.runGrants(producer.grants.begin(id, prompt, tokens, this.now));
  }

  compute(id: TransferId, by: number): void {
    const { producer } = this;
    const request = producer.running.get(id);
    if (!request) return;
    request.computed = Math.min(request.tokens, request.computed + by);
    const table = producer.blocks.tableOf(id);
    for (const block of table.slice(0, Math.ceil(request.computed / BLOCK)))
      producer.memory[block]!.fill(request.prompt);
    this.runGrants(producer.grants.progress(id, request.computed, table));
    if (request.computed < request.tokens) return;
    this.runGrants(producer.grants.finish(id, { drawn: [1], samplingDigest: 's' }, this.now));
    producer.blocks.free(id);
    producer.running.delete(id);
  }

  /** Its blocks go, and it begins again in others. */
  preempt(id: TransferId): void {
    const { producer } = this;
    const request = producer.running.get(id);
    if (!request) return;
    this.runGrants(producer.grants.progress(id, 0, []));
    producer.blocks.free(id);
    request.computed = 0;
    for (const block of producer.blocks.allocate(id, request.tokens)) producer.memory[block]!.fill('poison');
  }

  fail(id: TransferId): void {
    const { producer } = this;
    this.runGrants(producer.grants.fail(id, 'KV_SEND_FAILED', 'made room', this.now));
    if (producer.running.delete(id)) producer.blocks.free(id);
  }

  /** The next layer that waits is announced, and is on the pair. */
  announce(): void {
    const { producer, staged } = this;
    const next = producer.waiting.shift();
    if (!next) return;
    const { write, layer } = next;
    if (!producer.grants.mayLaunch(write.launch)) {
      this.landed(write.launch, 1);
      return;
    }
    const { peer, nonce, seq, ticket, place, sources } = write;
    const of = { cmd: 'PART', from: producer.nonce, to: nonce, seq, ticket, part: ++producer.parts } as const;
    const part = { ...of, layer, layers: 1, block: place, blocks: sources.length };
    this.runGrants([{ kind: 'send', peer, message: part }]);
    const bytes = staged ? sources.map((block) => producer.memory[block]![layer]!) : undefined;
    this.pair.push({ write, layer, bytes });
    if (staged) this.landed(write.launch, 1);
  }

  /** So many layers of a write need their blocks no more. */
  landed(launch: number, layers: number, failed = false): void {
    const { open, grants } = this.producer;
    const left = (open.get(launch) ?? 0) - layers;
    open.set(launch, left);
    if (left > 0) return;
    open.delete(launch);
    this.runGrants(grants.landed(launch, this.now, failed ? FAILED : undefined));
  }

  /** The part at the head of the pair meets the receive that was posted first. */
  move(): void {
    const { consumer, producer, pair } = this;
    if (pair.length === 0 || consumer.posted.length === 0) return;
    const { write, layer, bytes } = pair.shift()!;
    const { receipt, part, into } = consumer.posted.shift()!;
    expect(part).toMatchObject({ seq: write.seq, layer, blocks: write.sources.length });
    if (into !== 'scratch') {
      for (const [i, block] of into.entries()) {
        expect(consumer.exposed.get(part.seq) ?? []).toContain(block);
        consumer.memory[block]![layer] = bytes?.[i] ?? producer.memory[write.sources[i]!]![layer]!;
      }
    }
    if (!bytes) this.landed(write.launch, 1);
    this.runWants(consumer.wants.received(receipt, true, this.now));
  }

  /** A receive of a connection that is over has ended: until then it may have written. */
  failReceive(which: number): void {
    const { failing, exposed, wants } = this.consumer;
    const [one] = failing.splice(which % Math.max(1, failing.length), 1);
    if (!one) return;
    if (one.into !== 'scratch')
      for (const block of one.into) expect(exposed.get(one.part.seq) ?? []).toContain(block);
    this.runWants(wants.received(one.receipt, false, this.now));
  }

  deliver(to: 'producer' | 'consumer'): void {
    const { consumer, producer, now } = this;
    if (to === 'producer') {
      const message = this.toProducer.shift();
      if (message && message.cmd !== 'HELLO') this.runGrants(producer.grants.message(C, message, now));
      return;
    }
    const message = this.toConsumer.shift();
    if (message && message.cmd !== 'HELLO' && message.cmd !== 'PAIR')
      this.runWants(consumer.wants.message(P, message, now));
  }

  tick(ms: number): void {
    this.now += ms;
    this.runGrants(this.producer.grants.tick(this.now));
    this.runWants(this.consumer.wants.tick(this.now));
  }

  /** Its address is another's from then on. */
  restartConsumer(seenByProducer: boolean): void {
    this.cut(seenByProducer);
    this.consumer = new Consumer();
    this.connect();
  }

  restartProducer(): void {
    this.cut(false);
    this.producer = new Producer();
    this.connect();
  }

  check(): void {
    const { consumer, producer } = this;
    expect(consumer.blocks.checkIntegrity()).toEqual([]);
    expect(producer.blocks.checkIntegrity()).toEqual([]);
    expect(consumer.wants.checkIntegrity()).toEqual([]);
    expect(producer.grants.checkIntegrity()).toEqual([]);
  }
}

const ids = [0, 1, 2].map((i) => `r-${i}` as TransferId);
const step = fc.record({
  kind: fc.oneof(
    { weight: 4, arbitrary: fc.constantFrom('ask', 'begin', 'compute') },
    { weight: 10, arbitrary: fc.constantFrom('to producer', 'to consumer', 'announce', 'move') },
    { weight: 2, arbitrary: fc.constantFrom('tick', 'abort', 'long tick', 'fail receive') },
    { weight: 2, arbitrary: fc.constantFrom('cut', 'connect', 'connect', 'connect') },
    {
      weight: 1,
      arbitrary: fc.constantFrom(
        'restart consumer',
        'restart producer',
        'fail',
        'unwanted',
        'preempt',
        'stop',
      ),
    },
  ),
  id: fc.nat(2),
  prompt: fc.constantFrom('a', 'a', 'a', 'a', 'a', 'b'),
  size: fc.integer({ min: 1, max: 18 }),
});

describe('both ledgers, by a pair', () => {
  it('receive nothing into what is another’s, end every want, and keep nothing', () => {
    const seen = { loaded: 0, failed: 0, aborted: 0, again: 0, scratch: 0, cut: 0 };
    const property = fc.property(
      fc.boolean(),
      fc.array(step, { minLength: 120, maxLength: 250, size: 'max' }),
      (staged, steps) => {
        const world = new World(staged, seen);
        world.connect();
        for (const { kind, id: which, prompt, size } of steps) {
          const id = ids[which]!;
          const tokens = 10 + which;
          if (kind === 'ask') world.ask(id, prompt, tokens);
          else if (kind === 'begin') world.begin(id, prompt, tokens);
          else if (kind === 'compute') world.compute(id, size);
          else if (kind === 'to producer') world.deliver('producer');
          else if (kind === 'to consumer') world.deliver('consumer');
          else if (kind === 'announce') world.announce();
          else if (kind === 'move') world.move();
          else if (kind === 'tick') world.tick(250);
          else if (kind === 'long tick') world.tick(1_500);
          else if (kind === 'stop') world.tick(10_000);
          else if (kind === 'abort') world.abort(size);
          else if (kind === 'fail receive') world.failReceive(size);
          else if (kind === 'cut') world.cut(size % 2 === 0);
          else if (kind === 'connect') world.connect();
          else if (kind === 'restart consumer') world.restartConsumer(size % 2 === 0);
          else if (kind === 'restart producer') world.restartProducer();
          else if (kind === 'fail') world.fail(id);
          else if (kind === 'preempt') world.preempt(id);
          else if (kind === 'unwanted' && world.connected)
            world.runWants(world.consumer.wants.unwanted(P, id));
          world.check();
        }
        // and now everything gets its turn
        world.connect();
        for (const id of [...world.producer.running.keys()]) world.compute(id, 99);
        for (let round = 0; round < 60; round++) {
          for (let i = 0; i < 40; i++) {
            world.announce();
            world.move();
            world.failReceive(0);
            world.deliver('producer');
            world.deliver('consumer');
          }
          world.tick(500);
        }
        world.check();
        const { consumer, producer } = world;
        expect([...consumer.owners.values()].filter(({ outcome }) => outcome === undefined)).toEqual([]);
        expect(consumer.wants.isIdle && producer.grants.isIdle).toBe(true);
        // `settled` goes with the floor that the consumer's next message says
        expect(producer.grants.stats()).toMatchObject({ requests: 0, endedIds: 0 });
        expect([consumer.blocks.numFree, producer.blocks.numFree]).toEqual([CACHE, CACHE]);
      },
    );
    fc.assert(property, { numRuns: propertyRuns(100) });
    // The property says nothing about what never happened.
    for (const [what, count] of Object.entries(seen)) expect(count, what).toBeGreaterThan(0);
  });
});
