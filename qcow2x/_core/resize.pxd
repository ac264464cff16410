# Changing the size of the guest disk. Sections "Header", "Cluster mapping".
from libc.stdint cimport uint64_t

from qcow2x._core.state cimport ImageState
from qcow2x._core.status cimport q2_status

# No lock held. A longer L1 table, durably at return. One thread at a time.
cdef q2_status grow_l1(ImageState img, uint64_t entries) noexcept nogil

# No lock held. Grows or shrinks the disk to `size` bytes, durably at return. What is new reads as
# zeros, also where the backing file is longer than the disk was. Other requests may go on.
cdef q2_status resize_guest(ImageState img, uint64_t size) noexcept nogil
