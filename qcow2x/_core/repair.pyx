# cython: language_level=3
"""Mending the entries and refcounts of an image, on top of what a Checker found.

Everything is written through `write`, a callable that puts the bytes into an order of steps
(qcow2x/ops/overlay.py); nothing here touches the file itself. Two rules: what the guest can read
stays as it is, and an entry that reads as an error never becomes one that silently reads as zeros.
"""
from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.stdint cimport uint8_t, uint64_t

from qcow2x._core.census cimport *
from qcow2x._core.check cimport Checker
from qcow2x._core.errors cimport check_status
from qcow2x._core.l2table cimport is_compressed, load_l2e, q2_l2e, store_l2e
from qcow2x._core.status cimport *
from qcow2x._core.storage cimport Storage
from qcow2x._core.wire cimport (Q2_BITMAP_ALL_ALLOC, Q2_L1E_OFFSET_MASK, Q2_L2E_OFFSET_MASK,
                                Q2_OFLAG_COPIED, Q2_OFLAG_ZERO, q2_load_be64, q2_store_be64)

from qcow2x.types import CheckResult, FlagChange

cdef extern from "qcow2x/format.h" nogil:
    const uint64_t Q2_L1E_RESERVED_MASK, Q2_L2E_STD_RESERVED_MASK

# In which order the parts of a repair reach the file: what is needed before what refers to it,
# what is given up after everything that referred to it.
STEP_NEW = 0          # new tables, refcounts raised
STEP_LINK = 1         # what points to the new tables
STEP_ENTRIES = 2      # L1 and L2 entries
STEP_LOWER = 3        # refcounts lowered
STEP_CLEAN = 4        # the header says that all is well


cdef class EntryFixer:
    """Mends what is wrong with L1 and L2 entries by themselves, as `looked` has found them.

    `take_zeros` gives the place of a new cluster of zeros; None where an empty entry is as good.
    `moved` maps the offset of an L2 table that shares its place with something else to that of
    its copy. An entry whose place is misaligned is set right only if the cluster in which it
    points is otherwise unused and has a refcount of 1: then that is what the entry meant.
    """
    cdef Checker looked
    cdef Storage view
    cdef q2_census *c
    cdef object write            # (step, bytes, offset)
    cdef dict moved
    cdef object take_zeros       # makes a cluster of zeros, where an entry cannot say so

    def __cinit__(self, Checker looked not None, Storage view not None, write, dict moved,
                  take_zeros):
        self.looked = looked
        self.view = view
        self.c = &looked.c
        self.write = write
        self.moved = moved
        self.take_zeros = take_zeros

    def fix(self):
        for host_off, n, active in self.looked.l1_tables:
            # What else lies where a snapshot's table does may be the guest's: it is not written to.
            if active or host_off not in self.looked.shared_l1:
                self.fix_l1_table(host_off, n)
        self.fix_l2_tables()

    cdef int fix_l1_table(self, uint64_t host_off, uint64_t n) except -1:
        cdef uint64_t part, i, entry, better, at = 0
        cdef bint changed
        while at < n and host_off + at * 8 < self.c.file_size:
            part = min(n - at, self.looked.buf_bytes // 8)
            self.read(part * 8, host_off + at * 8)
            changed = False
            for i in range(part):
                entry = q2_load_be64(self.looked.buf + 8 * i)
                if entry == 0:
                    continue
                better = self.mended_l1e(entry)
                if better != entry:
                    q2_store_be64(self.looked.buf + 8 * i, better)
                    changed = True
            if changed:
                self.put(self.looked.buf, part * 8, host_off + at * 8)
            at += part
            self.looked.report(False)
        return 0

    cdef uint64_t mended_l1e(self, uint64_t entry) except? 0:
        cdef uint64_t host_off
        entry &= ~Q2_L1E_RESERVED_MASK
        host_off = entry & Q2_L1E_OFFSET_MASK
        # An empty table and none are the same to the guest.
        if host_off == 0 or reaches_past_end(self.c, host_off, self.c.g.cluster_size):
            return 0
        if host_off & (self.c.g.cluster_size - 1):
            return self.aligned_if_sure(entry, host_off)
        if self.moved and host_off in self.moved:
            return <uint64_t>self.moved[host_off] | (entry & Q2_OFLAG_COPIED)
        return entry

    cdef uint64_t aligned_if_sure(self, uint64_t entry, uint64_t host_off) noexcept:
        cdef uint64_t host_cl = host_off >> self.c.g.cluster_bits
        # The one reference counted is the one from this very entry.
        if (in_window(self.c, host_cl) and get_count(self.c, host_cl) == 1
                and is_stored_one(self.c, host_cl) == 1):
            return entry & ~(host_off & (self.c.g.cluster_size - 1))
        return entry

    cdef int fix_l2_tables(self) except -1:
        cdef uint64_t i, host_off, cluster_size = self.c.g.cluster_size
        for i in range(self.c.n_l2_refs):
            host_off = self.c.l2_refs[i].host_off
            # The copy of a moved table is mended, never what lies where it was.
            place = self.moved.get(host_off, host_off) if self.moved else host_off
            if host_off & (cluster_size - 1):
                continue
            self.read(cluster_size, host_off)
            if self.fix_l2(self.looked.buf):
                self.put(self.looked.buf, cluster_size, place)
            self.looked.report(False)
        return 0

    cdef bint fix_l2(self, uint8_t *table) except? True:
        cdef uint64_t i
        cdef bint changed = False
        cdef q2_l2e e, better
        for i in range(self.c.g.l2_entries):
            e = load_l2e(&self.c.g, table + (i << self.c.g.l2_entry_bits))
            if (e.entry | e.bitmap) == 0:
                continue
            better = self.mended_l2e(e)
            if better.entry != e.entry or better.bitmap != e.bitmap:
                store_l2e(&self.c.g, table + (i << self.c.g.l2_entry_bits), better)
                changed = True
        return changed

    cdef q2_l2e mended_l2e(self, q2_l2e e) except *:
        cdef uint64_t host_off
        cdef bint has_data
        if is_compressed(e):
            # Readers pass over both.
            e.entry &= ~Q2_OFLAG_COPIED
            e.bitmap = 0
            return e
        e.entry &= ~Q2_L2E_STD_RESERVED_MASK
        host_off = e.entry & Q2_L2E_OFFSET_MASK
        if host_off == 0:
            return e
        if not self.c.has_data_file and reaches_past_end(self.c, host_off, self.c.g.cluster_size):
            # What lies past the end of the file reads as zeros.
            return self.zeros_for(e)
        if host_off & (self.c.g.cluster_size - 1) == 0:
            return e
        if self.c.g.subclusters > 1:
            has_data = e.bitmap & Q2_BITMAP_ALL_ALLOC != 0
        else:
            has_data = e.entry & Q2_OFLAG_ZERO == 0
        if not has_data:
            return self.zeros_for(e)
        if not self.c.has_data_file:
            e.entry = self.aligned_if_sure(e.entry, host_off)
        return e

    # What reads the same as e when all that e keeps reads as zeros, and keeps no cluster.
    cdef q2_l2e zeros_for(self, q2_l2e e) except *:
        cdef q2_l2e out
        out.bitmap = 0
        if self.c.g.subclusters > 1:
            out.entry = 0
            out.bitmap = (e.bitmap | e.bitmap << 32) & ~Q2_BITMAP_ALL_ALLOC
        elif self.c.g.version >= 3:
            out.entry = Q2_OFLAG_ZERO
        else:
            # Version 2 has no such flag, and an empty entry lets a backing file show through.
            out.entry = self.take_zeros() if self.take_zeros is not None else 0
        return out

    cdef int read(self, uint64_t nbytes, uint64_t host_off) except -1:
        cdef q2_status st
        with nogil:
            st = self.view.read_at(Q2_SITE_CHECK_READ, self.looked.buf, nbytes, host_off)
        check_status(st, self.view.name)
        return 0

    cdef int put(self, const uint8_t *data, uint64_t nbytes, uint64_t host_off) except -1:
        self.write(STEP_ENTRIES, PyBytes_FromStringAndSize(<const char *>data, nbytes), host_off)
        return 0


cdef class RefcountFixer(Checker):
    """A look at the image that makes every refcount what it counts, and every COPIED flag of the
    active tables what the refcount says. Every cluster in use must have a refcount block.

    `fix` chooses: refcounts that are too low, those that are too high, flags. L2 tables at the
    offsets `keep_out` are not written to.
    """
    cdef object write
    cdef object keep_out
    cdef bint up
    cdef bint down
    cdef bint flags
    cdef readonly uint64_t flags_set     # COPIED flags that were changed
    cdef readonly list flag_changes      # the first of them

    def fix(self, write, bint up, bint down, bint flags, keep_out):
        self.write = write
        self.up, self.down, self.flags = up, down, flags
        self.keep_out = keep_out
        self.flag_changes = []
        self.check()

    cdef int settle_window(self) except -1:
        cdef uint64_t rb_idx, host_off
        cdef uint64_t first = self.c.win_first >> self.c.g.refblock_bits
        cdef uint64_t end = min(self.c.win_first + self.c.win_n, self.c.n_seen)
        for rb_idx in range(first, ((end - 1) >> self.c.g.refblock_bits) + 1):
            host_off = self.block_offset(rb_idx)
            if (host_off and not has_refblock_nowhere(&self.c, rb_idx)
                    and not self.c.rb_bad[rb_idx]
                    and self.read(self.buf, self.c.g.cluster_size, host_off)):
                self.settle_block(rb_idx, host_off)
            self.report(False)
        if self.flags:
            self.settle_flags()
        return 0

    cdef int settle_block(self, uint64_t rb_idx, uint64_t host_off) except -1:
        if self.up and raise_refcounts(&self.c, rb_idx, self.buf):
            self.put(STEP_NEW, self.c.g.cluster_size, host_off)
        if not self.down:
            adopt_refcounts(&self.c, rb_idx, self.buf)
        elif lower_refcounts(&self.c, rb_idx, self.buf):
            self.put(STEP_LOWER, self.c.g.cluster_size, host_off)
        return 0

    cdef int settle_flags(self) except -1:
        cdef uint64_t i, n_set, part, at = 0
        cdef uint64_t cluster_size = self.c.g.cluster_size
        cdef uint64_t host_off = self.header.fields.l1_offset
        cdef uint64_t n = self.header.fields.l1_size
        while at < n:
            part = min(n - at, self.buf_bytes // 8)
            if self.read(self.buf, part * 8, host_off + at * 8):
                n_set = self.set_flags_l1(at, part)
                self.put_flags(n_set, part * 8, host_off + at * 8)
            at += part
        for i in range(self.c.n_l2_refs):
            host_off = self.c.l2_refs[i].host_off
            if self.c.l2_refs[i].active_refs == 0 or host_off in self.keep_out:
                continue
            if host_off & (cluster_size - 1) or not self.read(self.buf, cluster_size, host_off):
                continue
            n_set = self.set_flags_l2(self.c.l2_refs[i].l1_idx)
            self.put_flags(n_set, cluster_size, host_off)
            self.report(False)
        return 0

    cdef int put_flags(self, uint64_t n_set, uint64_t nbytes, uint64_t host_off) except -1:
        self.flags_set += n_set
        return self.put(STEP_ENTRIES, nbytes, host_off) if n_set else 0

    cdef int put(self, int step, uint64_t nbytes, uint64_t host_off) except -1:
        self.write(step, PyBytes_FromStringAndSize(<const char *>self.buf, nbytes), host_off)
        return 0

    # How many flags of the n entries in the buffer were changed, the first of which is entry l1_idx.
    cdef uint64_t set_flags_l1(self, uint64_t l1_idx, uint64_t n) except? 0xFFFFFFFFFFFFFFFF:
        cdef uint64_t i, entry, better, n_set = 0
        cdef uint32_t shift = self.c.g.cluster_bits + self.c.g.l2_bits
        for i in range(n):
            entry = q2_load_be64(self.buf + 8 * i)
            if entry & Q2_L1E_OFFSET_MASK == 0:
                continue
            better = with_flag(&self.c, entry, entry & Q2_L1E_OFFSET_MASK)
            if better != entry:
                q2_store_be64(self.buf + 8 * i, better)
                n_set += 1
                self.note_change("l1", l1_idx + i, (l1_idx + i) << shift, entry,
                                 entry & Q2_L1E_OFFSET_MASK)
        return n_set

    cdef uint64_t set_flags_l2(self, uint64_t l1_idx) except? 0xFFFFFFFFFFFFFFFF:
        cdef uint64_t i, better, n_set = 0
        cdef uint64_t guest_off = l1_idx << (self.c.g.cluster_bits + self.c.g.l2_bits)
        cdef uint8_t *at
        cdef q2_l2e e
        for i in range(self.c.g.l2_entries):
            at = self.buf + (i << self.c.g.l2_entry_bits)
            e = load_l2e(&self.c.g, at)
            if is_compressed(e) or e.entry & Q2_L2E_OFFSET_MASK == 0:
                continue
            if self.c.has_data_file:
                # There every cluster is its guest cluster's own.
                better = e.entry | Q2_OFLAG_COPIED
            else:
                better = with_flag(&self.c, e.entry, e.entry & Q2_L2E_OFFSET_MASK)
            if better != e.entry:
                q2_store_be64(at, better)
                n_set += 1
                self.note_change("l2", i, guest_off + (i << self.c.g.cluster_bits), e.entry,
                                 e.entry & Q2_L2E_OFFSET_MASK)
        return n_set

    cdef int note_change(self, str structure, uint64_t index, uint64_t guest_off, uint64_t entry,
                         uint64_t host_off) except -1:
        cdef uint64_t host_cl = host_off >> self.c.g.cluster_bits
        if len(self.flag_changes) < CheckResult.MAX_FINDINGS:
            count = 1 if self.c.has_data_file else get_count(&self.c, host_cl)
            self.flag_changes.append(FlagChange(structure, index, guest_off, entry, count))
        return 0


# The entry with the flag that the refcount of its cluster asks for.
cdef inline uint64_t with_flag(const q2_census *c, uint64_t entry, uint64_t host_off) noexcept:
    cdef uint64_t host_cl = host_off >> c.g.cluster_bits
    if not in_window(c, host_cl):
        return entry
    if get_count(c, host_cl) == 1:
        return entry | Q2_OFLAG_COPIED
    return entry & ~Q2_OFLAG_COPIED
