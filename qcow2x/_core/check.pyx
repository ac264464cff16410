# cython: language_level=3
"""Checking a whole image.

Two rounds over the refcount blocks with the tables in between: learn which refcounts are 1 (an
entry's COPIED flag says the same of its cluster), walk every table and count the references,
then compare the counts with the refcounts. An L2 table that many snapshots share is read and
walked once. What counts as what follows `qemu-img check`.

Counters take 1 to 4 bytes per cluster of the file. Where that is more than MAX_COUNTER_BYTES, the
file is looked at through a window: all three steps for the clusters of one window, then for the
next, with the tables walked again for each.
"""
import time

from cpython.exc cimport PyErr_CheckSignals
from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memset

from qcow2x._core.census cimport *
from qcow2x._core.errors cimport check_status
from qcow2x._core.geometry cimport set_geometry
from qcow2x._core.refblock cimport get_refcount
from qcow2x._core.header cimport Header
from qcow2x._core.status cimport *
from qcow2x._core.storage cimport Storage
from qcow2x._core.wire cimport (Q2_HDR_NB_SNAPSHOTS, Q2_INCOMPAT_EXTL2, Q2_MAX_L1_BYTES,
                                Q2_RTE_OFFSET_MASK, q2_load_be64)

from qcow2x.errors import Cancelled
from qcow2x.types import CheckResult, Finding

cdef extern from "qcow2x/format.h" nogil:
    const uint32_t Q2_MAX_SNAPSHOTS
    const uint64_t Q2_MAX_SNAPSHOT_TABLE_BYTES

cdef enum:
    BATCH_BYTES = 1 << 20        # tables that lie side by side are read together, up to this
    REPORT_EVERY_MS = 100

#: Bytes that the counters of one check may take: a file of 3 TiB in clusters of 64 KiB and
#: refcounts of 16 bits is checked in one pass over its tables, one of 16 TiB in six.
MAX_COUNTER_BYTES = 96 << 20

cdef uint64_t NO_GUEST = <uint64_t>NO_GUEST_OFF
# Limits of the specification's section "Bitmaps", and QEMU's on the extra data of a snapshot.
cdef uint32_t MAX_SNAPSHOT_EXTRA = 1024
# Bytes from the first entry of a snapshot table to the end of any other, extra data to be dropped
# included.
cdef uint64_t MAX_SNAPSHOT_SPAN = 0x7fffffff
cdef uint64_t MAX_DIRTY_BITMAP_BYTES = <uint64_t>512 << 20
cdef uint64_t BITMAP_ENTRY_RESERVED = <uint64_t>0xff000000000001fe
cdef uint64_t BITMAP_ENTRY_OFFSET = <uint64_t>0x00fffffffffffe00

# (kind, structure, sentence, what a repair of everything does) in the order of q2_finding_code.
# None where only the user can know what to do.
FINDINGS = (
    ("corruption", "file", "reference to a range that ends a cluster or more behind the file",
     "replace the entry by one that reads as zeros, where it reads so already"),
    ("corruption", "refcount", "more references than a refcount of this width can count", None),
    ("corruption", "l1", "L1 entry has reserved bits set", "clear the bits"),
    ("corruption", "l1", "L1 entry has flags but no L2 table", "clear the entry"),
    ("corruption", "l1", "L2 table is not aligned to a cluster",
     "align the entry, if the table it then points to has no other use"),
    ("corruption", "l2", "L2 entry has reserved bits set", "clear the bits"),
    ("corruption", "l2", "compressed cluster has the COPIED flag", "clear the flag"),
    ("corruption", "l2", "compressed cluster in an image with an external data file", None),
    ("corruption", "l2", "compressed cluster has a subcluster bitmap", "clear the bitmap"),
    ("corruption", "l2", "subclusters are both allocated and zero", None),
    ("corruption", "l2", "subclusters are allocated but there is no cluster", None),
    ("corruption", "l2", "data cluster is not aligned",
     "align the entry, if the cluster it then points to has no other use"),
    ("corruption", "l2", "preallocated zero cluster is not aligned",
     "keep the zeros, let go of the cluster"),
    ("corruption", "l1", "COPIED flag of an L2 table does not match its refcount",
     "set the flag to what the refcount says"),
    ("corruption", "l2", "COPIED flag of a cluster does not match its refcount",
     "set the flag to what the refcount says"),
    ("corruption", "reftable", "refcount table entry has reserved bits set",
     "make the refcount block anew"),
    ("corruption", "reftable", "refcount block is not aligned to a cluster",
     "make the refcount block anew"),
    ("corruption", "reftable", "refcount block lies behind the end of the file",
     "make the refcount block anew"),
    ("corruption", "reftable", "refcount block is also used for something else",
     "make the refcount block anew"),
    ("corruption", "refcount", "refcount is too low", "raise the refcount"),
    ("leak", "refcount", "refcount is too high: the cluster is leaked", "lower the refcount"),
    ("error", "refcount", "refcounts cannot be read", "make the refcount block anew"),
    ("corruption", "snapshot", "L1 table of a snapshot is not aligned or too large", None),
    ("corruption", "snapshot", "snapshot lacks fields that version 3 requires",
     "write the snapshot table anew with them"),
    ("corruption", "snapshot", "snapshots in an image with an external data file", None),
    ("corruption", "bitmap", "bitmap directory is not valid",
     "keep only the bitmaps that are described in full"),
    ("corruption", "bitmap", "bitmap table entry is not valid",
     "clear the entry and mark the bitmap as not to be used"),
    ("error", "file", "table cannot be read", None),
    ("corruption", "snapshot", "snapshot table entry has too much extra data",
     "write the snapshot table anew with the first 1024 bytes of it"),
    ("corruption", "snapshot", "snapshot table is too big", "drop the snapshots that overhang"),
    ("corruption", "snapshot", "snapshot table has too many entries",
     "drop the snapshots that overhang"),
)

#: The same in one word each, which stays what it is.
CODES = (
    "beyond-end", "overflow", "l1-reserved", "l1-no-table", "l1-misaligned", "l2-reserved",
    "compressed-copied", "compressed-in-data-file", "compressed-bitmap", "bitmap-contradicts",
    "bitmap-without-cluster", "data-misaligned", "zero-misaligned", "l1-copied", "l2-copied",
    "reftable-reserved", "refblock-misaligned", "refblock-beyond-end", "refblock-shared",
    "refcount-low", "leak", "refblock-unreadable", "snapshot-l1", "snapshot-incomplete",
    "snapshot-data-file", "bitmap-directory", "bitmap-entry", "read-error", "snapshot-extra",
    "snapshots-too-big", "snapshots-too-many",
)


cdef class Checker:
    """One look at the image in ``storage``; :meth:`check`, then :meth:`result`.

    ``progress(done, total, phase)`` counts bytes of metadata; returning False raises Cancelled.
    Not thread-safe against writers of the same image.
    """

    def __cinit__(self, Storage storage not None, Header header not None, progress=None,
                  str phase="check", uint64_t max_counter_bytes=MAX_COUNTER_BYTES):
        memset(&self.c, 0, sizeof(q2_census))
        self.storage = storage
        self.header = header
        self.progress = progress
        self.phase = phase
        self.l1_tables = []
        self.shared_l2 = set()
        self.shared_l1 = set()
        self.missing_blocks = []
        self.used_blocks = set()
        self.snapshot_names = {}
        set_geometry(&self.c.g, header.fields.version, header.fields.cluster_bits,
                     header.fields.refcount_order,
                     header.fields.incompat & Q2_INCOMPAT_EXTL2 != 0)
        self.c.has_data_file = header.has_data_file
        check_status(storage.get_size(&self.c.file_size), storage.name)
        self.buf_bytes = max(<uint64_t>BATCH_BYTES, self.c.g.cluster_size)
        self.buf = <uint8_t *>malloc(self.buf_bytes)
        if self.buf is NULL:
            raise MemoryError
        n_rt = <uint64_t>header.fields.rt_clusters << (self.c.g.cluster_bits - 3)
        check_status(census_begin(&self.c, n_rt, CheckResult.MAX_FINDINGS, max_counter_bytes),
                     storage.name)

    def __dealloc__(self):
        census_end(&self.c)
        free(self.buf)

    def check(self):
        """Looks at everything, once. Raises OSError where even the refcount table cannot be read,
        Cancelled."""
        self.load_refcount_table()
        self.total = self.c.n_rt * 8
        while True:
            self.pass_over_tables()
            if not next_window(&self.c):
                break
        self.report(True)
        return self

    cdef int pass_over_tables(self) except -1:
        cdef uint64_t first = self.c.win_first >> self.c.g.refblock_bits
        cdef uint64_t end = self.blocks_for(min(self.c.win_first + self.c.win_n, self.c.n_clusters))
        self.total += (2 * (end - first)) << self.c.g.cluster_bits
        self.learn_refcounts(first, end)
        if self.c.first_pass and self.c.n_past:
            self.learn_refcounts(end, self.blocks_for(self.c.n_clusters + self.c.n_past))
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
        self.note_shared_places()
        self.settle_window()
        return 0

    # Tables of the window that share their clusters with something else.
    cdef int note_shared_places(self) except -1:
        cdef uint64_t i, host_cl, start, n, host_off
        cdef uint64_t first = self.header.fields.rt_offset >> self.c.g.cluster_bits
        for i in range(self.c.n_l2_refs):
            host_cl = self.c.l2_refs[i].host_off >> self.c.g.cluster_bits
            if (in_window(&self.c, host_cl)
                    and get_count(&self.c, host_cl) != min(self.c.l2_refs[i].refs,
                                                           self.c.max_count)):
                self.shared_l2.add(self.c.l2_refs[i].host_off)
        for host_off, n, active in self.l1_tables:
            start = host_off >> self.c.g.cluster_bits
            for host_cl in range(start, start + ((n * 8 - 1) >> self.c.g.cluster_bits) + 1):
                if in_window(&self.c, host_cl) and get_count(&self.c, host_cl) != 1:
                    if active:
                        self.disk_l1_shared = True
                    else:
                        self.shared_l1.add(host_off)
        for host_cl in range(first, first + self.header.fields.rt_clusters):
            if in_window(&self.c, host_cl) and get_count(&self.c, host_cl) != 1:
                self.rt_shared = True
        return 0

    cdef int settle_window(self) except -1:
        cdef uint64_t rb_idx, host_off
        cdef uint64_t first = self.c.win_first >> self.c.g.refblock_bits
        cdef uint64_t end = min(self.c.win_first + self.c.win_n, self.c.n_seen)
        for rb_idx in range(first, ((end - 1) >> self.c.g.refblock_bits) + 1):
            host_off = self.block_offset(rb_idx)
            self.done += self.c.g.cluster_size
            if has_refblock_nowhere(&self.c, rb_idx):
                miss_refblock(&self.c, rb_idx)
            elif host_off == 0:
                compare_refblock(&self.c, rb_idx, NULL)
            else:
                with nogil:
                    st = self.storage.read_at(Q2_SITE_CHECK_READ, self.buf, self.c.g.cluster_size,
                                              host_off)
                    if st == Q2_OK:
                        compare_refblock(&self.c, rb_idx, self.buf)
                    elif st == Q2_E_IO:
                        miss_refblock(&self.c, rb_idx)
                        st = Q2_OK
                check_status(st, self.storage.name)
            if is_block_used(&self.c, rb_idx):
                self.used_blocks.add(rb_idx)
                if host_off == 0 or self.c.rb_bad[rb_idx]:
                    self.missing_blocks.append(rb_idx)
            self.report(False)
        return 0

    # ---- reading ----

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
        if self.c.n_rt == 0:
            return 0
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

    cdef int learn_refcounts(self, uint64_t first, uint64_t end) except -1:
        cdef uint64_t rb_idx, host_off
        for rb_idx in range(first, end):
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

    # ---- L1 and L2 tables ----

    cdef int count_l1_table(self, uint64_t host_off, uint64_t n, bint active) except -1:
        cdef uint64_t part, l1_idx = 0
        count_region(&self.c, host_off, n * 8, NO_GUEST, 1)
        if self.c.first_pass and n:
            self.l1_tables.append((host_off, n, active))
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
        cdef uint64_t entry_at, kept_bytes = 0
        cdef uint32_t i, n = self.header.fields.nb_snapshots
        cdef uint64_t l1_total = 0
        stored = self.read_bytes(4, Q2_HDR_NB_SNAPSHOTS)
        if stored is not None and int.from_bytes(stored, "big") > Q2_MAX_SNAPSHOTS:
            # Then the header at hand has as many as there may be (ops.check.load_header).
            stored = int.from_bytes(stored, "big")
            note(&self.c, FOUND_SNAPSHOTS_TOO_MANY, Q2_HDR_NB_SNAPSHOTS, NO_GUEST,
                 Q2_MAX_SNAPSHOTS, stored, stored - n)
        if n and self.c.has_data_file:
            note(&self.c, FOUND_SNAPSHOT_DATA_FILE, start, 0, 0, n, 1)
        at = start
        for i in range(n):
            at = (at + 7) & ~<uint64_t>7
            entry_at = at
            entry = self.read_bytes(40, at)
            if entry is None:
                return 0
            l1_offset = int.from_bytes(entry[0:8], "big")
            l1_size = int.from_bytes(entry[8:12], "big")
            extra = int.from_bytes(entry[36:40], "big")
            id_bytes = int.from_bytes(entry[12:14], "big")
            name_bytes = int.from_bytes(entry[14:16], "big")
            names_at = at + 40 + extra
            at = names_at + id_bytes + name_bytes
            # What a repair leaves of the entry counts against the limit: as the table is written then.
            kept_bytes = (kept_bytes + 7) & ~<uint64_t>7
            kept_bytes += 40 + min(extra, MAX_SNAPSHOT_EXTRA) + id_bytes + name_bytes
            if extra > MAX_SNAPSHOT_EXTRA:
                note(&self.c, FOUND_SNAPSHOT_EXTRA, entry_at, i, MAX_SNAPSHOT_EXTRA, extra, 1)
            if kept_bytes > Q2_MAX_SNAPSHOT_TABLE_BYTES or at - start > MAX_SNAPSHOT_SPAN:
                note(&self.c, FOUND_SNAPSHOTS_TOO_BIG, entry_at, i, i, n, n - i)
                at = entry_at
                break
            if self.c.g.version >= 3 and extra < 16:
                note(&self.c, FOUND_SNAPSHOT_INCOMPLETE, at, i, 16, extra, 1)
            # Tables of their own fit in the file together: more than that is no table list but an
            # attempt to keep a checker busy.
            if (l1_offset & (self.c.g.cluster_size - 1) or l1_size * 8 > Q2_MAX_L1_BYTES
                    or l1_total + l1_size * 8 > self.c.file_size + self.c.g.cluster_size * n):
                names = self.read_bytes(id_bytes + name_bytes, names_at) or b""
                self.snapshot_names[i] = "%s (%s)" % (
                    names[:id_bytes].decode("utf-8", "surrogateescape"),
                    names[id_bytes:].decode("utf-8", "surrogateescape"))
                note(&self.c, FOUND_SNAPSHOT_L1, l1_offset, i, 0, l1_size, 1)
                continue
            l1_total += l1_size * 8
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

    @property
    def refs_hidden(self):
        """Whether references may be missing from the counts, as something that holds such could
        not be read or points nowhere: what looks leaked may be all that is left of the data."""
        return bool(self.c.refs_hidden)

    @property
    def refcounts_lost(self):
        """Whether a cluster in use has a refcount of 0: then any writer may take it away."""
        return bool(self.c.refcounts_lost)

    @property
    def wrong_flags(self):
        """How many of the corruptions are COPIED flags that do not match their refcount."""
        return self.c.wrong_flags

    @property
    def refs_uncertain(self):
        """That, or refcounts that cannot be trusted themselves."""
        return bool(self.c.refs_uncertain)

    @property
    def end_of_use(self):
        """Host offset behind the last cluster that is referred to or has a refcount."""
        return (self.c.highest_cluster + 1) << self.c.g.cluster_bits

    def refcount_table(self):
        """``[(entry, its block can be kept)]`` of the refcount table."""
        return [(self.c.rt[i], not self.c.rb_bad[i]) for i in range(self.c.n_rt)]

    def findings(self):
        """The first :data:`CheckResult.MAX_FINDINGS` of what was found."""
        return [self.finding_of(&self.c.findings[i]) for i in range(self.c.n_findings)]

    cdef object finding_of(self, const q2_finding *f):
        kind, structure, sentence, action = FINDINGS[f.code]
        guest = index = refcount = subject = None
        if f.guest_off != NO_GUEST:
            if structure in ("reftable", "snapshot"):
                index = f.guest_off
            else:
                guest = f.guest_off
        if structure == "l1" and guest is not None:
            index = guest >> (self.c.g.cluster_bits + self.c.g.l2_bits)
        elif structure == "l2" and guest is not None:
            index = (guest >> self.c.g.cluster_bits) & (self.c.g.l2_entries - 1)
        if f.code == FOUND_L1_COPIED or f.code == FOUND_L2_COPIED:
            refcount = self.stored_refcount(f.host_off >> self.c.g.cluster_bits)
        if structure == "snapshot" and index is not None:
            subject = self.snapshot_names.get(index)
        return Finding(
            kind=kind,
            structure=structure,
            offset=f.host_off,
            message=sentence,
            guest_offset=guest,
            expected=f.expected,
            found=f.found,
            action=action,
            code=CODES[f.code],
            index=index,
            refcount=refcount,
            subject=subject,
        )

    def stored_refcount(self, uint64_t host_cl):
        """The refcount of a cluster as it stands in the file; None where it cannot be read."""
        cdef uint64_t host_off = self.block_offset(host_cl >> self.c.g.refblock_bits)
        cdef q2_status st
        if self.c.has_data_file:
            return 1
        if host_off == 0:
            return 0
        with nogil:
            st = self.storage.read_at(Q2_SITE_CHECK_READ, self.buf, self.c.g.cluster_size, host_off)
        if st != Q2_OK:
            return None
        return get_refcount(self.buf, self.c.g.refcount_order,
                            host_cl & ((<uint64_t>1 << self.c.g.refblock_bits) - 1))

    def result(self):
        """A :class:`qcow2x.types.CheckResult`, with the counts of ``qemu-img check``."""
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
            findings=self.findings(),
            cluster_size=self.c.g.cluster_size,
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
