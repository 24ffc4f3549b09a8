// Matrix products whose every output is one sum in a fixed order, whatever the number of rows: what --batch-invariant runs on instead
// of cuBLAS. out [rows, outputs] = x [rows, inputs] weight [outputs, inputs]^T.
//
// The order is that of the mma instructions, 16 inputs at a time from the first to the last, into one float32 accumulator. Both tile
// shapes below keep to it, so a row has the same bits in a step of one token (`small`) as in a prompt of thousands (`large`).
#include "common.cuh"

enum Mode { STORE, ADD, LOGITS };  // T; float32 +=; float32

template <typename T, int BM, int BN, int BK, int WARPS_M, int WARPS_N, int STAGES, int MODE>
__device__ __forceinline__ void gemm(const T *x, const T *weight, void *out, int rows, int inputs, int outputs) {
  constexpr int THREADS = 32 * WARPS_M * WARPS_N, TM = BM / WARPS_M / 16, TN = BN / WARPS_N / 8;
  constexpr int STRIDE = BK + 8;  // elements; the padding spreads eight rows over all banks
  extern __shared__ u16 shared[];
  const int m_tiles = (rows + BM - 1) / BM;
  const int m0 = blockIdx.x % m_tiles * BM, n0 = blockIdx.x / m_tiles * BN;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int wm = warp / WARPS_N * (BM / WARPS_M), wn = warp % WARPS_N * (BN / WARPS_N);
  const int steps = (inputs + BK - 1) / BK;
  float sums[TM][TN][4] = {};

  auto fetch = [&](int step) {
    if (step < steps) {
      u16 *stage = shared + step % STAGES * (BM + BN) * STRIDE;
      for (int i = threadIdx.x; i < (BM + BN) * (BK / 8); i += THREADS) {
        const int row = i / (BK / 8), k = step * BK + i % (BK / 8) * 8;
        const bool of_x = row < BM;
        const int index = of_x ? m0 + row : n0 + row - BM;
        const bool valid = k < inputs && index < (of_x ? rows : outputs);
        const T *from = (of_x ? x : weight) + (valid ? (u64)index * inputs + k : 0);
        copy_async(shared_address(stage + row * STRIDE + i % (BK / 8) * 8), from, valid);
      }
    }
    copies_commit();
  };

  for (int step = 0; step < STAGES - 1; step++) fetch(step);
  for (int step = 0; step < steps; step++) {
    copies_wait<STAGES - 2>();
    __syncthreads();
    fetch(step + STAGES - 1);
    const u16 *a = shared + step % STAGES * (BM + BN) * STRIDE, *b = a + BM * STRIDE;
#pragma unroll
    for (int k = 0; k < BK; k += 16) {
      u32 fa[TM][4], fb[TN / 2][4];
#pragma unroll
      for (int i = 0; i < TM; i++) load_matrices(fa[i], shared_address(a + (wm + 16 * i + lane % 16) * STRIDE + k + lane / 16 * 8));
#pragma unroll
      for (int j = 0; j < TN / 2; j++)
        load_matrices(fb[j], shared_address(b + (wn + 16 * j + lane / 16 * 8 + lane % 8) * STRIDE + k + lane / 8 % 2 * 8));
#pragma unroll
      for (int i = 0; i < TM; i++)
#pragma unroll
        for (int j = 0; j < TN; j++)
          multiply<T>(sums[i][j], fa[i][0], fa[i][1], fa[i][2], fa[i][3], fb[j / 2][j % 2 * 2], fb[j / 2][j % 2 * 2 + 1]);
    }
  }
  copies_wait<0>();

#pragma unroll
  for (int i = 0; i < TM; i++)
#pragma unroll
    for (int j = 0; j < TN; j++)
#pragma unroll
      for (int k = 0; k < 4; k++) {
        const int row = m0 + wm + 16 * i + lane / 4 + k / 2 * 8, column = n0 + wn + 8 * j + lane % 4 * 2 + k % 2;
        if (row >= rows || column >= outputs) continue;
        const u64 at = (u64)row * outputs + column;
        if (MODE == STORE) ((T *)out)[at] = from_float<T>(sums[i][j][k]);
        if (MODE == ADD) ((float *)out)[at] += sums[i][j][k];
        if (MODE == LOGITS) ((float *)out)[at] = sums[i][j][k];
      }
}

// Shared bytes: stages * (BM + BN) * (BK + 8) * 2; src/model/cuda/kernels.ts has the same numbers.
#define KERNEL(T, NAME, MODE)                                                                                                     \
  extern "C" __global__ void __launch_bounds__(256)                                                                               \
      gemm_##T##_##NAME##_large(const T *x, const T *weight, void *out, int rows, int inputs, int outputs) {                      \
    gemm<T, 128, 128, 32, 2, 4, 4, MODE>(x, weight, out, rows, inputs, outputs);                                                  \
  }                                                                                                                               \
  extern "C" __global__ void __launch_bounds__(128)                                                                               \
      gemm_##T##_##NAME##_small(const T *x, const T *weight, void *out, int rows, int inputs, int outputs) {                      \
    gemm<T, 16, 64, 64, 1, 4, 4, MODE>(x, weight, out, rows, inputs, outputs);                                                    \
  }
#define KERNELS(T) KERNEL(T, store, STORE) KERNEL(T, add, ADD) KERNEL(T, logits, LOGITS)
FOR_BOTH_TYPES(KERNELS)
