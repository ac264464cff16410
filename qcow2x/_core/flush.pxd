# Making what was written durable.
from qcow2x._core.batch cimport q2_beside
from qcow2x._core.state cimport ImageState
from qcow2x._core.status cimport q2_status
from qcow2x._core.sync cimport q2_load

cdef enum:
    # Bytes of freed clusters that may wait: much more than a flush costs to write anew.
    FREED_AT_MOST = 16 << 20

# No lock held, and not inside a request of the caller's own (its epoch would keep freed clusters
# waiting). Everything that was written and every mapping that was changed before the call is
# durable after it. Calls at the same time share one sync (group commit). Freed clusters that became
# unreachable for good are given back on the way.
cdef q2_status flush_image(ImageState img) noexcept nogil

# The same, and the data `beside` is written by it if it writes an L2 slice; else that is left to the caller.
cdef q2_status flush_with(ImageState img, q2_beside *beside) noexcept nogil

# For writethrough, directsync and FUA, after the data was written: flushes if any metadata changed
# that is not durable yet. That also covers a write in place whose mapping another thread has linked
# but not flushed.
cdef q2_status flush_if_metadata_changed(ImageState img) noexcept nogil

# For the end of a request that may have freed clusters, outside of it: flushes if many wait to be
# free, as only that makes them. Without it a writer that never flushes would let the file grow for
# ever. Nobody asked for this flush, so nobody hears of its failure: what it could not write stays
# dirty, or the image is broken and the next request says so.
cdef inline void flush_if_much_freed(ImageState img) noexcept nogil:
    if q2_load(&img.dropped.clusters) << img.geo.cluster_bits >= FREED_AT_MOST:
        flush_image(img)

# No lock held, no request under way and none to come: the last flush of an image being closed.
cdef q2_status flush_closing(ImageState img) noexcept nogil

# commit held. Everything is durable, refcounts too, and the dirty bit of lazy ones cleared. The next
# allocation sets it again.
cdef q2_status settle_refcounts(ImageState img) noexcept nogil
