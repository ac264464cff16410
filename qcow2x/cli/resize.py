"""``resize``: grow or shrink a disk."""

from __future__ import annotations

from qcow2x.cli.objects import read_objects
from qcow2x.cli.opening import failure, open_disk, stored_in
from qcow2x.cli.options import FORMAT, IMAGE_OPTS, OBJECT, QUIET, Option, UsageError, parse
from qcow2x.cli.report import CommandError, report, warn

OPTIONS = (
    FORMAT,
    Option("", "preallocation", "MODE", "for what is added: off, metadata, falloc or full"),
    Option("", "shrink", None, "allow making the disk smaller, which deletes what is behind"),
    QUIET,
    OBJECT,
    IMAGE_OPTS,
)
USAGE = (
    "[--object OBJECT] [--image-opts] [-f FMT] [--preallocation=MODE] [-q] [--shrink] FILE "
    "[+|-]SIZE"
)
OPERANDS = (
    ("FILE", "the image"),
    ("[+|-]SIZE", "the new size, or by how much to grow or shrink"),
)

_PREALLOCATIONS = ("off", "metadata", "falloc", "full")


def main(argv: list[str]) -> int:
    if argv and argv[-1] in ("-h", "--help"):
        parse("resize", USAGE, OPTIONS, argv, OPERANDS)
    if len(argv) < 2:
        raise UsageError("Not enough arguments")
    # The size is the last word, whatever it looks like: "-1G" is no option.
    *argv, size = argv
    parsed = parse("resize", USAGE, OPTIONS, argv, OPERANDS)
    preallocation = parsed.value("preallocation", "off") or ""
    if preallocation not in _PREALLOCATIONS:
        raise CommandError(f"Invalid preallocation mode '{preallocation}'")
    if len(parsed.args) != 1:
        raise UsageError("Expecting image file name and size")
    sign, amount = _read_size(size)
    with open_disk(
        parsed.args[0],
        parsed.value("format"),
        image_opts=parsed.flag("image-opts"),
        secrets=read_objects(parsed.values("object")),
        writable=True,
    ) as node:
        old = node.size
        new = {"": amount, "+": old + amount, "-": old - amount}[sign]
        if new <= 0:
            raise CommandError("New image size must be positive")
        if new <= old and preallocation != "off":
            raise CommandError("Preallocation can only be used for growing images")
        if new < old and not parsed.flag("shrink"):
            report("Use the --shrink option to perform a shrink operation.")
            warn(
                "Shrinking an image will delete all data beyond the shrunken image's end. Before "
                "performing such an operation, make sure there is no important data there."
            )
            return 1
        try:
            node.resize(new, shrink=new < old, preallocation=preallocation)
            node.flush()
        except Exception as exc:
            raise failure(exc, name=stored_in(node)) from exc
    if not parsed.flag("quiet"):
        print("Image resized.")
    return 0


def _read_size(text: str) -> tuple[str, int]:
    """The sign in front of a size, if there is one, and its bytes."""
    from qcow2x.cli.formatopts import size_value

    sign = text[:1] if text[:1] in ("+", "-") else ""
    return sign, size_value("size", text[len(sign) :])
