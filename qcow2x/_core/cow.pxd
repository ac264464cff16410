# Copy-on-write: what a write to part of a cluster adds around its own bytes.
from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from qcow2x._core.state cimport ImageState
from qcow2x._core.status cimport q2_status

# Bytes before and after the guest data that go to the host in the same write.
cdef struct q2_cow:
    uint64_t head_off        # guest offset of the head; it ends where the data begins
    uint64_t head_bytes
    uint64_t tail_off        # guest offset of the tail; it begins where the data ends
    uint64_t tail_bytes

# No lock held. Whether nothing is to be written besides the data: on a fresh host cluster, one that reads
# as zeros already, sides that are zeros are left out.
cdef q2_status writes_alone(ImageState img, const q2_cow *cow, bint fresh,
                            bint *alone) noexcept nogil

# No lock held. Writes head, data and tail as one vector to host_off (the place of the head), the
# old guest bytes around the data read first; `flags` of writev_at.
cdef q2_status write_with_cow(ImageState img, const q2_cow *cow, const uint8_t *data,
                              size_t data_bytes, uint64_t host_off, bint fresh,
                              uint32_t flags) noexcept nogil
