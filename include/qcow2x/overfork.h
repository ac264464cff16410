/* Locks of the whole process, which a child of fork() must find free whatever other threads were at:
 * the thread that forks takes them before and lets go of them after, in both processes. For one unit
 * of the core: it has state of its own. */
#ifndef QCOW2X_OVERFORK_H
#define QCOW2X_OVERFORK_H

#include <pthread.h>

#define Q2_OVER_FORK_MAX 32

static pthread_mutex_t *q2_over_fork[Q2_OVER_FORK_MAX];
static int q2_n_over_fork;

static void q2_before_fork(void)
{
    int i;
    for (i = 0; i < q2_n_over_fork; i++)
        pthread_mutex_lock(q2_over_fork[i]);
}

static void q2_after_fork(void)
{
    int i;
    for (i = q2_n_over_fork; i > 0; i--)
        pthread_mutex_unlock(q2_over_fork[i - 1]);
}

/* Before the lock is first used; one thread at a time. Nothing else of the list may be taken while it
 * is held, nor may a thread that forks hold it. -1 if there is no room or memory for one more. */
static inline int q2_hold_over_fork(pthread_mutex_t *lock)
{
    if (q2_n_over_fork == Q2_OVER_FORK_MAX)
        return -1;
    if (q2_n_over_fork == 0 && pthread_atfork(q2_before_fork, q2_after_fork, q2_after_fork) != 0)
        return -1;
    q2_over_fork[q2_n_over_fork++] = lock;
    return 0;
}

#endif
