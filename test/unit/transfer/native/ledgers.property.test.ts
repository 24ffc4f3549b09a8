import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { BlockManager } from '../../../../src/kv/block-manager.ts';
import type { GrantAction, WantAction } from '../../../../src/transfer/native/actions.ts';
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
const limits = { maxBlocks: CACHE };
const P = 'producer';
const C = 'consumer';
let serial = 0;
const hex = () => (serial++).toString(16).padStart(32, '0');

/** One end's process: what dies with it. */
class Consumer {
  readonly nonce = hex() as Nonce;
  readonly blocks = new BlockManager(CACHE, BLOCK);
  /** Of which prompt the KV in each block is; by block. */
  readonly memory = new Array<string>(CACHE).fill('');
  readonly grantWords = new Map<number, number>();
  readonly wants: Wants;
  /** Blocks by the seq that may write them; and sequences by seq. */
  readonly exposed = new Map<number, readonly number[]>();
  readonly owners = new Map<string, { prompt: string; outcome?: string }>();
  alive = true;
  constructor() {
    this.wants = new Wants({
      nonce: this.nonce,
      cacheBlocks: CACHE,
      layers: 1,
      newTicket: () => hex() as Ticket,
      slots: 8,
    });
  }
}
class Producer {
  readonly nonce = hex() as Nonce;
  readonly blocks = new BlockManager(CACHE, BLOCK);
  readonly memory = new Array<string>(CACHE).fill('');
  readonly grants = new Grants({
    nonce: this.nonce,
    blockSize: BLOCK,
    names: () => true,
    unboundMs: 5_000,
    leaseMs: 4_000,
    endedMs: 20_000,
  });
  /** In stream order; `looked`: it has read the grant word and goes on. */
  readonly stream: { action: GrantAction & { kind: 'write' }; target: Consumer; looked?: boolean }[] = [];
  alive = true;
}

class World {
  now = 0;
  consumer = new Consumer();
  producer = new Producer();
  /** Consumers that died while a producer may still write to their memory. */
  readonly toProducer: AskedMessage[] = [];
  readonly toConsumer: AnsweredMessage[] = [];
  /** What has reached this producer from this consumer: a copy of it may come late. */
  readonly heard: AskedMessage[] = [];
  readonly running = new Map<TransferId, { prompt: string; tokens: number; computed: number }>();
  requests = 0;
  /** Another has the consumer's name, and neither end sees its connection end: nothing comes through until the next. */
  severed = false;

  connect() {
    const { consumer, producer } = this;
    this.severed = false;
    this.toProducer.length = 0;
    this.toConsumer.length = 0;
    this.runGrants(producer.grants.introduced(C, consumer.nonce, CACHE, this.now));
    this.runWants(consumer.wants.introduced(P, producer.nonce, this.now));
  }

  runGrants(actions: GrantAction[], producer = this.producer) {
    for (const action of actions) {
      switch (action.kind) {
        case 'send':
          this.toConsumer.push(decodeAnswered(encodeNative(action.message, limits), limits));
          break;
        case 'write':
          producer.blocks.hold(action.sources);
          producer.stream.push({ action, target: this.consumer });
          break;
        case 'unhold':
          producer.blocks.unhold(action.sources);
          break;
        case 'lease':
          producer.blocks.lease(action.id, producer.blocks.tableOf(action.id));
          break;
        case 'release':
          producer.blocks.endLease(action.id);
          break;
        case 'introduce':
        case 'bound':
        case 'ended':
        case 'drained':
          break;
      }
    }
  }

  runWants(actions: WantAction[]) {
    const { consumer } = this;
    for (const action of actions) {
      switch (action.kind) {
        case 'send':
          this.toProducer.push(decodeAsked(encodeNative(action.message, limits), limits));
          break;
        case 'expose':
          consumer.blocks.expose(`${action.seq}`, action.blocks);
          consumer.exposed.set(action.seq, action.blocks);
          break;
        case 'retract':
          consumer.blocks.retract(`${action.seq}`);
          consumer.exposed.delete(action.seq);
          break;
        case 'grant':
          consumer.grantWords.set(action.slot, action.seq);
          break;
        case 'loaded': {
          const owner = consumer.owners.get(action.owner)!;
          expect(owner.outcome).toBeUndefined();
          for (const block of consumer.blocks.tableOf(action.owner))
            expect(consumer.memory[block]).toBe(owner.prompt);
          if (action.draw) expect(action.draw.samplingDigest).toBe('s');
          this.settle(action.owner, 'loaded');
          break;
        }
        case 'failed':
          expect(consumer.owners.get(action.owner)?.outcome).toBeUndefined();
          this.settle(action.owner, 'failed');
          break;
        case 'receive':
        case 'reset-pair':
          throw new Error('there is no pair');
      }
    }
  }

  settle(owner: string, outcome: string) {
    this.consumer.owners.get(owner)!.outcome = outcome;
    this.consumer.blocks.free(owner);
  }

  ask(id: TransferId, prompt: string, tokens: number) {
    const { consumer } = this;
    if (!consumer.blocks.canAllocate(tokens)) return;
    const owner = `${id}/${this.requests++}`;
    const blocks = consumer.blocks.allocate(owner, tokens);
    // what others compute or load here must survive whatever is written late
    for (const block of blocks) consumer.memory[block] = 'poison';
    const answer = consumer.wants.ask(
      {
        peer: P,
        id,
        owner,
        promptDigest: prompt,
        samplingDigest: 's',
        tokens,
        skip: 0,
        blocks,
        transport: 'direct',
        withinMs: 3_000,
      },
      this.now,
    );
    if (typeof answer === 'string') {
      consumer.blocks.free(owner);
      return;
    }
    consumer.owners.set(owner, { prompt });
    this.runWants(answer.actions);
  }

  begin(id: TransferId, prompt: string, tokens: number) {
    const { producer } = this;
    if (this.running.has(id) || !producer.blocks.canAllocate(tokens) || producer.blocks.leaseOf(id)) return;
    producer.blocks.allocate(id, tokens);
    this.running.set(id, { prompt, tokens, computed: 0 });
    this.runGrants(producer.grants.begin(id, prompt, tokens, this.now));
  }

  compute(id: TransferId, by: number) {
    const request = this.running.get(id)!;
    const { producer } = this;
    request.computed = Math.min(request.tokens, request.computed + by);
    const table = producer.blocks.tableOf(id);
    for (const block of table.slice(0, Math.ceil(request.computed / BLOCK)))
      producer.memory[block] = request.prompt;
    this.runGrants(producer.grants.progress(id, request.computed, table));
    if (request.computed < request.tokens) return;
    this.runGrants(producer.grants.finish(id, { drawn: [1], samplingDigest: 's' }, this.now));
    producer.blocks.free(id);
    this.running.delete(id);
  }

  /** Its blocks go to others, and it begins again in what is free then. */
  preempt(id: TransferId) {
    const { producer } = this;
    const request = this.running.get(id);
    if (!request) return;
    this.runGrants(producer.grants.progress(id, 0, []));
    producer.blocks.free(id);
    request.computed = 0;
    const spare = 'spare';
    if (producer.blocks.canAllocate(BLOCK + request.tokens)) producer.blocks.allocate(spare, BLOCK);
    for (const block of producer.blocks.allocate(id, request.tokens)) producer.memory[block] = 'poison';
    producer.blocks.free(spare);
  }

  /** The first write of a stream goes one step on: it reads the grant word, or it lands, or (`broken`) it comes to nothing. */
  land(producer = this.producer, broken = false) {
    const [first] = producer.stream;
    if (!first) return;
    const { action, target } = first;
    if (!first.looked) {
      const granted = target.grantWords.get(action.slot!) === action.seq;
      if (producer.grants.mayLaunch(action.launch) && granted) {
        first.looked = true;
        return;
      }
    } else if (target.alive && !broken) {
      // the heart of it: whoever has this block is the one that wanted it written
      for (const [i, block] of action.targets.entries()) {
        expect(target.exposed.get(action.seq) ?? []).toContain(block);
        target.memory[block] = producer.memory[action.sources[i]!]!;
      }
    }
    producer.stream.shift();
    const failure = { code: 'KV_SEND_FAILED', message: 'the write failed' } as const;
    this.runGrants(producer.grants.landed(action.launch, this.now, broken ? failure : undefined), producer);
    if (broken || !first.looked || !action.last || target !== this.consumer || producer !== this.producer)
      return;
    this.runWants(this.consumer.wants.flag(P, producer.nonce, action.slot!, action.seq));
  }

  deliver(to: 'producer' | 'consumer') {
    if (this.severed) {
      this.toProducer.length = 0;
      this.toConsumer.length = 0;
    }
    if (to === 'producer') {
      const message = this.toProducer.shift();
      if (message) this.heard.push(message);
      if (message?.cmd === 'WANT' || message?.cmd === 'DROP' || message?.cmd === 'ACK')
        this.runGrants(this.producer.grants.message(C, message, this.now));
    } else {
      const message = this.toConsumer.shift();
      if (!message || message.cmd === 'HELLO' || message.cmd === 'PAIR') return;
      this.runWants(this.consumer.wants.message(P, message, this.now));
    }
  }

  copy(which: number) {
    const message = this.heard.at(-1 - which * 3);
    if (message?.cmd === 'WANT' || message?.cmd === 'DROP' || message?.cmd === 'ACK')
      this.runGrants(this.producer.grants.message(C, message, this.now));
  }

  tick(ms: number) {
    this.now += ms;
    this.runGrants(this.producer.grants.tick(this.now));
    this.runWants(this.consumer.wants.tick(this.now));
  }

  /** Another says hello under the consumer's address, whose connection so ends: it connects again. */
  stealName() {
    this.runGrants(this.producer.grants.introduced(C, hex() as Nonce, CACHE, this.now));
    this.connect();
  }

  killConsumer() {
    const dead = this.consumer;
    dead.alive = false;
    this.consumer = new Consumer();
    this.runGrants(this.producer.grants.died(C, dead.nonce, this.now));
    this.connect();
  }

  killProducer() {
    const dead = this.producer;
    dead.alive = false;
    dead.stream.length = 0;
    this.running.clear();
    this.producer = new Producer();
    this.runWants(this.consumer.wants.died(P, dead.nonce, this.now));
    this.connect();
  }

  check() {
    expect(this.consumer.blocks.checkIntegrity()).toEqual([]);
    expect(this.producer.blocks.checkIntegrity()).toEqual([]);
    expect(this.consumer.wants.checkIntegrity()).toEqual([]);
    expect(this.producer.grants.checkIntegrity()).toEqual([]);
  }
}

const ids = [0, 1, 2].map((i) => `r-${i}` as TransferId);
const step = fc.record({
  kind: fc.oneof(
    { weight: 3, arbitrary: fc.constantFrom('ask', 'begin', 'compute') },
    { weight: 8, arbitrary: fc.constantFrom('to producer', 'to consumer', 'land') },
    { weight: 2, arbitrary: fc.constantFrom('tick', 'abort', 'long tick', 'copy') },
    {
      weight: 1,
      arbitrary: fc.constantFrom(
        ...[
          'reconnect',
          'kill consumer',
          'kill producer',
          'fail',
          'unwanted',
          'stop',
          'name stolen',
          'severed',
          'preempt',
          'write fails',
          'prefilled',
          'known to fail',
          'drain',
        ],
      ),
    },
  ),
  id: fc.nat(2),
  prompt: fc.constantFrom('a', 'a', 'a', 'a', 'a', 'b'),
  size: fc.integer({ min: 1, max: 18 }),
});

describe('both ledgers', () => {
  it('let nobody write to what is another’s, end every want, and keep nothing', () => {
    fc.assert(
      fc.property(fc.array(step, { minLength: 120, maxLength: 250, size: 'max' }), (steps) => {
        const world = new World();
        world.connect();
        for (const { kind, id: which, prompt, size } of steps) {
          const id = ids[which]!;
          const tokens = 10 + which;
          const { consumer, producer, now } = world;
          if (kind === 'ask') world.ask(id, prompt, tokens);
          else if (kind === 'begin') world.begin(id, prompt, tokens);
          else if (kind === 'compute' && world.running.has(id)) world.compute(id, size);
          else if (kind === 'to producer') world.deliver('producer');
          else if (kind === 'to consumer') world.deliver('consumer');
          else if (kind === 'land') world.land();
          else if (kind === 'copy') world.copy(size);
          else if (kind === 'tick') world.tick(250);
          else if (kind === 'long tick') world.tick(1_500);
          else if (kind === 'stop') world.tick(10_000);
          else if (kind === 'reconnect') world.connect();
          else if (kind === 'name stolen') world.stealName();
          else if (kind === 'severed') world.severed = true;
          else if (kind === 'preempt') world.preempt(id);
          else if (kind === 'write fails') world.land(world.producer, true);
          else if (kind === 'prefilled' || kind === 'known to fail') {
            const seqs = [...consumer.exposed.keys()];
            const seq = seqs[size % Math.max(1, seqs.length)];
            const error = { code: 'KV_SEND_FAILED', message: 'says the proxy', context: {} } as const;
            if (seq === undefined) continue;
            if (kind === 'prefilled') consumer.wants.hasten(seq, 1_000, now);
            else world.runWants(consumer.wants.fail(seq, error, now));
          } else if (kind === 'drain' && size === 1) {
            world.runGrants(producer.grants.shutdown(now));
            for (const id of world.running.keys()) producer.blocks.free(id);
            world.running.clear();
          } else if (kind === 'kill consumer') world.killConsumer();
          else if (kind === 'kill producer') world.killProducer();
          else if (kind === 'unwanted') world.runWants(consumer.wants.unwanted(P, id));
          else if (kind === 'abort') {
            const [seq] = consumer.exposed.keys();
            const owner = [...consumer.owners].find(
              ([name, { outcome }]) =>
                outcome === undefined &&
                seq !== undefined &&
                consumer.blocks.tableOf(name)[0] === consumer.exposed.get(seq)![0],
            );
            if (seq !== undefined && owner) {
              world.runWants(consumer.wants.abort(seq, now));
              world.settle(owner[0], 'aborted');
            }
          } else if (kind === 'fail') {
            world.runGrants(producer.grants.fail(id, 'KV_SEND_FAILED', 'made room', now));
            if (world.running.delete(id)) producer.blocks.free(id);
          }
          world.check();
        }
        // as silence.ts sees to
        if (world.severed) world.connect();
        // and now everything gets its turn
        for (const id of [...world.running.keys()]) world.compute(id, 99);
        for (let round = 0; round < 60; round++) {
          for (let i = 0; i < 40; i++) {
            world.land();
            world.deliver('producer');
            world.deliver('consumer');
          }
          world.tick(500);
        }
        world.check();
        const { consumer, producer } = world;
        expect([...consumer.owners.values()].filter(({ outcome }) => outcome === undefined)).toEqual([]);
        expect(consumer.wants.isIdle && producer.grants.isIdle).toBe(true);
        expect(producer.grants.stats()).toMatchObject({ requests: 0, endedIds: 0, settled: 0 });
        expect([consumer.blocks.numFree, producer.blocks.numFree]).toEqual([CACHE, CACHE]);
      }),
      { numRuns: propertyRuns(100) },
    );
  });
});
