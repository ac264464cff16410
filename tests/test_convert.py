"""convert(): the same disk comes out, whole or not at all, whatever the format and threads."""

from __future__ import annotations

import hashlib
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from cli_helpers import (
    MIB,
    assert_qemu_agrees,
    disk_bytes,
    qemu_img,
    qemu_io,
    write_sparse,
)

import qcow2x
from qcow2x.errors import Cancelled, ImageLocked, ReferenceDenied
from qcow2x.ops.convert import convert
from qcow2x.ops.copyjob import DATA, KEEP, ZERO, plan_runs
from qcow2x.types import Extent


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    return write_sparse(tmp_path / "disk.raw", disk_bytes())


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def names(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


# --- content -------------------------------------------------------------------------------


def test_raw_to_raw_is_exact_and_sparse(tmp_path: Path) -> None:
    source = tmp_path / "odd.raw"
    source.write_bytes(disk_bytes(5 * MIB)[:-3])
    result = convert(source, tmp_path / "out.raw", dst_format="raw")
    out = tmp_path / "out.raw"
    assert out.read_bytes() == source.read_bytes()
    assert out.stat().st_blocks * 512 < MIB + (512 << 10)
    assert result.size == 5 * MIB - 3
    assert result.data_bytes + result.zero_bytes == -(-result.size // 512) * 512 or (
        result.data_bytes + result.zero_bytes == result.size
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cluster_size": 512},
        {"cluster_size": 2 * MIB},
        {"compat": "0.10"},
        {"extended_l2": True},
        {"refcount_bits": 1},
        {"preallocation": "metadata"},
        {"cache": "none"},
        {"cache": "directsync", "threads": 2},
    ],
    ids=str,
)
def test_raw_to_qcow2_and_back(raw: Path, tmp_path: Path, options: dict[str, object]) -> None:
    image, back = tmp_path / "disk.qcow2", tmp_path / "back.raw"
    convert(raw, image, **options)  # type: ignore[arg-type]
    assert_qemu_agrees(image, raw)
    convert(image, back, dst_format="raw")
    assert back.read_bytes() == raw.read_bytes()


@pytest.mark.parametrize("compression_type", ["zlib", "zstd"])
@pytest.mark.parametrize("cluster_size", [4096, 65536, 2 * MIB])
def test_compressed(raw: Path, tmp_path: Path, compression_type: str, cluster_size: int) -> None:
    image, back = tmp_path / "disk.qcow2", tmp_path / "back.raw"
    result = convert(
        raw, image, compress=True, compression_type=compression_type, cluster_size=cluster_size
    )
    assert_qemu_agrees(image, raw)
    assert result.compressed_bytes is not None
    assert 0 < result.compressed_bytes < result.data_bytes
    assert '"compressed-clusters"' in qemu_img("check", "--output=json", image)
    convert(image, back, dst_format="raw")
    assert back.read_bytes() == raw.read_bytes()


def test_higher_level_is_smaller(tmp_path: Path) -> None:
    source = tmp_path / "text.raw"
    source.write_bytes(Path(__file__).read_bytes() * 60)
    sizes = []
    for level in (1, 9):
        result = convert(source, tmp_path / f"{level}.qcow2", compress=True, level=level)
        sizes.append(result.compressed_bytes)
    assert sizes[1] < sizes[0]
    with pytest.raises(ValueError, match="level"):
        convert(source, tmp_path / "x.qcow2", compress=True, level=77)


@pytest.mark.parametrize("options", [{}, {"compress": True}, {"dst_format": "raw"}], ids=str)
def test_bytes_do_not_depend_on_threads(
    raw: Path, tmp_path: Path, options: dict[str, object]
) -> None:
    digests = set()
    for threads in (1, 2, 5):
        out = tmp_path / f"{threads}.out"
        convert(raw, out, threads=threads, **options)  # type: ignore[arg-type]
        digests.add(digest(out))
    assert len(digests) == 1


def test_chain_made_by_qemu_reads_the_same(raw: Path, tmp_path: Path) -> None:
    base, middle, top = (tmp_path / f"{n}.qcow2" for n in ("base", "middle", "top"))
    qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", raw, base)
    qemu_img("create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", middle, "5M")
    qemu_io(middle, "write -P 7 100k 300k", "write -z 512k 128k", "write -P 9 4M 4k")
    qemu_img(
        "create", "-q", "-f", "qcow2", "-o", "extended_l2=on", "-b", middle, "-F", "qcow2", top
    )
    qemu_io(top, "write -P 5 130k 3k", "write -z -u 1M 64k", "write -c -P 3 2M 64k")
    ours, theirs = tmp_path / "ours.raw", tmp_path / "theirs.raw"
    convert(top, ours, dst_format="raw", references="follow")
    qemu_img("convert", "-O", "raw", top, theirs)
    assert ours.read_bytes() == theirs.read_bytes()
    convert(top, tmp_path / "flat.qcow2", references="follow")
    assert_qemu_agrees(tmp_path / "flat.qcow2", ours)


def test_names_inside_the_source_are_not_opened_by_default(raw: Path, tmp_path: Path) -> None:
    top = tmp_path / "top.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-b", raw, "-F", "raw", top)
    with pytest.raises(ReferenceDenied):
        convert(top, tmp_path / "out.raw", dst_format="raw")
    assert names(tmp_path) == {"disk.raw", "top.qcow2"}


def test_with_backing_file_only_the_top_is_copied(raw: Path, tmp_path: Path) -> None:
    base, top, out = (tmp_path / f"{n}.qcow2" for n in ("base", "top", "out"))
    qemu_img("convert", "-f", "raw", "-O", "qcow2", raw, base)
    qemu_img("create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", top)
    qemu_io(top, "write -P 7 128k 64k", "write -z 0 64k")
    convert(top, out, backing_file="base.qcow2", backing_format="qcow2", references="follow")
    assert_qemu_agrees(out, top, "qcow2")
    depths = {r["start"]: r["depth"] for r in _map(out)}
    assert depths[0] == 0
    assert depths[128 << 10] == 0
    assert depths[192 << 10] == 1


def _map(image: Path) -> list[dict[str, int]]:
    import json

    return list(json.loads(qemu_img("map", "--output=json", image)))


def test_existing_target_loses_its_old_content(raw: Path, tmp_path: Path) -> None:
    size = raw.stat().st_size
    for name, format in (("old.raw", "raw"), ("old.qcow2", "qcow2")):
        target = tmp_path / name
        qemu_img("create", "-q", "-f", format, target, size)
        qemu_io(target, f"write -P 170 0 {size}", format=format)
        convert(raw, target, dst_format=format, target_exists=True)
        qemu_img("compare", "-f", "raw", "-F", format, raw, target)
    small = tmp_path / "small.raw"
    small.write_bytes(bytes(4096))
    with pytest.raises(ValueError, match="smaller"):
        convert(raw, small, dst_format="raw", target_exists=True)


def test_into_an_open_image_and_from_one(raw: Path, tmp_path: Path) -> None:
    target = tmp_path / "t.qcow2"
    qcow2x.create(target, 8 * MIB)
    with qcow2x.open(target, "r+") as image:
        convert(raw, image, target_exists=True)
        assert image.pread(70_000, 0) == raw.read_bytes()[:70_000]
        convert(image, tmp_path / "back.raw", dst_format="raw")
    back = (tmp_path / "back.raw").read_bytes()
    assert back[: raw.stat().st_size] == raw.read_bytes()
    assert len(back) == 8 * MIB


def test_sparse_size_0_stores_every_cluster(tmp_path: Path) -> None:
    source = write_sparse(tmp_path / "s.raw", bytes(MIB))
    convert(source, tmp_path / "full.qcow2", sparse_size=0)
    convert(source, tmp_path / "full.raw", dst_format="raw", sparse_size=0)
    assert [(r["length"], r["data"]) for r in _map(tmp_path / "full.qcow2")] == [(MIB, True)]
    assert (tmp_path / "full.raw").stat().st_blocks * 512 >= MIB


def test_holes_of_a_preallocated_image_are_not_read(tmp_path: Path) -> None:
    image = tmp_path / "laid-out.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", image, "64M")
    qemu_io(image, "write -P 3 5M 64k")
    result = convert(image, tmp_path / "out.qcow2")
    assert result.data_bytes == 64 << 10
    assert_qemu_agrees(tmp_path / "out.qcow2", image, "qcow2")


def test_sources_are_put_one_after_another(raw: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.raw"
    other.write_bytes(b"second" * 1000)
    convert([raw, other], tmp_path / "both.qcow2")
    convert(tmp_path / "both.qcow2", tmp_path / "both.raw", dst_format="raw")
    qemu_img("convert", "-f", "raw", "-O", "raw", raw, other, tmp_path / "theirs.raw")
    assert (tmp_path / "both.raw").read_bytes() == (tmp_path / "theirs.raw").read_bytes()


class ObjectStorage:
    """The least a Python object needs to be read."""

    def __init__(self, data: bytes, fail_at: int | None = None) -> None:
        self.data, self.fail_at = data, fail_at

    def size(self) -> int:
        return len(self.data)

    def pread(self, length: int, offset: int) -> bytes:
        if self.fail_at is not None and offset + length > self.fail_at:
            raise OSError(5, "the disk is on fire")
        return self.data[offset : offset + length]


def test_python_object_as_source(raw: Path, tmp_path: Path) -> None:
    convert(ObjectStorage(raw.read_bytes()), tmp_path / "o.qcow2", threads=3)
    assert_qemu_agrees(tmp_path / "o.qcow2", raw)


# --- whole or not at all -------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"compress": True}, {"dst_format": "raw"}], ids=str)
def test_failing_source_leaves_the_folder_as_it_was(
    tmp_path: Path, options: dict[str, object]
) -> None:
    target = tmp_path / "target"
    target.write_bytes(b"old content")
    source = ObjectStorage(disk_bytes(6 * MIB), fail_at=3 * MIB)
    with pytest.raises(OSError, match="on fire"):
        convert(source, target, threads=3, **options)  # type: ignore[arg-type]
    assert names(tmp_path) == {"target"}
    assert target.read_bytes() == b"old content"


def test_cancelled_leaves_nothing(tmp_path: Path) -> None:
    raw = tmp_path / "noise.raw"
    raw.write_bytes(os.urandom(MIB) * 8)
    calls: list[tuple[int, int, str]] = []

    def stop(done: int, total: int, phase: str) -> object:
        calls.append((done, total, phase))
        return False

    with pytest.raises(Cancelled):
        convert(raw, tmp_path / "t.qcow2", progress=stop)
    assert names(tmp_path) == {"noise.raw"}
    assert calls[0] == (0, 8 * MIB, "convert")


def test_progress_ends_at_the_total(raw: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    convert(
        raw, tmp_path / "t.qcow2", progress=lambda done, total, phase: seen.append((done, total))
    )
    # Holes are no work.
    total = seen[0][1]
    assert 0 < total < raw.stat().st_size
    assert seen[0] == (0, total)
    assert seen[-1] == (total, total)
    assert seen == sorted(seen)


def test_mode_bits_and_links(raw: Path, tmp_path: Path) -> None:
    new, old = tmp_path / "new.qcow2", tmp_path / "old.qcow2"
    before = os.umask(0o027)
    try:
        convert(raw, new)
    finally:
        os.umask(before)
    assert stat.S_IMODE(new.stat().st_mode) == 0o640
    old.write_bytes(b"")
    old.chmod(0o604)
    link = tmp_path / "link.qcow2"
    link.symlink_to("old.qcow2")
    convert(raw, link)
    assert link.is_symlink()
    assert stat.S_IMODE(old.stat().st_mode) == 0o604
    assert_qemu_agrees(old, raw)


def test_target_that_is_a_source_is_refused(raw: Path, tmp_path: Path) -> None:
    before = raw.read_bytes()
    with pytest.raises(ValueError, match="target is one of the files"):
        convert(raw, raw, dst_format="raw")
    assert raw.read_bytes() == before
    base, top = tmp_path / "base.qcow2", tmp_path / "top.qcow2"
    convert(raw, base)
    qemu_img("create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", top)
    with pytest.raises(ValueError, match="target is one of the files"):
        convert(top, base, references="follow")


@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_files_in_use_elsewhere_are_left_alone(raw: Path, tmp_path: Path, format: str) -> None:
    used = tmp_path / "used"
    qemu_img("create", "-q", "-f", format, used, "4M")
    with subprocess.Popen(
        ["qemu-io", "-f", format, str(used)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as user:
        assert user.stdin is not None and user.stdout is not None
        # Its answer to a command shows that it has the image open.
        user.stdin.write(b"length\n")
        user.stdin.flush()
        assert b"MiB" in user.stdout.readline()
        with pytest.raises(ImageLocked):
            convert(raw, used, dst_format=format)
        with pytest.raises(ImageLocked):
            convert(used, tmp_path / "copy", src_format=format)
        convert(used, tmp_path / "copy", src_format=format, lock=False)
        assert names(tmp_path) == {"disk.raw", "used", "copy"}
        user.stdin.close()
    convert(raw, used, dst_format=format)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dst_format": "vmdk"}, "vmdk"),
        ({"dst_format": "raw", "compress": True}, "Compression not supported"),
        ({"compress": True, "preallocation": "full"}, "preallocation"),
        ({"compression_type": "lzma"}, "lzma"),
        ({"sparse_size": 1000}, "sparse size"),
        ({"threads": 0}, "threads"),
        ({"backing_file": "x"}, "backing format"),
        ({"cluster_size": 1234}, "Cluster size"),
        ({"size": 512}, "smaller"),
    ],
    ids=str,
)
def test_options_that_do_not_fit(
    raw: Path, tmp_path: Path, options: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        convert(raw, tmp_path / "t.qcow2", **options)  # type: ignore[arg-type]
    assert names(tmp_path) == {"disk.raw"}


def test_memory_stays_bounded(tmp_path: Path) -> None:
    source = tmp_path / "big.raw"
    block = os.urandom(MIB)
    with open(source, "wb") as out:
        for _ in range(160):
            out.write(block)
    code = (
        "import resource, sys; from qcow2x.ops.convert import convert\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10\n"
        "before = peak(); convert(*sys.argv[1:3], threads=4, cache='unsafe')\n"
        "print(peak() - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(source), str(tmp_path / "t.qcow2")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) < 64 + 4 * 4


# --- planning ------------------------------------------------------------------------------


def extent(offset: int, length: int, kind: str) -> Extent:
    return Extent(offset, length, kind == DATA, kind == ZERO, False, 0, None, "f")


def plan(size: int, *runs: tuple[int, int, str]) -> list[tuple[str, int, int]]:
    kinds = {offset: kind for offset, _, kind in runs}
    extents = (extent(*run) for run in runs)
    return list(plan_runs(extents, size, 64, lambda e: kinds[e.offset]))


def test_runs_of_one_kind_are_merged() -> None:
    assert plan(256, (0, 64, DATA), (64, 64, DATA), (128, 128, ZERO)) == [
        (DATA, 0, 128),
        (ZERO, 128, 256),
    ]


def test_a_mixed_grain_is_data() -> None:
    assert plan(256, (0, 100, ZERO), (100, 20, DATA), (120, 136, ZERO)) == [
        (ZERO, 0, 64),
        (DATA, 64, 128),
        (ZERO, 128, 256),
    ]
    assert plan(200, (0, 10, KEEP), (10, 20, ZERO), (30, 170, KEEP)) == [
        (DATA, 0, 64),
        (KEEP, 64, 200),
    ]


def test_the_last_run_ends_at_the_size() -> None:
    assert plan(130, (0, 129, DATA), (129, 1, ZERO)) == [(DATA, 0, 130)]
