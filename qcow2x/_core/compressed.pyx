# cython: language_level=3
"""Compressed clusters: fetched and decoded, several of one request at a time, and for who reads on and on
some before they are asked for."""
from libc.string cimport memcpy
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec

from qcow2x._core.codec cimport decode_cluster
from qcow2x._core.crew cimport crew_join, crew_leave, crew_size, crew_spare
from qcow2x._core.decoded cimport (MOST_AHEAD, decoded_copy, decoded_follow, decoded_keep,
                                   decoded_lend, decoded_most_ahead)
from qcow2x._core.errors cimport fail
from qcow2x._core.mapping cimport plan_range
from qcow2x._core.plan cimport Q2_KIND_COMPRESSED, q2_plan
from qcow2x._core.scratch cimport scratch_give, scratch_take
from qcow2x._core.status cimport *
from qcow2x._core.storage cimport FileStorage
from qcow2x._core.sync cimport *

cdef extern from "<pthread.h>" nogil:
    ctypedef unsigned long pthread_t
    int pthread_create(pthread_t *, void *, void *(*)(void *) noexcept nogil, void *)
    int pthread_join(pthread_t, void **)

cdef enum:
    MOST_HELPERS = 15
    # Work for each thread. To start one and wait for its end takes 45 us.
    SHARE_NS = 100000
    # Before sharing is judged: the first one, with a thread and a CPU that were not there yet, took twice
    # as long as those that followed.
    FIRST_TURNS = 16
    # Streams that lie together are fetched by one transfer of at most so many bytes, with at most so
    # many between two of them; for one call at most so many bytes.
    TOGETHER_BYTES = 1 << 20
    GAP_BYTES = 4096
    FETCHED_BYTES = 4 << 20
    MOST_JOBS = MOST_PIECES + MOST_AHEAD

# The pieces of one cluster, which is decoded once.
cdef struct q2_job:
    const q2_piece *piece
    size_t n
    const uint8_t *stream       # NULL: not fetched yet

cdef struct q2_fetched:
    uint8_t *memory
    size_t nbytes

cdef struct q2_work:
    void *img
    uint64_t epoch
    size_t n
    q2_job job[MOST_JOBS]
    q2_piece ahead[MOST_AHEAD]      # what the last jobs are of
    size_t n_fetched
    q2_fetched fetched[MOST_JOBS]
    uint64_t taken                  # atomic
    uint64_t failed                 # atomic


cdef inline uint64_t now_ns() noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return <uint64_t>now.tv_sec * 1000000000 + <uint64_t>now.tv_nsec


cdef inline void note_time(uint64_t *average, uint64_t ns, uint64_t over) noexcept nogil:
    # An average over the last few; two threads may lose one of their figures.
    cdef uint64_t before = q2_load(average)
    q2_store(average, before - before // over + ns // over if before else ns)


cdef q2_status decode_stream(ImageState img, const q2_extent *ext, const uint8_t *stream,
                             uint8_t *decoded) noexcept nogil:
    cdef size_t room = ext.comp_bytes
    cdef uint8_t *own = NULL
    cdef uint64_t start = now_ns()
    cdef q2_status st = Q2_OK
    if stream is NULL:
        own = <uint8_t *>scratch_take(room)
        if own is NULL:
            return fail(Q2_E_NOMEM, Q2_SITE_COMPRESSED_READ, ext.host_off, b"out of memory")
        st = img.file.read_at(Q2_SITE_COMPRESSED_READ, own, room, ext.host_off)
        stream = own
    if st == Q2_OK:
        st = decode_cluster(img.header.fields.compression_type, stream, room, decoded,
                            img.geo.cluster_size)
        if st == Q2_E_CODEC:
            fail(Q2_E_CODEC, Q2_SITE_COMPRESSED_READ, ext.host_off,
                 b"compressed cluster does not decode to a full cluster")
    scratch_give(own, room)
    # Stored clusters take 9 us, dense zlib 150: what the streams' bytes do not tell.
    note_time(&img.decode_ns, now_ns() - start, 8)
    return st


cdef inline size_t place_in(ImageState img, const q2_piece *piece) noexcept nogil:
    return piece.ext.guest_off & (img.geo.cluster_size - 1)


cdef q2_status do_job(ImageState img, const q2_job *job, uint64_t epoch) noexcept nogil:
    """Decodes straight to where it is wanted if all of the cluster is; else by way of the clusters that
    were decoded last, unless somebody counts reads."""
    cdef const q2_extent *ext = &job.piece.ext
    cdef size_t size = img.geo.cluster_size
    cdef uint32_t slot = 0
    cdef uint8_t *cluster = NULL
    cdef bint kept
    cdef size_t k
    cdef q2_status st
    if job.n == 1 and job.piece.out is not NULL and ext.nbytes == size:
        return decode_stream(img, ext, job.stream, job.piece.out)
    if not img.file.listens:
        cluster = decoded_lend(&img.decoded, size, &slot)
    kept = cluster is not NULL
    if not kept:
        if job.piece.out is NULL:
            return Q2_OK
        cluster = <uint8_t *>scratch_take(size)
    if cluster is NULL:
        return fail(Q2_E_NOMEM, Q2_SITE_COMPRESSED_READ, ext.host_off, b"out of memory")
    st = decode_stream(img, ext, job.stream, cluster)
    if st == Q2_OK and job.piece.out is not NULL:
        for k in range(job.n):
            memcpy(job.piece[k].out, cluster + place_in(img, &job.piece[k]), job.piece[k].ext.nbytes)
    if kept:
        decoded_keep(&img.decoded, slot, cluster, ext.host_off,
                     ext.comp_bytes if st == Q2_OK else 0, epoch)
    else:
        scratch_give(cluster, size)
    return st


cdef q2_status do_in_turn(ImageState img, const q2_work *work, size_t *failed) noexcept nogil:
    cdef size_t i
    cdef q2_status st
    for i in range(work.n):
        st = do_job(img, &work.job[i], work.epoch)
        if st != Q2_OK and work.job[i].piece.out is not NULL:
            failed[0] = work.job[i].piece.request
            return st
    return Q2_OK


# ---- What the decoded clusters serve ------------------------------------------------------------

cdef bint is_decoded(ImageState img, const q2_piece *piece, size_t n) noexcept nogil:
    cdef size_t k
    if img.file.listens:
        return False
    for k in range(n):
        if not decoded_copy(&img.decoded, piece[k].ext.host_off, piece[k].ext.comp_bytes,
                            q2_load(&img.epoch), place_in(img, &piece[k]), piece[k].ext.nbytes,
                            piece[k].out):
            return False
    return True


cdef void make_jobs(ImageState img, const q2_piece *piece, size_t n, q2_work *work) noexcept nogil:
    cdef size_t i = 0, k
    work.n = 0
    while i < n:
        k = 1
        while (i + k < n and piece[i + k].ext.host_off == piece[i].ext.host_off
               and piece[i + k].ext.comp_bytes == piece[i].ext.comp_bytes):
            k += 1
        if not is_decoded(img, &piece[i], k):
            work.job[work.n].piece = &piece[i]
            work.job[work.n].n = k
            work.job[work.n].stream = NULL
            work.n += 1
        i += k


# ---- Several CPUs -------------------------------------------------------------------------------

cdef uint64_t helpers_for(ImageState img, size_t n, uint64_t at_work) noexcept nogil:
    cdef uint64_t shares
    if n < 2:
        return 0
    shares = min(n * q2_load(&img.decode_ns) // SHARE_NS, <uint64_t>n)
    return min(shares - 1, crew_spare(at_work), <uint64_t>MOST_HELPERS) if shares else 0


cdef bint sharing_pays(ImageState img) noexcept nogil:
    """By what a cluster took alone and with others beside it: two CPUs that are one core of the machine
    below decode no faster than one (a dense cluster 216 us instead of 164), and look no different. Now
    and then the other way, to see whether that still holds."""
    cdef uint64_t turn = q2_add(&img.share_turns, 1)
    if turn <= FIRST_TURNS:
        return True
    if q2_load(&img.shared_ns) < q2_load(&img.alone_ns):
        return (turn - FIRST_TURNS) % 256 > 3
    return turn % 16 == 0


cdef void *decode_some(void *work_) noexcept nogil:
    cdef q2_work *work = <q2_work *>work_
    cdef const q2_job *job
    cdef uint64_t i = q2_add(&work.taken, 1) - 1
    while i < work.n and not q2_load(&work.failed):
        job = &work.job[i]
        if (do_job(<ImageState>work.img, job, work.epoch) != Q2_OK
                and job.piece.out is not NULL):
            q2_store(&work.failed, 1)
        i = q2_add(&work.taken, 1) - 1
    return NULL


cdef q2_status do_together(ImageState img, q2_work *work, uint64_t helpers, uint64_t *started,
                           size_t *failed) noexcept nogil:
    cdef pthread_t helper[MOST_HELPERS]
    cdef uint64_t n = 0
    crew_join(helpers)
    work.taken = work.failed = 0
    while n < helpers and pthread_create(&helper[n], NULL, decode_some, work) == 0:
        n += 1
    started[0] = n
    decode_some(work)
    while n:
        n -= 1
        pthread_join(helper[n], NULL)
    crew_leave(helpers)
    # What was wrong is known in the thread that met it: here it is met again.
    return do_in_turn(img, work, failed) if work.failed else Q2_OK


# ---- Fetching -----------------------------------------------------------------------------------

cdef inline bint fetches_cost(ImageState img) noexcept nogil:
    """Whether each transfer is a wait for a disk, or for Python."""
    return not img.file.listens and (not img.data_is_file
                                     or (<FileStorage>img.data).bounce is not NULL)


cdef bint fetch_run(ImageState img, q2_work *work, size_t first, size_t end,
                    size_t nbytes) noexcept nogil:
    cdef uint64_t start = work.job[first].piece.ext.host_off
    cdef uint8_t *memory = <uint8_t *>scratch_take(nbytes)
    cdef size_t i
    # What cannot be fetched together may be one by one, or tells what is wrong there.
    if (memory is NULL
            or img.file.read_at(Q2_SITE_COMPRESSED_READ, memory, nbytes, start) != Q2_OK):
        scratch_give(memory, nbytes)
        return False
    for i in range(first, end):
        work.job[i].stream = memory + (work.job[i].piece.ext.host_off - start)
    work.fetched[work.n_fetched].memory = memory
    work.fetched[work.n_fetched].nbytes = nbytes
    work.n_fetched += 1
    return True


cdef bint fetch_together(ImageState img, q2_work *work) noexcept nogil:
    """True: nothing is left to fetch."""
    cdef size_t i = 0, k, left = FETCHED_BYTES
    cdef uint64_t start, end, off, upto
    cdef bint all = True
    while i < work.n:
        start = work.job[i].piece.ext.host_off
        end = start + work.job[i].piece.ext.comp_bytes
        k = i + 1
        while k < work.n:
            off = work.job[k].piece.ext.host_off
            upto = max(end, off + work.job[k].piece.ext.comp_bytes)
            if off < start or off > end + GAP_BYTES or upto - start > TOGETHER_BYTES:
                break
            end = upto
            k += 1
        if end - start <= left and k > i + 1 and fetch_run(img, work, i, k, end - start):
            left -= end - start
        else:
            all = False
        i = k
    return all


cdef void give_fetched(q2_work *work) noexcept nogil:
    cdef size_t i
    for i in range(work.n_fetched):
        scratch_give(work.fetched[i].memory, work.fetched[i].nbytes)


# ---- Ahead of who reads on and on ---------------------------------------------------------------

cdef void add_ahead(ImageState img, q2_work *work, uint64_t first_cl, uint32_t n) noexcept nogil:
    cdef uint64_t off = first_cl << img.geo.cluster_bits
    cdef uint64_t end = off + (<uint64_t>n << img.geo.cluster_bits)
    cdef uint64_t miss = 0
    cdef uint8_t nothing = 0
    cdef size_t added = 0
    cdef int32_t i
    cdef q2_plan plan
    cdef q2_job *job
    plan.n = 0
    pthread_rwlock_rdlock(&img.meta)
    if end > q2_load(&img.disk_size):
        end = q2_load(&img.disk_size)
    # What is wrong there is for him to hear who asks for it; so is what would have to be loaded.
    if off < end and plan_range(img, off, end - off, False, &plan, &miss) != Q2_OK:
        plan.n = 0
    pthread_rwlock_unlock(&img.meta)
    for i in range(plan.n):
        if plan.extent[i].kind != Q2_KIND_COMPRESSED or added == MOST_AHEAD:
            continue
        work.ahead[added].ext = plan.extent[i]
        # No byte of it: is it there?
        work.ahead[added].ext.nbytes = 0
        work.ahead[added].out = &nothing
        if is_decoded(img, &work.ahead[added], 1):
            continue
        work.ahead[added].out = NULL
        job = &work.job[work.n]
        job.piece = &work.ahead[added]
        job.n = 1
        job.stream = NULL
        added += 1
        work.n += 1


cdef void follow(ImageState img, q2_work *work, bint pays) noexcept nogil:
    """Adds to the jobs what will be asked for next, if that is known and having it decoded now is
    cheaper: streams are fetched together, or CPUs are idle."""
    cdef const q2_job *last = &work.job[work.n - 1]
    cdef uint64_t first_cl = work.job[0].piece.ext.guest_off >> img.geo.cluster_bits
    cdef uint64_t end_cl = (last.piece[last.n - 1].ext.guest_off >> img.geo.cluster_bits) + 1
    cdef uint32_t most = decoded_most_ahead(img.geo.cluster_size)
    cdef uint32_t ahead
    if img.file.listens or end_cl <= first_cl or work.n > most:
        return
    if not (fetches_cost(img) or (pays and helpers_for(img, most + 1, crew_size() + 1))):
        most = 0
    ahead = decoded_follow(&img.decoded, first_cl, end_cl, most)
    if ahead:
        add_ahead(img, work, end_cl, ahead)


# ---- Together -----------------------------------------------------------------------------------

cdef q2_status do_work(ImageState img, q2_work *work, size_t *failed) noexcept nogil:
    cdef bint pays = sharing_pays(img), all_there = False
    cdef uint64_t at_work, helpers = 0, started = 0, start
    cdef q2_status st
    work.n_fetched = 0
    follow(img, work, pays)
    if fetches_cost(img):
        all_there = fetch_together(img, work)
    at_work = crew_join(1)
    # A Python storage would have to wait for the GIL, and who listens counts the reads in their order.
    if pays and not img.file.listens and (img.data_is_file or all_there):
        helpers = helpers_for(img, work.n, at_work)
    start = now_ns()
    if helpers:
        st = do_together(img, work, helpers, &started, failed)
    else:
        st = do_in_turn(img, work, failed)
    note_time(&img.shared_ns if started else &img.alone_ns, (now_ns() - start) // work.n, 2)
    crew_leave(1)
    give_fetched(work)
    return st


cdef q2_status read_pieces(ImageState img, const q2_piece *piece, size_t n, uint64_t epoch,
                           size_t *failed) noexcept nogil:
    cdef q2_work work
    make_jobs(img, piece, n, &work)
    if work.n == 0:
        return Q2_OK
    work.img = <void *>img
    work.epoch = epoch
    return do_work(img, &work, failed)


cdef q2_status read_compressed(ImageState img, const q2_extent *ext, size_t n, uint8_t *buf,
                               uint64_t epoch) noexcept nogil:
    cdef q2_piece piece[MOST_PIECES]
    cdef size_t i, failed = 0
    for i in range(n):
        piece[i].ext = ext[i]
        piece[i].out = buf + (ext[i].guest_off - ext[0].guest_off)
        piece[i].request = 0
    return read_pieces(img, piece, n, epoch, &failed)
