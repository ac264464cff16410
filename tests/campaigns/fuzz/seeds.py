"""The images that a run begins with: small ones of every kind that the format has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from support.stamps import noise, stamped

import qcow2x
from qcow2x.encryption import Encryption

KEY = "fuzz"
SIZE = 96 << 10

_KINDS: dict[str, dict[str, Any]] = {
    "plain": {"cluster_size": 4096},
    "tiny": {"cluster_size": 512, "refcount_bits": 1},
    "wide": {"cluster_size": 1024, "refcount_bits": 64},
    "narrow": {"cluster_size": 512, "refcount_bits": 4, "compression_type": "zstd"},
    "extended": {"cluster_size": 16384, "extended_l2": True},
    "lazy": {"cluster_size": 2048, "lazy_refcounts": True, "compression_type": "zstd"},
    "v2": {"cluster_size": 1024, "compat": "0.10"},
    "luks": {"cluster_size": 4096, "encryption": Encryption(KEY, iter_time_ms=1)},
    "aes": {"cluster_size": 1024, "encryption": Encryption(KEY, format="aes")},
}


def make(folder: Path) -> dict[str, bytes]:
    return {kind: _make(folder / f"{kind}.qcow2", kind) for kind in _KINDS}


def _make(path: Path, kind: str) -> bytes:
    options = _KINDS[kind]
    qcow2x.create(path, SIZE, **options)
    with qcow2x.open(path, "r+", key=KEY if "encryption" in options else None) as image:
        cluster = image.cluster_size
        image.pwrite(stamped(0, 4 * cluster, 1), 0)
        if "encryption" not in options:
            middle = SIZE // 2 // cluster * cluster
            image.pwrite_compressed(stamped(0, cluster, 2), middle)
            image.pwrite_compressed(noise(0, cluster // 2, 3) + bytes(cluster // 2), 0)
        image.write_zeroes(SIZE - 2 * cluster, cluster)
        if kind != "tiny":
            image.snapshots.create("before")
            image.pwrite(b"after" * 100, cluster // 2)
            image.snapshots.create("between")
        if options.get("compat") != "0.10":
            image.bitmaps.add("often", 512)
            image.bitmaps.add("rest", 65536, False)
            image.pwrite(b"noted", 3 * cluster)
        if kind == "luks":
            image.pwrite(b"odd", 777)
    return path.read_bytes()
