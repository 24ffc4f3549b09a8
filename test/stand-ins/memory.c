// libcudart: memory and copies. cudaFree and cudaFreeHost wait for the whole device, as the real ones do while a receive waits for its
// sender. All memory starts poisoned.
#include <stdlib.h>
#include <string.h>
#include "standin.h"

enum { SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2 };

typedef struct block { char *at; size_t bytes; int device; /* -1: page-locked */ struct block *next; } block;
static block *blocks;
static size_t used[MAX_DEVICES];
static size_t capacity(void) { return (size_t)setting("PD_STANDIN_MEMORY_MB", 1024) << 20; }

static int take(void **out, size_t bytes, int device) {
  char *at = NULL;
  if (posix_memalign((void **)&at, 4096, bytes ? bytes : 1)) return OUT_OF_MEMORY;
  memset(at, 0xA5, bytes);  // never zeros: those hide what was not written
  block *b = malloc(sizeof *b);
  pthread_mutex_lock(&big);
  *b = (block){at, bytes, device, blocks};
  blocks = b;
  pthread_mutex_unlock(&big);
  *out = at;
  return SUCCESS;
}

static int give(void *at, bool device_memory) {
  pthread_mutex_lock(&big);
  for (block **b = &blocks; *b; b = &(*b)->next) {
    if ((*b)->at != at || ((*b)->device >= 0) != device_memory) continue;
    block *found = *b;
    *b = found->next;
    if (found->device >= 0) used[found->device] -= found->bytes;
    pthread_mutex_unlock(&big);
    free(found->at);
    free(found);
    return SUCCESS;
  }
  pthread_mutex_unlock(&big);
  return INVALID_VALUE;
}

void memory_add(void *at, size_t bytes, int device) {
  block *b = malloc(sizeof *b);
  pthread_mutex_lock(&big);
  *b = (block){at, bytes, device, blocks};
  blocks = b;
  pthread_mutex_unlock(&big);
}
bool memory_remove(void *at) {
  bool found = false;
  pthread_mutex_lock(&big);
  for (block **b = &blocks; *b && !found; b = found ? b : &(*b)->next) {
    if ((*b)->at != at) continue;
    block *gone = *b;
    *b = gone->next;
    free(gone);
    found = true;
  }
  pthread_mutex_unlock(&big);
  return found;
}

bool memory_known(const void *at, size_t bytes) {
  bool known = false;
  pthread_mutex_lock(&big);
  for (block *b = blocks; b && !known; b = b->next) {
    known = (const char *)at >= b->at && (const char *)at + bytes <= b->at + b->bytes;
  }
  pthread_mutex_unlock(&big);
  return known;
}

EXPORT int cudaMalloc(void **out, size_t bytes) {
  CHECK("cudaMalloc");
  pthread_mutex_lock(&big);
  bool fits = used[current_device] + bytes <= capacity();
  if (fits) used[current_device] += bytes;
  pthread_mutex_unlock(&big);
  return fits ? take(out, bytes, current_device) : OUT_OF_MEMORY;
}
EXPORT int cudaFree(void *at) {
  CHECK("cudaFree");
  device_wait_idle(current_device, NULL);
  return at ? give(at, true) : SUCCESS;
}
EXPORT int cudaHostAlloc(void **out, size_t bytes, unsigned flags) {
  (void)flags;
  CHECK("cudaHostAlloc");
  return take(out, bytes, -1);
}
EXPORT int cudaFreeHost(void *at) {
  CHECK("cudaFreeHost");
  device_wait_idle(current_device, NULL);
  return give(at, false);
}
EXPORT int cudaMemGetInfo(size_t *available, size_t *total) {
  CHECK("cudaMemGetInfo");
  *total = capacity();
  *available = capacity() - used[current_device];
  return SUCCESS;
}

typedef struct { void *target; const void *source; size_t bytes; } copy;
static void run_copy(void *arg) {
  copy *c = arg;
  memcpy(c->target, c->source, c->bytes);
  free(c);
}

EXPORT int cudaMemcpyAsync(void *target, const void *source, size_t bytes, int kind, stream *s) {
  CHECK("cudaMemcpyAsync");
  if (kind != 4) return INVALID_VALUE;
  bool pageable = !memory_known(target, bytes) || !memory_known(source, bytes);
  copy *c = malloc(sizeof *c);
  *c = (copy){target, source, bytes};
  stream_push(s, run_copy, c);
  // pageable memory makes the call wait for the stream
  if (pageable) stream_wait_idle(s);
  return SUCCESS;
}

EXPORT int cudaMemcpyPeerAsync(void *target, int target_device, const void *source, int source_device, size_t bytes, stream *s) {
  (void)target_device;
  (void)source_device;
  CHECK("cudaMemcpyPeerAsync");
  return cudaMemcpyAsync(target, source, bytes, 4, s);
}
