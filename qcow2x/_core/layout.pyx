# cython: language_level=3
"""An empty image on disk: header, refcount table, refcount blocks, L1 table and, for LUKS,
its header and key slots, in this order."""
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy

from qcow2x._core.errors cimport check_status, fail
from qcow2x._core.geometry cimport l1_entries_for, q2_geometry, set_geometry
from qcow2x._core.header cimport Header
from qcow2x._core.status cimport *
from qcow2x._core.storage cimport Storage
from qcow2x._core.wire cimport (Q2_INCOMPAT_EXTL2, Q2_L1E_OFFSET_MASK, Q2_MAX_L1_BYTES,
                                q2_load_be64, q2_store_be64)

cdef struct q2_layout:
    uint64_t l1_size         # entries
    uint64_t l1_clusters
    uint64_t n_blocks        # refcount blocks
    uint64_t rt_clusters
    uint64_t luks_clusters
    uint64_t n_clusters      # all of them together with the header


# Every cluster of the layout needs a refcount, and the refcounts need clusters: grow both until
# they fit. Both only ever grow, and by ever less, so this ends after a few rounds.
cdef q2_layout plan_layout(const q2_geometry *g, uint64_t size,
                           uint64_t luks_bytes) noexcept nogil:
    cdef q2_layout lay
    cdef uint64_t blocks, entries = g.cluster_size >> 3
    lay.l1_size = l1_entries_for(g, size)
    lay.l1_clusters = (lay.l1_size * 8 + g.cluster_size - 1) >> g.cluster_bits
    lay.luks_clusters = (luks_bytes + g.cluster_size - 1) >> g.cluster_bits
    lay.n_blocks = lay.rt_clusters = 1
    while True:
        lay.n_clusters = (1 + lay.rt_clusters + lay.n_blocks + lay.l1_clusters
                          + lay.luks_clusters)
        blocks = (lay.n_clusters + (<uint64_t>1 << g.refblock_bits) - 1) >> g.refblock_bits
        if blocks <= lay.n_blocks:
            return lay
        lay.n_blocks = blocks
        lay.rt_clusters = (blocks + entries - 1) // entries


def largest_disk(uint32_t cluster_bits, bint extended_l2=False):
    """Bytes of the largest disk that a 32 MiB L1 table can map, and no more than 2^63 - 512."""
    cdef uint32_t entry_bits = 4 if extended_l2 else 3
    entries = <uint64_t>Q2_MAX_L1_BYTES // 8
    return min(entries << (2 * cluster_bits - entry_bits), (1 << 63) - 512)


def write_empty_image(Storage storage, Header header, bytes luks_area=b""):
    """Makes `storage` an empty image of what `header` says, and syncs it.

    `luks_area` is the LUKS header with its key slots, for an image that is encrypted so. Sets the
    header's tables and the place of that area. A storage of fixed size keeps whatever lies behind the image's
    last table; any other is cut to the image's length first, so that its tables read as zeros.
    Raises ValueError, before anything is written, if the header does not fit in its cluster.
    """
    cdef q2_geometry g
    cdef q2_status st
    cdef uint64_t l1_off
    set_geometry(&g, header.fields.version, header.fields.cluster_bits,
                 header.fields.refcount_order, header.fields.incompat & Q2_INCOMPAT_EXTL2 != 0)
    cdef q2_layout lay = plan_layout(&g, header.fields.size, len(luks_area))
    l1_off = (1 + lay.rt_clusters + lay.n_blocks) << g.cluster_bits if lay.l1_size else 0
    header.set_tables(g.cluster_size, lay.rt_clusters, l1_off, lay.l1_size)
    if luks_area:
        header.set_encryption("luks", (lay.n_clusters - lay.luks_clusters) << g.cluster_bits,
                              len(luks_area))
    cdef bytes head = header.encode_gil()
    cdef const uint8_t *head_bytes = head
    cdef const uint8_t *luks = luks_area
    cdef uint64_t luks_bytes = len(luks_area)
    with nogil:
        st = write_layout(storage, &g, &lay, head_bytes, luks, luks_bytes)
    check_status(st, storage.name)


cdef q2_status write_layout(Storage storage, const q2_geometry *g, const q2_layout *lay,
                            const uint8_t *head, const uint8_t *luks,
                            uint64_t luks_bytes) noexcept nogil:
    cdef uint64_t front_clusters = 1 + lay.rt_clusters + lay.n_blocks
    cdef uint64_t front_bytes = front_clusters << g.cluster_bits
    cdef uint64_t end = front_bytes + lay.l1_size * 8
    cdef uint64_t luks_off = front_bytes + (lay.l1_clusters << g.cluster_bits)
    cdef uint8_t *front = <uint8_t *>calloc(front_clusters, g.cluster_size)
    cdef q2_status st
    if front is NULL:
        return fail(Q2_E_NOMEM, Q2_SITE_CREATE_WRITE, 0, b"out of memory")
    if luks_bytes:
        end = luks_off + (lay.luks_clusters << g.cluster_bits)
    memcpy(front, head, g.cluster_size)
    fill_refcounts(front, g, lay)
    st = prepare_storage(storage, front_bytes, end)
    # The header last: what could not be written whole is no image.
    if st == Q2_OK and luks_bytes:
        st = storage.write_at(Q2_SITE_CREATE_WRITE, luks, luks_bytes, luks_off, 0)
    if st == Q2_OK:
        st = storage.write_at(Q2_SITE_CREATE_WRITE, front, front_bytes, 0, 0)
    if st == Q2_OK:
        st = storage.sync(Q2_SITE_CREATE_WRITE)
    free(front)
    return st


cdef void fill_refcounts(uint8_t *front, const q2_geometry *g,
                         const q2_layout *lay) noexcept nogil:
    cdef uint64_t first_block = (1 + lay.rt_clusters) << g.cluster_bits
    cdef uint64_t i
    for i in range(lay.n_blocks):
        q2_store_be64(front + g.cluster_size + 8 * i, first_block + (i << g.cluster_bits))
    # The blocks follow each other and are full but for the last: one long array of refcounts,
    # big-endian from a byte on, packed from the lowest bit up below.
    for i in range(lay.n_clusters):
        if g.refcount_order >= 3:
            front[first_block + ((i + 1) << (g.refcount_order - 3)) - 1] = 1
        else:
            front[first_block + ((i << g.refcount_order) >> 3)] |= (
                1 << ((i << g.refcount_order) & 7))


# After this, what lies between the front and `end` reads as zeros.
cdef q2_status prepare_storage(Storage storage, uint64_t front_bytes,
                               uint64_t end) noexcept nogil:
    cdef q2_status st
    cdef uint64_t there = 0
    if storage.fixed_size:
        st = storage.get_size(&there)
        if st != Q2_OK:
            return st
        if there < end:
            return fail(Q2_E_NOSPC, Q2_SITE_CREATE_WRITE, there,
                        b"the device is smaller than the tables of an empty image")
        if end == front_bytes:
            return Q2_OK
        return storage.zero_range(Q2_SITE_CREATE_WRITE, front_bytes, end - front_bytes, 0)
    st = storage.set_size(Q2_SITE_TRUNCATE, 0)
    if st == Q2_OK:
        st = storage.set_size(Q2_SITE_TRUNCATE, end)
    return st


def write_header(Storage storage, Header header):
    """Writes the header cluster and syncs it."""
    cdef bytes head = header.encode_gil()
    cdef const uint8_t *head_bytes = head
    cdef uint64_t nbytes = len(head)
    cdef q2_status st
    with nogil:
        st = storage.write_at(Q2_SITE_HEADER_UPDATE, head_bytes, nbytes, 0, 0)
        if st == Q2_OK:
            st = storage.sync(Q2_SITE_FLUSH)
    check_status(st, storage.name)


def forget_subclusters(Storage storage, Header header):
    """Marks every subcluster unallocated, while each cluster keeps its place in the file.

    For an image with extended L2 entries that nobody has written to: a backing file that is named
    afterwards shows through all of it.
    """
    cdef uint64_t i, l2_off, n = header.fields.l1_size
    cdef uint64_t cluster_size = <uint64_t>1 << header.fields.cluster_bits
    cdef uint8_t *l1 = <uint8_t *>malloc(n * 8 + 1)
    cdef uint8_t *l2 = <uint8_t *>malloc(cluster_size)
    cdef q2_status st = Q2_OK
    if l1 is NULL or l2 is NULL:
        free(l1)
        free(l2)
        raise MemoryError
    with nogil:
        st = storage.read_at(Q2_SITE_L1_READ, l1, n * 8, header.fields.l1_offset)
        for i in range(n):
            l2_off = q2_load_be64(l1 + 8 * i) & Q2_L1E_OFFSET_MASK
            if st == Q2_OK and l2_off:
                st = clear_bitmaps(storage, l2, cluster_size, l2_off)
    free(l1)
    free(l2)
    check_status(st, storage.name)


cdef q2_status clear_bitmaps(Storage storage, uint8_t *l2, uint64_t cluster_size,
                             uint64_t l2_off) noexcept nogil:
    cdef uint64_t at
    cdef q2_status st = storage.read_at(Q2_SITE_L2_LOAD, l2, cluster_size, l2_off)
    if st != Q2_OK:
        return st
    for at in range(8, cluster_size, 16):
        q2_store_be64(l2 + at, 0)
    return storage.write_at(Q2_SITE_L2_UPDATE, l2, cluster_size, l2_off, 0)
