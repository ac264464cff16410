# Freed clusters on their way to being free: see retire.pyx.
from qcow2x._core.state cimport ImageState
from qcow2x._core.status cimport q2_status

# commit held, meta not. Gives back what is durably unmapped and no request can still touch.
cdef q2_status retire_freed(ImageState img) noexcept nogil
