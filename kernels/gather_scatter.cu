// Gather and scatter of paged KV blocks.
//
// A request's blocks lie anywhere in the cache of a layer; on the wire they are dense. A block is one run of bytes, or two (K and V)
// that lie apart. Each thread block moves one tile of a run at a time: 256 threads x 4 loads of one element T, all four in flight
// before the first store. One launch does many layers, whose blocks are the same: a launch costs more than a layer of a short request.
//
// Addresses and block ids travel in the kernel's parameters, which the launch copies: no table to upload, nothing to keep alive, nothing
// to free. The struct stays under the 4,096 bytes that every driver takes; longer lists take several launches.
// src/device/cuda/paged-copy.ts writes this struct byte by byte.

struct PagedCopy {
  unsigned long long cache_block;  // bytes from one block to the next in the cache
  unsigned long long cache_run;    // bytes from a block's first run to its second in the cache
  unsigned long long flat_block;   // the same two in the dense tensor
  unsigned long long flat_run;
  unsigned long long run_bytes;
  unsigned int layers;
  unsigned int blocks;             // in this launch
  unsigned int runs;               // per block
  unsigned int tiles;              // per run: ceil(run_bytes / (1024 * sizeof(T)))
  unsigned long long table[482];   // cache and tensor of each layer; then the block ids, 4 bytes each
};

enum { THREADS = 256, UNROLL = 4, TILE = THREADS * UNROLL };

template <typename T, bool GATHER>
__device__ __forceinline__ void copy_tiles(const PagedCopy &p) {
  const unsigned long long elements = p.run_bytes / sizeof(T);
  const int *ids = (const int *)(p.table + 2 * p.layers);
  const unsigned int per_layer = p.blocks * p.runs * p.tiles;
  const unsigned int total = p.layers * per_layer;
  for (unsigned int tile = blockIdx.x; tile < total; tile += gridDim.x) {
    const unsigned int layer = tile / per_layer;
    const unsigned int index = tile % per_layer / p.tiles;
    const unsigned int block = index / p.runs;
    const unsigned int run = index % p.runs;
    const unsigned long long first = (unsigned long long)(tile % p.tiles) * TILE + threadIdx.x;
    T *cache = (T *)(p.table[2 * layer] + (unsigned long long)ids[block] * p.cache_block + run * p.cache_run);
    T *flat = (T *)(p.table[2 * layer + 1] + block * p.flat_block + run * p.flat_run);
    const T *source = GATHER ? cache : flat;
    T *target = GATHER ? flat : cache;
    T held[UNROLL];
#pragma unroll
    for (int i = 0; i < UNROLL; i++) {
      const unsigned long long at = first + i * THREADS;
      if (at < elements) held[i] = source[at];
    }
#pragma unroll
    for (int i = 0; i < UNROLL; i++) {
      const unsigned long long at = first + i * THREADS;
      if (at < elements) target[at] = held[i];
    }
  }
}

// 16 bytes at a time where every address and stride is a multiple of 16, which real caches are; single bytes for the rest.
extern "C" __global__ void __launch_bounds__(THREADS) gather_16(const __grid_constant__ PagedCopy p) {
  copy_tiles<uint4, true>(p);
}
extern "C" __global__ void __launch_bounds__(THREADS) gather_1(const __grid_constant__ PagedCopy p) {
  copy_tiles<unsigned char, true>(p);
}
extern "C" __global__ void __launch_bounds__(THREADS) scatter_16(const __grid_constant__ PagedCopy p) {
  copy_tiles<uint4, false>(p);
}
extern "C" __global__ void __launch_bounds__(THREADS) scatter_1(const __grid_constant__ PagedCopy p) {
  copy_tiles<unsigned char, false>(p);
}
