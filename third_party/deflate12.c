/* One unit of all that the compressor needs: the window changed between the constants and what is
 * built on them, and its functions under other names, as the system's libdeflate is in the process
 * too. */
#include "libdeflate/lib/deflate_constants.h"
#undef DEFLATE_MAX_MATCH_OFFSET
#undef DEFLATE_WINDOW_ORDER
#define DEFLATE_MAX_MATCH_OFFSET 4096
#define DEFLATE_WINDOW_ORDER 12

#define libdeflate_alloc_compressor q2_deflate12_alloc
#define libdeflate_alloc_compressor_ex q2_deflate12_alloc_ex
#define libdeflate_deflate_compress q2_deflate12_compress
#define libdeflate_deflate_compress_bound q2_deflate12_bound
#define libdeflate_free_compressor q2_deflate12_free
#define libdeflate_get_compression_level q2_deflate12_level
#define libdeflate_set_memory_allocator q2_deflate12_set_memory_allocator
#define libdeflate_default_malloc_func q2_deflate12_malloc_func
#define libdeflate_default_free_func q2_deflate12_free_func
#define libdeflate_aligned_malloc q2_deflate12_aligned_malloc
#define libdeflate_aligned_free q2_deflate12_aligned_free

/* Of code that is taken as it is. */
#pragma GCC diagnostic ignored "-Wsign-compare"
#pragma GCC diagnostic ignored "-Wunused-parameter"
#include "libdeflate/lib/deflate_compress.c"
#include "libdeflate/lib/utils.c"

#include "deflate12.h"
