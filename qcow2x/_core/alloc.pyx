# cython: language_level=3
"""Host clusters: finding free ones, raising and lowering their refcounts."""
from libc.stdint cimport uint8_t, uint32_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy

from qcow2x._core.cache cimport cache_dirty, cache_drop, cache_get, q2_slot
from qcow2x._core.edges cimport *
from qcow2x._core.errors cimport fail, fail_entry
from qcow2x._core.metadata cimport MISSING_DIRTY_BIT, MISSING_REFTABLE, missing_refblock
from qcow2x._core.overlap cimport (HOLDS_FIXED, HOLDS_REFBLOCK, guard_add, guard_remove,
                                   guard_table_write, guard_write)
from qcow2x._core.refblock cimport get_refcount, set_refcount
from qcow2x._core.state cimport poison_unless_full, poison_unless_kept, runs_add
from qcow2x._core.status cimport *
from qcow2x._core.storage cimport WRITE_DEFERRED
from qcow2x._core.sync cimport (q2_add, q2_count, q2_load, q2_raise_to, q2_store,
                                q2_store32)
from qcow2x._core.wire cimport (Q2_HDR_RT_OFFSET, Q2_MAX_HOST_OFFSET, Q2_MAX_RT_BYTES,
                                Q2_RTE_OFFSET_MASK, q2_store_be32, q2_store_be64)


# The cached slice that holds the refcount of `cluster`, and its index in there. *slot is NULL with
# Q2_OK where no refcount block exists: every refcount of its range is 0.
cdef q2_status slice_of(ImageState img, uint64_t cluster, q2_slot **slot, uint64_t *index,
                        uint64_t *miss) noexcept nogil:
    cdef uint64_t rt_idx = cluster >> img.geo.refblock_bits
    cdef uint64_t in_block = cluster & ((<uint64_t>1 << img.geo.refblock_bits) - 1)
    cdef uint32_t per_slice_bits = img.geo.slice_bits + 3 - img.geo.refcount_order
    cdef uint64_t block_off, key
    slot[0] = NULL
    if img.rt is NULL:
        miss[0] = MISSING_REFTABLE
        return Q2_MISS
    if rt_idx >= img.rt_entries:
        return Q2_OK
    block_off = img.rt[rt_idx] & Q2_RTE_OFFSET_MASK
    if block_off == 0:
        return Q2_OK
    if block_off & (img.geo.cluster_size - 1):
        q2_store(&img.damaged, 1)
        return fail_entry(Q2_E_CORRUPT, Q2_SITE_REFBLOCK_LOAD, block_off, rt_idx,
                          b"Refblock offset {offset} unaligned (reftable index: {index})")
    key = block_off + ((in_block >> per_slice_bits) << img.geo.slice_bits)
    index[0] = in_block & ((<uint64_t>1 << per_slice_bits) - 1)
    slot[0] = cache_get(&img.refblocks, key)
    if slot[0] is NULL:
        miss[0] = missing_refblock(key)
        return Q2_MISS
    return Q2_OK


cdef inline void put(ImageState img, q2_slot *slot, uint64_t index, uint64_t n,
                     uint64_t value) noexcept nogil:
    cdef uint32_t order = img.geo.refcount_order
    cdef uint64_t i
    for i in range(index, index + n):
        set_refcount(slot.data, order, i, value)
    cache_dirty(&img.refblocks, slot, <uint32_t>((index << order) >> 3),
                <uint32_t>((((index + n) << order) + 7) >> 3) - <uint32_t>((index << order) >> 3))
    q2_add(&img.meta_seq, 1)


# The refcount block of `cluster` is only that, so its slices may be changed.
cdef inline q2_status guard_refblock_of(ImageState img, uint64_t cluster) noexcept nogil:
    return guard_table_write(img, HOLDS_REFBLOCK,
                             img.rt[cluster >> img.geo.refblock_bits] & Q2_RTE_OFFSET_MASK)


# The first index >= `at` below `end` whose refcount is 0, or `end`.
cdef uint64_t find_free(ImageState img, const uint8_t *slice, uint64_t at,
                        uint64_t end) noexcept nogil:
    cdef uint32_t order = img.geo.refcount_order
    cdef uint64_t word
    # Opening a full 1 TiB image looks at 16 M refcounts before it finds room: skip the usual
    # 16-bit ones four at a time by the classic test for a zero lane.
    if order == 4:
        while at < end and at & 3:
            if get_refcount(slice, order, at) == 0:
                return at
            at += 1
        while at + 4 <= end:
            memcpy(&word, slice + 2 * at, 8)
            if (word - <uint64_t>0x0001000100010001) & ~word & <uint64_t>0x8000800080008000:
                break
            at += 4
    while at < end and get_refcount(slice, order, at) != 0:
        at += 1
    return at


# The file's last place: a block device ends, and an entry holds 56 bits.
cdef inline uint64_t last_cluster(ImageState img) noexcept nogil:
    if img.file.fixed_size:
        return q2_load(&img.host_size) >> img.geo.cluster_bits
    return Q2_MAX_HOST_OFFSET >> img.geo.cluster_bits


cdef q2_status no_room(ImageState img, uint64_t cluster) noexcept nogil:
    return fail(Q2_E_NOSPC, Q2_SITE_DATA_WRITE, cluster << img.geo.cluster_bits,
                b"no free cluster is left in the storage")


# With lazy refcounts nothing is handed out before the dirty bit is on disk.
cdef inline bint wants_dirty_bit(ImageState img, uint64_t *miss) noexcept nogil:
    if not img.lazy_refcounts or q2_load(&img.lazy_dirty):
        return False
    miss[0] = MISSING_DIRTY_BIT
    return True


cdef q2_status find_run(ImageState img, uint64_t want, uint64_t least, uint64_t *first,
                        uint64_t *got, uint64_t *miss) noexcept nogil:
    """The first run of at least `least` free clusters, cut to `want`; nothing is changed but the
    hints, which move up to what is free, and missing refcount blocks, which are made. After a load
    the search goes on where it was: a disk may have more slices full of small holes than the cache
    holds at once."""
    cdef uint64_t cluster = img.free_hint
    cdef uint64_t per_slice = clusters_per_slice(img)
    cdef uint64_t end = last_cluster(img)
    cdef uint64_t index = 0, at, run, start = 0, length = 0
    cdef q2_slot *slot
    cdef q2_status st
    cdef bint hint_moves = True
    if least > 1 and want >= img.run_want and img.run_from > cluster:
        cluster = img.run_from
        hint_moves = False
    while cluster < end:
        st = slice_of(img, cluster, &slot, &index, miss)
        if st == Q2_MISS and hint_moves and length == 0:
            img.free_hint = cluster
        elif st == Q2_MISS and least > 1:
            img.run_from = start if length else cluster
            img.run_want = want
        if st != Q2_OK:
            return st
        if slot is NULL:
            st = add_refblocks(img, cluster, (start if length else cluster) + want)
            if st != Q2_OK:
                return st
            continue
        while index < per_slice and cluster < end:
            at = find_free(img, slot.data, index, per_slice)
            if at != index:
                length = 0
                cluster += at - index
                index = at
                if hint_moves:
                    img.free_hint = cluster
                continue
            hint_moves = False            # cluster is free: the hint stays at or before it
            if length == 0:
                start = cluster
            run = 0
            while (index + run < per_slice and length + run < want and cluster + run < end
                   and get_refcount(slot.data, img.geo.refcount_order, index + run) == 0):
                run += 1
            length += run
            index += run
            cluster += run
            # Data takes the first hole as it is; a table wants all its clusters in a row.
            if length >= want or (length >= least and (
                    index < per_slice or least == 1)):
                first[0] = start
                got[0] = length
                return Q2_OK
            if cluster >= end:
                break
    return no_room(img, cluster)


# Counts the clusters as handed out and says whether they are fresh. From here on they no longer are,
# also if the write to them fails half way and they come back: so the known end moves now.
cdef bint hand_out(ImageState img, uint64_t first, uint64_t n) noexcept nogil:
    cdef bint fresh = (img.file.zero_past_end and
                       first << img.geo.cluster_bits >= q2_load(&img.host_size))
    if first >= img.gap_first and first + n <= img.gap_end:
        fresh = True
    if first < img.gap_end and first + n > img.gap_first:
        img.gap_first = first + n
    if img.file.listens:
        img.file.reach(Q2_SITE_REFCOUNT_RAISE)
    q2_raise_to(&img.host_size, (first + n) << img.geo.cluster_bits)
    q2_count(&img.count.allocated, n)
    return fresh


cdef q2_status alloc_clusters(ImageState img, uint64_t want, uint64_t *first, uint64_t *got,
                              bint *fresh, uint64_t *miss) noexcept nogil:
    cdef uint64_t index = 0
    cdef q2_slot *slot
    cdef q2_status st
    if img.file.listens:
        img.file.reach(Q2_SITE_CLUSTER_ALLOC)
    if wants_dirty_bit(img, miss):
        return Q2_MISS
    # least == 1 keeps the run inside one slice, so what was found is still cached to be raised.
    st = find_run(img, want, 1, first, got, miss)
    if st != Q2_OK:
        return st
    st = slice_of(img, first[0], &slot, &index, miss)
    if st != Q2_OK:
        return st
    # A refcount of 0 for a table is damage: the allocator must not hand it out.
    st = guard_write(img, first[0] << img.geo.cluster_bits, got[0] << img.geo.cluster_bits)
    if st != Q2_OK:
        return st
    st = guard_refblock_of(img, first[0])
    if st != Q2_OK:
        return st
    put(img, slot, index, got[0], 1)
    img.free_hint = first[0] + got[0]
    fresh[0] = hand_out(img, first[0], got[0])
    return Q2_OK


cdef q2_status alloc_contiguous(ImageState img, uint64_t n, uint64_t *first, bint *fresh,
                                uint64_t *miss) noexcept nogil:
    cdef uint64_t got, i
    cdef q2_slot *slot
    cdef uint64_t index = 0
    cdef q2_status st
    if img.file.listens:
        img.file.reach(Q2_SITE_CLUSTER_ALLOC)
    if wants_dirty_bit(img, miss):
        return Q2_MISS
    if n / clusters_per_slice(img) + 2 > img.refblocks.max_slots:
        return fail(Q2_E_NOMEM, Q2_SITE_REFBLOCK_LOAD, 0,
                    b"the refcounts of so many clusters in a row do not fit into the cache")
    st = find_run(img, n, n, first, &got, miss)
    if st != Q2_OK:
        return st
    st = guard_write(img, first[0] << img.geo.cluster_bits, n << img.geo.cluster_bits)
    if st != Q2_OK:
        return st
    # All slices must be there before the first refcount is raised.
    for i in range(n):
        st = slice_of(img, first[0] + i, &slot, &index, miss)
        if st != Q2_OK:
            return st
    for i in range(n):
        slice_of(img, first[0] + i, &slot, &index, miss)
        put(img, slot, index, 1, 1)
    if first[0] == img.free_hint:
        img.free_hint = first[0] + n
    fresh[0] = hand_out(img, first[0], n)
    return Q2_OK


cdef q2_status alloc_packed(ImageState img, uint64_t nbytes, uint64_t *host_off,
                            uint64_t *miss) noexcept nogil:
    cdef uint64_t size = img.geo.cluster_size
    cdef uint64_t used = img.packed_end & (size - 1)
    cdef uint64_t tail, tail_refs, first, got, index
    cdef bint fresh, spill
    cdef q2_slot *slot
    cdef q2_status st
    if img.file.listens:
        img.file.reach(Q2_SITE_CLUSTER_ALLOC_BYTES)
    if used:
        tail = img.packed_end >> img.geo.cluster_bits
        st = get_refcount_of(img, tail, &tail_refs, miss)
        if st != Q2_OK:
            return st
        if tail_refs == 0 or tail_refs >= img.geo.refcount_max:
            used = 0
    if not used:
        st = alloc_clusters(img, 1, &first, &got, &fresh, miss)
        if st != Q2_OK:
            return st
        host_off[0] = first << img.geo.cluster_bits
        img.packed_end = host_off[0] + nbytes
        return Q2_OK
    spill = used + nbytes > size
    if spill:
        # The stream may run on into the next cluster only if that one is free: take what comes
        # first and see whether it is.
        st = alloc_clusters(img, 1, &first, &got, &fresh, miss)
        if st != Q2_OK:
            return st
        if first != tail + 1:
            host_off[0] = first << img.geo.cluster_bits
            img.packed_end = host_off[0] + nbytes
            return Q2_OK
    # alloc_clusters may have grown the refcount structures, but it evicts nothing: the slice of
    # the tail is still cached.
    st = slice_of(img, tail, &slot, &index, miss)
    if st != Q2_OK:
        return st
    put(img, slot, index, 1, tail_refs + 1)
    host_off[0] = img.packed_end
    img.packed_end += nbytes
    return Q2_OK


cdef q2_status get_refcount_of(ImageState img, uint64_t cluster, uint64_t *value,
                               uint64_t *miss) noexcept nogil:
    cdef q2_slot *slot
    cdef uint64_t index = 0
    cdef q2_status st = slice_of(img, cluster, &slot, &index, miss)
    if st != Q2_OK:
        return st
    value[0] = get_refcount(slot.data, img.geo.refcount_order, index) if slot is not NULL else 0
    return Q2_OK


cdef q2_status set_refcount_of(ImageState img, uint64_t cluster, uint64_t value,
                               uint64_t *miss) noexcept nogil:
    cdef q2_slot *slot
    cdef uint64_t index = 0
    cdef q2_status st = slice_of(img, cluster, &slot, &index, miss)
    if st != Q2_OK:
        return st
    if slot is NULL:
        return fail(Q2_E_CORRUPT, Q2_SITE_REFBLOCK_UPDATE, cluster << img.geo.cluster_bits,
                    b"a cluster in use has no refcount block")
    st = guard_refblock_of(img, cluster)
    if st != Q2_OK:
        return st
    put(img, slot, index, 1, value)
    if value == 0 and cluster < img.free_hint:
        img.free_hint = cluster
    if value == 0 and cluster < img.run_from:
        img.run_from = 0
    return Q2_OK


cdef q2_status write_refcount(ImageState img, uint64_t cluster) noexcept nogil:
    cdef q2_slot *slot
    cdef uint64_t index = 0, miss = 0, at
    cdef q2_status st = slice_of(img, cluster, &slot, &index, &miss)
    if st != Q2_OK or slot is NULL:
        return Q2_OK if st == Q2_MISS else st
    at = ((index << img.geo.refcount_order) >> 3) & ~<uint64_t>511
    q2_count(&img.count.metadata_writes, 1)
    return poison_unless_full(img, img.file.write_at(
        Q2_SITE_REFBLOCK_UPDATE, slot.data + at, 512, slot.key + at, WRITE_DEFERRED))


cdef q2_status release_unlinked(ImageState img, uint64_t first, uint64_t n, uint64_t *done,
                                uint64_t *miss) noexcept nogil:
    cdef uint64_t refs
    cdef q2_status st
    while done[0] < n:
        st = get_refcount_of(img, first + done[0], &refs, miss)
        if st == Q2_OK and refs > 0:
            st = set_refcount_of(img, first + done[0], refs - 1, miss)
            # Nothing may be packed behind the last stream of a cluster that is free.
            if refs == 1:
                guard_remove(img, first + done[0], 1)
            if refs == 1 and img.packed_end >> img.geo.cluster_bits == first + done[0]:
                img.packed_end = 0
        if st != Q2_OK:
            return st
        done[0] += 1
    return Q2_OK


# Refcount blocks and the table itself.
#
# Missing blocks go behind the clusters that are about to be handed out, so that these stay in one
# run. All of a range without a block is free, since no refcount could be stored for it.

cdef q2_status write_table(ImageState img, int32_t site, const void *buf, uint64_t nbytes,
                           uint64_t host_off) noexcept nogil:
    cdef q2_status st = img.file.write_at(site, buf, nbytes, host_off, WRITE_DEFERRED)
    # Also of a write that failed something may be there: no place for a fresh cluster.
    q2_raise_to(&img.host_size, host_off + nbytes)
    if st == Q2_OK:
        q2_count(&img.count.metadata_writes, 1)
    if site == Q2_SITE_REFBLOCK_ALLOC_WRITE or site == Q2_SITE_REFTABLE_GROW_WRITE:
        return poison_unless_kept(img, st)
    return poison_unless_full(img, st)


cdef q2_status barrier(ImageState img) noexcept nogil:
    q2_count(&img.count.barriers, 1)
    return poison_unless_full(img, img.file.sync(Q2_SITE_BARRIER))


# How many refcount blocks the ranges from `first` on lack, if clusters up to `end` and, right behind
# them, the blocks themselves are to be described.
cdef uint64_t refblocks_for(ImageState img, uint64_t first, uint64_t end) noexcept nogil:
    cdef uint64_t n = 0, needed = 1
    while needed > n:
        n = needed
        needed = ((end + n - 1) >> img.geo.refblock_bits) - first + 1
    return n


# Writes the entries [first, first + n) of the refcount table, and with them their sectors.
cdef q2_status write_table_entries(ImageState img, uint64_t first, uint64_t n) noexcept nogil:
    cdef uint64_t low = first & ~<uint64_t>63
    cdef uint64_t high = (first + n + 63) & ~<uint64_t>63
    cdef uint64_t i
    cdef uint8_t *sectors = <uint8_t *>calloc(high - low, 8)
    cdef q2_status st
    if sectors is NULL:
        return fail(Q2_E_NOMEM, Q2_SITE_REFTABLE_UPDATE, img.rt_offset, b"out of memory")
    for i in range(low, high if high < img.rt_entries else img.rt_entries):
        q2_store_be64(sectors + 8 * (i - low), img.rt[i])
    st = write_table(img, Q2_SITE_REFTABLE_UPDATE, sectors, (high - low) * 8,
                     img.rt_offset + low * 8)
    free(sectors)
    return st


cdef q2_status add_refblocks(ImageState img, uint64_t cluster, uint64_t end) noexcept nogil:
    """A refcount block for `cluster`, which has none, and for all clusters from there to `end`.

    The blocks lie behind `end`, or, where something is in their way there, one block lies in the
    first cluster of the range that it describes."""
    cdef uint32_t cbits = img.geo.cluster_bits
    cdef uint64_t first = cluster >> img.geo.refblock_bits
    cdef uint64_t n = refblocks_for(img, first, end)
    cdef uint64_t place = end, known_end, i
    cdef uint8_t *blocks
    cdef q2_status st
    if img.file.listens:
        img.file.reach(Q2_SITE_REFBLOCK_ALLOC)
    if first == 0:
        return fail(Q2_E_CORRUPT, Q2_SITE_REFTABLE_READ, img.rt_offset,
                    b"the header's own refcount block is missing")
    if first + n > img.rt_entries and end + n <= last_cluster(img):
        return grow_table(img, first + n)
    if end + n > last_cluster(img):
        n = 0
    for i in range(n):
        if img.rt[first + i] & Q2_RTE_OFFSET_MASK:
            n = 0
            break
    if n == 0:
        if first >= img.rt_entries:
            return grow_table(img, first + 1)
        n = 1
        place = first << img.geo.refblock_bits
        if place >= last_cluster(img):
            return no_room(img, place)
    st = guard_write(img, place << cbits, n << cbits)
    if st != Q2_OK:
        return st
    blocks = <uint8_t *>calloc(n, img.geo.cluster_size)
    if blocks is NULL:
        return fail(Q2_E_NOMEM, Q2_SITE_REFBLOCK_ALLOC_WRITE, place << cbits, b"out of memory")
    for i in range(place, place + n):
        set_refcount(blocks + (((i >> img.geo.refblock_bits) - first) << cbits),
                     img.geo.refcount_order, i & ((<uint64_t>1 << img.geo.refblock_bits) - 1), 1)
    cache_drop(&img.refblocks, place << cbits, n << cbits)
    cache_drop(&img.l2, place << cbits, n << cbits)
    known_end = (q2_load(&img.host_size) + img.geo.cluster_size - 1) >> cbits
    st = write_table(img, Q2_SITE_REFBLOCK_ALLOC_WRITE, blocks, n << cbits, place << cbits)
    free(blocks)
    if img.file.zero_past_end and place > known_end:
        # The file now reaches past clusters that nothing was written to.
        img.gap_first = known_end
        img.gap_end = place
    # Edge: the blocks before the table entries that point to them; the entries before anything
    # that counts on a refcount in the blocks, so both are durable before this returns.
    if st == Q2_OK and q2_keeps(Q2_EDGE_REFBLOCK_BEFORE_REFTABLE):
        st = barrier(img)
    if st != Q2_OK:
        return st
    for i in range(n):
        img.rt[first + i] = (place + i) << cbits
    st = write_table_entries(img, first, n)
    if st == Q2_OK:
        st = barrier(img)
    if st != Q2_OK:
        for i in range(n):
            img.rt[first + i] = 0
        return st
    return guard_add(img, HOLDS_REFBLOCK, place, n)


cdef q2_status grow_table(ImageState img, uint64_t least_entries) noexcept nogil:
    """A larger refcount table, with the blocks that describe it and themselves in front of it, in
    the first clusters that the old table could not describe."""
    cdef uint32_t cbits = img.geo.cluster_bits
    cdef uint64_t per_block = <uint64_t>1 << img.geo.refblock_bits
    cdef uint64_t start = img.rt_entries << img.geo.refblock_bits
    cdef uint64_t entries = img.rt_entries + img.rt_entries // 2
    cdef uint64_t blocks, table_clusters, i, total
    cdef uint64_t *table
    cdef uint8_t *buf
    cdef uint64_t table_off
    cdef uint64_t old_first = img.rt_offset >> cbits
    cdef uint64_t old_n = (img.rt_entries << 3) >> cbits
    cdef q2_status st
    if entries < least_entries:
        entries = least_entries
    # The table must have entries for its own blocks, which depend on its size: a block describes
    # at least 64 clusters (512-byte clusters, 64-bit refcounts), so a few rounds settle it.
    blocks = 1
    while True:
        if entries < img.rt_entries + blocks:
            entries = img.rt_entries + blocks
        table_clusters = ((entries << 3) + img.geo.cluster_size - 1) >> cbits
        if blocks * per_block >= blocks + table_clusters:
            break
        blocks += 1
    entries = (table_clusters << cbits) >> 3
    if entries << 3 > Q2_MAX_RT_BYTES:
        return fail(Q2_E_NOSPC, Q2_SITE_REFTABLE_GROW_WRITE, img.rt_offset,
                    b"the refcount table is at its limit of 8 MiB")
    total = blocks + table_clusters
    if start + total > last_cluster(img):
        return no_room(img, start)
    table = <uint64_t *>calloc(entries, 8)
    buf = <uint8_t *>calloc(total, img.geo.cluster_size)
    if table is NULL or buf is NULL:
        free(table)
        free(buf)
        return fail(Q2_E_NOMEM, Q2_SITE_REFTABLE_GROW_WRITE, start << cbits, b"out of memory")
    memcpy(table, img.rt, img.rt_entries * 8)
    for i in range(total):
        set_refcount(buf + ((i >> img.geo.refblock_bits) << cbits), img.geo.refcount_order,
                     i & (per_block - 1), 1)
    for i in range(blocks):
        table[img.rt_entries + i] = (start + i) << cbits
    for i in range(entries):
        q2_store_be64(buf + (blocks << cbits) + 8 * i, table[i])
    cache_drop(&img.refblocks, start << cbits, total << cbits)
    cache_drop(&img.l2, start << cbits, total << cbits)
    st = write_table(img, Q2_SITE_REFTABLE_GROW_WRITE, buf, total << cbits, start << cbits)
    free(buf)
    # Edge: the whole new table before the header that points to it.
    if st == Q2_OK and q2_keeps(Q2_EDGE_REFTABLE_BEFORE_HEADER):
        st = barrier(img)
    if st == Q2_OK:
        table_off = (start + blocks) << cbits
        q2_store_be64(img.head + Q2_HDR_RT_OFFSET, table_off)
        q2_store_be32(img.head + Q2_HDR_RT_OFFSET + 8, <uint32_t>table_clusters)
        st = write_table(img, Q2_SITE_REFTABLE_GROW_ACTIVATE, img.head, 512, 0)
        if st == Q2_OK:
            st = barrier(img)
        if st != Q2_OK:
            q2_store_be64(img.head + Q2_HDR_RT_OFFSET, img.rt_offset)
            q2_store_be32(img.head + Q2_HDR_RT_OFFSET + 8, <uint32_t>old_n)
    if st != Q2_OK:
        free(table)
        return st
    free(img.rt)
    img.rt = table
    img.rt_entries = entries
    img.rt_offset = table_off
    q2_store(&img.header.fields.rt_offset, table_off)
    q2_store32(&img.header.fields.rt_clusters, <uint32_t>table_clusters)
    st = guard_add(img, HOLDS_REFBLOCK, start, blocks)
    if st == Q2_OK:
        st = guard_add(img, HOLDS_FIXED, start + blocks, table_clusters)
    if st != Q2_OK:
        return st
    # The old table is durably unreferenced; no request reads it, but its refcount must drop.
    return runs_add(&img.limbo[img.epoch & 1], old_first, old_n)
