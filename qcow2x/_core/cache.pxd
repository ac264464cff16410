# Metadata slices in memory: L2 table slices in one cache, refcount block slices in another.
#
# A slice is 1 << slice_bits bytes of a table, keyed by its host offset. The cache holds no lock
# of its own and does no I/O: every function says what the caller must hold of the image's metadata
# lock. What a dirty slice has to wait for is kept beside it as edges (see `after`).
from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t

from qcow2x._core.condensed cimport q2_condensed
from qcow2x._core.status cimport q2_status
from qcow2x._core.sync cimport q2_touch

cdef enum:
    SLOT_EMPTY = 0
    SLOT_LOADING = 1    # being read without the lock; nobody else may touch it
    SLOT_VALID = 2

cdef enum:
    # Ranks of metadata in the order of writes. An edge may only point from a lower rank to a
    # higher one, so that no cycle can be stated; what would need the other direction (a refcount
    # that drops after its mapping is gone) waits outside the cache, see retire.pyx.
    RANK_DATA = 0
    RANK_REFBLOCK = 1
    RANK_L2 = 2
    RANK_L1 = 3

cdef enum:
    MOST_TOGETHER = 8

cdef struct q2_slot:
    uint64_t key           # host offset of the slice
    uint8_t *data          # slice bytes as on disk, big-endian, aligned for O_DIRECT
    uint64_t need_seq      # the file's write_seq that must be durable before this is written
    int32_t next           # chain of the hash bucket, -1 at its end
    uint8_t state
    uint8_t used           # looked at since the clock hand last passed
    uint8_t writing        # a copy is on its way to the file: neither evict nor reuse
    uint8_t dirty          # one bit per 512-byte sector
    uint8_t stale          # forgotten while it was loading: what comes is old
    uint8_t after_refblock # edge: every dirty refcount block before this slice

cdef struct q2_cache:
    q2_slot *slots
    int32_t *buckets
    uint32_t bucket_mask
    uint32_t slice_bits
    uint32_t max_slots
    uint32_t hand
    uint8_t rank
    # Atomic, changed under the exclusive lock: stats() looks at them without any.
    uint32_t n_slots       # that own memory, whatever they hold
    uint32_t n_dirty
    uint64_t n_loads       # reads of the file, of one slice or of several
    uint64_t n_evictions
    uint64_t n_dirtied     # slices that became dirty
    q2_condensed condensed # those that were forgotten, if they are few words; L2 tables only

cdef enum:
    # Enough for every slice that one request pins while it plans, many threads at once; a bound
    # below this would trade memory (64 * 4 KiB) for livelock.
    MIN_SLOTS = 64

cdef inline uint64_t least_bytes(uint32_t slice_bits) noexcept nogil:
    return <uint64_t>MIN_SLOTS << slice_bits

cdef q2_status cache_init(q2_cache *c, uint8_t rank, uint32_t slice_bits,
                          uint64_t max_bytes) noexcept nogil
cdef void cache_free(q2_cache *c) noexcept nogil

# Buckets hold slot number + 1, so that fresh zeroed memory means empty.
cdef inline int32_t *bucket_of(q2_cache *c, uint64_t key) noexcept nogil:
    cdef uint64_t mixed = (key >> c.slice_bits) * <uint64_t>0x9E3779B97F4A7C15
    return &c.buckets[<uint32_t>(mixed >> 32) & c.bucket_mask]

# Shared or exclusive lock. Whatever state it is in.
cdef inline q2_slot *cache_find(q2_cache *c, uint64_t key) noexcept nogil:
    cdef int32_t i = bucket_of(c, key)[0] - 1
    while i >= 0:
        if c.slots[i].key == key and c.slots[i].state != SLOT_EMPTY:
            return &c.slots[i]
        i = c.slots[i].next
    return NULL

# Shared or exclusive lock. NULL if the slice is absent or still loading.
cdef inline q2_slot *cache_get(q2_cache *c, uint64_t key) noexcept nogil:
    cdef q2_slot *slot = cache_find(c, key)
    if slot is NULL or slot.state != SLOT_VALID:
        return NULL
    q2_touch(&slot.used)
    return slot

# Exclusive lock. Q2_OK: *out is a slot in SLOT_LOADING for the caller to fill and finish (or, with
# *already set, one that is valid, be it made of its record). Q2_BUSY: another thread loads it. Q2_FULL: write back first.
cdef q2_status cache_begin_load(q2_cache *c, uint64_t key, q2_slot **out,
                                bint *already) noexcept nogil
# Exclusive lock. What may be read together with `slot`, which is being loaded: absent slices next to
# it inside the same aligned `window` bytes, at most MOST_TOGETHER in all and only as many as there is
# memory for without another slice being forgotten. `together` gets their slots, in SLOT_LOADING and
# ordered by key, `slot` among them. Returns how many.
cdef uint32_t cache_widen_load(q2_cache *c, q2_slot *slot, uint64_t window,
                               q2_slot **together) noexcept nogil
# Exclusive lock. A load that failed forgets the slice.
cdef void cache_end_load(q2_cache *c, q2_slot *slot, bint filled) noexcept nogil

# Exclusive lock. `slice` is what the file had at `key` when c.n_dirtied was what it is now, and since
# then the table was not dropped: a record of it, if it is not cached.
cdef void cache_note_absent(q2_cache *c, uint64_t key, const uint8_t *slice) noexcept nogil

# Exclusive lock. Bytes [first, first + nbytes) of the slice were changed.
cdef void cache_dirty(q2_cache *c, q2_slot *slot, uint32_t first, uint32_t nbytes) noexcept nogil

# Exclusive lock. States the edge "`rank` before this slice"; seq is the write_seq to be durable
# for RANK_DATA and unused otherwise. Q2_E_ORDER where the edge would point downwards.
cdef q2_status cache_after(q2_cache *c, q2_slot *slot, uint8_t rank, uint64_t seq) noexcept nogil

# Exclusive lock. Forgets every slice inside [key, key + nbytes), dirty or not: the table is gone.
cdef void cache_drop(q2_cache *c, uint64_t key, uint64_t nbytes) noexcept nogil

# Exclusive lock. Forgets every slice, also those still loading: the file was changed beneath the
# cache.
cdef void cache_forget_all(q2_cache *c) noexcept nogil
