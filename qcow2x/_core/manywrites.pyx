# cython: language_level=3
"""Many guest writes of one caller, under way together.

What goes in place is put into a batch of transfers (batch.pyx), and the next ones are planned while it is
under way. So is the data of allocating writes, which stay open between their plan and their end meanwhile:
all whose data is in the batch are ended when it has landed. Nobody may wait for others with writes open, who
might wait for these. All of it is made durable at the end, by one flush."""
from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t

from qcow2x._core.batch cimport *
from qcow2x._core.cow cimport writes_alone
from qcow2x._core.edges cimport *
from qcow2x._core.errors cimport last_error, q2_error, set_last_error
from qcow2x._core.flush cimport (flush_if_metadata_changed, flush_if_much_freed,
                                 flush_image)
from qcow2x._core.plan cimport q2_plan
from qcow2x._core.state cimport *
from qcow2x._core.status cimport *
from qcow2x._core.storage cimport WRITE_DEFERRED, WRITE_SOON, FileStorage, q2_extent
from qcow2x._core.write cimport *

cdef enum:
    MOST_OPEN = 32

cdef struct q2_many:
    q2_batch batch
    q2_write open[MOST_OPEN]        # allocating writes whose data is in the batch, or was when it was sent
    size_t of_request[MOST_OPEN]
    uint32_t n


cdef q2_status send_all(ImageState img, q2_many *m, q2_status st, size_t at) noexcept nogil:
    """Nothing is left in the batch, nothing open. `st` is what stopped the caller at request `at`, or
    Q2_OK; the answer is the earliest failure."""
    cdef q2_status first = batch_end(img, &m.batch, st, at)
    cdef q2_error detail = last_error()
    cdef q2_status this
    cdef uint32_t k
    for k in range(m.n):
        this = finish(img, &m.open[k], Q2_OK if m.of_request[k] < m.batch.failed else first)
        if this != Q2_OK and m.of_request[k] < m.batch.failed:
            m.batch.failed = m.of_request[k]
            first = this
            detail = last_error()
    m.n = 0
    if first != Q2_OK:
        set_last_error(detail)
    return first


cdef q2_status collect_in_place(ImageState img, q2_many *m, size_t request, const uint8_t *data,
                                uint64_t nbytes, uint64_t guest_off, bint alone, bint *entered,
                                uint32_t *parity, uint64_t *done) noexcept nogil:
    """As write_in_place, but what can go along with others is put into the batch."""
    cdef q2_plan plan
    cdef const q2_extent *ext
    cdef int32_t leading = 0, i
    cdef q2_status st = plan_in_place(img, guest_off, nbytes, alone, not batch_under_way(&m.batch),
                                      entered, parity, &plan, &leading)
    done[0] = 0
    if st == Q2_BUSY:
        st = batch_land(img, &m.batch)
        if st == Q2_OK:
            st = plan_in_place(img, guest_off, nbytes, alone, True, entered, parity, &plan, &leading)
    for i in range(leading):
        ext = &plan.extent[i]
        if st != Q2_OK:
            break
        if batch_takes(img, &m.batch, data + done[0], ext.nbytes, ext.host_off):
            st = batch_add(img, &m.batch, data + done[0], ext.nbytes, ext.host_off, request)
        else:
            st = batch_land(img, &m.batch)
            if st == Q2_OK:
                st = write_extent(img, ext, data + done[0], WRITE_DEFERRED)
        done[0] += ext.nbytes
    return st


cdef inline bint past_the_page_cache(ImageState img) noexcept nogil:
    return img.data_is_file and (<FileStorage>img.data).bounce is not NULL


cdef q2_status collect_allocating(ImageState img, q2_many *m, size_t request, const uint8_t *data,
                                  uint64_t nbytes, uint64_t guest_off, uint64_t at_once,
                                  uint64_t *done) noexcept nogil:
    """As write_allocating; if nothing has to be written around the data, it waits in the batch."""
    cdef q2_write *w
    cdef uint64_t host_off
    cdef bint alone = False
    cdef q2_status st = Q2_OK
    done[0] = 0
    if m.n == MOST_OPEN:
        st = send_all(img, m, st, request)
    if st == Q2_OK:
        st = batch_land(img, &m.batch)
    if st == Q2_OK:
        st = begin_allocating(img, guest_off, nbytes, at_once, m.n == 0, &m.open[m.n])
    if st == Q2_BUSY:
        st = send_all(img, m, Q2_OK, request)
        if st == Q2_OK:
            st = begin_allocating(img, guest_off, nbytes, at_once, True, &m.open[0])
    w = &m.open[m.n]
    if st != Q2_OK or w.what == IN_PLACE:
        return st
    host_off = w.host_off + (w.data_off - (w.owned.first_cl << img.geo.cluster_bits))
    if (past_the_page_cache(img) and batch_takes(img, &m.batch, data, w.data_bytes, host_off)
            and writes_alone(img, &w.cow, w.fresh, &alone) == Q2_OK and alone):
        m.of_request[m.n] = request
        m.n += 1
        done[0] = w.data_bytes
        return batch_add(img, &m.batch, data, w.data_bytes, host_off, request)
    return end_allocating(img, w, data, 0, done)


cdef q2_status write_in_turn(ImageState img, const q2_wanted *wanted, size_t n, size_t depth,
                             bint durable) noexcept nogil:
    cdef uint32_t flags = WRITE_DEFERRED | WRITE_SOON if durable else WRITE_DEFERRED
    cdef q2_status st = Q2_OK
    cdef size_t i
    for i in range(n):
        if st == Q2_OK:
            st = write_range(img, wanted[i].buf, wanted[i].nbytes, wanted[i].guest_off,
                             flags, min(n, depth))
    return st


cdef q2_status write_together(ImageState img, const q2_wanted *wanted, size_t n,
                              size_t depth) noexcept nogil:
    cdef q2_many m
    cdef const uint8_t *data
    cdef uint64_t left, guest_off, done
    cdef uint32_t parity = 0
    cdef bint entered = False, alone
    cdef size_t i = 0, k
    cdef q2_status st = may_write(img)
    # What is in the batch has been planned in this image's present epoch (`parity`): whoever frees
    # those clusters meanwhile may not have them used again before all of this has landed.
    batch_begin(img, &m.batch, n, depth, True)
    m.n = 0
    while i < n and st == Q2_OK:
        data = <const uint8_t *>wanted[i].buf
        left = wanted[i].nbytes
        guest_off = wanted[i].guest_off
        alone = False
        while left and st == Q2_OK:
            st = collect_in_place(img, &m, i, data, left, guest_off, alone, &entered, &parity, &done)
            if st == Q2_OK and done == 0:
                st = collect_allocating(img, &m, i, data, left, guest_off, min(n, depth), &done)
            alone = done == 0
            data += done
            guest_off += done
            left -= done
        if st == Q2_OK:
            i += 1
    st = send_all(img, &m, st, i)
    if entered:
        # Also after a failure: any part may have been written.
        for k in range(n):
            if wanted[k].nbytes:
                note_change(img, wanted[k].guest_off, wanted[k].nbytes)
        leave_write(img, parity)
    return st


cdef q2_status write_many(ImageState img, const q2_wanted *wanted, size_t n, size_t depth,
                          bint fua) noexcept nogil:
    cdef bint durable = fua or img.durable
    cdef q2_status st
    if n == 1:
        return write_guest(img, wanted[0].buf, wanted[0].nbytes, wanted[0].guest_off, fua)
    if past_the_page_cache(img):
        st = write_together(img, wanted, n, depth)
    else:
        # Copies under the file's lock: 64 KiB each took 12.1 us by a ring, 32 under way, and 8.5 in turn.
        st = write_in_turn(img, wanted, n, depth, durable)
    # One flush, instead of durable writes: 512 of 4 KiB past the page cache took 34 us each and not 54, 32 of
    # them 46 and not 56; in the page cache 31 and 38, where 32 threads of durable writes took 41.
    if st == Q2_OK and durable:
        if q2_keeps(Q2_EDGE_WRITE_DURABLE_AT_RETURN):
            st = flush_image(img)
        elif q2_keeps(Q2_EDGE_MAPPING_DURABLE_AT_RETURN):
            st = flush_if_metadata_changed(img)
    flush_if_much_freed(img)
    return st
