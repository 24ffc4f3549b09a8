/**
 * The native hand-over on the core thread: a consumer's half (loads.ts) and a producer's (fills.ts), each with its ledger, and what is common to
 * both: whom this worker is connected with (connections.ts), the time, and the order in which things are done. Bytes that travel on pairs, and all
 * messages, go by the transfer thread (wire.ts).
 *
 *   connector --want, cancel------------> Loads · Wants  --ask, receive--> wire --> producer
 *             <--loadEnded--------------- Loads · Wants  <--answered------ wire <--
 *   connector --begin, progress, finish-> Fills · Grants <--asked--------- wire <-- consumer
 *             --layer-------------------> Writes         --answer, write-> wire -->
 */
import { setImmediate } from 'node:timers';
import { deferred } from '../../deferred.ts';
import type { EventRef } from '../../device/device.ts';
import { type ErrorCode, type ErrorData, PdError, unreachable } from '../../errors.ts';
import { remember } from '../../memories.ts';
import { formatHostPort } from '../../net/address.ts';
import type { Logger } from '../../observability/log.ts';
import type { MetricsPage } from '../../observability/metrics.ts';
import type { SlotFlag } from '../../transport/direct/page.ts';
import { type EngineRequestId, peerAddressOf, type TransferId } from '../../wire/ids.ts';
import type { TransferState } from '../types.ts';
import type { FromWire, NativeInit, ToWire } from './channel.ts';
import { Connections } from './connections.ts';
import type { DirectWays } from './direct.ts';
import { Fills } from './fills.ts';
import type {
  Drawn,
  HandOverApi,
  HandOverStage,
  HandOverState,
  HandOverUser,
  MovedKv,
  WantRequest,
} from './hand-over-api.ts';
import { Loads } from './loads.ts';

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

const TICK_MS = 250;
/** For a consumer to say whether it speaks natively; once it has said that it does not, it is told of each request. */
const PROBE_AGAIN_MS = 1_000;
/** Consumers of which it is remembered when they were asked. */
const MOST_PROBED = 1_024;
/** For peers to hear the ends of their WANTs when this worker stops. */
const CLOSE_MS = 3_000;

export class HandOver implements HandOverApi {
  readonly #options: HandOverOptions;
  readonly #tell: (command: ToWire) => void;
  readonly #connections: Connections;
  readonly #loads: Loads;
  readonly #fills: Fills;
  /** When a consumer was asked whether it speaks natively. */
  readonly #probed = new Map<string, number>();
  #user: HandOverUser | undefined;
  #tasks: (() => void)[] = [];
  #working = false;
  #timer: NodeJS.Timeout | undefined;
  #closed: Promise<void> | undefined;
  #settled = deferred<void>();

  constructor(options: HandOverOptions) {
    this.#options = options;
    const { init, role, direct, log, metrics, leaseMs, onFlag } = options;
    this.#connections = new Connections({
      init,
      role,
      direct,
      log,
      on: {
        ready: (peer) => {
          this.#loads.connected(peer);
          this.#measure();
        },
        useless: (peer, error) => {
          this.#loads.lose(peer, error, false);
          // the next want finds out anew
          this.#tell({ kind: 'reset', peer, why: error.message });
        },
        died: (peer, nonce) => {
          this.#fills.died(peer, nonce);
          this.#loads.died(peer, nonce);
        },
        idle: () => this.#fills.hasLanded && !options.busy(),
      },
    });
    this.#tell = options.wire((event) => this.#hear(event));
    const half = {
      init,
      direct,
      metrics,
      tell: this.#tell,
      work: (task: () => void) => this.#work(task),
      user: () => this.#served,
      onStage: (id: TransferId, stage: HandOverStage, moved?: MovedKv) => options.onStage?.(id, stage, moved),
    };
    this.#loads = new Loads({ ...half, log, connections: this.#connections, onFlag });
    this.#fills = new Fills({ ...half, leaseMs, names: (id, peer) => this.#otherOf(id) === peer });
  }

  serve(user: HandOverUser): void {
    this.#user = user;
  }

  want(request: WantRequest): void {
    this.#loads.want(request);
    this.#arm();
  }

  cancel(requestId: EngineRequestId): void {
    this.#loads.cancel(requestId);
  }

  unwanted(transferId: TransferId, peer: string): void {
    this.#loads.unwanted(transferId, peer);
  }

  prefilled(transferId: TransferId): void {
    this.#loads.prefilled(transferId);
  }

  sendFailed(transferId: TransferId, reason: ErrorData): void {
    this.#loads.sendFailed(transferId, reason);
  }

  begin(request: {
    readonly transferId: TransferId;
    readonly promptDigest: string;
    readonly tokens: number;
  }): void {
    this.#fills.begin(request);
  }

  progress(transferId: TransferId, computed: number, blocks: readonly number[]): void {
    this.#fills.progress(transferId, computed, blocks);
  }

  layer(index: number, ready?: EventRef): void {
    this.#fills.layer(index, ready);
  }

  stepEnded(): Promise<void> {
    return this.#fills.stepEnded();
  }

  finish(transferId: TransferId, drawn: Drawn): void {
    this.#fills.finish(transferId, drawn);
    this.#probe(transferId);
  }

  consumerWaits(transferId: TransferId): number {
    const peer = this.#otherOf(transferId);
    return peer === undefined ? 0 : this.#fills.grants.longestUnbound(peer, performance.now());
  }

  fail(transferId: TransferId, code: ErrorCode, why: string): void {
    this.#fills.fail(transferId, code, why);
  }

  state(): HandOverState {
    return {
      producers: this.#connections.states(),
      mappings: this.#connections.mappings(),
      ...this.#loads.state(),
      grants: this.#fills.grants.stats(),
    };
  }

  /** With the loads that are waited for and those that failed lately. */
  told(): { readonly state: HandOverState } & Pick<TransferState, 'waiting' | 'failures'> {
    return { state: this.state(), ...this.#loads.told() };
  }

  /** What is wrong, in words; empty when all is well. */
  checkIntegrity(): string[] {
    return [...this.#loads.wants.checkIntegrity(), ...this.#fills.grants.checkIntegrity()];
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
    this.#loads.cancelAll();
    this.#fills.shutdown();
    const late = setTimeout(() => this.#settled.resolve(), CLOSE_MS);
    this.#checkSettled();
    await this.#settled.promise;
    clearTimeout(late);
    clearTimeout(this.#timer);
    this.#timer = undefined;
    // A producer that never answers must not keep this thread: neither its mapping nor its page is waited for any more.
    this.#connections.close();
    this.#loads.close();
  }

  /** A consumer that has not said a word may have been told another wire, and would wait for what never comes. */
  #probe(id: TransferId): void {
    const peer = this.#otherOf(id);
    if (peer === undefined || this.#fills.grants.knows(peer)) return;
    if (performance.now() - (this.#probed.get(peer) ?? Number.NEGATIVE_INFINITY) < PROBE_AGAIN_MS) return;
    remember(this.#probed, peer, performance.now(), MOST_PROBED);
    this.#tell({ kind: 'probe', peer, id });
  }

  /** The rank's address of the other end that the id of a request names. */
  #otherOf(id: TransferId): string | undefined {
    const { role, rank } = this.#options;
    const address = peerAddressOf(id, role === 'producer' ? 'decode' : 'prefill');
    return address && formatHostPort({ ...address, port: address.port + rank });
  }

  get #served(): HandOverUser {
    if (!this.#user) throw new PdError('INTERNAL', 'the hand-over serves nobody yet');
    return this.#user;
  }

  #hear(event: FromWire): void {
    switch (event.kind) {
      case 'introduced': {
        const { way, peer, hello } = event;
        if (way === 'to') this.#loads.met(peer, hello);
        else {
          this.#fills.introduced(peer, hello.from, hello.cache.blocks);
          this.#connections.admitted(peer, hello);
        }
        return;
      }
      case 'asked':
        this.#fills.asked(event.peer, event.message);
        return;
      case 'answered':
        this.#loads.answered(event.peer, event.message);
        return;
      case 'lost':
        if (event.way === 'from') this.#fills.unreachable(event.peer);
        else this.#loads.lose(event.peer, event.error, this.#connections.has(event.peer));
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
      case 'written':
      case 'sent':
        this.#fills.moved(event);
        if (this.#closed) this.#checkSettled();
        return;
      case 'received':
        this.#loads.received(event.receipt, event.error === undefined);
        return;
      default:
        unreachable(event, 'event of the native wire');
    }
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

  /** A quarter of a second from now, and after what has come by then has been heard, unless nothing is under way. */
  #arm(): void {
    this.#timer ??= setTimeout(() => setImmediate(() => this.#tick()), TICK_MS);
  }

  #tick(): void {
    if (!this.#timer) return;
    this.#timer = undefined;
    this.#fills.tick();
    this.#loads.tick();
    this.#measure();
    if (this.#fills.grants.isIdle && this.#loads.wants.isIdle && this.#loads.size === 0) {
      clearTimeout(this.#timer);
      this.#timer = undefined;
    }
  }

  #measure(): void {
    const { metrics } = this.#options;
    const { waiting, quarantined } = this.#loads.wants.stats();
    metrics.set('pd_native_wants', waiting);
    metrics.set('pd_native_quarantined_blocks', quarantined);
    metrics.set('pd_native_leases', this.#fills.grants.stats().leases);
    this.#connections.measure(metrics);
  }

  #checkSettled(): void {
    if (this.#fills.hasLanded && this.#fills.grants.isIdle && this.#loads.wants.isIdle)
      this.#settled.resolve();
  }
}
