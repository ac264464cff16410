# cython: language_level=3
"""The entry points of an open image: arguments checked at the door, the GIL released once, a status
turned into an exception at the end."""
from cpython.buffer cimport (PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer)
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stddef cimport size_t
from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy, memset
from posix.time cimport nanosleep, timespec
from posix.uio cimport iovec

from qcow2x._core.amend cimport change_refcount_width
from qcow2x._core.batch cimport MOST_UNDER_WAY
from qcow2x._core.bitmapdir cimport Marks
from qcow2x._core.cache cimport RANK_L2, RANK_REFBLOCK, cache_forget_all, cache_init, least_bytes
from qcow2x._core.chain cimport chain_init
from qcow2x._core.codec cimport CODEC_LEVEL_DEFAULT, encode_cluster
from qcow2x._core.condensed cimport condensed_bytes, condensed_init
from qcow2x._core.crypto cimport SectorCipher
from qcow2x._core.discard cimport discard_guest, unmap_guest, zero_guest
from qcow2x._core.door cimport door_length, door_offset
from qcow2x._core.edges cimport *
from qcow2x._core.errors cimport check_status, fail, last_error, set_last_error
from qcow2x._core.flush cimport (flush_closing, flush_if_metadata_changed, flush_image,
                                 settle_refcounts)
from qcow2x._core.geometry cimport l1_entries_for, set_geometry
from qcow2x._core.header cimport Header
from qcow2x._core.manybuffers cimport ManyBuffers
from qcow2x._core.manywrites cimport write_many
from qcow2x._core.mapping cimport plan_range
from qcow2x._core.metadata cimport load_slice, mark_corrupt
from qcow2x._core.overlap cimport *
from qcow2x._core.plan cimport q2_plan
from qcow2x._core.read cimport guest_extent, read_guest, read_many
from qcow2x._core.reserve cimport GROWTH_AHEAD, GROWTH_PLAIN, GROWTH_TOGETHER, init_growth
from qcow2x._core.resize cimport resize_guest
from qcow2x._core.scratch cimport scratch_give, scratch_take
from qcow2x._core.snapshot cimport (apply_snapshot, create_snapshot, delete_snapshot, q2_old_table,
                                    q2_table, release_clusters, reserve_clusters)
from qcow2x._core.marks cimport q2_marks
from qcow2x._core.state cimport (begin_request, drain_requests, freeze, is_encrypted,
                                 leave_request, leave_to_parent, may_write,
                                 poison_unless_full, refuse_closed, refuse_unguarded, runs_clear, thaw, wake_bitmaps)
from qcow2x._core.status cimport *
from qcow2x._core.storage cimport (WRITE_DEFERRED, WRITE_FUA, ZERO_MAY_UNMAP, FileStorage, Storage,
                                   q2_extent)
from qcow2x._core.sync cimport *
from qcow2x._core.vmstate cimport load_vmstate, save_vmstate, vmstate_at
from qcow2x._core.wire cimport (Q2_AUTOCLEAR_BITMAPS, Q2_AUTOCLEAR_RAW_DATA, Q2_HDR_AUTOCLEAR,
                                Q2_MAX_L1_BYTES, q2_load_be64, q2_store_be64)
from qcow2x._core.write cimport allocate_guest, write_encoded, write_guest
from qcow2x.errors import CorruptImage

#: Default bound of the L2 cache in bytes: covers 256 GiB at 64 KiB clusters, as QEMU's does.
DEFAULT_L2_CACHE = 32 << 20
cdef uint64_t MAX_LUKS_BYTES = 4 << 20
#: What overlap_check= may say; see overlap.pxd.
GUARDS = {"none": GUARD_NONE, "constant": GUARD_CONSTANT, "cached": GUARD_CACHED, "all": GUARD_ALL}


#: What growth= may say; see reserve.pxd.
GROWTHS = {"auto": GROWTH_PLAIN, "plain": GROWTH_PLAIN, "together": GROWTH_TOGETHER,
           "ahead": GROWTH_AHEAD}

#: What is written, for ``_write_meta``.
SITE_L1_UPDATE = Q2_SITE_L1_UPDATE
SITE_L2_UPDATE = Q2_SITE_L2_UPDATE
SITE_EMPTY_IMAGE = Q2_SITE_EMPTY_IMAGE
SITE_REFBLOCK_ALLOC = Q2_SITE_REFBLOCK_ALLOC
SITE_REFBLOCK_UPDATE = Q2_SITE_REFBLOCK_UPDATE
SITE_REFTABLE_UPDATE = Q2_SITE_REFTABLE_UPDATE


cdef size_t door_depth(depth) except 0:
    if not 1 <= depth <= MOST_UNDER_WAY:
        raise ValueError(f"depth must be between 1 and {MOST_UNDER_WAY}, not {depth}")
    return depth


cdef class CoreImage(ImageState):
    """An open qcow2 image: positional reads and writes of the guest disk.

    Any number of threads may use one image at once; no call moves a cursor, and the GIL is not
    held while data or metadata is read, written, compressed or decompressed. Offsets and lengths
    are bytes. After close() every call raises ValueError.
    """

    def __init__(self, Storage file not None, Header header not None, *, Storage backing=None,
                 Storage data=None, SectorCipher cipher=None, l2_cache_size=None,
                 bint writable=False, bint discard_to_host=True, str overlap_check="cached",
                 bint lazy_refcounts=False, str growth="auto"):
        cdef q2_status st
        self.file = file
        self.data = file if data is None else data
        self.data_is_file = type(self.data) is FileStorage
        self.header = header
        self.cipher = cipher
        self.name = file.name
        self.read_only = not writable
        self.durable = file.durable_writes
        self.discard_to_host = discard_to_host
        self.lazy_refcounts = lazy_refcounts and writable and header.fields.version >= 3
        self.zero_past_end = True
        self.align = 1
        set_geometry(&self.geo, header.fields.version, header.fields.cluster_bits,
                     header.fields.refcount_order, header.extended_l2)
        self.geo.external_data = data is not None
        self.raw_data = data is not None and header.data_file_raw
        self.disk_size = header.fields.size
        if overlap_check not in GUARDS:
            raise ValueError(f"overlap_check must be one of {', '.join(GUARDS)}")
        self.guard_level = GUARDS[overlap_check] if writable else GUARD_NONE
        if l2_cache_size is None:
            l2_cache_size = DEFAULT_L2_CACHE
        if not 0 < l2_cache_size < 1 << 40:
            raise ValueError("l2_cache_size must be between 1 byte and 1 TiB")
        with nogil:
            st = self.file.get_size(&self.host_size)
        check_status(st, self.name)
        self.rt_offset = header.fields.rt_offset
        self.rt_entries = (<uint64_t>header.fields.rt_clusters << self.geo.cluster_bits) >> 3
        self._load_l1()
        self._init_caches(l2_cache_size)
        check_status(guard_image(self), self.name)
        self._guard_luks_header()
        self._set_backing(backing)
        if growth not in GROWTHS:
            raise ValueError(f"growth must be one of {', '.join(GROWTHS)}")
        how = GROWTHS[growth] if writable else GROWTH_PLAIN
        if growth == "auto" and writable:
            if self.durable:
                how = GROWTH_AHEAD
            elif self.file.align > 1 and not self.file.fixed_size:
                # Past the page cache. A device has no blocks to hand out.
                how = GROWTH_TOGETHER
        init_growth(self, how)
        with nogil:
            st = self.file.read_at(Q2_SITE_HEADER_READ, self.head, 512, 0)
        check_status(st, self.name)

    cdef _load_l1(self):
        cdef uint64_t entries = self.header.fields.l1_size
        # A snapshot's table may be shorter than its disk; what it lacks is not allocated.
        cdef uint64_t needed = l1_entries_for(&self.geo, self.disk_size)
        cdef uint64_t i
        cdef q2_status st
        self.l1_size = <uint32_t>entries
        self.l1_offset = self.header.fields.l1_offset
        if needed * 8 > Q2_MAX_L1_BYTES:
            check_status(fail(Q2_E_CORRUPT, Q2_SITE_L1_READ, self.l1_offset,
                              b"the disk is larger than any L1 table can map"), self.name)
        self.l1 = <uint64_t *>calloc((needed if needed > entries else entries) + 1, 8)
        self.l1_dirty = <uint8_t *>calloc(((entries * 8) >> 9) + 1, 1)
        if self.l1 is NULL or self.l1_dirty is NULL:
            raise MemoryError(f"{self.name}: no memory for an L1 table of {entries} entries")
        with nogil:
            st = self.file.read_at(Q2_SITE_L1_READ, self.l1, entries * 8, self.l1_offset)
            for i in range(entries):
                self.l1[i] = q2_load_be64(&self.l1[i])
        check_status(st, self.name)

    cdef _guard_luks_header(self):
        place = self.header.crypto_header
        if place is not None:
            # Eight slots of the longest keys end at 2 MiB; a header may claim all of the file.
            check_status(guard_table(self, HOLDS_FIXED, place[0], min(place[1], MAX_LUKS_BYTES)),
                         self.name)

    cdef _init_caches(self, uint64_t l2_bytes):
        # No larger than all there is to cache.
        cdef uint64_t all_l2 = <uint64_t>self.l1_size << self.geo.cluster_bits
        cdef uint64_t refcount_bytes
        cdef uint64_t condensed = 0
        if l2_bytes > all_l2 and self.l1_size and self.read_only:
            l2_bytes = all_l2
        # A refcount slice speaks for at least as many clusters as an L2 slice of 8-byte entries
        # does in all common widths, and allocation is local: a quarter is plenty.
        # But those of the longest L1 table (32 MiB in 512-byte clusters, 64-bit refcounts) must fit.
        refcount_bytes = max(l2_bytes // 4, <uint64_t>1 << 20)
        if l2_bytes < all_l2:
            # 16 bytes for a slice of 4 KiB, and as much air: records of sixteen times what all of the
            # cache could hold. 8 MiB serve a disk of 1 TiB that was filled in order.
            condensed = max(l2_bytes, least_bytes(self.geo.slice_bits)) // 8
        check_status(cache_init(&self.l2, RANK_L2, self.geo.slice_bits,
                                l2_bytes - min(condensed, l2_bytes)), self.name)
        if condensed:
            check_status(condensed_init(&self.l2.condensed, condensed, self.geo.slice_bits,
                                        self.geo.l2_entry_bits, self.geo.cluster_bits), self.name)
        check_status(cache_init(&self.refblocks, RANK_REFBLOCK, self.geo.slice_bits,
                                refcount_bytes), self.name)

    cdef _set_backing(self, Storage backing):
        cdef q2_status st
        self.backing = backing
        if backing is not None:
            with nogil:
                st = self.backing.get_size(&self.backing_size)
            check_status(st, backing.name)
            self._map_chain()

    cdef _map_chain(self):
        """Lists the layers below, down to the first that must always be asked."""
        cdef list layers = []
        cdef Storage layer = self.backing
        cdef Py_ssize_t i
        while layer is not None:
            layers.append(layer)
            if (not isinstance(layer, CoreImage) or not layer.read_only
                    or (<CoreImage>layer).file.listens):
                break
            layer = (<CoreImage>layer).backing
        cdef void **listed = <void **>calloc(len(layers), sizeof(void *))
        if listed is NULL:
            raise MemoryError(f"{self.name}: no memory for a list of its layers")
        for i in range(len(layers)):
            listed[i] = <void *>layers[i]
        self.below.last_is_image = isinstance(layers[len(layers) - 1], CoreImage)
        check_status(chain_init(&self.below, listed, <uint32_t>len(layers), self.disk_size),
                     self.name)

    # ---- Reading --------------------------------------------------------------------------------

    def pread(self, length, offset):
        """Up to ``length`` bytes from ``offset``; fewer only at the end of the disk.

        Raises ValueError for negative arguments, CorruptImage for metadata or compressed data that
        is damaged, StorageError where the file cannot be read.
        """
        cdef uint64_t off = door_offset(offset)
        cdef size_t n = self._until_end(door_length(length), off)
        cdef bytes data = PyBytes_FromStringAndSize(NULL, n)
        cdef char *out = PyBytes_AS_STRING(data)
        cdef q2_status st
        with nogil:
            st = read_guest(self, out, n, off)
        if st != Q2_OK:
            self._raise(st)
        return data

    def preadinto(self, buffer, offset):
        """Fills ``buffer`` with the bytes from ``offset``; returns how many, fewer than its length
        only at the end of the disk. Errors as :meth:`pread`."""
        cdef uint64_t off = door_offset(offset)
        cdef Py_buffer view
        cdef size_t n
        cdef q2_status st
        PyObject_GetBuffer(buffer, &view, PyBUF_WRITABLE)
        n = self._until_end(view.len, off)
        with nogil:
            st = read_guest(self, view.buf, n, off)
        PyBuffer_Release(&view)
        if st != Q2_OK:
            self._raise(st)
        return n

    def preadv_many(self, requests, *, depth=MOST_UNDER_WAY):
        """Serves many reads in one call: ``requests`` is a sequence of ``(buffer, offset)``.

        Returns a list with the bytes read of each, as :meth:`preadinto` would. Reads of the image's
        file are under way together, at most ``depth`` of them (1 to 64) at once, by io_uring or, where
        the kernel does not let us, by threads: an O_DIRECT image gains most, and more from one call
        with hundreds of requests than from many calls. They are made in the order of their places on the host. The first failure in their order raises; what the other
        buffers then hold is not said. Buffers must not overlap.
        """
        cdef size_t under_way = door_depth(depth)
        cdef ManyBuffers many = ManyBuffers(self.name, requests, PyBUF_WRITABLE)
        cdef size_t i
        cdef q2_status st = self._open_status()
        for i in range(many.n):
            many.wanted[i].nbytes = self._until_end(many.wanted[i].nbytes, many.wanted[i].guest_off)
        if st == Q2_OK:
            with nogil:
                st = read_many(self, many.wanted, many.n, under_way)
        if st != Q2_OK:
            self._raise(st)
        return many.lengths()

    # ---- Writing --------------------------------------------------------------------------------

    def pwrite(self, data, offset, *, bint fua=False):
        """Writes all of ``data`` at ``offset``; returns its length.

        Durable at return with ``fua`` or in the cache modes writethrough and directsync, else after
        :meth:`flush`. Raises ValueError outside the disk, PermissionError on a read-only image,
        NoSpace (retryable), StorageError, ImageBroken.
        """
        cdef uint64_t off = door_offset(offset)
        cdef Py_buffer view
        cdef q2_status st
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        st = self._inside(off, view.len)
        if st == Q2_OK:
            with nogil:
                st = write_guest(self, view.buf, view.len, off, fua)
        cdef Py_ssize_t n = view.len
        PyBuffer_Release(&view)
        if st != Q2_OK:
            self._raise(st)
        return n

    def pwritev_many(self, requests, *, bint fua=False, depth=MOST_UNDER_WAY):
        """Serves many writes in one call: ``requests`` is a sequence of ``(data, offset)``.

        Returns a list with the length of each. What goes past the page cache into the image's file as it is,
        is under way together, at most ``depth`` of it (1 to 64) at once, by io_uring or, where the kernel
        does not let us, by threads. Durable as :meth:`pwrite` says, by one flush for all; if that fails the
        image is broken, as after a failed :meth:`flush`. Raises what :meth:`pwrite`
        raises, ValueError before anything is written; of other failures the first in their order, and
        what of the others was written is not said. The ranges must not overlap.
        """
        cdef size_t under_way = door_depth(depth)
        cdef ManyBuffers many = ManyBuffers(self.name, requests, PyBUF_SIMPLE)
        cdef size_t i
        cdef q2_status st = self._open_status()
        for i in range(many.n):
            if st == Q2_OK:
                st = self._inside(many.wanted[i].guest_off, many.wanted[i].nbytes)
        if st == Q2_OK and many.n:
            with nogil:
                st = write_many(self, many.wanted, many.n, under_way, fua)
        if st != Q2_OK:
            self._raise(st)
        return many.lengths()

    def pwrite_compressed(self, data, offset, *, level=None):
        """Writes whole clusters compressed; returns the number of bytes taken.

        ``offset`` must be cluster aligned and the length whole clusters, or up to the disk's end.
        Replaces whatever was there. A cluster that does not become smaller is written as it is.
        ``level``: see :func:`qcow2x.convert`. Errors as :meth:`pwrite`.
        """
        cdef uint64_t off = door_offset(offset)
        cdef int32_t lvl = CODEC_LEVEL_DEFAULT if level is None else level
        cdef Py_buffer view
        cdef q2_status st
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        cdef Py_ssize_t n = view.len
        st = self._takes_compressed(off)
        if st == Q2_OK:
            st = self._inside(off, n)
        if st == Q2_OK and (off & (self.geo.cluster_size - 1) or (
                n & (self.geo.cluster_size - 1) and off + n != q2_load(&self.disk_size))):
            st = fail(Q2_E_RANGE, Q2_SITE_NONE, off,
                      b"compressed writes take whole clusters at a cluster boundary")
        if st == Q2_OK:
            with nogil:
                st = self._write_compressed(<const uint8_t *>view.buf, n, off, lvl)
        PyBuffer_Release(&view)
        self._raise(st)
        return n

    cdef q2_status _write_compressed(self, const uint8_t *data, uint64_t nbytes, uint64_t off,
                                     int32_t level) noexcept nogil:
        cdef uint64_t size = self.geo.cluster_size
        cdef uint64_t done = 0, n
        # The encoded cluster in front; a last, short cluster padded with zeros behind it.
        cdef uint8_t *scratch = <uint8_t *>scratch_take(2 * size)
        cdef const uint8_t *cluster
        cdef size_t encoded = 0
        cdef q2_status st = Q2_OK
        if scratch is NULL:
            return fail(Q2_E_NOMEM, Q2_SITE_COMPRESSED_WRITE, off, b"out of memory")
        while done < nbytes and st == Q2_OK:
            n = nbytes - done if nbytes - done < size else size
            cluster = data + done
            if n < size:
                memcpy(scratch + size, cluster, n)
                memset(scratch + size + n, 0, size - n)
                cluster = scratch + size
            st = encode_cluster(self.header.fields.compression_type, level, cluster, size,
                                scratch, size - 1, &encoded)
            if st == Q2_OK:
                st = write_encoded(self, scratch, <uint32_t>encoded, off + done)
            elif st == Q2_INCOMPRESSIBLE:
                st = write_guest(self, data + done, n, off + done, False)
            done += n
        scratch_give(scratch, 2 * size)
        if st == Q2_OK and self.durable:
            st = flush_if_metadata_changed(self)
        return st

    def write_compressed_batch(self, packed, sizes, raw, offset):
        """Stores clusters that were encoded elsewhere, in order, from guest ``offset`` on.

        ``packed`` holds the encoded clusters one after another, ``sizes`` (unsigned 32-bit, one per
        cluster) their lengths; 0 takes the cluster's bytes from ``raw`` as they are, 0xffffffff
        skips it. ``raw`` is what was encoded: whole clusters, or up to the disk's end. Errors as
        :meth:`pwrite`.
        """
        cdef uint64_t off = door_offset(offset)
        cdef const uint8_t[::1] streams = packed
        cdef const uint32_t[::1] lengths = sizes
        cdef const uint8_t[::1] plain = raw
        cdef uint64_t size = self.geo.cluster_size
        cdef uint64_t total = 0, i
        cdef uint64_t clusters = lengths.shape[0]
        cdef q2_status st = self._takes_compressed(off)
        if st == Q2_OK:
            st = self._inside(off, plain.shape[0])
        for i in range(clusters):
            if lengths[i] != BATCH_SKIP:
                if lengths[i] >= size:
                    raise ValueError("an encoded cluster is not smaller than a cluster")
                total += lengths[i]
        if (st == Q2_OK and (off & (size - 1) or total > <uint64_t>streams.shape[0]
                             or clusters != (plain.shape[0] + size - 1) // size)):
            raise ValueError("packed, sizes and raw do not describe the same clusters")
        if st == Q2_OK and clusters:
            with nogil:
                st = self._write_batch(&streams[0] if streams.shape[0] else NULL, &lengths[0],
                                       clusters, &plain[0], plain.shape[0], off)
        self._raise(st)

    cdef q2_status _write_batch(self, const uint8_t *stream, const uint32_t *lengths,
                                uint64_t clusters, const uint8_t *plain, uint64_t plain_bytes,
                                uint64_t off) noexcept nogil:
        cdef uint64_t size = self.geo.cluster_size
        cdef uint64_t i, at, n
        cdef q2_status st = Q2_OK
        for i in range(clusters):
            at = i * size
            if lengths[i] == BATCH_SKIP:
                continue
            if lengths[i] == 0:
                n = plain_bytes - at if plain_bytes - at < size else size
                st = write_guest(self, plain + at, n, off + at, False)
            else:
                st = write_encoded(self, stream, lengths[i], off + at)
                stream += lengths[i]
            if st != Q2_OK:
                return st
        return flush_if_metadata_changed(self) if self.durable else Q2_OK

    def write_zeroes(self, offset, length, *, bint unmap=False, bint fua=False):
        """Makes the range read as zeros, by metadata alone for whole clusters (subclusters with
        extended L2 entries). With ``unmap`` their host clusters are given back, else kept for the
        next write. Errors as :meth:`pwrite`."""
        cdef uint64_t off = door_offset(offset)
        cdef uint64_t n = door_length(length)
        cdef q2_status st = self._inside(off, n)
        if st == Q2_OK:
            with nogil:
                st = zero_guest(self, off, n, unmap, fua)
        self._raise(st)

    def discard(self, offset, length):
        """Says that the range is not needed any more.

        Whole clusters of it (the disk's end completes one) read as zeros afterwards and their host
        space is given back after the next flush; the rest keeps its bytes, and so does everything
        on a version 2 image with a backing file. Errors as :meth:`pwrite`.
        """
        cdef uint64_t off = door_offset(offset)
        cdef uint64_t n = door_length(length)
        cdef q2_status st = self._inside(off, n)
        if st == Q2_OK:
            with nogil:
                st = discard_guest(self, off, n)
        self._raise(st)

    def flush(self):
        """Everything that was written before is durable when this returns. Threads that flush at
        the same time share one sync. Raises StorageError; the image then takes no more writes."""
        cdef q2_status st = self._flush()
        if st == Q2_E_BROKEN and self.half_done:
            # Only room was lacking, and there may be some now. (A method of the Image.)
            self._finish_half_done()
            st = self._flush()
        check_status(st, self.name)

    cdef q2_status _flush(self):
        cdef q2_status st = self._open_status()
        if st == Q2_OK and not self.read_only:
            with nogil:
                st = flush_image(self)
        return st

    # ---- The state of a machine, behind the disk -------------------------------------------------

    @property
    def vmstate_offset(self):
        """Where the state of a machine begins: the first guest offset whose L1 entry the disk does
        not need. (It counts from 0 in the methods that read and write it.)"""
        return vmstate_at(self)

    def vmstate_preadinto(self, buffer, offset):
        """Fills ``buffer`` with a machine's state from ``offset`` on; what was never written is
        zeros. Returns the buffer's length. Raises UnsupportedFeature with an external data file,
        else errors as :meth:`pread`."""
        cdef uint64_t off = door_offset(offset)
        cdef Py_buffer view
        cdef q2_status st
        PyObject_GetBuffer(buffer, &view, PyBUF_WRITABLE)
        with nogil:
            st = load_vmstate(self, view.buf, view.len, off)
        cdef Py_ssize_t n = view.len
        PyBuffer_Release(&view)
        check_status(st, self.name)
        return n

    def _vmstate_write(self, data, offset):
        """What Image.vmstate_pwrite does alone: the L1 table reaches as far, then whole clusters."""
        cdef uint64_t off = door_offset(offset)
        cdef Py_buffer view
        cdef q2_status st
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        with nogil:
            st = save_vmstate(self, view.buf, view.len, off)
        PyBuffer_Release(&view)
        self._raise(st)

    def _resize(self, size):
        """Sets the disk's size; policy (shrinking, preallocation) is the caller's."""
        cdef uint64_t n = door_offset(size)
        cdef q2_status st
        check_status(self._open_status(), self.name)
        with nogil:
            st = resize_guest(self, n)
        self._raise(st)

    def _allocate(self, offset, length):
        """Gives every cluster of the range a host cluster that reads as zeros."""
        cdef uint64_t off = door_offset(offset)
        cdef uint64_t n = door_length(length)
        cdef q2_status st = self._inside(off, n)
        if st == Q2_OK and n:
            with nogil:
                st = allocate_guest(self, off, n)
        self._raise(st)

    def _clear_autoclear(self, bint bitmaps=False):
        """Autoclear features promise what a writer keeps up to date; those not kept here end with
        the first writer (section "Header", autoclear_features). ``bitmaps``: those are kept."""
        cdef uint64_t kept = Q2_AUTOCLEAR_RAW_DATA if self.raw_data else 0
        cdef q2_status st
        if bitmaps:
            kept |= Q2_AUTOCLEAR_BITMAPS
        if self.geo.version < 3 or self.header.fields.autoclear & ~kept == 0:
            return
        kept &= self.header.fields.autoclear
        with nogil:
            q2_store_be64(self.head + Q2_HDR_AUTOCLEAR, kept)
            st = self.file.write_at(Q2_SITE_HEADER_UPDATE, self.head, 512, 0, WRITE_DEFERRED)
            if st == Q2_OK and q2_keeps(Q2_EDGE_AUTOCLEAR_BEFORE_WRITE):
                # Edge: cleared before anything is written that would make the promise false.
                st = self.file.sync(Q2_SITE_BARRIER)
        check_status(st, self.name)
        self.header.fields.autoclear = kept

    def _settle_refcounts(self, lazy=None):
        """Everything is durable, refcounts too, and the dirty bit that lazy ones need is cleared.
        ``lazy`` says how they are kept from now on; None: as before."""
        cdef q2_status st
        cdef bint keep = self.lazy_refcounts if lazy is None else lazy
        with nogil:
            st = may_write(self)
            if st == Q2_OK:
                pthread_mutex_lock(&self.commit)
                st = settle_refcounts(self)
                if st == Q2_OK:
                    pthread_rwlock_wrlock(&self.meta)
                    self.lazy_refcounts = keep
                    pthread_rwlock_unlock(&self.meta)
                pthread_mutex_unlock(&self.commit)
        check_status(st, self.name)

    def _reload(self, Header header not None):
        """After a repair changed tables in the file: what is in memory is read again, or forgotten
        until it is needed. Nothing else may be under way or waiting to be written. What snapshots
        hold is then no longer guarded."""
        cdef uint64_t entries = header.fields.l1_size
        cdef uint64_t *l1 = <uint64_t *>calloc(entries + 1, 8)
        cdef uint8_t *dirty = <uint8_t *>calloc((entries * 8 >> 9) + 1, 1)
        cdef uint64_t *rt = NULL
        cdef uint64_t i, host_size = 0
        cdef uint8_t head[512]
        cdef q2_status st = Q2_OK
        if l1 is NULL or dirty is NULL:
            st = fail(Q2_E_NOMEM, Q2_SITE_L1_READ, 0, b"no memory for the L1 table")
        with nogil:
            if st == Q2_OK:
                st = self.file.read_at(Q2_SITE_L1_READ, l1, entries * 8, header.fields.l1_offset)
            if st == Q2_OK:
                st = self.file.read_at(Q2_SITE_HEADER_READ, head, 512, 0)
            if st == Q2_OK:
                st = self.file.get_size(&host_size)
            if st == Q2_OK:
                for i in range(entries):
                    l1[i] = q2_load_be64(&l1[i])
                pthread_mutex_lock(&self.commit)
                pthread_rwlock_wrlock(&self.meta)
                self.l1, l1 = l1, self.l1
                self.l1_dirty, dirty = dirty, self.l1_dirty
                self.l1_is_dirty = False
                self.l1_size = <uint32_t>entries
                q2_store(&self.disk_size, header.fields.size)
                self.rt, rt = rt, self.rt
                self.rt_entries = (<uint64_t>header.fields.rt_clusters
                                   << self.geo.cluster_bits) >> 3
                self.rt_offset = header.fields.rt_offset
                self.l1_offset = header.fields.l1_offset
                self.header.fields = header.fields
                memcpy(self.head, head, 512)
                q2_store(&self.host_size, host_size)
                cache_forget_all(&self.l2)
                cache_forget_all(&self.refblocks)
                self.free_hint = 0
                self.run_from = 0
                self.packed_end = 0
                # The same parity, but what was decoded before is of no use.
                q2_store(&self.epoch, self.epoch + 2)
                guard_forget(self)
                st = guard_image(self)
                pthread_rwlock_unlock(&self.meta)
                pthread_mutex_unlock(&self.commit)
        free(l1)
        free(dirty)
        free(rt)
        check_status(st, self.name)
        self.header.extensions = header.extensions

    @property
    def _half_done(self):
        """A snapshot's step lacked room in the middle, and refcounts are to be made anew."""
        return self.half_done

    def _revive(self):
        """They have been, and what is in memory was read again: writes may go on."""
        with nogil:
            pthread_rwlock_wrlock(&self.meta)
            # The new refcounts call free what waited to become that.
            runs_clear(&self.dropped)
            runs_clear(&self.limbo[0])
            runs_clear(&self.limbo[1])
            pthread_rwlock_unlock(&self.meta)
            # Who still reads by an old mapping must not meet what is written from now on.
            drain_requests(self)
            self.half_done = False
            q2_store(&self.broken, 0)

    # ---- Internal snapshots: the tables are made by qcow2x/snapshot.py ---------------------------

    def _reserve(self, nbytes):
        """Host offset of whole clusters for nbytes, reserved durably; 0 for none."""
        cdef uint64_t n = (door_length(nbytes) + self.geo.cluster_size - 1
                           ) >> self.geo.cluster_bits
        cdef uint64_t host_off = 0
        cdef q2_status st = Q2_OK
        if n:
            with nogil:
                st = reserve_clusters(self, n, &host_off)
        self._raise(st)
        return host_off

    def _unreserve(self, host_off, nbytes):
        """Gives back what _reserve returned for as many bytes."""
        cdef uint64_t off = host_off
        cdef uint64_t n = (door_length(nbytes) + self.geo.cluster_size - 1
                           ) >> self.geo.cluster_bits
        cdef q2_status st = Q2_OK
        if n:
            with nogil:
                st = release_clusters(self, off, n)
        check_status(st, self.name)

    def _snapshot_create(self, l1_copy_off, bytes table, table_off, count, old):
        cdef q2_table new_table = published(table, table_off, count)
        cdef q2_old_table old_table = q2_old_table(old[0], old[1])
        cdef uint64_t off = l1_copy_off
        cdef q2_status st
        with nogil:
            st = create_snapshot(self, off, &new_table, &old_table)
        check_status(st, self.name)

    def _snapshot_delete(self, l1_off, l1_size, bytes table, table_off, count, old):
        cdef q2_table new_table = published(table, table_off, count)
        cdef q2_old_table old_table = q2_old_table(old[0], old[1])
        cdef uint64_t off = l1_off
        cdef uint32_t n = l1_size
        cdef q2_status st
        with nogil:
            st = delete_snapshot(self, off, n, &new_table, &old_table)
        check_status(st, self.name)

    def _snapshot_apply(self, l1_off, l1_size, new_l1_off, new_l1_size, disk_size):
        cdef uint64_t off = l1_off
        cdef uint32_t n = l1_size
        cdef uint64_t new_off = new_l1_off
        cdef uint32_t new_n = new_l1_size
        cdef uint64_t size = disk_size
        cdef q2_status st
        with nogil:
            st = apply_snapshot(self, off, n, new_off, new_n, size)
        check_status(st, self.name)

    cdef int _raise(self, q2_status st) except -1:
        """check_status for what reads and writes: damage that no write may follow marks an image
        that is open for writing."""
        cdef q2_error refused
        if st == Q2_E_CORRUPT and not self.read_only:
            refused = last_error()
            with nogil:
                mark_corrupt(self)
            set_last_error(refused)
            try:
                check_status(st, self.name)
            except CorruptImage as exc:
                exc.marked = self.header.corrupt
                raise
        return check_status(st, self.name)

    def _guard(self, holds, host_off, nbytes):
        """Tables that the core does not look for itself: HOLDS of overlap.pxd."""
        cdef uint32_t what = holds
        cdef uint64_t off = host_off
        cdef uint64_t n = nbytes
        cdef q2_status st
        with nogil:
            pthread_rwlock_wrlock(&self.meta)
            st = guard_table(self, what, off, n)
            pthread_rwlock_unlock(&self.meta)
        check_status(st, self.name)

    def _refuse_writes(self, number):
        """No write is let through from now on; ``number`` is the errno that says why."""
        self.refused = number

    # ---- Amending: what qcow2x/ops/amend.py asks for ---------------------------------------------

    def _change_refcount_width(self, order):
        cdef uint32_t n = order
        cdef q2_status st
        with nogil:
            st = change_refcount_width(self, n)
        check_status(st, self.name)

    def _unmap(self, offset, length):
        cdef uint64_t off = door_offset(offset)
        cdef uint64_t n = door_length(length)
        cdef q2_status st = self._inside(off, n)
        if st == Q2_OK:
            with nogil:
                st = unmap_guest(self, off, n)
        self._raise(st)

    def _rewrite_header(self):
        """The whole header cluster as the Header object now says it, durably. Nothing may write
        meanwhile."""
        cdef bytes encoded = self.header.encode()
        cdef const char *cluster = PyBytes_AS_STRING(encoded)
        cdef uint64_t nbytes = len(encoded)
        cdef q2_status st
        with nogil:
            pthread_mutex_lock(&self.commit)
            st = self.file.write_at(Q2_SITE_HEADER_UPDATE, cluster, nbytes, 0, WRITE_DEFERRED)
            if st == Q2_OK:
                st = self.file.sync(Q2_SITE_BARRIER)
            if st == Q2_OK:
                memcpy(self.head, cluster, 512)
                self.geo.version = self.header.fields.version
            pthread_mutex_unlock(&self.commit)
        check_status(st, self.name)

    def _patch_header(self, offset, bytes data):
        """Overwrites bytes of the header cluster, durably. They lie in one sector, or do not matter
        until a later patch says so."""
        cdef uint64_t off = door_offset(offset)
        cdef uint64_t n = len(data)
        cdef uint64_t in_head = 0 if off >= 512 else min(n, 512 - off)
        cdef const char *src = PyBytes_AS_STRING(data)
        cdef uint8_t before[512]
        cdef q2_status st
        with nogil:
            pthread_mutex_lock(&self.commit)
            pthread_rwlock_wrlock(&self.meta)
            memcpy(before, self.head + (off if in_head else 0), in_head)
            memcpy(self.head + (off if in_head else 0), src, in_head)
            st = self.file.write_at(Q2_SITE_HEADER_UPDATE, src, n, off, WRITE_DEFERRED)
            pthread_rwlock_unlock(&self.meta)
            if st == Q2_OK:
                st = self.file.sync(Q2_SITE_BARRIER)
            st = poison_unless_full(self, st)
            if st != Q2_OK:
                pthread_rwlock_wrlock(&self.meta)
                memcpy(self.head + (off if in_head else 0), before, in_head)
                pthread_rwlock_unlock(&self.meta)
            q2_count(&self.count.metadata_writes, 1)
            q2_count(&self.count.barriers, 1)
            pthread_mutex_unlock(&self.commit)
        check_status(st, self.name)

    # ---- Persistent bitmaps: what qcow2x/bitmap.py asks for ---------------------------------------

    def _freeze(self):
        """Returns when no write is under way; none begins before _thaw. One thread at a time."""
        cdef q2_status st
        with nogil:
            st = freeze(self)
        check_status(st, self.name)

    def _thaw(self):
        with nogil:
            thaw(self)

    def _track(self, Marks marks):
        """Writes are noted in ``marks`` from now on, or nowhere (None). Frozen, or not in use yet."""
        if marks is None:
            memset(&self.marks, 0, sizeof(q2_marks))
        else:
            self.marks = marks.m
        self.tracker = marks

    def _set_asleep(self, bytes directory, offset):
        """What _track set up begins with the next write, which first puts this directory in place
        of the one at host ``offset``. None: nothing is to be put anywhere. Frozen, or not in use
        yet."""
        cdef uint64_t n = 0 if directory is None else len(directory)
        cdef uint8_t *copy = NULL
        if n:
            copy = <uint8_t *>malloc(n)
            if copy is NULL:
                raise MemoryError(f"{self.name}: no memory for the bitmap directory")
            memcpy(copy, PyBytes_AS_STRING(directory), n)
        free(self.awake_dir)
        self.awake_dir = copy
        self.awake_dir_bytes = n
        self.awake_dir_off = offset
        q2_store(&self.asleep, 1 if n else 0)

    def _wake(self):
        """Marks tracked bitmaps in use now."""
        cdef q2_status st
        with nogil:
            st = wake_bitmaps(self)
        check_status(st, self.name)

    @property
    def _asleep(self):
        return q2_load(&self.asleep) != 0

    @property
    def _marks(self):
        """What was changed since the bitmaps were stored, or None."""
        return self.tracker

    def _write_meta(self, bytes data, offset, int32_t site=Q2_SITE_BITMAP_WRITE):
        """Bytes of a table that is not in use yet, or may be found half written; not synced."""
        cdef uint64_t off = door_offset(offset)
        cdef const char *src = PyBytes_AS_STRING(data)
        cdef uint64_t n = len(data)
        cdef q2_status st
        q2_count(&self.count.metadata_writes, 1)
        with nogil:
            st = poison_unless_full(self, self.file.write_at(site, src, n, off,
                                                             WRITE_DEFERRED))
        check_status(st, self.name)

    def _barrier(self):
        """What was written to the file is durable."""
        cdef q2_status st
        q2_count(&self.count.barriers, 1)
        with nogil:
            st = poison_unless_full(self, self.file.sync(Q2_SITE_BARRIER))
        check_status(st, self.name)

    def _l1_entries_for(self, nbytes):
        return l1_entries_for(&self.geo, door_length(nbytes))

    # ---- Looking --------------------------------------------------------------------------------

    def _plan(self, offset, length):
        """The next runs of this layer alone: a list of (offset, length, kind, host offset); kind as
        in plan.h. Answers at least one byte."""
        cdef uint64_t off = door_offset(offset)
        cdef uint64_t n = door_length(length)
        cdef q2_plan plan
        cdef uint64_t miss = 0
        cdef uint32_t parity = 0
        cdef q2_status st = self._inside(off, n)
        cdef int32_t i
        if st == Q2_OK and n:
            with nogil:
                st = begin_request(self, &parity)
                while st == Q2_OK:
                    pthread_rwlock_rdlock(&self.meta)
                    st = plan_range(self, off, n, False, &plan, &miss)
                    pthread_rwlock_unlock(&self.meta)
                    if st != Q2_MISS:
                        leave_request(self, parity)
                        break
                    st = load_slice(self, miss)
                    if st != Q2_OK:
                        leave_request(self, parity)
        check_status(st, self.name)
        if not n:
            return []
        return [(plan.extent[i].guest_off, plan.extent[i].nbytes, plan.extent[i].kind,
                 plan.extent[i].host_off) for i in range(plan.n)]

    @property
    def size(self):
        """Size of the guest disk in bytes."""
        return q2_load(&self.disk_size)

    @property
    def cluster_size(self):
        """Bytes per cluster."""
        return self.geo.cluster_size

    @property
    def closed(self):
        """Whether close() was called."""
        return q2_load(&self.closed) != 0

    @property
    def _header(self):
        return self.header

    @property
    def _file(self):
        return self.file

    @property
    def _backing(self):
        return self.backing

    @property
    def _data(self):
        return self.data

    @property
    def _cipher(self):
        return self.cipher

    def _counters(self):
        """The figures behind Image.stats(), in the order of qcow2x.types.Stats."""
        cdef uint64_t condensed = condensed_bytes(&self.l2.condensed)
        return (
            condensed + (<uint64_t>q2_load32(&self.l2.n_slots) << self.l2.slice_bits),
            condensed + (<uint64_t>self.l2.max_slots << self.l2.slice_bits),
            <uint64_t>q2_load32(&self.refblocks.n_slots) << self.refblocks.slice_bits,
            <uint64_t>self.refblocks.max_slots << self.refblocks.slice_bits,
            q2_load(&self.l2.n_loads), q2_load(&self.l2.n_evictions),
            q2_load(&self.refblocks.n_loads), q2_load(&self.count.metadata_writes),
            q2_load(&self.count.barriers),
            q2_load32(&self.l2.n_dirty) + q2_load32(&self.refblocks.n_dirty),
            q2_load(&self.count.allocated), q2_load(&self.count.freed),
            q2_load(&self.host_size),
        )

    # ---- Closing --------------------------------------------------------------------------------

    def _shut(self):
        """Refuses new requests, waits for those under way, flushes. Returns False if it was shut
        before. What was unflushed is durable afterwards, or this raises."""
        cdef q2_status st = Q2_OK
        cdef bint was_closed
        cdef timespec pause
        pause.tv_sec = 0
        pause.tv_nsec = 200_000
        with nogil:
            pthread_rwlock_wrlock(&self.meta)
            was_closed = q2_load(&self.closed) != 0
            if not was_closed:
                q2_store(&self.closed, 1)
            pthread_rwlock_unlock(&self.meta)
            if not was_closed:
                # Requests end by themselves within an I/O; looking now and then costs nothing.
                while q2_load(&self.active[0]) + q2_load(&self.active[1]) != 0:
                    nanosleep(&pause, NULL)
                if q2_load(&self.broken):
                    st = fail(Q2_E_BROKEN, Q2_SITE_NONE, 0, b"an earlier metadata write failed")
                elif not self.read_only:
                    st = flush_closing(self)
                    if st == Q2_OK and q2_load(&self.refusals):
                        st = refuse_unguarded(self)
        if was_closed:
            return False
        check_status(st, self.name)
        return True

    def _leave_to_parent(self):
        """In a child, right after a fork()."""
        leave_to_parent(self)

    cdef q2_status _open_status(self) noexcept nogil:
        if q2_load(&self.closed):
            return refuse_closed(self)
        return Q2_OK

    # ---- The guest disk as a Storage: backing chains, consumers in Cython -----------------------

    cdef q2_status read_at(self, int32_t site, void *buf, size_t nbytes,
                           uint64_t off) noexcept nogil:
        cdef uint64_t end = q2_load(&self.disk_size)
        cdef uint64_t inside = 0
        if off < end:
            inside = end - off
            if inside > nbytes:
                inside = nbytes
        if inside < nbytes:
            memset(<uint8_t *>buf + inside, 0, nbytes - inside)
        return read_guest(self, buf, inside, off) if inside else Q2_OK

    cdef q2_status write_at(self, int32_t site, const void *buf, size_t nbytes, uint64_t off,
                            uint32_t flags) noexcept nogil:
        cdef q2_status st = self._inside(off, nbytes)
        if st == Q2_OK:
            st = write_guest(self, buf, nbytes, off, (flags & WRITE_FUA) != 0)
        if st == Q2_OK:
            self.note_write()
        return st

    cdef q2_status sync(self, int32_t site) noexcept nogil:
        cdef uint64_t seq = q2_load(&self.write_seq)
        cdef q2_status st = Q2_OK if self.read_only else flush_image(self)
        if st == Q2_OK:
            self.note_sync(seq)
        return st

    cdef q2_status get_size(self, uint64_t *nbytes) noexcept nogil:
        nbytes[0] = q2_load(&self.disk_size)
        return Q2_OK

    cdef q2_status punch_hole(self, int32_t site, uint64_t off, uint64_t nbytes) noexcept nogil:
        cdef q2_status st = self._inside(off, nbytes)
        return discard_guest(self, off, nbytes) if st == Q2_OK else st

    cdef q2_status zero_range(self, int32_t site, uint64_t off, uint64_t nbytes,
                              uint32_t flags) noexcept nogil:
        cdef q2_status st = self._inside(off, nbytes)
        if st == Q2_OK:
            st = zero_guest(self, off, nbytes, (flags & ZERO_MAY_UNMAP) != 0, False)
        if st == Q2_OK:
            self.note_write()
        return st

    cdef q2_status extent_at(self, uint64_t off, uint64_t nbytes, q2_extent *out) noexcept nogil:
        cdef uint64_t end = q2_load(&self.disk_size)
        if off >= end:
            memset(out, 0, sizeof(q2_extent))
            out.guest_off = off
            out.nbytes = nbytes
            return Q2_OK
        if nbytes > end - off:
            nbytes = end - off
        return guest_extent(self, off, nbytes, out)

    # ---- The door -------------------------------------------------------------------------------

    cdef q2_status _inside(self, uint64_t off, uint64_t nbytes) noexcept nogil:
        cdef uint64_t end = q2_load(&self.disk_size)
        if off > end or nbytes > end - off:
            return fail(Q2_E_RANGE, Q2_SITE_NONE, off, b"the range reaches past the disk's end")
        return Q2_OK

    cdef q2_status _takes_compressed(self, uint64_t off) noexcept nogil:
        if is_encrypted(self):
            return fail(Q2_E_UNSUPPORTED, Q2_SITE_COMPRESSED_WRITE, off,
                        b"compressed clusters are never encrypted, so that an encrypted image"
                        b" takes none")
        return Q2_OK

    cdef size_t _until_end(self, uint64_t nbytes, uint64_t off) noexcept nogil:
        cdef uint64_t end = q2_load(&self.disk_size)
        if off >= end:
            return 0
        return nbytes if nbytes <= end - off else end - off


cdef q2_table published(bytes table, host_off, count):
    """`table` must be kept alive by the caller."""
    cdef q2_table t
    t.bytes = <const uint8_t *>PyBytes_AS_STRING(table)
    t.nbytes = len(table)
    t.host_off = host_off
    t.count = count
    return t
