"""Internal snapshots: against a bytearray for each, and both ways with qemu-img."""

from __future__ import annotations

import errno
import random
import struct
import threading
from pathlib import Path

import pytest
from support.qemu import check_clean, qemu_img, qemu_io

import qcow2x
from qcow2x.snapshot import Snapshot, encode_table

# cluster size, extended L2, compat, refcount bits
SHAPES = [
    (512, False, "1.1", 16),
    (4096, False, "0.10", 16),
    (16384, True, "1.1", 64),
    (65536, False, "1.1", 2),
    (65536, True, "1.1", 8),
    (2 << 20, False, "1.1", 32),
]


def shaped(path: Path, shape: tuple[int, bool, str, int], size: int) -> None:
    cluster_size, extended_l2, compat, refcount_bits = shape
    qcow2x.create(
        path,
        size,
        cluster_size=cluster_size,
        extended_l2=extended_l2,
        compat=compat,
        refcount_bits=refcount_bits,
    )


def zero_whole_clusters(model: bytearray, cluster: int, offset: int, length: int) -> None:
    first = -(-offset // cluster) * cluster
    end = len(model) if offset + length == len(model) else (offset + length) // cluster * cluster
    if first < end:
        model[first:end] = bytes(end - first)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_snapshot_keeps_its_own_bytes(
    tmp_path: Path, shape: tuple[int, bool, str, int]
) -> None:
    cluster = shape[0]
    size = min(cluster * 150, 24 << 20)
    path = tmp_path / "disk.qcow2"
    shaped(path, shape, size)
    rnd = random.Random(str(shape))
    model, held = bytearray(size), dict[str, bytes]()
    image = qcow2x.open(path, "r+", cache="unsafe")
    limit = 3 if shape[3] == 2 else 5
    for step in range(90):
        what = rnd.choice(
            ["write"] * 5 + ["discard", "packed", "create", "delete", "apply", "reopen"]
        )
        offset = rnd.randrange(size)
        length = min(rnd.choice([1, 600, cluster, 3 * cluster]), size - offset)
        try:
            if what == "write":
                data = rnd.randbytes(length)
                image.pwrite(data, offset)
                model[offset : offset + length] = data
            elif what == "discard":
                image.discard(offset, length)
                zero_whole_clusters(model, cluster, offset, length)
            elif what == "packed":
                offset -= offset % cluster
                length = min(cluster * 2, size - offset)
                data = (rnd.randbytes(8) * (length // 8 + 1))[:length]
                image.pwrite_compressed(data, offset)
                model[offset : offset + length] = data
            elif what == "create" and len(held) < limit:
                held[image.snapshots.create(f"after {step}").id] = bytes(model)
            elif what == "delete" and held:
                key = rnd.choice(sorted(held))
                image.snapshots.delete(key)
                del held[key]
            elif what == "apply" and held:
                key = rnd.choice(sorted(held))
                image.snapshots.apply(key)
                model[:] = held[key]
            elif what == "reopen":
                image.close()
                image = qcow2x.open(path, "r+", cache="unsafe")
        except qcow2x.UnsupportedFeature:
            # Narrow refcounts run out; then nothing may have changed.
            assert shape[3] < 8
        if step % 15 == 0:
            assert image.pread(size, 0) == model, step
            for key, bytes_then in held.items():
                with image.snapshots.open(key) as then:
                    assert then.pread(size, 0) == bytes_then, (step, key)
    assert [s.id for s in image.snapshots] == list(held)
    image.close()
    check_clean(path)
    with qcow2x.open(path) as image:
        assert image.check().clean
        assert not image.info().dirty
        assert image.pread(size, 0) == model
    out = tmp_path / "out.raw"
    for key, bytes_then in held.items():
        with qcow2x.open(path, snapshot=key) as then:
            assert then.pread(size, 0) == bytes_then
        qemu_img("convert", "-l", f"snapshot.id={key}", "-O", "raw", path, out)
        assert out.read_bytes() == bytes_then


@pytest.mark.parametrize("compat", ["0.10", "1.1"])
def test_snapshots_of_qemu_are_ours_and_back(tmp_path: Path, compat: str) -> None:
    path = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", f"compat={compat}", path, "8M")
    qemu_io(path, "write -P 1 0 1M")
    qemu_img("snapshot", "-c", "first", path)
    qemu_io(path, "write -P 2 512k 1M")
    with qcow2x.open(path, "r+") as image:
        assert [s.name for s in image.snapshots] == ["first"]
        made = image.snapshots.create("second")
        assert made.id == "2" and made.disk_size == 8 << 20 and made.vm_state_size == 0
        image.pwrite(b"\3" * 4096, 0)
    check_clean(path)
    listed = qemu_img("snapshot", "-l", path)
    assert "first" in listed and "second" in listed
    qemu_img("snapshot", "-a", "second", path)
    qemu_io(path, "read -P 1 0 512k", "read -P 2 512k 1M")
    qemu_img("snapshot", "-d", "second", path)
    with qcow2x.open(path, "r+") as image:
        image.snapshots.apply("first")
        assert image.pread(1 << 20, 0) == b"\1" * (1 << 20)
        assert image.pread(1 << 20, 1 << 20) == bytes(1 << 20)
        image.snapshots.delete("first")
        assert len(image.snapshots) == 0
    check_clean(path)


def test_deleting_gives_the_space_back(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qcow2x.create(path, 16 << 20)
    with qcow2x.open(path, "r+") as image:
        image.pwrite(b"a" * (8 << 20), 0)
        image.snapshots.create("s")
        image.pwrite(b"b" * (8 << 20), 0)
        image.flush()
        before = path.stat().st_blocks
        image.snapshots.delete("s")
        assert path.stat().st_blocks * 512 < before * 512 - (7 << 20)
        end = path.stat().st_size
        image.pwrite(b"c" * (6 << 20), 8 << 20)
    assert path.stat().st_size <= end, "freed clusters are used again"
    check_clean(path)


def test_apply_brings_back_the_size_of_the_disk(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qcow2x.create(path, 4 << 20, cluster_size=4096)
    with qcow2x.open(path, "r+") as image:
        image.pwrite(b"end", (4 << 20) - 3)
        image.snapshots.create("small")
        image.resize(64 << 20)
        image.pwrite(b"END", (64 << 20) - 3)
        image.snapshots.create("large")
        image.snapshots.apply("small")
        assert image.size == 4 << 20 and image.pread(3, (4 << 20) - 3) == b"end"
        assert list(image.snapshots.diff("small")) == []
        assert list(image.snapshots.diff("small", "large"))[-1] == (4 << 20, 60 << 20)
        image.snapshots.apply("large")
        assert image.size == 64 << 20 and image.pread(3, (64 << 20) - 3) == b"END"
    check_clean(path)
    assert '"virtual-size": 67108864' in qemu_img("info", "--output=json", path)


def test_diff_names_every_change_and_not_much_else(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    cluster = 65536
    qcow2x.create(path, 64 * cluster)
    with qcow2x.open(path, "r+") as image:
        image.pwrite(b"x" * (32 * cluster), 0)
        image.snapshots.create("a")
        image.pwrite(b"y", 5 * cluster)
        image.pwrite(b"y" * cluster, 40 * cluster)
        image.discard(7 * cluster, cluster)
        image.snapshots.create("b")
        image.pwrite(b"z", 9 * cluster)
        changed = [(5, 1), (7, 1), (40, 1)]
        assert list(image.snapshots.diff("a", "b")) == [
            (first * cluster, n * cluster) for first, n in changed
        ]
        assert list(image.snapshots.diff("b")) == [(9 * cluster, cluster)]
        assert list(image.snapshots.diff("a", "a")) == []


def test_several_snapshots_open_at_once_while_the_disk_changes(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qcow2x.create(path, 8 << 20)
    with qcow2x.open(path, "r+") as image:
        for n in range(1, 4):
            image.pwrite(bytes([n]) * (2 << 20), 0)
            image.snapshots.create(f"s{n}")
        views = [image.snapshots.open(f"s{n}") for n in range(1, 4)]
        image.pwrite(b"\xff" * (4 << 20), 0)
        for n, view in enumerate(views, 1):
            assert view.pread(2 << 20, 0) == bytes([n]) * (2 << 20)
            with pytest.raises(PermissionError):
                view.pwrite(b"x", 0)
            view.close()


def test_a_snapshot_is_one_instant_for_writers_in_threads(tmp_path: Path) -> None:
    """Each thread counts up in its own sector, then in a second one: in no snapshot may the second
    be ahead of the first."""
    path = tmp_path / "disk.qcow2"
    qcow2x.create(path, 8 << 20, cluster_size=4096)
    stop = threading.Event()
    with qcow2x.open(path, "r+", cache="unsafe") as image:

        def count(thread: int) -> None:
            n = 0
            while not stop.is_set():
                n += 1
                sector = struct.pack("<Q", n) * 64
                image.pwrite(sector, thread * (1 << 20))
                image.pwrite(sector, thread * (1 << 20) + (512 << 10))

        threads = [threading.Thread(target=count, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for n in range(8):
            image.snapshots.create(f"s{n}")
            if n >= 2:
                image.snapshots.delete(f"s{n - 2}")
        stop.set()
        for thread in threads:
            thread.join()
        for snapshot in image.snapshots:
            with image.snapshots.open(snapshot.id) as then:
                for n in range(4):
                    first, second = (
                        struct.unpack("<Q", then.pread(8, n * (1 << 20) + at))[0]
                        for at in (0, 512 << 10)
                    )
                    assert second <= first <= second + 1
    check_clean(path)


def test_unknown_extra_data_and_odd_names_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qcow2x.create(path, 1 << 20)
    with qcow2x.open(path, "r+") as image:
        first = image.snapshots.create("n" * 300)
        table = [
            Snapshot(
                id="17", name="grüße", date_sec=5, date_nsec=6, vm_clock_nsec=7, vm_state_size=0,
                disk_size=1 << 20, icount=42, l1_offset=first.l1_offset, l1_size=first.l1_size,
                unknown_extra=b"future", extra_size=30,
            )
        ]  # fmt: skip
        encoded = encode_table(table, 3)
        image._file.pwrite(encoded, image._header.snapshots_offset)
        assert list(image.snapshots) == table
        image.snapshots.create("next")
        kept, made = image.snapshots
        assert kept == table[0] and made.id == "18"
    check_clean(path)
    assert "grüße" in qemu_img("snapshot", "-l", path)


def test_refusals(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qcow2x.create(path, 1 << 20, refcount_bits=1)
    with qcow2x.open(path, "r+") as image:
        with pytest.raises(qcow2x.UnsupportedFeature, match="1 bit"):
            image.snapshots.create("s")
        with pytest.raises(ValueError):
            image.snapshots.create("")
        for call in (image.snapshots.delete, image.snapshots.apply, image.snapshots.open):
            with pytest.raises(KeyError, match="nope"):
                call("nope")
    with qcow2x.open(path) as image, pytest.raises(PermissionError):
        image.snapshots.create("s")
    with pytest.raises(ValueError, match="mode"):
        qcow2x.open(path, "r+", snapshot="s")
    check_clean(path)


@pytest.mark.not_for_qemu("damaged")
def test_a_damaged_table_is_an_error_with_its_offset(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qcow2x.create(path, 1 << 20)
    with qcow2x.open(path, "r+") as image:
        image.snapshots.create("s")
        at = image._header.snapshots_offset
        entry = bytearray(image._file.pread(40, at))
    good = path.read_bytes()
    data = bytearray(good)
    data[at + 36 : at + 40] = b"\xff" * 4
    path.write_bytes(data)
    with qcow2x.open(path) as image, pytest.raises(qcow2x.FormatError) as caught:
        list(image.snapshots)
    assert caught.value.offset == at and "disk.qcow2" in str(caught.value)
    assert len(entry) == 40
    # The file ends before the table.
    data = bytearray(good)
    struct.pack_into(">Q", data, 64, 1 << 40)
    path.write_bytes(data)
    with qcow2x.open(path, "r+") as image:
        image.pwrite(b"x" * 512, 0)
        with pytest.raises(qcow2x.CorruptImage):
            list(image.snapshots)
    path.unlink()


@pytest.mark.parametrize(
    "where, value, error, number",
    [
        (0, b"\0\0\0\0\0\0\0\1", qcow2x.CorruptImage, errno.EINVAL),
        (0, b"\xff" * 6 + b"\0\0", qcow2x.CorruptImage, errno.EINVAL),
        (8, b"\xff" * 4, qcow2x.FormatError, errno.EFBIG),
    ],
)
def test_a_snapshot_whose_l1_table_cannot_be(
    tmp_path: Path, where: int, value: bytes, error: type[Exception], number: int
) -> None:
    path = tmp_path / "disk.qcow2"
    qcow2x.create(path, 1 << 20)
    with qcow2x.open(path, "r+") as image:
        image.snapshots.create("bad")
        image.snapshots.create("good")
        at = image._header.snapshots_offset
    data = bytearray(path.read_bytes())
    data[at + where : at + where + len(value)] = value
    path.write_bytes(data)
    with qcow2x.open(path, "r+") as image:
        assert [snapshot.name for snapshot in image.snapshots] == ["bad", "good"]
        for verb in (image.snapshots.open, image.snapshots.apply, image.snapshots.delete):
            with pytest.raises(error, match="Snapshot L1 table"):
                verb("bad")
        image.pwrite(b"x" * 512, 0)
        image.snapshots.apply("good")
        image.snapshots.delete("good")
        assert [snapshot.name for snapshot in image.snapshots] == ["bad"]
    before = path.read_bytes()
    with pytest.raises(error, match="Snapshot L1 table"):
        qcow2x.amend(path, compat="0.10")
    assert path.read_bytes() == before
    # What is to be guarded but cannot be found stops every write.
    with pytest.raises(OSError) as caught:
        with qcow2x.open(path, "r+", overlap_check="all") as image:
            with pytest.raises(OSError) as refused:
                image.pwrite(b"y" * 512, 0)
            assert refused.value.errno == number
            assert image.pread(512, 0) == bytes(512)
    assert caught.value.errno == number
    assert path.read_bytes() == before
    path.unlink()


@pytest.mark.parametrize("entry", [0xBFFFFFFFFFFF0000, 0x800000FFFFFF0000, 0x8000000100000000])
def test_a_cluster_without_a_refcount_has_no_snapshot(tmp_path: Path, entry: int) -> None:
    path = tmp_path / "disk.qcow2"
    qcow2x.create(path, 64 << 20)
    with qcow2x.open(path, "r+") as image:
        image.pwrite(b"a" * 512, 0)
        image.snapshots.create("before")
        image.pwrite(b"b" * 512, 1 << 20)
    raw = bytearray(path.read_bytes())
    (l1,) = struct.unpack_from(">Q", raw, 40)
    l2 = struct.unpack_from(">Q", raw, l1)[0] & 0x00FFFFFFFFFFFE00
    struct.pack_into(">Q", raw, l2 + 8 * 16, entry)
    path.write_bytes(raw)
    with qcow2x.open(path, "r+") as image:
        leaks = image.check().leaks
        with pytest.raises((qcow2x.CorruptImage, qcow2x.FormatError)):
            image.snapshots.create("after")
        assert [snapshot.name for snapshot in image.snapshots] == ["before"]
        assert image.check().leaks == leaks
        image.pwrite(b"c" * 512, 2 << 20)
        image.flush()
    with qcow2x.open(path) as image:
        assert image.pread(512, 2 << 20) == b"c" * 512
    path.unlink()  # damaged


@pytest.mark.not_for_qemu("a snapshot's disk is longer than its L1 table maps")
@pytest.mark.parametrize("claimed", [1 << 30, (1 << 63) - 512])
def test_a_disk_longer_than_its_l1_table(tmp_path: Path, claimed: int) -> None:
    """What the table lacks is not allocated; and what no table can map is refused."""
    path = tmp_path / "disk.qcow2"
    qcow2x.create(path, 96 << 10, cluster_size=1024)
    with qcow2x.open(path, "r+") as image:
        image.pwrite(b"held", 0)
        image.snapshots.create("before")
    data = bytearray(path.read_bytes())
    table = int.from_bytes(data[64:72], "big")
    data[table + 48 : table + 56] = claimed.to_bytes(8, "big")
    path.write_bytes(data)
    with qcow2x.open(path, "r+") as image:
        if claimed == 1 << 30:
            with image.snapshots.open("before") as then:
                assert then.pread(4, 0) == b"held"
                assert then.pread(4096, claimed - 4096) == bytes(4096)
            image.snapshots.apply("before")
            assert image.size == claimed
            assert image.pread(4, 0) == b"held"
            return
        with pytest.raises(qcow2x.CorruptImage, match=str(path)):
            image.snapshots.open("before")
        with pytest.raises(qcow2x.CorruptImage, match=str(path)):
            image.snapshots.apply("before")
        assert image.pread(4, 0) == b"held"
    with pytest.raises(qcow2x.CorruptImage, match=str(path)):
        qcow2x.open(path, snapshot="before")
