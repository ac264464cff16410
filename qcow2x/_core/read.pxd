# Guest reads.
from libc.stddef cimport size_t
from libc.stdint cimport uint64_t

from qcow2x._core.batch cimport q2_wanted
from qcow2x._core.state cimport ImageState
from qcow2x._core.status cimport q2_status
from qcow2x._core.storage cimport q2_extent

# No lock held. Fills buf with the guest bytes [guest_off, guest_off + nbytes), which must lie inside
# the disk. One failure fails the whole request.
cdef q2_status read_guest(ImageState img, void *buf, size_t nbytes,
                          uint64_t guest_off) noexcept nogil

# No lock held. All of them, each inside the disk. What lies in a file is read many at a time, up to
# `depth` of them (1 to MOST_UNDER_WAY), by io_uring or by threads; what is compressed, encrypted, in a backing file or in a Python storage
# one after another. The first failure in their order is the answer; what of the others was read
# is not said.
cdef q2_status read_many(ImageState img, const q2_wanted *wanted, size_t n,
                         size_t depth) noexcept nogil

# No lock held. The same as read_guest for a range past the end of the disk, where the state of a machine is kept:
# what is not mapped there is zeros, whatever the backing file has.
cdef q2_status read_vmstate(ImageState img, void *buf, size_t nbytes,
                            uint64_t guest_off) noexcept nogil

# No lock held. The first run at guest_off in this layer, with its own Q2_KIND: UNALLOCATED for what a
# backing file shows.
cdef q2_status layer_extent(ImageState img, uint64_t guest_off, uint64_t nbytes,
                            q2_extent *out) noexcept nogil

# No lock held. The first run at guest_off, through the chain: DATA (also for compressed) or ZERO.
cdef q2_status guest_extent(ImageState img, uint64_t guest_off, uint64_t nbytes,
                            q2_extent *out) noexcept nogil

# No lock held. Whether the guest range reads as zeros, as far as metadata tells.
cdef q2_status reads_as_zero(ImageState img, uint64_t guest_off, uint64_t nbytes,
                             bint *zero) noexcept nogil
