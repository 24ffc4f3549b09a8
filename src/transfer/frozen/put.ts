/** A PUT of ours: gathered, announced, and sent when the peer has said `0`. */
import type { MemoryRef } from '../../device/device.ts';
import { PdError } from '../../errors.ts';
import type { Pair } from '../../transport/transport.ts';
import type { TensorId } from '../../wire/ids.ts';
import type { Answer, PutMessage } from '../../wire/messages.ts';
import { logTensor, type TransferContext } from '../context.ts';
import type { Held } from '../kv-memory.ts';
import type { FormedRequest } from './form.ts';
import { Announcement } from './link.ts';
import { checkSource, type Stager, stagingMemory } from './stager.ts';

/** How a send goes on; each is called at most once. */
export interface SendReply {
  /** `underWay`: there is a pair with the peer by then. */
  gathered(underWay: boolean): void;
  /** There is a pair with the peer now, and was none when it was gathered. */
  underWay(): void;
  sent(bytes: number): void;
  failed(error: PdError): void;
}

export class PutAnnouncement extends Announcement {
  readonly #context: TransferContext;
  readonly #request: FormedRequest;
  readonly #peer: string;
  readonly #reply: SendReply;
  #bytes = 0;
  #staged: Held | undefined;
  #over = false;
  #underWay = false;

  constructor(context: TransferContext, request: FormedRequest, peer: string, reply: SendReply) {
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
  prepare(stager: Stager): void {
    const request = this.#request;
    const fail = (error: unknown) =>
      this.fail(PdError.from(error, 'KV_SEND_FAILED', { tensorId: this.tensorId, peer: this.#peer }));
    try {
      this.#bytes = checkSource(request);
    } catch (error) {
      fail(error);
      return;
    }
    stager.add({
      request,
      bytes: this.#bytes,
      mayLieInPlace: true,
      room: () => stagingMemory(this.#context, request, this.#bytes),
      staged: (held) => {
        if (this.#over) return held?.free();
        this.#staged = held;
        if (held) this.#reply.gathered(this.#underWay);
        this.markReady();
      },
      failed: fail,
    });
  }

  override pairOpened(): void {
    if (this.#underWay || this.#over) return;
    this.#underWay = true;
    if (this.#staged) this.#reply.underWay();
  }

  message(native: boolean): PutMessage {
    const { tensorId, shape, dtype, plan, promptDigest } = this.#request;
    const put = { cmd: 'PUT', tensor_id: tensorId, shape, dtype } as const;
    // With our field a tensor is taken for one that lies as the cache does.
    return native && !plan ? { ...put, native: { promptDigest } } : put;
  }

  answered(answer: Answer, pair: Pair): boolean {
    const { tensorId } = this;
    switch (answer.kind) {
      case 'send':
        void this.#send(pair);
        return true;
      case 'no-room': {
        const message = `${this.#peer} has no room for ${tensorId} (answered 1)`;
        this.fail(new PdError('KV_BUFFER_FULL', message, { tensorId, peer: this.#peer }));
        return true;
      }
      default:
        return false;
    }
  }

  fail(error: PdError): void {
    if (this.#over) return;
    this.#over = true;
    this.#staged?.free();
    logTensor(this.#context, `${error.code}: not sent`, this.#request, this.#peer);
    this.#reply.failed(error);
  }

  /** Where its bytes lie once it is ready. */
  get #memory(): MemoryRef | undefined {
    const { source } = this.#request;
    return this.#staged?.memory ?? (source.kind === 'flat' ? source.memory : undefined);
  }

  async #send(pair: Pair): Promise<void> {
    const { tensorId } = this;
    const memory = this.#memory;
    if (!memory || this.#over) {
      const error = new PdError('INTERNAL', `${tensorId} was answered 0 and cannot be sent`, { tensorId });
      this.fail(error);
      pair.abort(error);
      return;
    }
    logTensor(this.#context, 'send', this.#request, this.#peer);
    try {
      await pair.send([memory], { tensorId, timeoutMs: this.#context.options.timeouts.transfer });
    } catch (error) {
      // The transport may read the memory until the pair is over; only then is it anybody else's.
      await pair.over;
      this.fail(PdError.from(error, 'KV_SEND_FAILED', { tensorId, peer: this.#peer }));
      return;
    }
    if (this.#over) return;
    this.#over = true;
    this.#staged?.free();
    this.#context.metrics.inc('pd_kv_sent_bytes_total', memory.bytes);
    logTensor(this.#context, 'sent', this.#request, this.#peer);
    this.#reply.sent(this.#bytes);
  }
}
