# Internal snapshots: making, deleting and applying them. Section "Snapshots".
#
# The snapshot table's bytes are made by qcow2x/snapshot.py; here is what happens to the image. All
# three freeze writers, hold commit and work on the file itself (reftree.pyx). On version 3 the dirty
# bit stands from before the first refcount changes until everything fits again, so that a cut of
# power is mended when the image is next opened for writing. The image must not be changed in another
# administrative way meanwhile: Image sees to that.
from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t

from qcow2x._core.state cimport ImageState
from qcow2x._core.status cimport q2_status

# A snapshot table to publish: nbytes at `bytes` go to host_off, reserved by reserve_clusters.
cdef struct q2_table:
    const uint8_t *bytes
    uint64_t nbytes
    uint64_t host_off      # 0 for an empty table
    uint32_t count         # of snapshots in it

# The table that is published now.
cdef struct q2_old_table:
    uint64_t host_off
    uint64_t nbytes

# n clusters in a row with refcount 1, durably: leaked if nothing comes of it.
cdef q2_status reserve_clusters(ImageState img, uint64_t n, uint64_t *host_off) noexcept nogil

# Clusters that were reserved and came to nothing: free after the next flush.
cdef q2_status release_clusters(ImageState img, uint64_t host_off, uint64_t n) noexcept nogil

# The disk as it is now becomes a snapshot whose L1 table (of l1_size entries, as the active one) goes
# to l1_copy_off.
cdef q2_status create_snapshot(ImageState img, uint64_t l1_copy_off, const q2_table *table,
                               const q2_old_table *old) noexcept nogil

# The snapshot with this L1 table is in `table` no more: its clusters are given back.
cdef q2_status delete_snapshot(ImageState img, uint64_t l1_off, uint32_t l1_size,
                               const q2_table *table, const q2_old_table *old) noexcept nogil

# The disk becomes what the snapshot with this L1 table is, disk_size bytes long. new_l1_off has room
# for new_l1_size entries, at least l1_size and as many as the disk needs.
cdef q2_status apply_snapshot(ImageState img, uint64_t l1_off, uint32_t l1_size,
                              uint64_t new_l1_off, uint32_t new_l1_size,
                              uint64_t disk_size) noexcept nogil
