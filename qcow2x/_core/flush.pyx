# cython: language_level=3
"""Making what was written durable, once for everybody who asks at the same time."""
from libc.stdint cimport uint64_t

from qcow2x._core.edges cimport *
from qcow2x._core.errors cimport fail
from qcow2x._core.metadata cimport (write_back_for_guest, write_back_locked,
                                    write_dirty_bit)
from qcow2x._core.reserve cimport cut_tail, settle_growth
from qcow2x._core.retire cimport retire_freed
from qcow2x._core.state cimport runs_append, runs_clear
from qcow2x._core.status cimport *
from qcow2x._core.sync cimport *


cdef void free_what_is_mapped(ImageState img) noexcept nogil:
    """What no flush may do: a build that can leave edges out (edges.h) does it to show why."""
    pthread_rwlock_wrlock(&img.meta)
    if runs_append(&img.limbo[img.epoch & 1], &img.dropped) == Q2_OK:
        runs_clear(&img.dropped)
    pthread_rwlock_unlock(&img.meta)
    retire_freed(img)


cdef q2_status flush_image(ImageState img) noexcept nogil:
    return flush_with(img, NULL)


cdef q2_status flush_with(ImageState img, q2_beside *beside) noexcept nogil:
    cdef q2_status st
    cdef uint64_t ticket = q2_add(&img.flush_tickets, 1)
    pthread_mutex_lock(&img.commit)
    if img.shut:
        # A durable write that was under way when the image was closed: the flush of the closing
        # took it along, or failed for it as well.
        st = img.shut_status
        pthread_mutex_unlock(&img.commit)
        return st if st == Q2_OK else fail(st, Q2_SITE_NONE, 0, b"the flush at closing failed")
    if q2_load(&img.broken):
        # Whatever a sync would say now, what failed before it is not on the disk.
        pthread_mutex_unlock(&img.commit)
        return fail(Q2_E_BROKEN, Q2_SITE_NONE, 0, b"an earlier metadata write failed")
    if img.flush_done >= ticket:
        # Whoever held the lock took our ticket along.
        pthread_mutex_unlock(&img.commit)
        return Q2_OK
    ticket = q2_load(&img.flush_tickets)
    if not q2_keeps(Q2_EDGE_UNMAPPED_BEFORE_FREED):
        free_what_is_mapped(img)
    st = write_back_for_guest(img, beside)
    if st == Q2_OK:
        img.flush_done = ticket
        st = retire_freed(img)
    pthread_mutex_unlock(&img.commit)
    return st


cdef q2_status flush_if_metadata_changed(ImageState img) noexcept nogil:
    if q2_load(&img.meta_durable) >= q2_load(&img.meta_seq):
        return Q2_OK
    return flush_image(img)


cdef q2_status settle_refcounts(ImageState img) noexcept nogil:
    # Edge: every refcount before the bit that says they may be wrong is cleared.
    cdef bint durable = q2_keeps(Q2_EDGE_REFCOUNTS_BEFORE_CLEAN)
    cdef q2_status st = settle_growth(img)
    if st == Q2_OK:
        st = write_back_locked(img, durable)
    if st == Q2_OK:
        st = retire_freed(img)
    # What was freed last has lowered refcounts: they go out as well, so that nothing leaks.
    if st == Q2_OK and q2_load32(&img.refblocks.n_dirty):
        st = write_back_locked(img, durable)
    if st == Q2_OK and q2_load(&img.lazy_dirty):
        st = write_dirty_bit(img, False)
        if st == Q2_OK:
            q2_store(&img.lazy_dirty, 0)
    return st


cdef q2_status flush_closing(ImageState img) noexcept nogil:
    cdef q2_status st
    pthread_mutex_lock(&img.commit)
    st = settle_refcounts(img)
    if st == Q2_OK:
        cut_tail(img)
    img.shut = True
    img.shut_status = st
    pthread_mutex_unlock(&img.commit)
    return st
