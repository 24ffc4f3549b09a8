/** Loads and receives under way: their deadlines, and in GET the asking. */
import { deferred } from '../deferred.ts';
import { PdError } from '../errors.ts';
import { blockBytes } from '../kv/layout.ts';
import { formatHostPort } from '../net/address.ts';
import { splitTensorId, type TensorId, transferIdOf } from '../wire/ids.ts';
import type { Claimant } from './claims.ts';
import type { TransferContext } from './context.ts';
import { GetAnnouncement } from './get.ts';
import type { Intake } from './intake.ts';
import { heldInstead, Load } from './load.ts';
import type { OutgoingPeer } from './peer.ts';
import { PeerWatch } from './peer-watch.ts';
import type { Held, StoreEntry } from './store.ts';
import type { LoadRequest, LoadResult, PairState, StoredTensor, TransferState } from './types.ts';

/** Between a GET that was answered `{ret: 1}` and the next: doubled each time. */
const FIRST_PAUSE_MS = 5;
const LONGEST_PAUSE_MS = 1_000;

export interface LoadPeers {
  outgoing(peer: string): OutgoingPeer;
  /** Why the last pair that this peer had with us is over, if it is and it has not sent NEW since. */
  lostPair(peer: string): PdError | undefined;
  /** Pairs with it, both directions. */
  pairs(peer: string): PairState[];
}

interface Asking {
  readonly tensorId: TensorId;
  readonly peer: string;
  readonly bytes?: number;
  readonly deadlineAt: number;
  /** False once nobody wants it any more. */
  wanted(): boolean;
  arrived(entry: StoreEntry): void;
  failed(error: PdError): void;
  /** What the producer has of the same request under another id. */
  near(tensorIds: readonly string[]): void;
}

export class Loads {
  readonly #context: TransferContext;
  readonly #intake: Intake;
  readonly #peers: LoadPeers;
  readonly #loads = new Set<Load>();
  readonly #receives = new Set<{ fail(error: PdError): void }>();
  /** GETs that have not been answered, by who wants them. */
  readonly #asked = new Map<Load, Set<GetAnnouncement>>();

  constructor(context: TransferContext, intake: Intake, peers: LoadPeers) {
    this.#context = context;
    this.#intake = intake;
    this.#peers = peers;
  }

  /** Loads and receives that have not settled. */
  get size(): number {
    return this.#loads.size + this.#receives.size;
  }

  load(request: LoadRequest): Promise<LoadResult> {
    const { options, deadlines, log, metrics } = this.#context;
    const timeoutMs = request.timeoutMs ?? options.timeouts.load;
    const { requestId, transferId } = request;
    const { promise, resolve, reject } = deferred<LoadResult>();
    const load = new Load(this.#context, this.#intake, request, { resolve, reject });
    this.#loads.add(load);
    const peer = load.peer;
    log.debug({ requestId, transferId, peer, layers: request.layers.length }, `load ${requestId}`);
    const half = deadlines.after(timeoutMs / 2, () => this.#warn(load, timeoutMs));
    const end = deadlines.after(timeoutMs, () => load.timeOut(timeoutMs));
    // In GET our own link to the peer knows.
    const lostPair = () => this.#peers.lostPair(peer);
    const watch =
      options.sendType === 'GET' ? undefined : new PeerWatch(this.#context, load, request.peer, lostPair);
    if (options.sendType === 'GET') this.#askLayers(load, timeoutMs);
    else this.#intake.claim(load);
    load.begin();
    return promise
      .then((result) => {
        metrics.observe('pd_transfer_seconds', result.milliseconds / 1_000);
        log.debug({ requestId, transferId, peer, bytes: result.bytes }, `loaded ${requestId}`);
        return result;
      })
      .finally(() => {
        for (const deadline of [half, end]) deadline.cancel();
        watch?.stop();
        this.#loads.delete(load);
        this.#intake.claims.unregister(load);
        for (const get of this.#asked.get(load) ?? []) get.cancel();
        this.#asked.delete(load);
      });
  }

  /** Waits for one tensor of any size, or asks for it. */
  receive(tensorId: TensorId, peerAddress: LoadRequest['peer'], timeoutMs?: number): Promise<StoredTensor> {
    const { options, deadlines } = this.#context;
    const ms = timeoutMs ?? options.timeouts.load;
    const peer = formatHostPort(peerAddress);
    const { requestId, layerName } = splitTensorId(tensorId);
    const { promise, resolve, reject } = deferred<StoredTensor>();
    let open = true;
    let atPeer: readonly string[] = [];
    const take = (entry: StoreEntry) => {
      if (!open) return this.#intake.store.release(entry);
      if (!this.#intake.own(entry)) return fail(new PdError('REQUEST_ABORTED', `${tensorId}: finished`));
      open = false;
      const { shape, dtype, held } = entry;
      resolve({ tensorId: entry.tensorId, shape, dtype, memory: held.memory });
    };
    const fail = (error: PdError) => {
      if (!open) return;
      open = false;
      reject(error);
    };
    const waiting: Claimant = {
      requestId,
      transferId: transferIdOf(requestId),
      peer,
      wants: (layer) => open && layer === layerName,
      take,
      fail,
    };
    this.#receives.add(waiting);
    const deadline = deadlines.after(ms, () => {
      const held = heldInstead(this.#intake.store.nearMisses(requestId), atPeer, peer);
      fail(
        new PdError('KV_LOAD_TIMEOUT', `${tensorId} from ${peer} did not come within ${ms} ms; ${held}`, {
          tensorId,
          peer,
        }),
      );
    });
    if (options.sendType === 'GET') {
      const deadlineAt = deadlines.now() + ms;
      this.#intake.expect(requestId, waiting.transferId);
      const near = (tensorIds: readonly string[]) => {
        atPeer = tensorIds;
      };
      this.#ask({ tensorId, peer, deadlineAt, wanted: () => open, arrived: take, failed: fail, near });
    } else {
      this.#intake.claim(waiting);
    }
    return promise.finally(() => {
      deadline.cancel();
      this.#receives.delete(waiting);
      this.#intake.claims.unregister(waiting);
    });
  }

  cancel(requestId: string): void {
    const reason = new PdError('REQUEST_ABORTED', `load of ${requestId} was given up`, { requestId });
    for (const load of [...this.#loads]) if (load.requestId === requestId) load.cancel(reason);
  }

  waiting(): TransferState['waiting'] {
    const now = this.#context.deadlines.now();
    return [...this.#loads]
      .filter((load) => !load.decided)
      .map((load) => ({
        requestId: load.requestId,
        tensorId: load.tensorId(load.missing[0] ?? ''),
        peer: load.peer,
        sinceMs: Math.round(now - load.startedAt),
        deadlineMs: load.request.timeoutMs ?? this.#context.options.timeouts.load,
        nearMisses: load.nearMisses(),
      }));
  }

  /** Fails all of them. */
  dispose(reason: PdError): void {
    for (const load of [...this.#loads]) load.cancel(reason);
    for (const receive of [...this.#receives]) receive.fail(reason);
  }

  /** All layers at once, into neighbouring memory where that can be had. */
  #askLayers(load: Load, timeoutMs: number): void {
    const { layers, blockIds } = load.request;
    const sizes = layers.map(({ target }) => blockBytes(target.layout) * blockIds.length);
    const run = this.#context.memory.tryAllocateRun(sizes);
    for (const [index, { name }] of layers.entries()) {
      this.#ask(
        {
          tensorId: load.tensorId(name),
          peer: load.peer,
          bytes: sizes[index]!,
          deadlineAt: load.startedAt + timeoutMs,
          wanted: () => load.wants(name),
          arrived: (entry) => load.take(entry),
          failed: (error) => load.fail(error),
          near: (tensorIds) => load.seenAtPeer(tensorIds),
        },
        { load, held: run?.[index] },
      );
    }
  }

  /** Asks, and asks again after `{ret: 1}`, until the deadline of who wants it. `held`: memory for the first time. */
  #ask(
    asking: Asking,
    { load, held }: { readonly load?: Load; readonly held?: Held | undefined } = {},
    pauseMs = FIRST_PAUSE_MS,
  ): void {
    const { deadlines } = this.#context;
    const left = asking.deadlineAt - deadlines.now();
    if (!asking.wanted() || left <= 0) {
      held?.free();
      return;
    }
    const asked = load ? (this.#asked.get(load) ?? new Set()) : undefined;
    if (load && asked) this.#asked.set(load, asked);
    const get: GetAnnouncement = new GetAnnouncement(this.#context, this.#intake, {
      tensorId: asking.tensorId,
      peer: asking.peer,
      ...(asking.bytes === undefined ? {} : { bytes: asking.bytes }),
      arrived: (entry) => {
        asked?.delete(get);
        asking.arrived(entry);
      },
      failed: (error) => {
        asked?.delete(get);
        asking.failed(error);
      },
      missed: (near) => {
        asked?.delete(get);
        asking.near(near);
        const again = Math.min(pauseMs * 2, LONGEST_PAUSE_MS);
        deadlines.after(pauseMs, () => this.#ask(asking, load ? { load } : {}, again));
      },
    });
    asked?.add(get);
    this.#peers.outgoing(asking.peer).submit(get);
    if (held) get.give(held);
    else void get.reserve(left);
  }

  /** Once, at half the deadline: whoever reads the log now can still look at the other end. */
  #warn(load: Load, timeoutMs: number): void {
    if (load.decided) return;
    const { memory, log } = this.#context;
    const { requestId, transferId, peer, missing } = load;
    const near = load.nearMisses();
    log.warn(
      {
        requestId,
        transferId,
        peer,
        missing: missing.length,
        layers: load.request.layers.length,
        nearMisses: near,
        lostPair: this.#peers.lostPair(peer)?.message,
        held: this.#intake.store.size,
        pairs: this.#peers.pairs(peer),
        bufferUsed: memory.bufferUsed,
        bufferThreshold: memory.thresholdBytes,
        poolUsed: memory.poolUsed,
        poolLimit: memory.limitBytes,
      },
      `KV of ${requestId} from ${peer} is not here after half of its ${timeoutMs} ms: waiting for ` +
        `${load.tensorId(missing[0] ?? '')}; ${this.#pairWords(peer)}; ` +
        (near.length > 0 ? `held instead: ${near.join(', ')}` : 'nothing of a similar id is held'),
    );
  }

  #pairWords(peer: string): string {
    const pairs = this.#peers.pairs(peer);
    if (pairs.length === 0) return 'there is no pair with it';
    return pairs
      .map(
        ({ direction, state, sinceMs, queued, outstanding }) =>
          `${direction} pair ${state} since ${sinceMs} ms, ${queued} queued, ${outstanding} outstanding`,
      )
      .join(', ');
  }
}
