# How often each host cluster is referred to, and what is wrong with the entries that refer to it:
# the counting half of a check. One thread uses a census at a time; nothing here needs the GIL.
from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t

from qcow2x._core.geometry cimport q2_geometry
from qcow2x._core.status cimport q2_status

cdef enum:
    NO_GUEST_OFF = -1

# What can be found. check.pyx has the sentence of each, in this order.
cdef enum q2_finding_code:
    FOUND_BEYOND_END
    FOUND_OVERFLOW
    FOUND_L1_RESERVED
    FOUND_L1_NO_TABLE
    FOUND_L1_MISALIGNED
    FOUND_L2_RESERVED
    FOUND_COMPRESSED_COPIED
    FOUND_COMPRESSED_IN_DATA_FILE
    FOUND_COMPRESSED_BITMAP
    FOUND_BITMAP_CONTRADICTS
    FOUND_BITMAP_WITHOUT_CLUSTER
    FOUND_DATA_MISALIGNED
    FOUND_ZERO_MISALIGNED
    FOUND_L1_COPIED
    FOUND_L2_COPIED
    FOUND_RT_RESERVED
    FOUND_RB_MISALIGNED
    FOUND_RB_BEYOND_END
    FOUND_RB_SHARED
    FOUND_REFCOUNT_LOW
    FOUND_LEAK
    FOUND_RB_UNREADABLE
    FOUND_SNAPSHOT_L1
    FOUND_SNAPSHOT_INCOMPLETE
    FOUND_SNAPSHOT_DATA_FILE
    FOUND_DIRTY_BITMAP_DIRECTORY
    FOUND_DIRTY_BITMAP_ENTRY
    FOUND_READ_ERROR
    FOUND_SNAPSHOT_EXTRA
    FOUND_SNAPSHOTS_TOO_BIG
    FOUND_SNAPSHOTS_TOO_MANY
    FOUND_CODES

cdef struct q2_finding:
    int32_t code
    uint64_t host_off
    # NO_GUEST_OFF where there is none; what belongs to no guest range but to one of several (a
    # refcount block, a snapshot) has its number here.
    uint64_t guest_off
    uint64_t expected
    uint64_t found

# An L2 table and how often L1 tables refer to it, so that it is walked once for all of them.
cdef struct q2_l2_ref:
    uint64_t host_off
    uint64_t l1_idx          # of one of the references: says which guest range it maps
    uint64_t refs
    uint64_t active_refs     # of these, from the active L1 table

cdef struct q2_census:
    q2_geometry g
    uint64_t file_size
    bint has_data_file

    # The window: host clusters [win_first, win_first + win_n), whose references are counted in this
    # pass over the tables. A window that holds the whole file is the only one.
    uint64_t win_first
    uint64_t win_n
    uint64_t next_used       # lowest cluster behind the window that something refers to
    bint first_pass          # what is wrong with an entry by itself is noted in the first pass

    # References counted: one counter per cluster of the window. Wide enough for max_count, which
    # is the most that a refcount of this image can say.
    uint8_t *counters
    uint32_t counter_bits    # log2 of a counter's bytes: 0, 1 or 2
    uint64_t n_clusters      # of the file, and two more: an unaligned reference may reach past it
    uint64_t n_seen          # clusters to compare: those of the file and those referred to
    uint64_t max_count

    # Refcounts stored: the table in host byte order, and per cluster whether its refcount is 1:
    # of the window, and of what lies behind the end of a file that was cut short.
    uint64_t *rt
    uint64_t n_rt
    uint8_t *rb_bad          # a byte per entry of rt: its block is no place to keep refcounts
    uint8_t *stored_one
    uint64_t n_past
    uint8_t *past_one

    q2_l2_ref *l2_refs
    uint64_t n_l2_refs
    uint64_t l2_refs_room

    # The first max_findings of what was found, and the counts of all of it.
    q2_finding *findings
    uint64_t n_findings
    uint64_t max_findings
    uint64_t corruptions
    uint64_t wrong_flags     # of these, COPIED flags that do not match a refcount
    uint64_t leaks
    uint64_t check_errors
    bint refcounts_lost      # a cluster in use has a refcount of 0
    # Something was found that may hide references, so a refcount that looks too high may not be.
    bint refs_hidden
    # That, or refcounts that cannot be trusted themselves.
    bint refs_uncertain
    uint64_t allocated
    uint64_t fragmented
    uint64_t compressed
    uint64_t highest_cluster

# Allocates the arrays, of a window that takes at most max_bytes; c must be zeroed but for g,
# file_size, has_data_file. Q2_E_NOMEM.
cdef q2_status census_begin(q2_census *c, uint64_t n_rt, uint64_t max_findings,
                            uint64_t max_bytes) noexcept nogil
cdef void census_end(q2_census *c) noexcept nogil
# Forgets the counts and moves the window on to where something may be referred to or have a
# refcount. False behind the last.
cdef bint next_window(q2_census *c) noexcept nogil
cdef bint in_window(const q2_census *c, uint64_t host_cl) noexcept nogil
# References to a cluster of the window.
cdef uint64_t get_count(const q2_census *c, uint64_t host_cl) noexcept nogil
# Whether the stored refcount is 1; -1 where this pass cannot tell.
cdef int32_t is_stored_one(const q2_census *c, uint64_t host_cl) noexcept nogil
# Whether the range ends a cluster or more behind the file.
cdef bint reaches_past_end(const q2_census *c, uint64_t host_off, uint64_t nbytes) noexcept nogil

cdef void note(q2_census *c, int32_t code, uint64_t host_off, uint64_t guest_off,
               uint64_t expected, uint64_t found, uint64_t times) noexcept nogil

# `times` references to every cluster that holds a byte of the range.
cdef void count_region(q2_census *c, uint64_t host_off, uint64_t nbytes, uint64_t guest_off,
                       uint64_t times) noexcept nogil

# One L1 table of n entries as on disk, or a part of it that starts at l1_idx. Notes its L2 tables
# for the walk. Needs stored_one to be filled. Q2_E_NOMEM.
cdef q2_status count_l1(q2_census *c, const uint8_t *table, uint64_t l1_idx, uint64_t n,
                        bint active) noexcept nogil
# Sorts the noted L2 tables by place and merges those that are the same.
cdef void merge_l2_refs(q2_census *c) noexcept nogil
# One L2 table of cluster_size bytes.
cdef void count_l2(q2_census *c, const q2_l2_ref *ref, const uint8_t *table) noexcept nogil

# The refcount blocks as the refcount table (c.rt) names them; after everything else was counted.
cdef void count_refblocks(q2_census *c) noexcept nogil
# The refcount table gives block rb_idx a place where no block can be: misaligned, or past 2^63.
cdef bint has_refblock_nowhere(const q2_census *c, uint64_t rb_idx) noexcept nogil
# Fills stored_one from the refcount block (NULL: all zeros) of index rb_idx.
cdef void learn_refblock(q2_census *c, uint64_t rb_idx, const uint8_t *block) noexcept nogil
# Compares the refcounts of a block (NULL: all zeros) with what was counted.
cdef void compare_refblock(q2_census *c, uint64_t rb_idx, const uint8_t *block) noexcept nogil
# Makes the refcounts of a block what was counted: only those that are too low, or those too high.
# Answers whether it changed any.
cdef bint raise_refcounts(const q2_census *c, uint64_t rb_idx, uint8_t *block) noexcept nogil
cdef bint lower_refcounts(const q2_census *c, uint64_t rb_idx, uint8_t *block) noexcept nogil
# Counts what leaks as used: for a repair that leaves leaks alone. After raise_refcounts.
cdef void adopt_refcounts(q2_census *c, uint64_t rb_idx, const uint8_t *block) noexcept nogil
# Whether anything of block rb_idx was counted.
cdef bint is_block_used(const q2_census *c, uint64_t rb_idx) noexcept nogil
# The refcounts of a block that cannot be read: each is a check error.
cdef void miss_refblock(q2_census *c, uint64_t rb_idx) noexcept nogil
