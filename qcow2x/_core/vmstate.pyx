# cython: language_level=3
"""The state of a machine, kept behind the disk."""
from libc.stdint cimport uint8_t
from libc.string cimport memcpy

from qcow2x._core.errors cimport fail
from qcow2x._core.geometry cimport l1_entries_for
from qcow2x._core.read cimport read_vmstate
from qcow2x._core.resize cimport grow_l1
from qcow2x._core.scratch cimport scratch_give, scratch_take
from qcow2x._core.state cimport may_write
from qcow2x._core.status cimport *
from qcow2x._core.sync cimport q2_load
from qcow2x._core.wire cimport Q2_MAX_L1_BYTES
from qcow2x._core.write cimport write_guest


cdef uint64_t vmstate_at(ImageState img) noexcept nogil:
    return l1_entries_for(&img.geo, q2_load(&img.disk_size)) << (
        img.geo.cluster_bits + img.geo.l2_bits)


cdef q2_status has_vmstate(ImageState img) noexcept nogil:
    if img.geo.external_data:
        return fail(Q2_E_UNSUPPORTED, Q2_SITE_NONE, 0,
                    b"an image with an external data file keeps no state of a machine")
    return Q2_OK


cdef q2_status load_vmstate(ImageState img, void *buf, size_t nbytes, uint64_t off) noexcept nogil:
    cdef q2_status st = has_vmstate(img)
    return read_vmstate(img, buf, nbytes, vmstate_at(img) + off) if st == Q2_OK else st


cdef q2_status reach(ImageState img, uint64_t end) noexcept nogil:
    """The L1 table has entries for all before `end`."""
    cdef uint64_t entries = l1_entries_for(&img.geo, end)
    cdef uint64_t room = img.l1_size
    if entries <= room:
        return Q2_OK
    # A state is long and written from front to back: not one table for each piece of it.
    while room < entries:
        room = (room * 3 + 1) // 2 if room else 1
    return grow_l1(img, room if room << 3 <= Q2_MAX_L1_BYTES else entries)


cdef q2_status save_cluster(ImageState img, const uint8_t *data, uint64_t nbytes,
                            uint64_t off) noexcept nogil:
    """Part of one. Copy-on-write would look for the rest of it on the disk and in the backing file."""
    cdef uint64_t skip = off & (img.geo.cluster_size - 1)
    cdef uint8_t *cluster = <uint8_t *>scratch_take(img.geo.cluster_size)
    cdef q2_status st
    if cluster is NULL:
        return fail(Q2_E_NOMEM, Q2_SITE_DATA_WRITE, off, b"out of memory")
    st = read_vmstate(img, cluster, img.geo.cluster_size, off - skip)
    if st == Q2_OK:
        memcpy(cluster + skip, data, nbytes)
        st = write_guest(img, cluster, img.geo.cluster_size, off - skip, False)
    scratch_give(cluster, img.geo.cluster_size)
    return st


cdef q2_status save_vmstate(ImageState img, const void *buf, size_t nbytes,
                            uint64_t off) noexcept nogil:
    cdef const uint8_t *data = <const uint8_t *>buf
    cdef uint64_t size = img.geo.cluster_size
    cdef uint64_t left = nbytes
    cdef uint64_t skip, n
    cdef q2_status st = has_vmstate(img)
    off += vmstate_at(img)
    if st == Q2_OK:
        st = may_write(img)
    if st == Q2_OK and left:
        st = reach(img, off + left)
    while left and st == Q2_OK:
        skip = off & (size - 1)
        if skip == 0 and left >= size:
            n = left & ~(size - 1)
            st = write_guest(img, data, n, off, False)
        else:
            n = size - skip if size - skip < left else left
            st = save_cluster(img, data, n, off)
        data += n
        off += n
        left -= n
    return st
