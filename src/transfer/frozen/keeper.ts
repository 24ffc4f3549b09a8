/** The producer's side of GET: keeps what is sent until it is asked for, and lets who asks too early wait. */
import type { MemoryRef } from '../../device/device.ts';
import { PdError } from '../../errors.ts';
import { formShape } from '../../kv/families.ts';
import type { Pair } from '../../transport/transport.ts';
import { tensorBytes } from '../../wire/dtype.ts';
import { splitTensorId, type TensorId, type TransferId, tensorIdOf } from '../../wire/ids.ts';
import { logTensor, type TransferContext, tensorFields } from '../context.ts';
import type { Deadline } from '../deadlines.ts';
import { checkSource, passed } from '../staging.ts';
import type { SendRequest } from '../types.ts';
import { denseBlocks, foreignForm, reform } from './form.ts';
import { GivenUpTensors } from './memories.ts';
import type { SendReply } from './put.ts';
import { type KeptTensor, SendStore } from './send-store.ts';
import type { Stager } from './stager.ts';
import type { Held } from './store.ts';

export interface ForeignCopy {
  readonly shape: readonly number[];
  readonly held: Held;
}

interface Parked {
  readonly tensorId: TensorId;
  /** Which of our requests a peer that is not ours may mean besides. */
  readonly meant: TransferId | undefined;
  readonly deadline: Deadline;
  readonly resolve: (kept: KeptTensor | undefined) => void;
}

/** GETs that wait at one time; beyond it `{ret: 1}` at once. */
const MOST_PARKED = 16_384;

export class Keeper {
  readonly store = new SendStore();
  readonly #context: TransferContext;
  readonly #stager: Stager;
  /** Requests being gathered; one that ends meanwhile is not kept. */
  readonly #gathering = new Set<{ readonly requestId: string; over: boolean }>();
  readonly #givenUp = new GivenUpTensors();
  readonly #parked = new Map<string, Set<Parked>>();
  #parkedCount = 0;
  #sweeping = false;

  constructor(context: TransferContext, stager: Stager) {
    this.#context = context;
    this.#stager = stager;
  }

  /** Gathers and keeps one tensor. */
  keep(request: SendRequest, reply: SendReply): void {
    const { deadlines } = this.#context;
    const { tensorId } = request;
    const gathering = { requestId: splitTensorId(tensorId).requestId, over: false };
    const failed = (error: unknown) => {
      this.#gathering.delete(gathering);
      this.#giveUp(tensorId);
      reply.failed(PdError.from(error, 'KV_SEND_FAILED', { tensorId }));
    };
    let bytes: number;
    try {
      bytes = checkSource(request);
    } catch (error) {
      failed(error);
      return;
    }
    this.#gathering.add(gathering);
    this.#stager.add({
      request,
      bytes,
      mayLieInPlace: false,
      room: () => this.#room(request, bytes),
      staged: (held) => {
        this.#gathering.delete(gathering);
        if (!held) return failed(new PdError('INTERNAL', `${tensorId} was not copied`));
        if (gathering.over) held.free();
        else {
          const kept = this.store.keep({ ...request, dense: denseBlocks(request) }, held, deadlines.now());
          this.#givenUp.delete(tensorId);
          logTensor(this.#context, 'kept', request);
          this.#wake(kept);
          this.#armSweep();
        }
        reply.gathered(true);
        reply.sent(bytes);
      },
      failed,
    });
  }

  /** The tensor, when it is there; undefined after `waitMs`. */
  async find(tensorId: TensorId, waitMs: number, meant?: TransferId): Promise<KeptTensor | undefined> {
    const kept = this.#lookup(tensorId, meant);
    if (kept || waitMs <= 0 || this.gaveUp(tensorId, meant) || this.#parkedCount >= MOST_PARKED) return kept;
    const { layerName } = splitTensorId(tensorId);
    return new Promise((resolve) => {
      const deadline = this.#context.deadlines.after(waitMs, () => settle(undefined));
      const settle = (found: KeptTensor | undefined) => {
        deadline.cancel();
        const set = this.#parked.get(layerName);
        if (!set?.delete(parked)) return;
        this.#parkedCount--;
        if (set.size === 0) this.#parked.delete(layerName);
        resolve(found);
      };
      const parked: Parked = { tensorId, meant, deadline, resolve: settle };
      const set = this.#parked.get(layerName);
      if (set) set.add(parked);
      else this.#parked.set(layerName, new Set([parked]));
      this.#parkedCount++;
    });
  }

  /** It was kept, or was to be, and has had to go: it will not be here again. */
  gaveUp(tensorId: TensorId, meant?: TransferId): boolean {
    const { layerName } = splitTensorId(tensorId);
    const given =
      this.#givenUp.has(tensorId) || (meant !== undefined && this.#givenUp.has(tensorIdOf(meant, layerName)));
    return given && !this.#lookup(tensorId, meant);
  }

  /**
   * Posts the send of kept tensors as one operation. `leave`: they are fetched once and go. The answer leaves after this, in the same
   * turn. Never rejects.
   */
  async send(
    kept: readonly KeptTensor[],
    regions: readonly MemoryRef[],
    pair: Pair,
    leave: boolean,
  ): Promise<void> {
    const { log, options, metrics } = this.#context;
    const { peer } = pair;
    for (const one of kept) {
      this.store.beginSend(one);
      logTensor(this.#context, 'send', one, peer);
    }
    const more = kept.length > 1 ? ` and ${kept.length - 1} more` : '';
    const tensorId = `${kept[0]?.tensorId}${more}`;
    try {
      await pair.send(regions, { tensorId, timeoutMs: options.timeouts.transfer });
    } catch (error) {
      log.warn({ peer, tensors: kept.length }, PdError.from(error).message);
      await pair.over;
      for (const one of kept) this.store.endSend(one, false);
      return;
    }
    for (const one of kept) {
      metrics.inc('pd_kv_sent_bytes_total', one.held.bytes);
      logTensor(this.#context, 'sent', one, peer);
      this.store.endSend(one, leave);
    }
  }

  /**
   * A copy of a kept tensor in the form that peers get which are not ours; undefined where that is its own. Throws KV_BUFFER_FULL. Whoever
   * asks frees it.
   */
  async foreignCopy(kept: KeptTensor): Promise<ForeignCopy | undefined> {
    const { options, memory, device, stream } = this.#context;
    const { dense, tensorId, dtype } = kept;
    const form = dense && foreignForm(dense, options.wireLayout);
    if (!form) return undefined;
    const shape = formShape(form, dense.layout);
    this.store.beginSend(kept);
    try {
      const held = await memory.waitFor(tensorBytes(shape, dtype), options.timeouts.transfer);
      if (!held)
        throw new PdError('KV_BUFFER_FULL', `no memory to bring ${tensorId} into the form [${shape}]`, {
          tensorId,
        });
      reform(device, dense, kept.held.memory, held.memory, form, stream);
      await passed(this.#context, `another form of ${tensorId}`);
      return { shape, held };
    } finally {
      this.store.endSend(kept, false);
    }
  }

  /** Posts the send of a copy, and frees it. The answer leaves after this, in the same turn. Never rejects. */
  async sendCopy({ tensorId }: KeptTensor, { held }: ForeignCopy, pair: Pair): Promise<void> {
    const { log, metrics, options } = this.#context;
    try {
      await pair.send([held.memory], { tensorId, timeoutMs: options.timeouts.transfer });
      metrics.inc('pd_kv_sent_bytes_total', held.bytes);
    } catch (error) {
      log.warn({ peer: pair.peer, tensorId }, PdError.from(error).message);
      await pair.over;
    }
    held.free();
  }

  finish(id: string, keepSends: boolean): void {
    if (keepSends) return;
    this.store.finish(id);
    for (const one of this.#gathering) if (one.requestId === id) one.over = true;
  }

  /** Answers everybody who waits: there is nothing. */
  dispose(): void {
    for (const set of [...this.#parked.values()]) for (const parked of [...set]) parked.resolve(undefined);
  }

  #lookup(tensorId: TensorId, meant: TransferId | undefined): KeptTensor | undefined {
    const found = this.store.lookup(tensorId, meant);
    if (found.kind !== 'ambiguous') return found.kind === 'found' ? found.tensor : undefined;
    const { requestIds } = found;
    this.#context.limited.log(`collision ${requestIds.join()}`, (suppressed) =>
      this.#context.log.warn(
        { tensorId, requestIds, suppressed },
        `GET ${tensorId}: its request has been asked for as ${requestIds[0]} before, and nothing tells which of the two is meant: not sent`,
      ),
    );
    return undefined;
  }

  #wake(kept: KeptTensor): void {
    for (const parked of [...(this.#parked.get(kept.layerName) ?? [])]) {
      if (this.#lookup(parked.tensorId, parked.meant) === kept) parked.resolve(kept);
    }
  }

  /** Room for a tensor to keep: the oldest go for it, and while all are being sent it waits. */
  async #room(request: SendRequest, bytes: number): Promise<Held> {
    const { memory, metrics, options, log } = this.#context;
    let held: Held | undefined = await memory.allocate(bytes);
    while (!held && memory.canEverHold(bytes)) {
      const evicted = this.store.evict();
      if (!evicted) break;
      metrics.inc('pd_kv_evicted_total', 1);
      this.#giveUp(evicted.tensorId);
      log.debug(tensorFields(this.#context, evicted), `evicted ${evicted.tensorId} for ${request.tensorId}`);
      held = memory.tryAllocate(bytes);
    }
    held ??= await memory.waitFor(bytes, options.timeouts.transfer);
    if (held) return held;
    throw new PdError(
      'KV_BUFFER_FULL',
      `no room to keep ${request.tensorId} of ${bytes} bytes: ${memory.usedBytes} bytes are used, ` +
        `${memory.thresholdBytes} of buffer and ${memory.limitBytes} of host pool are allowed`,
      { tensorId: request.tensorId },
    );
  }

  #giveUp(tensorId: TensorId): void {
    this.#givenUp.add(tensorId, this.#context.deadlines.now());
    // Whoever waits for it waits in vain.
    for (const parked of [...(this.#parked.get(splitTensorId(tensorId).layerName) ?? [])]) {
      if (this.gaveUp(parked.tensorId, parked.meant)) parked.resolve(undefined);
    }
    this.#armSweep();
  }

  #armSweep(): void {
    if (this.#sweeping) return;
    this.#sweeping = true;
    const { deadlines, options, metrics, log } = this.#context;
    deadlines.after(options.timeouts.orphan / 4, () => {
      this.#sweeping = false;
      const before = deadlines.now() - options.timeouts.orphan;
      const orphans = this.store.freeOrphans(before);
      this.#givenUp.sweep(before);
      for (const { tensorId } of orphans) this.#giveUp(tensorId);
      if (orphans.length > 0) {
        metrics.inc('pd_kv_orphans_freed_total', orphans.length);
        log.warn(
          { tensors: orphans.length, first: orphans[0]!.tensorId },
          `freed ${orphans.length} tensors that nobody has asked for in time`,
        );
      }
      if (this.store.size + this.#givenUp.size > 0) this.#armSweep();
    });
  }
}
