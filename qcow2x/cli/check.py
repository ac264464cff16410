"""``qcow2x check``: look for corruption and leaked clusters, repair them, undo a repair."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

from qcow2x.cli.options import FORMAT, OUTPUT, QUIET, SHARE, Option, UsageError, one_file, parse
from qcow2x.cli.options import output_format as read_output_format
from qcow2x.cli.report import program, report
from qcow2x.cli.text import json_text

if TYPE_CHECKING:
    from qcow2x.cli.options import Parsed

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
)
USAGE = (
    "[-q] [-f FMT] [--output=human|json] [-r leaks|all [--dry-run] [--journal FILE|--no-journal]] "
    "[--undo JOURNAL [--force]] [-T MODE] [-U] FILE"
)

EXIT_CORRUPT = 2
EXIT_LEAKS = 3
EXIT_NOT_SUPPORTED = 63


def main(argv: list[str]) -> int:
    from qcow2x.ops.check import check
    from qcow2x.ops.disk import probe_format

    parsed = parse("check", USAGE, OPTIONS, argv)
    style = read_output_format(parsed)
    repair = parsed.value("repair")
    if repair not in (None, "leaks", "all"):
        raise UsageError(f"Unknown option value for -r (expecting 'leaks' or 'all'): {repair}")
    path = one_file(parsed)
    if parsed.value("undo") is not None:
        return _undo(parsed, path)
    if repair is None and (parsed.flag("dry-run") or parsed.value("journal") is not None):
        raise UsageError("--dry-run and --journal go with -r")
    format = parsed.value("format") or probe_format(path)
    if format != "qcow2":
        report("This image format does not support checks")
        return EXIT_NOT_SUPPORTED
    dry_run = parsed.flag("dry-run")
    journal = None if dry_run else _journal(parsed, path)
    result = check(
        path,
        repair=repair,
        dry_run=dry_run,
        journal=journal,
        cache=parsed.value("src-cache", "writeback") or "",
        lock=not parsed.flag("force-share"),
    )
    _print_findings(result, repair is not None)
    if journal is not None and os.path.exists(journal):
        report(
            f"what the repair has changed is kept in {journal}; to undo it: "
            f"{program()} check --undo {journal} {path}"
        )
    if style == "json":
        print(json_text(_members(path, format, result)))
    elif not parsed.flag("quiet"):
        _print_human(result)
    if result.check_errors:
        return 1
    if result.corruptions:
        return EXIT_CORRUPT
    return EXIT_LEAKS if result.leaks else 0


def _journal(parsed: Parsed, path: str) -> str | None:
    from qcow2x.ops.undo import default_journal

    named = parsed.value("journal")
    if named is not None or parsed.value("repair") != "all" or parsed.flag("no-journal"):
        return named
    return default_journal(path)


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


def _print_findings(result: Any, repairing: bool) -> None:
    for finding in result.findings:
        told = f"{finding.message} (offset {finding.offset:#x}"
        if finding.guest_offset is not None:
            told += f", guest offset {finding.guest_offset:#x}"
        told += ")"
        if repairing and finding.action is not None:
            told += f": {finding.action}"
        print(told, file=sys.stderr)


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
