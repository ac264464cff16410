/* What Linux knows about a file or block device, where Cython has no declaration for it. */
#ifndef QCOW2X_HOSTFILE_H
#define QCOW2X_HOSTFILE_H

#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

/* 1 MiB of zeros in .bss: read-only by agreement, aligned for O_DIRECT. */
#define Q2_ZEROS_BYTES (1u << 20)
static char q2_zeros[Q2_ZEROS_BYTES] __attribute__((aligned(4096)));

/* Size of a block device, -1 with errno on failure. */
static inline int64_t q2_device_size(int fd)
{
    uint64_t nbytes = 0;
    return ioctl(fd, BLKGETSIZE64, &nbytes) == 0 ? (int64_t)nbytes : -1;
}

/* What O_DIRECT asks on this descriptor, which was opened with it. The kernel is asked (6.1 and
 * newer answer), then the device, then a trial read; a file too short to try on gets 4096, which
 * is right everywhere, if not the least. */
static inline void q2_direct_alignment(int fd, int is_device, uint32_t *memory, uint32_t *offset)
{
#ifdef STATX_DIOALIGN
    struct statx stx;
    if (statx(fd, "", AT_EMPTY_PATH, STATX_DIOALIGN, &stx) == 0 &&
        (stx.stx_mask & STATX_DIOALIGN) && stx.stx_dio_offset_align) {
        *memory = stx.stx_dio_mem_align;
        *offset = stx.stx_dio_offset_align;
        return;
    }
#endif
    int sector = 0;
    if (is_device && ioctl(fd, BLKSSZGET, &sector) == 0 && sector >= 512) {
        *memory = *offset = (uint32_t)sector;
        return;
    }
    void *trial = NULL;
    *memory = *offset = 4096;
    if (posix_memalign(&trial, 4096, 4096))
        return;
    if (pread(fd, (char *)trial + 512, 512, 512) == 512)
        *memory = *offset = 512;
    free(trial);
}

/* The lock between aligned and unaligned O_DIRECT writes. Writers go first: a stream of aligned
 * writes must not hold up an unaligned one for ever. NULL when out of memory. */
static inline pthread_rwlock_t *q2_edges_new(void)
{
    pthread_rwlock_t *lock = malloc(sizeof *lock);
    pthread_rwlockattr_t attr;
    if (!lock)
        return NULL;
    pthread_rwlockattr_init(&attr);
#ifdef __GLIBC__
    pthread_rwlockattr_setkind_np(&attr, PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP);
#endif
    pthread_rwlock_init(lock, &attr);
    pthread_rwlockattr_destroy(&attr);
    return lock;
}

/* Puts a descriptor that can do nothing in the place of fd, so that a thread still about to use
 * the number gets EBADF and never some other file that was given the number since. */
static inline int q2_retire_fd(int fd)
{
    int nothing = open("/", O_PATH | O_CLOEXEC);
    if (nothing < 0)
        return -1;
    int rc = dup3(nothing, fd, O_CLOEXEC);
    close(nothing);
    return rc < 0 ? -1 : 0;
}

/* lseek to data or to a hole; on a descriptor shared with the caller the cursor is put back. */
static pthread_mutex_t q2_cursor_lock = PTHREAD_MUTEX_INITIALIZER;

static inline int64_t q2_seek_run(int fd, int64_t off, int whence, int shared_cursor)
{
    if (!shared_cursor)
        return lseek(fd, off, whence);
    pthread_mutex_lock(&q2_cursor_lock);
    int64_t old = lseek(fd, 0, SEEK_CUR);
    int64_t found = lseek(fd, off, whence);
    int failure = errno;
    if (old >= 0)
        lseek(fd, old, SEEK_SET);
    pthread_mutex_unlock(&q2_cursor_lock);
    errno = failure;
    return found;
}

/* A durable write number `seq` finished: if all before it are durable, so is everything. */
static inline void q2_step_durable(uint64_t *durable, uint64_t seq)
{
    uint64_t before = seq - 1;
    __atomic_compare_exchange_n(durable, &before, seq, 0, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED);
}

#endif
