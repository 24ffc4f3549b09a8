/** Loads and receives under way: their deadlines, and in GET the asking. */
import { deferred } from '../../deferred.ts';
import { PdError } from '../../errors.ts';
import { blockBytes } from '../../kv/layout.ts';
import { formatHostPort } from '../../net/address.ts';
import { splitTensorId, type TensorId, type TransferId, transferIdOf } from '../../wire/ids.ts';
import type { TransferContext } from '../context.ts';
import { PeerWatch } from '../peer-watch.ts';
import type { LoadRequest, LoadResult, StoredTensor, TransferState } from '../types.ts';
import type { Claimant } from './claims.ts';
import { GetAnnouncement } from './get.ts';
import type { Intake } from './intake.ts';
import { heldInstead, Load, type PairsOfPeer } from './load.ts';
import type { OutgoingPeers } from './peer.ts';
import { contradicts, type StoreEntry } from './store.ts';

/** Between GETs of one load that are answered `{ret: 1}`: this share of the time in which nothing has come, within these bounds. */
const PAUSE = { share: 0.25, leastMs: 1, mostMs: 20 } as const;

/** How long a load may take, and what watches that. */
interface Limit {
  /** On the engine's clock. */
  readonly at: number;
  /** The producer may still be computing the prompt. */
  readonly prefilling: boolean;
  cancel(): void;
}

/** What is asked for in GET. */
interface Wanted {
  readonly tensorId: TensorId;
  /** Where they are known. */
  readonly bytes: number | undefined;
  readonly deadlineAt: number;
}

/** What has become of it. */
interface Asking {
  /** Not answered, or on their way. */
  readonly gets: Set<GetAnnouncement>;
  /** Not there when they were asked for. */
  readonly missed: Wanted[];
  /** When the last has come, or when the first was asked for; the engine's clock. */
  since: number;
  pausing: boolean;
}

export interface LoadPeers extends PairsOfPeer {
  readonly outgoing: OutgoingPeers;
}

export class Loads {
  readonly #context: TransferContext;
  readonly #intake: Intake;
  readonly #peers: LoadPeers;
  readonly #loads = new Map<Load, Limit>();
  readonly #receives = new Set<Claimant>();
  /** Who looks after the producers of loads, in PUT. */
  readonly #watches = new WeakMap<Load, PeerWatch>();
  /** In GET. */
  readonly #asked = new Map<Claimant, Asking>();

  constructor(context: TransferContext, intake: Intake, peers: LoadPeers) {
    this.#context = context;
    this.#intake = intake;
    this.#peers = peers;
  }

  load(request: LoadRequest): Promise<LoadResult> {
    const { options, log, metrics, failures } = this.#context;
    const { requestId, transferId, prefillWithinMs } = request;
    const timeoutMs = this.#timeoutOf(request) + (prefillWithinMs ?? 0);
    for (const other of this.#loads.keys()) {
      if (other.transferId !== transferId) continue;
      const message = `load of ${requestId}: another load of ${transferId} is under way`;
      return Promise.reject(new PdError('REQUEST_INVALID', message, { requestId, transferId }));
    }
    const { promise, resolve, reject } = deferred<LoadResult>();
    const load = new Load(this.#context, this.#intake, request, { resolve, reject });
    const peer = load.peer;
    log.debug({ requestId, transferId, peer, layers: request.layers.length }, `load ${requestId}`);
    this.#limit(load, timeoutMs, prefillWithinMs !== undefined);
    // A pair that was lost before the producer had anything to send is opened anew when it has, which is by the look after the notice.
    let forgiven = prefillWithinMs === undefined ? undefined : this.#peers.lostPair(peer);
    const lostPair = () => {
      const lost = this.#peers.lostPair(peer);
      if (lost !== forgiven) return lost;
      if (!this.#loads.get(load)?.prefilling) forgiven = undefined;
      return undefined;
    };
    // In GET our own link to the peer knows.
    const watch =
      options.sendType === 'GET'
        ? undefined
        : new PeerWatch(this.#context, load, request.peer, {
            lost: lostPair,
            last: () => this.#peers.lostPair(peer),
          });
    if (watch) {
      this.#watches.set(load, watch);
      this.#intake.claim(load);
    } else {
      this.#intake.expect(transferId);
      const lost = this.#intake.lostReason(load);
      if (lost) load.fail(lost);
      else this.#askLayers(load);
    }
    return promise
      .catch((error: unknown) => {
        failures.note('load', peer, PdError.from(error));
        throw error;
      })
      .then((result) => {
        this.#intake.complete(transferId);
        failures.wentWell('load', peer);
        metrics.observe('pd_transfer_seconds', result.milliseconds / 1_000);
        log.debug({ requestId, transferId, peer, bytes: result.bytes }, `loaded ${requestId}`);
        return result;
      })
      .finally(() => {
        this.#loads.get(load)?.cancel();
        watch?.stop();
        this.#loads.delete(load);
        this.#forget(load);
      });
  }

  /** Waits for one tensor of any size, or asks for it. */
  receive(tensorId: TensorId, peerAddress: LoadRequest['peer'], timeoutMs?: number): Promise<StoredTensor> {
    const { options, deadlines } = this.#context;
    const ms = timeoutMs ?? options.timeouts.load;
    const peer = formatHostPort(peerAddress);
    const { requestId, layerName } = splitTensorId(tensorId);
    const transferId = transferIdOf(requestId);
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
      transferId,
      peer,
      wants: (layer) => open && layer === layerName,
      take,
      fail,
      seenAtPeer: (tensorIds) => {
        atPeer = tensorIds;
      },
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
      this.#intake.expect(transferId);
      this.#ask(waiting, { tensorId, bytes: undefined, deadlineAt: deadlines.now() + ms });
    } else {
      this.#intake.claim(waiting);
    }
    return promise.finally(() => {
      deadline.cancel();
      this.#receives.delete(waiting);
      this.#forget(waiting);
    });
  }

  cancel(requestId: string): void {
    const reason = new PdError('REQUEST_ABORTED', `load of ${requestId} was given up`, { requestId });
    for (const load of [...this.#loads.keys()]) if (load.requestId === requestId) load.cancel(reason);
  }

  /** The prompt of these is computed: from now on they wait no longer than for KV that is on its way. */
  prefilled(transferId: TransferId): void {
    for (const load of [...this.#loads.keys()]) {
      const { request } = load;
      if (request.prefillWithinMs === undefined || load.transferId !== transferId) continue;
      if (!load.decided) this.#limit(load, this.#timeoutOf(request), false);
    }
  }

  waiting(): TransferState['waiting'] {
    const now = this.#context.deadlines.now();
    return [...this.#loads]
      .filter(([load]) => !load.decided)
      .map(([load, { at, prefilling }]) => ({
        requestId: load.requestId,
        tensorId: load.tensorId(load.missing[0] ?? ''),
        peer: load.peer,
        sinceMs: Math.round(now - load.startedAt),
        deadlineMs: Math.round(at - load.startedAt),
        nearMisses: load.nearMisses(),
        ...(prefilling && { prefilling }),
      }));
  }

  /** The producer could not send it: whoever waits for it, now or later, knows at once. In GET too, where it would be asked for in vain. */
  sendFailed(transferId: TransferId, reason: PdError): void {
    this.#intake.lost(transferId, reason);
    for (const load of [...this.#loads.keys()]) if (load.transferId === transferId) load.fail(reason);
  }

  /** Fails all of them. */
  dispose(reason: PdError): void {
    for (const load of [...this.#loads.keys()]) load.cancel(reason);
    for (const receive of [...this.#receives]) receive.fail(reason);
  }

  #timeoutOf(request: LoadRequest): number {
    return request.timeoutMs ?? this.#context.options.timeouts.load;
  }

  /** Gives it so long from its start, and later from now in place of what it had; longer than that it never gets. */
  #limit(load: Load, timeoutMs: number, prefilling: boolean): void {
    const { deadlines } = this.#context;
    const known = this.#loads.get(load);
    const at = (known ? deadlines.now() : load.startedAt) + timeoutMs;
    if (known && known.at <= at) return;
    known?.cancel();
    const half = deadlines.after(timeoutMs / 2, () => load.warnLate(this.#peers, timeoutMs));
    const end = deadlines.after(timeoutMs, () => {
      const [roomless] = [...(this.#asked.get(load)?.gets ?? [])].flatMap(({ lacksRoom }) => lacksRoom ?? []);
      load.timeOut(timeoutMs, this.#peers, this.#watches.get(load)?.port, roomless);
    });
    const cancel = () => {
      half.cancel();
      end.cancel();
    };
    this.#loads.set(load, { at, prefilling, cancel });
  }

  #askLayers(load: Load): void {
    const { layers, blockIds } = load.request;
    const deadlineAt = this.#loads.get(load)?.at ?? load.startedAt;
    for (const { name, target } of layers) {
      const bytes = blockBytes(target.layout) * blockIds.length;
      this.#ask(load, { tensorId: load.tensorId(name), bytes, deadlineAt });
    }
  }

  #ask(claimant: Claimant, wanted: Wanted): void {
    const { tensorId, bytes, deadlineAt } = wanted;
    const now = this.#context.deadlines.now();
    const left = deadlineAt - now;
    if (!claimant.wants(splitTensorId(tensorId).layerName) || left <= 0) return;
    const asking = this.#asked.get(claimant) ?? { gets: new Set(), missed: [], since: now, pausing: false };
    this.#asked.set(claimant, asking);
    const { gets } = asking;
    const { peer } = claimant;
    const get: GetAnnouncement = new GetAnnouncement(this.#context, this.#intake, {
      tensorId,
      peer,
      bytes,
      arrived: (entry) => {
        gets.delete(get);
        if (contradicts(claimant, entry)) {
          // KV of another prompt is dropped, and asked for again: the right one may come under the same id.
          claimant.otherPrompt?.(entry);
          this.#intake.store.release(entry);
          this.#askLater(claimant, asking, wanted);
          return;
        }
        claimant.take(entry);
        asking.since = this.#context.deadlines.now();
        for (const one of asking.missed.splice(0)) this.#ask(claimant, one);
      },
      failed: (error) => {
        gets.delete(get);
        claimant.fail(error);
      },
      missed: (near) => {
        gets.delete(get);
        claimant.seenAtPeer?.(near);
        this.#askLater(claimant, asking, wanted);
      },
    });
    gets.add(get);
    this.#peers.outgoing.of(peer).submit(get);
    void get.reserve(left);
  }

  /** One tensor is asked for again while none comes, and all that are missed once one has: where a layer is, the others soon are. */
  #askLater(claimant: Claimant, asking: Asking, wanted: Wanted): void {
    asking.missed.push(wanted);
    if (asking.pausing) return;
    asking.pausing = true;
    const { deadlines } = this.#context;
    const waitedMs = deadlines.now() - asking.since;
    const pauseMs = Math.min(Math.max(waitedMs * PAUSE.share, PAUSE.leastMs), PAUSE.mostMs);
    deadlines.after(pauseMs, () => {
      asking.pausing = false;
      const next = asking.missed.shift();
      if (next) this.#ask(claimant, next);
    });
  }

  #forget(claimant: Claimant): void {
    this.#intake.claims.unregister(claimant);
    const asking = this.#asked.get(claimant);
    this.#asked.delete(claimant);
    for (const get of asking?.gets ?? []) get.cancel();
  }
}
