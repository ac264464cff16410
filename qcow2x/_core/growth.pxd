# Growth ahead of the writer: new clusters without a refcount to write, and without a mapping to write. What it is
# stands in reserve.pxd; here is what touches the file for it.
from libc.stdint cimport uint64_t

from qcow2x._core.state cimport ImageState
from qcow2x._core.status cimport q2_status

# No lock held. A new reserve, durably if it is GROWTH_AHEAD; on failure (there may be no room for so much at once) the caller
# allocates what it needs by itself.
cdef q2_status fill_reserve(ImageState img) noexcept nogil

# No lock held. The guest cluster up to which nothing of the backing file shows through, from the one
# that guest_off lies in on, as far as linking ahead may reach.
cdef uint64_t clear_from(ImageState img, uint64_t guest_off) noexcept nogil
