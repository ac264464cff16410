# cython: language_level=3
"""Compressed clusters: fetched and decoded, several of one request at a time."""
import os

from libc.string cimport memcpy
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec

from qcow2x._core.codec cimport decode_cluster
from qcow2x._core.decoded cimport decoded_copy, decoded_keep, decoded_lend
from qcow2x._core.errors cimport fail
from qcow2x._core.scratch cimport scratch_give, scratch_take
from qcow2x._core.status cimport *
from qcow2x._core.sync cimport *

cdef extern from "<pthread.h>" nogil:
    ctypedef unsigned long pthread_t
    int pthread_create(pthread_t *, void *, void *(*)(void *) noexcept nogil, void *)
    int pthread_join(pthread_t, void **)

cdef enum:
    MOST_HELPERS = 15
    # Work for each thread. To start one and wait for its end takes 45 us.
    SHARE_NS = 100000

cdef uint64_t cpus = len(os.sched_getaffinity(0))
cdef uint64_t busy = 0      # threads that decode, of the whole process; atomic


cdef inline uint64_t now_ns() noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return <uint64_t>now.tv_sec * 1000000000 + <uint64_t>now.tv_nsec


cdef inline void note_time(ImageState img, uint64_t ns) noexcept nogil:
    # Stored clusters take 9 us, dense zlib 150: what the streams' bytes do not tell. An average over the
    # last eight or so; two threads may lose one of their figures.
    cdef uint64_t before = q2_load(&img.decode_ns)
    q2_store(&img.decode_ns, before - before // 8 + ns // 8 if before else ns)


cdef q2_status decode_from_file(ImageState img, const q2_extent *ext,
                                uint8_t *decoded) noexcept nogil:
    cdef size_t room = ext.comp_bytes
    cdef uint8_t *stream = <uint8_t *>scratch_take(room)
    cdef uint64_t start = now_ns()
    cdef q2_status st
    if stream is NULL:
        return fail(Q2_E_NOMEM, Q2_SITE_COMPRESSED_READ, ext.host_off, b"out of memory")
    st = img.file.read_at(Q2_SITE_COMPRESSED_READ, stream, room, ext.host_off)
    if st == Q2_OK:
        st = decode_cluster(img.header.fields.compression_type, stream, room, decoded,
                            img.geo.cluster_size)
        if st == Q2_E_CODEC:
            fail(Q2_E_CODEC, Q2_SITE_COMPRESSED_READ, ext.host_off,
                 b"compressed cluster does not decode to a full cluster")
    scratch_give(stream, room)
    note_time(img, now_ns() - start)
    return st


cdef q2_status read_one(ImageState img, const q2_extent *ext, uint8_t *buf,
                        uint64_t epoch) noexcept nogil:
    """Decodes straight into buf when all of the cluster is wanted; else by way of the clusters that were
    decoded last, unless somebody counts reads."""
    cdef size_t size = img.geo.cluster_size
    cdef size_t skip = ext.guest_off & (size - 1)
    cdef uint32_t slot = 0
    cdef uint8_t *cluster = NULL
    cdef bint kept
    cdef q2_status st
    if ext.nbytes == size:
        return decode_from_file(img, ext, buf)
    if not img.file.listens:
        if decoded_copy(&img.decoded, ext.host_off, ext.comp_bytes, q2_load(&img.epoch), skip,
                        ext.nbytes, buf):
            return Q2_OK
        cluster = decoded_lend(&img.decoded, size, &slot)
    kept = cluster is not NULL
    if not kept:
        cluster = <uint8_t *>scratch_take(size)
    if cluster is NULL:
        return fail(Q2_E_NOMEM, Q2_SITE_COMPRESSED_READ, ext.host_off, b"out of memory")
    st = decode_from_file(img, ext, cluster)
    if st == Q2_OK:
        memcpy(buf, cluster + skip, ext.nbytes)
    if kept:
        decoded_keep(&img.decoded, slot, cluster, ext.host_off,
                     ext.comp_bytes if st == Q2_OK else 0, epoch)
    else:
        scratch_give(cluster, size)
    return st


cdef q2_status read_in_turn(ImageState img, const q2_extent *ext, size_t n, uint8_t *buf,
                            uint64_t epoch) noexcept nogil:
    cdef size_t i
    cdef q2_status st = Q2_OK
    for i in range(n):
        if st == Q2_OK:
            st = read_one(img, &ext[i], buf + (ext[i].guest_off - ext[0].guest_off), epoch)
    return st


# ---- Several CPUs -------------------------------------------------------------------------------

cdef struct q2_share:
    void *img
    const q2_extent *ext
    size_t n
    uint8_t *buf
    uint64_t epoch
    uint64_t taken      # atomic
    uint64_t failed     # atomic


cdef void *decode_some(void *share_) noexcept nogil:
    cdef q2_share *share = <q2_share *>share_
    cdef const q2_extent *ext
    cdef uint64_t i = q2_add(&share.taken, 1) - 1
    while i < share.n and not q2_load(&share.failed):
        ext = &share.ext[i]
        if read_one(<ImageState>share.img, ext,
                    share.buf + (ext.guest_off - share.ext[0].guest_off), share.epoch) != Q2_OK:
            q2_store(&share.failed, 1)
        i = q2_add(&share.taken, 1) - 1
    return NULL


cdef uint64_t helpers_for(ImageState img, size_t n, uint64_t decoding) noexcept nogil:
    cdef uint64_t shares
    # A Python storage would have to wait for the GIL, and who listens counts the reads in their order.
    if n < 2 or decoding >= cpus or img.file.listens or not img.data_is_file:
        return 0
    shares = min(n * q2_load(&img.decode_ns) // SHARE_NS, <uint64_t>n)
    return min(shares - 1, cpus - decoding, <uint64_t>MOST_HELPERS) if shares else 0


cdef q2_status read_compressed(ImageState img, const q2_extent *ext, size_t n, uint8_t *buf,
                               uint64_t epoch) noexcept nogil:
    cdef uint64_t wanted = helpers_for(img, n, q2_add(&busy, 1))
    cdef uint64_t started = 0
    cdef pthread_t helper[MOST_HELPERS]
    cdef q2_share share
    cdef q2_status st
    if wanted == 0:
        st = read_in_turn(img, ext, n, buf, epoch)
        q2_sub(&busy, 1)
        return st
    q2_add(&busy, wanted)
    share.img = <void *>img
    share.ext = ext
    share.n = n
    share.buf = buf
    share.epoch = epoch
    share.taken = share.failed = 0
    while (started < wanted
           and pthread_create(&helper[started], NULL, decode_some, &share) == 0):
        started += 1
    decode_some(&share)
    while started:
        started -= 1
        pthread_join(helper[started], NULL)
    q2_sub(&busy, wanted + 1)
    # What was wrong is known in the thread that met it: here it is met again.
    return read_in_turn(img, ext, n, buf, epoch) if share.failed else Q2_OK


def share_out_alone() -> None:
    """From now on requests are decoded by the threads that make them: who has one for each CPU, or means
    to use no more, calls this, and :func:`share_out_again` when done. Any thread."""
    q2_add(&busy, cpus)


def share_out_again() -> None:
    q2_sub(&busy, cpus)


def _in_child() -> None:
    q2_store(&busy, 0)


os.register_at_fork(after_in_child=_in_child)
