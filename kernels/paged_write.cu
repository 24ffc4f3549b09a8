// Writes paged KV blocks into another process's paged cache: from scattered blocks to scattered blocks, in one launch.
//
// The source is our cache, the target a mapping of the cache of whoever wants the blocks (on this GPU or on another one). A block is one
// run of bytes, or two (K and V) that lie apart; strides and bytes decide, so layouts and element types are all one here. Each warp
// moves one unit of a run at a time: 32 threads x UNROLL loads of one element T, all in flight before the first store.
//
// A launch may come late, when the one who wanted the blocks has long given up and lent them to others. So it first reads the grant word
// of the WANT's slot, in host memory that both processes map, and writes nothing where that names another seq. The first thread block
// to run reads it for all: reads of one host address go one after the other, a microsecond each. A launch whose tables name a block
// outside of either cache sets no flag.
//
// The last thread block to end sets the flag: every thread's writes are fenced system-wide before it is counted, so whoever sees the
// flag finds the bytes. src/device/cuda/paged-write.ts writes this struct byte by byte.

struct PagedWrite {
  unsigned long long source_block;  // bytes from one block to the next in our cache
  unsigned long long source_run;    // bytes from a block's first run to its second
  unsigned long long target_block;  // the same two in the other cache
  unsigned long long target_run;
  unsigned long long run_bytes;
  const int *source_ids;            // on the device, `blocks` of each
  const int *target_ids;
  const volatile unsigned long long *grant;
  unsigned long long seq;           // what the grant word must name
  volatile unsigned long long *marks;  // flag, began, ended, fault (page.ts)
  unsigned long long flag;          // written at the end; 0 writes none
  volatile unsigned int *counter;   // begun, verdict, ended, ids outside: all 0 between launches
  unsigned int layers;
  unsigned int blocks;              // in this launch
  unsigned int runs;                // per block
  unsigned int units;               // per run: ceil(run_bytes / (32 * UNROLL * sizeof(T)))
  unsigned int source_limit;        // blocks of either cache
  unsigned int target_limit;
  unsigned long long table[256];    // our cache and the other one, of each layer
};

#ifndef UNROLL
#define UNROLL 8
#endif
enum { THREADS = 512, WARPS = THREADS / 32 };
enum { BEGUN, VERDICT, ENDED, OUTSIDE };          // of the counter
enum { GRANTED = 1, REFUSED = 2 };                // verdicts

__device__ __forceinline__ unsigned long long now() {
  unsigned long long ns;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(ns));
  return ns;
}

template <typename T>
__device__ __forceinline__ void write_units(const PagedWrite &p) {
  const unsigned long long elements = p.run_bytes / sizeof(T);
  const unsigned int lane = threadIdx.x % 32;
  const unsigned int per_layer = p.blocks * p.runs * p.units;
  const unsigned int total = p.layers * per_layer;
  for (unsigned int unit = blockIdx.x * WARPS + threadIdx.x / 32; unit < total; unit += gridDim.x * WARPS) {
    const unsigned int layer = unit / per_layer;
    const unsigned int index = unit % per_layer / p.units;
    const unsigned int block = index / p.runs;
    const unsigned int run = index % p.runs;
    const unsigned int from = (unsigned int)p.source_ids[block];
    const unsigned int to = (unsigned int)p.target_ids[block];
    if (from >= p.source_limit || to >= p.target_limit) {
      if (lane == 0) atomicAdd((unsigned int *)p.counter + OUTSIDE, 1u);
      continue;
    }
    const unsigned long long first = (unsigned long long)(unit % p.units) * (32 * UNROLL) + lane;
    const T *source = (const T *)(p.table[2 * layer] + from * p.source_block + run * p.source_run);
    T *target = (T *)(p.table[2 * layer + 1] + to * p.target_block + run * p.target_run);
    T held[UNROLL];
#pragma unroll
    for (int i = 0; i < UNROLL; i++) {
      const unsigned long long at = first + i * 32;
      if (at < elements) held[i] = source[at];
    }
#pragma unroll
    for (int i = 0; i < UNROLL; i++) {
      const unsigned long long at = first + i * 32;
      if (at < elements) target[at] = held[i];
    }
  }
}

template <typename T>
__device__ __forceinline__ void write_paged(const PagedWrite &p) {
  __shared__ unsigned int verdict;
  if (threadIdx.x == 0) {
    if (atomicAdd((unsigned int *)p.counter + BEGUN, 1u) == 0) {
      verdict = *p.grant == p.seq ? GRANTED : REFUSED;
      if (verdict == GRANTED) p.marks[1] = now();
      p.counter[VERDICT] = verdict;
    } else {
      // the one that reads it runs already
      do verdict = p.counter[VERDICT]; while (verdict == 0);
    }
  }
  __syncthreads();
  if (verdict == GRANTED) write_units<T>(p);
  __threadfence_system();
  __syncthreads();
  if (threadIdx.x != 0 || atomicAdd((unsigned int *)p.counter + ENDED, 1u) != gridDim.x - 1) return;
  // the last: nobody else counts any more
  __threadfence_system();
  const unsigned int outside = p.counter[OUTSIDE];
  for (int i = BEGUN; i <= OUTSIDE; i++) p.counter[i] = 0;
  if (verdict != GRANTED) return;
  if (outside != 0) {
    p.marks[3] = outside;
    return;
  }
  if (p.flag == 0) return;
  p.marks[2] = now();
  __threadfence_system();
  p.marks[0] = p.flag;
}

// 16 bytes at a time where every address and stride is a multiple of 16, which real caches are; single bytes for the rest.
extern "C" __global__ void __launch_bounds__(THREADS) write_16(const __grid_constant__ PagedWrite p) {
  write_paged<uint4>(p);
}
extern "C" __global__ void __launch_bounds__(THREADS) write_1(const __grid_constant__ PagedWrite p) {
  write_paged<unsigned char>(p);
}
