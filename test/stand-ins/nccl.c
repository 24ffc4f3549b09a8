// libnccl, communicators of two ranks, non-blocking (ours) or blocking (vLLM's). As the real one:
//  - init, groups and finalize return "in progress" and settle later; a call on a communicator that has not settled fails;
//  - work enters the stream only when the call settles; a send waits in its stream for the receive, and the other way round;
//  - without a peer init never settles; a peer that dies leaves the stream busy for ever and no error;
//  - abort frees the communicator's own stream at once, and then blocks until every stream of the device has drained;
//  - its bootstrap takes the first address of NCCL_SOCKET_IFNAME (`=NAME`) and NCCL_SOCKET_FAMILY, never ::1, and says so under
//    NCCL_DEBUG=INFO; where there is none nothing works (2);
//  - both ranks on one GPU are refused (5); before 2.27 a second communicator in progress in a thread wipes out the first.
#include <arpa/inet.h>
#include <errno.h>
#include <ifaddrs.h>
#include <net/if.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>
#include "standin.h"

enum { SUCCESS = 0, SYSTEM = 2, INVALID_ARGUMENT = 4, INVALID_USAGE = 5, IN_PROGRESS = 7 };
enum { LINES = 3, CONTROL = 2 };  // sockets: data of rank 0, data of rank 1, control

typedef struct { char internal[128]; } unique_id;
typedef struct { char magic[4]; uint32_t port; uint64_t token; } address;  // the first bytes of a unique id
typedef struct { uint64_t token; int32_t line, device, version; } hello;
typedef struct config { size_t size; unsigned magic, version; int blocking, cga, min_ctas, max_ctas; const char *net; } config;

typedef struct comm {
  int rank, device, lines[LINES], listener;
  address where;
  volatile bool aborted, freed, lost, used, blocking;
  volatile int state;     // what ncclCommGetAsyncError says
  volatile int helpers;   // threads at work for it
} comm;

typedef struct { bool send; char *buffer; size_t bytes; } piece;
typedef struct { comm *c; stream *s; int count; piece pieces[]; } group;

static struct { uint64_t token; int fd; } listeners[256];
static __thread int depth;
static __thread group *open_group;
static __thread comm *in_slot;

static int version(void) { return setting("PD_STANDIN_NCCL", 22809); }

static void check_alive(comm *c) {
  if (!c->freed) return;
  fprintf(stderr, "stand-in NCCL: a call on a communicator that was aborted\n");
  abort();
}

// Before 2.27 a thread has one slot for work in progress.
static void begin(comm *c) {
  if (version() < 22700 && in_slot && in_slot != c && !in_slot->freed && in_slot->state == IN_PROGRESS) in_slot->lost = true;
  in_slot = c;
  c->state = IN_PROGRESS;
}
static void settle(comm *c, int state) { if (!c->lost) c->state = state; }
static void helper(comm *c, int delta) { __sync_fetch_and_add(&c->helpers, delta); }
static void start(void *(*run)(void *), void *arg) {
  pthread_t thread;
  pthread_create(&thread, NULL, run, arg);
  pthread_detach(thread);
}

// Reads or writes all of it. A connection that breaks is not an error here: it waits for the abort, as a GPU would. False: aborted.
static bool transfer(comm *c, int fd, void *data, size_t bytes, bool out) {
  bool broken = false;
  for (char *at = data; bytes;) {
    if (c->aborted) return false;
    if (broken) { sleep_us(1000); continue; }
    struct pollfd ready = {fd, out ? POLLOUT : POLLIN, 0};
    if (poll(&ready, 1, 5) <= 0) continue;
    ssize_t n = out ? send(fd, at, bytes, MSG_NOSIGNAL | MSG_DONTWAIT) : recv(fd, at, bytes, MSG_DONTWAIT);
    if (n > 0) { at += n; bytes -= n; }
    else if (n == 0 || (errno != EAGAIN && errno != EINTR)) broken = true;
  }
  return true;
}

EXPORT int ncclGetVersion(int *out) { CHECK("ncclGetVersion"); *out = version(); return SUCCESS; }

// Once per process. Data moves over 127.0.0.1 all the same: what is kept of the real one is which addresses it would have.
static int bootstrap(void) {
  static int state = -1;
  pthread_mutex_lock(&big);
  if (state < 0) {
    state = SYSTEM;
    const char *wanted = getenv("NCCL_SOCKET_IFNAME"), *family = getenv("NCCL_SOCKET_FAMILY"), *debug = getenv("NCCL_DEBUG");
    struct ifaddrs *all = NULL;
    char text[INET6_ADDRSTRLEN + 64] = "";
    getifaddrs(&all);
    for (struct ifaddrs *i = all; i && state; i = i->ifa_next) {
      if (!i->ifa_addr || !(i->ifa_flags & IFF_RUNNING)) continue;
      bool six = i->ifa_addr->sa_family == AF_INET6;
      if (!six && i->ifa_addr->sa_family != AF_INET) continue;
      if (family && strcmp(family, six ? "AF_INET6" : "AF_INET")) continue;
      if (wanted && wanted[0] == '=' ? strcmp(wanted + 1, i->ifa_name) : wanted && strncmp(wanted, i->ifa_name, strlen(wanted))) continue;
      if (!wanted && !strcmp(i->ifa_name, "lo")) continue;
      const struct in6_addr *at6 = &((struct sockaddr_in6 *)i->ifa_addr)->sin6_addr;
      if (six && IN6_IS_ADDR_LOOPBACK(at6)) continue;
      const void *at = six ? (const void *)at6 : &((struct sockaddr_in *)i->ifa_addr)->sin_addr;
      int length = snprintf(text, sizeof text, "%s:", i->ifa_name);
      inet_ntop(six ? AF_INET6 : AF_INET, at, text + length, sizeof text - length);
      state = SUCCESS;
    }
    if (all) freeifaddrs(all);
    if (!wanted && state) state = SUCCESS;  // the loopback interface, when nothing else is up
    // One write: the lines of other threads come between, not in the middle.
    if (state) dprintf(1, "stand-in:%d [0] NCCL WARN Bootstrap : no socket interface found\n", getpid());
    else if (debug && strcmp(debug, "WARN")) dprintf(1, "stand-in:%d [0] NCCL INFO Bootstrap: Using %s<0>\n", getpid(), text);
  }
  pthread_mutex_unlock(&big);
  return state;
}

EXPORT int ncclGetUniqueId(unique_id *id) {
  CHECK("ncclGetUniqueId");
  if (bootstrap()) return SYSTEM;
  struct sockaddr_in at = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
  socklen_t size = sizeof at;
  int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (fd < 0 || bind(fd, (void *)&at, size) || listen(fd, 8) || getsockname(fd, (void *)&at, &size)) return SYSTEM;
  address where = {"PDSN", ntohs(at.sin_port), (uint64_t)rand() << 32 ^ (uint64_t)getpid() << 16 ^ (uint64_t)fd};
  memset(id, 0x5C, sizeof *id);
  memcpy(id, &where, sizeof where);
  pthread_mutex_lock(&big);
  for (int i = 0; i < 256; i++) {
    if (listeners[i].fd) continue;
    listeners[i].token = where.token;
    listeners[i].fd = fd;
    break;
  }
  pthread_mutex_unlock(&big);
  return SUCCESS;
}

static int accept_peer(comm *c) {
  for (int got = 0; got < LINES;) {
    if (c->aborted) return IN_PROGRESS;
    struct pollfd ready = {c->listener, POLLIN, 0};
    if (poll(&ready, 1, 5) <= 0) continue;
    int fd = accept(c->listener, NULL, NULL);
    hello theirs, ours = {c->where.token, 0, physical_device(c->device), version()};
    if (!transfer(c, fd, &theirs, sizeof theirs, false) || theirs.token != c->where.token) { close(fd); continue; }
    transfer(c, fd, &ours, sizeof ours, true);
    if (theirs.device == ours.device || theirs.version != version()) return INVALID_USAGE;
    c->lines[theirs.line] = fd;
    got++;
  }
  return SUCCESS;
}

static int connect_peer(comm *c) {
  struct sockaddr_in at = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK), .sin_port = htons(c->where.port)};
  for (int line = 0; line < LINES;) {
    if (c->aborted) return IN_PROGRESS;
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (connect(fd, (void *)&at, sizeof at)) { close(fd); sleep_us(20000); continue; }
    hello ours = {c->where.token, line, physical_device(c->device), version()}, theirs;
    transfer(c, fd, &ours, sizeof ours, true);
    if (!transfer(c, fd, &theirs, sizeof theirs, false)) return IN_PROGRESS;
    if (theirs.device == ours.device || theirs.version != version()) return INVALID_USAGE;
    c->lines[line++] = fd;
  }
  return SUCCESS;
}

static void *run_init(void *arg) {
  comm *c = arg;
  int state = fault("init") == HANG ? IN_PROGRESS : c->rank == 0 ? accept_peer(c) : connect_peer(c);
  for (int i = 0; i < LINES; i++) if (c->lines[i] >= 0) setsockopt(c->lines[i], IPPROTO_TCP, TCP_NODELAY, &(int){1}, sizeof(int));
  sleep_us(setting("PD_STANDIN_INIT_US", 20000));
  if (!c->aborted) settle(c, state);
  helper(c, -1);
  return NULL;
}

EXPORT int ncclCommInitRankConfig(comm **out, int ranks, unique_id id, int rank, const config *given) {
  CHECK("ncclCommInitRankConfig");
  if (bootstrap()) return SYSTEM;
  if (given->magic != 0xcafebeef || given->size < 40 || given->version < 21700) return INVALID_ARGUMENT;
  if (given->blocking != 0 || given->min_ctas != given->max_ctas || given->min_ctas < 1 || ranks != 2) return INVALID_ARGUMENT;
  comm *c = calloc(1, sizeof *c);
  memcpy(&c->where, &id, sizeof c->where);
  c->rank = rank;
  c->device = current_device;
  c->listener = -1;
  for (int i = 0; i < LINES; i++) c->lines[i] = -1;
  if (memcmp(c->where.magic, "PDSN", 4)) return INVALID_ARGUMENT;
  pthread_mutex_lock(&big);
  for (int i = 0; rank == 0 && i < 256; i++) {
    if (!listeners[i].fd || listeners[i].token != c->where.token) continue;
    c->listener = listeners[i].fd;
    listeners[i].fd = 0;
  }
  pthread_mutex_unlock(&big);
  begin(c);
  helper(c, 1);
  start(run_init, c);
  *out = c;
  return IN_PROGRESS;
}

// On a blocking communicator every call returns once it has settled: for ever, where the peer does not do its part.
static int settled(comm *c) {
  while (c->state == IN_PROGRESS && !c->aborted) sleep_us(200);
  return c->state;
}

EXPORT int ncclCommInitRank(comm **out, int ranks, unique_id id, int rank) {
  const config given = {sizeof given, 0xcafebeef, version(), 0, -1, 8, 8, NULL};
  int code = ncclCommInitRankConfig(out, ranks, id, rank, &given);
  if (code != IN_PROGRESS) return code;
  (*out)->blocking = true;
  return settled(*out);
}

EXPORT int ncclCommGetAsyncError(comm *c, int *state) {
  check_alive(c);
  CHECK("ncclCommGetAsyncError");
  *state = c->state;
  return SUCCESS;
}

static void move(group *g, bool send) {
  comm *c = g->c;
  int line = send ? c->rank : !c->rank;
  for (int i = 0; i < g->count; i++) {
    piece *p = &g->pieces[i];
    if (p->send != send) continue;
    // The receiver says that it is there; before that not a byte moves. Sizes that differ: stuck, as on a GPU.
    uint64_t size = p->bytes;
    if (!transfer(c, c->lines[line], &size, sizeof size, !send)) return;
    if (send && size != p->bytes) for (; !c->aborted; sleep_us(1000));
    if (send && fault("ncclSend") == HANG) for (; !c->aborted; sleep_us(1000));
    if (!transfer(c, c->lines[line], p->buffer, p->bytes, send)) return;
  }
}
static void *move_sends(void *arg) { move(arg, true); return NULL; }

static void run_group(void *arg) {
  group *g = arg;
  device_nccl(g->c->device, 1);
  pthread_t sender;
  pthread_create(&sender, NULL, move_sends, g);
  move(g, false);
  pthread_join(sender, NULL);
  device_nccl(g->c->device, -1);
  free(g);
}

static void *run_launch(void *arg) {
  group *g = arg;
  comm *c = g->c;
  // the first operation sets the link up
  sleep_us(c->used ? setting("PD_STANDIN_ENQUEUE_US", 80) : 3000);
  c->used = true;
  if (!c->lost) stream_push(g->s, run_group, g);
  settle(c, SUCCESS);
  helper(c, -1);
  return NULL;
}

EXPORT int ncclGroupStart(void) { CHECK("ncclGroupStart"); depth++; return SUCCESS; }

EXPORT int ncclGroupEnd(void) {
  group *g = open_group;
  if (--depth > 0 || !g) return SUCCESS;
  open_group = NULL;
  CHECK("ncclGroupEnd");
  if (g->c->state == IN_PROGRESS) return INVALID_USAGE;
  comm *c = g->c;  // run_launch frees the group
  begin(c);
  helper(c, 1);
  start(run_launch, g);
  return c->blocking ? settled(c) : IN_PROGRESS;
}

static int add(bool send, void *buffer, size_t count, int type, int peer, comm *c, stream *s) {
  check_alive(c);
  if (type != 1 || peer != !c->rank) return INVALID_ARGUMENT;
  if (!memory_known(buffer, count)) return INVALID_ARGUMENT;
  if (c->state == IN_PROGRESS) return INVALID_USAGE;
  if (stream_device(s) != c->device || current_device != c->device) return INVALID_USAGE;
  int have = open_group ? open_group->count : 0;
  open_group = realloc(open_group, sizeof *open_group + (have + 1) * sizeof(piece));
  open_group->c = c;
  open_group->s = s;
  open_group->count = have + 1;
  open_group->pieces[have] = (piece){send, buffer, count};
  if (depth > 0 || !c->blocking) return SUCCESS;
  depth++;
  return ncclGroupEnd();
}
EXPORT int ncclSend(void *b, size_t n, int t, int p, comm *c, stream *s) { int code = fault("ncclSend"); return code > 0 ? code : add(true, b, n, t, p, c, s); }
EXPORT int ncclRecv(void *b, size_t n, int t, int p, comm *c, stream *s) { CHECK("ncclRecv"); return add(false, b, n, t, p, c, s); }

static void *run_finalize(void *arg) {
  comm *c = arg;
  char bye = 'F';
  transfer(c, c->lines[CONTROL], &bye, 1, true);
  transfer(c, c->lines[CONTROL], &bye, 1, false);
  if (!c->aborted) settle(c, SUCCESS);
  helper(c, -1);
  return NULL;
}
EXPORT int ncclCommFinalize(comm *c) {
  check_alive(c);
  CHECK("ncclCommFinalize");
  if (c->state == IN_PROGRESS) return INVALID_USAGE;
  begin(c);
  helper(c, 1);
  start(run_finalize, c);
  return IN_PROGRESS;
}

EXPORT int ncclCommAbort(comm *c) {
  check_alive(c);
  c->aborted = true;
  CHECK("ncclCommAbort");
  while (c->helpers) sleep_us(500);
  device_wait_idle(c->device, NULL);
  for (int i = 0; i < LINES; i++) if (c->lines[i] >= 0) close(c->lines[i]);
  if (c->listener >= 0) close(c->listener);
  c->freed = true;  // the struct stays, so that a later call on it is noticed
  return SUCCESS;
}

EXPORT const char *ncclGetErrorString(int code) {
  static const char *const text[] = {"no error", "unhandled cuda error", "unhandled system error", "internal error", "invalid argument",
                                     "invalid usage", "remote process exited or there was a network error", "NCCL operation in progress"};
  return code >= 0 && code < 8 ? text[code] : "unknown result code";
}
EXPORT const char *ncclGetLastError(comm *c) { (void)c; return ""; }
