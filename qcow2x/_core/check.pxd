# Consistency of a whole image: what every structure refers to against what the refcounts say.
# Works on the storage alone, past all caches, so whoever has the image open flushes first.
from libc.stdint cimport int32_t, uint8_t, uint64_t

from qcow2x._core.census cimport q2_census, q2_finding
from qcow2x._core.header cimport Header
from qcow2x._core.storage cimport Storage


# One look at an image; run() once, then ask. repair.pyx builds on it. One thread at a time.
cdef class Checker:
    cdef q2_census c
    cdef readonly Storage storage
    cdef readonly Header header
    cdef object progress
    cdef str phase
    cdef uint8_t *buf            # of buf_bytes: at least a cluster
    cdef uint64_t buf_bytes
    cdef uint64_t done
    cdef uint64_t total
    cdef double next_report
    cdef readonly list l1_tables     # [(offset, entries, active)] of those that can be walked
    cdef readonly set shared_l2      # offsets of L2 tables where something else lies as well
    cdef readonly set shared_l1      # the same of L1 tables of snapshots
    cdef readonly bint disk_l1_shared   # and of the disk's own
    cdef readonly list missing_blocks   # refcount blocks that clusters in use need
    cdef readonly set used_blocks    # refcount blocks of clusters that something refers to
    cdef dict snapshot_names         # of those that were found wrong, by their place in the table
    cdef readonly bint rt_shared     # something else lies where the refcount table does

    # One pass: every reference to the clusters of the window, then what that says of them.
    cdef int pass_over_tables(self) except -1
    # Once per window, when all of its references are counted.
    cdef int settle_window(self) except -1
    cdef int note_shared_places(self) except -1

    cdef int load_refcount_table(self) except -1
    cdef uint64_t blocks_for(self, uint64_t n_clusters) noexcept
    cdef uint64_t block_offset(self, uint64_t rb_idx) noexcept
    cdef int learn_refcounts(self, uint64_t first, uint64_t end) except -1
    cdef int count_l1_table(self, uint64_t host_off, uint64_t n, bint active) except -1
    cdef int count_l2_tables(self) except -1
    cdef int count_snapshots(self) except -1
    cdef int count_dirty_bitmaps(self) except -1
    cdef int count_dirty_bitmap(self, uint64_t host_off, uint64_t n) except -1

    # Fills dst; False (and a finding) where the storage cannot read. What lies past the end of the
    # file reads as zeros.
    cdef bint read(self, void *dst, uint64_t nbytes, uint64_t host_off) except? 0
    cdef object read_bytes(self, uint64_t nbytes, uint64_t host_off)
    cdef int report(self, bint at_end) except -1
    cdef object finding_of(self, const q2_finding *f)
