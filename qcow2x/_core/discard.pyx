# cython: language_level=3
"""Discard, write zeroes, and cutting off the end.

All three walk L2 entries, a slice at a time under the exclusive lock, and differ only in what they
make of one entry.
"""
from libc.stdint cimport uint8_t, uint32_t

from qcow2x._core.cache cimport q2_slot
from qcow2x._core.edges cimport *
from qcow2x._core.flush cimport flush_if_metadata_changed, flush_if_much_freed
from qcow2x._core.geometry cimport round_down, round_up
from qcow2x._core.l2table cimport *
from qcow2x._core.mapping cimport (drop_entry, ensure_l2_table, entry_changed, entry_is_ours,
                                   find_entry)
from qcow2x._core.metadata cimport load_slice
from qcow2x._core.plan cimport Q2_KIND_DATA, Q2_KIND_UNALLOCATED, Q2_KIND_ZERO
from qcow2x._core.read cimport layer_extent, reads_as_zero
from qcow2x._core.reserve cimport note_used
from qcow2x._core.scratch cimport ZEROS_BYTES, zeros
from qcow2x._core.state cimport *
from qcow2x._core.status cimport *
from qcow2x._core.storage cimport ZERO_MAY_UNMAP, q2_extent
from qcow2x._core.sync cimport *
from qcow2x._core.wire cimport Q2_BITMAP_ALL_ZERO, Q2_OFLAG_ZERO
from qcow2x._core.write cimport write_guest

cdef enum:
    DISCARD = 0         # zeros, nothing kept on the host
    ZERO_KEEP = 1       # zeros, the host cluster stays for the next write
    ZERO_FREE = 2       # zeros, nothing kept
    UNMAP = 3           # as if it had never been written


cdef inline bint is_empty(ImageState img, q2_l2e e) noexcept nogil:
    return e.entry == 0 and e.bitmap == 0


cdef q2_status change_cluster(ImageState img, uint8_t what, uint64_t guest_cl, q2_slot *slot,
                              uint8_t *at) noexcept nogil:
    """meta, exclusive: one whole guest cluster."""
    cdef q2_l2e old = load_l2e(&img.geo, at)
    cdef q2_l2e new
    cdef bint keep = (what == ZERO_KEEP and not is_compressed(old) and has_cluster(&img.geo, old)
                      and entry_is_ours(img, guest_cl, old))
    cdef q2_status st
    new.entry = 0
    new.bitmap = 0
    if what == UNMAP:
        if is_empty(img, old):
            return Q2_OK
    elif (what == DISCARD and not has_backing(img) and not is_compressed(old)
          and not has_cluster(&img.geo, old)):
        # Whatever its marks are, it reads as zeros and keeps nothing.
        return Q2_OK
    elif img.geo.version >= 3:
        if keep:
            new.entry = old.entry
        if img.geo.subclusters > 1:
            new.bitmap = Q2_BITMAP_ALL_ZERO
        else:
            new.entry |= Q2_OFLAG_ZERO
    # Version 2 has no zero flag: unmapped reads as zeros, as the caller made sure that nothing
    # shows through.
    if new.entry == old.entry and new.bitmap == old.bitmap:
        return Q2_OK
    store_l2e(&img.geo, at, new)
    st = entry_changed(img, slot, at)
    if st == Q2_OK and not keep:
        st = drop_entry(img, old)
    return st


cdef q2_status change_slice(ImageState img, uint8_t what, uint64_t guest_cl, uint64_t end_cl,
                            uint64_t *done, uint64_t *miss) noexcept nogil:
    """meta, exclusive: as many clusters from guest_cl on as one slice holds."""
    cdef uint64_t left = 0, i
    cdef uint8_t *at = NULL
    cdef q2_slot *slot = NULL
    cdef bint makes_entries = what != UNMAP and img.geo.version >= 3 and (
        what != DISCARD or has_backing(img))
    cdef q2_status st = find_entry(img, guest_cl, &slot, &at, &left, miss)
    if st != Q2_OK:
        return st
    if left > end_cl - guest_cl:
        left = end_cl - guest_cl
    if overlaps_inflight(img, guest_cl, left):
        return Q2_BUSY
    if slot is NULL and not makes_entries:
        done[0] = left
        return Q2_OK
    # A table that a snapshot shares is copied before it changes.
    st = ensure_l2_table(img, guest_cl, miss)
    if st == Q2_OK:
        st = find_entry(img, guest_cl, &slot, &at, &left, miss)
    if st != Q2_OK:
        return st
    if left > end_cl - guest_cl:
        left = end_cl - guest_cl
    note_used(img, guest_cl, guest_cl + left)
    for i in range(left):
        st = change_cluster(img, what, guest_cl + i, slot, at)
        if st != Q2_OK:
            return st
        at += <uint64_t>1 << img.geo.l2_entry_bits
    done[0] = left
    return Q2_OK


cdef q2_status clear_data_file(ImageState img, uint64_t guest_off, uint64_t end,
                               bint may_unmap) noexcept nogil:
    """The same range of an external data file: zeros if it is to read as the disk by itself, else
    only a hole. Before the mapping changes, so that it cannot hit what is written after."""
    cdef uint64_t disk = q2_load(&img.disk_size)
    if end > disk:
        end = disk
    if not img.geo.external_data or guest_off >= end:
        return Q2_OK
    if img.raw_data:
        return img.data.zero_range(Q2_SITE_ZERO_WRITE, guest_off, end - guest_off,
                                   ZERO_MAY_UNMAP if may_unmap else 0)
    if may_unmap and img.discard_to_host:
        return img.data.punch_hole(Q2_SITE_PUNCH, guest_off, end - guest_off)
    return Q2_OK


cdef q2_status change_clusters(ImageState img, uint8_t what, uint64_t guest_cl,
                               uint64_t end_cl) noexcept nogil:
    cdef uint64_t miss = 0, turn = 0, done
    cdef uint64_t start = guest_cl << img.geo.cluster_bits
    cdef uint32_t parity = 0
    cdef q2_status st = begin_write_request(img, &parity)
    if st != Q2_OK:
        return st
    if what != UNMAP:
        st = clear_data_file(img, guest_cl << img.geo.cluster_bits,
                             end_cl << img.geo.cluster_bits, what != ZERO_KEEP)
    while guest_cl < end_cl and st == Q2_OK:
        done = 0
        pthread_rwlock_wrlock(&img.meta)
        st = change_slice(img, what, guest_cl, end_cl, &done, &miss)
        if st == Q2_BUSY:
            turn = room_enter(img)
        pthread_rwlock_unlock(&img.meta)
        if st == Q2_BUSY:
            room_wait(img, turn)
            st = Q2_OK
        elif st == Q2_MISS:
            st = load_slice(img, miss)
        guest_cl += done
    if what != UNMAP:
        # Who unmaps knows that the disk reads the same afterwards, or ends in front of this.
        note_change(img, start, (end_cl << img.geo.cluster_bits) - start)
    leave_write(img, parity)
    return st


# The whole clusters of a range; the end of the disk completes the last one.
cdef void whole_clusters(ImageState img, uint64_t guest_off, uint64_t nbytes, uint64_t *first,
                         uint64_t *end) noexcept nogil:
    cdef uint64_t stop = guest_off + nbytes
    first[0] = (guest_off + img.geo.cluster_size - 1) >> img.geo.cluster_bits
    if stop == q2_load(&img.disk_size):
        stop = round_up(stop, img.geo.cluster_size)
    end[0] = stop >> img.geo.cluster_bits


cdef q2_status discard_guest(ImageState img, uint64_t guest_off, uint64_t nbytes) noexcept nogil:
    cdef uint64_t first, end
    cdef q2_status st = may_write(img)
    if st != Q2_OK or nbytes == 0 or (img.geo.version < 3 and has_backing(img)):
        return st
    whole_clusters(img, guest_off, nbytes, &first, &end)
    if first < end:
        st = change_clusters(img, DISCARD, first, end)
    if st == Q2_OK and img.durable and q2_keeps(Q2_EDGE_DISCARD_DURABLE_AT_RETURN):
        st = flush_if_metadata_changed(img)
    flush_if_much_freed(img)
    return st


cdef q2_status write_zeros(ImageState img, uint64_t guest_off, uint64_t end) noexcept nogil:
    """Zeros as data, but only over what this layer does not say to be zeros already. Those of a
    backing file are written too: what was written to this layer does not depend on another."""
    cdef q2_extent ext
    cdef uint64_t n
    cdef q2_status st
    while guest_off < end:
        st = layer_extent(img, guest_off, end - guest_off, &ext)
        if st != Q2_OK:
            return st
        n = ext.nbytes
        if ext.kind != Q2_KIND_ZERO and (ext.kind != Q2_KIND_UNALLOCATED or has_backing(img)):
            if n > ZEROS_BYTES:
                n = ZEROS_BYTES
            st = write_guest(img, zeros(), n, guest_off, False)
            if st != Q2_OK:
                return st
        guest_off += n
    return Q2_OK


cdef inline bint holds_data(const q2_geometry *g, q2_l2e e, uint32_t first,
                            uint32_t n) noexcept nogil:
    cdef uint32_t i
    for i in range(first, first + n):
        if subcluster_kind(g, e, i) == Q2_KIND_DATA:
            return True
    return False


cdef q2_status zero_subclusters_of(ImageState img, uint64_t guest_off, uint64_t end,
                                   uint64_t asked_off, uint64_t asked_end, bint also_data,
                                   bint *handled) noexcept nogil:
    """Whole subclusters of one guest cluster, by their bits or the entry's zero flag, where zeros
    were asked for in [asked_off, asked_end) of it; of a cluster that is shared, too, as only the
    entry changes. A compressed cluster, and unless `also_data` what holds data, are left to
    write_zeros."""
    cdef uint64_t guest_cl = guest_off >> img.geo.cluster_bits
    cdef uint64_t start = guest_cl << img.geo.cluster_bits
    cdef uint32_t first = <uint32_t>((guest_off - start) >> img.geo.subcluster_bits)
    cdef uint32_t n = <uint32_t>((end - guest_off) >> img.geo.subcluster_bits)
    cdef uint64_t miss = 0, turn = 0, left = 0, mask
    cdef uint8_t *at = NULL
    cdef q2_slot *slot = NULL
    cdef q2_l2e e, new
    cdef uint32_t parity = 0
    cdef q2_status st = begin_write_request(img, &parity)
    handled[0] = False
    if st != Q2_OK:
        return st
    st = clear_data_file(img, guest_off, end, False)
    while st == Q2_OK:
        pthread_rwlock_wrlock(&img.meta)
        if overlaps_inflight(img, guest_cl, 1):
            st = Q2_BUSY
            turn = room_enter(img)
        else:
            st = ensure_l2_table(img, guest_cl, &miss)
            if st == Q2_OK:
                st = find_entry(img, guest_cl, &slot, &at, &left, &miss)
            if st == Q2_OK:
                e = load_l2e(&img.geo, at)
                if not is_compressed(e) and (also_data or not holds_data(&img.geo, e, first, n)):
                    new = e
                    if img.geo.subclusters == 1:
                        new.entry |= Q2_OFLAG_ZERO
                    else:
                        mask = subcluster_bits(first, n)
                        new.bitmap = (e.bitmap & ~mask) | (mask << 32)
                    if new.entry != e.entry or new.bitmap != e.bitmap:
                        note_used(img, guest_cl, guest_cl + 1)
                        store_l2e(&img.geo, at, new)
                        st = entry_changed(img, slot, at)
                    handled[0] = st == Q2_OK
        pthread_rwlock_unlock(&img.meta)
        if st == Q2_BUSY:
            room_wait(img, turn)
            st = Q2_OK
        elif st == Q2_MISS:
            st = load_slice(img, miss)
        else:
            break
    note_change(img, asked_off, asked_end - asked_off)
    leave_write(img, parity)
    return st


cdef q2_status zero_part(ImageState img, uint64_t guest_off, uint64_t end) noexcept nogil:
    """A range inside one subcluster that is shorter than it. If the rest reads as zeros as well, and
    no data is there, all of it becomes zeros, so that nothing has to be allocated."""
    cdef uint64_t sub = <uint64_t>1 << img.geo.subcluster_bits
    cdef uint64_t start = round_down(guest_off, sub)
    cdef uint64_t stop = start + sub
    cdef uint64_t disk = q2_load(&img.disk_size)
    cdef bint zero = False, handled = False
    cdef q2_status st = Q2_OK
    if guest_off >= end:
        return Q2_OK
    # The zeros of a raw data file are written, also over what somebody writes at this moment.
    if img.geo.version >= 3 and not img.raw_data:
        st = reads_as_zero(img, start, guest_off - start, &zero)
        if st == Q2_OK and zero:
            if stop > disk:
                stop = disk
            st = reads_as_zero(img, end, stop - end, &zero)
        if st == Q2_OK and zero:
            # A write to the rest since then is seen: it left data, or is still under way.
            st = zero_subclusters_of(img, start, start + sub, guest_off, end, False, &handled)
    if st == Q2_OK and not handled:
        st = write_zeros(img, guest_off, end)
    return st


cdef q2_status zero_edge(ImageState img, uint64_t guest_off, uint64_t end) noexcept nogil:
    """A range inside one guest cluster that is shorter than it."""
    cdef uint64_t sub = <uint64_t>1 << img.geo.subcluster_bits
    cdef uint64_t first = round_up(guest_off, sub)
    cdef uint64_t last = round_down(end, sub)
    cdef bint handled = False
    cdef q2_status st
    if end == q2_load(&img.disk_size):
        # The end of the disk completes the last subcluster.
        last = round_up(end, sub)
    if first > last or first > end:
        return zero_part(img, guest_off, end)
    if first == last:
        st = zero_part(img, guest_off, first)
        return zero_part(img, last, end) if st == Q2_OK else st
    # First what may have to be written as data: after that a compressed cluster no longer is one.
    st = zero_part(img, guest_off, first)
    if st == Q2_OK:
        st = zero_subclusters_of(img, first, last, first, last if last < end else end, True,
                                 &handled)
    if st == Q2_OK and not handled:
        st = write_zeros(img, first, last if last < end else end)
    return zero_part(img, last, end) if st == Q2_OK else st


cdef q2_status zero_guest(ImageState img, uint64_t guest_off, uint64_t nbytes, bint may_unmap,
                          bint fua) noexcept nogil:
    cdef uint64_t end = guest_off + nbytes
    cdef uint64_t first, last
    cdef q2_status st = may_write(img)
    if st != Q2_OK or nbytes == 0:
        return st
    whole_clusters(img, guest_off, nbytes, &first, &last)
    if img.geo.subclusters > 1:
        # Of the cluster that the disk ends in only the subclusters that it reaches.
        last = end >> img.geo.cluster_bits
    if img.geo.version < 3 and (has_backing(img) or not may_unmap):
        # No zero flag to set: without leave to unmap the clusters stay, and their bytes go.
        st = write_zeros(img, guest_off, end)
    elif first >= last:
        if guest_off >> img.geo.cluster_bits == (end - 1) >> img.geo.cluster_bits:
            st = zero_edge(img, guest_off, end)
        else:
            st = zero_edge(img, guest_off, first << img.geo.cluster_bits)
            if st == Q2_OK:
                st = zero_edge(img, first << img.geo.cluster_bits, end)
    else:
        if guest_off < first << img.geo.cluster_bits:
            st = zero_edge(img, guest_off, first << img.geo.cluster_bits)
        if st == Q2_OK:
            st = change_clusters(img, ZERO_FREE if may_unmap else ZERO_KEEP, first, last)
        if st == Q2_OK and end > last << img.geo.cluster_bits:
            st = zero_edge(img, last << img.geo.cluster_bits, end)
    if st == Q2_OK and (fua or img.durable) and q2_keeps(Q2_EDGE_DISCARD_DURABLE_AT_RETURN):
        st = flush_if_metadata_changed(img)
    flush_if_much_freed(img)
    return st


cdef q2_status unmap_guest(ImageState img, uint64_t guest_off, uint64_t nbytes) noexcept nogil:
    cdef uint64_t first, end
    cdef q2_status st = may_write(img)
    whole_clusters(img, guest_off, nbytes, &first, &end)
    if st == Q2_OK and first < end:
        st = change_clusters(img, UNMAP, first, end)
    return st


cdef q2_status unmap_tail(ImageState img, uint64_t guest_off) noexcept nogil:
    cdef uint64_t first = round_up(guest_off, img.geo.cluster_size) >> img.geo.cluster_bits
    cdef uint64_t end = round_up(q2_load(&img.disk_size),
                                 img.geo.cluster_size) >> img.geo.cluster_bits
    cdef q2_status st = may_write(img)
    if st == Q2_OK and first < end:
        st = change_clusters(img, UNMAP, first, end)
    return st
