/** CUDA graphs: work recorded from a stream once and launched as a whole. Every method throws CUDA_ERROR with the library's text. */
import { loadLibcuda } from './libcuda.ts';
import { loadLibrary } from './load.ts';
import { type Bound, bind, type NativeLibrary, row } from './native.ts';
import type { CudaGraphExecHandle, CudaGraphHandle, CudaStreamHandle } from './pointers.ts';
import { statusError } from './status.ts';

const GRAPH = {
  // cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode mode)
  cudaStreamBeginCapture: row<[stream: CudaStreamHandle, mode: number]>('int', ['void *', 'int']),
  // cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *pGraph)
  cudaStreamEndCapture: row<[stream: CudaStreamHandle, graph: BigUint64Array]>('int', ['void *', 'void *']),
  // cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *pGraphExec, cudaGraph_t graph, unsigned long long flags)
  cudaGraphInstantiateWithFlags: row<[exec: BigUint64Array, graph: CudaGraphHandle, flags: number]>('int', [
    'void *',
    'void *',
    'unsigned long long',
  ]),
  // cudaError_t cudaGraphDestroy(cudaGraph_t graph)
  cudaGraphDestroy: row<[graph: CudaGraphHandle]>('int', ['void *']),
  // cudaError_t cudaGraphUpload(cudaGraphExec_t graphExec, cudaStream_t stream)
  cudaGraphUpload: row<[exec: CudaGraphExecHandle, stream: CudaStreamHandle]>('int', ['void *', 'void *']),
  // cudaError_t cudaGraphLaunch(cudaGraphExec_t graphExec, cudaStream_t stream)
  cudaGraphLaunch: row<[exec: CudaGraphExecHandle, stream: CudaStreamHandle]>('int', ['void *', 'void *']),
  // cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graphExec)
  cudaGraphExecDestroy: row<[exec: CudaGraphExecHandle]>('int', ['void *']),
  // const char *cudaGetErrorString(cudaError_t error)
  cudaGetErrorString: row<[error: number], string | null>('const char *', ['int']),
} as const;

/** cudaStreamCaptureModeThreadLocal: what other threads call meanwhile (the transfer thread polls events) does not end the capture. */
const THREAD_LOCAL = 1;

export class CudaGraphs {
  readonly library: NativeLibrary;
  readonly #call: Bound<typeof GRAPH>;

  constructor(library: NativeLibrary) {
    this.library = library;
    this.#call = bind(library, GRAPH);
  }

  /** What `record` enqueues on `stream`, which is not run now. `record` must not wait, allocate or copy. */
  capture(stream: CudaStreamHandle, record: () => void): CudaGraphExecHandle {
    const out = new BigUint64Array(1);
    this.#check(this.#call.cudaStreamBeginCapture(stream, THREAD_LOCAL), 'cudaStreamBeginCapture');
    try {
      record();
    } catch (error) {
      // the stream must not stay in capture; the first error is the one to tell
      this.#call.cudaStreamEndCapture(stream, out);
      throw error;
    }
    this.#check(this.#call.cudaStreamEndCapture(stream, out), 'cudaStreamEndCapture');
    const graph = out[0]! as CudaGraphHandle;
    const status = this.#call.cudaGraphInstantiateWithFlags(out, graph, 0);
    this.#call.cudaGraphDestroy(graph);
    this.#check(status, 'cudaGraphInstantiateWithFlags');
    const exec = out[0]! as CudaGraphExecHandle;
    // takes its device memory now rather than at the first launch
    this.#check(this.#call.cudaGraphUpload(exec, stream), 'cudaGraphUpload');
    return exec;
  }

  launch(exec: CudaGraphExecHandle, stream: CudaStreamHandle): void {
    this.#check(this.#call.cudaGraphLaunch(exec, stream), 'cudaGraphLaunch');
  }

  destroy(exec: CudaGraphExecHandle): void {
    this.#check(this.#call.cudaGraphExecDestroy(exec), 'cudaGraphExecDestroy');
  }

  #check(status: number, call: string): void {
    if (status === 0) return;
    const code = status === 2 ? 'OUT_OF_DEVICE_MEMORY' : 'CUDA_ERROR';
    throw statusError(code, call, status, this.#call.cudaGetErrorString(status) ?? 'no text');
  }
}

let graphs: CudaGraphs | undefined;

/** This thread's. Throws LIBRARY_NOT_FOUND, or LIBRARY_TOO_OLD for a runtime without them. */
export function loadCudaGraphs(): CudaGraphs {
  graphs ??= new CudaGraphs(loadLibrary('cudart', Math.trunc(loadLibcuda().driverVersion() / 1000)));
  return graphs;
}
