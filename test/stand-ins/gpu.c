// libcudart: streams with a thread each, events, devices. Real queues: a copy at enqueue would hide every deadlock.
#include <stdlib.h>
#include <string.h>
#include <stdio.h>
#include <time.h>
#include "standin.h"

enum { SUCCESS = 0, INVALID_VALUE = 1, INVALID_DEVICE = 101, NOT_READY = 600 };

typedef struct work { void (*run)(void *); void *arg; struct work *next; } work;
struct stream {
  int device;
  work *head, *tail;
  bool busy, gone;
  pthread_t thread;
  struct stream *next;
};
struct event { uint64_t recorded, done; };

__thread int current_device = 0;
pthread_mutex_t big = PTHREAD_MUTEX_INITIALIZER;
pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static stream *streams;
static int errors[MAX_DEVICES];
static int nccl_running[MAX_DEVICES];


void sleep_us(long us) {
  struct timespec pause = {us / 1000000, us % 1000000 * 1000};
  nanosleep(&pause, NULL);
}

// CUDA_VISIBLE_DEVICES as CUDA reads it: indices up to the first that names no GPU.
static int visible_devices(int physical[MAX_DEVICES]) {
  int all = setting("PD_STANDIN_DEVICES", 2), count = 0;
  const char *at = getenv("CUDA_VISIBLE_DEVICES");
  if (!at) for (; count < all && count < MAX_DEVICES; count++) physical[count] = count;
  while (at && count < MAX_DEVICES) {
    char *end;
    long index = strtol(at, &end, 10);
    if (end == at || index < 0 || index >= all) break;
    physical[count++] = (int)index;
    at = *end == ',' ? end + 1 : NULL;
  }
  return count;
}
int device_count(void) { return visible_devices((int[MAX_DEVICES]){0}); }
int physical_device(int device) {
  int physical[MAX_DEVICES] = {0};
  return device >= 0 && device < visible_devices(physical) ? physical[device] : device;
}

// ---- streams

static void *stream_main(void *arg) {
  stream *s = arg;
  pthread_mutex_lock(&big);
  for (;;) {
    while (!s->head && !s->gone) pthread_cond_wait(&changed, &big);
    if (!s->head) break;
    work *w = s->head;
    s->head = w->next;
    if (!s->head) s->tail = NULL;
    s->busy = true;
    pthread_mutex_unlock(&big);
    w->run(w->arg);
    free(w);
    pthread_mutex_lock(&big);
    s->busy = false;
    pthread_cond_broadcast(&changed);
  }
  for (stream **at = &streams; *at; at = &(*at)->next) {
    if (*at == s) { *at = s->next; break; }
  }
  pthread_mutex_unlock(&big);
  return NULL;  // the struct stays: a late query must not crash
}

void stream_push(stream *s, void (*run)(void *), void *arg) {
  if (stream_is_captured(s)) {
    fprintf(stderr, "stand-in: work that no graph can hold was enqueued during a capture\n");
    abort();
  }
  work *w = malloc(sizeof *w);
  *w = (work){run, arg, NULL};
  pthread_mutex_lock(&big);
  if (s->tail) s->tail->next = w; else s->head = w;
  s->tail = w;
  pthread_cond_broadcast(&changed);
  pthread_mutex_unlock(&big);
}

int stream_device(stream *s) { return s->device; }
static bool idle(stream *s) { return !s->head && !s->busy; }

void stream_wait_idle(stream *s) {
  pthread_mutex_lock(&big);
  while (!idle(s)) pthread_cond_wait(&changed, &big);
  pthread_mutex_unlock(&big);
}

void device_wait_idle(int device, stream *except) {
  pthread_mutex_lock(&big);
  for (bool waiting = true; waiting;) {
    waiting = false;
    for (stream *s = streams; s; s = s->next) waiting |= s != except && s->device == device && !idle(s);
    if (waiting) pthread_cond_wait(&changed, &big);
  }
  pthread_mutex_unlock(&big);
}

void device_wait_nccl(int device) {
  pthread_mutex_lock(&big);
  while (nccl_running[device]) pthread_cond_wait(&changed, &big);
  pthread_mutex_unlock(&big);
}

void device_nccl(int device, int delta) {
  pthread_mutex_lock(&big);
  nccl_running[device] += delta;
  pthread_cond_broadcast(&changed);
  pthread_mutex_unlock(&big);
}

void device_fail(int device, int code) { errors[device] = code; }

EXPORT int cudaStreamCreateWithFlags(stream **out, unsigned flags) {
  CHECK("cudaStreamCreateWithFlags");
  if (flags != 1) return INVALID_VALUE;  // ours never wait for the default stream
  stream *s = calloc(1, sizeof *s);
  s->device = current_device;
  pthread_mutex_lock(&big);
  s->next = streams;
  streams = s;
  pthread_mutex_unlock(&big);
  pthread_create(&s->thread, NULL, stream_main, s);
  pthread_detach(s->thread);
  *out = s;
  return SUCCESS;
}

// urgent or not: order among streams is nobody's promise here
EXPORT int cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
  CHECK("cudaDeviceGetStreamPriorityRange");
  *least = 0;
  *greatest = -5;
  return SUCCESS;
}
EXPORT int cudaStreamCreateWithPriority(stream **out, unsigned flags, int priority) {
  return priority < -5 || priority > 0 ? INVALID_VALUE : cudaStreamCreateWithFlags(out, flags);
}

EXPORT int cudaStreamDestroy(stream *s) {
  CHECK("cudaStreamDestroy");
  pthread_mutex_lock(&big);
  s->gone = true;
  pthread_cond_broadcast(&changed);
  pthread_mutex_unlock(&big);
  return SUCCESS;
}

EXPORT int cudaStreamQuery(stream *s) {
  CHECK("cudaStreamQuery");
  if (errors[s->device]) return errors[s->device];
  pthread_mutex_lock(&big);
  bool drained = idle(s);
  pthread_mutex_unlock(&big);
  return drained ? SUCCESS : NOT_READY;
}

// ---- events

typedef struct { event *e; uint64_t generation; } mark;

static void run_record(void *arg) {
  mark *m = arg;
  pthread_mutex_lock(&big);
  if (m->e->done < m->generation) m->e->done = m->generation;
  pthread_cond_broadcast(&changed);
  pthread_mutex_unlock(&big);
  free(m);
}

static void run_wait(void *arg) {
  mark *m = arg;
  pthread_mutex_lock(&big);
  while (m->e->done < m->generation) pthread_cond_wait(&changed, &big);
  pthread_mutex_unlock(&big);
  free(m);
}

static mark *marking(event *e, bool next) {
  mark *m = malloc(sizeof *m);
  pthread_mutex_lock(&big);
  *m = (mark){e, next ? ++e->recorded : e->recorded};
  pthread_mutex_unlock(&big);
  return m;
}

EXPORT int cudaEventCreateWithFlags(event **out, unsigned flags) {
  (void)flags;
  CHECK("cudaEventCreateWithFlags");
  *out = calloc(1, sizeof(event));
  return SUCCESS;
}
EXPORT int cudaEventDestroy(event *e) { (void)e; CHECK("cudaEventDestroy"); return SUCCESS; }
EXPORT int cudaEventRecord(event *e, stream *s) {
  CHECK("cudaEventRecord");
  stream_push(s, run_record, marking(e, true));
  return SUCCESS;
}
EXPORT int cudaStreamWaitEvent(stream *s, event *e, unsigned flags) {
  (void)flags;
  CHECK("cudaStreamWaitEvent");
  stream_push(s, run_wait, marking(e, false));
  return SUCCESS;
}
EXPORT int cudaEventQuery(event *e) {
  CHECK("cudaEventQuery");
  if (errors[current_device]) return errors[current_device];
  pthread_mutex_lock(&big);
  bool done = e->done >= e->recorded;
  pthread_mutex_unlock(&big);
  return done ? SUCCESS : NOT_READY;
}

// ---- devices

EXPORT int cudaGetDeviceCount(int *count) { CHECK("cudaGetDeviceCount"); *count = device_count(); return *count ? SUCCESS : 100; }
EXPORT int cudaSetDevice(int device) {
  CHECK("cudaSetDevice");
  if (device < 0 || device >= device_count()) return INVALID_DEVICE;
  current_device = device;
  return SUCCESS;
}
EXPORT int cudaRuntimeGetVersion(int *version) { CHECK("cudaRuntimeGetVersion"); *version = setting("PD_STANDIN_CUDA", 13000); return SUCCESS; }
EXPORT int cudaDeviceGetAttribute(int *value, int attribute, int device) {
  (void)device;
  CHECK("cudaDeviceGetAttribute");
  int compute = setting("PD_STANDIN_COMPUTE", 90);
  *value = attribute == 16 ? 4 : attribute == 75 ? compute / 10 : attribute == 76 ? compute % 10 : 0;
  return SUCCESS;
}
EXPORT int cudaDeviceGetPCIBusId(char *id, int length, int device) {
  CHECK("cudaDeviceGetPCIBusId");
  snprintf(id, length, "0000:%02x:00.0", 16 + physical_device(device));
  return SUCCESS;
}
EXPORT int cudaDeviceCanAccessPeer(int *can, int device, int peer) {
  CHECK("cudaDeviceCanAccessPeer");
  *can = device != peer;
  return SUCCESS;
}

EXPORT int cudaDeviceGetP2PAttribute(int *value, int attribute, int device, int peer) {
  CHECK("cudaDeviceGetP2PAttribute");
  *value = attribute == 3 && device != peer;
  return SUCCESS;
}
EXPORT int cudaDeviceEnablePeerAccess(int peer, unsigned flags) {
  CHECK("cudaDeviceEnablePeerAccess");
  return flags || peer == current_device ? INVALID_VALUE : SUCCESS;
}

static const struct { int code; const char *name, *text; } names[] = {
    {0, "cudaSuccess", "no error"},
    {2, "cudaErrorMemoryAllocation", "out of memory"},
    {100, "cudaErrorNoDevice", "no CUDA-capable device is detected"},
    {101, "cudaErrorInvalidDevice", "invalid device ordinal"},
    {600, "cudaErrorNotReady", "device not ready"},
    {700, "cudaErrorIllegalAddress", "an illegal memory access was encountered"},
    {716, "cudaErrorMisalignedAddress", "misaligned address"},
};
EXPORT const char *cudaGetErrorName(int code) {
  for (size_t i = 0; i < sizeof names / sizeof *names; i++) if (names[i].code == code) return names[i].name;
  return "cudaErrorUnknown";
}
EXPORT const char *cudaGetErrorString(int code) {
  for (size_t i = 0; i < sizeof names / sizeof *names; i++) if (names[i].code == code) return names[i].text;
  return "unknown error";
}
