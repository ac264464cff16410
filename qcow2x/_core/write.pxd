# Guest writes.
from libc.stddef cimport size_t
from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t

from qcow2x._core.cow cimport q2_cow
from qcow2x._core.plan cimport q2_plan
from qcow2x._core.state cimport ImageState, q2_inflight
from qcow2x._core.status cimport q2_status
from qcow2x._core.storage cimport q2_extent

cdef enum:
    IN_PLACE = 0    # nothing to allocate: the caller goes the short way
    KEEP = 1        # the host cluster is ours and stays; flags or subcluster bits change
    RENEW = 2       # a new host cluster

cdef struct q2_write:
    q2_inflight owned
    uint8_t what            # IN_PLACE, KEEP or RENEW
    bint fresh              # the host clusters read as zeros until written
    bint grows              # the host clusters may come from the reserve (growth.pxd)
    bint many               # one of many writes under way
    bint one_flush          # one of many of one call, all of them durable by the same flush
    bint over_zeros         # the guest clusters read as zeros before, and the host's do until written
    uint64_t ahead          # of the owned clusters, the last so many are linked ahead
    uint64_t clear_cl       # where `grows`: nothing of the backing file shows through before it
    bint flag_zeros         # what is mapped reads as zeros by its entry, whatever the host holds
    uint64_t host_off       # of the first owned cluster
    uint64_t data_off       # guest
    uint64_t data_bytes
    q2_cow cow

# No lock held. Writes the guest bytes [guest_off, guest_off + nbytes), which must lie inside the
# disk. Durable at return with fua or where the image is `durable`. After a failure any part may
# have been written; what was not keeps its old bytes.
cdef q2_status write_guest(ImageState img, const void *buf, size_t nbytes, uint64_t guest_off,
                           bint fua) noexcept nogil

# No lock held. Gives the guest clusters of the range, which must be whole (or end with the disk),
# host clusters that read as zeros, without writing data. For preallocation: clusters that are
# allocated already stay.
cdef q2_status allocate_guest(ImageState img, uint64_t guest_off, uint64_t nbytes) noexcept nogil

# No lock held. Stores one encoded cluster (stream_bytes < cluster_size) for the guest cluster at
# guest_off, replacing what was there.
cdef q2_status write_encoded(ImageState img, const uint8_t *stream, uint32_t stream_bytes,
                             uint64_t guest_off) noexcept nogil

# The parts of write_guest, for who has many writes under way (manywrites.pyx).

# No lock held. The same without its end: what goes in place is written with `flags` of write_at, what
# allocates is durable after the next flush. `at_once`: so many
# writes of one caller are under way, and durable together.
cdef q2_status write_range(ImageState img, const void *buf, size_t nbytes, uint64_t guest_off,
                           uint32_t flags, uint64_t at_once) noexcept nogil

# No lock held. The part of a write that leads it and needs no metadata: the first *leading extents of
# the plan, maybe none. Unless `alone` it leaves to an allocating write what makes one with what follows
# it. Enters the request (*entered, *parity) if it has not been. Q2_BUSY, only without `wait`: it would
# have to wait for a lock, or to read.
cdef q2_status plan_in_place(ImageState img, uint64_t guest_off, uint64_t nbytes, bint alone,
                             bint wait, bint *entered, uint32_t *parity, q2_plan *plan,
                             int32_t *leading) noexcept nogil
# No lock held. One extent of such a plan; flags of write_at.
cdef q2_status write_extent(ImageState img, const q2_extent *ext, const uint8_t *data,
                            uint32_t flags) noexcept nogil

# No lock held, the request entered. An allocating write of as much of the range as one run of host
# clusters takes; `at_once` as for write_range. It is IN_PLACE if
# none is needed, else it owns its clusters until end_allocating or finish. Q2_BUSY, only without `wait`:
# somebody else's are in the way.
cdef q2_status begin_allocating(ImageState img, uint64_t guest_off, uint64_t nbytes,
                                uint64_t at_once, bint wait, q2_write *w) noexcept nogil
# No lock held. Writes its data, and what is to be copied around it, with `flags` of write_at besides
# WRITE_DEFERRED, and ends it. *done: guest bytes.
cdef q2_status end_allocating(ImageState img, q2_write *w, const uint8_t *data, uint32_t flags,
                              uint64_t *done) noexcept nogil
# No lock held. Its end: linked if its data was written (outcome Q2_OK), else aborted.
cdef q2_status finish(ImageState img, q2_write *w, q2_status outcome) noexcept nogil
