# What comes from Python as a number of bytes.
from libc.stdint cimport uint64_t

cdef extern from "Python.h":
    long long PyLong_AsLongLongAndOverflow(object value, int *overflow) except? -1


cdef inline uint64_t door_offset(value) except? 0:
    cdef int overflow = 0
    cdef long long n = PyLong_AsLongLongAndOverflow(value, &overflow)
    if n < 0:
        raise ValueError(f"offset {value} is out of range" if overflow
                         else f"offset {value} is negative")
    return <uint64_t>n


cdef inline uint64_t door_length(value) except? 0:
    cdef int overflow = 0
    cdef long long n = PyLong_AsLongLongAndOverflow(value, &overflow)
    if n < 0:
        raise ValueError(f"length {value} is out of range" if overflow
                         else f"length {value} is negative")
    return <uint64_t>n
