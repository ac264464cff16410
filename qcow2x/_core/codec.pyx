# cython: language_level=3
"""Compressed clusters: one cluster in, one cluster out.

Decoding is libdeflate's (about twice as fast as zlib), encoding is ISA-L's at the fast levels and
libdeflate's with a small window at the thorough ones; zstd does both of its own. Every context that costs an allocation is
pooled, so any number of threads may call in and none allocates once warm.
"""
from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdint cimport uint16_t
from libc.stdlib cimport calloc, free, malloc

from qcow2x._core.errors cimport check_status, fail
from qcow2x._core.status cimport *

cdef extern from "qcow2x/format.h" nogil:
    enum:
        Q2_COMPRESSION_DEFLATE
        Q2_COMPRESSION_ZSTD

cdef extern from "qcow2x/pool.h" nogil:
    ctypedef struct q2_pool:
        pass
    enum:
        Q2_POOL_MAX
    int q2_pool_init_shared(q2_pool *pool, int max)
    void *q2_pool_take(q2_pool *pool)
    int q2_pool_give(q2_pool *pool, void *item)

cdef extern from "inflate.h" nogil:
    struct libdeflate_decompressor:
        pass
    libdeflate_decompressor *q2_inflate_alloc()
    int q2_inflate(libdeflate_decompressor *d, const void *src, size_t src_bytes, void *out,
                   size_t out_bytes, size_t *used, size_t *written)
    void q2_inflate_free(libdeflate_decompressor *d)

cdef extern from "deflate12.h" nogil:
    struct libdeflate_compressor:
        pass
    libdeflate_compressor *q2_deflate12_alloc(int level)
    size_t q2_deflate12_compress(libdeflate_compressor *c, const void *src, size_t src_bytes,
                                 void *out, size_t out_cap)
    void q2_deflate12_free(libdeflate_compressor *c)

cdef extern from "zlib.h" nogil:
    ctypedef struct z_stream:
        uint8_t *next_in
        unsigned int avail_in
        uint8_t *next_out
        unsigned int avail_out
    enum:
        Z_OK
        Z_FINISH
    int inflateInit2(z_stream *strm, int window_bits)
    int inflateReset(z_stream *strm)
    int inflate(z_stream *strm, int flush)
    int inflateEnd(z_stream *strm)

cdef extern from "isa-l/igzip_lib.h" nogil:
    struct isal_zstream:
        uint8_t *next_in
        uint32_t avail_in
        uint8_t *next_out
        uint32_t avail_out
        uint32_t level
        uint32_t level_buf_size
        uint8_t *level_buf
        uint16_t end_of_stream
        uint16_t flush
        uint16_t gzip_flag
        uint16_t hist_bits
    enum:
        COMP_OK
        STATELESS_OVERFLOW
        NO_FLUSH
        IGZIP_DEFLATE
        ISAL_DEF_LVL1_LARGE
        ISAL_DEF_LVL2_LARGE
        ISAL_DEF_LVL3_LARGE
    void isal_deflate_stateless_init(isal_zstream *stream)
    int isal_deflate_stateless(isal_zstream *stream)

cdef extern from "zstd.h" nogil:
    ctypedef struct ZSTD_CCtx:
        pass
    ctypedef struct ZSTD_DCtx:
        pass
    ZSTD_CCtx *ZSTD_createCCtx()
    size_t ZSTD_freeCCtx(ZSTD_CCtx *ctx)
    size_t ZSTD_sizeof_CCtx(const ZSTD_CCtx *ctx)
    ZSTD_DCtx *ZSTD_createDCtx()
    size_t ZSTD_freeDCtx(ZSTD_DCtx *ctx)
    size_t ZSTD_compressCCtx(ZSTD_CCtx *ctx, void *out, size_t out_cap, const void *src,
                             size_t src_bytes, int level)
    size_t ZSTD_decompressDCtx(ZSTD_DCtx *ctx, void *out, size_t out_cap, const void *src,
                               size_t src_bytes)
    size_t ZSTD_findFrameCompressedSize(const void *src, size_t src_bytes)
    unsigned int ZSTD_isError(size_t code)
    int ZSTD_maxCLevel()

cdef extern from "zstd_errors.h" nogil:
    ctypedef enum ZSTD_ErrorCode:
        ZSTD_error_dstSize_tooSmall
        ZSTD_error_memory_allocation
    ZSTD_ErrorCode ZSTD_getErrorCode(size_t code)

cdef enum:
    # Readers of qcow2 inflate with a window of 4 KiB, so no distance may be longer when writing.
    # Reading allows the most that deflate has: the whole cluster is at hand anyway.
    WRITE_WINDOW_BITS = 12
    READ_WINDOW_BITS = 15
    ISAL_MAX_LEVEL = 3
    DEFLATE_MAX_LEVEL = 9
    # Within a 4 KiB window ISA-L's level 3 saves 2 % and costs a third of the speed. Measured on a
    # mix of programs, libraries and text, MB/s of one thread: 470, 420, 260 at levels 1 to 3, 115
    # to 50 at 4 to 9, 6 to 8 % smaller than level 1; zlib at its level 6: 33, 7 % smaller.
    DEFLATE_DEFAULT_LEVEL = 1
    ZSTD_DEFAULT_LEVEL = 3
    # A zstd encoder at its highest levels holds tens of MiB. Making one is nothing beside what it
    # then does to a cluster, so the large ones are not kept.
    ZSTD_KEEP_BYTES = 16 << 20


# The stream and the level buffer that it works in, made and kept as one.
ctypedef struct isal_encoder:
    isal_zstream stream
    uint8_t level_buf[1]

cdef q2_pool inflate_fast            # libdeflate_decompressor
cdef q2_pool inflate_tolerant        # z_stream for inflate
cdef q2_pool deflate_fast[ISAL_MAX_LEVEL + 1]       # isal_encoder, by level
cdef q2_pool deflate_thorough[DEFLATE_MAX_LEVEL + 1]    # libdeflate_compressor, by level
cdef q2_pool zstd_encoders           # ZSTD_CCtx
cdef q2_pool zstd_decoders           # ZSTD_DCtx

cdef uint32_t isal_level_bytes[ISAL_MAX_LEVEL + 1]
isal_level_bytes[:] = [0, ISAL_DEF_LVL1_LARGE, ISAL_DEF_LVL2_LARGE, ISAL_DEF_LVL3_LARGE]


cdef int begin_pool(q2_pool *pool, int most) except -1:
    if q2_pool_init_shared(pool, most) != 0:
        raise MemoryError("no memory for the codecs")
    return 0


begin_pool(&inflate_fast, Q2_POOL_MAX)
begin_pool(&inflate_tolerant, 8)
begin_pool(&zstd_encoders, Q2_POOL_MAX)
begin_pool(&zstd_decoders, Q2_POOL_MAX)
cdef int i
for i in range(ISAL_MAX_LEVEL + 1):
    begin_pool(&deflate_fast[i], Q2_POOL_MAX)
for i in range(DEFLATE_MAX_LEVEL + 1):
    begin_pool(&deflate_thorough[i], Q2_POOL_MAX)


# ---- Decoding ----------------------------------------------------------------------------------

cdef q2_status decode_cluster(uint32_t compression_type, const uint8_t *src, size_t src_bytes,
                              uint8_t *out, size_t out_bytes) noexcept nogil:
    if compression_type == Q2_COMPRESSION_DEFLATE:
        return decode_deflate(src, src_bytes, out, out_bytes)
    if compression_type == Q2_COMPRESSION_ZSTD:
        return decode_zstd(src, src_bytes, out, out_bytes)
    return fail(Q2_E_UNSUPPORTED, Q2_SITE_NONE, 0, b"unknown compression type")


cdef q2_status decode_deflate(const uint8_t *src, size_t src_bytes, uint8_t *out,
                              size_t out_bytes) noexcept nogil:
    cdef libdeflate_decompressor *d = <libdeflate_decompressor *>q2_pool_take(&inflate_fast)
    cdef size_t used = 0
    cdef size_t written = 0
    if d is NULL:
        d = q2_inflate_alloc()
        if d is NULL:
            return fail(Q2_E_NOMEM, Q2_SITE_NONE, 0, b"no memory for a deflate decoder")
    cdef int wrong = q2_inflate(d, src, src_bytes, out, out_bytes, &used, &written)
    if not q2_pool_give(&inflate_fast, d):
        q2_inflate_free(d)
    if not wrong:
        if written == out_bytes:
            return Q2_OK
        return fail(Q2_E_CODEC, Q2_SITE_NONE, 0, b"compressed cluster ends early")
    # libdeflate takes whole streams only. A cluster is good as soon as its last byte is out, also
    # where a writer left the end-of-stream mark out or went on beyond it.
    return decode_deflate_prefix(src, src_bytes, out, out_bytes)


cdef q2_status decode_deflate_prefix(const uint8_t *src, size_t src_bytes, uint8_t *out,
                                     size_t out_bytes) noexcept nogil:
    cdef z_stream *strm = <z_stream *>q2_pool_take(&inflate_tolerant)
    if strm is NULL:
        strm = <z_stream *>calloc(1, sizeof(z_stream))
        if strm is NULL or inflateInit2(strm, -READ_WINDOW_BITS) != Z_OK:
            free(strm)
            return fail(Q2_E_NOMEM, Q2_SITE_NONE, 0, b"no memory for a deflate decoder")
    else:
        inflateReset(strm)
    strm.next_in = <uint8_t *>src
    strm.avail_in = <unsigned int>src_bytes
    strm.next_out = out
    strm.avail_out = <unsigned int>out_bytes
    inflate(strm, Z_FINISH)
    cdef bint full = strm.avail_out == 0
    if not q2_pool_give(&inflate_tolerant, strm):
        inflateEnd(strm)
        free(strm)
    if full:
        return Q2_OK
    return fail(Q2_E_CODEC, Q2_SITE_NONE, 0, b"compressed cluster is not a valid deflate stream")


cdef q2_status decode_zstd(const uint8_t *src, size_t src_bytes, uint8_t *out,
                           size_t out_bytes) noexcept nogil:
    # Frame by frame straight into `out`, never through a stream: the output is the window then,
    # so a frame that claims a window of 128 MiB costs no memory.
    cdef ZSTD_DCtx *ctx = <ZSTD_DCtx *>q2_pool_take(&zstd_decoders)
    cdef size_t used = 0
    cdef size_t written = 0
    cdef size_t n = 0
    if ctx is NULL:
        ctx = ZSTD_createDCtx()
        if ctx is NULL:
            return fail(Q2_E_NOMEM, Q2_SITE_NONE, 0, b"no memory for a zstd decoder")
    while written < out_bytes and used < src_bytes:
        n = ZSTD_findFrameCompressedSize(src + used, src_bytes - used)
        if ZSTD_isError(n):
            break
        used += n
        n = ZSTD_decompressDCtx(ctx, out + written, out_bytes - written, src + used - n, n)
        if ZSTD_isError(n):
            break
        written += n
    if not q2_pool_give(&zstd_decoders, ctx):
        ZSTD_freeDCtx(ctx)
    if ZSTD_isError(n):
        return fail(Q2_E_CODEC, Q2_SITE_NONE, 0, b"compressed cluster is not a valid zstd frame")
    if written < out_bytes:
        return fail(Q2_E_CODEC, Q2_SITE_NONE, 0, b"compressed cluster ends early")
    return Q2_OK


# ---- Encoding ----------------------------------------------------------------------------------

cdef q2_status encode_cluster(uint32_t compression_type, int32_t level, const uint8_t *src,
                              size_t src_bytes, uint8_t *out, size_t out_cap,
                              size_t *out_bytes) noexcept nogil:
    out_bytes[0] = 0
    if compression_type != Q2_COMPRESSION_DEFLATE and compression_type != Q2_COMPRESSION_ZSTD:
        return fail(Q2_E_UNSUPPORTED, Q2_SITE_NONE, 0, b"unknown compression type")
    if level == CODEC_LEVEL_DEFAULT:
        level = (DEFLATE_DEFAULT_LEVEL if compression_type == Q2_COMPRESSION_DEFLATE
                 else ZSTD_DEFAULT_LEVEL)
    if level < min_level(compression_type) or level > max_level(compression_type):
        return fail(Q2_E_RANGE, Q2_SITE_NONE, 0, b"compression level is out of range")
    if compression_type == Q2_COMPRESSION_ZSTD:
        return encode_zstd(level, src, src_bytes, out, out_cap, out_bytes)
    if level <= ISAL_MAX_LEVEL:
        return encode_deflate_fast(level, src, src_bytes, out, out_cap, out_bytes)
    return encode_deflate_thorough(level, src, src_bytes, out, out_cap, out_bytes)


cdef q2_status encode_deflate_fast(int32_t level, const uint8_t *src, size_t src_bytes,
                                   uint8_t *out, size_t out_cap, size_t *out_bytes) noexcept nogil:
    cdef isal_encoder *enc = <isal_encoder *>q2_pool_take(&deflate_fast[level])
    if enc is NULL:
        enc = <isal_encoder *>malloc(sizeof(isal_encoder) + isal_level_bytes[level])
        if enc is NULL:
            return fail(Q2_E_NOMEM, Q2_SITE_NONE, 0, b"no memory for a deflate encoder")
    # Sets every field that a fresh stream needs; what an earlier cluster left is not looked at.
    isal_deflate_stateless_init(&enc.stream)
    enc.stream.level = <uint32_t>level
    enc.stream.level_buf = enc.level_buf
    enc.stream.level_buf_size = isal_level_bytes[level]
    enc.stream.hist_bits = WRITE_WINDOW_BITS
    enc.stream.gzip_flag = IGZIP_DEFLATE
    enc.stream.flush = NO_FLUSH
    enc.stream.end_of_stream = 1
    enc.stream.next_in = <uint8_t *>src
    enc.stream.avail_in = <uint32_t>src_bytes
    enc.stream.next_out = out
    enc.stream.avail_out = <uint32_t>out_cap
    cdef int rc = isal_deflate_stateless(&enc.stream)
    out_bytes[0] = out_cap - enc.stream.avail_out
    if not q2_pool_give(&deflate_fast[level], enc):
        free(enc)
    if rc == COMP_OK:
        return Q2_OK
    if rc == STATELESS_OVERFLOW:
        return Q2_INCOMPRESSIBLE
    return fail(Q2_E_CODEC, Q2_SITE_NONE, 0, b"the deflate encoder failed")


cdef q2_status encode_deflate_thorough(int32_t level, const uint8_t *src, size_t src_bytes,
                                       uint8_t *out, size_t out_cap,
                                       size_t *out_bytes) noexcept nogil:
    cdef libdeflate_compressor *c = <libdeflate_compressor *>q2_pool_take(&deflate_thorough[level])
    if c is NULL:
        c = q2_deflate12_alloc(level)
        if c is NULL:
            return fail(Q2_E_NOMEM, Q2_SITE_NONE, 0, b"no memory for a deflate encoder")
    out_bytes[0] = q2_deflate12_compress(c, src, src_bytes, out, out_cap)
    if not q2_pool_give(&deflate_thorough[level], c):
        q2_deflate12_free(c)
    return Q2_OK if out_bytes[0] else Q2_INCOMPRESSIBLE


cdef q2_status encode_zstd(int32_t level, const uint8_t *src, size_t src_bytes, uint8_t *out,
                           size_t out_cap, size_t *out_bytes) noexcept nogil:
    cdef ZSTD_CCtx *ctx = <ZSTD_CCtx *>q2_pool_take(&zstd_encoders)
    if ctx is NULL:
        ctx = ZSTD_createCCtx()
        if ctx is NULL:
            return fail(Q2_E_NOMEM, Q2_SITE_NONE, 0, b"no memory for a zstd encoder")
    cdef size_t n = ZSTD_compressCCtx(ctx, out, out_cap, src, src_bytes, level)
    if ZSTD_sizeof_CCtx(ctx) > ZSTD_KEEP_BYTES or not q2_pool_give(&zstd_encoders, ctx):
        ZSTD_freeCCtx(ctx)
    if not ZSTD_isError(n):
        out_bytes[0] = n
        return Q2_OK
    if ZSTD_getErrorCode(n) == ZSTD_error_dstSize_tooSmall:
        return Q2_INCOMPRESSIBLE
    if ZSTD_getErrorCode(n) == ZSTD_error_memory_allocation:
        return fail(Q2_E_NOMEM, Q2_SITE_NONE, 0, b"no memory for a zstd encoder")
    return fail(Q2_E_CODEC, Q2_SITE_NONE, 0, b"the zstd encoder failed")


# ---- Levels ------------------------------------------------------------------------------------

cdef int32_t min_level(uint32_t compression_type) noexcept nogil:
    return 1


cdef int32_t max_level(uint32_t compression_type) noexcept nogil:
    return ZSTD_maxCLevel() if compression_type == Q2_COMPRESSION_ZSTD else DEFLATE_MAX_LEVEL


# ---- For Python --------------------------------------------------------------------------------

def levels(uint32_t compression_type):
    """The lowest and highest ``level`` that :func:`encode` takes for this compression type."""
    return min_level(compression_type), max_level(compression_type)


def decode(uint32_t compression_type, data, size_t out_bytes):
    """Decode one compressed cluster to exactly ``out_bytes`` bytes.

    ``compression_type`` is the header's (0 deflate, 1 zstd). Bytes of ``data`` beyond the stream
    are ignored, because a cluster descriptor gives its length in whole sectors only. Raises
    CorruptImage if the result would be short or ``data`` is no such stream. Any thread; the GIL is
    released. Specification: "Compressed Clusters Descriptor".
    """
    cdef Py_buffer view
    cdef q2_status rc
    out = PyBytes_FromStringAndSize(NULL, out_bytes)
    cdef uint8_t *dst = <uint8_t *>PyBytes_AS_STRING(out)
    PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
    try:
        with nogil:
            rc = decode_cluster(compression_type, <const uint8_t *>view.buf, view.len, dst,
                                out_bytes)
        check_status(rc, "codec")
    finally:
        PyBuffer_Release(&view)
    return out


def encode(uint32_t compression_type, data, int32_t level=CODEC_LEVEL_DEFAULT, out_cap=None):
    """Encode one cluster, or return None if that would take more than ``out_cap`` bytes.

    ``level`` 0 is the default of the type; :func:`levels` gives the others. ``out_cap`` is
    ``len(data) - 1`` unless given, since a cluster that does not shrink is stored as it is.
    Raises ValueError for a level out of range. Any thread; the GIL is released.
    """
    cdef Py_buffer view
    cdef q2_status rc
    cdef size_t cap
    cdef size_t n = 0
    cdef uint8_t *dst
    PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
    try:
        cap = max(view.len - 1, 0) if out_cap is None else out_cap
        out = PyBytes_FromStringAndSize(NULL, cap)
        dst = <uint8_t *>PyBytes_AS_STRING(out)
        with nogil:
            rc = encode_cluster(compression_type, level, <const uint8_t *>view.buf, view.len, dst,
                                cap, &n)
        if rc == Q2_INCOMPRESSIBLE:
            return None
        check_status(rc, "codec")
    finally:
        PyBuffer_Release(&view)
    return out[:n]
