# What comes from Python as a number of bytes.
from libc.stdint cimport int64_t, uint64_t


cdef inline uint64_t door_offset(value) except? 0:
    cdef int64_t n
    try:
        n = value
    except OverflowError:
        raise ValueError(f"offset {value} is out of range") from None
    if n < 0:
        raise ValueError(f"offset {value} is negative")
    return <uint64_t>n


cdef inline uint64_t door_length(value) except? 0:
    cdef int64_t n
    try:
        n = value
    except OverflowError:
        raise ValueError(f"length {value} is out of range") from None
    if n < 0:
        raise ValueError(f"length {value} is negative")
    return <uint64_t>n
