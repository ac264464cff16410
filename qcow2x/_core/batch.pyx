# cython: language_level=3
"""Transfers of data collected and sent together, by io_uring or by threads (iomany.h)."""
from libc.stdint cimport uintptr_t

from qcow2x._core.errors cimport last_error, q2_error, set_last_error
from qcow2x._core.state cimport is_encrypted
from qcow2x._core.status cimport *
from qcow2x._core.storage cimport (WRITE_FUA, FileStorage, hold_edges, note_durable_write,
                                   release_edges)
from qcow2x._core.sync cimport q2_load32, q2_raise_to

cdef extern from "qcow2x/iomany.h" nogil:
    void q2_io_many(q2_io *io, size_t n, size_t depth, bint by_threads)

cdef extern from "<sys/uio.h>" nogil:
    int RWF_DSYNC

cdef uint64_t LONGEST = 1 << 30


cdef inline bint by_itself_durable(FileStorage file, uint32_t flags) noexcept nogil:
    return flags & WRITE_FUA and q2_load32(&file.can_dsync) and not file.ignore_sync


cdef inline bint serves(FileStorage file, uint32_t flags) noexcept nogil:
    """A host that cannot make a single write durable has write_at see to it."""
    return not flags & WRITE_FUA or file.ignore_sync or by_itself_durable(file, flags)


cdef void batch_begin(ImageState img, q2_batch *batch, size_t requests, size_t depth, bint writes,
                      uint32_t flags) noexcept nogil:
    batch.n = 0
    batch.depth = depth
    batch.writes = writes
    batch.flags = flags
    batch.serves = (img.data_is_file and not is_encrypted(img) and not img.data.listens
                    and serves(<FileStorage>img.data, flags))
    batch.failed = requests


cdef inline bint suits(FileStorage file, const void *buf, uint64_t nbytes,
                       uint64_t host_off) noexcept nogil:
    return file.bounce is NULL or ((host_off | nbytes) & (file.align - 1) == 0
                                   and <uintptr_t>buf & (file.mem_align - 1) == 0)


cdef bint batch_takes(ImageState img, const q2_batch *batch, const void *buf, uint64_t nbytes,
                      uint64_t host_off) noexcept nogil:
    return (batch.serves and nbytes <= LONGEST
            and suits(<FileStorage>img.data, buf, nbytes, host_off))


cdef q2_status batch_add(ImageState img, q2_batch *batch, const void *buf, uint64_t nbytes,
                         uint64_t host_off, size_t request, uint32_t flags) noexcept nogil:
    cdef q2_status st = Q2_OK
    cdef q2_io *io
    if batch.n == BATCH_MOST:
        st = batch_send(img, batch)
    io = &batch.io[batch.n]
    io.buf = <void *>buf
    io.nbytes = nbytes
    io.off = host_off
    io.fd = (<FileStorage>img.data).fd
    io.writes = batch.writes
    io.flags = RWF_DSYNC if by_itself_durable(<FileStorage>img.data, flags) else 0
    batch.of_request[batch.n] = request
    batch.n += 1
    return st


cdef q2_status one_by_one(ImageState img, const q2_io *io, uint32_t flags) noexcept nogil:
    """What came back short: the end of the file, an interruption, an error. The storage knows what
    it means."""
    if io.writes:
        return img.data.write_at(Q2_SITE_DATA_WRITE, io.buf, io.nbytes, io.off, flags)
    return img.data.read_at(Q2_SITE_DATA_READ, io.buf, io.nbytes, io.off)


cdef void transfer(FileStorage file, q2_batch *batch) noexcept nogil:
    cdef size_t i
    if batch.writes:
        hold_edges(file, True)
    # A ring makes durable writes through the page cache one after another: 139 us for each of 32 writes
    # of 4 KiB, where threads took 33.
    q2_io_many(batch.io, batch.n, batch.depth, batch.flags & WRITE_FUA and file.bounce is NULL)
    if batch.writes:
        release_edges(file)
        for i in range(batch.n):
            if batch.io[i].got == <int64_t>batch.io[i].nbytes:
                q2_raise_to(&file.file_size, batch.io[i].off + batch.io[i].nbytes)
                if batch.io[i].flags:
                    note_durable_write(file)
                else:
                    file.note_write()


cdef q2_status batch_send(ImageState img, q2_batch *batch) noexcept nogil:
    cdef q2_status st = Q2_OK
    cdef q2_status this
    cdef size_t i
    cdef q2_io *io
    transfer(<FileStorage>img.data, batch)
    for i in range(batch.n):
        io = &batch.io[i]
        if io.got != <int64_t>io.nbytes and batch.of_request[i] < batch.failed:
            this = one_by_one(img, io, batch.flags)
            if this != Q2_OK:
                st = this
                batch.failed = batch.of_request[i]
    batch.n = 0
    return st


cdef q2_status batch_end(ImageState img, q2_batch *batch, q2_status st, size_t at) noexcept nogil:
    cdef q2_error detail
    cdef q2_status sent
    if st != Q2_OK and at < batch.failed:
        batch.failed = at
    if batch.n == 0:
        return st
    detail = last_error()
    sent = batch_send(img, batch)
    if sent != Q2_OK:
        # Of a request before the one that failed, or of that one's earlier part.
        return sent
    set_last_error(detail)
    return st
