# Bits in memory that say which parts of the guest disk were changed. No .pyx: nothing to compile.
#
# Bit i, from the least significant of word 0 on, stands for the guest bytes [i << shift, (i + 1) <<
# shift): the order of bits of a bitmap in an image, section "Bitmaps". Any thread may set bits at any
# time; the array is exchanged only while writers are frozen.
from libc.stdint cimport uint32_t, uint64_t

from qcow2x._core.sync cimport q2_set_bits

cdef struct q2_marks:
    uint64_t *word         # NULL: nothing is tracked
    uint64_t bits
    uint32_t shift


cdef inline void marks_set(q2_marks *m, uint64_t guest_off, uint64_t end) noexcept nogil:
    """Marks [guest_off, end), which is not empty; what lies past the last bit is left out."""
    cdef uint64_t first = guest_off >> m.shift
    cdef uint64_t last = (end - 1) >> m.shift
    cdef uint64_t at, high, ones
    if first >= m.bits:
        return
    if last >= m.bits:
        last = m.bits - 1
    for at in range(first >> 6, (last >> 6) + 1):
        ones = ~<uint64_t>0
        if at == first >> 6:
            ones <<= first & 63
        if at == last >> 6:
            high = last & 63
            ones &= ~<uint64_t>0 >> (63 - high)
        q2_set_bits(&m.word[at], ones)
