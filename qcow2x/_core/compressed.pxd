# Reading compressed clusters.
from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint64_t

from qcow2x._core.state cimport ImageState
from qcow2x._core.status cimport q2_status
from qcow2x._core.storage cimport q2_extent

cdef enum:
    MOST_PIECES = 64

# What is wanted of a compressed cluster, all of it or a part.
cdef struct q2_piece:
    q2_extent ext
    uint8_t *out
    size_t request          # the caller's, to tell which one failed

# No lock held, the request entered. At most MOST_PIECES; those of one cluster, if they follow one another,
# are one work. Streams that lie together are fetched together where each transfer is a wait; several CPUs
# decode if there is enough for them and they have nothing to decode. `epoch` is the image's from before
# the plan. *failed, after a failure: the request of the first piece that failed.
cdef q2_status read_pieces(ImageState img, const q2_piece *piece, size_t n, uint64_t epoch,
                           size_t *failed) noexcept nogil

# The same for what `n` extents of compressed clusters, which follow one another, hold of the disk.
cdef q2_status read_compressed(ImageState img, const q2_extent *ext, size_t n, uint8_t *buf,
                               uint64_t epoch) noexcept nogil
