# Reading compressed clusters.
from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint64_t

from qcow2x._core.state cimport ImageState
from qcow2x._core.status cimport q2_status
from qcow2x._core.storage cimport q2_extent

# No lock held. What `n` extents of compressed clusters, which follow one another, hold of the disk; on several
# CPUs if there is enough to decode and CPUs have nothing to decode. `epoch` is the image's from before the
# plan.
cdef q2_status read_compressed(ImageState img, const q2_extent *ext, size_t n, uint8_t *buf,
                               uint64_t epoch) noexcept nogil
