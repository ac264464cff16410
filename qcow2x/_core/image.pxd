# The entry points: an open image as Python and other Cython modules see it.
#
# To a consumer extension a CoreImage is a Storage whose bytes are the guest disk: read_at, write_at,
# writev_at, sync, get_size, punch_hole (discard), zero_range and extent_at may all be called without
# the GIL, from any thread; see storage.pxd for their contracts.
from libc.stddef cimport size_t
from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t

from qcow2x._core.state cimport ImageState
from qcow2x._core.status cimport q2_status
from qcow2x._core.storage cimport Storage

cdef enum:
    # In the sizes of write_compressed_batch: not this cluster.
    BATCH_SKIP = 0xffffffff


cdef class CoreImage(ImageState):
    cdef _load_l1(self)
    cdef _guard_luks_header(self)
    cdef _init_caches(self, uint64_t l2_bytes)
    cdef _set_backing(self, Storage backing)
    cdef _map_chain(self)
    cdef q2_status _write_compressed(self, const uint8_t *data, uint64_t nbytes, uint64_t off,
                                     int32_t level) noexcept nogil
    cdef q2_status _write_batch(self, const uint8_t *stream, const uint32_t *lengths,
                                uint64_t clusters, const uint8_t *plain, uint64_t plain_bytes,
                                uint64_t off) noexcept nogil
    cdef int _raise(self, q2_status st) except -1
    cdef q2_status _open_status(self) noexcept nogil
    cdef q2_status _flush(self)
    cdef q2_status _inside(self, uint64_t off, uint64_t nbytes) noexcept nogil
    cdef q2_status _takes_compressed(self, uint64_t off) noexcept nogil
    cdef size_t _until_end(self, uint64_t nbytes, uint64_t off) noexcept nogil
