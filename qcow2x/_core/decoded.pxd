# The compressed clusters that were decoded last, for requests that want a part of one each. Any thread;
# nobody waits: who finds the lock taken does without.
from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from qcow2x._core.sync cimport pthread_mutex_t

cdef enum:
    DECODED_SLOTS = 16

cdef struct q2_decoded_slot:
    uint8_t *data               # a cluster; NULL: none yet, or lent out
    uint64_t host_off           # of the stream
    uint32_t comp_bytes         # 0: data is of nobody
    bint lent
    uint64_t epoch              # ImageState.epoch before the plan that led to the stream
    uint64_t used               # the turn in which it was last wanted

cdef struct q2_decoded:
    pthread_mutex_t lock        # innermost: nothing is called while it is held but malloc
    uint64_t turn
    q2_decoded_slot slot[DECODED_SLOTS]

# The fields begin as zeros, the lock as any other of the image.
cdef void decoded_free(q2_decoded *d) noexcept nogil

# Copies nbytes from byte `skip` of the cluster that the stream at host_off holds. `epoch` is the
# image's after the plan that named the stream: a cluster that was decoded in an earlier one may have
# been freed since, and written anew.
cdef bint decoded_copy(q2_decoded *d, uint64_t host_off, uint32_t comp_bytes, uint64_t epoch,
                       size_t skip, size_t nbytes, uint8_t *out) noexcept nogil

# Memory for a cluster of `size` bytes to decode into, and its slot; NULL: none to spare. Goes back by decoded_keep with
# what it holds now, or with comp_bytes 0 if that is nothing of use.
cdef uint8_t *decoded_lend(q2_decoded *d, size_t size, uint32_t *slot) noexcept nogil
cdef void decoded_keep(q2_decoded *d, uint32_t slot, uint8_t *data, uint64_t host_off,
                       uint32_t comp_bytes, uint64_t epoch) noexcept nogil
