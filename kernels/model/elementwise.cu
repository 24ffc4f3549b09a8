// Everything between the matrix products: embedding, RMSNorm, RoPE with the write into the paged cache, SwiGLU. Arithmetic in float32;
// the residual stream x [rows, hidden] is float32, so nothing is rounded between layers; all else is the checkpoint's 16-bit type T.
#include "common.cuh"

// x[row] = embedding[tokens[row]]. One block per row.
template <typename T>
__device__ __forceinline__ void embed(const T *embedding, const int *tokens, float *x, int hidden) {
  const uint4 *from = (const uint4 *)(embedding + (u64)tokens[blockIdx.x] * hidden);
  float4 *to = (float4 *)(x + (u64)blockIdx.x * hidden);
  for (int i = threadIdx.x; i < hidden / 8; i += blockDim.x) {
    float v[8];
    unpack8<T>(from[i], v);
    to[2 * i] = make_float4(v[0], v[1], v[2], v[3]);
    to[2 * i + 1] = make_float4(v[4], v[5], v[6], v[7]);
  }
}

// out[i] = x[chosen[i]] / rms * weight; chosen null: every row. One block of 256 per output row.
template <typename T>
__device__ __forceinline__ void rms_norm(const float *x, const int *chosen, const T *weight, T *out, int hidden, float eps) {
  __shared__ float sums[8];
  const int row = chosen ? chosen[blockIdx.x] : blockIdx.x;
  const float4 *from = (const float4 *)(x + (u64)row * hidden);
  float squares = 0.f;
  for (int i = threadIdx.x; i < hidden / 4; i += 256) {
    const float4 v = from[i];
    squares += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
  }
  squares = warp_sum(squares);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = squares;
  __syncthreads();
  float total = 0.f;
#pragma unroll
  for (int i = 0; i < 8; i++) total += sums[i];
  const float scale = rsqrtf(total / hidden + eps);
  const uint2 *w = (const uint2 *)weight;
  uint2 *to = (uint2 *)(out + (u64)blockIdx.x * hidden);
  for (int i = threadIdx.x; i < hidden / 4; i += 256) {
    const float4 v = from[i];
    float a, b, c, d;
    unpack<T>(w[i].x, a, b);
    unpack<T>(w[i].y, c, d);
    to[i] = make_uint2(pack<T>(v.x * scale * a, v.y * scale * b), pack<T>(v.z * scale * c, v.w * scale * d));
  }
}

// qkv [rows, heads + 2 kv_heads, dim] -> q [rows, heads, dim], K and V into the cache at slots[row] (-1: nowhere). Adds `bias`, norms
// q and k per head, and rotates both, each where its weights are given. cosine, sine [positions, dim / 2]; element i pairs with
// i + dim / 2. One warp per row and head.
template <typename T>
__device__ __forceinline__ void rope_cache(const T *qkv, const T *bias, const T *q_norm, const T *k_norm, const float *cosine,
                                           const float *sine, const int *positions, const int *slots, T *q, T *keys, T *values,
                                           int rows, int heads, int kv_heads, int dim, float eps) {
  const int all = heads + 2 * kv_heads;
  const u64 index = (u64)blockIdx.x * 8 + threadIdx.x / 32;
  if (index >= (u64)rows * all) return;
  const int row = index / all, head = index % all, lane = threadIdx.x % 32, half = dim / 2;
  const bool is_value = head >= heads + kv_heads, is_query = head < heads;
  const int slot = slots[row];
  if (!is_query && slot < 0) return;
  const T *from = qkv + index * dim;
  const T *add = bias ? bias + head * dim : nullptr;
  float low[4], high[4];
#pragma unroll
  for (int k = 0; k < 4; k++) {
    const int i = lane + 32 * k;
    low[k] = high[k] = 0.f;
    if (i >= half) continue;
    low[k] = to_float(from[i]) + (add ? to_float(add[i]) : 0.f);
    high[k] = to_float(from[i + half]) + (add ? to_float(add[i + half]) : 0.f);
  }
  const T *norm = is_value ? nullptr : is_query ? q_norm : k_norm;
  if (norm) {
    float squares = 0.f;
#pragma unroll
    for (int k = 0; k < 4; k++) squares += low[k] * low[k] + high[k] * high[k];
    const float scale = rsqrtf(warp_sum(squares) / dim + eps);
#pragma unroll
    for (int k = 0; k < 4; k++) {
      const int i = lane + 32 * k;
      if (i >= half) continue;
      low[k] *= scale * to_float(norm[i]);
      high[k] *= scale * to_float(norm[i + half]);
    }
  }
  T *to = is_query    ? q + ((u64)row * heads + head) * dim
          : !is_value ? keys + ((u64)slot * kv_heads + head - heads) * dim
                      : values + ((u64)slot * kv_heads + head - heads - kv_heads) * dim;
  const u64 angle = (u64)positions[row] * half;
#pragma unroll
  for (int k = 0; k < 4; k++) {
    const int i = lane + 32 * k;
    if (i >= half) continue;
    const float c = is_value ? 1.f : cosine[angle + i], s = is_value ? 0.f : sine[angle + i];
    to[i] = from_float<T>(low[k] * c - high[k] * s);
    to[i + half] = from_float<T>(high[k] * c + low[k] * s);
  }
}

// out [rows, inner] = silu(gate) * up; gate_up [rows, 2, inner]. Eight elements per thread.
template <typename T>
__device__ __forceinline__ void swiglu(const T *gate_up, T *out, int rows, int inner) {
  const u64 index = (u64)blockIdx.x * blockDim.x + threadIdx.x;
  const int width = inner / 8;
  if (index >= (u64)rows * width) return;
  const u64 row = index / width, at = index % width;
  const uint4 *from = (const uint4 *)gate_up + row * 2 * width + at;
  float g[8], u[8];
  unpack8<T>(from[0], g);
  unpack8<T>(from[width], u);
#pragma unroll
  for (int i = 0; i < 8; i++) g[i] = g[i] / (1.f + __expf(-g[i])) * u[i];
  ((uint4 *)out)[index] = make_uint4(pack<T>(g[0], g[1]), pack<T>(g[2], g[3]), pack<T>(g[4], g[5]), pack<T>(g[6], g[7]));
}

#define KERNELS(T)                                                                                                                   \
  extern "C" __global__ void embed_##T(const T *embedding, const int *tokens, float *x, int hidden) {                                \
    embed<T>(embedding, tokens, x, hidden);                                                                                          \
  }                                                                                                                                  \
  extern "C" __global__ void __launch_bounds__(256)                                                                                  \
      rms_norm_##T(const float *x, const int *chosen, const T *weight, T *out, int hidden, float eps) {                              \
    rms_norm<T>(x, chosen, weight, out, hidden, eps);                                                                                \
  }                                                                                                                                  \
  extern "C" __global__ void __launch_bounds__(256)                                                                                  \
      rope_cache_##T(const T *qkv, const T *bias, const T *q_norm, const T *k_norm, const float *cosine, const float *sine,          \
                     const int *positions, const int *slots, T *q, T *keys, T *values, int rows, int heads, int kv_heads, int dim,   \
                     float eps) {                                                                                                    \
    rope_cache<T>(qkv, bias, q_norm, k_norm, cosine, sine, positions, slots, q, keys, values, rows, heads, kv_heads, dim, eps);      \
  }                                                                                                                                  \
  extern "C" __global__ void swiglu_##T(const T *gate_up, T *out, int rows, int inner) { swiglu<T>(gate_up, out, rows, inner); }
FOR_BOTH_TYPES(KERNELS)
