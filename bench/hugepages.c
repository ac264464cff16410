/* Loaded in front of qemu-img's C library: large aligned buffers lie in huge pages, as those of the other runners do.
 *
 * A request of 64 KiB out of small pages is sixteen segments for the disk, out of a huge page it is one; without
 * this the baseline would pay for its allocator and not for its qcow2. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <sys/mman.h>

#define HUGE_PAGE ((size_t)2 << 20)

/* The buffers of `bench` and the metadata caches, which live as long as the run. What copy-on-write takes for each
 * request is smaller than a cluster: a mapping and 2 MiB of zeros for each would slow the baseline down. */
#define SMALLEST ((size_t)64 << 10)

int posix_memalign(void **out, size_t alignment, size_t size)
{
    static int (*next)(void **, size_t, size_t);
    if (!next)
        next = (int (*)(void **, size_t, size_t))dlsym(RTLD_NEXT, "posix_memalign");
    if (size < SMALLEST || alignment > HUGE_PAGE)
        return next(out, alignment, size);

    size_t whole = (size + HUGE_PAGE - 1) & ~(HUGE_PAGE - 1);
    if (whole < size)
        return next(out, alignment, size);
    int status = next(out, HUGE_PAGE, whole);
    if (!status)
        madvise(*out, whole, MADV_HUGEPAGE);
    return status;
}
