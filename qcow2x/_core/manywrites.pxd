# Many guest writes of one caller, under way together.
from libc.stddef cimport size_t

from qcow2x._core.batch cimport q2_wanted
from qcow2x._core.state cimport ImageState
from qcow2x._core.status cimport q2_status

# No lock held. Writes as write_guest would (write.pxd), each inside the disk and none over another. Those
# that lie in the image's file as they are go together past the page cache, up to `depth` of them (1 to
# MOST_UNDER_WAY), whether in place or to new clusters. With fua, or where the image is `durable`, all are
# durable at return, by one flush. The answer is that of the first in their order that failed; what of the
# others was written is not said.
cdef q2_status write_many(ImageState img, const q2_wanted *wanted, size_t n, size_t depth,
                          bint fua) noexcept nogil
