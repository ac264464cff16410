# cython: language_level=3
"""Any Python object as storage.

Each method comes as a pair: the one that the core calls, without the GIL, and a half that holds it
and lets no exception out: the exception is kept for check_status and a status goes up.
"""
import errno

from cpython.buffer cimport (PyBUF_SIMPLE, PyBuffer_FillInfo, PyBuffer_Release,
                             PyObject_GetBuffer)
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stddef cimport size_t
from libc.stdint cimport INT64_MAX, int32_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset
from posix.uio cimport iovec

from qcow2x._core.errors cimport fail, stash_exception_gil
from qcow2x._core.status cimport *
from qcow2x._core.storage cimport WRITE_DEFERRED, WRITE_FUA, Storage

from qcow2x._core.opening import check_mode, storage_error

cdef extern from "qcow2x/atomics.h" nogil:
    uint64_t q2_load(const uint64_t *p)

cdef extern from "qcow2x/iov.h" nogil:
    ctypedef struct q2_iov:
        pass
    q2_iov q2_iov_start(const iovec *iov, int n)
    size_t q2_iov_bytes(const iovec *iov, int n)
    void q2_iov_take(q2_iov *at, void *dst, size_t n)


cdef class PyStorage(Storage):
    """A Python object with ``size()`` and ``pread(length, offset)``.

    For writing also ``pwrite(buffer, offset)``, ``flush()`` and ``truncate(size)``; optionally
    ``preadinto(buffer, offset)`` and ``punch(offset, length)``. ``pread`` and ``preadinto`` may give
    less than asked for; nothing at all only at or past the end. ``pwrite`` is handed ``bytes``, which
    it may keep, and returns how many it took. The buffer that ``preadinto`` fills must not be kept.

    ``cache`` has the meaning it has for a file, as far as an object knows of such: with
    "writethrough" and "directsync" a flush follows every write, with "unsafe" none ever comes.

    What the object raises reaches the caller as it is. Calls may come from any thread, one at a
    time as far as the GIL goes; the order of writes and flushes is that of the image.
    """

    def __init__(self, obj, bint writable=False, str cache="writeback"):
        check_mode(cache)
        needs = ["size", "pread"] + (["pwrite", "flush", "truncate"] if writable else [])
        missing = [name for name in needs if not callable(getattr(obj, name, None))]
        if missing:
            raise TypeError(f"{type(obj).__name__} object cannot be "
                            f"{'written' if writable else 'read'} as storage: it has no "
                            f"{', '.join(missing)}")
        name = getattr(obj, "name", None)
        self.name = name if isinstance(name, str) else f"<{type(obj).__name__}>"
        self.obj = obj
        self.read_only = not writable
        self.ignore_sync = cache == "unsafe"
        self.durable_writes = cache in ("writethrough", "directsync")
        self.has_preadinto = callable(getattr(obj, "preadinto", None))
        self.has_punch = callable(getattr(obj, "punch", None))

    cdef q2_status read_at(self, int32_t site, void *buf, size_t nbytes,
                           uint64_t off) noexcept nogil:
        with gil:
            return read_gil(self, site, <char *>buf, nbytes, off)

    cdef q2_status write_at(self, int32_t site, const void *buf, size_t nbytes, uint64_t off,
                            uint32_t flags) noexcept nogil:
        cdef iovec one
        one.iov_base = <void *>buf
        one.iov_len = nbytes
        with gil:
            return write_gil(self, site, &one, 1, off, flags)

    cdef q2_status writev_at(self, int32_t site, const iovec *iov, int iovcnt, uint64_t off,
                             uint32_t flags) noexcept nogil:
        with gil:
            return write_gil(self, site, iov, iovcnt, off, flags)

    cdef q2_status sync(self, int32_t site) noexcept nogil:
        with gil:
            return sync_gil(self, site)

    cdef q2_status set_size(self, int32_t site, uint64_t nbytes) noexcept nogil:
        with gil:
            return set_size_gil(self, site, nbytes)

    cdef q2_status get_size(self, uint64_t *nbytes) noexcept nogil:
        with gil:
            return get_size_gil(self, nbytes)

    cdef q2_status punch_hole(self, int32_t site, uint64_t off, uint64_t nbytes) noexcept nogil:
        if self.read_only:
            return fail(Q2_E_READONLY, site, off, b"the storage is open read-only")
        if not self.has_punch:
            return Q2_OK
        with gil:
            return punch_gil(self, site, off, nbytes)


cdef q2_status read_gil(PyStorage self, int32_t site, char *buf, size_t nbytes,
                        uint64_t off) noexcept:
    cdef size_t got
    cdef uint64_t size = 0
    cdef q2_status rc
    try:
        while nbytes > 0:
            got = preadinto_gil(self, buf, nbytes, off) if self.has_preadinto else                 pread_gil(self, buf, nbytes, off)
            if got == 0:
                rc = get_size_gil(self, &size)
                if rc != Q2_OK:
                    return rc
                if off < size:
                    raise storage_error(errno.EIO, self.name, f"read returned nothing at offset "
                                        f"{off}, before the end at {size}")
                memset(buf, 0, nbytes)
                break
            buf += got
            off += got
            nbytes -= got
    except BaseException:
        return stash_exception_gil(site, off)
    return Q2_OK


cdef size_t pread_gil(PyStorage self, char *buf, size_t nbytes, uint64_t off) except? 0:
    cdef Py_buffer view
    data = self.obj.pread(nbytes, off)
    PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
    try:
        if <size_t>view.len > nbytes:
            raise ValueError(f"{self.name}: pread({nbytes}, {off}) returned {view.len} bytes")
        memcpy(buf, view.buf, view.len)
        return view.len
    finally:
        PyBuffer_Release(&view)


cdef size_t preadinto_gil(PyStorage self, char *buf, size_t nbytes, uint64_t off) except? 0:
    cdef Window window = Window.__new__(Window)
    window.start = buf
    window.nbytes = nbytes
    view = memoryview(window)
    try:
        count = self.obj.preadinto(view, off)
    finally:
        view.release()
    if window.exports:
        raise BufferError(f"{self.name}: preadinto kept a view of the buffer it was to fill")
    return checked_count(self, "preadinto", count, nbytes)


cdef class Window:
    """Memory of the core, lent for one call; counts the views that are still out on it."""
    cdef char *start
    cdef Py_ssize_t nbytes
    cdef int exports

    def __getbuffer__(self, Py_buffer *view, int flags):
        PyBuffer_FillInfo(view, self, self.start, self.nbytes, 0, flags)
        self.exports += 1

    def __releasebuffer__(self, Py_buffer *view):
        self.exports -= 1


cdef size_t checked_count(PyStorage self, str method, count, size_t most) except? 0:
    number = count.__index__()
    if not 0 <= number <= most:
        raise ValueError(f"{self.name}: {method} returned {number}, which is not in 0 .. {most}")
    return number


cdef q2_status write_gil(PyStorage self, int32_t site, const iovec *iov, int iovcnt, uint64_t off,
                         uint32_t flags) noexcept:
    cdef size_t nbytes = q2_iov_bytes(iov, iovcnt)
    cdef size_t done = 0
    cdef size_t took
    cdef q2_iov src = q2_iov_start(iov, iovcnt)
    if self.read_only:
        return fail(Q2_E_READONLY, site, off, b"the storage is open read-only")
    if nbytes == 0:
        return Q2_OK
    try:
        # A copy that the object may keep: a view of our memory that it kept would dangle.
        data = PyBytes_FromStringAndSize(NULL, nbytes)
        q2_iov_take(&src, PyBytes_AS_STRING(data), nbytes)
        while done < nbytes:
            took = checked_count(self, "pwrite",
                                 self.obj.pwrite(data if done == 0 else data[done:], off + done),
                                 nbytes - done)
            if took == 0:
                raise storage_error(errno.EIO, self.name,
                                    f"pwrite took nothing at offset {off + done}")
            done += took
    except BaseException:
        return stash_exception_gil(site, off + done)
    self.note_write()
    if flags & WRITE_FUA or (self.durable_writes and not flags & WRITE_DEFERRED):
        return sync_gil(self, site)
    return Q2_OK


cdef q2_status sync_gil(PyStorage self, int32_t site) noexcept:
    cdef uint64_t seq = q2_load(&self.write_seq)
    if not (self.read_only or self.ignore_sync):
        try:
            self.obj.flush()
        except BaseException:
            return stash_exception_gil(site, 0)
    self.note_sync(seq)
    return Q2_OK


cdef q2_status set_size_gil(PyStorage self, int32_t site, uint64_t nbytes) noexcept:
    if self.read_only:
        return fail(Q2_E_READONLY, site, nbytes, b"the storage is open read-only")
    try:
        self.obj.truncate(nbytes)
    except BaseException:
        return stash_exception_gil(site, nbytes)
    self.note_write()
    return Q2_OK


cdef q2_status get_size_gil(PyStorage self, uint64_t *nbytes) noexcept:
    try:
        nbytes[0] = checked_count(self, "size()", self.obj.size(), INT64_MAX - 1)
    except BaseException:
        return stash_exception_gil(Q2_SITE_NONE, 0)
    return Q2_OK


cdef q2_status punch_gil(PyStorage self, int32_t site, uint64_t off, uint64_t nbytes) noexcept:
    try:
        self.obj.punch(off, nbytes)
    except BaseException:
        return stash_exception_gil(site, off)
    self.note_write()
    return Q2_OK
