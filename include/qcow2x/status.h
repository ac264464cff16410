/* q2_status: the single source of error codes, and the sites at which storage is touched.
 *
 * Everything below the entry points of the core returns a q2_status. The details (errno, site,
 * host offset, one sentence) are kept per thread by q2_fail in errors.pyx and turned into a
 * Python exception by errors.check_status, which is the only raiser.
 */
#ifndef QCOW2X_STATUS_H
#define QCOW2X_STATUS_H

#include <stdint.h>

typedef int32_t q2_status;

enum {
    Q2_OK = 0,

    /* Failures a caller can see; errors.py has the exception of each. */
    Q2_E_IO = 1,          /* the storage failed; sys_errno says how */
    Q2_E_NOSPC = 2,       /* no room in the storage; retry once there is */
    Q2_E_NOMEM = 3,
    Q2_E_CORRUPT = 4,     /* metadata that contradicts itself or the specification */
    Q2_E_FORMAT = 5,      /* not qcow2, or a header no reader can accept */
    Q2_E_UNSUPPORTED = 6, /* a feature this build or this image version lacks */
    Q2_E_RANGE = 7,       /* an offset or length outside the disk */
    Q2_E_READONLY = 8,
    Q2_E_BROKEN = 9,      /* an earlier metadata write failed: no more writes on this object */
    Q2_E_CLOSED = 10,
    Q2_E_CODEC = 11,      /* a compressed cluster that does not decode to a full cluster */
    Q2_E_LIMIT = 12,      /* a table larger than format.h allows */
    Q2_E_PYTHON = 13,     /* a Python storage raised; its exception is stashed for check_status */
    Q2_E_ORDER = 14,      /* an edge that would close a cycle in the order of writes: a bug */

    /* Internal answers that never leave the core. */
    Q2_MISS = 64,         /* a metadata slice is not cached: load it without the lock, plan again */
    Q2_BUSY = 65,         /* overlaps a write in flight: wait for it, plan again */
    Q2_FULL = 66,         /* the cache has only dirty slices: write back, plan again */
    Q2_INCOMPRESSIBLE = 67 /* the encoder's output would not be smaller than its input */
};

/* Where the storage is touched. Tests fail or cut power at each. Keep in step with
 * errors.SITE_NAMES, which is generated from this list by Q2_SITES. */
#define Q2_SITES(X)                                                                                \
    X(NONE)                                                                                        \
    X(HEADER_READ) X(HEADER_UPDATE)                                                                \
    X(L1_READ) X(L1_UPDATE) X(L1_GROW_WRITE) X(L1_GROW_ACTIVATE)                                   \
    X(L2_LOAD) X(L2_UPDATE) X(L2_ALLOC_COW_READ) X(L2_ALLOC_WRITE)                                 \
    X(REFTABLE_READ) X(REFTABLE_UPDATE) X(REFTABLE_GROW_WRITE) X(REFTABLE_GROW_ACTIVATE)           \
    X(REFBLOCK_LOAD) X(REFBLOCK_UPDATE) X(REFBLOCK_ALLOC_WRITE)                                    \
    X(DATA_READ) X(DATA_WRITE) X(COMPRESSED_READ) X(COMPRESSED_WRITE)                              \
    X(COW_READ) X(COW_WRITE) X(ZERO_WRITE)                                                         \
    X(BARRIER) X(FLUSH) X(TRUNCATE) X(PUNCH) X(PREALLOCATE)                                        \
    X(CHECK_READ) X(REPAIR_WRITE) X(CREATE_WRITE)                                                  \
    X(SNAPSHOT_READ) X(SNAPSHOT_WRITE) X(BITMAP_READ) X(BITMAP_WRITE) X(CRYPTO_READ)               \
    X(CRYPTO_WRITE)                                                                                \
    /* Nothing is touched at these: told to storages that listen (Storage.reach). */               \
    X(CLUSTER_ALLOC) X(CLUSTER_ALLOC_BYTES) X(CLUSTER_FREE) X(REFBLOCK_ALLOC) X(L1_GROW_ALLOC)     \
    X(BACKING_READ) X(EMPTY_IMAGE) X(REFCOUNT_RAISE)

#define Q2_SITE_ENUM_(name) Q2_SITE_##name,
enum q2_site { Q2_SITES(Q2_SITE_ENUM_) Q2_SITE_COUNT };
#undef Q2_SITE_ENUM_

typedef struct q2_error {
    q2_status status;
    int32_t sys_errno; /* 0 when the failure did not come from a system call */
    int32_t site;      /* enum q2_site */
    uint64_t offset;   /* host or guest offset in bytes, as the sentence says */
    uint64_t index;    /* of the entry that the sentence speaks of, if it does */
    const char *what;  /* one static sentence, no full stop; "{offset}" and "{index}" stand for these */
} q2_error;

#endif
