# cython: language_level=3
"""A small cache of decoded clusters: a guest that reads a compressed image 4 KiB at a time would have each
cluster of 64 KiB decoded sixteen times."""
from libc.stdlib cimport free
from libc.string cimport memcpy
from posix.stdlib cimport posix_memalign

from qcow2x._core.sync cimport *

cdef enum:
    # An image at most: 16 clusters of the usual 64 KiB, but two of any size, as a guest that copies reads
    # in two places by turns.
    MOST_BYTES = 1 << 20
    AT_LEAST = 2


cdef inline uint32_t slots_of(size_t cluster_size) noexcept nogil:
    cdef uint32_t n = DECODED_SLOTS
    while n > AT_LEAST and n * cluster_size > MOST_BYTES:
        n //= 2
    return n


cdef void decoded_free(q2_decoded *d) noexcept nogil:
    cdef uint32_t i
    for i in range(DECODED_SLOTS):
        free(d.slot[i].data)


cdef bint decoded_copy(q2_decoded *d, uint64_t host_off, uint32_t comp_bytes, uint64_t epoch,
                       size_t skip, size_t nbytes, uint8_t *out) noexcept nogil:
    cdef uint32_t i
    cdef bint found = False
    if pthread_mutex_trylock(&d.lock) != 0:
        return False
    for i in range(DECODED_SLOTS):
        if (d.slot[i].comp_bytes == comp_bytes and d.slot[i].host_off == host_off
                and d.slot[i].epoch == epoch and d.slot[i].data is not NULL):
            d.turn += 1
            d.slot[i].used = d.turn
            memcpy(out, d.slot[i].data + skip, nbytes)
            found = True
            break
    pthread_mutex_unlock(&d.lock)
    return found


cdef uint8_t *decoded_lend(q2_decoded *d, size_t size, uint32_t *slot) noexcept nogil:
    cdef uint32_t i, oldest = DECODED_SLOTS
    cdef void *data = NULL
    if pthread_mutex_trylock(&d.lock) != 0:
        return NULL
    for i in range(slots_of(size)):
        if not d.slot[i].lent and (oldest == DECODED_SLOTS
                                   or d.slot[i].used < d.slot[oldest].used):
            oldest = i
    if oldest < DECODED_SLOTS:
        data = d.slot[oldest].data
        if data is not NULL or posix_memalign(&data, 4096, size) == 0:
            d.slot[oldest].data = NULL
            d.slot[oldest].lent = True
    slot[0] = oldest
    pthread_mutex_unlock(&d.lock)
    return <uint8_t *>data


cdef void decoded_keep(q2_decoded *d, uint32_t slot, uint8_t *data, uint64_t host_off,
                       uint32_t comp_bytes, uint64_t epoch) noexcept nogil:
    pthread_mutex_lock(&d.lock)
    d.turn += 1
    d.slot[slot].data = data
    d.slot[slot].host_off = host_off
    d.slot[slot].comp_bytes = comp_bytes
    d.slot[slot].epoch = epoch
    d.slot[slot].used = d.turn
    d.slot[slot].lent = False
    pthread_mutex_unlock(&d.lock)

