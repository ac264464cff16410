/* libdeflate's compressor with a window of 4 KiB; see README.md. Any number of compressors, each for
 * one thread at a time. */
#ifndef QCOW2X_DEFLATE12_H
#define QCOW2X_DEFLATE12_H

#include <stddef.h>

/* Level 0 to 12; NULL: no memory. */
struct libdeflate_compressor *q2_deflate12_alloc(int level);
/* Bytes of out that were filled; 0: the result would be longer than room. */
size_t q2_deflate12_compress(struct libdeflate_compressor *compressor, const void *in, size_t bytes,
                             void *out, size_t room);
void q2_deflate12_free(struct libdeflate_compressor *compressor);

#endif
