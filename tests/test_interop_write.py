"""Images written here, with every feature, read by QEMU byte for byte; and what one wrote the other
goes on with."""

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.qemu import check_clean, compare_bytes, qemu_img, qemu_info, qemu_io
from support.stamps import explain, noise, stamped
from test_interop_read import CLUSTER_SIZES, REFCOUNT_BITS, content, disk_size

import qcow2x

KiB = 1 << 10
MiB = 1 << 20


def options_of(cell: dict[str, object]) -> str:
    return "-".join(str(value) for value in cell.values())


def cells() -> Iterator[dict[str, object]]:
    """Every cluster size with every refcount width, the other options turned over as it goes."""
    compression = itertools.cycle(["zlib", "zlib", "zstd"])
    preallocation = itertools.cycle(["off", "off", "metadata", "falloc", "off", "full", "off"])
    extended = itertools.cycle([False, True])
    lazy = itertools.cycle([False, True, False])
    cache = itertools.cycle(["unsafe", "writeback", "none", "unsafe", "writethrough", "directsync"])
    for cluster_size in CLUSTER_SIZES:
        yield {
            "cluster_size": cluster_size,
            "compat": "0.10",
            "preallocation": next(preallocation),
            "cache": next(cache),
        }
        for bits in REFCOUNT_BITS:
            yield {
                "cluster_size": cluster_size,
                "refcount_bits": bits,
                "extended_l2": cluster_size >= 16384 and next(extended),
                "compression_type": next(compression),
                "lazy_refcounts": next(lazy),
                "preallocation": next(preallocation),
                "cache": next(cache),
            }


@pytest.mark.parametrize("cell", list(cells()), ids=options_of)
def test_everything_written_here_is_read_by_qemu(tmp_path: Path, cell: dict[str, object]) -> None:
    options = dict(cell)
    cache = options.pop("cache")
    cluster = int(options["cluster_size"])  # type: ignore[call-overload]
    size = disk_size(cluster)
    path = tmp_path / "disk.qcow2"
    qcow2x.create(path, size, **options)  # type: ignore[arg-type]
    compare_bytes(path, bytes(size))
    model = content(size)
    with qcow2x.open(path, "r+", cache=cache) as image:  # type: ignore[arg-type]
        image.pwrite(model, 0)
        compressed = stamped(cluster, cluster, 5)
        image.pwrite_compressed(compressed, cluster)
        model[cluster : 2 * cluster] = compressed
        image.pwrite_compressed(noise(0, cluster, 6), 0)
        model[:cluster] = noise(0, cluster, 6)
        image.write_zeroes(2 * cluster - 300, 700)
        model[2 * cluster - 300 : 2 * cluster + 400] = bytes(700)
        last = size // cluster * cluster
        image.pwrite_compressed(stamped(last, size - last, 7), last)
        model[last:] = stamped(last, size - last, 7)
        image.flush()
        image.discard(cluster, cluster)
        model[cluster : 2 * cluster] = bytes(cluster)
        image.pwrite(b"partial", cluster + 77)
        model[cluster + 77 : cluster + 84] = b"partial"
    check_clean(path)
    compare_bytes(path, model)
    # QEMU goes on with it, then we read what it made of it.
    qemu_io(path, f"write -P 0x71 {size // 2 & ~511} 1k", f"discard {cluster} {cluster}")
    told = tmp_path / "told.raw"
    qemu_img("convert", "-f", "qcow2", "-O", "raw", path, told)
    with qcow2x.open(path, "r+") as image:
        wanted = told.read_bytes()
        got = image.pread(size, 0)
        assert got == wanted, explain(0, got, wanted)
        image.pwrite(b"again", 3)
        assert image.check().clean
    check_clean(path)


@pytest.mark.parametrize("compression", ["zlib", "zstd"])
@pytest.mark.parametrize("cluster_size", CLUSTER_SIZES)
def test_compressed_disk(tmp_path: Path, compression: str, cluster_size: int) -> None:
    """All clusters compressed and packed, every kind of content, then opened to other writers."""
    size = max(256 * KiB, 5 * cluster_size) + 512
    model = content(size)
    path = tmp_path / "disk.qcow2"
    qcow2x.create(path, size, cluster_size=cluster_size, compression_type=compression)
    with qcow2x.open(path, "r+", cache="unsafe") as image:
        image.pwrite_compressed(model, 0)
        used = image.check()
        assert used.clean
        assert used.compressed_clusters > 0
    compare_bytes(path, model)
    check_clean(path)
    # Packed: less than the clusters would take.
    assert os.path.getsize(path) < size + 4 * cluster_size + size // 4
    with qcow2x.open(path, "r+", cache="unsafe") as image:
        for at in range(0, size - 600, max(3 * cluster_size, 4096)):
            image.pwrite(b"\x66" * 600, at)
            model[at : at + 600] = b"\x66" * 600
        # Streams that are replaced give their share of a packed cluster back.
        image.pwrite_compressed(stamped(0, cluster_size, 8), 0)
        model[:cluster_size] = stamped(0, cluster_size, 8)
    check_clean(path)
    compare_bytes(path, model)


@pytest.mark.parametrize("compat", ["0.10", "1.1"])
@pytest.mark.parametrize("extended_l2", [False, True])
@pytest.mark.parametrize("base_format", ["raw", "qcow2"])
@pytest.mark.parametrize("relation", ["short", "same", "long"])
def test_chains_made_here(
    tmp_path: Path, compat: str, extended_l2: bool, base_format: str, relation: str
) -> None:
    if compat == "0.10" and extended_l2:
        with pytest.raises(ValueError):
            qcow2x.create(tmp_path / "x", 512, compat=compat, extended_l2=True)
        return
    size = 400 * KiB + 512
    cluster = 16 * KiB
    base_size = {"short": 150 * KiB + 512, "same": size, "long": size + 128 * KiB}[relation]
    bottom = content(base_size)
    base = tmp_path / f"base.{base_format}"
    if base_format == "raw":
        base.write_bytes(bottom)
    else:
        qcow2x.create(base, base_size, cluster_size=4096)
        with qcow2x.open(base, "r+") as image:
            image.pwrite_compressed(bottom, 0)
    model = (bottom + bytes(size))[:size]
    untouched = base.read_bytes()
    for name, under, fmt in (
        ("middle.qcow2", base.name, base_format),
        ("top.qcow2", "middle.qcow2", "qcow2"),
    ):
        path = tmp_path / name
        qcow2x.create(
            path, size, cluster_size=cluster, compat=compat, extended_l2=extended_l2,
            backing_file=under, backing_format=fmt,
        )  # fmt: skip
        with qcow2x.open(path, "r+", references="follow") as image:
            for n, at in enumerate(range(700, size - 3000, 50_000)):
                image.pwrite(bytes([n + 1]) * 3000, at)
                model[at : at + 3000] = bytes([n + 1]) * 3000
            image.write_zeroes(20_000, 40_000, unmap=True)
            model[20_000:60_000] = bytes(40_000)
            image.discard(5 * cluster, 2 * cluster)
            if compat != "0.10":
                model[5 * cluster : 7 * cluster] = bytes(2 * cluster)
        check_clean(path)
        compare_bytes(path, model)
    assert base.read_bytes() == untouched
    assert qemu_info(path)["backing-filename-format"] == "qcow2"


@pytest.mark.parametrize("preallocation", ["metadata", "falloc", "full"])
@pytest.mark.parametrize("cluster_size", [512, 65536, 2 * MiB])
@pytest.mark.parametrize("extended_l2", [False, True])
def test_growing_with_preallocation(
    tmp_path: Path, preallocation: str, cluster_size: int, extended_l2: bool
) -> None:
    extended_l2 = extended_l2 and cluster_size >= 16384
    path = tmp_path / "disk.qcow2"
    old = cluster_size + 512
    new = 4 * cluster_size + 1024
    qcow2x.create(path, old, cluster_size=cluster_size, extended_l2=extended_l2)
    with qcow2x.open(path, "r+") as image:
        image.pwrite(stamped(0, old, 1), 0)
        image.resize(new, preallocation=preallocation)
        assert image.pread(new, 0) == stamped(0, old, 1) + bytes(new - old)
        image.pwrite(b"x" * 100, new - 200)
    check_clean(path)
    compare_bytes(path, stamped(0, old, 1) + bytes(new - old - 200) + b"x" * 100 + bytes(100))


def test_a_disk_larger_than_its_first_tables(tmp_path: Path) -> None:
    """Sparse writes over a disk whose refcount table has to move several times."""
    path = tmp_path / "disk.qcow2"
    size = 40 * MiB
    qcow2x.create(path, size, cluster_size=512, refcount_bits=64)
    model = bytearray(size)
    with qcow2x.open(path, "r+", cache="unsafe") as image:
        for at in range(0, size, MiB):
            data = stamped(at, 700 * KiB, 1)
            image.pwrite(data, at)
            model[at : at + len(data)] = data
        image.discard(3 * MiB, 20 * MiB)
        model[3 * MiB : 23 * MiB] = bytes(20 * MiB)
        image.flush()
        image.flush()
        end = image.stats().host_bytes_end
        image.pwrite(stamped(4 * MiB, 5 * MiB, 2), 4 * MiB)
        model[4 * MiB : 9 * MiB] = stamped(4 * MiB, 5 * MiB, 2)
        # What was freed is used again.
        assert image.stats().host_bytes_end == end
    check_clean(path)
    compare_bytes(path, model)


def test_a_disk_of_terabytes(tmp_path: Path) -> None:
    """A few clusters far apart on the largest disk that default clusters allow."""
    path = tmp_path / "disk.qcow2"
    size = 1 << 51
    qcow2x.create(path, size)
    places = [0, 1 << 40, (1 << 45) + 12345, size - 1000]
    with qcow2x.open(path, "r+") as image:
        for n, at in enumerate(places):
            image.pwrite(bytes([n + 1]) * 1000, at)
    check_clean(path)
    qemu_io(path, *[f"read -P {n + 1} {at} 1000" for n, at in enumerate(places)])
    with qcow2x.open(path) as image:
        assert [image.pread(1000, at)[:1] for at in places] == [b"\1", b"\2", b"\3", b"\4"]
        runs = [e for e in image.extents() if e.data]
    assert len(runs) == 4


def test_qemu_and_we_take_turns(tmp_path: Path) -> None:
    """An image that both write, each allocating where the other freed."""
    path = tmp_path / "disk.qcow2"
    size = 3 * MiB
    qcow2x.create(path, size, cluster_size=4096, refcount_bits=8)
    model = bytearray(size)
    for turn in range(6):
        with qcow2x.open(path, "r+") as image:
            at = turn * 400_000
            data = stamped(at, 300_000, turn)
            image.pwrite(data, at)
            model[at : at + 300_000] = data
            image.discard(turn * 81920, 40960)
            model[turn * 81920 : turn * 81920 + 40960] = bytes(40960)
        start = turn * 200_704
        qemu_io(path, f"write -P {turn + 9} {start} 102400", f"write -z {start + 4096} 8192")
        model[start : start + 102400] = bytes([turn + 9]) * 102400
        model[start + 4096 : start + 12288] = bytes(8192)
        check_clean(path)
    compare_bytes(path, model)
