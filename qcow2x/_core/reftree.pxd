# Refcounts of everything below an L1 table at once, block by block: what snapshots are made of.
#
# These work on the file itself, not through the caches: the caller holds commit, has frozen the
# image, written everything back, and forgets both caches afterwards. Memory is bounded: refcount
# blocks are held WINDOW_BYTES at a time, and the L2 tables walked once for each window.
from libc.stdint cimport int32_t, uint64_t

from qcow2x._core.state cimport ImageState, q2_runs
from qcow2x._core.status cimport q2_status

# Adds `delta` (1 or -1) to the refcount of every L2 table that the n entries of l1 (host byte order)
# point to, and of every cluster below them. Nothing is written if any refcount would leave its range
# (Q2_E_UNSUPPORTED above it, Q2_E_CORRUPT below 0). Clusters that reach 0 are added to `freed`. The
# blocks are written, not synced.
cdef q2_status shift_refcounts(ImageState img, const uint64_t *l1, uint64_t n, int32_t delta,
                               q2_runs *freed) noexcept nogil

# The same for single runs of clusters, a table of the snapshots for example.
cdef q2_status shift_runs(ImageState img, const q2_runs *runs, int32_t delta,
                          q2_runs *freed) noexcept nogil

# Sets COPIED where the refcount is 1 and clears it where it is not: in the entries of l1 (in memory
# only) and in the L2 tables below them (written where they changed, not synced).
cdef q2_status refresh_copied(ImageState img, uint64_t *l1, uint64_t n) noexcept nogil
