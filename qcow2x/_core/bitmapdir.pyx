# cython: language_level=3
"""Persistent dirty bitmaps in the file: directory, tables and data. Section "Bitmaps".

A table has an entry for each cluster of bits: the host offset of the cluster, or 0 for all zeros, or
1 for all ones. Bits are looked at a cluster at a time, so that a bitmap of any size takes the memory
of its table and one cluster. Nothing is changed in place: what a bitmap becomes is written to new
clusters (`write_changed`), and the old ones are the caller's to free.
"""
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memset

from qcow2x._core.errors cimport check_status, fail
from qcow2x._core.marks cimport marks_set, q2_marks
from qcow2x._core.status cimport *
from qcow2x._core.sync cimport q2_look
from qcow2x._core.storage cimport WRITE_DEFERRED, Storage
from qcow2x._core.wire cimport q2_load_be64, q2_store_be64

from qcow2x.errors import CorruptImage

cdef extern from *:
    """
    static inline int q2_ctz(uint64_t w) { return __builtin_ctzll(w); }
    static inline int q2_popcount(uint64_t w) { return __builtin_popcountll(w); }
    """
    int q2_ctz(uint64_t w) nogil
    int q2_popcount(uint64_t w) nogil

cdef extern from "qcow2x/format.h" nogil:
    const uint32_t Q2_MAX_BITMAPS, Q2_MAX_BITMAP_NAME
    const uint64_t Q2_MAX_BITMAP_BYTES

cdef uint64_t ENTRY_RESERVED = <uint64_t>0xff000000000001fe
cdef uint64_t ENTRY_OFFSET = <uint64_t>0x00fffffffffffe00
cdef uint64_t ALL_ONES = 1

#: QEMU's limits, so that an image which one opens the other opens as well.
MAX_TABLE_CLUSTER_BYTES = Q2_MAX_BITMAP_BYTES
MAX_NAME_BYTES = Q2_MAX_BITMAP_NAME
MIN_GRANULARITY_BITS = 9
MAX_GRANULARITY_BITS = 31

FLAG_IN_USE = 1
FLAG_AUTO = 2
FLAG_EXTRA_DATA_COMPATIBLE = 4

# Clusters of bits read in one call of BitmapData.runs, at most.
cdef uint64_t CLUSTERS_AT_ONCE = 256


# ---- The directory -------------------------------------------------------------------------------

def decode_directory(bytes raw, uint64_t count, uint64_t cluster_size, name, uint64_t at):
    """``[(name, granularity_bits, flags, table_offset, table_entries, extra)]`` of a directory that
    lies at host offset ``at``. Raises CorruptImage for one that breaks a rule."""
    found = []
    names = set()
    cdef uint64_t pos = 0, total = len(raw), end
    while pos < total:
        if <uint64_t>len(found) == count:
            raise _damaged(name, at + pos, "holds more entries than the header says")
        if total - pos < 24:
            raise _damaged(name, at + pos, "ends inside an entry")
        table_offset = int.from_bytes(raw[pos:pos + 8], "big")
        entries = int.from_bytes(raw[pos + 8:pos + 12], "big")
        flags = int.from_bytes(raw[pos + 12:pos + 16], "big")
        kind, granularity = raw[pos + 16], raw[pos + 17]
        name_bytes = int.from_bytes(raw[pos + 18:pos + 20], "big")
        extra_bytes = int.from_bytes(raw[pos + 20:pos + 24], "big")
        end = (pos + 24 + <uint64_t>extra_bytes + <uint64_t>name_bytes + 7) & ~<uint64_t>7
        if end > total:
            raise _damaged(name, at + pos, "ends inside an entry")
        extra = raw[pos + 24:pos + 24 + extra_bytes]
        title = raw[pos + 24 + extra_bytes:pos + 24 + extra_bytes + name_bytes]
        if kind != 1:
            raise _damaged(name, at + pos, f"has a bitmap of the unknown type {kind}")
        if flags & ~7:
            raise _damaged(name, at + pos, f"has a bitmap with the unknown flags {flags:#x}")
        if not MIN_GRANULARITY_BITS <= granularity <= MAX_GRANULARITY_BITS:
            raise _damaged(name, at + pos, f"has a bitmap of granularity 2^{granularity}")
        if not 1 <= name_bytes <= MAX_NAME_BYTES or title in names:
            raise _damaged(name, at + pos, "has a bitmap whose name is empty, too long or not unique")
        if (table_offset == 0 or table_offset & (cluster_size - 1) or table_offset >> 56
                or entries == 0 or entries * cluster_size > MAX_TABLE_CLUSTER_BYTES):
            raise _damaged(name, at + pos, "has a bitmap whose table is misplaced or too large")
        names.add(title)
        found.append((title, granularity, flags, table_offset, entries, extra))
        pos = end
    if <uint64_t>len(found) != count:
        raise _damaged(name, at, f"holds {len(found)} entries, not {count}")
    return found


def encode_directory(bitmaps):
    """The directory's bytes, of tuples as :func:`decode_directory` gives them."""
    out = bytearray()
    for title, granularity, flags, table_offset, entries, extra in bitmaps:
        out += table_offset.to_bytes(8, "big") + entries.to_bytes(4, "big")
        out += flags.to_bytes(4, "big") + bytes((1, granularity))
        out += len(title).to_bytes(2, "big") + len(extra).to_bytes(4, "big")
        out += extra + title
        out += bytes((8 - (len(out) & 7)) & 7)
    return bytes(out)


cdef object _damaged(name, uint64_t at, str what):
    return CorruptImage(f"{name}: the bitmap directory {what} (offset {at:#x}, bitmap_read)")._where(
        name, at, "bitmap_read")


# ---- Bits in memory ------------------------------------------------------------------------------

cdef class Marks:
    """One bit for each ``2 ** granularity_bits`` bytes of a disk of ``size`` bytes, none set."""

    def __cinit__(self, uint64_t size, uint32_t granularity_bits):
        self.size = size
        self.m.shift = granularity_bits
        self.m.bits = (size + (<uint64_t>1 << granularity_bits) - 1) >> granularity_bits
        # Zeros that nobody touches take no memory.
        self.m.word = <uint64_t *>calloc((self.m.bits >> 6) + 1, 8)
        if self.m.word is NULL:
            raise MemoryError(f"no memory for a bitmap of {self.m.bits} bits")

    def __dealloc__(self):
        free(self.m.word)

    def mark(self, uint64_t offset, uint64_t length):
        """Sets the bits of a range of the disk, in bytes."""
        if length:
            marks_set(&self.m, offset, offset + length)

    @property
    def granularity_bits(self):
        return self.m.shift

    def __bool__(self):
        return any_marks(&self.m, 0, self.m.bits)


cdef bint any_marks(const q2_marks *m, uint64_t first, uint64_t end) noexcept nogil:
    """Whether a bit of [first, end) is set; first is a multiple of 64, end too unless it is the last
    of all."""
    cdef uint64_t at
    if end > m.bits:
        end = m.bits
    for at in range(first >> 6, (end + 63) >> 6):
        if q2_look(&m.word[at]):
            return True
    return False


cdef void add_marks(uint64_t *to, const q2_marks *m, uint32_t down, uint64_t first,
                    uint64_t end) noexcept nogil:
    """Into a cluster of bits that begins at bit `first`, each for 2^down bits of the marks."""
    cdef uint64_t at, word, bit
    cdef uint64_t stop = end << down if end << down < m.bits else m.bits
    cdef uint64_t group = (<uint64_t>1 << (<uint64_t>1 << down)) - 1 if down < 6 else ~<uint64_t>0
    for at in range((first << down) >> 6, (stop + 63) >> 6):
        word = q2_look(&m.word[at])
        if word == 0:
            continue
        if down == 0:
            to[at - (first >> 6)] |= word
            continue
        while word:
            bit = (((at << 6) + q2_ctz(word)) >> down) - first
            to[bit >> 6] |= <uint64_t>1 << (bit & 63)
            if down >= 6:
                break
            word &= ~(group << ((q2_ctz(word) >> down) << down))


# ---- One bitmap ----------------------------------------------------------------------------------

cdef inline void extend_run(q2_bitruns *runs, bint value, uint64_t end) noexcept nogil:
    if runs.n == 0 or runs.value != value:
        runs.n += 1
        runs.value = value
    runs.end[runs.n - 1] = end


cdef uint64_t end_of_run(const uint64_t *word, uint64_t at, uint64_t end, bint value) noexcept nogil:
    """The first bit of [at, end) that is not `value`, or end."""
    cdef uint64_t flip = ~<uint64_t>0 if value else 0
    cdef uint64_t other = (word[at >> 6] ^ flip) >> (at & 63)
    if other:
        at += q2_ctz(other)
        return at if at < end else end
    at = ((at >> 6) + 1) << 6
    while at < end:
        other = word[at >> 6] ^ flip
        if other:
            at += q2_ctz(other)
            return at if at < end else end
        at += 64
    return end


cdef void keep_first(uint64_t *word, uint64_t bits, uint64_t nbytes) noexcept nogil:
    """Clears all but the first bits of a cluster of them."""
    cdef uint64_t whole = bits >> 6
    if bits & 63:
        word[whole] &= ~<uint64_t>0 >> (64 - (bits & 63))
        whole += 1
    memset(<uint8_t *>word + whole * 8, 0, nbytes - whole * 8)


cdef class BitmapData:
    """What one bitmap holds. Not for several threads at once."""

    def __cinit__(self, Storage file not None, uint64_t size, uint32_t granularity_bits,
                  uint32_t cluster_bits):
        self.file = file
        self.size = size
        self.shift = granularity_bits
        self.cluster_bits = cluster_bits
        self.per_cluster = <uint64_t>8 << cluster_bits
        self.bits = (size + (<uint64_t>1 << granularity_bits) - 1) >> granularity_bits
        self.n = (self.bits + self.per_cluster - 1) // self.per_cluster
        if self.n << cluster_bits > MAX_TABLE_CLUSTER_BYTES:
            raise ValueError(f"{file.name}: a bitmap of granularity {1 << granularity_bits} is too "
                             f"large for a disk of {size} bytes; use a larger granularity")
        self.entry = <uint64_t *>calloc(self.n + 1, 8)
        if self.entry is NULL:
            raise MemoryError(f"{file.name}: no memory for a bitmap's table")

    def __dealloc__(self):
        free(self.entry)

    @staticmethod
    def empty(Storage file, size, granularity_bits, cluster_bits):
        """A bitmap without a bit set."""
        return BitmapData(file, size, granularity_bits, cluster_bits)

    @staticmethod
    def load(Storage file, size, granularity_bits, cluster_bits, uint64_t table_offset,
             uint64_t entries):
        """Reads the table and checks each entry. Raises CorruptImage."""
        cdef BitmapData data = BitmapData(file, size, granularity_bits, cluster_bits)
        cdef q2_status st
        if entries != data.n:
            st = fail(Q2_E_CORRUPT, Q2_SITE_BITMAP_READ, table_offset,
                      b"a bitmap's table is not of the disk's size")
        else:
            with nogil:
                st = data.read_table(table_offset)
        check_status(st, file.name)
        return data

    cdef q2_status read_table(self, uint64_t table_off) noexcept nogil:
        cdef uint64_t i, file_size = 0, host_off
        cdef q2_status st = self.file.get_size(&file_size)
        if st == Q2_OK and (table_off > file_size or self.n * 8 > file_size - table_off):
            st = fail(Q2_E_CORRUPT, Q2_SITE_BITMAP_READ, table_off,
                      b"a bitmap's table lies beyond the end of the file")
        if st == Q2_OK:
            st = self.file.read_at(Q2_SITE_BITMAP_READ, self.entry, self.n * 8, table_off)
        if st != Q2_OK:
            return st
        for i in range(self.n):
            self.entry[i] = q2_load_be64(&self.entry[i])
            host_off = self.entry[i] & ENTRY_OFFSET
            if self.entry[i] & ENTRY_RESERVED or (host_off and (
                    self.entry[i] & ALL_ONES or host_off & ((<uint64_t>1 << self.cluster_bits) - 1)
                    or host_off >= file_size)):
                return fail(Q2_E_CORRUPT, Q2_SITE_BITMAP_READ, table_off + 8 * i,
                            b"an entry of a bitmap's table is not valid")
        return Q2_OK

    def encode_table(self):
        """The table's bytes."""
        cdef uint64_t i
        out = bytearray(self.n * 8)
        cdef uint8_t[::1] view = out
        for i in range(self.n):
            q2_store_be64(&view[8 * i], self.entry[i])
        return bytes(out)

    @property
    def entries(self):
        return self.n

    def clusters(self):
        """``[(host offset, bytes)]`` of the clusters of bits, neighbours together."""
        cdef uint64_t i, size = <uint64_t>1 << self.cluster_bits
        cdef uint64_t first = 0, end = 0, host_off
        found = []
        for i in range(self.n):
            host_off = self.entry[i] & ENTRY_OFFSET
            if host_off == 0:
                continue
            if host_off != end:
                if end:
                    found.append((first, end - first))
                first = host_off
            end = host_off + size
        if end:
            found.append((first, end - first))
        return found

    cdef uint64_t bits_in(self, uint64_t i) noexcept nogil:
        cdef uint64_t left = self.bits - i * self.per_cluster
        return left if left < self.per_cluster else self.per_cluster

    cdef q2_status read_bits(self, uint64_t i, uint64_t *into) noexcept nogil:
        """The bits of one cluster; those past the disk's end are 0."""
        cdef uint64_t size = <uint64_t>1 << self.cluster_bits
        cdef q2_status st = Q2_OK
        if self.entry[i] & ENTRY_OFFSET:
            st = self.file.read_at(Q2_SITE_BITMAP_READ, into, size, self.entry[i] & ENTRY_OFFSET)
        else:
            memset(into, 0xff if self.entry[i] & ALL_ONES else 0, size)
        keep_first(into, self.bits_in(i), size)
        return st

    cdef bint marked(self, uint64_t i, const q2_marks *m) noexcept nogil:
        cdef uint32_t down
        if m is NULL:
            return False
        down = self.shift - m.shift
        return any_marks(m, (i * self.per_cluster) << down, ((i + 1) * self.per_cluster) << down)

    # ---- Looking --------------------------------------------------------------------------------

    def runs(self, uint64_t offset, Marks marks, uint64_t limit):
        """Runs ``(offset, length, dirty)`` of the disk in bytes from ``offset`` (a multiple of the
        granularity) on, with the bits of ``marks`` (or None) set as well; and where the next call
        goes on. Ends after about ``limit`` runs or some tens of megabytes of bits."""
        cdef const q2_marks *m = NULL
        cdef q2_bitruns found
        cdef uint64_t start = offset >> self.shift
        cdef uint64_t i, end, at = 0
        cdef q2_status st
        if marks is not None:
            m = &marks.m
        memset(&found, 0, sizeof(q2_bitruns))
        if start >= self.bits:
            return [], self.size
        found.end = <uint64_t *>malloc((limit + 1) * 8)
        if found.end is NULL:
            raise MemoryError(f"{self.file.name}: no memory for a list of extents")
        with nogil:
            st = self.scan(start, m, limit, &found)
        listed = []
        if st == Q2_OK:
            value = bool(found.value) if found.n & 1 else not found.value
            at = start << self.shift
            for i in range(found.n):
                end = found.end[i] << self.shift
                if end > self.size:
                    end = self.size
                listed.append((at, end - at, value))
                at = end
                value = not value
        free(found.end)
        check_status(st, self.file.name)
        return listed, at

    cdef q2_status scan(self, uint64_t at, const q2_marks *m, uint64_t limit,
                        q2_bitruns *found) noexcept nogil:
        cdef uint64_t *word = <uint64_t *>malloc(<uint64_t>1 << self.cluster_bits)
        cdef uint64_t i, base, end, stop, read = 0
        cdef bint value
        cdef q2_status st = Q2_OK
        if word is NULL:
            return fail(Q2_E_NOMEM, Q2_SITE_BITMAP_READ, 0, b"out of memory")
        while at < self.bits and found.n < limit and read < CLUSTERS_AT_ONCE:
            i = at // self.per_cluster
            base = i * self.per_cluster
            end = base + self.bits_in(i)
            if self.entry[i] & ENTRY_OFFSET == 0 and (self.entry[i] == ALL_ONES
                                                      or not self.marked(i, m)):
                extend_run(found, self.entry[i] == ALL_ONES, end)
                at = end
                continue
            read += 1
            st = self.read_bits(i, word)
            if st != Q2_OK:
                break
            if m is not NULL:
                add_marks(word, m, self.shift - m.shift, base, end)
            while at < end and found.n < limit:
                value = (word[(at - base) >> 6] >> ((at - base) & 63)) & 1
                stop = base + end_of_run(word, at - base, end - base, value)
                extend_run(found, value, stop)
                at = stop
        free(word)
        return st

    def dirty_bytes(self, Marks marks):
        """Bytes of the disk whose bit is set here or in ``marks`` (or None)."""
        cdef const q2_marks *m = NULL
        cdef uint64_t total = 0
        cdef bint last = False
        cdef q2_status st
        if marks is not None:
            m = &marks.m
        with nogil:
            st = self.count(m, &total, &last)
        check_status(st, self.file.name)
        # The last bit may stand for less than the others.
        return (total << self.shift) - ((self.bits << self.shift) - self.size if last else 0)

    cdef q2_status count(self, const q2_marks *m, uint64_t *total, bint *last) noexcept nogil:
        cdef uint64_t *word = <uint64_t *>malloc(<uint64_t>1 << self.cluster_bits)
        cdef uint64_t i, j, n
        cdef q2_status st = Q2_OK
        if word is NULL:
            return fail(Q2_E_NOMEM, Q2_SITE_BITMAP_READ, 0, b"out of memory")
        for i in range(self.n):
            n = self.bits_in(i)
            if self.entry[i] == ALL_ONES:
                total[0] += n
                last[0] = i == self.n - 1
            elif self.entry[i] or self.marked(i, m):
                st = self.read_bits(i, word)
                if st != Q2_OK:
                    break
                if m is not NULL:
                    add_marks(word, m, self.shift - m.shift, i * self.per_cluster,
                              i * self.per_cluster + n)
                for j in range((n + 63) >> 6):
                    total[0] += q2_popcount(word[j])
                last[0] = i == self.n - 1 and (word[(n - 1) >> 6] >> ((n - 1) & 63)) & 1
        free(word)
        return st

    def bits_at(self, uint64_t first_byte, uint64_t nbytes, Marks marks):
        """Bytes of the bitmap as they lie in the file, the bits of ``marks`` set as well."""
        cdef const q2_marks *m = NULL
        cdef uint64_t size = <uint64_t>1 << self.cluster_bits
        cdef uint64_t i
        cdef q2_status st = Q2_OK
        if marks is not None:
            m = &marks.m
        cdef bytearray whole = bytearray(size)
        cdef uint8_t[::1] view = whole
        out = []
        while nbytes and st == Q2_OK:
            i = first_byte >> self.cluster_bits
            with nogil:
                st = self.read_bits(i, <uint64_t *>&view[0])
                if st == Q2_OK and m is not NULL:
                    add_marks(<uint64_t *>&view[0], m, self.shift - m.shift,
                              i * self.per_cluster, i * self.per_cluster + self.bits_in(i))
            start = first_byte & (size - 1)
            part = bytes(whole[start:start + nbytes])
            out.append(part)
            first_byte += len(part)
            nbytes -= len(part)
        check_status(st, self.file.name)
        return b"".join(out)

    # ---- Changing -------------------------------------------------------------------------------

    cdef bint changes(self, BitmapData old, uint64_t i, const q2_marks *m) noexcept nogil:
        """Whether entry i cannot simply be that of the bitmap as it was."""
        if i >= old.n or old.entry[i] == 0:
            return self.marked(i, m)
        # Bits past the end of the old disk may be anything, and mean something on a longer one.
        return old.bits_in(i) != self.bits_in(i) or (old.entry[i] != ALL_ONES and self.marked(i, m))

    def grown(self, uint64_t size, Marks marks):
        """``(bitmap, clusters)``: this bitmap for a disk of ``size`` bytes, not smaller, with the bits
        of ``marks`` (or None) set; at most so many clusters of bits have to be written for that."""
        cdef BitmapData new = BitmapData(self.file, size, self.shift, self.cluster_bits)
        cdef const q2_marks *m = NULL
        cdef uint64_t i, n = 0
        if marks is not None:
            m = &marks.m
        with nogil:
            for i in range(new.n):
                if new.changes(self, i, m):
                    n += 1
        return new, n

    def write_changed(self, BitmapData old, Marks marks, uint64_t host_off):
        """Makes this one, which came of ``old.grown``, what it is to be: clusters that changed go to
        ``host_off`` and after, not synced. Returns ``(clusters written, clusters of old that are
        none of its own)``, the latter a list as :meth:`clusters` gives. `old` is used up."""
        cdef const q2_marks *m = NULL
        cdef uint64_t written = 0, i
        cdef q2_status st
        if marks is not None:
            m = &marks.m
        with nogil:
            st = self.build(old, m, host_off, &written)
        check_status(st, self.file.name)
        # What is left in the old table are the clusters that only it used.
        for i in range(old.n):
            if i < self.n and self.entry[i] == old.entry[i]:
                old.entry[i] = 0
        return written, old.clusters()

    cdef q2_status build(self, BitmapData old, const q2_marks *m, uint64_t host_off,
                         uint64_t *written) noexcept nogil:
        cdef uint64_t size = <uint64_t>1 << self.cluster_bits
        cdef uint64_t *word = <uint64_t *>malloc(size)
        cdef uint64_t i, n
        cdef q2_status st = Q2_OK
        if word is NULL:
            return fail(Q2_E_NOMEM, Q2_SITE_BITMAP_WRITE, 0, b"out of memory")
        for i in range(self.n):
            if not self.changes(old, i, m):
                self.entry[i] = old.entry[i] if i < old.n else 0
                continue
            n = self.bits_in(i)
            if i < old.n:
                st = old.read_bits(i, word)
            else:
                memset(word, 0, size)
            if st != Q2_OK:
                break
            if m is not NULL:
                add_marks(word, m, self.shift - m.shift, i * self.per_cluster,
                          i * self.per_cluster + n)
            keep_first(word, n, size)
            if end_of_run(word, 0, n, word[0] & 1) == n:
                self.entry[i] = ALL_ONES if word[0] & 1 else 0
                continue
            self.entry[i] = host_off
            st = self.file.write_at(Q2_SITE_BITMAP_WRITE, word, size, host_off, WRITE_DEFERRED)
            if st != Q2_OK:
                break
            host_off += size
            written[0] += 1
        free(word)
        return st
