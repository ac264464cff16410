# cython: language_level=3
"""Guarding metadata: the set of clusters that hold tables, and what happens to a write that hits."""
from libc.stdlib cimport calloc, free
from libc.string cimport memset

from qcow2x._core.errors cimport fail
from qcow2x._core.state cimport q2_guard
from qcow2x._core.status cimport *
from qcow2x._core.sync cimport q2_store
from qcow2x._core.wire cimport Q2_L1E_OFFSET_MASK, Q2_RTE_OFFSET_MASK

cdef q2_status reserve(q2_guard *g, uint64_t more) noexcept nogil:
    cdef q2_guard larger
    cdef uint64_t room = g.mask + 1 if g.slot is not NULL else 64
    cdef uint64_t i
    if g.slot is not NULL and (g.n + more) * 2 <= room:
        return Q2_OK
    while (g.n + more) * 2 > room:
        room *= 2
    larger.slot = <uint64_t *>calloc(room, 8)
    larger.mask = room - 1
    larger.n = g.n
    if larger.slot is NULL:
        return fail(Q2_E_NOMEM, Q2_SITE_NONE, 0, b"no memory for the set of table clusters")
    if g.slot is not NULL:
        for i in range(g.mask + 1):
            if g.slot[i]:
                larger.slot[guard_find(&larger, (g.slot[i] >> 3) - 1)] = g.slot[i]
    free(g.slot)
    g[0] = larger
    return Q2_OK


# From which guard on a table of this sort is guarded.
cdef inline uint32_t level_of(uint32_t holds) noexcept nogil:
    if holds == HOLDS_FIXED:
        return GUARD_CONSTANT
    return GUARD_ALL if holds == HOLDS_SNAPSHOT_L2 else GUARD_CACHED


cdef inline uint64_t together(uint64_t before, uint32_t holds) noexcept nogil:
    """What a cluster holds that held `before` already."""
    if before == 0 or before == holds:
        return holds
    # A table that the active L1 and a snapshot share.
    if (before == HOLDS_L2 and holds == HOLDS_SNAPSHOT_L2) or (
            before == HOLDS_SNAPSHOT_L2 and holds == HOLDS_L2):
        return HOLDS_L2
    return HOLDS_SEVERAL


cdef q2_status guard_add(ImageState img, uint32_t holds, uint64_t first_cl,
                         uint64_t n) noexcept nogil:
    cdef uint64_t cluster, at
    cdef q2_status st
    if level_of(holds) > img.guard_level:
        return Q2_OK
    st = reserve(&img.guarded, n)
    if st != Q2_OK:
        return st
    for cluster in range(first_cl, first_cl + n):
        at = guard_find(&img.guarded, cluster)
        if not img.guarded.slot[at]:
            img.guarded.n += 1
        img.guarded.slot[at] = (cluster + 1) << 3 | together(img.guarded.slot[at] & 7, holds)
    return Q2_OK


cdef void guard_remove(ImageState img, uint64_t first_cl, uint64_t n) noexcept nogil:
    cdef q2_guard *g = &img.guarded
    cdef uint64_t cluster, at, hole, home
    if g.n == 0:
        return
    for cluster in range(first_cl, first_cl + n):
        hole = guard_find(g, cluster)
        if not g.slot[hole]:
            continue
        g.slot[hole] = 0
        g.n -= 1
        # What probed past the hole moves back, so that no search ends there too early.
        at = (hole + 1) & g.mask
        while g.slot[at]:
            home = home_of(g, (g.slot[at] >> 3) - 1)
            if ((at - home) & g.mask) >= ((at - hole) & g.mask):
                g.slot[hole] = g.slot[at]
                g.slot[at] = 0
                hole = at
            at = (at + 1) & g.mask


cdef void guard_forget(ImageState img) noexcept nogil:
    if img.guarded.slot is not NULL:
        memset(img.guarded.slot, 0, (img.guarded.mask + 1) * 8)
    img.guarded.n = 0


cdef q2_status guard_table(ImageState img, uint32_t holds, uint64_t host_off,
                           uint64_t nbytes) noexcept nogil:
    cdef uint64_t first = host_off >> img.geo.cluster_bits
    cdef uint64_t end = (host_off + nbytes + img.geo.cluster_size - 1) >> img.geo.cluster_bits
    return guard_add(img, holds, first, end - first) if nbytes else Q2_OK


cdef q2_status guard_image(ImageState img) noexcept nogil:
    cdef uint64_t i, off
    cdef q2_status st = guard_add(img, HOLDS_FIXED, 0, 1)
    if st == Q2_OK:
        st = guard_table(img, HOLDS_FIXED, img.l1_offset, <uint64_t>img.l1_size * 8)
    if st == Q2_OK:
        st = guard_table(img, HOLDS_FIXED, img.rt_offset, img.rt_entries * 8)
    for i in range(img.l1_size):
        off = img.l1[i] & Q2_L1E_OFFSET_MASK
        if st == Q2_OK and off:
            st = guard_add(img, HOLDS_L2, off >> img.geo.cluster_bits, 1)
    return st


cdef q2_status guard_refblocks(ImageState img) noexcept nogil:
    cdef uint64_t i, off
    cdef q2_status st = Q2_OK
    for i in range(img.rt_entries):
        off = img.rt[i] & Q2_RTE_OFFSET_MASK
        if st == Q2_OK and off:
            st = guard_add(img, HOLDS_REFBLOCK, off >> img.geo.cluster_bits, 1)
    return st


cdef q2_status guard_write(ImageState img, uint64_t host_off, uint64_t nbytes) noexcept nogil:
    cdef uint64_t cluster, last
    if img.guarded.n == 0 or nbytes == 0:
        return Q2_OK
    last = (host_off + nbytes - 1) >> img.geo.cluster_bits
    for cluster in range(host_off >> img.geo.cluster_bits, last + 1):
        if img.guarded.slot[guard_find(&img.guarded, cluster)]:
            q2_store(&img.damaged, 1)
            return fail(Q2_E_CORRUPT, Q2_SITE_DATA_WRITE, cluster << img.geo.cluster_bits,
                        b"a write of guest data would have overwritten a table of the image")
    return Q2_OK


cdef q2_status guard_table_write(ImageState img, uint32_t holds, uint64_t host_off) noexcept nogil:
    cdef uint64_t found
    if img.guarded.n == 0:
        return Q2_OK
    found = img.guarded.slot[guard_find(&img.guarded, host_off >> img.geo.cluster_bits)] & 7
    if found == 0 or found == holds:
        return Q2_OK
    q2_store(&img.damaged, 1)
    return fail(Q2_E_CORRUPT, Q2_SITE_L2_UPDATE, host_off,
                b"a table of the image lies where another table is")
