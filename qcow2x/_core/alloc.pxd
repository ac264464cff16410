# Host clusters: finding free ones, raising and lowering refcounts. Section "Refcounts".
#
# Everything here wants meta held exclusively and works on cached refcount block slices only. A
# slice that is not cached is answered by Q2_MISS, with what to load in *miss; nothing has been
# changed then, so the caller lets go of the lock, loads it (metadata.load_slice) and plans again.
# Only growing the refcount structures themselves does I/O here: once per 2 GiB of file at 64 KiB
# clusters.
from libc.stdint cimport int64_t, uint64_t

from qcow2x._core.state cimport ImageState, q2_runs
from qcow2x._core.status cimport q2_status

# alloc_clusters never hands out more in one go: it stays inside one slice.
cdef inline uint64_t clusters_per_slice(ImageState img) noexcept nogil:
    return <uint64_t>1 << (img.geo.slice_bits + 3 - img.geo.refcount_order)

# The first free run at or after the hint, at most `want` clusters of it, refcounts raised to 1.
# *first is a cluster index, *got >= 1 how many. *fresh: they lie past the file's end, so that they
# read as zeros until written.
cdef q2_status alloc_clusters(ImageState img, uint64_t want, uint64_t *first, uint64_t *got,
                              bint *fresh, uint64_t *miss) noexcept nogil

# The same for exactly n clusters in a row (tables). n must fit one slice of refcounts or start
# anywhere a run of n is free; Q2_E_NOSPC if no place is left below the largest host offset.
cdef q2_status alloc_contiguous(ImageState img, uint64_t n, uint64_t *first, bint *fresh,
                                uint64_t *miss) noexcept nogil

# Room for a compressed cluster of nbytes < cluster_size, behind the one before it where the format
# allows (section "Compressed Clusters Descriptor"). The refcount of every cluster touched is raised.
cdef q2_status alloc_packed(ImageState img, uint64_t nbytes, uint64_t *host_off,
                            uint64_t *miss) noexcept nogil

cdef q2_status get_refcount_of(ImageState img, uint64_t cluster, uint64_t *value,
                               uint64_t *miss) noexcept nogil
cdef q2_status set_refcount_of(ImageState img, uint64_t cluster, uint64_t value,
                               uint64_t *miss) noexcept nogil

# The sector that holds the refcount of `cluster`, which was just handed out, written now whatever waits
# for a flush. For tables where refcounts are lazy: who writes without heeding the dirty bit shall not
# take a table for free room.
cdef q2_status write_refcount(ImageState img, uint64_t cluster) noexcept nogil

# Gives clusters back that no mapping ever named: refcount 1 -> 0, at once free. Progress is kept
# in *done over a Q2_MISS.
cdef q2_status release_unlinked(ImageState img, uint64_t first, uint64_t n, uint64_t *done,
                                uint64_t *miss) noexcept nogil
