"""``qcow2x check``: look for corruption and leaked clusters, repair them, undo a repair."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

from qcow2x.cli.objects import read_objects
from qcow2x.cli.opening import failure, open_disk, stored_in
from qcow2x.cli.options import (
    FORMAT,
    IMAGE_OPTS,
    OBJECT,
    OUTPUT,
    QUIET,
    SHARE,
    Option,
    UsageError,
    one_file,
    parse,
)
from qcow2x.cli.options import output_format as read_output_format
from qcow2x.cli.report import CommandError, program, report, tool
from qcow2x.cli.text import json_text

if TYPE_CHECKING:
    from qcow2x.cli.options import Parsed
    from qcow2x.types import CheckResult

OPTIONS = (
    QUIET,
    FORMAT,
    OUTPUT,
    Option("r", "repair", "WHAT", "repair: 'leaks', or 'all' that can be repaired"),
    Option("", "dry-run", None, "with -r: say what would be done, change nothing"),
    Option("", "journal", "FILE", "with -r: where the old bytes go (-r all: FILE.qcow2x-undo)"),
    Option("", "no-journal", None, "with -r all: keep no old bytes"),
    Option("", "undo", "JOURNAL", "put the old bytes back that a repair has kept"),
    Option("", "force", None, "with --undo: even if the image was written to since"),
    Option("T", "src-cache", "MODE", "cache mode for reading the image"),
    SHARE,
    OBJECT,
    IMAGE_OPTS,
)
USAGE = (
    "[--object OBJECT] [--image-opts] [-q] [-f FMT] [--output=human|json] [-r leaks|all [--dry-run] [--journal FILE|--no-journal]] "
    "[--undo JOURNAL [--force]] [-T MODE] [-U] FILE"
)
OPERANDS = (("FILE", "the image"),)

EXIT_CORRUPT = 2
EXIT_LEAKS = 3
EXIT_NOT_SUPPORTED = 63


def main(argv: list[str]) -> int:
    parsed = parse("check", USAGE, OPTIONS, argv, OPERANDS)
    repair = parsed.value("repair")
    if repair not in (None, "leaks", "all"):
        raise UsageError(f"Unknown option value for -r (expecting 'leaks' or 'all'): {repair}")
    path = one_file(parsed)
    style = read_output_format(parsed)
    if parsed.value("undo") is not None:
        return _undo(parsed, path)
    if repair is None and (parsed.flag("dry-run") or parsed.value("journal") is not None):
        raise UsageError("--dry-run and --journal go with -r")
    cache = parsed.value("src-cache", "writeback") or ""
    from qcow2x.drivers.opening import CACHE_FLAGS

    if cache not in CACHE_FLAGS:
        raise CommandError(f"Invalid source cache option: {cache}")
    dry_run = parsed.flag("dry-run")
    with open_disk(
        path,
        parsed.value("format"),
        image_opts=parsed.flag("image-opts"),
        secrets=read_objects(parsed.values("object")),
        force_share=parsed.flag("force-share"),
        writable=repair is not None and not dry_run,
        cache=cache,
        # What only reads or corrects the tables needs neither a key nor what lies below.
        io=False,
        checking=True,
        backing=False,
    ) as node:
        if node.driver != "qcow2":
            report("This image format does not support checks")
            return EXIT_NOT_SUPPORTED
        journal = None if dry_run else _journal(parsed, path)
        try:
            result = _look(node.children["file"].storage, repair, dry_run, journal)
        except Exception as exc:
            raise failure(exc, name=stored_in(node)) from exc
        if repair != "all":
            _refuse_snapshot_table(result)
        _print_findings(result, repair, dry_run)
        if journal is not None and os.path.exists(journal):
            report(
                f"what the repair has changed is kept in {journal}; to undo it: "
                f"{program()} check --undo {journal} {path}"
            )
        if style == "json" and not parsed.flag("quiet"):
            print(json_text(_in_qemu_order(_members(path, node.driver, result))))
        elif not parsed.flag("quiet"):
            _print_human(result)
    if result.check_errors:
        raise CommandError("Check failed")
    if result.corruptions:
        return EXIT_CORRUPT
    return EXIT_LEAKS if result.leaks else 0


def _look(storage: Any, repair: str | None, dry_run: bool, journal: str | None) -> CheckResult:
    from qcow2x.ops.check import check_storage, load_header

    header = load_header(storage, repair == "all")
    return check_storage(storage, header, repair=repair, dry_run=dry_run, journal=journal)


def _refuse_snapshot_table(result: CheckResult) -> None:
    """Ends a check of an image whose snapshot table is past the limits, as qemu-img does: what only
    the dropped snapshots hold would be told as leaked."""
    from qcow2x.cli.checktext import snapshot_table_error

    for finding in result.findings:
        text = snapshot_table_error(finding)
        if text is not None:
            report(text)
            raise CommandError("Check failed: File too large")


def _journal(parsed: Parsed, path: str) -> str | None:
    from qcow2x.ops.undo import default_journal

    named = parsed.value("journal")
    if named is not None or parsed.value("repair") != "all" or parsed.flag("no-journal"):
        return named
    # qemu-img keeps nothing, and who calls its stand-in expects no new files.
    return default_journal(path) if tool() == "qcow2x" else None


def _undo(parsed: Parsed, path: str) -> int:
    from qcow2x.ops.undo import undo_repair

    if parsed.value("repair") is not None:
        raise UsageError("--undo and -r exclude each other")
    done = undo_repair(
        path,
        parsed.value("undo") or "",
        force=parsed.flag("force"),
        lock=not parsed.flag("force-share"),
    )
    if not parsed.flag("quiet"):
        print("The image is what it was." if done else "The repair never began: nothing to undo.")
    return 0


def _print_findings(result: CheckResult, repair: str | None, dry_run: bool) -> None:
    from qcow2x.cli.checktext import check_lines, repair_lines

    if dry_run:
        for finding in result.findings:
            told = f"{finding.message} (offset {finding.offset:#x}"
            if finding.guest_offset is not None:
                told += f", guest offset {finding.guest_offset:#x}"
            told += ")" if finding.action is None else f"): {finding.action}"
            print(told, file=sys.stderr)
        return
    if repair is None:
        lines = check_lines(result.findings, result.cluster_size)
    else:
        lines = repair_lines(result, repair)
    for line in lines:
        print(line, file=sys.stderr)
    if result.corruptions_fixed or result.leaks_fixed:
        # The second look.
        for line in check_lines(result.left, result.cluster_size):
            print(line, file=sys.stderr)


def _in_qemu_order(members: dict[str, Any]) -> dict[str, Any]:
    from qcow2x.drivers.naming import in_qemu_order

    return {key: members[key] for key in in_qemu_order(list(members))}


def _members(path: str, format: str, result: Any) -> dict[str, Any]:
    """The members of QEMU's ``ImageCheck`` in its order; counts of 0 are left out, as it does."""
    counts = {
        "image-end-offset": result.image_end_offset,
        "compressed-clusters": result.compressed_clusters,
        "total-clusters": result.total_clusters,
        "corruptions": result.corruptions,
        "corruptions-fixed": result.corruptions_fixed,
        "check-errors": result.check_errors,
        "leaks": result.leaks,
        "leaks-fixed": result.leaks_fixed,
        "allocated-clusters": result.allocated_clusters,
    }
    members: dict[str, Any] = {k: v for k, v in counts.items() if v or k == "check-errors"}
    members["filename"] = path
    members["format"] = format
    if result.fragmented_clusters:
        members["fragmented-clusters"] = result.fragmented_clusters
    return members


def _print_human(result: Any) -> None:
    if result.corruptions_fixed or result.leaks_fixed:
        print("The following inconsistencies were found and repaired:\n")
        print(f"    {result.leaks_fixed} leaked clusters")
        print(f"    {result.corruptions_fixed} corruptions\n")
        print("Double checking the fixed image now...")
    if result.clean:
        print("No errors were found on the image.")
    if result.corruptions:
        print(f"\n{result.corruptions} errors were found on the image.")
        print("Data may be corrupted, or further writes to the image may corrupt it.")
    if result.leaks:
        print(f"\n{result.leaks} leaked clusters were found on the image.")
        print("This means waste of disk space, but no harm to data.")
    if result.check_errors:
        print(f"\n{result.check_errors} internal errors have occurred during the check.")
    total, used = result.total_clusters, result.allocated_clusters
    if total and used:
        print(
            f"{used}/{total} = {100 * used / total:.2f}% allocated, "
            f"{100 * result.fragmented_clusters / used:.2f}% fragmented, "
            f"{100 * result.compressed_clusters / used:.2f}% compressed clusters"
        )
    if result.image_end_offset:
        print(f"Image end offset: {result.image_end_offset}")
