# Buffers for the length of one request, kept for the next one. Any thread, no GIL.
from libc.stddef cimport size_t

# At least nbytes, aligned to 4096 (fit for O_DIRECT); NULL without memory. Contents undefined.
cdef void *scratch_take(size_t nbytes) noexcept nogil
# The same nbytes it was taken with. NULL is ignored.
cdef void scratch_give(void *buf, size_t nbytes) noexcept nogil

# ZEROS_BYTES of zeros for writing from; never written to, costs one page however long it is.
cdef enum:
    ZEROS_BYTES = 2 * 1024 * 1024
cdef const void *zeros() noexcept nogil
