# What encrypts the data clusters of an image: AES over sectors of 512 bytes, by libcrypto.
from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from qcow2x._core.status cimport q2_status
from qcow2x._core.sync cimport pthread_rwlock_t

cdef enum:
    CRYPTO_SECTOR = 512

    MODE_XTS = 0
    MODE_CBC = 1

    IV_PLAIN = 0             # the low 32 bits of the sector number
    IV_PLAIN64 = 1
    IV_ESSIV = 2             # the sector number, encrypted with the hash of the key

cdef extern from "qcow2x/format.h" nogil:
    enum:
        MAX_KEY_BYTES "Q2_MAX_KEY_BYTES"

cdef extern from "qcow2x/pool.h" nogil:
    ctypedef struct q2_pool:
        pass


cdef class SectorCipher:
    # Whether a sector is numbered by its place on the guest disk (legacy AES) or in the image file
    # (LUKS). Read-only after construction.
    cdef bint by_guest
    # Reader-writer: whole sectors are read and written shared, part of a sector is read, merged
    # and written back exclusively. Taken around I/O, after `meta` was let go; nothing is taken
    # under it.
    cdef pthread_rwlock_t edges

    cdef uint8_t mode
    cdef uint8_t ivgen
    cdef void *template      # the key schedules that new contexts are copies of
    cdef q2_pool contexts

    # Any thread, no GIL. nbytes whole sectors, the first of which is sector byte_off >> 9.
    # src and dst are the same or do not overlap.
    cdef q2_status encrypt(self, const uint8_t *src, uint8_t *dst, size_t nbytes,
                           uint64_t byte_off) noexcept nogil
    cdef q2_status decrypt(self, const uint8_t *src, uint8_t *dst, size_t nbytes,
                           uint64_t byte_off) noexcept nogil
    cdef q2_status run(self, bint encrypting, const uint8_t *src, uint8_t *dst, size_t nbytes,
                       uint64_t byte_off) noexcept nogil


# A cipher with this key: for XTS two AES keys of 16, 24 or 32 bytes each, for CBC one. The key is
# not kept, only its schedules inside libcrypto, which are wiped with the cipher. `essiv_hash` names
# a digest whose size is that of an AES key, NULL with other generators. NULL without memory or
# where libcrypto refuses, so the caller has to check the sizes.
cdef SectorCipher new_cipher(const uint8_t *key, size_t key_bytes, uint8_t mode, uint8_t ivgen,
                             const char *essiv_hash, bint by_guest)

# Bytes of the digest `name`, 0 where libcrypto has none of that name.
cdef size_t digest_bytes(const char *name) noexcept nogil
# The digest of two pieces, one after the other. False where libcrypto refuses.
cdef bint digest_of(const char *name, const void *a, size_t a_bytes, const void *b, size_t b_bytes,
                    uint8_t *out) noexcept nogil
# PBKDF2 with HMAC of that digest. Takes time in proportion to `iterations`; the caller bounds them.
cdef bint stretch_key(const char *digest, const uint8_t *passphrase, size_t nbytes,
                      const uint8_t *salt, size_t salt_bytes, uint32_t iterations, uint8_t *out,
                      size_t out_bytes) noexcept nogil
cdef bint random_fill(void *out, size_t nbytes) noexcept nogil
# Zeros that no compiler leaves out.
cdef void wipe(void *secret, size_t nbytes) noexcept nogil
cdef bint same_bytes(const void *a, const void *b, size_t nbytes) noexcept nogil
