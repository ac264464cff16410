# Growth ahead of the writer: new clusters without a refcount to write, and without a mapping to write.
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
#
# Past the page cache, where nothing has to be durable before a flush, the host's file system still takes
# writes to new blocks one at a time. There the same is done while several writes are under way, with blocks
# that the file system sets aside (fallocate), which take them side by side: 64 KiB on and on with 32 under
# way took 62 us each instead of 147, and 170 in a raw file. One write at a time is better off without, as
# the first write to such a block is followed by one of the file system's (4 KiB: 112 us instead of 71);
# so are streams of small writes, which get zeros instead.
from libc.stdint cimport int32_t, uint8_t, uint64_t

from qcow2x._core.state cimport ImageState, q2_growth
from qcow2x._core.status cimport q2_status

cdef enum:
    # Bytes of a first reserve and of a first window linked ahead; both double while growth goes on.
    # From 1 MiB on the two extra syncs of a filling are spread over 16 writes of 64 KiB.
    LEAST_BYTES = 1 << 20
    MOST_BYTES = 8 << 20

cdef enum:
    GROWTH_PLAIN = 0
    GROWTH_TOGETHER = 1     # while several writes are under way
    GROWTH_AHEAD = 2        # for everybody; a reserve is durable before its use

cdef enum:
    # What the host has where a reserve lies. It reads as zeros.
    RESERVE_HOLE = 0        # nothing: only the file's end is written
    RESERVE_SET_ASIDE = 1   # blocks that were never written to; where the host cannot, nothing
    RESERVE_WRITTEN = 2     # zeros, so that a write changes nothing for its file system

cdef enum:
    # Bytes of a write up to which all it writes may be written twice, to save it the commit of the file
    # system's journal.
    WRITTEN_AT_MOST = 512 << 10
    # Bytes of a reserve for larger ones, which is a hole and costs the host nothing: the two syncs of
    # making one are spread over 32 writes of 1 MiB.
    HOLE_BYTES = 32 << 20
    # Writes under way from which on they are many. Of these, durable ones in the page cache share each
    # commit of the file system's journal, and then the bytes are what counts (64 KiB sequential, 32 under
    # way: 1.1 times a raw file's time in holes, 1.9 with zeros; past the cache 1.1 and 0.4).
    MANY_WRITERS = 5
    # The same for GROWTH_TOGETHER: two writes of 64 KiB at a time took 110 us each instead of 159.
    SEVERAL_WRITERS = 2

cdef inline uint64_t clusters_in(ImageState img, uint64_t nbytes) noexcept nogil:
    return nbytes >> img.geo.cluster_bits or 1

# Before the image is used: `how` for an image whose data clusters are its own and plain.
cdef void init_growth(ImageState img, int32_t how) noexcept nogil

# meta, exclusive: host clusters for the n empty (or shared) guest clusters from first_cl on, whose L2
# entries begin at `at`, with `room` entries to the end of the slice; nothing of the backing file shows
# through before cluster clear_cl; the write is of
# nbytes, and `many`: one of many under way, `one_flush`: one of many that are durable by the same flush. *got
# of them begin at *first, and the *ahead following ones are for the guest clusters behind. All read as zeros
# until they are written to. Q2_MISS with MISSING_RESERVE: call
# fill_reserve (growth.pxd) and plan again; with a slice: load it. Q2_BUSY: somebody fills it.
cdef q2_status take_reserved(ImageState img, uint64_t first_cl, uint64_t n, uint64_t room,
                             const uint8_t *at, uint64_t clear_cl, bint many, bint one_flush,
                             uint64_t nbytes,
                             uint64_t *first, uint64_t *got, uint64_t *ahead,
                             uint64_t *miss) noexcept nogil

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
