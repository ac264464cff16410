# cython: language_level=3
"""Where bytes live: the interface, and the regular file or block device.

Every method that the core calls does its whole range or fails; retries, short transfers, zeros
past the end and O_DIRECT's alignment are dealt with here and nowhere else.
"""
import os
import stat as stat_mode

from cpython.buffer cimport (PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer)
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.errno cimport (EBADF, EINTR, EIO, EINVAL, ENODEV, ENOSPC, ENOSYS, ENOTTY, ENXIO, EOPNOTSUPP,
                         EPERM)
from libc.errno cimport errno as c_errno
from libc.stdint cimport INT64_MAX, int64_t, uintptr_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset
from posix.types cimport off_t

from qcow2x._core.errors cimport check_status, fail, fail_errno
from qcow2x._core.status cimport *
from qcow2x._core.sync cimport (pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock,
                                pthread_mutex_t, pthread_mutex_unlock)

from qcow2x._core.opening import (adopt_descriptor, check_mode, is_direct, open_past_cache,
                                  open_path, refuse_kind)

cdef extern from "qcow2x/plan.h" nogil:
    enum:
        Q2_KIND_UNALLOCATED
        Q2_KIND_DATA
        Q2_KIND_ZERO

cdef extern from "qcow2x/atomics.h" nogil:
    uint64_t q2_load(const uint64_t *p)
    void q2_store(uint64_t *p, uint64_t v)
    uint64_t q2_add(uint64_t *p, uint64_t v)
    void q2_raise_to(uint64_t *p, uint64_t v)
    uint32_t q2_load32(const uint32_t *p)
    void q2_store32(uint32_t *p, uint32_t v)

cdef extern from "qcow2x/iov.h" nogil:
    ctypedef struct q2_iov:
        const iovec *iov
        int n
        size_t used
    q2_iov q2_iov_start(const iovec *iov, int n)
    size_t q2_iov_bytes(const iovec *iov, int n)
    void q2_iov_advance(q2_iov *at, size_t n)
    void q2_iov_take(q2_iov *at, void *dst, size_t n)

cdef extern from "qcow2x/pool.h" nogil:
    ctypedef struct q2_pool:
        pass
    void q2_pool_init(q2_pool *pool, int max)
    void *q2_pool_take(q2_pool *pool)
    int q2_pool_give(q2_pool *pool, void *item)

cdef extern from "qcow2x/hostfile.h" nogil:
    ctypedef struct pthread_rwlock_t:
        pass
    int pthread_rwlock_rdlock(pthread_rwlock_t *lock)
    int pthread_rwlock_wrlock(pthread_rwlock_t *lock)
    int pthread_rwlock_unlock(pthread_rwlock_t *lock)
    int pthread_rwlock_destroy(pthread_rwlock_t *lock)
    pthread_rwlock_t *q2_edges_new()

    enum:
        Q2_ZEROS_BYTES
        RWF_DSYNC
        FALLOC_FL_KEEP_SIZE
        FALLOC_FL_PUNCH_HOLE
        FALLOC_FL_ZERO_RANGE
        SEEK_DATA
        SEEK_HOLE
        SYNC_FILE_RANGE_WRITE
    char q2_zeros[]
    int64_t q2_device_size(int fd)
    void q2_direct_alignment(int fd, int is_device, uint32_t *memory, uint32_t *offset)
    int q2_retire_fd(int fd)
    int64_t q2_seek_run(int fd, int64_t off, int whence, int shared_cursor)
    void q2_step_durable(uint64_t *durable, uint64_t seq)

    struct c_stat "stat":
        off_t st_size
    int c_fstat "fstat"(int fd, c_stat *st)
    ssize_t c_pread "pread"(int fd, void *buf, size_t n, off_t off)
    ssize_t c_pwrite "pwrite"(int fd, const void *buf, size_t n, off_t off)
    ssize_t c_pwritev2 "pwritev2"(int fd, const iovec *iov, int n, off_t off, int flags)
    int c_fdatasync "fdatasync"(int fd)
    int c_ftruncate "ftruncate"(int fd, off_t n)
    int c_fallocate "fallocate"(int fd, int mode, off_t off, off_t n)
    int c_sync_file_range "sync_file_range"(int fd, off_t off, off_t n, unsigned int flags)
    int c_close "close"(int fd)
    int posix_memalign(void **p, size_t align, size_t n)

    pthread_mutex_t q2_cursor_lock

cdef extern from "qcow2x/overfork.h" nogil:
    int q2_hold_over_fork(pthread_mutex_t *lock)

if q2_hold_over_fork(&q2_cursor_lock) != 0:
    raise MemoryError("qcow2x: no memory to be ready for a fork")

cdef enum:
    BOUNCE_BYTES = 1 << 20    # one aligned buffer; more of an unaligned request goes in pieces
    BOUNCE_KEPT = 8
    # Up to here one copied transfer is cheaper than separate ones for edges and middle.
    SPLIT_BYTES = 128 << 10
    IOV_BATCH = 64
    LONG_BYTES = 64 << 10
    PAGE = 4096               # what O_DIRECT asks of offsets nearly everywhere
    GATHER_BYTES = 1 << 20


# ---- Storage: what every implementation has, and what it may leave out --------------------------

cdef class Storage:
    """Bytes that an image lives in. Subclasses: FileStorage and PyStorage.

    Offsets and lengths are bytes. All methods may be called from any thread; the work is done
    without the GIL. Storage errors are StorageError (an OSError), NoSpace where there is no room.
    """

    def __cinit__(self):
        self.name = "<storage>"
        self.align = 1
        self.read_only = True

    # -- for the core; an implementation overrides what it can --

    cdef q2_status read_at(self, int32_t site, void *buf, size_t nbytes,
                           uint64_t off) noexcept nogil:
        return fail(Q2_E_UNSUPPORTED, site, off, b"this storage cannot be read")

    cdef q2_status write_at(self, int32_t site, const void *buf, size_t nbytes, uint64_t off,
                            uint32_t flags) noexcept nogil:
        return fail(Q2_E_READONLY, site, off, b"this storage cannot be written")

    cdef q2_status writev_at(self, int32_t site, const iovec *iov, int iovcnt, uint64_t off,
                             uint32_t flags) noexcept nogil:
        """Gathers and calls write_at, so an implementation needs only that."""
        cdef size_t left = q2_iov_bytes(iov, iovcnt)
        cdef size_t n
        cdef q2_status rc = Q2_OK
        cdef q2_iov src = q2_iov_start(iov, iovcnt)
        if iovcnt == 1:
            return self.write_at(site, iov[0].iov_base, left, off, flags)
        cdef void *gathered = malloc(min(left, <size_t>GATHER_BYTES) + 1)
        if gathered is NULL:
            return fail(Q2_E_NOMEM, site, off, b"no memory to gather a write")
        while left > 0 and rc == Q2_OK:
            n = min(left, <size_t>GATHER_BYTES)
            q2_iov_take(&src, gathered, n)
            rc = self.write_at(site, gathered, n, off, flags)
            off += n
            left -= n
        free(gathered)
        return rc

    cdef q2_status sync(self, int32_t site) noexcept nogil:
        self.note_sync(q2_load(&self.write_seq))
        return Q2_OK

    cdef q2_status set_size(self, int32_t site, uint64_t nbytes) noexcept nogil:
        return fail(Q2_E_UNSUPPORTED, site, nbytes, b"this storage cannot change its size")

    cdef q2_status get_size(self, uint64_t *nbytes) noexcept nogil:
        return fail(Q2_E_UNSUPPORTED, Q2_SITE_NONE, 0, b"this storage does not know its size")

    cdef q2_status punch_hole(self, int32_t site, uint64_t off, uint64_t nbytes) noexcept nogil:
        return Q2_OK

    cdef q2_status zero_range(self, int32_t site, uint64_t off, uint64_t nbytes,
                              uint32_t flags) noexcept nogil:
        cdef size_t n
        cdef q2_status rc
        while nbytes > 0:
            n = <size_t>min(nbytes, <uint64_t>Q2_ZEROS_BYTES)
            rc = self.write_at(site, q2_zeros, n, off, 0)
            if rc != Q2_OK:
                return rc
            off += n
            nbytes -= n
        return Q2_OK

    cdef q2_status allocate(self, int32_t site, uint64_t off, uint64_t nbytes) noexcept nogil:
        return fail(Q2_E_UNSUPPORTED, site, off, b"this storage cannot reserve space")

    cdef q2_status extent_at(self, uint64_t off, uint64_t nbytes, q2_extent *out) noexcept nogil:
        cdef uint64_t size = 0
        cdef q2_status rc = self.get_size(&size)
        if rc != Q2_OK:
            return rc
        if off >= size:
            fill_extent(out, off, nbytes, Q2_KIND_UNALLOCATED)
        else:
            fill_extent(out, off, min(nbytes, size - off), Q2_KIND_DATA)
        return Q2_OK

    cdef void reach(self, int32_t site) noexcept nogil:
        pass

    cdef void note_write(self) noexcept nogil:
        q2_add(&self.write_seq, 1)

    cdef void note_sync(self, uint64_t seq_at_start) noexcept nogil:
        q2_raise_to(&self.durable_seq, seq_at_start)

    # -- for Python --

    def size(self):
        """Size in bytes."""
        cdef uint64_t nbytes = 0
        cdef q2_status rc
        with nogil:
            rc = self.get_size(&nbytes)
        check_status(rc, self.name)
        return nbytes

    def pread(self, length, offset):
        """``length`` bytes from ``offset``; fewer only where the storage ends."""
        cdef uint64_t off = checked_offset(offset, "offset")
        cdef uint64_t n = until_end(self, checked_offset(length, "length"), off)
        cdef q2_status rc
        data = PyBytes_FromStringAndSize(NULL, n)
        cdef char *dst = PyBytes_AS_STRING(data)
        with nogil:
            # From Python this is how metadata is read; a disk's data goes by way of preadinto.
            rc = self.read_at(Q2_SITE_HEADER_READ, dst, n, off)
        check_status(rc, self.name)
        return data

    def preadinto(self, buffer, offset):
        """Fill ``buffer`` from ``offset``; returns how many bytes, fewer only at the end."""
        cdef uint64_t off = checked_offset(offset, "offset")
        cdef uint64_t n
        cdef Py_buffer view
        cdef q2_status rc
        PyObject_GetBuffer(buffer, &view, PyBUF_WRITABLE)
        try:
            n = until_end(self, view.len, off)
            with nogil:
                rc = self.read_at(Q2_SITE_DATA_READ, view.buf, n, off)
            check_status(rc, self.name)
        finally:
            PyBuffer_Release(&view)
        return n

    def pwrite(self, buffer, offset, *, bint fua=False):
        """Write all of ``buffer`` at ``offset``; returns its length in bytes.

        With ``fua`` these bytes are on stable storage when the call returns, in any cache mode
        but "unsafe".
        """
        return self.pwritev([buffer], offset, fua=fua)

    def pwritev(self, buffers, offset, *, bint fua=False):
        """Write the buffers one after the other from ``offset`` on; returns their bytes."""
        cdef uint64_t off = checked_offset(offset, "offset")
        cdef uint32_t flags = WRITE_FUA if fua else 0
        cdef list parts = list(buffers)
        cdef int n = <int>len(parts)
        cdef int held = 0
        cdef int i
        cdef q2_status rc
        cdef Py_buffer *view = <Py_buffer *>malloc((n + 1) * sizeof(Py_buffer))
        cdef iovec *iov = <iovec *>malloc((n + 1) * sizeof(iovec))
        try:
            if view is NULL or iov is NULL:
                raise MemoryError()
            for i in range(n):
                PyObject_GetBuffer(parts[i], &view[i], PyBUF_SIMPLE)
                held += 1
                iov[i].iov_base = view[i].buf
                iov[i].iov_len = view[i].len
            with nogil:
                rc = self.writev_at(Q2_SITE_DATA_WRITE, iov, n, off, flags)
            check_status(rc, self.name)
            return q2_iov_bytes(iov, n)
        finally:
            for i in range(held):
                PyBuffer_Release(&view[i])
            free(view)
            free(iov)

    def flush(self):
        """What was written before the call is on stable storage after it."""
        cdef q2_status rc
        with nogil:
            rc = self.sync(Q2_SITE_FLUSH)
        check_status(rc, self.name)

    def truncate(self, size):
        """Make the storage ``size`` bytes long; what it grows by reads as zeros."""
        cdef uint64_t nbytes = checked_offset(size, "size")
        cdef q2_status rc
        with nogil:
            rc = self.set_size(Q2_SITE_TRUNCATE, nbytes)
        check_status(rc, self.name)

    def punch(self, offset, length):
        """Give a range back to the host where it can take it; its bytes are then undefined."""
        cdef uint64_t off = checked_offset(offset, "offset")
        cdef uint64_t n = checked_offset(length, "length")
        cdef q2_status rc
        with nogil:
            rc = self.punch_hole(Q2_SITE_PUNCH, off, n)
        check_status(rc, self.name)

    def extent(self, offset, length):
        """The run at ``offset`` as ``(length, kind)``: "data", "zero" or "end" (past the end)."""
        cdef uint64_t off = checked_offset(offset, "offset")
        cdef uint64_t n = checked_offset(length, "length")
        cdef q2_extent run
        cdef q2_status rc
        with nogil:
            rc = self.extent_at(off, n, &run)
        check_status(rc, self.name)
        return run.nbytes, ("end", "data", "zero")[run.kind]

    def zero(self, offset, length, *, bint may_unmap=False):
        """Make a range read as zeros; with ``may_unmap`` a hole will do."""
        cdef uint64_t off = checked_offset(offset, "offset")
        cdef uint64_t n = checked_offset(length, "length")
        cdef uint32_t flags = ZERO_MAY_UNMAP if may_unmap else 0
        cdef q2_status rc
        with nogil:
            rc = self.zero_range(Q2_SITE_ZERO_WRITE, off, n, flags)
        check_status(rc, self.name)

    def reserve(self, offset, length):
        """Take host blocks for a range; its bytes stay, the size may grow to its end."""
        cdef uint64_t off = checked_offset(offset, "offset")
        cdef uint64_t n = checked_offset(length, "length")
        cdef q2_status rc
        with nogil:
            rc = self.allocate(Q2_SITE_PREALLOCATE, off, n)
        check_status(rc, self.name)

    def close(self):
        """Let go of what the storage holds. Does not flush."""

    @property
    def writable(self):
        """Whether writes are allowed."""
        return not self.read_only

    @property
    def alignment(self):
        """What O_DIRECT asks of offsets here, in bytes; 1 where there is no such need."""
        return self.align

    @property
    def unsynced_writes(self):
        """How many finished writes no flush (or durable write) covers yet."""
        return q2_load(&self.write_seq) - q2_load(&self.durable_seq)

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.close()

    def __repr__(self):
        return f"<{type(self).__name__} {self.name!r}{'' if self.read_only else ' writable'}>"


cdef uint64_t checked_offset(value, str what) except? 0:
    """A Python integer as an offset or length; ValueError outside 0 .. 2**63 - 2."""
    number = value.__index__() if not isinstance(value, int) else value
    if not 0 <= number < INT64_MAX:
        raise ValueError(f"{what} {number} is out of range")
    return number


cdef uint64_t until_end(Storage self, uint64_t length, uint64_t off) except? 0:
    """How much of a range lies before the end of the storage."""
    cdef uint64_t size = 0
    check_status(self.get_size(&size), self.name)
    return 0 if off >= size else min(length, size - off)


cdef void fill_extent(q2_extent *out, uint64_t off, uint64_t nbytes, uint8_t kind) noexcept nogil:
    memset(out, 0, sizeof(q2_extent))
    out.guest_off = out.host_off = off
    out.nbytes = nbytes
    out.kind = kind


# ---- FileStorage: a regular file or block device ------------------------------------------------

cdef class FileStorage(Storage):
    """A regular file or block device: ``FileStorage(path_or_fd, writable=False, cache=...)``.

    ``cache`` is one of :data:`qcow2x.storage.CACHE_MODES`, with QEMU's meaning: "writeback" (durable at flush),
    "none" (the same past the page cache, O_DIRECT), "writethrough" and "directsync" (the same two,
    every write durable when it returns) and "unsafe" (flush does nothing).

    ``create`` makes the file where there is none, ``exclusive`` besides refuses one that is there.
    A descriptor is duplicated: the caller's own stays open and its cursor where it was. In the
    O_DIRECT modes it is opened anew, since O_DIRECT belongs to the open file and not to the number.

    With O_DIRECT a write that ends past the end of the file, off the alignment, leaves the file
    longer than it asked for, by zeros up to the next multiple of ``alignment``.
    """

    def __cinit__(self):
        self.fd = self.past_fd = -1
        pthread_mutex_init(&self.sync_lock, NULL)

    def __init__(self, source, bint writable=False, str cache="writeback", *,
                 bint create=False, bint exclusive=False):
        if self.fd >= 0:
            raise RuntimeError("FileStorage is already open")
        check_mode(cache)
        if isinstance(source, int):
            self.name = f"<fd {source}>"
            self.fd = adopt_descriptor(source, writable, cache, self.name)
            self.shared_cursor = True
        else:
            self.name = os.fsdecode(source)
            self.fd = open_path(source, writable, cache, create, exclusive)
        self._inspect(is_direct(self.fd))
        self.read_only = not writable
        self.ignore_sync = cache == "unsafe"
        self.durable_writes = cache in ("writethrough", "directsync")
        self.can_punch = self.can_zero = self.can_dsync = 1
        if cache == "writethrough" and writable and self.bounce is NULL:
            self.past_fd = open_past_cache(self.fd)

    def _inspect(self, bint direct):
        """Learn what the descriptor is; only a regular file or block device will do."""
        status = os.fstat(self.fd)
        kind = stat_mode.S_IFMT(status.st_mode)
        if kind not in (stat_mode.S_IFREG, stat_mode.S_IFBLK):
            raise refuse_kind(kind, self.name)
        self.is_block_device = self.fixed_size = kind == stat_mode.S_IFBLK
        self.zero_past_end = not self.is_block_device
        cdef uint64_t nbytes = 0
        check_status(self.get_size(&nbytes), self.name)
        if direct:
            q2_direct_alignment(self.fd, self.is_block_device, &self.mem_align, &self.align)
            self.edges = q2_edges_new()
            self.bounce = malloc(sizeof(q2_pool))
            if self.edges is NULL or self.bounce is NULL:
                raise MemoryError()
            q2_pool_init(<q2_pool *>self.bounce, BOUNCE_KEPT)

    def __dealloc__(self):
        cdef void *buf
        if self.fd >= 0:
            c_close(self.fd)
        if self.past_fd >= 0:
            c_close(self.past_fd)
        pthread_mutex_destroy(&self.sync_lock)
        if self.edges is not NULL:
            pthread_rwlock_destroy(<pthread_rwlock_t *>self.edges)
            free(self.edges)
        if self.bounce is not NULL:
            buf = q2_pool_take(<q2_pool *>self.bounce)
            while buf is not NULL:
                free(buf)
                buf = q2_pool_take(<q2_pool *>self.bounce)
            free(self.bounce)

    def close(self):
        """Close the file. Other threads' calls under way finish, later ones raise ValueError.

        Does not flush: what was written is then as durable as the kernel happens to make it.
        """
        if self.fd >= 0 and not q2_load32(&self.closed):
            q2_store32(&self.closed, 1)
            if (q2_retire_fd(self.fd) != 0
                    or (self.past_fd >= 0 and q2_retire_fd(self.past_fd) != 0)):
                raise OSError(c_errno, os.strerror(c_errno), self.name)

    def fileno(self):
        """The descriptor, to lock or stat the file by; it stays this object's."""
        if q2_load32(&self.closed):
            raise ValueError(f"{self.name}: the storage is closed")
        return self.fd

    @property
    def is_closed(self):
        """Whether :meth:`close` was called."""
        return q2_load32(&self.closed) != 0

    @property
    def is_device(self):
        """Whether this is a block device, whose size is its own."""
        return self.fixed_size

    # -- reading --

    cdef q2_status read_at(self, int32_t site, void *buf, size_t nbytes,
                           uint64_t off) noexcept nogil:
        if self.bounce is NULL or (is_aligned(off | nbytes, self.align)
                                   and is_aligned(<uintptr_t>buf, self.mem_align)):
            return pread_all(self, site, <char *>buf, nbytes, off)
        return read_unaligned(self, site, <char *>buf, nbytes, off)

    cdef q2_status get_size(self, uint64_t *nbytes) noexcept nogil:
        cdef c_stat status
        cdef int64_t size = -1
        if q2_load32(&self.closed):
            # The descriptor that stands in the place of a closed one still has a size.
            return fail_here(self, EBADF, Q2_SITE_NONE, 0, b"cannot learn the size")
        if self.is_block_device:
            size = q2_device_size(self.fd)
        elif c_fstat(self.fd, &status) == 0:
            size = status.st_size
        if size < 0:
            return fail_here(self, c_errno, Q2_SITE_NONE, 0, b"cannot learn the size")
        q2_raise_to(&self.file_size, <uint64_t>size)
        nbytes[0] = <uint64_t>size
        return Q2_OK

    cdef q2_status extent_at(self, uint64_t off, uint64_t nbytes, q2_extent *out) noexcept nogil:
        cdef uint64_t size = 0
        cdef int64_t data
        cdef int64_t hole
        cdef q2_status rc = self.get_size(&size)
        if rc != Q2_OK:
            return rc
        if off >= size:
            fill_extent(out, off, nbytes, Q2_KIND_UNALLOCATED)
            return Q2_OK
        nbytes = min(nbytes, size - off)
        data = q2_seek_run(self.fd, off, SEEK_DATA, self.shared_cursor)
        if data < 0 and c_errno == ENXIO:
            fill_extent(out, off, nbytes, Q2_KIND_ZERO)
        elif data > <int64_t>off:
            fill_extent(out, off, min(nbytes, <uint64_t>data - off), Q2_KIND_ZERO)
        else:
            # Data, or a host that cannot tell (a block device): data is always a safe answer.
            hole = q2_seek_run(self.fd, off, SEEK_HOLE, self.shared_cursor) if data >= 0 else -1
            if hole > <int64_t>off:
                nbytes = min(nbytes, <uint64_t>hole - off)
            fill_extent(out, off, nbytes, Q2_KIND_DATA)
        return Q2_OK

    # -- writing --

    cdef q2_status write_at(self, int32_t site, const void *buf, size_t nbytes, uint64_t off,
                            uint32_t flags) noexcept nogil:
        cdef bint durable = is_durable(self, flags), dsync = durable and q2_load32(&self.can_dsync)
        cdef iovec one
        cdef q2_status rc
        if self.bounce is not NULL and not (is_aligned(off | nbytes, self.align)
                                            and is_aligned(<uintptr_t>buf, self.mem_align)):
            one.iov_base = <void *>buf
            one.iov_len = nbytes
            return self.writev_at(site, &one, 1, off, flags)
        if self.read_only:
            return fail(Q2_E_READONLY, site, off, b"the storage is open read-only")
        if flags & WRITE_PAST_CACHE and write_past_cache(self, buf, nbytes, off):
            return wrote(self, site, off + nbytes, durable, False)
        hold_edges(self, True)
        rc = pwrite_all(self, site, <const char *>buf, nbytes, off, &dsync)
        release_edges(self)
        if flags & WRITE_SOON and not durable:
            begin_to_write_out(self, nbytes, off)
        return wrote(self, site, off + nbytes, durable, dsync) if rc == Q2_OK and nbytes else rc

    cdef q2_status writev_at(self, int32_t site, const iovec *iov, int iovcnt, uint64_t off,
                             uint32_t flags) noexcept nogil:
        cdef size_t nbytes = q2_iov_bytes(iov, iovcnt)
        cdef bint durable = is_durable(self, flags), dsync = durable and q2_load32(&self.can_dsync)
        cdef q2_status rc
        if self.read_only:
            return fail(Q2_E_READONLY, site, off, b"the storage is open read-only")
        if nbytes == 0:
            return Q2_OK
        if self.bounce is NULL:
            # More than one transfer is made durable by one sync at the end, not one by one.
            dsync = dsync and iovcnt <= IOV_BATCH
            rc = pwritev_all(self, site, iov, iovcnt, off, &dsync)
            if flags & WRITE_SOON and not durable:
                begin_to_write_out(self, nbytes, off)
        else:
            rc = write_direct(self, site, iov, iovcnt, nbytes, off, &dsync)
        return wrote(self, site, off + nbytes, durable, dsync) if rc == Q2_OK else rc

    cdef q2_status sync(self, int32_t site) noexcept nogil:
        cdef uint64_t seq = q2_load(&self.write_seq)
        cdef q2_status rc = Q2_OK
        # Once a sync failed, the kernel forgets the pages it could not write and the next sync
        # would claim success for them, also one that runs beside it: so one at a time. (O_DIRECT
        # data never was in its hands.)
        pthread_mutex_lock(&self.sync_lock)
        if self.sync_errno != 0:
            rc = fail_here(self, self.sync_errno, site, 0, b"an earlier flush failed")
        while rc == Q2_OK and not self.ignore_sync and c_fdatasync(self.fd) != 0:
            if c_errno != EINTR:
                if self.bounce is NULL and not q2_load32(&self.closed):
                    self.sync_errno = c_errno
                rc = fail_here(self, c_errno, site, 0, b"flush failed")
        pthread_mutex_unlock(&self.sync_lock)
        if rc == Q2_OK:
            self.note_sync(seq)
        return rc

    # -- size and space --

    cdef q2_status set_size(self, int32_t site, uint64_t nbytes) noexcept nogil:
        cdef uint64_t size = 0
        cdef int rc = -1
        cdef q2_status status
        if self.read_only:
            return fail(Q2_E_READONLY, site, nbytes, b"the storage is open read-only")
        if self.is_block_device:
            status = self.get_size(&size)
            if status == Q2_OK and nbytes > size:
                return fail_errno(ENOSPC, site, nbytes, b"the block device is smaller than that")
            return status
        hold_edges(self, False)
        while rc != 0:
            rc = c_ftruncate(self.fd, nbytes)
            if rc != 0 and c_errno != EINTR:
                break
        release_edges(self)
        if rc != 0:
            return fail_here(self, c_errno, site, nbytes, b"cannot change the size")
        q2_store(&self.file_size, nbytes)
        self.note_write()
        return Q2_OK

    cdef q2_status punch_hole(self, int32_t site, uint64_t off, uint64_t nbytes) noexcept nogil:
        if self.read_only:
            return fail(Q2_E_READONLY, site, off, b"the storage is open read-only")
        if not q2_load32(&self.can_punch) or nbytes == 0:
            return Q2_OK
        cdef int failure = fallocate_range(self, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, off,
                                           nbytes)
        if failure == 0:
            self.note_write()
            return Q2_OK
        if host_cannot(failure):
            # EINVAL is a matter of this one range (a device's own alignment), not of the host.
            if failure != EINVAL:
                q2_store32(&self.can_punch, 0)
            return Q2_OK
        return fail_here(self, failure, site, off, b"cannot give space back to the host")

    cdef q2_status zero_range(self, int32_t site, uint64_t off, uint64_t nbytes,
                              uint32_t flags) noexcept nogil:
        cdef int failure = EOPNOTSUPP
        cdef uint64_t size = 0
        cdef uint64_t end = off + nbytes
        cdef uint64_t last
        cdef q2_status rc
        if self.read_only:
            return fail(Q2_E_READONLY, site, off, b"the storage is open read-only")
        if nbytes == 0:
            return Q2_OK
        if flags & ZERO_MAY_UNMAP and q2_load32(&self.can_punch):
            failure = fallocate_range(self, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, off, nbytes)
            if failure == 0 and not self.is_block_device:
                # A hole never extends the file. Zeros at the end do, and unlike ftruncate they
                # cannot cut off what another thread appends meanwhile.
                rc = self.get_size(&size)
                if rc != Q2_OK:
                    return rc
                if end > size:
                    last = max(off, (end - 1) & ~<uint64_t>511)
                    return Storage.zero_range(self, site, last, end - last, 0)
        elif q2_load32(&self.can_zero):
            failure = fallocate_range(self, FALLOC_FL_ZERO_RANGE, off, nbytes)
            if failure in (EOPNOTSUPP, ENOSYS, ENODEV):
                q2_store32(&self.can_zero, 0)
        if failure == 0:
            q2_raise_to(&self.file_size, end)
            self.note_write()
            return self.sync(site) if self.durable_writes else Q2_OK
        if host_cannot(failure):
            return Storage.zero_range(self, site, off, nbytes, 0)
        return fail_here(self, failure, site, off, b"cannot write zeros")

    cdef q2_status allocate(self, int32_t site, uint64_t off, uint64_t nbytes) noexcept nogil:
        cdef uint64_t size = 0
        cdef q2_status rc
        cdef int failure
        if self.read_only:
            return fail(Q2_E_READONLY, site, off, b"the storage is open read-only")
        if self.is_block_device:
            rc = self.get_size(&size)
            if rc == Q2_OK and off + nbytes > size:
                return fail_errno(ENOSPC, site, off, b"the block device is smaller than that")
            return rc
        if nbytes == 0:
            return Q2_OK
        failure = fallocate_range(self, 0, off, nbytes)
        if failure == 0:
            q2_raise_to(&self.file_size, off + nbytes)
            self.note_write()
            return Q2_OK
        if host_cannot(failure):
            return fail(Q2_E_UNSUPPORTED, site, off, b"this file system cannot reserve space")
        return fail_here(self, failure, site, off, b"cannot reserve space")


# The work ------------------------------------------------------------------------------------------

cdef inline bint is_aligned(uint64_t value, uint32_t align) noexcept nogil:
    return (value & (align - 1)) == 0


cdef inline bint host_cannot(int number) noexcept nogil:
    """Whether a failed fallocate means that the host has no such thing here."""
    return (number == EOPNOTSUPP or number == ENOSYS or number == EINVAL or number == ENODEV
            or number == ENOTTY or number == EPERM)


cdef q2_status fail_here(FileStorage self, int number, int32_t site, uint64_t off,
                         const char *what) noexcept nogil:
    if number == EBADF and q2_load32(&self.closed):
        return fail(Q2_E_CLOSED, site, off, b"the storage is closed")
    return fail_errno(number, site, off, what)


cdef q2_status pread_all(FileStorage self, int32_t site, char *buf, size_t nbytes,
                         uint64_t off) noexcept nogil:
    cdef ssize_t got
    while nbytes > 0:
        got = c_pread(self.fd, buf, nbytes, off)
        if got < 0:
            if c_errno == EINTR:
                continue
            return fail_here(self, c_errno, site, off, b"read failed")
        # With O_DIRECT a count off the alignment is the end of the file: to go on reading there
        # would be refused.
        if got == 0 or not is_aligned(got, self.align):
            memset(buf + got, 0, nbytes - got)
            return Q2_OK
        buf += got
        off += got
        nbytes -= got
    return Q2_OK


cdef q2_status failed_write(FileStorage self, int32_t site, uint64_t off, ssize_t done,
                            bint *dsync) noexcept nogil:
    """What a call that wrote nothing means: Q2_OK, it is to be tried again; *dsync is cleared if the
    kernel has no such thing."""
    cdef int failure = c_errno
    if done == 0:
        return fail_errno(ENOSPC, site, off, b"the storage takes no more bytes")
    if dsync[0] and (failure == EOPNOTSUPP or failure == ENOSYS):
        q2_store32(&self.can_dsync, 0)
        dsync[0] = False
        return Q2_OK
    if failure == EINTR:
        return Q2_OK
    if failure == EIO and dsync[0] and self.bounce is NULL:
        # It may have been told of a page of somebody else's, and a sync would not be again.
        pthread_mutex_lock(&self.sync_lock)
        self.sync_errno = failure
        pthread_mutex_unlock(&self.sync_lock)
    return fail_here(self, failure, site, off, b"write failed")


cdef q2_status pwrite_all(FileStorage self, int32_t site, const char *buf, size_t nbytes,
                          uint64_t off, bint *dsync) noexcept nogil:
    """*dsync asks for durability and is cleared if the kernel has none."""
    cdef iovec one
    cdef ssize_t done
    cdef q2_status rc
    while nbytes > 0:
        if dsync[0]:
            one.iov_base = <void *>buf
            one.iov_len = nbytes
            done = c_pwritev2(self.fd, &one, 1, off, RWF_DSYNC)
        else:
            # A list of one costs the kernel a tenth of the call.
            done = c_pwrite(self.fd, buf, nbytes, off)
        if done <= 0:
            rc = failed_write(self, site, off, done, dsync)
            if rc != Q2_OK:
                return rc
            continue
        buf += done
        off += done
        nbytes -= done
    return Q2_OK


cdef q2_status pwritev_all(FileStorage self, int32_t site, const iovec *iov, int iovcnt,
                           uint64_t off, bint *dsync) noexcept nogil:
    """Writes all of the list; *dsync as for pwrite_all."""
    cdef iovec part[IOV_BATCH]
    cdef q2_iov at = q2_iov_start(iov, iovcnt)
    cdef ssize_t done
    cdef int n
    cdef q2_status rc
    if iovcnt == 1:
        return pwrite_all(self, site, <const char *>iov.iov_base, iov.iov_len, off, dsync)
    q2_iov_advance(&at, 0)
    while at.n > 0:
        n = min(at.n, <int>IOV_BATCH)
        memcpy(part, at.iov, n * sizeof(iovec))
        part[0].iov_base = <char *>part[0].iov_base + at.used
        part[0].iov_len -= at.used
        done = c_pwritev2(self.fd, part, n, off, RWF_DSYNC if dsync[0] else 0)
        if done <= 0:
            rc = failed_write(self, site, off, done, dsync)
            if rc != Q2_OK:
                return rc
            continue
        off += done
        q2_iov_advance(&at, done)
    return Q2_OK


cdef bint write_past_cache(FileStorage self, const void *buf, size_t nbytes,
                           uint64_t off) noexcept nogil:
    """8 MiB of zeros and the sync after them took 16.5 ms this way and 21 by way of the page cache, which has
    them copied first and then written from pages that lie here and there. False: not all of it; through the
    page cache it will be seen whether anything is wrong."""
    return (self.past_fd >= 0 and is_aligned(off | nbytes, PAGE)
            and c_pwrite(self.past_fd, buf, nbytes, off) == <ssize_t>nbytes)


cdef inline void begin_to_write_out(FileStorage self, size_t nbytes, uint64_t off) noexcept nogil:
    """A hint: the sync that follows waits for it, and tells what went wrong. 1 MiB at a time, 32 of them to a
    sync, took 2.2 ms instead of 2.8; 4 KiB at a time, which the sync could make one transfer of, nothing less."""
    if self.bounce is NULL and nbytes >= LONG_BYTES and not self.ignore_sync:
        c_sync_file_range(self.fd, off, nbytes, SYNC_FILE_RANGE_WRITE)


cdef inline bint is_durable(FileStorage self, uint32_t flags) noexcept nogil:
    return not self.ignore_sync and (
        flags & WRITE_FUA or (self.durable_writes and not flags & WRITE_DEFERRED))


cdef q2_status wrote(FileStorage self, int32_t site, uint64_t end, bint durable,
                     bint dsync) noexcept nogil:
    """Counts a write up to `end`, and makes it durable if it is to be and is not by itself."""
    q2_raise_to(&self.file_size, end)
    if dsync:
        note_durable_write(self)
        return Q2_OK
    q2_add(&self.write_seq, 1)
    return self.sync(site) if durable else Q2_OK


cdef int fallocate_range(FileStorage self, int mode, uint64_t off, uint64_t nbytes) noexcept nogil:
    """fallocate; 0 or an errno."""
    cdef int failure = 0
    hold_edges(self, is_aligned(off | nbytes, self.align))
    while c_fallocate(self.fd, mode, off, nbytes) != 0:
        failure = c_errno
        if failure != EINTR:
            break
        failure = 0
    release_edges(self)
    return failure


# O_DIRECT ------------------------------------------------------------------------------------------
#
# The kernel takes whole blocks only, so a write with an edge inside a block reads the block, merges
# and writes it back. Between its read and its write another write may finish in the other part of
# the same block and be acknowledged; writing back the stale edge would undo it. Hence the lock
# `edges`: unaligned writes are alone, aligned ones share. Reads need no lock: both the old and the
# merged block have the same bytes wherever the merging write was not asked to change them.

cdef void note_durable_write(FileStorage self) noexcept nogil:
    q2_step_durable(&self.durable_seq, q2_add(&self.write_seq, 1))


cdef void hold_edges(FileStorage self, bint shared) noexcept nogil:
    if self.edges is NULL:
        return
    if shared:
        pthread_rwlock_rdlock(<pthread_rwlock_t *>self.edges)
    else:
        pthread_rwlock_wrlock(<pthread_rwlock_t *>self.edges)


cdef void release_edges(FileStorage self) noexcept nogil:
    if self.edges is not NULL:
        pthread_rwlock_unlock(<pthread_rwlock_t *>self.edges)


cdef char *take_bounce(FileStorage self) noexcept nogil:
    cdef void *buf = q2_pool_take(<q2_pool *>self.bounce)
    if buf is NULL and posix_memalign(&buf, 4096, BOUNCE_BYTES) != 0:
        return NULL
    return <char *>buf


cdef void give_bounce(FileStorage self, char *buf) noexcept nogil:
    if not q2_pool_give(<q2_pool *>self.bounce, buf):
        free(buf)


cdef q2_status read_unaligned(FileStorage self, int32_t site, char *buf, size_t nbytes,
                              uint64_t off) noexcept nogil:
    cdef uint32_t mask = self.align - 1
    cdef size_t before
    cdef size_t n
    cdef q2_status rc = Q2_OK
    cdef char *bounce = take_bounce(self)
    if bounce is NULL:
        return fail(Q2_E_NOMEM, site, off, b"no memory for an aligned buffer")
    while nbytes > 0 and rc == Q2_OK:
        before = off & mask
        if before == 0 and nbytes > SPLIT_BYTES and is_aligned(<uintptr_t>buf, self.mem_align):
            n = nbytes & ~<size_t>mask
            rc = pread_all(self, site, buf, n, off)
        else:
            n = min(nbytes, BOUNCE_BYTES - before)
            rc = pread_all(self, site, bounce, (before + n + mask) & ~<size_t>mask, off - before)
            if rc == Q2_OK:
                memcpy(buf, bounce + before, n)
        buf += n
        off += n
        nbytes -= n
    give_bounce(self, bounce)
    return rc


cdef bint list_is_aligned(FileStorage self, const iovec *iov, int n) noexcept nogil:
    cdef int i
    for i in range(n):
        if not is_aligned(iov[i].iov_len, self.align):
            return False
        if not is_aligned(<uintptr_t>iov[i].iov_base, self.mem_align):
            return False
    return True


cdef q2_status write_direct(FileStorage self, int32_t site, const iovec *iov, int iovcnt,
                            size_t nbytes, uint64_t off, bint *dsync) noexcept nogil:
    cdef q2_iov src = q2_iov_start(iov, iovcnt)
    cdef size_t before
    cdef size_t n
    cdef q2_status rc = Q2_OK
    cdef char *bounce
    if is_aligned(off, self.align) and list_is_aligned(self, iov, iovcnt):
        dsync[0] = dsync[0] and iovcnt <= IOV_BATCH
        hold_edges(self, True)
        rc = pwritev_all(self, site, iov, iovcnt, off, dsync)
        release_edges(self)
        return rc
    bounce = take_bounce(self)
    if bounce is NULL:
        return fail(Q2_E_NOMEM, site, off, b"no memory for an aligned buffer")
    # In pieces there is one sync at the end instead of a durable write each.
    dsync[0] = dsync[0] and (off & (self.align - 1)) + nbytes <= BOUNCE_BYTES
    while nbytes > 0 and rc == Q2_OK:
        before = off & (self.align - 1)
        n = min(nbytes, BOUNCE_BYTES - before)
        rc = write_piece(self, site, &src, bounce, n, off, dsync)
        off += n
        nbytes -= n
    give_bounce(self, bounce)
    return rc


cdef q2_status write_piece(FileStorage self, int32_t site, q2_iov *src, char *bounce, size_t n,
                           uint64_t off, bint *dsync) noexcept nogil:
    """At most one bounce buffer's worth: the edges from the file, the rest from src."""
    cdef uint32_t align = self.align
    cdef size_t before = off & (align - 1)
    cdef size_t span = (before + n + align - 1) & ~<size_t>(align - 1)
    cdef bint whole = before == 0 and span == n
    cdef uint64_t start = off - before
    cdef iovec one
    cdef q2_status rc = Q2_OK
    one.iov_base = bounce
    one.iov_len = span
    hold_edges(self, whole)
    if before:
        rc = pread_all(self, site, bounce, align, start)
    if rc == Q2_OK and before + n != span and (before == 0 or span > align):
        rc = pread_all(self, site, bounce + span - align, align, start + span - align)
    if rc == Q2_OK:
        q2_iov_take(src, bounce + before, n)
        rc = pwritev_all(self, site, &one, 1, start, dsync)
    release_edges(self)
    return rc
