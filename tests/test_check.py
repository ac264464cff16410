"""check: the counts of qemu-img check on sound and on damaged images, and repair of leaks."""

import json
import os
import random
import shutil
import struct
import subprocess

import pytest

import qcow2x
from qcow2x._core.check import Checker
from qcow2x._core.header import Header
from qcow2x._core.storage import FileStorage
from qcow2x.errors import Cancelled
from qcow2x.ops.check import check_storage
from qcow2x.types import CheckResult

pytestmark = pytest.mark.not_for_qemu("damaged images")

COPIED, COMPRESSED = 1 << 63, 1 << 62
#: qemu-img's name of each count, and ours.
COUNTS = {
    "corruptions": "corruptions",
    "leaks": "leaks",
    "check-errors": "check_errors",
    "total-clusters": "total_clusters",
    "allocated-clusters": "allocated_clusters",
    "fragmented-clusters": "fragmented_clusters",
    "compressed-clusters": "compressed_clusters",
    "image-end-offset": "image_end_offset",
}


def run(*args):
    for _ in range(10):
        done = subprocess.run([*map(str, args)], check=False, capture_output=True, text=True)
        # QEMU times its key derivation, and gives up where a busy machine gives it no CPU time.
        if "accurate CPU usage" not in done.stderr:
            break
    assert done.returncode == 0, done.stderr
    return done.stdout


def qemu_io(path, *commands):
    run("qemu-io", "-f", "qcow2", *(arg for step in commands for arg in ("-c", step)), path)


def qemu_create(path, size, **options):
    listed = ",".join(f"{name}={value}" for name, value in options.items())
    run("qemu-img", "create", "-q", "-f", "qcow2", *(["-o", listed] if listed else []), path, size)


def qemu_counts(path):
    """The counts, or None where QEMU gave up on the image."""
    done = subprocess.run(
        ["qemu-img", "check", "--output=json", str(path)],
        check=False,
        capture_output=True,
        text=True,
    )
    if not done.stdout:
        return None
    told = json.loads(done.stdout)
    return {name: told.get(name, 0) for name in COUNTS}


def check(path, repair=None, progress=None):
    return qcow2x.check(path, repair=repair, progress=progress)


def counts(result):
    return {name: getattr(result, ours) for name, ours in COUNTS.items()}


def assert_agrees(path):
    result = check(path)
    assert counts(result) == qemu_counts(path)
    assert len(result.findings) > 0 or result.clean
    return result


class Raw:
    """An image as bytes, with the places of its tables, to do damage to."""

    def __init__(self, path):
        self.path = path
        self.bytes = bytearray(path.read_bytes())
        (bits,) = struct.unpack_from(">I", self.bytes, 20)
        self.cluster = 1 << bits
        self.l1_size, self.l1, self.rt = struct.unpack_from(">IQQ", self.bytes, 36)

    def get(self, at):
        return struct.unpack_from(">Q", self.bytes, at)[0]

    def put(self, at, value):
        struct.pack_into(">Q", self.bytes, at, value)

    def l2(self, l1_idx=0):
        return self.get(self.l1 + 8 * l1_idx) & 0x00FFFFFFFFFFFE00

    def block(self, rt_idx=0):
        return self.get(self.rt + 8 * rt_idx)

    def add(self, at, value):
        self.put(at, self.get(at) + value)

    def set(self, at, bits):
        self.put(at, self.get(at) | bits)

    def save(self):
        self.path.write_bytes(self.bytes)


@pytest.fixture
def disk(tmp_path):
    """20 MiB of 4 KiB clusters: two runs of data, two L2 tables with more to come."""
    path = tmp_path / "disk.qcow2"
    qemu_create(path, "20M", cluster_size=4096)
    qemu_io(path, "write -P 1 0 64k", "write -P 2 3M 64k")
    return path


# ---- sound images -------------------------------------------------------------------------------

SHAPES = [
    {"cluster_size": 512, "refcount_bits": 16},
    {"cluster_size": 1024, "refcount_bits": 64},
    {"cluster_size": 2048, "refcount_bits": 8},
    {"cluster_size": 4096, "refcount_bits": 2},
    {"cluster_size": 4096, "compat": "0.10"},
    {"cluster_size": 16384, "extended_l2": "on"},
    {"cluster_size": 65536, "extended_l2": "on", "refcount_bits": 32, "compression_type": "zstd"},
    {"cluster_size": 65536, "refcount_bits": 4},
    {"cluster_size": 2097152},
]


def make_rich(path, options, rng):
    """Data, zeros, holes, compressed clusters, snapshots and bitmaps."""
    size, cluster = 2 << 20, int(options["cluster_size"])
    size = max(size, 4 * cluster)
    qemu_create(path, size, **options)
    steps = []
    if int(options.get("refcount_bits", 16)) >= 8:  # compressed clusters share host clusters
        for guest_cl in rng.sample(range(size // cluster), 4):
            steps.append(f"write -c -P 9 {guest_cl * cluster} {cluster}")
    for _ in range(6):
        offset, length = rng.randrange(0, 1800) * 1024, rng.randrange(1, 60) * 1024
        what = rng.choice(["write -P 3", "write -P 5", "write -z", "discard"])
        steps.append(f"{what} {offset} {length}")
    qemu_io(path, *steps)
    run("qemu-img", "snapshot", "-c", "one", path)
    qemu_io(path, "write -P 8 100k 100k", "write -z 400k 64k")
    run("qemu-img", "snapshot", "-c", "two", path)
    qemu_io(path, "write -P 8 200k 30k")
    if rng.random() < 0.5:
        run("qemu-img", "snapshot", "-d", "one", path)
    if options.get("compat") != "0.10":
        run("qemu-img", "bitmap", "--add", "-g", "4096", path, "tracked")
        run("qemu-img", "bitmap", "--add", "--disable", path, "idle")
        qemu_io(path, "write -P 8 300k 30k")


@pytest.mark.parametrize("options", SHAPES, ids=lambda o: "-".join(map(str, o.values())))
def test_rich_image_is_clean_and_counted_as_qemu_does(tmp_path, options):
    path = tmp_path / "disk.qcow2"
    make_rich(path, options, random.Random(repr(options)))
    assert assert_agrees(path).clean


@pytest.mark.parametrize("options", SHAPES, ids=lambda o: "-".join(map(str, o.values())))
@pytest.mark.parametrize("preallocation", ["off", "metadata"])
def test_fresh_image_is_clean_and_counted_as_qemu_does(tmp_path, options, preallocation):
    path = tmp_path / "disk.qcow2"
    qemu_create(path, "9M", preallocation=preallocation, **options)
    assert assert_agrees(path).clean


def test_luks_header_and_external_data_file_are_no_leaks(tmp_path):
    luks = tmp_path / "luks.qcow2"
    run(
        *("qemu-img", "create", "-q", "-f", "qcow2", "--object", "secret,id=s,data=pass"),
        *("-o", "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10", luks, "1M"),
    )
    assert check(luks).clean
    told = run(
        *(
            "qemu-img",
            "check",
            "--output=json",
            "--object",
            "secret,id=s,data=pass",
            "--image-opts",
        ),
        f"driver=qcow2,encrypt.format=luks,encrypt.key-secret=s,file.filename={luks}",
    )
    assert check(luks).image_end_offset == json.loads(told)["image-end-offset"]
    split = tmp_path / "split.qcow2"
    qemu_create(split, "2M", cluster_size=4096, data_file=tmp_path / "data.raw")
    qemu_io(split, "write 0 64k", "write 128k 8k", "write -z 1M 8k")
    assert assert_agrees(split).clean


def test_image_written_here_is_clean_for_both(tmp_path):
    path = tmp_path / "disk.qcow2"
    qcow2x.create(path, 8 << 20, cluster_size=4096)
    with qcow2x.open(path, "r+") as image:
        image.pwrite(b"a" * 300_000, 12_345)
        image.write_zeroes(100_000, 50_000)
        image.discard(200_000, 40_000)
        assert image.check().clean
    assert assert_agrees(path).clean


# ---- damage -------------------------------------------------------------------------------------

DAMAGE = {
    "data misaligned": lambda raw: raw.add(raw.l2() + 8, 512),
    "zero cluster misaligned": lambda raw: raw.add(raw.l2() + 8, 513),
    "data behind the file": lambda raw: raw.put(raw.l2() + 8, COPIED | 1 << 40),
    "data twice": lambda raw: raw.put(raw.l2() + 8, raw.get(raw.l2())),
    "L2 reserved bits": lambda raw: raw.set(raw.l2() + 8, 1 << 57 | 4),
    "COPIED missing on data": lambda raw: raw.put(raw.l2(), raw.get(raw.l2()) & ~COPIED),
    "COPIED alone": lambda raw: raw.put(raw.l2() + 800, COPIED),
    "compressed with COPIED": lambda raw: raw.set(raw.l2(), COMPRESSED),
    "L1 misaligned": lambda raw: raw.add(raw.l1, 512),
    "L1 reserved bits": lambda raw: raw.set(raw.l1, 1 << 57 | 4),
    "L1 behind the file": lambda raw: raw.put(raw.l1 + 8, COPIED | 1 << 40),
    "L1 just behind the file": lambda raw: raw.put(raw.l1 + 8, COPIED | len(raw.bytes) + 4096),
    "L1 twice": lambda raw: raw.put(raw.l1 + 8, raw.get(raw.l1)),
    "COPIED missing on L2": lambda raw: raw.put(raw.l1, raw.l2()),
    "data leaked": lambda raw: raw.put(raw.l2() + 8, 0),
    "L2 leaked": lambda raw: raw.put(raw.l1, 0),
    "refcount 0": lambda raw: raw.bytes.__setitem__(raw.block() + 17, 0),
    "refcount 2": lambda raw: raw.bytes.__setitem__(raw.block() + 17, 2),
    "refcounts behind the file": lambda raw: raw.bytes.__setitem__(raw.block() + 1601, 2),
    "block misaligned": lambda raw: raw.add(raw.rt, 512),
    "block with reserved bits": lambda raw: raw.set(raw.rt, 4),
    "block behind the file": lambda raw: raw.put(raw.rt, 1 << 40),
    "block nowhere": lambda raw: raw.put(raw.rt, 1 << 63),
    "second block behind the file": lambda raw: raw.put(raw.rt + 8, 1 << 40),
    "second block is the L1 table": lambda raw: raw.put(raw.rt + 8, raw.l1),
    "second block is the first": lambda raw: raw.put(raw.rt + 8, raw.block()),
    "file cut": lambda raw: raw.bytes.__delitem__(slice(-3 * 4096 - 100, None)),
    "disk of half a sector": lambda raw: raw.put(24, (4 << 20) + 1),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_counted_as_qemu_does(disk, name):
    raw = Raw(disk)
    DAMAGE[name](raw)
    raw.save()
    assert_agrees(disk)


EXTENDED_DAMAGE = {
    "both bits": lambda raw: raw.put(raw.l2() + 8, 1 << 33 | 3),
    "bits without a cluster": lambda raw: raw.put(raw.l2() + 168, 3),
    "zero bits without a cluster": lambda raw: raw.put(raw.l2() + 168, 3 << 32),
    "zero flag": lambda raw: raw.set(raw.l2(), 1),
    "misaligned without data": lambda raw: (
        raw.add(raw.l2(), 512),
        raw.put(raw.l2() + 8, 3 << 32),
    ),
    "misaligned with data": lambda raw: raw.add(raw.l2(), 512),
    "compressed with a bitmap": lambda raw: raw.put(raw.l2() + 16 * 8 + 8, 3),
}


@pytest.mark.parametrize("name", EXTENDED_DAMAGE)
def test_damage_to_subclusters_is_counted_as_qemu_does(tmp_path, name):
    path = tmp_path / "disk.qcow2"
    qemu_create(path, "8M", cluster_size=16384, extended_l2="on")
    qemu_io(path, "write -P 1 0 64k", "write -c -P 2 128k 16k")
    raw = Raw(path)
    EXTENDED_DAMAGE[name](raw)
    raw.save()
    assert_agrees(path)


def test_more_references_than_a_refcount_can_say_are_counted_as_qemu_does(tmp_path):
    path = tmp_path / "disk.qcow2"
    for bits, times in ((1, 5), (2, 7), (8, 300)):
        qemu_create(path, "4M", cluster_size=4096, refcount_bits=bits)
        qemu_io(path, "write -P 1 0 1536k")
        raw = Raw(path)
        for i in range(1, times):
            raw.put(raw.l2() + 8 * i, raw.get(raw.l2()))
        raw.save()
        assert_agrees(path)


def damage_at_random(raw, rng):
    """One entry of one table turned into something else."""
    mask = 0x00FFFFFFFFFFFE00

    def other(value):
        return rng.choice(
            [
                value ^ COPIED,
                value ^ (1 << rng.randrange(64)),
                value + 512 * rng.randrange(1, 10),
                0,
                value & ~mask | rng.randrange(0, len(raw.bytes) // raw.cluster + 3) * raw.cluster,
                value ^ 1,
                value | COMPRESSED,
                rng.getrandbits(64),
                value + raw.cluster * rng.randrange(1, 4),
            ]
        ) & (2**64 - 1)

    what = rng.choice(["l1", "l2", "l2", "l2", "l2", "rt", "block", "block", "cut"])
    tables = [raw.l2(i) for i in range(raw.l1_size)]
    tables = [at for at in tables if at and at + raw.cluster <= len(raw.bytes)]
    if what == "l1":
        at = raw.l1 + 8 * rng.randrange(raw.l1_size)
        value = other(raw.get(at))
        # QEMU takes the header for an L2 table where an entry has flags and no offset.
        raw.put(at, value if value & mask else 0)
    elif what == "l2" and tables:
        table = rng.choice(tables)
        used = [at for at in range(table, table + raw.cluster, 8) if raw.get(at)]
        if used:
            at = rng.choice(used)
            raw.put(at, other(raw.get(at)))
    elif what == "rt":
        at = raw.rt + 8 * rng.randrange(4)
        raw.put(at, other(raw.get(at)))
    elif what == "block" and raw.block() % raw.cluster == 0 and 0 < raw.block() < len(raw.bytes):
        raw.bytes[raw.block() + rng.randrange(min(raw.cluster, 400))] ^= 1 << rng.randrange(8)
    elif what == "cut":
        keep = max(raw.l1 + raw.l1_size * 8, raw.rt + raw.cluster)
        (snapshots,) = struct.unpack_from(">Q", raw.bytes, 64)
        keep = max(keep, snapshots + raw.cluster)
        del raw.bytes[max(keep, len(raw.bytes) - rng.randrange(1, raw.cluster * 8)) :]


@pytest.mark.parametrize("options", SHAPES[:8], ids=lambda o: "-".join(map(str, o.values())))
def test_random_damage_is_counted_as_qemu_does(tmp_path, options):
    rng = random.Random(repr(options))
    sound, broken = tmp_path / "sound.qcow2", tmp_path / "broken.qcow2"
    make_rich(sound, options, rng)
    # QEMU does not open an image whose bitmaps were cut off.
    for name in () if "compat" in options else ("tracked", "idle"):
        run("qemu-img", "bitmap", "--remove", sound, name)
    for _ in range(12):
        shutil.copyfile(sound, broken)
        raw = Raw(broken)
        for _ in range(rng.choice([1, 1, 2, 3])):
            damage_at_random(raw, rng)
        raw.save()
        expected = qemu_counts(broken)
        if expected is not None:
            assert counts(check(broken)) == expected


def test_bitmap_directory_out_of_order_is_a_corruption(tmp_path):
    path = tmp_path / "disk.qcow2"
    qemu_create(path, "2M")
    run("qemu-img", "bitmap", "--add", path, "tracked")
    raw = Raw(path)
    directory = Header.parse(bytes(raw.bytes)).bitmap_directory[0]
    raw.put(directory, 12345)
    raw.save()
    result = check(path)
    assert result.corruptions == 1
    assert [found.structure for found in result.findings if found.kind == "corruption"] == [
        "bitmap"
    ]


def test_snapshot_table_past_the_limits_keeps_leaks(tmp_path):
    path = tmp_path / "disk.qcow2"
    qemu_create(path, "2M")
    qemu_io(path, "write 0 64k")
    run("qemu-img", "snapshot", "-c", "one", path)
    raw = Raw(path)
    (snapshots,) = struct.unpack_from(">Q", raw.bytes, 64)
    struct.pack_into(">I", raw.bytes, snapshots + 36, 5000)
    raw.save()
    result = check(path)
    assert result.corruptions == 1 and result.findings[0].code == "snapshot-extra"
    # What only the snapshot holds may look leaked, and must not be given away.
    assert check(path, "leaks").leaks_fixed == 0
    assert path.read_bytes() == raw.bytes


# ---- findings -----------------------------------------------------------------------------------


def test_finding_says_where_and_what(disk):
    raw = Raw(disk)
    entry = raw.get(raw.l2() + 40)
    raw.put(raw.l2() + 40, entry & ~COPIED)
    raw.save()
    (found,) = check(disk).findings
    assert (found.kind, found.structure) == ("corruption", "l2")
    assert found.offset == entry & ~COPIED
    assert found.guest_offset == 5 * 4096
    assert "COPIED" in found.message


def test_findings_are_capped_and_counts_are_whole(tmp_path):
    path = tmp_path / "disk.qcow2"
    qemu_create(path, "32M", cluster_size=512, preallocation="metadata")
    raw = Raw(path)
    raw.bytes[raw.l1 : raw.l1 + raw.l1_size * 8] = bytes(raw.l1_size * 8)
    raw.save()
    result = assert_agrees(path)
    assert result.leaks > CheckResult.MAX_FINDINGS == len(result.findings)


# ---- repair -------------------------------------------------------------------------------------


def test_leaks_are_repaired(disk):
    raw = Raw(disk)
    raw.put(raw.l2() + 8, 0)
    raw.put(raw.l2() + 16, 0)
    raw.bytes[raw.block() + 17] = 3
    raw.save()
    result = check(disk, "leaks")
    assert (result.leaks, result.leaks_fixed, result.corruptions) == (0, 3, 0)
    fixed = [found for found in result.findings if found.fixed and found.kind == "leak"]
    assert sorted(found.offset for found in fixed) == [
        6 * 4096,
        7 * 4096,
        8 * 4096,
    ]
    assert assert_agrees(disk).clean
    qemu_io(disk, "read -P 1 0 4k", "read -P 0 4k 8k", "read -P 1 12k 52k", "read -P 2 3M 64k")


@pytest.mark.parametrize("refcount_bits", [1, 2, 4, 8, 16, 32, 64])
def test_leaks_are_repaired_in_every_refcount_width(tmp_path, refcount_bits):
    path = tmp_path / "disk.qcow2"
    qemu_create(path, "1M", cluster_size=512, refcount_bits=refcount_bits)
    qemu_io(path, "write -P 1 0 512k")
    raw = Raw(path)
    for i in range(0, 64, 3):
        raw.put(raw.l2(3) + 8 * i, 0)
    raw.save()
    assert check(path, "leaks").leaks_fixed == 22
    assert assert_agrees(path).clean


def test_repair_of_a_sound_image_writes_nothing(disk):
    before, stamp = disk.read_bytes(), os.stat(disk).st_mtime_ns
    assert check(disk, "leaks").clean
    assert disk.read_bytes() == before and os.stat(disk).st_mtime_ns == stamp


def test_leaks_stay_where_damage_may_hide_what_uses_them(disk):
    raw = Raw(disk)
    raw.add(raw.l1, 512)
    raw.save()
    result = check(disk, "leaks")
    assert result.leaks > 0 and result.leaks_fixed == 0
    assert disk.read_bytes() == raw.bytes


def test_open_image_repairs_itself_and_goes_on(disk):
    raw = Raw(disk)
    raw.put(raw.l2() + 8, 0)
    raw.save()
    with qcow2x.open(disk, "r+") as image:
        assert image.check(repair="leaks").leaks_fixed == 1
        image.pwrite(b"n" * 100_000, 1 << 20)
        assert image.check().clean
    assert assert_agrees(disk).clean


def test_repair_needs_a_writable_image_and_a_known_name(disk):
    with FileStorage(disk) as storage:
        header = Header.load(storage.pread, storage.size())
        with pytest.raises(PermissionError, match="read-only"):
            check_storage(storage, header, repair="leaks")
        with pytest.raises(ValueError, match="repair must be"):
            check_storage(storage, header, repair="some")
        with pytest.raises(ValueError, match="go with a repair"):
            check_storage(storage, header, dry_run=True)


# ---- bounds -------------------------------------------------------------------------------------


def test_progress_ends_at_its_total_and_can_cancel(disk):
    seen = []
    assert check(disk, progress=lambda *step: seen.append(step)).clean
    done, total, phase = seen[-1]
    assert done == total > 0 and phase == "check"
    assert all(0 <= step[0] <= step[1] for step in seen)
    with pytest.raises(Cancelled):
        check(disk, progress=lambda *step: False)


def windowed(path, max_counter_bytes):
    """The counts by as many passes as it takes."""
    with FileStorage(path) as storage:
        header = Header.load(storage.pread, storage.size(), storage.name)
        return Checker(storage, header, max_counter_bytes=max_counter_bytes).check().result()


@pytest.mark.parametrize("options", SHAPES[:7], ids=lambda o: "-".join(map(str, o.values())))
def test_many_passes_find_what_one_pass_finds(tmp_path, options):
    rng = random.Random(repr(options))
    sound, broken = tmp_path / "sound.qcow2", tmp_path / "broken.qcow2"
    make_rich(sound, options, rng)
    os.truncate(sound, os.path.getsize(sound) + 3000 * int(options["cluster_size"]))
    assert counts(windowed(sound, 1)) == counts(check(sound))
    for _ in range(6):
        shutil.copyfile(sound, broken)
        raw = Raw(broken)
        for _ in range(3):
            damage_at_random(raw, rng)
        raw.save()
        whole, parts = check(broken), windowed(broken, 1)
        assert counts(parts) == counts(whole)
        assert set(parts.findings) == set(whole.findings)


def test_huge_sparse_file_of_small_clusters_takes_few_passes(tmp_path):
    path = tmp_path / "disk.qcow2"
    qemu_create(path, "1M", cluster_size=512)
    os.truncate(path, 8 << 40)
    assert check(path).clean


def test_sparse_gigabytes_behind_the_image_cost_nothing(tmp_path):
    path = tmp_path / "disk.qcow2"
    qemu_create(path, "1M")
    os.truncate(path, 4 << 40)
    assert check(path).clean


def test_l1_table_full_of_the_same_l2_table_is_walked_once(tmp_path):
    path = tmp_path / "disk.qcow2"
    qemu_create(path, "2P", cluster_size=65536)
    qemu_io(path, "write -P 1 0 512k")
    with open(path, "r+b") as file:
        file.seek(40)
        (l1,) = struct.unpack(">Q", file.read(8))
        file.seek(l1)
        file.write(file.read(8) * (4 << 20))
    result = check(path)
    assert result.allocated_clusters == 8 * (4 << 20)
    # The L2 table and its 8 clusters, each referred to more often than 16 bits can count.
    assert result.corruptions >= 9 * ((4 << 20) - 65535)
