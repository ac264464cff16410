# cython: language_level=3
"""Guest reads: plan under the shared lock, then do what the plan says without it."""
from libc.stdint cimport int32_t, uint8_t, uint32_t
from libc.string cimport memset

from qcow2x._core.batch cimport (batch_add, batch_begin, batch_end, batch_takes, q2_batch,
                                 q2_wanted)
from qcow2x._core.chain cimport CHAIN_BLOCK_BITS, chain_known, chain_learn
from qcow2x._core.compressed cimport MOST_PIECES, q2_piece, read_compressed, read_pieces
from qcow2x._core.errors cimport last_error, q2_error, set_last_error
from qcow2x._core.mapping cimport plan_one, plan_range
from qcow2x._core.metadata cimport load_slice
from qcow2x._core.plan cimport (Q2_KIND_COMPRESSED, Q2_KIND_DATA, Q2_KIND_UNALLOCATED,
                                Q2_KIND_ZERO, q2_plan)
from qcow2x._core.sectors cimport read_encrypted
from qcow2x._core.state cimport (copies_only, enter_request, has_backing, is_encrypted,
                                 leave_request)
from qcow2x._core.status cimport *
from qcow2x._core.storage cimport FileStorage, Storage, q2_extent, read_from_cache
from qcow2x._core.sync cimport *

cdef inline uint32_t layers_to_pass(ImageState img, uint64_t block) noexcept nogil:
    """How many layers below the image hold nothing of a block, and show what is below them."""
    cdef uint32_t passed = 0
    return passed if chain_known(&img.below, block, &passed) else count_layers(img, block)


cdef uint32_t count_layers(ImageState img, uint64_t block) noexcept nogil:
    cdef uint64_t start = block << CHAIN_BLOCK_BITS
    cdef uint64_t nbytes = <uint64_t>1 << CHAIN_BLOCK_BITS
    cdef uint32_t passed = 0
    cdef q2_extent ext
    # The last one is always asked.
    while passed + 1 < img.below.n:
        # Past its end a layer reads as zeros, whatever is below it.
        if start + nbytes > (<ImageState>img.below.layer[passed]).disk_size:
            break
        if layer_extent(<ImageState>img.below.layer[passed], start, nbytes, &ext) != Q2_OK:
            # Asking it will say what is wrong; it may be well the next time.
            return passed
        if ext.kind != Q2_KIND_UNALLOCATED or ext.nbytes < nbytes:
            break
        passed += 1
    chain_learn(&img.below, block, passed)
    return passed


cdef q2_status read_below(ImageState img, uint8_t *buf, size_t nbytes,
                          uint64_t guest_off) noexcept nogil:
    """What the backing chain shows; zeros past its end. Runs of blocks that one layer is asked for
    are one request."""
    cdef uint64_t end = guest_off + nbytes
    cdef uint64_t upto
    cdef uint32_t passed
    cdef q2_status st = Q2_OK
    if img.below.slot is NULL:
        return img.backing.read_at(Q2_SITE_DATA_READ, buf, nbytes, guest_off)
    while guest_off < end and st == Q2_OK:
        passed = layers_to_pass(img, guest_off >> CHAIN_BLOCK_BITS)
        upto = ((guest_off >> CHAIN_BLOCK_BITS) + 1) << CHAIN_BLOCK_BITS
        while upto < end and layers_to_pass(img, upto >> CHAIN_BLOCK_BITS) == passed:
            upto += <uint64_t>1 << CHAIN_BLOCK_BITS
        if upto > end:
            upto = end
        st = (<Storage>img.below.layer[passed]).read_at(Q2_SITE_DATA_READ, buf,
                                                        upto - guest_off, guest_off)
        buf += upto - guest_off
        guest_off = upto
    return st


cdef q2_status read_extent(ImageState img, const q2_extent *ext, uint8_t *buf,
                           uint64_t epoch) noexcept nogil:
    if ext.kind == Q2_KIND_DATA:
        if is_encrypted(img):
            return read_encrypted(img, Q2_SITE_DATA_READ, buf, ext.nbytes, ext.host_off,
                                  ext.guest_off)
        if img.file.listens and img.data is not img.file:
            img.file.reach(Q2_SITE_DATA_READ)
        return img.data.read_at(Q2_SITE_DATA_READ, buf, ext.nbytes, ext.host_off)
    if ext.kind == Q2_KIND_COMPRESSED:
        return read_compressed(img, ext, 1, buf, epoch)
    if ext.kind == Q2_KIND_UNALLOCATED and has_backing(img):
        if img.file.listens:
            img.file.reach(Q2_SITE_BACKING_READ)
        return read_below(img, buf, ext.nbytes, ext.guest_off)
    memset(buf, 0, ext.nbytes)
    return Q2_OK


cdef q2_status read_plan(ImageState img, const q2_plan *plan, uint8_t *out,
                         uint64_t epoch) noexcept nogil:
    cdef int32_t i = 0, n
    cdef const q2_extent *ext
    cdef uint8_t *at
    cdef q2_status st = Q2_OK
    while i < plan.n and st == Q2_OK:
        ext = &plan.extent[i]
        at = out + (ext.guest_off - plan.extent[0].guest_off)
        n = 1
        if ext.kind == Q2_KIND_COMPRESSED:
            while i + n < plan.n and plan.extent[i + n].kind == Q2_KIND_COMPRESSED:
                n += 1
            st = read_compressed(img, ext, n, at, epoch)
        else:
            st = read_extent(img, ext, at, epoch)
        i += n
    return st


# The part of a host offset's plausibility that another process may change under us: a file that
# grows while we read it. Asked only when a plan ran past the end that we knew.
cdef bint host_grew(ImageState img) noexcept nogil:
    cdef uint64_t now = 0
    cdef uint64_t known = q2_load(&img.host_size)
    if img.file.get_size(&now) != Q2_OK or now <= known:
        return False
    q2_raise_to(&img.host_size, now)
    return True


cdef q2_status plan_next(ImageState img, uint64_t guest_off, uint64_t nbytes, q2_plan *plan,
                         bint *entered, uint32_t *parity) noexcept nogil:
    """One plan that answers at least one byte, loading what it needs; enters the request."""
    cdef uint64_t miss = 0
    cdef q2_status st
    while True:
        pthread_rwlock_rdlock(&img.meta)
        st = Q2_OK
        if not entered[0]:
            st = enter_request(img, parity)
            entered[0] = st == Q2_OK
        if st == Q2_OK:
            st = plan_range(img, guest_off, nbytes, False, plan, &miss)
        pthread_rwlock_unlock(&img.meta)
        if st == Q2_MISS:
            st = load_slice(img, miss)
            if st != Q2_OK:
                return st
            continue
        if st == Q2_E_CORRUPT and img.read_only and host_grew(img):
            continue
        return st


cdef bint read_here_below(ImageState img, void *buf, size_t nbytes,
                          uint64_t guest_off) noexcept nogil:
    """What read_here finds nothing of: zeros, or what the layer has that may have something."""
    cdef uint64_t block = guest_off >> CHAIN_BLOCK_BITS
    cdef uint32_t passed = 0
    if not has_backing(img):
        memset(buf, 0, nbytes)
        return True
    if img.below.slot is not NULL and (
            (guest_off + nbytes - 1) >> CHAIN_BLOCK_BITS != block
            or not chain_known(&img.below, block, &passed)):
        return False
    if ((passed + 1 == img.below.n and not img.below.last_is_image)
            or guest_off + nbytes > q2_load(&(<ImageState>img.below.layer[passed]).disk_size)):
        return False
    return read_here(<ImageState>img.below.layer[passed], buf, nbytes, guest_off)


cdef bint read_here(ImageState img, void *buf, size_t nbytes, uint64_t guest_off) noexcept nogil:
    """The commonest read of all: from the page cache, inside one cluster that is there, here or in a
    layer below. False: it is another, or failed, and is to be made from its start."""
    cdef q2_extent ext
    cdef uint32_t parity = 0
    cdef bint goes
    if not copies_only(img):
        return False
    pthread_rwlock_rdlock(&img.meta)
    goes = (plan_one(img, guest_off, nbytes, &ext)
            and enter_request(img, &parity) == Q2_OK)
    pthread_rwlock_unlock(&img.meta)
    if not goes:
        return False
    if ext.kind == Q2_KIND_DATA:
        goes = read_from_cache(<FileStorage>img.data, buf, nbytes, ext.host_off)
    else:
        goes = read_here_below(img, buf, nbytes, guest_off)
    leave_request(img, parity)
    return goes


cdef q2_status read_guest(ImageState img, void *buf, size_t nbytes,
                          uint64_t guest_off) noexcept nogil:
    cdef q2_plan plan
    cdef uint8_t *out = <uint8_t *>buf
    cdef uint64_t end = guest_off + nbytes
    cdef uint64_t epoch = q2_load(&img.epoch)
    cdef uint32_t parity = 0
    cdef bint entered = False
    cdef q2_status st = Q2_OK
    if nbytes and read_here(img, buf, nbytes, guest_off):
        return Q2_OK
    while guest_off < end and st == Q2_OK:
        st = plan_next(img, guest_off, end - guest_off, &plan, &entered, &parity)
        if st != Q2_OK:
            break
        st = read_plan(img, &plan, out, epoch)
        out += plan.nbytes
        guest_off += plan.nbytes
    if entered:
        leave_request(img, parity)
    return st


cdef q2_status read_many(ImageState img, const q2_wanted *wanted, size_t n,
                         size_t depth) noexcept nogil:
    cdef q2_batch batch
    cdef q2_plan plan
    cdef q2_piece piece[MOST_PIECES]        # of compressed clusters, read when there are as many
    cdef size_t pieces = 0, failed = 0
    cdef q2_error detail
    cdef q2_status of_pieces
    cdef uint8_t *out
    cdef uint64_t pos, end
    cdef uint64_t epoch = q2_load(&img.epoch)
    cdef uint32_t parity = 0
    cdef bint entered = False
    cdef size_t i = 0
    cdef int32_t k
    cdef const q2_extent *ext
    cdef q2_status st = Q2_OK
    batch_begin(img, &batch, n, depth, False)
    while i < n and st == Q2_OK:
        out = <uint8_t *>wanted[i].buf
        pos = wanted[i].guest_off
        end = pos + wanted[i].nbytes
        while pos < end and st == Q2_OK:
            st = plan_next(img, pos, end - pos, &plan, &entered, &parity)
            k = 0
            while st == Q2_OK and k < plan.n:
                ext = &plan.extent[k]
                if ext.kind == Q2_KIND_DATA and batch_takes(img, &batch, out, ext.nbytes,
                                                            ext.host_off):
                    st = batch_add(img, &batch, out, ext.nbytes, ext.host_off, i)
                elif ext.kind == Q2_KIND_COMPRESSED:
                    piece[pieces].ext = ext[0]
                    piece[pieces].out = out
                    piece[pieces].request = i
                    pieces += 1
                else:
                    st = read_extent(img, ext, out, epoch)
                if pieces == MOST_PIECES:
                    pieces = 0
                    failed = i
                    st = read_pieces(img, piece, MOST_PIECES, epoch, &failed)
                    if st != Q2_OK:
                        i = failed
                out += ext.nbytes
                k += 1
            pos += plan.nbytes
        if st == Q2_OK:
            i += 1
    if pieces:
        # Of requests before the one that failed, or of that one's earlier part.
        detail = last_error()
        of_pieces = read_pieces(img, piece, pieces, epoch, &failed)
        if of_pieces != Q2_OK:
            st = of_pieces
            i = failed
        elif st != Q2_OK:
            set_last_error(detail)
    st = batch_end(img, &batch, st, i)
    if entered:
        leave_request(img, parity)
    return st


cdef q2_status read_vmstate(ImageState img, void *buf, size_t nbytes,
                            uint64_t guest_off) noexcept nogil:
    cdef q2_plan plan
    cdef uint8_t *out = <uint8_t *>buf
    cdef uint64_t end = guest_off + nbytes
    cdef uint64_t mapped
    cdef uint64_t epoch = q2_load(&img.epoch)
    cdef uint32_t parity = 0
    cdef bint entered = False
    cdef int32_t i
    cdef q2_status st = Q2_OK
    memset(out, 0, nbytes)
    pthread_rwlock_rdlock(&img.meta)
    mapped = <uint64_t>img.l1_size << (img.geo.cluster_bits + img.geo.l2_bits)
    pthread_rwlock_unlock(&img.meta)
    if end > mapped:
        end = mapped
    while guest_off < end and st == Q2_OK:
        st = plan_next(img, guest_off, end - guest_off, &plan, &entered, &parity)
        if st != Q2_OK:
            break
        for i in range(plan.n):
            # The backing file has a disk there, if anything.
            if plan.extent[i].kind != Q2_KIND_UNALLOCATED and st == Q2_OK:
                st = read_extent(img, &plan.extent[i], out, epoch)
            out += plan.extent[i].nbytes
        guest_off += plan.nbytes
    if entered:
        leave_request(img, parity)
    return st


cdef q2_status layer_extent(ImageState img, uint64_t guest_off, uint64_t nbytes,
                            q2_extent *out) noexcept nogil:
    cdef q2_plan plan
    cdef uint32_t parity = 0
    cdef bint entered = False
    cdef q2_status st = plan_next(img, guest_off, nbytes, &plan, &entered, &parity)
    if st == Q2_OK:
        out[0] = plan.extent[0]
    if entered:
        leave_request(img, parity)
    return st


cdef q2_status guest_extent(ImageState img, uint64_t guest_off, uint64_t nbytes,
                            q2_extent *out) noexcept nogil:
    cdef q2_plan plan
    cdef uint32_t parity = 0
    cdef bint entered = False
    cdef q2_status st = plan_next(img, guest_off, nbytes, &plan, &entered, &parity)
    if st == Q2_OK:
        out[0] = plan.extent[0]
        out.host_off = 0
        if out.kind == Q2_KIND_COMPRESSED:
            out.kind = Q2_KIND_DATA
        elif out.kind == Q2_KIND_UNALLOCATED:
            out.kind = Q2_KIND_ZERO
            if has_backing(img) and guest_off < img.backing_size:
                if out.nbytes > img.backing_size - guest_off:
                    out.nbytes = img.backing_size - guest_off
                nbytes = out.nbytes
                st = img.backing.extent_at(guest_off, nbytes, out)
                out.host_off = 0
                if out.kind == Q2_KIND_UNALLOCATED:
                    out.kind = Q2_KIND_ZERO
    if entered:
        leave_request(img, parity)
    return st


cdef q2_status reads_as_zero(ImageState img, uint64_t guest_off, uint64_t nbytes,
                             bint *zero) noexcept nogil:
    cdef q2_extent ext
    cdef uint64_t end = guest_off + nbytes
    cdef q2_status st
    zero[0] = True
    while guest_off < end:
        st = guest_extent(img, guest_off, end - guest_off, &ext)
        if st != Q2_OK:
            return st
        if ext.kind != Q2_KIND_ZERO:
            zero[0] = False
            return Q2_OK
        guest_off += ext.nbytes
    return Q2_OK
