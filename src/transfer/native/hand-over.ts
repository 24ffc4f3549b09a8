/**
 * The native hand-over on the core thread: owns both ledgers, carries out what they decide, and tells the connector what came of it. Bytes
 * that travel on pairs, and all messages, go by the transfer thread (wire.ts). Beside it: whom it is connected with (connections.ts), what it
 * writes (writes.ts), and where it looks for what is written here (page-watch.ts).
 *
 *   connector --want, cancel------------> Wants  --ask, receive--> wire --> producer
 *             <--loadEnded--------------- Wants  <--answered------ wire <--
 *   connector --begin, progress, finish-> Grants <--asked--------- wire <-- consumer
 *             --layer-------------------> Writes --answer, write-> wire -->
 */
import { randomBytes } from 'node:crypto';
import { setImmediate } from 'node:timers';
import { deferred } from '../../deferred.ts';
import type { EventRef } from '../../device/device.ts';
import { type ErrorCode, type ErrorData, PdError, unreachable } from '../../errors.ts';
import { formatHostPort } from '../../net/address.ts';
import type { Logger } from '../../observability/log.ts';
import type { MetricsPage } from '../../observability/metrics.ts';
import { NO_TOKEN, SLOTS, type SlotFlag } from '../../transport/direct/page.ts';
import { type EngineRequestId, peerAddressOf, type TransferId } from '../../wire/ids.ts';
import { Failures } from '../failures.ts';
import type { TransferState } from '../types.ts';
import type { FromWire, NativeInit, ToWire } from './channel.ts';
import { isTokenId } from './codec.ts';
import { Connections } from './connections.ts';
import type { DirectWays } from './direct.ts';
import { type GrantAction, Grants } from './grants.ts';
import type {
  Drawn,
  HandOverApi,
  HandOverBooks,
  HandOverStage,
  HandOverState,
  HandOverUser,
  MovedKv,
  WantOutcome,
  WantRequest,
} from './hand-over-api.ts';
import type { HelloMessage, NativeTransport, ProducerMessage, Ticket } from './messages.ts';
import { digestForPage, PageWatch } from './page-watch.ts';
import { type WantAction, Wants } from './wants.ts';
import { Writes } from './writes.ts';

export interface HandOverOptions {
  readonly init: NativeInit;
  /** Where the wire is told what to do, and tells what came (`TransferEngine.native`). */
  readonly wire: (hear: (event: FromWire) => void) => (command: ToWire) => void;
  readonly role: 'producer' | 'consumer';
  readonly rank: number;
  /** Whether this worker computes now, or has something to. */
  readonly busy: () => boolean;
  /** How long KV that nobody asks for is kept, ms. */
  readonly leaseMs: number;
  /** Where `direct` may be used here. */
  readonly direct?: Pick<
    DirectWays,
    'serve' | 'pageOf' | 'expect' | 'connect' | 'mappings' | 'begin' | 'targetPage' | 'release'
  >;
  readonly log: Logger;
  /** Of the core thread. */
  readonly metrics: MetricsPage;
  readonly onStage?: (id: TransferId, stage: HandOverStage, moved?: MovedKv) => void;
  /** The stage `flagged`, with the GPU's times of the write that set the flag: of the last layer, where each was written by itself. */
  readonly onFlag?: (id: TransferId, times: SlotFlag) => void;
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
  /** The connection that it waited for was lost: that of another one is the last. */
  again: boolean;
}

const TICK_MS = 250;
/** How long a WANT may wait for its request, which may stand in the producer's queue; whoever gives up earlier says DROP. */
const UNBOUND_MS = 600_000;
/** Ids that a peer is still to be told of, or whose failure came before their want. */
const MOST_REMEMBERED = 1_024;
/** For a consumer to say whether it speaks natively; once it has said that it does not, it is told of each request. */
const PROBE_AGAIN_MS = 1_000;
/** For peers to hear the ends of their WANTs when this worker stops. */
const CLOSE_MS = 3_000;

export class HandOver implements HandOverApi {
  readonly #options: HandOverOptions;
  readonly #grants: Grants;
  readonly #wants: Wants;
  readonly #tell: (command: ToWire) => void;
  readonly #loads = new Map<EngineRequestId, Load>();
  readonly #exposed = new Set<number>();
  readonly #connections: Connections;
  readonly #pages: PageWatch;
  readonly #writes: Writes;
  /** Ids that nobody wants, by the producer that is to be told once it has said hello. */
  readonly #unwanted = new Map<TransferId, string>();
  readonly #failures = new Failures({ now });
  /** What producers have told of requests that have not been wanted yet. */
  readonly #failed = new Map<TransferId, ErrorData>();
  /** When a consumer was asked whether it speaks natively. */
  readonly #probed = new Map<string, number>();
  #user: HandOverUser | undefined;
  #tasks: (() => void)[] = [];
  #working = false;
  #timer: NodeJS.Timeout | undefined;
  #closed: Promise<void> | undefined;
  #settled = deferred<void>();

  constructor(options: HandOverOptions) {
    const { init, role, leaseMs } = options;
    const { nonce, shape } = init;
    this.#options = options;
    this.#grants = new Grants({
      nonce,
      blockSize: shape.blockSize,
      names: (id, peer) => this.#otherOf(id) === peer,
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
    const { direct, log, metrics } = options;
    this.#connections = new Connections({
      init,
      role,
      direct,
      log,
      on: {
        ready: (peer) => {
          for (const load of this.#waitingFor(peer)) this.#ask(load);
          this.#measure();
        },
        useless: (peer, error) => {
          this.#lose(peer, error, false);
          // the next want finds out anew
          this.#tell({ kind: 'reset', peer, why: error.message });
        },
        died: (peer, nonce) => {
          this.#grant(() => this.#grants.died(peer, nonce, now()));
          this.#want(() => this.#wants.died(peer, nonce, now()));
        },
        idle: () => this.#writes.size === 0 && !options.busy(),
      },
    });
    this.#pages = new PageWatch((nonce) => direct?.pageOf(nonce), {
      flag: ({ peer, nonce, slot, seq }, times) => {
        const load = [...this.#loads.values()].find((one) => one.seq === seq);
        if (load) {
          const { transferId } = load.request;
          this.#stage(transferId, 'flagged');
          options.onFlag?.(transferId, times);
        }
        this.#want(() => this.#wants.flag(peer, nonce, slot, seq));
      },
      done: (slot, draw) => this.#want(() => this.#wants.doneInPage(slot, draw, now())),
    });
    this.#tell = options.wire((event) => this.#hear(event));
    this.#writes = new Writes({
      init,
      direct,
      metrics,
      tell: this.#tell,
      onStage: (id, stage, moved) => this.#stage(id, stage, moved),
      mayLaunch: (launch) => this.#grants.mayLaunch(launch),
      landed: (launch, failure) => this.#grant(() => this.#grants.landed(launch, now(), failure)),
    });
  }

  serve(user: HandOverUser): void {
    this.#user = user;
  }

  want(request: WantRequest): void {
    const { requestId, transferId, peer, withinMs, prefillWithinMs = 0 } = request;
    const began = now();
    const deadline = began + withinMs + prefillWithinMs;
    const load: Load = { request, began, deadline, seq: undefined, transport: undefined, again: false };
    this.#loads.set(requestId, load);
    this.#stage(transferId, 'wanted');
    const failed = this.#failed.get(transferId);
    this.#failed.delete(transferId);
    if (failed) {
      this.#fail(load, failed, false);
      return;
    }
    if (this.#connections.ready(peer)) this.#ask(load);
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
    if (this.#connections.has(peer)) {
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
    if (computed > 0) this.#writes.computes(transferId);
    this.#grant(() => this.#grants.progress(transferId, computed, blocks));
  }

  layer(index: number, ready?: EventRef): void {
    this.#writes.layer(index, ready);
  }

  stepEnded(): Promise<void> {
    return this.#writes.stepEnded();
  }

  finish(transferId: TransferId, { tokens, logprobs, samplingDigest }: Drawn): void {
    // of a runtime that is not ours, perhaps: what cannot be said must not reach the wire
    if (!tokens.every((token) => isTokenId(token)))
      throw new PdError(
        'REQUEST_INVALID',
        `${transferId}: drawn are ${tokens.join(', ')}, which are no token ids`,
      );
    const draw = { drawn: tokens, ...(logprobs && { logprobs }), samplingDigest };
    this.#grant(() => this.#grants.finish(transferId, draw, now()));
    this.#probe(transferId);
  }

  consumerWaits(transferId: TransferId): number {
    const peer = this.#otherOf(transferId);
    return peer === undefined ? 0 : this.#grants.longestUnbound(peer, now());
  }

  fail(transferId: TransferId, code: ErrorCode, why: string): void {
    this.#grant(() => this.#grants.fail(transferId, code, why, now()));
  }

  state(): HandOverState {
    const loads = [...this.#loads.values()];
    return {
      producers: this.#connections.states(),
      mappings: this.#connections.mappings(),
      quarantine: this.#wants.quarantine(),
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
    this.#connections.close();
    this.#pages.close();
  }

  /** A consumer that has not said a word may have been told another wire, and would wait for what never comes. */
  #probe(id: TransferId): void {
    const peer = this.#otherOf(id);
    if (peer === undefined || this.#grants.knows(peer)) return;
    if (now() - (this.#probed.get(peer) ?? Number.NEGATIVE_INFINITY) < PROBE_AGAIN_MS) return;
    remember(this.#probed, peer, now());
    this.#tell({ kind: 'probe', peer, id });
  }

  /** The rank's address of the other end that the id of a request names. */
  #otherOf(id: TransferId): string | undefined {
    const { role, rank } = this.#options;
    const address = peerAddressOf(id, role === 'producer' ? 'decode' : 'prefill');
    return address && formatHostPort({ ...address, port: address.port + rank });
  }

  get #books(): HandOverBooks {
    if (!this.#user) throw new PdError('INTERNAL', 'the hand-over serves nobody yet');
    return this.#user.books;
  }

  #hear(event: FromWire): void {
    switch (event.kind) {
      case 'introduced':
        if (event.way === 'to') this.#meet(event.peer, event.hello);
        else {
          const { from, cache } = event.hello;
          this.#grant(() => this.#grants.introduced(event.peer, from, cache.blocks, now()));
          this.#connections.admitted(event.peer, event.hello);
        }
        return;
      case 'asked':
        this.#grant(() => this.#grants.message(event.peer, event.message, now()));
        return;
      case 'answered':
        this.#want(() => this.#wants.message(event.peer, event.message, now()));
        return;
      case 'lost':
        if (event.way === 'from') this.#grant(() => this.#grants.unreachable(event.peer, now()));
        else this.#lose(event.peer, event.error, this.#connections.has(event.peer));
        return;
      case 'unwilling': {
        const { peer, id, error } = event;
        this.#probed.delete(peer);
        this.#options.log.error(
          { peer, code: error.code },
          `KV of ${id} will not be asked for: ${error.message}`,
        );
        this.fail(id, error.code, error.message);
        return;
      }
      case 'gathered':
        this.#writes.gathered(event.step);
        return;
      case 'written':
        this.#writes.written(event);
        return;
      case 'sent':
        this.#writes.sent();
        if (this.#closed) this.#checkSettled();
        return;
      case 'received':
        this.#want(() => this.#wants.received(event.receipt, event.error === undefined, now()));
        return;
      default:
        unreachable(event, 'event of the native wire');
    }
  }

  /** A producer has answered our hello. */
  #meet(peer: string, hello: HelloMessage): void {
    this.#wants.pairOpened(peer);
    this.#want(() => this.#wants.introduced(peer, hello.from, now()));
    this.#connections.met(peer, hello);
    for (const [id, whom] of this.#unwanted) {
      if (whom !== peer) continue;
      this.#unwanted.delete(id);
      this.unwanted(id, peer);
    }
  }

  /** The connection to a producer is over, or never was. `again`: another may be tried for what waits. */
  #lose(peer: string, error: ErrorData, again: boolean): void {
    this.#connections.lost(peer);
    for (const [id, whom] of this.#unwanted) if (whom === peer) this.#unwanted.delete(id);
    for (const load of this.#waitingFor(peer)) {
      if (again) this.#connectAgain(load, error);
      else this.#fail(load, error, false);
    }
    this.#want(() => this.#wants.unreachable(peer, error, now()));
  }

  /** Once, and within its deadline: a want that met the end of a connection has asked nobody yet. */
  #connectAgain(load: Load, error: ErrorData): void {
    if (load.again) {
      this.#fail(load, error, false);
      return;
    }
    load.again = true;
    load.seq = undefined;
    load.transport = undefined;
    this.#tell({ kind: 'connect', peer: load.request.peer });
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
      const producer = this.#connections.ready(peer);
      if (!producer || this.#loads.get(requestId) !== load || load.seq !== undefined) return [];
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
        this.#books.hold(action.sources);
        this.#writes.begin(action);
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
      case 'again': {
        const load = this.#loads.get(action.owner as EngineRequestId);
        if (load?.seq === action.seq) this.#connectAgain(load, action.error);
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
        if (action.seq > 0) this.#pages.grant(action);
        else this.#pages.revoke(action.nonce, action.slot);
        return;
      default:
        unreachable(action, 'action of the wants');
    }
  }

  /** What a page has room for; the message says it too. */
  #endInPage(slot: number, message: ProducerMessage): void {
    const page = this.#options.direct?.targetPage(message.to);
    if (!page || message.cmd !== 'DONE' || message.logprobs || message.drawn.length > 1) return;
    if (message.written !== message.promised) return;
    const digest = digestForPage(message.samplingDigest);
    const [token = NO_TOKEN] = message.drawn;
    if (digest) page.end(slot, message.seq, 'done', { token, digest });
  }

  #loaded(load: Load, { seq, draw }: Extract<WantAction, { readonly kind: 'loaded' }>): void {
    const { requestId, transferId, peer, blocks } = load.request;
    const { layers, blockBytes } = this.#options.init.shape;
    const milliseconds = now() - load.began;
    const bytes = blocks.length * layers * blockBytes;
    const { transport } = load;
    this.#stage(transferId, 'loaded', transport && { transport, kv_bytes: bytes, kv_from: peer });
    this.#failures.wentWell('load', peer);
    const { metrics } = this.#options;
    metrics.observe('pd_transfer_seconds', milliseconds / 1_000);
    // what comes on a pair is counted by the transfer thread
    if (transport === 'direct') metrics.inc('pd_kv_received_bytes_total', bytes);
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

  #stage(id: TransferId, stage: HandOverStage, moved?: MovedKv): void {
    this.#options.onStage?.(id, stage, moved);
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
      } else if (this.#connections.ready(peer)) this.#ask(load);
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
    this.#connections.measure(metrics);
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
function remember<Key, Value>(map: Map<Key, Value>, id: Key, value: Value): void {
  map.delete(id);
  map.set(id, value);
  if (map.size > MOST_REMEMBERED) map.delete(map.keys().next().value!);
}
