"""What a check says of each thing that it finds, in the words and the order of qemu-img.

qemu-img looks three times: at what the tables refer to, at the refcounts, at the COPIED flags. A
repair says again what it does about each refcount and flag.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from qcow2x.types import CheckResult, Finding

_REFCOUNTS = ("refcount-low", "leak")
_FLAGS = ("l1-copied", "l2-copied")
#: What qemu-img says on the way whether or not it repairs: "Repairing" where it does at once.
_REPAIRED_AT_ONCE = ("zero-misaligned", "refblock-beyond-end", "snapshot-incomplete")

_TEXTS: dict[str, Callable[[Finding], str]] = {
    "beyond-end": lambda f: (
        "ERROR: counting reference for region exceeding the end of the file by one cluster or "
        f"more: offset {f.offset:#x} size {f.found:#x}"
    ),
    "overflow": lambda f: (
        f"ERROR: overflow cluster offset={f.offset:#x}\n"
        "Use qemu-img amend to increase the refcount entry width or qemu-img convert to create a "
        "clean copy if the image cannot be opened for writing"
    ),
    "l1-reserved": lambda f: f"ERROR found L1 entry with reserved bits set: {f.found:x}",
    "l1-misaligned": lambda f: (
        f"ERROR l2_offset={f.offset:x}: Table is not cluster aligned; L1 entry corrupted"
    ),
    "l2-reserved": lambda f: f"ERROR found l2 entry with reserved bits set: {f.found:x}",
    "compressed-copied": lambda f: (
        f"ERROR: coffset={f.offset:#x}: copied flag must never be set for compressed clusters"
    ),
    "compressed-in-data-file": lambda f: (
        f"ERROR compressed cluster {f.index} with data file, entry={f.found:#x}"
    ),
    "compressed-bitmap": lambda f: (
        f"ERROR compressed cluster {f.index} with non-zero subcluster allocation bitmap, "
        f"entry={f.found:#x}"
    ),
    "bitmap-contradicts": lambda f: (
        f"ERROR offset={f.offset:x}: Allocated cluster has corrupted subcluster allocation bitmap"
    ),
    "bitmap-without-cluster": lambda _: (
        "ERROR: Unallocated cluster has non-zero subcluster allocation map"
    ),
    "data-misaligned": lambda f: (
        f"ERROR offset={f.offset:x}: Data cluster is not properly aligned; L2 entry corrupted."
    ),
    "zero-misaligned": lambda f: (
        f"ERROR offset={f.offset:x}: Preallocated cluster is not properly aligned; "
        "L2 entry corrupted."
    ),
    "l1-copied": lambda f: (
        f"ERROR OFLAG_COPIED L2 cluster: l1_index={f.index} l1_entry={f.found:x} "
        f"refcount={f.refcount}"
    ),
    "l2-copied": lambda f: (
        f"ERROR OFLAG_COPIED data cluster: l2_entry={f.found:x} refcount={f.refcount}"
    ),
    "reftable-reserved": lambda f: f"ERROR refcount table entry {f.index} has reserved bits set",
    "refblock-misaligned": lambda f: (
        f"ERROR refcount block {f.index} is not cluster aligned; refcount table entry corrupted"
    ),
    "refblock-beyond-end": lambda f: f"ERROR refcount block {f.index} is outside image",
    "refblock-shared": lambda f: f"ERROR refcount block {f.index} refcount={f.found}",
    "snapshot-l1": lambda f: (
        f"ERROR snapshot {f.subject} l1_size={f.found:#x}: L1 table is too large; "
        "snapshot table entry corrupted"
        if f.found is not None and f.found > _MAX_L1_ENTRIES
        else f"ERROR snapshot {f.subject} l1_offset={f.offset:#x}: L1 table is not cluster "
        "aligned; snapshot table entry corrupted"
    ),
    "snapshot-incomplete": lambda f: f"ERROR snapshot table entry {f.index} is incomplete",
    "snapshot-data-file": lambda f: f"ERROR {f.found} snapshots in image with data file",
    "snapshot-extra": lambda f: (
        f"Discarding too much extra metadata in snapshot table entry {f.index} "
        f"({f.found} > {f.expected})"
    ),
    "snapshots-too-big": lambda f: (
        f"Discarding {_overhang(f)} overhanging snapshots (snapshot table is too big)"
    ),
    "snapshots-too-many": lambda f: f"Discarding {_overhang(f)} overhanging snapshots",
    "read-error": lambda f: f"ERROR: I/O error at offset {f.offset:#x}: {f.message}",
}
_MAX_L1_ENTRIES = (32 << 20) // 8


def _overhang(finding: Finding) -> int:
    return (finding.found or 0) - (finding.expected or 0)


def snapshot_table_error(finding: Finding) -> str | None:
    """What ends a check that may not repair; None for any other finding."""
    failed = "ERROR failed to read the snapshot table: "
    remove = f"You can force-remove all {_overhang(finding)} overhanging snapshots"
    if finding.code == "snapshot-extra":
        failed += f"Too much extra metadata in snapshot table entry {finding.index}"
        remove = "You can force-remove this extra metadata"
    elif finding.code == "snapshots-too-big":
        failed += "Snapshot table is too big"
    elif finding.code == "snapshots-too-many":
        failed = "ERROR snapshot table too large"
    else:
        return None
    return f"{failed}\n{remove} with qemu-img check -r all"


def check_lines(findings: Iterable[Finding], cluster_size: int) -> Iterator[str]:
    """What a look without repair says."""
    yield from _reference_lines(findings, repairing=False)
    yield from _refcount_lines(findings, cluster_size, ("ERROR", "Leaked"))
    yield from _flag_lines(findings)


def repair_lines(result: CheckResult, repair: str) -> Iterator[str]:
    """What a repair (``"leaks"`` or ``"all"``) says, up to the second look."""
    found, left, cluster_size = result.findings, result.left, result.cluster_size
    yield from _reference_lines(found, repairing=repair == "all")
    yield from _refcount_lines(found, cluster_size, ("ERROR", "Leaked"))
    if result.rebuilt:
        yield "Rebuilding refcount structure"
        yield from _reference_lines(left, repairing=False)
        for cluster in result.released:
            yield f"Repairing cluster {cluster} refcount=1 reference=0"
    else:
        yield from _refcount_lines(
            found, cluster_size, ("Repairing" if repair == "all" else "ERROR", "Repairing")
        )
    for change in result.flag_changes:
        if change.structure == "l1":
            what = f"L2 cluster: l1_index={change.index} l1_entry={change.entry:x}"
        else:
            what = f"data cluster: l2_entry={change.entry:x}"
        yield f"Repairing OFLAG_COPIED {what} refcount={change.refcount}"
    yield from _flag_lines(left)


def _reference_lines(findings: Iterable[Finding], *, repairing: bool) -> Iterator[str]:
    for finding in findings:
        if finding.code in _REFCOUNTS + _FLAGS + ("refblock-unreadable",):
            continue
        text = _text(finding)
        if repairing and finding.code in _REPAIRED_AT_ONCE:
            text = text.replace("ERROR", "Repairing", 1)
        yield text


def _refcount_lines(
    findings: Iterable[Finding], cluster_size: int, words: tuple[str, str]
) -> Iterator[str]:
    """``words``: what is done about a refcount that is too low, and about one that is too high."""
    for finding in findings:
        if finding.code in _REFCOUNTS:
            word = words[finding.code == "leak"]
            yield (
                f"{word} cluster {finding.offset // cluster_size} refcount={finding.found} "
                f"reference={finding.expected}"
            )
        elif finding.code == "refblock-unreadable":
            yield _text(finding)


def _flag_lines(findings: Iterable[Finding]) -> Iterator[str]:
    flags = [finding for finding in findings if finding.code in _FLAGS]
    flags.sort(key=lambda finding: (finding.guest_offset or 0, finding.structure))
    for finding in flags:
        yield _text(finding)


def _text(finding: Finding) -> str:
    told = _TEXTS.get(finding.code)
    if told is not None:
        return told(finding)
    # Nothing that qemu-img has words for.
    text = f"ERROR {finding.message} (offset {finding.offset:#x}"
    if finding.guest_offset is not None:
        text += f", guest offset {finding.guest_offset:#x}"
    return text + ")"
