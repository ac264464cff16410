/* The qcow2 format on disk: offsets, masks, feature bits, limits.
 *
 * Everything here is a fact of the specification (docs/interop/qcow2 of the QEMU project) or a
 * limit that keeps a hostile image from taking more memory than it is worth. All integers on
 * disk are big-endian; see wire.h for the loads and stores.
 */
#ifndef QCOW2X_FORMAT_H
#define QCOW2X_FORMAT_H

#include <stdint.h>

#define Q2_MAGIC 0x514649fbu /* "QFI\xfb" */

/* Header field offsets in bytes, section "Header". Those from 72 on exist in version 3 only. */
#define Q2_HDR_MAGIC 0
#define Q2_HDR_VERSION 4
#define Q2_HDR_BACKING_OFFSET 8
#define Q2_HDR_BACKING_SIZE 16
#define Q2_HDR_CLUSTER_BITS 20
#define Q2_HDR_SIZE 24
#define Q2_HDR_CRYPT_METHOD 32
#define Q2_HDR_L1_SIZE 36
#define Q2_HDR_L1_OFFSET 40
#define Q2_HDR_RT_OFFSET 48
#define Q2_HDR_RT_CLUSTERS 56
#define Q2_HDR_NB_SNAPSHOTS 60
#define Q2_HDR_SNAPSHOTS_OFFSET 64
#define Q2_HDR_V2_LENGTH 72
#define Q2_HDR_INCOMPAT 72
#define Q2_HDR_COMPAT 80
#define Q2_HDR_AUTOCLEAR 88
#define Q2_HDR_REFCOUNT_ORDER 96
#define Q2_HDR_HEADER_LENGTH 100
#define Q2_HDR_V3_LENGTH 104
#define Q2_HDR_COMPRESSION_TYPE 104
#define Q2_HDR_LENGTH_NOW 112 /* what we write: compression type plus its padding */

/* Feature bits, section "Header". */
#define Q2_INCOMPAT_DIRTY (UINT64_C(1) << 0)
#define Q2_INCOMPAT_CORRUPT (UINT64_C(1) << 1)
#define Q2_INCOMPAT_DATA_FILE (UINT64_C(1) << 2)
#define Q2_INCOMPAT_COMPRESSION (UINT64_C(1) << 3)
#define Q2_INCOMPAT_EXTL2 (UINT64_C(1) << 4)
#define Q2_INCOMPAT_KNOWN UINT64_C(0x1f)
#define Q2_COMPAT_LAZY_REFCOUNTS (UINT64_C(1) << 0)
#define Q2_AUTOCLEAR_BITMAPS (UINT64_C(1) << 0)
#define Q2_AUTOCLEAR_RAW_DATA (UINT64_C(1) << 1)

#define Q2_CRYPT_NONE 0u
#define Q2_CRYPT_AES 1u
#define Q2_CRYPT_LUKS 2u

#define Q2_COMPRESSION_DEFLATE 0u
#define Q2_COMPRESSION_ZSTD 1u

/* Header extension types, section "Header extensions". */
#define Q2_EXT_END 0x00000000u
#define Q2_EXT_BACKING_FORMAT 0xe2792acau
#define Q2_EXT_FEATURE_NAMES 0x6803f857u
#define Q2_EXT_BITMAPS 0x23852875u
#define Q2_EXT_CRYPTO_HEADER 0x0537be77u
#define Q2_EXT_DATA_FILE 0x44415441u

/* L1 and L2 entries, section "Cluster mapping". */
#define Q2_OFLAG_COPIED (UINT64_C(1) << 63)
#define Q2_OFLAG_COMPRESSED (UINT64_C(1) << 62)
#define Q2_OFLAG_ZERO UINT64_C(1)
#define Q2_L1E_OFFSET_MASK UINT64_C(0x00fffffffffffe00)
#define Q2_L2E_OFFSET_MASK UINT64_C(0x00fffffffffffe00)
#define Q2_L1E_RESERVED_MASK UINT64_C(0x7f000000000001ff)
#define Q2_L2E_STD_RESERVED_MASK UINT64_C(0x3f000000000001fe)
#define Q2_RTE_OFFSET_MASK UINT64_C(0xfffffffffffffe00)
#define Q2_RTE_RESERVED_MASK UINT64_C(0x00000000000001ff)

/* Extended L2 entries, section "Extended L2 Entries": bit i of the low half says subcluster i is
 * allocated, bit i of the high half says it reads as zeros. */
#define Q2_SUBCLUSTERS 32u
#define Q2_BITMAP_ALL_ALLOC UINT64_C(0x00000000ffffffff)
#define Q2_BITMAP_ALL_ZERO UINT64_C(0xffffffff00000000)

#define Q2_MIN_CLUSTER_BITS 9u
#define Q2_MAX_CLUSTER_BITS 21u
#define Q2_MIN_EXTL2_CLUSTER_BITS 14u
#define Q2_MAX_REFCOUNT_ORDER 6u

/* Limits, each looked at before memory is taken for what it limits; SECURITY.md lists them. They are
 * QEMU's where QEMU has one, so that an image which one opens the other opens as well. */
#define Q2_MAX_DISK_BYTES UINT64_C(0x7fffffffffffffff)
#define Q2_MAX_L1_BYTES (UINT64_C(32) << 20)
#define Q2_MAX_RT_BYTES (UINT64_C(8) << 20)
#define Q2_MAX_SNAPSHOTS 65536u
#define Q2_MAX_SNAPSHOT_TABLE_BYTES (UINT64_C(1024) * Q2_MAX_SNAPSHOTS)
#define Q2_MAX_SNAPSHOT_EXTRA 1024u /* bytes of an entry that nobody need know */
#define Q2_MAX_EXTENSIONS 1024u /* five exist; a cluster of 2 MiB has room for 262144 */
#define Q2_MAX_BACKING_NAME 1023u
#define Q2_MAX_BACKING_FORMAT 15u
#define Q2_MAX_BITMAPS 65535u
#define Q2_MAX_BITMAP_DIR_BYTES (UINT64_C(1024) * Q2_MAX_BITMAPS)
#define Q2_MAX_BITMAP_BYTES (UINT64_C(512) << 20) /* clusters of bits of one bitmap */
#define Q2_MAX_BITMAP_NAME 1023u
#define Q2_MAX_KEY_BYTES 64u /* of a LUKS slot: two AES-256 keys, for XTS */
#define Q2_MAX_CHAIN_DEPTH 1024u /* layers of one backing chain */
/* Host offsets live in bits 9..55 of an entry. */
#define Q2_MAX_HOST_OFFSET (UINT64_C(1) << 56)

#define Q2_SECTOR 512u /* unit of compressed sizes and of dirty metadata */

#endif
