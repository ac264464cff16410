/* A place in a list of buffers; the list itself stays as it was. */
#ifndef QCOW2X_IOV_H
#define QCOW2X_IOV_H

#include <stddef.h>
#include <string.h>
#include <sys/uio.h>

typedef struct q2_iov {
    const struct iovec *iov;
    int n;
    size_t used; /* how much of iov[0] is done */
} q2_iov;

static inline q2_iov q2_iov_start(const struct iovec *iov, int n)
{
    return (q2_iov){iov, n, 0};
}

static inline size_t q2_iov_bytes(const struct iovec *iov, int n)
{
    size_t total = 0;
    for (int i = 0; i < n; i++)
        total += iov[i].iov_len;
    return total;
}

/* Moves on by n bytes, and past what is empty. */
static inline void q2_iov_advance(q2_iov *at, size_t n)
{
    at->used += n;
    while (at->n > 0 && at->used >= at->iov->iov_len) {
        at->used -= at->iov->iov_len;
        at->iov++;
        at->n--;
    }
}

/* Copies the next n bytes, which must be there, and moves on. */
static inline void q2_iov_take(q2_iov *at, void *dst, size_t n)
{
    char *to = dst;
    q2_iov_advance(at, 0);
    while (n > 0) {
        size_t part = at->iov->iov_len - at->used;
        part = part < n ? part : n;
        memcpy(to, (const char *)at->iov->iov_base + at->used, part);
        to += part;
        n -= part;
        q2_iov_advance(at, part);
    }
}

#endif
