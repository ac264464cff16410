# Data clusters of an encrypted image: whole sectors on the host, any bytes for the guest.
from libc.stddef cimport size_t
from libc.stdint cimport int32_t, uint32_t, uint64_t
from posix.uio cimport iovec

from qcow2x._core.state cimport ImageState
from qcow2x._core.status cimport q2_status

# No lock held. The guest bytes [guest_off, guest_off + nbytes), which are stored at host_off.
cdef q2_status read_encrypted(ImageState img, int32_t site, void *buf, size_t nbytes,
                              uint64_t host_off, uint64_t guest_off) noexcept nogil

# No lock held. The buffers of iov, one after another, as the guest bytes from guest_off on, to
# host_off. A sector of which they hold only a part must have been written before: the rest of it
# is kept. iov is left as it was.
cdef q2_status write_encrypted(ImageState img, int32_t site, const iovec *iov, int32_t n,
                               uint64_t host_off, uint64_t guest_off,
                               uint32_t flags) noexcept nogil
