# L2 slices that were forgotten and say little: entries that are all the same, or clusters that follow
# one another, as those of a disk that was filled in order. 16 bytes instead of 4 KiB, so that where a
# 1 TiB disk lies fits into an 8 MiB cache. A record is what the file has, unless its slice is in the
# cache: who takes the slice's memory makes the record anew. No I/O and no lock of its own, as cache.pxd.
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from qcow2x._core.status cimport q2_status

cdef struct q2_record:
    uint64_t key        # host offset of the slice, a multiple of 512, and in its low bits RECORD_FOLLOWS; 0: none
    uint64_t first      # its first entry, without the bitmap of an extended one

cdef struct q2_condensed:
    q2_record *record       # n_sets times SET_RECORDS; NULL: none are kept
    uint64_t n_sets
    uint64_t cluster_size
    uint32_t slice_bits
    uint32_t entry_bits     # log2 of an entry's bytes
    bint worthwhile         # the last slice was one of these, and no other had to make room for it

cdef q2_status condensed_init(q2_condensed *c, uint64_t max_bytes, uint32_t slice_bits,
                              uint32_t entry_bits, uint32_t cluster_bits) noexcept nogil
cdef void condensed_free(q2_condensed *c) noexcept nogil
cdef uint64_t condensed_bytes(const q2_condensed *c) noexcept nogil

# Exclusive lock. The slice at `key` is as the file has it: a record of it, or none if it says too much.
cdef void condensed_note(q2_condensed *c, uint64_t key, const uint8_t *slice) noexcept nogil
cdef void condensed_forget(q2_condensed *c, uint64_t key) noexcept nogil
cdef void condensed_forget_all(q2_condensed *c) noexcept nogil

# Shared or exclusive lock. The whole slice; one entry of it (not extended). False: there is no record.
cdef bint condensed_slice(const q2_condensed *c, uint64_t key, uint8_t *slice) noexcept nogil
cdef bint condensed_entry(const q2_condensed *c, uint64_t key, uint64_t index,
                          uint64_t *entry) noexcept nogil
