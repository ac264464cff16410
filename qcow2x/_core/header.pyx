# cython: language_level=3
"""The header cluster, section "Header" and "Header extensions" of the qcow2 specification."""
from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t, UINT64_MAX

from qcow2x._core.errors cimport check_status, fail
from qcow2x._core.geometry cimport l1_entries_for, q2_geometry, set_geometry
from qcow2x._core.status cimport *
from qcow2x._core.sync cimport q2_load, q2_load32

from qcow2x.errors import FormatError, UnsupportedFeature

cdef extern from "qcow2x/wire.h" nogil:
    ctypedef struct q2_cursor:
        size_t remaining
        int ok

    q2_cursor q2_cursor_over(const void *buf, size_t nbytes)
    const uint8_t *q2_take(q2_cursor *c, size_t nbytes)
    uint8_t q2_take_u8(q2_cursor *c)
    uint32_t q2_take_be32(q2_cursor *c)
    uint64_t q2_take_be64(q2_cursor *c)
    void q2_store_be32(void *p, uint32_t v)
    void q2_store_be64(void *p, uint64_t v)

cdef extern from "qcow2x/format.h" nogil:
    const uint32_t Q2_MAGIC
    const uint32_t Q2_HDR_VERSION, Q2_HDR_BACKING_OFFSET, Q2_HDR_BACKING_SIZE
    const uint32_t Q2_HDR_CLUSTER_BITS, Q2_HDR_SIZE, Q2_HDR_CRYPT_METHOD
    const uint32_t Q2_HDR_L1_SIZE, Q2_HDR_L1_OFFSET, Q2_HDR_RT_OFFSET, Q2_HDR_RT_CLUSTERS
    const uint32_t Q2_HDR_NB_SNAPSHOTS, Q2_HDR_SNAPSHOTS_OFFSET, Q2_HDR_V2_LENGTH
    const uint32_t Q2_HDR_INCOMPAT, Q2_HDR_COMPAT, Q2_HDR_AUTOCLEAR, Q2_HDR_REFCOUNT_ORDER
    const uint32_t Q2_HDR_HEADER_LENGTH, Q2_HDR_V3_LENGTH, Q2_HDR_COMPRESSION_TYPE
    const uint32_t Q2_HDR_LENGTH_NOW
    const uint64_t Q2_INCOMPAT_DIRTY, Q2_INCOMPAT_CORRUPT, Q2_INCOMPAT_DATA_FILE
    const uint64_t Q2_INCOMPAT_COMPRESSION, Q2_INCOMPAT_EXTL2, Q2_INCOMPAT_KNOWN
    const uint64_t Q2_COMPAT_LAZY_REFCOUNTS, Q2_AUTOCLEAR_BITMAPS, Q2_AUTOCLEAR_RAW_DATA
    const uint32_t Q2_CRYPT_NONE, Q2_CRYPT_AES, Q2_CRYPT_LUKS
    const uint32_t Q2_COMPRESSION_DEFLATE, Q2_COMPRESSION_ZSTD
    const uint32_t Q2_EXT_END, Q2_EXT_BACKING_FORMAT, Q2_EXT_FEATURE_NAMES, Q2_EXT_BITMAPS
    const uint32_t Q2_EXT_CRYPTO_HEADER, Q2_EXT_DATA_FILE
    const uint32_t Q2_MIN_CLUSTER_BITS, Q2_MAX_CLUSTER_BITS, Q2_MIN_EXTL2_CLUSTER_BITS
    const uint32_t Q2_MAX_REFCOUNT_ORDER, Q2_MAX_SNAPSHOTS, Q2_MAX_BACKING_NAME, Q2_MAX_BITMAPS
    const uint32_t Q2_MAX_BACKING_FORMAT, Q2_MAX_EXTENSIONS
    const uint64_t Q2_MAX_L1_BYTES, Q2_MAX_RT_BYTES, Q2_MAX_BITMAP_DIR_BYTES, Q2_MAX_HOST_OFFSET
    const uint64_t Q2_MAX_DISK_BYTES

cdef uint32_t FEATURE_ENTRY_BYTES = 48      # type, bit, 46 bytes of name
# QEMU leaves the feature name table out of smaller clusters: it would crowd out the backing name.
cdef uint64_t FEATURE_TABLE_MIN_CLUSTER = 8192

# The names that the specification gives its own feature bits: (type, bit, name).
FEATURE_NAMES = (
    (0, 0, b"dirty bit"),
    (0, 1, b"corrupt bit"),
    (0, 2, b"external data file"),
    (0, 3, b"compression type"),
    (0, 4, b"extended L2 entries"),
    (1, 0, b"lazy refcounts"),
    (2, 0, b"bitmaps"),
    (2, 1, b"raw external data"),
)
EXTENSION_ORDER = {kind: i for i, kind in enumerate(
    (Q2_EXT_BACKING_FORMAT, Q2_EXT_DATA_FILE, Q2_EXT_CRYPTO_HEADER, Q2_EXT_FEATURE_NAMES,
     Q2_EXT_BITMAPS))}
COMPRESSION_NAMES = {0: "zlib", 1: "zstd"}
ENCRYPTION_NAMES = {0: None, 1: "aes", 2: "luks"}


cdef q2_status bad_field(uint32_t field_off, const char *what) noexcept nogil:
    return fail(Q2_E_FORMAT, Q2_SITE_HEADER_READ, field_off, what)


cdef q2_status unsupported_field(uint32_t field_off, const char *what) noexcept nogil:
    return fail(Q2_E_UNSUPPORTED, Q2_SITE_HEADER_READ, field_off, what)


cdef q2_status decode_fields(const uint8_t *buf, uint64_t nbytes, q2_header *out) noexcept nogil:
    cdef q2_cursor at = q2_cursor_over(buf, nbytes)
    cdef uint32_t magic = q2_take_be32(&at)
    if not at.ok or magic != Q2_MAGIC:
        return bad_field(0, b"Image is not in qcow2 format")
    out.version = q2_take_be32(&at)
    if not at.ok:
        return bad_field(0, b"the file ends inside the header")
    if out.version != 2 and out.version != 3:
        return unsupported_field(
            Q2_HDR_VERSION, b"only versions 2 and 3 of the qcow2 format are supported")
    out.backing_offset = q2_take_be64(&at)
    out.backing_size = q2_take_be32(&at)
    out.cluster_bits = q2_take_be32(&at)
    out.size = q2_take_be64(&at)
    out.crypt_method = q2_take_be32(&at)
    out.l1_size = q2_take_be32(&at)
    out.l1_offset = q2_take_be64(&at)
    out.rt_offset = q2_take_be64(&at)
    out.rt_clusters = q2_take_be32(&at)
    out.nb_snapshots = q2_take_be32(&at)
    out.snapshots_offset = q2_take_be64(&at)
    if out.version == 2:
        out.incompat = out.compat = out.autoclear = 0
        out.refcount_order = 4
        out.header_length = Q2_HDR_V2_LENGTH
    else:
        out.incompat = q2_take_be64(&at)
        out.compat = q2_take_be64(&at)
        out.autoclear = q2_take_be64(&at)
        out.refcount_order = q2_take_be32(&at)
        out.header_length = q2_take_be32(&at)
    out.compression_type = 0
    if out.version == 3 and out.header_length > Q2_HDR_COMPRESSION_TYPE:
        out.compression_type = q2_take_u8(&at)
    if not at.ok:
        return bad_field(0, b"the file ends inside the header")
    return check_fields(out)


# Ranges and combinations that need nothing but the fields.
cdef q2_status check_fields(const q2_header *h) noexcept nogil:
    cdef uint64_t cluster_size
    if h.cluster_bits < Q2_MIN_CLUSTER_BITS or h.cluster_bits > Q2_MAX_CLUSTER_BITS:
        return bad_field(Q2_HDR_CLUSTER_BITS, b"Unsupported cluster size")
    cluster_size = <uint64_t>1 << h.cluster_bits
    if h.version == 3 and h.header_length < Q2_HDR_V3_LENGTH:
        return bad_field(Q2_HDR_HEADER_LENGTH, b"qcow2 header too short")
    if h.header_length > cluster_size:
        return bad_field(Q2_HDR_HEADER_LENGTH, b"qcow2 header exceeds cluster size")
    if h.header_length & 7:
        return bad_field(Q2_HDR_HEADER_LENGTH, b"header_length is not a multiple of 8")
    if h.size > Q2_MAX_DISK_BYTES:
        return bad_field(Q2_HDR_SIZE, b"Image is too big")
    if h.refcount_order > Q2_MAX_REFCOUNT_ORDER:
        return bad_field(Q2_HDR_REFCOUNT_ORDER, b"Reference count entry width too large; may not exceed 64 bits")
    if h.crypt_method > Q2_CRYPT_LUKS:
        return unsupported_field(Q2_HDR_CRYPT_METHOD, b"the encryption method is unknown")
    if h.nb_snapshots > Q2_MAX_SNAPSHOTS:
        return bad_field(Q2_HDR_NB_SNAPSHOTS, b"Snapshot table too large")
    if h.incompat & Q2_INCOMPAT_EXTL2 and h.cluster_bits < Q2_MIN_EXTL2_CLUSTER_BITS:
        return bad_field(Q2_HDR_CLUSTER_BITS,
                         b"extended L2 entries need clusters of at least 16 KiB")
    if h.compression_type > Q2_COMPRESSION_ZSTD:
        return unsupported_field(Q2_HDR_COMPRESSION_TYPE, b"the compression type is unknown")
    if h.compression_type != Q2_COMPRESSION_DEFLATE and not h.incompat & Q2_INCOMPAT_COMPRESSION:
        return bad_field(Q2_HDR_COMPRESSION_TYPE,
                         b"qcow2: Compression type incompatible feature bit must be set")
    if h.compression_type == Q2_COMPRESSION_DEFLATE and h.incompat & Q2_INCOMPAT_COMPRESSION:
        return bad_field(Q2_HDR_INCOMPAT,
                         b"qcow2: Compression type incompatible feature bit must not be set")
    if h.autoclear & Q2_AUTOCLEAR_RAW_DATA and not h.incompat & Q2_INCOMPAT_DATA_FILE:
        return bad_field(Q2_HDR_AUTOCLEAR,
                         b"data-file-raw requires a data file")
    if h.backing_offset:
        if h.backing_offset < h.header_length:
            return bad_field(Q2_HDR_BACKING_OFFSET,
                             b"the backing file name overlaps the header fields")
        if h.backing_offset > cluster_size:
            return bad_field(Q2_HDR_BACKING_OFFSET,
                             b"Invalid backing file offset")
        if (h.backing_size > Q2_MAX_BACKING_NAME
                or h.backing_size > cluster_size - h.backing_offset):
            return bad_field(Q2_HDR_BACKING_SIZE,
                             b"Backing file name too long")
    return Q2_OK


# One table: aligned, behind the header cluster, wholly inside the file.
cdef q2_status check_table(uint32_t field_off, uint64_t host_off, uint64_t nbytes,
                           uint64_t cluster_size, uint64_t file_size, const char *invalid,
                           const char *outside) noexcept nogil:
    if host_off & (cluster_size - 1) or host_off >= Q2_MAX_HOST_OFFSET:
        return bad_field(field_off, invalid)
    if nbytes == 0:
        return Q2_OK
    if host_off < cluster_size:
        return fail(Q2_E_CORRUPT, Q2_SITE_HEADER_READ, field_off,
                    b"a table overlaps the header cluster")
    # Tables are limited to megabytes and offsets to 2^56, so the sum cannot wrap.
    if host_off + nbytes > file_size:
        return fail(Q2_E_CORRUPT, Q2_SITE_HEADER_READ, field_off, outside)
    return Q2_OK


cdef q2_status validate(const q2_header *h, const q2_geometry *g,
                        uint64_t file_size) noexcept nogil:
    cdef uint64_t l1_bytes = <uint64_t>h.l1_size * 8
    cdef uint64_t rt_bytes = <uint64_t>h.rt_clusters << h.cluster_bits
    cdef q2_status st
    if l1_bytes > Q2_MAX_L1_BYTES:
        return fail(Q2_E_LIMIT, Q2_SITE_HEADER_READ, Q2_HDR_L1_SIZE,
                    b"Active L1 table too large")
    if rt_bytes > Q2_MAX_RT_BYTES:
        return fail(Q2_E_LIMIT, Q2_SITE_HEADER_READ, Q2_HDR_RT_CLUSTERS,
                    b"Reference count table too large")
    if rt_bytes == 0:
        return bad_field(Q2_HDR_RT_CLUSTERS, b"Image does not contain a reference count table")
    if l1_entries_for(g, h.size) > 0x7fffffff:
        return bad_field(Q2_HDR_SIZE, b"Image is too big")
    if h.l1_size < l1_entries_for(g, h.size):
        return bad_field(Q2_HDR_L1_SIZE, b"L1 table is too small")
    st = check_table(Q2_HDR_RT_OFFSET, h.rt_offset, rt_bytes, g.cluster_size, file_size,
                     b"Reference count table offset invalid",
                     b"the refcount table lies beyond the end of the file")
    if st != Q2_OK:
        return st
    st = check_table(Q2_HDR_L1_OFFSET, h.l1_offset, l1_bytes, g.cluster_size, file_size,
                     b"Active L1 table offset invalid",
                     b"the L1 table lies beyond the end of the file")
    if st != Q2_OK:
        return st
    # 40 bytes are the least that a snapshot's entry takes; the table's reader checks the rest. A file
    # that ends before it is of use without it: the disk is all there.
    st = check_table(Q2_HDR_SNAPSHOTS_OFFSET, h.snapshots_offset, <uint64_t>h.nb_snapshots * 40,
                     g.cluster_size, UINT64_MAX,
                     b"Snapshot table offset invalid",
                     b"the snapshot table lies beyond the end of the file")
    if st != Q2_OK:
        return st
    if (l1_bytes and h.l1_offset < h.rt_offset + rt_bytes
            and h.rt_offset < h.l1_offset + l1_bytes):
        return fail(Q2_E_CORRUPT, Q2_SITE_HEADER_READ, Q2_HDR_L1_OFFSET,
                    b"the L1 table and the refcount table overlap")
    if h.nb_snapshots and (h.snapshots_offset == h.l1_offset
                           or h.snapshots_offset - h.rt_offset < rt_bytes):
        return fail(Q2_E_CORRUPT, Q2_SITE_HEADER_READ, Q2_HDR_SNAPSHOTS_OFFSET,
                    b"the snapshot table overlaps another table")
    return Q2_OK


def cluster_size_of(first_bytes, name="image"):
    """Bytes of the header cluster, from at least the first 112 bytes of the file.

    Raises FormatError or UnsupportedFeature as :meth:`Header.parse` does.
    """
    cdef bytes data = bytes(first_bytes)
    cdef q2_header fields
    check_status(decode_fields(<const uint8_t *>data, len(data), &fields), name)
    return 1 << fields.cluster_bits


cdef class Header:
    """One image's header cluster, decoded; not safe to change from several threads at once.

    :meth:`load` and :meth:`parse` read one, :meth:`new` starts one for a new image. The
    attributes ``backing_file``, ``backing_format``, ``data_file`` and ``extensions`` may be set;
    :meth:`encode` then gives the bytes of the whole cluster.
    """

    def __cinit__(self):
        self.backing_file = self.backing_format = self.data_file = None
        self.extensions = []
        self.unknown_fields = b""
        self.unknown_incompat = []

    # --- reading ---------------------------------------------------------------------------

    @staticmethod
    def load(pread, file_size, name="image"):
        """Reads and validates the header through ``pread(length, offset) -> bytes``.

        ``file_size`` is in bytes, or a function that says it: of a file that may grow meanwhile it
        is asked again once the header was read. Reads the first 64 KiB, and the rest of the first
        cluster only where that is larger.
        """
        cdef bint asked = callable(file_size)
        cdef uint64_t nbytes = file_size() if asked else file_size
        cdef uint64_t want = min(nbytes, <uint64_t>65536)
        first = bytes(pread(want, 0))
        cluster = cluster_size_of(first, name)
        want = min(nbytes, <uint64_t>cluster)
        if want > <uint64_t>len(first):
            first += bytes(pread(want - len(first), len(first)))
        return Header.parse(first, file_size() if asked else file_size, name)

    @staticmethod
    def parse(first_bytes, file_size=None, name="image"):
        """Decodes the first cluster of a file; what the file is too short for reads as zeros.

        Checks everything that lies inside the cluster and, given the file's size in bytes, what
        the header says of the rest of the file (:meth:`validate`). Raises FormatError or
        CorruptImage, or UnsupportedFeature for a version, encryption method or compression type
        that does not exist here. Unknown incompatible features do not raise: they are listed by
        name in ``unknown_incompat``, so that such an image can still be inspected;
        :meth:`require_supported` raises for them.
        """
        # A pointer to the bytes, no typed memoryview: that would make every start of a tool load the
        # package collections.
        cdef bytes data = bytes(first_bytes)
        cdef Header self = Header.__new__(Header)
        check_status(decode_fields(<const uint8_t *>data, len(data), &self.fields), name)
        cluster_size = 1 << self.fields.cluster_bits
        cluster = data[:cluster_size].ljust(cluster_size, b"\0")
        if self.fields.header_length > Q2_HDR_COMPRESSION_TYPE:
            self.unknown_fields = cluster[Q2_HDR_COMPRESSION_TYPE + 1:self.fields.header_length]
        parse_extensions(self, cluster, name)
        check_extensions(self, name)
        if self.fields.backing_offset:
            raw = cluster[self.fields.backing_offset:][:self.fields.backing_size]
            # A name ends at its first NUL for every reader that holds it in a C string.
            self.backing_file = text_of(raw.split(b"\0", 1)[0]) or None
        if file_size is not None:
            self.validate(file_size, name)
        return self

    def validate(self, uint64_t file_size, name="image"):
        """Checks what the header says of the file: tables aligned, inside ``file_size`` bytes,
        within the limits, apart from each other, and the L1 table large enough for the disk.

        Raises FormatError or CorruptImage.
        """
        cdef q2_geometry g
        set_geometry(&g, self.fields.version, self.fields.cluster_bits,
                     self.fields.refcount_order, self.fields.incompat & Q2_INCOMPAT_EXTL2 != 0)
        check_status(validate(&self.fields, &g, file_size), name)
        crypto = self.crypto_header
        if crypto is not None and crypto[0] + crypto[1] > file_size:
            raise bad_extension(name, None, "the encryption header lies beyond the end of the "
                                "file")

    def require_supported(self, name="image"):
        """Raises UnsupportedFeature, naming each, if there are unknown incompatible features."""
        if self.unknown_incompat:
            listed = ", ".join(self.unknown_incompat)
            exc = UnsupportedFeature(f"{name}: the image needs features that are not supported: "
                                     f"{listed}", features=tuple(self.unknown_incompat))
            exc.unknown_bits = tuple(unknown_bits(self))
            raise exc

    # --- making and writing ----------------------------------------------------------------

    @staticmethod
    def new(uint64_t size, *, uint32_t cluster_bits=16, uint32_t version=3,
            uint32_t refcount_order=4, bint extended_l2=False, bint lazy_refcounts=False,
            uint32_t compression_type=0, backing_file=None, backing_format=None):
        """A header for a new image; its tables are placed by :meth:`set_tables`."""
        cdef Header self = Header.__new__(Header)
        self.fields.version = version
        self.fields.cluster_bits = cluster_bits
        self.fields.size = size
        self.fields.refcount_order = refcount_order
        self.fields.compression_type = compression_type
        self.fields.header_length = Q2_HDR_V2_LENGTH if version == 2 else Q2_HDR_LENGTH_NOW
        if extended_l2:
            self.fields.incompat |= Q2_INCOMPAT_EXTL2
        if compression_type != Q2_COMPRESSION_DEFLATE:
            self.fields.incompat |= Q2_INCOMPAT_COMPRESSION
        if lazy_refcounts:
            self.fields.compat |= Q2_COMPAT_LAZY_REFCOUNTS
        self.backing_file = backing_file
        self.backing_format = backing_format
        if version >= 3 and <uint64_t>1 << cluster_bits >= FEATURE_TABLE_MIN_CLUSTER:
            self.extensions.append((Q2_EXT_FEATURE_NAMES, feature_name_table()))
        check_status(check_fields(&self.fields), "new image")
        return self

    def set_tables(self, uint64_t rt_offset, uint32_t rt_clusters, uint64_t l1_offset,
                   uint32_t l1_size):
        """Says where the refcount table and the L1 table (``l1_size`` entries) lie."""
        self.fields.rt_offset = rt_offset
        self.fields.rt_clusters = rt_clusters
        self.fields.l1_offset = l1_offset
        self.fields.l1_size = l1_size

    def use_data_file(self, name, bint raw):
        """Says that guest data lies in the file `name`; raw: that it reads as the disk by itself."""
        self.data_file = name
        self.fields.incompat |= Q2_INCOMPAT_DATA_FILE
        self.keep_raw(raw)

    def set_version(self, uint32_t version):
        """Version 2 or 3. Going down needs every feature of version 3 gone; going up adds none."""
        self.fields.version = version
        self.fields.header_length = Q2_HDR_V2_LENGTH if version == 2 else Q2_HDR_LENGTH_NOW
        if version == 2:
            self.fields.incompat = self.fields.compat = self.fields.autoclear = 0
            self.unknown_fields = b""
            self.set_extension(Q2_EXT_FEATURE_NAMES, None)
        elif <uint64_t>1 << self.fields.cluster_bits >= FEATURE_TABLE_MIN_CLUSTER:
            self.set_extension(Q2_EXT_FEATURE_NAMES, feature_name_table())

    def use_zlib(self):
        """Says that compressed clusters, of which there must be none yet, are zlib streams."""
        self.fields.compression_type = Q2_COMPRESSION_DEFLATE
        self.fields.incompat &= ~Q2_INCOMPAT_COMPRESSION

    def keep_raw(self, bint raw):
        """Says whether the data file reads as the disk by itself."""
        if raw:
            self.fields.autoclear |= Q2_AUTOCLEAR_RAW_DATA
        else:
            self.fields.autoclear &= ~Q2_AUTOCLEAR_RAW_DATA

    def set_lazy_refcounts(self, bint lazy):
        if lazy:
            self.fields.compat |= Q2_COMPAT_LAZY_REFCOUNTS
        else:
            self.fields.compat &= ~Q2_COMPAT_LAZY_REFCOUNTS

    def use_bitmaps(self, data):
        """Says where the bitmap directory is: the bytes of the extension, or None for no bitmaps."""
        self.set_extension(Q2_EXT_BITMAPS, data)
        if data is None:
            self.fields.autoclear &= ~Q2_AUTOCLEAR_BITMAPS
        else:
            self.fields.autoclear |= Q2_AUTOCLEAR_BITMAPS

    def set_size(self, uint64_t size):
        """Says how long the guest disk is, in bytes."""
        self.fields.size = size

    def set_encryption(self, str method, uint64_t offset=0, uint64_t nbytes=0):
        """Says how the data clusters are encrypted (``"aes"`` or ``"luks"``) and, for LUKS, where
        its header and key slots lie."""
        self.fields.crypt_method = {"aes": Q2_CRYPT_AES, "luks": Q2_CRYPT_LUKS}[method]
        self.set_extension(Q2_EXT_CRYPTO_HEADER, offset.to_bytes(8, "big")
                           + nbytes.to_bytes(8, "big") if method == "luks" else None)

    def extension(self, uint32_t kind):
        """The bytes of the first extension of this type, or None."""
        for found, data in self.extensions:
            if found == kind:
                return data
        return None

    def set_extension(self, uint32_t kind, data):
        """Replaces the extension of this type where it stands, adds it, or drops it (None)."""
        places = [i for i, (found, _) in enumerate(self.extensions) if found == kind]
        for i in reversed(places[1:] if data is not None else places):
            del self.extensions[i]
        if data is not None and places:
            self.extensions[places[0]] = (kind, bytes(data))
        elif data is not None:
            self.extensions.append((kind, bytes(data)))

    def clear_unknown_autoclear(self):
        """Clears autoclear bits that are not known here, as every writer must before it changes
        anything else. True if there were any, so that the header has to be written."""
        known = Q2_AUTOCLEAR_BITMAPS | Q2_AUTOCLEAR_RAW_DATA
        changed = self.fields.autoclear & ~known != 0
        self.fields.autoclear &= known
        return changed

    def encode(self):
        """The bytes of the header cluster, padded with zeros to the cluster size.

        Raises ValueError if the fields, extensions and backing file name do not fit in it.
        """
        return self.encode_gil()

    cdef bytes encode_gil(self):
        cdef q2_header *h = &self.fields
        cdef uint8_t fixed[112]
        self.set_extension(Q2_EXT_BACKING_FORMAT, bytes_of(self.backing_format))
        self.set_extension(Q2_EXT_DATA_FILE, bytes_of(self.data_file))
        if h.version == 2:
            h.header_length = Q2_HDR_V2_LENGTH
        elif h.header_length < Q2_HDR_LENGTH_NOW:
            # A compression type other than zlib needs its field; else keep what was there.
            needs_type = h.compression_type != 0 or h.header_length < Q2_HDR_V3_LENGTH
            h.header_length = Q2_HDR_LENGTH_NOW if needs_type else Q2_HDR_V3_LENGTH
        # Known ones in the order in which QEMU writes them, then the others as they were.
        self.extensions.sort(key=lambda pair: EXTENSION_ORDER.get(pair[0], len(EXTENSION_ORDER)))
        parts = []
        for kind, data in self.extensions:
            parts.append(kind.to_bytes(4, "big") + len(data).to_bytes(4, "big"))
            parts.append(data + bytes((8 - (len(data) & 7)) & 7))
        parts.append(bytes(8))                          # the end marker
        extensions = b"".join(parts)
        backing = bytes_of(self.backing_file) or b""
        if len(backing) > Q2_MAX_BACKING_NAME:
            raise ValueError("the backing file name has %d bytes; at most %d are possible"
                             % (len(backing), Q2_MAX_BACKING_NAME))
        total = h.header_length + len(extensions) + len(backing)
        if total > self.cluster_size:
            raise ValueError("the header needs %d bytes with its extensions and backing file "
                             "name, but a cluster has %d" % (total, self.cluster_size))
        h.backing_size = len(backing)
        h.backing_offset = total - len(backing) if backing else 0
        store_fields(h, fixed)
        head = (<bytes>fixed[:112])[:h.header_length]
        if h.header_length > Q2_HDR_COMPRESSION_TYPE:
            head = head[:Q2_HDR_COMPRESSION_TYPE + 1] + self.unknown_fields
        head = head.ljust(h.header_length, b"\0")
        return (head + extensions + backing).ljust(self.cluster_size, b"\0")

    # --- what it says ----------------------------------------------------------------------

    @property
    def version(self):
        return self.fields.version

    @property
    def compat(self):
        """``"0.10"`` for version 2, ``"1.1"`` for version 3, as ``qemu-img`` names them."""
        return "0.10" if self.fields.version == 2 else "1.1"

    @property
    def size(self):
        """Bytes of the guest disk."""
        return q2_load(&self.fields.size)

    @property
    def cluster_bits(self):
        return self.fields.cluster_bits

    @property
    def cluster_size(self):
        return <uint64_t>1 << self.fields.cluster_bits

    @property
    def l1_size(self):
        """Entries of the active L1 table."""
        return q2_load32(&self.fields.l1_size)

    @property
    def l1_offset(self):
        return q2_load(&self.fields.l1_offset)

    @property
    def refcount_table_offset(self):
        return q2_load(&self.fields.rt_offset)

    @property
    def refcount_table_clusters(self):
        return q2_load32(&self.fields.rt_clusters)

    @property
    def refcount_order(self):
        return self.fields.refcount_order

    @property
    def refcount_bits(self):
        return 1 << self.fields.refcount_order

    @property
    def nb_snapshots(self):
        return q2_load32(&self.fields.nb_snapshots)

    @property
    def snapshots_offset(self):
        return q2_load(&self.fields.snapshots_offset)

    @property
    def header_length(self):
        return self.fields.header_length

    @property
    def incompatible_features(self):
        return q2_load(&self.fields.incompat)

    @property
    def compatible_features(self):
        return self.fields.compat

    @property
    def autoclear_features(self):
        return self.fields.autoclear

    @property
    def dirty(self):
        return q2_load(&self.fields.incompat) & Q2_INCOMPAT_DIRTY != 0

    @property
    def corrupt(self):
        return q2_load(&self.fields.incompat) & Q2_INCOMPAT_CORRUPT != 0

    @property
    def has_unknown_autoclear(self):
        """Whether autoclear bits are set that are not known here: whoever writes clears them."""
        return self.fields.autoclear & ~(Q2_AUTOCLEAR_BITMAPS | Q2_AUTOCLEAR_RAW_DATA) != 0

    @property
    def has_data_file(self):
        return q2_load(&self.fields.incompat) & Q2_INCOMPAT_DATA_FILE != 0

    @property
    def data_file_raw(self):
        return self.fields.autoclear & Q2_AUTOCLEAR_RAW_DATA != 0

    @property
    def extended_l2(self):
        return q2_load(&self.fields.incompat) & Q2_INCOMPAT_EXTL2 != 0

    @property
    def lazy_refcounts(self):
        return self.fields.compat & Q2_COMPAT_LAZY_REFCOUNTS != 0

    @property
    def compression_type(self):
        """``"zlib"`` or ``"zstd"``."""
        return COMPRESSION_NAMES[self.fields.compression_type]

    @property
    def encryption(self):
        """``"aes"``, ``"luks"`` or None."""
        return ENCRYPTION_NAMES[self.fields.crypt_method]

    @property
    def bitmap_directory(self):
        """``(offset, nbytes, count)`` of the bitmap directory, or None where there is none or
        where the autoclear bit says that it is out of date."""
        data = self.extension(Q2_EXT_BITMAPS)
        if data is None or not self.fields.autoclear & Q2_AUTOCLEAR_BITMAPS:
            return None
        return (int.from_bytes(data[16:24], "big"), int.from_bytes(data[8:16], "big"),
                int.from_bytes(data[:4], "big"))

    @property
    def crypto_header(self):
        """``(offset, nbytes)`` of the LUKS header, or None."""
        data = self.extension(Q2_EXT_CRYPTO_HEADER)
        if data is None:
            return None
        return int.from_bytes(data[:8], "big"), int.from_bytes(data[8:16], "big")


cdef int parse_extensions(Header self, bytes cluster, object name) except -1:
    cdef uint64_t at = self.fields.header_length
    cdef uint64_t end = self.fields.backing_offset or len(cluster)
    cdef q2_cursor cur
    cdef uint32_t kind, nbytes
    cdef const uint8_t *base = cluster
    known = {Q2_EXT_BACKING_FORMAT, Q2_EXT_FEATURE_NAMES, Q2_EXT_BITMAPS,
             Q2_EXT_CRYPTO_HEADER, Q2_EXT_DATA_FILE}
    seen = set()
    while at < end:
        cur = q2_cursor_over(base + at, end - at)
        kind = q2_take_be32(&cur)
        nbytes = q2_take_be32(&cur)
        if not cur.ok:
            raise bad_extension(name, at, "Header extension too large", ": it is cut off")
        if kind == Q2_EXT_END:
            return 0
        if nbytes > cur.remaining:
            raise bad_extension(
                name, at, "Header extension too large", f": {kind:#010x} of {nbytes} bytes, where "
                f"{cur.remaining} remain for it")
        # Twice is one time too often: programs would differ in which they take. All take the last
        # of two backing formats, and programs that only append one, to change it, exist.
        if kind in known and kind in seen and kind != Q2_EXT_BACKING_FORMAT:
            raise bad_extension(name, at, f"header extension {kind:#010x} is there twice")
        seen.add(kind)
        if len(self.extensions) == Q2_MAX_EXTENSIONS:
            raise bad_extension(name, at, f"there are more than {Q2_MAX_EXTENSIONS} header extensions")
        self.extensions.append((kind, cluster[at + 8:at + 8 + nbytes]))
        at += 8 + ((<uint64_t>nbytes + 7) & ~<uint64_t>7)
    return 0


cdef int check_extensions(Header self, object name) except -1:
    for kind, data in self.extensions:
        if kind == Q2_EXT_BACKING_FORMAT:
            if len(data) > Q2_MAX_BACKING_FORMAT:
                raise bad_extension(name, None, "the backing format name is longer than "
                                    f"{Q2_MAX_BACKING_FORMAT} bytes")
            self.backing_format = text_of(data.split(b"\0", 1)[0]) or None
        elif kind == Q2_EXT_DATA_FILE:
            self.data_file = text_of(data.split(b"\0", 1)[0]) or None
        elif kind == Q2_EXT_CRYPTO_HEADER:
            check_crypto_extension(self, data, name)
        elif kind == Q2_EXT_BITMAPS and self.fields.autoclear & Q2_AUTOCLEAR_BITMAPS:
            check_bitmaps_extension(self, data, name)
    if self.fields.crypt_method == Q2_CRYPT_LUKS and self.crypto_header is None:
        raise bad_extension(name, None, "Missing CRYPTO header for crypt method 2")
    self.unknown_incompat = name_unknown_incompat(self)
    return 0


cdef int check_crypto_extension(Header self, bytes data, object name) except -1:
    if self.fields.crypt_method != Q2_CRYPT_LUKS:
        raise bad_extension(name, None, "there is an encryption header but the encryption "
                            "method is not LUKS")
    if len(data) != 16:
        raise bad_extension(name, None, "the encryption header extension has "
                            f"{len(data)} bytes instead of 16")
    offset, nbytes = int.from_bytes(data[:8], "big"), int.from_bytes(data[8:], "big")
    if offset & (self.cluster_size - 1) or offset == 0:
        raise bad_extension(name, None, f"the encryption header at {offset:#x} is not "
                            "aligned to a cluster")
    if nbytes == 0 or offset + nbytes > Q2_MAX_HOST_OFFSET:
        raise bad_extension(name, None, f"the encryption header has {nbytes} bytes")
    return 0


cdef int check_bitmaps_extension(Header self, bytes data, object name) except -1:
    if len(data) != 24:
        raise bad_extension(name, None, f"the bitmaps extension has {len(data)} bytes "
                            "instead of 24")
    count, reserved = int.from_bytes(data[:4], "big"), int.from_bytes(data[4:8], "big")
    nbytes, offset = int.from_bytes(data[8:16], "big"), int.from_bytes(data[16:], "big")
    if reserved:
        raise bad_extension(name, None, "reserved bits of the bitmaps extension are set")
    if count == 0 or count > Q2_MAX_BITMAPS:
        raise bad_extension(name, None, f"the bitmaps extension counts {count} bitmaps")
    if nbytes == 0 or nbytes > Q2_MAX_BITMAP_DIR_BYTES:
        raise bad_extension(name, None, f"the bitmap directory has {nbytes} bytes")
    if offset & (self.cluster_size - 1) or offset == 0 or offset >= Q2_MAX_HOST_OFFSET:
        raise bad_extension(name, None, f"the bitmap directory at {offset:#x} is not aligned "
                            "to a cluster")
    return 0


cdef list name_unknown_incompat(Header self):
    return [name or f"unknown incompatible feature bit {bit}" for bit, name in unknown_bits(self)]


cdef list unknown_bits(Header self):
    unknown = self.fields.incompat & ~Q2_INCOMPAT_KNOWN
    if not unknown:
        return []
    names = {}
    table = self.extension(Q2_EXT_FEATURE_NAMES) or b""
    # The last name may be cut short.
    for at in range(0, len(table) - 2, FEATURE_ENTRY_BYTES):
        if table[at] == 0:
            raw = table[at + 2:at + FEATURE_ENTRY_BYTES].split(b"\0", 1)[0]
            # Ends up in messages: nothing that could drive a terminal.
            names[table[at + 1]] = raw.decode("utf-8", "replace").encode(
                "unicode_escape").decode("ascii")
    return [(bit, names.get(bit)) for bit in range(64) if unknown >> bit & 1]


cdef void store_fields(const q2_header *h, uint8_t *out) noexcept nogil:
    cdef uint32_t i
    for i in range(112):
        out[i] = 0
    q2_store_be32(out, Q2_MAGIC)
    q2_store_be32(out + Q2_HDR_VERSION, h.version)
    q2_store_be64(out + Q2_HDR_BACKING_OFFSET, h.backing_offset)
    q2_store_be32(out + Q2_HDR_BACKING_SIZE, h.backing_size)
    q2_store_be32(out + Q2_HDR_CLUSTER_BITS, h.cluster_bits)
    q2_store_be64(out + Q2_HDR_SIZE, q2_load(&h.size))
    q2_store_be32(out + Q2_HDR_CRYPT_METHOD, h.crypt_method)
    q2_store_be32(out + Q2_HDR_L1_SIZE, q2_load32(&h.l1_size))
    q2_store_be64(out + Q2_HDR_L1_OFFSET, q2_load(&h.l1_offset))
    q2_store_be64(out + Q2_HDR_RT_OFFSET, q2_load(&h.rt_offset))
    q2_store_be32(out + Q2_HDR_RT_CLUSTERS, q2_load32(&h.rt_clusters))
    q2_store_be32(out + Q2_HDR_NB_SNAPSHOTS, q2_load32(&h.nb_snapshots))
    q2_store_be64(out + Q2_HDR_SNAPSHOTS_OFFSET, q2_load(&h.snapshots_offset))
    q2_store_be64(out + Q2_HDR_INCOMPAT, q2_load(&h.incompat))
    q2_store_be64(out + Q2_HDR_COMPAT, h.compat)
    q2_store_be64(out + Q2_HDR_AUTOCLEAR, h.autoclear)
    q2_store_be32(out + Q2_HDR_REFCOUNT_ORDER, h.refcount_order)
    q2_store_be32(out + Q2_HDR_HEADER_LENGTH, h.header_length)
    out[Q2_HDR_COMPRESSION_TYPE] = <uint8_t>h.compression_type


def feature_name_table():
    """The feature name table extension with the names of all features known here."""
    return b"".join(bytes((kind, bit)) + name.ljust(46, b"\0")
                    for kind, bit, name in FEATURE_NAMES)


cdef object bad_extension(object name, object at, str what, str more=""):
    where = "" if at is None else f" (offset {at:#x}, header_read)"
    exc = FormatError(f"{name}: {what}{more}{where}")._where(str(name), at, "header_read")
    exc.what = what
    return exc


cdef str text_of(bytes raw):
    return raw.decode("utf-8", "surrogateescape")


cdef object bytes_of(object text):
    return text.encode("utf-8", "surrogateescape") if text else None
