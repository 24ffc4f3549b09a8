/** A GET of ours: asked of a producer, answered, and its data received. */
import type { MemoryRef } from '../../device/device.ts';
import { PdError } from '../../errors.ts';
import type { Pair } from '../../transport/transport.ts';
import { tensorBytes } from '../../wire/dtype.ts';
import type { TensorId } from '../../wire/ids.ts';
import type { Answer, GetMessage, TensorForm } from '../../wire/messages.ts';
import { logTensor, type TransferContext } from '../context.ts';
import { Announcement, type Reaction } from './announcement.ts';
import { sentAs } from './form.ts';
import type { Intake } from './intake.ts';
import type { Held, StoreEntry } from './store.ts';

export interface GetRequest {
  readonly tensorId: TensorId;
  readonly peer: string;
  /** Bytes expected; without it memory is taken when the answer says how much. */
  readonly bytes?: number;
  /** A request whose KV may be long in coming: the answer to a bundle waits for all of it, so that no other's goes along. */
  readonly early?: string | undefined;
  /** The bytes are there; the entry is the asker's, to release or to own. */
  arrived(entry: StoreEntry): void;
  /** The producer does not have it (yet); `near`: what it has of the same request under another id. */
  missed(near: readonly string[]): void;
  failed(error: PdError): void;
}

/** A tensor that was answered 0, in the books, and its bytes to come. */
export interface Incoming {
  readonly entry: StoreEntry;
  arrived(): void;
  /** It will not come: its asker knows at once, its memory is free once the pair is over. */
  broke(error: PdError, over: Promise<unknown>): Promise<void>;
}

export class GetAnnouncement extends Announcement {
  readonly direction = 'get';
  override readonly group: string | undefined;
  readonly #context: TransferContext;
  readonly #intake: Intake;
  readonly #request: GetRequest;
  /** Memory waits for the answer: whatever is answered 0 is sent, room or not. */
  #reserved: Held | undefined;
  #announced = false;
  #over = false;

  constructor(context: TransferContext, intake: Intake, request: GetRequest) {
    super();
    this.group = request.early;
    this.#context = context;
    this.#intake = intake;
    this.#request = request;
  }

  get tensorId(): TensorId {
    return this.#request.tensorId;
  }

  get bytes(): number | undefined {
    return this.#request.bytes;
  }

  get cancelled(): boolean {
    return this.#over;
  }

  get reserved(): MemoryRef | undefined {
    return this.#reserved?.memory;
  }

  /** Memory that was reserved for it together with others'; the announcement is ready then. */
  give(held: Held): void {
    if (this.#over) {
      held.free();
      return;
    }
    this.#reserved = held;
    this.markReady();
  }

  /** Reserves memory, waiting for others to free some for at most `timeoutMs`; the announcement is ready then. */
  async reserve(timeoutMs: number): Promise<void> {
    const { bytes } = this.#request;
    if (bytes === undefined) return this.markReady();
    const held = await this.#context.memory.waitFor(bytes, timeoutMs);
    if (held) return this.give(held);
    this.fail(this.#noRoom());
  }

  /** Set while it waits for memory to be asked with. */
  get lacksRoom(): PdError | undefined {
    return this.ready || this.#over ? undefined : this.#noRoom();
  }

  #noRoom(): PdError {
    const message = `no room for ${this.tensorId} of ${this.bytes} bytes to be asked for`;
    return new PdError('KV_BUFFER_FULL', message, { tensorId: this.tensorId });
  }

  /** It leaves: from now on it may be answered 0. */
  announce(): void {
    this.#announced = true;
  }

  message(ours: boolean, seq: number): GetMessage {
    const { tensorId } = this;
    this.announce();
    return ours ? { cmd: 'GET', tensor_id: tensorId, native: { seq } } : { cmd: 'GET', tensor_id: tensorId };
  }

  answered(answer: Answer, pair: Pair): Reaction {
    if (answer.kind !== 'get') return 'unexpected';
    if (answer.ret === 1) {
      this.miss(answer.gone ?? false, answer.near);
      return {};
    }
    const incoming = this.accept(answer, pair);
    return incoming ? { moved: this.#receive(incoming, pair) } : {};
  }

  /** The producer does not have it (yet); `gone`: not any more, so that asking again is in vain. */
  miss(gone: boolean, near: readonly string[] = []): void {
    this.#unreserve();
    if (this.#over) return;
    this.#over = true;
    if (gone) this.#request.failed(this.#goneError());
    else this.#request.missed(near);
  }

  /** Enters what is to come. Without room for it the pair ends: it would be sent all the same. */
  accept({ shape, dtype, promptDigest }: TensorForm, pair: Pair): Incoming | undefined {
    const { memory, metrics } = this.#context;
    const { peer } = this.#request;
    const { tensorId } = this;
    const bytes = tensorBytes(shape, dtype);
    if (this.#reserved?.bytes !== bytes) {
      this.#unreserve();
      this.#reserved = memory.tryAllocate(bytes);
    }
    const held = this.#reserved;
    this.#reserved = undefined;
    if (!held) {
      const error = new PdError(
        'KV_BUFFER_FULL',
        `${peer} sends ${tensorId} of ${bytes} bytes, for which there is no room: the pair must end`,
        { tensorId, peer },
      );
      this.fail(error);
      pair.abort(error);
      return undefined;
    }
    const dropped = this.#over;
    this.#over = true;
    const twoBlocks = sentAs(this.#context.options, undefined, this.peerIsOurs);
    const tensor = { tensorId, shape, dtype, peer, twoBlocks, promptDigest };
    const entry = this.#intake.adopt(tensor, held, dropped ? 'dropped' : 'claimed');
    logTensor(this.#context, 'receive', tensor, peer);
    return {
      entry,
      arrived: () => {
        metrics.inc('pd_kv_received_bytes_total', bytes);
        if (!dropped) return this.#request.arrived(entry);
        metrics.inc('pd_kv_late_dropped_total', 1);
        this.#intake.store.release(entry);
      },
      broke: async (error, over) => {
        if (!dropped) this.#request.failed(error);
        await over;
        this.#intake.store.release(entry);
      },
    };
  }

  fail(error: PdError): void {
    this.#unreserve();
    if (this.#over) return;
    this.#over = true;
    this.#request.failed(error);
    // It may stand at the head of the queue, still waiting for memory: nobody else would take it out.
    if (!this.#announced) this.markReady();
  }

  /** The owner wants it no more. An answer 0 that is under way is still received, then dropped. */
  cancel(): void {
    this.#over = true;
    if (this.#announced) return;
    this.#unreserve();
    this.markReady();
  }

  async #receive(incoming: Incoming, pair: Pair): Promise<void> {
    const { tensorId } = this;
    const { timeouts } = this.#context.options;
    try {
      await pair.receive([incoming.entry.held.memory], { tensorId, timeoutMs: timeouts.transfer });
    } catch (error) {
      return incoming.broke(PdError.from(error, 'PEER_LOST'), pair.over);
    }
    incoming.arrived();
  }

  #goneError(): PdError {
    const { peer, tensorId } = this.#request;
    return new PdError(
      'KV_LOAD_FAILED',
      `${peer} does not have ${tensorId}: it had no room to keep it, had to make room for others (pd_kv_evicted_total), or nobody asked in time`,
      { tensorId, peer },
    );
  }

  #unreserve(): void {
    this.#reserved?.free();
    this.#reserved = undefined;
  }
}
