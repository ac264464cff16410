/* Big-endian loads and stores, and a read cursor that cannot leave its buffer.
 *
 * Parsers touch memory through q2_cursor only: every take checks the bytes that remain, and a
 * cursor that ran out stays out (ok == 0), so a parser may take many fields and test once.
 */
#ifndef QCOW2X_WIRE_H
#define QCOW2X_WIRE_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

static inline uint16_t q2_load_be16(const void *p)
{
    uint16_t v;
    memcpy(&v, p, sizeof v);
    return __builtin_bswap16(v);
}

static inline uint32_t q2_load_be32(const void *p)
{
    uint32_t v;
    memcpy(&v, p, sizeof v);
    return __builtin_bswap32(v);
}

static inline uint64_t q2_load_be64(const void *p)
{
    uint64_t v;
    memcpy(&v, p, sizeof v);
    return __builtin_bswap64(v);
}

static inline void q2_store_be16(void *p, uint16_t v)
{
    v = __builtin_bswap16(v);
    memcpy(p, &v, sizeof v);
}

static inline void q2_store_be32(void *p, uint32_t v)
{
    v = __builtin_bswap32(v);
    memcpy(p, &v, sizeof v);
}

static inline void q2_store_be64(void *p, uint64_t v)
{
    v = __builtin_bswap64(v);
    memcpy(p, &v, sizeof v);
}

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "wire.h is written for little-endian hosts"
#endif

typedef struct q2_cursor {
    const uint8_t *at;
    size_t remaining;
    int ok; /* 0 once any take asked for more than remained */
} q2_cursor;

static inline q2_cursor q2_cursor_over(const void *buf, size_t nbytes)
{
    q2_cursor c = {(const uint8_t *)buf, nbytes, 1};
    return c;
}

/* The next nbytes, or NULL (and ok = 0) where fewer remain. */
static inline const uint8_t *q2_take(q2_cursor *c, size_t nbytes)
{
    const uint8_t *p = c->at;
    if (!c->ok || nbytes > c->remaining) {
        c->ok = 0;
        return NULL;
    }
    c->at += nbytes;
    c->remaining -= nbytes;
    return p;
}

static inline uint8_t q2_take_u8(q2_cursor *c)
{
    const uint8_t *p = q2_take(c, 1);
    return p ? *p : 0;
}

static inline uint16_t q2_take_be16(q2_cursor *c)
{
    const uint8_t *p = q2_take(c, 2);
    return p ? q2_load_be16(p) : 0;
}

static inline uint32_t q2_take_be32(q2_cursor *c)
{
    const uint8_t *p = q2_take(c, 4);
    return p ? q2_load_be32(p) : 0;
}

static inline uint64_t q2_take_be64(q2_cursor *c)
{
    const uint8_t *p = q2_take(c, 8);
    return p ? q2_load_be64(p) : 0;
}

#endif
