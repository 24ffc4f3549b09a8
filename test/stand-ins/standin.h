// Stand-ins for libcuda, libcudart, libnccl and libnvrtc on a machine without a GPU: the same symbols, and the behaviour that hangs
// programs (docs of each file). "GPU memory" is the process's own, or a memfd; streams are threads; NCCL moves bytes over loopback sockets.
#ifndef PD_STANDIN_H
#define PD_STANDIN_H
#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define EXPORT __attribute__((visibility("default")))
#define MAX_DEVICES 8

// ---- faults.c: PD_STANDIN_FAULTS="cudaMalloc=2,ncclCommAbort=hang,cudaEventQuery=700@3"
// `name=code` fails every call, `name=code@n` from the nth on; `hang` is HANG: the call returns only once the fault is taken back.
#define HANG (-1)
int fault(const char *name);
int setting(const char *name, int otherwise);
// At the head of every call.
int fault_after_hang(const char *name);
#define CHECK(name) do { int code_ = fault_after_hang(name); if (code_) return code_; } while (0)

// ---- gpu.c
typedef struct stream stream;
typedef struct event event;
extern __thread int current_device;
int device_count(void);        // that CUDA_VISIBLE_DEVICES leaves
int physical_device(int device);    // the GPU behind a visible one
extern pthread_mutex_t big;      // guards everything in gpu.c; held for moments only
extern pthread_cond_t changed;   // anything has changed
void stream_push(stream *s, void (*run)(void *), void *arg);
int stream_device(stream *s);
void stream_wait_idle(stream *s);
void device_wait_idle(int device, stream *except);  // every stream of it
void device_wait_nccl(int device);                  // until no NCCL operation runs on it
void device_nccl(int device, int delta);
void device_fail(int device, int code);             // sticky, as a kernel fault is
void sleep_us(long us);

// ---- graph.c
// As stream_push, with a copy of `blob` for each run: what may be captured into a graph.
void stream_record(stream *s, void (*run)(void *), const void *blob, size_t bytes);
bool stream_is_captured(const stream *s);  // by this thread

// ---- model.c
void *model_function(const char *name);  // NULL: no kernel of a model
int model_launch(const void *function, unsigned blocks, unsigned threads, stream *s, void **params);

// ---- vmm.c
unsigned write_element(const char *name);  // 0: no kernel that writes between caches
int write_launch(unsigned element, unsigned blocks, unsigned threads, stream *s, void **params);

// ---- memory.c
void memory_add(void *at, size_t bytes, int device);  // that others have mapped; device -1: of the host
bool memory_remove(void *at);
bool memory_known(const void *at, size_t bytes);    // inside of one live GPU or page-locked allocation
#endif
