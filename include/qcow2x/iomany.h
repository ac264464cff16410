/* Many reads or writes of files at once: by io_uring where the kernel lets us (containers often do not), else by
 * threads. Any thread. For one unit of the core: it has state of its own. */
#ifndef QCOW2X_IOMANY_H
#define QCOW2X_IOMANY_H

#include <errno.h>
#include <liburing.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/uio.h>
#include <unistd.h>

#define Q2_RING_DEPTH 64
#define Q2_IO_THREADS 16

typedef struct q2_io {
    void *buf;
    size_t nbytes; /* below 2 GiB */
    uint64_t off;
    int fd;
    int writes; /* from buf to the file, else from the file to buf */
    int flags;  /* of a write: 0 or RWF_DSYNC */
    int64_t got; /* bytes, or a negative errno, as the system call says it; short is possible */
} q2_io;

/* Each thread has a ring of its own, closed when the thread ends: the kernel then need not interrupt it for
 * what completes, which took 10.5 us for a write of 4 KiB (32 under way, O_DIRECT) instead of 12.5. */
#ifdef IORING_SETUP_DEFER_TASKRUN
#define Q2_RING_FLAGS (IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN)
#else
#define Q2_RING_FLAGS 0
#endif

typedef struct q2_ring {
    struct io_uring uring;
    pid_t owner;
} q2_ring;

static pthread_key_t q2_ring_of_thread;
static pthread_once_t q2_rings_once = PTHREAD_ONCE_INIT;
static int q2_no_rings; /* the kernel refused one; atomic */

static inline void q2_ring_close(void *ring_)
{
    q2_ring *ring = ring_;
    if (ring->owner == getpid())
        io_uring_queue_exit(&ring->uring);
    else
        /* Made before a fork: the other process goes on with it, and here it is no memory. */
        close(ring->uring.ring_fd);
    free(ring);
}

static inline void q2_rings_init(void)
{
    if (pthread_key_create(&q2_ring_of_thread, q2_ring_close) != 0)
        __atomic_store_n(&q2_no_rings, 1, __ATOMIC_RELAXED);
}

static inline q2_ring *q2_ring_new(void)
{
    int rc;
    q2_ring *ring = malloc(sizeof(*ring));
    if (ring == NULL)
        return NULL;
    ring->owner = getpid();
    rc = io_uring_queue_init(Q2_RING_DEPTH, &ring->uring, Q2_RING_FLAGS);
    if (rc == -EINVAL) /* before Linux 6.1 */
        rc = io_uring_queue_init(Q2_RING_DEPTH, &ring->uring, 0);
    if (rc == 0) {
        /* A child has no use for it, and must not share it. */
        if (io_uring_ring_dontfork(&ring->uring) == 0)
            return ring;
        io_uring_queue_exit(&ring->uring);
    } else if (rc == -ENOSYS || rc == -EPERM) {
        __atomic_store_n(&q2_no_rings, 1, __ATOMIC_RELAXED);
    }
    free(ring);
    return NULL;
}

/* The calling thread's, which keeps it; NULL: it has to do without. */
static inline q2_ring *q2_ring_take(void)
{
    q2_ring *ring;
    pthread_once(&q2_rings_once, q2_rings_init);
    if (__atomic_load_n(&q2_no_rings, __ATOMIC_RELAXED))
        return NULL;
    ring = pthread_getspecific(q2_ring_of_thread);
    if (ring != NULL && ring->owner == getpid())
        return ring;
    if (ring != NULL)
        q2_ring_close(ring);
    ring = q2_ring_new();
    if (pthread_setspecific(q2_ring_of_thread, ring) != 0 && ring != NULL) {
        q2_ring_close(ring);
        ring = NULL;
    }
    return ring;
}

static inline void q2_ring_drop(q2_ring *ring)
{
    pthread_setspecific(q2_ring_of_thread, NULL);
    q2_ring_close(ring);
}

/* Returns with nothing under way, so that the buffers are the caller's again. */
static inline void q2_io_by_ring(q2_ring *ring, q2_io *r, size_t n, size_t depth)
{
    size_t queued = 0, submitted = 0, completed = 0;
    int usable = 1;
    while (completed < n) {
        struct io_uring_cqe *cqe;
        struct io_uring_sqe *sqe;
        int rc;
        while (usable && queued < n && queued - completed < depth &&
               (sqe = io_uring_get_sqe(&ring->uring)) != NULL) {
            if (r[queued].writes) {
                io_uring_prep_write(sqe, r[queued].fd, r[queued].buf, (unsigned)r[queued].nbytes,
                                    r[queued].off);
                sqe->rw_flags = r[queued].flags;
            } else {
                io_uring_prep_read(sqe, r[queued].fd, r[queued].buf, (unsigned)r[queued].nbytes,
                                   r[queued].off);
            }
            io_uring_sqe_set_data(sqe, &r[queued]);
            queued++;
        }
        if (usable) {
            /* A quarter of them at a time while others wait for their places: 10 % less than one by one. */
            size_t under_way = queued - completed;
            unsigned wanted = (unsigned)(queued < n ? (under_way + 3) / 4 : under_way);
            rc = io_uring_submit_and_wait(&ring->uring, wanted);
            if (rc >= 0)
                submitted += (size_t)rc;
            else if (rc != -EINTR && rc != -EAGAIN && rc != -EBUSY)
                usable = 0; /* what it has taken still has to be waited for */
        }
        if (!usable) {
            if (submitted == completed)
                break;
            rc = io_uring_wait_cqe(&ring->uring, &cqe);
            if (rc < 0)
                usleep(1000); /* not to be left: the kernel still uses the buffers */
        }
        while (io_uring_peek_cqe(&ring->uring, &cqe) == 0) {
            ((q2_io *)io_uring_cqe_get_data(cqe))->got = cqe->res;
            io_uring_cqe_seen(&ring->uring, cqe);
            completed++;
        }
    }
    if (!usable)
        q2_ring_drop(ring);
}

typedef struct q2_io_share {
    q2_io *r;
    size_t n;
    size_t next; /* atomic */
} q2_io_share;

static inline void *q2_io_some(void *share_)
{
    q2_io_share *share = share_;
    size_t i;
    while ((i = __atomic_fetch_add(&share->next, 1, __ATOMIC_RELAXED)) < share->n) {
        q2_io *r = &share->r[i];
        struct iovec one = {r->buf, r->nbytes};
        ssize_t got = r->writes ? pwritev2(r->fd, &one, 1, (off_t)r->off, r->flags)
                                : pread(r->fd, r->buf, r->nbytes, (off_t)r->off);
        r->got = got < 0 ? -errno : got;
    }
    return NULL;
}

static inline void q2_io_by_threads(q2_io *r, size_t n, size_t depth)
{
    q2_io_share share = {r, n, 0};
    pthread_t thread[Q2_IO_THREADS];
    size_t started = 0;
    while (started < Q2_IO_THREADS && started + 1 < n && started + 1 < depth &&
           pthread_create(&thread[started], NULL, q2_io_some, &share) == 0)
        started++;
    q2_io_some(&share);
    while (started > 0)
        pthread_join(thread[--started], NULL);
}

/* All of them, in any order, at most `depth` (1 to Q2_RING_DEPTH) under way at once; got of each says how
 * it went. */
static inline void q2_io_many(q2_io *r, size_t n, size_t depth, int by_threads)
{
    q2_ring *ring = n > 1 && !by_threads ? q2_ring_take() : NULL;
    size_t i;
    for (i = 0; i < n; i++)
        r[i].got = -ECANCELED;
    if (ring != NULL)
        q2_io_by_ring(ring, r, n, depth);
    else
        q2_io_by_threads(r, n, depth);
}

#endif
