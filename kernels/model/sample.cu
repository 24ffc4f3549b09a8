// From float32 logits [rows, vocab] to tokens and what the model says of them, a thread block a row, so that a row's bits do not depend on
// the others. `shape` bans, biases and penalizes, `argmax` and `draw` choose, `report` tells log-probabilities of the raw logits.
#include "common.cuh"

struct Best { float value; int index; };
__device__ __forceinline__ Best better(Best a, Best b) {
  return b.value > a.value || (b.value == a.value && b.index < a.index) ? b : a;
}

__device__ __forceinline__ Best warp_best(Best best) {
#pragma unroll
  for (int mask = 16; mask; mask >>= 1) {
    best = better(best, {__shfl_xor_sync(0xffffffff, best.value, mask), __shfl_xor_sync(0xffffffff, best.index, mask)});
  }
  return best;
}

// The most likely token of each row. Ties go to the lowest id; -1 where the highest logit is no finite number (all are banned, or the
// model is broken) or any is NaN, which must not become text.
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
  best = warp_best(best);
  if (threadIdx.x % 32 == 0) found[threadIdx.x / 32] = best;
  __syncthreads();
  if (threadIdx.x >= 32) return;
  best = warp_best(found[threadIdx.x]);
  const bool finite = best.value - best.value == 0.f;
  if (threadIdx.x == 0) tokens[blockIdx.x] = broken || !finite ? -1 : best.index;
}

// How a row's token is to be drawn: the host writes it into the plan of a step.
struct Draw {
  float inverse_temperature;  // 0: leave the most likely token
  int top_k;                  // 0: all
  float top_p;                // 1: all
  float uniform;              // [0, 1)
  float min_p;                // 0: all
};

// N sums over the threads of a block, each in the same order whatever N is.
template <int N, typename V> __device__ __forceinline__ void block_sums(V (&x)[N], V (*shared)[32]) {
#pragma unroll
  for (int n = 0; n < N; n++) {
#pragma unroll
    for (int mask = 16; mask; mask >>= 1) x[n] += __shfl_xor_sync(0xffffffff, x[n], mask);
  }
  __syncthreads();
#pragma unroll
  for (int n = 0; n < N; n++) if (threadIdx.x % 32 == 0) shared[n][threadIdx.x / 32] = x[n];
  __syncthreads();
#pragma unroll
  for (int n = 0; n < N; n++) {
    x[n] = shared[n][threadIdx.x % 32];
#pragma unroll
    for (int mask = 16; mask; mask >>= 1) x[n] += __shfl_xor_sync(0xffffffff, x[n], mask);
  }
}

// tokens[row], which holds the most likely token, becomes one drawn from softmax(logits / temperature), cut to those at least min_p times
// as likely as the likeliest, then to the top_k likeliest, then to the smallest set of likeliest whose share of what is left reaches
// top_p; tokens as likely as the last one of a cut stay too. Tokens pass in the order of their ids. A cut is a least weight, found by
// search over the bits of a float, three probes at a time: 15 passes over a row that lies in the second-level cache.
extern "C" __global__ void __launch_bounds__(1024) draw(const float *logits, int *tokens, const Draw *draws, int vocab) {
  enum { PROBES = 3 };
  __shared__ float sums[PROBES][32];
  __shared__ int counts[PROBES][32];
  __shared__ float starts[32];
  const Draw d = draws[blockIdx.x];
  const int likeliest = tokens[blockIdx.x];
  if (d.inverse_temperature == 0.f || likeliest < 0) return;
  const float *row = logits + (u64)blockIdx.x * vocab;
  const float top = row[likeliest], scale = d.inverse_temperature * 1.44269504f;
  auto weight = [&](int i) { return exp2_fast((row[i] - top) * scale); };

  // bits of the least weight that stays; weights that are zero never do
  u32 cut = max(1u, __float_as_uint(d.min_p));
  // the cut becomes the highest bits whose total is enough
  auto search = [&](auto enough, auto totals_of) {
    u32 low = cut, high = __float_as_uint(1.f) + 1;
    while (high - low > 1) {
      u32 probes[PROBES];
      float least[PROBES];
#pragma unroll
      for (int n = 0; n < PROBES; n++) {
        probes[n] = low + (high - low) / (PROBES + 1) * (n + 1) + (high - low) % (PROBES + 1) * (n + 1) / (PROBES + 1);
        least[n] = __uint_as_float(probes[n]);
      }
      const auto totals = totals_of(least);
#pragma unroll
      for (int n = 0; n < PROBES; n++) {
        if (enough(totals.of[n])) low = probes[n];
        else {
          high = probes[n];
          break;
        }
      }
    }
    cut = low;
  };
  struct Masses { float of[PROBES]; };
  struct Counts { int of[PROBES]; };
  auto masses = [&](const float *least) {
    Masses sum = {};
#pragma unroll 4
    for (int i = threadIdx.x; i < vocab; i += 1024) {
      const float w = weight(i);
#pragma unroll
      for (int n = 0; n < PROBES; n++) sum.of[n] += w >= least[n] ? w : 0.f;
    }
    block_sums(sum.of, sums);
    return sum;
  };
  if (d.top_k > 0 && d.top_k < vocab) {
    search([&](int count) { return count >= d.top_k; }, [&](const float *least) {
      Counts count = {};
#pragma unroll 4
      for (int i = threadIdx.x; i < vocab; i += 1024) {
        const float w = weight(i);
#pragma unroll
        for (int n = 0; n < PROBES; n++) count.of[n] += w >= least[n];
      }
      block_sums(count.of, counts);
      return count;
    });
  }
  if (d.top_p < 1.f) {
    const float start[PROBES] = {__uint_as_float(cut), __uint_as_float(cut), __uint_as_float(cut)};
    const float wanted = d.top_p * masses(start).of[0];
    search([&](float mass) { return mass >= wanted; }, masses);
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
  if (lane == 31) sums[0][warp] = upto;
  __syncthreads();
  if (threadIdx.x == 0) {
    float sum = 0.f;
    for (int i = 0; i < 32; i++) {
      starts[i] = sum;
      sum += sums[0][i];
    }
    sums[0][0] = sum;
  }
  __syncthreads();
  const float total = sums[0][0], target = fminf(d.uniform * total, total * 0.9999999f);
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

// What is done to a row of logits before its token is drawn: the host writes one for each row that it is done to. Lists stand in `data`,
// where they begin is counted in words.
struct Shape {
  int row;                                // of logits
  int mask;                               // a bit per token, and those without are banned; -1: none
  int edits, edit_count;                  // a token and the bits of a float that its logit gets added; each token once
  int slot;                               // of counts; -1: no penalties
  int fresh;                              // 1: another row's counts stand in the slot
  int tokens, prompt_count, output_count; // what the slot does not count yet: so many of the prompt, then so many of the output
  float repetition, frequency, presence;
};

// Highest bit: the prompt has the token. Below: how often the output has it.
#define IN_PROMPT 0x80000000u

// shaped[i] = the logits of shapes[i].row: banned outside the mask, edited, then penalized. counts [slots, vocab] are brought up to date
// first. Rounds after each operation, as the host does.
extern "C" __global__ void __launch_bounds__(1024) shape(const float *logits, float *shaped, const Shape *shapes, const int *data, u32 *counts, int vocab) {
  const Shape s = shapes[blockIdx.x];
  const float *row = logits + (u64)s.row * vocab;
  float *out = shaped + (u64)blockIdx.x * vocab;
  const bool penalized = s.slot >= 0;
  u32 *own = counts + (u64)max(s.slot, 0) * vocab;
  if (penalized) {
    if (s.fresh) for (int i = threadIdx.x; i < vocab; i += 1024) own[i] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < s.prompt_count + s.output_count; i += 1024) {
      u32 *count = own + data[s.tokens + i];
      if (i < s.prompt_count) atomicOr(count, IN_PROMPT);
      else atomicAdd(count, 1u);
    }
    __syncthreads();
  }
  auto shape_one = [&](int i, float bias) {
    float v = row[i];
    if (s.mask >= 0 && !((u32)data[s.mask + i / 32] >> (i % 32) & 1)) v = NEGATIVE_INFINITY;
    v += bias;
    // past the first-level cache, which the counting went round
    const u32 count = penalized ? __ldcg(own + i) : 0;
    if (count == 0) return v;
    v = v > 0.f ? v / s.repetition : v * s.repetition;
    const u32 times = count & ~IN_PROMPT;
    return times == 0 ? v : __fsub_rn(fmaf(-s.frequency, (float)times, v), s.presence);
  };
#pragma unroll 4
  for (int i = threadIdx.x; i < vocab; i += 1024) out[i] = shape_one(i, 0.f);
  __syncthreads();
  for (int e = threadIdx.x; e < s.edit_count; e += 1024) {
    const int token = data[s.edits + 2 * e];
    out[token] = shape_one(token, __int_as_float(data[s.edits + 2 * e + 1]));
  }
}

struct Wanted {
  int row;    // of logits
  int token;  // which of `tokens` it is about
  int count;  // of the likeliest, at most MOST_REPORTED
};

#define MOST_REPORTED 20

struct Report {
  float logprob;
  int rank;  // how many tokens are at least as likely
  int ids[MOST_REPORTED];
  float logprobs[MOST_REPORTED];
};

// Log-probabilities, of the logits as they are, of tokens[wanted.token] and of the likeliest tokens, the likeliest first, ties by the lowest
// id. Beyond the vocabulary an id is no token. Each thread keeps the four likeliest of its own, and looks again when they are used up.
extern "C" __global__ void __launch_bounds__(1024) report(const float *logits, const int *tokens, const Wanted *wanted, Report *reports, int vocab) {
  enum { KEPT = 4 };
  __shared__ Best found[2][32];
  __shared__ float sums[1][32];
  __shared__ int ranks[1][32];
  const Wanted w = wanted[blockIdx.x];
  Report *out = reports + blockIdx.x;
  const float *row = logits + (u64)w.row * vocab;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const Best none = {NEGATIVE_INFINITY, 0x7fffffff};
  Best kept[KEPT];
  // of those that come after `after`
  auto look = [&](Best after) {
#pragma unroll
    for (int k = 0; k < KEPT; k++) kept[k] = none;
#pragma unroll 4
    for (int i = threadIdx.x; i < vocab; i += 1024) {
      const float v = row[i];
      if (!(v < after.value || (v == after.value && i > after.index)) || !(v > kept[KEPT - 1].value)) continue;
      kept[KEPT - 1] = {v, i};
#pragma unroll
      for (int k = KEPT - 1; k > 0; k--) {
        if (kept[k].value > kept[k - 1].value) {
          const Best lower = kept[k - 1];
          kept[k - 1] = kept[k];
          kept[k] = lower;
        }
      }
    }
  };
  look({__int_as_float(0x7f800000), -1});
  float top = 0.f;
  for (int n = 0; n < max(w.count, 1); n++) {
    const Best mine = warp_best(kept[0]);
    // by turns, so that one barrier is enough
    if (lane == 0) found[n % 2][warp] = mine;
    __syncthreads();
    const Best best = warp_best(found[n % 2][lane]);
    if (n == 0) top = best.value;
    if (threadIdx.x == 0 && n < w.count) {
      out->ids[n] = best.index;
      out->logprobs[n] = best.value;
    }
    if (kept[0].index != best.index || best.index == none.index) continue;
    const Best used = kept[0];
    const bool more = kept[1].index == none.index;
#pragma unroll
    for (int k = 1; k < KEPT; k++) kept[k - 1] = kept[k];
    kept[KEPT - 1] = none;
    if (more) look(used);
  }
  const int token = tokens[w.token];
  const float own = token >= 0 ? row[token] : __int_as_float(0x7fc00000);
  float sum[1] = {0.f};
  int rank[1] = {0};
#pragma unroll 4
  for (int i = threadIdx.x; i < vocab; i += 1024) {
    const float v = row[i];
    sum[0] += exp2_fast((v - top) * 1.44269504f);
    rank[0] += v >= own;
  }
  block_sums(sum, sums);
  block_sums(rank, ranks);
  if (threadIdx.x > 0) return;
  const float total = logf(sum[0]);
  out->logprob = own - top - total;
  out->rank = rank[0];
  for (int n = 0; n < w.count; n++) out->logprobs[n] = out->logprobs[n] - top - total;
}
