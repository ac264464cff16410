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
    for i in range(<uint32_t>DECODED_SLOTS):
        free(d.slot[i].data)


cdef bint decoded_copy(q2_decoded *d, uint64_t host_off, uint32_t comp_bytes, uint64_t epoch,
                       size_t skip, size_t nbytes, uint8_t *out) noexcept nogil:
    cdef uint32_t i
    cdef bint found = False
    if pthread_mutex_trylock(&d.lock) != 0:
        return False
    for i in range(<uint32_t>DECODED_SLOTS):
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


cdef uint32_t decoded_most_ahead(size_t cluster_size) noexcept nogil:
    return slots_of(cluster_size) // 2 - 1


cdef uint32_t decoded_follow(q2_decoded *d, uint64_t first_cl, uint64_t end_cl,
                             uint32_t most) noexcept nogil:
    cdef q2_reader *r
    cdef q2_reader *oldest = &d.reader[0]
    cdef q2_reader *found = NULL
    cdef uint32_t i, ahead = 0
    if pthread_mutex_trylock(&d.lock) != 0:
        return 0
    for i in range(<uint32_t>DECODED_READERS):
        r = &d.reader[i]
        # Clusters that are not compressed may lie in between, for who has been seen to read on.
        if r.used and r.next_cl <= first_cl and first_cl - r.next_cl <= r.ahead:
            found = r
            ahead = min(2 * r.ahead + 1, most)
            break
        if r.used and first_cl < r.next_cl and r.next_cl - first_cl <= r.ahead:
            found = r
            ahead = min(r.ahead // 2, most)
            break
        if r.used < oldest.used:
            oldest = r
    if found is NULL:
        found = oldest
    d.turn += 1
    found.used = d.turn
    found.ahead = ahead
    found.next_cl = end_cl + ahead
    pthread_mutex_unlock(&d.lock)
    return ahead
