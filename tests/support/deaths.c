/* Preloaded into a process: dies inside the k-th call that changes something below a directory.

   deaths_arm(directory, k, power) counts from then on; k = 0 only counts. A write dies with half of its bytes written,
   any other call before it is done. With `power` what was written and not yet flushed is lost, too, as when the
   machine loses power. deaths_log() names the kind of each call counted, one letter each. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#define MANY 65536
static char below[PATH_MAX];
static long target, count;
static int power;
static char kinds[MANY + 1];
static char *dirty[MANY];
static long dirty_count;
static pthread_mutex_t lock = PTHREAD_RECURSIVE_MUTEX_INITIALIZER_NP;

void deaths_arm(const char *directory, long k, int with_power)
{
    strncpy(below, directory, PATH_MAX - 1);
    target = k, count = 0, power = with_power, dirty_count = 0;
    memset(kinds, 0, sizeof kinds);
}

const char *deaths_log(void) { return kinds; }

static int is_below(const char *path) { return below[0] && !strncmp(path, below, strlen(below)); }

static int path_of(int fd, char *path)
{
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, PATH_MAX - 1);
    path[length > 0 ? length : 0] = 0;
    return length > 0 && is_below(path);
}

static void die(void)
{
    for (long i = 0; power && i < dirty_count; i++)
        if (dirty[i] && truncate(dirty[i], 0)) continue;
    kill(getpid(), SIGKILL);
    for (;;) pause();
}

/* Whether this is the call to die in. */
static int counted(char kind)
{
    pthread_mutex_lock(&lock);
    if (count < MANY) kinds[count] = kind;
    int now = ++count == target;
    pthread_mutex_unlock(&lock);
    return now;
}

static void soil(const char *path)
{
    pthread_mutex_lock(&lock);
    for (long i = 0; i < dirty_count; i++)
        if (dirty[i] && !strcmp(dirty[i], path)) { pthread_mutex_unlock(&lock); return; }
    if (dirty_count < MANY) dirty[dirty_count++] = strdup(path);
    pthread_mutex_unlock(&lock);
}

static void clean(const char *path)
{
    pthread_mutex_lock(&lock);
    for (long i = 0; i < dirty_count; i++)
        if (dirty[i] && !strcmp(dirty[i], path)) { free(dirty[i]); dirty[i] = NULL; }
    pthread_mutex_unlock(&lock);
}

static void moved(const char *from, const char *to)
{
    pthread_mutex_lock(&lock);
    clean(to); /* what was there is replaced */
    for (long i = 0; i < dirty_count; i++) {
        size_t length = strlen(from);
        if (!dirty[i] || strncmp(dirty[i], from, length) || (dirty[i][length] && dirty[i][length] != '/')) continue;
        char path[PATH_MAX * 2];
        snprintf(path, sizeof path, "%s%s", to, dirty[i] + length);
        free(dirty[i]);
        dirty[i] = strdup(path);
    }
    pthread_mutex_unlock(&lock);
}

#define REAL(name) static __typeof__(&name) real; if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

ssize_t write(int fd, const void *bytes, size_t size)
{
    REAL(write);
    char path[PATH_MAX];
    if (below[0] && path_of(fd, path)) {
        soil(path);
        if (counted('w')) { real(fd, bytes, size / 2); die(); }
    }
    return real(fd, bytes, size);
}

ssize_t pwrite64(int fd, const void *bytes, size_t size, off64_t at)
{
    REAL(pwrite64);
    char path[PATH_MAX];
    if (below[0] && path_of(fd, path)) {
        soil(path);
        if (counted('w')) { real(fd, bytes, size / 2, at); die(); }
    }
    return real(fd, bytes, size, at);
}

ssize_t writev(int fd, const struct iovec *parts, int number)
{
    REAL(writev);
    char path[PATH_MAX];
    if (below[0] && path_of(fd, path)) {
        soil(path);
        if (counted('w')) { real(fd, parts, number / 2); die(); }
    }
    return real(fd, parts, number);
}

int fsync(int fd)
{
    REAL(fsync);
    char path[PATH_MAX];
    int ours = below[0] && path_of(fd, path);
    if (ours && counted('f')) die();
    int result = real(fd);
    if (ours && !result) clean(path);
    return result;
}

int rename(const char *from, const char *to)
{
    REAL(rename);
    int ours = below[0] && is_below(from);
    if (ours && counted('r')) die();
    int result = real(from, to);
    if (ours && !result) moved(from, to);
    return result;
}

int mkdir(const char *path, mode_t mode)
{
    REAL(mkdir);
    if (below[0] && is_below(path) && counted('m')) die();
    return real(path, mode);
}

int unlink(const char *path)
{
    REAL(unlink);
    if (below[0] && is_below(path) && counted('u')) die();
    return real(path);
}

int unlinkat(int directory, const char *path, int flags)
{
    REAL(unlinkat);
    char parent[PATH_MAX];
    if (below[0] && (is_below(path) || path_of(directory, parent)) && counted('u')) die();
    return real(directory, path, flags);
}

int rmdir(const char *path)
{
    REAL(rmdir);
    if (below[0] && is_below(path) && counted('u')) die();
    return real(path);
}
