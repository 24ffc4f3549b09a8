// Faults and settings, from the environment or from pd_standin_faults (tests that change them while running).
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "standin.h"

static char text[1024];
static bool given;
static struct { char name[64]; int calls; } counts[64];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

EXPORT void pd_standin_faults(const char *faults) {
  pthread_mutex_lock(&lock);
  snprintf(text, sizeof text, "%s", faults);
  given = true;
  memset(counts, 0, sizeof counts);
  pthread_mutex_unlock(&lock);
}

static int count(const char *name) {
  for (int i = 0; i < 64; i++) {
    if (!counts[i].name[0]) snprintf(counts[i].name, sizeof counts[i].name, "%s", name);
    if (!strcmp(counts[i].name, name)) return ++counts[i].calls;
  }
  return 0;
}

int fault(const char *name) {
  int result = 0;
  pthread_mutex_lock(&lock);
  const char *from = given ? text : getenv("PD_STANDIN_FAULTS");
  size_t length = strlen(name);
  for (const char *at = from; at && *at; at = strchr(at, ',') ? strchr(at, ',') + 1 : NULL) {
    if (strncmp(at, name, length) || at[length] != '=') continue;
    int code = strncmp(at + length + 1, "hang", 4) ? atoi(at + length + 1) : HANG;
    const char *since = strchr(at, '@');
    const char *comma = strchr(at, ',');
    int first = since && (!comma || since < comma) ? atoi(since + 1) : 1;
    if (count(name) >= first) result = code;
  }
  pthread_mutex_unlock(&lock);
  return result;
}

static int hanging;

// Calls that hang now.
EXPORT int pd_standin_hanging(void) {
  pthread_mutex_lock(&lock);
  int now = hanging;
  pthread_mutex_unlock(&lock);
  return now;
}

static void add_hanging(int delta) {
  pthread_mutex_lock(&lock);
  hanging += delta;
  pthread_mutex_unlock(&lock);
}

int fault_after_hang(const char *name) {
  int code = fault(name);
  if (code != HANG) return code;
  add_hanging(1);
  while ((code = fault(name)) == HANG) sleep_us(20000);
  add_hanging(-1);
  return code;
}

int setting(const char *name, int otherwise) {
  const char *value = getenv(name);
  return value && *value ? atoi(value) : otherwise;
}
