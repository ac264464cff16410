# cython: language_level=3
"""Refcounts of everything below an L1 table at once, block by block.

A snapshot of 1 TiB at 64 KiB clusters refers to 16 million clusters whose refcounts fill 512 blocks.
Taken one cluster at a time through a cache that is a day's work of lookups; here all blocks of a
window are read once, changed in memory, and written once, in order.
"""
from libc.stdint cimport uint8_t, uint32_t
from libc.stdlib cimport calloc, free, malloc

from qcow2x._core.errors cimport fail
from qcow2x._core.l2table cimport *
from qcow2x._core.metadata cimport MISSING_REFTABLE, load_slice_committing
from qcow2x._core.refblock cimport get_refcount, set_refcount
from qcow2x._core.state cimport poison_unless_full, runs_add
from qcow2x._core.status cimport *
from qcow2x._core.storage cimport WRITE_DEFERRED
from qcow2x._core.sync cimport q2_count, q2_load
from qcow2x._core.wire cimport Q2_MAX_RT_BYTES, Q2_L1E_OFFSET_MASK, Q2_OFLAG_COPIED, Q2_RTE_OFFSET_MASK

cdef enum:
    # Refcount blocks in memory at a time: 2 TiB of file at 64 KiB clusters and 16 bits.
    WINDOW_BYTES = 64 << 20


# The refcount blocks rt[first_block .. first_block + n_blocks).
cdef struct q2_window:
    uint64_t first_block
    uint64_t n_blocks
    uint8_t **block          # NULL where the table has none
    uint8_t *changed
    uint64_t first_cl
    uint64_t end_cl
    uint64_t known_end       # no cluster from here on is described by any block


cdef uint64_t blocks_at_once(ImageState img) noexcept nogil:
    cdef uint64_t n = <uint64_t>WINDOW_BYTES >> img.geo.cluster_bits
    return n if n else 1


# Blocks that can describe a cluster of the file; entries past them are unused.
cdef uint64_t blocks_of_file(ImageState img) noexcept nogil:
    cdef uint64_t clusters = (q2_load(&img.host_size) + img.geo.cluster_size - 1
                              ) >> img.geo.cluster_bits
    cdef uint64_t n = (clusters + (<uint64_t>1 << img.geo.refblock_bits) - 1
                       ) >> img.geo.refblock_bits
    return n if n < img.rt_entries else img.rt_entries


cdef void close_window(q2_window *w) noexcept nogil:
    cdef uint64_t i
    if w.block is not NULL:
        for i in range(w.n_blocks):
            free(w.block[i])
    free(w.block)
    free(w.changed)
    w.block = NULL
    w.changed = NULL


cdef q2_status open_window(ImageState img, uint64_t first_block, q2_window *w) noexcept nogil:
    cdef uint64_t i, host_off
    cdef q2_status st
    w.first_block = first_block
    w.n_blocks = blocks_of_file(img) - first_block
    if w.n_blocks > blocks_at_once(img):
        w.n_blocks = blocks_at_once(img)
    w.first_cl = first_block << img.geo.refblock_bits
    w.end_cl = (first_block + w.n_blocks) << img.geo.refblock_bits
    w.known_end = blocks_of_file(img) << img.geo.refblock_bits
    w.block = <uint8_t **>calloc(w.n_blocks + 1, sizeof(uint8_t *))
    w.changed = <uint8_t *>calloc(w.n_blocks + 1, 1)
    if w.block is NULL or w.changed is NULL:
        close_window(w)
        return fail(Q2_E_NOMEM, Q2_SITE_REFBLOCK_LOAD, 0, b"no memory for refcount blocks")
    for i in range(w.n_blocks):
        host_off = img.rt[first_block + i] & Q2_RTE_OFFSET_MASK
        if host_off == 0:
            continue
        w.block[i] = <uint8_t *>malloc(img.geo.cluster_size)
        if w.block[i] is NULL:
            st = fail(Q2_E_NOMEM, Q2_SITE_REFBLOCK_LOAD, host_off,
                      b"no memory for refcount blocks")
        else:
            st = img.file.read_at(Q2_SITE_REFBLOCK_LOAD, w.block[i], img.geo.cluster_size,
                                  host_off)
        if st != Q2_OK:
            close_window(w)
            return st
    return Q2_OK


cdef q2_status write_window(ImageState img, const q2_window *w) noexcept nogil:
    cdef uint64_t i
    cdef q2_status st
    for i in range(w.n_blocks):
        if not w.changed[i]:
            continue
        st = poison_unless_full(img, img.file.write_at(
            Q2_SITE_REFBLOCK_UPDATE, w.block[i], img.geo.cluster_size,
            img.rt[w.first_block + i] & Q2_RTE_OFFSET_MASK, WRITE_DEFERRED))
        if st != Q2_OK:
            return st
        q2_count(&img.count.metadata_writes, 1)
    return Q2_OK


cdef inline uint8_t *block_of(ImageState img, const q2_window *w, uint64_t cluster,
                              uint64_t *index) noexcept nogil:
    index[0] = cluster & ((<uint64_t>1 << img.geo.refblock_bits) - 1)
    return w.block[(cluster >> img.geo.refblock_bits) - w.first_block]


cdef q2_status shift_one(ImageState img, q2_window *w, uint64_t cluster, int32_t delta,
                         q2_runs *freed) noexcept nogil:
    cdef uint64_t index, refs
    cdef uint8_t *block
    if delta > 0 and cluster >= w.known_end:
        # A file that was cut short, or an entry that is damaged: a snapshot could not count it.
        if cluster >> img.geo.refblock_bits >= Q2_MAX_RT_BYTES // 8:
            return fail(Q2_E_LIMIT, Q2_SITE_REFBLOCK_UPDATE, cluster << img.geo.cluster_bits,
                        b"a cluster in use lies where the longest refcount table does not reach")
        return fail(Q2_E_CORRUPT, Q2_SITE_REFBLOCK_UPDATE, cluster << img.geo.cluster_bits,
                    b"a cluster in use lies where no refcount is; check and repair the image first")
    if cluster < w.first_cl or cluster >= w.end_cl:
        return Q2_OK
    block = block_of(img, w, cluster, &index)
    refs = get_refcount(block, img.geo.refcount_order, index) if block is not NULL else 0
    if refs == 0:
        return fail(Q2_E_CORRUPT, Q2_SITE_REFBLOCK_UPDATE, cluster << img.geo.cluster_bits,
                    b"a cluster in use has refcount 0; check and repair the image first")
    if delta > 0 and refs == img.geo.refcount_max:
        return fail(Q2_E_UNSUPPORTED, Q2_SITE_REFBLOCK_UPDATE, cluster << img.geo.cluster_bits,
                    b"refcounts of this width cannot count one more reference")
    set_refcount(block, img.geo.refcount_order, index, refs + delta)
    w.changed[(cluster >> img.geo.refblock_bits) - w.first_block] = 1
    if refs == 1 and delta < 0:
        return runs_add(freed, cluster, 1)
    return Q2_OK


cdef q2_status shift_entry(ImageState img, q2_window *w, q2_l2e e, int32_t delta,
                           q2_runs *freed) noexcept nogil:
    cdef uint64_t cluster, last
    cdef q2_status st = Q2_OK
    if is_compressed(e):
        cluster = compressed_offset(&img.geo, e) >> img.geo.cluster_bits
        last = (compressed_offset(&img.geo, e) + compressed_bytes(&img.geo, e) - 1
                ) >> img.geo.cluster_bits
        while cluster <= last and st == Q2_OK:
            st = shift_one(img, w, cluster, delta, freed)
            cluster += 1
        return st
    if host_cluster(e) == 0:
        return Q2_OK
    return shift_one(img, w, host_cluster(e) >> img.geo.cluster_bits, delta, freed)


cdef q2_status read_l2(ImageState img, uint64_t l1_entry, uint8_t *table) noexcept nogil:
    cdef uint64_t l2_off = l1_entry & Q2_L1E_OFFSET_MASK
    if l2_off & (img.geo.cluster_size - 1) or l2_off >= q2_load(&img.host_size):
        return fail(Q2_E_CORRUPT, Q2_SITE_L1_READ, l2_off,
                    b"an L1 entry points to no valid place for an L2 table")
    return img.file.read_at(Q2_SITE_L2_LOAD, table, img.geo.cluster_size, l2_off)


cdef q2_status shift_window(ImageState img, q2_window *w, const uint64_t *l1, uint64_t n,
                            int32_t delta, uint8_t *table, q2_runs *freed) noexcept nogil:
    cdef uint64_t i, j
    cdef q2_l2e e
    cdef q2_status st = Q2_OK
    for i in range(n):
        if l1[i] & Q2_L1E_OFFSET_MASK == 0:
            continue
        st = read_l2(img, l1[i], table)
        for j in range(img.geo.l2_entries):
            if st != Q2_OK:
                return st
            e = load_l2e(&img.geo, table + (j << img.geo.l2_entry_bits))
            if e.entry:
                st = shift_entry(img, w, e, delta, freed)
        if st == Q2_OK:
            st = shift_one(img, w, (l1[i] & Q2_L1E_OFFSET_MASK) >> img.geo.cluster_bits, delta,
                           freed)
        if st != Q2_OK:
            return st
    return st


cdef q2_status shift_pass(ImageState img, const uint64_t *l1, uint64_t n, const q2_runs *runs,
                          int32_t delta, bint write, q2_runs *freed) noexcept nogil:
    cdef q2_window w
    cdef uint64_t at = 0, i, c
    cdef uint64_t total = blocks_of_file(img)
    cdef uint8_t *table = <uint8_t *>malloc(img.geo.cluster_size)
    cdef q2_status st = Q2_OK
    if table is NULL:
        return fail(Q2_E_NOMEM, Q2_SITE_L2_LOAD, 0, b"out of memory")
    while at < total and st == Q2_OK:
        st = open_window(img, at, &w)
        if st != Q2_OK:
            break
        st = shift_window(img, &w, l1, n, delta, table, freed)
        if runs is not NULL:
            for i in range(runs.n):
                for c in range(runs.run[i].first, runs.run[i].first + runs.run[i].n):
                    if st == Q2_OK:
                        st = shift_one(img, &w, c, delta, freed)
        if st == Q2_OK and write:
            st = write_window(img, &w)
        at += w.n_blocks
        close_window(&w)
    free(table)
    return st


cdef q2_status shift(ImageState img, const uint64_t *l1, uint64_t n, const q2_runs *runs,
                     int32_t delta, q2_runs *freed) noexcept nogil:
    cdef q2_status st = Q2_OK
    if img.rt is NULL:
        st = load_slice_committing(img, MISSING_REFTABLE)
    # With several windows a refcount out of range may show up after the first were written: look
    # through all of them first.
    if st == Q2_OK and blocks_of_file(img) > blocks_at_once(img):
        st = shift_pass(img, l1, n, runs, delta, False, freed)
        freed.n = 0
    if st == Q2_OK:
        st = shift_pass(img, l1, n, runs, delta, True, freed)
    return st


cdef q2_status shift_refcounts(ImageState img, const uint64_t *l1, uint64_t n, int32_t delta,
                               q2_runs *freed) noexcept nogil:
    return shift(img, l1, n, NULL, delta, freed)


cdef q2_status shift_runs(ImageState img, const q2_runs *runs, int32_t delta,
                          q2_runs *freed) noexcept nogil:
    return shift(img, NULL, 0, runs, delta, freed)


cdef inline bint refcount_is_one(ImageState img, const q2_window *w, uint64_t cluster) noexcept nogil:
    cdef uint64_t index
    cdef uint8_t *block = block_of(img, w, cluster, &index)
    return block is not NULL and get_refcount(block, img.geo.refcount_order, index) == 1


cdef bint refresh_table(ImageState img, const q2_window *w, uint8_t *table) noexcept nogil:
    """The L2 entries whose cluster the window describes; True if any changed."""
    cdef uint64_t j, cluster
    cdef uint8_t *at = table
    cdef q2_l2e e
    cdef uint64_t entry
    cdef bint changed = False
    for j in range(img.geo.l2_entries):
        e = load_l2e(&img.geo, at)
        if not is_compressed(e) and host_cluster(e):
            cluster = host_cluster(e) >> img.geo.cluster_bits
            if w.first_cl <= cluster < w.end_cl:
                entry = e.entry & ~Q2_OFLAG_COPIED
                if refcount_is_one(img, w, cluster):
                    entry |= Q2_OFLAG_COPIED
                if entry != e.entry:
                    e.entry = entry
                    store_l2e(&img.geo, at, e)
                    changed = True
        at += <uint64_t>1 << img.geo.l2_entry_bits
    return changed


cdef q2_status refresh_window(ImageState img, const q2_window *w, uint64_t *l1, uint64_t n,
                              uint8_t *table) noexcept nogil:
    cdef uint64_t i, l2_off
    cdef q2_status st
    for i in range(n):
        l2_off = l1[i] & Q2_L1E_OFFSET_MASK
        if l2_off == 0:
            continue
        st = read_l2(img, l1[i], table)
        if st == Q2_OK and refresh_table(img, w, table):
            st = poison_unless_full(img, img.file.write_at(
                Q2_SITE_L2_UPDATE, table, img.geo.cluster_size, l2_off, WRITE_DEFERRED))
            q2_count(&img.count.metadata_writes, 1)
        if st != Q2_OK:
            return st
        if w.first_cl <= l2_off >> img.geo.cluster_bits < w.end_cl:
            l1[i] &= ~Q2_OFLAG_COPIED
            if refcount_is_one(img, w, l2_off >> img.geo.cluster_bits):
                l1[i] |= Q2_OFLAG_COPIED
    return Q2_OK


cdef q2_status refresh_copied(ImageState img, uint64_t *l1, uint64_t n) noexcept nogil:
    cdef q2_window w
    cdef uint64_t at = 0
    cdef uint64_t total = blocks_of_file(img)
    cdef uint8_t *table = <uint8_t *>malloc(img.geo.cluster_size)
    cdef q2_status st = Q2_OK
    if table is NULL:
        return fail(Q2_E_NOMEM, Q2_SITE_L2_LOAD, 0, b"out of memory")
    while at < total and st == Q2_OK:
        st = open_window(img, at, &w)
        if st != Q2_OK:
            break
        st = refresh_window(img, &w, l1, n, table)
        at += w.n_blocks
        close_window(&w)
    free(table)
    return st
