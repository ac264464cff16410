# cython: language_level=3
"""Changing the size of the guest disk."""
from libc.stdint cimport uint8_t, uint32_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy

from qcow2x._core.alloc cimport alloc_contiguous
from qcow2x._core.discard cimport unmap_guest, unmap_tail, zero_guest
from qcow2x._core.edges cimport *
from qcow2x._core.errors cimport fail
from qcow2x._core.flush cimport flush_image
from qcow2x._core.geometry cimport l1_entries_for, round_up
from qcow2x._core.metadata cimport load_slice, write_back_locked, write_head
from qcow2x._core.overlap cimport HOLDS_FIXED, guard_add
from qcow2x._core.state cimport *
from qcow2x._core.status cimport *
from qcow2x._core.storage cimport WRITE_DEFERRED
from qcow2x._core.sync cimport *
from qcow2x._core.wire cimport (Q2_HDR_L1_OFFSET, Q2_HDR_L1_SIZE, Q2_HDR_SIZE, Q2_MAX_L1_BYTES,
                                q2_store_be32, q2_store_be64)


cdef q2_status place_l1(ImageState img, uint64_t n_clusters, uint64_t *first) noexcept nogil:
    cdef bint fresh
    cdef uint64_t miss = 0
    cdef q2_status st
    while True:
        pthread_rwlock_wrlock(&img.meta)
        st = alloc_contiguous(img, n_clusters, first, &fresh, &miss)
        pthread_rwlock_unlock(&img.meta)
        if st != Q2_MISS:
            return st
        st = load_slice(img, miss)
        if st != Q2_OK:
            return st


cdef q2_status grow_l1(ImageState img, uint64_t entries) noexcept nogil:
    """commit not held. A longer L1 table in a new place: written whole and durable before the
    header points to it, the header durable before the old place may be used again."""
    cdef uint32_t cbits = img.geo.cluster_bits
    cdef uint64_t n_clusters = ((entries << 3) + img.geo.cluster_size - 1) >> cbits
    cdef uint64_t first = 0, i, old_first, old_n
    cdef uint64_t *l1
    cdef uint8_t *dirty
    cdef uint8_t *table
    cdef q2_status st
    if entries << 3 > Q2_MAX_L1_BYTES:
        return fail(Q2_E_LIMIT, Q2_SITE_L1_GROW_WRITE, img.l1_offset,
                    b"the L1 table of a disk of this size exceeds 32 MiB")
    if img.file.listens:
        img.file.reach(Q2_SITE_L1_GROW_ALLOC)
    l1 = <uint64_t *>calloc(entries, 8)
    dirty = <uint8_t *>calloc((entries * 8 + 511) >> 9, 1)
    table = <uint8_t *>calloc(n_clusters, img.geo.cluster_size)
    if l1 is NULL or dirty is NULL or table is NULL:
        st = fail(Q2_E_NOMEM, Q2_SITE_L1_GROW_WRITE, 0, b"out of memory")
    else:
        st = place_l1(img, n_clusters, &first)
    pthread_mutex_lock(&img.commit)
    while st == Q2_OK:
        # Edge: every L2 table and its refcount before the L1 entry that points to it, also in the
        # new place. So the copy is made while no entry waits to be written; tables are made once
        # per 512 MiB, so this does not go round twice in practice.
        if q2_keeps(Q2_EDGE_L1_WRITTEN_BEFORE_COPIED):
            st = write_back_locked(img, True)
        pthread_rwlock_wrlock(&img.meta)
        if not img.l1_is_dirty or not q2_keeps(Q2_EDGE_L1_WRITTEN_BEFORE_COPIED):
            break
        pthread_rwlock_unlock(&img.meta)
    else:
        pthread_rwlock_wrlock(&img.meta)
    if st == Q2_OK:
        memcpy(l1, img.l1, <size_t>img.l1_size * 8)
        for i in range(entries):
            q2_store_be64(table + 8 * i, l1[i])
        st = poison_unless_kept(img, img.file.write_at(
            Q2_SITE_L1_GROW_WRITE, table, n_clusters << cbits, first << cbits, WRITE_DEFERRED))
        if st == Q2_OK and q2_keeps(Q2_EDGE_L1_BEFORE_HEADER):
            q2_count(&img.count.barriers, 1)
            st = poison_unless_full(img, img.file.sync(Q2_SITE_BARRIER))
    if st == Q2_OK:
        q2_store_be32(img.head + Q2_HDR_L1_SIZE, <uint32_t>entries)
        q2_store_be64(img.head + Q2_HDR_L1_OFFSET, first << cbits)
        st = poison_unless_kept(img, img.file.write_at(Q2_SITE_L1_GROW_ACTIVATE, img.head, 512, 0,
                                                       WRITE_DEFERRED))
        if st == Q2_OK:
            st = poison_unless_full(img, img.file.sync(Q2_SITE_BARRIER))
        q2_count(&img.count.metadata_writes, 1)
        q2_count(&img.count.barriers, 1)
        if st != Q2_OK:
            # Either header leads to the same mapping, until the next flush, which puts this one back
            # before anything else.
            img.head_stale = True
            q2_store_be32(img.head + Q2_HDR_L1_SIZE, img.l1_size)
            q2_store_be64(img.head + Q2_HDR_L1_OFFSET, img.l1_offset)
    if st == Q2_OK:
        old_first = img.l1_offset >> cbits
        old_n = (<uint64_t>img.l1_size * 8 + img.geo.cluster_size - 1) >> cbits
        l1, img.l1 = img.l1, l1
        dirty, img.l1_dirty = img.l1_dirty, dirty
        img.l1_size = <uint32_t>entries
        img.l1_offset = first << cbits
        q2_store32(&img.header.fields.l1_size, img.l1_size)
        q2_store(&img.header.fields.l1_offset, img.l1_offset)
        st = guard_add(img, HOLDS_FIXED, first, n_clusters)
        if old_n and st == Q2_OK:
            st = runs_add(&img.limbo[img.epoch & 1], old_first, old_n)
    elif first:
        # The new place is free when the file is known not to name it.
        runs_add(&img.dropped, first, n_clusters)
    pthread_rwlock_unlock(&img.meta)
    pthread_mutex_unlock(&img.commit)
    free(l1)
    free(dirty)
    free(table)
    return st


cdef q2_status set_disk_size(ImageState img, uint64_t size) noexcept nogil:
    cdef uint64_t old
    cdef q2_status st
    pthread_mutex_lock(&img.commit)
    pthread_rwlock_wrlock(&img.meta)
    old = q2_load(&img.disk_size)
    q2_store_be64(img.head + Q2_HDR_SIZE, size)
    st = write_head(img, Q2_SITE_HEADER_UPDATE, Q2_EDGE_SIZE_BEFORE_RESIZE_RETURNS)
    if st == Q2_OK:
        q2_store(&img.disk_size, size)
        q2_store(&img.header.fields.size, size)
    else:
        q2_store_be64(img.head + Q2_HDR_SIZE, old)
    pthread_rwlock_unlock(&img.meta)
    pthread_mutex_unlock(&img.commit)
    return st


cdef q2_status drop_vmstate(ImageState img, uint64_t size) noexcept nogil:
    """A machine's state lies behind the last L1 entry of the disk. Where that moves, what was there
    is no state any more, and must not become part of the disk."""
    cdef uint32_t shift = img.geo.cluster_bits + img.geo.l2_bits
    cdef uint64_t entries = l1_entries_for(&img.geo, q2_load(&img.disk_size))
    if l1_entries_for(&img.geo, size) == entries or entries >= img.l1_size:
        return Q2_OK
    return unmap_guest(img, entries << shift, (img.l1_size - entries) << shift)


cdef q2_status resize_guest(ImageState img, uint64_t size) noexcept nogil:
    cdef uint64_t old = q2_load(&img.disk_size)
    cdef uint64_t entries = l1_entries_for(&img.geo, size)
    cdef uint64_t tail = 0, end
    cdef q2_status st = may_write(img)
    if st == Q2_OK:
        st = drop_vmstate(img, size)
    if st != Q2_OK:
        return st
    if size < old:
        # The mappings first: were the size cut first and the power then, a later growth would bring
        # the old bytes back.
        st = unmap_tail(img, size)
        if st == Q2_OK and q2_keeps(Q2_EDGE_UNMAPPED_BEFORE_SHRUNK):
            st = flush_image(img)
        if st == Q2_OK:
            st = set_disk_size(img, size)
        return flush_image(img) if st == Q2_OK else st
    if entries > img.l1_size:
        st = grow_l1(img, entries)
    # What the new end uncovers must read as zeros: the rest of the last cluster, and what a longer
    # backing file would show. It is made so before the disk is that long.
    if st == Q2_OK and size > old:
        # Nothing is mapped there, but for what was let in just before the disk last became shorter.
        end = round_up(size, img.geo.cluster_size)
        tail = round_up(old, img.geo.cluster_size)
        st = unmap_guest(img, tail, end - tail)
    if st == Q2_OK and size > old:
        if has_backing(img) and img.backing_size > old:
            tail = size
        if tail > size:
            tail = size
        if tail > old:
            st = zero_guest(img, old, tail - old, True, False)
    if st == Q2_OK and q2_keeps(Q2_EDGE_ZEROED_BEFORE_GROWN):
        st = flush_image(img)
    return set_disk_size(img, size) if st == Q2_OK else st
