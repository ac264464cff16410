"""What is interrupted: one function per kind of work. Each builds a machine, does the work on it and
returns how to tell whether a cut of power left what must be left."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

from support.stamps import stamped

import qcow2x
from campaigns.guest import Guest, Lost, UnluckyGuest, prepare
from campaigns.power import Machine, RecordedFile, State
from qcow2x.encryption import Encryption

KiB = 1 << 10
SIZE = 96 * KiB

SHAPES: dict[str, dict[str, Any]] = {
    "512": {"cluster_size": 512},
    "512-rc1": {"cluster_size": 512, "refcount_bits": 1},
    "512-rc64": {"cluster_size": 512, "refcount_bits": 64},
    "v2": {"cluster_size": 1024, "compat": "0.10"},
    "4096-zstd": {"cluster_size": 4096, "compression_type": "zstd"},
    "extended-l2": {"cluster_size": 16384, "extended_l2": True},
    "lazy": {"cluster_size": 512, "lazy_refcounts": True},
}
#: Those whose refcounts can count a snapshot.
COUNTING = [name for name in SHAPES if name != "512-rc1"]
CACHES = ("writeback", "writethrough", "none", "directsync")


class Corrupt(AssertionError):
    """The file contradicts itself after a cut: more than leaked clusters."""


#: Files by name, as they are once the state was opened, mended and closed: for QEMU to look at.
Files = dict[str, "bytes | bytearray"]


class Case(NamedTuple):
    """Work that was done, and how to judge a state that a cut during it left."""

    machine: Machine
    #: What was chosen: shape, cache mode; for the report of a failure.
    detail: str
    verify: Callable[[State], Files]


def sound(image: qcow2x.Image, *, but_for_flags: bool = False) -> None:
    found = image.check()
    if found.corruptions or found.check_errors:
        bad = [finding for finding in found.findings if finding.kind != "leak"]
        if but_for_flags and all(finding.message.startswith("COPIED flag of") for finding in bad):
            return
        raise Corrupt(f"{len(bad)} findings, the first: {bad[0]}")


def recorded(data: bytes) -> RecordedFile:
    return Machine().file(data)


def _reopened(file: RecordedFile, **options: Any) -> qcow2x.Image:
    """As the next start of the machine would open it: what was left dirty is mended."""
    return qcow2x.open(file, "r+", **options)


def whole_disk(image: qcow2x.Image) -> bytes:
    return image.pread(image.size, 0)


# ---- A guest that reads, writes, trims and flushes ----


def _guest_case(
    rng: random.Random,
    weights: dict[str, int],
    *,
    steps: int = 40,
    size: int = SIZE,
    filled: float = 0.4,
    window: tuple[int, int] | None = None,
    shapes: Any = tuple(SHAPES),
    backing: bytes | None = None,
    before: Callable[[qcow2x.Image], object] | None = None,
    growth: str = "auto",
    left_over: int = 0,
    guest_type: type[Guest] = Guest,
    **create: Any,
) -> Case:
    """``left_over``: bytes of something else behind the image, in its file or on its device."""
    shape, cache = rng.choice(shapes), rng.choice(CACHES)
    options: dict[str, Any] = {**SHAPES[shape], **create}
    under: dict[str, Any] = {}
    if backing is not None:
        options |= {"backing_file": "base.raw", "backing_format": "raw"}
        under["backing"] = recorded(backing)
    start = prepare(size, filled=filled, under=under, **options)
    if before is not None:
        file = recorded(start)
        with qcow2x.open(file, "r+", **under) as image:
            before(image)
        start = bytes(file.data)
    machine = Machine()
    file = machine.file(start + stamped(0, left_over, 6 << 40))
    # Now and then as on a block device, where a new cluster holds what was there before.
    file.zero_past_end = rng.random() < 0.8
    image = qcow2x.open(file, "r+", cache=cache, growth=growth, **under)
    frozen = _snapshots(image)
    durable = cache in ("writethrough", "directsync")
    guest = guest_type(machine, image, rng, durable_at_return=durable, window=window)
    guest.end = int(size * filled) // 512 * 512
    guest.work(steps, weights)
    file.failing_sites = ()
    image.close()
    guest.settle()

    def verify(state: State) -> Files:
        disk = recorded(state.files[0])
        with _reopened(disk, **under) as found:
            sound(found)
            guest.verify(state.happened, whole_disk(found))
            if _snapshots(found) != frozen:
                raise Lost("a snapshot reads differently")
            if frozen:
                _stands_apart(found, frozen)
        return {"disk.qcow2": disk.data, **({"base.raw": backing} if backing is not None else {})}

    return Case(machine, f"{shape} {cache}", verify)


def _snapshots(image: qcow2x.Image) -> dict[str, bytes]:
    found = {}
    for snapshot in image.snapshots:
        with image.snapshots.open(snapshot.id) as then:
            found[snapshot.name] = whole_disk(then)
    return found


def _stands_apart(image: qcow2x.Image, frozen: dict[str, bytes]) -> None:
    """Nothing that is written to the disk from now on shows in its snapshots."""
    disk = stamped(0, image.size, 9 << 40)
    image.pwrite(disk, 0)
    if whole_disk(image) != disk:
        raise Corrupt("what is written to the disk does not stay there")
    if _snapshots(image) != frozen:
        raise Corrupt("a write to the disk changed a snapshot")


def growth(rng: random.Random) -> Case:
    return _guest_case(rng, {"append": 6, "write": 2, "flush": 1}, filled=0.0)


def many_writes(rng: random.Random) -> Case:
    """Writes of one call are durable when it returns, those that allocate and those that do not."""
    return _guest_case(
        rng,
        {"write_many": 8, "write": 2, "discard": 1, "flush": 1},
        steps=16,
        growth=rng.choice(("auto", "ahead", "together", "plain")),
    )


def growth_together(rng: random.Random) -> Case:
    """Reserved for several writes at a time and linked ahead of them, with nothing made durable for it."""
    return _guest_case(
        rng,
        {"write_many": 7, "append": 3, "write": 1, "discard": 1, "zero": 1, "flush": 2},
        steps=24,
        filled=0.0,
        growth="together",
    )


def growth_ahead(rng: random.Random) -> Case:
    """Reserved and linked ahead in every cache mode, with all that may meet what was linked."""
    base = stamped(0, SIZE // 2 + 512, 7 << 40) if rng.random() < 0.4 else None
    return _guest_case(
        rng,
        {"append": 9, "write": 2, "discard": 1, "zero": 1, "compress": 1, "flush": 1},
        filled=0.0,
        backing=base,
        growth="ahead",
    )


def growth_over_left_over(rng: random.Random) -> Case:
    """What is linked ahead is zeros, whatever was in its place; and no barrier helps out: refcounts
    are lazy, and a part of an L2 table is in use, so that no mapping waits for a new one."""
    return _guest_case(
        rng,
        {"append": 9, "write": 2, "discard": 1, "flush": 1},
        filled=0.45,
        shapes=("lazy",),
        growth="ahead",
        left_over=256 * KiB,
    )


def growth_into_holes(rng: random.Random) -> Case:
    """Clusters so large that a reserve for scattered writes is a hole in the file."""
    return _guest_case(
        rng,
        {"write": 6, "append": 1, "zero": 1, "flush": 1},
        steps=16,
        size=2048 * KiB,
        filled=0.0,
        shapes=("512",),
        growth="ahead",
        cluster_size=128 * KiB,
    )


def growth_of_refcounts(rng: random.Random) -> Case:
    """A new refcount block now and then, or past the end of the first refcount table, at 2 MiB."""
    weights = {"append": 3, "write": 4, "flush": 1}
    if rng.random() < 0.8:
        return _guest_case(rng, weights, filled=0.2, shapes=("512-rc64",))
    size = 2300 * KiB
    window = (1970 * KiB, size)
    return _guest_case(
        rng,
        {"write": 6, "flush": 1},
        steps=60,
        size=size,
        filled=window[0] / size,
        window=window,
        shapes=("512-rc64",),
    )


def failing_writes(rng: random.Random) -> Case:
    """Writes of metadata fail now and then; the work goes on, and a later flush tries again."""
    return _guest_case(
        rng,
        {"append": 5, "write": 5, "discard": 2, "fail": 3, "flush": 3},
        filled=rng.choice((0.0, 0.4)),
        shapes=[name for name in SHAPES if name != "lazy"],
        guest_type=UnluckyGuest,
    )


def lazy_refcounts(rng: random.Random) -> Case:
    """Refcounts on disk are behind, so no barrier of theirs comes before a mapping."""
    filled = rng.choice((0.0, 0.4, 0.9))
    snapshot = rng.random() < 0.5
    return _guest_case(
        rng,
        {"write": 5, "discard": 2, "compress": 1, "zero": 1, "flush": 1},
        filled=filled,
        shapes=("lazy",),
        before=(lambda image: image.snapshots.create("before")) if snapshot else None,
    )


def overwrite(rng: random.Random) -> Case:
    return _guest_case(rng, {"write": 5, "flush": 1}, filled=1.0)


def cow_from_backing(rng: random.Random) -> Case:
    base = stamped(0, rng.choice((SIZE, SIZE // 2 + 512)), 7 << 40)
    return _guest_case(
        rng, {"write": 5, "zero": 1, "discard": 1, "flush": 1}, filled=0.2, backing=base
    )


def cow_from_snapshot(rng: random.Random) -> Case:
    return _guest_case(
        rng,
        {"write": 5, "zero": 1, "discard": 1, "compress": 1, "flush": 1},
        shapes=COUNTING,
        before=lambda image: image.snapshots.create("before"),
    )


def compressed(rng: random.Random) -> Case:
    return _guest_case(rng, {"compress": 4, "write": 1, "flush": 1})


def discard_and_reuse(rng: random.Random) -> Case:
    return _guest_case(
        rng, {"discard": 3, "zero": 2, "write": 3, "compress": 1, "flush": 1}, filled=0.9
    )


def encrypted_guest(rng: random.Random) -> Case:
    start = recorded(b"")
    qcow2x.create(start, SIZE, cluster_size=4096, encryption=_luks("one"))
    machine = Machine()
    cache = rng.choice(CACHES)
    image = qcow2x.open(machine.file(bytes(start.data)), "r+", cache=cache, key="one")
    guest = Guest(machine, image, rng, durable_at_return=cache in ("writethrough", "directsync"))
    guest.work(30, {"write": 5, "zero": 1, "discard": 1, "flush": 1})
    image.close()
    guest.settle()

    def verify(state: State) -> Files:
        disk = recorded(state.files[0])
        with _reopened(disk, key="one") as found:
            sound(found)
            guest.verify(state.happened, whole_disk(found))
        # QEMU opens it with its key only.
        return {}

    return Case(machine, cache, verify)


def external_data_file(rng: random.Random) -> Case:
    """The mapping in one file, the bytes in another: each is flushed on its own."""
    shape = rng.choice(("512", "4096-zstd", "extended-l2"))
    options = {k: v for k, v in SHAPES[shape].items() if k != "compression_type"}
    start = recorded(b"")
    with tempfile.TemporaryDirectory() as folder:
        # Making an image makes its data file; only the name is kept.
        qcow2x.create(start, SIZE, data_file=f"{folder}/data.raw", **options)
    with qcow2x.open(start, "r+", data_file=recorded(bytes(SIZE))) as image:
        qcow2x.amend(image, data_file="data.raw")
    machine = Machine()
    # What lies where nothing is mapped must never be seen.
    left_over = stamped(0, SIZE, 8 << 40)
    file, bytes_of_disk = machine.file(bytes(start.data)), machine.file(left_over)
    cache = rng.choice(CACHES)
    image = qcow2x.open(file, "r+", cache=cache, data_file=bytes_of_disk)
    guest = Guest(machine, image, rng, durable_at_return=cache in ("writethrough", "directsync"))
    guest.work(40, {"write": 5, "zero": 1, "discard": 1, "flush": 1})
    image.close()
    guest.settle()

    def verify(state: State) -> Files:
        disk, data = recorded(state.files[0]), recorded(state.files[1])
        with _reopened(disk, data_file=data) as found:
            sound(found)
            guest.verify(state.happened, whole_disk(found))
        return {"disk.qcow2": disk.data, "data.raw": data.data}

    return Case(machine, f"{shape} {cache}", verify)


# ---- Steps that have two sides: before and after ----


def worn(rng: random.Random, shape: str) -> bytes:
    """An image with data, a compressed cluster, two snapshots and changes since."""
    file = recorded(prepare(SIZE, **SHAPES[shape]))
    with qcow2x.open(file, "r+") as image:
        image.snapshots.create("kept")
        image.pwrite(stamped(4 * KiB, 8 * KiB, rng.randrange(1 << 30)), 4 * KiB)
        image.snapshots.create("old")
        image.pwrite(stamped(8 * KiB, 16 * KiB, rng.randrange(1 << 30)), 8 * KiB)
        image.discard(48 * KiB, 16 * KiB)
    return bytes(file.data)


def _step_case(rng: random.Random, step: Callable[[qcow2x.Image], object]) -> Case:
    shape = rng.choice(COUNTING)
    machine = Machine()
    with qcow2x.open(machine.file(worn(rng, shape)), "r+") as image:
        before = (whole_disk(image), _snapshots(image))
        began = machine.now
        step(image)
        done = machine.now
        after = (whole_disk(image), _snapshots(image))

    def verify(state: State) -> Files:
        disk = recorded(state.files[0])
        with _reopened(disk) as found:
            content = (whole_disk(found), _snapshots(found))
            sound(found, but_for_flags=shape == "v2")
        written_to = recorded(disk.data)
        with _reopened(written_to) as found:
            _stands_apart(found, content[1])
        if content != after or state.happened <= began:
            if content != before or state.happened >= done:
                raise Lost("neither what was before the step nor what it makes")
        if shape == "v2":
            # Version 2 has no bit that says dirty, so where refcounts and COPIED flags, which change
            # in two sectors, do not match they are not mended unasked. No harm comes of it.
            qcow2x.check(disk, repair="all")
            with qcow2x.open(disk) as found:
                sound(found)
                if (whole_disk(found), _snapshots(found)) != content:
                    raise Lost("mending the flags changed what is read")
        return {"disk.qcow2": disk.data}

    return Case(machine, shape, verify)


def snapshot_create(rng: random.Random) -> Case:
    return _step_case(rng, lambda image: image.snapshots.create("new"))


def snapshot_apply(rng: random.Random) -> Case:
    return _step_case(rng, lambda image: image.snapshots.apply("old"))


def snapshot_delete(rng: random.Random) -> Case:
    return _step_case(rng, lambda image: image.snapshots.delete("old"))


def amend_refcounts(rng: random.Random) -> Case:
    # The version 2 shape has 16-bit refcounts and no others.
    bits = rng.choice((2, 8, 32, 64))

    def step(image: qcow2x.Image) -> None:
        if image.info().compat != "0.10":
            qcow2x.amend(image, refcount_bits=bits)

    return _step_case(rng, step)


def amend_compat(rng: random.Random) -> Case:
    def step(image: qcow2x.Image) -> None:
        if image.info().compat == "0.10":
            qcow2x.amend(image, compat="1.1")
        else:
            qcow2x.amend(image, lazy_refcounts=not image.info().lazy_refcounts)

    return _step_case(rng, step)


def resize(rng: random.Random) -> Case:
    """Old bytes never come back past an end that was moved away and back."""
    shape = rng.choice(tuple(SHAPES))
    machine = Machine()
    filled = rng.choice((1.0, 0.3))
    image = qcow2x.open(machine.file(prepare(SIZE, filled=filled, **SHAPES[shape])), "r+")
    # (log length when the change began, when it was durable, the disk then)
    disks = [(0, 0, whole_disk(image))]
    for _ in range(4):
        # One sector, which is written or not; the resize makes it durable.
        at = rng.randrange(image.size // 512) * 512
        size = rng.randrange(16, 400) * 512
        began = machine.now
        image.pwrite(stamped(at, 512, began), at)
        written = whole_disk(image)
        resizing = machine.now
        image.resize(size, shrink=True)
        disks.append((began, machine.now, written))
        disks.append((resizing, machine.now, whole_disk(image)))
    image.close()

    def verify(state: State) -> Files:
        disk = recorded(state.files[0])
        with _reopened(disk) as found:
            sound(found)
            content = whole_disk(found)
            found.resize(len(content) + 64 * KiB)
            if any(found.pread(64 * KiB, len(content))):
                raise Lost("what was behind the end of the disk is back")
        for n, (began, done, then) in reversed([*enumerate(disks)]):
            if began > state.happened:
                continue
            # A shrink drops mappings before it moves the end: what is to go may read as zeros.
            before = [disk for _, _, disk in disks[max(0, n - 2) : n]]
            if content == then or any(_is_cut_down(content, old, len(then)) for old in before):
                return {"disk.qcow2": disk.data}
            if done <= state.happened:
                break
        raise Lost(f"a disk of {len(content)} bytes that never was")

    return Case(machine, shape, verify)


def _is_cut_down(content: bytes, old: bytes, kept: int) -> bool:
    """Whether ``content`` is ``old`` with sectors behind its first ``kept`` bytes gone."""
    return len(content) == len(old) and all(
        content[at : at + 512] in (old[at : at + 512], bytes(512) if at >= kept else b"")
        for at in range(0, len(old), 512)
    )


def unknown_feature(rng: random.Random) -> Case:
    """The bit of a feature that ends with the first writer that does not know it: while it is set
    nothing has been written."""
    shape = rng.choice([name for name in SHAPES if name != "v2"])
    start = bytearray(prepare(SIZE, **SHAPES[shape]))
    start[_AUTOCLEAR_AT] |= 0x40
    machine = Machine()
    image = qcow2x.open(machine.file(bytes(start)), "r+")
    before = whole_disk(image)
    guest = Guest(machine, image, rng)
    guest.work(12, {"write": 5, "zero": 1, "flush": 1})
    image.close()
    guest.settle()

    def verify(state: State) -> Files:
        disk = recorded(state.files[0])
        with qcow2x.open(disk) as found:
            if state.files[0][_AUTOCLEAR_AT] and whole_disk(found) != before:
                raise Lost("a feature's promise stands and is broken")
        with _reopened(disk) as found:
            sound(found)
            guest.verify(state.happened, whole_disk(found))
        return {"disk.qcow2": disk.data}

    return Case(machine, shape, verify)


_AUTOCLEAR_AT = 88


# ---- Bitmaps ----


def bitmaps(rng: random.Random) -> Case:
    """A bitmap that does not call itself inconsistent tells of every change since it was made."""
    shape = rng.choice([name for name in SHAPES if name != "v2"])
    options, under, backing = dict(SHAPES[shape]), {}, None
    if rng.random() < 0.4:
        # Its name lies where the header gets an extension.
        backing = "base.raw"
        options |= {"backing_file": backing, "backing_format": "raw"}
        under["backing"] = recorded(stamped(0, SIZE, 7 << 40))
    machine = Machine()
    image = qcow2x.open(machine.file(prepare(SIZE, under=under, **options)), "r+", **under)
    guest = Guest(machine, image, rng)
    guest.work(3, {"write": 1})
    # What a new bitmap calls clean is as it is now, whatever happens.
    began = whole_disk(image)
    image.bitmaps.add("since", 512)
    guest.settle()
    added = machine.now
    guest.work(12, {"write": 4, "zero": 1, "flush": 1})
    image.bitmaps.add("later", 4096)
    guest.work(6, {"write": 4, "flush": 1})
    image.bitmaps.remove("later")
    guest.work(6, {"write": 4, "flush": 1})
    image.close()
    guest.settle()
    closed = machine.now

    def verify(state: State) -> Files:
        disk = recorded(state.files[0])
        with _reopened(disk, **under) as found:
            sound(found)
            content = whole_disk(found)
            guest.verify(state.happened, content)
            if found.info().backing_filename != backing:
                raise Lost("the name of the backing file is gone")
            if "since" not in found.bitmaps:
                if state.happened >= added:
                    raise Lost("the bitmap is gone")
            elif found.bitmaps["since"].inconsistent:
                if state.happened >= closed:
                    raise Lost("the bitmap was stored and is inconsistent")
            else:
                _tells_of_changes(found, began, content)
        base = {} if backing is None else {backing: under["backing"].data}
        return {"disk.qcow2": disk.data, **base}

    return Case(machine, f"{shape}{' backed' if backing else ''}", verify)


def _tells_of_changes(image: qcow2x.Image, before: bytes, after: bytes) -> None:
    dirty = bytearray(len(after))
    for extent in image.bitmaps.extents("since"):
        if extent.dirty:
            dirty[extent.offset : extent.offset + extent.length] = b"\1" * extent.length
    for at in range(0, len(after), 512):
        if after[at : at + 512] != before[at : at + 512] and not dirty[at]:
            raise Lost(f"the bitmap does not tell of a change at {at:#x}")


def checkpoint(rng: random.Random) -> Case:
    """In all of the images or in none."""
    machine = Machine()
    shapes = rng.sample([name for name in SHAPES if name != "v2"], 3)
    files = [machine.file(prepare(SIZE, **SHAPES[shape])) for shape in shapes]
    images = [qcow2x.open(file, "r+") for file in files]
    disks = [whole_disk(image) for image in images]
    qcow2x.checkpoint(images, "monday", granularity=512)
    done = machine.now
    for image in images:
        image.close()

    def verify(state: State) -> Files:
        left = [recorded(data) for data in state.files]
        found = [_reopened(file) for file in left]
        try:
            qcow2x.settle_checkpoints(found)
            have = {"monday" in image.bitmaps for image in found}
            if len(have) != 1 or (state.happened >= done and have != {True}):
                raise Lost("the checkpoint is in some of the images only")
            for image, disk in zip(found, disks, strict=True):
                sound(image)
                if whole_disk(image) != disk:
                    raise Lost("the disk changed")
        finally:
            for image in found:
                image.close()
        return {f"disk{n}.qcow2": file.data for n, file in enumerate(left)}

    return Case(machine, " ".join(shapes), verify)


# ---- Layers ----


class _Layers:
    """A chain of images in one machine, from the base up; each names the one below it."""

    def __init__(self, machine: Machine, start: dict[str, bytes]) -> None:
        self.names = list(start)
        self.files = {name: machine.file(data) for name, data in start.items()}

    def go_on(self) -> None:
        """Does nothing, but later: the cut that leaves just this leaves what is durable by then."""
        file = self.files[self.names[0]]
        file.truncate(file.size())

    def left_by(self, state: State) -> dict[str, RecordedFile]:
        return {name: recorded(data) for name, data in zip(self.names, state.files, strict=True)}


def _among(files: dict[str, RecordedFile]) -> dict[str, Any]:
    """How to open an image whose backing files are among these."""
    return {"references": lambda reference: files.get(reference.name)}


def _chain(rng: random.Random, *, depth: int) -> tuple[dict[str, bytes], str]:
    """``depth`` images one upon the other, each with data of its own, zeros over what is below, and
    a compressed cluster; and what they are. The base may be raw, any layer shorter than the next."""
    files: dict[str, RecordedFile] = {}
    shapes = [rng.choice(("raw", *SHAPES)), *rng.choices(tuple(SHAPES), k=depth - 1)]
    below: dict[str, Any] = {}
    for level, shape in enumerate(shapes):
        name = f"{level}.{'raw' if shape == 'raw' else 'qcow2'}"
        size = rng.choice((SIZE, SIZE, SIZE // 2 + 512, SIZE + 16 * KiB))
        if shape == "raw":
            files[name] = recorded(stamped(0, size, (level + 1) << 40))
        else:
            files[name] = file = recorded(b"")
            qcow2x.create(file, size, **SHAPES[shape], **below)
            with qcow2x.open(file, "r+", **_among(files)) as image:
                _change_here_and_there(image, rng, (level + 1) << 40)
        below = {"backing_file": name, "backing_format": name.split(".")[1]}
    return {name: bytes(file.data) for name, file in files.items()}, " ".join(shapes)


def _change_here_and_there(image: qcow2x.Image, rng: random.Random, sequence: int) -> None:
    for number in range(6):
        length = rng.randrange(1, 24) * 512
        offset = rng.randrange((image.size - length) // 512) * 512
        image.pwrite(stamped(offset, length, sequence + number), offset)
    cluster = image.cluster_size
    offset = rng.randrange(image.size // cluster) * cluster
    image.pwrite_compressed(stamped(offset, cluster, sequence + 6), offset)
    # Zeros that hide what the layers below have.
    image.write_zeroes(rng.randrange(image.size // 2 // 512) * 512, 20 * 512)


def commit(rng: random.Random) -> Case:
    """The overlay reads the same at every instant; once all is done so does its base."""
    start, detail = _chain(rng, depth=rng.choice((2, 3)))
    machine = Machine()
    chain = _Layers(machine, start)
    number = rng.randrange(1, len(chain.names))
    base, top = chain.names[-1 - number], chain.names[-1]
    with qcow2x.open(recorded(start[top]), **_among(chain.files)) as image:
        disk = whole_disk(image)
    drop = number > 1 or rng.random() < 0.3
    qcow2x.commit(
        chain.files[top],
        number if number > 1 else None,
        drop=drop,
        cache=rng.choice(CACHES),
        threads=1,
        **_among(chain.files),
    )
    done = machine.now
    chain.go_on()

    def verify(state: State) -> Files:
        files = chain.left_by(state)
        for name in chain.names:
            if name.endswith(".qcow2"):
                with _reopened(files[name], **_among(files)) as image:
                    sound(image)
        with qcow2x.open(files[top], **_among(files)) as image:
            if whole_disk(image) != disk:
                raise Lost("the overlay reads differently")
            if state.happened > done and not drop and any(e.depth == 0 for e in image.extents()):
                raise Lost("the overlay was emptied and is not empty")
        if state.happened > done and _read(files[base], base, files)[: len(disk)] != disk:
            raise Lost("the base has not all of it")
        return {name: file.data for name, file in files.items()}

    return Case(machine, f"{detail} into {base}{' dropped' if drop else ''}", verify)


def _read(file: RecordedFile, name: str, files: dict[str, RecordedFile]) -> bytes:
    if name.endswith(".raw"):
        return bytes(file.data)
    with qcow2x.open(file, **_among(files)) as image:
        return whole_disk(image)


def rebase(rng: random.Random) -> Case:
    """The image reads the same at every instant, whichever of the backing files it names."""
    start, detail = _chain(rng, depth=3)
    others, more = _chain(rng, depth=1)
    # Onto another file, onto the base of the old chain, or onto nothing.
    new = rng.choice(("other", "other", "base", "none"))
    ((other, content),) = others.items()
    start[f"a-new-and-much-longer-name.{other.split('.')[1]}"] = content
    machine = Machine()
    chain = _Layers(machine, start)
    base, top, other = chain.names[0], chain.names[2], chain.names[3]
    name = {"other": other, "base": base, "none": None}[new]
    with qcow2x.open(recorded(start[top]), **_among(chain.files)) as image:
        disk = whole_disk(image)
    compress = rng.random() < 0.3
    qcow2x.rebase(
        chain.files[top],
        name,
        backing_format=None if name is None else name.split(".")[1],
        compress=compress,
        cache=rng.choice(CACHES),
        threads=1,
        **_among(chain.files),
    )
    done = machine.now
    chain.go_on()

    def verify(state: State) -> Files:
        files = chain.left_by(state)
        with _reopened(files[top], **_among(files)) as image:
            sound(image)
            if whole_disk(image) != disk:
                raise Lost("the image reads differently")
            if state.happened > done and image.info().backing_filename != name:
                raise Lost("the backing file is not the new one")
        return {name: file.data for name, file in files.items()}

    return Case(machine, f"{detail} / {more}, {new}{' compressed' if compress else ''}", verify)


# ---- Key slots ----


def _luks(secret: str) -> Encryption:
    # The fewest iterations that are allowed: what is tested is the order of writes.
    return Encryption(key=secret, iter_time_ms=1)


def key_slots(rng: random.Random) -> Case:
    """At every instant some known passphrase opens the image, and an erased one never again."""
    start = recorded(b"")
    qcow2x.create(start, 8 * KiB, cluster_size=4096, encryption=_luks("one"))
    with qcow2x.open(start, "r+", key="one") as image:
        image.pwrite(stamped(0, 8 * KiB, 1), 0)
        disk = whole_disk(image)
    machine = Machine()
    file = machine.file(bytes(start.data))
    qcow2x.amend(file, key="one", new_key="two", iter_time_ms=1)
    added = machine.now
    qcow2x.amend(file, key="two", erase_key="one")
    erased = machine.now

    def verify(state: State) -> Files:
        opened = set()
        for secret in ("one", "two"):
            try:
                found = _reopened(recorded(state.files[0]), key=secret)
            except qcow2x.KeyRequired:
                continue
            with found:
                opened.add(secret)
                sound(found)
                if whole_disk(found) != disk:
                    raise Lost("the disk reads differently")
        if not opened or (state.happened >= added and "two" not in opened):
            raise Lost("no passphrase opens the image")
        if state.happened >= erased and "one" in opened:
            raise Lost("an erased passphrase opens the image")
        return {}

    return Case(machine, "LUKS", verify)


WORKLOADS: dict[str, Callable[[random.Random], Case]] = {
    "growth": growth,
    "growth, reserved and linked ahead": growth_ahead,
    "growth, over what was there before": growth_over_left_over,
    "growth, reserved as holes": growth_into_holes,
    "growth, several writes at a time": growth_together,
    "growth of refcount blocks and table": growth_of_refcounts,
    "writes of metadata that fail": failing_writes,
    "lazy refcounts": lazy_refcounts,
    "overwrite": overwrite,
    "many writes in one call": many_writes,
    "copy-on-write from a backing file": cow_from_backing,
    "copy-on-write from a snapshot": cow_from_snapshot,
    "compressed writes": compressed,
    "discard and reuse": discard_and_reuse,
    "encrypted guest": encrypted_guest,
    "external data file": external_data_file,
    "snapshot create": snapshot_create,
    "snapshot apply": snapshot_apply,
    "snapshot delete": snapshot_delete,
    "bitmaps": bitmaps,
    "checkpoint of three images": checkpoint,
    "commit": commit,
    "rebase": rebase,
    "resize": resize,
    "amend of the refcount width": amend_refcounts,
    "amend of version and features": amend_compat,
    "unknown autoclear feature": unknown_feature,
    "key slots": key_slots,
}

__all__ = [
    "COUNTING",
    "SHAPES",
    "WORKLOADS",
    "Case",
    "Corrupt",
    "Files",
    "Lost",
    "RecordedFile",
    "recorded",
    "sound",
    "whole_disk",
    "worn",
]
