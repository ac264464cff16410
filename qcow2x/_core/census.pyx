# cython: language_level=3
"""Counting references: sections "Cluster mapping" and "Refcounts" of the specification."""
from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc, qsort, realloc
from libc.string cimport memset

from qcow2x._core.errors cimport fail
from qcow2x._core.geometry cimport q2_geometry
from qcow2x._core.l2table cimport (compressed_bytes, compressed_offset, is_compressed, load_l2e,
                                   q2_l2e)
from qcow2x._core.refblock cimport get_refcount, set_refcount
from qcow2x._core.status cimport *
from qcow2x._core.wire cimport (Q2_BITMAP_ALL_ALLOC, Q2_L1E_OFFSET_MASK, Q2_L2E_OFFSET_MASK,
                                Q2_OFLAG_COPIED, Q2_OFLAG_ZERO, Q2_RTE_OFFSET_MASK, q2_load_be64)

cdef extern from "qcow2x/format.h" nogil:
    const uint64_t Q2_L1E_RESERVED_MASK, Q2_L2E_STD_RESERVED_MASK, Q2_RTE_RESERVED_MASK

cdef uint64_t MAX_STORED_PAST_END = <uint64_t>1 << 27     # clusters: 16 MiB of bits
cdef uint64_t NO_GUEST = <uint64_t>NO_GUEST_OFF


# ---- memory and windows -------------------------------------------------------------------------

# Clusters of a window: whole refcount blocks of them, or the whole file.
cdef uint64_t window_for(const q2_census *c, uint64_t max_bytes) noexcept nogil:
    cdef uint64_t n = max_bytes * 8 // ((<uint64_t>8 << c.counter_bits) + 1)
    cdef uint64_t per_block = <uint64_t>1 << c.g.refblock_bits
    if n >= c.n_clusters:
        return c.n_clusters
    return max(n & ~(per_block - 1), per_block)


cdef q2_status census_begin(q2_census *c, uint64_t n_rt, uint64_t max_findings,
                            uint64_t max_bytes) noexcept nogil:
    cdef uint64_t n_stored
    c.counter_bits = 0 if c.g.refcount_order <= 3 else 1 if c.g.refcount_order == 4 else 2
    c.n_clusters = (c.file_size >> c.g.cluster_bits) + 3
    c.n_seen = (c.file_size + c.g.cluster_size - 1) >> c.g.cluster_bits
    c.max_count = min(c.g.refcount_max, <uint64_t>0xffffffff)
    c.n_rt = n_rt
    c.win_first = 0
    c.win_n = window_for(c, max_bytes)
    c.next_used = ~<uint64_t>0
    c.first_pass = True
    # A file that was cut short still has refcounts for what lay behind its end.
    n_stored = min(n_rt << c.g.refblock_bits, MAX_STORED_PAST_END)
    c.n_past = n_stored - c.n_clusters if n_stored > c.n_clusters else 0
    c.max_findings = max_findings
    # calloc takes large arrays as untouched zero pages: a sparse file costs no memory for its
    # holes.
    c.counters = <uint8_t *>calloc(c.win_n, <size_t>1 << c.counter_bits)
    c.stored_one = <uint8_t *>calloc((c.win_n >> 3) + 1, 1)
    c.past_one = <uint8_t *>calloc((c.n_past >> 3) + 1, 1)
    c.rt = <uint64_t *>malloc(n_rt * 8 + 1)
    c.rb_bad = <uint8_t *>calloc(n_rt + 1, 1)
    c.findings = <q2_finding *>malloc(max_findings * sizeof(q2_finding))
    if (c.counters is NULL or c.stored_one is NULL or c.past_one is NULL or c.rt is NULL
            or c.rb_bad is NULL or c.findings is NULL):
        return fail(Q2_E_NOMEM, Q2_SITE_CHECK_READ, 0, b"no memory for the reference counters")
    return Q2_OK


cdef void census_end(q2_census *c) noexcept nogil:
    free(c.counters)
    free(c.stored_one)
    free(c.past_one)
    free(c.rt)
    free(c.rb_bad)
    free(c.l2_refs)
    free(c.findings)
    c.counters = c.stored_one = c.past_one = c.rb_bad = NULL
    c.rt = NULL
    c.l2_refs = NULL
    c.findings = NULL


cdef bint next_window(q2_census *c) noexcept nogil:
    cdef uint64_t rb_idx, first = c.next_used
    cdef uint64_t end = c.win_first + c.win_n
    # A refcount that nothing refers to is a leak to be found as well.
    for rb_idx in range(end >> c.g.refblock_bits, c.n_rt):
        if c.rt[rb_idx] != 0:
            first = min(first, rb_idx << c.g.refblock_bits)
            break
    first &= ~((<uint64_t>1 << c.g.refblock_bits) - 1)
    if end >= c.n_seen or first >= c.n_seen:
        return False
    c.win_first = first
    c.next_used = ~<uint64_t>0
    c.first_pass = False
    memset(c.counters, 0, c.win_n << c.counter_bits)
    memset(c.stored_one, 0, (c.win_n >> 3) + 1)
    return True


cdef inline bint in_window(const q2_census *c, uint64_t host_cl) noexcept nogil:
    # Below the window the difference wraps to a huge number.
    return host_cl - c.win_first < c.win_n


# ---- findings -----------------------------------------------------------------------------------

cdef void note(q2_census *c, int32_t code, uint64_t host_off, uint64_t guest_off,
               uint64_t expected, uint64_t found, uint64_t times) noexcept nogil:
    cdef q2_finding *f
    if not c.first_pass and not (
            code == FOUND_OVERFLOW or code == FOUND_L1_COPIED or code == FOUND_L2_COPIED
            or code == FOUND_RB_SHARED or code == FOUND_REFCOUNT_LOW or code == FOUND_LEAK
            or code == FOUND_RB_UNREADABLE or code == FOUND_READ_ERROR):
        return
    if code == FOUND_LEAK:
        c.leaks += times
    elif code == FOUND_READ_ERROR or code == FOUND_RB_UNREADABLE:
        c.check_errors += times
        c.refs_uncertain = True
        if code != FOUND_RB_UNREADABLE:
            c.refs_hidden = True
    else:
        c.corruptions += times
        if code == FOUND_L1_COPIED or code == FOUND_L2_COPIED:
            c.wrong_flags += times
        # These say something false but still point to what they mean.
        if not (code == FOUND_REFCOUNT_LOW or code == FOUND_L1_COPIED or code == FOUND_L2_COPIED
                or code == FOUND_COMPRESSED_COPIED or code == FOUND_SNAPSHOT_INCOMPLETE
                or code == FOUND_OVERFLOW or code == FOUND_BITMAP_CONTRADICTS):
            c.refs_uncertain = True
            # Damage to the refcounts hides no reference.
            if not (code == FOUND_RT_RESERVED or code == FOUND_RB_MISALIGNED
                    or code == FOUND_RB_BEYOND_END or code == FOUND_RB_SHARED):
                c.refs_hidden = True
    if c.n_findings < c.max_findings:
        f = &c.findings[c.n_findings]
        f.code = code
        f.host_off = host_off
        f.guest_off = guest_off
        f.expected = expected
        f.found = found
        c.n_findings += 1


# ---- counters -----------------------------------------------------------------------------------

cdef inline uint64_t get_count(const q2_census *c, uint64_t host_cl) noexcept nogil:
    cdef uint64_t at = host_cl - c.win_first
    if c.counter_bits == 1:
        return (<const uint16_t *>c.counters)[at]
    if c.counter_bits == 0:
        return c.counters[at]
    return (<const uint32_t *>c.counters)[at]


cdef inline void put_count(q2_census *c, uint64_t host_cl, uint64_t count) noexcept nogil:
    cdef uint64_t at = host_cl - c.win_first
    if c.counter_bits == 1:
        (<uint16_t *>c.counters)[at] = <uint16_t>count
    elif c.counter_bits == 0:
        c.counters[at] = <uint8_t>count
    else:
        (<uint32_t *>c.counters)[at] = <uint32_t>count


cdef inline void count_cluster(q2_census *c, uint64_t host_cl, uint64_t guest_off,
                               uint64_t times) noexcept nogil:
    cdef uint64_t count, room
    if not in_window(c, host_cl):
        if host_cl > c.win_first and host_cl < c.next_used:
            c.next_used = host_cl
        return
    count = get_count(c, host_cl)
    room = c.max_count - count
    if times > room:
        # More references than a refcount of this width can say.
        put_count(c, host_cl, c.max_count)
        note(c, FOUND_OVERFLOW, host_cl << c.g.cluster_bits, guest_off, c.max_count, count + times,
             times - room)
    else:
        put_count(c, host_cl, count + times)


cdef inline bint reaches_past_end(const q2_census *c, uint64_t host_off,
                                  uint64_t nbytes) noexcept nogil:
    # The file's last cluster may be there in part only, so less than a cluster past the end is
    # fine. Written so that no sum can wrap.
    return (nbytes >= c.file_size + c.g.cluster_size
            or host_off >= c.file_size + c.g.cluster_size - nbytes)


cdef void count_region(q2_census *c, uint64_t host_off, uint64_t nbytes, uint64_t guest_off,
                       uint64_t times) noexcept nogil:
    cdef uint64_t host_cl, last
    if nbytes == 0:
        return
    if reaches_past_end(c, host_off, nbytes):
        note(c, FOUND_BEYOND_END, host_off, guest_off, c.file_size, nbytes, times)
        return
    last = (host_off + nbytes - 1) >> c.g.cluster_bits
    for host_cl in range(host_off >> c.g.cluster_bits, last + 1):
        count_cluster(c, host_cl, guest_off, times)
    if last >= c.n_seen:
        c.n_seen = last + 1


cdef inline bint has_refblock_nowhere(const q2_census *c, uint64_t rb_idx) noexcept nogil:
    cdef uint64_t host_off
    if rb_idx >= c.n_rt:
        return False
    host_off = c.rt[rb_idx] & Q2_RTE_OFFSET_MASK
    return host_off & (c.g.cluster_size - 1) != 0 or host_off >> 63 != 0


cdef inline int32_t is_stored_one(const q2_census *c, uint64_t host_cl) noexcept nogil:
    cdef uint64_t at = host_cl - c.win_first
    if at < c.win_n:
        if has_refblock_nowhere(c, host_cl >> c.g.refblock_bits):
            return -1
        return (c.stored_one[at >> 3] >> (at & 7)) & 1
    if host_cl < c.n_clusters or not c.first_pass:
        return -1
    if has_refblock_nowhere(c, host_cl >> c.g.refblock_bits):
        return -1
    at = host_cl - c.n_clusters
    return (c.past_one[at >> 3] >> (at & 7)) & 1 if at < c.n_past else 0


# ---- L1 and L2 tables ---------------------------------------------------------------------------

cdef q2_status note_l2_ref(q2_census *c, uint64_t host_off, uint64_t l1_idx,
                           bint active) noexcept nogil:
    cdef q2_l2_ref *ref
    cdef uint64_t room
    cdef void *grown
    if c.n_l2_refs == c.l2_refs_room:
        # Snapshots mostly share their tables: merging first keeps this to the distinct ones.
        merge_l2_refs(c)
        if c.n_l2_refs >= c.l2_refs_room // 2:
            room = max(<uint64_t>1024, c.l2_refs_room * 2)
            grown = realloc(c.l2_refs, room * sizeof(q2_l2_ref))
            if grown is NULL:
                return fail(Q2_E_NOMEM, Q2_SITE_CHECK_READ, 0, b"no memory to list the L2 tables")
            c.l2_refs = <q2_l2_ref *>grown
            c.l2_refs_room = room
    ref = &c.l2_refs[c.n_l2_refs]
    ref.host_off = host_off
    ref.l1_idx = l1_idx
    ref.refs = 1
    ref.active_refs = 1 if active else 0
    c.n_l2_refs += 1
    return Q2_OK


cdef int compare_l2_refs(const void *a, const void *b) noexcept nogil:
    cdef uint64_t x = (<const q2_l2_ref *>a).host_off
    cdef uint64_t y = (<const q2_l2_ref *>b).host_off
    return -1 if x < y else 1 if x > y else 0


cdef void merge_l2_refs(q2_census *c) noexcept nogil:
    cdef uint64_t i, kept = 0
    cdef q2_l2_ref *refs = c.l2_refs
    if c.n_l2_refs < 2:
        return
    qsort(refs, c.n_l2_refs, sizeof(q2_l2_ref), compare_l2_refs)
    for i in range(1, c.n_l2_refs):
        if refs[i].host_off == refs[kept].host_off:
            # Show the guest range of the active reference where there is one.
            if refs[kept].active_refs == 0:
                refs[kept].l1_idx = refs[i].l1_idx
            refs[kept].refs += refs[i].refs
            refs[kept].active_refs += refs[i].active_refs
        else:
            kept += 1
            refs[kept] = refs[i]
    c.n_l2_refs = kept + 1


cdef q2_status count_l1(q2_census *c, const uint8_t *table, uint64_t l1_idx, uint64_t n,
                        bint active) noexcept nogil:
    cdef uint64_t i, entry, host_off, guest_off
    cdef uint32_t shift = c.g.cluster_bits + c.g.l2_bits
    cdef int32_t one
    cdef q2_status st
    for i in range(n):
        entry = q2_load_be64(table + 8 * i)
        if entry == 0:
            continue
        host_off = entry & Q2_L1E_OFFSET_MASK
        guest_off = (l1_idx + i) << shift
        if entry & Q2_L1E_RESERVED_MASK:
            note(c, FOUND_L1_RESERVED, host_off, guest_off, host_off, entry, 1)
        if host_off == 0:
            if entry & Q2_OFLAG_COPIED:
                note(c, FOUND_L1_NO_TABLE, 0, guest_off, 0, entry, 1)
            continue
        count_region(c, host_off, c.g.cluster_size, guest_off, 1)
        if host_off & (c.g.cluster_size - 1):
            note(c, FOUND_L1_MISALIGNED, host_off, guest_off, 0, entry, 1)
        if active:
            one = is_stored_one(c, host_off >> c.g.cluster_bits)
            if one >= 0 and (one != 0) != (entry & Q2_OFLAG_COPIED != 0):
                note(c, FOUND_L1_COPIED, host_off, guest_off, one, entry, 1)
        # What lies past the end of the file reads as zeros: an empty table.
        if host_off < c.file_size and c.first_pass:
            st = note_l2_ref(c, host_off, l1_idx + i, active)
            if st != Q2_OK:
                return st
    return Q2_OK


cdef void count_compressed(q2_census *c, const q2_l2_ref *ref, q2_l2e e,
                           uint64_t guest_off) noexcept nogil:
    cdef uint64_t host_off = compressed_offset(&c.g, e)
    if e.entry & Q2_OFLAG_COPIED:
        note(c, FOUND_COMPRESSED_COPIED, host_off, guest_off, 0, e.entry, ref.refs)
    if c.has_data_file:
        note(c, FOUND_COMPRESSED_IN_DATA_FILE, host_off, guest_off, 0, e.entry, ref.refs)
        return
    if e.bitmap:
        note(c, FOUND_COMPRESSED_BITMAP, host_off, guest_off, 0, e.entry, ref.refs)
        return
    count_region(c, host_off, compressed_bytes(&c.g, e), guest_off, ref.refs)
    if not c.first_pass:
        return
    # They share sectors, so two of them are never one read: each counts as fragmented.
    c.allocated += ref.active_refs
    c.compressed += ref.active_refs
    c.fragmented += ref.active_refs


# An entry that keeps a host cluster: what it says of it, then the cluster itself.
cdef void count_standard(q2_census *c, const q2_l2_ref *ref, q2_l2e e,
                         uint64_t guest_off) noexcept nogil:
    cdef uint64_t host_off = e.entry & Q2_L2E_OFFSET_MASK
    cdef uint64_t host_cl = host_off >> c.g.cluster_bits
    cdef bint has_data
    cdef int32_t one = 1
    if e.bitmap & (e.bitmap >> 32) & Q2_BITMAP_ALL_ALLOC:
        note(c, FOUND_BITMAP_CONTRADICTS, host_off, guest_off, 0, e.bitmap, ref.refs)
    if host_off & (c.g.cluster_size - 1):
        if c.g.subclusters > 1:
            has_data = e.bitmap & Q2_BITMAP_ALL_ALLOC != 0
        else:
            has_data = e.entry & Q2_OFLAG_ZERO == 0
        note(c, FOUND_DATA_MISALIGNED if has_data else FOUND_ZERO_MISALIGNED, host_off, guest_off,
             0, e.entry, ref.refs)
    if not c.has_data_file:
        if host_off & (c.g.cluster_size - 1) == 0 and host_off < c.file_size:
            count_cluster(c, host_cl, guest_off, ref.refs)
        else:
            count_region(c, host_off, c.g.cluster_size, guest_off, ref.refs)
    if ref.active_refs:
        # In an external data file every cluster is its guest cluster's own.
        if not c.has_data_file:
            one = is_stored_one(c, host_cl)
        if one >= 0 and (one != 0) != (e.entry & Q2_OFLAG_COPIED != 0):
            note(c, FOUND_L2_COPIED, host_off, guest_off, one, e.entry, ref.active_refs)


# The common case, in a few instructions: a cluster of its own that nothing referred to before, and
# whose flag says what its refcount says. False, and nothing counted, for any other entry.
cdef inline bint count_plain(q2_census *c, uint64_t entry, uint64_t host_off) noexcept nogil:
    cdef uint64_t at = (host_off >> c.g.cluster_bits) - c.win_first
    if ((entry & ~Q2_L2E_OFFSET_MASK) != Q2_OFLAG_COPIED or host_off & (c.g.cluster_size - 1)
            or host_off >= c.file_size or at >= c.win_n or host_off == 0):
        return False
    if (<uint16_t *>c.counters)[at] or not (c.stored_one[at >> 3] >> (at & 7)) & 1:
        return False
    (<uint16_t *>c.counters)[at] = 1
    return True


cdef void count_l2(q2_census *c, const q2_l2_ref *ref, const uint8_t *table) noexcept nogil:
    cdef uint64_t i, guest_off, host_off, next_host_off = 0
    cdef uint64_t base = ref.l1_idx << c.g.l2_bits
    cdef uint64_t allocated = 0, fragmented = 0
    cdef bint plain_zero
    cdef bint may_be_plain = (c.counter_bits == 1 and c.g.subclusters == 1 and ref.refs == 1
                              and ref.active_refs == 1 and not c.has_data_file)
    cdef q2_l2e e
    for i in range(c.g.l2_entries):
        e = load_l2e(&c.g, table + (i << c.g.l2_entry_bits))
        if (e.entry | e.bitmap) == 0:
            continue
        host_off = e.entry & Q2_L2E_OFFSET_MASK
        if not (may_be_plain and count_plain(c, e.entry, host_off)):
            guest_off = (base + i) << c.g.cluster_bits
            if is_compressed(e):
                count_compressed(c, ref, e, guest_off)
                continue
            if e.entry & Q2_L2E_STD_RESERVED_MASK:
                note(c, FOUND_L2_RESERVED, host_off, guest_off, 0, e.entry, ref.refs)
            plain_zero = e.entry & Q2_OFLAG_ZERO != 0 and c.g.subclusters == 1
            # Offset 0 means no cluster, but for the first one of an external data file.
            if host_off == 0 and (plain_zero or not c.has_data_file
                                  or not e.entry & Q2_OFLAG_COPIED):
                if e.bitmap & Q2_BITMAP_ALL_ALLOC:
                    note(c, FOUND_BITMAP_WITHOUT_CLUSTER, 0, guest_off, 0, e.bitmap, ref.refs)
                continue
            count_standard(c, ref, e, guest_off)
        allocated += 1
        if next_host_off and host_off != next_host_off:
            fragmented += 1
        next_host_off = host_off + c.g.cluster_size
    if c.first_pass:
        c.allocated += allocated * ref.active_refs
        c.fragmented += fragmented * ref.active_refs


# ---- refcounts ----------------------------------------------------------------------------------

cdef void count_refblocks(q2_census *c) noexcept nogil:
    cdef uint64_t rb_idx, host_off, host_cl
    for rb_idx in range(c.n_rt):
        if c.rt[rb_idx] == 0:
            continue
        host_off = c.rt[rb_idx] & Q2_RTE_OFFSET_MASK
        host_cl = host_off >> c.g.cluster_bits
        if c.rt[rb_idx] & Q2_RTE_RESERVED_MASK:
            note(c, FOUND_RT_RESERVED, host_off, rb_idx, host_off, c.rt[rb_idx], 1)
        elif host_off & (c.g.cluster_size - 1):
            note(c, FOUND_RB_MISALIGNED, host_off, rb_idx, 0, rb_idx, 1)
        elif host_cl >= c.n_seen:
            note(c, FOUND_RB_BEYOND_END, host_off, rb_idx, c.file_size, rb_idx, 1)
        else:
            count_region(c, host_off, c.g.cluster_size, NO_GUEST, 1)
            if not in_window(c, host_cl) or get_count(c, host_cl) == 1:
                continue
            note(c, FOUND_RB_SHARED, host_off, rb_idx, 1, get_count(c, host_cl), 1)
        c.rb_bad[rb_idx] = True


cdef void learn_refblock(q2_census *c, uint64_t rb_idx, const uint8_t *block) noexcept nogil:
    cdef uint64_t i, at, n, first = rb_idx << c.g.refblock_bits
    if block is NULL:
        return
    if in_window(c, first):
        n = min(<uint64_t>1 << c.g.refblock_bits, c.win_first + c.win_n - first)
        at = first - c.win_first
        for i in range(n):
            if get_refcount(block, c.g.refcount_order, i) == 1:
                c.stored_one[(at + i) >> 3] |= <uint8_t>(1 << ((at + i) & 7))
    n = <uint64_t>1 << c.g.refblock_bits
    if not c.first_pass or first + n <= c.n_clusters:
        return
    for i in range(c.n_clusters - first if c.n_clusters > first else 0, n):
        at = first + i - c.n_clusters
        if at < c.n_past and get_refcount(block, c.g.refcount_order, i) == 1:
            c.past_one[at >> 3] |= <uint8_t>(1 << (at & 7))


# Refcounts of block rb_idx that the window holds; its blocks are whole ones but for the last.
cdef inline uint64_t block_clusters(const q2_census *c, uint64_t rb_idx) noexcept nogil:
    cdef uint64_t first = rb_idx << c.g.refblock_bits
    cdef uint64_t end = min(c.n_seen, c.win_first + c.win_n)
    if first >= end:
        return 0
    return min(<uint64_t>1 << c.g.refblock_bits, end - first)


cdef void compare_refblock(q2_census *c, uint64_t rb_idx, const uint8_t *block) noexcept nogil:
    cdef uint64_t i, stored, counted, first = rb_idx << c.g.refblock_bits
    for i in range(block_clusters(c, rb_idx)):
        stored = 0 if block is NULL else get_refcount(block, c.g.refcount_order, i)
        counted = get_count(c, first + i)
        if stored == 0 and counted == 0:
            continue
        c.highest_cluster = first + i
        if stored < counted:
            if stored == 0:
                c.refcounts_lost = True
            note(c, FOUND_REFCOUNT_LOW, (first + i) << c.g.cluster_bits, NO_GUEST, counted, stored,
                 1)
        elif stored > counted:
            note(c, FOUND_LEAK, (first + i) << c.g.cluster_bits, NO_GUEST, counted, stored, 1)


cdef bint raise_refcounts(const q2_census *c, uint64_t rb_idx, uint8_t *block) noexcept nogil:
    cdef uint64_t i, counted, first = rb_idx << c.g.refblock_bits
    cdef bint changed = False
    for i in range(block_clusters(c, rb_idx)):
        counted = get_count(c, first + i)
        if get_refcount(block, c.g.refcount_order, i) < counted:
            set_refcount(block, c.g.refcount_order, i, counted)
            changed = True
    return changed


cdef bint lower_refcounts(const q2_census *c, uint64_t rb_idx, uint8_t *block) noexcept nogil:
    cdef uint64_t i, counted, n, first = rb_idx << c.g.refblock_bits
    cdef bint changed = False
    n = block_clusters(c, rb_idx)
    for i in range(n):
        counted = get_count(c, first + i)
        if get_refcount(block, c.g.refcount_order, i) > counted:
            set_refcount(block, c.g.refcount_order, i, counted)
            changed = True
    # What a block says of clusters behind the end is a leak as soon as the file grows.
    if first + n < c.n_seen:
        return changed
    for i in range(n, <uint64_t>1 << c.g.refblock_bits):
        if get_refcount(block, c.g.refcount_order, i):
            set_refcount(block, c.g.refcount_order, i, 0)
            changed = True
    return changed


cdef void adopt_refcounts(q2_census *c, uint64_t rb_idx, const uint8_t *block) noexcept nogil:
    cdef uint64_t i, stored, first = rb_idx << c.g.refblock_bits
    for i in range(block_clusters(c, rb_idx)):
        stored = get_refcount(block, c.g.refcount_order, i)
        if stored > get_count(c, first + i):
            put_count(c, first + i, min(stored, c.max_count))


cdef bint is_block_used(const q2_census *c, uint64_t rb_idx) noexcept nogil:
    cdef uint64_t i, first = rb_idx << c.g.refblock_bits
    for i in range(block_clusters(c, rb_idx)):
        if get_count(c, first + i):
            return True
    return False


cdef void miss_refblock(q2_census *c, uint64_t rb_idx) noexcept nogil:
    c.rb_bad[rb_idx] = True
    note(c, FOUND_RB_UNREADABLE, rb_idx << (c.g.refblock_bits + c.g.cluster_bits), NO_GUEST, 0,
         rb_idx, block_clusters(c, rb_idx))
