# cython: language_level=3
"""L2 slices in 16 bytes each: the first entry, and whether the others are the same or follow it."""
from libc.stdint cimport int32_t, int64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memmove

from qcow2x._core.errors cimport fail
from qcow2x._core.status cimport *
from qcow2x._core.wire cimport (Q2_BITMAP_ALL_ALLOC, Q2_L2E_OFFSET_MASK, q2_load_be64,
                                q2_store_be64)

cdef enum:
    RECORD_FOLLOWS = 1      # each entry names the cluster behind the one before
    # Two lines of the CPU's cache. Half full, sets of 8 have no room for 0.8 % of what falls to them,
    # sets of 4 for 3.7 %.
    SET_RECORDS = 8


cdef q2_status condensed_init(q2_condensed *c, uint64_t max_bytes, uint32_t slice_bits,
                              uint32_t entry_bits, uint32_t cluster_bits) noexcept nogil:
    c.n_sets = max_bytes // (SET_RECORDS * sizeof(q2_record))
    c.slice_bits = slice_bits
    c.entry_bits = entry_bits
    c.cluster_size = <uint64_t>1 << cluster_bits
    c.worthwhile = False
    # calloc of large arrays touches no memory before use.
    c.record = <q2_record *>calloc(c.n_sets * SET_RECORDS, sizeof(q2_record))
    if c.record is NULL:
        return fail(Q2_E_NOMEM, Q2_SITE_NONE, 0, b"no memory for the metadata cache")
    return Q2_OK


cdef void condensed_free(q2_condensed *c) noexcept nogil:
    free(c.record)
    c.record = NULL


cdef uint64_t condensed_bytes(const q2_condensed *c) noexcept nogil:
    return 0 if c.record is NULL else c.n_sets * SET_RECORDS * sizeof(q2_record)


cdef inline q2_record *set_of(const q2_condensed *c, uint64_t key) noexcept nogil:
    cdef uint64_t mixed = ((key >> c.slice_bits) * <uint64_t>0x9E3779B97F4A7C15) >> 32
    return &c.record[(mixed * c.n_sets >> 32) * SET_RECORDS]


cdef inline q2_record *find(const q2_condensed *c, uint64_t key) noexcept nogil:
    cdef q2_record *record
    cdef int32_t i
    if c.record is NULL:
        return NULL
    record = set_of(c, key)
    for i in range(SET_RECORDS):
        if record[i].key & ~<uint64_t>RECORD_FOLLOWS == key:
            return &record[i]
    return NULL


# What the entries step by: 0 or a cluster. -1: neither.
cdef int64_t step_of(const q2_condensed *c, const uint8_t *slice) noexcept nogil:
    cdef const uint8_t *end = slice + (<size_t>1 << c.slice_bits)
    cdef size_t width = <size_t>1 << c.entry_bits
    cdef uint64_t first = q2_load_be64(slice)
    cdef uint64_t step = q2_load_be64(slice + width) - first
    cdef uint64_t wanted = first
    cdef const uint8_t *at = slice
    if step != 0 and step != c.cluster_size:
        return -1
    while at < end:
        if q2_load_be64(at) != wanted:
            return -1
        if c.entry_bits == 4 and q2_load_be64(at + 8) != bitmap_beside(wanted):
            return -1
        wanted += step
        at += width
    return <int64_t>step


# All subclusters of a cluster that is there are, of one that is not none. What else there is stays long.
cdef inline uint64_t bitmap_beside(uint64_t entry) noexcept nogil:
    return Q2_BITMAP_ALL_ALLOC if entry & Q2_L2E_OFFSET_MASK else 0


cdef q2_record *make_room(q2_condensed *c, uint64_t key) noexcept nogil:
    """A record at the front of its set; the oldest goes if none is free."""
    cdef q2_record *record = set_of(c, key)
    cdef int32_t i = 0
    while i < SET_RECORDS - 1 and record[i].key:
        i += 1
    if record[i].key:
        c.worthwhile = False
    memmove(record + 1, record, i * sizeof(q2_record))
    return record


cdef void condensed_note(q2_condensed *c, uint64_t key, const uint8_t *slice) noexcept nogil:
    cdef q2_record *record
    cdef int64_t step
    if c.record is NULL:
        return
    step = step_of(c, slice)
    c.worthwhile = step >= 0
    if step < 0:
        condensed_forget(c, key)
        return
    record = find(c, key)
    if record is NULL:
        record = make_room(c, key)
    record.key = key | (RECORD_FOLLOWS if step else 0)
    record.first = q2_load_be64(slice)


cdef void condensed_forget(q2_condensed *c, uint64_t key) noexcept nogil:
    cdef q2_record *record = find(c, key)
    if record is not NULL:
        record.key = 0


cdef void condensed_forget_all(q2_condensed *c) noexcept nogil:
    # What was never written to is not touched by this either.
    cdef uint64_t i
    for i in range(c.n_sets * SET_RECORDS if c.record is not NULL else 0):
        if c.record[i].key:
            c.record[i].key = 0


cdef bint condensed_slice(const q2_condensed *c, uint64_t key, uint8_t *slice) noexcept nogil:
    cdef const q2_record *record = find(c, key)
    cdef const uint8_t *end = slice + (<size_t>1 << c.slice_bits)
    cdef size_t width = <size_t>1 << c.entry_bits
    cdef uint64_t entry, step
    if record is NULL:
        return False
    entry = record.first
    step = c.cluster_size if record.key & RECORD_FOLLOWS else 0
    while slice < end:
        q2_store_be64(slice, entry)
        if c.entry_bits == 4:
            q2_store_be64(slice + 8, bitmap_beside(entry))
        entry += step
        slice += width
    return True


cdef bint condensed_entry(const q2_condensed *c, uint64_t key, uint64_t index,
                          uint64_t *entry) noexcept nogil:
    cdef const q2_record *record = find(c, key)
    if record is NULL:
        return False
    entry[0] = record.first + (index * c.cluster_size if record.key & RECORD_FOLLOWS else 0)
    return True
