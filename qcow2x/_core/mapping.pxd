# Guest offset -> what is there. Section "Cluster mapping".
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from qcow2x._core.cache cimport q2_slot
from qcow2x._core.l2table cimport q2_l2e
from qcow2x._core.plan cimport q2_plan
from qcow2x._core.state cimport ImageState
from qcow2x._core.status cimport q2_status

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
