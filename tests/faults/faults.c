/* Faults in system calls on files below one directory: loaded before libc, armed in a process by arm(). */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

static char below[4096];
static volatile long left; /* calls until the fault; 0 and less: past */
static int failure;        /* 0: the process is killed; else the call fails with this number */
static int lasts;          /* do all later calls fail as well, as on a full disk? */

void arm(const char *directory, long count, int number, int stays) {
  snprintf(below, sizeof below, "%s", directory);
  failure = number;
  lasts = stays;
  left = count;
}

long calls_left(void) { return left; }

static int inside(int at, const char *path) {
  char whole[8192], link[64];
  if (!below[0]) return 0;
  if (path && (path[0] == '/' || at == AT_FDCWD)) return !strncmp(path, below, strlen(below));
  snprintf(link, sizeof link, "/proc/self/fd/%d", at);
  ssize_t size = readlink(link, whole, sizeof whole - 1);
  if (size < 0) return 0;
  whole[size] = 0;
  return !strncmp(whole, below, strlen(below));
}

static int fails(int at, const char *path) {
  int saved = errno;
  if (!inside(at, path)) { errno = saved; return 0; }
  long now = __sync_sub_and_fetch(&left, 1);
  if (now == 0 || (now < 0 && lasts && failure)) {
    if (!failure) kill(getpid(), SIGKILL);
    errno = failure;
    return 1;
  }
  errno = saved;
  return 0;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define WRAP(type, name, args, at, path, ...) \
  type name args { if (fails(at, path)) return -1; return REAL(name)(__VA_ARGS__); }

WRAP(ssize_t, write, (int fd, const void *b, size_t n), fd, NULL, fd, b, n)
WRAP(ssize_t, pwrite, (int fd, const void *b, size_t n, off_t o), fd, NULL, fd, b, n, o)
WRAP(ssize_t, pwrite64, (int fd, const void *b, size_t n, off64_t o), fd, NULL, fd, b, n, o)
WRAP(int, fsync, (int fd), fd, NULL, fd)
WRAP(int, rename, (const char *a, const char *b), AT_FDCWD, a, a, b)
WRAP(int, renameat, (int x, const char *a, int y, const char *b), x, a, x, a, y, b)
WRAP(int, renameat2, (int x, const char *a, int y, const char *b, unsigned f), x, a, x, a, y, b, f)
WRAP(int, unlink, (const char *a), AT_FDCWD, a, a)
WRAP(int, unlinkat, (int x, const char *a, int f), x, a, x, a, f)
WRAP(int, rmdir, (const char *a), AT_FDCWD, a, a)
WRAP(int, mkdir, (const char *a, mode_t m), AT_FDCWD, a, a, m)

#define WRAP_OPEN(name)                                    \
  int name(const char *path, int flags, ...) {             \
    va_list rest;                                          \
    va_start(rest, flags);                                 \
    mode_t mode = va_arg(rest, mode_t);                    \
    va_end(rest);                                          \
    if (fails(AT_FDCWD, path)) return -1;                  \
    return REAL(name)(path, flags, mode);                  \
  }
WRAP_OPEN(open)
WRAP_OPEN(open64)
