"""``qcow2x check``: look for corruption and leaked clusters; repair leaks."""

from __future__ import annotations

import sys
from typing import Any

from qcow2x.cli.options import FORMAT, OUTPUT, QUIET, SHARE, Option, UsageError, one_file, parse
from qcow2x.cli.options import output_format as read_output_format
from qcow2x.cli.text import json_text

OPTIONS = (
    QUIET,
    FORMAT,
    OUTPUT,
    Option("r", "repair", "WHAT", "repair: 'leaks', or 'all' (today the same)"),
    Option("T", "src-cache", "MODE", "cache mode for reading the image"),
    SHARE,
)
USAGE = "[-q] [-f FMT] [--output=human|json] [-r leaks|all] [-T MODE] [-U] FILE"

EXIT_CORRUPT = 2
EXIT_LEAKS = 3
EXIT_NOT_SUPPORTED = 63


def main(argv: list[str]) -> int:
    from qcow2x.ops.disk import open_disk, probe_format

    parsed = parse("check", USAGE, OPTIONS, argv)
    style = read_output_format(parsed)
    repair = parsed.value("repair")
    if repair not in (None, "leaks", "all"):
        raise UsageError(f"Unknown option value for -r (expecting 'leaks' or 'all'): {repair}")
    path = one_file(parsed)
    format = parsed.value("format") or probe_format(path)
    if format == "raw":
        print("qcow2x: This image format does not support checks", file=sys.stderr)
        return EXIT_NOT_SUPPORTED
    image, _ = open_disk(
        path,
        format,
        mode="r+" if repair else "r",
        cache=parsed.value("src-cache", "writeback") or "",
        backing=False,
        lock=not parsed.flag("force-share"),
    )
    try:
        # 'all' repairs what can be repaired: leaks. Corruption that is left shows in the result.
        result = image.check(repair="leaks" if repair else None)
    finally:
        image.close()
    for finding in result.findings:
        print(finding.message, file=sys.stderr)
    if style == "json":
        print(json_text(_members(path, format, result)))
    elif not parsed.flag("quiet"):
        _print_human(result)
    if result.check_errors:
        return 1
    if result.corruptions:
        return EXIT_CORRUPT
    return EXIT_LEAKS if result.leaks else 0


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
