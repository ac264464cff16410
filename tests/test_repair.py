"""Repair: every kind of damage to every structure, next to `qemu-img check -r all`."""

import json
import shutil
import struct
import subprocess

import pytest

import qcow2x

pytestmark = pytest.mark.not_for_qemu("damaged images")

COPIED, COMPRESSED = 1 << 63, 1 << 62
CLUSTER = 4096
MASK = 0x00FFFFFFFFFFFE00


def run(*args, ok=(0,)):
    done = subprocess.run([*map(str, args)], check=False, capture_output=True, text=True)
    assert done.returncode in ok, (done.args, done.stdout, done.stderr)
    return done.stdout


def qemu_io(path, *commands):
    run("qemu-io", "-f", "qcow2", *(arg for step in commands for arg in ("-c", step)), path)


def qemu_create(path, size, **options):
    listed = ",".join(f"{name}={value}" for name, value in options.items())
    run("qemu-img", "create", "-q", "-f", "qcow2", *(["-o", listed] if listed else []), path, size)


class Raw:
    """An image as bytes, with the places of its tables, to do damage to."""

    def __init__(self, path):
        self.path = path
        self.bytes = bytearray(path.read_bytes())
        (bits,) = struct.unpack_from(">I", self.bytes, 20)
        self.cluster = 1 << bits
        self.l1_size, self.l1, self.rt = struct.unpack_from(">IQQ", self.bytes, 36)
        (self.snapshots,) = struct.unpack_from(">Q", self.bytes, 64)

    def get(self, at, form=">Q"):
        return struct.unpack_from(form, self.bytes, at)[0]

    def put(self, at, value, form=">Q"):
        struct.pack_into(form, self.bytes, at, value)

    def add(self, at, value):
        self.put(at, self.get(at) + value)

    def set(self, at, bits):
        self.put(at, self.get(at) | bits)

    def l2(self, l1_idx=0):
        return self.get(self.l1 + 8 * l1_idx) & MASK

    def data(self, index=0):
        return self.get(self.l2() + 8 * index) & MASK

    def block(self, rt_idx=0):
        return self.get(self.rt + 8 * rt_idx)

    def refcount(self, host_off, value):
        """For refcounts of 16 bits in the first block."""
        self.put(self.block() + 2 * (host_off // self.cluster), value, ">H")

    def bitmaps(self):
        """Where the directory is."""
        at = self.get(100, ">I")
        while self.get(at, ">I") != 0x23852875:
            at += 8 + -(-self.get(at + 4, ">I") // 8) * 8
        return self.get(at + 24)

    def cut(self, nbytes):
        del self.bytes[-nbytes:]

    def save(self):
        self.path.write_bytes(self.bytes)


# ---- sound images to do damage to ---------------------------------------------------------------


def make_plain(path):
    """Two runs of data, a cluster of zeros with a place kept, two compressed clusters."""
    qemu_create(path, "20M", cluster_size=CLUSTER)
    qemu_io(path, "write -P 1 0 64k", "write -P 2 3M 64k", "write -P 4 80k 4k")
    qemu_io(path, "write -z 80k 4k", "write -c -P 5 96k 4k", "write -c -P 6 100k 4k")


def make_old(path):
    qemu_create(path, "20M", cluster_size=CLUSTER, compat="0.10")
    qemu_io(path, "write -P 1 0 64k", "write -P 2 3M 64k")


def make_backed(path):
    below = path.with_name("below.raw")
    below.write_bytes(b"\x07" * (1 << 20))
    run(
        *("qemu-img", "create", "-q", "-f", "qcow2", "-b", below, "-F", "raw"),
        *("-o", f"cluster_size={CLUSTER},compat=0.10", path, "20M"),
    )
    qemu_io(path, "write -P 1 0 64k", "write -P 2 3M 64k")


def make_snapshots(path):
    make_plain(path)
    run("qemu-img", "snapshot", "-c", "one", path)
    qemu_io(path, "write -P 8 0 16k", "write -P 9 3M 4k")
    run("qemu-img", "snapshot", "-c", "two", path)
    qemu_io(path, "write -P 10 8k 16k")


def make_bitmaps(path):
    make_plain(path)
    for name in ("first", "second"):
        run("qemu-img", "bitmap", "--add", "-g", "4096", path, name)
    qemu_io(path, "write -P 11 200k 20k")


def make_extended(path):
    qemu_create(path, "8M", cluster_size=16384, extended_l2="on")
    qemu_io(path, "write -P 1 0 64k", "write -c -P 2 128k 16k", "write -P 3 200k 2k")
    qemu_io(path, "write -P 3 256k 16k", "write -z 256k 16k")


def make_split(path):
    qemu_create(path, "2M", cluster_size=CLUSTER, data_file=path.with_name("data.raw"))
    qemu_io(path, "write -P 1 0 64k", "write -P 2 128k 8k")


def make_narrow(path):
    qemu_create(path, "1M", cluster_size=512, refcount_bits=1)
    qemu_io(path, "write -P 1 0 256k")


def make_wide(path):
    qemu_create(path, "8M", cluster_size=65536, refcount_bits=64)
    qemu_io(path, "write -P 1 0 1M")


# ---- damage -------------------------------------------------------------------------------------


def first_snapshot(raw, field, value, form):
    raw.put(raw.snapshots + field, value, form)


def drop_snapshot_fields(raw, keep):
    """The table as a writer of version 2 would have left it: less extra data."""
    out, at = bytearray(), raw.snapshots
    for _ in range(raw.get(60, ">I")):
        at = -(-at // 8) * 8
        n_id, n_name = struct.unpack_from(">HH", raw.bytes, at + 12)
        extra = raw.get(at + 36, ">I")
        entry = raw.bytes[at : at + 36] + struct.pack(">I", keep)
        entry += raw.bytes[at + 40 : at + 40 + keep]
        names = at + 40 + extra
        entry += raw.bytes[names : names + n_id + n_name]
        out += entry + bytes(-len(entry) % 8)
        at = names + n_id + n_name
    raw.bytes[raw.snapshots : raw.snapshots + len(out)] = out


def other_l2_table(raw):
    """The L2 table of the disk is also a data cluster of it."""
    raw.put(raw.l2() + 8 * 3, COPIED | raw.l2())


PLAIN = {
    # L1
    "L1 reserved bits": lambda raw: raw.set(raw.l1, 1 << 57 | 4),
    "L1 flag without a table": lambda raw: raw.put(raw.l1 + 32, COPIED),
    "L1 misaligned": lambda raw: raw.add(raw.l1, 512),
    "L1 behind the file": lambda raw: raw.put(raw.l1 + 8, COPIED | 1 << 40),
    "L1 just behind the file": lambda raw: raw.put(raw.l1 + 8, COPIED | len(raw.bytes) + 8192),
    "L1 twice the same table": lambda raw: raw.put(raw.l1 + 8, raw.get(raw.l1)),
    "L1 without COPIED": lambda raw: raw.put(raw.l1, raw.l2()),
    "L1 to a data cluster": lambda raw: raw.put(raw.l1 + 16, COPIED | raw.data()),
    "L1 to the refcount block": lambda raw: raw.put(raw.l1 + 16, COPIED | raw.block()),
    "L1 to the refcount table": lambda raw: raw.put(raw.l1 + 16, COPIED | raw.rt),
    "L1 to itself": lambda raw: raw.put(raw.l1 + 16, COPIED | raw.l1),
    "L1 entry lost": lambda raw: raw.put(raw.l1, 0),
    # L2
    "L2 reserved bits": lambda raw: raw.set(raw.l2() + 8, 1 << 57 | 4),
    "data misaligned": lambda raw: raw.add(raw.l2() + 8, 512),
    "data misaligned beyond doubt": lambda raw: raw.put(raw.l2() + 8, COPIED | raw.data(2) + 1024),
    "zero cluster misaligned": lambda raw: raw.add(raw.l2() + 8 * 20, 1024),
    "data behind the file": lambda raw: raw.put(raw.l2() + 8, COPIED | 1 << 40),
    "zero cluster behind the file": lambda raw: raw.put(raw.l2() + 8 * 20, COPIED | 1 << 40 | 1),
    "data twice": lambda raw: raw.put(raw.l2() + 8, raw.get(raw.l2())),
    "data twice in two tables": lambda raw: raw.put(raw.l2(1) + 2048 + 8, raw.get(raw.l2())),
    "data without COPIED": lambda raw: raw.put(raw.l2(), raw.data()),
    "COPIED alone": lambda raw: raw.put(raw.l2() + 800, COPIED),
    "data entry lost": lambda raw: raw.put(raw.l2() + 8, 0),
    "data is the L2 table": other_l2_table,
    "data is the L1 table": lambda raw: raw.put(raw.l2() + 8, COPIED | raw.l1),
    "data is the refcount block": lambda raw: raw.put(raw.l2() + 8, COPIED | raw.block()),
    "data is the L1 table, which changes": lambda raw: (
        raw.put(raw.l2() + 16, raw.l1),
        raw.put(raw.l1 + 16, COPIED | raw.rt),
        raw.set(raw.l1, 1 << 57),
    ),
    "data is the refcount table": lambda raw: raw.put(raw.l2() + 8, COPIED | raw.rt),
    "data made compressed": lambda raw: raw.set(raw.l2(), COMPRESSED),
    "compressed with COPIED": lambda raw: raw.set(raw.l2() + 8 * 24, COPIED),
    "compressed behind the file": lambda raw: raw.put(raw.l2() + 8 * 24, COMPRESSED | 1 << 40),
    "compressed became data": lambda raw: raw.put(
        raw.l2() + 8 * 24, raw.get(raw.l2() + 8 * 24) & ~COMPRESSED
    ),
    # refcounts
    "refcount 0": lambda raw: raw.refcount(raw.data(), 0),
    "refcount 2": lambda raw: raw.refcount(raw.data(), 2),
    "refcount of the L2 table 0": lambda raw: raw.refcount(raw.l2(), 0),
    "refcount of the L1 table 0": lambda raw: raw.refcount(raw.l1, 0),
    "refcount of the header 0": lambda raw: raw.refcount(0, 0),
    "refcount of the refcount table 0": lambda raw: raw.refcount(raw.rt, 0),
    "refcount of the refcount block 0": lambda raw: raw.refcount(raw.block(), 0),
    "refcount of the refcount block 3": lambda raw: raw.refcount(raw.block(), 3),
    "refcount largest": lambda raw: raw.refcount(raw.data(), 65535),
    "refcount of a free cluster 1": lambda raw: raw.refcount(len(raw.bytes), 1),
    "refcounts all 0": lambda raw: raw.bytes.__setitem__(
        slice(raw.block(), raw.block() + CLUSTER), bytes(CLUSTER)
    ),
    "refcounts all noise": lambda raw: raw.bytes.__setitem__(
        slice(raw.block(), raw.block() + CLUSTER), bytes(range(256)) * 16
    ),
    # refcount table
    "no refcount block": lambda raw: raw.put(raw.rt, 0),
    "block misaligned": lambda raw: raw.add(raw.rt, 512),
    "block with reserved bits": lambda raw: raw.set(raw.rt, 4),
    "block behind the file": lambda raw: raw.put(raw.rt, 1 << 40),
    "block nowhere": lambda raw: raw.put(raw.rt, 1 << 63),
    "block is the L1 table": lambda raw: raw.put(raw.rt, raw.l1),
    "block is an L2 table": lambda raw: raw.put(raw.rt, raw.l2()),
    "block is data": lambda raw: raw.put(raw.rt, raw.data()),
    "block is the header": lambda raw: raw.put(raw.rt + 8, 512),
    "block is the refcount table": lambda raw: raw.put(raw.rt, raw.rt),
    "second block behind the file": lambda raw: raw.put(raw.rt + 8, 1 << 40),
    "second block is the first": lambda raw: raw.put(raw.rt + 8, raw.block()),
    "refcount table all noise": lambda raw: raw.bytes.__setitem__(
        slice(raw.rt, raw.rt + CLUSTER), bytes(range(255, -1, -1)) * 16
    ),
    # header
    "dirty bit": lambda raw: raw.put(72, 1),
    "corrupt bit": lambda raw: raw.put(72, 2),
    "dirty bit and refcounts that lag": lambda raw: (
        raw.put(72, 1),
        raw.refcount(raw.data(), 0),
        raw.refcount(raw.data(5), 0),
        raw.refcount(raw.l2(1), 0),
    ),
    "corrupt bit and data twice": lambda raw: (
        raw.put(72, 2),
        raw.put(raw.l2() + 8, raw.get(raw.l2())),
    ),
    "refcount table behind the file": lambda raw: raw.put(48, 1 << 30),
    "refcount table misaligned": lambda raw: raw.put(48, raw.rt + 512),
    "no refcount table": lambda raw: raw.put(56, 0, ">I"),
    "refcount table is the L1 table": lambda raw: raw.put(48, raw.l1),
    "unknown autoclear bit and a leak": lambda raw: (
        raw.put(88, 1 << 40),
        raw.put(raw.l2() + 8, 0),
    ),
    # the file
    "file cut in a cluster": lambda raw: raw.cut(1000),
    "file cut by clusters": lambda raw: raw.cut(3 * CLUSTER + 100),
    "file cut by a table": lambda raw: raw.cut(len(raw.bytes) - raw.l2(1)),
    "file with noise behind": lambda raw: raw.bytes.extend(b"noise" * 5000),
    # several at once
    "refcounts, flags and entries": lambda raw: (
        raw.refcount(raw.data(), 0),
        raw.refcount(raw.data(1), 7),
        raw.put(raw.l2() + 16, raw.data(2)),
        raw.put(raw.l2() + 24, COPIED | 1 << 40),
        raw.put(raw.l1 + 32, COPIED),
    ),
    "everything about refcounts": lambda raw: (
        raw.put(raw.rt, raw.l2()),
        raw.put(raw.rt + 8, 12345),
        raw.put(raw.rt + 16, 1 << 50),
    ),
}

SNAPSHOTS = {
    "snapshot L1 misaligned": lambda raw: first_snapshot(
        raw, 0, raw.get(raw.snapshots) + 512, ">Q"
    ),
    "snapshot L1 too large": lambda raw: first_snapshot(raw, 8, 1 << 30, ">I"),
    "snapshot L1 behind the file": lambda raw: first_snapshot(raw, 0, 1 << 40, ">Q"),
    "snapshot L1 is that of the disk": lambda raw: first_snapshot(raw, 0, raw.l1, ">Q"),
    "snapshot L1 entry reserved bits": lambda raw: raw.set(raw.get(raw.snapshots), 1 << 57),
    "snapshot L1 entry behind the file": lambda raw: raw.put(raw.get(raw.snapshots), 1 << 40),
    "snapshot L2 entry behind the file": lambda raw: raw.put(
        (raw.get(raw.get(raw.snapshots)) & MASK) + 8 * 12, 1 << 40
    ),
    "snapshots without extra data": lambda raw: drop_snapshot_fields(raw, 0),
    "snapshots without a disk size": lambda raw: drop_snapshot_fields(raw, 8),
    "snapshot with too much extra data": lambda raw: first_snapshot(raw, 36, 2000, ">I"),
    "snapshot refcount of shared data 1": lambda raw: raw.refcount(raw.data(10), 1),
    "snapshot refcount of shared data 9": lambda raw: raw.refcount(raw.data(10), 9),
    "snapshot shared data has COPIED": lambda raw: raw.set(raw.l2() + 8 * 10, COPIED),
    "snapshot own data lacks COPIED": lambda raw: raw.put(raw.l2() + 8 * 3, raw.data(3)),
    "snapshot table refcount 0": lambda raw: raw.refcount(raw.snapshots, 0),
    "snapshot forgotten": lambda raw: raw.put(60, 1, ">I"),
    "snapshots forgotten": lambda raw: raw.put(60, 0, ">I"),
}

BITMAPS = {
    "bitmap directory noise": lambda raw: raw.put(raw.bitmaps(), 12345),
    "bitmap name twice": lambda raw: raw.bytes.__setitem__(
        slice(raw.bitmaps() + 32 + 24, raw.bitmaps() + 32 + 29), b"first"
    ),
    "bitmap table entry reserved bits": lambda raw: raw.put(raw.get(raw.bitmaps()), 2),
    "bitmap table entry misaligned": lambda raw: raw.put(raw.get(raw.bitmaps()), 0x1200),
    "bitmap data behind the file": lambda raw: raw.put(raw.get(raw.bitmaps()), 1 << 40),
    "bitmap table behind the file": lambda raw: raw.put(raw.bitmaps(), 1 << 40),
    "bitmap granularity": lambda raw: raw.bytes.__setitem__(raw.bitmaps() + 17, 70),
    "bitmap flags": lambda raw: raw.put(raw.bitmaps() + 12, 0x100, ">I"),
}

EXTENDED = {
    "subclusters both": lambda raw: raw.put(raw.l2() + 8, 1 << 33 | 3),
    "subclusters without a cluster": lambda raw: raw.put(raw.l2() + 168, 3),
    "subclusters misaligned with data": lambda raw: raw.add(raw.l2(), 512),
    "subclusters misaligned without data": lambda raw: raw.add(raw.l2() + 16 * 16, 512),
    "subclusters behind the file": lambda raw: raw.put(raw.l2() + 16, COPIED | 1 << 40),
    "subclusters of a compressed cluster": lambda raw: raw.put(raw.l2() + 16 * 8 + 8, 3),
    "subclusters refcount 0": lambda raw: raw.refcount(raw.data(), 0),
}

OLD = {
    "v2 data behind the file": lambda raw: raw.put(raw.l2() + 8, COPIED | 1 << 40),
    "v2 L1 behind the file": lambda raw: raw.put(raw.l1 + 8, COPIED | 1 << 40),
    "v2 refcount 0": lambda raw: raw.refcount(raw.data(), 0),
    "v2 no refcount block": lambda raw: raw.put(raw.rt, 0),
    "v2 data twice": lambda raw: raw.put(raw.l2() + 8, raw.get(raw.l2())),
}

SPLIT = {
    "data file: COPIED missing": lambda raw: raw.put(raw.l2() + 8, raw.data(1)),
    "data file: compressed": lambda raw: raw.set(raw.l2() + 8, COMPRESSED),
    "data file: misaligned": lambda raw: raw.add(raw.l2() + 8, 512),
    "data file: refcount of L2 0": lambda raw: raw.refcount(raw.l2(), 0),
}

NARROW = {
    "1 bit: data twice": lambda raw: raw.put(raw.l2() + 8, raw.get(raw.l2())),
    "1 bit: refcounts 0": lambda raw: raw.bytes.__setitem__(
        slice(raw.block() + 3, raw.block() + 20), bytes(17)
    ),
    "1 bit: leaks": lambda raw: raw.bytes.__setitem__(slice(raw.l2(), raw.l2() + 128), bytes(128)),
}

WIDE = {
    "64 bits: refcount 2^63": lambda raw: raw.put(raw.block() + 64, 1 << 63),
    "64 bits: refcount 0": lambda raw: raw.put(raw.block() + 64, 0),
    "64 bits: no block": lambda raw: raw.put(raw.rt, 0),
}

#: Here tables show up as guest data, and tables are what a repair changes.
SHOWS_TABLES = {"L1 to itself"}

CASES = [
    (make, name, harm)
    for make, kinds in (
        (make_plain, PLAIN),
        (make_snapshots, SNAPSHOTS),
        (make_bitmaps, BITMAPS),
        (make_extended, EXTENDED),
        (make_old, OLD),
        (make_backed, {f"backed {name}": harm for name, harm in OLD.items()}),
        (make_split, SPLIT),
        (make_narrow, NARROW),
        (make_wide, WIDE),
    )
    for name, harm in kinds.items()
]


# ---- judges -------------------------------------------------------------------------------------


def qemu_verdict(path):
    """Corruptions, leaks and errors that qemu-img finds; None where it does not open the image."""
    done = subprocess.run(
        ["qemu-img", "check", "--output=json", str(path)],
        check=False,
        capture_output=True,
        text=True,
    )
    if not done.stdout:
        return None
    told = json.loads(done.stdout)
    return {name: told.get(name, 0) for name in ("corruptions", "leaks", "check-errors")}


def guest_bytes(path, snapshot=None):
    """What QEMU reads, with zeros where it cannot read; None where it does not open the image."""
    out = path.with_suffix(".read")
    done = subprocess.run(
        ["qemu-img", "convert", "-q", "--salvage", "-f", "qcow2", "-O", "raw"]
        + (["-l", snapshot] if snapshot else [])
        + [str(path), str(out)],
        check=False,
        capture_output=True,
    )
    return out.read_bytes() if done.returncode == 0 else None


def lost_sectors(before, ours, theirs):
    """Sectors that QEMU's repair keeps as they were and ours does not."""
    return [
        at
        for at in range(0, len(theirs), 512)
        if theirs[at : at + 512].strip(b"\0")
        and theirs[at : at + 512] == before[at : at + 512] != ours[at : at + 512]
    ]


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A copy of a sound image of each kind, made once."""
    made = {}

    def give(make, path):
        if make not in made:
            folder = tmp_path_factory.mktemp(make.__name__)
            made[make] = folder / "sound.qcow2"
            make(made[make])
        shutil.copyfile(made[make], path)
        return path

    return give


@pytest.mark.parametrize(("make", "name", "harm"), CASES, ids=[name for _, name, _ in CASES])
def test_repair_is_at_least_as_good_as_qemus(tmp_path, sound, make, name, harm):
    ours = sound(make, tmp_path / "ours.qcow2")
    raw = Raw(ours)
    harm(raw)
    raw.save()
    broken = bytes(raw.bytes)
    theirs = tmp_path / "theirs.qcow2"
    shutil.copyfile(ours, theirs)
    subprocess.run(["qemu-img", "check", "-q", "-r", "all", theirs], check=False, timeout=60)
    their_verdict = qemu_verdict(theirs)

    views = ("one", "two", None) if make is make_snapshots else (None,)
    before = {view: guest_bytes(ours, view) for view in views}

    told = qcow2x.check(ours, repair="all", dry_run=True)
    assert ours.read_bytes() == broken
    journal = tmp_path / "undo"
    result = qcow2x.check(ours, repair="all", journal=journal)
    repaired = ours.read_bytes()

    # A dry run tells what the repair does.
    assert [f.action for f in told.findings] == [f.action for f in result.findings]
    assert not any(found.fixed for found in told.findings)
    assert all(found.fixed == (found.action is not None) for found in result.findings)

    # QEMU finds the outcome as we do, and no worse than its own.
    verdict = qemu_verdict(ours)
    if verdict is None:
        assert their_verdict is None and result.corruptions + result.check_errors
    else:
        assert verdict == {
            "corruptions": result.corruptions,
            "leaks": result.leaks,
            "check-errors": result.check_errors,
        }
        worst = {"corruptions": 1 << 60, "leaks": 1 << 60, "check-errors": 1 << 60}
        limit = their_verdict or worst
        assert verdict["corruptions"] <= limit["corruptions"]
        assert verdict["check-errors"] <= limit["check-errors"]
        # Clusters that nothing refers to stay while it is not known what some entry meant.
        assert verdict["leaks"] <= limit["leaks"] or result.corruptions
    if result.clean:
        assert struct.unpack_from(">Q", repaired, 72)[0] & 3 == 0 or make in (
            make_old,
            make_backed,
        )
        with qcow2x.open(ours, "r+", references="follow") as image:
            image.pwrite(b"after", image.size - 5)
            looked = image.check()
            # A writer that keeps no bitmaps up to date leaves them behind.
            assert looked.clean or (make is make_bitmaps and not looked.corruptions)
        ours.write_bytes(repaired)

    # What the guest and its snapshots hold.
    for view in views:
        kept = guest_bytes(theirs, view)
        if kept is not None and before[view] is not None and name not in SHOWS_TABLES:
            assert lost_sectors(before[view], guest_bytes(ours, view), kept) == []

    # A second look repairs nothing more.
    qcow2x.check(ours, repair="all")
    assert ours.read_bytes() == repaired
    # Undone, the file is what it was.
    if repaired != broken:
        assert qcow2x.undo_repair(ours, journal)
    assert ours.read_bytes() == broken


def test_a_snapshot_whose_l1_table_lies_in_data(tmp_path):
    """Its entries are nonsense, and where they stand is not to be written to: it is the disk's."""
    path = tmp_path / "disk.qcow2"
    qcow2x.create(path, 96 << 10, cluster_size=1024)
    with qcow2x.open(path, "r+") as image:
        image.pwrite(b"\x12\x34" * 2048, 0)
        image.snapshots.create("before")
    data = bytearray(path.read_bytes())
    l1, table = int.from_bytes(data[40:48], "big"), int.from_bytes(data[64:72], "big")
    l2 = int.from_bytes(data[l1 + 2 : l1 + 8], "big")
    data[table : table + 8] = bytes(2) + data[l2 + 2 : l2 + 8]
    path.write_bytes(data)
    assert qcow2x.check(path, repair="all").clean
    with qcow2x.open(path) as image:
        assert image.pread(4096, 0) == b"\x12\x34" * 2048
