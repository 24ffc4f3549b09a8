// The most likely token of each row of float32 logits [rows, vocab]. Ties go to the lowest id; -1 where the highest logit is no finite
// number or any is NaN, which is a defect of the model and must not become text.
#include "common.cuh"

struct Best { float value; int index; };
__device__ __forceinline__ Best better(Best a, Best b) {
  return b.value > a.value || (b.value == a.value && b.index < a.index) ? b : a;
}

extern "C" __global__ void __launch_bounds__(1024) argmax(const float *logits, int *tokens, int vocab) {
  __shared__ Best found[32];
  __shared__ int broken;
  if (threadIdx.x == 0) broken = 0;
  __syncthreads();
  const float *row = logits + (u64)blockIdx.x * vocab;
  Best best = {NEGATIVE_INFINITY, 0x7fffffff};
  bool nan = false;
#pragma unroll 8
  for (int i = threadIdx.x; i < vocab; i += 1024) {
    const float v = row[i];
    nan |= v != v;
    if (v > best.value) best = {v, i};
  }
  if (nan) broken = 1;
#pragma unroll
  for (int mask = 16; mask; mask >>= 1) {
    best = better(best, {__shfl_xor_sync(0xffffffff, best.value, mask), __shfl_xor_sync(0xffffffff, best.index, mask)});
  }
  if (threadIdx.x % 32 == 0) found[threadIdx.x / 32] = best;
  __syncthreads();
  if (threadIdx.x >= 32) return;
  best = found[threadIdx.x];
#pragma unroll
  for (int mask = 16; mask; mask >>= 1) {
    best = better(best, {__shfl_xor_sync(0xffffffff, best.value, mask), __shfl_xor_sync(0xffffffff, best.index, mask)});
  }
  const bool finite = best.value - best.value == 0.f;
  if (threadIdx.x == 0) tokens[blockIdx.x] = broken || !finite ? -1 : best.index;
}
