from libc.stddef cimport size_t

from qcow2x._core.batch cimport q2_wanted


cdef class ManyBuffers:
    # The buffers of many requests, held until this object is gone.
    cdef q2_wanted *wanted      # n of them
    cdef size_t n
    cdef size_t held
    cdef void *views

    cdef list lengths(self)
