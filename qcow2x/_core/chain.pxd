# Which layers below an image hold nothing where, so that a read need not ask them. Never wrong, as only
# layers whose mapping cannot change are passed over. Any thread, no lock.
from libc.stdint cimport uint32_t, uint64_t

from qcow2x._core.status cimport q2_status
from qcow2x._core.sync cimport q2_load

cdef enum:
    CHAIN_BLOCK_BITS = 16       # what one entry speaks for

cdef struct q2_chain:
    void **layer                # Storages, borrowed: the image keeps its backing chain alive. All but
                                # the last are images that may be passed over
    uint32_t n
    bint last_is_image
    uint64_t *slot              # (block + 1) << 16 | layers that hold nothing; NULL: nobody to pass
    uint64_t mask

# Takes `layer` over, also when it fails.
cdef q2_status chain_init(q2_chain *c, void **layer, uint32_t n, uint64_t disk_size) noexcept nogil
cdef void chain_free(q2_chain *c) noexcept nogil

# Whether it is known how many layers hold nothing of this block; if so, passed is their number.
cdef inline bint chain_known(const q2_chain *c, uint64_t block, uint32_t *passed) noexcept nogil:
    cdef uint64_t entry = q2_load(&c.slot[block & c.mask])
    passed[0] = <uint32_t>(entry & 0xffff)
    return entry >> 16 == block + 1

cdef void chain_learn(q2_chain *c, uint64_t block, uint32_t passed) noexcept nogil
