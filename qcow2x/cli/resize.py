"""``qcow2x resize``: grow or shrink a disk."""

from __future__ import annotations

import re
import sys

from qcow2x.cli.options import FORMAT, QUIET, Option, UsageError, parse, parse_size

OPTIONS = (
    FORMAT,
    Option("", "preallocation", "MODE", "for what is added: off, metadata, falloc or full"),
    Option("", "shrink", None, "allow making the disk smaller, which deletes what is behind"),
    QUIET,
)
USAGE = "[-f FMT] [--preallocation=MODE] [-q] [--shrink] FILE [+|-]SIZE"

_NEGATIVE = re.compile(r"-\d.*")


def main(argv: list[str]) -> int:
    # "-1G" is a size and no option: no option begins with a digit.
    shrink_by = [arg for arg in argv if _NEGATIVE.fullmatch(arg)]
    parsed = parse("resize", USAGE, OPTIONS, [a for a in argv if not _NEGATIVE.fullmatch(a)])
    args = parsed.args + shrink_by
    if len(args) < 2:
        raise UsageError("Expecting an image file name and a size")
    if len(args) > 2:
        raise UsageError("Expecting one image file name")
    path, text = args
    sign = text[0] if text[:1] in "+-" else ""
    amount = parse_size(text[len(sign) :])
    if amount is None or amount < 0:
        raise UsageError(f"Invalid size: '{text}' (k, M, G, T, P and E are possible suffixes)")
    preallocation = parsed.value("preallocation", "off") or ""
    if preallocation not in ("off", "metadata", "falloc", "full"):
        raise UsageError(f"Invalid preallocation mode '{preallocation}'")

    from qcow2x.ops.disk import open_disk, probe_format

    format = parsed.value("format")
    if format is None:
        format = probe_format(path)
        if format == "raw":
            print(
                f"WARNING: Image format was not specified for '{path}' and probing guessed raw. "
                "Specify -f raw to be sure.",
                file=sys.stderr,
            )
    disk, _ = open_disk(path, format, mode="r+", references="follow")
    try:
        old = disk.size
        size = {"": amount, "+": old + amount, "-": old - amount}[sign]
        if size <= 0:
            raise ValueError("New image size must be positive")
        size = -(-size // 512) * 512
        if size <= old and preallocation != "off":
            raise ValueError("Preallocation can only be used for growing images")
        if size < old and not parsed.flag("shrink"):
            raise ValueError(
                "Use the --shrink option to perform a shrink operation; it deletes all data "
                "beyond the shrunken image's end"
            )
        disk.resize(size, shrink=size < old, preallocation=preallocation)
        disk.flush()
    finally:
        disk.close()
    if not parsed.flag("quiet"):
        print("Image resized.")
    return 0
