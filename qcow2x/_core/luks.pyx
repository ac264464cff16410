# cython: language_level=3
"""The LUKS1 header of an encrypted image: where it is decoded, opened with a passphrase, made anew,
and where its key slots are filled and erased. "LUKS On-Disk Format Specification" version 1.2.3.

In a qcow2 file the header lies in clusters of its own, which the encryption header extension names,
and only the headers and key slots are there: the payload is the image's data clusters.

A master key is only ever in a buffer of this module that is wiped before its function returns.
"""
from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset
from posix.time cimport CLOCK_THREAD_CPUTIME_ID, clock_gettime, timespec

from qcow2x._core.crypto cimport *
from qcow2x._core.crypto cimport SectorCipher
from qcow2x._core.wire cimport *

import uuid

from qcow2x.errors import FormatError, UnsupportedFeature

cdef enum:
    HEADER_BYTES = 592
    SECTOR = CRYPTO_SECTOR
    FIRST_MATERIAL = 4096            # what lies before belongs to the header
    MATERIAL_ALIGN = 4096
    STRIPES = 4000
    SLOT_ENTRY_BYTES = 48
    SLOTS_AT = 208
    MAX_DIGEST = 64
    LEGACY_KEY_BYTES = 16

cdef const char *MAGIC = b"LUKS\xba\xbe"
cdef uint32_t SLOT_ACTIVE = 0x00ac71f3
cdef uint32_t SLOT_DISABLED = 0x0000dead

# The digests that QEMU knows; which of them libcrypto has is asked of it.
cdef tuple HASHES = ("md5", "sha1", "sha224", "sha256", "sha384", "sha512", "ripemd160")
cdef dict IVGENS = {"plain": IV_PLAIN, "plain64": IV_PLAIN64, "essiv": IV_ESSIV}
cdef dict MODES = {"xts": MODE_XTS, "cbc": MODE_CBC}

#: What opening an image may cost at most, in PBKDF2 iterations over all active slots: a minute or
#: two. A header may claim 2^32 for each, which would hold up the program for an hour.
MAX_ITERATIONS = 1 << 27
#: The most that a slot made here gets, so that eight of them stay openable.
MAX_SLOT_ITERATIONS = 1 << 23
MIN_ITERATIONS = 1000
cdef uint64_t MAX_COST = MAX_ITERATIONS
cdef uint32_t MAX_SLOT = MAX_SLOT_ITERATIONS


cdef uint64_t material_bytes(const q2_luks *luks) noexcept nogil:
    """Of one slot: the split key, in whole sectors."""
    cdef uint64_t nbytes = <uint64_t>luks.key_bytes * STRIPES
    return (nbytes + SECTOR - 1) & ~<uint64_t>(SECTOR - 1)


# ---- Anti-forensic splitter: a key spread so that losing any stripe of it loses the key -------


cdef bint diffuse(const char *hash_spec, uint8_t *block, size_t nbytes) noexcept nogil:
    cdef uint8_t digest[MAX_DIGEST]
    cdef uint8_t counter[4]
    cdef size_t size = digest_bytes(hash_spec)
    cdef size_t done = 0, now
    cdef uint32_t i = 0
    while done < nbytes:
        now = nbytes - done if nbytes - done < size else size
        q2_store_be32(counter, i)
        if not digest_of(hash_spec, counter, 4, block + done, now, digest):
            return False
        memcpy(block + done, digest, now)
        done += now
        i += 1
    wipe(digest, sizeof(digest))
    return True


cdef inline void xor_into(uint8_t *block, const uint8_t *other, size_t nbytes) noexcept nogil:
    cdef size_t i
    for i in range(nbytes):
        block[i] ^= other[i]


# All stripes but the last, hashed together: what the last one is masked with.
cdef bint fold_stripes(const q2_luks *luks, const uint8_t *material, uint8_t *mask) noexcept nogil:
    cdef size_t nbytes = luks.key_bytes
    cdef int i
    memset(mask, 0, nbytes)
    for i in range(STRIPES - 1):
        xor_into(mask, material + i * nbytes, nbytes)
        if not diffuse(luks.hash_spec, mask, nbytes):
            return False
    return True


cdef bint merge_key(const q2_luks *luks, const uint8_t *material, uint8_t *key) noexcept nogil:
    if not fold_stripes(luks, material, key):
        return False
    xor_into(key, material + (STRIPES - 1) * <size_t>luks.key_bytes, luks.key_bytes)
    return True


cdef bint split_key(const q2_luks *luks, const uint8_t *key, uint8_t *material) noexcept nogil:
    cdef uint8_t mask[MAX_KEY_BYTES]
    cdef uint8_t *last = material + (STRIPES - 1) * <size_t>luks.key_bytes
    cdef bint done = (random_fill(material, material_bytes(luks))
                      and fold_stripes(luks, material, mask))
    if done:
        memcpy(last, key, luks.key_bytes)
        xor_into(last, mask, luks.key_bytes)
    wipe(mask, sizeof(mask))
    return done


# ---- The header on disk -----------------------------------------------------------------------


cdef bint take_text(q2_cursor *at, char *out, size_t nbytes) noexcept nogil:
    """A text that ends inside its field; False where it does not."""
    cdef const uint8_t *field = q2_take(at, nbytes)
    memset(out, 0, nbytes + 1)
    if field is NULL:
        return False
    memcpy(out, field, nbytes)
    return out[nbytes - 1] == 0


cdef const char *decode_header(const uint8_t *buf, size_t nbytes, q2_luks *luks) noexcept nogil:
    """NULL, or what is wrong."""
    cdef q2_cursor at = q2_cursor_over(buf, nbytes)
    cdef const uint8_t *magic = q2_take(&at, 6)
    cdef const uint8_t *part
    cdef uint32_t state
    cdef int i
    cdef uint16_t version = q2_take_be16(&at)
    if not at.ok or not same_bytes(magic, MAGIC, 6):
        return b"it does not start with the magic bytes"
    if version != 1:
        return b"its version is not 1"
    if not take_text(&at, luks.cipher_name, TEXT_BYTES):
        return b"the cipher name does not end inside its field"
    if not take_text(&at, luks.cipher_mode, TEXT_BYTES):
        return b"the cipher mode does not end inside its field"
    if not take_text(&at, luks.hash_spec, TEXT_BYTES):
        return b"the hash name does not end inside its field"
    luks.payload_sector = q2_take_be32(&at)
    luks.key_bytes = q2_take_be32(&at)
    part = q2_take(&at, DIGEST_BYTES)
    if part is not NULL:
        memcpy(luks.digest, part, DIGEST_BYTES)
    part = q2_take(&at, SALT_BYTES)
    if part is not NULL:
        memcpy(luks.digest_salt, part, SALT_BYTES)
    luks.digest_iterations = q2_take_be32(&at)
    if not take_text(&at, luks.uuid, UUID_BYTES):
        return b"the UUID does not end inside its field"
    for i in range(SLOTS):
        state = q2_take_be32(&at)
        luks.slot[i].active = state == SLOT_ACTIVE
        luks.slot[i].iterations = q2_take_be32(&at)
        part = q2_take(&at, SALT_BYTES)
        if part is not NULL:
            memcpy(luks.slot[i].salt, part, SALT_BYTES)
        luks.slot[i].sector = q2_take_be32(&at)
        luks.slot[i].stripes = q2_take_be32(&at)
        if at.ok and state != SLOT_ACTIVE and state != SLOT_DISABLED:
            return b"a key slot is neither active nor disabled"
    if not at.ok:
        return b"it is cut off"
    return NULL


cdef const char *check_header(const q2_luks *luks, uint64_t area_bytes,
                              bint detached) noexcept nogil:
    """NULL, or what is wrong with the figures of a header whose area has area_bytes."""
    cdef uint64_t sectors = material_bytes(luks) // SECTOR
    cdef uint64_t start, other
    cdef uint64_t cost = 0
    cdef int i, j
    if luks.digest_iterations == 0:
        return b"the master key's digest has no iterations"
    for i in range(SLOTS):
        start = luks.slot[i].sector
        if luks.slot[i].stripes != STRIPES:
            return b"a key slot has not 4000 stripes"
        if start < FIRST_MATERIAL // SECTOR:
            return b"a key slot overlaps the header"
        if (not detached and start + sectors > luks.payload_sector) or (start + sectors) * SECTOR > area_bytes:
            return b"a key slot lies beyond the end of the encryption header"
        for j in range(i):
            other = luks.slot[j].sector
            if start < other + sectors and other < start + sectors:
                return b"two key slots overlap"
        if luks.slot[i].active:
            if luks.slot[i].iterations == 0:
                return b"an active key slot has no iterations"
            cost += <uint64_t>luks.slot[i].iterations + luks.digest_iterations
    if cost > MAX_COST:
        return b"trying its key slots would take more than 134217728 iterations, the limit here"
    return NULL


cdef void encode_header(const q2_luks *luks, uint8_t *out) noexcept nogil:
    cdef uint8_t *slot
    cdef int i
    memset(out, 0, HEADER_BYTES)
    memcpy(out, MAGIC, 6)
    out[7] = 1
    memcpy(out + 8, luks.cipher_name, TEXT_BYTES)
    memcpy(out + 40, luks.cipher_mode, TEXT_BYTES)
    memcpy(out + 72, luks.hash_spec, TEXT_BYTES)
    q2_store_be32(out + 104, luks.payload_sector)
    q2_store_be32(out + 108, luks.key_bytes)
    memcpy(out + 112, luks.digest, DIGEST_BYTES)
    memcpy(out + 132, luks.digest_salt, SALT_BYTES)
    q2_store_be32(out + 164, luks.digest_iterations)
    memcpy(out + 168, luks.uuid, UUID_BYTES)
    for i in range(SLOTS):
        slot = out + SLOTS_AT + i * SLOT_ENTRY_BYTES
        q2_store_be32(slot, SLOT_ACTIVE if luks.slot[i].active else SLOT_DISABLED)
        q2_store_be32(slot + 4, luks.slot[i].iterations)
        memcpy(slot + 8, luks.slot[i].salt, SALT_BYTES)
        q2_store_be32(slot + 40, luks.slot[i].sector)
        q2_store_be32(slot + 44, luks.slot[i].stripes)


# ---- Opening and filling a slot ---------------------------------------------------------------


cdef bint digest_key(const q2_luks *luks, const uint8_t *key, uint8_t *digest) noexcept nogil:
    return stretch_key(luks.hash_spec, key, luks.key_bytes, luks.digest_salt, SALT_BYTES,
                       luks.digest_iterations, digest, DIGEST_BYTES)


# Enough of libcrypto's answers are "no" only for want of memory to call them all that.
cdef object no_memory(object name):
    return MemoryError(f"{name}: libcrypto refused, most likely for want of memory")


cdef SectorCipher slot_cipher(LuksHeader self, int index, const Py_buffer *passphrase):
    """What the key material of one slot is encrypted with."""
    cdef q2_luks *luks = &self.luks
    cdef uint8_t key[MAX_KEY_BYTES]
    cdef bint done
    cdef SectorCipher cipher = None
    with nogil:
        done = stretch_key(luks.hash_spec, <const uint8_t *>passphrase.buf, passphrase.len,
                           luks.slot[index].salt, SALT_BYTES, luks.slot[index].iterations, key,
                           luks.key_bytes)
    if done:
        cipher = new_cipher(key, luks.key_bytes, luks.mode, luks.ivgen, luks.essiv_hash, False)
    wipe(key, sizeof(key))
    if cipher is None:
        raise no_memory(self.name)
    return cipher


cdef int open_slot(LuksHeader self, int index, bytes stored, const Py_buffer *passphrase,
                   uint8_t *master) except -1:
    """1 and the master key if the passphrase opens the slot, else 0."""
    cdef q2_luks *luks = &self.luks
    cdef SectorCipher cipher = slot_cipher(self, index, passphrase)
    cdef uint64_t nbytes = material_bytes(luks)
    cdef uint8_t digest[DIGEST_BYTES]
    cdef const uint8_t *sealed = stored
    cdef uint8_t *material
    cdef bint done
    if <uint64_t>len(stored) != nbytes:
        raise bad_header(self.name, "its key slots are cut off")
    material = <uint8_t *>malloc(nbytes)
    if material is NULL:
        raise no_memory(self.name)
    with nogil:
        done = (cipher.decrypt(sealed, material, nbytes, 0) == 0
                and merge_key(luks, material, master) and digest_key(luks, master, digest))
        wipe(material, nbytes)
        free(material)
    if not done:
        raise no_memory(self.name)
    return same_bytes(digest, luks.digest, DIGEST_BYTES)


cdef bytes fill_slot(LuksHeader self, int index, const Py_buffer *passphrase,
                     const uint8_t *master, uint32_t iterations):
    """The encrypted key material; the slot's entry is set."""
    cdef q2_luks *luks = &self.luks
    cdef uint64_t nbytes = material_bytes(luks)
    cdef uint8_t *material
    cdef SectorCipher cipher
    cdef bint done = random_fill(luks.slot[index].salt, SALT_BYTES)
    luks.slot[index].iterations = iterations
    luks.slot[index].active = True
    cipher = slot_cipher(self, index, passphrase)
    material = <uint8_t *>malloc(nbytes)
    if material is NULL:
        raise no_memory(self.name)
    with nogil:
        done = (done and split_key(luks, master, material)
                and cipher.encrypt(material, material, nbytes, 0) == 0)
    # Encrypted by now, or to be wiped: either way what is returned is no secret.
    sealed = <bytes>material[:nbytes] if done else None
    wipe(material, nbytes)
    free(material)
    if not done:
        raise no_memory(self.name)
    return sealed


cdef uint32_t count_iterations(const q2_luks *luks, uint32_t milliseconds):
    """PBKDF2 iterations that take this thread about so long."""
    cdef timespec start, end
    cdef uint8_t out[MAX_KEY_BYTES]
    cdef uint8_t salt[SALT_BYTES]
    cdef uint32_t n = 4096
    cdef double seconds = 0, wanted
    memset(salt, 0, SALT_BYTES)
    while seconds < 0.02 and n < MAX_SLOT:
        n *= 2
        with nogil:
            clock_gettime(CLOCK_THREAD_CPUTIME_ID, &start)
            stretch_key(luks.hash_spec, salt, SALT_BYTES, salt, SALT_BYTES, n, out,
                        luks.key_bytes)
            clock_gettime(CLOCK_THREAD_CPUTIME_ID, &end)
        seconds = (end.tv_sec - start.tv_sec) + (end.tv_nsec - start.tv_nsec) * 1e-9
    wanted = n * (milliseconds / 1000.0) / max(seconds, 1e-6)
    return <uint32_t>min(max(wanted, MIN_ITERATIONS), MAX_SLOT)


cdef object bad_header(object name, str what):
    return FormatError(f"{name}: the encryption header is not valid: {what}")._where(
        str(name), None, "crypto_read")


cdef object not_here(object name, str what):
    return UnsupportedFeature(f"{name}: the image needs what is not supported: {what}",
                              features=(what,))._where(str(name), None, "crypto_read")


cdef set_text(char *field, str text):
    cdef bytes raw = text.encode("ascii")
    if len(raw) >= TEXT_BYTES:
        raise ValueError(f"{text!r} is too long")
    memset(field, 0, TEXT_BYTES + 1)
    memcpy(field, <const char *>raw, len(raw))


cdef class LuksHeader:
    """One image's LUKS1 header: :meth:`load` decodes it, :meth:`new` starts one.

    Not safe to change from several threads at once. Passphrases are buffers; none is kept.
    """

    @staticmethod
    def load(first_bytes, uint64_t area_bytes, name="image", bint detached=False):
        """From at least the first 592 bytes of an area that has ``area_bytes``. ``detached``: the
        payload may be in another file.

        Raises FormatError for what breaks the specification or QEMU's limits (or
        :data:`MAX_ITERATIONS`), UnsupportedFeature, naming it, for a cipher, mode or hash that
        cannot be used here.
        """
        cdef LuksHeader self = LuksHeader.__new__(LuksHeader)
        cdef bytes head = bytes(first_bytes)
        cdef const char *wrong = decode_header(head, min(<uint64_t>len(head), area_bytes),
                                               &self.luks)
        self.name = name
        if wrong is NULL:
            self._understand()
            wrong = check_header(&self.luks, area_bytes, detached)
        if wrong is not NULL:
            raise bad_header(name, (<bytes>wrong).decode("ascii"))
        return self

    @staticmethod
    def new(str cipher, str mode, str ivgen, str hash, ivgen_hash=None, name="new image"):
        """A header without keys; ``cipher`` is ``aes-128``, ``aes-192`` or ``aes-256``.

        Raises ValueError for a combination that does not exist.
        """
        cdef LuksHeader self = LuksHeader.__new__(LuksHeader)
        cdef uint64_t sectors
        cdef int i
        self.name = name
        key_bytes = {"aes-128": 16, "aes-192": 24, "aes-256": 32}.get(cipher)
        if key_bytes is None:
            raise not_here(name, f"LUKS cipher {cipher}")
        if mode not in MODES:
            raise not_here(name, f"LUKS cipher mode {mode}")
        if ivgen not in IVGENS:
            raise not_here(name, f"LUKS IV generator {ivgen}")
        if (ivgen == "essiv") != (ivgen_hash is not None):
            raise ValueError("the IV generator essiv, and only it, needs a hash")
        self.luks.key_bytes = key_bytes * 2 if mode == "xts" else key_bytes
        if material_bytes(&self.luks) != <uint64_t>self.luks.key_bytes * STRIPES:
            raise ValueError("aes-192 in cbc mode makes key slots of half a sector, which QEMU "
                             "cannot read; choose xts or another key size")
        set_text(self.luks.cipher_name, "aes")
        set_text(self.luks.cipher_mode,
                 f"{mode}-{ivgen}" if ivgen_hash is None else f"{mode}-{ivgen}:{ivgen_hash}")
        set_text(self.luks.hash_spec, hash)
        self._understand()
        identity = str(uuid.uuid4()).encode("ascii")
        memcpy(self.luks.uuid, <const char *>identity, len(identity))
        sectors = ((material_bytes(&self.luks) + MATERIAL_ALIGN - 1) // MATERIAL_ALIGN
                   * (MATERIAL_ALIGN // SECTOR))
        for i in range(SLOTS):
            self.luks.slot[i].sector = <uint32_t>(FIRST_MATERIAL // SECTOR + i * sectors)
            self.luks.slot[i].stripes = STRIPES
        self.luks.payload_sector = <uint32_t>(FIRST_MATERIAL // SECTOR + SLOTS * sectors)
        return self

    def _understand(self):
        """What the texts of the header mean to us."""
        name = _text(self.luks.cipher_name)
        mode, _, generator = _text(self.luks.cipher_mode).partition("-")
        generator, _, essiv_hash = generator.partition(":")
        if name != "aes" or mode not in MODES or generator not in IVGENS:
            raise not_here(self.name, f"LUKS cipher {name}-{_text(self.luks.cipher_mode)}")
        self.luks.mode = MODES[mode]
        self.luks.ivgen = IVGENS[generator]
        halves = 2 if mode == "xts" else 1
        if self.luks.key_bytes not in (16 * halves, 24 * halves, 32 * halves):
            raise bad_header(self.name, f"{name}-{mode} has no keys of {self.luks.key_bytes} bytes")
        _known_hash(self.name, _text(self.luks.hash_spec))
        if generator == "essiv":
            _known_hash(self.name, essiv_hash)
            set_text(self.luks.essiv_hash, essiv_hash)
            if digest_bytes(self.luks.essiv_hash) not in (16, 32):
                raise not_here(self.name, f"LUKS IV generator essiv:{essiv_hash}")

    def unlock(self, pread, passphrase):
        """The cipher of the data clusters, or None if the passphrase opens no slot.

        ``pread(length, offset)`` reads the header's area. Tries the active slots in order, each
        for as long as its iterations take, without the GIL.
        """
        cdef uint8_t master[MAX_KEY_BYTES]
        cdef SectorCipher cipher = None
        try:
            if self._open_slots(pread, passphrase, False, master):
                cipher = new_cipher(master, self.luks.key_bytes, self.luks.mode, self.luks.ivgen,
                                    self.luks.essiv_hash, False)
                if cipher is None:
                    raise no_memory(self.name)
        finally:
            wipe(master, sizeof(master))
        return cipher

    def slots_of(self, pread, passphrase):
        """The numbers of all slots that the passphrase opens."""
        cdef uint8_t master[MAX_KEY_BYTES]
        try:
            return self._open_slots(pread, passphrase, True, master)
        finally:
            wipe(master, sizeof(master))

    cdef list _open_slots(self, pread, passphrase, bint every, uint8_t *master):
        cdef Py_buffer view
        cdef int i
        cdef list opened = []
        PyObject_GetBuffer(passphrase, &view, PyBUF_SIMPLE)
        try:
            for i in range(SLOTS):
                if self.luks.slot[i].active:
                    stored = bytes(pread(material_bytes(&self.luks),
                                         <uint64_t>self.luks.slot[i].sector * SECTOR))
                    if open_slot(self, i, stored, &view, master):
                        opened.append(i)
                        if not every:
                            break
        finally:
            PyBuffer_Release(&view)
        return opened

    def make_master_key(self, passphrase, uint32_t milliseconds):
        """Draws a master key and puts it in slot 0: the bytes of the whole area.

        Opening the slot will take this machine about ``milliseconds``.
        """
        cdef uint8_t master[MAX_KEY_BYTES]
        cdef uint32_t iterations = count_iterations(&self.luks, milliseconds)
        cdef Py_buffer view
        cdef bint done
        self.luks.digest_iterations = max(iterations // 8, <uint32_t>MIN_ITERATIONS)
        PyObject_GetBuffer(passphrase, &view, PyBUF_SIMPLE)
        try:
            with nogil:
                done = (random_fill(master, self.luks.key_bytes)
                        and random_fill(self.luks.digest_salt, SALT_BYTES)
                        and digest_key(&self.luks, master, self.luks.digest))
            if not done:
                raise no_memory(self.name)
            material = fill_slot(self, 0, &view, master, iterations)
        finally:
            wipe(master, sizeof(master))
            PyBuffer_Release(&view)
        area = bytearray(self.payload_offset)
        area[:HEADER_BYTES] = self.encode()
        start = self.luks.slot[0].sector * SECTOR
        area[start:start + len(material)] = material
        return bytes(area)

    def add_key(self, pread, passphrase, new_passphrase, int slot, uint32_t milliseconds):
        """Fills ``slot`` (0 to 7) so that ``new_passphrase`` opens it, whatever it held.

        Returns the key material to write at the slot's offset, before :meth:`encode` is written at
        the area's start; None if ``passphrase`` opens no slot.
        """
        cdef uint8_t master[MAX_KEY_BYTES]
        cdef Py_buffer view
        if not 0 <= slot < SLOTS:
            raise ValueError(f"key slot {slot} is outside 0 to {SLOTS - 1}")
        PyObject_GetBuffer(new_passphrase, &view, PyBUF_SIMPLE)
        try:
            if not self._open_slots(pread, passphrase, False, master):
                return None
            return fill_slot(self, slot, &view, master, count_iterations(&self.luks, milliseconds))
        finally:
            wipe(master, sizeof(master))
            PyBuffer_Release(&view)

    def erase_key(self, int slot):
        """Marks ``slot`` disabled. Its key material must have been overwritten before."""
        if not 0 <= slot < SLOTS:
            raise ValueError(f"key slot {slot} is outside 0 to {SLOTS - 1}")
        memset(self.luks.slot[slot].salt, 0, SALT_BYTES)
        self.luks.slot[slot].iterations = 0
        self.luks.slot[slot].active = False

    def encode(self):
        """The header's 592 bytes."""
        cdef uint8_t out[HEADER_BYTES]
        encode_header(&self.luks, out)
        return <bytes>out[:HEADER_BYTES]

    @property
    def cipher(self):
        """As QEMU names it: ``aes-256`` and so on."""
        return f"aes-{self.luks.key_bytes * 8 // (2 if self.luks.mode == MODE_XTS else 1)}"

    @property
    def mode(self):
        return _text(self.luks.cipher_mode).partition("-")[0]

    @property
    def ivgen(self):
        return _text(self.luks.cipher_mode).partition("-")[2].partition(":")[0]

    @property
    def ivgen_hash(self):
        """The hash of ``essiv``, else None."""
        return _text(self.luks.essiv_hash) or None

    @property
    def hash(self):
        return _text(self.luks.hash_spec)

    @property
    def uuid(self):
        return _text(self.luks.uuid)

    @property
    def payload_offset(self):
        """Bytes of the area: header and key slots."""
        return self.luks.payload_sector * SECTOR

    @property
    def master_key_iterations(self):
        return self.luks.digest_iterations

    @property
    def material_bytes(self):
        """Bytes of one slot's key material."""
        return material_bytes(&self.luks)

    @property
    def slots(self):
        """``(active, iterations, key_offset, stripes)`` of each of the eight."""
        return [(bool(self.luks.slot[i].active), self.luks.slot[i].iterations,
                 self.luks.slot[i].sector * SECTOR, self.luks.slot[i].stripes)
                for i in range(SLOTS)]


def legacy_cipher(passphrase):
    """Encryption method 1: AES-128-CBC, keyed with the passphrase itself, cut or padded with zeros
    to 16 bytes, sectors numbered by their place on the guest disk. Any passphrase "fits"."""
    cdef uint8_t key[LEGACY_KEY_BYTES]
    cdef Py_buffer view
    cdef SectorCipher cipher
    memset(key, 0, sizeof(key))
    PyObject_GetBuffer(passphrase, &view, PyBUF_SIMPLE)
    memcpy(key, view.buf, min(<size_t>view.len, sizeof(key)))
    PyBuffer_Release(&view)
    cipher = new_cipher(key, sizeof(key), MODE_CBC, IV_PLAIN64, NULL, True)
    wipe(key, sizeof(key))
    if cipher is None:
        raise no_memory("image")
    return cipher


cdef str _text(const char *field):
    # Ends up in messages: nothing that could drive a terminal.
    return (<bytes>field).decode("latin-1").encode("unicode_escape").decode("ascii")


cdef _known_hash(object name, str hash):
    if hash not in HASHES or digest_bytes(hash.encode("ascii")) == 0:
        raise not_here(name, f"LUKS hash {hash}")
