# Many transfers between memory and the file in which an image's data lies, under way together. While some
# are, their thread goes on and prepares others.
from libc.stddef cimport size_t
from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t

from qcow2x._core.state cimport ImageState
from qcow2x._core.status cimport q2_status

cdef extern from "qcow2x/iomany.h" nogil:
    ctypedef struct q2_io:
        void *buf
        size_t nbytes
        uint64_t off
        int fd
        int writes
        size_t of
        int64_t got
    ctypedef struct q2_flight:
        void *ring
        size_t n

cdef enum:
    # Collected, put in the order of their places, and sent.
    BATCH_MOST = 512
    MOST_UNDER_WAY = 64     # Q2_RING_DEPTH
    # Writes one after another until all have to land, for others who wait for `edges`.
    MOST_IN_A_ROW = 4096

cdef struct q2_batch:
    q2_io io[BATCH_MOST]            # collected; `of` is which of the caller's requests each belongs to
    size_t n
    size_t fill                     # of them, before they are sent
    q2_flight flight                # sent
    size_t in_a_row                 # sent since nothing was under way
    q2_io short[MOST_UNDER_WAY + 1] # landed, but not whole
    size_t n_short
    size_t depth                    # under way at once, at most
    bint writes
    bint serves                     # False: takes nothing
    bint copies                     # out of the page cache
    size_t failed                   # the first of the caller's requests of which something failed

# One request of a caller.
cdef struct q2_wanted:
    void *buf
    size_t nbytes
    uint64_t guest_off

# For `requests` requests of a caller, all of them reads or all of them writes; `depth` from 1 to
# MOST_UNDER_WAY. No write is durable by itself.
cdef void batch_begin(ImageState img, q2_batch *batch, size_t requests, size_t depth,
                      bint writes) noexcept nogil

# Whether the bytes can go along: they lie in a plain file, as they are, and suit O_DIRECT.
cdef bint batch_takes(ImageState img, const q2_batch *batch, const void *buf, uint64_t nbytes,
                      uint64_t host_off) noexcept nogil

# No lock held. Adds a transfer of request `request`; sends what is collected first if that is enough, and
# answers how it went, as far as that is known.
cdef q2_status batch_add(ImageState img, q2_batch *batch, const void *buf, uint64_t nbytes,
                         uint64_t host_off, size_t request) noexcept nogil

# Writes that are under way hold `edges` of the file shared (storage.pyx), which others may wait for with
# any lock in their hands. So as long as this is true, who writes neither waits for a lock or a request nor
# touches the file in another way.
cdef inline bint batch_under_way(const q2_batch *batch) noexcept nogil:
    return batch.flight.ring is not NULL

# No lock held. Waits for what is under way. The answer is that of the first request that failed, and
# `failed` is lowered to it.
cdef q2_status batch_land(ImageState img, q2_batch *batch) noexcept nogil

# A transfer of guest data that may go along with one of metadata.
cdef struct q2_beside:
    const void *buf
    size_t nbytes
    uint64_t host_off
    bint written

# commit held. Writes metadata of `site` to the image's file, and the data beside it, in any order, under way
# together past the page cache. Neither is durable by itself.
cdef q2_status write_beside(ImageState img, int32_t site, const void *buf, size_t nbytes,
                            uint64_t host_off, q2_beside *beside) noexcept nogil

# No lock held. Sends and waits for the rest, where `st` is what stopped the caller at request `at` (or
# Q2_OK): answers with the earliest failure, whose message is the one that is told.
cdef q2_status batch_end(ImageState img, q2_batch *batch, q2_status st, size_t at) noexcept nogil
