/* One unit of all that the decompressor needs, its functions under other names, as the system's
 * libdeflate may be in the process too. Memory comes by way of deflate12.c. */
#define libdeflate_default_malloc_func q2_deflate12_malloc_func
#define libdeflate_default_free_func q2_deflate12_free_func
#define libdeflate_alloc_decompressor q2_inflate_alloc
#define libdeflate_alloc_decompressor_ex q2_inflate_alloc_ex
#define libdeflate_free_decompressor q2_inflate_free
#define libdeflate_deflate_decompress q2_inflate_exactly
#define libdeflate_deflate_decompress_ex q2_inflate_result
#define libdeflate_x86_cpu_features q2_inflate_x86_cpu_features
#define libdeflate_init_x86_cpu_features q2_inflate_init_x86_cpu_features

/* Of code that is taken as it is. */
#pragma GCC diagnostic ignored "-Wsign-compare"
#pragma GCC diagnostic ignored "-Wunused-parameter"
#include "libdeflate/lib/deflate_decompress.c"
#include "libdeflate/lib/x86/cpu_features.c"

#include "inflate.h"

int q2_inflate(struct libdeflate_decompressor *decompressor, const void *in, size_t bytes, void *out,
               size_t room, size_t *used, size_t *written)
{
    return q2_inflate_result(decompressor, in, bytes, out, room, used, written);
}
