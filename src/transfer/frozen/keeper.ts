/** The producer's side of GET: keeps what is sent until it is asked for. */
import { PdError } from '../../errors.ts';
import { formShape, type WireForm } from '../../kv/families.ts';
import { Aging } from '../../memories.ts';
import type { Pair } from '../../transport/transport.ts';
import { tensorBytes } from '../../wire/dtype.ts';
import { splitTensorId, type TensorId, type TransferId } from '../../wire/ids.ts';
import { logTensor, passed, type TransferContext, tensorFields } from '../context.ts';
import { Sweep } from '../deadlines.ts';
import type { Held } from '../kv-memory.ts';
import type { SendRequest } from '../types.ts';
import { type DenseBlocks, denseBlocks, frozenForm, reform } from './form.ts';
import type { SendReply } from './put.ts';
import { type KeptTensor, SendStore } from './send-store.ts';
import { checkSource, type Stager } from './stager.ts';

export interface FrozenCopy {
  readonly shape: readonly number[];
  readonly held: Held;
}

export class Keeper {
  readonly store = new SendStore();
  readonly #context: TransferContext;
  readonly #stager: Stager;
  /** Requests being gathered; one that ends meanwhile is not kept. */
  readonly #gathering = new Set<{ readonly requestId: string; over: boolean }>();
  /** Tensors that gave way to others before anybody asked: who asks now need not ask again. */
  readonly #givenUp = new Aging<true>();
  readonly #sweep: Sweep;

  constructor(context: TransferContext, stager: Stager) {
    this.#context = context;
    this.#stager = stager;
    const { deadlines, options } = context;
    this.#sweep = new Sweep(deadlines, options.timeouts.orphan / 4, () => this.#age());
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
          this.store.keep({ ...request, dense: denseBlocks(request) }, held, deadlines.now());
          this.#givenUp.delete(tensorId);
          logTensor(this.#context, 'kept', request);
          this.#sweep.arm();
        }
        reply.gathered(true);
        reply.sent(bytes);
      },
      failed,
    });
  }

  /** The tensor, where it is here. `meant`: which request of ours a peer that is not ours may mean besides. */
  find(tensorId: TensorId, meant: TransferId | undefined): KeptTensor | undefined {
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

  /** It was kept, or was to be, and has had to go: it will not be here again. */
  gaveUp(tensorId: TensorId): boolean {
    return this.#givenUp.get(tensorId) ?? false;
  }

  /** Posts the send of a kept tensor. `leave`: it is fetched once and goes. The answer leaves after this, in the same turn. Never rejects. */
  async send(kept: KeptTensor, pair: Pair, leave: boolean): Promise<void> {
    this.store.beginSend(kept);
    const sent = await this.#send(kept.tensorId, kept.held, pair);
    this.store.endSend(kept, sent && leave);
  }

  /**
   * A copy of a kept tensor in the form that peers get which are not ours; undefined where that is its own. Rejects with KV_BUFFER_FULL.
   * Whoever asks frees it.
   */
  frozenCopy(kept: KeptTensor): Promise<FrozenCopy> | undefined {
    const { dense } = kept;
    const form = dense && frozenForm(dense, this.#context.options.wireLayout);
    return form && this.#copy(kept, dense, form);
  }

  /** As `send`, of a copy, which is freed then. */
  async sendCopy({ tensorId }: KeptTensor, { held }: FrozenCopy, pair: Pair): Promise<void> {
    await this.#send(tensorId, held, pair);
    held.free();
  }

  finish(id: string, keepSends: boolean): void {
    if (keepSends) return;
    this.store.finish(id);
    for (const one of this.#gathering) if (one.requestId === id) one.over = true;
  }

  async #copy(kept: KeptTensor, dense: DenseBlocks, form: WireForm): Promise<FrozenCopy> {
    const { options, memory, device, stream } = this.#context;
    const { tensorId, dtype } = kept;
    const shape = formShape(form, dense.layout);
    this.store.beginSend(kept);
    try {
      const held = await memory.waitFor(tensorBytes(shape, dtype), options.timeouts.transfer);
      if (!held) {
        const message = `no memory to bring ${tensorId} into the form [${shape}]`;
        throw new PdError('KV_BUFFER_FULL', message, { tensorId });
      }
      reform(device, dense, kept.held.memory, held.memory, form, stream);
      await passed(this.#context, `another form of ${tensorId}`);
      return { shape, held };
    } finally {
      this.store.endSend(kept, false);
    }
  }

  /** True once it has left; false where it has not, and its memory may be used for something else. */
  async #send(tensorId: TensorId, { memory, bytes }: Held, pair: Pair): Promise<boolean> {
    const { log, options, metrics } = this.#context;
    const { peer } = pair;
    logTensor(this.#context, 'send', { tensorId }, peer);
    try {
      await pair.send([memory], { tensorId, timeoutMs: options.timeouts.transfer });
    } catch (error) {
      log.warn({ peer, tensorId }, PdError.from(error).message);
      await pair.over;
      return false;
    }
    metrics.inc('pd_kv_sent_bytes_total', bytes);
    logTensor(this.#context, 'sent', { tensorId }, peer);
    return true;
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
    this.#givenUp.set(tensorId, true, this.#context.deadlines.now());
    this.#sweep.arm();
  }

  /** Whether anything is left that may age. */
  #age(): boolean {
    const { deadlines, options, metrics, log } = this.#context;
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
    return this.store.size + this.#givenUp.size > 0;
  }
}
