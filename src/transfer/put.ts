/** A PUT of ours: gathered, announced, and sent when the peer has said `0`. */
import { PdError } from '../errors.ts';
import type { Pair } from '../transport/transport.ts';
import type { TensorId } from '../wire/ids.ts';
import type { Answer, PutMessage } from '../wire/messages.ts';
import { Announcement, type Verdict } from './announcement.ts';
import { type TransferContext, tensorFields } from './context.ts';
import { checkSource, sendsInPlace, stage, stagingMemory, whenProduced } from './staging.ts';
import type { Held } from './store.ts';
import type { SendRequest } from './types.ts';

/** How a send goes on; each is called at most once. */
export interface SendReply {
  gathered(): void;
  sent(bytes: number): void;
  failed(error: PdError): void;
}

export class PutAnnouncement extends Announcement {
  readonly #context: TransferContext;
  readonly #request: SendRequest;
  readonly #peer: string;
  readonly #reply: SendReply;
  #staged: Held | undefined;
  #over = false;

  constructor(context: TransferContext, request: SendRequest, peer: string, reply: SendReply) {
    super();
    this.#context = context;
    this.#request = request;
    this.#peer = peer;
    this.#reply = reply;
  }

  get tensorId(): TensorId {
    return this.#request.tensorId;
  }

  get cancelled(): boolean {
    return this.#over;
  }

  /** Makes it ready, or fails it. */
  async prepare(): Promise<void> {
    try {
      const bytes = checkSource(this.#request);
      if (sendsInPlace(this.#context, this.#request)) {
        await whenProduced(this.#context, this.#request);
      } else {
        const held = await stagingMemory(this.#context, this.#request, bytes);
        try {
          await stage(this.#context, this.#request, held.memory);
        } catch (error) {
          // The gather may still write: its memory is given up rather than given to somebody else.
          if (this.#context.device.kind === 'host') held.free();
          throw error;
        }
        if (this.#over) return held.free();
        this.#staged = held;
        this.#reply.gathered();
      }
      this.markReady();
    } catch (error) {
      this.fail(PdError.from(error, 'KV_SEND_FAILED', { tensorId: this.tensorId, peer: this.#peer }));
    }
  }

  message(ours: boolean): PutMessage {
    const { shape, dtype } = this.#request;
    const put = { cmd: 'PUT', tensor_id: this.tensorId, shape, dtype } as const;
    return ours ? { ...put, ours: true } : put;
  }

  answered(answer: Answer, pair: Pair): Verdict {
    switch (answer.kind) {
      case 'send':
        this.#send(pair);
        return 'settled';
      case 'no-room':
        this.fail(
          new PdError('KV_BUFFER_FULL', `${this.#peer} has no room for ${this.tensorId} (answered 1)`, {
            tensorId: this.tensorId,
            peer: this.#peer,
          }),
        );
        return 'settled';
      default:
        return 'unexpected';
    }
  }

  fail(error: PdError): void {
    if (this.#over) return;
    this.#over = true;
    this.#staged?.free();
    this.#context.log.debug(
      { ...tensorFields(this.#context, this.#request, this.#peer), code: error.code },
      `send of ${this.tensorId} to ${this.#peer} failed: ${error.message}`,
    );
    this.#reply.failed(error);
  }

  #send(pair: Pair): void {
    const { source } = this.#request;
    const memory = this.#staged?.memory ?? (source.kind === 'flat' ? source.memory : undefined);
    const { tensorId } = this;
    const { log, metrics, options } = this.#context;
    if (!memory || this.#over) {
      const error = new PdError('INTERNAL', `${tensorId} was answered 0 and cannot be sent`, { tensorId });
      this.fail(error);
      pair.abort(error);
      return;
    }
    log.debug(tensorFields(this.#context, this.#request, this.#peer), `send ${tensorId}`);
    pair.send([memory], { tensorId, timeoutMs: options.timeouts.transfer }).then(
      () => {
        metrics.inc('pd_kv_sent_bytes_total', memory.bytes);
        log.debug(tensorFields(this.#context, this.#request, this.#peer), `sent ${tensorId}`);
        this.#over = true;
        this.#staged?.free();
        this.#reply.sent(memory.bytes);
      },
      async (error: unknown) => {
        // The transport may read the memory until the pair is over; only then is it anybody else's.
        await pair.over;
        this.fail(PdError.from(error, 'KV_SEND_FAILED', { tensorId, peer: this.#peer }));
      },
    );
  }
}
