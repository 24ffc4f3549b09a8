/**
 * A producer and a consumer in one process: two schedulers (scheduler-world.ts) with the two ledgers of the native hand-over between them,
 * and a network and a stream of writes that go on when the test says so. A write copies what its source blocks hold when it lands, so one
 * that reads or reaches blocks which have become another's shows as wrong KV.
 */
import { type ErrorCode, PdError } from '../../src/errors.ts';
import type { SchedulerOptions } from '../../src/scheduler/scheduler.ts';
import type { GrantAction, WantAction } from '../../src/transfer/native/actions.ts';
import { Grants } from '../../src/transfer/native/grants.ts';
import type {
  Drawn,
  HandOverApi,
  HandOverUser,
  WantRequest,
} from '../../src/transfer/native/hand-over-api.ts';
import type { NativeMessage, Nonce, Ticket } from '../../src/transfer/native/messages.ts';
import { Wants } from '../../src/transfer/native/wants.ts';
import type { EngineRequestId, TransferId } from '../../src/wire/ids.ts';
import { SchedulerWorld } from './scheduler-world.ts';

const PRODUCER = '10.0.0.1:8082';
const CONSUMER = '10.0.0.2:8084';
const LEASE_MS = 4_000;
const UNBOUND_MS = 5_000;
const LOAD_MS = 3_000;

let serial = 0;
const hex = () => (serial++).toString(16).padStart(32, '0');

type Write = GrantAction & { kind: 'write' };

/** What both halves need of the world around them. */
interface Outside {
  readonly now: () => number;
  readonly send: (message: NativeMessage) => void;
}

class Half {
  readonly nonce = hex() as Nonce;
  readonly outside: Outside;
  alive = true;
  #user: HandOverUser | undefined;

  constructor(outside: Outside) {
    this.outside = outside;
  }

  serve(user: HandOverUser): void {
    this.#user = user;
  }

  get user(): HandOverUser {
    if (!this.#user) throw new PdError('INTERNAL', 'nobody is served');
    return this.#user;
  }

  layer(): void {}
  prefilled(): void {}
  sendFailed(): void {}
  stepEnded(): Promise<void> {
    return Promise.resolve();
  }
  want(_request: WantRequest): void {
    throw new PdError('INTERNAL', 'a producer wants nothing');
  }
  cancel(_requestId: EngineRequestId): void {}
  unwanted(_transferId: TransferId, _peer: string): void {}
  begin(_request: { transferId: TransferId; promptDigest: string; tokens: number }): void {
    throw new PdError('INTERNAL', 'a consumer fills nothing');
  }
  progress(_transferId: TransferId, _computed: number, _blocks: readonly number[]): void {}
  finish(_transferId: TransferId, _drawn: Drawn): void {}
  consumerWaits(_transferId: TransferId): number {
    return 0;
  }
  fail(_transferId: TransferId, _code: ErrorCode, _why: string): void {}
}

class ConsumerHalf extends Half implements HandOverApi {
  readonly wants: Wants;
  readonly grantWords = new Map<number, number>();
  readonly exposed = new Map<number, readonly number[]>();
  readonly #seqs = new Map<EngineRequestId, number>();

  constructor(outside: Outside, cacheBlocks: number) {
    super(outside);
    const { nonce } = this;
    this.wants = new Wants({ nonce, cacheBlocks, layers: 1, newTicket: () => hex() as Ticket, slots: 32 });
  }

  override want({ requestId, transferId, withinMs, prefillWithinMs: _, ...request }: WantRequest): void {
    const ask = { ...request, id: transferId, owner: requestId, transport: 'direct', withinMs } as const;
    const answer = this.wants.ask(ask, this.outside.now());
    if (typeof answer === 'string') {
      const error = { code: 'KV_LOAD_FAILED', message: `not asked: ${answer}`, context: {} } as const;
      this.user.loadEnded({ requestId, ok: false, error, quarantined: false });
      return;
    }
    this.#seqs.set(requestId, answer.seq);
    this.run(answer.actions);
  }

  override cancel(requestId: EngineRequestId): void {
    const seq = this.#seqs.get(requestId);
    if (seq === undefined) return;
    this.run(this.wants.abort(seq, this.outside.now()));
    this.#seqs.delete(requestId);
    const error = { code: 'REQUEST_ABORTED', message: 'given up', context: {} } as const;
    this.user.loadEnded({ requestId, ok: false, error, quarantined: this.exposed.has(seq) });
  }

  override unwanted(transferId: TransferId, peer: string): void {
    this.run(this.wants.unwanted(peer, transferId));
  }

  run(actions: readonly WantAction[]): void {
    const { books } = this.user;
    for (const action of actions) {
      switch (action.kind) {
        case 'send':
          this.outside.send(action.message);
          break;
        case 'expose':
          books.expose(`${action.seq}`, action.blocks);
          this.exposed.set(action.seq, action.blocks);
          break;
        case 'retract':
          books.retract(`${action.seq}`);
          this.exposed.delete(action.seq);
          break;
        case 'grant':
          this.grantWords.set(action.slot, action.seq);
          break;
        case 'loaded': {
          const requestId = action.owner as EngineRequestId;
          this.#seqs.delete(requestId);
          const { draw } = action;
          const ok = { requestId, ok: true, bytes: 1, milliseconds: 1 } as const;
          this.user.loadEnded({ ...ok, ...(draw && { draw: { tokens: draw.drawn, ...logprobsOf(draw) } }) });
          break;
        }
        case 'failed': {
          const requestId = action.owner as EngineRequestId;
          this.#seqs.delete(requestId);
          const { error, quarantined } = action;
          this.user.loadEnded({ requestId, ok: false, error, quarantined });
          break;
        }
        default:
          throw new PdError('INTERNAL', `no ${action.kind} where writes are direct`);
      }
    }
  }
}

class ProducerHalf extends Half implements HandOverApi {
  readonly grants: Grants;
  /** In stream order. `ready`: the step that computes it has done so. `looked`: it has read the grant word and goes on. */
  readonly stream: {
    readonly action: Write;
    readonly target: ConsumerEnd;
    ready: boolean;
    looked?: boolean;
  }[] = [];
  readonly #target: () => ConsumerEnd;
  readonly #step = new Set<TransferId>();

  constructor(outside: Outside, blockSize: number, target: () => ConsumerEnd) {
    super(outside);
    this.#target = target;
    this.grants = new Grants({
      nonce: this.nonce,
      blockSize,
      names: (id, peer) => id.includes(peer),
      unboundMs: UNBOUND_MS,
      leaseMs: LEASE_MS,
      endedMs: 20_000,
    });
  }

  override begin({
    transferId,
    promptDigest,
    tokens,
  }: {
    transferId: TransferId;
    promptDigest: string;
    tokens: number;
  }): void {
    this.run(this.grants.begin(transferId, promptDigest, tokens, this.outside.now()));
  }

  override progress(transferId: TransferId, computed: number, blocks: readonly number[]): void {
    if (computed > 0) this.#step.add(transferId);
    this.run(this.grants.progress(transferId, computed, blocks));
  }

  override layer(): void {
    this.#step.clear();
    for (const write of this.stream) write.ready = true;
  }

  override finish(transferId: TransferId, { tokens, samplingDigest, logprobs }: Drawn): void {
    const draw = { drawn: tokens, samplingDigest, ...(logprobs && { logprobs }) };
    this.run(this.grants.finish(transferId, draw, this.outside.now()));
  }

  override consumerWaits(): number {
    return this.grants.longestUnbound(CONSUMER, this.outside.now());
  }

  override fail(transferId: TransferId, code: ErrorCode, why: string): void {
    this.run(this.grants.fail(transferId, code, why, this.outside.now()));
  }

  run(actions: readonly GrantAction[]): void {
    const { books } = this.user;
    for (const action of actions) {
      if (action.kind === 'send') this.outside.send(action.message);
      else if (action.kind === 'unhold') books.unhold(action.sources);
      else if (action.kind === 'lease') books.lease(action.id);
      else if (action.kind === 'release') books.endLease(action.id);
      else if (action.kind === 'write') {
        books.hold(action.sources);
        this.stream.push({ action, target: this.#target(), ready: !this.#step.has(action.id) });
      }
    }
  }
}

interface ConsumerEnd {
  readonly world: SchedulerWorld;
  readonly half: ConsumerHalf;
}

interface ProducerEnd {
  readonly world: SchedulerWorld;
  readonly half: ProducerHalf;
}

export class PairWorld {
  now = 0;
  consumer: ConsumerEnd;
  producer: ProducerEnd;
  /** Producers that were killed while their writes were under way, which go nowhere. */
  readonly #options: { readonly consumer: SchedulerOptions; readonly producer: SchedulerOptions };
  readonly #keepMs: number;
  #toProducer: NativeMessage[] = [];
  #toConsumer: NativeMessage[] = [];

  /** `keepMs`: as `NativeParts.loadMs`, on the real clock: 0, or for ever. */
  constructor(consumer: SchedulerOptions, producer: SchedulerOptions, keepMs: number) {
    this.#options = { consumer, producer };
    this.#keepMs = keepMs;
    this.consumer = this.#newConsumer();
    this.producer = this.#newProducer();
    this.connect();
  }

  /** A new connection: what was under way is lost, and both say hello. */
  connect(): void {
    const { consumer, producer, now } = this;
    this.#toProducer = [];
    this.#toConsumer = [];
    const { numBlocks } = this.#options.consumer;
    producer.half.run(producer.half.grants.introduced(CONSUMER, consumer.half.nonce, numBlocks, now));
    consumer.half.run(consumer.half.wants.introduced(PRODUCER, producer.half.nonce, now));
  }

  deliver(to: 'producer' | 'consumer'): boolean {
    const { consumer, producer, now } = this;
    const message = (to === 'producer' ? this.#toProducer : this.#toConsumer).shift();
    switch (message?.cmd) {
      case 'WANT':
      case 'DROP':
      case 'ACK':
        producer.half.run(producer.half.grants.message(CONSUMER, message, now));
        break;
      case 'HELD':
      case 'DONE':
      case 'FAIL':
      case 'DROPPED':
        consumer.half.run(consumer.half.wants.message(PRODUCER, message, now));
        break;
      default:
    }
    return message !== undefined;
  }

  /** The first write of the stream goes on by half: it reads the grant word, or it lands. */
  land(): boolean {
    const { half, world } = this.producer;
    const [first] = half.stream;
    if (!first?.ready) return false;
    const { action, target } = first;
    const { slot, seq, sources, targets, launch, last } = action;
    if (slot === undefined) throw new PdError('INTERNAL', 'a write without a slot');
    if (!first.looked) {
      if (half.grants.mayLaunch(launch) && target.half.grantWords.get(slot) === seq) {
        first.looked = true;
        return true;
      }
    } else if (target.half.alive) {
      const { blockSize } = world;
      for (const [i, block] of targets.entries()) {
        if (!target.half.exposed.get(seq)?.includes(block)) {
          throw new Error(`block ${block} is written for ${seq}, which has it no more`);
        }
        const from = sources[i]! * blockSize;
        target.world.slots.set(world.slots.subarray(from, from + blockSize), block * blockSize);
      }
    }
    half.stream.shift();
    half.run(half.grants.landed(launch, this.now));
    if (first.looked && last && target === this.consumer) {
      const { wants } = target.half;
      target.half.run(wants.flag(PRODUCER, half.nonce, slot, seq));
    }
    return true;
  }

  tick(ms: number): void {
    this.now += ms;
    this.producer.half.run(this.producer.half.grants.tick(this.now));
    this.consumer.half.run(this.consumer.half.wants.tick(this.now));
  }

  killConsumer(): void {
    const dead = this.consumer.half;
    dead.alive = false;
    this.consumer = this.#newConsumer();
    this.producer.half.run(this.producer.half.grants.died(CONSUMER, dead.nonce, this.now));
    this.connect();
  }

  killProducer(): void {
    const dead = this.producer.half;
    dead.alive = false;
    this.producer = this.#newProducer();
    this.consumer.half.run(this.consumer.half.wants.died(PRODUCER, dead.nonce, this.now));
    this.connect();
  }

  check(): void {
    this.consumer.world.check();
    this.producer.world.check();
    const wrong = [
      ...this.consumer.half.wants.checkIntegrity(),
      ...this.producer.half.grants.checkIntegrity(),
    ];
    if (wrong.length > 0) throw new Error(wrong.join('; '));
  }

  get isIdle(): boolean {
    return this.consumer.half.wants.isIdle && this.producer.half.grants.isIdle;
  }

  #newConsumer(): ConsumerEnd {
    const options = this.#options.consumer;
    const half = new ConsumerHalf(
      { now: () => this.now, send: (message) => half.alive && this.#toProducer.push(message) },
      options.numBlocks,
    );
    return { half, world: new SchedulerWorld(options, 'consumer', { handOver: half, loadMs: LOAD_MS }) };
  }

  #newProducer(): ProducerEnd {
    const options = this.#options.producer;
    const half: ProducerHalf = new ProducerHalf(
      { now: () => this.now, send: (message) => half.alive && this.#toConsumer.push(message) },
      options.blockSize,
      () => this.consumer,
    );
    return { half, world: new SchedulerWorld(options, 'producer', { handOver: half, loadMs: this.#keepMs }) };
  }
}

function logprobsOf({ logprobs }: Pick<Drawn, 'logprobs'>): Pick<Drawn, 'logprobs'> {
  return logprobs ? { logprobs } : {};
}
