"""Room of the host that is used again without anybody asking for a flush."""

from __future__ import annotations

from pathlib import Path

import qcow2x

MIB = 1 << 20


def test_discarded_clusters_are_reused_by_a_writer_that_never_flushes(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qcow2x.create(path, 64 * MIB)
    with qcow2x.open(path, "r+") as image:
        for turn in range(12):
            image.pwrite(bytes([turn + 1]) * (32 * MIB), 0)
            image.discard(0, 32 * MIB)
        image.pwrite(b"x" * MIB, 0)
        # One disk's worth, and what may wait to be free; not twelve.
        assert path.stat().st_size < 2 * 32 * MIB
        assert image.pread(2, MIB - 1) == b"x\0"
    with qcow2x.open(path) as image:
        assert image.check().clean


def test_a_search_for_a_run_goes_on_after_its_loads(tmp_path: Path) -> None:
    """Holes too small for a table, in more refcount slices than the cache holds at once: the search
    once began anew with each slice that it had to read, and never ended."""
    path = tmp_path / "disk.qcow2"
    size = 80 << 20
    qcow2x.create(path, size, cluster_size=512, refcount_bits=64)
    with qcow2x.open(path, "r+") as image:
        image.pwrite(b"x" * size, 0)
        for at in range(0, size, 1024):
            image.discard(at, 512)
    with qcow2x.open(path, "r+", l2_cache_size=4096) as image:
        # 2.5 KiB of bits are five clusters in a row.
        image.bitmaps.add("changed", granularity=4096)
        image.pwrite(b"y" * size, 0)
    with qcow2x.open(path) as image:
        assert image.check().clean
