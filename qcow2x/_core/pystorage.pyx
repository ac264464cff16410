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
from qcow2x._core.storage cimport (WRITE_DEFERRED, WRITE_FUA, ZERO_MAY_UNMAP, Storage, fill_extent,
                                   q2_extent)

from qcow2x._core.errors import SITE_NAMES
from qcow2x._core.opening import check_mode, storage_error

cdef extern from "qcow2x/atomics.h" nogil:
    uint64_t q2_load(const uint64_t *p)

cdef extern from "qcow2x/plan.h" nogil:
    enum:
        Q2_KIND_UNALLOCATED
        Q2_KIND_DATA
        Q2_KIND_ZERO

KINDS = {"end": Q2_KIND_UNALLOCATED, "data": Q2_KIND_DATA, "zero": Q2_KIND_ZERO}

cdef extern from "qcow2x/iov.h" nogil:
    ctypedef struct q2_iov:
        pass
    q2_iov q2_iov_start(const iovec *iov, int n)
    size_t q2_iov_bytes(const iovec *iov, int n)
    void q2_iov_take(q2_iov *at, void *dst, size_t n)


cdef class PyStorage(Storage):
    """A Python object with ``size()`` and ``pread(length, offset)``.

    For writing also ``pwrite(buffer, offset)``, ``flush()`` and ``truncate(size)``; optionally
    ``preadinto(buffer, offset)``, ``punch(offset, length)``, ``zero(offset, length, may_unmap)``,
    ``extent(offset, length)``, which returns ``(length, "data" | "zero" | "end")``, and
    ``reserve(offset, length)``. An object with ``at_site(name)`` is told where the image is (a name
    of ``status.h``) before each access, and at some places between. One whose ``zero_past_end`` is true
    promises, as a regular file does, that growing it leaves the gap reading as zeros. ``pread`` and ``preadinto`` may give
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
        self.has_zero = callable(getattr(obj, "zero", None))
        self.has_extent = callable(getattr(obj, "extent", None))
        self.has_reserve = callable(getattr(obj, "reserve", None))
        self.listens = callable(getattr(obj, "at_site", None))
        # A place that cannot grow, like a block device.
        self.fixed_size = bool(getattr(obj, "fixed_size", False))
        self.zero_past_end = bool(getattr(obj, "zero_past_end", False))

    @property
    def is_device(self):
        """Whether its size is its own, as a block device's is."""
        return self.fixed_size

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

    cdef q2_status zero_range(self, int32_t site, uint64_t off, uint64_t nbytes,
                              uint32_t flags) noexcept nogil:
        if self.read_only:
            return fail(Q2_E_READONLY, site, off, b"the storage is open read-only")
        if not self.has_zero:
            return Storage.zero_range(self, site, off, nbytes, flags)
        with gil:
            return zero_gil(self, site, off, nbytes, flags)

    cdef q2_status allocate(self, int32_t site, uint64_t off, uint64_t nbytes) noexcept nogil:
        if self.read_only or not self.has_reserve:
            return Storage.allocate(self, site, off, nbytes)
        with gil:
            return reserve_gil(self, site, off, nbytes)

    cdef q2_status extent_at(self, uint64_t off, uint64_t nbytes, q2_extent *out) noexcept nogil:
        if not self.has_extent:
            return Storage.extent_at(self, off, nbytes, out)
        with gil:
            return extent_gil(self, off, nbytes, out)

    cdef void reach(self, int32_t site) noexcept nogil:
        with gil:
            tell_site(self, site)


cdef void tell_site(PyStorage self, int32_t site) noexcept:
    self.obj.at_site(SITE_NAMES[site])


cdef q2_status read_gil(PyStorage self, int32_t site, char *buf, size_t nbytes,
                        uint64_t off) noexcept:
    cdef size_t got
    cdef uint64_t size = 0
    cdef q2_status rc
    if self.listens:
        tell_site(self, site)
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
    if self.listens:
        tell_site(self, site)
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
        if self.listens:
            tell_site(self, site)
        try:
            self.obj.flush()
        except BaseException:
            return stash_exception_gil(site, 0)
    self.note_sync(seq)
    return Q2_OK


cdef q2_status set_size_gil(PyStorage self, int32_t site, uint64_t nbytes) noexcept:
    if self.read_only:
        return fail(Q2_E_READONLY, site, nbytes, b"the storage is open read-only")
    if self.listens:
        tell_site(self, site)
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
    if self.listens:
        tell_site(self, site)
    try:
        self.obj.punch(off, nbytes)
    except BaseException:
        return stash_exception_gil(site, off)
    self.note_write()
    return Q2_OK


cdef q2_status zero_gil(PyStorage self, int32_t site, uint64_t off, uint64_t nbytes,
                        uint32_t flags) noexcept:
    if self.listens:
        tell_site(self, site)
    try:
        self.obj.zero(off, nbytes, bool(flags & ZERO_MAY_UNMAP))
    except BaseException:
        return stash_exception_gil(site, off)
    self.note_write()
    return sync_gil(self, site) if self.durable_writes else Q2_OK


cdef q2_status reserve_gil(PyStorage self, int32_t site, uint64_t off, uint64_t nbytes) noexcept:
    if self.listens:
        tell_site(self, site)
    try:
        self.obj.reserve(off, nbytes)
    except BaseException:
        return stash_exception_gil(site, off)
    self.note_write()
    return Q2_OK


cdef q2_status extent_gil(PyStorage self, uint64_t off, uint64_t nbytes, q2_extent *out) noexcept:
    try:
        length, kind = self.obj.extent(off, nbytes)
        if not 0 < length <= nbytes or kind not in KINDS:
            raise ValueError(f"{self.name}: extent({off}, {nbytes}) returned {length}, {kind!r}")
        fill_extent(out, off, length, KINDS[kind])
    except BaseException:
        return stash_exception_gil(Q2_SITE_NONE, off)
    return Q2_OK
