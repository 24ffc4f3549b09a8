// Causal attention of many query rows over the paged cache: a tile of 128 rows of one head at a time, keys and values in tiles of 64
// through shared memory, softmax kept running in registers.
//
//   q [rows, heads, D]   keys, values [slots, kv_heads, D]   out [rows, heads, D]
//   items: {first row, rows (1..128), position of the first row, where the sequence's block table begins in `tables`}
//
// A row's result hangs on its own query and the keys before it alone: key tiles begin at multiples of 64 whatever the batch, and a tile
// that a row does not see changes no bit of it. So this kernel is also the one of --batch-invariant, for single tokens too.
#include "common.cuh"

enum { ROWS = 128, KEYS = 64, THREADS = 256 };

struct Item { int row, rows, position, table; };

// Where 8 elements of a row lie in shared memory, in elements: the 16-byte pieces of eight neighbouring rows on different banks, which
// is how the tensor cores' loads take them; without padding, since 96 KiB is what GPUs of sm_86 and sm_89 have.
template <int D> __device__ __forceinline__ int place(int row, int piece) {
  return D >= 64 ? row * D + (piece ^ row % 8) * 8 : row * (D + 8) + piece * 8;
}

template <typename T, int D>
__device__ __forceinline__ void attention(const T *q, const T *keys, const T *values, T *out, const Item *items, const int *tables,
                                          int heads, int kv_heads, int block_size, int shift, float scale) {
  constexpr int STRIDE = D >= 64 ? D : D + 8, CHUNKS = D / 8;
  extern __shared__ u16 shared[];
  u16 *sq = shared, *sk = sq + ROWS * STRIDE, *sv = sk + 2 * KEYS * STRIDE;
  const Item item = items[blockIdx.x / heads];
  const int head = blockIdx.x % heads, kv_head = head / (heads / kv_heads);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int *table = tables + item.table;
  const int context = item.position + item.rows;
  const int tiles = (context + KEYS - 1) / KEYS;

  for (int i = threadIdx.x; i < ROWS * CHUNKS; i += THREADS) {
    const int row = i / CHUNKS, piece = i % CHUNKS;
    const bool valid = row < item.rows;
    const T *from = q + (valid ? ((u64)(item.row + row) * heads + head) * D + piece * 8 : 0);
    copy_async(shared_address(sq + place<D>(row, piece)), from, valid);
  }
  auto fetch = [&](int tile) {
    if (tile < tiles) {
      u16 *k = sk + tile % 2 * KEYS * STRIDE, *v = sv + tile % 2 * KEYS * STRIDE;
#pragma unroll
      for (int i = threadIdx.x; i < KEYS * CHUNKS; i += THREADS) {
        const int token = i / CHUNKS, piece = i % CHUNKS, t = tile * KEYS + token;
        const bool valid = t < context;
        const u64 from = valid ? ((u64)slot_of(table, t, block_size, shift) * kv_heads + kv_head) * D + piece * 8 : 0;
        copy_async(shared_address(k + place<D>(token, piece)), keys + from, valid);
        copy_async(shared_address(v + place<D>(token, piece)), values + from, valid);
      }
    }
    copies_commit();
  };
  fetch(0);

  float sums[D / 8][4] = {};
  float highest[2] = {NEGATIVE_INFINITY, NEGATIVE_INFINITY}, total[2] = {0.f, 0.f};
  // positions of this lane's two rows
  const int position = item.position + 16 * warp + lane / 4;
  const int last = item.position + 16 * warp + 15;
  const bool idle = 16 * warp >= item.rows;

  for (int tile = 0; tile < tiles; tile++) {
    fetch(tile + 1);
    copies_wait<1>();
    __syncthreads();
    if (!idle && tile * KEYS <= last) {
      const u16 *k = sk + tile % 2 * KEYS * STRIDE, *v = sv + tile % 2 * KEYS * STRIDE;
      float scores[KEYS / 8][4] = {};
#pragma unroll
      for (int d = 0; d < D; d += 16) {
        u32 fq[4];
        load_matrices(fq, shared_address(sq + place<D>(16 * warp + lane % 16, d / 8 + lane / 16)));
#pragma unroll
        for (int j = 0; j < KEYS / 16; j++) {
          u32 fk[4];
          load_matrices(fk, shared_address(k + place<D>(16 * j + lane / 16 * 8 + lane % 8, d / 8 + lane / 8 % 2)));
          multiply<T>(scores[2 * j], fq[0], fq[1], fq[2], fq[3], fk[0], fk[1]);
          multiply<T>(scores[2 * j + 1], fq[0], fq[1], fq[2], fq[3], fk[2], fk[3]);
        }
      }
      if (tile * KEYS + KEYS - 1 > item.position + 16 * warp) {
#pragma unroll
        for (int j = 0; j < KEYS / 8; j++)
#pragma unroll
          for (int i = 0; i < 4; i++) {
            const int t = tile * KEYS + 8 * j + lane % 4 * 2 + i % 2;
            if (t > position + i / 2 * 8) scores[j][i] = NEGATIVE_INFINITY;
          }
      }
#pragma unroll
      for (int r = 0; r < 2; r++) {
        float top = highest[r];
#pragma unroll
        for (int j = 0; j < KEYS / 8; j++) top = fmaxf(top, fmaxf(scores[j][2 * r], scores[j][2 * r + 1]));
        top = fmaxf(top, __shfl_xor_sync(0xffffffff, top, 1));
        top = fmaxf(top, __shfl_xor_sync(0xffffffff, top, 2));
        // exp(score / sqrt(D) - ...) as a power of two: `scale` holds log2(e) / sqrt(D)
        const float keep = exp2_fast((highest[r] - top) * scale), offset = top * scale;
        highest[r] = top;
        float sum = 0.f;
#pragma unroll
        for (int j = 0; j < KEYS / 8; j++) {
          scores[j][2 * r] = exp2_fast(fmaf(scores[j][2 * r], scale, -offset));
          scores[j][2 * r + 1] = exp2_fast(fmaf(scores[j][2 * r + 1], scale, -offset));
          sum += scores[j][2 * r] + scores[j][2 * r + 1];
        }
        total[r] = total[r] * keep + sum;
#pragma unroll
        for (int n = 0; n < D / 8; n++) {
          sums[n][2 * r] *= keep;
          sums[n][2 * r + 1] *= keep;
        }
      }
#pragma unroll
      for (int j = 0; j < KEYS / 16; j++) {
        const u32 p0 = pack<T>(scores[2 * j][0], scores[2 * j][1]), p1 = pack<T>(scores[2 * j][2], scores[2 * j][3]);
        const u32 p2 = pack<T>(scores[2 * j + 1][0], scores[2 * j + 1][1]), p3 = pack<T>(scores[2 * j + 1][2], scores[2 * j + 1][3]);
#pragma unroll
        for (int n = 0; n < D / 16; n++) {
          u32 fv[4];
          load_matrices_transposed(fv, shared_address(v + place<D>(16 * j + lane % 16, 2 * n + lane / 16)));
          multiply<T>(sums[2 * n], p0, p1, p2, p3, fv[0], fv[1]);
          multiply<T>(sums[2 * n + 1], p0, p1, p2, p3, fv[2], fv[3]);
        }
      }
    }
    __syncthreads();
  }
  copies_wait<0>();
  if (idle) return;
#pragma unroll
  for (int r = 0; r < 2; r++) {
    float all = total[r];
    all += __shfl_xor_sync(0xffffffff, all, 1);
    all += __shfl_xor_sync(0xffffffff, all, 2);
    const int row = 16 * warp + lane / 4 + 8 * r;
    if (row >= item.rows) continue;
    const float share = 1.f / all;
    u32 *to = (u32 *)(out + ((u64)(item.row + row) * heads + head) * D) + lane % 4;
#pragma unroll
    for (int n = 0; n < D / 8; n++) to[4 * n] = pack<T>(sums[n][2 * r] * share, sums[n][2 * r + 1] * share);
  }
}

// Shared bytes: (128 + 4 * 64) * STRIDE * 2; src/model/cuda/kernels.ts has the same numbers.
#define KERNEL(T, D)                                                                                                                 \
  extern "C" __global__ void __launch_bounds__(THREADS, 2)                                                                           \
      attention_prefill_##T##_##D(const T *q, const T *keys, const T *values, T *out, const Item *items, const int *tables,          \
                                  int heads, int kv_heads, int block_size, int shift, float scale) {                                 \
    attention<T, D>(q, keys, values, out, items, tables, heads, kv_heads, block_size, shift, scale);                                 \
  }
#define KERNELS(T) KERNEL(T, 32) KERNEL(T, 64) KERNEL(T, 128)
FOR_BOTH_TYPES(KERNELS)
