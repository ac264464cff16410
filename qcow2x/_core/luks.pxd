# The LUKS1 header, "LUKS On-Disk Format Specification" version 1.2.3.
from libc.stdint cimport uint8_t, uint32_t, uint64_t

cdef enum:
    SLOTS = 8
    SALT_BYTES = 32
    DIGEST_BYTES = 20
    UUID_BYTES = 40
    TEXT_BYTES = 32

cdef struct q2_slot_key:
    bint active
    uint32_t iterations
    uint8_t salt[SALT_BYTES]
    uint32_t sector          # where the key material begins, from the header's start
    uint32_t stripes

cdef struct q2_luks:
    char cipher_name[TEXT_BYTES + 1]
    char cipher_mode[TEXT_BYTES + 1]
    char hash_spec[TEXT_BYTES + 1]
    uint32_t payload_sector
    uint32_t key_bytes
    uint8_t digest[DIGEST_BYTES]
    uint8_t digest_salt[SALT_BYTES]
    uint32_t digest_iterations
    char uuid[UUID_BYTES + 1]
    q2_slot_key slot[SLOTS]
    # What the three texts above say, once they were understood.
    uint8_t mode
    uint8_t ivgen
    char essiv_hash[TEXT_BYTES + 1]


cdef class LuksHeader:
    # Not safe to change from several threads at once.
    cdef q2_luks luks
    cdef object name
    cdef list _open_slots(self, pread, passphrase, bint every, uint8_t *master)
