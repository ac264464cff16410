# One L2 entry: decode and encode. Section "Cluster mapping", "Extended L2 Entries".
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from qcow2x._core.geometry cimport q2_geometry
from qcow2x._core.plan cimport (Q2_KIND_COMPRESSED, Q2_KIND_DATA, Q2_KIND_UNALLOCATED,
                                Q2_KIND_ZERO)
from qcow2x._core.wire cimport (Q2_BITMAP_ALL_ALLOC, Q2_L2E_OFFSET_MASK, Q2_OFLAG_COMPRESSED,
                                Q2_OFLAG_COPIED, Q2_OFLAG_ZERO, q2_load_be64, q2_store_be64)

cdef struct q2_l2e:
    uint64_t entry
    uint64_t bitmap      # extended L2 entries only, else 0


cdef inline q2_l2e load_l2e(const q2_geometry *g, const uint8_t *at) noexcept nogil:
    cdef q2_l2e e
    e.entry = q2_load_be64(at)
    e.bitmap = q2_load_be64(at + 8) if g.subclusters > 1 else 0
    return e


cdef inline void store_l2e(const q2_geometry *g, uint8_t *at, q2_l2e e) noexcept nogil:
    q2_store_be64(at, e.entry)
    if g.subclusters > 1:
        q2_store_be64(at + 8, e.bitmap)


cdef inline bint is_compressed(q2_l2e e) noexcept nogil:
    return (e.entry & Q2_OFLAG_COMPRESSED) != 0


# Host offset of the cluster a standard entry keeps. Not for compressed entries.
cdef inline uint64_t host_cluster(q2_l2e e) noexcept nogil:
    return e.entry & Q2_L2E_OFFSET_MASK


# Whether a standard entry keeps a cluster. Offset 0 is the header's place and means none, but in an
# external data file it is the disk's first cluster, told from none by the COPIED flag.
cdef inline bint has_cluster(const q2_geometry *g, q2_l2e e) noexcept nogil:
    return (e.entry & Q2_L2E_OFFSET_MASK) != 0 or (
        g.external_data and (e.entry & Q2_OFLAG_COPIED) != 0)


cdef inline uint64_t compressed_offset(const q2_geometry *g, q2_l2e e) noexcept nogil:
    return e.entry & ((<uint64_t>1 << g.comp_shift) - 1)


# From compressed_offset to the end of the last sector that the stream may touch.
cdef inline uint32_t compressed_bytes(const q2_geometry *g, q2_l2e e) noexcept nogil:
    cdef uint64_t sectors = ((e.entry >> g.comp_shift) & g.comp_sectors_mask) + 1
    return <uint32_t>(sectors * 512 - (compressed_offset(g, e) & 511))


cdef inline q2_l2e compressed_l2e(const q2_geometry *g, uint64_t host_off,
                                  uint64_t nbytes) noexcept nogil:
    cdef q2_l2e e
    cdef uint64_t more_sectors = ((host_off + nbytes - 1) >> 9) - (host_off >> 9)
    e.entry = Q2_OFLAG_COMPRESSED | (more_sectors << g.comp_shift) | host_off
    e.bitmap = 0
    return e


# What subcluster `sc` of a standard entry holds: a Q2_KIND.
cdef inline uint8_t subcluster_kind(const q2_geometry *g, q2_l2e e, uint32_t sc) noexcept nogil:
    if e.entry & Q2_OFLAG_COMPRESSED:
        return Q2_KIND_COMPRESSED
    if g.subclusters == 1:
        # Version 2 knows no zero flag; there the bit is reserved and ignored, as QEMU does.
        if e.entry & Q2_OFLAG_ZERO and g.version >= 3:
            return Q2_KIND_ZERO
        return Q2_KIND_DATA if has_cluster(g, e) else Q2_KIND_UNALLOCATED
    if (e.bitmap >> (32 + sc)) & 1:
        return Q2_KIND_ZERO
    if (e.bitmap >> sc) & 1:
        return Q2_KIND_DATA
    return Q2_KIND_UNALLOCATED


# How many subclusters from `sc` on are of the same kind.
cdef inline uint32_t subcluster_run(const q2_geometry *g, q2_l2e e, uint32_t sc) noexcept nogil:
    cdef uint8_t kind
    cdef uint32_t n = 1
    if g.subclusters == 1 or e.entry & Q2_OFLAG_COMPRESSED:
        return g.subclusters - sc
    kind = subcluster_kind(g, e, sc)
    while sc + n < g.subclusters and subcluster_kind(g, e, sc + n) == kind:
        n += 1
    return n


# Bits first .. first + n of a subcluster mask.
cdef inline uint64_t subcluster_bits(uint32_t first, uint32_t n) noexcept nogil:
    return (((<uint64_t>1 << n) - 1) << first) & Q2_BITMAP_ALL_ALLOC
