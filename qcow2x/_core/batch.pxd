# Many transfers between memory and the file in which an image's data lies, under way together.
from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint32_t, uint64_t

from qcow2x._core.state cimport ImageState
from qcow2x._core.status cimport q2_status

cdef extern from "qcow2x/iomany.h" nogil:
    ctypedef struct q2_io:
        void *buf
        size_t nbytes
        uint64_t off
        int fd
        int writes
        int flags
        int64_t got

cdef enum:
    # Between two batches fewer and fewer are under way: of 512, with 32 under way, that is nothing to see.
    BATCH_MOST = 512
    MOST_UNDER_WAY = 64     # Q2_RING_DEPTH

cdef struct q2_batch:
    q2_io io[BATCH_MOST]
    size_t of_request[BATCH_MOST]   # which of the caller's requests each belongs to
    size_t n
    size_t depth                    # of them under way at once, at most
    bint writes
    bint serves                     # False: takes nothing
    uint32_t flags
    size_t failed                   # the first of the caller's requests of which something failed

# One request of a caller.
cdef struct q2_wanted:
    void *buf
    size_t nbytes
    uint64_t guest_off

# For `requests` requests of a caller, all of them reads or all of them writes, these with `flags` of
# write_at; `depth` from 1 to MOST_UNDER_WAY.
cdef void batch_begin(ImageState img, q2_batch *batch, size_t requests, size_t depth, bint writes,
                      uint32_t flags) noexcept nogil

# Whether the bytes can go along: they lie in a plain file, as they are, and suit O_DIRECT.
cdef bint batch_takes(ImageState img, const q2_batch *batch, const void *buf, uint64_t nbytes,
                      uint64_t host_off) noexcept nogil

# No lock held. Adds a transfer of request `request`, with `flags` (of the batch, or without WRITE_FUA);
# sends what is collected first if it is full, and answers how that went.
cdef q2_status batch_add(ImageState img, q2_batch *batch, const void *buf, uint64_t nbytes,
                         uint64_t host_off, size_t request, uint32_t flags) noexcept nogil

# No lock held. Does what is collected and empties the batch. The answer is that of the first request
# that failed, and `failed` is lowered to it.
cdef q2_status batch_send(ImageState img, q2_batch *batch) noexcept nogil

# No lock held. The same at the end of all, where `st` is what stopped the caller at request `at` (or
# Q2_OK): answers with the earliest failure, whose message is the one that is told.
cdef q2_status batch_end(ImageState img, q2_batch *batch, q2_status st, size_t at) noexcept nogil
