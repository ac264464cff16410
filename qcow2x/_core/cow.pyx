# cython: language_level=3
"""Copy-on-write: the old bytes around a partial write, merged into one vectored call with it."""
from libc.stdint cimport int32_t
from libc.string cimport memset
from posix.uio cimport iovec

from qcow2x._core.errors cimport fail
from qcow2x._core.read cimport read_guest, reads_as_zero
from qcow2x._core.scratch cimport scratch_give, scratch_take, zeros
from qcow2x._core.sectors cimport write_encrypted
from qcow2x._core.state cimport is_encrypted
from qcow2x._core.status cimport *
from qcow2x._core.sync cimport q2_load


cdef struct q2_side:
    uint64_t guest_off
    uint64_t nbytes
    bint left_out           # reads as zeros where it is, nothing to write
    void *scratch           # the old bytes, NULL where zeros do


cdef q2_status look_at_side(ImageState img, uint64_t guest_off, uint64_t nbytes, uint64_t *inside,
                            bint *zero) noexcept nogil:
    """How much of it lies inside the disk, and whether all of that reads as zeros."""
    cdef uint64_t end = q2_load(&img.disk_size)
    zero[0] = True
    inside[0] = nbytes
    # The last cluster may reach past the end of the disk: nothing is there to copy.
    if guest_off >= end:
        inside[0] = 0
    elif nbytes > end - guest_off:
        inside[0] = end - guest_off
    return reads_as_zero(img, guest_off, inside[0], zero) if inside[0] else Q2_OK


cdef q2_status fetch_side(ImageState img, q2_side *side, bint fresh) noexcept nogil:
    cdef uint64_t inside = 0
    cdef bint zero = True
    cdef q2_status st
    side.scratch = NULL
    side.left_out = side.nbytes == 0
    if side.left_out:
        return Q2_OK
    st = look_at_side(img, side.guest_off, side.nbytes, &inside, &zero)
    if st != Q2_OK:
        return st
    if zero:
        side.left_out = fresh
        return Q2_OK
    side.scratch = scratch_take(side.nbytes)
    if side.scratch is NULL:
        return fail(Q2_E_NOMEM, Q2_SITE_COW_READ, side.guest_off, b"out of memory")
    if img.file.listens:
        img.file.reach(Q2_SITE_COW_READ)
    st = read_guest(img, side.scratch, inside, side.guest_off)
    if st == Q2_OK and inside < side.nbytes:
        memset(<uint8_t *>side.scratch + inside, 0, side.nbytes - inside)
    return st


cdef int32_t add_side(iovec *iov, int32_t n, const q2_side *side) noexcept nogil:
    if side.left_out:
        return n
    iov[n].iov_base = side.scratch if side.scratch is not NULL else <void *>zeros()
    iov[n].iov_len = side.nbytes
    return n + 1


cdef q2_status writes_alone(ImageState img, const q2_cow *cow, bint fresh,
                            bint *alone) noexcept nogil:
    cdef uint64_t inside = 0
    cdef q2_status st = Q2_OK
    alone[0] = (fresh and not is_encrypted(img)) or (cow.head_bytes == 0 and cow.tail_bytes == 0)
    if alone[0] and cow.head_bytes:
        st = look_at_side(img, cow.head_off, cow.head_bytes, &inside, alone)
    if st == Q2_OK and alone[0] and cow.tail_bytes:
        st = look_at_side(img, cow.tail_off, cow.tail_bytes, &inside, alone)
    return st


cdef q2_status write_with_cow(ImageState img, const q2_cow *cow, const uint8_t *data,
                              size_t data_bytes, uint64_t host_off, bint fresh,
                              uint32_t flags) noexcept nogil:
    cdef q2_side head, tail
    cdef uint64_t end = q2_load(&img.disk_size)
    cdef iovec iov[3]
    cdef int32_t n = 0
    cdef int32_t site
    cdef q2_status st
    if is_encrypted(img):
        # What the host holds as zeros is none to the guest: both sides have to be written.
        fresh = False
    head.guest_off = cow.head_off
    head.nbytes = cow.head_bytes
    tail.guest_off = cow.tail_off
    tail.nbytes = cow.tail_bytes
    head.scratch = tail.scratch = NULL
    # An external data file ends where the disk does: nothing is written past that.
    if img.geo.external_data and tail.guest_off + tail.nbytes > end:
        tail.nbytes = end - tail.guest_off if tail.guest_off < end else 0
    st = fetch_side(img, &head, fresh)
    if st == Q2_OK:
        st = fetch_side(img, &tail, fresh)
    if st == Q2_OK:
        n = add_side(iov, n, &head)
        if head.left_out:
            host_off += head.nbytes
        if data_bytes:
            iov[n].iov_base = <void *>data
            iov[n].iov_len = data_bytes
            n += 1
        n = add_side(iov, n, &tail)
        site = Q2_SITE_DATA_WRITE if n == 1 else Q2_SITE_COW_WRITE
        if is_encrypted(img):
            st = write_encrypted(img, site, iov, n, host_off, cow.head_off, flags)
        elif n:
            if img.file.listens and img.data is not img.file:
                img.file.reach(site)
            st = img.data.writev_at(site, iov, n, host_off, flags)
    scratch_give(head.scratch, head.nbytes)
    scratch_give(tail.scratch, tail.nbytes)
    return st
