# cython: language_level=3
"""Transfers of data collected and sent together, by io_uring or by threads (iomany.h)."""
from libc.stdint cimport uintptr_t
from libc.stdlib cimport qsort

from qcow2x._core.crew cimport crew_join, crew_leave, crew_spare
from qcow2x._core.errors cimport last_error, q2_error, set_last_error
from qcow2x._core.state cimport is_encrypted
from qcow2x._core.status cimport *
from qcow2x._core.storage cimport WRITE_DEFERRED, FileStorage, hold_edges, release_edges
from qcow2x._core.sync cimport q2_raise_to

cdef extern from "qcow2x/iomany.h" nogil:
    bint q2_flight_begin(q2_flight *f)
    void q2_flight_add(q2_flight *f, const q2_io *io)
    void q2_flight_wait(q2_flight *f, size_t least)
    bint q2_flight_landed(q2_flight *f, q2_io *io)
    void q2_flight_end(q2_flight *f)
    void q2_io_by_threads(q2_io *io, size_t n, size_t depth, int flags)
    int RWF_NOWAIT

cdef uint64_t LONGEST = 1 << 30
# Copied by several CPUs from here on. To start a thread and wait for its end takes 45 us, to copy 1 MiB 80 to 140.
cdef uint64_t SHARED_BYTES = 4 << 20


cdef void batch_begin(ImageState img, q2_batch *batch, size_t requests, size_t depth,
                      bint writes) noexcept nogil:
    batch.n = batch.n_short = 0
    batch.flight.ring = NULL
    batch.in_a_row = 0
    batch.depth = depth
    # The first ones leave as soon as there are as many as may be under way: nothing is, meanwhile.
    batch.fill = depth
    batch.writes = writes
    batch.serves = img.data_is_file and not is_encrypted(img) and not img.data.listens
    batch.copies = batch.serves and not writes and (<FileStorage>img.data).bounce is NULL
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
                         uint64_t host_off, size_t request) noexcept nogil:
    cdef q2_status st = Q2_OK
    cdef q2_io *io
    if batch.n >= batch.fill:
        st = send(img, batch, True)
        batch.fill = min(2 * batch.fill, <size_t>BATCH_MOST)
    io = &batch.io[batch.n]
    io.buf = <void *>buf
    io.nbytes = nbytes
    io.off = host_off
    io.fd = (<FileStorage>img.data).fd
    io.writes = batch.writes
    io.of = request
    batch.n += 1
    return st


cdef int by_place(const void *a, const void *b) noexcept nogil:
    cdef uint64_t x = (<const q2_io *>a).off, y = (<const q2_io *>b).off
    return (x > y) - (x < y)


cdef void put_in_order(q2_batch *batch, FileStorage file) noexcept nogil:
    """By their places in the file, past the page cache: of 64 KiB each, 512 of them all over 256 MiB, that
    takes a tenth off the time, since the kernel makes one request of those that meet."""
    cdef size_t i
    if file.bounce is NULL:
        return
    for i in range(1, batch.n):
        if batch.io[i].off < batch.io[i - 1].off:
            qsort(batch.io, batch.n, sizeof(q2_io), by_place)
            return


cdef q2_status one_by_one(ImageState img, q2_batch *batch, const q2_io *io,
                          q2_status st) noexcept nogil:
    """What came back short: the end of the file, an interruption, an error. The storage knows what
    it means. Answers with `st` unless that is the earliest failure now."""
    cdef q2_status this
    if io.of >= batch.failed:
        return st
    if io.writes:
        this = img.data.write_at(Q2_SITE_DATA_WRITE, io.buf, io.nbytes, io.off, WRITE_DEFERRED)
    else:
        this = img.data.read_at(Q2_SITE_DATA_READ, io.buf, io.nbytes, io.off)
    if this == Q2_OK:
        return st
    batch.failed = io.of
    return this


cdef inline bint is_whole(FileStorage file, const q2_io *io) noexcept nogil:
    if io.got != <int64_t>io.nbytes:
        return False
    if io.writes:
        q2_raise_to(&file.file_size, io.off + io.nbytes)
        file.note_write()
    return True


cdef void take_landed(q2_batch *batch, FileStorage file) noexcept nogil:
    cdef q2_io *io = &batch.short[batch.n_short]
    while q2_flight_landed(&batch.flight, io):
        if not is_whole(file, io):
            batch.n_short += 1
            io = &batch.short[batch.n_short]


cdef void wait_for_all(q2_batch *batch, FileStorage file) noexcept nogil:
    take_landed(batch, file)
    while batch.flight.n:
        q2_flight_wait(&batch.flight, batch.flight.n)
        take_landed(batch, file)
    q2_flight_end(&batch.flight)
    if batch.writes:
        release_edges(file)


cdef q2_status batch_land(ImageState img, q2_batch *batch) noexcept nogil:
    cdef q2_status st = Q2_OK
    cdef size_t i
    if not batch_under_way(batch):
        return Q2_OK
    wait_for_all(batch, <FileStorage>img.data)
    for i in range(batch.n_short):
        st = one_by_one(img, batch, &batch.short[i], st)
    batch.n_short = 0
    return st


cdef q2_status send_by_threads(ImageState img, q2_batch *batch, size_t first) noexcept nogil:
    cdef q2_status st = Q2_OK
    cdef size_t i
    if batch.writes:
        hold_edges(<FileStorage>img.data, True)
    q2_io_by_threads(&batch.io[first], batch.n - first, batch.depth, 0)
    if batch.writes:
        release_edges(<FileStorage>img.data)
    for i in range(first, batch.n):
        if not is_whole(<FileStorage>img.data, &batch.io[i]):
            st = one_by_one(img, batch, &batch.io[i], st)
    return st


cdef void copy_together(q2_batch *batch) noexcept nogil:
    """What lies in the page cache, by the CPUs that are idle: the ring copies it by the caller's alone. What is
    not there is left to be sent."""
    cdef uint64_t nbytes = 0, helpers
    cdef size_t i, left = 0
    for i in range(batch.n):
        nbytes += batch.io[i].nbytes
    if nbytes < SHARED_BYTES:
        return
    helpers = min(crew_spare(crew_join(1)), <uint64_t>(min(batch.n, batch.depth) - 1))
    if helpers:
        crew_join(helpers)
        q2_io_by_threads(batch.io, batch.n, helpers + 1, RWF_NOWAIT)
        for i in range(batch.n):
            if batch.io[i].got != <int64_t>batch.io[i].nbytes:
                batch.io[left] = batch.io[i]
                left += 1
        # A file of which nothing was there is read from its disk, the rest of it too.
        batch.copies = left < batch.n
        batch.n = left
    crew_leave(helpers + 1)


cdef bint take_off(q2_batch *batch, FileStorage file) noexcept nogil:
    if not batch_under_way(batch):
        if not q2_flight_begin(&batch.flight):
            return False
        batch.in_a_row = 0
        if batch.writes:
            hold_edges(file, True)
    return True


cdef size_t send_some(q2_batch *batch, FileStorage file, size_t first, bint more) noexcept nogil:
    """From `first` on, until all have been sent or something came back short; answers how far. As many as
    may be are still under way in the end if `more` follows."""
    cdef size_t least
    while first < batch.n and batch.n_short == 0:
        while first < batch.n and batch.flight.n < batch.depth:
            q2_flight_add(&batch.flight, &batch.io[first])
            first += 1
        # A quarter of them at a time while others wait for their places: 10 % less than one by one.
        least = (batch.flight.n + 3) // 4 if first < batch.n else 0 if more else batch.flight.n
        q2_flight_wait(&batch.flight, least)
        take_landed(batch, file)
    return first


cdef q2_status send(ImageState img, q2_batch *batch, bint more) noexcept nogil:
    """All that is collected, and what is under way lands if no more follows. Answers with the earliest
    failure among those that showed now, or Q2_OK."""
    cdef bint alone
    cdef size_t i = 0
    cdef q2_status this = Q2_OK, st = Q2_OK
    if batch.copies:
        copy_together(batch)
    alone = batch.n == 1 and not more and not batch_under_way(batch)
    put_in_order(batch, <FileStorage>img.data)
    while i < batch.n:
        if alone or not take_off(batch, <FileStorage>img.data):
            # Nothing goes on meanwhile: there is no sense in collecting less than all.
            batch.fill = BATCH_MOST
            this = send_by_threads(img, batch, i)
            i = batch.n
        else:
            i = send_some(batch, <FileStorage>img.data, i, more)
            this = batch_land(img, batch) if batch.n_short else Q2_OK
        if this != Q2_OK:
            st = this
    batch.in_a_row += batch.n
    batch.n = 0
    if not more or (batch.writes and batch.in_a_row >= MOST_IN_A_ROW):
        this = batch_land(img, batch)
    return this if this != Q2_OK else st


cdef q2_status batch_end(ImageState img, q2_batch *batch, q2_status st, size_t at) noexcept nogil:
    cdef q2_error detail
    cdef q2_status sent
    if st != Q2_OK and at < batch.failed:
        batch.failed = at
    if batch.n == 0 and not batch_under_way(batch):
        return st
    detail = last_error()
    sent = send(img, batch, False)
    if sent != Q2_OK:
        # Of a request before the one that failed, or of that one's earlier part.
        return sent
    set_last_error(detail)
    return st


cdef void fill_io(q2_io *io, FileStorage file, const void *buf, size_t nbytes,
                  uint64_t host_off) noexcept nogil:
    io.buf = <void *>buf
    io.nbytes = nbytes
    io.off = host_off
    io.fd = file.fd
    io.writes = True


cdef bint write_both(FileStorage file, q2_io *io, bint *whole) noexcept nogil:
    """Two writes at once. False: there is no ring."""
    cdef q2_flight flight
    cdef q2_io landed
    cdef size_t i
    if not q2_flight_begin(&flight):
        return False
    hold_edges(file, True)
    for i in range(2):
        io[i].of = i
        q2_flight_add(&flight, &io[i])
    while flight.n:
        q2_flight_wait(&flight, flight.n)
        while q2_flight_landed(&flight, &landed):
            whole[landed.of] = is_whole(file, &landed)
    q2_flight_end(&flight)
    release_edges(file)
    return True


cdef q2_status write_beside(ImageState img, int32_t site, const void *buf, size_t nbytes,
                            uint64_t host_off, q2_beside *beside) noexcept nogil:
    cdef q2_io io[2]
    cdef bint whole[2]
    cdef q2_status st = Q2_OK
    whole[0] = whole[1] = False
    if (img.data_is_file and (<FileStorage>img.data).bounce is not NULL
            and suits(<FileStorage>img.data, buf, nbytes, host_off)
            and suits(<FileStorage>img.data, beside.buf, beside.nbytes, beside.host_off)):
        fill_io(&io[0], <FileStorage>img.data, beside.buf, beside.nbytes, beside.host_off)
        fill_io(&io[1], <FileStorage>img.data, buf, nbytes, host_off)
        write_both(<FileStorage>img.data, io, whole)
    # What the storage has to see to: it knows what a write that came back short means.
    if not whole[0]:
        st = img.file.write_at(Q2_SITE_DATA_WRITE, beside.buf, beside.nbytes, beside.host_off,
                               WRITE_DEFERRED)
    if st == Q2_OK:
        beside.written = True
        if not whole[1]:
            st = img.file.write_at(site, buf, nbytes, host_off, WRITE_DEFERRED)
    return st
