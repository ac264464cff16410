# What the verbs share: one open image. Only fields, locks and the waiting room; no verb.
#
# Locks, in the order in which they may be taken:
#   commit    one thread at a time writes metadata back (metadata.pyx), retires freed clusters
#             (retire.pyx) or rewrites the header
#   meta      reader-writer; held to plan, never across data I/O. Shared: look at L1, caches,
#             refcount table. Exclusive: change any of them, the lists, the size
#   room      the waiting room's mutex; leaf, nothing is taken under it
# The lock of `cipher` is taken around data I/O, when no other is held (sectors.pyx); that of `decoded`
# before and after it.
# Atomic fields may be read without a lock. Nothing here takes the GIL.
from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t

from qcow2x._core.cache cimport q2_cache
from qcow2x._core.chain cimport q2_chain
from qcow2x._core.crypto cimport SectorCipher
from qcow2x._core.decoded cimport q2_decoded
from qcow2x._core.geometry cimport q2_geometry
from qcow2x._core.header cimport Header
from qcow2x._core.marks cimport marks_set, q2_marks
from qcow2x._core.status cimport Q2_BUSY, Q2_OK, q2_status
from qcow2x._core.storage cimport FileStorage, Storage
from qcow2x._core.sync cimport pthread_cond_t, pthread_mutex_t, pthread_rwlock_t, q2_add, q2_load, q2_sub

# An allocating write between its plan and its link. It owns guest clusters [first, first + n):
# whoever would change their mapping waits until it has linked or aborted.
cdef struct q2_inflight:
    uint64_t first_cl
    uint64_t n_clusters
    q2_inflight *prev
    q2_inflight *next

# Host clusters [first, first + n), a growing list of them.
cdef struct q2_run:
    uint64_t first
    uint64_t n

cdef struct q2_runs:
    q2_run *run
    uint64_t n
    uint64_t room
    uint64_t clusters           # of all runs together; atomic

# Clusters that hold tables, see overlap.pyx.
cdef struct q2_guard:
    uint64_t *slot
    uint64_t mask
    uint64_t n

# See growth.pxd.
cdef enum:
    GROWTH_STREAMS = 8
    AHEAD_WORDS = 8             # a slice of an L2 table has at most 512 entries

cdef struct q2_stream:
    uint64_t next_cl            # where somebody who writes on and on goes on; 0: not in use
    uint64_t window             # clusters last linked ahead of him

# Guest clusters [first_cl, first_cl + n), of one L2 slice, linked ahead to host clusters from
# first_host on.
cdef struct q2_ahead:
    uint64_t first_cl
    uint64_t n
    uint64_t first_host
    uint64_t used[AHEAD_WORDS]  # atomic: a bit for each that was written to, or changed otherwise

cdef struct q2_growth:
    int32_t how                 # a GROWTH of reserve.pxd; fixed when the image is opened
    uint32_t n_ahead
    bint filling                # somebody makes a new reserve
    int32_t ask_made            # how the next reserve is to be made: a RESERVE of reserve.pxd
    uint64_t ask                # clusters that whoever found the reserve empty wants
    uint64_t step               # clusters that the next reserve has at least
    uint64_t first              # the reserve: host clusters that are counted, durably, and read as
    uint64_t n                  # zeros, and that nothing names
    uint64_t file_end           # bytes in the file when the image was opened
    q2_stream stream[GROWTH_STREAMS]
    uint32_t stream_turn
    uint32_t promised           # windows that writes in flight will link
    q2_ahead ahead[GROWTH_STREAMS]

cdef struct q2_counters:
    uint64_t metadata_writes
    uint64_t barriers
    uint64_t allocated
    uint64_t freed


cdef class ImageState(Storage):
    # What every request looks at and few change lies together: after an I/O little of it is left in the
    # processor's nearest caches, and each line of theirs that a request touches costs it time. The same
    # goes for what every request changes, which lies apart from that for the sake of other processors.
    cdef q2_geometry geo
    cdef q2_cache l2
    cdef uint64_t *l1               # under meta; host byte order
    cdef uint32_t l1_size           # entries
    cdef int32_t refused            # an errno if nothing is to be written from the start: what was asked
                                    # to be guarded cannot be found; set before the image is used
    cdef q2_guard guarded           # under meta
    cdef uint64_t *rt               # refcount table, host byte order; NULL before it is needed; under meta
    cdef uint32_t guard_level       # a GUARD of overlap.pxd; fixed when the image is opened
    cdef bint durable               # writethrough, directsync: a write returns when it is durable
    cdef bint frozen                # writers wait outside: a snapshot is being made; under meta
    cdef bint data_is_file          # data is a FileStorage, and no subclass of it
    cdef Storage file               # metadata, and data too unless data is another
    cdef Storage data               # guest data: the same as file without an external data file
    cdef SectorCipher cipher        # None unless the data clusters are encrypted
    cdef uint64_t epoch             # atomic; changed under meta: what it is at a plan tells what may
                                    # have been freed since
    # Atomic.
    cdef uint64_t disk_size         # guest bytes; changed under meta, exclusive
    cdef uint64_t host_size         # the file's size as far as this image has seen or grown it
    cdef uint64_t closed            # not 0 from close() on; set under meta, exclusive
    cdef uint64_t asleep            # 1: bitmaps are valid on disk, and must be marked in use before
                                    # anything is written; cleared under meta, exclusive
    cdef uint64_t broken            # 1 after metadata could not be written, or a sync failed
    cdef uint64_t meta_seq          # counts changes of metadata
    cdef uint64_t meta_durable      # changes up to this one are durable
    cdef q2_marks marks             # changed since the bitmaps were last stored; exchanged while
                                    # writers are frozen
    cdef q2_runs dropped            # unmapped, but not yet durably so; under meta
    cdef q2_growth growth           # under meta

    # Atomic, changed by every request.
    cdef uint64_t active[2]         # requests that entered during an epoch of this parity, and
                                    # one_writer() for each of them that writes
    cdef pthread_rwlock_t meta

    cdef Header header
    cdef bint raw_data              # the data file is to read as the disk by itself, zeros included
    cdef Storage backing            # None without a backing file
    cdef uint64_t backing_size
    cdef q2_chain below             # the layers that the backing file begins
    cdef bint discard_to_host       # freed clusters are punched out of the file
    cdef bint lazy_refcounts        # refcounts wait for the close; till then the dirty bit is set

    # Under meta.
    cdef uint64_t l1_offset
    cdef uint8_t *l1_dirty          # a byte per 512-byte sector of the table
    cdef bint l1_is_dirty
    cdef uint64_t rt_entries
    cdef uint64_t rt_offset
    cdef uint8_t head[512]          # the file's first sector as it is on disk, patched in place;
                                    # frozen, commit is enough. So with the fields of `header`, which
                                    # are looked at without a lock: atomic
    cdef bint head_stale            # the file may have another than `head`, as a write of it failed:
                                    # a write-back begins with it. Under commit
    cdef q2_cache refblocks
    cdef uint64_t free_hint         # no host cluster below this one is free
    cdef uint64_t run_from          # nor are run_want of them in a row below this one
    cdef uint64_t run_want
    cdef uint64_t gap_first         # host clusters [gap_first, gap_end) lie inside the file, but it
    cdef uint64_t gap_end           # only grew past them: nothing was written there, they are zeros
    cdef uint64_t packed_end        # host offset after the last compressed cluster; 0: start anew
    cdef q2_inflight *inflight
    cdef q2_runs limbo[2]           # durably unmapped during an epoch of this parity
    cdef bint half_done             # a snapshot lacked room in the middle: poisoned until refcounts and
                                    # COPIED flags are made anew (Image._finish_half_done)

    # Persistent bitmaps; exchanged while writers are frozen.
    cdef object tracker             # keeps the array of `marks` alive
    cdef uint8_t *awake_dir         # the bitmap directory with tracked bitmaps marked in use
    cdef uint64_t awake_dir_bytes
    cdef uint64_t awake_dir_off

    # Atomic.
    cdef uint64_t refblock_seq      # the file's write_seq after the last refcount block written
    cdef uint64_t table_seq         # the same after the last L2 table written
    cdef uint64_t lazy_dirty        # 1: the dirty bit is on disk, so refcounts there may be wrong
    cdef uint64_t damaged           # 1 after damage was met that no write may follow: a table where a
                                    # write would go, an entry that no writer makes
    cdef uint64_t refusals          # writes that `refused` has cost
    cdef uint64_t flush_tickets     # calls to flush so far

    # Under commit.
    cdef uint64_t flush_done        # calls to flush up to this one are answered
    cdef bint shut                  # the flush at closing was done: nothing touches the file again
    cdef q2_status shut_status      # how that one ended

    cdef q2_counters count          # for stats()
    # What a compressed cluster takes, of late: its thread, and of the whole request when one thread decoded
    # it and when several did. Atomic.
    cdef uint64_t decode_ns
    cdef uint64_t alone_ns
    cdef uint64_t shared_ns
    cdef uint64_t share_turns
    cdef q2_decoded decoded

    cdef pthread_mutex_t commit
    cdef pthread_mutex_t room
    cdef pthread_cond_t room_cond
    cdef uint64_t room_turn         # under room: grows whenever something one may wait for happened
    cdef uint64_t room_waiters      # atomic

    cdef bint locks_ready


cdef enum:
    WRITERS_SHIFT = 32

# A request that writes, in `active`: one of all, and one of these, with a single atomic change.
cdef inline uint64_t one_writer() noexcept nogil:
    return (<uint64_t>1 << WRITERS_SHIFT) + 1

cdef inline uint64_t writers_under_way(ImageState img) noexcept nogil:
    return (q2_load(&img.active[0]) >> WRITERS_SHIFT) + (q2_load(&img.active[1]) >> WRITERS_SHIFT)

cdef inline bint has_backing(ImageState img) noexcept nogil:
    return img.backing is not None

cdef inline bint is_encrypted(ImageState img) noexcept nogil:
    return img.cipher is not None

# Whether data is copied from and into the page cache as it is, and nobody listens.
cdef inline bint copies_only(ImageState img) noexcept nogil:
    return (img.data_is_file and (<FileStorage>img.data).bounce is NULL and img.cipher is None
            and not img.file.listens)

# What `closed` is in a child of the process that opened the image.
cdef enum:
    CLOSED_BY_FORK = 2

# Only thread of a child after fork(): the image is the parent's. All that is asked of it here is
# refused, and nothing of it is written.
cdef void leave_to_parent(ImageState img) noexcept nogil
cdef q2_status refuse_closed(ImageState img) noexcept nogil

# Why a write is refused that cannot be guarded as was asked.
cdef q2_status refuse_unguarded(ImageState img) noexcept nogil

cdef inline q2_status enter_as(ImageState img, uint64_t who, uint32_t *parity) noexcept nogil:
    if q2_load(&img.closed):
        return refuse_closed(img)
    parity[0] = <uint32_t>(img.epoch & 1)
    q2_add(&img.active[parity[0]], who)
    return Q2_OK

# meta, any side. Enters a request: what it plans stays readable until leave_request. Q2_E_CLOSED.
cdef inline q2_status enter_request(ImageState img, uint32_t *parity) noexcept nogil:
    return enter_as(img, 1, parity)

# No lock held: the same for a verb that plans under the exclusive lock later.
cdef q2_status begin_request(ImageState img, uint32_t *parity) noexcept nogil
# No lock needed.
cdef inline void leave_request(ImageState img, uint32_t parity) noexcept nogil:
    q2_sub(&img.active[parity], 1)

# The same for a request that writes. enter_write, with meta held, answers Q2_BUSY while the image is
# frozen or its bitmaps are not marked in use yet: note the turn, let go of meta, wait_at_gate, again.
# begin_write_request does all that.
cdef inline q2_status enter_write(ImageState img, uint32_t *parity) noexcept nogil:
    if img.frozen or q2_load(&img.asleep):
        return Q2_BUSY
    return enter_as(img, one_writer(), parity)

cdef q2_status begin_write_request(ImageState img, uint32_t *parity) noexcept nogil
cdef q2_status wait_at_gate(ImageState img, uint64_t turn) noexcept nogil
cdef inline void leave_write(ImageState img, uint32_t parity) noexcept nogil:
    q2_sub(&img.active[parity], one_writer())

# Inside a writing request: what it changed, for the bitmaps. Inside the disk only: what a resize
# clears past its end is not a change.
cdef inline void note_change(ImageState img, uint64_t guest_off, uint64_t nbytes) noexcept nogil:
    cdef uint64_t end
    if img.marks.word is not NULL:
        end = q2_load(&img.disk_size)
        if end > guest_off + nbytes:
            end = guest_off + nbytes
        if guest_off < end:
            marks_set(&img.marks, guest_off, end)

# No lock held. Bitmaps that are valid on disk are marked in use, durably; nothing while frozen.
cdef q2_status wake_bitmaps(ImageState img) noexcept nogil

# No lock held. freeze returns when no write is under way and lets none begin before thaw. Reads go
# on. One thread at a time (Image serialises what freezes).
cdef q2_status freeze(ImageState img) noexcept nogil
cdef void thaw(ImageState img) noexcept nogil
# No lock held: every request that was under way at the call has finished. Not inside one.
cdef void drain_requests(ImageState img) noexcept nogil

# Waiting: note the turn while meta is held, let go of meta, wait for the next turn.
cdef uint64_t room_enter(ImageState img) noexcept nogil
cdef void room_wait(ImageState img, uint64_t turn) noexcept nogil
cdef void room_wake(ImageState img) noexcept nogil

# meta, any side. Whether a write in flight owns a cluster of [first_cl, first_cl + n_clusters).
cdef bint overlaps_inflight(ImageState img, uint64_t first_cl, uint64_t n_clusters) noexcept nogil
# meta, exclusive.
cdef void add_inflight(ImageState img, q2_inflight *w) noexcept nogil
cdef void remove_inflight(ImageState img, q2_inflight *w) noexcept nogil

# Appends, merging with the last run where they touch. Q2_E_NOMEM leaves the list alone.
cdef q2_status runs_add(q2_runs *runs, uint64_t first, uint64_t n) noexcept nogil
cdef q2_status runs_append(q2_runs *runs, const q2_runs *more) noexcept nogil
cdef void runs_clear(q2_runs *runs) noexcept nogil
# What is in the list, with its memory, becomes out's; whatever that held is not freed.
cdef void runs_take(q2_runs *runs, q2_runs *out) noexcept nogil

# Whether a write may start: Q2_E_CLOSED, Q2_E_READONLY, Q2_E_BROKEN or Q2_OK.
cdef q2_status refuse_write(ImageState img) noexcept nogil
cdef inline q2_status may_write(ImageState img) noexcept nogil:
    if q2_load(&img.closed) or img.read_only or q2_load(&img.broken) or img.refused:
        return refuse_write(img)
    return Q2_OK

# After a sync failed, or a write to a table that is in use and not kept in memory: no room is retryable,
# all else poisons.
cdef q2_status poison_unless_full(ImageState img, q2_status status) noexcept nogil
# After a write failed of what memory still has, or of what nothing on disk names yet: it is tried
# again, or its place given back.
cdef q2_status poison_unless_kept(ImageState img, q2_status status) noexcept nogil
