/* libdeflate's decompressor; see README.md. Any number of decompressors, each for one thread at a time. */
#ifndef QCOW2X_INFLATE_H
#define QCOW2X_INFLATE_H

#include <stddef.h>

/* NULL: no memory. */
struct libdeflate_decompressor *q2_inflate_alloc(void);
/* 0: all of a stream became at most room bytes, whose number is in written, its own in used. */
int q2_inflate(struct libdeflate_decompressor *decompressor, const void *in, size_t bytes, void *out,
               size_t room, size_t *used, size_t *written);
void q2_inflate_free(struct libdeflate_decompressor *decompressor);

#endif
