# Guarding metadata: no write may land on a cluster that holds a table of the image.
#
# On a sound image nothing ever tries. On a damaged one an L2 entry that points at a table, or a
# refcount of 0 for it, would have the guest (or the allocator) overwrite it; then the write is
# refused, the image marked corrupt and poisoned. The clusters of all tables are kept as a set, so
# that a write costs one look-up per cluster, where QEMU goes through the whole L1 table.
from libc.stdint cimport uint32_t, uint64_t

from qcow2x._core.state cimport ImageState, q2_guard
from qcow2x._core.status cimport q2_status

cdef enum:
    # What is guarded; each includes the one before. QEMU's names, QEMU's default is CACHED.
    GUARD_NONE = 0
    GUARD_CONSTANT = 1   # header, active L1, refcount table, snapshot table
    GUARD_CACHED = 2     # and active L2 tables, refcount blocks, snapshots' L1 tables
    GUARD_ALL = 3        # and snapshots' L2 tables

cdef enum:
    # What a cluster holds.
    HOLDS_FIXED = 1      # header, active L1, refcount table, snapshot table
    HOLDS_L2 = 2
    HOLDS_REFBLOCK = 3
    HOLDS_SNAPSHOT_L1 = 4
    HOLDS_SNAPSHOT_L2 = 5
    HOLDS_SEVERAL = 7    # two tables claim it: neither may be written

# Open addressing with linear probing; a slot holds (cluster + 1) << 3 | what it holds, 0 is empty.
cdef inline uint64_t home_of(const q2_guard *g, uint64_t cluster) noexcept nogil:
    return ((cluster * <uint64_t>0x9E3779B97F4A7C15) >> 30) & g.mask

# The slot of the cluster, or the empty one where it would go.
cdef inline uint64_t guard_find(const q2_guard *g, uint64_t cluster) noexcept nogil:
    cdef uint64_t at = home_of(g, cluster)
    while g.slot[at] and (g.slot[at] >> 3) != cluster + 1:
        at = (at + 1) & g.mask
    return at

# meta, exclusive (or nobody else has the image yet). n clusters hold a table from now on; they hold
# none any more.
cdef q2_status guard_add(ImageState img, uint32_t holds, uint64_t first_cl,
                         uint64_t n) noexcept nogil
cdef void guard_remove(ImageState img, uint64_t first_cl, uint64_t n) noexcept nogil
# None holds a table: what is there is to be told anew.
cdef void guard_forget(ImageState img) noexcept nogil
# As guard_add, for the clusters of a table of nbytes.
cdef q2_status guard_table(ImageState img, uint32_t holds, uint64_t host_off,
                           uint64_t nbytes) noexcept nogil

# What an opened image guards: header, L1, L2 tables, the place of the refcount table. What snapshots
# hold is added by the caller, refcount blocks when their table is loaded.
cdef q2_status guard_image(ImageState img) noexcept nogil
cdef q2_status guard_refblocks(ImageState img) noexcept nogil

# meta, any side. Q2_E_CORRUPT if any cluster of the range holds a table.
cdef q2_status guard_write(ImageState img, uint64_t host_off, uint64_t nbytes) noexcept nogil
# meta, any side. Q2_E_CORRUPT if the cluster of a table, about to be changed, holds another as well.
cdef q2_status guard_table_write(ImageState img, uint32_t holds, uint64_t host_off) noexcept nogil
