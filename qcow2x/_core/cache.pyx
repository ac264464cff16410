# cython: language_level=3
"""Metadata slices in memory, with a bound, a clock hand and the edges of the order of writes."""
from libc.stdlib cimport calloc, free
from libc.string cimport memset
from posix.stdlib cimport posix_memalign

from qcow2x._core.condensed cimport (condensed_forget, condensed_forget_all, condensed_free,
                                     condensed_note, condensed_slice)
from qcow2x._core.errors cimport fail
from qcow2x._core.status cimport *
from qcow2x._core.sync cimport q2_store, q2_store32

cdef q2_status cache_init(q2_cache *c, uint8_t rank, uint32_t slice_bits,
                          uint64_t max_bytes) noexcept nogil:
    cdef uint64_t slots = max_bytes >> slice_bits
    cdef uint32_t buckets = 128
    memset(c, 0, sizeof(q2_cache))
    if slots < MIN_SLOTS:
        slots = MIN_SLOTS
    if slots > 1 << 28:
        slots = 1 << 28
    while buckets < slots * 2:
        buckets *= 2
    c.rank = rank
    c.slice_bits = slice_bits
    c.max_slots = <uint32_t>slots
    c.bucket_mask = buckets - 1
    # calloc of large arrays touches no memory before use: an image pays for what it caches.
    c.slots = <q2_slot *>calloc(slots, sizeof(q2_slot))
    c.buckets = <int32_t *>calloc(buckets, sizeof(int32_t))
    if c.slots is NULL or c.buckets is NULL:
        cache_free(c)
        return fail(Q2_E_NOMEM, Q2_SITE_NONE, 0, b"no memory for the metadata cache")
    return Q2_OK


cdef void cache_free(q2_cache *c) noexcept nogil:
    cdef uint32_t i
    if c.slots is not NULL:
        for i in range(c.n_slots):
            free(c.slots[i].data)
    condensed_free(&c.condensed)
    free(c.slots)
    free(c.buckets)
    c.slots = NULL
    c.buckets = NULL
    c.n_slots = 0
    c.n_dirty = 0


cdef void unlink(q2_cache *c, q2_slot *slot) noexcept nogil:
    cdef int32_t wanted = <int32_t>(slot - c.slots)
    cdef int32_t *bucket = bucket_of(c, slot.key)
    cdef int32_t i = bucket[0] - 1
    if i == wanted:
        bucket[0] = slot.next + 1
        return
    while i >= 0:
        if c.slots[i].next == wanted:
            c.slots[i].next = slot.next
            return
        i = c.slots[i].next


cdef void forget(q2_cache *c, q2_slot *slot) noexcept nogil:
    unlink(c, slot)
    if slot.dirty:
        q2_store32(&c.n_dirty, c.n_dirty - 1)
    slot.state = SLOT_EMPTY
    slot.dirty = 0
    slot.stale = 0
    slot.need_seq = 0
    slot.after_refblock = 0


cdef q2_slot *take_slot(q2_cache *c) noexcept nogil:
    """A slot that holds nothing: a new one below the bound, else the first clean one that the
    clock hand finds unused for a whole turn. NULL if all are dirty, loading or being written."""
    cdef q2_slot *slot
    cdef uint32_t step
    cdef void *memory = NULL
    if (c.n_slots < c.max_slots
            and posix_memalign(&memory, 4096, <size_t>1 << c.slice_bits) == 0):
        slot = &c.slots[c.n_slots]
        slot.data = <uint8_t *>memory
        q2_store32(&c.n_slots, c.n_slots + 1)
        return slot
    for step in range(2 * c.n_slots):
        slot = &c.slots[c.hand]
        c.hand = c.hand + 1 if c.hand + 1 < c.n_slots else 0
        if slot.state == SLOT_EMPTY and not slot.writing:
            return slot
        if slot.state != SLOT_VALID or slot.dirty or slot.writing:
            continue
        if slot.used:
            slot.used = 0
            continue
        condensed_note(&c.condensed, slot.key, slot.data)
        forget(c, slot)
        q2_store(&c.n_evictions, c.n_evictions + 1)
        return slot
    return NULL


cdef void enter(q2_cache *c, q2_slot *slot, uint64_t key) noexcept nogil:
    cdef int32_t *bucket = bucket_of(c, key)
    slot.key = key
    slot.next = bucket[0] - 1
    bucket[0] = <int32_t>(slot - c.slots) + 1
    slot.state = SLOT_LOADING


cdef q2_status cache_begin_load(q2_cache *c, uint64_t key, q2_slot **out,
                                bint *already) noexcept nogil:
    cdef q2_slot *slot = cache_find(c, key)
    already[0] = False
    if slot is not NULL:
        if slot.state == SLOT_LOADING:
            return Q2_BUSY
        out[0] = slot
        already[0] = True
        return Q2_OK
    slot = take_slot(c)
    if slot is NULL:
        if c.n_slots == 0:
            return fail(Q2_E_NOMEM, Q2_SITE_NONE, key, b"no memory for a metadata slice")
        return Q2_FULL
    enter(c, slot, key)
    slot.used = 1
    if condensed_slice(&c.condensed, key, slot.data):
        slot.state = SLOT_VALID
        out[0] = slot
        already[0] = True
        return Q2_OK
    q2_store(&c.n_loads, c.n_loads + 1)
    out[0] = slot
    return Q2_OK


cdef inline bint could_enter(q2_cache *c, uint64_t key) noexcept nogil:
    return c.n_slots < c.max_slots and cache_find(c, key) is NULL


cdef uint32_t cache_widen_load(q2_cache *c, q2_slot *slot, uint64_t window,
                               q2_slot **together) noexcept nogil:
    cdef uint64_t step = <uint64_t>1 << c.slice_bits
    cdef uint64_t first = slot.key
    cdef uint64_t end = slot.key + step
    cdef uint64_t low = slot.key & ~(window - 1)
    cdef uint64_t high = low + window
    cdef uint64_t room = c.max_slots - c.n_slots
    cdef uint64_t at
    cdef uint32_t n = 0
    if high - low > MOST_TOGETHER * step:
        low = slot.key & ~(MOST_TOGETHER * step - 1)
        high = low + MOST_TOGETHER * step
    # What follows first: it is wanted next by who goes through the disk in order.
    while end < high and room and could_enter(c, end):
        end += step
        room -= 1
    while first > low and room and could_enter(c, first - step):
        first -= step
        room -= 1
    at = first
    while at < end:
        together[n] = slot
        if at != slot.key:
            together[n] = take_slot(c)
            if together[n] is NULL:
                # Out of memory: what was wanted is read alone.
                while n:
                    n -= 1
                    if together[n] is not slot:
                        forget(c, together[n])
                together[0] = slot
                return 1
            # Not looked at yet: the first to be forgotten again.
            together[n].used = 0
            enter(c, together[n], at)
        n += 1
        at += step
    return n


cdef void cache_end_load(q2_cache *c, q2_slot *slot, bint filled) noexcept nogil:
    if filled and not slot.stale:
        slot.state = SLOT_VALID
    else:
        forget(c, slot)


cdef void cache_note_absent(q2_cache *c, uint64_t key, const uint8_t *slice) noexcept nogil:
    if cache_find(c, key) is NULL:
        condensed_note(&c.condensed, key, slice)


cdef void cache_dirty(q2_cache *c, q2_slot *slot, uint32_t first, uint32_t nbytes) noexcept nogil:
    cdef uint32_t low = first >> 9
    cdef uint32_t high = (first + nbytes - 1) >> 9
    if not slot.dirty:
        q2_store32(&c.n_dirty, c.n_dirty + 1)
        c.n_dirtied += 1
    slot.dirty |= <uint8_t>(((2 << high) - 1) & ~((1 << low) - 1))


cdef q2_status cache_after(q2_cache *c, q2_slot *slot, uint8_t rank, uint64_t seq) noexcept nogil:
    if rank >= c.rank:
        return fail(Q2_E_ORDER, Q2_SITE_NONE, slot.key, b"edge against the order of writes")
    if rank == RANK_DATA:
        if seq > slot.need_seq:
            slot.need_seq = seq
    else:
        slot.after_refblock = 1
    return Q2_OK


cdef void cache_drop(q2_cache *c, uint64_t key, uint64_t nbytes) noexcept nogil:
    cdef uint64_t at = key
    cdef q2_slot *slot
    while at < key + nbytes:
        slot = cache_find(c, at)
        if slot is not NULL and slot.state == SLOT_VALID:
            forget(c, slot)
        elif slot is not NULL:
            slot.stale = 1
        condensed_forget(&c.condensed, at)
        at += <uint64_t>1 << c.slice_bits


cdef void cache_forget_all(q2_cache *c) noexcept nogil:
    cdef uint32_t i
    for i in range(c.n_slots):
        if c.slots[i].state == SLOT_VALID:
            forget(c, &c.slots[i])
        elif c.slots[i].state == SLOT_LOADING:
            c.slots[i].stale = 1
    condensed_forget_all(&c.condensed)
