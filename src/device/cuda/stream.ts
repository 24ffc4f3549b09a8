/** CUDA streams and events behind the device interface. Events come from a pool: creating one costs more than recording it. */
import type { Cudart } from '../../../ffi/libcudart.ts';
import type { CudaEventHandle, CudaStreamHandle } from '../../../ffi/pointers.ts';
import { PdError } from '../../errors.ts';
import type { DeviceEvent, EventRef, Stream } from '../device.ts';

/** What streams and events need of their device. */
export interface CudaContext {
  readonly runtime: Cudart;
  /** Makes the GPU current in this thread. */
  enter(): void;
}

/**
 * Gives something back to CUDA. On a GPU with a broken context each of these calls fails with the error of the work that broke it, which
 * has already been reported where that work was awaited; cleaning up must go on.
 */
export function released(give: () => void): void {
  try {
    give();
  } catch {
    // see above
  }
}

export class EventPool {
  readonly #context: CudaContext;
  readonly #free: CudaEventHandle[] = [];
  readonly #all: CudaEventHandle[] = [];

  constructor(context: CudaContext) {
    this.#context = context;
  }

  take(): CudaEventHandle {
    const pooled = this.#free.pop();
    if (pooled !== undefined) return pooled;
    this.#context.enter();
    const created = this.#context.runtime.eventCreate();
    this.#all.push(created);
    return created;
  }

  give(event: CudaEventHandle): void {
    this.#free.push(event);
  }

  /** After this the pool must not be used. Never throws. */
  dispose(): void {
    for (const event of this.#all.splice(0)) {
      released(() => {
        this.#context.enter();
        this.#context.runtime.eventDestroy(event);
      });
    }
    this.#free.length = 0;
  }
}

export class CudaEvent implements DeviceEvent {
  readonly ref: EventRef & { readonly kind: 'cuda' };
  readonly #context: CudaContext;
  readonly #pool: EventPool;
  #done = false;
  #disposed = false;

  constructor(context: CudaContext, pool: EventPool, handle: CudaEventHandle) {
    this.ref = { kind: 'cuda', handle };
    this.#context = context;
    this.#pool = pool;
  }

  done(): boolean {
    if (this.#done) return true;
    if (this.#disposed) throw new PdError('INTERNAL', 'a disposed CUDA event was polled');
    this.#context.enter();
    this.#done = this.#context.runtime.eventDone(this.ref.handle as CudaEventHandle);
    return this.#done;
  }

  dispose(): void {
    if (this.#disposed) return;
    this.#disposed = true;
    this.#pool.give(this.ref.handle as CudaEventHandle);
  }
}

export class CudaStream implements Stream {
  readonly handle: CudaStreamHandle;
  readonly #context: CudaContext;
  readonly #pool: EventPool;
  readonly #onDispose: (stream: CudaStream) => void;
  #disposed = false;

  constructor(
    context: CudaContext,
    pool: EventPool,
    onDispose: (stream: CudaStream) => void,
    urgent = false,
  ) {
    context.enter();
    this.handle = context.runtime.streamCreate(urgent);
    this.#context = context;
    this.#pool = pool;
    this.#onDispose = onDispose;
  }

  /** Makes the stream's GPU current in this thread. */
  enter(): void {
    this.#context.enter();
  }

  record(): CudaEvent {
    const handle = this.#pool.take();
    this.#context.enter();
    this.#context.runtime.eventRecord(handle, this.handle);
    return new CudaEvent(this.#context, this.#pool, handle);
  }

  wait(event: EventRef): void {
    // an event of the host has fired already
    if (event.kind === 'host') return;
    this.#context.enter();
    this.#context.runtime.streamWait(this.handle, event.handle as CudaEventHandle);
  }

  /** True once everything enqueued has been done. Throws CUDA_ERROR where it failed. */
  drained(): boolean {
    this.#context.enter();
    return this.#context.runtime.streamDrained(this.handle);
  }

  /** CUDA keeps a busy stream alive until it has drained. Never throws. */
  dispose(): void {
    if (this.#disposed) return;
    this.#disposed = true;
    this.#onDispose(this);
    released(() => {
      this.#context.enter();
      this.#context.runtime.streamDestroy(this.handle);
    });
  }
}

/** A stream whose work failed has drained as well: nothing of it runs any more. */
export function hasDrained(stream: CudaStream): boolean {
  try {
    return stream.drained();
  } catch {
    return true;
  }
}
