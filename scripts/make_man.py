"""Manual pages of qcow2x-img and qcow2x-io, from what the programs say of themselves.

Used as: make_man.py DIRECTORY. Commands and options come from the tables that the command lines are
read with, the last section from docs/qemu-img.md, so that no page can say something else.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

from qcow2x._version import __version__
from qcow2x.cli.formatopts import amend_descriptions, create_descriptions, help_lines
from qcow2x.cli.img import PROGRAM
from qcow2x.cli.io import program as io_program
from qcow2x.cli.main import IMG_COMMANDS
from qcow2x.cli.options import Option

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "qemu-img.md"
FORMATS = ("qcow2", "luks", "raw")


def main() -> None:
    directory = Path(sys.argv[1])
    directory.mkdir(parents=True, exist_ok=True)
    for name, page in (("qcow2x-img", img_page()), ("qcow2x-io", io_page())):
        (directory / f"{name}.1").write_text("\n".join(page) + "\n", encoding="utf-8")


def img_page() -> Iterator[str]:
    yield from head("qcow2x-img", PROGRAM.purpose)
    yield from [
        r"\fBqcow2x\-img\fR [\fB\-hV\fR] [\fB\-T\fR \fITRACE\fR] \fICOMMAND\fR [\fIOPTION\fR ...] ..."
    ]
    yield from section("DESCRIPTION")
    yield text(
        "Takes the command lines of QEMU 10.0's qemu-img, prints what it prints and ends with its "
        "exit status. Messages start with the name that the program was called by, so that a "
        "symbolic link named qemu-img makes it a stand-in. The same commands are there as "
        "subcommands of qcow2x."
    )
    yield from section("COMMANDS")
    for name, purpose in IMG_COMMANDS.items():
        command = import_module(f"qcow2x.cli.{name}")
        yield f".SS {name}"
        yield text(f"{purpose[0].upper()}{purpose[1:]}.")
        yield ".PP"
        yield rf"\fBqcow2x\-img {name}\fR {text(command.USAGE)}"
        for operand, meaning in command.OPERANDS:
            yield from labelled(rf"\fI{escape(operand)}\fR", meaning)
        for option in command.OPTIONS:
            yield from labelled(option_label(option), option.help)
    yield from section("FORMAT OPTIONS")
    for title, descriptions in (
        ("create", lambda name: create_descriptions(name, None)),
        ("amend", amend_descriptions),
    ):
        for format in FORMATS:
            if known := descriptions(format):
                yield f".SS {title} \\-f {format} \\-o"
                yield from literal("\n".join(help_lines(known)))
    yield from section("DIFFERENCES FROM QEMU")
    yield from from_markdown(part_of(DOCUMENT.read_text(encoding="utf-8"), "What differs"))
    yield from section("SEE ALSO")
    yield r"\fBqcow2x\-io\fR(1)"


def io_page() -> Iterator[str]:
    language = io_program.language()
    yield from head("qcow2x-io", "the command language of qemu-io, for disk images")
    yield r"\fBqcow2x\-io\fR [\fIOPTION\fR ...] [\fB\-c\fR \fICOMMAND\fR ...] [\fIFILE\fR]"
    yield from section("DESCRIPTION")
    yield text(
        "Reads, writes and looks at disks by commands: those given with -c, else the lines of "
        "standard input. The exit status is 1 if any of them failed. A stand-in for QEMU 10.0's "
        "qemu-io under that name too."
    )
    yield from section("OPTIONS")
    yield from literal(io_program.USAGE.format(name="qcow2x-io").split("\n\n", 1)[1])
    yield from section("COMMANDS")
    for command in language.commands:
        called = command.name if command.altname is None else f"{command.name}, {command.altname}"
        yield f".SS {escape(called)}"
        yield text(command.synopsis(command.name))
        if command.help.strip():
            yield from literal(command.help.strip("\n"))
    yield from section("SEE ALSO")
    yield r"\fBqcow2x\-img\fR(1)"


def option_label(option: Option) -> str:
    names = [f"-{option.short}"] if option.short else []
    if option.long:
        names.append(f"--{option.long}")
    label = ", ".join(rf"\fB{escape(name)}\fR" for name in names)
    return label + (rf" \fI{escape(option.metavar)}\fR" if option.metavar else "")


# ---- Markdown, as much of it as the document has -------------------------------------------------


def part_of(document: str, heading: str) -> str:
    """What stands below a heading of the second level."""
    found = re.search(rf"^## {re.escape(heading)}.*?\n(.*?)(?=^## |\Z)", document, re.M | re.S)
    if found is None:
        raise SystemExit(f"{DOCUMENT.name} has no part {heading!r}")
    return found.group(1)


def from_markdown(part: str) -> Iterator[str]:
    for block in re.split(r"\n\s*\n", part.strip()):
        if block.startswith("### "):
            yield f".SS {escape(block[4:])}"
        elif block.startswith("- "):
            for item in re.split(r"^- ", block, flags=re.M)[1:]:
                yield r".IP \(bu 2"
                yield inline(item)
        else:
            yield ".PP"
            yield inline(block)


def inline(block: str) -> str:
    words = text(" ".join(block.split()))
    return re.sub(r"\*\*(.+?)\*\*|\\\(ga(.+?)\\\(ga", r"\\fB\1\2\\fR", words)


# ---- roff ----------------------------------------------------------------------------------------


def head(name: str, purpose: str) -> Iterator[str]:
    yield f'.TH {escape(name.upper())} 1 "" "qcow2x {__version__}" "User Commands"'
    yield from section("NAME")
    yield rf"{escape(name)} \- {text(purpose)}"
    yield from section("SYNOPSIS")


def section(title: str) -> list[str]:
    return [f".SH {title}"]


def labelled(label: str, what: str) -> list[str]:
    return [".TP", label, text(f"{what[0].upper()}{what[1:]}.")]


def literal(block: str) -> Iterator[str]:
    yield ".PP"
    yield ".nf"
    yield from (text(line) for line in block.splitlines())
    yield ".fi"


def text(line: str) -> str:
    """One line of text: not taken for a request where it starts with a dot."""
    escaped = escape(line)
    return rf"\&{escaped}" if escaped.startswith(".") else escaped


def escape(line: str) -> str:
    return line.replace("\\", r"\e").replace("-", r"\-").replace("'", r"\(aq").replace("`", r"\(ga")


if __name__ == "__main__":
    main()
