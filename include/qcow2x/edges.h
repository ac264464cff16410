/* The edges of the order of writes that barriers keep: what is durable before what else is written.
 *
 * Each barrier of the core asks q2_keeps(edge) first. That is the constant 1, and the compiler
 * drops the question, unless Q2_DROP_ORDER_EDGE is defined: a build of that kind, which only the
 * mutation check of the crash tests makes (tests/campaigns/mutants.py), leaves the edge out whose
 * name it finds in the environment, so that it can be shown that the crash tests notice.
 */
#ifndef QCOW2X_EDGES_H
#define QCOW2X_EDGES_H

/* X(name, what goes wrong at a cut of power without it) */
#define Q2_EDGES(X)                                                                                \
    X(REFBLOCK_BEFORE_L2, "an L2 entry names a cluster that is counted as free")                   \
    X(DATA_BEFORE_L2, "an L2 entry names a cluster whose bytes are not there")                     \
    X(RESERVE_BEFORE_L2, "an L2 entry names a reserved cluster whose zeros are not there")         \
    X(DATA_FILE_BEFORE_L2, "the same with an external data file")                                  \
    X(L2_BEFORE_L1, "an L1 entry names a table that is not there")                                 \
    X(ALL_BEFORE_FLUSH_RETURNS, "flushed bytes are gone")                                          \
    X(DATA_FILE_BEFORE_FLUSH_RETURNS, "flushed bytes of an external data file are gone")           \
    X(WRITE_DURABLE_AT_RETURN, "a write promised to be durable is gone")                           \
    X(MAPPING_DURABLE_AT_RETURN, "an allocating write promised to be durable is gone")             \
    X(DISCARD_DURABLE_AT_RETURN, "zeros promised to be durable are gone")                          \
    X(DIRTY_BEFORE_LAZY, "refcounts are behind and nothing says so")                               \
    X(REFCOUNTS_BEFORE_CLEAN, "the dirty bit is cleared and refcounts are behind")                 \
    X(UNMAPPED_BEFORE_FREED, "a mapping comes back to a cluster that is counted as free")          \
    X(REFBLOCK_BEFORE_REFTABLE, "the refcount table names a block that is not there")              \
    X(REFTABLE_BEFORE_HEADER, "the header names a refcount table that is not there")               \
    X(L1_WRITTEN_BEFORE_COPIED, "a longer L1 names tables that are not there")                     \
    X(L1_BEFORE_HEADER, "the header names an L1 table that is not there")                          \
    X(UNMAPPED_BEFORE_SHRUNK, "a disk that shrinks and grows shows its old bytes")                 \
    X(ZEROED_BEFORE_GROWN, "a disk that grows shows what was behind its end")                      \
    X(SIZE_BEFORE_RESIZE_RETURNS, "a resize that was done is undone")                              \
    X(DIRTY_BEFORE_SNAPSHOT_STEPS, "half a snapshot's refcounts and nothing says so")              \
    X(SNAPSHOT_BEFORE_HEADER, "the header names a snapshot that is not there, or writable yet")    \
    X(SNAPSHOTS_BEFORE_HEADER, "the header names a table of snapshots that is not there")          \
    X(SNAPSHOT_GONE_BEFORE_FREED, "a snapshot that comes back has lost its clusters")              \
    X(SNAPSHOT_L1_BEFORE_HEADER, "the disk's L1 table is not there")                               \
    X(DISK_SWITCHED_BEFORE_FREED, "the old disk comes back and has lost its clusters")             \
    X(COPIED_BEFORE_CLEAN, "the dirty bit is cleared, refcounts or COPIED flags are behind")       \
    X(REFCOUNTS_BEFORE_WIDTH, "the header names refcounts that are not there")                     \
    X(WIDTH_BEFORE_FREED, "the header names refcounts that are something else")                    \
    X(BITMAPS_IN_USE_BEFORE_WRITE, "a bitmap calls itself right and misses a write")               \
    X(AUTOCLEAR_BEFORE_WRITE, "a feature's promise stands and is broken")

#define Q2_EDGE_ENUM_(name, why) Q2_EDGE_##name,
/* NONE: a barrier that makes a result durable and orders nothing that another does not. */
enum q2_edge { Q2_EDGE_NONE, Q2_EDGES(Q2_EDGE_ENUM_) Q2_EDGE_COUNT };
#undef Q2_EDGE_ENUM_

#ifdef Q2_DROP_ORDER_EDGE
#include <stdlib.h>
#include <string.h>

static inline int q2_keeps(enum q2_edge edge)
{
#define Q2_EDGE_NAME_(name, why) #name,
    static const char *const names[] = {"", Q2_EDGES(Q2_EDGE_NAME_)};
#undef Q2_EDGE_NAME_
    const char *dropped = getenv("QCOW2X_DROPPED_EDGE");
    return !dropped || edge == Q2_EDGE_NONE || strcmp(dropped, names[edge]) != 0;
}
#else
#define q2_keeps(edge) ((void)(edge), 1)
#endif

#endif
