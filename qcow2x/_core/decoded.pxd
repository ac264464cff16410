# The compressed clusters that were decoded last, for requests that want a part of one each. Any thread;
# nobody waits: who finds the lock taken does without.
from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from qcow2x._core.sync cimport pthread_mutex_t

cdef enum:
    DECODED_SLOTS = 16
    DECODED_READERS = 4
    MOST_AHEAD = 7              # DECODED_SLOTS / 2 - 1

cdef struct q2_decoded_slot:
    uint8_t *data               # a cluster; NULL: none yet, or lent out
    uint64_t host_off           # of the stream
    uint32_t comp_bytes         # 0: data is of nobody
    bint lent
    uint64_t epoch              # ImageState.epoch before the plan that led to the stream
    uint64_t used               # the turn in which it was last wanted

# Who reads on and on.
cdef struct q2_reader:
    uint64_t next_cl            # the guest cluster that he will want decoded next
    uint32_t ahead              # clusters before it that were decoded ahead
    uint64_t used               # the turn in which he was last seen; 0: nobody

cdef struct q2_decoded:
    pthread_mutex_t lock        # innermost: nothing is called while it is held but malloc
    uint64_t turn
    q2_decoded_slot slot[DECODED_SLOTS]
    q2_reader reader[DECODED_READERS]

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

# Clusters that may be decoded ahead of a reader: half of what is kept, so that two readers who take turns
# do not push out what the other has not read yet. 0 to MOST_AHEAD.
cdef uint32_t decoded_most_ahead(size_t cluster_size) noexcept nogil
# Guest clusters [first_cl, end_cl) are about to be decoded. How many after them should be as well, at most
# `most`: none unless that continues what was decoded before, then more each time; fewer if what was
# decoded ahead was gone before it was read.
cdef uint32_t decoded_follow(q2_decoded *d, uint64_t first_cl, uint64_t end_cl,
                             uint32_t most) noexcept nogil
