# cython: language_level=3
"""The map of a backing chain: how many layers hold nothing of each block of the disk."""
from libc.stdlib cimport calloc, free

from qcow2x._core.errors cimport fail
from qcow2x._core.status cimport *
from qcow2x._core.sync cimport q2_store

cdef enum:
    MAX_SLOTS = 1 << 20
    MAX_LAYERS = 0xffff


cdef q2_status chain_init(q2_chain *c, void **layer, uint32_t n,
                          uint64_t disk_size) noexcept nogil:
    cdef uint64_t slots = 1
    c.layer = layer
    c.n = n if n < MAX_LAYERS else MAX_LAYERS
    c.slot = NULL
    if n < 2:
        return Q2_OK
    while slots < MAX_SLOTS and slots << CHAIN_BLOCK_BITS < disk_size:
        slots *= 2
    c.mask = slots - 1
    # calloc of large arrays touches no memory before use: only what is read through is paid for.
    c.slot = <uint64_t *>calloc(slots, 8)
    if c.slot is NULL:
        return fail(Q2_E_NOMEM, Q2_SITE_NONE, 0, b"no memory for the map of the backing chain")
    return Q2_OK


cdef void chain_free(q2_chain *c) noexcept nogil:
    free(c.layer)
    free(c.slot)
    c.layer = NULL
    c.slot = NULL


cdef void chain_learn(q2_chain *c, uint64_t block, uint32_t passed) noexcept nogil:
    # One word: whoever reads it meanwhile sees this entry or the one before.
    q2_store(&c.slot[block & c.mask], (block + 1) << 16 | passed)
