/* pread and pwrite for small requests from and into the page cache. Any thread. */
#ifndef QCOW2X_POSITIONAL_H
#define QCOW2X_POSITIONAL_H

#include <stdint.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <unistd.h>

/* In a process with threads the C library makes a thread ready to be cancelled around each of them, and
 * undoes it: 40 ns of the 700 that 4 KiB take. Nobody cancels a thread that holds locks of ours. The
 * sanitizers know the library's functions alone. */
#if defined(__LP64__) && defined(SYS_pread64) && defined(SYS_pwrite64) && \
    !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
static inline ssize_t q2_pread(int fd, void *buf, size_t nbytes, uint64_t off)
{
    return syscall(SYS_pread64, fd, buf, nbytes, off);
}
static inline ssize_t q2_pwrite(int fd, const void *buf, size_t nbytes, uint64_t off)
{
    return syscall(SYS_pwrite64, fd, buf, nbytes, off);
}
#else
static inline ssize_t q2_pread(int fd, void *buf, size_t nbytes, uint64_t off)
{
    return pread(fd, buf, nbytes, (off_t)off);
}
static inline ssize_t q2_pwrite(int fd, const void *buf, size_t nbytes, uint64_t off)
{
    return pwrite(fd, buf, nbytes, (off_t)off);
}
#endif

#endif
