# Durable growth: new clusters without a refcount to write, and without a mapping to write.
#
# Where a write returns only when it is durable, the price of a new cluster is what has to be durable
# besides the data. Two measures take it away:
#   reserve      a run of host clusters is counted and made durable in one go, ahead of its use. A cut
#                of power leaks it.
#   link ahead   a writer that moves on through the disk gets the guest clusters in front of it mapped
#                to the reserve by the L2 write that it waits for anyway. They read as zeros until they
#                are written to, and then nothing but data is written: over blocks that the host wrote
#                before, which needs no commit of its file system's journal either.
# What was linked ahead and never written to is unlinked at the end, the reserve given back, the file
# cut where its last cluster ends.
from libc.stdint cimport uint8_t, uint64_t

from qcow2x._core.state cimport ImageState, q2_growth
from qcow2x._core.status cimport q2_status

cdef enum:
    # Bytes of a first reserve and of a first window linked ahead; both double while growth goes on.
    # From 1 MiB on the two extra syncs of a filling are spread over 16 writes of 64 KiB.
    LEAST_BYTES = 1 << 20
    MOST_BYTES = 8 << 20

cdef inline uint64_t clusters_in(ImageState img, uint64_t nbytes) noexcept nogil:
    return nbytes >> img.geo.cluster_bits or 1

# Before the image is used: on for an image whose data clusters are its own and plain.
cdef void init_growth(ImageState img, bint wanted) noexcept nogil

# meta, exclusive: host clusters for the n empty (or shared) guest clusters from first_cl on, whose L2
# entries begin at `at`, with `room` entries to the end of the slice; nothing of the backing file shows
# through before cluster clear_cl. *got of them begin at *first, and the *ahead following ones are for the
# guest clusters behind. All read as zeros until they are written to. Q2_MISS with MISSING_RESERVE: call
# fill_reserve (growth.pxd) and plan again; with a slice: load it. Q2_BUSY: somebody fills it.
cdef q2_status take_reserved(ImageState img, uint64_t first_cl, uint64_t n, uint64_t room,
                             const uint8_t *at, uint64_t clear_cl, uint64_t *first, uint64_t *got,
                             uint64_t *ahead, uint64_t *miss) noexcept nogil

# meta, exclusive: what take_reserved gave with `ahead` clusters was linked, or the write was aborted.
cdef void note_ahead(ImageState img, uint64_t first_cl, uint64_t n, uint64_t first_host,
                     bint linked) noexcept nogil

# meta, any side: the mapping of these clusters is no longer for us to take back.
cdef void mark_used(ImageState img, uint64_t first_cl, uint64_t end_cl) noexcept nogil
cdef inline void note_used(ImageState img, uint64_t first_cl, uint64_t end_cl) noexcept nogil:
    if img.growth.n_ahead:
        mark_used(img, first_cl, end_cl)

# commit held, no write under way: everything unused is unlinked and given back; a write-back and
# retire_freed have to follow.
cdef q2_status settle_growth(ImageState img) noexcept nogil

# commit held, at the very end: the file ends where the last cluster in use does.
cdef void cut_tail(ImageState img) noexcept nogil
