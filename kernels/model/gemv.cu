// Matrix products of one or two rows, which a decode step of few sequences consists of: bound by reading the weights once.
// out [rows, outputs] = x [rows, inputs] weight [outputs, inputs]^T. One warp per two outputs, 16-byte loads, eight of them in flight
// per lane; `inputs` is a multiple of 8. From three rows on cuBLAS is as fast.
#include "common.cuh"

enum Mode {
  STORE,   // T
  ADD,     // float32 +=, the residual stream
  LOGITS,  // float32
  SWIGLU,  // T; weight [2, outputs, inputs]: silu(first) * second
};
enum { UNROLL = 4 };

template <typename T> __device__ __forceinline__ float dot8(uint4 a, uint4 b, float sum) {
  float x[8], y[8];
  unpack8<T>(a, x);
  unpack8<T>(b, y);
#pragma unroll
  for (int i = 0; i < 8; i++) sum = fmaf(x[i], y[i], sum);
  return sum;
}

template <typename T, int ROWS, int MODE>
__device__ __forceinline__ void gemv(const T *x, const T *weight, void *out, int inputs, int outputs) {
  const int warp = (blockIdx.x * blockDim.x + threadIdx.x) / 32, lane = threadIdx.x % 32;
  const int first = MODE == SWIGLU ? warp : 2 * warp;
  if (first >= outputs) return;
  const int second = MODE == SWIGLU ? outputs + warp : min(first + 1, outputs - 1);
  const int chunks = inputs / 8;
  const uint4 *a = (const uint4 *)weight + (u64)first * chunks, *b = (const uint4 *)weight + (u64)second * chunks;
  const uint4 *in = (const uint4 *)x;
  float sums[2][ROWS] = {};
  for (int at = lane; at < chunks; at += 32 * UNROLL) {
    uint4 held[2][UNROLL];
#pragma unroll
    for (int i = 0; i < UNROLL; i++) {
      if (at + 32 * i >= chunks) continue;
      held[0][i] = load_once(a + at + 32 * i);
      held[1][i] = load_once(b + at + 32 * i);
    }
#pragma unroll
    for (int i = 0; i < UNROLL; i++) {
      if (at + 32 * i >= chunks) continue;
#pragma unroll
      for (int row = 0; row < ROWS; row++) {
        const uint4 v = in[row * chunks + at + 32 * i];
        sums[0][row] = dot8<T>(held[0][i], v, sums[0][row]);
        sums[1][row] = dot8<T>(held[1][i], v, sums[1][row]);
      }
    }
  }
#pragma unroll
  for (int row = 0; row < ROWS; row++) {
    const float p = warp_sum(sums[0][row]), q = warp_sum(sums[1][row]);
    if (lane != 0) continue;
    const u64 at = (u64)row * outputs + first;
    if constexpr (MODE == SWIGLU) {
      ((T *)out)[at] = from_float<T>(p / (1.f + __expf(-p)) * q);
    } else {
#pragma unroll
      for (int k = 0; k < 2; k++) {
        if (first + k >= outputs) continue;
        const float y = k ? q : p;
        if (MODE == STORE) ((T *)out)[at + k] = from_float<T>(y);
        if (MODE == ADD) ((float *)out)[at + k] += y;
        if (MODE == LOGITS) ((float *)out)[at + k] = y;
      }
    }
  }
}

#define KERNEL(T, ROWS, NAME, MODE)                                                                                  \
  extern "C" __global__ void __launch_bounds__(256)                                                                  \
      gemv_##T##_##NAME##_##ROWS(const T *x, const T *weight, void *out, int inputs, int outputs) {                  \
    gemv<T, ROWS, MODE>(x, weight, out, inputs, outputs);                                                            \
  }
#define MODES(T, ROWS) \
  KERNEL(T, ROWS, store, STORE) KERNEL(T, ROWS, add, ADD) KERNEL(T, ROWS, logits, LOGITS) KERNEL(T, ROWS, swiglu, SWIGLU)
#define KERNELS(T) MODES(T, 1) MODES(T, 2)
FOR_BOTH_TYPES(KERNELS)
