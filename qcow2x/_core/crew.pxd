# How many threads of the process are busy with bytes: they decode, or copy out of the page cache. Any thread, no lock.
from libc.stdint cimport uint64_t

# `n` more are; answers how many that makes.
cdef uint64_t crew_join(uint64_t n) noexcept nogil
cdef void crew_leave(uint64_t n) noexcept nogil
cdef uint64_t crew_size() noexcept nogil
# CPUs that are left where so many threads are busy.
cdef uint64_t crew_spare(uint64_t size) noexcept nogil
