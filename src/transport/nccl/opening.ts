/** Opening a communicator: a non-blocking init that settles with its peer, or is aborted at its deadline. */
import type { CommSlot, Libnccl } from '../../../ffi/libnccl.ts';
import type { NcclCommHandle } from '../../../ffi/pointers.ts';
import { deferred } from '../../deferred.ts';
import type { Poll, PollLoop } from '../../device/poller.ts';
import { PdError } from '../../errors.ts';
import type { OpenOptions } from '../transport.ts';
import { abortOnThread } from './abort.ts';
import type { ProgressGate } from './gate.ts';

/** ncclInvalidUsage: what NCCL says of two ranks on one GPU, among other things. */
const INVALID_USAGE = 5;
const SAME_GPU =
  ' (are both ends on one GPU? NCCL refuses that: CUDA_VISIBLE_DEVICES or --device cuda:N gives each its own, --wire native --transport direct needs none)';

export interface OpeningParts {
  readonly nccl: Libnccl;
  readonly device: number;
  readonly channels: number;
  readonly loop: PollLoop;
  readonly gate: ProgressGate;
  /** Makes the GPU current in this thread. */
  readonly enter: () => void;
}

export class Opening {
  readonly #done = deferred<NcclCommHandle>();
  /** The communicator, once its peer has come. Rejects with PAIR_INIT_TIMEOUT, NCCL_ERROR or the reason of `cancel`. */
  readonly done = this.#done.promise;
  readonly #parts: OpeningParts;
  readonly #options: OpenOptions;
  readonly #what: string;
  readonly #deadline: number;
  #slot: CommSlot | undefined;
  #through = false;
  readonly #poll: Poll = (now) => this.#turn(now);

  constructor(parts: OpeningParts, options: OpenOptions) {
    this.#parts = parts;
    this.#options = options;
    this.#what = `opening a pair with ${options.peer} as rank ${options.rank}`;
    this.#deadline = performance.now() + options.timeoutMs;
    parts.loop.add(this.#poll);
    this.#turn(performance.now());
  }

  cancel(reason: PdError): void {
    if (this.#through) return;
    this.#fail(reason);
    this.#parts.loop.delete(this.#poll);
  }

  #turn(now: number): boolean {
    if (this.#through) return false;
    try {
      const comm = this.#settled();
      if (comm !== undefined) {
        this.#through = true;
        this.#slot?.release();
        this.#parts.gate.leave(this);
        this.#done.resolve(comm);
        return false;
      }
    } catch (error) {
      this.#fail(this.#describe(PdError.from(error, 'NCCL_ERROR')));
      return false;
    }
    if (now < this.#deadline) return true;
    this.#fail(this.#timeout());
    return false;
  }

  #settled(): NcclCommHandle | undefined {
    const { nccl, gate, channels, enter } = this.#parts;
    if (!this.#slot) {
      if (!gate.enter(this)) return undefined;
      enter();
      this.#slot = nccl.initRank(this.#options.uniqueId, this.#options.rank, { channels }, this.#what);
    }
    const comm = this.#slot.handle();
    return comm !== undefined && nccl.state(comm, this.#what) === 'settled' ? comm : undefined;
  }

  #fail(error: PdError): void {
    this.#through = true;
    const { gate, device } = this.#parts;
    const comm = this.#slot?.handle();
    if (comm === undefined) gate.leave(this);
    // The turn is kept until the abort has returned: until then NCCL is still at work on it.
    else {
      void abortOnThread({ device, comm }).then(() => {
        this.#slot?.release();
        gate.leave(this);
      });
    }
    this.#done.reject(error);
  }

  #timeout(): PdError {
    const { peer, timeoutMs } = this.#options;
    const begun = this.#slot
      ? 'NCCL found no peer'
      : 'another communicator was in progress (NCCL before 2.27 takes one at a time)';
    return new PdError(
      'PAIR_INIT_TIMEOUT',
      `${this.#what}: ${begun} within ${timeoutMs} ms${this.#version()}`,
      { peer, stage: 'pair-init' },
    );
  }

  #describe(error: PdError): PdError {
    const sameGpu = error.context['status'] === INVALID_USAGE ? SAME_GPU : '';
    const context = { ...error.context, peer: this.#options.peer, stage: 'pair-init' } as const;
    const message = `${error.message}${sameGpu}${this.#version()}`;
    return new PdError(error.code, message, context, { cause: error });
  }

  #version(): string {
    const { nccl } = this.#parts;
    return `; this end has NCCL ${nccl.versionText} (${nccl.library.path}), and the peer must have the same`;
  }
}
