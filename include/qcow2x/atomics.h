/* The few atomic operations the core needs, as plain functions that Cython can declare. */
#ifndef QCOW2X_ATOMICS_H
#define QCOW2X_ATOMICS_H

#include <stdint.h>

static inline uint64_t q2_load(const uint64_t *p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
static inline void q2_store(uint64_t *p, uint64_t v) { __atomic_store_n(p, v, __ATOMIC_RELEASE); }
static inline uint64_t q2_add(uint64_t *p, uint64_t v)
{
    return __atomic_add_fetch(p, v, __ATOMIC_ACQ_REL);
}
static inline uint64_t q2_sub(uint64_t *p, uint64_t v)
{
    return __atomic_sub_fetch(p, v, __ATOMIC_ACQ_REL);
}
/* Sets bits; writes only where one of them is not set yet, so that a hot word stays shared. */
static inline void q2_set_bits(uint64_t *p, uint64_t bits)
{
    if ((__atomic_load_n(p, __ATOMIC_RELAXED) & bits) != bits)
        __atomic_fetch_or(p, bits, __ATOMIC_RELEASE);
}
/* Raises *p to v; never lowers it. */
static inline void q2_raise_to(uint64_t *p, uint64_t v)
{
    uint64_t old = __atomic_load_n(p, __ATOMIC_RELAXED);
    while (old < v &&
           !__atomic_compare_exchange_n(p, &old, v, 1, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED)) {
    }
}
/* A hint that several readers may set at once and nobody orders by. */
static inline void q2_touch(uint8_t *p)
{
    if (!__atomic_load_n(p, __ATOMIC_RELAXED))
        __atomic_store_n(p, 1, __ATOMIC_RELAXED);
}
/* Figures that anybody may add to and nobody orders by. */
static inline void q2_count(uint64_t *p, uint64_t n) { __atomic_fetch_add(p, n, __ATOMIC_RELAXED); }
/* Figures and flags that one lock's holder changes while others look without it. */
static inline uint32_t q2_load32(const uint32_t *p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
static inline void q2_store32(uint32_t *p, uint32_t v) { __atomic_store_n(p, v, __ATOMIC_RELEASE); }
/* A word of bits that others set by q2_set_bits meanwhile. */
static inline uint64_t q2_look(const uint64_t *p) { return __atomic_load_n(p, __ATOMIC_RELAXED); }

#endif
