// Makes the n-th call that changes files below a folder fail: preloaded, and armed from Python through ctypes.
//
// Kinds: an errno, once; ENOSPC from the n-th on, as a disk stays full; SHORT, a write of half the bytes; KILL, the
// process is killed in the call's place.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

#define SHORT -1
#define KILL -2

static char folder[PATH_MAX];
static int kind;
static long left = -1, seen;

// kind 0 counts alone.
void faults_arm(const char* below, int which, long number) {
  strncpy(folder, below, sizeof folder - 1);
  kind = which;
  seen = 0;
  left = number;
}

long faults_seen(void) { return seen; }

static int below(const char* path) { return folder[0] && strncmp(path, folder, strlen(folder)) == 0; }

static int of_descriptor(int descriptor) {
  char link[64], path[PATH_MAX];
  snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
  const ssize_t length = readlink(link, path, sizeof path - 1);
  if (length < 0) return 0;
  path[length] = 0;
  return below(path);
}

// Whether this call is to fail.
static int due(int concerned) {
  if (left < 0 || !concerned) return 0;
  const long place = seen++;
  if (kind == 0) return 0;
  if (kind == KILL && place == left) raise(SIGKILL);
  return place == left || (kind == ENOSPC && place > left);
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define FAIL()                                          \
  do {                                                  \
    errno = kind == SHORT ? EIO : kind;                 \
    return -1;                                          \
  } while (0)

ssize_t write(int fd, const void* data, size_t size) {
  if (due(of_descriptor(fd))) {
    if (kind != SHORT) FAIL();
    size = size > 1 ? size / 2 : size;
  }
  return REAL(write)(fd, data, size);
}

ssize_t pwrite(int fd, const void* data, size_t size, off_t at) {
  if (due(of_descriptor(fd))) {
    if (kind != SHORT) FAIL();
    size = size > 1 ? size / 2 : size;
  }
  return REAL(pwrite)(fd, data, size, at);
}

ssize_t pwrite64(int fd, const void* data, size_t size, off64_t at) {
  if (due(of_descriptor(fd))) {
    if (kind != SHORT) FAIL();
    size = size > 1 ? size / 2 : size;
  }
  return REAL(pwrite64)(fd, data, size, at);
}

// A short write is no fault of the calls below, which then go through.
#define WHOLE(concerned) \
  if (due(concerned) && kind != SHORT) FAIL()

int fsync(int fd) {
  WHOLE(of_descriptor(fd));
  return REAL(fsync)(fd);
}

int ftruncate64(int fd, off64_t size) {
  WHOLE(of_descriptor(fd));
  return REAL(ftruncate64)(fd, size);
}

int posix_fallocate64(int fd, off64_t start, off64_t size) {
  if (due(of_descriptor(fd)) && kind != SHORT) return kind;  // it returns its error
  return REAL(posix_fallocate64)(fd, start, size);
}

int rename(const char* from, const char* to) {
  WHOLE(kind != EINTR && below(to));
  return REAL(rename)(from, to);
}

int mkdir(const char* path, mode_t mode) {
  WHOLE(kind != EINTR && below(path));
  return REAL(mkdir)(path, mode);
}

static int open_for_writing(const char* name, const char* path, int flags, mode_t mode) {
  WHOLE(below(path) && (flags & (O_CREAT | O_WRONLY | O_RDWR)));
  int (*real)(const char*, int, ...) = (int (*)(const char*, int, ...))dlsym(RTLD_NEXT, name);
  return real(path, flags, mode);
}

int open(const char* path, int flags, ...) {
  va_list rest;
  va_start(rest, flags);
  const mode_t mode = (flags & (O_CREAT | O_TMPFILE)) ? va_arg(rest, mode_t) : 0;
  va_end(rest);
  return open_for_writing("open", path, flags, mode);
}

int open64(const char* path, int flags, ...) {
  va_list rest;
  va_start(rest, flags);
  const mode_t mode = (flags & (O_CREAT | O_TMPFILE)) ? va_arg(rest, mode_t) : 0;
  va_end(rest);
  return open_for_writing("open64", path, flags, mode);
}
