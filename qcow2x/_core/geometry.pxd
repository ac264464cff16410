# Index arithmetic, inline only. Guest offset -> L1 index, L2 index, subcluster; host offset ->
# refcount table index, refcount block index. Section "Cluster mapping" and "Refcounts".
from libc.stdint cimport int32_t, uint32_t, uint64_t

cdef struct q2_geometry:
    uint32_t version
    uint32_t cluster_bits
    uint64_t cluster_size           # bytes
    uint32_t l2_entry_bits          # 3, or 4 with extended L2 entries
    uint32_t l2_bits                # log2 of entries per L2 table
    uint64_t l2_entries
    uint32_t slice_bits             # log2 of a cached slice in bytes: at most 12
    uint32_t subclusters            # per cluster: 32 with extended L2 entries, else 1
    uint32_t subcluster_bits
    uint32_t refcount_order         # refcounts are 1 << order bits wide
    uint32_t refblock_bits          # log2 of refcounts per block
    uint64_t refcount_max
    uint32_t comp_shift             # bits of a compressed descriptor that hold the host offset
    uint64_t comp_sectors_mask
    bint external_data              # guest data lies in a file of its own, at its guest offset


cdef inline void set_geometry(q2_geometry *g, uint32_t version, uint32_t cluster_bits,
                              uint32_t refcount_order, bint extended_l2) noexcept nogil:
    g.version = version
    g.cluster_bits = cluster_bits
    g.cluster_size = <uint64_t>1 << cluster_bits
    g.l2_entry_bits = 4 if extended_l2 else 3
    g.l2_bits = cluster_bits - g.l2_entry_bits
    g.l2_entries = <uint64_t>1 << g.l2_bits
    # 4 KiB slices: a 64 KiB table is 16 of them, so a random workload caches what it touches
    # (QEMU went from 2.7k to 57k IOPS with the same step, its commit af39bd0d).
    g.slice_bits = cluster_bits if cluster_bits < 12 else 12
    g.subclusters = 32 if extended_l2 else 1
    g.subcluster_bits = cluster_bits - 5 if extended_l2 else cluster_bits
    g.refcount_order = refcount_order
    # A block of cluster_size bytes holds cluster_size * 8 >> order refcounts.
    g.refblock_bits = cluster_bits + 3 - refcount_order
    g.refcount_max = ~<uint64_t>0 if refcount_order == 6 else (
        (<uint64_t>1 << (<uint64_t>1 << refcount_order)) - 1)
    g.comp_shift = 62 - (cluster_bits - 8)
    g.comp_sectors_mask = (<uint64_t>1 << (cluster_bits - 8)) - 1


cdef inline uint64_t l1_index(const q2_geometry *g, uint64_t guest_off) noexcept nogil:
    return guest_off >> (g.cluster_bits + g.l2_bits)


cdef inline uint64_t l2_index(const q2_geometry *g, uint64_t guest_off) noexcept nogil:
    return (guest_off >> g.cluster_bits) & (g.l2_entries - 1)


cdef inline uint32_t subcluster_index(const q2_geometry *g, uint64_t guest_off) noexcept nogil:
    return <uint32_t>((guest_off >> g.subcluster_bits) & (g.subclusters - 1))


cdef inline uint64_t offset_in_cluster(const q2_geometry *g, uint64_t off) noexcept nogil:
    return off & (g.cluster_size - 1)


cdef inline uint64_t round_down(uint64_t value, uint64_t power_of_two) noexcept nogil:
    return value & ~(power_of_two - 1)


cdef inline uint64_t round_up(uint64_t value, uint64_t power_of_two) noexcept nogil:
    return (value + power_of_two - 1) & ~(power_of_two - 1)


# L1 entries that a disk of `size` bytes needs.
cdef inline uint64_t l1_entries_for(const q2_geometry *g, uint64_t size) noexcept nogil:
    cdef uint32_t shift = g.cluster_bits + g.l2_bits
    return (size >> shift) + (1 if size & ((<uint64_t>1 << shift) - 1) else 0)
