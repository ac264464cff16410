# cython: language_level=3
"""The disk in a LUKS container: sectors of 512 bytes, encrypted, behind a header in another storage.

As with the data clusters of an encrypted image (sectors.pyx) a write of part of a sector reads it,
merges and writes it back, alone; everything in whole sectors shares the cipher's `edges` lock.
"""
from libc.stddef cimport size_t
from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from qcow2x._core.crypto cimport CRYPTO_SECTOR, SectorCipher
from qcow2x._core.errors cimport fail
from qcow2x._core.scratch cimport scratch_give, scratch_take
from qcow2x._core.status cimport *
from qcow2x._core.storage cimport Storage
from qcow2x._core.sync cimport *

cdef enum:
    # Encrypted, then written, while still in the second-level cache.
    CHUNK = 128 * 1024


cdef class LuksDisk(Storage):
    """What a LUKS container in ``below`` holds from byte ``payload_offset`` on. Closing it leaves
    ``below`` open.

    Where the container grew without being written its new bytes are not zeros but whatever zeros
    decrypt to.
    """
    cdef Storage below
    cdef SectorCipher cipher
    cdef uint64_t payload_offset

    def __init__(self, Storage below not None, SectorCipher cipher not None,
                 uint64_t payload_offset):
        self.below = below
        self.cipher = cipher
        self.payload_offset = payload_offset
        self.name = below.name
        self.read_only = below.read_only
        self.fixed_size = below.fixed_size
        self.durable_writes = below.durable_writes

    cdef q2_status get_size(self, uint64_t *nbytes) noexcept nogil:
        cdef uint64_t size = 0
        cdef q2_status st = self.below.get_size(&size)
        # A container that ends inside a sector has all of it.
        size = (size + CRYPTO_SECTOR - 1) & ~<uint64_t>(CRYPTO_SECTOR - 1)
        nbytes[0] = size - self.payload_offset if size > self.payload_offset else 0
        return st

    cdef q2_status read_at(self, int32_t site, void *buf, size_t nbytes,
                           uint64_t off) noexcept nogil:
        cdef uint8_t *out = <uint8_t *>buf
        cdef uint64_t size = 0
        cdef q2_status st = self.get_size(&size)
        if st != Q2_OK:
            return st
        if off >= size:
            memset(out, 0, nbytes)
            return Q2_OK
        if nbytes > size - off:
            memset(out + (size - off), 0, nbytes - (size - off))
            nbytes = size - off
        pthread_rwlock_rdlock(&self.cipher.edges)
        st = self.read_inside(site, out, nbytes, off)
        pthread_rwlock_unlock(&self.cipher.edges)
        return st

    cdef q2_status read_inside(self, int32_t site, uint8_t *out, size_t nbytes,
                               uint64_t off) noexcept nogil:
        cdef uint8_t sector[CRYPTO_SECTOR]
        cdef size_t lead, now
        cdef q2_status st = Q2_OK
        while nbytes and st == Q2_OK:
            lead = off & (CRYPTO_SECTOR - 1)
            if lead or nbytes < CRYPTO_SECTOR:
                now = min(nbytes, <size_t>CRYPTO_SECTOR - lead)
                st = self.read_sectors(site, sector, CRYPTO_SECTOR, off - lead)
                if st == Q2_OK:
                    memcpy(out, sector + lead, now)
            else:
                now = min(nbytes & ~<size_t>(CRYPTO_SECTOR - 1), <size_t>CHUNK)
                st = self.read_sectors(site, out, now, off)
            out += now
            off += now
            nbytes -= now
        return st

    cdef q2_status read_sectors(self, int32_t site, uint8_t *out, size_t nbytes,
                                uint64_t off) noexcept nogil:
        cdef q2_status st = self.below.read_at(site, out, nbytes, self.payload_offset + off)
        return self.cipher.decrypt(out, out, nbytes, off) if st == Q2_OK else st

    cdef q2_status write_at(self, int32_t site, const void *buf, size_t nbytes, uint64_t off,
                            uint32_t flags) noexcept nogil:
        cdef const uint8_t *src = <const uint8_t *>buf
        cdef size_t lead, now
        cdef q2_status st = Q2_OK
        cdef uint8_t *scratch
        if self.read_only:
            return fail(Q2_E_READONLY, site, off, b"the storage is open read-only")
        scratch = <uint8_t *>scratch_take(CHUNK)
        if scratch is NULL:
            return fail(Q2_E_NOMEM, site, off, b"out of memory")
        if (off | nbytes) & (CRYPTO_SECTOR - 1):
            pthread_rwlock_wrlock(&self.cipher.edges)
        else:
            pthread_rwlock_rdlock(&self.cipher.edges)
        while nbytes and st == Q2_OK:
            lead = off & (CRYPTO_SECTOR - 1)
            if lead or nbytes < CRYPTO_SECTOR:
                now = min(nbytes, <size_t>CRYPTO_SECTOR - lead)
                st = self.read_sectors(site, scratch, CRYPTO_SECTOR, off - lead)
                memcpy(scratch + lead, src, now)
                if st == Q2_OK:
                    st = self.cipher.encrypt(scratch, scratch, CRYPTO_SECTOR, off - lead)
                if st == Q2_OK:
                    st = self.below.write_at(site, scratch, CRYPTO_SECTOR,
                                             self.payload_offset + off - lead, flags)
            else:
                now = min(nbytes & ~<size_t>(CRYPTO_SECTOR - 1), <size_t>CHUNK)
                st = self.cipher.encrypt(src, scratch, now, off)
                if st == Q2_OK:
                    st = self.below.write_at(site, scratch, now, self.payload_offset + off, flags)
            src += now
            off += now
            nbytes -= now
        pthread_rwlock_unlock(&self.cipher.edges)
        scratch_give(scratch, CHUNK)
        if st == Q2_OK:
            self.note_write()
        return st

    cdef q2_status sync(self, int32_t site) noexcept nogil:
        cdef uint64_t seq = q2_load(&self.write_seq)
        cdef q2_status st = self.below.sync(site)
        if st == Q2_OK:
            self.note_sync(seq)
        return st

    cdef q2_status set_size(self, int32_t site, uint64_t nbytes) noexcept nogil:
        cdef q2_status st = self.below.set_size(site, self.payload_offset + nbytes)
        if st == Q2_OK:
            self.note_write()
        return st

    cdef q2_status allocate(self, int32_t site, uint64_t off, uint64_t nbytes) noexcept nogil:
        return self.below.allocate(site, self.payload_offset + off, nbytes)
