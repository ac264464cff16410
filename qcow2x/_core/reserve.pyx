# cython: language_level=3
"""Host clusters reserved in runs, guest clusters linked ahead of who writes on and on.

Why nothing but leaks can come of it: a reserved cluster is counted before anything names it. A cluster
that is linked ahead reads as zeros by its mapping and as zeros without it, so it does not matter which
of the two a cut of power leaves; its zeros were durable before its mapping could be.
"""
from libc.stdint cimport int32_t, uint32_t
from libc.string cimport memmove, memset

from qcow2x._core.alloc cimport get_refcount_of, release_unlinked
from qcow2x._core.cache cimport q2_slot
from qcow2x._core.geometry cimport round_up
from qcow2x._core.l2table cimport *
from qcow2x._core.mapping cimport drop_entry, entry_changed, entry_is_ours, find_entry
from qcow2x._core.metadata cimport MISSING_RESERVE, load_slice_committing
from qcow2x._core.state cimport *
from qcow2x._core.status cimport *
from qcow2x._core.sync cimport *

cdef enum:
    # Clusters by which a write may miss the place where its stream was to go on: requests that are in
    # flight together come in any order.
    SLACK = 8
    # Up to this cluster size a scattered 4 KiB write is better off in blocks that were written with
    # zeros (1.03 to 1.12 times a raw file's time, directsync, 64 KiB) than in a hole (1.27 to 1.33).
    WRITTEN_CLUSTER = 64 << 10


cdef void init_growth(ImageState img, int32_t how) noexcept nogil:
    memset(&img.growth, 0, sizeof(q2_growth))
    # An external data file has no clusters to hand out, and zeros of the host are none to a guest
    # whose disk is encrypted.
    img.growth.how = GROWTH_PLAIN if img.geo.external_data or is_encrypted(img) else how
    img.growth.step = clusters_in(img, LEAST_BYTES)
    img.growth.file_end = q2_load(&img.host_size)


# ---- Streams: who goes on where -----------------------------------------------------------------

cdef q2_stream *stream_at(q2_growth *g, uint64_t first_cl) noexcept nogil:
    cdef int32_t i
    for i in range(GROWTH_STREAMS):
        if (g.stream[i].next_cl and first_cl + SLACK >= g.stream[i].next_cl
                and first_cl <= g.stream[i].next_cl + SLACK):
            return &g.stream[i]
    return NULL


cdef void stream_moves(q2_growth *g, q2_stream *stream, uint64_t next_cl,
                       uint64_t window) noexcept nogil:
    cdef uint32_t tries = 0
    if stream is NULL:
        # A place that nobody went on from, if there is one: whoever writes here and there must not
        # drive out who writes on and on.
        while True:
            stream = &g.stream[g.stream_turn]
            g.stream_turn = (g.stream_turn + 1) % GROWTH_STREAMS
            tries += 1
            if stream.window == 0 or tries > <uint32_t>GROWTH_STREAMS:
                break
        stream.next_cl = 0
    # Of requests in flight together the one that is ahead says where the stream goes on.
    if stream.next_cl < next_cl:
        stream.next_cl = next_cl
    stream.window = window


cdef uint64_t next_window(ImageState img, uint64_t window, bint large) noexcept nogil:
    cdef uint64_t most = clusters_in(img, HOLE_BYTES if large else MOST_BYTES)
    if large:
        return most
    window = window * 2 if window else clusters_in(img, LEAST_BYTES)
    return window if window < most else most


cdef uint64_t linkable(ImageState img, uint64_t first_cl, uint64_t most, const uint8_t *at,
                       uint64_t clear_cl) noexcept nogil:
    """meta, exclusive: how many guest clusters from first_cl on, whose entries begin at `at`, are
    empty, on the disk, nobody's in flight, and read as zeros."""
    cdef uint64_t end = round_up(q2_load(&img.disk_size),
                                 img.geo.cluster_size) >> img.geo.cluster_bits
    cdef uint64_t n = 0
    cdef q2_l2e e
    if end > clear_cl:
        end = clear_cl
    if most > 64 * AHEAD_WORDS:
        most = 64 * AHEAD_WORDS
    while n < most and first_cl + n < end:
        e = load_l2e(&img.geo, at + (n << img.geo.l2_entry_bits))
        if e.entry or e.bitmap or overlaps_inflight(img, first_cl + n, 1):
            break
        n += 1
    return n


# ---- Windows: what is linked ahead --------------------------------------------------------------

cdef void mark_used(ImageState img, uint64_t first_cl, uint64_t end_cl) noexcept nogil:
    cdef q2_ahead *a
    cdef uint64_t i, end
    cdef uint32_t k
    for k in range(img.growth.n_ahead):
        a = &img.growth.ahead[k]
        if end_cl <= a.first_cl or first_cl >= a.first_cl + a.n:
            continue
        i = first_cl - a.first_cl if first_cl > a.first_cl else 0
        end = end_cl - a.first_cl if end_cl < a.first_cl + a.n else a.n
        while i < end:
            q2_set_bits(&a.used[i >> 6], <uint64_t>1 << (i & 63))
            i += 1


cdef inline bint is_used(q2_ahead *a, uint64_t i) noexcept nogil:
    return (q2_load(&a.used[i >> 6]) >> (i & 63)) & 1


cdef bint all_used(q2_ahead *a) noexcept nogil:
    cdef uint64_t i
    for i in range(a.n):
        if not is_used(a, i):
            return False
    return True


cdef void forget_window(q2_growth *g, uint32_t k) noexcept nogil:
    g.n_ahead -= 1
    memmove(&g.ahead[k], &g.ahead[k + 1], (g.n_ahead - k) * sizeof(q2_ahead))


cdef q2_status unlink_window(ImageState img, q2_ahead *a, uint64_t *miss) noexcept nogil:
    """meta, exclusive: what was never written to is unmapped again. An entry that is no longer as it
    was linked is another's."""
    cdef uint64_t left = 0, i
    cdef uint8_t *at = NULL
    cdef q2_slot *slot = NULL
    cdef q2_l2e e, none
    cdef q2_status st = find_entry(img, a.first_cl, &slot, &at, &left, miss)
    if st != Q2_OK or slot is NULL:
        return st
    none.entry = none.bitmap = 0
    for i in range(a.n):
        e = load_l2e(&img.geo, at)
        if (not is_used(a, i) and entry_is_ours(img, a.first_cl + i, e) and e.entry == (
                ((a.first_host + i) << img.geo.cluster_bits) | Q2_OFLAG_COPIED)):
            store_l2e(&img.geo, at, none)
            st = entry_changed(img, slot, at)
            if st == Q2_OK:
                st = drop_entry(img, e)
            if st != Q2_OK:
                return st
        at += <uint64_t>1 << img.geo.l2_entry_bits
    return Q2_OK


cdef q2_status make_room(ImageState img, uint64_t *miss) noexcept nogil:
    """meta, exclusive: place for one more window. The oldest goes if all are in use."""
    cdef q2_growth *g = &img.growth
    cdef uint32_t k = 0
    cdef q2_status st
    while k < g.n_ahead:
        if all_used(&g.ahead[k]):
            forget_window(g, k)
        else:
            k += 1
    while g.n_ahead and g.n_ahead + g.promised >= GROWTH_STREAMS:
        st = unlink_window(img, &g.ahead[0], miss)
        if st != Q2_OK:
            return st
        forget_window(g, 0)
    return Q2_OK


cdef void note_ahead(ImageState img, uint64_t first_cl, uint64_t n, uint64_t first_host,
                     bint linked) noexcept nogil:
    cdef q2_ahead *a
    img.growth.promised -= 1
    if linked:
        a = &img.growth.ahead[img.growth.n_ahead]
        memset(a, 0, sizeof(q2_ahead))
        a.first_cl = first_cl
        a.n = n
        a.first_host = first_host
        img.growth.n_ahead += 1


# ---- The reserve --------------------------------------------------------------------------------

cdef inline int32_t best_made(ImageState img, bint in_stream, bint many, bint one_flush,
                              uint64_t nbytes) noexcept nogil:
    # Many that share a flush share its commit of the journal, so that bytes are what counts: 4 KiB each, past
    # the page cache, 66 us of one call instead of 285 with zeros, 373 of 32 threads instead of 433.
    if ((img.growth.how == GROWTH_TOGETHER or one_flush or (many and not in_stream))
            and not (in_stream and nbytes < img.geo.cluster_size)):
        return RESERVE_SET_ASIDE
    if ((img.file.align > 1 or not many) and nbytes <= WRITTEN_AT_MOST
            and (in_stream or img.geo.cluster_size <= WRITTEN_CLUSTER)):
        return RESERVE_WRITTEN
    return RESERVE_HOLE


cdef q2_status take_reserved(ImageState img, uint64_t first_cl, uint64_t n, uint64_t room,
                             const uint8_t *at, uint64_t clear_cl, bint many, bint one_flush,
                             uint64_t nbytes,
                             uint64_t *first, uint64_t *got, uint64_t *ahead,
                             uint64_t *miss) noexcept nogil:
    cdef q2_growth *g = &img.growth
    cdef q2_stream *stream = stream_at(g, first_cl)
    cdef bint large = nbytes > WRITTEN_AT_MOST
    cdef uint64_t window = 0, more = 0
    cdef q2_status st
    got[0] = ahead[0] = 0
    if stream is not NULL:
        window = next_window(img, stream.window, large)
        more = linkable(img, first_cl + n, window if window < room - n else room - n,
                        at + (n << img.geo.l2_entry_bits), clear_cl)
    if g.n == 0:
        if g.filling:
            return Q2_BUSY
        g.ask = max(n + more, clusters_in(img, HOLE_BYTES) if large else 0)
        g.ask_made = best_made(img, stream is not NULL, many, one_flush, nbytes)
        miss[0] = MISSING_RESERVE
        return Q2_MISS
    if more and g.promised + 1 >= GROWTH_STREAMS:
        more = 0            # so many windows are being linked at this moment
    if more:
        st = make_room(img, miss)
        if st != Q2_OK:
            return st
    got[0] = n if n < g.n else g.n
    if more > g.n - got[0]:
        more = g.n - got[0]
    ahead[0] = more
    if more:
        g.promised += 1
    first[0] = g.first
    g.first += got[0] + more
    g.n -= got[0] + more
    stream_moves(g, stream, first_cl + got[0] + more, window)
    return Q2_OK


# ---- The end ------------------------------------------------------------------------------------

cdef q2_status settle_growth(ImageState img) noexcept nogil:
    cdef q2_growth *g = &img.growth
    cdef uint64_t released, miss = 0
    cdef q2_status st = Q2_MISS
    if g.how == GROWTH_PLAIN:
        return Q2_OK
    while st == Q2_MISS:
        st = Q2_OK
        pthread_rwlock_wrlock(&img.meta)
        while g.n_ahead and st == Q2_OK:
            st = unlink_window(img, &g.ahead[g.n_ahead - 1], &miss)
            if st == Q2_OK:
                forget_window(g, g.n_ahead - 1)
        if g.n and st == Q2_OK:
            released = 0
            st = release_unlinked(img, g.first, g.n, &released, &miss)
            g.first += released
            g.n -= released
        memset(g.stream, 0, sizeof(g.stream))
        pthread_rwlock_unlock(&img.meta)
        if st == Q2_MISS:
            st = load_slice_committing(img, miss)
            if st == Q2_OK:
                st = Q2_MISS
    return st


cdef void cut_tail(ImageState img) noexcept nogil:
    cdef uint32_t cbits = img.geo.cluster_bits
    # What was there when the image was opened is not for us to judge.
    cdef uint64_t least = round_up(img.growth.file_end, img.geo.cluster_size) >> cbits
    cdef uint64_t end = q2_load(&img.host_size) >> cbits
    cdef uint64_t was = end, refs = 1, miss = 0, size = 0
    cdef q2_status st
    if img.growth.how == GROWTH_PLAIN or img.file.fixed_size or img.rt is NULL:
        return
    while end > least:
        pthread_rwlock_wrlock(&img.meta)
        st = Q2_OK
        while end > least and st == Q2_OK:
            st = get_refcount_of(img, end - 1, &refs, &miss)
            if st != Q2_OK or refs:
                break
            end -= 1
        pthread_rwlock_unlock(&img.meta)
        if st != Q2_MISS or load_slice_committing(img, miss) != Q2_OK:
            break
    # A file that is longer than that has free clusters at its end, and nothing is wrong with it.
    if end < was and img.file.get_size(&size) == Q2_OK and end << cbits < size:
        img.file.set_size(Q2_SITE_TRUNCATE, end << cbits)
