# The C side of wire.h and format.h for Cython. No .pyx: nothing to compile.
from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

cdef extern from "qcow2x/wire.h" nogil:
    uint16_t q2_load_be16(const void *p)
    uint32_t q2_load_be32(const void *p)
    uint64_t q2_load_be64(const void *p)
    void q2_store_be16(void *p, uint16_t v)
    void q2_store_be32(void *p, uint32_t v)
    void q2_store_be64(void *p, uint64_t v)

    ctypedef struct q2_cursor:
        const uint8_t *at
        size_t remaining
        int ok
    q2_cursor q2_cursor_over(const void *buf, size_t nbytes)
    const uint8_t *q2_take(q2_cursor *c, size_t nbytes)
    uint8_t q2_take_u8(q2_cursor *c)
    uint16_t q2_take_be16(q2_cursor *c)
    uint32_t q2_take_be32(q2_cursor *c)
    uint64_t q2_take_be64(q2_cursor *c)

cdef extern from "qcow2x/format.h" nogil:
    uint32_t Q2_MAGIC
    uint32_t Q2_HDR_L1_SIZE
    uint32_t Q2_HDR_SIZE
    uint32_t Q2_HDR_L1_OFFSET
    uint32_t Q2_HDR_RT_OFFSET
    uint32_t Q2_HDR_RT_CLUSTERS
    uint32_t Q2_HDR_NB_SNAPSHOTS
    uint32_t Q2_HDR_SNAPSHOTS_OFFSET
    uint32_t Q2_HDR_REFCOUNT_ORDER
    uint32_t Q2_HDR_INCOMPAT
    uint32_t Q2_HDR_AUTOCLEAR
    uint64_t Q2_INCOMPAT_DIRTY
    uint64_t Q2_INCOMPAT_CORRUPT
    uint64_t Q2_INCOMPAT_DATA_FILE
    uint64_t Q2_INCOMPAT_COMPRESSION
    uint64_t Q2_INCOMPAT_EXTL2
    uint64_t Q2_INCOMPAT_KNOWN
    uint64_t Q2_COMPAT_LAZY_REFCOUNTS
    uint64_t Q2_AUTOCLEAR_BITMAPS
    uint64_t Q2_AUTOCLEAR_RAW_DATA
    uint64_t Q2_OFLAG_COPIED
    uint64_t Q2_OFLAG_COMPRESSED
    uint64_t Q2_OFLAG_ZERO
    uint64_t Q2_L1E_OFFSET_MASK
    uint64_t Q2_L2E_OFFSET_MASK
    uint64_t Q2_RTE_OFFSET_MASK
    uint64_t Q2_BITMAP_ALL_ALLOC
    uint64_t Q2_BITMAP_ALL_ZERO
    uint64_t Q2_MAX_L1_BYTES
    uint64_t Q2_MAX_RT_BYTES
    uint64_t Q2_MAX_HOST_OFFSET
    uint32_t Q2_SECTOR
