/** A GET of ours: asked of a producer, answered, and its data received. */
import { PdError } from '../errors.ts';
import type { Pair } from '../transport/transport.ts';
import { type Dtype, tensorBytes } from '../wire/dtype.ts';
import type { TensorId } from '../wire/ids.ts';
import type { Answer, GetMessage } from '../wire/messages.ts';
import { Announcement, type Verdict } from './announcement.ts';
import { type TransferContext, tensorFields } from './context.ts';
import type { Intake } from './intake.ts';
import type { Held, StoreEntry } from './store.ts';

export interface GetRequest {
  readonly tensorId: TensorId;
  readonly peer: string;
  /** Bytes expected; without it memory is taken when the answer says how much. */
  readonly bytes?: number;
  /** The bytes are there; the entry is the asker's, to release or to own. */
  arrived(entry: StoreEntry): void;
  /** The producer does not have it (yet). */
  missed(): void;
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
      if (!held) {
        return this.fail(
          new PdError('KV_BUFFER_FULL', `no room for ${this.tensorId} of ${bytes} bytes to be asked for`, {
            tensorId: this.tensorId,
          }),
        );
      }
      if (this.#over) return held.free();
      this.#reserved = held;
    }
    this.markReady();
  }

  message(ours: boolean, seq: number): GetMessage {
    const { tensorId } = this;
    this.#announced = true;
    return ours ? { cmd: 'GET', tensor_id: tensorId, ours: { seq } } : { cmd: 'GET', tensor_id: tensorId };
  }

  answered(answer: Answer, pair: Pair): Verdict {
    if (answer.kind !== 'get') return 'unexpected';
    if (answer.ret === 0) this.#receive(answer.shape, answer.dtype, pair);
    else {
      this.#unreserve();
      if (!this.#over) {
        this.#over = true;
        if (answer.gone) this.#request.failed(this.#goneError());
        else this.#request.missed();
      }
    }
    return 'settled';
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

  #receive(shape: readonly number[], dtype: Dtype, pair: Pair): void {
    const { memory, options, metrics, log } = this.#context;
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
      return;
    }
    const dropped = this.#over;
    this.#over = true;
    const tensor = { tensorId, shape, dtype, peer };
    const entry = this.#intake.adopt(tensor, held, dropped ? 'dropped' : 'claimed');
    log.debug(tensorFields(this.#context, tensor, peer), `receive ${tensorId}`);
    pair.receive([held.memory], { tensorId, timeoutMs: options.timeouts.transfer }).then(
      () => {
        metrics.inc('pd_kv_received_bytes_total', bytes);
        if (!dropped) return this.#request.arrived(entry);
        metrics.inc('pd_kv_late_dropped_total', 1);
        this.#intake.store.release(entry);
      },
      async (error: unknown) => {
        if (!dropped) this.#request.failed(PdError.from(error, 'PEER_LOST'));
        await pair.over;
        this.#intake.store.release(entry);
      },
    );
  }

  #goneError(): PdError {
    const { peer, tensorId } = this.#request;
    return new PdError(
      'KV_LOAD_FAILED',
      `${peer} does not have ${tensorId} any more: it had to make room for others (pd_kv_evicted_total), or nobody asked in time`,
      { tensorId, peer },
    );
  }

  #unreserve(): void {
    this.#reserved?.free();
    this.#reserved = undefined;
  }
}
