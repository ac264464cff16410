# Guest writes.
from libc.stddef cimport size_t
from libc.stdint cimport uint64_t, uint8_t, uint32_t

from qcow2x._core.batch cimport q2_wanted
from qcow2x._core.state cimport ImageState
from qcow2x._core.status cimport q2_status

# No lock held. Writes the guest bytes [guest_off, guest_off + nbytes), which must lie inside the
# disk. Durable at return with fua or where the image is `durable`. After a failure any part may
# have been written; what was not keeps its old bytes.
cdef q2_status write_guest(ImageState img, const void *buf, size_t nbytes, uint64_t guest_off,
                           bint fua) noexcept nogil

# No lock held. Many such writes, each inside the disk and none over another. Those that go in place
# are under way together; with fua, or where the image is `durable`, all are made durable by one flush
# at the end. The answer is that of the first in their order that failed; what of the others was written
# is not said.
cdef q2_status write_many(ImageState img, const q2_wanted *wanted, size_t n, bint fua) noexcept nogil

# No lock held. Gives the guest clusters of the range, which must be whole (or end with the disk),
# host clusters that read as zeros, without writing data. For preallocation: clusters that are
# allocated already stay.
cdef q2_status allocate_guest(ImageState img, uint64_t guest_off, uint64_t nbytes) noexcept nogil

# No lock held. Stores one encoded cluster (stream_bytes < cluster_size) for the guest cluster at
# guest_off, replacing what was there.
cdef q2_status write_encoded(ImageState img, const uint8_t *stream, uint32_t stream_bytes,
                             uint64_t guest_off) noexcept nogil
