/**
 * Memory, streams, events, and moving paged KV blocks: one interface, `host` and `cuda` behind it.
 *
 * Work on a stream runs in order; `record` marks a point in it and the event tells when that point is reached. On `host` all work is
 * done when the call returns and every event has fired at once. Nothing here blocks: calls enqueue, callers wait on events
 * (`EventPoller`). A MemoryRef, an EventRef and a PagedLayer are plain data, so they cross threads by structured clone.
 */
import type { DevicePointer, PinnedPointer } from '../../ffi/pointers.ts';
import type { PagedLayout } from '../kv/layout.ts';
import type { CopyPlan } from '../kv/reblock.ts';

export type { DevicePointer, PinnedPointer };

/** A run of bytes that any thread of this process can reach. */
export type MemoryRef =
  | {
      readonly kind: 'host';
      readonly buffer: SharedArrayBuffer;
      readonly offset: number;
      readonly bytes: number;
    }
  | { readonly kind: 'pinned'; readonly pointer: PinnedPointer; readonly bytes: number }
  | {
      readonly kind: 'cuda';
      readonly device: number;
      readonly pointer: DevicePointer;
      readonly bytes: number;
    };

/** A point in a stream, as it crosses threads: the consumer of it makes its stream wait, or polls it. */
export type EventRef = { readonly kind: 'host' } | { readonly kind: 'cuda'; readonly handle: bigint };

/** One layer of a paged KV cache: where it is, and how blocks lie in it. */
export interface PagedLayer {
  readonly memory: MemoryRef;
  readonly layout: PagedLayout;
}

/** One layer of a paged cache and the dense tensor of some of its blocks. */
export interface LayerTensor {
  readonly layer: PagedLayer;
  readonly tensor: MemoryRef;
}

export interface DeviceEvent {
  readonly ref: EventRef;
  /** True once the stream has passed the point. Throws CUDA_ERROR where the work before it failed. */
  done(): boolean;
  /** Idempotent. */
  dispose(): void;
}

export interface Stream {
  /** Marks the point after all work enqueued so far. The caller disposes the event. */
  record(): DeviceEvent;
  /** Work enqueued from now on starts after `event`. */
  wait(event: EventRef): void;
  dispose(): void;
}

export interface Device {
  readonly kind: 'host' | 'cuda';
  /** As users write it: `host`, `cuda:0`. */
  readonly name: string;

  /** Device memory for the life of the device (arena, KV cache). Throws OUT_OF_DEVICE_MEMORY with `what` and the sizes. */
  allocate(bytes: number, what: string): MemoryRef;
  /**
   * Host memory that the transport can send from and receive into, for the life of the device. On CUDA it is page-locked and takes
   * about 30 ms for 64 MiB, so it happens on another thread.
   */
  allocatePinned(bytes: number, what: string): Promise<MemoryRef>;
  createStream(): Stream;

  /** `bytes` equal on both sides. */
  copy(target: MemoryRef, source: MemoryRef, stream: Stream): void;
  /** Blocks `blockIds` of a layer into `target`, dense, as the wire tensor of `layer.layout` with `blockIds.length` blocks. */
  gather(target: MemoryRef, layer: PagedLayer, blockIds: Int32Array, stream: Stream): void;
  /** The reverse. The first `skip` blocks of the tensor are left out (the consumer has them already, shared). */
  scatter(layer: PagedLayer, blockIds: Int32Array, source: MemoryRef, stream: Stream, skip?: number): void;

  /** `gather` of the same blocks of many layers: what is equal among them is prepared once. */
  gatherLayers(parts: readonly LayerTensor[], blockIds: Int32Array, stream: Stream): void;
  scatterLayers(parts: readonly LayerTensor[], blockIds: Int32Array, stream: Stream, skip?: number): void;

  /**
   * Between a layer's memory and the dense tensor of another family or block size, as planned by kv/reblock.ts: `gather` fills the
   * tensor, `scatter` the cache. Throws INTERNAL where the plan does not fit them.
   */
  reblock(
    direction: 'gather' | 'scatter',
    cache: MemoryRef,
    tensor: MemoryRef,
    plan: CopyPlan,
    stream: Stream,
  ): void;

  /** A zero-copy view where the CPU can read the memory (`host`, `pinned`); throws INTERNAL for `cuda`. */
  view(memory: MemoryRef): Uint8Array;

  /** Idempotent; frees all of it. Only after every stream has drained. */
  dispose(): void;
}
