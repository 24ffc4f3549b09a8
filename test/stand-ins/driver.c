// libcuda: modules and launches; the kernels are C twins of kernels/*.cu. Loading a module waits while an NCCL operation runs on the
// device, as the real one does. Addresses outside of live allocations and misaligned vectors fail the device for good.
#include <stdlib.h>
#include <string.h>
#include <stdio.h>
#include "standin.h"

enum { SUCCESS = 0, INVALID_VALUE = 1, NO_DEVICE = 100, NO_BINARY = 209, NOT_FOUND = 500 };

// The same bytes as PagedCopy in kernels/gather_scatter.cu.
typedef struct {
  uint64_t cache_block, cache_run, flat_block, flat_run, run_bytes;
  uint32_t layers, blocks, runs, tiles;
  uint64_t table[482];
} paged_copy;
_Static_assert(sizeof(paged_copy) == 3912, "src/device/cuda/paged-copy.ts writes 3912 bytes");

typedef struct { int device; void (*twin)(int, const paged_copy *); paged_copy params; } launch;

static void move(int device, const paged_copy *p, unsigned element, bool gather) {
  uint64_t tile = 1024ull * element;
  const int32_t *ids = (const int32_t *)(p->table + 2 * p->layers);
  if (p->tiles != (p->run_bytes + tile - 1) / tile) return device_fail(device, 700);
  if (16 * p->layers + 4 * p->blocks > sizeof p->table) return device_fail(device, 700);
  for (uint32_t layer = 0; layer < p->layers; layer++) {
    for (uint32_t block = 0; block < p->blocks; block++) {
      for (uint32_t run = 0; run < p->runs; run++) {
        unsigned char *cache = (unsigned char *)p->table[2 * layer] + ids[block] * p->cache_block + run * p->cache_run;
        unsigned char *flat = (unsigned char *)p->table[2 * layer + 1] + block * p->flat_block + run * p->flat_run;
        if ((uintptr_t)cache % element || (uintptr_t)flat % element || p->run_bytes % element) return device_fail(device, 716);
        if (!memory_known(cache, p->run_bytes) || !memory_known(flat, p->run_bytes)) return device_fail(device, 700);
        if (gather) memcpy(flat, cache, p->run_bytes); else memcpy(cache, flat, p->run_bytes);
      }
    }
  }
}
static void gather_16(int device, const paged_copy *p) { move(device, p, 16, true); }
static void gather_1(int device, const paged_copy *p) { move(device, p, 1, true); }
static void scatter_16(int device, const paged_copy *p) { move(device, p, 16, false); }
static void scatter_1(int device, const paged_copy *p) { move(device, p, 1, false); }

// `of_model`: a kernel of model.c, `of_write`: one of vmm.c, and nothing else is set.
typedef struct { const char *name; void (*twin)(int, const paged_copy *); void *of_model; unsigned of_write; } kernel;
static const kernel kernels[] = {
    {"gather_16", gather_16, NULL, 0}, {"gather_1", gather_1, NULL, 0}, {"scatter_16", scatter_16, NULL, 0}, {"scatter_1", scatter_1, NULL, 0}};

static void run_launch(void *arg) {
  launch *l = arg;
  sleep_us(setting("PD_STANDIN_KERNEL_US", 0));
  int code = fault("kernel");
  if (code) device_fail(l->device, code); else l->twin(l->device, &l->params);
  free(l);
}

EXPORT int cuInit(unsigned flags) { (void)flags; CHECK("cuInit"); return device_count() ? SUCCESS : NO_DEVICE; }
EXPORT int cuDeviceGetCount(int *count) { CHECK("cuDeviceGetCount"); *count = device_count(); return SUCCESS; }
EXPORT int cuDriverGetVersion(int *version) { CHECK("cuDriverGetVersion"); *version = setting("PD_STANDIN_DRIVER", 13000); return SUCCESS; }
EXPORT int cuDeviceGet(int *device, int ordinal) { CHECK("cuDeviceGet"); *device = ordinal; return SUCCESS; }
EXPORT int cuDeviceGetName(char *name, int length, int device) {
  CHECK("cuDeviceGetName");
  snprintf(name, length, "Stand-in GPU %d", physical_device(device));
  return SUCCESS;
}
EXPORT int cuModuleLoadData(void **module, const void *image) {
  CHECK("cuModuleLoadData");
  // machine code, PTX, or what the stand-in of NVRTC makes
  bool cubin = !memcmp(image, "\177ELF", 4), own = !memcmp(image, "PDSTANDIN", 9);
  if (cubin && fault("cubin")) return fault("cubin");
  if (!cubin && !own && (fault("ptx") || !strstr(image, ".version"))) return NO_BINARY;
  device_wait_nccl(current_device);
  *module = malloc(1);
  return SUCCESS;
}
EXPORT int cuModuleUnload(void *module) {
  CHECK("cuModuleUnload");
  device_wait_nccl(current_device);
  free(module);
  return SUCCESS;
}
EXPORT int cuModuleGetFunction(const kernel **out, void *module, const char *name) {
  (void)module;
  CHECK("cuModuleGetFunction");
  for (size_t i = 0; i < sizeof kernels / sizeof *kernels; i++) {
    if (strcmp(kernels[i].name, name)) continue;
    *out = &kernels[i];
    return SUCCESS;
  }
  unsigned of_write = write_element(name);
  void *of_model = of_write ? NULL : model_function(name);
  if (!of_model && !of_write) return NOT_FOUND;
  kernel *k = calloc(1, sizeof *k);
  k->of_model = of_model;
  k->of_write = of_write;
  *out = k;
  return SUCCESS;
}
EXPORT int cuLaunchKernel(const kernel *k, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                          unsigned shared, stream *s, void **params, void **extra) {
  (void)shared;
  CHECK("cuLaunchKernel");
  if (!gx || gy != 1 || gz != 1 || by != 1 || bz != 1 || extra) return INVALID_VALUE;
  if (k->of_model) return model_launch(k->of_model, gx, bx, s, params);
  if (k->of_write) return write_launch(k->of_write, gx, bx, s, params);
  if (bx != 256) return INVALID_VALUE;
  launch *l = malloc(sizeof *l);
  l->device = stream_device(s);
  l->twin = k->twin;
  memcpy(&l->params, params[0], sizeof l->params);
  stream_push(s, run_launch, l);
  return SUCCESS;
}
EXPORT const char *cudaGetErrorName(int code);
EXPORT const char *cudaGetErrorString(int code);
EXPORT int cuGetErrorName(int code, const char **text) { *text = cudaGetErrorName(code); return SUCCESS; }
EXPORT int cuGetErrorString(int code, const char **text) { *text = cudaGetErrorString(code); return SUCCESS; }

// ---- libnvrtc: no compiler, only its manners. `#error` in the source fails.
typedef struct { char *source; } program;
EXPORT int nvrtcVersion(int *major, int *minor) { CHECK("nvrtcVersion"); *major = 13; *minor = 0; return SUCCESS; }
EXPORT int nvrtcCreateProgram(program **out, const char *source, const char *name, int headers, void *bodies, void *names_) {
  (void)name; (void)headers; (void)bodies; (void)names_;
  CHECK("nvrtcCreateProgram");
  *out = malloc(sizeof **out);
  (*out)->source = strdup(source);
  return SUCCESS;
}
EXPORT int nvrtcCompileProgram(program *p, int count, const char **options) {
  CHECK("nvrtcCompileProgram");
  if (count < 1 || strncmp(options[0], "--gpu-architecture=sm_", 22)) return 5;
  return strstr(p->source, "#error") ? 6 : SUCCESS;
}
EXPORT int nvrtcGetCUBINSize(program *p, size_t *size) { (void)p; *size = 10; return SUCCESS; }
EXPORT int nvrtcGetCUBIN(program *p, char *cubin) { (void)p; memcpy(cubin, "PDSTANDIN", 10); return SUCCESS; }
EXPORT int nvrtcGetProgramLogSize(program *p, size_t *size) { (void)p; *size = 32; return SUCCESS; }
EXPORT int nvrtcGetProgramLog(program *p, char *log) { (void)p; snprintf(log, 32, "error: #error"); return SUCCESS; }
EXPORT int nvrtcDestroyProgram(program **p) { free((*p)->source); free(*p); *p = NULL; return SUCCESS; }
EXPORT const char *nvrtcGetErrorString(int code) { return code == 6 ? "NVRTC_ERROR_COMPILATION" : "NVRTC_ERROR"; }
