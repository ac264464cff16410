/* A bounded free list for things that are dear to make and cheap to keep: codec contexts,
 * aligned buffers. Take one (NULL: the list is empty, make your own), use it alone, give it back
 * (0: the list is full, dispose of it yourself). Any thread. */
#ifndef QCOW2X_POOL_H
#define QCOW2X_POOL_H

#include <pthread.h>
#include <stddef.h>

#include "overfork.h"

#define Q2_POOL_MAX 64

typedef struct q2_pool {
    pthread_mutex_t lock; /* innermost of all locks: nothing is called while it is held */
    int n;
    int max; /* how many are kept, at most Q2_POOL_MAX */
    void *item[Q2_POOL_MAX];
} q2_pool;

static inline void q2_pool_init(q2_pool *pool, int max)
{
    pthread_mutex_init(&pool->lock, NULL);
    pool->n = 0;
    pool->max = max < Q2_POOL_MAX ? max : Q2_POOL_MAX;
}

/* The same for a pool that all of the process shares. -1: no memory. */
static inline int q2_pool_init_shared(q2_pool *pool, int max)
{
    q2_pool_init(pool, max);
    return q2_hold_over_fork(&pool->lock);
}

static inline void *q2_pool_take(q2_pool *pool)
{
    void *item = NULL;
    pthread_mutex_lock(&pool->lock);
    if (pool->n > 0)
        item = pool->item[--pool->n];
    pthread_mutex_unlock(&pool->lock);
    return item;
}

static inline int q2_pool_give(q2_pool *pool, void *item)
{
    int kept = 0;
    pthread_mutex_lock(&pool->lock);
    if (pool->n < pool->max) {
        pool->item[pool->n++] = item;
        kept = 1;
    }
    pthread_mutex_unlock(&pool->lock);
    return kept;
}

#endif
