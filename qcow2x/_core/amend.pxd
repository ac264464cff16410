# Changing what an image is, in place.
from libc.stdint cimport uint32_t

from qcow2x._core.state cimport ImageState
from qcow2x._core.status cimport q2_status

# No lock held; administrative, like the verbs of snapshot.pxd. All refcounts are written anew, 1 << order
# bits wide, behind the end of the file, and the header switches to them in one sector: a cut of power
# leaves one set or the other. Q2_E_UNSUPPORTED if a refcount does not fit. Version 3 only.
cdef q2_status change_refcount_width(ImageState img, uint32_t order) noexcept nogil
