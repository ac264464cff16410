# Discard, write zeroes, and cutting off the end: mapping removed now, clusters freed by a later
# flush (retire.pyx).
from libc.stdint cimport uint64_t

from qcow2x._core.state cimport ImageState
from qcow2x._core.status cimport q2_status

# No lock held; the range must lie inside the disk. What is no whole cluster of it (the end of the
# disk completes one) is left alone. The rest reads as zeros afterwards; only where the image is
# version 2 and a backing file would show through it keeps its bytes.
cdef q2_status discard_guest(ImageState img, uint64_t guest_off, uint64_t nbytes) noexcept nogil

# No lock held; the range must lie inside the disk and reads as zeros afterwards, whole clusters (and
# subclusters) of it by metadata alone where the format can. may_unmap gives host clusters back.
cdef q2_status zero_guest(ImageState img, uint64_t guest_off, uint64_t nbytes, bint may_unmap,
                          bint fua) noexcept nogil

# No lock held. Unmaps whole clusters of the range, whatever would show through. For taking zero flags
# away where nothing would.
cdef q2_status unmap_guest(ImageState img, uint64_t guest_off, uint64_t nbytes) noexcept nogil

# No lock held. Unmaps every whole cluster at or after guest_off, whatever would show through: for
# shrinking.
cdef q2_status unmap_tail(ImageState img, uint64_t guest_off) noexcept nogil
