/** A GET of ours: asked of a producer, answered, and its data received. */
import { PdError } from '../../errors.ts';
import type { Pair } from '../../transport/transport.ts';
import { tensorBytes } from '../../wire/dtype.ts';
import type { TensorId } from '../../wire/ids.ts';
import type { Answer, GetMessage, TensorForm } from '../../wire/messages.ts';
import type { TransferContext } from '../context.ts';
import type { Held } from '../kv-memory.ts';
import { sentAs } from './form.ts';
import type { Intake } from './intake.ts';
import { Announcement } from './link.ts';
import type { StoreEntry } from './store.ts';

export interface GetRequest {
  readonly tensorId: TensorId;
  readonly peer: string;
  /** Bytes expected; without it memory is taken when the answer says how much. */
  readonly bytes: number | undefined;
  /** The bytes are there; the entry is the asker's, to release or to own. */
  arrived(entry: StoreEntry): void;
  /** The producer does not have it (yet); `near`: what it has of the same request under another id. */
  missed(near: readonly string[]): void;
  failed(error: PdError): void;
}

export class GetAnnouncement extends Announcement {
  readonly #context: TransferContext;
  readonly #intake: Intake;
  readonly #request: GetRequest;
  /** Memory waits for the answer: whatever is answered 0 is sent, room or not. */
  #reserved: Held | undefined;
  #announced = false;
  #over = false;

  constructor(context: TransferContext, intake: Intake, request: GetRequest) {
    super();
    this.#context = context;
    this.#intake = intake;
    this.#request = request;
  }

  get tensorId(): TensorId {
    return this.#request.tensorId;
  }

  get cancelled(): boolean {
    return this.#over;
  }

  /** Reserves memory, waiting for others to free some for at most `timeoutMs`; the announcement is ready then. */
  async reserve(timeoutMs: number): Promise<void> {
    const { bytes } = this.#request;
    if (bytes !== undefined) {
      const held = await this.#context.memory.waitFor(bytes, timeoutMs);
      if (!held) return this.fail(this.#noRoom());
      if (this.#over) return held.free();
      this.#reserved = held;
    }
    this.markReady();
  }

  /** Set while it waits for memory to be asked with. */
  get lacksRoom(): PdError | undefined {
    return this.ready || this.#over ? undefined : this.#noRoom();
  }

  message(): GetMessage {
    // From now on it may be answered 0.
    this.#announced = true;
    return { cmd: 'GET', tensor_id: this.tensorId };
  }

  answered(answer: Answer, pair: Pair, native: boolean): boolean {
    if (answer.kind !== 'get') return false;
    if (answer.ret === 0) this.#accept(answer, pair, native);
    else this.#miss(answer.gone ?? false, answer.near ?? []);
    return true;
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

  /** The producer does not have it (yet); `gone`: not any more, so that asking again is in vain. */
  #miss(gone: boolean, near: readonly string[]): void {
    this.#unreserve();
    if (this.#over) return;
    this.#over = true;
    if (!gone) {
      this.#request.missed(near);
      return;
    }
    const { peer, tensorId } = this.#request;
    const message = `${peer} does not have ${tensorId}: it had no room to keep it, had to make room for others (pd_kv_evicted_total), or nobody asked in time`;
    this.#request.failed(new PdError('KV_LOAD_FAILED', message, { tensorId, peer }));
  }

  /** Enters what is to come, and posts its receive. Without room for it the pair ends: it would be sent all the same. */
  #accept({ shape, dtype, promptDigest }: TensorForm, pair: Pair, native: boolean): void {
    const { peer, tensorId } = this.#request;
    const bytes = tensorBytes(shape, dtype);
    if (this.#reserved?.bytes !== bytes) {
      this.#unreserve();
      this.#reserved = this.#context.memory.tryAllocate(bytes);
    }
    const held = this.#reserved;
    this.#reserved = undefined;
    if (!held) {
      const message = `${peer} sends ${tensorId} of ${bytes} bytes, for which there is no room: the pair must end`;
      const error = new PdError('KV_BUFFER_FULL', message, { tensorId, peer });
      this.fail(error);
      pair.abort(error);
      return;
    }
    const wanted = !this.#over;
    this.#over = true;
    const twoBlocks = sentAs(this.#context.options, undefined, native);
    const tensor = { tensorId, shape, dtype, peer, twoBlocks, promptDigest };
    const entry = this.#intake.adopt(tensor, held, wanted ? 'claimed' : 'dropped');
    void this.#intake.receive(entry, pair, {
      arrived: () => this.#request.arrived(entry),
      lost: (error) => {
        if (wanted) this.#request.failed(error);
      },
    });
  }

  #noRoom(): PdError {
    const { tensorId, bytes } = this.#request;
    const message = `no room for ${tensorId} of ${bytes} bytes to be asked for`;
    return new PdError('KV_BUFFER_FULL', message, { tensorId });
  }

  #unreserve(): void {
    this.#reserved?.free();
    this.#reserved = undefined;
  }
}
