# The C side of status.h for Cython: codes, sites, the error detail. No .pyx: nothing to compile.
from libc.stdint cimport int32_t, uint64_t

cdef extern from "qcow2x/status.h" nogil:
    ctypedef int32_t q2_status

    enum:
        Q2_OK
        Q2_E_IO
        Q2_E_NOSPC
        Q2_E_NOMEM
        Q2_E_CORRUPT
        Q2_E_FORMAT
        Q2_E_UNSUPPORTED
        Q2_E_RANGE
        Q2_E_READONLY
        Q2_E_BROKEN
        Q2_E_CLOSED
        Q2_E_CODEC
        Q2_E_LIMIT
        Q2_E_PYTHON
        Q2_E_ORDER
        Q2_MISS
        Q2_BUSY
        Q2_FULL
        Q2_INCOMPRESSIBLE

    enum:
        Q2_SITE_NONE
        Q2_SITE_HEADER_READ
        Q2_SITE_HEADER_UPDATE
        Q2_SITE_L1_READ
        Q2_SITE_L1_UPDATE
        Q2_SITE_L1_GROW_WRITE
        Q2_SITE_L1_GROW_ACTIVATE
        Q2_SITE_L2_LOAD
        Q2_SITE_L2_UPDATE
        Q2_SITE_L2_ALLOC_COW_READ
        Q2_SITE_L2_ALLOC_WRITE
        Q2_SITE_REFTABLE_READ
        Q2_SITE_REFTABLE_UPDATE
        Q2_SITE_REFTABLE_GROW_WRITE
        Q2_SITE_REFTABLE_GROW_ACTIVATE
        Q2_SITE_REFBLOCK_LOAD
        Q2_SITE_REFBLOCK_UPDATE
        Q2_SITE_REFBLOCK_ALLOC_WRITE
        Q2_SITE_DATA_READ
        Q2_SITE_DATA_WRITE
        Q2_SITE_COMPRESSED_READ
        Q2_SITE_COMPRESSED_WRITE
        Q2_SITE_COW_READ
        Q2_SITE_COW_WRITE
        Q2_SITE_ZERO_WRITE
        Q2_SITE_BARRIER
        Q2_SITE_FLUSH
        Q2_SITE_TRUNCATE
        Q2_SITE_PUNCH
        Q2_SITE_PREALLOCATE
        Q2_SITE_CHECK_READ
        Q2_SITE_REPAIR_WRITE
        Q2_SITE_CREATE_WRITE
        Q2_SITE_SNAPSHOT_READ
        Q2_SITE_SNAPSHOT_WRITE
        Q2_SITE_BITMAP_READ
        Q2_SITE_BITMAP_WRITE
        Q2_SITE_CRYPTO_READ
        Q2_SITE_CRYPTO_WRITE
        Q2_SITE_CLUSTER_ALLOC
        Q2_SITE_CLUSTER_ALLOC_BYTES
        Q2_SITE_CLUSTER_FREE
        Q2_SITE_REFCOUNT_RAISE
        Q2_SITE_REFBLOCK_ALLOC
        Q2_SITE_L1_GROW_ALLOC
        Q2_SITE_BACKING_READ
        Q2_SITE_EMPTY_IMAGE
        Q2_SITE_COUNT

    ctypedef struct q2_error:
        q2_status status
        int32_t sys_errno
        int32_t site
        uint64_t offset
        uint64_t index
        const char *what
