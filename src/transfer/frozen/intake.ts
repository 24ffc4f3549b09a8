/**
 * KV that comes in, whatever brought it: taken in if there is room, received, given to who waits for it, and freed when nobody does.
 * Memory is taken before an announcement is answered; what was answered `0` is received even if its request is over by then.
 */
import { PdError } from '../../errors.ts';
import { Aging } from '../../memories.ts';
import type { Pair } from '../../transport/transport.ts';
import { tensorBytes } from '../../wire/dtype.ts';
import { splitTensorId, type TransferId, withoutSuffix } from '../../wire/ids.ts';
import type { PutMessage } from '../../wire/messages.ts';
import { logTensor, type TransferContext, tensorFields } from '../context.ts';
import { Sweep } from '../deadlines.ts';
import type { Held } from '../kv-memory.ts';
import { type Claimant, ClaimBook } from './claims.ts';
import { contradicts, ReceiveStore, type StoreEntry, type TensorInfo } from './store.ts';

/** How many times as long as KV that nobody claims itself it is remembered that it is gone: a worker without blocks comes for it very late. */
const GONE_REMEMBERED = 10;

type Lost = Pick<Names, 'promptDigest'> & { readonly reason: PdError };

export class Intake {
  readonly store = new ReceiveStore();
  readonly claims: ClaimBook;
  /** Requests that are over, and of which prompt: tensors of theirs that still come are received, dropped and counted. */
  readonly #finished = new Aging<Pick<Names, 'promptDigest'>>();
  /** Requests of which a tensor was refused or lost: a load of one need not wait for its deadline. */
  readonly #lost = new Aging<Lost>();
  /** Likewise, and those whose KV was freed as nobody claimed it in time. Kept for longer, as requests may wait for long; but only until it is sent anew. */
  readonly #gone = new Aging<Lost>();
  readonly #context: TransferContext;
  /** Orphans and memories age together. */
  readonly #sweep: Sweep;

  constructor(context: TransferContext) {
    this.#context = context;
    const { deadlines, options } = context;
    this.#sweep = new Sweep(deadlines, options.timeouts.orphan / 4, () => this.#age());
    this.claims = new ClaimBook((transferId, requestIds) => {
      context.limited.log(`collision ${transferId}`, (suppressed) =>
        context.log.warn(
          { transferId, requestIds, suppressed },
          `KV of ${requestIds.join(' and of ')} could both be meant for ${transferId}: only that of exactly its id is taken`,
        ),
      );
    });
  }

  /** Memory for an announced tensor, or undefined: answer `1`. What comes for a request that is over is received all the same. */
  async admit(
    put: PutMessage,
    peer: string,
    told: Pick<TensorInfo, 'twoBlocks' | 'standsFor'>,
  ): Promise<StoreEntry | undefined> {
    const { tensor_id, shape, dtype, native } = put;
    const tensor = { tensorId: tensor_id, shape, dtype, peer, promptDigest: native?.promptDigest, ...told };
    if (this.#isDuplicate(tensor)) return undefined;
    const { memory, options } = this.#context;
    const mayHold = this.store.size < options.limits.maxTensors;
    const held = mayHold ? await memory.allocate(tensorBytes(shape, dtype)) : undefined;
    if (!held) {
      this.#refuse(tensor);
      return undefined;
    }
    // Room may have taken its time: the same tensor may have come from elsewhere, its request may have ended.
    if (this.#isDuplicate(tensor)) {
      held.free();
      return undefined;
    }
    const named = namesOf(tensor);
    // A tensor that comes soon after another was lost is of the same sending.
    for (const id of idsOf(named)) if (!this.#lost.get(id)) this.#gone.delete(id);
    const late = this.#isOver(named);
    if (late) this.#remember(named, overError(tensor));
    this.#sweep.arm();
    return this.store.open(tensor, held, this.#context.deadlines.now(), late ? 'dropped' : 'receiving');
  }

  /** As `receive`, of an admitted tensor: it goes to who waits for it. */
  post(entry: StoreEntry, pair: Pair): Promise<void> {
    return this.receive(entry, pair, {
      arrived: () => this.#arrived(entry),
      lost: (reason) => this.#lose(entry, reason),
    });
  }

  /**
   * Posts the receive of an entered tensor. In PUT the answer leaves after this, in the same turn. `lost` is told at once; the memory is free once
   * the pair is over. What was dropped is freed when it has come, and `arrived` is not told. Never rejects.
   */
  async receive(
    entry: StoreEntry,
    pair: Pair,
    on: { arrived(): void; lost(reason: PdError): void },
  ): Promise<void> {
    const { options, metrics } = this.#context;
    const { tensorId, held, peer } = entry;
    logTensor(this.#context, 'receive', entry, peer);
    try {
      await pair.receive([held.memory], { tensorId, timeoutMs: options.timeouts.transfer });
    } catch (error) {
      on.lost(PdError.from(error, 'PEER_LOST'));
      await pair.over;
      this.store.release(entry);
      return;
    }
    metrics.inc('pd_kv_received_bytes_total', held.bytes);
    if (this.store.arrived(entry)) return on.arrived();
    metrics.inc('pd_kv_late_dropped_total', 1);
    logTensor(this.#context, 'dropped, its request being over:', entry, peer);
  }

  /** Enters a tensor that a GET has been answered with; it belongs to who asked. */
  adopt(tensor: TensorInfo, held: Held, as: 'claimed' | 'dropped'): StoreEntry {
    return this.store.open(tensor, held, this.#context.deadlines.now(), as);
  }

  /** Somebody wants KV of this request, so it is not over, whatever was said before. */
  expect(transferId: TransferId): void {
    this.#finished.delete(transferId);
  }

  /** Starts waiting. What is known to be lost fails at once, what is there is taken at once. */
  claim(claimant: Claimant): void {
    const { transferId } = claimant;
    this.expect(transferId);
    const here = this.store.find(transferId).filter((entry) => {
      if (entry.state === 'ready' && contradicts(claimant, entry)) this.#dropOther(entry, [claimant]);
      return (entry.state === 'ready' || entry.state === 'receiving') && !contradicts(claimant, entry);
    });
    this.claims.register(claimant, here);
    const lost = this.lostReason(claimant);
    if (lost) claimant.fail(lost);
  }

  /** Its sender could not send it: whoever waits for it knows now, and who comes later too. */
  lost(transferId: TransferId, reason: PdError): void {
    this.#lose({ requestId: transferId }, reason);
  }

  /** Why KV of this request will not come, where that is known. */
  lostReason(claimant: Pick<Claimant, 'transferId' | 'promptDigest'>): PdError | undefined {
    for (const book of [this.#lost, this.#gone]) {
      const lost = book.get(claimant.transferId);
      // What another prompt has lost is nothing to it.
      if (lost && !contradicts(lost, claimant)) return lost.reason;
    }
    return undefined;
  }

  /** All KV of a load has come. */
  complete(transferId: TransferId): void {
    this.claims.complete(transferId);
  }

  /** A pair that brought tensors of `peer` died: what is not complete will not be. */
  peerLost(peer: string, reason: PdError): void {
    for (const claimant of this.claims.all()) if (claimant.peer === peer) claimant.fail(reason);
  }

  /** The tensor belongs to a caller until its request is finished; if it is finished already, it goes now. */
  own(entry: StoreEntry): boolean {
    if (this.#isOver(entry)) {
      this.store.release(entry);
      return false;
    }
    this.store.claim(entry, 'owned');
    return true;
  }

  finish(id: TransferId): void {
    const { log, deadlines } = this.#context;
    const { promptDigest, complete } = this.claims.finish(id);
    const { freed, dropped } = this.store.finish(id, promptDigest);
    this.#lost.delete(id);
    this.#gone.delete(id);
    // Where all has come, what comes under the id from now on is a later request's.
    if (!complete) this.#finished.set(id, { promptDigest }, deadlines.now());
    log.debug({ transferId: id, freed, dropped }, 'request finished');
    this.#sweep.arm();
  }

  #refuse(tensor: TensorInfo): void {
    const { memory, metrics, limited, log, failures } = this.#context;
    const { tensorId, peer, shape, dtype } = tensor;
    metrics.inc('pd_kv_refused_total', 1);
    const reason = new PdError(
      'KV_BUFFER_FULL',
      `no room for ${tensorId} of ${tensorBytes(shape, dtype)} bytes from ${peer}: ` +
        `${memory.bufferUsed} of ${memory.thresholdBytes} bytes of the buffer and ${memory.poolUsed} of ` +
        `${memory.limitBytes} bytes of the host pool are used, ${this.store.size} tensors held`,
      { tensorId, peer },
    );
    limited.log('no room', (suppressed) =>
      log.warn({ ...tensorFields(this.#context, tensor, peer), suppressed }, reason.message),
    );
    failures.note('refused', peer, reason);
    this.#lose(namesOf(tensor), reason);
  }

  #isDuplicate(tensor: TensorInfo): boolean {
    const known = this.store.get(tensor.tensorId);
    if (!known) return false;
    if (contradicts(known, tensor)) {
      // The id has been given to another prompt. What nobody has come for of the one before goes, though it may be on its way still.
      for (const entry of this.store.find(known.requestId)) {
        if (!contradicts(entry, tensor)) continue;
        if (entry.state === 'ready') this.#dropOther(entry, []);
        else if (entry.state === 'receiving' && !this.claims.awaits(entry)) {
          this.store.drop(entry);
          this.#warnOfOther(entry);
        }
      }
      return false;
    }
    const { metrics, limited, log } = this.#context;
    metrics.inc('pd_protocol_errors_total', 1, 'duplicate');
    limited.log(`duplicate ${tensor.peer}`, (suppressed) =>
      log.warn(
        { ...tensorFields(this.#context, tensor, tensor.peer), suppressed },
        `${tensor.peer} announces ${tensor.tensorId}, which is held already: refused`,
      ),
    );
    return true;
  }

  #arrived(entry: StoreEntry): void {
    logTensor(this.#context, 'received', entry, entry.peer);
    const contradicted = this.claims.contradicted(entry);
    if (contradicted.length > 0) this.#dropOther(entry, contradicted);
    else if (!this.claims.arrived(entry)) this.#warnOfSuffix(entry);
  }

  /** KV of another prompt than the one that its id stands for now, and who waits for that. */
  #dropOther(entry: StoreEntry, waiting: readonly Claimant[]): void {
    for (const claimant of waiting) claimant.otherPrompt?.(entry);
    this.store.release(entry);
    this.#context.metrics.inc('pd_kv_late_dropped_total', 1);
    this.#warnOfOther(entry);
  }

  #warnOfOther({ tensorId, requestId, peer }: StoreEntry): void {
    const { limited, log } = this.#context;
    limited.log(`other prompt ${requestId}`, (suppressed) =>
      log.warn(
        { tensorId, peer, suppressed },
        `${tensorId} from ${peer} is KV of another prompt than the request of that id here has: dropped. ` +
          'Two requests were given one id',
      ),
    );
  }

  /** Somebody waits for this but for what looks like a random suffix, and is not given it. */
  #warnOfSuffix({ tensorId, requestId, standsFor: meant, peer }: StoreEntry): void {
    const { limited, log, options } = this.#context;
    const stem = withoutSuffix(requestId);
    if (meant !== undefined || stem === undefined) return;
    if (options.kvKey === 'engine' || !this.claims.waits(stem)) return;
    limited.log(`suffix ${stem}`, (suppressed) =>
      log.warn(
        { tensorId, peer, transferId: stem, suppressed },
        `${tensorId} from ${peer} is nobody's: request ${stem} waits for KV, and this may be its own under a random suffix, ` +
          'but no proxy has made that id, so it may as well be another request. VLLM_DISABLE_REQUEST_ID_RANDOMIZATION=1 ' +
          'at the peer leaves the suffix off; --suffixed-ids any takes every such id for a suffixed one',
      ),
    );
  }

  /** It will not come: whoever waits for it knows now, and who comes later too. */
  #lose(tensor: Names, reason: PdError): void {
    if (this.#isOver(tensor)) return;
    for (const book of [this.#lost, this.#gone]) this.#remember(tensor, reason, book);
    this.#sweep.arm();
    for (const claimant of this.claims.claimantsOf(tensor)) claimant.fail(reason);
  }

  /** Its request has ended. KV of another prompt is a later request's of the same id, and not late. */
  #isOver(named: Names): boolean {
    return idsOf(named).some((id) => {
      const over = this.#finished.get(id);
      return over !== undefined && !contradicts(over, named);
    });
  }

  #remember(named: Names, reason: PdError, book = this.#lost): void {
    const now = this.#context.deadlines.now();
    for (const id of idsOf(named)) book.set(id, { promptDigest: named.promptDigest, reason }, now);
  }

  /** Whether anything is left that may age. */
  #age(): boolean {
    const { deadlines, options } = this.#context;
    const { orphan } = options.timeouts;
    const before = deadlines.now() - orphan;
    const orphans = this.store.freeOrphans(before);
    this.#finished.sweep(before);
    this.#lost.sweep(before);
    this.#gone.sweep(deadlines.now() - GONE_REMEMBERED * orphan);
    for (const entry of orphans) this.#remember(entry, orphanError(entry, orphan), this.#gone);
    if (orphans.length > 0) this.#tellOrphans(orphans);
    return this.store.size + this.#finished.size + this.#lost.size + this.#gone.size > 0;
  }

  #tellOrphans(orphans: readonly StoreEntry[]): void {
    const { metrics, log } = this.#context;
    metrics.inc('pd_kv_orphans_freed_total', orphans.length);
    const requests = [...new Set(orphans.map((entry) => entry.requestId))];
    const suffixed = requests.some((id) => withoutSuffix(id) !== undefined);
    log.warn(
      { tensors: orphans.length, requests: requests.slice(0, 5) },
      `freed ${orphans.length} tensors that no request claimed in time, of ${requests[0]}` +
        (requests.length > 1 ? ` and ${requests.length - 1} more requests` : '') +
        (suffixed ? ' (a vLLM worker here: VLLM_DISABLE_REQUEST_ID_RANDOMIZATION=1 makes ids match)' : ''),
    );
  }
}

type Names = Pick<StoreEntry, 'requestId' | 'standsFor' | 'promptDigest'>;

function namesOf({ tensorId, standsFor: meant, promptDigest }: TensorInfo): Names {
  return { requestId: splitTensorId(tensorId).requestId, standsFor: meant, promptDigest };
}

/** The ids of requests that it may be of. */
function idsOf({ requestId, standsFor: meant }: Names): readonly string[] {
  return meant === undefined ? [requestId] : [requestId, meant];
}

/** For a request that comes for KV when it is gone. */
function orphanError({ tensorId, peer }: StoreEntry, orphanMs: number): PdError {
  return new PdError(
    'KV_LOAD_FAILED',
    `${tensorId} from ${peer} was here and had to go, as its request did not come for it within ${orphanMs} ms: ` +
      'this worker has more to do than it has blocks for, or --kv-orphan-timeout is too short',
    { tensorId, peer },
  );
}

/** For a request that is given the id of one that is over, and whose KV was taken for that one's. */
function overError({ tensorId, peer }: TensorInfo): PdError {
  return new PdError(
    'KV_LOAD_FAILED',
    `${tensorId} from ${peer} came when a request of that id and prompt was over before its KV had come, and was dropped: ` +
      'the same prompt can have the same id again only after --kv-orphan-timeout',
    { tensorId, peer },
  );
}
