"""``dd``: copy a part of a disk, counted in blocks."""

from __future__ import annotations

from qcow2x.cli.objects import read_objects
from qcow2x.cli.opening import open_disk
from qcow2x.cli.options import IMAGE_OPTS, OBJECT, SHARE, Option, image_size, parse
from qcow2x.cli.report import CommandError, report

OPTIONS = (
    Option("f", "format", "FMT", "format of the input (default: look)"),
    Option("O", "output-format", "FMT", "format of the output: raw (default), qcow2 or luks"),
    SHARE,
    OBJECT,
    IMAGE_OPTS,
)
USAGE = (
    "[--object OBJECT] [--image-opts] [-U] [-f FMT] [-O FMT] [bs=BLOCK_SIZE] [count=BLOCKS] [skip=BLOCKS] "
    "if=INPUT of=OUTPUT"
)
OPERANDS = (
    ("if=INPUT", "what is copied"),
    ("of=OUTPUT", "the new image; one that is there is replaced"),
    ("bs=BLOCK_SIZE", "bytes of a block (512)"),
    ("count=BLOCKS", "blocks to copy (all)"),
    ("skip=BLOCKS", "blocks of the input to leave out first (0)"),
)
INT_MAX = (1 << 31) - 1
SECTOR = 512


def main(argv: list[str]) -> int:
    parsed = parse("dd", USAGE, OPTIONS, argv, OPERANDS)
    secrets = read_objects(parsed.values("object"))
    names: dict[str, str] = {}
    numbers: dict[str, int] = {"bs": SECTOR}
    for operand in parsed.args:
        name, equals, value = operand.partition("=")
        if not equals or name not in ("bs", "count", "if", "of", "skip"):
            raise CommandError(f"unrecognized operand {name}")
        if name in ("if", "of"):
            names[name] = value
        else:
            low, high = (1, INT_MAX) if name == "bs" else (0, (1 << 63) - 1)
            numbers[name] = image_size(value, name, low, high)
    if len(names) < 2:
        raise CommandError("Must specify both input and output files")
    with open_disk(
        names["if"],
        parsed.value("format"),
        image_opts=parsed.flag("image-opts"),
        secrets=secrets,
        force_share=parsed.flag("force-share"),
    ) as source:
        _copy(source, names, numbers, parsed.value("output-format", "raw") or "")
    return 0


def _copy(source: object, names: dict[str, str], numbers: dict[str, int], format: str) -> None:
    from qcow2x.cli.copying import told_as
    from qcow2x.cli.create import READ_ONLY_FORMATS, protocol_of
    from qcow2x.ops.dd import dd

    target = names["of"]
    if format not in ("qcow2", "raw", "luks"):
        if format in READ_ONLY_FORMATS:
            raise CommandError(f"Format driver '{format}' does not support image creation")
        raise CommandError("Unknown file format")
    protocol_of(target)
    block, skip = numbers["bs"], numbers.get("skip", 0)
    count = numbers.get("count")
    size = source.size  # type: ignore[attr-defined]
    end = size if count is None else min(size, count * block)
    if skip * block > end:
        # As with dd, what is made then is an empty disk.
        report(f"{names['if']}: cannot skip to specified offset")
    length = max(0, end - skip * block)
    with told_as(
        f"{target}: error while creating output image: ",
        reading="error while reading from input image file: ",
        writing="error while writing to output image file: ",
    ):
        dd(
            source,
            target.removeprefix("file:"),
            block_size=block,
            count=count,
            skip=skip,
            dst_format=format,
            size=-(-length // SECTOR) * SECTOR,
        )
