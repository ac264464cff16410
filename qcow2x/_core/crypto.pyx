# cython: language_level=3
"""AES over sectors, and the primitives that a LUKS header is made of. All of it is libcrypto's but
the way from one block to the next in XTS: libcrypto's own XTS takes one call and one key exchange
per 512-byte sector and knows no 192-bit keys; over its ECB many sectors go in one call.
"""
from libc.limits cimport INT_MAX
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy

from qcow2x._core.errors cimport fail
from qcow2x._core.status cimport *
from qcow2x._core.sync cimport *

cdef extern from "qcow2x/pool.h" nogil:
    enum:
        Q2_POOL_MAX
    void q2_pool_init(q2_pool *pool, int max)
    void *q2_pool_take(q2_pool *pool)
    int q2_pool_give(q2_pool *pool, void *item)

cdef extern from "<openssl/evp.h>" nogil:
    ctypedef struct EVP_CIPHER:
        pass
    ctypedef struct EVP_CIPHER_CTX:
        pass
    ctypedef struct EVP_MD:
        pass
    ctypedef struct EVP_MD_CTX:
        pass
    ctypedef struct ENGINE:
        pass
    const EVP_CIPHER *EVP_aes_128_ecb()
    const EVP_CIPHER *EVP_aes_192_ecb()
    const EVP_CIPHER *EVP_aes_256_ecb()
    const EVP_CIPHER *EVP_aes_128_cbc()
    const EVP_CIPHER *EVP_aes_192_cbc()
    const EVP_CIPHER *EVP_aes_256_cbc()
    EVP_CIPHER_CTX *EVP_CIPHER_CTX_new()
    void EVP_CIPHER_CTX_free(EVP_CIPHER_CTX *ctx)
    int EVP_CIPHER_CTX_copy(EVP_CIPHER_CTX *out, const EVP_CIPHER_CTX *src)
    int EVP_CIPHER_CTX_set_padding(EVP_CIPHER_CTX *ctx, int padding)
    int EVP_CipherInit_ex(EVP_CIPHER_CTX *ctx, const EVP_CIPHER *cipher, ENGINE *engine,
                          const uint8_t *key, const uint8_t *iv, int encrypting)
    int EVP_CipherUpdate(EVP_CIPHER_CTX *ctx, uint8_t *out, int *out_bytes, const uint8_t *data,
                         int nbytes)
    const EVP_MD *EVP_get_digestbyname(const char *name)
    int EVP_MD_size(const EVP_MD *md)
    EVP_MD_CTX *EVP_MD_CTX_new()
    void EVP_MD_CTX_free(EVP_MD_CTX *ctx)
    int EVP_DigestInit_ex(EVP_MD_CTX *ctx, const EVP_MD *md, ENGINE *engine)
    int EVP_DigestUpdate(EVP_MD_CTX *ctx, const void *data, size_t nbytes)
    int EVP_DigestFinal_ex(EVP_MD_CTX *ctx, uint8_t *out, unsigned int *nbytes)
    int PKCS5_PBKDF2_HMAC(const char *passphrase, int nbytes, const uint8_t *salt, int salt_bytes,
                          int iterations, const EVP_MD *md, int out_bytes, uint8_t *out)
    enum:
        EVP_MAX_MD_SIZE

cdef extern from "<openssl/crypto.h>" nogil:
    void OPENSSL_cleanse(void *p, size_t nbytes)
    int CRYPTO_memcmp(const void *a, const void *b, size_t nbytes)

cdef extern from "<openssl/rand.h>" nogil:
    int RAND_priv_bytes(uint8_t *out, int nbytes)

cdef enum:
    BLOCK = 16
    # Sectors of one call to libcrypto: their tweaks and their data stay in the first-level cache.
    BATCH_BYTES = 8192
    BATCH = BATCH_BYTES // CRYPTO_SECTOR
    BATCH_WORDS = BATCH_BYTES // 8
    SECTOR_WORDS = CRYPTO_SECTOR // 8
    # Contexts kept: as many threads as are ever busy in one image at once.
    CONTEXTS_KEPT = 32


# What one thread works with. A context of libcrypto must not be used by two at once.
cdef struct context:
    EVP_CIPHER_CTX *encryptor
    EVP_CIPHER_CTX *decryptor
    EVP_CIPHER_CTX *essiv      # keyed with the hash of the key; NULL with other generators
    EVP_CIPHER_CTX *tweak      # the second key of XTS; NULL for CBC


cdef void free_context(context *c) noexcept nogil:
    if c is NULL:
        return
    # Wipes the key schedule before its memory goes back.
    EVP_CIPHER_CTX_free(c.encryptor)
    EVP_CIPHER_CTX_free(c.decryptor)
    EVP_CIPHER_CTX_free(c.essiv)
    EVP_CIPHER_CTX_free(c.tweak)
    free(c)


cdef EVP_CIPHER_CTX *copy_of(const EVP_CIPHER_CTX *ctx) noexcept nogil:
    cdef EVP_CIPHER_CTX *copy
    if ctx is NULL:
        return NULL
    copy = EVP_CIPHER_CTX_new()
    if copy is not NULL and not EVP_CIPHER_CTX_copy(copy, ctx):
        EVP_CIPHER_CTX_free(copy)
        return NULL
    return copy


cdef context *copy_context(const context *c) noexcept nogil:
    cdef context *copy = <context *>calloc(1, sizeof(context))
    if copy is NULL:
        return NULL
    copy.encryptor = copy_of(c.encryptor)
    copy.decryptor = copy_of(c.decryptor)
    copy.essiv = copy_of(c.essiv)
    copy.tweak = copy_of(c.tweak)
    if (copy.encryptor is NULL or copy.decryptor is NULL
            or (copy.essiv is NULL) != (c.essiv is NULL)
            or (copy.tweak is NULL) != (c.tweak is NULL)):
        free_context(copy)
        return NULL
    return copy


def decrypt_cbc(key, iv, data):
    """``data``, whole blocks of 16 bytes, decrypted by AES in CBC mode: key of 16, 24 or 32 bytes, IV
    of 16. Padding is the caller's matter. Raises ValueError for other sizes."""
    cdef bytes secret = bytes(key), start = bytes(iv), source = bytes(data)
    cdef bytearray plain = bytearray(len(source))
    cdef EVP_CIPHER_CTX *ctx
    cdef bint done
    if len(start) != BLOCK or len(source) % BLOCK or len(source) > INT_MAX:
        raise ValueError("AES in CBC mode takes an IV of one block and whole blocks")
    ctx = new_context(True, secret, len(secret), False)
    if ctx is NULL:
        raise ValueError("the key must be of 16, 24 or 32 bytes")
    done = (EVP_CipherInit_ex(ctx, NULL, NULL, NULL, start, -1)
            and update(ctx, source, <uint8_t *><char *>plain, len(source)))
    EVP_CIPHER_CTX_free(ctx)
    if not done:
        raise ValueError("the data cannot be decrypted")
    return bytes(plain)


cdef const EVP_CIPHER *aes(bint chained, size_t key_bytes) noexcept nogil:
    if key_bytes == 16:
        return EVP_aes_128_cbc() if chained else EVP_aes_128_ecb()
    if key_bytes == 24:
        return EVP_aes_192_cbc() if chained else EVP_aes_192_ecb()
    if key_bytes == 32:
        return EVP_aes_256_cbc() if chained else EVP_aes_256_ecb()
    return NULL


cdef EVP_CIPHER_CTX *new_context(bint chained, const uint8_t *key, size_t key_bytes,
                                 bint encrypting) noexcept nogil:
    cdef const EVP_CIPHER *cipher = aes(chained, key_bytes)
    cdef EVP_CIPHER_CTX *ctx = EVP_CIPHER_CTX_new()
    if (ctx is NULL or cipher is NULL
            or not EVP_CipherInit_ex(ctx, cipher, NULL, key, NULL, encrypting)
            or not EVP_CIPHER_CTX_set_padding(ctx, 0)):
        EVP_CIPHER_CTX_free(ctx)
        return NULL
    return ctx


cdef context *new_template(const uint8_t *key, size_t key_bytes, uint8_t mode, uint8_t ivgen,
                           const char *essiv_hash) noexcept nogil:
    cdef uint8_t hashed[EVP_MAX_MD_SIZE]
    cdef bint xts = mode == MODE_XTS
    cdef size_t half = key_bytes >> 1 if xts else key_bytes
    cdef context *c = <context *>calloc(1, sizeof(context))
    if c is NULL:
        return NULL
    c.encryptor = new_context(not xts, key, half, True)
    c.decryptor = new_context(not xts, key, half, False)
    if xts:
        c.tweak = new_context(False, key + half, half, True)
    if ivgen == IV_ESSIV:
        if digest_of(essiv_hash, key, key_bytes, NULL, 0, hashed):
            c.essiv = new_context(False, hashed, digest_bytes(essiv_hash), True)
        wipe(hashed, sizeof(hashed))
    if (c.encryptor is NULL or c.decryptor is NULL or (xts and c.tweak is NULL)
            or (ivgen == IV_ESSIV and c.essiv is NULL)):
        free_context(c)
        return NULL
    return c


cdef SectorCipher new_cipher(const uint8_t *key, size_t key_bytes, uint8_t mode, uint8_t ivgen,
                             const char *essiv_hash, bint by_guest):
    cdef SectorCipher cipher = SectorCipher.__new__(SectorCipher)
    cipher.mode = mode
    cipher.ivgen = ivgen
    cipher.by_guest = by_guest
    cipher.template = new_template(key, key_bytes, mode, ivgen, essiv_hash)
    if cipher.template is NULL:
        return None
    return cipher


cdef inline bint update(EVP_CIPHER_CTX *ctx, const uint8_t *src, uint8_t *dst,
                        size_t nbytes) noexcept nogil:
    cdef int written = 0
    return EVP_CipherUpdate(ctx, dst, &written, src, <int>nbytes) == 1 and written == <int>nbytes


# The IVs of n sectors from `sector` on, as pairs of little-endian words.
cdef inline bint make_ivs(const context *c, uint8_t ivgen, uint64_t sector, size_t n,
                          uint64_t *iv) noexcept nogil:
    cdef uint64_t mask = <uint64_t>0xffffffff if ivgen == IV_PLAIN else ~<uint64_t>0
    cdef size_t i
    for i in range(n):
        iv[2 * i] = (sector + i) & mask
        iv[2 * i + 1] = 0
    return ivgen != IV_ESSIV or update(c.essiv, <uint8_t *>iv, <uint8_t *>iv, n * BLOCK)


# IEEE 1619: each block's tweak is the one before it times x in GF(2^128).
cdef inline void spread_tweak(uint64_t low, uint64_t high, uint64_t *tweaks) noexcept nogil:
    cdef uint64_t carry
    cdef int i
    for i in range(0, SECTOR_WORDS, 2):
        tweaks[i] = low
        tweaks[i + 1] = high
        carry = (0 - (high >> 63)) & 0x87
        high = (high << 1) | (low >> 63)
        low = (low << 1) ^ carry


cdef inline void mix(const uint8_t *src, const uint64_t *tweaks, uint8_t *dst,
                     size_t nbytes) noexcept nogil:
    cdef size_t i
    cdef uint64_t word
    for i in range(nbytes >> 3):
        memcpy(&word, src + 8 * i, 8)
        word ^= tweaks[i]
        memcpy(dst + 8 * i, &word, 8)


cdef bint run_xts(const context *c, uint8_t ivgen, bint encrypting, const uint8_t *src,
                  uint8_t *dst, size_t nbytes, uint64_t sector) noexcept nogil:
    cdef EVP_CIPHER_CTX *ctx = c.encryptor if encrypting else c.decryptor
    cdef uint64_t iv[2 * BATCH]
    cdef uint64_t tweaks[BATCH_WORDS]
    cdef size_t now, i
    while nbytes:
        now = nbytes if nbytes < BATCH_BYTES else BATCH_BYTES
        if (not make_ivs(c, ivgen, sector, now // CRYPTO_SECTOR, iv)
                or not update(c.tweak, <uint8_t *>iv, <uint8_t *>iv,
                              now // CRYPTO_SECTOR * BLOCK)):
            return False
        for i in range(now // CRYPTO_SECTOR):
            spread_tweak(iv[2 * i], iv[2 * i + 1], tweaks + i * SECTOR_WORDS)
        mix(src, tweaks, dst, now)
        if not update(ctx, dst, dst, now):
            return False
        mix(dst, tweaks, dst, now)
        src += now
        dst += now
        nbytes -= now
        sector += now // CRYPTO_SECTOR
    return True


cdef bint run_cbc(const context *c, uint8_t ivgen, bint encrypting, const uint8_t *src,
                  uint8_t *dst, size_t nbytes, uint64_t sector) noexcept nogil:
    cdef EVP_CIPHER_CTX *ctx = c.encryptor if encrypting else c.decryptor
    cdef uint64_t iv[2]
    cdef size_t done = 0
    while done < nbytes:
        if (not make_ivs(c, ivgen, sector, 1, iv)
                or not EVP_CipherInit_ex(ctx, NULL, NULL, NULL, <uint8_t *>iv, -1)
                or not update(ctx, src + done, dst + done, CRYPTO_SECTOR)):
            return False
        done += CRYPTO_SECTOR
        sector += 1
    return True


cdef class SectorCipher:
    """The key of an open image, as libcrypto holds it. Made by :mod:`qcow2x._core.luks`."""

    def __cinit__(self):
        cdef pthread_rwlockattr_t attr
        # Writers first: a write of part of a sector must not starve behind a stream of reads.
        pthread_rwlockattr_init(&attr)
        pthread_rwlockattr_setkind_np(&attr, PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP)
        pthread_rwlock_init(&self.edges, &attr)
        pthread_rwlockattr_destroy(&attr)
        q2_pool_init(&self.contexts, CONTEXTS_KEPT)

    def __dealloc__(self):
        cdef context *c
        while True:
            c = <context *>q2_pool_take(&self.contexts)
            if c is NULL:
                break
            free_context(c)
        free_context(<context *>self.template)
        pthread_rwlock_destroy(&self.edges)

    cdef q2_status encrypt(self, const uint8_t *src, uint8_t *dst, size_t nbytes,
                           uint64_t byte_off) noexcept nogil:
        return self.run(True, src, dst, nbytes, byte_off)

    cdef q2_status decrypt(self, const uint8_t *src, uint8_t *dst, size_t nbytes,
                           uint64_t byte_off) noexcept nogil:
        return self.run(False, src, dst, nbytes, byte_off)

    cdef q2_status run(self, bint encrypting, const uint8_t *src, uint8_t *dst, size_t nbytes,
                       uint64_t byte_off) noexcept nogil:
        cdef context *c = <context *>q2_pool_take(&self.contexts)
        cdef uint64_t sector = byte_off // CRYPTO_SECTOR
        cdef bint done
        if c is NULL:
            c = copy_context(<const context *>self.template)
        if c is NULL:
            return fail(Q2_E_NOMEM, Q2_SITE_NONE, byte_off, b"out of memory")
        if self.mode == MODE_XTS:
            done = run_xts(c, self.ivgen, encrypting, src, dst, nbytes, sector)
        else:
            done = run_cbc(c, self.ivgen, encrypting, src, dst, nbytes, sector)
        if not q2_pool_give(&self.contexts, c):
            free_context(c)
        # libcrypto has no other reason to refuse whole blocks.
        return Q2_OK if done else fail(Q2_E_NOMEM, Q2_SITE_NONE, byte_off, b"out of memory")


cdef size_t digest_bytes(const char *name) noexcept nogil:
    cdef const EVP_MD *md = EVP_get_digestbyname(name)
    return <size_t>EVP_MD_size(md) if md is not NULL else 0


cdef bint digest_of(const char *name, const void *a, size_t a_bytes, const void *b, size_t b_bytes,
                    uint8_t *out) noexcept nogil:
    cdef const EVP_MD *md = EVP_get_digestbyname(name)
    cdef EVP_MD_CTX *ctx = EVP_MD_CTX_new()
    cdef bint done = (md is not NULL and ctx is not NULL and EVP_DigestInit_ex(ctx, md, NULL)
                      and EVP_DigestUpdate(ctx, a, a_bytes) and EVP_DigestUpdate(ctx, b, b_bytes)
                      and EVP_DigestFinal_ex(ctx, out, NULL))
    EVP_MD_CTX_free(ctx)
    return done


cdef bint stretch_key(const char *digest, const uint8_t *passphrase, size_t nbytes,
                      const uint8_t *salt, size_t salt_bytes, uint32_t iterations, uint8_t *out,
                      size_t out_bytes) noexcept nogil:
    cdef const EVP_MD *md = EVP_get_digestbyname(digest)
    if md is NULL or nbytes > INT_MAX or iterations > INT_MAX:
        return False
    return PKCS5_PBKDF2_HMAC(<const char *>passphrase, <int>nbytes, salt, <int>salt_bytes,
                             <int>iterations, md, <int>out_bytes, out) == 1


cdef bint random_fill(void *out, size_t nbytes) noexcept nogil:
    return nbytes <= INT_MAX and RAND_priv_bytes(<uint8_t *>out, <int>nbytes) == 1


cdef void wipe(void *secret, size_t nbytes) noexcept nogil:
    OPENSSL_cleanse(secret, nbytes)


cdef bint same_bytes(const void *a, const void *b, size_t nbytes) noexcept nogil:
    return CRYPTO_memcmp(a, b, nbytes) == 0
