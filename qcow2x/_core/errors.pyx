# cython: language_level=3
"""Statuses become exceptions here and nowhere else."""
import os

from cpython.exc cimport PyErr_Restore
from cpython.object cimport PyObject
from libc.errno cimport EDQUOT, EFBIG, ENOSPC

from qcow2x._core.status cimport *

cdef extern from *:
    """
    #include "qcow2x/status.h"
    #include <Python.h>

    static _Thread_local q2_error q2_last_error;
    static _Thread_local PyObject *q2_stashed[3];

    #define Q2_SITE_NAME_(name) #name,
    static const char *const q2_site_names[] = {Q2_SITES(Q2_SITE_NAME_)};
    """
    q2_error q2_last_error
    PyObject *q2_stashed[3]
    const char *q2_site_names[]


SITE_NAMES = tuple(q2_site_names[i].decode("ascii").lower() for i in range(Q2_SITE_COUNT))


cdef q2_status fail(q2_status status, int32_t site, uint64_t offset,
                    const char *what) noexcept nogil:
    q2_last_error.status = status
    q2_last_error.sys_errno = 0
    q2_last_error.site = site
    q2_last_error.offset = offset
    q2_last_error.what = what
    return status


cdef q2_status fail_entry(q2_status status, int32_t site, uint64_t offset, uint64_t index,
                          const char *what) noexcept nogil:
    fail(status, site, offset, what)
    q2_last_error.index = index
    return status


cdef q2_status fail_errno(int32_t sys_errno, int32_t site, uint64_t offset,
                          const char *what) noexcept nogil:
    cdef q2_status status = Q2_E_NOSPC if means_no_room(sys_errno) else Q2_E_IO
    fail(status, site, offset, what)
    q2_last_error.sys_errno = sys_errno
    return status


cdef inline bint means_no_room(int32_t sys_errno) noexcept nogil:
    return sys_errno == ENOSPC or sys_errno == EDQUOT or sys_errno == EFBIG


cdef bint lacked_room(q2_status status) noexcept nogil:
    return status == Q2_E_NOSPC or (
        status == Q2_E_PYTHON and means_no_room(q2_last_error.sys_errno))


cdef q2_error last_error() noexcept nogil:
    return q2_last_error


cdef void set_last_error(q2_error detail) noexcept nogil:
    q2_last_error = detail


cdef extern from "Python.h":
    void Py_XDECREF(PyObject *)
    void PyErr_GetExcInfo(PyObject **type, PyObject **value, PyObject **trace)


cdef q2_status stash_exception_gil(int32_t site, uint64_t offset) noexcept:
    cdef PyObject *old_type = q2_stashed[0]
    cdef PyObject *old_value = q2_stashed[1]
    cdef PyObject *old_trace = q2_stashed[2]
    # In an `except` block the exception is no longer the pending one (PyErr_Fetch would find
    # nothing) but the handled one. These are new references.
    PyErr_GetExcInfo(&q2_stashed[0], &q2_stashed[1], &q2_stashed[2])
    # An earlier one that nobody collected.
    Py_XDECREF(old_type)
    Py_XDECREF(old_value)
    Py_XDECREF(old_trace)
    fail(Q2_E_PYTHON, site, offset, b"the storage object raised")
    q2_last_error.sys_errno = errno_of_gil(<object>q2_stashed[1])
    return Q2_E_PYTHON


cdef int32_t errno_of_gil(object exc) noexcept:
    try:
        return exc.errno if isinstance(exc, OSError) else 0
    except Exception:       # errno is None, or whatever somebody put there
        return 0




cdef int check_status(q2_status status, object name) except -1:
    if status == Q2_OK:
        return 0
    if status == Q2_E_NOMEM:
        raise MemoryError("%s: out of memory" % name)
    if status == Q2_E_PYTHON and q2_stashed[0] is not NULL:
        PyErr_Restore(q2_stashed[0], q2_stashed[1], q2_stashed[2])
        q2_stashed[0] = q2_stashed[1] = q2_stashed[2] = NULL
        return -1
    cdef q2_error detail = q2_last_error
    # A status that was returned without details must not borrow those of an older failure.
    if detail.status != status:
        detail = q2_error(status, 0, Q2_SITE_NONE, 0, 0, NULL)
    what = detail.what.decode("utf-8") if detail.what is not NULL else None
    from qcow2x.errors import exception_for
    if what is not None and "{" in what:
        # As C's %#x has it, which QEMU's messages are written with: no 0x in front of 0.
        what = what.format(offset="%#x" % detail.offset if detail.offset else "0",
                           index="%#x" % detail.index if detail.index else "0")
    raise exception_for(status, name, what, detail.sys_errno, detail.offset,
                        SITE_NAMES[detail.site])
