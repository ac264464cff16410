"""``qcow2x convert``: copy one or more disks into a new image."""

from __future__ import annotations

from typing import Any

from qcow2x.cli.create import print_option_help, qcow2_arguments
from qcow2x.cli.formatopts import (
    FormatOptions,
    create_descriptions,
    join_option_lists,
    wants_help,
)
from qcow2x.cli.options import (
    CREATE_OPTIONS,
    PROGRESS,
    QUIET,
    SHARE,
    Option,
    UsageError,
    number,
    parse,
    parse_size,
)
from qcow2x.cli.text import ProgressBar

OPTIONS = (
    Option("c", "compress", None, "compress the clusters of the target (qcow2 only)"),
    Option("f", "format", "FMT", "format of the source: qcow2 or raw (default: look)"),
    Option("O", "output-format", "FMT", "format of the target: qcow2 or raw (default)"),
    CREATE_OPTIONS,
    Option("b", "backing", "FILE", "backing file of the target; only the source's top is copied"),
    Option("B", "target-backing", "FILE", "the same as -b"),
    Option("F", "backing-format", "FMT", "format of that backing file"),
    Option("l", "snapshot", "NAME", "copy this internal snapshot of the source"),
    Option("m", "parallel", "N", "worker threads, 1 to 16 (default: one per CPU)"),
    Option("n", "no-create", None, "write into a target that is there already"),
    Option("", "target-is-zero", None, "with -n: the target reads as zeros, do not write any"),
    Option("S", "sparse-size", "SIZE", "zero runs of this size are not stored (4k; 0: store all)"),
    Option("t", "cache", "MODE", "cache mode of the target (default: writeback)"),
    Option("T", "src-cache", "MODE", "cache mode of the source (default: writeback)"),
    Option("W", "out-of-order", None, "accepted for qemu-img: raw targets are always written so"),
    Option("", "level", "N", "compression level: 1..9 for zlib, 1..19 for zstd"),
    PROGRESS,
    QUIET,
    SHARE,
)
USAGE = (
    "[-c] [-f FMT] [-O FMT] [-o OPTS] [-B BACKING -F FMT] [-l SNAPSHOT] [-m N] [-n] [-S SIZE] "
    "[-t MODE] [-T MODE] [-p] [-q] [-U] FILE [FILE2 ...] TARGET"
)


def main(argv: list[str]) -> int:
    parsed = parse("convert", USAGE, OPTIONS, argv)
    target_format = parsed.value("output-format", "raw") or ""
    lists = join_option_lists(parsed.values("options"))
    if wants_help(lists):
        print_option_help(target_format, parsed.args[-1] if parsed.args else None)
        return 0
    threads = parsed.value("parallel")
    workers = None if threads is None else number(threads, "number of threads", 1, 16, 1)
    if len(parsed.args) < 2:
        raise UsageError("Must specify image file name")
    if target_format not in ("qcow2", "raw"):
        raise ValueError(f"Unknown file format '{target_format}'")
    no_create = parsed.flag("no-create")
    if parsed.flag("target-is-zero") and not no_create:
        raise UsageError("--target-is-zero requires use of -n flag")

    from qcow2x.ops.convert import convert

    *sources, target = parsed.args
    with ProgressBar(parsed.flag("progress") and not parsed.flag("quiet")) as bar:
        convert(
            sources if len(sources) > 1 else sources[0],
            target,
            src_format=parsed.value("format"),
            dst_format=target_format,
            compress=parsed.flag("compress"),
            level=_level(parsed.value("level")),
            threads=workers,
            sparse_size=_sparse_size(parsed.value("sparse-size")),
            target_exists=no_create,
            target_is_zero=parsed.flag("target-is-zero"),
            cache=parsed.value("cache", "writeback") or "",
            src_cache=parsed.value("src-cache", "writeback") or "",
            references="follow",
            snapshot=parsed.value("snapshot"),
            lock=not parsed.flag("force-share"),
            progress=bar,
            **_target_options(parsed, target_format, lists, target),
        )
    return 0


def _target_options(parsed: Any, format: str, lists: str, target: str) -> dict[str, Any]:
    given = FormatOptions(create_descriptions(format))
    given.parse(lists)
    names = set(given.given())
    for unsupported in ("data_file", "data_file_raw"):
        if unsupported in names:
            raise ValueError(f"{target}: '{unsupported}' cannot be used for a target of convert")
    arguments = qcow2_arguments(given, {}) if format == "qcow2" else {}
    wanted = {"backing_format" if name == "backing_fmt" else name for name in names}
    options = {name: value for name, value in arguments.items() if name in wanted}
    if format == "raw" and "preallocation" in names:
        options["preallocation"] = given.text("preallocation")
    if "size" in names:
        options["size"] = given.number("size")
    backing = parsed.value("backing") or parsed.value("target-backing")
    if backing is not None:
        options["backing_file"] = backing
    if parsed.value("backing-format") is not None:
        options["backing_format"] = parsed.value("backing-format")
    return options


def _level(text: str | None) -> int | None:
    return None if text is None else number(text, "compression level", 1, 22, 1)


def _sparse_size(text: str | None) -> int:
    if text is None:
        return 4096
    value = parse_size(text)
    if value is None or value % 512 or not 0 <= value <= 16 << 20:
        raise UsageError(
            f"Invalid buffer size for sparse output specified: '{text}'. Valid sizes are multiples "
            "of 512 up to 16777216. Select 0 to disable sparse detection (fully allocates output)."
        )
    return value
