# cython: language_level=3
"""Buffers for the length of one request, kept for the next one."""
from libc.stdint cimport uintptr_t
from libc.stdlib cimport free
from posix.mman cimport MAP_ANONYMOUS, MAP_FAILED, MAP_PRIVATE, PROT_READ, madvise, mmap
from posix.stdlib cimport posix_memalign

from qcow2x._core.sync cimport *

cdef extern from "qcow2x/overfork.h" nogil:
    int q2_hold_over_fork(pthread_mutex_t *lock)

cdef extern from "<sys/mman.h>" nogil:
    int MADV_HUGEPAGE

cdef enum:
    SMALLEST = 12           # 4 KiB
    LARGEST = 23            # 8 MiB: two clusters and the compressed stream of a third
    KEEP = 8                # of each size: at most 8 * 16 MiB are ever kept, usually far less

# Under `guard`.
cdef pthread_mutex_t guard
cdef void *kept[LARGEST + 1][KEEP]
cdef int n_kept[LARGEST + 1]

# One huge page of zeros, where the kernel has it: past the page cache a disk takes it as one piece, where the
# page of 4 KiB that it would otherwise see 512 times makes as many (2 MiB: 3.6 ms instead of 2.2).
cdef char *zero_pages = <char *>mmap(NULL, 2 * ZEROS_BYTES, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
if zero_pages == MAP_FAILED:
    raise MemoryError("qcow2x: no address space for 2 MiB of zeros")
zero_pages += -<uintptr_t>zero_pages % <uintptr_t>ZEROS_BYTES
madvise(zero_pages, ZEROS_BYTES, MADV_HUGEPAGE)
pthread_mutex_init(&guard, NULL)
if q2_hold_over_fork(&guard) != 0:
    raise MemoryError("qcow2x: no memory to be ready for a fork")


cdef const void *zeros() noexcept nogil:
    return zero_pages


cdef inline int class_of(size_t nbytes) noexcept nogil:
    cdef int bits = SMALLEST
    while (<size_t>1 << bits) < nbytes:
        bits += 1
    return bits


cdef void *scratch_take(size_t nbytes) noexcept nogil:
    cdef int bits = class_of(nbytes)
    cdef void *buf = NULL
    if bits <= LARGEST:
        pthread_mutex_lock(&guard)
        if n_kept[bits]:
            n_kept[bits] -= 1
            buf = kept[bits][n_kept[bits]]
        pthread_mutex_unlock(&guard)
        if buf is not NULL:
            return buf
    if posix_memalign(&buf, 4096, <size_t>1 << bits) != 0:
        return NULL
    return buf


cdef void scratch_give(void *buf, size_t nbytes) noexcept nogil:
    cdef int bits = class_of(nbytes)
    if buf is NULL:
        return
    if bits <= LARGEST:
        pthread_mutex_lock(&guard)
        if n_kept[bits] < KEEP:
            kept[bits][n_kept[bits]] = buf
            n_kept[bits] += 1
            buf = NULL
        pthread_mutex_unlock(&guard)
    free(buf)
