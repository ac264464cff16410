# cython: language_level=3
"""Metadata between memory and file.

Dirty slices are copied under the shared lock and written without it, so that neither a read nor a
write in place waits for the disk. One thread at a time does this (the commit lock); it writes the
ranks in order, with a barrier between two of them only where an edge asks for one:

    refcount blocks, and data that must not be lost   -- barrier --
    L2 slices                                         -- barrier --
    L1 sectors                                        -- sync (of a flush) --
    then, and only then, freed clusters are retired (retire.pyx)
"""
from libc.stdint cimport int32_t, uint8_t, uint32_t
from libc.stdlib cimport free, malloc, qsort
from libc.string cimport memcpy, memset
from posix.stdlib cimport posix_memalign

from qcow2x._core.batch cimport q2_beside, write_beside
from qcow2x._core.cache cimport (MOST_TOGETHER, SLOT_VALID, cache_begin_load, cache_end_load,
                                 cache_note_absent, cache_widen_load, q2_cache, q2_slot)
from qcow2x._core.edges cimport *
from qcow2x._core.errors cimport fail
from qcow2x._core.overlap cimport guard_refblocks
from qcow2x._core.state cimport (poison_unless_full, poison_unless_kept, q2_runs, room_enter, room_wait, room_wake,
                                 runs_append, runs_take)
from qcow2x._core.status cimport *
from qcow2x._core.storage cimport WRITE_DEFERRED
from qcow2x._core.sync cimport *
from qcow2x._core.wire cimport (Q2_HDR_INCOMPAT, Q2_INCOMPAT_CORRUPT,
                                Q2_INCOMPAT_DIRTY, q2_load_be64,
                                q2_store_be64)


cdef q2_status load_reftable(ImageState img) noexcept nogil:
    cdef uint64_t *table
    cdef uint64_t i, entries, host_off
    cdef bint there
    cdef q2_status st
    pthread_rwlock_rdlock(&img.meta)
    there = img.rt is not NULL
    entries = img.rt_entries
    host_off = img.rt_offset
    pthread_rwlock_unlock(&img.meta)
    if there:
        return Q2_OK
    table = <uint64_t *>malloc(entries * 8 + 1)
    if table is NULL:
        return fail(Q2_E_NOMEM, Q2_SITE_REFTABLE_READ, host_off,
                    b"no memory for the refcount table")
    # Its place and size change only after somebody has loaded it.
    st = img.file.read_at(Q2_SITE_REFTABLE_READ, table, entries * 8, host_off)
    for i in range(entries):
        table[i] = q2_load_be64(&table[i])
    pthread_rwlock_wrlock(&img.meta)
    if st == Q2_OK and img.rt is NULL:
        img.rt = table
        table = NULL
        st = guard_refblocks(img)
    pthread_rwlock_unlock(&img.meta)
    free(table)
    return st


cdef q2_status refuse_past_end(ImageState img, int32_t site, uint64_t host_off,
                               uint64_t nbytes) noexcept nogil:
    """Past its end a file reads as zeros, and a table of zeros is a valid one: in a file that was
    cut short old data would show through. So a table must lie inside the file."""
    cdef uint64_t end = q2_load(&img.host_size)
    cdef q2_status st
    if host_off < end and nbytes <= end - host_off:
        return Q2_OK
    # Another process may have grown the file since it was looked at.
    st = img.file.get_size(&end)
    if st != Q2_OK:
        return st
    q2_raise_to(&img.host_size, end)
    if host_off < end and nbytes <= end - host_off:
        return Q2_OK
    return fail(Q2_E_CORRUPT, site, host_off, b"the table reaches past the end of the file")


cdef q2_status write_dirty_bit(ImageState img, bint dirty) noexcept nogil:
    cdef uint64_t before, after
    cdef q2_status st
    # Who makes the refcount table grow changes `head` as well, and has not got commit.
    pthread_rwlock_wrlock(&img.meta)
    before = img.header.fields.incompat
    after = before | Q2_INCOMPAT_DIRTY if dirty else before & ~Q2_INCOMPAT_DIRTY
    q2_store_be64(img.head + Q2_HDR_INCOMPAT, after)
    st = write_head(img, Q2_SITE_HEADER_UPDATE, Q2_EDGE_NONE)
    pthread_rwlock_unlock(&img.meta)
    # That refcounts are right again orders nothing: said too late, they are only looked at in vain.
    if st == Q2_OK and dirty and q2_keeps(Q2_EDGE_DIRTY_BEFORE_LAZY):
        st = poison_unless_full(img, img.file.sync(Q2_SITE_BARRIER))
    pthread_rwlock_wrlock(&img.meta)
    if st == Q2_OK:
        q2_store(&img.header.fields.incompat, after)
    else:
        q2_store_be64(img.head + Q2_HDR_INCOMPAT, before)
    pthread_rwlock_unlock(&img.meta)
    return st


cdef q2_status begin_lazy(ImageState img, bint committing) noexcept nogil:
    """Edge: the dirty bit before anything that counts on a refcount which is not on disk."""
    cdef q2_status st = Q2_OK
    if not committing:
        pthread_mutex_lock(&img.commit)
    if not q2_load(&img.lazy_dirty):
        st = write_dirty_bit(img, True)
        if st == Q2_OK:
            q2_store(&img.lazy_dirty, 1)
    if not committing:
        pthread_mutex_unlock(&img.commit)
    return st


cdef q2_status read_slices(ImageState img, int32_t site, q2_cache *cache, q2_slot **together,
                           uint32_t n) noexcept nogil:
    """Fills `n` slots that follow one another in the file; only their state is anybody else's."""
    cdef size_t slice_bytes = <size_t>1 << cache.slice_bits
    cdef void *buffer = NULL
    cdef uint32_t i
    cdef q2_status st = refuse_past_end(img, site, together[0].key, n * slice_bytes)
    if st != Q2_OK:
        return st
    if n == 1:
        return img.file.read_at(site, together[0].data, slice_bytes, together[0].key)
    if posix_memalign(&buffer, 4096, n * slice_bytes) != 0:
        return fail(Q2_E_NOMEM, site, together[0].key, b"no memory for slices of metadata")
    st = img.file.read_at(site, buffer, n * slice_bytes, together[0].key)
    if st == Q2_OK:
        for i in range(n):
            memcpy(together[i].data, <uint8_t *>buffer + i * slice_bytes, slice_bytes)
    free(buffer)
    return st


cdef q2_status read_around(ImageState img, q2_cache *cache, q2_slot *slot, uint8_t *buffer,
                           uint64_t first, uint64_t nbytes) noexcept nogil:
    """Fills the slot out of a read of what lies around it, too."""
    cdef q2_status st = refuse_past_end(img, Q2_SITE_L2_LOAD, first, nbytes)
    if st == Q2_OK:
        st = img.file.read_at(Q2_SITE_L2_LOAD, buffer, nbytes, first)
    if st == Q2_OK:
        memcpy(slot.data, buffer + (slot.key - first), <size_t>1 << cache.slice_bits)
    return st


cdef void note_around(q2_cache *cache, q2_slot *slot, const uint8_t *buffer, uint64_t first,
                      uint64_t nbytes, uint64_t n_dirtied) noexcept nogil:
    """meta, exclusive. Nothing of the table was changed since the read began if no slice became dirty; if
    the table is another by now, `slot` has gone stale."""
    cdef uint64_t at = 0
    if slot.stale or cache.n_dirtied != n_dirtied:
        return
    while at < nbytes:
        cache_note_absent(cache, first + at, buffer + at)
        at += <uint64_t>1 << cache.slice_bits


cdef q2_status load(ImageState img, uint64_t miss, bint committing) noexcept nogil:
    cdef int32_t site = Q2_SITE_REFBLOCK_LOAD if miss & 1 else Q2_SITE_L2_LOAD
    cdef q2_cache *cache = &img.refblocks if miss & 1 else &img.l2
    cdef uint64_t key = miss & ~<uint64_t>1
    cdef q2_slot *slot = NULL
    cdef q2_slot *together[MOST_TOGETHER]
    cdef uint32_t n = 1, i
    cdef bint already
    cdef uint64_t turn, n_dirtied = 0
    cdef uint64_t window = min(img.geo.cluster_size, <uint64_t>MOST_TOGETHER << cache.slice_bits)
    cdef void *around = NULL
    cdef q2_status st
    if miss == MISSING_REFTABLE:
        return load_reftable(img)
    if miss == MISSING_DIRTY_BIT:
        return begin_lazy(img, committing)
    pthread_rwlock_wrlock(&img.meta)
    st = cache_begin_load(cache, key, &slot, &already)
    if st == Q2_BUSY or (st == Q2_FULL and cache.n_dirty == 0):
        # Somebody else is reading it, or readers hold every slot: both end soon.
        turn = room_enter(img)
        pthread_rwlock_unlock(&img.meta)
        room_wait(img, turn)
        return Q2_OK
    if st == Q2_OK and not already:
        together[0] = slot
        # Reading 32 KiB of an L2 table takes little longer than reading 4 KiB (O_DIRECT: 85 and 65 us),
        # and spares whoever goes through a disk, or all over it, seven such reads. Whoever listens to
        # sites is asked for what is needed and nothing else.
        if cache is &img.l2 and not img.file.listens:
            n = cache_widen_load(cache, slot, img.geo.cluster_size, together)
            # Without memory for its neighbours there may be some for what little they say.
            n_dirtied = cache.n_dirtied
            if n == 1 and cache.condensed.worthwhile and window >> cache.slice_bits > 1:
                if posix_memalign(&around, 4096, window) != 0:
                    around = NULL
    pthread_rwlock_unlock(&img.meta)
    if st == Q2_FULL:
        return write_back_locked(img, False) if committing else write_back(img)
    if st != Q2_OK or already:
        return st
    if around is not NULL:
        st = read_around(img, cache, slot, <uint8_t *>around, key & ~(window - 1), window)
        if st != Q2_OK:
            free(around)
            around = NULL
    if around is NULL:
        st = read_slices(img, site, cache, together, n)
    if st != Q2_OK and n > 1:
        # It may be a neighbour that cannot be read.
        pthread_rwlock_wrlock(&img.meta)
        for i in range(n):
            if together[i] is not slot:
                cache_end_load(cache, together[i], False)
        pthread_rwlock_unlock(&img.meta)
        n = 1
        together[0] = slot
        st = read_slices(img, site, cache, together, 1)
    pthread_rwlock_wrlock(&img.meta)
    if around is not NULL:
        note_around(cache, slot, <uint8_t *>around, key & ~(window - 1), window, n_dirtied)
    for i in range(n):
        cache_end_load(cache, together[i], st == Q2_OK)
    pthread_rwlock_unlock(&img.meta)
    free(around)
    room_wake(img)
    return st


cdef q2_status load_slice(ImageState img, uint64_t miss) noexcept nogil:
    return load(img, miss, False)


cdef q2_status load_slice_committing(ImageState img, uint64_t miss) noexcept nogil:
    return load(img, miss, True)


# One contiguous piece of metadata on its way to the file: `bytes` of them at buffer + at.
cdef struct q2_piece:
    uint64_t host_off
    uint64_t at
    uint32_t nbytes

cdef struct q2_batch:
    q2_piece *piece
    uint32_t n
    uint8_t *buffer


cdef int by_offset(const void *a, const void *b) noexcept nogil:
    cdef uint64_t x = (<const q2_piece *>a).host_off
    cdef uint64_t y = (<const q2_piece *>b).host_off
    return -1 if x < y else 1 if x > y else 0


cdef void free_batch(q2_batch *batch) noexcept nogil:
    free(batch.piece)
    free(batch.buffer)
    memset(batch, 0, sizeof(q2_batch))


cdef q2_status copy_dirty(q2_cache *cache, q2_batch *batch, uint64_t *need_seq) noexcept nogil:
    """meta, shared, and commit: copies the dirty sectors of the cache, ordered by host offset,
    and marks their slices as being written. Runs of sectors become one piece."""
    cdef uint32_t sectors = (<uint32_t>1 << cache.slice_bits) >> 9
    cdef uint32_t i, low, high
    cdef uint64_t used = 0
    cdef q2_slot *slot
    batch.n = 0
    if cache.n_dirty == 0:
        return Q2_OK
    # At most every other sector starts a run.
    batch.piece = <q2_piece *>malloc(
        <size_t>cache.n_dirty * ((sectors + 1) // 2) * sizeof(q2_piece))
    # As O_DIRECT wants it: sectors go out from here without a copy.
    if posix_memalign(<void **>&batch.buffer, 4096, <size_t>cache.n_dirty << cache.slice_bits) != 0:
        batch.buffer = NULL
    if batch.piece is NULL or batch.buffer is NULL:
        free_batch(batch)
        return fail(Q2_E_NOMEM, Q2_SITE_NONE, 0, b"no memory to write metadata back")
    for i in range(cache.n_slots):
        slot = &cache.slots[i]
        if slot.state != SLOT_VALID or slot.dirty == 0:
            continue
        low = 0
        while low < sectors:
            if not (slot.dirty >> low) & 1:
                low += 1
                continue
            high = low
            while high < sectors and (slot.dirty >> high) & 1:
                high += 1
            batch.piece[batch.n].host_off = slot.key + (<uint64_t>low << 9)
            batch.piece[batch.n].at = used
            batch.piece[batch.n].nbytes = (high - low) << 9
            memcpy(batch.buffer + used, slot.data + (low << 9), (high - low) << 9)
            used += batch.piece[batch.n].nbytes
            batch.n += 1
            low = high
        if slot.need_seq > need_seq[0]:
            need_seq[0] = slot.need_seq
        # `writing` keeps what was dirty until the write is known to have worked.
        slot.writing = slot.dirty
        slot.dirty = 0
        slot.need_seq = 0
        slot.after_refblock = 0
        q2_store32(&cache.n_dirty, cache.n_dirty - 1)
    qsort(batch.piece, batch.n, sizeof(q2_piece), by_offset)
    return Q2_OK


cdef q2_status write_batch(ImageState img, int32_t site, q2_batch *batch,
                           q2_beside *beside) noexcept nogil:
    """`beside`, where there is one, goes along with the first piece."""
    cdef uint32_t i
    cdef q2_status st
    for i in range(batch.n):
        if i == 0 and beside is not NULL:
            st = write_beside(img, site, batch.buffer + batch.piece[0].at, batch.piece[0].nbytes,
                              batch.piece[0].host_off, beside)
        else:
            st = img.file.write_at(site, batch.buffer + batch.piece[i].at, batch.piece[i].nbytes,
                                   batch.piece[i].host_off, WRITE_DEFERRED)
        if st != Q2_OK:
            # All of the batch is dirty again, whatever of it has reached the file (settle).
            return poison_unless_kept(img, st)
        q2_count(&img.count.metadata_writes, 1)
    return Q2_OK


cdef void settle(q2_cache *cache, bint written, uint64_t need_seq) noexcept nogil:
    """meta, exclusive: the copies have reached the file, or their sectors are dirty again."""
    cdef uint32_t i
    cdef q2_slot *slot
    for i in range(cache.n_slots):
        slot = &cache.slots[i]
        if not slot.writing:
            continue
        if not written and slot.state == SLOT_VALID:
            if not slot.dirty:
                q2_store32(&cache.n_dirty, cache.n_dirty + 1)
            slot.dirty |= slot.writing
            slot.after_refblock = 1
            if need_seq > slot.need_seq:
                slot.need_seq = need_seq
        slot.writing = 0


cdef q2_status copy_dirty_l1(ImageState img, q2_batch *batch) noexcept nogil:
    cdef uint64_t sectors = (<uint64_t>img.l1_size * 8 + 511) >> 9
    cdef uint64_t i, j, entry, n = 0
    batch.n = 0
    if not img.l1_is_dirty:
        return Q2_OK
    for i in range(sectors):
        n += img.l1_dirty[i] != 0
    batch.piece = <q2_piece *>malloc(n * sizeof(q2_piece))
    batch.buffer = <uint8_t *>malloc(n << 9)
    if batch.piece is NULL or batch.buffer is NULL:
        free_batch(batch)
        return fail(Q2_E_NOMEM, Q2_SITE_L1_UPDATE, img.l1_offset, b"no memory to write L1 back")
    for i in range(sectors):
        if not img.l1_dirty[i]:
            continue
        # A table that ends inside its last sector is followed by nothing of ours to spare: the
        # piece ends where the table does.
        n = <uint64_t>img.l1_size - i * 64
        if n > 64:
            n = 64
        batch.piece[batch.n].host_off = img.l1_offset + (i << 9)
        batch.piece[batch.n].at = <uint64_t>batch.n << 9
        batch.piece[batch.n].nbytes = <uint32_t>(n * 8)
        for j in range(n):
            entry = img.l1[i * 64 + j]
            q2_store_be64(batch.buffer + (<uint64_t>batch.n << 9) + 8 * j, entry)
        batch.n += 1
        img.l1_dirty[i] = 2     # being written
    img.l1_is_dirty = False
    return Q2_OK


cdef void settle_l1(ImageState img, bint written) noexcept nogil:
    """meta, exclusive."""
    cdef uint64_t sectors = (<uint64_t>img.l1_size * 8 + 511) >> 9
    cdef uint64_t i
    for i in range(sectors):
        if img.l1_dirty[i] == 2:
            img.l1_dirty[i] = 0 if written else 1
            if not written:
                img.l1_is_dirty = True


cdef q2_status barrier_for(ImageState img, uint64_t seq) noexcept nogil:
    """What was written up to `seq` is durable before anything that follows."""
    if seq <= q2_load(&img.file.durable_seq):
        return Q2_OK
    q2_count(&img.count.barriers, 1)
    return poison_unless_full(img, img.file.sync(Q2_SITE_BARRIER))


cdef q2_status restore_head(ImageState img) noexcept nogil:
    """commit. After a write of the header failed nobody knows which one the file has. Either leads to
    the same mapping until the L1 table in use changes on disk, and nothing that does is acknowledged,
    nor the other's place freed, before the sync of a flush: that makes this header durable as well."""
    cdef q2_status st
    # Under meta, as in write_dirty_bit.
    pthread_rwlock_wrlock(&img.meta)
    st = poison_unless_kept(img, img.file.write_at(Q2_SITE_HEADER_UPDATE, img.head, 512, 0,
                                                   WRITE_DEFERRED))
    q2_count(&img.count.metadata_writes, 1)
    img.head_stale = st != Q2_OK
    pthread_rwlock_unlock(&img.meta)
    return st


cdef q2_status write_ranks(ImageState img, q2_batch *refblocks, q2_batch *l2, q2_batch *l1,
                           uint64_t data_seq, q2_beside *beside) noexcept nogil:
    cdef q2_status st
    if refblocks.n:
        st = write_batch(img, Q2_SITE_REFBLOCK_UPDATE, refblocks, NULL)
        if st != Q2_OK:
            return st
        q2_raise_to(&img.refblock_seq, q2_load(&img.file.write_seq))
    if l2.n or l1.n:
        # Edges: refcounts before references; data that replaces old data before its mapping.
        # (An external data file has a count of its own, and no reason not to be asked each time.)
        if img.geo.external_data and q2_keeps(Q2_EDGE_DATA_FILE_BEFORE_L2):
            st = poison_unless_full(img, img.data.sync(Q2_SITE_BARRIER))
            if st != Q2_OK:
                return st
        if not q2_keeps(Q2_EDGE_DATA_BEFORE_L2):
            data_seq = 0
        if data_seq < q2_load(&img.refblock_seq) and q2_keeps(Q2_EDGE_REFBLOCK_BEFORE_L2):
            data_seq = q2_load(&img.refblock_seq)
        st = barrier_for(img, data_seq)
        if st != Q2_OK:
            return st
    if l2.n:
        st = write_batch(img, Q2_SITE_L2_UPDATE, l2, beside)
        if st != Q2_OK:
            return st
    if l1.n:
        # Edge: L2 tables before the L1 entries that point to them.
        if q2_keeps(Q2_EDGE_L2_BEFORE_L1):
            st = barrier_for(img, q2_load(&img.table_seq))
            if st != Q2_OK:
                return st
        return write_batch(img, Q2_SITE_L1_UPDATE, l1, NULL)
    return Q2_OK


cdef q2_status write_back_parts(ImageState img, bint make_durable, bint with_refcounts,
                                q2_beside *beside) noexcept nogil:
    cdef q2_batch refblocks, l2, l1
    cdef q2_runs unmapped
    cdef uint64_t data_seq = 0, seq
    cdef q2_status st = Q2_OK
    memset(&refblocks, 0, sizeof(q2_batch))
    memset(&l2, 0, sizeof(q2_batch))
    memset(&l1, 0, sizeof(q2_batch))
    memset(&unmapped, 0, sizeof(q2_runs))
    if img.head_stale:
        st = restore_head(img)
        if st != Q2_OK:
            return st
    # Shared would do to copy, but the dropped list is taken at the same instant.
    pthread_rwlock_wrlock(&img.meta)
    seq = q2_load(&img.meta_seq)
    # All or nothing: what cannot be copied now stays dirty.
    if with_refcounts:
        st = copy_dirty(&img.refblocks, &refblocks, &data_seq)
    if st == Q2_OK:
        st = copy_dirty(&img.l2, &l2, &data_seq)
    if st == Q2_OK:
        st = copy_dirty_l1(img, &l1)
    if st == Q2_OK and make_durable:
        runs_take(&img.dropped, &unmapped)
    pthread_rwlock_unlock(&img.meta)
    if st == Q2_OK:
        st = write_ranks(img, &refblocks, &l2, &l1, data_seq, beside)
    if (st == Q2_OK and make_durable and img.geo.external_data
            and q2_keeps(Q2_EDGE_DATA_FILE_BEFORE_FLUSH_RETURNS)):
        st = poison_unless_full(img, img.data.sync(Q2_SITE_FLUSH))
    if st == Q2_OK and make_durable and q2_keeps(Q2_EDGE_ALL_BEFORE_FLUSH_RETURNS):
        st = poison_unless_full(img, img.file.sync(Q2_SITE_FLUSH))
    pthread_rwlock_wrlock(&img.meta)
    settle(&img.refblocks, st == Q2_OK, 0)
    settle(&img.l2, st == Q2_OK, data_seq)
    settle_l1(img, st == Q2_OK)
    if st == Q2_OK and make_durable:
        q2_raise_to(&img.meta_durable, seq)
        st = runs_append(&img.limbo[img.epoch & 1], &unmapped)
    elif unmapped.n:
        # Not durably unmapped after all: they wait for the next flush.
        runs_append(&img.dropped, &unmapped)
    pthread_rwlock_unlock(&img.meta)
    free(unmapped.run)
    free_batch(&refblocks)
    free_batch(&l2)
    free_batch(&l1)
    room_wake(img)
    return st


cdef q2_status write_back_locked(ImageState img, bint make_durable) noexcept nogil:
    return write_back_parts(img, make_durable, True, NULL)


cdef q2_status write_back_for_guest(ImageState img, q2_beside *beside) noexcept nogil:
    return write_back_parts(img, True, not q2_load(&img.lazy_dirty), beside)


cdef q2_status write_back(ImageState img) noexcept nogil:
    cdef q2_status st
    pthread_mutex_lock(&img.commit)
    st = write_back_locked(img, False)
    pthread_mutex_unlock(&img.commit)
    return st


cdef q2_status write_head(ImageState img, int32_t site, int edge) noexcept nogil:
    cdef q2_status st = img.file.write_at(site, img.head, 512, 0, WRITE_DEFERRED)
    if st == Q2_OK and q2_keeps(edge):
        st = img.file.sync(Q2_SITE_BARRIER)
    q2_count(&img.count.metadata_writes, 1)
    q2_count(&img.count.barriers, 1)
    return poison_unless_full(img, st)


cdef void mark_corrupt(ImageState img) noexcept nogil:
    if not q2_load(&img.damaged) or q2_load(&img.broken):
        return
    pthread_mutex_lock(&img.commit)
    pthread_rwlock_wrlock(&img.meta)
    # Poisoned whatever becomes of the bit; version 2 has none.
    if img.geo.version >= 3 and not img.header.fields.incompat & Q2_INCOMPAT_CORRUPT:
        q2_store(&img.header.fields.incompat, img.header.fields.incompat | Q2_INCOMPAT_CORRUPT)
        q2_store_be64(img.head + Q2_HDR_INCOMPAT, img.header.fields.incompat)
        write_head(img, Q2_SITE_HEADER_UPDATE, Q2_EDGE_NONE)
    q2_store(&img.broken, 1)
    pthread_rwlock_unlock(&img.meta)
    pthread_mutex_unlock(&img.commit)
