/**
 * One communicator of two ranks, with a stream of its own: with one stream for all pairs, crossing transfers of several peers deadlock.
 *
 *   queued --exchange()--> settling --NCCL has enqueued it--> in flight --its event fires--> resolved
 *
 * At most one is settling, since the next NCCL call must wait for it; many are in flight. A pair that has to end rejects all of them at
 * once, has the communicator aborted on another thread, and is over when its stream has drained.
 */
import type { Libnccl, Region } from '../../../ffi/libnccl.ts';
import type { NcclCommHandle } from '../../../ffi/pointers.ts';
import { deferred } from '../../deferred.ts';
import { type CudaStream, hasDrained } from '../../device/cuda/stream.ts';
import type { DeviceEvent, MemoryRef } from '../../device/device.ts';
import type { Poll, PollLoop } from '../../device/poller.ts';
import { PdError } from '../../errors.ts';
import type { OperationOptions, Pair } from '../transport.ts';
import { abortOnThread } from './abort.ts';
import type { ProgressGate } from './gate.ts';

/** Operations in the stream at a time; more would only lengthen what an abort has to clear away. */
const MAX_IN_FLIGHT = 64;
/** NCCL reports a lost peer rarely and late, but where it does this is how soon it is heard; milliseconds. */
const ERROR_CHECK_EVERY = 10;
/** For the peer to close as well; milliseconds. */
const CLOSE_DEADLINE = 1_000;
/** An operation that NCCL may still have been launching when the abort began has surely met the abort after this; milliseconds. */
const LAUNCH_GRACE = 5_000;
/** Between looks at the stream of a pair that ends; milliseconds. */
const DRAIN_POLL = { first: 1, most: 50 } as const;

/** One send or receive on its way. */
interface Operation {
  readonly direction: 'send' | 'receive';
  readonly regions: readonly Region[];
  readonly options: OperationOptions;
  readonly resolve: () => void;
  readonly reject: (error: PdError) => void;
  /** When nothing of this pair was ahead of it any more; the deadline counts from here. */
  startedAt?: number;
  /** Marks its end in the pair's stream, once NCCL has enqueued it. */
  event?: DeviceEvent;
}

export interface PairParts {
  readonly nccl: Libnccl;
  readonly comm: NcclCommHandle;
  readonly stream: CudaStream;
  readonly device: number;
  readonly loop: PollLoop;
  readonly gate: ProgressGate;
  readonly rank: 0 | 1;
  readonly peer: string;
}

export class NcclPair implements Pair {
  readonly rank: 0 | 1;
  readonly peer: string;
  readonly #over = deferred<PdError>();
  readonly over = this.#over.promise;
  readonly #released = deferred<void>();
  /** Resolves when the abort call itself has returned: long after `over`, or never. */
  readonly released = this.#released.promise;
  readonly #parts: PairParts;
  readonly #queue: Operation[] = [];
  readonly #inFlight: Operation[] = [];
  #settling: Operation | undefined;
  #ended: PdError | undefined;
  #checkedAt = 0;
  readonly #poll: Poll = (now) => this.#turn(now);

  constructor(parts: PairParts) {
    this.#parts = parts;
    this.rank = parts.rank;
    this.peer = parts.peer;
  }

  get pending(): number {
    return this.#queue.length + this.#inFlight.length + (this.#settling ? 1 : 0);
  }

  send(regions: readonly MemoryRef[], options: OperationOptions): Promise<void> {
    return this.#enqueue('send', regions, options);
  }

  receive(regions: readonly MemoryRef[], options: OperationOptions): Promise<void> {
    return this.#enqueue('receive', regions, options);
  }

  abort(reason: PdError): void {
    if (this.#ended) return;
    this.#ended = reason;
    const idle = this.pending === 0;
    const launching = this.#settling !== undefined;
    const unsettled = [...this.#inFlight, ...(this.#settling ? [this.#settling] : []), ...this.#queue];
    this.#inFlight.length = 0;
    this.#queue.length = 0;
    this.#settling = undefined;
    this.#parts.loop.delete(this.#poll);
    for (const operation of unsettled) {
      operation.event?.dispose();
      operation.reject(reason);
    }
    if (idle && reason.code === 'PAIR_CLOSED') this.#close(reason);
    else this.#abortNow(reason, launching);
  }

  #enqueue(
    direction: 'send' | 'receive',
    memory: readonly MemoryRef[],
    options: OperationOptions,
  ): Promise<void> {
    if (this.#ended) {
      const { code, message } = this.#ended;
      const { tensorId } = options;
      const what = `${tensorId}: the pair with ${this.peer} is over (${code}: ${message})`;
      return Promise.reject(new PdError('PAIR_CLOSED', what, { tensorId, peer: this.peer }));
    }
    return new Promise((resolve, reject) => {
      const regions = deviceRegions(memory, this.#parts.device);
      if (regions.length === 0) return resolve();
      this.#queue.push({ direction, regions, options, resolve, reject });
      this.#parts.loop.add(this.#poll);
      // The first operation goes out at once; those behind it wait for their turn in the loop.
      this.#turn(performance.now());
    });
  }

  #turn(now: number): boolean {
    try {
      this.#settle(now);
      this.#start();
      this.#complete(now);
      this.#checkPeer(now);
    } catch (error) {
      this.abort(this.#describe(PdError.from(error, 'NCCL_ERROR')));
      return false;
    }
    const head = this.#inFlight[0] ?? this.#settling ?? this.#queue[0];
    if (head === undefined) return false;
    head.startedAt ??= now;
    if (now - head.startedAt < head.options.timeoutMs) return true;
    this.abort(this.#timeout(head));
    return false;
  }

  /** Has NCCL enqueued what was given to it last? */
  #settle(now: number): void {
    const operation = this.#settling;
    if (!operation) return;
    const { nccl, comm, gate, stream } = this.#parts;
    if (nccl.state(comm, operation.options.tensorId) === 'in-progress') return;
    gate.leave(this);
    this.#checkedAt = now;
    this.#settling = undefined;
    // Only now is the work in the stream: an event recorded earlier would mark a point before it.
    operation.event = stream.record();
    this.#inFlight.push(operation);
  }

  #start(): void {
    const [next] = this.#queue;
    if (this.#settling || !next || this.#inFlight.length >= MAX_IN_FLIGHT) return;
    const { nccl, comm, gate, stream, rank } = this.#parts;
    if (!gate.enter(this)) return;
    this.#queue.shift();
    this.#settling = next;
    stream.enter();
    const peer = rank === 0 ? 1 : 0;
    nccl.exchange(next.direction, next.regions, comm, peer, stream.handle, next.options.tensorId);
  }

  #complete(now: number): void {
    for (let head = this.#inFlight[0]; head?.event?.done(); head = this.#inFlight[0]) {
      head.event.dispose();
      this.#inFlight.shift();
      const next = this.#inFlight[0] ?? this.#settling;
      if (next) next.startedAt = now;
      head.resolve();
    }
  }

  #checkPeer(now: number): void {
    if (this.#settling || this.#inFlight.length === 0 || now - this.#checkedAt < ERROR_CHECK_EVERY) return;
    this.#checkedAt = now;
    this.#parts.nccl.state(this.#parts.comm, `pair with ${this.peer}`);
  }

  /** Both ends close an idle pair: announce it, give the peer a moment to do the same, then free what it held. */
  #close(reason: PdError): void {
    const { nccl, comm, loop, gate } = this.#parts;
    const deadline = performance.now() + CLOSE_DEADLINE;
    const what = `closing the pair with ${this.peer}`;
    let begun = false;
    loop.add((now) => {
      try {
        if (now >= deadline) throw new PdError('PAIR_CLOSED', what);
        if (!begun && !gate.enter(this)) return true;
        if (!begun) nccl.finalize(comm, what);
        begun = true;
        if (nccl.state(comm, what) === 'in-progress') return true;
      } catch {
        // the peer is gone or slow: the abort does not need it
      }
      this.#abortNow(reason, false);
      return false;
    });
  }

  #abortNow(reason: PdError, launching: boolean): void {
    const { comm, device, stream, gate } = this.#parts;
    gate.leave(this);
    const began = performance.now();
    let returned = false;
    void abortOnThread({ device, comm }).then(() => {
      returned = true;
    });
    let pause: number = DRAIN_POLL.first;
    let over = false;
    const look = () => {
      const safe = !launching || returned || performance.now() - began >= LAUNCH_GRACE;
      if (!over && safe && hasDrained(stream)) {
        over = true;
        this.#over.resolve(reason);
      }
      if (over && returned) {
        stream.dispose();
        this.#released.resolve();
        return;
      }
      pause = Math.min(pause * 2, DRAIN_POLL.most);
      // it does not keep the process alive: who needs the end of it waits for `over`
      setTimeout(look, pause).unref();
    };
    setTimeout(look, pause).unref();
  }

  #timeout(operation: Operation): PdError {
    const { tensorId, timeoutMs } = operation.options;
    const stage =
      operation === this.#queue[0]
        ? 'waited for its turn'
        : operation.event
          ? 'was on its way'
          : 'was being enqueued';
    const peerDoes = operation.direction === 'send' ? 'receive' : 'send';
    return new PdError(
      'TRANSFER_TIMEOUT',
      `${operation.direction} of ${tensorId} (${operationBytes(operation)} bytes in ${operation.regions.length} regions): it ${stage} and the peer ${this.peer} did not ${peerDoes} it within ${timeoutMs} ms; ${this.pending - 1} more stood behind it`,
      { tensorId, peer: this.peer },
    );
  }

  #describe(error: PdError): PdError {
    const context = { ...error.context, peer: this.peer };
    return PdError.because(error.code, `pair with ${this.peer}`, error, context);
  }
}

/** Regions as NCCL takes them: GPU memory of `device`, or page-locked memory. Empty ones are left out, on both ends alike. */
function deviceRegions(memory: readonly MemoryRef[], device: number): Region[] {
  const regions: Region[] = [];
  for (const ref of memory) {
    if (ref.kind === 'host') throw new PdError('INTERNAL', 'NCCL does not reach pageable host memory');
    if (ref.kind === 'cuda' && ref.device !== device) {
      throw new PdError(
        'INTERNAL',
        `memory of cuda:${ref.device} cannot travel over a pair of cuda:${device}`,
      );
    }
    if (ref.bytes > 0) regions.push({ pointer: ref.pointer, bytes: ref.bytes });
  }
  return regions;
}

function operationBytes(operation: Operation): number {
  return operation.regions.reduce((sum, region) => sum + region.bytes, 0);
}
