"""Images made by QEMU, in every option it has for qcow2, read here byte for byte."""

import itertools
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.qemu import check_clean, compare_bytes, qemu_img, qemu_io, qemu_map, run
from support.stamps import explain, noise, stamped

import qcow2x

KiB = 1 << 10
MiB = 1 << 20
CLUSTER_SIZES = [512 << i for i in range(13)]
REFCOUNT_BITS = [1, 2, 4, 8, 16, 32, 64]


@dataclass(frozen=True)
class Made:
    """One image QEMU is asked for."""

    cluster_size: int
    compat: str = "1.1"
    refcount_bits: int = 16
    extended_l2: bool = False
    compression: str = "zlib"
    lazy: bool = False
    preallocation: str = "off"

    @property
    def options(self) -> str:
        words = [f"cluster_size={self.cluster_size}", f"compat={self.compat}"]
        if self.compat != "0.10":
            words += [
                f"refcount_bits={self.refcount_bits}",
                f"extended_l2={'on' if self.extended_l2 else 'off'}",
                f"compression_type={self.compression}",
                f"lazy_refcounts={'on' if self.lazy else 'off'}",
            ]
        if self.preallocation != "off":
            words.append(f"preallocation={self.preallocation}")
        return ",".join(words)

    def __str__(self) -> str:
        parts = [f"{self.cluster_size}", f"v{2 if self.compat == '0.10' else 3}"]
        parts.append(f"rc{self.refcount_bits}")
        parts += ["extl2"] * self.extended_l2 + ["lazy"] * self.lazy
        return "-".join([*parts, self.compression, self.preallocation])


def shapes() -> Iterator[Made]:
    """Every cluster size with every refcount width, the other options turned over as it goes, so
    that each pair of options meets somewhere."""
    compressions = itertools.cycle(["zlib", "zstd", "zlib"])
    preallocations = itertools.cycle(["off", "metadata", "off", "falloc", "full"])
    extended = itertools.cycle([True, False])
    lazy = itertools.cycle([False, False, True])
    for cluster_size in CLUSTER_SIZES:
        yield Made(cluster_size, compat="0.10", preallocation=next(preallocations))
        for bits in REFCOUNT_BITS:
            yield Made(
                cluster_size,
                refcount_bits=bits,
                extended_l2=cluster_size >= 16384 and next(extended),
                compression=next(compressions),
                lazy=next(lazy),
                preallocation=next(preallocations),
            )


def disk_size(cluster_size: int) -> int:
    """Several L2 tables of the small sizes, a few clusters of the large ones; ends inside one."""
    return max(192 * KiB, 3 * cluster_size + cluster_size // 2) + 512


def content(size: int) -> bytearray:
    """A disk with everything: stamped, incompressible, uniform, and empty stretches."""
    data = bytearray(size)
    quarter = size // 4 & ~511
    data[:quarter] = stamped(0, quarter, 1)
    data[quarter : quarter + 4096] = noise(quarter, 4096, 2)
    data[2 * quarter : 2 * quarter + 1536] = b"\xee" * 1536
    data[size - 700 :] = stamped(size - 700, 700, 3)
    return data


def assert_reads(path: Path, expected: bytes | bytearray, **options: object) -> None:
    """All of it, in one piece and in pieces that respect no boundary."""
    with qcow2x.open(path, **options) as image:  # type: ignore[arg-type]
        assert image.size == len(expected)
        got = image.pread(len(expected), 0)
        assert got == expected, explain(0, got, expected)
        step = max(777, len(expected) // 50)
        for offset in range(0, len(expected), step):
            got = image.pread(step, offset)
            wanted = expected[offset : offset + step]
            assert got == wanted, explain(offset, got, wanted)


@pytest.mark.parametrize("made", list(shapes()), ids=str)
def test_converted_and_then_written_by_qemu(tmp_path: Path, made: Made) -> None:
    size = disk_size(made.cluster_size)
    expected = content(size)
    raw = tmp_path / "disk.raw"
    raw.write_bytes(expected)
    path = tmp_path / "disk.qcow2"
    qemu_img("convert", "-f", "raw", "-O", "qcow2", "-o", made.options, raw, path)
    assert_reads(path, expected)

    cluster = made.cluster_size
    middle = size // 2 & ~511
    v3 = made.compat != "0.10"
    qemu_io(
        path,
        f"write -P 0x11 {middle} 1536",
        "write -z 0 1024",
        f"write -z {'-u ' if v3 else ''}{cluster} {cluster}",
        f"discard {2 * cluster} {cluster}",
        f"write -P 0x22 {size - 512} 512",
    )
    expected[middle : middle + 1536] = b"\x11" * 1536
    expected[0:1024] = bytes(1024)
    expected[cluster : 2 * cluster] = bytes(cluster)
    # QEMU may leave a discarded cluster as it is; what it now reads is the oracle.
    after = tmp_path / "after.raw"
    qemu_img("convert", "-f", "qcow2", "-O", "raw", path, after)
    told = after.read_bytes()
    expected[2 * cluster : 3 * cluster] = told[2 * cluster : 3 * cluster]
    expected[size - 512 :] = b"\x22" * 512
    assert told == expected
    assert_reads(path, told)


@pytest.mark.parametrize("made", [m for m in shapes() if m.preallocation == "off"], ids=str)
def test_compressed_by_qemu(tmp_path: Path, made: Made) -> None:
    size = disk_size(made.cluster_size)
    expected = content(size)
    raw = tmp_path / "disk.raw"
    raw.write_bytes(expected)
    path = tmp_path / "disk.qcow2"
    qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", "-o", made.options, raw, path)
    assert_reads(path, expected)
    # Plain clusters among compressed ones.
    qemu_io(path, "write -P 0x33 512 2048")
    expected[512:2560] = b"\x33" * 2048
    assert_reads(path, expected, cache="none")


@pytest.mark.parametrize("compat", ["0.10", "1.1"])
@pytest.mark.parametrize("base_format", ["raw", "qcow2"])
@pytest.mark.parametrize("extended_l2", [False, True])
@pytest.mark.parametrize("relation", ["short", "same", "long"])
def test_chains_made_by_qemu(
    tmp_path: Path, compat: str, base_format: str, extended_l2: bool, relation: str
) -> None:
    if extended_l2 and compat == "0.10":
        extended_l2 = False
    size = 512 * KiB + 512
    base_size = {"short": 200 * KiB + 512, "same": size, "long": size + 64 * KiB}[relation]
    bottom = content(base_size)
    raw = tmp_path / "base.raw"
    raw.write_bytes(bottom)
    base = raw
    if base_format == "qcow2":
        base = tmp_path / "base.qcow2"
        qemu_img("convert", "-O", "qcow2", "-o", "cluster_size=4096", raw, base)
    middle = tmp_path / "middle.qcow2"
    top = tmp_path / "top.qcow2"
    options = f"compat={compat},cluster_size=16384" + (",extended_l2=on" if extended_l2 else "")
    for path, under, fmt, length in (
        (middle, base, base_format, size - 16 * KiB),
        (top, middle, "qcow2", size),
    ):
        qemu_img("create", "-f", "qcow2", "-o", options, "-b", under, "-F", fmt, path, length)
    qemu_io(middle, "write -P 0x41 70000 3000", "write -z 32768 16384", "write -P 0x42 400000 512")
    qemu_io(top, "write -P 0x43 71000 512", "write -z 98304 512", "discard 16384 16384")
    told = tmp_path / "told.raw"
    qemu_img("convert", "-f", "qcow2", "-O", "raw", top, told)
    assert_reads(top, told.read_bytes(), references="follow")
    with qcow2x.open(top, references="follow") as image:
        assert len(image.backing_chain) == 3


def test_every_kind_of_subcluster(tmp_path: Path) -> None:
    """Allocated, zero and unallocated subclusters side by side, over a backing file."""
    raw = tmp_path / "base.raw"
    size = 512 * KiB
    raw.write_bytes(stamped(0, size, 9))
    path = tmp_path / "top.qcow2"
    qemu_img("create", "-f", "qcow2", "-o", "extended_l2=on", "-b", raw, "-F", "raw", path, size)
    commands = []
    for sub in range(0, 64, 3):
        commands.append(f"write -P {sub + 1} {sub * 2048} 2048")
        commands.append(f"write -z {(sub + 1) * 2048} 2048")
    commands.append(f"write -z {128 * KiB} {64 * KiB}")
    commands.append(f"write -P 0x77 {130 * KiB} 512")
    qemu_io(path, *commands)
    told = tmp_path / "told.raw"
    qemu_img("convert", "-f", "qcow2", "-O", "raw", path, told)
    assert_reads(path, told.read_bytes(), references="follow")


@pytest.mark.parametrize("cluster_size", [512, 65536])
@pytest.mark.parametrize("extended_l2", [False, True])
@pytest.mark.parametrize("compressed", [False, True])
def test_writing_leaves_internal_snapshots_alone(
    tmp_path: Path, cluster_size: int, extended_l2: bool, compressed: bool
) -> None:
    """Clusters shared with a snapshot are copied before they change, tables too."""
    if extended_l2 and cluster_size < 16384:
        cluster_size = 16384
    size = 40 * cluster_size + 512
    before = content(size)
    raw = tmp_path / "disk.raw"
    raw.write_bytes(before)
    path = tmp_path / "disk.qcow2"
    made = Made(cluster_size, extended_l2=extended_l2)
    flags = ["-c"] if compressed else []
    qemu_img("convert", *flags, "-f", "raw", "-O", "qcow2", "-o", made.options, raw, path)
    qemu_img("snapshot", "-c", "first", path)
    qemu_io(path, f"write -P 0x61 {3 * cluster_size} {cluster_size}")
    middle = bytearray(before)
    middle[3 * cluster_size : 4 * cluster_size] = b"\x61" * cluster_size
    qemu_img("snapshot", "-c", "second", path)

    after = bytearray(middle)
    with qcow2x.open(path, "r+") as image:
        for offset, length in ((100, 700), (3 * cluster_size + 5, 2 * cluster_size), (size - 9, 9)):
            image.pwrite(b"\x99" * length, offset)
            after[offset : offset + length] = b"\x99" * length
        image.discard(10 * cluster_size, 2 * cluster_size)
        after[10 * cluster_size : 12 * cluster_size] = bytes(2 * cluster_size)
        for unmap, at in ((False, 14), (True, 16)):
            image.write_zeroes(at * cluster_size, cluster_size + 33, unmap=unmap)
            after[at * cluster_size : (at + 1) * cluster_size + 33] = bytes(cluster_size + 33)
        data = stamped(20 * cluster_size, cluster_size, 44)
        image.pwrite_compressed(data, 20 * cluster_size)
        after[20 * cluster_size : 21 * cluster_size] = data
        # Again: now the clusters are the image's own.
        image.pwrite(b"\x55" * 300, 3 * cluster_size + 50)
        after[3 * cluster_size + 50 : 3 * cluster_size + 350] = b"\x55" * 300
        image.flush()
        image.pwrite(b"\x56" * 300, 11 * cluster_size + 50)
        after[11 * cluster_size + 50 : 11 * cluster_size + 350] = b"\x56" * 300

    check_clean(path)
    compare_bytes(path, after)
    for name, wanted in (("first", before), ("second", middle)):
        out = tmp_path / f"{name}.raw"
        qemu_img("convert", "-l", name, "-f", "qcow2", "-O", "raw", path, out)
        got = out.read_bytes()
        assert got == wanted, f"snapshot {name}: {explain(0, got, wanted)}"
    # Deleting them gives every reference back, so the counts were right.
    qemu_img("snapshot", "-d", "first", path)
    qemu_img("snapshot", "-d", "second", path)
    check_clean(path)
    compare_bytes(path, after)


def test_resizing_with_snapshots_is_qemus_policy(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qemu_img("create", "-f", "qcow2", path, "1M")
    qemu_io(path, "write -P 1 0 1M")
    qemu_img("snapshot", "-c", "s", path)
    for size in (2 * MiB, 512 * KiB):
        with qcow2x.open(path, "r+") as image:
            image.resize(size, shrink=True)
        check_clean(path)
        assert json.loads(qemu_img("info", "--output=json", path))["virtual-size"] == size
    qemu_img("snapshot", "-a", "s", path)
    qemu_io(path, "read -P 1 0 1M")
    old = tmp_path / "old.qcow2"
    qemu_img("create", "-f", "qcow2", "-o", "compat=0.10", old, "1M")
    qemu_img("snapshot", "-c", "s", old)
    qemu_img("resize", "--shrink", old, "512k", code=1)
    with qcow2x.open(old, "r+") as image, pytest.raises(qcow2x.UnsupportedFeature):
        image.resize(512 * KiB, shrink=True)


def test_dirty_image_is_read_as_it_is_and_mended_to_be_written(tmp_path: Path) -> None:
    """An image with lazy refcounts that was not closed: data is right, refcounts may not be."""
    path = tmp_path / "disk.qcow2"
    qemu_img("create", "-f", "qcow2", "-o", "lazy_refcounts=on", path, "4M")
    # `abort` leaves the image as a crash would.
    run("qemu-io", "-f", "qcow2", "-c", "write -P 0x5a 0 1M", "-c", "flush", "-c", "abort", path,
        code=None)  # fmt: skip
    with qcow2x.open(path) as image:
        assert image.info().dirty
        assert image.pread(4 * MiB, 0) == b"\x5a" * MiB + bytes(3 * MiB)
    with qcow2x.open(path, "r+") as image:
        assert not image.info().dirty
        image.pwrite(b"\x5b" * MiB, MiB)
    check_clean(path)
    qemu_io(path, "read -P 0x5a 0 1M", "read -P 0x5b 1M 1M")


@pytest.mark.parametrize("extended_l2", ["off", "on"])
@pytest.mark.parametrize("backing", [False, True])
def test_extents_agree_with_qemu_map(tmp_path: Path, extended_l2: str, backing: bool) -> None:
    size = 2 * MiB + 512
    path = tmp_path / "top.qcow2"
    under = []
    if backing:
        raw = tmp_path / "base.raw"
        qemu_img("convert", "-O", "qcow2", _raw(raw, content(MiB)), tmp_path / "base.qcow2")
        under = ["-b", tmp_path / "base.qcow2", "-F", "qcow2"]
    options = f"cluster_size=16k,extended_l2={extended_l2}"
    qemu_img("create", "-f", "qcow2", "-o", options, *under, path, size)
    qemu_io(
        path, "write -P 1 0 48k", "write -P 2 64k 512", "write -z 80k 16k", "write -z -u 32k 16k",
        "write -c -P 3 160k 16k", "write -P 4 2M 512", "discard 0 16k", "write -z 112k 1k",
    )  # fmt: skip
    with qcow2x.open(path, references="follow") as image:
        ours = [
            (e.offset, e.length, e.data, e.zero, e.depth, e.host_offset, e.allocated)
            for e in image.extents()
        ]
    theirs = [
        (m["start"], m["length"], m["data"], m["zero"], m["depth"], m.get("offset"), m["present"])
        for m in qemu_map(path)
    ]
    assert _by_sector(ours) == _by_sector(theirs)


def _raw(path: Path, data: bytes | bytearray) -> Path:
    path.write_bytes(data)
    return path


def _by_sector(runs: list[tuple]) -> list[tuple]:
    """What holds for each sector: who merges which runs is nobody's business."""
    sectors = []
    for start, length, data, zero, depth, host, present in runs:
        for at in range(0, length, 512):
            place = host + at if host is not None and data else None
            where = depth if present else None
            sectors.append((start + at, data, zero, where, place))
    return sectors


def test_copies_opened_from_a_descriptor(tmp_path: Path) -> None:
    raw = _raw(tmp_path / "disk.raw", content(300 * KiB))
    path = tmp_path / "disk.qcow2"
    qemu_img("convert", "-O", "qcow2", raw, path)
    copy = tmp_path / "copy.qcow2"
    shutil.copy(path, copy)
    with open(copy, "rb") as file:
        with qcow2x.open(file.fileno()) as image:
            assert image.pread(300 * KiB, 0) == raw.read_bytes()
        assert file.read(4) == b"QFI\xfb"
