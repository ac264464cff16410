# Guest offset -> what is there. Section "Cluster mapping".
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from qcow2x._core.cache cimport cache_get, q2_slot
from qcow2x._core.geometry cimport l1_index, l2_index
from qcow2x._core.l2table cimport q2_l2e
from qcow2x._core.plan cimport Q2_KIND_DATA, Q2_KIND_UNALLOCATED, q2_plan
from qcow2x._core.state cimport ImageState
from qcow2x._core.status cimport q2_status
from qcow2x._core.storage cimport q2_extent
from qcow2x._core.sync cimport q2_load
from qcow2x._core.wire cimport (Q2_L1E_OFFSET_MASK, Q2_L2E_OFFSET_MASK, Q2_OFLAG_COMPRESSED,
                                Q2_OFLAG_COPIED, Q2_OFLAG_ZERO, q2_load_be64)

# meta, any side. What most requests want: one place inside one cluster that is simply there, or simply not
# (Q2_KIND_DATA, Q2_KIND_UNALLOCATED), its slice cached. False: anything else, which plan_range sees to. Inline, and nothing in it that is rare: after a
# system call little of the caller is left in the processor's nearest caches, so that the lines of code
# that a request goes through cost more than what they do.
cdef inline bint plan_one(ImageState img, uint64_t guest_off, uint64_t nbytes, q2_extent *ext) noexcept nogil:
    cdef uint32_t cbits = img.geo.cluster_bits
    cdef uint64_t in_cluster = guest_off & (img.geo.cluster_size - 1)
    cdef uint64_t l1_idx = l1_index(&img.geo, guest_off)
    cdef uint64_t in_table = l2_index(&img.geo, guest_off) << 3
    cdef uint64_t in_slice = in_table & ((<uint64_t>1 << img.geo.slice_bits) - 1)
    cdef uint64_t l1e, l2_off, entry, host_off
    cdef q2_slot *slot
    if (in_cluster + nbytes > img.geo.cluster_size or img.geo.subclusters > 1 or img.geo.external_data
            or l1_idx >= img.l1_size):
        return False
    ext.guest_off = guest_off
    ext.nbytes = nbytes
    ext.host_off = 0
    ext.comp_bytes = 0
    ext.kind = Q2_KIND_UNALLOCATED
    ext.in_place = False
    l1e = img.l1[l1_idx]
    l2_off = l1e & Q2_L1E_OFFSET_MASK
    if l2_off == 0:
        return True
    if l2_off & (img.geo.cluster_size - 1):
        return False
    slot = cache_get(&img.l2, l2_off + in_table - in_slice)
    if slot is NULL:
        return False
    entry = q2_load_be64(slot.data + in_slice)
    if entry == 0:
        return True
    host_off = entry & Q2_L2E_OFFSET_MASK
    # No cluster is at 0, where the header is.
    if (entry & (Q2_OFLAG_COMPRESSED | Q2_OFLAG_ZERO) or host_off - 1 >= q2_load(&img.host_size) - 1
            or host_off & (img.geo.cluster_size - 1)):
        return False
    ext.host_off = host_off + in_cluster
    ext.kind = Q2_KIND_DATA
    ext.in_place = entry & l1e & Q2_OFLAG_COPIED != 0
    return True

# meta, any side. What the guest range [guest_off, guest_off + nbytes), which must lie inside the
# disk, is made of, in order; extents that continue each other are one. Answers as much as fits
# the plan and as is cached: with nothing to answer Q2_MISS and the slice to load in *miss.
# With for_write, extents that may not be written in place are not merged with those that may.
cdef q2_status plan_range(ImageState img, uint64_t guest_off, uint64_t nbytes, bint for_write,
                          q2_plan *plan, uint64_t *miss) noexcept nogil

# meta, any side. The cached slice with the L2 entry of guest cluster guest_cl, the entry's place
# in it, and how many entries follow in the slice (itself included). *slot NULL: no L2 table there.
cdef q2_status find_entry(ImageState img, uint64_t guest_cl, q2_slot **slot, uint8_t **at,
                          uint64_t *entries_left, uint64_t *miss) noexcept nogil

# Whether the standard entry's cluster may be written where it is.
cdef bint entry_is_ours(ImageState img, uint64_t guest_cl, q2_l2e e) noexcept nogil

# A host offset that data may have: aligned, and not past the file's end. Q2_E_CORRUPT else.
cdef q2_status check_host_cluster(ImageState img, uint64_t host_off,
                                  uint64_t guest_off) noexcept nogil

# meta, exclusive. The L2 table of guest cluster guest_cl exists and is ours alone to change:
# allocates it, or copies one that a snapshot shares. Rare (once per 512 MiB at 64 KiB clusters),
# so it does its I/O under the lock. Q2_MISS for a refcount slice.
cdef q2_status ensure_l2_table(ImageState img, uint64_t guest_cl, uint64_t *miss) noexcept nogil

# meta, exclusive. An entry of `slot` was changed: dirty, behind the refcounts raised before.
cdef q2_status entry_changed(ImageState img, q2_slot *slot, uint8_t *at) noexcept nogil

# meta, exclusive. What entry `e` kept is no longer mapped: its clusters go on the dropped list.
cdef q2_status drop_entry(ImageState img, q2_l2e e) noexcept nogil
