"""External data files, raw and not: against a bytearray, and both ways with QEMU."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from support.qemu import check_clean, qemu_img, qemu_io

import qcow2x
from qcow2x.types import Reference

SIZE = 6 << 20


def make(tmp_path: Path, by: str, raw: bool, cluster_size: int = 65536, ext: bool = False) -> Path:
    path, data = tmp_path / "disk.qcow2", tmp_path / "disk.data"
    if by == "qcow2x":
        qcow2x.create(
            path,
            SIZE,
            data_file=data,
            data_file_raw=raw,
            cluster_size=cluster_size,
            extended_l2=ext,
        )
    else:
        options = f"data_file={data},data_file_raw={'on' if raw else 'off'}"
        options += f",cluster_size={cluster_size},extended_l2={'on' if ext else 'off'}"
        qemu_img("create", "-q", "-f", "qcow2", "-o", options, path, SIZE)
    return path


@pytest.mark.parametrize("cluster_size,ext", [(512, False), (65536, False), (65536, True)])
@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("by", ["qcow2x", "qemu"])
def test_random_work_is_read_right_by_both(
    tmp_path: Path, by: str, raw: bool, cluster_size: int, ext: bool
) -> None:
    path = make(tmp_path, by, raw, cluster_size, ext)
    rnd = random.Random(f"{by}{raw}{cluster_size}{ext}")
    model = bytearray(SIZE)
    image = qcow2x.open(path, "r+", references="follow")
    for _ in range(80):
        offset = rnd.randrange(SIZE)
        length = min(rnd.choice([1, 700, cluster_size, 5 * cluster_size]), SIZE - offset)
        what = rnd.choice(["write"] * 3 + ["zero", "discard", "reopen"])
        if what == "write":
            data = rnd.randbytes(length)
            image.pwrite(data, offset)
            model[offset : offset + length] = data
        elif what == "zero":
            image.write_zeroes(offset, length, unmap=rnd.random() < 0.5)
            model[offset : offset + length] = bytes(length)
        elif what == "discard":
            image.discard(offset, length)
            first = -(-offset // cluster_size) * cluster_size
            end = (offset + length) // cluster_size * cluster_size
            end = SIZE if offset + length == SIZE else end
            if first < end:
                model[first:end] = bytes(end - first)
        else:
            image.close()
            image = qcow2x.open(path, "r+", references="follow")
    assert image.pread(SIZE, 0) == model
    assert image.check().clean
    image.close()
    check_clean(path)
    out = tmp_path / "out.raw"
    qemu_img("convert", "-O", "raw", path, out)
    assert out.read_bytes() == model
    if raw:
        assert (tmp_path / "disk.data").read_bytes() == model
        assert qcow2x.open(path, references="follow").info().data_file_raw
    qemu_io(path, "write -P 7 64k 128k")
    with qcow2x.open(path, references="follow") as image:
        assert image.pread(128 << 10, 64 << 10) == b"\7" * (128 << 10)


def test_the_name_is_opened_only_if_allowed(tmp_path: Path) -> None:
    path = make(tmp_path, "qcow2x", False)
    with pytest.raises(qcow2x.ReferenceDenied, match=r"disk\.data"):
        qcow2x.open(path)
    seen: list[Reference] = []

    def policy(reference: Reference) -> str | None:
        seen.append(reference)
        return reference.path

    qcow2x.open(path, references=policy).close()
    assert [r.kind for r in seen] == ["data-file"]
    with qcow2x.open(path, data_file=tmp_path / "disk.data") as image:
        assert image.pread(10, 0) == bytes(10)
    with qcow2x.open(path, "r", data_file=False) as image:
        assert image.info().data_file == str(tmp_path / "disk.data")


def test_what_the_format_forbids_is_refused(tmp_path: Path) -> None:
    path = make(tmp_path, "qcow2x", False)
    with qcow2x.open(path, "r+", references="follow") as image:
        with pytest.raises(qcow2x.UnsupportedFeature):
            image.snapshots.create("s")
        with pytest.raises(qcow2x.UnsupportedFeature):
            image.pwrite_compressed(bytes(65536), 0)
    with pytest.raises(ValueError, match="data-file"):
        qcow2x.create(path, SIZE, data_file_raw=True)
    with pytest.raises(ValueError, match="External data files"):
        qcow2x.create(path, SIZE, data_file=tmp_path / "x", compat="0.10")


def test_resize_moves_a_raw_data_file_along(tmp_path: Path) -> None:
    path = make(tmp_path, "qcow2x", True)
    data = tmp_path / "disk.data"
    with qcow2x.open(path, "r+", references="follow") as image:
        image.pwrite(b"x" * SIZE, 0)
        image.resize(2 * SIZE)
        assert data.stat().st_size == 2 * SIZE
        assert image.pread(SIZE, SIZE) == bytes(SIZE)
        image.resize(SIZE // 2, shrink=True)
    assert data.stat().st_size == SIZE // 2
    check_clean(path)


def test_a_write_reaches_the_data_file_before_its_mapping(tmp_path: Path) -> None:
    """With both files recorded: when the L2 entry is on its way, the data was synced."""
    path, data = tmp_path / "m.qcow2", tmp_path / "d.raw"
    qcow2x.create(path, SIZE, data_file=data)
    order: list[str] = []

    class Recorded:
        def __init__(self, name: str, file: Path) -> None:
            self.name, self.bytes = name, bytearray(file.read_bytes())

        def size(self) -> int:
            return len(self.bytes)

        def pread(self, length: int, offset: int) -> bytes:
            return bytes(self.bytes[offset : offset + length])

        def pwrite(self, buffer: bytes, offset: int) -> int:
            order.append(f"{self.name} write")
            self.bytes[offset : offset + len(buffer)] = buffer
            return len(buffer)

        def flush(self) -> None:
            order.append(f"{self.name} sync")

        def truncate(self, size: int) -> None:
            self.bytes = self.bytes[:size].ljust(size, b"\0")

    with qcow2x.open(Recorded("meta", path), "r+", data_file=Recorded("data", data)) as image:
        image.pwrite(b"x" * 4096, 0)
        image.flush()
        order.clear()
        image.pwrite(b"x" * 4096, 1 << 20)
        image.flush()
        written = order.index("data write")
        assert order.index("data sync") < order.index("meta write", written)
        assert order[-1] == "meta sync"
