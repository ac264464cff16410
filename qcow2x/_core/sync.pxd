# Atomics and the POSIX locks the core uses. No .pyx: nothing to compile.
from libc.stdint cimport uint8_t, uint32_t, uint64_t

cdef extern from "qcow2x/atomics.h" nogil:
    uint64_t q2_load(const uint64_t *p)
    void q2_store(uint64_t *p, uint64_t v)
    uint64_t q2_add(uint64_t *p, uint64_t v)
    uint64_t q2_sub(uint64_t *p, uint64_t v)
    void q2_set_bits(uint64_t *p, uint64_t bits)
    void q2_raise_to(uint64_t *p, uint64_t v)
    void q2_touch(uint8_t *p)
    void q2_count(uint64_t *p, uint64_t n)
    uint32_t q2_load32(const uint32_t *p)
    void q2_store32(uint32_t *p, uint32_t v)
    uint64_t q2_look(const uint64_t *p)

cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_mutex_t:
        pass
    ctypedef struct pthread_cond_t:
        pass
    ctypedef struct pthread_rwlock_t:
        pass
    ctypedef struct pthread_rwlockattr_t:
        pass
    int PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP
    int pthread_mutex_init(pthread_mutex_t *, void *)
    int pthread_mutex_destroy(pthread_mutex_t *)
    int pthread_mutex_lock(pthread_mutex_t *)
    int pthread_mutex_trylock(pthread_mutex_t *)
    int pthread_mutex_unlock(pthread_mutex_t *)
    int pthread_cond_init(pthread_cond_t *, void *)
    int pthread_cond_destroy(pthread_cond_t *)
    int pthread_cond_wait(pthread_cond_t *, pthread_mutex_t *)
    int pthread_cond_broadcast(pthread_cond_t *)
    int pthread_rwlockattr_init(pthread_rwlockattr_t *)
    int pthread_rwlockattr_setkind_np(pthread_rwlockattr_t *, int)
    int pthread_rwlockattr_destroy(pthread_rwlockattr_t *)
    int pthread_rwlock_init(pthread_rwlock_t *, pthread_rwlockattr_t *)
    int pthread_rwlock_destroy(pthread_rwlock_t *)
    int pthread_rwlock_rdlock(pthread_rwlock_t *)
    int pthread_rwlock_tryrdlock(pthread_rwlock_t *)
    int pthread_rwlock_wrlock(pthread_rwlock_t *)
    int pthread_rwlock_unlock(pthread_rwlock_t *)
