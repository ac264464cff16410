# Compressed clusters: raw deflate (window 12 bits) and zstd, section "Compressed Clusters
# Descriptor". Contexts are pooled: no allocation per cluster once warm. Any thread, no GIL.
from libc.stddef cimport size_t
from libc.stdint cimport int32_t, uint8_t, uint32_t

from qcow2x._core.status cimport q2_status

cdef enum:
    # Deflate levels: 1..3 are ISA-L's (level 1 = its fastest), 4..9 libdeflate's. 0 means the default.
    CODEC_LEVEL_DEFAULT = 0

# Decodes one cluster into out, which must end exactly full: src_bytes is known only to a sector,
# so bytes left over in src are no error, a short output is. Q2_E_CODEC otherwise.
cdef q2_status decode_cluster(uint32_t compression_type, const uint8_t *src, size_t src_bytes,
                              uint8_t *out, size_t out_bytes) noexcept nogil

# Encodes one cluster. Q2_INCOMPRESSIBLE if the result would not fit in out_cap (callers give
# cluster_size - 1). Deterministic: the same bytes and level give the same output always.
cdef q2_status encode_cluster(uint32_t compression_type, int32_t level, const uint8_t *src,
                              size_t src_bytes, uint8_t *out, size_t out_cap,
                              size_t *out_bytes) noexcept nogil

# The levels each type takes, for checking a user's level= at the door.
cdef int32_t min_level(uint32_t compression_type) noexcept nogil
cdef int32_t max_level(uint32_t compression_type) noexcept nogil
