/**
 * What this end has asked others for, or will: the consumer's half of a hand-over (hand-over.ts). It carries out what the ledger decides
 * (wants.ts), looks for what is written here (page-watch.ts), and tells the connector what came of each want.
 *
 *   want --(no connection yet)--> waits --connected--> asked --> loaded, failed
 */
import { randomBytes } from 'node:crypto';
import { type ErrorData, PdError, unreachable } from '../../errors.ts';
import { remember } from '../../memories.ts';
import type { Logger } from '../../observability/log.ts';
import type { MetricsPage } from '../../observability/metrics.ts';
import { SLOTS, type SlotFlag } from '../../transport/direct/page.ts';
import type { EngineRequestId, TransferId } from '../../wire/ids.ts';
import { Failures } from '../failures.ts';
import type { TransferState } from '../types.ts';
import type { WantAction } from './actions.ts';
import type { NativeInit, ToWire } from './channel.ts';
import type { Connections } from './connections.ts';
import type { DirectWays } from './direct.ts';
import type { HandOverState, HandOverUser, LoadOutcome, MovedKv, WantRequest } from './hand-over-api.ts';
import type { HelloMessage, NativeTransport, Nonce, ProducerMessage, Ticket } from './messages.ts';
import { PageWatch } from './page-watch.ts';
import { Wants } from './wants.ts';

export interface LoadsOptions {
  readonly init: NativeInit;
  readonly direct: Pick<DirectWays, 'pageOf'> | undefined;
  readonly connections: Pick<Connections, 'ready' | 'has' | 'met' | 'lost'>;
  readonly log: Logger;
  readonly metrics: MetricsPage;
  readonly tell: (command: ToWire) => void;
  /** Of the one queue of both halves (`HandOver`). */
  readonly work: (task: () => void) => void;
  readonly user: () => HandOverUser;
  readonly onStage: (
    id: TransferId,
    stage: 'wanted' | 'asked' | 'flagged' | 'loaded',
    moved?: MovedKv,
  ) => void;
  /** The stage `flagged`, with the GPU's times of the write that set the flag. */
  readonly onFlag: ((id: TransferId, times: SlotFlag) => void) | undefined;
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

/** Ids that a peer is still to be told of, or whose failure came before their want. */
const MOST_REMEMBERED = 1_024;

export class Loads {
  readonly #options: LoadsOptions;
  readonly #wants: Wants;
  readonly #loads = new Map<EngineRequestId, Load>();
  readonly #exposed = new Set<number>();
  readonly #pages: PageWatch;
  /** Ids that nobody wants, by the producer that is to be told once it has said hello. */
  readonly #unwanted = new Map<TransferId, string>();
  readonly #failures = new Failures(performance);
  /** What producers have told of requests that have not been wanted yet. */
  readonly #failed = new Map<TransferId, ErrorData>();

  constructor(options: LoadsOptions) {
    const { nonce, shape } = options.init;
    this.#options = options;
    this.#wants = new Wants({
      nonce,
      cacheBlocks: shape.blocks,
      layers: shape.layers,
      newTicket: () => randomBytes(16).toString('hex') as Ticket,
      slots: SLOTS,
    });
    this.#pages = new PageWatch((process) => options.direct?.pageOf(process), {
      flag: ({ peer, nonce, slot, seq }, times) => {
        const load = [...this.#loads.values()].find((one) => one.seq === seq);
        if (load) {
          const { transferId } = load.request;
          options.onStage(transferId, 'flagged');
          options.onFlag?.(transferId, times);
        }
        this.#want(() => this.#wants.flag(peer, nonce, slot, seq));
      },
      done: (slot, draw) => this.#want(() => this.#wants.doneInPage(slot, draw, performance.now())),
    });
  }

  want(request: WantRequest): void {
    const { requestId, transferId, peer, withinMs, prefillWithinMs = 0 } = request;
    const began = performance.now();
    const deadline = began + withinMs + prefillWithinMs;
    const load: Load = { request, began, deadline, seq: undefined, transport: undefined, again: false };
    this.#loads.set(requestId, load);
    this.#options.onStage(transferId, 'wanted');
    const failed = this.#failed.get(transferId);
    this.#failed.delete(transferId);
    if (failed) {
      this.#fail(load, failed, false);
      return;
    }
    if (this.#options.connections.ready(peer)) this.#ask(load);
    else this.#options.tell({ kind: 'connect', peer });
  }

  cancel(requestId: EngineRequestId): void {
    const load = this.#loads.get(requestId);
    if (!load) return;
    const { seq } = load;
    if (seq !== undefined) this.#want(() => this.#wants.abort(seq, performance.now()));
    const error = {
      code: 'REQUEST_ABORTED',
      message: `request ${requestId} does not want its KV any more`,
      context: {},
    } as const;
    // what the ledger had to say first has been said
    this.#options.work(() => this.#fail(load, error, seq !== undefined && this.#exposed.has(seq)));
  }

  unwanted(transferId: TransferId, peer: string): void {
    if (this.#options.connections.has(peer)) {
      this.#want(() => this.#wants.unwanted(peer, transferId));
      return;
    }
    remember(this.#unwanted, transferId, peer, MOST_REMEMBERED);
    this.#options.tell({ kind: 'connect', peer });
  }

  prefilled(transferId: TransferId): void {
    const load = this.#loadOf(transferId);
    if (!load) return;
    const { withinMs } = load.request;
    load.deadline = Math.min(load.deadline, performance.now() + withinMs);
    if (load.seq !== undefined) this.#wants.hasten(load.seq, withinMs, performance.now());
  }

  sendFailed(transferId: TransferId, reason: ErrorData): void {
    const load = this.#loadOf(transferId);
    if (!load) remember(this.#failed, transferId, reason, MOST_REMEMBERED);
    else if (load.seq === undefined) this.#fail(load, reason, false);
    else {
      const { seq } = load;
      this.#want(() => this.#wants.fail(seq, reason, performance.now()));
    }
  }

  /** That producer may be asked. */
  connected(peer: string): void {
    for (const load of this.#waitingFor(peer)) this.#ask(load);
  }

  /** A producer has answered our hello. */
  met(peer: string, hello: HelloMessage): void {
    this.#wants.pairOpened(peer);
    this.#want(() => this.#wants.introduced(peer, hello.from, performance.now()));
    this.#options.connections.met(peer, hello);
    for (const [id, whom] of this.#unwanted) {
      if (whom !== peer) continue;
      this.#unwanted.delete(id);
      this.unwanted(id, peer);
    }
  }

  /** The connection to a producer is over, or never was. `again`: another may be tried for what waits. */
  lose(peer: string, error: ErrorData, again: boolean): void {
    this.#options.connections.lost(peer);
    for (const [id, whom] of this.#unwanted) if (whom === peer) this.#unwanted.delete(id);
    for (const load of this.#waitingFor(peer)) {
      if (again) this.#connectAgain(load, error);
      else this.#fail(load, error, false);
    }
    this.#want(() => this.#wants.unreachable(peer, error, performance.now()));
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
    this.#options.tell({ kind: 'connect', peer: load.request.peer });
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
      const producer = this.#options.connections.ready(peer);
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
          withinMs: Math.max(load.deadline - performance.now(), 0),
        },
        performance.now(),
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
      this.#options.onStage(transferId, 'asked');
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

  #end(load: Load, outcome: LoadOutcome): void {
    if (this.#loads.get(outcome.requestId) !== load) return;
    this.#loads.delete(outcome.requestId);
    this.#options.user().loadEnded(outcome);
  }

  died(peer: string, nonce: Nonce): void {
    this.#want(() => this.#wants.died(peer, nonce, performance.now()));
  }

  answered(peer: string, message: ProducerMessage): void {
    this.#want(() => this.#wants.message(peer, message, performance.now()));
  }

  received(receipt: number, ok: boolean): void {
    this.#want(() => this.#wants.received(receipt, ok, performance.now()));
  }

  /** Each quarter of a second, unless nothing is under way. */
  tick(): void {
    for (const load of [...this.#loads.values()]) {
      if (load.seq !== undefined) continue;
      const { peer, transferId } = load.request;
      if (performance.now() >= load.deadline) {
        const message = `KV of ${transferId} did not come from ${peer} in time: it has not been asked for, as there is no connection yet`;
        this.#fail(load, { code: 'KV_LOAD_TIMEOUT', message, context: { peer } }, false);
      } else if (this.#options.connections.ready(peer)) this.#ask(load);
    }
    this.#want(() => this.#wants.tick(performance.now()));
  }

  /** Wants that have no outcome yet. */
  get size(): number {
    return this.#loads.size;
  }

  /** To be asked; what it is told goes through here. */
  get wants(): Pick<Wants, 'isIdle' | 'stats' | 'checkIntegrity'> {
    return this.#wants;
  }

  /** Every want ends. */
  cancelAll(): void {
    for (const requestId of [...this.#loads.keys()]) this.cancel(requestId);
  }

  /** No page is looked into any more. */
  close(): void {
    this.#pages.close();
  }

  state(): Pick<HandOverState, 'quarantine' | 'connecting' | 'wants'> {
    const connecting = [...this.#loads.values()].filter(({ seq }) => seq === undefined).length;
    return { quarantine: this.#wants.quarantine(), connecting, wants: this.#wants.stats() };
  }

  /** The loads that are waited for and those that failed lately, as the transfer engine tells its own. */
  told(): Pick<TransferState, 'waiting' | 'failures'> {
    const at = performance.now();
    const waiting = [...this.#loads.values()].map(({ request, began, deadline }) => ({
      requestId: request.requestId,
      tensorId: request.transferId,
      peer: request.peer,
      sinceMs: Math.round(at - began),
      deadlineMs: Math.round(deadline - began),
      nearMisses: [],
      ...(deadline - began > request.withinMs && { prefilling: true as const }),
    }));
    return { waiting, failures: this.#failures.state() };
  }

  #want(told: () => readonly WantAction[]): void {
    this.#options.work(() => {
      for (const action of told()) this.#doWant(action);
    });
  }

  #doWant(action: WantAction): void {
    switch (action.kind) {
      case 'send':
        this.#options.tell({ kind: 'ask', peer: action.peer, message: action.message });
        return;
      case 'expose':
        this.#options.user().books.expose(exposureOf(action.seq), action.blocks);
        this.#exposed.add(action.seq);
        return;
      case 'retract':
        this.#exposed.delete(action.seq);
        this.#options.user().books.retract(exposureOf(action.seq));
        this.#options.user().freed();
        return;
      case 'loaded':
      case 'failed':
      case 'again': {
        const load = this.#loads.get(action.owner as EngineRequestId);
        if (load?.seq !== action.seq) return;
        if (action.kind === 'loaded') this.#loaded(load, action);
        else if (action.kind === 'failed') this.#fail(load, action.error, action.quarantined);
        else this.#connectAgain(load, action.error);
        return;
      }
      case 'receive': {
        const { peer, receipt, part, into } = action;
        this.#options.tell({
          kind: 'receive',
          peer,
          receipt,
          part,
          ...(into !== 'scratch' && { blocks: Int32Array.from(into) }),
        });
        return;
      }
      case 'reset-pair':
        this.#options.tell({ kind: 'reset', peer: action.peer, why: 'PART is out of step' });
        return;
      case 'grant':
        if (action.seq > 0) this.#pages.grant(action);
        else this.#pages.revoke(action.nonce, action.slot);
        return;
      default:
        unreachable(action, 'action of the wants');
    }
  }

  #loaded(load: Load, { seq, draw }: Extract<WantAction, { readonly kind: 'loaded' }>): void {
    const { requestId, transferId, peer, blocks } = load.request;
    const { transport } = load;
    const { layers, blockBytes } = this.#options.init.shape;
    const milliseconds = performance.now() - load.began;
    const bytes = blocks.length * layers * blockBytes;
    this.#options.onStage(transferId, 'loaded', transport && { transport, kv_bytes: bytes, kv_from: peer });
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
}

function exposureOf(seq: number): string {
  return `WANT ${seq}`;
}
