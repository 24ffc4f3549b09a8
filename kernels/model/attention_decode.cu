// Attention of one query row per sequence over the paged cache, bound by reading the cache once. The context is cut into splits, so
// that one long sequence fills the GPU; G query heads that share a KV head are computed together, so that each key is read once.
//
//   q [rows, heads, D]   keys, values [slots, kv_heads, D]
//   contexts[i]: tokens of sequence i, its own among them (0: padding); query_rows[i]: its row in q; table_starts[i]: its block table
//   partial [sequences, heads, splits, D], marks [sequences, heads, splits, 2] (highest score, sum), both float32, joined by `combine`
//
// Per tile of 64 tokens: scores by tensor cores straight from global memory (lane l of a warp reads token l / 4, 16 bytes at a time;
// dims are taken in the same permuted order on both sides, which a dot product allows), softmax in shared memory, values by plain
// multiply-adds with their loads issued before the scores are known.
#include "common.cuh"

enum { TILE = 64, THREADS = 128, WARPS = 4 };

// Tokens per split: the same in both kernels.
__device__ __forceinline__ int split_length(int context, int splits) {
  return ((context + splits - 1) / splits + TILE - 1) / TILE * TILE;
}

template <typename T, int D, int G>
__device__ __forceinline__ void decode(const T *q, const T *keys, const T *values, const int *query_rows, const int *contexts,
                                       const int *table_starts, const int *tables, float *partial, float *marks, int heads,
                                       int kv_heads, int block_size, int shift, int splits, float scale) {
  constexpr int LOADS = D / 32;            // 16-byte loads per lane and key
  constexpr int LANES = D / 8;             // lanes that hold one value row
  constexpr int GROUPS = THREADS / LANES;  // tokens whose values are read at a time
  constexpr int TURNS = TILE / GROUPS;
  __shared__ int slots[2][TILE];
  __shared__ float scores[G][TILE];
  __shared__ float highest[G], total[G], keep[G];
  __shared__ float joined[WARPS][G][D];

  const int group = heads / kv_heads, parts = (group + G - 1) / G;
  const int split = blockIdx.x % splits, part = blockIdx.x / splits % parts, kv_head = blockIdx.x / splits / parts % kv_heads;
  const int sequence = blockIdx.x / splits / parts / kv_heads;
  const int context = contexts[sequence], length = split_length(context, splits);
  const int begin = split * length, end = min(context, begin + length);
  if (begin >= end) return;
  const int first_head = kv_head * group + part * G, count = min(G, group - part * G);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int *table = tables + table_starts[sequence];
  const T *kv_keys = keys + (u64)kv_head * D, *kv_values = values + (u64)kv_head * D;
  const u64 stride = (u64)kv_heads * D;

  // Row lane / 4 of the first operand is one query head; rows past `count` are zero.
  uint4 fq[LOADS];
  const T *query = q + ((u64)query_rows[sequence] * heads + first_head + lane / 4) * D + lane % 4 * 8;
#pragma unroll
  for (int i = 0; i < LOADS; i++) fq[i] = lane / 4 < count ? *(const uint4 *)(query + 32 * i) : make_uint4(0, 0, 0, 0);
  if (threadIdx.x < G) {
    highest[threadIdx.x] = NEGATIVE_INFINITY;
    total[threadIdx.x] = 0.f;
  }
  auto locate = [&](int tile) {
    const int t = begin + tile * TILE + threadIdx.x;
    if (threadIdx.x < TILE) slots[tile % 2][threadIdx.x] = t < end ? slot_of(table, t, block_size, shift) : -1;
  };
  locate(0);
  __syncthreads();

  float sums[G][8] = {};
  const int tiles = (end - begin + TILE - 1) / TILE;
  for (int tile = 0; tile < tiles; tile++) {
    const int *here = slots[tile % 2];
    uint4 fk[2][LOADS], fv[TURNS];
#pragma unroll
    for (int n = 0; n < 2; n++) {
      const int slot = here[16 * warp + 8 * n + lane / 4];
#pragma unroll
      for (int i = 0; i < LOADS; i++)
        fk[n][i] = slot >= 0 ? load_once((const uint4 *)(kv_keys + slot * stride + lane % 4 * 8 + 32 * i)) : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int i = 0; i < TURNS; i++) {
      const int slot = here[i * GROUPS + threadIdx.x / LANES];
      fv[i] = slot >= 0 ? load_once((const uint4 *)(kv_values + slot * stride + threadIdx.x % LANES * 8)) : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int n = 0; n < 2; n++) {
      float c[4] = {};
#pragma unroll
      for (int i = 0; i < LOADS; i++) {
        multiply<T>(c, fq[i].x, 0, fq[i].y, 0, fk[n][i].x, fk[n][i].y);
        multiply<T>(c, fq[i].z, 0, fq[i].w, 0, fk[n][i].z, fk[n][i].w);
      }
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const int at = 16 * warp + 8 * n + lane % 4 * 2 + i;
        if (lane / 4 < G) scores[lane / 4][at] = here[at] >= 0 ? c[i] * scale : NEGATIVE_INFINITY;
      }
    }
    if (tile + 1 < tiles) locate(tile + 1);
    __syncthreads();
    for (int head = warp; head < G; head += WARPS) {
      const float a = scores[head][lane], b = scores[head][lane + 32];
      float top = fmaxf(a, b);
#pragma unroll
      for (int mask = 16; mask; mask >>= 1) top = fmaxf(top, __shfl_xor_sync(0xffffffff, top, mask));
      const float before = highest[head];
      top = fmaxf(top, before);
      const float pa = exp2_fast(a - top), pb = exp2_fast(b - top), sum = warp_sum(pa + pb);
      scores[head][lane] = pa;
      scores[head][lane + 32] = pb;
      __syncwarp();
      if (lane == 0) {
        const float kept = exp2_fast(before - top);
        keep[head] = kept;
        highest[head] = top;
        total[head] = total[head] * kept + sum;
      }
    }
    __syncthreads();
#pragma unroll
    for (int head = 0; head < G; head++) {
#pragma unroll
      for (int d = 0; d < 8; d++) sums[head][d] *= keep[head];
    }
#pragma unroll
    for (int i = 0; i < TURNS; i++) {
      float v[8];
      unpack8<T>(fv[i], v);
#pragma unroll
      for (int head = 0; head < G; head++) {
        const float p = scores[head][i * GROUPS + threadIdx.x / LANES];
#pragma unroll
        for (int d = 0; d < 8; d++) sums[head][d] = fmaf(p, v[d], sums[head][d]);
      }
    }
    __syncthreads();
  }

#pragma unroll
  for (int head = 0; head < G; head++)
#pragma unroll
    for (int d = 0; d < 8; d++) {
      float sum = sums[head][d];
#pragma unroll
      for (int mask = 16; mask >= LANES; mask >>= 1) sum += __shfl_xor_sync(0xffffffff, sum, mask);
      if (lane < LANES) joined[warp][head][lane * 8 + d] = sum;
    }
  __syncthreads();
  for (int i = threadIdx.x; i < count * D; i += THREADS) {
    const int head = i / D, d = i % D;
    const u64 at = ((u64)sequence * heads + first_head + head) * splits + split;
    partial[at * D + d] = joined[0][head][d] + joined[1][head][d] + joined[2][head][d] + joined[3][head][d];
    if (d == 0) {
      marks[2 * at] = highest[head];
      marks[2 * at + 1] = total[head];
    }
  }
}

// out [rows, heads, D] at query_rows. One block of D threads per sequence and head.
template <typename T>
__device__ __forceinline__ void combine(const float *partial, const float *marks, const int *query_rows, const int *contexts, T *out,
                                        int heads, int dim, int splits) {
  const int sequence = blockIdx.x / heads, head = blockIdx.x % heads;
  const int context = contexts[sequence], length = max(1, split_length(context, splits)), used = (context + length - 1) / length;
  const u64 first = (u64)blockIdx.x * splits;
  float top = NEGATIVE_INFINITY;
  for (int i = 0; i < used; i++) top = fmaxf(top, marks[2 * (first + i)]);
  float total = 0.f, sum = 0.f;
  for (int i = 0; i < used; i++) {
    const float share = exp2_fast(marks[2 * (first + i)] - top);
    total += share * marks[2 * (first + i) + 1];
    sum += share * partial[(first + i) * dim + threadIdx.x];
  }
  out[((u64)query_rows[sequence] * heads + head) * dim + threadIdx.x] = from_float<T>(used ? sum / total : 0.f);
}

#define KERNEL(T, D, G)                                                                                                              \
  extern "C" __global__ void __launch_bounds__(THREADS)                                                                              \
      attention_decode_##T##_##D##_##G(const T *q, const T *keys, const T *values, const int *query_rows, const int *contexts,       \
                                       const int *table_starts, const int *tables, float *partial, float *marks, int heads,          \
                                       int kv_heads, int block_size, int shift, int splits, float scale) {                           \
    decode<T, D, G>(q, keys, values, query_rows, contexts, table_starts, tables, partial, marks, heads, kv_heads, block_size, shift, \
                    splits, scale);                                                                                                  \
  }
#define GROUPS_OF(T, D) KERNEL(T, D, 1) KERNEL(T, D, 2) KERNEL(T, D, 4) KERNEL(T, D, 8)
#define KERNELS(T)                                                                                                                   \
  GROUPS_OF(T, 32) GROUPS_OF(T, 64) GROUPS_OF(T, 128)                                                                                \
  extern "C" __global__ void attention_combine_##T(const float *partial, const float *marks, const int *query_rows,                  \
                                                   const int *contexts, T *out, int heads, int dim, int splits) {                    \
    combine<T>(partial, marks, query_rows, contexts, out, heads, dim, splits);                                                       \
  }
FOR_BOTH_TYPES(KERNELS)
