# Refcounts of 1 to 64 bits inside a slice of a refcount block. Section "Refcounts": widths below
# a byte are packed from the least significant bit up, wider ones are big-endian.
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from qcow2x._core.wire cimport (q2_load_be16, q2_load_be32, q2_load_be64, q2_store_be16,
                                q2_store_be32, q2_store_be64)


cdef inline uint64_t get_refcount(const uint8_t *slice, uint32_t order,
                                  uint64_t i) noexcept nogil:
    if order == 4:
        return q2_load_be16(slice + 2 * i)
    if order == 3:
        return slice[i]
    if order == 5:
        return q2_load_be32(slice + 4 * i)
    if order == 6:
        return q2_load_be64(slice + 8 * i)
    # 1, 2 or 4 bits: (1 << order) bits at bit (i << order)
    return (slice[(i << order) >> 3] >> ((i << order) & 7)) & ((1 << (1 << order)) - 1)


cdef inline void set_refcount(uint8_t *slice, uint32_t order, uint64_t i,
                              uint64_t value) noexcept nogil:
    cdef uint32_t shift
    cdef uint8_t mask
    if order == 4:
        q2_store_be16(slice + 2 * i, <uint16_t>value)
    elif order == 3:
        slice[i] = <uint8_t>value
    elif order == 5:
        q2_store_be32(slice + 4 * i, <uint32_t>value)
    elif order == 6:
        q2_store_be64(slice + 8 * i, value)
    else:
        shift = (i << order) & 7
        mask = <uint8_t>(((1 << (1 << order)) - 1) << shift)
        slice[(i << order) >> 3] = <uint8_t>(
            (slice[(i << order) >> 3] & ~mask) | ((value << shift) & mask))
