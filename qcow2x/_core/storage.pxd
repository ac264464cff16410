# Where bytes live. One interface for a file, a block device, a Python object and (so that a
# backing chain is just storages over storages) for the guest disk of an open image.
from libc.stddef cimport size_t
from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t
from posix.uio cimport iovec

from qcow2x._core.status cimport q2_status
from qcow2x._core.sync cimport pthread_mutex_t, q2_add, q2_raise_to

cdef extern from "qcow2x/positional.h" nogil:
    ssize_t q2_pread(int fd, void *buf, size_t nbytes, uint64_t off)
    ssize_t q2_pwrite(int fd, const void *buf, size_t nbytes, uint64_t off)

cdef extern from "qcow2x/plan.h" nogil:
    ctypedef struct q2_extent:
        uint64_t guest_off
        uint64_t nbytes
        uint64_t host_off
        uint32_t comp_bytes
        uint8_t kind
        uint8_t in_place

cdef enum:
    # Flags of write_at and writev_at.
    WRITE_FUA = 1        # durable when the call returns (RWF_DSYNC)
    WRITE_DEFERRED = 2   # a sync follows: do not make this one durable by itself, whatever the
                         # cache mode says (loses against WRITE_FUA)
    WRITE_SOON = 4       # where it is not durable by itself: others come before the sync. If it is
                         # long, the disk may begin with it
    WRITE_PAST_CACHE = 8 # of write_at, from aligned memory: nobody reads it from the page cache
                         # soon, so past it, where the host can
    # Flags of zero_range.
    ZERO_MAY_UNMAP = 1   # a hole will do; without it the range stays allocated


cdef class Storage:
    # Read-only after construction, so any thread may look without a lock.
    cdef public str name             # for messages
    cdef uint32_t align              # 1, or what O_DIRECT asks of memory and offsets (512, 4096)
    cdef bint read_only
    cdef bint fixed_size             # a block device: truncate cannot grow it
    cdef bint ignore_sync            # cache mode unsafe
    cdef bint durable_writes         # cache modes writethrough and directsync: each write is FUA
                                     # unless WRITE_DEFERRED
    cdef bint listens                # wants to hear of sites where nothing is touched
    cdef bint zero_past_end          # growing by a write leaves the gap reading as zeros

    # Order of writes: write_seq counts finished writes, everything up to durable_seq is on
    # stable storage. A barrier for "A before B" is needed iff A's seq > durable_seq. Atomic.
    cdef uint64_t write_seq
    cdef uint64_t durable_seq

    # All methods may be called from any thread, without the GIL; each either does the whole
    # range or fails. The object must be kept alive by the caller.

    # Fills buf; what lies past the end of the storage reads as zeros.
    cdef q2_status read_at(self, int32_t site, void *buf, size_t nbytes,
                           uint64_t off) noexcept nogil
    cdef q2_status write_at(self, int32_t site, const void *buf, size_t nbytes,
                            uint64_t off, uint32_t flags) noexcept nogil
    # iov is left as it was.
    cdef q2_status writev_at(self, int32_t site, const iovec *iov, int iovcnt,
                             uint64_t off, uint32_t flags) noexcept nogil
    # Everything written before the call is durable after it (a no-op in cache mode unsafe).
    cdef q2_status sync(self, int32_t site) noexcept nogil
    cdef q2_status set_size(self, int32_t site, uint64_t nbytes) noexcept nogil
    cdef q2_status get_size(self, uint64_t *nbytes) noexcept nogil
    # Gives the range back to the host. Best effort: Q2_OK also where the host cannot; the range
    # then keeps its bytes. Never changes the size.
    cdef q2_status punch_hole(self, int32_t site, uint64_t off, uint64_t nbytes) noexcept nogil
    # The range reads as zeros afterwards. Falls back to writing zeros. May extend the storage.
    cdef q2_status zero_range(self, int32_t site, uint64_t off, uint64_t nbytes,
                              uint32_t flags) noexcept nogil
    # Reserves host blocks; the bytes do not change, the size may grow to off + nbytes.
    cdef q2_status allocate(self, int32_t site, uint64_t off, uint64_t nbytes) noexcept nogil
    # The run that starts at off, at most nbytes long: kind is Q2_KIND_DATA, Q2_KIND_ZERO (a hole,
    # or known zeros) or Q2_KIND_UNALLOCATED (past the end). Data may be reported for a hole.
    cdef q2_status extent_at(self, uint64_t off, uint64_t nbytes,
                             q2_extent *out) noexcept nogil

    # The image is at a site that touches no storage. Only for what listens: nobody else is called.
    cdef void reach(self, int32_t site) noexcept nogil

    # For implementations: count a finished write; remember what a sync covers.
    cdef void note_write(self) noexcept nogil
    cdef void note_sync(self, uint64_t seq_at_start) noexcept nogil


cdef void fill_extent(q2_extent *out, uint64_t off, uint64_t nbytes, uint8_t kind) noexcept nogil


cdef class FileStorage(Storage):
    # A regular file or block device, buffered or O_DIRECT; owns its descriptor (a descriptor
    # handed in is duplicated). FileStorage(path_or_fd, writable=False, cache="writeback")
    cdef int fd
    cdef int past_fd                 # the same file opened O_DIRECT, for WRITE_PAST_CACHE; or -1
    cdef bint is_block_device
    cdef bint shared_cursor          # the descriptor was handed in: its owner sees our lseek
    cdef uint32_t closed             # atomic
    # What the host turned out not to know; cleared once, never set again. Atomic.
    cdef uint32_t can_punch
    cdef uint32_t can_zero
    cdef uint32_t can_dsync
    cdef uint32_t mem_align          # what O_DIRECT asks of memory, at most `align`
    cdef uint64_t file_size          # at least the size as this object has grown it; atomic
    cdef void *edges                 # rwlock: unaligned O_DIRECT writes exclude aligned ones
    cdef void *bounce                # pool of aligned buffers, NULL when buffered
    cdef pthread_mutex_t sync_lock   # held while syncing; innermost of all locks but the pools'
    cdef int32_t sync_errno          # under it: first failure of a buffered sync; later ones repeat it


# From and into the page cache, `bounce` being NULL, for small requests one after another. False: not all
# of it, or not at all, which read_at and write_at see to from the start.
cdef inline bint read_from_cache(FileStorage self, void *buf, size_t nbytes,
                                 uint64_t off) noexcept nogil:
    return q2_pread(self.fd, buf, nbytes, off) == <ssize_t>nbytes

cdef inline bint write_to_cache(FileStorage self, const void *buf, size_t nbytes,
                                uint64_t off) noexcept nogil:
    if (self.durable_writes or self.read_only
            or q2_pwrite(self.fd, buf, nbytes, off) != <ssize_t>nbytes):
        return False
    q2_raise_to(&self.file_size, off + nbytes)
    q2_add(&self.write_seq, 1)
    return True

# Around whole, aligned writes with the descriptor (shared), and around what must not meet one.
cdef void hold_edges(FileStorage self, bint shared) noexcept nogil
cdef void release_edges(FileStorage self) noexcept nogil

# Counts a finished write that is on stable storage itself (RWF_DSYNC).
cdef void note_durable_write(FileStorage self) noexcept nogil
