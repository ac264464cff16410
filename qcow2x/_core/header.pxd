# The header cluster: fixed fields, extensions, backing file name. Decoding is bounded and
# validates every field against the specification, format.h's limits and the file's size, so that
# what comes after may trust it.
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from qcow2x._core.geometry cimport q2_geometry
from qcow2x._core.status cimport q2_status

cdef struct q2_header:
    uint32_t version
    uint64_t backing_offset
    uint32_t backing_size
    uint32_t cluster_bits
    uint64_t size                 # guest disk, bytes
    uint32_t crypt_method
    uint32_t l1_size              # entries
    uint64_t l1_offset
    uint64_t rt_offset
    uint32_t rt_clusters
    uint32_t nb_snapshots
    uint64_t snapshots_offset
    uint64_t incompat
    uint64_t compat
    uint64_t autoclear
    uint32_t refcount_order
    uint32_t header_length
    uint32_t compression_type


# Fixed fields only, from the first nbytes of the file: magic, version, ranges that need no file
# size. Q2_E_FORMAT with the sentence for the user otherwise.
cdef q2_status decode_fields(const uint8_t *buf, uint64_t nbytes, q2_header *out) noexcept nogil

# Tables inside the file and within limits, aligned, large enough for the disk; no two of header,
# L1, refcount table overlapping. Q2_E_FORMAT, Q2_E_LIMIT or Q2_E_CORRUPT.
cdef q2_status validate(const q2_header *h, const q2_geometry *g,
                        uint64_t file_size) noexcept nogil


cdef class Header:
    # A decoded header together with all that is preserved when it is rewritten: unknown
    # extensions in their order, unknown header fields beyond those we know, feature names.
    cdef q2_header fields
    cdef public object backing_file       # str or None (surrogateescape)
    cdef public object backing_format     # str or None
    cdef public object data_file          # str or None
    cdef public list extensions           # [(type, bytes)] in file order, END left out
    cdef public bytes unknown_fields      # header bytes past those we know
    cdef public list unknown_incompat     # names (or "bit N") of incompatible features unknown
    # bytes of the whole header cluster (padded with zeros to cluster_size)
    cdef bytes encode_gil(self)
