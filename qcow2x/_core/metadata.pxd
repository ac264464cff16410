# Metadata between memory and file: loading slices, writing them back in order.
from libc.stdint cimport int32_t, uint64_t

from qcow2x._core.batch cimport q2_beside
from qcow2x._core.state cimport ImageState
from qcow2x._core.status cimport q2_status

# What a planning step writes to *miss with Q2_MISS: the slice's host offset, which is a multiple of
# 512, and in bit 0 which cache wants it.
cdef inline uint64_t missing_l2(uint64_t key) noexcept nogil:
    return key

cdef inline uint64_t missing_refblock(uint64_t key) noexcept nogil:
    return key | 1

# The refcount table as a whole: only the first allocation wants it, opening an image does not.
cdef enum:
    MISSING_REFTABLE = 1

# The dirty bit on disk, which the first allocation of an image with lazy refcounts wants.
cdef enum:
    MISSING_DIRTY_BIT = 2

# The reserve of growth.pxd is empty: fill_reserve there, not load_slice, fills it.
cdef enum:
    MISSING_RESERVE = 4

# No lock held. The slice is (or was, a moment ago) cached afterwards: plan again.
cdef q2_status load_slice(ImageState img, uint64_t miss) noexcept nogil

# The same for a thread that holds commit.
cdef q2_status load_slice_committing(ImageState img, uint64_t miss) noexcept nogil

# commit held. The file's first sector as `head` now is, durable at return: before what the edge
# (edges.h) says comes after it.
cdef q2_status write_head(ImageState img, int32_t site, int edge) noexcept nogil

# No lock held: after a request failed with Q2_E_CORRUPT. If it met damage that no write may follow
# (`damaged` of state.pxd), the corrupt bit is set on disk and the image poisoned.
cdef void mark_corrupt(ImageState img) noexcept nogil

# commit held. Sets or clears the dirty bit, durably. Version 3.
cdef q2_status write_dirty_bit(ImageState img, bint dirty) noexcept nogil

# commit held, meta not. The same as write_back_locked(img, True), but with the dirty bit set for lazy
# refcounts these stay in memory: what a guest's flush asks for. The data `beside`, if not NULL, is written
# along with an L2 slice, if one is.
cdef q2_status write_back_for_guest(ImageState img, q2_beside *beside) noexcept nogil

# commit held, meta not. Writes every dirty slice back in the order of writes. With make_durable a
# sync follows, and what was unmapped before the call moves to limbo (retire.pyx). After a failure
# everything is dirty again.
cdef q2_status write_back_locked(ImageState img, bint make_durable) noexcept nogil
