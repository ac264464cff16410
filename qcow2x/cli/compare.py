"""``qcow2x compare``: do two disks read the same? Exit status 0 yes, 1 no, 2 and up cannot tell."""

from __future__ import annotations

import errno

from qcow2x.cli.options import FORMAT, PROGRESS, QUIET, SHARE, Option, UsageError, parse
from qcow2x.cli.text import ProgressBar
from qcow2x.errors import CorruptImage, StorageError

OPTIONS = (
    FORMAT,
    Option("F", "second-format", "FMT", "format of the second image"),
    Option("s", "strict", None, "sizes and allocation have to be equal too"),
    Option("T", "src-cache", "MODE", "cache mode for reading both"),
    PROGRESS,
    QUIET,
    SHARE,
)
USAGE = "[-f FMT] [-F FMT] [-s] [-T MODE] [-p] [-q] [-U] FILE1 FILE2"

#: Cannot open or otherwise failed; a failed read has a number of its own.
EXIT_ERROR = 2
EXIT_READ_ERROR = 4


def main(argv: list[str]) -> int:
    from qcow2x.cli.main import describe
    from qcow2x.cli.report import report
    from qcow2x.ops.compare import compare

    parsed = parse("compare", USAGE, OPTIONS, argv)
    if len(parsed.args) != 2:
        raise UsageError("Expecting two image file names")
    quiet = parsed.flag("quiet")
    strict = parsed.flag("strict")
    with ProgressBar(parsed.flag("progress") and not quiet) as bar:
        try:
            result = compare(
                *parsed.args,
                first_format=parsed.value("format"),
                second_format=parsed.value("second-format"),
                strict=strict,
                cache=parsed.value("src-cache", "writeback") or "",
                references="follow",
                lock=not parsed.flag("force-share"),
                progress=bar,
            )
        except (StorageError, CorruptImage) as exc:
            # Reading failed, where the disks themselves could be opened.
            if isinstance(exc, StorageError) and exc.errno == errno.ENOENT:
                raise
            report(describe(exc))
            return EXIT_READ_ERROR
    if not quiet:
        for line in _lines(result, strict):
            print(line)
    return 0 if result.identical else 1


def _lines(result: object, strict: bool) -> list[str]:
    from qcow2x.ops.compare import CompareResult

    assert isinstance(result, CompareResult)
    if result.reason == "size":
        return ["Strict mode: Image size mismatch!"]
    lines = []
    # QEMU says so when it gets to the end of the shorter disk, and not if it stops before.
    reached = result.offset is None or result.offset >= min(result.sizes)
    if not strict and result.sizes[0] != result.sizes[1] and reached:
        lines.append("Warning: Image size mismatch!")
    if result.identical:
        lines.append("Images are identical.")
    elif result.reason == "allocation":
        lines.append(f"Strict mode: Offset {result.offset} block status mismatch!")
    else:
        # Counted in sectors, as disks are.
        lines.append(f"Content mismatch at offset {(result.offset or 0) // 512 * 512}!")
    return lines
