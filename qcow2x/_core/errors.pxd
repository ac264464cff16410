# Failure below the entry points: a status goes up, the details stay with the thread.
from libc.stdint cimport int32_t, uint64_t

from qcow2x._core.status cimport q2_error, q2_status

# Notes the details for this thread and returns `status`, so that a kernel says
# `return fail(Q2_E_CORRUPT, Q2_SITE_L2_LOAD, off, "...")`. `what` must be a static string.
cdef q2_status fail(q2_status status, int32_t site, uint64_t offset,
                    const char *what) noexcept nogil

# The same for one entry of a table at `offset`: "{offset}" and "{index}" in `what` stand for them.
cdef q2_status fail_entry(q2_status status, int32_t site, uint64_t offset, uint64_t index,
                          const char *what) noexcept nogil

# The same for a failed system call; sys_errno ENOSPC (and EDQUOT, EFBIG) becomes Q2_E_NOSPC.
cdef q2_status fail_errno(int32_t sys_errno, int32_t site, uint64_t offset,
                          const char *what) noexcept nogil

# Whether this thread's last failure, which ended in `status`, was for lack of room, also when a
# Python storage raised it: nothing is wrong with what is there, and the call may be repeated.
cdef bint lacked_room(q2_status status) noexcept nogil

# The details of this thread's last failure. A pool hands them from worker to caller by copying.
cdef q2_error last_error() noexcept nogil
cdef void set_last_error(q2_error detail) noexcept nogil

# Keeps the exception now being handled for the check_status that follows in this thread, and
# returns Q2_E_PYTHON. For the `_gil` half of a Python-backed storage.
cdef q2_status stash_exception_gil(int32_t site, uint64_t offset) noexcept

# Raises the exception of `status`; the only raiser. Returns 0 for Q2_OK. `name` is the file.
cdef int check_status(q2_status status, object name) except -1
