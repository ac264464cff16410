# cython: language_level=3
"""One open image: the fields, locks and lists that the verbs share."""
from libc.stdlib cimport free, realloc
from libc.string cimport memcpy, memset
from posix.time cimport nanosleep, timespec

from qcow2x._core.cache cimport cache_free
from qcow2x._core.chain cimport chain_free
from qcow2x._core.decoded cimport decoded_free
from qcow2x._core.edges cimport *
from qcow2x._core.errors cimport fail, fail_errno, lacked_room
from qcow2x._core.status cimport *
from qcow2x._core.storage cimport WRITE_DEFERRED
from qcow2x._core.sync cimport *


cdef class ImageState(Storage):

    def __cinit__(self, *args, **kwargs):
        self.l1 = NULL
        self.l1_dirty = NULL
        self.rt = NULL
        self.inflight = NULL
        self.marks.word = NULL
        self.awake_dir = NULL
        init_locks(self)
        self.locks_ready = True

    def __dealloc__(self):
        cache_free(&self.l2)
        cache_free(&self.refblocks)
        free(self.l1)
        free(self.l1_dirty)
        free(self.rt)
        free(self.guarded.slot)
        free(self.dropped.run)
        free(self.limbo[0].run)
        free(self.limbo[1].run)
        free(self.awake_dir)
        chain_free(&self.below)
        decoded_free(&self.decoded)
        if self.locks_ready:
            pthread_rwlock_destroy(&self.meta)
            pthread_cond_destroy(&self.room_cond)
            pthread_mutex_destroy(&self.room)
            pthread_mutex_destroy(&self.commit)
            pthread_mutex_destroy(&self.decoded.lock)


cdef void init_locks(ImageState img) noexcept nogil:
    cdef pthread_rwlockattr_t attr
    pthread_mutex_init(&img.commit, NULL)
    pthread_mutex_init(&img.room, NULL)
    pthread_mutex_init(&img.decoded.lock, NULL)
    pthread_cond_init(&img.room_cond, NULL)
    # Writers first: an allocating write must not starve behind a stream of readers.
    pthread_rwlockattr_init(&attr)
    pthread_rwlockattr_setkind_np(&attr, PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP)
    pthread_rwlock_init(&img.meta, &attr)
    pthread_rwlockattr_destroy(&attr)


cdef void leave_to_parent(ImageState img) noexcept nogil:
    # Threads that are not here may have held them.
    init_locks(img)
    q2_store(&img.closed, CLOSED_BY_FORK)
    img.shut = True
    img.shut_status = Q2_E_CLOSED
    img.frozen = False
    img.active[0] = img.active[1] = img.room_waiters = 0


cdef q2_status refuse_closed(ImageState img) noexcept nogil:
    if q2_load(&img.closed) == CLOSED_BY_FORK:
        return fail(Q2_E_CLOSED, Q2_SITE_NONE, 0,
                    b"image is closed here: it is of the process that forked this one; open it anew")
    return fail(Q2_E_CLOSED, Q2_SITE_NONE, 0, b"image is closed")


cdef q2_status begin_request(ImageState img, uint32_t *parity) noexcept nogil:
    cdef q2_status st
    pthread_rwlock_rdlock(&img.meta)
    st = enter_request(img, parity)
    pthread_rwlock_unlock(&img.meta)
    return st


cdef q2_status begin_write_request(ImageState img, uint32_t *parity) noexcept nogil:
    cdef uint64_t turn = 0
    cdef q2_status st
    while True:
        pthread_rwlock_rdlock(&img.meta)
        st = enter_write(img, parity)
        if st == Q2_BUSY:
            turn = room_enter(img)
        pthread_rwlock_unlock(&img.meta)
        if st == Q2_BUSY:
            st = wait_at_gate(img, turn)
            if st == Q2_OK:
                continue
        return st


cdef q2_status wait_at_gate(ImageState img, uint64_t turn) noexcept nogil:
    cdef q2_status st = wake_bitmaps(img)
    if st != Q2_OK:
        q2_sub(&img.room_waiters, 1)
        return st
    room_wait(img, turn)
    return Q2_OK


cdef q2_status wake_bitmaps(ImageState img) noexcept nogil:
    cdef bint wanted
    cdef q2_status st = Q2_OK
    if not q2_load(&img.asleep):
        return Q2_OK
    pthread_mutex_lock(&img.commit)
    # Whoever froze the writers may be about to put another directory there, and to give back the
    # place of this one; they ask again once they are let go on.
    pthread_rwlock_rdlock(&img.meta)
    wanted = q2_load(&img.asleep) and not img.frozen
    pthread_rwlock_unlock(&img.meta)
    if wanted:
        # In place: whichever sectors of it get to the disk, each bitmap is either in use or, as
        # nothing was written since, still right.
        st = img.file.write_at(Q2_SITE_BITMAP_WRITE, img.awake_dir, img.awake_dir_bytes,
                               img.awake_dir_off, WRITE_DEFERRED)
        if st == Q2_OK:
            q2_count(&img.count.metadata_writes, 1)
            q2_count(&img.count.barriers, 1)
            # Edge: marked in use before anything is written that would make it wrong.
            if q2_keeps(Q2_EDGE_BITMAPS_IN_USE_BEFORE_WRITE):
                st = img.file.sync(Q2_SITE_BARRIER)
        st = poison_unless_full(img, st)
        if st == Q2_OK:
            pthread_rwlock_wrlock(&img.meta)
            q2_store(&img.asleep, 0)
            pthread_rwlock_unlock(&img.meta)
    pthread_mutex_unlock(&img.commit)
    room_wake(img)
    return st


# Waiting for requests to end, which they do within an I/O: looking now and then costs nothing.
cdef void pause_briefly() noexcept nogil:
    cdef timespec pause
    pause.tv_sec = 0
    pause.tv_nsec = 100_000
    nanosleep(&pause, NULL)


cdef q2_status freeze(ImageState img) noexcept nogil:
    cdef q2_status st = may_write(img)
    if st != Q2_OK:
        return st
    # With commit, so that nobody is about to mark bitmaps in use.
    pthread_mutex_lock(&img.commit)
    pthread_rwlock_wrlock(&img.meta)
    if q2_load(&img.closed):
        st = refuse_closed(img)
    else:
        img.frozen = True
    pthread_rwlock_unlock(&img.meta)
    pthread_mutex_unlock(&img.commit)
    while st == Q2_OK and writers_under_way(img) != 0:
        pause_briefly()
    return st


cdef void thaw(ImageState img) noexcept nogil:
    pthread_rwlock_wrlock(&img.meta)
    img.frozen = False
    pthread_rwlock_unlock(&img.meta)
    room_wake(img)


cdef void drain_requests(ImageState img) noexcept nogil:
    cdef uint64_t now, other
    # A new epoch may begin only when the requests of the one before the present have ended; then
    # those of the present one are all there is to wait for.
    while True:
        pthread_rwlock_wrlock(&img.meta)
        now = img.epoch & 1
        other = now ^ 1
        if q2_load(&img.active[other]) == 0:
            break
        pthread_rwlock_unlock(&img.meta)
        pause_briefly()
    # What waits in limbo for the other parity waits on; the next flush takes it.
    if runs_append(&img.limbo[now], &img.limbo[other]) == Q2_OK:
        runs_clear(&img.limbo[other])
    q2_store(&img.epoch, img.epoch + 1)
    pthread_rwlock_unlock(&img.meta)
    while q2_load(&img.active[now]) != 0:
        pause_briefly()


cdef uint64_t room_enter(ImageState img) noexcept nogil:
    cdef uint64_t turn
    pthread_mutex_lock(&img.room)
    turn = img.room_turn
    q2_add(&img.room_waiters, 1)
    pthread_mutex_unlock(&img.room)
    return turn


cdef void room_wait(ImageState img, uint64_t turn) noexcept nogil:
    pthread_mutex_lock(&img.room)
    while img.room_turn == turn:
        pthread_cond_wait(&img.room_cond, &img.room)
    q2_sub(&img.room_waiters, 1)
    pthread_mutex_unlock(&img.room)


cdef void room_wake(ImageState img) noexcept nogil:
    # Whoever waits entered while holding meta, and what wakes it happens under meta exclusive or
    # after it, so a waiter that counts is seen here.
    if q2_load(&img.room_waiters) == 0:
        return
    pthread_mutex_lock(&img.room)
    img.room_turn += 1
    pthread_cond_broadcast(&img.room_cond)
    pthread_mutex_unlock(&img.room)


cdef bint overlaps_inflight(ImageState img, uint64_t first_cl, uint64_t n_clusters) noexcept nogil:
    cdef q2_inflight *w = img.inflight
    while w is not NULL:
        if w.first_cl < first_cl + n_clusters and first_cl < w.first_cl + w.n_clusters:
            return True
        w = w.next
    return False


cdef void add_inflight(ImageState img, q2_inflight *w) noexcept nogil:
    w.prev = NULL
    w.next = img.inflight
    if w.next is not NULL:
        w.next.prev = w
    img.inflight = w


cdef void remove_inflight(ImageState img, q2_inflight *w) noexcept nogil:
    if w.prev is not NULL:
        w.prev.next = w.next
    else:
        img.inflight = w.next
    if w.next is not NULL:
        w.next.prev = w.prev


cdef q2_status reserve_runs(q2_runs *runs, uint64_t more) noexcept nogil:
    cdef uint64_t room = runs.room * 2 if runs.room else 16
    cdef void *grown
    if runs.n + more <= runs.room:
        return Q2_OK
    while room < runs.n + more:
        room *= 2
    grown = realloc(runs.run, room * sizeof(q2_run))
    if grown is NULL:
        return fail(Q2_E_NOMEM, Q2_SITE_NONE, 0, b"no memory for the list of freed clusters")
    runs.run = <q2_run *>grown
    runs.room = room
    return Q2_OK


cdef q2_status runs_add(q2_runs *runs, uint64_t first, uint64_t n) noexcept nogil:
    cdef q2_status st
    if runs.n and runs.run[runs.n - 1].first + runs.run[runs.n - 1].n == first:
        runs.run[runs.n - 1].n += n
        q2_store(&runs.clusters, runs.clusters + n)
        return Q2_OK
    st = reserve_runs(runs, 1)
    if st != Q2_OK:
        return st
    runs.run[runs.n].first = first
    runs.run[runs.n].n = n
    runs.n += 1
    q2_store(&runs.clusters, runs.clusters + n)
    return Q2_OK


cdef q2_status runs_append(q2_runs *runs, const q2_runs *more) noexcept nogil:
    cdef q2_status st = reserve_runs(runs, more.n)
    if st != Q2_OK:
        return st
    if more.n:
        memcpy(runs.run + runs.n, more.run, more.n * sizeof(q2_run))
        runs.n += more.n
        q2_store(&runs.clusters, runs.clusters + more.clusters)
    return Q2_OK


cdef void runs_clear(q2_runs *runs) noexcept nogil:
    # A list that once grew large does not keep its memory for good.
    if runs.room > 4096:
        free(runs.run)
        runs.run = NULL
        runs.room = 0
    runs.n = 0
    q2_store(&runs.clusters, 0)


cdef void runs_take(q2_runs *runs, q2_runs *out) noexcept nogil:
    out[0] = runs[0]
    runs.run = NULL
    runs.n = runs.room = 0
    q2_store(&runs.clusters, 0)


cdef q2_status refuse_write(ImageState img) noexcept nogil:
    if q2_load(&img.closed):
        return refuse_closed(img)
    if img.read_only:
        return fail(Q2_E_READONLY, Q2_SITE_NONE, 0, b"image is open read-only")
    if q2_load(&img.broken):
        return fail(Q2_E_BROKEN, Q2_SITE_NONE, 0, b"an earlier metadata write failed")
    return refuse_unguarded(img) if img.refused else Q2_OK


cdef q2_status refuse_unguarded(ImageState img) noexcept nogil:
    q2_store(&img.refusals, 1)
    return fail_errno(img.refused, Q2_SITE_REFBLOCK_UPDATE, 0,
                      b"a snapshot's tables, which are to be guarded, cannot be found")


cdef q2_status poison_unless_kept(ImageState img, q2_status status) noexcept nogil:
    if status == Q2_E_IO or status == Q2_E_PYTHON:
        return status
    return poison_unless_full(img, status)


cdef q2_status poison_unless_full(ImageState img, q2_status status) noexcept nogil:
    if status != Q2_OK and status != Q2_E_NOMEM and not lacked_room(status):
        q2_store(&img.broken, 1)
    return status
