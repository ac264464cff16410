# cython: language_level=3
"""The requests of one call that serves many: checked at the door, their buffers held."""
from cpython.buffer cimport PyBuffer_Release, PyObject_GetBuffer
from libc.stdlib cimport calloc, free

from qcow2x._core.door cimport door_offset


cdef class ManyBuffers:
    """Of ``requests``, a sequence of ``(buffer, offset)``; ``flags`` are PyObject_GetBuffer's."""

    def __cinit__(self, name, requests, int flags):
        cdef list parts = list(requests)
        cdef Py_buffer *view
        cdef size_t i
        self.n = len(parts)
        self.views = calloc(self.n + 1, sizeof(Py_buffer))
        self.wanted = <q2_wanted *>calloc(self.n + 1, sizeof(q2_wanted))
        if self.views is NULL or self.wanted is NULL:
            raise MemoryError(f"{name}: no memory for {self.n} requests")
        for i in range(self.n):
            buffer, offset = parts[i]
            self.wanted[i].guest_off = door_offset(offset)
            view = <Py_buffer *>self.views + i
            PyObject_GetBuffer(buffer, view, flags)
            self.held += 1
            self.wanted[i].buf = view.buf
            self.wanted[i].nbytes = view.len

    def __dealloc__(self):
        cdef size_t i
        for i in range(self.held):
            PyBuffer_Release(<Py_buffer *>self.views + i)
        free(self.views)
        free(self.wanted)

    cdef list lengths(self):
        cdef size_t i
        return [self.wanted[i].nbytes for i in range(self.n)]
