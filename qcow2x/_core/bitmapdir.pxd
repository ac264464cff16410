# Persistent dirty bitmaps in the file: directory, tables and data. Section "Bitmaps".
from libc.stdint cimport uint32_t, uint64_t

from qcow2x._core.marks cimport q2_marks
from qcow2x._core.status cimport q2_status
from qcow2x._core.storage cimport Storage

# A list of runs of equal bits: where each ends. The first begins where the scan did, and the values
# alternate.
cdef struct q2_bitruns:
    uint64_t *end
    uint64_t n
    bint value             # of the last run


cdef class Marks:
    # An array of its own; the disk's size in bytes. See marks.pxd.
    cdef q2_marks m
    cdef readonly uint64_t size


cdef class BitmapData:
    # The table of one bitmap, made for a disk of `size` bytes. Clusters of bits are read only when
    # asked for.
    cdef Storage file
    cdef readonly uint64_t size
    cdef uint64_t bits              # of the bitmap
    cdef uint32_t shift             # granularity, log2
    cdef uint32_t cluster_bits
    cdef uint64_t per_cluster       # bits in one cluster
    cdef uint64_t n                 # entries
    cdef uint64_t *entry            # host byte order

    cdef q2_status read_table(self, uint64_t table_off) noexcept nogil
    cdef uint64_t bits_in(self, uint64_t i) noexcept nogil
    cdef q2_status read_bits(self, uint64_t i, uint64_t *into) noexcept nogil
    cdef bint marked(self, uint64_t i, const q2_marks *m) noexcept nogil
    cdef q2_status scan(self, uint64_t at, const q2_marks *m, uint64_t limit,
                        q2_bitruns *found) noexcept nogil
    cdef q2_status count(self, const q2_marks *m, uint64_t *total, bint *last) noexcept nogil
    cdef bint changes(self, BitmapData old, uint64_t i, const q2_marks *m) noexcept nogil
    cdef q2_status build(self, BitmapData old, const q2_marks *m, uint64_t host_off,
                         uint64_t *written) noexcept nogil
