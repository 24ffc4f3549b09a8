/**
 * The native hand-over on the core thread: owns both ledgers, carries out what they decide, and tells the connector what came of it. Bytes
 * that travel on pairs, and all messages, go by the transfer thread (wire.ts).
 *
 *   connector --want, cancel------------> Wants  --ask, receive--> wire --> producer
 *             <--loadEnded--------------- Wants  <--answered------ wire <--
 *   connector --begin, progress, finish-> Grants <--asked--------- wire <-- consumer
 *             --layer-------------------> writes --answer, write-> wire -->
 */
import { randomBytes } from 'node:crypto';
import { setImmediate } from 'node:timers';
import { type Deferred, deferred } from '../../deferred.ts';
import type { EventRef } from '../../device/device.ts';
import { type ErrorCode, type ErrorData, PdError, unreachable } from '../../errors.ts';
import { formatHostPort } from '../../net/address.ts';
import type { Logger } from '../../observability/log.ts';
import type { MetricsPage } from '../../observability/metrics.ts';
import { NO_TOKEN, type OwnerPage, SLOTS, type SlotState } from '../../transport/direct/page.ts';
import { type EngineRequestId, peerAddressOf, type TransferId } from '../../wire/ids.ts';
import { Failures } from '../failures.ts';
import type { TransferState } from '../types.ts';
import type { FromWire, NativeInit, ToWire } from './channel.ts';
import type { DirectWays, DirectWrite } from './direct.ts';
import { type GrantAction, Grants } from './grants.ts';
import type {
  Drawn,
  HandOverApi,
  HandOverBooks,
  HandOverStage,
  HandOverState,
  HandOverUser,
  WantOutcome,
  WantRequest,
} from './hand-over-api.ts';
import {
  type HelloMessage,
  type NativeTransport,
  type Nonce,
  type ProducerMessage,
  type Ticket,
  TRANSPORTS,
} from './messages.ts';
import { type WantAction, Wants } from './wants.ts';

export interface HandOverOptions {
  readonly init: NativeInit;
  /** Where the wire is told what to do, and tells what came (`TransferEngine.native`). */
  readonly wire: (hear: (event: FromWire) => void) => (command: ToWire) => void;
  readonly role: 'producer' | 'consumer';
  readonly rank: number;
  /** How long KV that nobody asks for is kept, ms. */
  readonly leaseMs: number;
  /** Where `direct` may be used here. */
  readonly direct?: DirectWays;
  readonly log: Logger;
  /** Of the core thread. */
  readonly metrics: MetricsPage;
  readonly onStage?: (id: TransferId, stage: HandOverStage) => void;
}

/** A `want` that has no outcome yet. */
interface Load {
  readonly request: WantRequest;
  readonly began: number;
  /** While it has not been asked for. */
  deadline: number;
  /** Once it has been asked for. */
  seq: number | undefined;
  transport: NativeTransport | undefined;
}

/** A producer that has said hello on the connection of now. */
interface Producer {
  readonly hello: HelloMessage;
  /** How its bytes come; undefined while that is being found out. */
  transport: NativeTransport | undefined;
  /** Until when `direct` is waited for. */
  patience: NodeJS.Timeout | undefined;
}

/** A slot in the page shared with a producer, granted to the want of that seq. */
interface Slot {
  readonly peer: string;
  readonly nonce: Nonce;
  readonly slot: number;
  readonly seq: number;
  readonly since: number;
  flagged: boolean;
}

/** A write that has not landed. */
interface Write {
  readonly action: Extract<GrantAction, { readonly kind: 'write' }>;
  /** Layers below have been launched, or will not be. */
  next: number;
  /** Parts under way, or one for all launches of `direct`. */
  parts: number;
  /** By `direct`, once there is room for its lists. */
  direct: DirectWrite | undefined;
  failure: { readonly code: ErrorCode; readonly message: string } | undefined;
}

interface Step {
  /** Requests that this step computes. */
  readonly ids: Set<TransferId>;
  /** Writes that wait for its layers. */
  readonly writes: Set<Write>;
  /** Of each layer that has been told. */
  readonly events: (EventRef | undefined)[];
  readonly number: number;
  /** Parts that still need an event of it. */
  gathering: number;
  readonly gathered: Deferred<void>;
}

const TICK_MS = 250;
/** For a producer of this host to map our cache, before its bytes go by a pair. */
const DIRECT_MS = 5_000;
const LOOK_MS = 1;
/** From WANT to KV that its producer holds already. */
const AT_ONCE_MS = 2;
/** How long a WANT may wait for its request, which may stand in the producer's queue; whoever gives up earlier says DROP. */
const UNBOUND_MS = 600_000;
/** Bytes of one PART, where its layers are there at once: no operation then takes longer than its deadline. */
const PART_BYTES = 128 * 2 ** 20;
/** Of a sampling digest. */
const DIGEST_BYTES = 16;
/** Ids that a peer is still to be told of, or whose failure came before their want. */
const MOST_REMEMBERED = 1_024;
/** For peers to hear the ends of their WANTs when this worker stops. */
const CLOSE_MS = 3_000;

export class HandOver implements HandOverApi {
  readonly #options: HandOverOptions;
  readonly #grants: Grants;
  readonly #wants: Wants;
  readonly #tell: (command: ToWire) => void;
  readonly #loads = new Map<EngineRequestId, Load>();
  readonly #exposed = new Set<number>();
  readonly #producers = new Map<string, Producer>();
  /** Where a process was heard of last; those linked by `direct`. */
  readonly #peers = new Map<Nonce, string>();
  readonly #slots = new Map<number, Slot>();
  #looking = false;
  /** Writes by `direct` that wait for room. */
  readonly #crowded = new Set<Write>();
  readonly #writes = new Map<number, Write>();
  /** Ids that nobody wants, by the producer that is to be told once it has said hello. */
  readonly #unwanted = new Map<TransferId, string>();
  readonly #failures = new Failures({ now });
  /** What producers have told of requests that have not been wanted yet. */
  readonly #failed = new Map<TransferId, ErrorData>();
  #step: Step | undefined;
  #numSteps = 0;
  /** Steps with parts that still need an event of them. */
  readonly #gathering = new Map<number, Step>();
  #user: HandOverUser | undefined;
  #tasks: (() => void)[] = [];
  #working = false;
  #timer: NodeJS.Timeout | undefined;
  #closed: Promise<void> | undefined;
  #settled = deferred<void>();

  constructor(options: HandOverOptions) {
    const { init, role, rank, leaseMs } = options;
    const { nonce, shape } = init;
    this.#options = options;
    const other = role === 'producer' ? 'decode' : 'prefill';
    this.#grants = new Grants({
      nonce,
      blockSize: shape.blockSize,
      names: (id, peer) => {
        const address = peerAddressOf(id, other);
        return address !== undefined && formatHostPort({ ...address, port: address.port + rank }) === peer;
      },
      unboundMs: UNBOUND_MS,
      leaseMs,
    });
    this.#wants = new Wants({
      nonce,
      cacheBlocks: shape.blocks,
      layers: shape.layers,
      newTicket: () => randomBytes(16).toString('hex') as Ticket,
      slots: SLOTS,
    });
    options.direct?.serve({
      open: (nonce) => this.#directOpen(nonce),
      refused: (nonce, why) => this.#directRefused(nonce, why),
      died: (nonce) => this.#died(nonce),
    });
    this.#tell = options.wire((event) => this.#hear(event));
  }

  serve(user: HandOverUser): void {
    this.#user = user;
  }

  want(request: WantRequest): void {
    const { requestId, transferId, peer, withinMs, prefillWithinMs = 0 } = request;
    const began = now();
    const deadline = began + withinMs + prefillWithinMs;
    const load: Load = { request, began, deadline, seq: undefined, transport: undefined };
    this.#loads.set(requestId, load);
    this.#stage(transferId, 'wanted');
    const failed = this.#failed.get(transferId);
    this.#failed.delete(transferId);
    if (failed) {
      this.#fail(load, failed, false);
      return;
    }
    if (this.#producers.get(peer)?.transport) this.#ask(load);
    else this.#tell({ kind: 'connect', peer });
    this.#arm();
  }

  cancel(requestId: EngineRequestId): void {
    const load = this.#loads.get(requestId);
    if (!load) return;
    const { seq } = load;
    if (seq !== undefined) this.#want(() => this.#wants.abort(seq, now()));
    const error = {
      code: 'REQUEST_ABORTED',
      message: `request ${requestId} does not want its KV any more`,
      context: {},
    } as const;
    // what the ledger had to say first has been said
    this.#work(() => this.#fail(load, error, seq !== undefined && this.#exposed.has(seq)));
  }

  unwanted(transferId: TransferId, peer: string): void {
    if (this.#producers.has(peer)) {
      this.#want(() => this.#wants.unwanted(peer, transferId));
      return;
    }
    remember(this.#unwanted, transferId, peer);
    this.#tell({ kind: 'connect', peer });
  }

  prefilled(transferId: TransferId): void {
    const load = this.#loadOf(transferId);
    if (!load) return;
    const { withinMs } = load.request;
    load.deadline = Math.min(load.deadline, now() + withinMs);
    if (load.seq !== undefined) this.#wants.hasten(load.seq, withinMs, now());
  }

  sendFailed(transferId: TransferId, reason: ErrorData): void {
    const load = this.#loadOf(transferId);
    if (!load) remember(this.#failed, transferId, reason);
    else if (load.seq === undefined) this.#fail(load, reason, false);
    else {
      const { seq } = load;
      this.#want(() => this.#wants.fail(seq, reason, now()));
    }
  }

  begin(request: {
    readonly transferId: TransferId;
    readonly promptDigest: string;
    readonly tokens: number;
  }): void {
    const { transferId, promptDigest, tokens } = request;
    this.#grant(() => this.#grants.begin(transferId, promptDigest, tokens, now()));
  }

  progress(transferId: TransferId, computed: number, blocks: readonly number[]): void {
    if (computed > 0) this.#stepOf().ids.add(transferId);
    this.#grant(() => this.#grants.progress(transferId, computed, blocks));
  }

  layer(index: number, ready?: EventRef): void {
    const step = this.#step;
    if (!step) return;
    step.events.push(ready);
    for (const write of step.writes) this.#launch(write, index + 1, ready);
  }

  stepEnded(): Promise<void> {
    const step = this.#step;
    this.#step = undefined;
    if (!step) return Promise.resolve();
    for (const write of step.writes) {
      if (write.next >= this.#layers) continue;
      if (this.#crowded.delete(write) && step.events.length === this.#layers) {
        this.#launch(write, this.#layers, undefined);
        continue;
      }
      write.failure ??= {
        code: 'KV_SEND_FAILED',
        message: 'the step that was to compute it did not end well',
      };
      write.next = this.#layers;
      this.#settle(write);
    }
    return step.gathering > 0 ? step.gathered.promise : Promise.resolve();
  }

  finish(transferId: TransferId, { tokens, logprobs, samplingDigest }: Drawn): void {
    const draw = { drawn: tokens, ...(logprobs && { logprobs }), samplingDigest };
    this.#grant(() => this.#grants.finish(transferId, draw, now()));
  }

  fail(transferId: TransferId, code: ErrorCode, why: string): void {
    this.#grant(() => this.#grants.fail(transferId, code, why, now()));
  }

  state(): HandOverState {
    const loads = [...this.#loads.values()];
    return {
      producers: [...this.#producers].map(([peer, { transport }]) => ({ peer, transport })),
      connecting: loads.filter(({ seq }) => seq === undefined).length,
      wants: this.#wants.stats(),
      grants: this.#grants.stats(),
    };
  }

  /** With the loads that are waited for and those that failed lately, as the transfer engine tells its own. */
  told(): { readonly state: HandOverState } & Pick<TransferState, 'waiting' | 'failures'> {
    const at = now();
    const waiting = [...this.#loads.values()].map(({ request, began, deadline }) => ({
      requestId: request.requestId,
      tensorId: request.transferId,
      peer: request.peer,
      sinceMs: Math.round(at - began),
      deadlineMs: Math.round(deadline - began),
      nearMisses: [],
      ...(deadline - began > request.withinMs && { prefilling: true as const }),
    }));
    return { state: this.state(), waiting, failures: this.#failures.state() };
  }

  /** What is wrong, in words; empty when all is well. */
  checkIntegrity(): string[] {
    return [...this.#wants.checkIntegrity(), ...this.#grants.checkIntegrity()];
  }

  /**
   * Nothing more is begun; every WANT is answered and every write lands, as far as that goes within seconds. Every load has ended then.
   * Before the engine is disposed. Idempotent.
   */
  close(): Promise<void> {
    this.#closed ??= this.#close();
    return this.#closed;
  }

  async #close(): Promise<void> {
    for (const requestId of [...this.#loads.keys()]) this.cancel(requestId);
    this.#grant(() => this.#grants.shutdown(now()));
    const late = setTimeout(() => this.#settled.resolve(), CLOSE_MS);
    this.#checkSettled();
    await this.#settled.promise;
    clearTimeout(late);
    clearTimeout(this.#timer);
    this.#timer = undefined;
    // A producer that never answers must not keep this thread: neither its mapping nor its page is waited for any more.
    for (const { patience } of this.#producers.values()) clearTimeout(patience);
    this.#slots.clear();
  }

  #stepOf(): Step {
    this.#step ??= {
      ids: new Set(),
      writes: new Set(),
      number: ++this.#numSteps,
      events: [],
      gathering: 0,
      gathered: deferred<void>(),
    };
    return this.#step;
  }

  get #layers(): number {
    return this.#options.init.shape.layers;
  }

  get #books(): HandOverBooks {
    if (!this.#user) throw new PdError('INTERNAL', 'the hand-over serves nobody yet');
    return this.#user.books;
  }

  #hear(event: FromWire): void {
    switch (event.kind) {
      case 'introduced':
        if (event.way === 'to') this.#meet(event.peer, event.hello);
        else this.#admit(event.peer, event.hello);
        return;
      case 'asked':
        this.#grant(() => this.#grants.message(event.peer, event.message, now()));
        return;
      case 'answered':
        this.#want(() => this.#wants.message(event.peer, event.message, now()));
        return;
      case 'lost':
        if (event.way === 'from') this.#grant(() => this.#grants.unreachable(event.peer, now()));
        else this.#lose(event.peer, event.error);
        return;
      case 'gathered': {
        const step = this.#gathering.get(event.step);
        if (!step || --step.gathering > 0) return;
        this.#gathering.delete(step.number);
        step.gathered.resolve();
        return;
      }
      case 'written': {
        const write = this.#writes.get(event.launch);
        if (!write) return;
        write.parts--;
        if (event.error) write.failure ??= event.error;
        this.#settle(write);
        return;
      }
      case 'received':
        this.#want(() => this.#wants.received(event.receipt, event.error === undefined, now()));
        return;
      default:
        unreachable(event, 'event of the native wire');
    }
  }

  /** A producer has answered our hello. */
  #meet(peer: string, hello: HelloMessage): void {
    const producer: Producer = { hello, transport: undefined, patience: undefined };
    const { direct } = this.#options;
    this.#producers.set(peer, producer);
    this.#wants.pairOpened(peer);
    this.#want(() => this.#wants.introduced(peer, hello.from, now()));
    for (const [id, whom] of this.#unwanted) {
      if (whom !== peer) continue;
      this.#unwanted.delete(id);
      this.unwanted(id, peer);
    }
    if (!direct || !this.#mayBeDirect(hello)) {
      this.#takePair(peer, producer);
      return;
    }
    this.#peers.set(hello.from, peer);
    if (direct.pageOf(hello.from)) {
      this.#ready(peer, producer, 'direct');
      return;
    }
    direct.expect(hello.from);
    const why = `its producer has not mapped the cache within ${DIRECT_MS / 1_000} s`;
    producer.patience = setTimeout(() => this.#directRefused(hello.from, why), DIRECT_MS);
  }

  #mayBeDirect({ transports, direct }: HelloMessage): boolean {
    const { init } = this.#options;
    const both = init.transports.includes('direct') && transports.includes('direct');
    return both && direct !== undefined && direct.bootId === init.direct?.bootId;
  }

  /** By a pair: of both ends' ways the first that is one. */
  #takePair(peer: string, producer: Producer): void {
    const { transports } = producer.hello;
    const way = this.#options.init.transports.find((one) => one !== 'direct' && transports.includes(one));
    if (!way) {
      const message = `no way for KV is open at both ends: direct is refused, and ${peer} has no other`;
      this.#lose(peer, { code: 'TRANSPORT_MISMATCH', message, context: { peer } });
      // the next want finds out anew
      this.#tell({ kind: 'reset', peer, why: message });
      return;
    }
    this.#ready(peer, producer, way);
  }

  #ready(peer: string, producer: Producer, transport: NativeTransport): void {
    clearTimeout(producer.patience);
    producer.patience = undefined;
    producer.transport = transport;
    for (const load of this.#waitingFor(peer)) this.#ask(load);
  }

  #directOpen(nonce: Nonce): void {
    const peer = this.#peers.get(nonce);
    const producer = peer === undefined ? undefined : this.#producers.get(peer);
    if (peer === undefined) return;
    const { log, role } = this.#options;
    log.info({ peer }, `🤝direct Success, ${role === 'producer' ? `👉${peer}` : `👈${peer}`}`);
    // what is wanted already goes on as it began
    if (producer?.hello.from === nonce) this.#ready(peer, producer, 'direct');
  }

  #directRefused(nonce: Nonce, why: string): void {
    const peer = this.#peers.get(nonce);
    if (peer === undefined) return;
    this.#options.log.warn(
      { peer },
      `direct writes between this worker and ${peer} are not possible, KV goes another way: ${why}`,
    );
    const producer = this.#producers.get(peer);
    if (producer?.hello.from === nonce && !producer.transport) this.#takePair(peer, producer);
  }

  /** Its socket has ended. */
  #died(nonce: Nonce): void {
    const peer = this.#peers.get(nonce);
    if (peer === undefined) return;
    this.#peers.delete(nonce);
    this.#grant(() => this.#grants.died(peer, nonce, now()));
    this.#want(() => this.#wants.died(peer, nonce, now()));
  }

  /** A consumer has said hello. */
  #admit(peer: string, hello: HelloMessage): void {
    const { from, cache, direct } = hello;
    this.#grant(() => this.#grants.introduced(peer, from, cache.blocks, now()));
    if (!direct || !this.#mayBeDirect(hello)) return;
    this.#peers.set(from, peer);
    this.#options.direct?.connect(peer, from, direct.path);
  }

  /** The connection to a producer is over, or never was. */
  #lose(peer: string, error: ErrorData): void {
    clearTimeout(this.#producers.get(peer)?.patience);
    this.#producers.delete(peer);
    for (const [id, whom] of this.#unwanted) if (whom === peer) this.#unwanted.delete(id);
    for (const load of this.#waitingFor(peer)) this.#fail(load, error, false);
    this.#want(() => this.#wants.unreachable(peer, error, now()));
  }

  #waitingFor(peer: string): Load[] {
    return [...this.#loads.values()].filter(({ seq, request }) => seq === undefined && request.peer === peer);
  }

  #loadOf(transferId: TransferId): Load | undefined {
    for (const load of this.#loads.values()) if (load.request.transferId === transferId) return load;
    return undefined;
  }

  /** Once its producer has said hello and the way of the bytes is known. */
  #ask(load: Load): void {
    this.#want(() => {
      const { requestId, transferId, peer, promptDigest, samplingDigest, tokens, skip, blocks } =
        load.request;
      const producer = this.#producers.get(peer);
      if (!producer?.transport || this.#loads.get(requestId) !== load || load.seq !== undefined) return [];
      const most = producer.hello.cache.blocks;
      if (skip + blocks.length > most) {
        const message = `a prompt of ${skip + blocks.length} blocks does not fit the ${most} of ${peer}`;
        this.#fail(load, { code: 'LIMIT_EXCEEDED', message, context: {} }, false);
        return [];
      }
      const asked = this.#wants.ask(
        {
          peer,
          id: transferId,
          owner: requestId,
          promptDigest,
          samplingDigest,
          tokens,
          skip,
          blocks,
          transport: producer.transport,
          withinMs: Math.max(load.deadline - now(), 0),
        },
        now(),
      );
      // where it has no slot free it is asked for again, as long as there is time
      if (asked === 'slots' || asked === 'unknown') return [];
      if (asked === 'quarantine') {
        const message = `${peer} may still write to more than a quarter of this cache, so it is asked for nothing more`;
        this.#fail(load, { code: 'KV_LOAD_FAILED', message, context: { peer } }, false);
        return [];
      }
      load.seq = asked.seq;
      load.transport = producer.transport;
      this.#stage(transferId, 'asked');
      this.#options.log.debug(
        { requestId, transferId, peer, seq: asked.seq, tokens, skip, blocks: blocks.length },
        `WANT ${asked.seq} of ${peer}`,
      );
      return asked.actions;
    });
  }

  #fail(load: Load, error: ErrorData, quarantined: boolean): void {
    const { requestId, transferId, peer } = load.request;
    const own = ['KV_LOAD_TIMEOUT', 'KV_LOAD_FAILED', 'REQUEST_ABORTED', 'ENGINE_CLOSED'].includes(
      error.code,
    );
    const message = `KV of ${transferId} did not come from ${peer}: ${error.message}`;
    this.#failures.note('load', peer, PdError.fromData(error));
    const told = own
      ? error
      : ({
          code: 'KV_LOAD_FAILED',
          message,
          context: { requestId, transferId, peer },
          cause: error,
        } as const);
    this.#end(load, { requestId, ok: false, error: told, quarantined });
  }

  #end(load: Load, outcome: WantOutcome): void {
    if (this.#loads.get(outcome.requestId) !== load) return;
    this.#loads.delete(outcome.requestId);
    this.#user?.loadEnded(outcome);
  }

  /** Layers up to `end`, as far as they have not been launched. */
  #launch(write: Write, end: number, ready: EventRef | undefined): void {
    const { launch, transport } = write.action;
    if (write.next >= end || this.#crowded.has(write)) return;
    if (!this.#grants.mayLaunch(launch)) write.next = this.#layers;
    else if (transport === 'direct') this.#launchDirect(write, end, ready);
    else this.#sendParts(write, end, ready);
    if (write.next >= this.#layers && write.action.last) this.#stage(write.action.id, 'launched');
    this.#settle(write);
  }

  #launchDirect(write: Write, end: number, ready: EventRef | undefined): void {
    try {
      write.direct ??= this.#beginDirect(write);
      // all of it once there is room, when its step is over
      if (!write.direct) this.#crowded.add(write);
      else {
        write.direct.layers(write.next, end - write.next, ready);
        write.next = end;
      }
    } catch (error) {
      this.#giveUp(write, PdError.from(error));
    }
  }

  #beginDirect({ action }: Write): DirectWrite | undefined {
    const { nonce, seq, slot, sources, targets, last } = action;
    const { direct } = this.#options;
    if (!direct || slot === undefined)
      throw new PdError('DIRECT_REFUSED', 'a WANT by direct, which is off here');
    return direct.begin(nonce, { seq, slot, sources, targets, last });
  }

  #giveUp(write: Write, { code, message }: PdError): void {
    write.failure ??= { code, message };
    write.next = this.#layers;
  }

  #sendParts(write: Write, end: number, ready: EventRef | undefined): void {
    const { launch, peer, nonce: to, seq, ticket, place, sources } = write.action;
    const { nonce: from, shape } = this.#options.init;
    const most = Math.max(Math.floor(PART_BYTES / (sources.length * shape.blockBytes)), 1);
    const blocks = Int32Array.from(sources);
    const step = ready && ready.kind !== 'host' ? this.#step : undefined;
    for (; write.next < end; ) {
      const layers = Math.min(end - write.next, most);
      write.parts++;
      if (step) {
        step.gathering++;
        this.#gathering.set(step.number, step);
      }
      const of = { from, to, seq, ticket } as const;
      const what = { layer: write.next, layers, block: place, blocks: sources.length };
      this.#tell({
        kind: 'write',
        peer,
        launch,
        part: { cmd: 'PART', ...of, ...what },
        blocks,
        ...(step && ready && { ready: { event: ready, step: step.number } }),
      });
      write.next += layers;
    }
  }

  #settle(write: Write): void {
    const { launch } = write.action;
    if (write.next < this.#layers || write.parts > 0) return;
    const { direct } = write;
    if (direct) {
      write.direct = undefined;
      write.parts++;
      const { sources } = write.action;
      const { shape } = this.#options.init;
      direct
        .landed()
        .then(() => {
          const bytes = sources.length * shape.layers * shape.blockBytes;
          if (!write.failure) this.#options.metrics.inc('pd_kv_sent_bytes_total', bytes);
        })
        .catch((error: unknown) => this.#giveUp(write, PdError.from(error)))
        .finally(() => {
          write.parts--;
          this.#settle(write);
        });
      return;
    }
    if (!this.#writes.delete(launch)) return;
    this.#crowded.delete(write);
    this.#step?.writes.delete(write);
    if (write.action.last) this.#stage(write.action.id, 'landed');
    this.#grant(() => this.#grants.landed(launch, now(), write.failure));
    for (const other of [...this.#crowded]) {
      if (this.#step?.writes.has(other)) continue;
      this.#crowded.delete(other);
      this.#launch(other, this.#layers, undefined);
    }
  }

  #grant(told: () => readonly GrantAction[]): void {
    this.#work(() => {
      for (const action of told()) this.#doGrant(action);
    });
  }

  #want(told: () => readonly WantAction[]): void {
    this.#work(() => {
      for (const action of told()) this.#doWant(action);
    });
  }

  /** One after the other: what a ledger has decided is done before either is told anything else, whoever calls meanwhile. */
  #work(task: () => void): void {
    this.#tasks.push(task);
    if (this.#working) return;
    this.#working = true;
    try {
      for (let next = this.#tasks.shift(); next; next = this.#tasks.shift()) next();
    } finally {
      this.#working = false;
    }
    this.#arm();
    if (this.#closed) this.#checkSettled();
  }

  #doGrant(action: GrantAction): void {
    switch (action.kind) {
      case 'send':
        // first where its reader spins already
        if (action.slot !== undefined) this.#endInPage(action.slot, action.message);
        this.#tell({ kind: 'answer', peer: action.peer, message: action.message });
        return;
      case 'introduce':
        this.#tell({ kind: 'introduce', peer: action.peer });
        return;
      case 'write':
        this.#begin(action);
        return;
      case 'unhold':
        this.#books.unhold(action.sources);
        this.#user?.freed();
        return;
      case 'lease':
        this.#books.lease(action.id);
        return;
      case 'release':
        this.#books.endLease(action.id);
        this.#user?.freed();
        return;
      case 'drained':
        this.#options.direct?.release(action.nonce);
        return;
      case 'bound':
        this.#stage(action.id, 'bound');
        return;
      case 'ended':
        return;
      default:
        unreachable(action, 'action of the grants');
    }
  }

  #begin(action: Write['action']): void {
    this.#books.hold(action.sources);
    const write: Write = { action, next: 0, parts: 0, direct: undefined, failure: undefined };
    this.#writes.set(action.launch, write);
    const step = this.#step;
    if (!step?.ids.has(action.id)) {
      this.#launch(write, this.#layers, undefined);
      return;
    }
    step.writes.add(write);
    // Each layer behind its own event: a step is often enqueued before it has begun, and the last of it is far away.
    const { events } = step;
    for (let end = 1; end <= events.length; end++) {
      if (end === events.length || events[end] !== events[end - 1]) this.#launch(write, end, events[end - 1]);
    }
  }

  #doWant(action: WantAction): void {
    switch (action.kind) {
      case 'send':
        this.#tell({ kind: 'ask', peer: action.peer, message: action.message });
        return;
      case 'expose':
        this.#books.expose(exposureOf(action.seq), action.blocks);
        this.#exposed.add(action.seq);
        return;
      case 'retract':
        this.#exposed.delete(action.seq);
        this.#books.retract(exposureOf(action.seq));
        this.#user?.freed();
        return;
      case 'loaded': {
        const load = this.#loads.get(action.owner as EngineRequestId);
        if (load?.seq === action.seq) this.#loaded(load, action);
        return;
      }
      case 'failed': {
        const load = this.#loads.get(action.owner as EngineRequestId);
        if (load?.seq === action.seq) this.#fail(load, action.error, action.quarantined);
        return;
      }
      case 'receive': {
        const { peer, receipt, part, into } = action;
        this.#tell({
          kind: 'receive',
          peer,
          receipt,
          part,
          ...(into !== 'scratch' && { blocks: Int32Array.from(into) }),
        });
        return;
      }
      case 'reset-pair':
        this.#tell({ kind: 'reset', peer: action.peer, why: 'PART is out of step' });
        return;
      case 'grant':
        this.#grantSlot(action);
        return;
      default:
        unreachable(action, 'action of the wants');
    }
  }

  #grantSlot({ peer, nonce, slot, seq }: Extract<WantAction, { readonly kind: 'grant' }>): void {
    const page = this.#options.direct?.pageOf(nonce);
    if (seq > 0) {
      page?.grant(slot, seq);
      this.#slots.set(seq, { peer, nonce, slot, seq, since: now(), flagged: false });
      this.#look();
      return;
    }
    page?.revoke(slot);
    for (const [one, held] of this.#slots) {
      if (held.nonce === nonce && held.slot === slot) this.#slots.delete(one);
    }
  }

  /**
   * Looks into the pages until nothing is granted: each millisecond; all the time once the last chunk of one is under way, and for a moment
   * after its WANT, as KV that is computed already is written at once.
   */
  #look(): void {
    if (this.#looking || this.#slots.size === 0) return;
    this.#looking = true;
    let soon = false;
    for (const held of [...this.#slots.values()]) {
      const page = this.#options.direct?.pageOf(held.nonce);
      if (!page) continue;
      const state = this.#lookAt(held, page);
      if (state === 'last' || now() - held.since < AT_ONCE_MS) soon = true;
    }
    const again = () => {
      this.#looking = false;
      this.#look();
    };
    if (soon) setImmediate(again);
    else setTimeout(again, LOOK_MS);
  }

  #lookAt(held: Slot, page: OwnerPage): SlotState {
    const { peer, nonce, slot, seq } = held;
    if (!held.flagged && page.flag(slot, seq)) {
      held.flagged = true;
      const load = [...this.#loads.values()].find((one) => one.seq === seq);
      if (load) this.#stage(load.request.transferId, 'flagged');
      this.#want(() => this.#wants.flag(peer, nonce, slot, seq));
    }
    const state = page.state(slot, seq);
    if (state !== 'done' || !held.flagged) return state;
    const { token, digest } = page.result(slot, seq);
    const draw = {
      drawn: token === NO_TOKEN ? [] : [token],
      samplingDigest: Buffer.from(digest.subarray(0, DIGEST_BYTES)).toString('hex'),
    };
    this.#want(() => this.#wants.doneInPage(held, draw, now()));
    return state;
  }

  /** What a page has room for; the message says it too. */
  #endInPage(slot: number, message: ProducerMessage): void {
    const page = this.#options.direct?.targetPage(message.to);
    if (!page || message.cmd !== 'DONE' || message.logprobs || message.drawn.length > 1) return;
    if (message.written !== message.promised) return;
    const digest = new Uint8Array(2 * DIGEST_BYTES);
    const given = Buffer.from(message.samplingDigest, 'hex');
    if (given.length !== DIGEST_BYTES) return;
    digest.set(given);
    const [token = NO_TOKEN] = message.drawn;
    page.end(slot, message.seq, 'done', { token, digest });
  }

  #loaded(load: Load, { seq, draw }: Extract<WantAction, { readonly kind: 'loaded' }>): void {
    const { requestId, transferId, peer, blocks } = load.request;
    this.#stage(transferId, 'loaded');
    const { layers, blockBytes } = this.#options.init.shape;
    const milliseconds = now() - load.began;
    const bytes = blocks.length * layers * blockBytes;
    this.#failures.wentWell('load', peer);
    const { metrics } = this.#options;
    metrics.observe('pd_transfer_seconds', milliseconds / 1_000);
    // what comes on a pair is counted by the transfer thread
    if (load.transport === 'direct') metrics.inc('pd_kv_received_bytes_total', bytes);
    this.#options.log.debug(
      { requestId, peer, seq, milliseconds, drawn: draw !== undefined },
      `WANT ${seq} is done`,
    );
    const { drawn, logprobs } = draw ?? {};
    this.#end(load, {
      requestId,
      ok: true,
      bytes,
      milliseconds,
      ...(drawn && { draw: { tokens: drawn, ...(logprobs && { logprobs }) } }),
    });
  }

  #stage(id: TransferId, stage: HandOverStage): void {
    this.#options.onStage?.(id, stage);
  }

  /** A quarter of a second from now, and after what has come by then has been heard, unless nothing is under way. */
  #arm(): void {
    this.#timer ??= setTimeout(() => setImmediate(() => this.#tick()), TICK_MS);
  }

  #tick(): void {
    if (!this.#timer) return;
    this.#timer = undefined;
    for (const load of [...this.#loads.values()]) {
      if (load.seq !== undefined) continue;
      const { peer, transferId } = load.request;
      if (now() >= load.deadline) {
        const message = `KV of ${transferId} did not come from ${peer} in time: it has not been asked for, as there is no connection yet`;
        this.#fail(load, { code: 'KV_LOAD_TIMEOUT', message, context: { peer } }, false);
      } else if (this.#producers.get(peer)?.transport) this.#ask(load);
    }
    this.#grant(() => this.#grants.tick(now()));
    this.#want(() => this.#wants.tick(now()));
    this.#measure();
    if (this.#grants.isIdle && this.#wants.isIdle && this.#loads.size === 0) {
      clearTimeout(this.#timer);
      this.#timer = undefined;
    }
  }

  #measure(): void {
    const { metrics } = this.#options;
    const { waiting, quarantined } = this.#wants.stats();
    metrics.set('pd_native_wants', waiting);
    metrics.set('pd_native_quarantined_blocks', quarantined);
    metrics.set('pd_native_leases', this.#grants.stats().leases);
    for (const way of TRANSPORTS) {
      const producers = [...this.#producers.values()].filter(({ transport }) => transport === way);
      metrics.set('pd_native_connections', producers.length, way);
    }
  }

  #checkSettled(): void {
    if (this.#writes.size === 0 && this.#grants.isIdle && this.#wants.isIdle) this.#settled.resolve();
  }
}

function exposureOf(seq: number): string {
  return `WANT ${seq}`;
}

function now(): number {
  return performance.now();
}

/** The oldest goes where there are too many. */
function remember<Value>(map: Map<TransferId, Value>, id: TransferId, value: Value): void {
  map.delete(id);
  map.set(id, value);
  if (map.size > MOST_REMEMBERED) map.delete(map.keys().next().value!);
}
