# cython: language_level=3
"""Data clusters of an encrypted image.

The unit of encryption is a sector of 512 bytes, so a write of part of one reads it, merges and
writes it back. Two such writes to one sector, or one and a write of the whole sector, would lose
one's bytes, and a reader in between would decrypt a mixture: they exclude each other by the
cipher's `edges` lock, which everything that works in whole sectors only shares.
"""
from libc.stdint cimport uint8_t
from libc.string cimport memcpy

from qcow2x._core.crypto cimport CRYPTO_SECTOR, SectorCipher
from qcow2x._core.errors cimport fail
from qcow2x._core.scratch cimport scratch_give, scratch_take
from qcow2x._core.status cimport *
from qcow2x._core.storage cimport WRITE_FUA
from qcow2x._core.sync cimport *

cdef extern from "qcow2x/iov.h" nogil:
    ctypedef struct q2_iov:
        const iovec *iov
        int n
        size_t used
    q2_iov q2_iov_start(const iovec *iov, int n)
    size_t q2_iov_bytes(const iovec *iov, int n)
    void q2_iov_advance(q2_iov *at, size_t n)
    void q2_iov_take(q2_iov *at, void *dst, size_t n)

cdef enum:
    # Encrypted, then written, while still in the second-level cache.
    CHUNK = 128 * 1024
    # A durable write waits for the device each time: fewer, larger ones.
    DURABLE_CHUNK = 4 * 1024 * 1024


cdef inline uint64_t whole_sectors(uint64_t nbytes) noexcept nogil:
    return (nbytes + CRYPTO_SECTOR - 1) & ~<uint64_t>(CRYPTO_SECTOR - 1)


cdef inline uint64_t numbered_from(SectorCipher cipher, uint64_t host_off,
                                   uint64_t guest_off) noexcept nogil:
    return guest_off if cipher.by_guest else host_off


cdef q2_status read_sectors(ImageState img, int32_t site, uint8_t *buf, size_t nbytes,
                            uint64_t host_off, uint64_t guest_off) noexcept nogil:
    cdef q2_status st = img.data.read_at(site, buf, nbytes, host_off)
    if st != Q2_OK:
        return st
    return img.cipher.decrypt(buf, buf, nbytes, numbered_from(img.cipher, host_off, guest_off))


cdef q2_status read_in_part(ImageState img, int32_t site, uint8_t *buf, size_t nbytes,
                            uint64_t host_off, uint64_t guest_off) noexcept nogil:
    """A range whose first or last sector is wanted only in part, by way of a buffer."""
    cdef uint64_t lead = host_off & (CRYPTO_SECTOR - 1)
    cdef size_t now
    cdef uint8_t *scratch = <uint8_t *>scratch_take(CHUNK)
    cdef q2_status st = Q2_OK
    if scratch is NULL:
        return fail(Q2_E_NOMEM, site, host_off, b"out of memory")
    while nbytes and st == Q2_OK:
        now = nbytes if nbytes < CHUNK - lead else CHUNK - lead
        st = read_sectors(img, site, scratch, whole_sectors(lead + now), host_off - lead,
                          guest_off - lead)
        if st == Q2_OK:
            memcpy(buf, scratch + lead, now)
        buf += now
        nbytes -= now
        host_off += now
        guest_off += now
        lead = 0
    scratch_give(scratch, CHUNK)
    return st


cdef q2_status read_encrypted(ImageState img, int32_t site, void *buf, size_t nbytes,
                              uint64_t host_off, uint64_t guest_off) noexcept nogil:
    cdef pthread_rwlock_t *edges = &img.cipher.edges
    cdef uint8_t *out = <uint8_t *>buf
    cdef size_t now
    cdef q2_status st = Q2_OK
    pthread_rwlock_rdlock(edges)
    if (host_off | nbytes) & (CRYPTO_SECTOR - 1):
        st = read_in_part(img, site, out, nbytes, host_off, guest_off)
        nbytes = 0
    while nbytes and st == Q2_OK:
        now = nbytes if nbytes < CHUNK else CHUNK
        st = read_sectors(img, site, out, now, host_off, guest_off)
        out += now
        nbytes -= now
        host_off += now
        guest_off += now
    pthread_rwlock_unlock(edges)
    return st


cdef q2_status write_chunk(ImageState img, int32_t site, q2_iov *at, size_t nbytes,
                           uint64_t host_off, uint64_t guest_off, uint32_t flags,
                           uint8_t *scratch) noexcept nogil:
    """As many bytes as fit in scratch with the sectors around them."""
    cdef uint64_t lead = host_off & (CRYPTO_SECTOR - 1)
    cdef uint64_t hull = whole_sectors(lead + nbytes)
    cdef uint64_t first = numbered_from(img.cipher, host_off, guest_off) - lead
    cdef uint64_t last
    cdef const uint8_t *plain = scratch
    cdef q2_status st = Q2_OK
    q2_iov_advance(at, 0)
    if hull == nbytes and at.iov.iov_len - at.used >= nbytes:
        # Straight from where it lies.
        plain = <const uint8_t *>at.iov.iov_base + at.used
        q2_iov_advance(at, nbytes)
    else:
        if lead:
            st = read_sectors(img, site, scratch, CRYPTO_SECTOR, host_off - lead, guest_off - lead)
        if st == Q2_OK and hull != lead + nbytes and (lead == 0 or hull > CRYPTO_SECTOR):
            last = hull - CRYPTO_SECTOR
            st = read_sectors(img, site, scratch + last, CRYPTO_SECTOR, host_off - lead + last,
                              guest_off - lead + last)
        q2_iov_take(at, scratch + lead, nbytes)
    if st == Q2_OK:
        st = img.cipher.encrypt(plain, scratch, hull, first)
    if st == Q2_OK:
        st = img.data.write_at(site, scratch, hull, host_off - lead, flags)
    return st


cdef q2_status write_encrypted(ImageState img, int32_t site, const iovec *iov, int32_t n,
                               uint64_t host_off, uint64_t guest_off,
                               uint32_t flags) noexcept nogil:
    cdef pthread_rwlock_t *edges = &img.cipher.edges
    cdef q2_iov at = q2_iov_start(iov, n)
    cdef size_t nbytes = q2_iov_bytes(iov, n)
    cdef size_t room = DURABLE_CHUNK if flags & WRITE_FUA else CHUNK
    cdef size_t now
    cdef uint8_t *scratch
    cdef q2_status st = Q2_OK
    if room > nbytes + 2 * CRYPTO_SECTOR:
        room = whole_sectors(nbytes) + CRYPTO_SECTOR
    scratch = <uint8_t *>scratch_take(room)
    if scratch is NULL:
        return fail(Q2_E_NOMEM, site, host_off, b"out of memory")
    if (host_off | nbytes) & (CRYPTO_SECTOR - 1):
        pthread_rwlock_wrlock(edges)
    else:
        pthread_rwlock_rdlock(edges)
    while nbytes and st == Q2_OK:
        now = room - (host_off & (CRYPTO_SECTOR - 1))
        if now > nbytes:
            now = nbytes
        st = write_chunk(img, site, &at, now, host_off, guest_off, flags, scratch)
        nbytes -= now
        host_off += now
        guest_off += now
    pthread_rwlock_unlock(edges)
    scratch_give(scratch, room)
    return st
