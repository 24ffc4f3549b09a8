/** The CUDA runtime, 12 or 13: memory, streams, events, graphs. Methods throw CUDA_ERROR with the library's text unless they say otherwise. */

import { type CallContext, nativeError, statusError } from './errors.ts';
import { loadLibcuda } from './libcuda.ts';
import { loadLibrary } from './load.ts';
import { type Bound, bind, type NativeLibrary, row } from './native.ts';
import type {
  CudaEventHandle,
  CudaGraphExecHandle,
  CudaGraphHandle,
  CudaStreamHandle,
  DevicePointer,
  PinnedPointer,
  SharedPointer,
} from './pointers.ts';

type Out = BigUint64Array | Int32Array;
/** Memory on either side of a copy: an address, or the bytes of a JavaScript buffer. */
export type Address = DevicePointer | PinnedPointer | Uint8Array;

const CUDART = {
  // cudaError_t cudaRuntimeGetVersion(int *runtimeVersion)
  cudaRuntimeGetVersion: row<[version: Out]>('int(void *)'),
  // cudaError_t cudaGetDeviceCount(int *count)
  cudaGetDeviceCount: row<[count: Out]>('int(void *)'),
  // cudaError_t cudaSetDevice(int device)
  cudaSetDevice: row<[device: number]>('int(int)'),
  // cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attr, int device)
  cudaDeviceGetAttribute: row<[value: Out, attribute: number, device: number]>('int(void *, int, int)'),
  // cudaError_t cudaDeviceGetPCIBusId(char *pciBusId, int len, int device)
  cudaDeviceGetPCIBusId: row<[id: Uint8Array, length: number, device: number]>('int(void *, int, int)'),
  // cudaError_t cudaDeviceCanAccessPeer(int *canAccessPeer, int device, int peerDevice)
  cudaDeviceCanAccessPeer: row<[can: Out, device: number, peer: number]>('int(void *, int, int)'),
  // cudaError_t cudaDeviceGetP2PAttribute(int *value, enum cudaDeviceP2PAttr attr, int srcDevice, int dstDevice)
  cudaDeviceGetP2PAttribute: row<[value: Out, attribute: number, source: number, target: number]>(
    'int(void *, int, int, int)',
  ),
  // cudaError_t cudaDeviceEnablePeerAccess(int peerDevice, unsigned int flags)
  cudaDeviceEnablePeerAccess: row<[peer: number, flags: number]>('int(int, unsigned int)'),
  // cudaError_t cudaMemcpyPeerAsync(void *dst, int dstDevice, const void *src, int srcDevice, size_t count, cudaStream_t stream)
  cudaMemcpyPeerAsync: row<
    [
      target: DevicePointer,
      targetDevice: number,
      source: DevicePointer,
      sourceDevice: number,
      bytes: number,
      stream: CudaStreamHandle,
    ]
  >('int(void *, int, void *, int, size_t, void *)'),
  // cudaError_t cudaMemGetInfo(size_t *free, size_t *total)
  cudaMemGetInfo: row<[free: Out, total: Out]>('int(void *, void *)'),
  // cudaError_t cudaMalloc(void **devPtr, size_t size)
  cudaMalloc: row<[pointer: Out, bytes: number]>('int(void *, size_t)'),
  // cudaError_t cudaFree(void *devPtr)
  cudaFree: row<[pointer: bigint]>('int(void *)'),
  // cudaError_t cudaHostAlloc(void **pHost, size_t size, unsigned int flags)
  cudaHostAlloc: row<[pointer: Out, bytes: number, flags: number]>('int(void *, size_t, unsigned int)'),
  // cudaError_t cudaFreeHost(void *ptr)
  cudaFreeHost: row<[pointer: bigint]>('int(void *)'),
  // cudaError_t cudaHostRegister(void *ptr, size_t size, unsigned int flags)
  cudaHostRegister: row<[pointer: bigint, bytes: number, flags: number]>('int(void *, size_t, unsigned int)'),
  // cudaError_t cudaHostGetDevicePointer(void **pDevice, void *pHost, unsigned int flags)
  cudaHostGetDevicePointer: row<[pointer: Out, host: bigint, flags: number]>(
    'int(void *, void *, unsigned int)',
  ),
  // cudaError_t cudaMemcpyAsync(void *dst, const void *src, size_t count, enum cudaMemcpyKind kind, cudaStream_t stream)
  cudaMemcpyAsync: row<
    [target: Address, source: Address, bytes: number, kind: number, stream: CudaStreamHandle]
  >('int(void *, void *, size_t, int, void *)'),
  // cudaError_t cudaStreamCreateWithFlags(cudaStream_t *pStream, unsigned int flags)
  cudaStreamCreateWithFlags: row<[stream: Out, flags: number]>('int(void *, unsigned int)'),
  // cudaError_t cudaStreamCreateWithPriority(cudaStream_t *pStream, unsigned int flags, int priority)
  cudaStreamCreateWithPriority: row<[stream: Out, flags: number, priority: number]>(
    'int(void *, unsigned int, int)',
  ),
  // cudaError_t cudaDeviceGetStreamPriorityRange(int *leastPriority, int *greatestPriority)
  cudaDeviceGetStreamPriorityRange: row<[least: Out, greatest: Out]>('int(void *, void *)'),
  // cudaError_t cudaStreamDestroy(cudaStream_t stream)
  cudaStreamDestroy: row<[stream: CudaStreamHandle]>('int(void *)'),
  // cudaError_t cudaStreamQuery(cudaStream_t stream)
  cudaStreamQuery: row<[stream: CudaStreamHandle]>('int(void *)'),
  // cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned int flags)
  cudaStreamWaitEvent: row<[stream: CudaStreamHandle, event: CudaEventHandle, flags: number]>(
    'int(void *, void *, unsigned int)',
  ),
  // cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned int flags)
  cudaEventCreateWithFlags: row<[event: Out, flags: number]>('int(void *, unsigned int)'),
  // cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream)
  cudaEventRecord: row<[event: CudaEventHandle, stream: CudaStreamHandle]>('int(void *, void *)'),
  // cudaError_t cudaEventQuery(cudaEvent_t event)
  cudaEventQuery: row<[event: CudaEventHandle]>('int(void *)'),
  // cudaError_t cudaEventDestroy(cudaEvent_t event)
  cudaEventDestroy: row<[event: CudaEventHandle]>('int(void *)'),
  // cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode mode)
  cudaStreamBeginCapture: row<[stream: CudaStreamHandle, mode: number]>('int(void *, int)'),
  // cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *pGraph)
  cudaStreamEndCapture: row<[stream: CudaStreamHandle, graph: Out]>('int(void *, void *)'),
  // cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *pGraphExec, cudaGraph_t graph, unsigned long long flags)
  cudaGraphInstantiateWithFlags: row<[exec: Out, graph: CudaGraphHandle, flags: number]>(
    'int(void *, void *, unsigned long long)',
  ),
  // cudaError_t cudaGraphDestroy(cudaGraph_t graph)
  cudaGraphDestroy: row<[graph: CudaGraphHandle]>('int(void *)'),
  // cudaError_t cudaGraphUpload(cudaGraphExec_t graphExec, cudaStream_t stream)
  cudaGraphUpload: row<[exec: CudaGraphExecHandle, stream: CudaStreamHandle]>('int(void *, void *)'),
  // cudaError_t cudaGraphLaunch(cudaGraphExec_t graphExec, cudaStream_t stream)
  cudaGraphLaunch: row<[exec: CudaGraphExecHandle, stream: CudaStreamHandle]>('int(void *, void *)'),
  // cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graphExec)
  cudaGraphExecDestroy: row<[exec: CudaGraphExecHandle]>('int(void *)'),
  // const char *cudaGetErrorName(cudaError_t error)
  cudaGetErrorName: row<[error: number], string | null>('const char *(int)'),
  // const char *cudaGetErrorString(cudaError_t error)
  cudaGetErrorString: row<[error: number], string | null>('const char *(int)'),
} as const;

const SUCCESS = 0;
const OUT_OF_MEMORY = 2;
const NOT_READY = 600;
const STREAM_NON_BLOCKING = 1;
const EVENT_DISABLE_TIMING = 2;
/** Usable by every context, and mapped into the GPU's address space: cudaHostAlloc and cudaHostRegister alike. */
const HOST_ALLOC_PORTABLE_MAPPED = 3;
/** The runtime infers the direction from the addresses. */
const MEMCPY_DEFAULT = 4;
/** cudaStreamCaptureModeThreadLocal: calls of other threads (the transfer thread polls events) do not invalidate the capture. */
const CAPTURE_THREAD_LOCAL = 1;
const PEER_ACCESS_ALREADY_ENABLED = 704;
/** cudaDevP2PAttrNativeAtomicSupported: atomics cross NVLink, not PCIe. */
const P2P_NATIVE_ATOMICS = 3;
/** cudaDeviceAttr numbers. */
const ATTRIBUTES = { multiProcessors: 16, computeMajor: 75, computeMinor: 76 } as const;

export class Cudart {
  readonly library: NativeLibrary;
  readonly #call: Bound<typeof CUDART>;
  readonly #out = new BigUint64Array(1);
  readonly #out2 = new BigUint64Array(1);
  readonly #int = new Int32Array(1);
  /** CUDA has a current device per thread; there is one such object per thread too. */
  #device = -1;

  constructor(library: NativeLibrary) {
    this.library = library;
    this.#call = bind(library, CUDART);
  }

  /** 13000 for 13.0. */
  version(): number {
    this.#check(this.#call.cudaRuntimeGetVersion(this.#int), 'cudaRuntimeGetVersion');
    return this.#int[0]!;
  }

  deviceCount(): number {
    this.#check(this.#call.cudaGetDeviceCount(this.#int), 'cudaGetDeviceCount', { what: 'counting GPUs' });
    return this.#int[0]!;
  }

  /** Makes `device` current in this thread; free if it already is. */
  setDevice(device: number): void {
    if (device === this.#device) return;
    this.#check(this.#call.cudaSetDevice(device), 'cudaSetDevice', { what: `choosing GPU ${device}` });
    this.#device = device;
  }

  attribute(device: number, name: keyof typeof ATTRIBUTES): number {
    const status = this.#call.cudaDeviceGetAttribute(this.#int, ATTRIBUTES[name], device);
    this.#check(status, 'cudaDeviceGetAttribute');
    return this.#int[0]!;
  }

  /** Such as `0000:18:00.0`. */
  pciBusId(device: number): string {
    const id = new Uint8Array(32);
    this.#check(this.#call.cudaDeviceGetPCIBusId(id, id.length, device), 'cudaDeviceGetPCIBusId');
    return Buffer.from(id.subarray(0, id.indexOf(0))).toString('latin1');
  }

  canAccessPeer(device: number, peer: number): boolean {
    this.#check(this.#call.cudaDeviceCanAccessPeer(this.#int, device, peer), 'cudaDeviceCanAccessPeer');
    return this.#int[0] !== 0;
  }

  /** How `device` reaches the memory of `peer`. */
  peerLink(device: number, peer: number): 'nvlink' | 'pcie' | 'none' {
    if (!this.canAccessPeer(device, peer)) return 'none';
    const status = this.#call.cudaDeviceGetP2PAttribute(this.#int, P2P_NATIVE_ATOMICS, device, peer);
    this.#check(status, 'cudaDeviceGetP2PAttribute');
    return this.#int[0] === 0 ? 'pcie' : 'nvlink';
  }

  /** Lets the current device access `peer` directly; without it a peer copy goes through the host. */
  enablePeerAccess(peer: number): void {
    const status = this.#call.cudaDeviceEnablePeerAccess(peer, 0);
    if (status !== PEER_ACCESS_ALREADY_ENABLED) this.#check(status, 'cudaDeviceEnablePeerAccess');
  }

  /** From one GPU of this process to another, by the copy engines. */
  memcpyPeerAsync(
    target: { readonly device: number; readonly pointer: DevicePointer },
    source: { readonly device: number; readonly pointer: DevicePointer },
    bytes: number,
    stream: CudaStreamHandle,
  ): void {
    const { device, pointer } = target;
    const status = this.#call.cudaMemcpyPeerAsync(
      pointer,
      device,
      source.pointer,
      source.device,
      bytes,
      stream,
    );
    this.#check(status, 'cudaMemcpyPeerAsync', { what: `copying ${bytes} bytes to cuda:${device}` });
  }

  /** Bytes of the current device. */
  memoryInfo(): { readonly free: number; readonly total: number } {
    this.#check(this.#call.cudaMemGetInfo(this.#out, this.#out2), 'cudaMemGetInfo');
    return { free: Number(this.#out[0]), total: Number(this.#out2[0]) };
  }

  /** Throws OUT_OF_DEVICE_MEMORY. */
  malloc(bytes: number, what: string): DevicePointer {
    this.#check(this.#call.cudaMalloc(this.#out, bytes), 'cudaMalloc', { what, bytes });
    return this.#out[0]! as DevicePointer;
  }

  /** Waits for the whole device: never while serving. */
  free(pointer: DevicePointer): void {
    this.#check(this.#call.cudaFree(pointer), 'cudaFree');
  }

  /** Takes about 0.5 ms per MiB in the calling thread. Throws OUT_OF_DEVICE_MEMORY. */
  hostAlloc(bytes: number, what: string): PinnedPointer {
    const status = this.#call.cudaHostAlloc(this.#out, bytes, HOST_ALLOC_PORTABLE_MAPPED);
    this.#check(status, 'cudaHostAlloc', { what, bytes });
    return this.#out[0]! as PinnedPointer;
  }

  /** Waits for the whole device: never while serving. */
  freeHost(pointer: PinnedPointer): void {
    this.#check(this.#call.cudaFreeHost(pointer), 'cudaFreeHost');
  }

  /**
   * Lets GPUs access `bytes` of host memory that this process already has, of whatever origin, and returns its address on the GPU.
   * 0.3 ms for a page. There is no way back: unregistering waits for the whole device.
   */
  hostRegister(pointer: SharedPointer, bytes: number, what: string): DevicePointer {
    const status = this.#call.cudaHostRegister(pointer, bytes, HOST_ALLOC_PORTABLE_MAPPED);
    this.#check(status, 'cudaHostRegister', { what, bytes });
    this.#check(this.#call.cudaHostGetDevicePointer(this.#out, pointer, 0), 'cudaHostGetDevicePointer', {
      what,
    });
    return this.#out[0]! as DevicePointer;
  }

  memcpyAsync(target: Address, source: Address, bytes: number, stream: CudaStreamHandle): void {
    const status = this.#call.cudaMemcpyAsync(target, source, bytes, MEMCPY_DEFAULT, stream);
    this.#check(status, 'cudaMemcpyAsync', { what: `copying ${bytes} bytes` });
  }

  /** A stream that does not synchronize with the default stream; `urgent`: with the highest priority. */
  streamCreate(urgent = false): CudaStreamHandle {
    if (!urgent) {
      const status = this.#call.cudaStreamCreateWithFlags(this.#out, STREAM_NON_BLOCKING);
      this.#check(status, 'cudaStreamCreateWithFlags');
      return this.#out[0]! as CudaStreamHandle;
    }
    const least = new Int32Array(1);
    const ranged = this.#call.cudaDeviceGetStreamPriorityRange(least, this.#int);
    this.#check(ranged, 'cudaDeviceGetStreamPriorityRange');
    const status = this.#call.cudaStreamCreateWithPriority(this.#out, STREAM_NON_BLOCKING, this.#int[0]!);
    this.#check(status, 'cudaStreamCreateWithPriority');
    return this.#out[0]! as CudaStreamHandle;
  }

  streamDestroy(stream: CudaStreamHandle): void {
    this.#check(this.#call.cudaStreamDestroy(stream), 'cudaStreamDestroy');
  }

  /** True once everything enqueued has completed. */
  streamDrained(stream: CudaStreamHandle): boolean {
    return this.#query(this.#call.cudaStreamQuery(stream), 'cudaStreamQuery');
  }

  streamWait(stream: CudaStreamHandle, event: CudaEventHandle): void {
    this.#check(this.#call.cudaStreamWaitEvent(stream, event, 0), 'cudaStreamWaitEvent');
  }

  /** An event without timestamps, the cheaper kind. */
  eventCreate(): CudaEventHandle {
    const status = this.#call.cudaEventCreateWithFlags(this.#out, EVENT_DISABLE_TIMING);
    this.#check(status, 'cudaEventCreateWithFlags');
    return this.#out[0]! as CudaEventHandle;
  }

  eventRecord(event: CudaEventHandle, stream: CudaStreamHandle): void {
    this.#check(this.#call.cudaEventRecord(event, stream), 'cudaEventRecord');
  }

  eventDone(event: CudaEventHandle): boolean {
    return this.#query(this.#call.cudaEventQuery(event), 'cudaEventQuery');
  }

  eventDestroy(event: CudaEventHandle): void {
    this.#check(this.#call.cudaEventDestroy(event), 'cudaEventDestroy');
  }

  /** A graph of what `record` enqueues on `stream`, which does not run now. `record` must not wait, allocate or copy. */
  graphCapture(stream: CudaStreamHandle, record: () => void): CudaGraphExecHandle {
    this.#check(this.#call.cudaStreamBeginCapture(stream, CAPTURE_THREAD_LOCAL), 'cudaStreamBeginCapture');
    try {
      record();
    } catch (error) {
      // the stream must not stay in capture; the first error is the one to report
      if (this.#call.cudaStreamEndCapture(stream, this.#out) === SUCCESS) {
        this.#call.cudaGraphDestroy(this.#out[0]! as CudaGraphHandle);
      }
      throw error;
    }
    this.#check(this.#call.cudaStreamEndCapture(stream, this.#out), 'cudaStreamEndCapture');
    const graph = this.#out[0]! as CudaGraphHandle;
    const instantiated = this.#call.cudaGraphInstantiateWithFlags(this.#out, graph, 0);
    const destroyed = this.#call.cudaGraphDestroy(graph);
    this.#check(instantiated, 'cudaGraphInstantiateWithFlags');
    const exec = this.#out[0]! as CudaGraphExecHandle;
    this.#check(destroyed, 'cudaGraphDestroy');
    // allocates its device memory now rather than at the first launch
    this.#check(this.#call.cudaGraphUpload(exec, stream), 'cudaGraphUpload');
    return exec;
  }

  graphLaunch(exec: CudaGraphExecHandle, stream: CudaStreamHandle): void {
    this.#check(this.#call.cudaGraphLaunch(exec, stream), 'cudaGraphLaunch');
  }

  graphDestroy(exec: CudaGraphExecHandle): void {
    this.#check(this.#call.cudaGraphExecDestroy(exec), 'cudaGraphExecDestroy');
  }

  #query(status: number, call: string): boolean {
    if (status === NOT_READY) return false;
    this.#check(status, call, { what: 'work enqueued before' });
    return true;
  }

  #check(status: number, call: string, context: CallContext = {}): void {
    if (status === SUCCESS) return;
    const name = this.#call.cudaGetErrorName(status) ?? 'unknown';
    const text = `${name}, ${this.#call.cudaGetErrorString(status) ?? 'no text'}`;
    throw statusError(
      status === OUT_OF_MEMORY ? 'OUT_OF_DEVICE_MEMORY' : 'CUDA_ERROR',
      call,
      status,
      text,
      context,
    );
  }
}

let runtime: Cudart | undefined;

/** This thread's CUDA runtime. Throws LIBRARY_NOT_FOUND, or LIBRARY_TOO_OLD if the driver is older than CUDA 12. */
export function loadCudart(): Cudart {
  if (runtime) return runtime;
  const driver = loadLibcuda().driverVersion();
  const major = Math.trunc(driver / 1000);
  if (major < 12) {
    throw nativeError(
      'LIBRARY_TOO_OLD',
      `the NVIDIA driver supports CUDA ${major}.${Math.trunc((driver % 1000) / 10)}; CUDA 12 or later is required: install driver 525 or later`,
      { driver },
    );
  }
  runtime = new Cudart(loadLibrary('cudart', major));
  return runtime;
}
