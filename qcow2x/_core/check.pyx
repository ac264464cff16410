# cython: language_level=3
"""Checking a whole image, and lowering refcounts that are too high.

Two rounds over the refcount blocks with the tables in between: learn which refcounts are 1 (an
entry's COPIED flag says the same of its cluster), walk every table and count the references,
then compare the counts with the refcounts. An L2 table that many snapshots share is read and
walked once. What counts as what follows `qemu-img check`.
"""
import time

from cpython.exc cimport PyErr_CheckSignals
from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memset

from qcow2x._core.census cimport *
from qcow2x._core.errors cimport check_status
from qcow2x._core.geometry cimport set_geometry
from qcow2x._core.header cimport Header
from qcow2x._core.status cimport *
from qcow2x._core.storage cimport Storage
from qcow2x._core.wire cimport Q2_INCOMPAT_EXTL2, Q2_MAX_L1_BYTES, Q2_RTE_OFFSET_MASK, q2_load_be64

from qcow2x.errors import Cancelled, UnsupportedFeature
from qcow2x.types import CheckResult, Finding

cdef extern from "qcow2x/format.h" nogil:
    const uint64_t Q2_MAX_SNAPSHOT_TABLE_BYTES

cdef enum:
    BATCH_BYTES = 1 << 20        # tables that lie side by side are read together, up to this
    REPORT_EVERY_MS = 100

#: Bytes that the counters of one check may take.
MAX_COUNTER_BYTES = 1 << 30

cdef uint64_t NO_GUEST = <uint64_t>NO_GUEST_OFF
# Limits of the specification's section "Bitmaps", and QEMU's on the extra data of a snapshot.
cdef uint32_t MAX_SNAPSHOT_EXTRA = 1024
cdef uint64_t MAX_DIRTY_BITMAP_BYTES = <uint64_t>512 << 20
cdef uint64_t BITMAP_ENTRY_RESERVED = <uint64_t>0xff000000000001fe
cdef uint64_t BITMAP_ENTRY_OFFSET = <uint64_t>0x00fffffffffffe00

# (kind, structure, sentence) in the order of q2_finding_code.
FINDINGS = (
    ("corruption", "file", "reference to a range that ends a cluster or more behind the file"),
    ("corruption", "refcount", "more references than a refcount of this width can count"),
    ("corruption", "l1", "L1 entry has reserved bits set"),
    ("corruption", "l1", "L1 entry has flags but no L2 table"),
    ("corruption", "l1", "L2 table is not aligned to a cluster"),
    ("corruption", "l2", "L2 entry has reserved bits set"),
    ("corruption", "l2", "compressed cluster has the COPIED flag"),
    ("corruption", "l2", "compressed cluster in an image with an external data file"),
    ("corruption", "l2", "compressed cluster has a subcluster bitmap"),
    ("corruption", "l2", "subclusters are both allocated and zero"),
    ("corruption", "l2", "subclusters are allocated but there is no cluster"),
    ("corruption", "l2", "data cluster is not aligned"),
    ("corruption", "l2", "preallocated zero cluster is not aligned"),
    ("corruption", "l1", "COPIED flag of an L2 table does not match its refcount"),
    ("corruption", "l2", "COPIED flag of a cluster does not match its refcount"),
    ("corruption", "reftable", "refcount table entry has reserved bits set"),
    ("corruption", "reftable", "refcount block is not aligned to a cluster"),
    ("corruption", "reftable", "refcount block lies behind the end of the file"),
    ("corruption", "reftable", "refcount block is also used for something else"),
    ("corruption", "refcount", "refcount is too low"),
    ("leak", "refcount", "refcount is too high: the cluster is leaked"),
    ("error", "refcount", "refcounts cannot be read"),
    ("corruption", "snapshot", "L1 table of a snapshot is not aligned or too large"),
    ("corruption", "snapshot", "snapshot lacks fields that version 3 requires"),
    ("corruption", "snapshot", "snapshots in an image with an external data file"),
    ("corruption", "bitmap", "bitmap directory is not valid"),
    ("corruption", "bitmap", "bitmap table entry is not valid"),
    ("error", "file", "table cannot be read"),
)


cpdef object check_storage(Storage storage, Header header, object repair=None,
                           object progress=None):
    """Checks the image in ``storage`` and returns a :class:`qcow2x.types.CheckResult`.

    ``repair="leaks"`` lowers refcounts that are too high, durably, and then checks again: the
    counts of the result are those of the second look, ``leaks_fixed`` that of the repair. Where
    damage was found that may hide references (a table that cannot be read, entries that point
    nowhere), no leak is touched: what looks leaked may be all that is left of the data.

    Takes 1 to 4 bytes of memory per cluster of the file, at most MAX_COUNTER_BYTES; a larger
    image raises UnsupportedFeature. ``progress(done, total, phase)`` counts bytes of metadata;
    returning False raises Cancelled, before a repair has begun or after it is complete.
    Raises ValueError for another ``repair``, PermissionError if the storage is read-only and
    OSError if a repair cannot be written. Not thread-safe against writers of the same image.
    """
    cdef Checker first, second
    if repair is not None and repair != "leaks":
        raise ValueError(f"repair must be None or 'leaks', not {repair!r}")
    if repair is not None and storage.read_only:
        raise PermissionError(f"{storage.name}: is open read-only and cannot be repaired")
    first = Checker(storage, header, progress, "check")
    first.run()
    if repair is None or first.c.leaks == 0 or first.c.refs_uncertain:
        return first.result()
    first.repair_leaks()
    second = Checker(storage, header, progress, "verify")
    second.run()
    result = second.result()
    result.leaks_fixed = first.c.leaks_fixed
    fixed = [found for found in first.found() if found.fixed]
    result.findings = (fixed + result.findings)[:CheckResult.MAX_FINDINGS]
    return result


cdef class Checker:
    """One pass over an image."""
    cdef q2_census c
    cdef Storage storage
    cdef Header header
    cdef object progress
    cdef str phase
    cdef uint8_t *buf            # of buf_bytes: at least a cluster
    cdef uint64_t buf_bytes
    cdef uint64_t done
    cdef uint64_t total
    cdef double next_report

    def __cinit__(self, Storage storage, Header header, progress, str phase):
        memset(&self.c, 0, sizeof(q2_census))
        self.storage = storage
        self.header = header
        self.progress = progress
        self.phase = phase
        set_geometry(&self.c.g, header.fields.version, header.fields.cluster_bits,
                     header.fields.refcount_order,
                     header.fields.incompat & Q2_INCOMPAT_EXTL2 != 0)
        self.c.has_data_file = header.has_data_file
        check_status(storage.get_size(&self.c.file_size), storage.name)
        needed = counter_bytes(&self.c.g, self.c.file_size)
        if needed > MAX_COUNTER_BYTES:
            raise UnsupportedFeature(
                f"{storage.name}: checking a file of {self.c.file_size} bytes with clusters of "
                f"{self.c.g.cluster_size} takes {needed} bytes of memory, more than the limit of "
                f"{MAX_COUNTER_BYTES}", features=("check of an image of this size",))
        self.buf_bytes = max(<uint64_t>BATCH_BYTES, self.c.g.cluster_size)
        self.buf = <uint8_t *>malloc(self.buf_bytes)
        if self.buf is NULL:
            raise MemoryError
        n_rt = <uint64_t>header.fields.rt_clusters << (self.c.g.cluster_bits - 3)
        check_status(census_begin(&self.c, n_rt, CheckResult.MAX_FINDINGS), storage.name)

    def __dealloc__(self):
        census_end(&self.c)
        free(self.buf)

    cdef int run(self) except -1:
        cdef uint64_t n_blocks
        self.load_refcount_table()
        n_blocks = self.blocks_for(self.c.n_stored)
        self.total = (2 * n_blocks) << self.c.g.cluster_bits
        self.learn_refcounts(n_blocks)
        count_region(&self.c, 0, self.c.g.cluster_size, NO_GUEST, 1)
        self.count_l1_table(self.header.fields.l1_offset, self.header.fields.l1_size, True)
        self.count_snapshots()
        count_region(&self.c, self.header.fields.rt_offset, self.c.n_rt * 8, NO_GUEST, 1)
        crypto = self.header.crypto_header
        if crypto is not None:
            count_region(&self.c, crypto[0], crypto[1], NO_GUEST, 1)
        self.count_l2_tables()
        self.count_dirty_bitmaps()
        count_refblocks(&self.c)
        self.compare_refcounts(False)
        self.report(True)
        return 0

    # ---- reading ----

    # Fills dst; False (and a finding) where the storage cannot read. What lies past the end of the
    # file reads as zeros.
    cdef bint read(self, void *dst, uint64_t nbytes, uint64_t host_off) except? 0:
        cdef q2_status st
        with nogil:
            st = self.storage.read_at(Q2_SITE_CHECK_READ, dst, nbytes, host_off)
        if st == Q2_E_IO:
            note(&self.c, FOUND_READ_ERROR, host_off, NO_GUEST, 0, nbytes, 1)
            return False
        check_status(st, self.storage.name)
        return True

    cdef object read_bytes(self, uint64_t nbytes, uint64_t host_off):
        cdef bytes out = bytes(nbytes)
        cdef uint8_t *dst = out
        return out if self.read(dst, nbytes, host_off) else None

    cdef int report(self, bint at_end) except -1:
        cdef double now
        PyErr_CheckSignals()
        if self.progress is None:
            return 0
        now = time.monotonic()
        if now < self.next_report and not at_end:
            return 0
        self.next_report = now + REPORT_EVERY_MS / 1000.0
        done = self.total if at_end else min(self.done, self.total)
        if self.progress(done, self.total, self.phase) is False:
            raise Cancelled(f"{self.storage.name}: the check was cancelled")
        return 0

    # ---- refcounts ----

    cdef int load_refcount_table(self) except -1:
        cdef uint64_t i
        # Without its refcount table nothing can be said of the image at all.
        with nogil:
            st = self.storage.read_at(Q2_SITE_REFTABLE_READ, self.c.rt, self.c.n_rt * 8,
                                      self.header.fields.rt_offset)
        check_status(st, self.storage.name)
        for i in range(self.c.n_rt):
            self.c.rt[i] = q2_load_be64(&self.c.rt[i])
        return 0

    # Refcount blocks that cover n clusters, as far as the refcount table goes.
    cdef uint64_t blocks_for(self, uint64_t n_clusters) noexcept:
        cdef uint64_t n = ((n_clusters - 1) >> self.c.g.refblock_bits) + 1
        return min(n, self.c.n_rt)

    # Where block rb_idx lies; 0 where there is none to read, so that its refcounts are all 0.
    cdef uint64_t block_offset(self, uint64_t rb_idx) noexcept:
        cdef uint64_t host_off = 0
        if rb_idx < self.c.n_rt:
            host_off = self.c.rt[rb_idx] & Q2_RTE_OFFSET_MASK
        return host_off if host_off < self.c.file_size else 0

    cdef int learn_refcounts(self, uint64_t n_blocks) except -1:
        cdef uint64_t rb_idx, host_off
        for rb_idx in range(n_blocks):
            host_off = self.block_offset(rb_idx)
            self.done += self.c.g.cluster_size
            if host_off == 0 or has_refblock_nowhere(&self.c, rb_idx):
                continue
            # A block that cannot be read is noted when it is compared.
            with nogil:
                st = self.storage.read_at(Q2_SITE_CHECK_READ, self.buf, self.c.g.cluster_size,
                                          host_off)
                if st == Q2_OK:
                    learn_refblock(&self.c, rb_idx, self.buf)
            if st != Q2_E_IO:
                check_status(st, self.storage.name)
            self.report(False)
        return 0

    # Compares every refcount with what was counted; with `fix` lowers those that are too high and
    # writes each block that this changes.
    cdef int compare_refcounts(self, bint fix) except -1:
        cdef uint64_t rb_idx, host_off
        cdef uint64_t n_blocks = ((self.c.n_seen - 1) >> self.c.g.refblock_bits) + 1
        for rb_idx in range(n_blocks):
            host_off = self.block_offset(rb_idx)
            self.done += self.c.g.cluster_size
            if has_refblock_nowhere(&self.c, rb_idx):
                miss_refblock(&self.c, rb_idx)
                continue
            if host_off == 0:
                compare_refblock(&self.c, rb_idx, NULL, False)
                continue
            with nogil:
                st = self.storage.read_at(Q2_SITE_CHECK_READ, self.buf, self.c.g.cluster_size,
                                          host_off)
                if st == Q2_E_IO:
                    miss_refblock(&self.c, rb_idx)
                    st = Q2_OK
                elif st == Q2_OK and compare_refblock(&self.c, rb_idx, self.buf, fix):
                    st = self.storage.write_at(Q2_SITE_REPAIR_WRITE, self.buf,
                                               self.c.g.cluster_size, host_off, 0)
            check_status(st, self.storage.name)
            if not fix:
                self.report(False)
        return 0

    # Only after run(), and only if refs_uncertain is not set.
    cdef int repair_leaks(self) except -1:
        cdef uint64_t i
        self.c.n_findings = 0
        self.c.leaks = 0
        self.compare_refcounts(True)
        self.storage.flush()
        self.c.leaks_fixed = self.c.leaks
        for i in range(self.c.n_findings):
            if self.c.findings[i].code == FOUND_LEAK:
                self.c.findings[i].fixed = True
        return 0

    # ---- L1 and L2 tables ----

    cdef int count_l1_table(self, uint64_t host_off, uint64_t n, bint active) except -1:
        cdef uint64_t part, l1_idx = 0
        count_region(&self.c, host_off, n * 8, NO_GUEST, 1)
        while l1_idx < n and host_off + l1_idx * 8 < self.c.file_size:
            part = min(n - l1_idx, self.buf_bytes // 8)
            if self.read(self.buf, part * 8, host_off + l1_idx * 8):
                with nogil:
                    st = count_l1(&self.c, self.buf, l1_idx, part, active)
                check_status(st, self.storage.name)
            l1_idx += part
            self.report(False)
        return 0

    cdef int count_l2_tables(self) except -1:
        cdef uint64_t i = 0, j, n, start
        cdef uint64_t cluster_size = self.c.g.cluster_size
        merge_l2_refs(&self.c)
        self.total += self.c.n_l2_refs * cluster_size
        while i < self.c.n_l2_refs:
            start = self.c.l2_refs[i].host_off
            n = 1
            while (i + n < self.c.n_l2_refs and (n + 1) * cluster_size <= self.buf_bytes
                    and self.c.l2_refs[i + n].host_off == start + n * cluster_size):
                n += 1
            if self.read(self.buf, n * cluster_size, start):
                with nogil:
                    for j in range(n):
                        count_l2(&self.c, &self.c.l2_refs[i + j], self.buf + j * cluster_size)
            i += n
            self.done += n * cluster_size
            self.report(False)
        return 0

    # ---- snapshots ----

    cdef int count_snapshots(self) except -1:
        cdef uint64_t at, start = self.header.fields.snapshots_offset
        cdef uint32_t i, n = self.header.fields.nb_snapshots
        cdef uint64_t l1_total = 0
        if n and self.c.has_data_file:
            note(&self.c, FOUND_SNAPSHOT_DATA_FILE, start, NO_GUEST, 0, n, 1)
        at = start
        for i in range(n):
            at = (at + 7) & ~<uint64_t>7
            entry = self.read_bytes(40, at)
            if entry is None:
                return 0
            l1_offset = int.from_bytes(entry[0:8], "big")
            l1_size = int.from_bytes(entry[8:12], "big")
            extra = int.from_bytes(entry[36:40], "big")
            at += 40 + extra + int.from_bytes(entry[12:14], "big") + int.from_bytes(
                entry[14:16], "big")
            if extra > MAX_SNAPSHOT_EXTRA or at - start > Q2_MAX_SNAPSHOT_TABLE_BYTES:
                note(&self.c, FOUND_READ_ERROR, at, NO_GUEST, MAX_SNAPSHOT_EXTRA, extra, 1)
                return 0
            if self.c.g.version >= 3 and extra < 16:
                note(&self.c, FOUND_SNAPSHOT_INCOMPLETE, at, NO_GUEST, 16, extra, 1)
            # Tables of their own fit in the file together: more than that is no table list but an
            # attempt to keep a checker busy.
            l1_total += l1_size * 8
            if (l1_offset & (self.c.g.cluster_size - 1) or l1_size * 8 > Q2_MAX_L1_BYTES
                    or l1_total > self.c.file_size + self.c.g.cluster_size * n):
                note(&self.c, FOUND_SNAPSHOT_L1, l1_offset, NO_GUEST, 0, l1_size, 1)
                continue
            self.count_l1_table(l1_offset, l1_size, False)
        if n:
            count_region(&self.c, start, at - start, NO_GUEST, 1)
        return 0

    # ---- dirty bitmaps ----

    cdef int count_dirty_bitmaps(self) except -1:
        directory = self.header.bitmap_directory
        if directory is None:
            return 0
        offset, nbytes, count = directory
        count_region(&self.c, offset, nbytes, NO_GUEST, 1)
        if offset >= self.c.file_size:
            note(&self.c, FOUND_DIRTY_BITMAP_DIRECTORY, offset, NO_GUEST, count, 0, 1)
            return 0
        raw = self.read_bytes(nbytes, offset)
        if raw is None:
            return 0
        tables = dirty_bitmap_tables(raw, count, self.c.g.cluster_size, self.header.fields.size)
        if tables is None:
            note(&self.c, FOUND_DIRTY_BITMAP_DIRECTORY, offset, NO_GUEST, count, 0, 1)
            return 0
        for table_offset, n in tables:
            self.count_dirty_bitmap(table_offset, n)
        return 0

    cdef int count_dirty_bitmap(self, uint64_t host_off, uint64_t n) except -1:
        cdef uint64_t part, i, entry, at = 0
        cdef uint64_t data_off
        count_region(&self.c, host_off, n * 8, NO_GUEST, 1)
        while at < n and host_off + at * 8 < self.c.file_size:
            part = min(n - at, self.buf_bytes // 8)
            if not self.read(self.buf, part * 8, host_off + at * 8):
                return 0
            for i in range(part):
                entry = q2_load_be64(self.buf + 8 * i)
                data_off = entry & BITMAP_ENTRY_OFFSET
                if (entry & BITMAP_ENTRY_RESERVED
                        or data_off and (entry & 1 or data_off & (self.c.g.cluster_size - 1))):
                    note(&self.c, FOUND_DIRTY_BITMAP_ENTRY, host_off + (at + i) * 8, NO_GUEST, 0,
                         entry, 1)
                elif data_off:
                    count_region(&self.c, data_off, self.c.g.cluster_size, NO_GUEST, 1)
            at += part
            self.report(False)
        return 0

    # ---- the answer ----

    cdef list found(self):
        return [finding_of(&self.c.findings[i]) for i in range(self.c.n_findings)]

    cdef object result(self):
        # Whole sectors only, as every reader that counts in sectors sees the disk.
        size = self.header.size & ~511
        return CheckResult(
            filename=self.storage.name,
            corruptions=self.c.corruptions,
            leaks=self.c.leaks,
            check_errors=self.c.check_errors,
            image_end_offset=(self.c.highest_cluster + 1) << self.c.g.cluster_bits,
            total_clusters=(size + self.c.g.cluster_size - 1) >> self.c.g.cluster_bits,
            allocated_clusters=self.c.allocated,
            fragmented_clusters=self.c.fragmented,
            compressed_clusters=self.c.compressed,
            findings=self.found(),
        )


cdef object finding_of(const q2_finding *f):
    kind, structure, sentence = FINDINGS[f.code]
    return Finding(
        kind=kind,
        structure=structure,
        offset=f.host_off,
        message=sentence,
        guest_offset=None if f.guest_off == NO_GUEST else f.guest_off,
        expected=f.expected,
        found=f.found,
        fixed=f.fixed,
    )


cdef object dirty_bitmap_tables(bytes raw, uint64_t count, uint64_t cluster_size,
                                uint64_t disk_size):
    """``[(table offset, entries)]`` of a bitmap directory, or None if it breaks a rule."""
    tables = []
    names = set()
    at, total, found = 0, len(raw), 0
    while at < total:
        if found == count or total - at < 24:
            return None
        table_offset = int.from_bytes(raw[at:at + 8], "big")
        n = int.from_bytes(raw[at + 8:at + 12], "big")
        flags = int.from_bytes(raw[at + 12:at + 16], "big")
        kind, granularity = raw[at + 16], raw[at + 17]
        name_bytes = int.from_bytes(raw[at + 18:at + 20], "big")
        extra = int.from_bytes(raw[at + 20:at + 24], "big")
        end = at + ((24 + extra + name_bytes + 7) & ~7)
        name = raw[at + 24 + extra:at + 24 + extra + name_bytes]
        if (end > total or not 1 <= name_bytes <= 1023 or name in names or extra
                or kind != 1 or not 9 <= granularity <= 31 or flags & ~3
                or table_offset == 0 or table_offset & (cluster_size - 1)
                or n == 0 or n * cluster_size > MAX_DIRTY_BITMAP_BYTES):
            return None
        # A bitmap that is in use may be of another size than the disk: a resize drops it.
        if not flags & 1 and (n * cluster_size * 8) << granularity < disk_size:
            return None
        names.add(name)
        tables.append((table_offset, n))
        found += 1
        at = end
    return tables if found == count else None
