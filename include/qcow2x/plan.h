/* What a lookup answers: numbers only, no pointer into a cache, so a plan outlives the lock. */
#ifndef QCOW2X_PLAN_H
#define QCOW2X_PLAN_H

#include <stdint.h>

enum q2_kind {
    Q2_KIND_UNALLOCATED = 0, /* nothing here: the backing file shows through, or zeros without one */
    Q2_KIND_DATA = 1,        /* host_off .. host_off + nbytes hold the bytes */
    Q2_KIND_ZERO = 2,        /* reads as zeros; host_off != 0 if a host cluster is kept for it */
    Q2_KIND_COMPRESSED = 3   /* the whole guest cluster is in host_off .. + comp_bytes */
};

typedef struct q2_extent {
    uint64_t guest_off;
    uint64_t nbytes;
    uint64_t host_off;
    uint32_t comp_bytes; /* upper bound of the compressed stream, COMPRESSED only */
    uint8_t kind;        /* enum q2_kind */
    uint8_t in_place;    /* COPIED is set: a write may go to host_off as it is */
} q2_extent;

/* 32 extents hold a 1 MiB request over 64 KiB clusters with every cluster elsewhere, twice. */
#define Q2_PLAN_MAX 32

typedef struct q2_plan {
    int32_t n;
    uint64_t nbytes; /* sum over the extents: how much of the request they answer */
    q2_extent extent[Q2_PLAN_MAX];
} q2_plan;

#endif
