# cython: language_level=3
"""Growth ahead of the writer: the reserve filled."""
from libc.stdint cimport UINT64_MAX, int32_t, uint32_t

from qcow2x._core.alloc cimport alloc_clusters, release_unlinked
from qcow2x._core.edges cimport Q2_EDGE_RESERVE_BEFORE_L2, q2_keeps
from qcow2x._core.flush cimport flush_image
from qcow2x._core.metadata cimport load_slice
from qcow2x._core.plan cimport Q2_KIND_DATA
from qcow2x._core.reserve cimport *
from qcow2x._core.scratch cimport ZEROS_BYTES, zeros
from qcow2x._core.state cimport *
from qcow2x._core.status cimport *
from qcow2x._core.storage cimport WRITE_DEFERRED, WRITE_PAST_CACHE, q2_extent
from qcow2x._core.sync cimport *


cdef q2_status make_reserve(ImageState img, uint64_t host_off, uint64_t nbytes,
                            int32_t made, bint fresh) noexcept nogil:
    """The range is inside the file and reads as zeros, in one of the ways of reserve.pxd; `fresh`: it
    did so before, or lay past the end."""
    cdef uint64_t n
    cdef q2_status st
    if made != RESERVE_WRITTEN and not fresh:
        return img.file.zero_range(Q2_SITE_PREALLOCATE, host_off, nbytes, 0)
    if made == RESERVE_SET_ASIDE:
        st = img.file.allocate(Q2_SITE_PREALLOCATE, host_off, nbytes)
        if st != Q2_E_UNSUPPORTED:
            return st
    if made != RESERVE_WRITTEN:
        # At the end a write cannot cut off what others append, as a truncate could.
        return img.file.write_at(Q2_SITE_PREALLOCATE, zeros(), 512, host_off + nbytes - 512,
                                 WRITE_DEFERRED)
    while nbytes:
        n = nbytes if nbytes < ZEROS_BYTES else ZEROS_BYTES
        st = img.file.write_at(Q2_SITE_PREALLOCATE, zeros(), n, host_off,
                               WRITE_DEFERRED | WRITE_PAST_CACHE)
        if st != Q2_OK:
            return st
        host_off += n
        nbytes -= n
    return Q2_OK


cdef q2_status fill_reserve(ImageState img) noexcept nogil:
    cdef q2_growth *g = &img.growth
    cdef uint32_t cbits = img.geo.cluster_bits
    cdef uint64_t first = 0, got = 0, released = 0, miss = 0
    cdef bint fresh = False
    cdef int32_t made = RESERVE_WRITTEN
    cdef q2_status st = Q2_MISS, outcome
    while st == Q2_MISS:
        pthread_rwlock_wrlock(&img.meta)
        if g.n or g.filling:
            pthread_rwlock_unlock(&img.meta)
            return Q2_OK
        made = g.ask_made
        st = alloc_clusters(img, g.ask if g.ask > g.step else g.step, &first, &got, &fresh, &miss)
        if st == Q2_OK:
            g.filling = True
        pthread_rwlock_unlock(&img.meta)
        if st == Q2_MISS and load_slice(img, miss) != Q2_OK:
            return Q2_E_IO
    if st != Q2_OK:
        return st
    outcome = make_reserve(img, first << cbits, got << cbits, made, fresh)
    # Edge: refcounts and zeros of the reserve before any mapping to it. (GROWTH_TOGETHER: see write.link.)
    if outcome == Q2_OK and g.how == GROWTH_AHEAD and q2_keeps(Q2_EDGE_RESERVE_BEFORE_L2):
        outcome = flush_image(img)
    st = Q2_MISS
    while st == Q2_MISS:
        st = Q2_OK
        pthread_rwlock_wrlock(&img.meta)
        if outcome == Q2_OK:
            g.first = first
            g.n = got
            g.step = min(2 * g.step, clusters_in(img, MOST_BYTES))
        else:
            g.step = 1
            st = release_unlinked(img, first, got, &released, &miss)
        if st != Q2_MISS:
            g.filling = False
        pthread_rwlock_unlock(&img.meta)
        if st == Q2_MISS and load_slice(img, miss) != Q2_OK:
            # Its refcounts cannot be lowered: the rest of it leaks.
            pthread_rwlock_wrlock(&img.meta)
            g.filling = False
            pthread_rwlock_unlock(&img.meta)
            break
    room_wake(img)
    return outcome


cdef uint64_t clear_from(ImageState img, uint64_t guest_off) noexcept nogil:
    cdef uint64_t at = guest_off & ~(img.geo.cluster_size - 1)
    cdef uint64_t end = at + 2 * MOST_BYTES
    cdef q2_extent ext
    if not has_backing(img):
        return UINT64_MAX
    while at < end:
        if at >= img.backing_size:
            return UINT64_MAX
        if img.backing.extent_at(at, end - at, &ext) != Q2_OK or ext.kind == Q2_KIND_DATA:
            break
        at += ext.nbytes
    return at >> img.geo.cluster_bits
