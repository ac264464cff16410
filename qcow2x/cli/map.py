"""``map``: which parts of a disk are stored, in which file of the chain, and where."""

from __future__ import annotations

from collections.abc import Iterator

from qcow2x.cli.objects import read_objects
from qcow2x.cli.opening import open_disk
from qcow2x.cli.options import (
    FORMAT,
    IMAGE_OPTS,
    OBJECT,
    OUTPUT,
    SHARE,
    Option,
    image_size,
    one_file,
    output_format,
    parse,
)
from qcow2x.cli.report import CommandError
from qcow2x.errors import Qcow2Error
from qcow2x.types import Extent

OPTIONS = (
    FORMAT,
    Option("s", "start-offset", "OFFSET", "begin at this byte of the disk"),
    Option("l", "max-length", "LENGTH", "stop after this many bytes"),
    OUTPUT,
    SHARE,
    OBJECT,
    IMAGE_OPTS,
)
USAGE = (
    "[--object OBJECT] [--image-opts] [-f FMT] [-s OFFSET] [-l LENGTH] [--output=human|json] "
    "[-U] FILE"
)
OPERANDS = (("FILE", "the image"),)


def main(argv: list[str]) -> int:
    from qcow2x.cli.copying import why
    from qcow2x.ops.disk import extents_of

    parsed = parse("map", USAGE, OPTIONS, argv, OPERANDS)
    start = image_size(parsed.value("start-offset") or "0", "start offset")
    length = parsed.value("max-length")
    limit = None if length is None else image_size(length, "max length")
    secrets = read_objects(parsed.values("object"))
    path = one_file(parsed)
    style = output_format(parsed)
    with open_disk(
        path,
        parsed.value("format"),
        image_opts=parsed.flag("image-opts"),
        secrets=secrets,
        force_share=parsed.flag("force-share"),
    ) as disk:
        end = disk.size if limit is None else min(disk.size, start + limit)
        runs = merge(extents_of(disk, start, end - start)) if start < end else iter(())
        try:
            if style == "json":
                _print_json(runs, start)
            else:
                _print_human(runs)
        except (OSError, Qcow2Error) as exc:
            if isinstance(exc, BrokenPipeError):
                raise
            raise CommandError(f"Could not read file metadata: {why(exc)}") from exc
    return 0


def merge(extents: Iterator[Extent]) -> Iterator[Extent]:
    """Join neighbours that differ in nothing but where they start."""
    run: Extent | None = None
    for extent in extents:
        if run is not None and _continues(run, extent):
            run = run._replace(length=run.length + extent.length)
            continue
        if run is not None:
            yield run
        run = extent
    if run is not None:
        yield run


def _continues(run: Extent, extent: Extent) -> bool:
    offset = None if run.host_offset is None else run.host_offset + run.length
    return (
        extent.host_offset == offset
        and extent.filename == run.filename
        and (extent.data, extent.zero, extent.compressed, extent.depth)
        == (run.data, run.zero, run.compressed, run.depth)
    )


def _print_json(runs: Iterator[Extent], start: int) -> None:
    separator = "["
    for run in runs:
        offset = "" if run.host_offset is None else f', "offset": {run.host_offset}'
        print(
            f'{separator}{{ "start": {run.offset}, "length": {run.length}, "depth": {run.depth}, '
            f'"present": {_json(run.allocated)}, "zero": {_json(run.zero)}, '
            f'"data": {_json(run.data)}, "compressed": {_json(run.compressed)}{offset}}}',
            end="",
        )
        separator = ",\n"
    if separator == "[":
        print(
            f'[{{ "start": {start}, "length": 0, "depth": 0, "present": false, "zero": false, '
            '"data": false, "compressed": false}',
            end="",
        )
    print("]")


def _json(value: bool) -> str:
    return "true" if value else "false"


def _print_human(runs: Iterator[Extent]) -> None:
    print(f"{'Offset':<16}{'Length':<16}{'Mapped to':<16}File")
    for run in runs:
        if run.data and run.host_offset is None:
            raise CommandError("File contains external, encrypted or compressed clusters.")
        if run.data and not run.zero:
            place = run.host_offset or 0
            print(f"{_hex(run.offset):<16}{_hex(run.length):<16}{_hex(place):<16}{run.filename}")


def _hex(value: int) -> str:
    return hex(value) if value else "0"
