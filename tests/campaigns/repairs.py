"""Repairs and their undo journals, interrupted: a kind of work of its own, beside workloads.py."""

from __future__ import annotations

import random
import struct
import tempfile
from pathlib import Path

import qcow2x
from campaigns.power import Machine, RecordedFile, State
from campaigns.workloads import (
    COUNTING,
    Case,
    Corrupt,
    Files,
    Lost,
    recorded,
    sound,
    whole_disk,
    worn,
)


def repair(rng: random.Random) -> Case:
    """A repair that was cut short can be done again, and shows what it would have shown; or it can be
    undone, also once it is complete, and the file is as it was, byte for byte. The image shows the
    guest at every instant what it showed before, and nothing is damaged that was not."""
    shape = rng.choice(COUNTING)
    start = harmed(rng, shape)
    machine = Machine()
    file = machine.file(start)
    with qcow2x.open(recorded(start)) as image:
        before = whole_disk(image)
    # The journal is synced before the first call and completed after the last.
    complete = _repaired_with_journal(file)
    done = machine.now
    unfinished = complete[: -len(_DONE)]

    def verify(state: State) -> Files:
        left = state.files[0]
        if state.happened < done:
            _reads_as_before(left, before)
        again = recorded(left)
        found = qcow2x.check(again, repair="all") if state.happened < done else None
        with qcow2x.open(again) as image:
            sound(image)
            if found is not None and not found.clean:
                raise Corrupt(f"a second repair leaves {found.corruptions} corruptions")
            if whole_disk(image) != before:
                raise Lost("the repair changed what the guest reads")
        for journal in [unfinished, *([complete] if state.happened >= done else [])]:
            if _undone(left, journal) != start:
                raise Lost("undoing the repair did not bring back the file as it was")
        return {"disk.qcow2": again.data}

    return Case(machine, shape, verify)


def repair_undone(rng: random.Random) -> Case:
    """Undoing is cut short: it can be done again, or given up for another repair."""
    shape = rng.choice(COUNTING)
    start = harmed(rng, shape)
    with qcow2x.open(recorded(start)) as image:
        before = whole_disk(image)
    repaired = recorded(start)
    journal = _repaired_with_journal(repaired)
    if rng.random() < 0.5:
        # The repair was itself cut short: some of its calls happened.
        machine = repaired._machine
        state = rng.choice(list(machine.states(rng, 4)))
        begun, journal = state.files[0], journal[: -len(_DONE)]
    else:
        begun = bytes(repaired.data)
    machine = Machine()
    file = machine.file(begun)
    undone = _journal_after_undo(file, journal)
    done = machine.now
    if bytes(file.data) != start:
        raise Lost("undoing the repair did not bring back the file as it was")

    def verify(state: State) -> Files:
        left = state.files[0]
        if state.happened >= done and left != start:
            raise Lost("the undo was acknowledged and is not there")
        if _undone(left, undone) != start:
            raise Lost("undoing a second time did not bring back the file as it was")
        again = recorded(left)
        qcow2x.check(again, repair="all")
        with qcow2x.open(again) as image:
            sound(image)
            if whole_disk(image) != before:
                raise Lost("a repair after an undo changed what the guest reads")
        return {"disk.qcow2": again.data}

    return Case(machine, shape, verify)


#: What a journal ends with once its repair is complete.
_DONE = b"DONE"


def harmed(rng: random.Random, shape: str) -> bytes:
    """An image with several kinds of damage that a repair can mend without loss."""
    image = bytearray(worn(rng, shape))
    kinds = (_spoil_refcounts, _claim_a_table, _forget_refcounts, _forget_copied_flags)
    # In any order: what one looks for may be gone by another.
    for harm in rng.sample(kinds, rng.randint(2, len(kinds))):
        harm(image, rng)
    return bytes(image)


def _first_block(image: bytearray) -> tuple[int, int]:
    """Where the refcount table lies, and what its first entry names."""
    (table,) = struct.unpack_from(">Q", image, 48)
    return table, struct.unpack_from(">Q", image, table)[0]


def _spoil_refcounts(image: bytearray, rng: random.Random) -> None:
    """Refcounts are what a repair can always tell anew: some become noise."""
    _, block = _first_block(image)
    cluster = 1 << image[23]
    for _ in range(rng.randrange(1, 12) if block else 0):
        image[block + rng.randrange(min(cluster, len(image) - block))] = rng.randrange(256)


def _forget_refcounts(image: bytearray, rng: random.Random) -> None:
    """No first block at all: the repair writes a new one."""
    table, _ = _first_block(image)
    struct.pack_into(">Q", image, table, 0)


def _forget_copied_flags(image: bytearray, rng: random.Random) -> None:
    """Entries of the first L2 table lose the flag that says that no one shares their cluster."""
    (l1,) = struct.unpack_from(">Q", image, 40)
    (entry,) = struct.unpack_from(">Q", image, l1)
    table = entry & (1 << 56) - 512
    extended = image[7] == 3 and image[79] & 16
    for _ in range(6):
        at = table + rng.randrange(8) * (16 if extended else 8)
        image[at] &= 0x7F


def _repaired_with_journal(file: RecordedFile) -> bytes:
    """Repairs the image; returns the journal."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "undo")
        qcow2x.check(file, repair="all", journal=path)
        # A repair that had nothing to change writes none.
        return path.read_bytes() if path.exists() else b""


def _journal_after_undo(file: RecordedFile, journal: bytes) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "undo")
        path.write_bytes(journal)
        if journal and not qcow2x.undo_repair(file, path):
            raise Lost("a journal that was whole is called unfinished")
        return path.read_bytes()


def _undone(left: bytes, journal: bytes) -> bytes:
    file = recorded(left)
    _journal_after_undo(file, journal)
    return bytes(file.data)


def _reads_as_before(left: bytes, before: bytes) -> None:
    """While a repair is under way, whoever only reads sees what was there before."""
    with qcow2x.open(recorded(left)) as image:
        if whole_disk(image) != before:
            raise Lost("half of a repair changes what the guest reads")


def _claim_a_table(image: bytearray, rng: random.Random) -> None:
    """An L2 table lies in a cluster that the guest can read as well: the repair copies it."""
    entries, l1 = struct.unpack_from(">IQ", image, 36)
    if entries > 1:
        one, other = struct.unpack_from(">QQ", image, l1)
        struct.pack_into(">Q", image, (one & (1 << 56) - 512) + 24, other)
