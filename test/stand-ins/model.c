// C twins of kernels/model/*.cu: short, in float32 and in plain order, so they agree with the kernels as far as rounding goes. A launch
// with a pointer that is no live memory, or a grid that does not fit its arguments, fails the device.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "standin.h"

enum { STORE, ADD, LOGITS, SWIGLU };
typedef struct call call;
// One launch. Arguments are 8 bytes each, as a launch lays them out: p pointer, ? pointer or null, i int, f float.
struct call {
  void (*twin)(call *);
  const char *signature;
  int device, half, variant[3];  // half: float16 rather than bfloat16; numbers at the end of the name, mode
  unsigned blocks, threads;
  uint64_t args[24];
};
#define P(n, type) ((type *)(uintptr_t)c->args[n])
#define I(n) ((int32_t)c->args[n])
static float as_float(const call *c, int n) { float f; memcpy(&f, &c->args[n], 4); return f; }
#define F(n) as_float(c, n)

static float load(const call *c, const uint16_t *at) {
  uint32_t bits = (uint32_t)*at << 16;
  float f;
  if (c->half) { _Float16 h; memcpy(&h, at, 2); return h; }
  memcpy(&f, &bits, 4);
  return f;
}
static void store(const call *c, uint16_t *at, float f) {
  uint32_t bits;
  if (c->half) { _Float16 h = f; memcpy(at, &h, 2); return; }
  memcpy(&bits, &f, 4);
  *at = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
static void expect(call *c, bool fits) { if (!fits) { fprintf(stderr, "stand-in: a launch does not fit its arguments\n"); device_fail(c->device, 9); } }

static void embed(call *c) {
  int hidden = I(3);
  for (unsigned r = 0; r < c->blocks; r++)
    for (int i = 0; i < hidden; i++) P(2, float)[(size_t)r * hidden + i] = load(c, P(0, uint16_t) + (size_t)P(1, int)[r] * hidden + i);
}
static void rms_norm(call *c) {
  int hidden = I(4);
  for (unsigned r = 0; r < c->blocks; r++) {
    const float *x = P(0, float) + (size_t)(P(1, int) ? P(1, int)[r] : (int)r) * hidden;
    float squares = 0;
    for (int i = 0; i < hidden; i++) squares += x[i] * x[i];
    float scale = 1 / sqrtf(squares / hidden + F(5));
    for (int i = 0; i < hidden; i++) store(c, P(3, uint16_t) + (size_t)r * hidden + i, x[i] * scale * load(c, P(2, uint16_t) + i));
  }
}
static void rope_cache(call *c) {
  int rows = I(11), heads = I(12), kv = I(13), dim = I(14), all = heads + 2 * kv, half = dim / 2;
  expect(c, c->blocks == (unsigned)(rows * all + 7) / 8);
  for (int index = 0; index < rows * all; index++) {
    int row = index / all, head = index % all, slot = P(7, int)[row];
    bool query = head < heads, value = head >= heads + kv;
    if (!query && slot < 0) continue;
    float v[512], squares = 0;
    for (int i = 0; i < dim; i++) {
      v[i] = load(c, P(0, uint16_t) + (size_t)index * dim + i) + (P(1, uint16_t) ? load(c, P(1, uint16_t) + head * dim + i) : 0);
      squares += v[i] * v[i];
    }
    const uint16_t *norm = value ? NULL : query ? P(2, uint16_t) : P(3, uint16_t);
    for (int i = 0; norm && i < dim; i++) v[i] *= load(c, norm + i) / sqrtf(squares / dim + F(15));
    uint16_t *to = query ? P(8, uint16_t) + ((size_t)row * heads + head) * dim
                         : (value ? P(10, uint16_t) : P(9, uint16_t)) + ((size_t)slot * kv + (head - heads) % kv) * dim;
    for (int i = 0; i < half; i++) {
      size_t at = (size_t)P(6, int)[row] * half + i;
      float cosine = value ? 1 : P(4, float)[at], sine = value ? 0 : P(5, float)[at];
      store(c, to + i, v[i] * cosine - v[i + half] * sine);
      store(c, to + i + half, v[i + half] * cosine + v[i] * sine);
    }
  }
}
static void swiglu(call *c) {
  int rows = I(2), inner = I(3);
  expect(c, (uint64_t)c->blocks * c->threads * 8 >= (uint64_t)rows * inner);
  for (int r = 0; r < rows; r++)
    for (int i = 0; i < inner; i++) {
      float g = load(c, P(0, uint16_t) + (size_t)r * 2 * inner + i), u = load(c, P(0, uint16_t) + ((size_t)r * 2 + 1) * inner + i);
      store(c, P(1, uint16_t) + (size_t)r * inner + i, g / (1 + expf(-g)) * u);
    }
}
static void argmax(call *c) {
  int vocab = I(2);
  for (unsigned r = 0; r < c->blocks; r++) {
    const float *row = P(0, float) + (size_t)r * vocab;
    int best = 0;
    bool nan = false;
    for (int i = 0; i < vocab; i++) { nan |= isnan(row[i]); if (row[i] > row[best]) best = i; }
    P(1, int)[r] = nan || !isfinite(row[best]) ? -1 : best;
  }
}
// Plainly: the least weight that stays is found by trying each token's.
static void draw(call *c) {
  int vocab = I(3);
  for (unsigned r = 0; r < c->blocks; r++) {
    const struct { float inverse; int top_k; float top_p, uniform, min_p; } *d = (void *)(P(2, float) + 5 * r);
    const float *row = P(0, float) + (size_t)r * vocab;
    int *token = P(1, int) + r;
    if (d->inverse == 0 || *token < 0) continue;
    float *w = malloc(vocab * sizeof(float)), least = d->min_p, mass = 0;
    for (int i = 0; i < vocab; i++) w[i] = expf((row[i] - row[*token]) * d->inverse);
    for (int cut = 0; cut < 2; cut++) {
      float kept = 0, best = least;
      for (int i = 0; i < vocab; i++) kept += w[i] >= least ? w[i] : 0;
      for (int t = 0; t < vocab; t++) {
        int count = 0;
        float sum = 0;
        for (int i = 0; i < vocab; i++) if (w[i] >= w[t]) { count++; sum += w[i]; }
        if (w[t] > best && (cut == 0 ? d->top_k > 0 && count >= d->top_k : d->top_p < 1 && sum >= d->top_p * kept)) best = w[t];
      }
      least = best;
    }
    for (int i = 0; i < vocab; i++) mass += w[i] >= least ? w[i] : 0;
    float passed = 0;
    for (int i = 0; i < vocab && passed <= d->uniform * mass; i++) if (w[i] >= least && w[i] > 0) { passed += w[i]; *token = i; }
    free(w);
  }
}
static void shape(call *c) {
  int vocab = I(5);
  const int *data = P(3, int);
  for (unsigned r = 0; r < c->blocks; r++) {
    const struct {
      int row, mask, edits, edit_count, slot, fresh, tokens, prompt_count, output_count;
      float repetition, frequency, presence;
    } *s = (void *)(P(2, int) + 12 * r);
    float *out = P(1, float) + (size_t)r * vocab, *bias = calloc(vocab, sizeof(float));
    uint32_t *own = s->slot < 0 ? NULL : P(4, uint32_t) + (size_t)s->slot * vocab;
    expect(c, !own || memory_known(own, vocab * 4));
    if (own && s->fresh) memset(own, 0, vocab * 4);
    for (int i = 0; own && i < s->prompt_count + s->output_count; i++) {
      uint32_t *count = own + data[s->tokens + i];
      *count = i < s->prompt_count ? *count | 1u << 31 : *count + 1;
    }
    for (int e = 0; e < s->edit_count; e++) memcpy(bias + data[s->edits + 2 * e], data + s->edits + 2 * e + 1, 4);
    for (int i = 0; i < vocab; i++) {
      float v = P(0, float)[(size_t)s->row * vocab + i];
      if (s->mask >= 0 && !((uint32_t)data[s->mask + i / 32] >> (i % 32) & 1)) v = -INFINITY;
      v += bias[i];
      if (own && own[i]) {
        v = v > 0 ? v / s->repetition : v * s->repetition;
        uint32_t times = own[i] & ~(1u << 31);
        if (times) v = fmaf(-s->frequency, times, v) - s->presence;
      }
      out[i] = v;
    }
    free(bias);
  }
}
static void report(call *c) {
  int vocab = I(4);
  for (unsigned r = 0; r < c->blocks; r++) {
    const struct { int row, token, count; } *w = (void *)(P(2, int) + 3 * r);
    struct { float logprob; int rank, ids[20]; float logprobs[20]; } *out = (void *)(P(3, int) + 42 * r);
    const float *row = P(0, float) + (size_t)w->row * vocab;
    int token = P(1, int)[w->token], last = -1;
    float top = -INFINITY, total = 0, own = token < 0 ? NAN : row[token];
    expect(c, w->count <= 20 && token < vocab);
    for (int i = 0; i < vocab; i++) top = fmaxf(top, row[i]);
    for (int i = 0; i < vocab; i++) total += expf(row[i] - top);
    out->logprob = own - top - logf(total);
    out->rank = 0;
    for (int i = 0; i < vocab; i++) out->rank += row[i] >= own;
    for (int n = 0; n < w->count; n++) {
      int best = 0x7fffffff;
      for (int i = 0; i < vocab; i++) {
        bool comes = last < 0 || row[i] < row[last] || (row[i] == row[last] && i > last);
        if (comes && row[i] > -INFINITY && (best > vocab || row[i] > row[best])) best = i;
      }
      out->ids[n] = best;
      if (best > vocab) continue;
      out->logprobs[n] = row[best] - top - logf(total);
      last = best;
    }
  }
}
static size_t slot_of(const int *table, int t, int block_size) { return (size_t)table[t / block_size] * block_size + t % block_size; }
// Over tokens [begin, end): the highest score, the sum of exp2(score - highest), and those times the values.
static void attend(call *c, const uint16_t *q, const int *table, int begin, int end, int kv_head, int kv, int dim, int block_size,
                   float scale, float *top, float *total, float *out) {
  float scores[end - begin];
  *top = -INFINITY;
  for (int t = begin; t < end; t++) {
    const uint16_t *k = P(1, uint16_t) + (slot_of(table, t, block_size) * kv + kv_head) * dim;
    float sum = 0;
    for (int i = 0; i < dim; i++) sum += load(c, q + i) * load(c, k + i);
    scores[t - begin] = sum * scale;
    *top = fmaxf(*top, sum * scale);
  }
  *total = 0;
  for (int i = 0; i < dim; i++) out[i] = 0;
  for (int t = begin; t < end; t++) {
    const uint16_t *v = P(2, uint16_t) + (slot_of(table, t, block_size) * kv + kv_head) * dim;
    float p = exp2f(scores[t - begin] - *top);
    *total += p;
    for (int i = 0; i < dim; i++) out[i] += p * load(c, v + i);
  }
}
static void attention_prefill(call *c) {
  int heads = I(6), kv = I(7), dim = c->variant[0];
  expect(c, c->blocks % heads == 0 && c->threads == 256);
  for (unsigned n = 0; n < c->blocks / heads; n++) {
    const int *item = P(4, int) + 4 * n;
    expect(c, item[1] <= 128 && item[0] >= 0 && item[2] >= 0);
    for (int r = 0; r < item[1]; r++)
      for (int h = 0; h < heads; h++) {
        size_t at = ((size_t)(item[0] + r) * heads + h) * dim;
        float top, total, sums[512];
        attend(c, P(0, uint16_t) + at, P(5, int) + item[3], 0, item[2] + r + 1, h / (heads / kv), kv, dim, I(8), F(10), &top, &total, sums);
        for (int i = 0; i < dim; i++) store(c, P(3, uint16_t) + at + i, sums[i] / total);
      }
  }
}
static int split_length(int context, int splits) { return ((context + splits - 1) / splits + 63) / 64 * 64; }
static void attention_decode(call *c) {
  int heads = I(9), kv = I(10), splits = I(13), dim = c->variant[0], together = c->variant[1], group = heads / kv;
  int per = kv * ((group + together - 1) / together) * splits;
  expect(c, c->blocks % per == 0 && c->threads == 128);
  for (unsigned s = 0; s < c->blocks / per; s++) {
    int context = P(4, int)[s], length = split_length(context, splits);
    for (int h = 0; h < heads; h++)
      for (int i = 0; i < splits && i * length < context; i++) {
        size_t at = ((size_t)s * heads + h) * splits + i;
        int end = (i + 1) * length < context ? (i + 1) * length : context;
        attend(c, P(0, uint16_t) + ((size_t)P(3, int)[s] * heads + h) * dim, P(6, int) + P(5, int)[s], i * length, end, h / group, kv, dim,
               I(11), F(14), P(8, float) + 2 * at, P(8, float) + 2 * at + 1, P(7, float) + at * dim);
      }
  }
}
static void attention_combine(call *c) {
  int heads = I(5), dim = I(6), splits = I(7);
  expect(c, c->threads == (unsigned)dim);
  for (unsigned b = 0; b < c->blocks; b++) {
    int context = P(3, int)[b / heads], length = split_length(context, splits), used = context ? (context + length - 1) / length : 0;
    const float *marks = P(1, float) + (size_t)b * splits * 2, *partial = P(0, float) + (size_t)b * splits * dim;
    float top = -INFINITY, total = 0, sums[512] = {0};
    for (int i = 0; i < used; i++) top = fmaxf(top, marks[2 * i]);
    for (int i = 0; i < used; i++) {
      float share = exp2f(marks[2 * i] - top);
      total += share * marks[2 * i + 1];
      for (int d = 0; d < dim; d++) sums[d] += share * partial[i * dim + d];
    }
    for (int d = 0; d < dim; d++)
      store(c, P(4, uint16_t) + ((size_t)P(2, int)[b / heads] * heads + b % heads) * dim + d, used ? sums[d] / total : 0);
  }
}
static void product(call *c, int mode, int rows, int inputs, int outputs) {
  const uint16_t *x = P(0, uint16_t), *w = P(1, uint16_t);
  for (int r = 0; r < rows; r++)
    for (int o = 0; o < outputs; o++) {
      float sum[2] = {0};
      for (int k = 0; k < (mode == SWIGLU ? 2 : 1); k++)
        for (int i = 0; i < inputs; i++) sum[k] += load(c, x + (size_t)r * inputs + i) * load(c, w + (size_t)(o + k * outputs) * inputs + i);
      size_t at = (size_t)r * outputs + o;
      if (mode == ADD) P(2, float)[at] += sum[0];
      else if (mode == LOGITS) P(2, float)[at] = sum[0];
      else store(c, P(2, uint16_t) + at, mode == SWIGLU ? sum[0] / (1 + expf(-sum[0])) * sum[1] : sum[0]);
    }
}
static void gemv(call *c) {
  int mode = c->variant[2], warps = mode == SWIGLU ? I(4) : (I(4) + 1) / 2;
  expect(c, c->blocks == (unsigned)(warps + 7) / 8 && c->threads == 256);
  product(c, mode, c->variant[0], I(3), I(4));
}
static void gemm(call *c) { product(c, c->variant[2], I(3), I(4), I(5)); }

static const struct { const char *name, *signature; void (*twin)(call *); } twins[] = {
    {"embed_", "pppi", embed},
    {"rms_norm_", "p?ppif", rms_norm},
    {"rope_cache_", "p???pppppppiiiif", rope_cache},
    {"swiglu_", "ppii", swiglu},
    {"argmax", "ppi", argmax},
    {"draw", "pppi", draw},
    {"shape", "pppppi", shape},
    {"report", "ppppi", report},
    {"attention_prefill_", "ppppppiiiif", attention_prefill},
    {"attention_decode_", "pppppppppiiiiif", attention_decode},
    {"attention_combine_", "pppppiii", attention_combine},
    {"gemv_", "pppii", gemv},
    {"gemm_", "pppiii", gemm},
};

static int mode_of(const char *name) {
  return strstr(name, "_add_") ? ADD : strstr(name, "_logits_") ? LOGITS : strstr(name, "_swiglu_") ? SWIGLU : STORE;
}

void *model_function(const char *name) {
  for (size_t i = 0; i < sizeof twins / sizeof *twins; i++) {
    if (strncmp(twins[i].name, name, strlen(twins[i].name))) continue;
    call *c = calloc(1, sizeof *c);
    c->twin = twins[i].twin;
    c->signature = twins[i].signature;
    c->half = strstr(name, "_f16") != NULL;
    c->variant[2] = mode_of(name);
    // the numbers after the type: head size and group, or rows
    const char *type = strstr(name, c->half ? "_f16" : "_bf16"), *at = type ? type + (c->half ? 4 : 5) : "";
    for (int n = 0; n < 2 && (at = strpbrk(at, "0123456789"));) c->variant[n++] = strtol(at, (char **)&at, 10);
    return c;
  }
  return NULL;
}

static void run_call(void *arg) {
  call *c = arg;
  int code = fault("kernel");
  for (int i = 0; !code && c->signature[i]; i++) {
    char kind = c->signature[i];
    if ((kind == 'p' || (kind == '?' && c->args[i])) && !memory_known(P(i, void), 1)) code = 700;
  }
  if (code) device_fail(c->device, code); else c->twin(c);
}

int model_launch(const void *function, unsigned blocks, unsigned threads, stream *s, void **params) {
  call c = *(const call *)function;
  c.device = stream_device(s);
  c.blocks = blocks;
  c.threads = threads;
  for (int i = 0; c.signature[i]; i++) memcpy(&c.args[i], params[i], c.signature[i] == 'p' || c.signature[i] == '?' ? 8 : 4);
  stream_record(s, run_call, &c, sizeof c);
  return 0;
}
EXPORT int cuFuncSetAttribute(void *function, int attribute, int value) {
  (void)function;
  CHECK("cuFuncSetAttribute");
  // what every GPU since sm_86 has
  return attribute == 8 && value <= 99 << 10 ? 0 : 1;
}

// ---- libcublas: the one product, of a stream and with a workspace
typedef struct { stream *s; void *workspace; } handle;
EXPORT int cublasCreate_v2(handle **out) { CHECK("cublasCreate"); *out = calloc(1, sizeof **out); return 0; }
EXPORT int cublasGetProperty(int property, int *value) { CHECK("cublasGetProperty"); *value = property ? 0 : 13; return 0; }
EXPORT int cublasDestroy_v2(handle *h) { CHECK("cublasDestroy"); free(h); return 0; }
// as in the real one, this takes the workspace back
EXPORT int cublasSetStream_v2(handle *h, stream *s) { CHECK("cublasSetStream"); *h = (handle){s, NULL}; return 0; }
EXPORT int cublasSetWorkspace_v2(handle *h, void *at, size_t bytes) {
  CHECK("cublasSetWorkspace");
  if (!memory_known(at, bytes)) return 7;
  h->workspace = at;
  return 0;
}
EXPORT int cublasSetMathMode(handle *h, int mode) { (void)h; return mode == 16 ? 0 : 7; }
static void run_product(call *c) { product(c, c->variant[2], I(3), I(4), I(5)); }
EXPORT int cublasGemmEx(handle *h, int ta, int tb, int m, int n, int k, const float *alpha, void *a, int a_type, int lda, void *b,
                        int b_type, int ldb, const float *beta, void *out, int c_type, int ldc, int compute, int algorithm) {
  CHECK("cublasGemmEx");
  bool fits = ta == 1 && tb == 0 && lda == k && ldb == k && ldc == m && a_type == b_type && (a_type == 2 || a_type == 14) &&
              (c_type == 0 || c_type == a_type) && *alpha == 1 && compute == 68 && algorithm == -1 && h->workspace;
  if (!fits) return 7;
  call c = {.twin = run_product, .signature = "pppiii", .device = stream_device(h->s), .half = a_type == 2};
  c.variant[2] = c_type ? STORE : *beta == 1 ? ADD : LOGITS;
  if (c_type && *beta) return 7;
  uint64_t args[] = {(uintptr_t)b, (uintptr_t)a, (uintptr_t)out, n, k, m};
  memcpy(c.args, args, sizeof args);
  stream_record(h->s, run_call, &c, sizeof c);
  return 0;
}
EXPORT const char *cublasGetStatusString(int code) { return code == 7 ? "CUBLAS_STATUS_INVALID_VALUE" : "CUBLAS_STATUS"; }
