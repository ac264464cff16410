# cython: language_level=3
"""Guest offset to host offset: lookups that only look, and the L2 tables behind them."""
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy

from qcow2x._core.alloc cimport alloc_clusters, release_unlinked, write_refcount
from qcow2x._core.cache cimport (RANK_REFBLOCK, cache_after, cache_begin_load, cache_dirty,
                                 cache_drop, cache_end_load, cache_get, q2_cache)
from qcow2x._core.condensed cimport condensed_entry
from qcow2x._core.errors cimport fail, fail_entry
from qcow2x._core.geometry cimport l1_index, l2_index
from qcow2x._core.l2table cimport *
from qcow2x._core.metadata cimport missing_l2
from qcow2x._core.overlap cimport HOLDS_L2, guard_add, guard_table_write
from qcow2x._core.plan cimport (Q2_KIND_COMPRESSED, Q2_KIND_DATA, Q2_KIND_UNALLOCATED,
                                Q2_PLAN_MAX)
from qcow2x._core.state cimport poison_unless_kept, runs_add
from qcow2x._core.status cimport *
from qcow2x._core.storage cimport WRITE_DEFERRED, q2_extent
from qcow2x._core.sync cimport q2_add, q2_count, q2_load, q2_raise_to, q2_store
from qcow2x._core.wire cimport (Q2_L1E_OFFSET_MASK, Q2_OFLAG_COMPRESSED, Q2_OFLAG_COPIED,
                                Q2_OFLAG_ZERO)


cdef inline bint append(q2_plan *plan, bint for_write, uint8_t kind, uint64_t guest_off,
                        uint64_t nbytes, uint64_t host_off, uint32_t comp_bytes,
                        bint in_place) noexcept nogil:
    """Adds a run to the plan, as part of the last extent if it continues it. False: no room."""
    cdef q2_extent *last
    if plan.n:
        last = &plan.extent[plan.n - 1]
        # Host offset 0 means no place, except for data, which in a data file may begin there.
        if (last.kind == kind and kind != Q2_KIND_COMPRESSED
                and (host_off == 0 if last.host_off == 0 and kind != Q2_KIND_DATA
                     else last.host_off + last.nbytes == host_off)
                and (not for_write or last.in_place == in_place)):
            last.nbytes += nbytes
            plan.nbytes += nbytes
            return True
    if plan.n == Q2_PLAN_MAX:
        return False
    last = &plan.extent[plan.n]
    last.guest_off = guest_off
    last.nbytes = nbytes
    last.host_off = host_off
    last.comp_bytes = comp_bytes
    last.kind = kind
    last.in_place = in_place
    plan.n += 1
    plan.nbytes += nbytes
    return True


cdef q2_status check_host_cluster(ImageState img, uint64_t host_off,
                                  uint64_t guest_off) noexcept nogil:
    if host_off & (img.geo.cluster_size - 1):
        return fail(Q2_E_CORRUPT, Q2_SITE_L2_LOAD, guest_off,
                    b"L2 entry of this guest offset is not cluster aligned")
    if img.geo.external_data:
        # Each cluster has one place there; a data file that is too short reads as zeros.
        if host_off != guest_off & ~(img.geo.cluster_size - 1):
            return fail(Q2_E_CORRUPT, Q2_SITE_L2_LOAD, guest_off,
                        b"L2 entry of this guest offset names another place in the data file")
        return Q2_OK
    if host_off >= q2_load(&img.host_size):
        return fail(Q2_E_CORRUPT, Q2_SITE_L2_LOAD, guest_off,
                    b"L2 entry of this guest offset points past the end of the file")
    return Q2_OK


cdef q2_status l2_table_offset(ImageState img, uint64_t l1_idx, uint64_t *l2_off) noexcept nogil:
    cdef uint64_t off
    l2_off[0] = 0
    if l1_idx >= img.l1_size:
        # Nothing is mapped there: a snapshot's table is shorter than its disk, or the disk became
        # shorter since the request was let in.
        return Q2_OK
    off = img.l1[l1_idx] & Q2_L1E_OFFSET_MASK
    if off & (img.geo.cluster_size - 1):
        return fail(Q2_E_CORRUPT, Q2_SITE_L1_READ, img.l1_offset + 8 * l1_idx,
                    b"L1 entry is not cluster aligned")
    if off and off >= q2_load(&img.host_size):
        return fail(Q2_E_CORRUPT, Q2_SITE_L1_READ, img.l1_offset + 8 * l1_idx,
                    b"L1 entry points past the end of the file")
    l2_off[0] = off
    return Q2_OK


cdef inline uint64_t index_in_slice(ImageState img, uint64_t guest_off) noexcept nogil:
    return l2_index(&img.geo, guest_off) & (
        (<uint64_t>1 << (img.geo.slice_bits - img.geo.l2_entry_bits)) - 1)


cdef q2_status find_entry(ImageState img, uint64_t guest_cl, q2_slot **slot, uint8_t **at,
                          uint64_t *entries_left, uint64_t *miss) noexcept nogil:
    cdef uint64_t guest_off = guest_cl << img.geo.cluster_bits
    cdef uint64_t idx = l2_index(&img.geo, guest_off)
    cdef uint64_t l2_off = 0, key, in_slice
    cdef q2_status st = l2_table_offset(img, l1_index(&img.geo, guest_off), &l2_off)
    slot[0] = NULL
    if st != Q2_OK:
        return st
    if l2_off == 0:
        entries_left[0] = img.geo.l2_entries - idx
        return Q2_OK
    in_slice = (idx << img.geo.l2_entry_bits) & ((<uint64_t>1 << img.geo.slice_bits) - 1)
    key = l2_off + (idx << img.geo.l2_entry_bits) - in_slice
    entries_left[0] = ((<uint64_t>1 << img.geo.slice_bits) - in_slice) >> img.geo.l2_entry_bits
    slot[0] = cache_get(&img.l2, key)
    if slot[0] is NULL:
        miss[0] = missing_l2(key)
        return Q2_MISS
    at[0] = slot[0].data + in_slice
    return Q2_OK


cdef inline bint l2_table_is_ours(ImageState img, uint64_t guest_cl) noexcept nogil:
    return (img.l1[l1_index(&img.geo, guest_cl << img.geo.cluster_bits)] & Q2_OFLAG_COPIED) != 0


cdef bint entry_is_ours(ImageState img, uint64_t guest_cl, q2_l2e e) noexcept nogil:
    # COPIED of the L2 entry speaks for the data cluster, that of the L1 entry for the table; a
    # snapshot clears both, and the entries below a shared table say nothing reliable.
    return (e.entry & Q2_OFLAG_COPIED) != 0 and l2_table_is_ours(img, guest_cl)


cdef q2_status invalid_entry(ImageState img, uint64_t guest_cl, bint for_write) noexcept nogil:
    """A subcluster that is both allocated and zero, or one that is allocated in no cluster."""
    cdef uint64_t guest_off = guest_cl << img.geo.cluster_bits
    cdef uint64_t l2_off = img.l1[l1_index(&img.geo, guest_off)] & Q2_L1E_OFFSET_MASK
    q2_store(&img.damaged, 1)
    # The second space is QEMU's.
    return fail_entry(Q2_E_CORRUPT, Q2_SITE_L2_LOAD, l2_off, l2_index(&img.geo, guest_off),
                      b"Invalid cluster entry found (L2 offset: {offset}, L2 index: {index})"
                      if for_write else
                      b"Invalid cluster entry found  (L2 offset: {offset}, L2 index: {index})")


cdef q2_status plan_range(ImageState img, uint64_t guest_off, uint64_t nbytes, bint for_write,
                          q2_plan *plan, uint64_t *miss) noexcept nogil:
    cdef uint64_t pos = guest_off
    cdef uint64_t end = guest_off + nbytes
    cdef uint64_t cluster_end, entries_left, guest_cl, run, host_off, in_cluster
    cdef uint32_t sc, sc_run, comp
    cdef uint8_t *at = NULL
    cdef q2_slot *slot
    cdef q2_l2e e
    cdef uint8_t kind
    cdef bint ours
    cdef q2_status st
    plan.n = 0
    plan.nbytes = 0
    guest_cl = pos >> img.geo.cluster_bits
    # Most requests lie in one cluster that is simply there, or simply not, and are half as long under way
    # by this.
    if img.geo.subclusters == 1 and (end - 1) >> img.geo.cluster_bits == guest_cl:
        st = find_entry(img, guest_cl, &slot, &at, &entries_left, miss)
        e.entry = e.bitmap = 0
        if st == Q2_OK:
            if slot is not NULL:
                e = load_l2e(&img.geo, at)
        elif st != Q2_MISS or not condensed_entry(&img.l2.condensed, miss[0],
                                                  index_in_slice(img, pos), &e.entry):
            return st
        if e.entry == 0:
            append(plan, for_write, Q2_KIND_UNALLOCATED, pos, nbytes, 0, 0, False)
            return Q2_OK
        host_off = host_cluster(e)
        if e.entry & (Q2_OFLAG_COMPRESSED | Q2_OFLAG_ZERO) == 0 and host_off:
            st = check_host_cluster(img, host_off, pos)
            if st == Q2_OK:
                append(plan, for_write, Q2_KIND_DATA, pos, nbytes,
                       host_off + (pos & (img.geo.cluster_size - 1)), 0,
                       entry_is_ours(img, guest_cl, e))
            return st
    while pos < end:
        guest_cl = pos >> img.geo.cluster_bits
        st = find_entry(img, guest_cl, &slot, &at, &entries_left, miss)
        if st != Q2_OK:
            return Q2_OK if st == Q2_MISS and plan.n else st
        if slot is NULL:
            run = ((guest_cl + entries_left) << img.geo.cluster_bits) - pos
            if run > end - pos:
                run = end - pos
            if not append(plan, for_write, Q2_KIND_UNALLOCATED, pos, run, 0, 0, False):
                return Q2_OK
            pos += run
            continue
        while entries_left and pos < end:
            e = load_l2e(&img.geo, at)
            guest_cl = pos >> img.geo.cluster_bits
            cluster_end = (guest_cl + 1) << img.geo.cluster_bits
            if not is_compressed(e) and e.bitmap & (e.bitmap >> 32):
                return invalid_entry(img, guest_cl, for_write)
            ours = entry_is_ours(img, guest_cl, e)
            while pos < cluster_end and pos < end:
                in_cluster = pos & (img.geo.cluster_size - 1)
                sc = <uint32_t>(in_cluster >> img.geo.subcluster_bits)
                kind = subcluster_kind(&img.geo, e, sc)
                sc_run = subcluster_run(&img.geo, e, sc)
                run = (<uint64_t>(sc + sc_run) << img.geo.subcluster_bits) - in_cluster
                if run > end - pos:
                    run = end - pos
                comp = 0
                if kind == Q2_KIND_COMPRESSED:
                    host_off = compressed_offset(&img.geo, e)
                    comp = compressed_bytes(&img.geo, e)
                    if host_off >= q2_load(&img.host_size):
                        return fail(Q2_E_CORRUPT, Q2_SITE_L2_LOAD, pos,
                                    b"compressed cluster of this guest offset lies past the end"
                                    b" of the file")
                else:
                    host_off = host_cluster(e)
                    if has_cluster(&img.geo, e):
                        if kind != Q2_KIND_UNALLOCATED:
                            st = check_host_cluster(img, host_off, pos)
                            if st != Q2_OK:
                                return st
                            host_off += in_cluster
                        else:
                            host_off = 0
                    elif kind == Q2_KIND_DATA:
                        return invalid_entry(img, guest_cl, for_write)
                if not append(plan, for_write, kind, pos, run, host_off, comp, ours):
                    return Q2_OK
                pos += run
            at += <uint64_t>1 << img.geo.l2_entry_bits
            entries_left -= 1
    return Q2_OK


cdef q2_status copy_old_table(ImageState img, uint64_t old_off, uint8_t *table) noexcept nogil:
    """The table as it is now: what is cached may be newer than the file."""
    cdef uint64_t slice_bytes = <uint64_t>1 << img.geo.slice_bits
    cdef uint64_t done = 0
    cdef q2_slot *slot
    cdef q2_status st = img.file.read_at(Q2_SITE_L2_ALLOC_COW_READ, table, img.geo.cluster_size,
                                         old_off)
    while st == Q2_OK and done < img.geo.cluster_size:
        slot = cache_get(&img.l2, old_off + done)
        if slot is not NULL:
            memcpy(table + done, slot.data, slice_bytes)
        done += slice_bytes
    return st


cdef void cache_new_table(ImageState img, const uint8_t *table, uint64_t host_off,
                          uint64_t guest_cl) noexcept nogil:
    """meta, exclusive: the slice that is about to be changed need not be read back, if there is room
    for it."""
    cdef uint64_t at = l2_index(&img.geo, guest_cl << img.geo.cluster_bits) << img.geo.l2_entry_bits
    cdef q2_slot *slot = NULL
    cdef bint already
    at &= ~((<uint64_t>1 << img.geo.slice_bits) - 1)
    if cache_begin_load(&img.l2, host_off + at, &slot, &already) == Q2_OK and not already:
        memcpy(slot.data, table + at, <size_t>1 << img.geo.slice_bits)
        cache_end_load(&img.l2, slot, True)


cdef q2_status ensure_l2_table(ImageState img, uint64_t guest_cl, uint64_t *miss) noexcept nogil:
    cdef uint64_t l1_idx = l1_index(&img.geo, guest_cl << img.geo.cluster_bits)
    cdef uint64_t old_off = 0, first = 0, got = 0, new_off
    cdef uint8_t *table
    cdef uint64_t released = 0
    cdef bint fresh
    cdef q2_status st = l2_table_offset(img, l1_idx, &old_off)
    if st != Q2_OK:
        return st
    if l1_idx >= img.l1_size:
        return fail(Q2_E_RANGE, Q2_SITE_NONE, guest_cl << img.geo.cluster_bits,
                    b"the range reaches past the disk's end, which has moved meanwhile")
    if old_off and img.l1[l1_idx] & Q2_OFLAG_COPIED:
        return guard_table_write(img, HOLDS_L2, old_off)
    table = <uint8_t *>calloc(1, img.geo.cluster_size)
    if table is NULL:
        return fail(Q2_E_NOMEM, Q2_SITE_L2_ALLOC_WRITE, old_off, b"out of memory")
    if old_off:
        st = copy_old_table(img, old_off, table)
    if st == Q2_OK:
        st = alloc_clusters(img, 1, &first, &got, &fresh, miss)
        if st == Q2_E_CORRUPT and first == 0:
            fail(st, Q2_SITE_L2_ALLOC_WRITE, 0,
                 b"Preventing invalid allocation of L2 table at offset 0")
    if st == Q2_OK:
        new_off = first << img.geo.cluster_bits
        cache_drop(&img.l2, new_off, img.geo.cluster_size)
        st = poison_unless_kept(img, img.file.write_at(
            Q2_SITE_L2_ALLOC_WRITE, table, img.geo.cluster_size, new_off, WRITE_DEFERRED))
        if st == Q2_OK:
            # Edge: the table (and its refcount) before the L1 entry. L1 is written last in every
            # write-back, behind a barrier that covers table_seq.
            q2_raise_to(&img.table_seq, q2_load(&img.file.write_seq))
            img.l1[l1_idx] = new_off | Q2_OFLAG_COPIED
            img.l1_dirty[(l1_idx * 8) >> 9] = 1
            img.l1_is_dirty = True
            q2_add(&img.meta_seq, 1)
            q2_count(&img.count.metadata_writes, 1)
            cache_new_table(img, table, new_off, guest_cl)
            st = guard_add(img, HOLDS_L2, first, 1)
            if st == Q2_OK and img.lazy_refcounts:
                st = write_refcount(img, first)
            if st == Q2_OK and old_off:
                st = runs_add(&img.dropped, old_off >> img.geo.cluster_bits, 1)
        else:
            # The slice of refcounts is still cached, so this gives the cluster back at once.
            release_unlinked(img, first, 1, &released, miss)
    free(table)
    return st


cdef q2_status entry_changed(ImageState img, q2_slot *slot, uint8_t *at) noexcept nogil:
    cache_dirty(&img.l2, slot, <uint32_t>(at - slot.data), 1 << img.geo.l2_entry_bits)
    q2_add(&img.meta_seq, 1)
    # Edge: the refcounts of what the entry names before the entry.
    return cache_after(&img.l2, slot, RANK_REFBLOCK, 0)


cdef q2_status drop_entry(ImageState img, q2_l2e e) noexcept nogil:
    cdef uint64_t first, last
    if img.geo.external_data:
        return Q2_OK            # nothing there is counted, or used for anything else
    if is_compressed(e):
        first = compressed_offset(&img.geo, e) >> img.geo.cluster_bits
        last = (compressed_offset(&img.geo, e) + compressed_bytes(&img.geo, e) - 1
                ) >> img.geo.cluster_bits
        return runs_add(&img.dropped, first, last - first + 1)
    if not has_cluster(&img.geo, e):
        return Q2_OK
    return runs_add(&img.dropped, host_cluster(e) >> img.geo.cluster_bits, 1)
