# cython: language_level=3
"""Refcounts of another width: the whole structure anew, then one switch."""
from libc.stdint cimport uint8_t, uint64_t
from libc.stdlib cimport calloc, free, malloc, qsort
from libc.string cimport memset

from qcow2x._core.cache cimport cache_forget_all
from qcow2x._core.edges cimport *
from qcow2x._core.errors cimport fail
from qcow2x._core.flush cimport settle_refcounts
from qcow2x._core.geometry cimport q2_geometry, set_geometry
from qcow2x._core.metadata cimport (MISSING_REFTABLE, load_slice_committing, write_back_locked,
                                    write_head)
from qcow2x._core.overlap cimport (HOLDS_FIXED, HOLDS_REFBLOCK, guard_add, guard_remove)
from qcow2x._core.refblock cimport get_refcount, set_refcount
from qcow2x._core.state cimport freeze, poison_unless_full, thaw
from qcow2x._core.status cimport *
from qcow2x._core.storage cimport WRITE_DEFERRED
from qcow2x._core.sync cimport *
from qcow2x._core.wire cimport (Q2_HDR_REFCOUNT_ORDER, Q2_HDR_RT_OFFSET, Q2_MAX_RT_BYTES,
                                Q2_RTE_OFFSET_MASK, q2_store_be32, q2_store_be64)


# The refcounts as they are, read block by block in rising order of clusters.
cdef struct q2_reader:
    uint8_t *block
    uint64_t loaded      # rt index of what `block` holds, + 1
    uint64_t *own        # clusters of the old table and blocks, sorted: they will be free
    uint64_t n_own
    uint64_t next_own


cdef int by_value(const void *a, const void *b) noexcept nogil:
    cdef uint64_t x = (<const uint64_t *>a)[0]
    cdef uint64_t y = (<const uint64_t *>b)[0]
    return -1 if x < y else 1 if x > y else 0


cdef q2_status open_reader(ImageState img, q2_reader *r) noexcept nogil:
    cdef uint64_t table_clusters = (img.rt_entries << 3) >> img.geo.cluster_bits
    cdef uint64_t first = img.rt_offset >> img.geo.cluster_bits
    cdef uint64_t i
    memset(r, 0, sizeof(q2_reader))
    r.block = <uint8_t *>malloc(img.geo.cluster_size)
    r.own = <uint64_t *>malloc((img.rt_entries + table_clusters) * 8)
    if r.block is NULL or r.own is NULL:
        return fail(Q2_E_NOMEM, Q2_SITE_REFBLOCK_LOAD, 0, b"out of memory")
    for i in range(table_clusters):
        r.own[r.n_own] = first + i
        r.n_own += 1
    for i in range(img.rt_entries):
        if img.rt[i] & Q2_RTE_OFFSET_MASK:
            r.own[r.n_own] = (img.rt[i] & Q2_RTE_OFFSET_MASK) >> img.geo.cluster_bits
            r.n_own += 1
    qsort(r.own, r.n_own, 8, by_value)
    return Q2_OK


cdef void close_reader(q2_reader *r) noexcept nogil:
    free(r.block)
    free(r.own)


cdef q2_status old_refcount(ImageState img, q2_reader *r, uint64_t cluster,
                            uint64_t *value) noexcept nogil:
    cdef uint64_t rt_idx = cluster >> img.geo.refblock_bits
    cdef uint64_t host_off
    cdef q2_status st
    value[0] = 0
    if rt_idx >= img.rt_entries:
        return Q2_OK
    host_off = img.rt[rt_idx] & Q2_RTE_OFFSET_MASK
    if host_off == 0:
        return Q2_OK
    if r.loaded != rt_idx + 1:
        st = img.file.read_at(Q2_SITE_REFBLOCK_LOAD, r.block, img.geo.cluster_size, host_off)
        if st != Q2_OK:
            return st
        r.loaded = rt_idx + 1
    while r.next_own < r.n_own and r.own[r.next_own] < cluster:
        r.next_own += 1
    if r.next_own < r.n_own and r.own[r.next_own] == cluster:
        return Q2_OK
    value[0] = get_refcount(r.block, img.geo.refcount_order,
                            cluster & ((<uint64_t>1 << img.geo.refblock_bits) - 1))
    return Q2_OK


cdef q2_status find_end(ImageState img, q2_reader *r, uint64_t limit, uint64_t *end) noexcept nogil:
    """One past the last cluster that the file has or that is counted; every refcount up to it is
    at most `limit`."""
    cdef uint64_t c, value
    cdef uint64_t described = img.rt_entries << img.geo.refblock_bits
    cdef q2_status st
    end[0] = (q2_load(&img.host_size) + img.geo.cluster_size - 1) >> img.geo.cluster_bits
    c = 0
    while c < described:
        if img.rt[c >> img.geo.refblock_bits] & Q2_RTE_OFFSET_MASK == 0:
            c += <uint64_t>1 << img.geo.refblock_bits
            continue
        st = old_refcount(img, r, c, &value)
        if st != Q2_OK:
            return st
        if value > limit:
            return fail(Q2_E_UNSUPPORTED, Q2_SITE_REFBLOCK_LOAD, c << img.geo.cluster_bits,
                        b"a refcount is too large for the new width")
        if value and c >= end[0]:
            end[0] = c + 1
        c += 1
    r.loaded = 0
    r.next_own = 0
    return Q2_OK


cdef q2_status write_blocks(ImageState img, const q2_geometry *g, q2_reader *r, uint64_t start,
                            uint64_t blocks, uint64_t total) noexcept nogil:
    cdef uint64_t per_block = <uint64_t>1 << g.refblock_bits
    cdef uint64_t i, j, c, value
    cdef uint8_t *block = <uint8_t *>malloc(g.cluster_size)
    cdef q2_status st = Q2_OK
    if block is NULL:
        return fail(Q2_E_NOMEM, Q2_SITE_REFBLOCK_ALLOC_WRITE, 0, b"out of memory")
    for i in range(blocks):
        memset(block, 0, g.cluster_size)
        for j in range(per_block):
            c = i * per_block + j
            if c >= start + total:
                break
            if c >= start:
                value = 1
            else:
                st = old_refcount(img, r, c, &value)
                if st != Q2_OK:
                    break
            if value:
                set_refcount(block, g.refcount_order, j, value)
        if st == Q2_OK:
            st = poison_unless_full(img, img.file.write_at(
                Q2_SITE_REFBLOCK_ALLOC_WRITE, block, g.cluster_size,
                (start + i) << g.cluster_bits, WRITE_DEFERRED))
        if st != Q2_OK:
            break
    free(block)
    return st


cdef q2_status rewrite(ImageState img, const q2_geometry *g, q2_reader *r) noexcept nogil:
    """commit held, writers frozen, everything on disk."""
    cdef uint32_t cbits = g.cluster_bits
    cdef uint64_t per_block = <uint64_t>1 << g.refblock_bits
    cdef uint64_t start, blocks = 1, table_clusters = 1, entries, i
    cdef uint64_t *table
    cdef uint64_t *bytes
    cdef q2_status st = find_end(img, r, g.refcount_max, &start)
    if st != Q2_OK:
        return st
    # Blocks describe themselves and the table as well: a few rounds settle how many it takes.
    while blocks * per_block < start + blocks + table_clusters:
        blocks = (start + blocks + table_clusters + per_block - 1) // per_block
        table_clusters = (blocks * 8 + g.cluster_size - 1) >> cbits
    entries = (table_clusters << cbits) >> 3
    if entries << 3 > Q2_MAX_RT_BYTES:
        return fail(Q2_E_UNSUPPORTED, Q2_SITE_REFTABLE_GROW_WRITE, img.rt_offset,
                    b"refcounts of this width need a refcount table of more than 8 MiB")
    if img.file.fixed_size and (start + blocks + table_clusters) << cbits > q2_load(&img.host_size):
        return fail(Q2_E_NOSPC, Q2_SITE_REFTABLE_GROW_WRITE, start << cbits,
                    b"no room for the new refcounts in the storage")
    table = <uint64_t *>calloc(entries, 8)
    bytes = <uint64_t *>calloc(entries, 8)
    if table is NULL or bytes is NULL:
        free(table)
        free(bytes)
        return fail(Q2_E_NOMEM, Q2_SITE_REFTABLE_GROW_WRITE, 0, b"out of memory")
    for i in range(blocks):
        table[i] = (start + i) << cbits
        q2_store_be64(bytes + i, table[i])
    st = write_blocks(img, g, r, start, blocks, blocks + table_clusters)
    if st == Q2_OK:
        st = poison_unless_full(img, img.file.write_at(
            Q2_SITE_REFTABLE_GROW_WRITE, bytes, entries * 8, (start + blocks) << cbits,
            WRITE_DEFERRED))
    free(bytes)
    # Edge: all of the new structure before the header that points to it.
    if st == Q2_OK and q2_keeps(Q2_EDGE_REFCOUNTS_BEFORE_WIDTH):
        st = poison_unless_full(img, img.file.sync(Q2_SITE_BARRIER))
    if st == Q2_OK:
        q2_store_be64(img.head + Q2_HDR_RT_OFFSET, (start + blocks) << cbits)
        q2_store_be32(img.head + Q2_HDR_RT_OFFSET + 8, <uint32_t>table_clusters)
        q2_store_be32(img.head + Q2_HDR_REFCOUNT_ORDER, g.refcount_order)
        # Edge: the header before the old structure is free.
        st = write_head(img, Q2_SITE_REFTABLE_GROW_ACTIVATE, Q2_EDGE_WIDTH_BEFORE_FREED)
    if st != Q2_OK:
        free(table)
        return st
    pthread_rwlock_wrlock(&img.meta)
    free(img.rt)
    img.rt = table
    img.rt_entries = entries
    img.rt_offset = (start + blocks) << cbits
    img.geo = g[0]
    q2_store(&img.header.fields.rt_offset, img.rt_offset)
    q2_store32(&img.header.fields.rt_clusters, <uint32_t>table_clusters)
    img.header.fields.refcount_order = g.refcount_order
    cache_forget_all(&img.refblocks)
    q2_raise_to(&img.host_size, (start + blocks + table_clusters) << cbits)
    img.free_hint = 0
    img.run_from = 0
    img.packed_end = 0
    for i in range(r.n_own):
        guard_remove(img, r.own[i], 1)
    st = guard_add(img, HOLDS_REFBLOCK, start, blocks)
    if st == Q2_OK:
        st = guard_add(img, HOLDS_FIXED, start + blocks, table_clusters)
    pthread_rwlock_unlock(&img.meta)
    # The old structure is free already, by the new one's count.
    for i in range(r.n_own):
        if st == Q2_OK and img.discard_to_host:
            st = img.file.punch_hole(Q2_SITE_PUNCH, r.own[i] << cbits, g.cluster_size)
    return st


cdef q2_status change_refcount_width(ImageState img, uint32_t order) noexcept nogil:
    cdef q2_geometry g = img.geo
    cdef q2_reader r
    cdef q2_status st = freeze(img)
    if st != Q2_OK:
        return st
    set_geometry(&g, img.geo.version, img.geo.cluster_bits, order, img.geo.subclusters > 1)
    memset(&r, 0, sizeof(q2_reader))
    pthread_mutex_lock(&img.commit)
    st = settle_refcounts(img)
    if st == Q2_OK and img.rt is NULL:
        st = load_slice_committing(img, MISSING_REFTABLE)
    if st == Q2_OK:
        st = open_reader(img, &r)
    if st == Q2_OK:
        st = rewrite(img, &g, &r)
    close_reader(&r)
    pthread_mutex_unlock(&img.commit)
    thaw(img)
    return st
