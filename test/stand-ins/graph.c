// CUDA graphs: what `stream_record` records while a stream is captured, replayed on launch. Other work on a captured stream is an error
// of the program that only a GPU would find, so it ends the process here.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "standin.h"

typedef struct node { void (*run)(void *); size_t bytes; void *blob; struct node *next; } node;
typedef struct { node *first, **last; } graph;
typedef struct { void (*run)(void *); char blob[]; } once;

// Thread-local, as the mode that is asked for.
static __thread graph *capturing;
static __thread stream *captured;

bool stream_is_captured(const stream *s) { return captured == s; }

static void run_once(void *arg) {
  once *o = arg;
  o->run(o->blob);
  free(o);
}
static void push_copy(stream *s, void (*run)(void *), const void *blob, size_t bytes) {
  once *o = malloc(sizeof *o + bytes);
  o->run = run;
  memcpy(o->blob, blob, bytes);
  stream_push(s, run_once, o);
}

void stream_record(stream *s, void (*run)(void *), const void *blob, size_t bytes) {
  if (captured != s) return push_copy(s, run, blob, bytes);
  node *n = malloc(sizeof *n);
  *n = (node){run, bytes, memcpy(malloc(bytes), blob, bytes), NULL};
  *capturing->last = n;
  capturing->last = &n->next;
}

EXPORT int cudaStreamBeginCapture(stream *s, int mode) {
  CHECK("cudaStreamBeginCapture");
  if (mode != 1 || captured) return 1;
  capturing = calloc(1, sizeof *capturing);
  capturing->last = &capturing->first;
  captured = s;
  return 0;
}
EXPORT int cudaStreamEndCapture(stream *s, graph **out) {
  if (captured != s) return 1;
  captured = NULL;
  CHECK("cudaStreamEndCapture");
  *out = capturing;
  return 0;
}
EXPORT int cudaGraphInstantiateWithFlags(graph **out, graph *g, unsigned long long flags) {
  CHECK("cudaGraphInstantiateWithFlags");
  *out = malloc(sizeof **out);
  **out = *g;
  return flags ? 1 : 0;
}
EXPORT int cudaGraphDestroy(graph *g) { free(g); return 0; }
EXPORT int cudaGraphUpload(graph *g, stream *s) { (void)g; (void)s; CHECK("cudaGraphUpload"); return 0; }
EXPORT int cudaGraphLaunch(graph *g, stream *s) {
  CHECK("cudaGraphLaunch");
  for (node *n = g->first; n; n = n->next) push_copy(s, n->run, n->blob, n->bytes);
  return 0;
}
EXPORT int cudaGraphExecDestroy(graph *g) {
  CHECK("cudaGraphExecDestroy");
  for (node *n = g->first, *next; n; n = next) {
    next = n->next;
    free(n->blob);
    free(n);
  }
  free(g);
  return 0;
}
