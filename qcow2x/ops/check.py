"""Check and repair of whole images, also of those that cannot be opened for writing.

A repair is planned on an overlay (:mod:`qcow2x.ops.overlay`): entries that are wrong by themselves
first, then places for refcounts, then the refcounts and COPIED flags, then a second look at the
outcome. Only then are the old bytes saved and the file changed.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable

from qcow2x._core.check import Checker
from qcow2x._core.header import Header
from qcow2x._core.repair import EntryFixer, RefcountFixer
from qcow2x.errors import CorruptImage, FormatError
from qcow2x.locking import lock_image
from qcow2x.ops.mend import Mender, Space
from qcow2x.ops.overlay import Overlay
from qcow2x.ops.undo import Journal
from qcow2x.snapshot import MAX_SNAPSHOTS
from qcow2x.storage import PyStorage, Source, Storage, open_storage
from qcow2x.types import CheckResult, Finding, Progress

REPAIRS = (None, "leaks", "all")
_PAGE = 4096
_OFFSET_MASK = 0xFFFFFFFFFFFFFE00
# Header fields with which a wrong place of the refcount table is reported (the L1 table's offset, if
# the two overlap): the table can be made anew.
_RT_FIELDS = (40, 48, 56)
_NB_SNAPSHOTS = 60


def check(
    source: Source,
    *,
    repair: str | None = None,
    dry_run: bool = False,
    journal: str | os.PathLike[str] | None = None,
    lock: bool = True,
    cache: str = "writeback",
    progress: Progress | None = None,
) -> CheckResult:
    """Checks an image, every table against every other, and repairs it if asked to.

    ``repair="leaks"`` lowers refcounts that are too high, and nothing where damage was found that
    may hide what uses the clusters. ``repair="all"`` also raises refcounts, makes refcount blocks
    and table anew where they are missing or damaged, corrects COPIED flags and entries that are
    wrong by themselves, the snapshot table and the bitmap directory, and clears the dirty and the
    corrupt bit when all is well. What the guest can read stays as it is, and what reads as an
    error keeps doing so. Works on images that :func:`qcow2x.open` refuses to write to.

    ``dry_run`` changes nothing: each finding's ``action`` says what would be done. ``journal``
    names a new file that takes the old bytes first; see :func:`qcow2x.undo_repair`.

    The counts are those that are left, the findings those of the first look; what was repaired is
    ``fixed``. ``progress(done, total, phase)`` counts bytes of metadata; returning False raises
    Cancelled, before anything was changed. A check takes at most 96 MiB and 40 bytes per L2 table;
    a repair besides that some 100 bytes per 4 KiB of metadata that it changes.

    Raises FormatError and UnsupportedFeature for what is no image or has features unknown here,
    ImageLocked, PermissionError, FileExistsError (the journal), OSError.
    """
    _check_arguments(repair, dry_run, journal)
    writable = repair is not None and not dry_run
    storage = open_storage(source, writable=writable, cache=cache)
    held = None
    try:
        held = lock_image(storage, writable) if lock else None
        header = load_header(storage, repair == "all")
        header.require_supported(storage.name)
        return check_storage(
            storage, header, repair=repair, dry_run=dry_run, journal=journal, progress=progress
        )
    finally:
        if held is not None:
            held.release()
        if storage is not source:
            storage.close()


def check_storage(
    storage: Storage,
    header: Header,
    *,
    repair: str | None = None,
    dry_run: bool = False,
    journal: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> CheckResult:
    """:func:`check` of an open storage. What else has it open must drop what it has cached."""
    _check_arguments(repair, dry_run, journal)
    if repair is not None and not dry_run and not storage.writable:
        raise PermissionError(f"{storage.name}: is open read-only and cannot be repaired")
    looked = Checker(storage, header, progress).check()
    before = looked.result()
    if repair is None:
        return before
    outdated = header.dirty or header.corrupt or header.has_unknown_autoclear
    if before.clean and not outdated:
        return before
    if repair == "leaks" and not before.clean and (not before.leaks or looked.refs_uncertain):
        return before
    plan = _Repair(storage, header, looked, repair, progress)
    try:
        after = plan.make()
        if not dry_run and plan.overlay.changed:
            plan.carry_out(journal)
        return plan.outcome(before, after, dry_run)
    finally:
        plan.overlay.close()


def rebuild_refcounts(storage: Storage, header: Header) -> CheckResult:
    """Makes every refcount and COPIED flag what the tables say, and clears the dirty bit.

    For an image that was not closed after its refcounts began to lag behind (section "Header",
    dirty bit). The file changes in an order that lets a second attempt follow a crash at any
    point; the header must be loaded again afterwards. Raises CorruptImage, with nothing changed,
    where other damage is found: that takes a repair.
    """
    looked = Checker(storage, header).check()
    plan = _Repair(storage, header, looked, "refcounts", None)
    try:
        after = plan.make()
        if after.corruptions or after.check_errors:
            exc = CorruptImage(
                f"{storage.name}: was not closed, and is damaged beyond its refcounts "
                f"({after.corruptions} corruptions, {after.check_errors} errors): repair it "
                'with qcow2x.check(..., repair="all") before writing'
            )
            exc.path = storage.name
            raise exc
        plan.carry_out(None)
        return plan.outcome(looked.result(), after, False)
    finally:
        plan.overlay.close()


def load_header(storage: Storage, without_refcounts: bool = False) -> Header:
    """The header, for a look at the image. Of more snapshots than there may be it has the first
    :data:`~qcow2x.snapshot.MAX_SNAPSHOTS`. With ``without_refcounts`` also where the refcount table
    it names is nowhere: the header then says that there is none."""

    def pread(nbytes: int, at: int) -> bytes:
        return (
            _without_overhang(storage.pread(nbytes, at)) if at == 0 else storage.pread(nbytes, at)
        )

    try:
        return Header.load(pread, storage.size(), storage.name)
    except FormatError as exc:
        if not without_refcounts or exc.offset not in _RT_FIELDS:
            raise
    except CorruptImage as exc:
        if not without_refcounts or exc.offset not in _RT_FIELDS:
            raise
    size = storage.size()
    header = Header.parse(pread(min(size, 2 << 20), 0), None, storage.name)
    # All else must be in order. The new table will stand right behind the file.
    end = -(-size // header.cluster_size) * header.cluster_size
    header.set_tables(end, 1, header.l1_offset, header.l1_size)
    header.validate(end + header.cluster_size, storage.name)
    header.set_tables(0, 0, header.l1_offset, header.l1_size)
    return header


def _without_overhang(first: bytes) -> bytes:
    """The first bytes of a file, saying of no more snapshots than there may be."""
    end = _NB_SNAPSHOTS + 4
    if int.from_bytes(first[_NB_SNAPSHOTS:end], "big") <= MAX_SNAPSHOTS:
        return first
    return first[:_NB_SNAPSHOTS] + struct.pack(">I", MAX_SNAPSHOTS) + first[end:]


def _check_arguments(repair: str | None, dry_run: bool, journal: object) -> None:
    if repair not in REPAIRS:
        raise ValueError(f'repair must be None, "leaks" or "all", not {repair!r}')
    if repair is None and (dry_run or journal is not None):
        raise ValueError("dry_run and journal go with a repair")


class _Repair:
    """One repair: planned by make(), done by carry_out()."""

    def __init__(
        self,
        storage: Storage,
        header: Header,
        looked: Checker,
        scope: str,
        progress: Progress | None,
    ) -> None:
        self.overlay = Overlay(storage, min(_PAGE, header.cluster_size))
        self._view = PyStorage(self.overlay)
        self._storage = storage
        self._header = header
        self._looked = looked
        self._scope = scope
        self._progress = progress
        # What lies where something else lies is made anew even if that moves away: until it has, the
        # place must not be written to.
        self._flags_wrong = looked.wrong_flags
        self._spoiled = [i for i, (_, good) in enumerate(looked.refcount_table()) if not good]
        self._rt_spoiled = looked.rt_shared
        # Where a cluster in use counts as free the refcounts are worth nothing: new ones are made in
        # another place, and one write of the header takes them into use.
        self._anew = looked.refcounts_lost
        self._rebuilt = False
        self._released: list[int] = []
        self._space = Space(self.overlay, storage, header.cluster_size, looked.end_of_use)

    def make(self) -> CheckResult:
        """Plans everything; returns what a check will find when it is done."""
        found = self._looked.result()
        self._mender().clear_unknown_autoclear()
        if self._scope == "all" and (found.corruptions or found.check_errors):
            self._mend_entries()
        if self._scope != "leaks":
            self._place_refcounts()
        # An entry without the flag costs a copy too many, one with it a copy too few: flags are
        # corrected together with the refcounts, if nothing else is wrong or all is repaired.
        fixer = RefcountFixer(self._view, self._header, self._progress, "repair")
        fixer.fix(
            self.overlay.write,
            self._scope != "leaks",
            not self._looked.refs_hidden,
            self._scope != "leaks" or not found.corruptions,
            self._looked.shared_l2,
        )
        self._flags_set = fixer.flags_set
        self._flag_changes = sorted(
            fixer.flag_changes, key=lambda change: (change.guest_offset, change.structure)
        )
        looked = Checker(self._view, self._header, self._progress, "verify").check()
        self._flags_left = looked.wrong_flags
        verified = looked.result()
        if not verified.corruptions and not verified.check_errors:
            self._mender().mark_sound()
        return verified

    def carry_out(self, journal: str | os.PathLike[str] | None) -> None:
        """Saves the old bytes, if so wanted, and changes the file."""
        kept = Journal(journal, self.overlay) if journal is not None else None
        try:
            self.overlay.apply()
            if kept is not None:
                kept.complete()
        finally:
            if kept is not None:
                kept.close()

    def outcome(self, before: CheckResult, after: CheckResult, dry_run: bool) -> CheckResult:
        """What is left, and the findings of the first look with what became of each."""
        left = {_key(found) for found in after.findings}
        findings: list[Finding] = []
        for found in before.findings:
            if _key(found) in left:
                findings.append(found._replace(action=None))
            else:
                findings.append(found._replace(fixed=not dry_run))
        known = {_key(found) for found in before.findings}
        findings.extend(_without_action(f for f in after.findings if _key(f) not in known))
        if dry_run:
            return before._replace(findings=findings[: CheckResult.MAX_FINDINGS])
        # As QEMU counts: flags that were changed, which may be other ones than those that did not
        # match the refcounts as they were.
        fixed = before.corruptions - self._flags_wrong - (after.corruptions - self._flags_left)
        return after._replace(
            corruptions_fixed=max(0, fixed + self._flags_set),
            leaks_fixed=max(0, before.leaks - after.leaks),
            findings=findings[: CheckResult.MAX_FINDINGS],
            left=after.findings,
            flag_changes=self._flag_changes,
            rebuilt=self._rebuilt,
            released=self._released,
        )

    def _mender(self) -> Mender:
        return Mender(self.overlay, self._header, self._space)

    def _look_again(self) -> None:
        # A header without a refcount table stays one until the table is placed.
        self._header = load_header(self._view, True)
        self._looked = Checker(self._view, self._header, self._progress, "check").check()

    def _mend_entries(self) -> None:
        mender = self._mender()
        if mender.mend_snapshot_table(self._looked):
            self._look_again()
            mender = self._mender()
        if mender.part_disk_l1(self._looked):
            self._look_again()
            mender = self._mender()
        moved = mender.part_l2_tables(self._looked)
        backed = self._header.backing_file is not None
        # It reads through the view, as the tables may lie where others have been changed.
        EntryFixer(
            self._looked,
            self._view,
            self.overlay.write,
            moved,
            (lambda: self._space.take(1)) if backed else None,
        ).fix()
        mender.mend_bitmaps()
        if self.overlay.changed:
            self._look_again()

    def _place_refcounts(self) -> None:
        looked = self._looked
        table = looked.refcount_table()
        damaged = {i for i, (_, good) in enumerate(table) if not good}
        spoiled = {*self._spoiled, *damaged}
        rt_spoiled = self._rt_spoiled or looked.rt_shared or not table
        if self._anew and table:
            spoiled |= {i for i, (entry, _) in enumerate(table) if entry}
            rt_spoiled = True
        if not (spoiled or rt_spoiled or looked.missing_blocks):
            return
        old = self._header
        self._mender().place_refcounts(looked, spoiled, rt_spoiled)
        self._header = load_header(self._view)
        self._rebuilt = bool(spoiled or rt_spoiled or looked.refcounts_lost)
        self._released = _clusters_of_refcounts(old, table, spoiled, rt_spoiled)


def _clusters_of_refcounts(
    header: Header, table: list[tuple[int, bool]], blocks: set[int], with_table: bool
) -> list[int]:
    """The clusters that held refcounts which now stand elsewhere, as far as these were sound."""
    cluster = header.cluster_size
    found = {
        (entry & _OFFSET_MASK) // cluster
        for i, (entry, good) in enumerate(table)
        if i in blocks and good and entry
    }
    if with_table:
        first = header.refcount_table_offset // cluster
        found |= set(range(first, first + header.refcount_table_clusters))
    return sorted(found)


def _without_action(findings: Iterable[Finding]) -> Iterable[Finding]:
    return (found._replace(action=None) for found in findings)


def _key(found: Finding) -> tuple[str, int, int | None]:
    return found.message, found.offset, found.guest_offset
