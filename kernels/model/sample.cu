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

// How a row's token is to be drawn: the host writes it into the plan of a step.
struct Draw {
  float inverse_temperature;  // 0: leave the most likely token
  int top_k;                  // 0: all
  float top_p;                // 1: all
  float uniform;              // [0, 1)
};

template <typename V> __device__ __forceinline__ V block_sum(V x, V *shared) {
#pragma unroll
  for (int mask = 16; mask; mask >>= 1) x += __shfl_xor_sync(0xffffffff, x, mask);
  __syncthreads();
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  x = shared[threadIdx.x % 32];
#pragma unroll
  for (int mask = 16; mask; mask >>= 1) x += __shfl_xor_sync(0xffffffff, x, mask);
  return x;
}

// tokens[row], which holds the most likely token, becomes one drawn from softmax(logits / temperature), cut to the top_k likeliest and
// then to the smallest set of likeliest whose share reaches top_p; tokens as likely as the last one of a cut stay too. Tokens pass in
// the order of their ids. A cut is a least weight, found by bisection over the bits of a float: 30 passes over a row that lies in the
// second-level cache.
extern "C" __global__ void __launch_bounds__(1024) draw(const float *logits, int *tokens, const Draw *draws, int vocab) {
  __shared__ float sums[32];
  __shared__ int counts[32];
  __shared__ float starts[32];
  const Draw d = draws[blockIdx.x];
  const int likeliest = tokens[blockIdx.x];
  if (d.inverse_temperature == 0.f || likeliest < 0) return;
  const float *row = logits + (u64)blockIdx.x * vocab;
  const float top = row[likeliest], scale = d.inverse_temperature * 1.44269504f;
  auto weight = [&](int i) { return exp2_fast((row[i] - top) * scale); };

  u32 cut = 1;  // bits of the least weight that stays; weights that are zero never do
  auto bisect = [&](auto enough) {
    u32 low = cut, high = __float_as_uint(1.f) + 1;
    while (high - low > 1) {
      const u32 middle = low + (high - low) / 2;
      if (enough(__uint_as_float(middle))) low = middle;
      else high = middle;
    }
    cut = low;
  };
  auto mass = [&](float least) {
    float sum = 0.f;
    for (int i = threadIdx.x; i < vocab; i += 1024) {
      const float w = weight(i);
      sum += w >= least ? w : 0.f;
    }
    return block_sum(sum, sums);
  };
  if (d.top_k > 0 && d.top_k < vocab) {
    bisect([&](float least) {
      int count = 0;
      for (int i = threadIdx.x; i < vocab; i += 1024) count += weight(i) >= least;
      return block_sum(count, counts) >= d.top_k;
    });
  }
  if (d.top_p < 1.f) {
    const float wanted = d.top_p * mass(__uint_as_float(cut));
    bisect([&](float least) { return mass(least) >= wanted; });
  }

  // Each thread has a run of ids; the thread in whose run the drawn number falls finds the token.
  const float least = __uint_as_float(cut);
  const int run = (vocab + 1023) / 1024, begin = threadIdx.x * run, end = min(vocab, begin + run);
  float own = 0.f;
  for (int i = begin; i < end; i++) {
    const float w = weight(i);
    own += w >= least ? w : 0.f;
  }
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float upto = own;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const float before = __shfl_up_sync(0xffffffff, upto, step);
    if (lane >= step) upto += before;
  }
  __syncthreads();
  if (lane == 31) sums[warp] = upto;
  __syncthreads();
  if (threadIdx.x == 0) {
    float sum = 0.f;
    for (int i = 0; i < 32; i++) {
      starts[i] = sum;
      sum += sums[i];
    }
    sums[0] = sum;
  }
  __syncthreads();
  const float total = sums[0], target = fminf(d.uniform * total, total * 0.9999999f);
  // a thread ends where the next begins, to the bit, so that exactly one has the target
  __shared__ float ends[1024];
  ends[threadIdx.x] = starts[warp] + upto;
  __syncthreads();
  // neighbours of different warps were rounded apart: never below what came before
  const float from = threadIdx.x == 0 ? 0.f : ends[threadIdx.x - 1];
  const bool mine = own > 0.f && from <= target && (target < ends[threadIdx.x] || threadIdx.x == 1023);
  __shared__ int chosen;
  if (threadIdx.x == 0) chosen = 0x7fffffff;
  __syncthreads();
  if (mine) {
    float sum = from;
    int last = likeliest;
    for (int i = begin; i < end; i++) {
      const float w = weight(i);
      if (w < least) continue;
      sum += w;
      last = i;
      if (sum > target) break;
    }
    atomicMin(&chosen, last);
  }
  __syncthreads();
  // where rounding left a gap, the likeliest token stays
  if (threadIdx.x == 0 && chosen != 0x7fffffff) tokens[blockIdx.x] = chosen;
}
