# cython: language_level=3
"""Who is at work: one count for all images of the process, so that nobody starts threads for which there are no CPUs."""
import os

from qcow2x._core.sync cimport q2_add, q2_load, q2_store, q2_sub

cdef uint64_t cpus = len(os.sched_getaffinity(0))
cdef uint64_t busy = 0      # atomic


cdef uint64_t crew_join(uint64_t n) noexcept nogil:
    return q2_add(&busy, n)


cdef void crew_leave(uint64_t n) noexcept nogil:
    q2_sub(&busy, n)


cdef uint64_t crew_size() noexcept nogil:
    return q2_load(&busy)


cdef uint64_t crew_spare(uint64_t size) noexcept nogil:
    return cpus - size if size < cpus else 0


def share_out_alone() -> None:
    """From now on requests are served by the threads that make them alone: who has one for each CPU, or means
    to use no more, calls this, and :func:`share_out_again` when done. Any thread."""
    crew_join(cpus)


def share_out_again() -> None:
    crew_leave(cpus)


def _in_child() -> None:
    q2_store(&busy, 0)


os.register_at_fork(after_in_child=_in_child)
