# cython: language_level=3
"""Internal snapshots: making, deleting and applying them.

Each is a sequence of steps with a barrier between any two whose order matters, written out below in
that order. What fails before the first refcount was changed leaves the image as it was; what fails
later poisons it, with the dirty bit set on disk. After lack of room that is not for good: made anew
from the tables, refcounts and flags are right whichever step was the last.
"""
from libc.stdint cimport int32_t
from libc.stdlib cimport calloc, free, qsort
from libc.string cimport memcpy, memset

from qcow2x._core.alloc cimport alloc_contiguous
from qcow2x._core.cache cimport cache_forget_all
from qcow2x._core.edges cimport *
from qcow2x._core.errors cimport fail, lacked_room
from qcow2x._core.metadata cimport load_slice, write_back_locked, write_head
from qcow2x._core.overlap cimport (HOLDS_FIXED, HOLDS_SNAPSHOT_L1, guard_image, guard_remove,
                                   guard_table)
from qcow2x._core.reftree cimport refresh_copied, shift_refcounts, shift_runs
from qcow2x._core.reserve cimport settle_growth
from qcow2x._core.retire cimport retire_freed
from qcow2x._core.state cimport *
from qcow2x._core.status cimport *
from qcow2x._core.storage cimport WRITE_DEFERRED
from qcow2x._core.sync cimport *
from qcow2x._core.wire cimport (Q2_HDR_INCOMPAT, Q2_HDR_L1_OFFSET, Q2_HDR_L1_SIZE,
                                Q2_HDR_NB_SNAPSHOTS, Q2_HDR_SIZE, Q2_HDR_SNAPSHOTS_OFFSET,
                                Q2_INCOMPAT_DIRTY, Q2_OFLAG_COPIED, q2_load_be64, q2_store_be32,
                                q2_store_be64)


cdef q2_status reserve_clusters(ImageState img, uint64_t n, uint64_t *host_off) noexcept nogil:
    cdef uint64_t first = 0, miss = 0
    cdef bint fresh = False
    cdef q2_status st = may_write(img)
    if st != Q2_OK:
        return st
    while True:
        pthread_rwlock_wrlock(&img.meta)
        st = alloc_contiguous(img, n, &first, &fresh, &miss)
        pthread_rwlock_unlock(&img.meta)
        if st != Q2_MISS:
            break
        st = load_slice(img, miss)
        if st != Q2_OK:
            break
    if st != Q2_OK:
        return st
    host_off[0] = first << img.geo.cluster_bits
    pthread_mutex_lock(&img.commit)
    st = write_back_locked(img, True)
    pthread_mutex_unlock(&img.commit)
    return st


cdef q2_status release_clusters(ImageState img, uint64_t host_off, uint64_t n) noexcept nogil:
    cdef q2_status st
    pthread_rwlock_wrlock(&img.meta)
    # Nothing durable ever named them.
    st = runs_add(&img.limbo[img.epoch & 1], host_off >> img.geo.cluster_bits, n)
    pthread_rwlock_unlock(&img.meta)
    return st


# ---- Steps, all with commit held and writers frozen ---------------------------------------------

cdef q2_status everything_on_disk(ImageState img) noexcept nogil:
    cdef q2_status st = settle_growth(img)
    if st == Q2_OK:
        st = write_back_locked(img, True)
    if st == Q2_OK:
        st = retire_freed(img)
    return write_back_locked(img, True) if st == Q2_OK else st


cdef q2_status barrier(ImageState img) noexcept nogil:
    q2_count(&img.count.barriers, 1)
    return poison_unless_full(img, img.file.sync(Q2_SITE_BARRIER))


cdef q2_status write_meta(ImageState img, int32_t site, const void *bytes, uint64_t nbytes,
                          uint64_t host_off) noexcept nogil:
    q2_count(&img.count.metadata_writes, 1)
    return poison_unless_full(img, img.file.write_at(site, bytes, nbytes, host_off,
                                                     WRITE_DEFERRED))


cdef void mark_dirty(ImageState img, bint dirty) noexcept nogil:
    """In `head` only. Version 2 has no such bit."""
    cdef uint64_t bits
    if img.geo.version < 3:
        return
    bits = img.header.fields.incompat
    bits = bits | Q2_INCOMPAT_DIRTY if dirty else bits & ~Q2_INCOMPAT_DIRTY
    q2_store(&img.header.fields.incompat, bits)
    q2_store_be64(img.head + Q2_HDR_INCOMPAT, bits)


cdef q2_status write_dirty(ImageState img, bint dirty) noexcept nogil:
    mark_dirty(img, dirty)
    if img.geo.version < 3:
        return Q2_OK
    return write_head(img, Q2_SITE_HEADER_UPDATE,
                      Q2_EDGE_DIRTY_BEFORE_SNAPSHOT_STEPS if dirty else Q2_EDGE_NONE)


cdef void name_table(ImageState img, uint32_t count, uint64_t host_off) noexcept nogil:
    """In `head` only."""
    q2_store_be32(img.head + Q2_HDR_NB_SNAPSHOTS, count)
    q2_store_be64(img.head + Q2_HDR_SNAPSHOTS_OFFSET, host_off)
    q2_store32(&img.header.fields.nb_snapshots, count)
    q2_store(&img.header.fields.snapshots_offset, host_off)


cdef q2_status switch_table(ImageState img, const q2_table *table, int edge) noexcept nogil:
    """Header and memory name another table; the old one as long as that did not work."""
    cdef uint32_t count = img.header.fields.nb_snapshots
    cdef uint64_t host_off = img.header.fields.snapshots_offset
    cdef q2_status st
    name_table(img, table.count, table.host_off)
    st = write_head(img, Q2_SITE_SNAPSHOT_WRITE, edge)
    if st != Q2_OK:
        name_table(img, count, host_off)
    return st


cdef q2_status guard_new(ImageState img, uint32_t holds, uint64_t host_off,
                         uint64_t nbytes) noexcept nogil:
    cdef q2_status st
    pthread_rwlock_wrlock(&img.meta)
    st = guard_table(img, holds, host_off, nbytes)
    pthread_rwlock_unlock(&img.meta)
    return st


cdef q2_status write_table(ImageState img, const q2_table *table) noexcept nogil:
    if table.count == 0:
        return Q2_OK
    return write_meta(img, Q2_SITE_SNAPSHOT_WRITE, table.bytes, table.nbytes, table.host_off)


cdef q2_status write_l1(ImageState img, const uint64_t *l1, uint64_t n, uint64_t host_off,
                        bint shared) noexcept nogil:
    """A whole L1 table; a shared one without any COPIED flag."""
    cdef uint64_t i
    cdef uint64_t *bytes = <uint64_t *>calloc(n + 1, 8)
    cdef q2_status st
    if bytes is NULL:
        return fail(Q2_E_NOMEM, Q2_SITE_L1_UPDATE, host_off, b"out of memory")
    for i in range(n):
        q2_store_be64(bytes + i, l1[i] & ~Q2_OFLAG_COPIED if shared else l1[i])
    st = write_meta(img, Q2_SITE_L1_UPDATE, bytes, n * 8, host_off)
    free(bytes)
    return st


cdef uint64_t *read_l1(ImageState img, uint64_t host_off, uint64_t n, uint64_t room,
                       q2_status *st) noexcept nogil:
    cdef uint64_t *l1 = <uint64_t *>calloc(room + 1, 8)
    cdef uint64_t i
    if l1 is NULL:
        st[0] = fail(Q2_E_NOMEM, Q2_SITE_SNAPSHOT_READ, host_off, b"out of memory")
        return NULL
    st[0] = img.file.read_at(Q2_SITE_SNAPSHOT_READ, l1, n * 8, host_off)
    for i in range(n):
        l1[i] = q2_load_be64(l1 + i)
    return l1


cdef q2_status refresh_active_l1(ImageState img) noexcept nogil:
    """COPIED flags of the active tables as the refcounts on disk now say, written but not synced.
    Nobody else changes L1 while writers are frozen."""
    cdef uint64_t n = img.l1_size
    cdef uint64_t *l1 = <uint64_t *>calloc(n + 1, 8)
    cdef q2_status st
    if l1 is NULL:
        return fail(Q2_E_NOMEM, Q2_SITE_L1_UPDATE, img.l1_offset, b"out of memory")
    memcpy(l1, img.l1, n * 8)
    st = refresh_copied(img, l1, n)
    if st == Q2_OK:
        st = write_l1(img, l1, n, img.l1_offset, False)
    if st == Q2_OK:
        pthread_rwlock_wrlock(&img.meta)
        memcpy(img.l1, l1, n * 8)
        pthread_rwlock_unlock(&img.meta)
    free(l1)
    return st


cdef void forget_caches(ImageState img) noexcept nogil:
    """The file's tables were rewritten beneath them."""
    pthread_rwlock_wrlock(&img.meta)
    cache_forget_all(&img.l2)
    cache_forget_all(&img.refblocks)
    img.packed_end = 0
    pthread_rwlock_unlock(&img.meta)


cdef int by_first(const void *a, const void *b) noexcept nogil:
    cdef uint64_t x = (<const q2_run *>a).first
    cdef uint64_t y = (<const q2_run *>b).first
    return -1 if x < y else 1 if x > y else 0


cdef q2_status punch_freed(ImageState img, q2_runs *freed) noexcept nogil:
    """Holes for clusters whose refcount is durably 0. Neighbours become one hole: they come in the
    order of the guest, which need not be that of the host."""
    cdef uint64_t i, j
    cdef uint32_t cbits = img.geo.cluster_bits
    cdef q2_status st = Q2_OK
    if freed.n == 0:
        return Q2_OK
    qsort(freed.run, freed.n, sizeof(q2_run), by_first)
    i = 0
    while i < freed.n and st == Q2_OK:
        j = i + 1
        while j < freed.n and freed.run[j].first == freed.run[i].first + freed.run[i].n:
            freed.run[i].n += freed.run[j].n
            j += 1
        if img.discard_to_host:
            st = img.file.punch_hole(Q2_SITE_PUNCH, freed.run[i].first << cbits,
                                     freed.run[i].n << cbits)
        q2_count(&img.count.freed, freed.run[i].n)
        i = j
    pthread_rwlock_wrlock(&img.meta)
    for i in range(freed.n):
        guard_remove(img, freed.run[i].first, freed.run[i].n)
    if freed.run[0].first < img.free_hint:
        img.free_hint = freed.run[0].first
    img.run_from = 0
    pthread_rwlock_unlock(&img.meta)
    return st


cdef q2_status clusters_of(ImageState img, uint64_t host_off, uint64_t nbytes,
                           q2_runs *out) noexcept nogil:
    cdef uint64_t first = host_off >> img.geo.cluster_bits
    cdef uint64_t end = (host_off + nbytes + img.geo.cluster_size - 1) >> img.geo.cluster_bits
    return runs_add(out, first, end - first) if nbytes else Q2_OK


cdef q2_status settle_counts(ImageState img, const q2_runs *tables, q2_runs *freed) noexcept nogil:
    """The end of giving back: the tables' own clusters, COPIED where one reference is left, the dirty
    bit taken off, and only then holes for what became free."""
    cdef q2_status st = shift_runs(img, tables, -1, freed)
    if st == Q2_OK:
        st = barrier(img)
    if st == Q2_OK:
        st = refresh_active_l1(img)
    if st == Q2_OK and q2_keeps(Q2_EDGE_COPIED_BEFORE_CLEAN):
        st = barrier(img)
    if st == Q2_OK:
        st = write_dirty(img, False)
    if st == Q2_OK:
        st = punch_freed(img, freed)
    if st == Q2_OK:
        forget_caches(img)
    return st


cdef q2_status begin(ImageState img) noexcept nogil:
    cdef q2_status st = freeze(img)
    if st != Q2_OK:
        return st
    pthread_mutex_lock(&img.commit)
    st = everything_on_disk(img)
    if st == Q2_OK:
        st = write_dirty(img, True)
    if st == Q2_OK:
        # All refcounts are on disk now; that the bit is set is this verb's matter until its end.
        q2_store(&img.lazy_dirty, 0)
    if st != Q2_OK:
        finish(img)
    return st


cdef void finish(ImageState img) noexcept nogil:
    pthread_mutex_unlock(&img.commit)
    thaw(img)


# After a step failed: with nothing changed yet the image goes on as if nothing had been asked of it,
# else what is on disk is for a repair: that of the next opening, or if only room was lacking one now.
cdef q2_status give_up(ImageState img, bint changed, q2_status why) noexcept nogil:
    if changed:
        img.half_done = lacked_room(why)
        q2_store(&img.broken, 1)
    elif not q2_load(&img.broken):
        write_dirty(img, False)
    forget_caches(img)
    return why


# ---- The three verbs ----------------------------------------------------------------------------

cdef q2_status create_snapshot(ImageState img, uint64_t l1_copy_off, const q2_table *table,
                               const q2_old_table *old) noexcept nogil:
    cdef q2_runs nothing, old_table
    cdef bint changed = False
    cdef q2_status st = begin(img)
    memset(&nothing, 0, sizeof(q2_runs))
    memset(&old_table, 0, sizeof(q2_runs))
    if st != Q2_OK:
        return st
    # 1. One more reference for everything below L1. Nothing is written if one cannot be counted.
    st = shift_refcounts(img, img.l1, img.l1_size, 1, &nothing)
    if st == Q2_OK:
        changed = True
        st = barrier(img)
    # 2. Nothing is ours alone any more, and the snapshot's own L1 and the table may say so.
    if st == Q2_OK:
        st = write_l1(img, img.l1, img.l1_size, l1_copy_off, True)
    if st == Q2_OK:
        st = refresh_active_l1(img)
    if st == Q2_OK:
        st = write_table(img, table)
    if st == Q2_OK and q2_keeps(Q2_EDGE_SNAPSHOT_BEFORE_HEADER):
        st = barrier(img)
    # 3. The snapshot exists.
    if st == Q2_OK:
        mark_dirty(img, False)
        st = switch_table(img, table, Q2_EDGE_NONE)
    if st == Q2_OK:
        st = guard_new(img, HOLDS_FIXED, table.host_off, table.nbytes)
    if st == Q2_OK:
        st = guard_new(img, HOLDS_SNAPSHOT_L1, l1_copy_off, <uint64_t>img.l1_size * 8)
    # 4. The old table does not.
    if st == Q2_OK:
        forget_caches(img)
        st = clusters_of(img, old.host_off, old.nbytes, &old_table)
    if st == Q2_OK:
        pthread_rwlock_wrlock(&img.meta)
        st = runs_append(&img.limbo[img.epoch & 1], &old_table)
        pthread_rwlock_unlock(&img.meta)
    if st != Q2_OK:
        give_up(img, changed, st)
    free(old_table.run)
    free(nothing.run)
    finish(img)
    return st


cdef q2_status delete_snapshot(ImageState img, uint64_t l1_off, uint32_t l1_size,
                               const q2_table *table, const q2_old_table *old) noexcept nogil:
    cdef q2_runs freed, tables
    cdef uint64_t *l1
    cdef bint changed = False
    cdef q2_status st = begin(img)
    memset(&freed, 0, sizeof(q2_runs))
    memset(&tables, 0, sizeof(q2_runs))
    if st != Q2_OK:
        return st
    l1 = read_l1(img, l1_off, l1_size, l1_size, &st)
    # 1. The snapshot is gone; its clusters have leaked. (The dirty bit stands in `head` already.)
    if st == Q2_OK:
        st = write_table(img, table)
    if st == Q2_OK and q2_keeps(Q2_EDGE_SNAPSHOTS_BEFORE_HEADER):
        st = barrier(img)
    if st == Q2_OK:
        changed = True
        st = switch_table(img, table, Q2_EDGE_SNAPSHOT_GONE_BEFORE_FREED)
    if st == Q2_OK:
        st = guard_new(img, HOLDS_FIXED, table.host_off, table.nbytes)
    # 2. They are given back.
    if st == Q2_OK and img.file.listens:
        img.file.reach(Q2_SITE_CLUSTER_FREE)
    if st == Q2_OK:
        st = shift_refcounts(img, l1, l1_size, -1, &freed)
    if st == Q2_OK:
        st = clusters_of(img, l1_off, <uint64_t>l1_size * 8, &tables)
    if st == Q2_OK:
        st = clusters_of(img, old.host_off, old.nbytes, &tables)
    # 3. What is left with one reference is ours alone again.
    if st == Q2_OK:
        st = settle_counts(img, &tables, &freed)
    if st != Q2_OK:
        give_up(img, changed, st)
    free(l1)
    free(freed.run)
    free(tables.run)
    finish(img)
    return st


cdef q2_status switch_l1(ImageState img, uint64_t *l1, uint64_t host_off, uint32_t n,
                         uint64_t disk_size) noexcept nogil:
    """Header first, then memory; takes l1 over when it worked."""
    cdef uint8_t *dirty = <uint8_t *>calloc(((<uint64_t>n * 8) >> 9) + 1, 1)
    cdef q2_status st
    if dirty is NULL:
        return fail(Q2_E_NOMEM, Q2_SITE_L1_UPDATE, host_off, b"out of memory")
    q2_store_be64(img.head + Q2_HDR_SIZE, disk_size)
    q2_store_be32(img.head + Q2_HDR_L1_SIZE, n)
    q2_store_be64(img.head + Q2_HDR_L1_OFFSET, host_off)
    st = write_head(img, Q2_SITE_L1_GROW_ACTIVATE, Q2_EDGE_DISK_SWITCHED_BEFORE_FREED)
    if st != Q2_OK:
        free(dirty)
        return st
    pthread_rwlock_wrlock(&img.meta)
    img.l1, l1 = l1, img.l1
    img.l1_dirty, dirty = dirty, img.l1_dirty
    img.l1_size = n
    img.l1_offset = host_off
    q2_store(&img.disk_size, disk_size)
    q2_store32(&img.header.fields.l1_size, n)
    q2_store(&img.header.fields.l1_offset, host_off)
    q2_store(&img.header.fields.size, disk_size)
    st = guard_image(img)
    cache_forget_all(&img.l2)
    pthread_rwlock_unlock(&img.meta)
    free(dirty)
    free(l1)
    return st


cdef q2_status apply_snapshot(ImageState img, uint64_t l1_off, uint32_t l1_size,
                              uint64_t new_l1_off, uint32_t new_l1_size,
                              uint64_t disk_size) noexcept nogil:
    cdef q2_runs freed, tables
    cdef uint64_t *new_l1
    cdef uint64_t *old_l1 = NULL
    cdef uint64_t old_l1_off, old_n
    cdef bint changed = False
    cdef q2_status st = begin(img)
    memset(&freed, 0, sizeof(q2_runs))
    memset(&tables, 0, sizeof(q2_runs))
    if st != Q2_OK:
        return st
    old_n = img.l1_size
    old_l1_off = img.l1_offset
    new_l1 = read_l1(img, l1_off, l1_size, new_l1_size, &st)
    if st == Q2_OK:
        old_l1 = <uint64_t *>calloc(old_n + 1, 8)
        if old_l1 is NULL:
            st = fail(Q2_E_NOMEM, Q2_SITE_SNAPSHOT_READ, 0, b"out of memory")
        else:
            memcpy(old_l1, img.l1, old_n * 8)
    # 1. One more reference for everything the snapshot holds.
    if st == Q2_OK:
        st = shift_refcounts(img, new_l1, l1_size, 1, &freed)
    if st == Q2_OK:
        changed = True
        st = barrier(img)
    # 2. The disk is the snapshot. (A snapshot's L1 entries carry no COPIED flag.)
    if st == Q2_OK:
        st = write_l1(img, new_l1, new_l1_size, new_l1_off, True)
    if st == Q2_OK and q2_keeps(Q2_EDGE_SNAPSHOT_L1_BEFORE_HEADER):
        st = barrier(img)
    if st == Q2_OK:
        st = switch_l1(img, new_l1, new_l1_off, new_l1_size, disk_size)
        if st == Q2_OK:
            new_l1 = NULL
    # 3. Nobody reads by the old mapping any more; what it held is given back.
    if st == Q2_OK:
        drain_requests(img)
        st = shift_refcounts(img, old_l1, old_n, -1, &freed)
    if st == Q2_OK:
        st = clusters_of(img, old_l1_off, old_n * 8, &tables)
    # 4. What is left with one reference is ours alone.
    if st == Q2_OK:
        st = settle_counts(img, &tables, &freed)
    if st != Q2_OK:
        give_up(img, changed, st)
    free(new_l1)
    free(old_l1)
    free(freed.run)
    free(tables.run)
    finish(img)
    return st
