"""``compare``: do two disks read the same? Exit status 0 yes, 1 no, 2 and up cannot tell."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

from qcow2x.cli.copying import why
from qcow2x.cli.objects import read_objects
from qcow2x.cli.opening import open_disk
from qcow2x.cli.options import (
    IMAGE_OPTS,
    OBJECT,
    PROGRESS,
    QUIET,
    SHARE,
    Option,
    Parsed,
    UsageError,
    parse,
)
from qcow2x.cli.report import CommandError
from qcow2x.cli.text import ProgressBar
from qcow2x.errors import Cancelled, Qcow2Error

if TYPE_CHECKING:
    from qcow2x.ops.compare import CompareResult

OPTIONS = (
    Option("f", "format", "FMT", "format of the first image (default: look)"),
    Option("F", "second-format", "FMT", "format of the second image (default: look)"),
    Option("s", "strict", None, "sizes and allocation have to be equal too"),
    Option("T", "src-cache", "MODE", "cache mode for reading both (default: writeback)"),
    PROGRESS,
    QUIET,
    SHARE,
    OBJECT,
    IMAGE_OPTS,
)
USAGE = (
    "[--object OBJECT] [--image-opts] [-f FMT] [-F FMT] [-s] [-T MODE] [-p] [-q] [-U] FILE1 FILE2"
)
OPERANDS = (("FILE1 FILE2", "the two disks"),)

#: Cannot open or otherwise failed; what cannot be looked at and what cannot be read have their own.
EXIT_ERROR = 2
EXIT_STATUS_ERROR = 3
EXIT_READ_ERROR = 4

SIZES_DIFFER = "Warning: Image size mismatch!"


def main(argv: list[str]) -> int:
    parsed = parse("compare", USAGE, OPTIONS, argv, OPERANDS)
    try:
        secrets = read_objects(parsed.values("object"))
    except CommandError as exc:
        exc.status = EXIT_ERROR
        raise
    if len(parsed.args) != 2:
        raise UsageError("Expecting two image file names")
    quiet, strict = parsed.flag("quiet"), parsed.flag("strict")
    with ExitStack() as stack:
        bar = stack.enter_context(ProgressBar(parsed.flag("progress") and not quiet))
        result = _compare(parsed, secrets, strict, stack, bar)
    if not quiet:
        for line in _lines(result, strict):
            print(line)
    return 0 if result.identical else 1


def _compare(
    parsed: Parsed, secrets: dict[str, bytes], strict: bool, stack: ExitStack, bar: ProgressBar
) -> CompareResult:
    from qcow2x.drivers.opening import CACHE_FLAGS
    from qcow2x.ops.compare import compare

    cache = parsed.value("src-cache", "writeback") or ""
    if cache not in CACHE_FLAGS:
        raise CommandError(f"Invalid source cache option: {cache}", status=EXIT_ERROR)
    try:
        disks = [
            stack.enter_context(
                open_disk(
                    name,
                    parsed.value(key),
                    image_opts=parsed.flag("image-opts"),
                    secrets=secrets,
                    cache=cache,
                    force_share=parsed.flag("force-share"),
                )
            )
            for name, key in zip(parsed.args, ("format", "second-format"), strict=True)
        ]
    except CommandError as exc:
        exc.status = EXIT_ERROR
        raise
    try:
        return compare(*disks, strict=strict, progress=bar)
    except Cancelled:
        raise
    except (OSError, Qcow2Error) as exc:
        name = parsed.args[getattr(exc, "disk", 0)]
        if getattr(exc, "doing", None) == "reading block status":
            raise CommandError(
                f"Sector allocation test failed for {name}", status=EXIT_STATUS_ERROR
            ) from exc
        offset = getattr(exc, "guest_offset", 0)
        sizes = [disk.size for disk in disks]
        if sizes[0] != sizes[1] and offset >= min(sizes) and not parsed.flag("quiet"):
            print(SIZES_DIFFER)
        raise CommandError(
            f"Error while reading offset {offset} of {name}: {why(exc)}", status=EXIT_READ_ERROR
        ) from exc


def _lines(result: CompareResult, strict: bool) -> list[str]:
    if result.reason == "size":
        return ["Strict mode: Image size mismatch!"]
    lines = []
    # QEMU says so when it gets to the end of the shorter disk, and not if it stops before.
    reached = result.offset is None or result.offset >= min(result.sizes)
    if not strict and result.sizes[0] != result.sizes[1] and reached:
        lines.append(SIZES_DIFFER)
    if result.identical:
        lines.append("Images are identical.")
    elif result.reason == "allocation":
        lines.append(f"Strict mode: Offset {result.offset} block status mismatch!")
    else:
        # Counted in sectors, as disks are.
        lines.append(f"Content mismatch at offset {(result.offset or 0) // 512 * 512}!")
    return lines
