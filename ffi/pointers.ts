/** Handles and addresses of the native libraries. koffi accepts any BigInt as a `void *`: only brands keep a stream from passing as an event. */
declare const brand: unique symbol;
type Handle<B extends string> = bigint & { readonly [brand]: B };

export type CudaStreamHandle = Handle<'cudaStream_t'>;
export type CudaEventHandle = Handle<'cudaEvent_t'>;
export type CuModuleHandle = Handle<'CUmodule'>;
export type CuFunctionHandle = Handle<'CUfunction'>;
export type CudaGraphHandle = Handle<'cudaGraph_t'>;
export type CudaGraphExecHandle = Handle<'cudaGraphExec_t'>;
export type CublasHandle = Handle<'cublasHandle_t'>;
export type NcclCommHandle = Handle<'ncclComm_t'>;
/** Address in a GPU's memory. */
export type DevicePointer = bigint & { readonly [brand]: 'DevicePointer' };
/** Address of page-locked host memory, which GPUs and NCCL reach directly. */
export type PinnedPointer = bigint & { readonly [brand]: 'PinnedPointer' };
/** Memory that koffi allocated outside V8's heap: its address does not move, so a library may write to it after the call. */
export type NativePointer = Handle<'malloc'>;
/** Address of memory that this process shares with another one (mmap). */
export type SharedPointer = Handle<'mmap'>;
/** Physical memory of a GPU, which exists as long as any process has it mapped or holds a handle. */
export type CuMemoryHandle = Handle<'CUmemGenericAllocationHandle'>;
/** An open file of this process. */
export type FileDescriptor = number & { readonly [brand]: 'fd' };
