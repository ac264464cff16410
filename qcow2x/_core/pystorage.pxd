# A Python object as storage.
from qcow2x._core.storage cimport Storage


cdef class PyStorage(Storage):
    # Any Python object with size(), pread(length, offset) and for writing pwrite(buffer, offset),
    # flush(), truncate(size); optional preadinto(buffer, offset), punch(offset, length),
    # zero(offset, length, may_unmap), extent(offset, length), reserve(offset, length), at_site(name).
    # The order of its calls is exactly the order of writes of docs/architecture.md, section 5.
    cdef object obj
    cdef bint has_preadinto
    cdef bint has_punch
    cdef bint has_zero
    cdef bint has_extent
    cdef bint has_reserve
