// libcuda's virtual memory management over memfd, and the twin of kernels/paged_write.cu. It must not flatter, so as the real one:
//  - memory lives as long as any process has it mapped or open, a killed one's too, and counts against the GPU (PD_STANDIN_GPUS names the
//    machine whose processes share GPUs; without it each process has its own);
//  - a launch starts at a random later moment of its stream, reads the grant then, and takes its time; a write through a range that is not
//    mapped ends the process;
//  - unmapping waits for nothing;
//  - mapping more than there is fails.
#define _GNU_SOURCE
#include <dirent.h>
#include <fcntl.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#include "standin.h"

enum { SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, GRANULARITY = 2 << 20 };

// As <cuda.h> declares them: ffi/cuda-memory.ts writes them byte by byte.
typedef struct { int type, id; } location;
typedef struct {
  int type, requested_handle_types;
  location where;
  void *win32;
  struct { unsigned char compression, rdma; unsigned short usage; unsigned char reserved[4]; } flags;
} allocation_prop;
typedef struct { location where; int flags; } access_desc;
_Static_assert(sizeof(allocation_prop) == 32 && offsetof(allocation_prop, where) == 8, "CUmemAllocationProp");
_Static_assert(sizeof(access_desc) == 12 && offsetof(access_desc, flags) == 8, "CUmemAccessDesc");

static int name_of(char *out, size_t size, int device) {
  const char *machine = getenv("PD_STANDIN_GPUS");
  return snprintf(out, size, "pd-standin-gpu-%s-%d", machine ? machine : "own", physical_device(device));
}

// Bytes of every memory of this GPU that any process has mapped or open, each once. Slow, so only where processes share GPUs.
typedef struct { ino_t seen[4096]; int count; size_t bytes; } total;
static void add_once(total *t, ino_t inode, size_t bytes) {
  for (int i = 0; i < t->count; i++) if (t->seen[i] == inode) return;
  if (t->count < 4096) t->seen[t->count++] = inode;
  t->bytes += bytes;
}
static void add_process(total *t, const char *pid, const char *name) {
  char path[512], line[1024], target[512];
  snprintf(path, sizeof path, "/proc/%s/fd", pid);
  DIR *fds = opendir(path);
  for (struct dirent *e; fds && (e = readdir(fds));) {
    snprintf(path, sizeof path, "/proc/%s/fd/%s", pid, e->d_name);
    ssize_t n = readlink(path, target, sizeof target - 1);
    struct stat found;
    if (n < 0 || (target[n] = 0, strncmp(target, "/memfd:", 7) || strncmp(target + 7, name, strlen(name)))) continue;
    if (!stat(path, &found)) add_once(t, found.st_ino, found.st_size);
  }
  if (fds) closedir(fds);
  snprintf(path, sizeof path, "/proc/%s/maps", pid);
  FILE *maps = fopen(path, "r");
  while (maps && fgets(line, sizeof line, maps)) {
    unsigned long from, to, inode;
    char file[512] = "";
    if (sscanf(line, "%lx-%lx %*s %*s %*s %lu %511s", &from, &to, &inode, file) < 4) continue;
    // a mapping covers all of its memory: ours always do
    if (!strncmp(file, "/memfd:", 7) && !strncmp(file + 7, name, strlen(name))) add_once(t, inode, to - from);
  }
  if (maps) fclose(maps);
}
static size_t in_use_everywhere(int device) {
  if (!getenv("PD_STANDIN_GPUS")) return 0;
  char name[128];
  name_of(name, sizeof name, device);
  total *t = calloc(1, sizeof *t);
  DIR *proc = opendir("/proc");
  for (struct dirent *e; proc && (e = readdir(proc));) if (e->d_name[0] >= '0' && e->d_name[0] <= '9') add_process(t, e->d_name, name);
  if (proc) closedir(proc);
  size_t bytes = t->bytes;
  free(t);
  return bytes;
}

EXPORT int cuDeviceGetAttribute(int *value, int attribute, int device) {
  (void)device;
  CHECK("cuDeviceGetAttribute");
  *value = attribute == 103 && setting("PD_STANDIN_SHAREABLE", 1);
  return SUCCESS;
}
static bool fits(const allocation_prop *p) {
  return p->type == 1 && p->requested_handle_types == 1 && p->where.type == 1 && p->where.id >= 0 && p->where.id < device_count() && !p->win32;
}
EXPORT int cuMemGetAllocationGranularity(size_t *bytes, const allocation_prop *p, int option) {
  CHECK("cuMemGetAllocationGranularity");
  if (!fits(p) || option) return INVALID_VALUE;
  *bytes = GRANULARITY;
  return SUCCESS;
}
EXPORT int cuMemCreate(uint64_t *handle, size_t bytes, const allocation_prop *p, unsigned long long flags) {
  CHECK("cuMemCreate");
  if (!fits(p) || flags || !bytes || bytes % GRANULARITY) return INVALID_VALUE;
  if (in_use_everywhere(p->where.id) + bytes > (size_t)setting("PD_STANDIN_MEMORY_MB", 1024) << 20) return OUT_OF_MEMORY;
  char name[128];
  name_of(name, sizeof name, p->where.id);
  int fd = memfd_create(name, MFD_CLOEXEC);
  void *at = fd < 0 || ftruncate(fd, bytes) ? MAP_FAILED : mmap(NULL, bytes, PROT_WRITE, MAP_SHARED, fd, 0);
  if (at == MAP_FAILED) return OUT_OF_MEMORY;
  memset(at, 0xA5, bytes);  // never zeros: those hide what was not written
  munmap(at, bytes);
  *handle = (uint64_t)fd + 1;
  return SUCCESS;
}
EXPORT int cuMemRelease(uint64_t handle) { CHECK("cuMemRelease"); return close((int)handle - 1) ? INVALID_VALUE : SUCCESS; }
EXPORT int cuMemExportToShareableHandle(int *out, uint64_t handle, int type, unsigned long long flags) {
  CHECK("cuMemExportToShareableHandle");
  if (type != 1 || flags) return INVALID_VALUE;
  *out = dup((int)handle - 1);  // as the real one's, open in children
  return *out < 0 ? INVALID_VALUE : SUCCESS;
}
EXPORT int cuMemImportFromShareableHandle(uint64_t *handle, void *given, int type) {
  CHECK("cuMemImportFromShareableHandle");
  char path[64], target[256];
  snprintf(path, sizeof path, "/proc/self/fd/%d", (int)(intptr_t)given);
  ssize_t n = readlink(path, target, sizeof target - 1);
  if (type != 1 || n < 0) return INVALID_VALUE;
  target[n] = 0;
  if (strncmp(target, "/memfd:pd-standin-gpu-", 22)) return INVALID_VALUE;
  int fd = fcntl((int)(intptr_t)given, F_DUPFD_CLOEXEC, 0);
  *handle = (uint64_t)fd + 1;
  return SUCCESS;
}
EXPORT int cuMemAddressReserve(void **out, size_t bytes, size_t alignment, uint64_t address, unsigned long long flags) {
  CHECK("cuMemAddressReserve");
  if (!bytes || bytes % GRANULARITY || alignment || address || flags) return INVALID_VALUE;
  *out = mmap(NULL, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return *out == MAP_FAILED ? OUT_OF_MEMORY : SUCCESS;
}
EXPORT int cuMemAddressFree(void *at, size_t bytes) { CHECK("cuMemAddressFree"); return munmap(at, bytes) ? INVALID_VALUE : SUCCESS; }
EXPORT int cuMemMap(void *at, size_t bytes, size_t offset, uint64_t handle, unsigned long long flags) {
  CHECK("cuMemMap");
  struct stat found;
  if (offset || flags || fstat((int)handle - 1, &found) || bytes > (size_t)found.st_size) return INVALID_VALUE;
  return mmap(at, bytes, PROT_NONE, MAP_SHARED | MAP_FIXED, (int)handle - 1, 0) == MAP_FAILED ? INVALID_VALUE : SUCCESS;
}
EXPORT int cuMemSetAccess(void *at, size_t bytes, const access_desc *access, size_t count) {
  CHECK("cuMemSetAccess");
  if (count != 1 || access->where.type != 1 || access->flags != 3 || mprotect(at, bytes, PROT_READ | PROT_WRITE)) return INVALID_VALUE;
  memory_add(at, bytes, access->where.id);
  return SUCCESS;
}
EXPORT int cuMemUnmap(void *at, size_t bytes) {
  CHECK("cuMemUnmap");
  if (!memory_remove(at)) return INVALID_VALUE;
  return mmap(at, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0) == MAP_FAILED ? INVALID_VALUE : SUCCESS;
}

// ---- libcudart, for the page
EXPORT int cudaHostRegister(void *at, size_t bytes, unsigned flags) {
  CHECK("cudaHostRegister");
  if (flags != 3 || memory_known(at, bytes)) return INVALID_VALUE;
  memory_add(at, bytes, -1);
  return SUCCESS;
}
EXPORT int cudaHostGetDevicePointer(void **out, void *at, unsigned flags) {
  CHECK("cudaHostGetDevicePointer");
  if (flags || !memory_known(at, 1)) return INVALID_VALUE;
  *out = at;
  return SUCCESS;
}

// ---- kernels/paged_write.cu: the same bytes
typedef struct {
  uint64_t source_block, source_run, target_block, target_run, run_bytes;
  const int32_t *source_ids, *target_ids;
  volatile uint64_t *grant;
  uint64_t seq;
  volatile uint64_t *marks;
  uint64_t flag;
  uint32_t *counter;
  uint32_t layers, blocks, runs, units, source_limit, target_limit;
  uint64_t table[256];
} paged_write;
_Static_assert(sizeof(paged_write) == 2168 && offsetof(paged_write, layers) == 96 && offsetof(paged_write, table) == 120,
               "src/device/cuda/paged-write.ts writes this block");

typedef struct { int device; unsigned element; paged_write p; } write_call;

static uint64_t now_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_REALTIME, &t);
  return (uint64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}
static void must_be_mapped(const volatile void *at, size_t bytes) {
  if (memory_known((const void *)at, bytes)) return;
  fprintf(stderr, "stand-in: a write through a range that is not mapped\n");
  abort();
}

static void run_write(void *arg) {
  static __thread unsigned seed;
  write_call *c = arg;
  const paged_write *p = &c->p;
  if (!seed) seed = (unsigned)now_ns() ^ (unsigned)getpid();
  int most = setting("PD_STANDIN_WRITE_US", 3000);
  if (most) sleep_us(rand_r(&seed) % most);
  int code = fault("kernel");
  uint64_t unit = 256ull * c->element;
  bool known = memory_known(p->source_ids, 4 * p->blocks) && memory_known(p->target_ids, 4 * p->blocks) && memory_known(p->counter, 16);
  if (!code && (!known || p->units != (p->run_bytes + unit - 1) / unit || p->layers > 128)) code = 700;
  if (!code && p->run_bytes % c->element) code = 716;
  if (code) { device_fail(c->device, code); free(c); return; }
  if (p->counter[0] || p->counter[1] || p->counter[2] || p->counter[3]) { fprintf(stderr, "stand-in: a counter of writes that is not 0\n"); abort(); }
  must_be_mapped(p->grant, 8);
  must_be_mapped(p->marks, 32);
  uint64_t began = now_ns();
  if (*p->grant != p->seq) { free(c); return; }
  p->marks[1] = began;
  uint32_t outside = 0;
  for (uint32_t layer = 0; layer < p->layers; layer++) {
    for (uint32_t block = 0; block < p->blocks; block++) {
      uint32_t from = p->source_ids[block], to = p->target_ids[block];
      if (from >= p->source_limit || to >= p->target_limit) { outside++; continue; }
      for (uint32_t run = 0; run < p->runs; run++) {
        const char *source = (const char *)p->table[2 * layer] + from * p->source_block + run * p->source_run;
        char *target = (char *)p->table[2 * layer + 1] + to * p->target_block + run * p->target_run;
        if (!memory_known(source, p->run_bytes)) { device_fail(c->device, 700); free(c); return; }
        if ((uintptr_t)source % c->element || (uintptr_t)target % c->element) { device_fail(c->device, 716); free(c); return; }
        must_be_mapped(target, p->run_bytes);
        memcpy(target, source, p->run_bytes);
      }
      if (most && rand_r(&seed) % 64 == 0) sleep_us(rand_r(&seed) % 100);
    }
  }
  __sync_synchronize();
  if (outside) p->marks[3] = outside;
  else if (p->flag) {
    p->marks[2] = now_ns();
    __sync_synchronize();
    p->marks[0] = p->flag;
  }
  free(c);
}

unsigned write_element(const char *name) { return !strcmp(name, "write_16") ? 16 : !strcmp(name, "write_1") ? 1 : 0; }
int write_launch(unsigned element, unsigned blocks, unsigned threads, stream *s, void **params) {
  if (!blocks || threads != 512) return INVALID_VALUE;
  write_call *c = malloc(sizeof *c);
  c->device = stream_device(s);
  c->element = element;
  memcpy(&c->p, params[0], sizeof c->p);
  stream_push(s, run_write, c);
  return SUCCESS;
}
