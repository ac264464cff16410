# cython: language_level=3
"""Freed clusters on their way to being free.

A host cluster whose mapping was removed passes three gates before it can be allocated again:

1. the removal is durable (`dropped` -> `limbo`, at the end of a flush): else a cut of power brings
   back a mapping to a cluster that by then holds somebody else's data;
2. every request that may have planned with the old mapping has finished. Requests enter an epoch
   of even or odd parity; when the requests of the other parity have drained, what was put into
   limbo during their epoch is out of everybody's reach, and the parities swap roles;
3. its hole is punched in the host file while its refcount still keeps others away.

Only then does the refcount drop. A cut in between leaks clusters and harms nothing.
"""
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport free
from libc.string cimport memset

from qcow2x._core.alloc cimport get_refcount_of, set_refcount_of
from qcow2x._core.metadata cimport load_slice_committing
from qcow2x._core.overlap cimport guard_remove
from qcow2x._core.state cimport q2_runs, runs_add, runs_append, runs_clear
from qcow2x._core.status cimport *
from qcow2x._core.sync cimport *


cdef void swap_epochs(ImageState img, q2_runs *out) noexcept nogil:
    """meta, exclusive: takes what no request can reach any more. Twice in a row empties both
    parities when nothing is under way."""
    cdef uint64_t other = (img.epoch & 1) ^ 1
    if q2_load(&img.active[other]) != 0:
        return
    if runs_append(out, &img.limbo[other]) != Q2_OK:
        return              # no memory for the list: they stay in limbo
    runs_clear(&img.limbo[other])
    q2_store(&img.epoch, img.epoch + 1)


cdef enum:
    # Clusters worked on under one hold of the lock: long enough that a discarded terabyte is not
    # all locking, short enough (tens of microseconds) that a read does not feel it.
    AT_ONCE = 1024


cdef q2_status lower_shared(ImageState img, uint64_t cluster, q2_runs *last,
                            uint64_t *miss) noexcept nogil:
    """meta, exclusive: one reference of `cluster` is gone. Where it was the last, only notes it:
    the refcount drops to 0 after the hole is punched."""
    cdef uint64_t refs
    cdef q2_status st = get_refcount_of(img, cluster, &refs, miss)
    if st != Q2_OK:
        return st
    if refs > 1:
        return set_refcount_of(img, cluster, refs - 1, miss)
    # Nothing may be packed behind the last stream of a cluster that is going away.
    if img.packed_end >> img.geo.cluster_bits == cluster:
        img.packed_end = 0
    # A refcount of 0 for a cluster that was in use is damage; it stays as it is for check to find.
    return runs_add(last, cluster, 1) if refs else Q2_OK


cdef q2_status make_free(ImageState img, uint64_t cluster, q2_runs *unused,
                         uint64_t *miss) noexcept nogil:
    """meta, exclusive."""
    cdef q2_status st = set_refcount_of(img, cluster, 0, miss)
    if st == Q2_OK:
        q2_count(&img.count.freed, 1)
        guard_remove(img, cluster, 1)
    return st


ctypedef q2_status (*per_cluster)(ImageState, uint64_t, q2_runs *, uint64_t *) noexcept nogil


cdef q2_status for_each(ImageState img, const q2_runs *runs, per_cluster step,
                        q2_runs *out) noexcept nogil:
    cdef uint64_t i, done, held, miss = 0
    cdef q2_status st = Q2_OK
    for i in range(runs.n):
        done = 0
        while done < runs.run[i].n:
            held = 0
            pthread_rwlock_wrlock(&img.meta)
            while done < runs.run[i].n and held < AT_ONCE:
                st = step(img, runs.run[i].first + done, out, &miss)
                if st != Q2_OK:
                    break
                done += 1
                held += 1
            pthread_rwlock_unlock(&img.meta)
            if st == Q2_MISS:
                st = load_slice_committing(img, miss)
            if st != Q2_OK:
                return st
    return Q2_OK


cdef q2_status retire_freed(ImageState img) noexcept nogil:
    cdef q2_runs gone, last
    cdef uint64_t i
    cdef uint32_t cbits = img.geo.cluster_bits
    cdef q2_status st
    memset(&gone, 0, sizeof(q2_runs))
    memset(&last, 0, sizeof(q2_runs))
    pthread_rwlock_wrlock(&img.meta)
    swap_epochs(img, &gone)
    swap_epochs(img, &gone)
    pthread_rwlock_unlock(&img.meta)
    if gone.n and img.file.listens:
        img.file.reach(Q2_SITE_CLUSTER_FREE)
    st = for_each(img, &gone, lower_shared, &last)
    if img.discard_to_host:
        for i in range(last.n):
            if st == Q2_OK:
                st = img.file.punch_hole(Q2_SITE_PUNCH, last.run[i].first << cbits,
                                         last.run[i].n << cbits)
    if st == Q2_OK:
        st = for_each(img, &last, make_free, NULL)
    # After a failure the rest stays counted as used: leaked clusters, which check finds.
    free(gone.run)
    free(last.run)
    return st
