/** The producer's side of GET: keeps what is sent until it is asked for, and lets who asks too early wait. */
import { PdError } from '../errors.ts';
import type { Pair } from '../transport/transport.ts';
import { splitTensorId, type TensorId } from '../wire/ids.ts';
import { type TransferContext, tensorFields } from './context.ts';
import type { Deadline } from './deadlines.ts';
import { GivenUpTensors } from './memories.ts';
import type { SendReply } from './put.ts';
import { type KeptTensor, SendStore } from './send-store.ts';
import { checkSource, stage } from './staging.ts';
import { belongsTo, type Held } from './store.ts';
import type { SendRequest } from './types.ts';

interface Parked {
  readonly tensorId: TensorId;
  readonly deadline: Deadline;
  readonly resolve: (kept: KeptTensor | undefined) => void;
}

/** GETs that wait at one time; beyond it `{ret: 1}` at once. */
const MOST_PARKED = 16_384;

export class Keeper {
  readonly store = new SendStore();
  readonly #context: TransferContext;
  /** Requests being gathered; one that ends meanwhile is not kept. */
  readonly #gathering = new Set<{ readonly requestId: string; over: boolean }>();
  readonly #givenUp = new GivenUpTensors();
  readonly #parked = new Map<string, Set<Parked>>();
  #parkedCount = 0;
  #sweeping = false;

  constructor(context: TransferContext) {
    this.#context = context;
  }

  /** Gathers and keeps one tensor. */
  async keep(request: SendRequest, reply: SendReply): Promise<void> {
    const { log, deadlines } = this.#context;
    const { tensorId } = request;
    const gathering = { requestId: splitTensorId(tensorId).requestId, over: false };
    this.#gathering.add(gathering);
    try {
      const bytes = checkSource(request);
      const held = await this.#room(request, bytes);
      try {
        await stage(this.#context, request, held.memory);
      } catch (error) {
        if (this.#context.device.kind === 'host') held.free();
        throw error;
      }
      if (gathering.over) held.free();
      else {
        const kept = this.store.keep(request, held, deadlines.now());
        this.#givenUp.delete(tensorId);
        log.debug(tensorFields(this.#context, request), `kept ${tensorId}`);
        this.#wake(kept);
        this.#armSweep();
      }
      reply.gathered();
      reply.sent(bytes);
    } catch (error) {
      this.#giveUp(tensorId);
      reply.failed(PdError.from(error, 'KV_SEND_FAILED', { tensorId }));
    } finally {
      this.#gathering.delete(gathering);
    }
  }

  /** The tensor, when it is there; undefined after `waitMs`. */
  async find(tensorId: TensorId, waitMs: number): Promise<KeptTensor | undefined> {
    const kept = this.#lookup(tensorId);
    if (kept || waitMs <= 0 || this.gaveUp(tensorId) || this.#parkedCount >= MOST_PARKED) return kept;
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
      const parked: Parked = { tensorId, deadline, resolve: settle };
      const set = this.#parked.get(layerName);
      if (set) set.add(parked);
      else this.#parked.set(layerName, new Set([parked]));
      this.#parkedCount++;
    });
  }

  /** It was kept, or was to be, and has had to go: it will not be here again. */
  gaveUp(tensorId: TensorId): boolean {
    return this.#givenUp.has(tensorId) && !this.#lookup(tensorId);
  }

  /** Posts the send of a kept tensor. `leave`: it is fetched once and goes. The answer leaves after this, in the same turn. */
  send(kept: KeptTensor, pair: Pair, peer: string, leave: boolean): void {
    const { log, options, metrics } = this.#context;
    const { tensorId, held } = kept;
    this.store.beginSend(kept);
    log.debug(tensorFields(this.#context, kept, peer), `send ${tensorId}`);
    pair.send([held.memory], { tensorId, timeoutMs: options.timeouts.transfer }).then(
      () => {
        metrics.inc('pd_kv_sent_bytes_total', held.bytes);
        log.debug(tensorFields(this.#context, kept, peer), `sent ${tensorId}`);
        this.store.endSend(kept, leave);
      },
      async (error: unknown) => {
        log.warn(tensorFields(this.#context, kept, peer), PdError.from(error).message);
        await pair.over;
        this.store.endSend(kept, false);
      },
    );
  }

  finish(id: string, keepSends: boolean): void {
    if (keepSends) return;
    this.store.finish(id);
    for (const one of this.#gathering) if (belongsTo(one.requestId, id)) one.over = true;
  }

  /** Answers everybody who waits: there is nothing. */
  dispose(): void {
    for (const set of [...this.#parked.values()]) for (const parked of [...set]) parked.resolve(undefined);
  }

  #lookup(tensorId: TensorId): KeptTensor | undefined {
    const found = this.store.lookup(tensorId);
    if (found.kind !== 'ambiguous') return found.kind === 'found' ? found.tensor : undefined;
    const { requestIds } = found;
    this.#context.limited.log(`collision ${requestIds.join()}`, (suppressed) =>
      this.#context.log.warn(
        { tensorId, requestIds, suppressed },
        `GET ${tensorId} could mean ${requestIds.join(' or ')}: they share a transfer id, so neither is sent`,
      ),
    );
    return undefined;
  }

  #wake(kept: KeptTensor): void {
    for (const parked of [...(this.#parked.get(kept.layerName) ?? [])]) {
      if (this.#lookup(parked.tensorId) === kept) parked.resolve(kept);
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
