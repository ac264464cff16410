"""Commands for zoned disks. No driver here has zones, so each checks what it was given, and fails."""

from __future__ import annotations

import errno
from collections.abc import Callable

from qcow2x.cli.io import units
from qcow2x.cli.io.disk import RequestFailed, failing_as
from qcow2x.cli.io.language import Command, Failed
from qcow2x.cli.io.session import Session
from qcow2x.cli.io.transfers import lengths

_MAX_ZONES = (1 << 32) - 1


def _refuse(doing: str) -> None:
    with failing_as(f"zone {doing} failed"):
        raise RequestFailed(errno.ENOTSUP)


def _report(session: Session, argv: list[str]) -> None:
    units.number(argv[1])
    if units.number(argv[2]) > _MAX_ZONES:
        raise Failed("Number of zones must be less than 2^32")
    _refuse("report")


def _manage(doing: str) -> Callable[[Session, list[str]], None]:
    def run(session: Session, argv: list[str]) -> None:
        units.number(argv[1])
        units.number(argv[2])
        _refuse(doing)

    return run


def _append(session: Session, argv: list[str]) -> None:
    rest = [word for word in argv[1:] if word != "-p"]
    units.number(rest[0])
    lengths(rest[1:])
    _refuse("append")


COMMANDS = (
    Command(
        "zone_report",
        _report,
        "report zone information",
        args="offset number",
        altname="zrp",
        least=2,
        most=2,
    ),
    Command(
        "zone_open",
        _manage("open"),
        "explicit open a range of zones in zone block device",
        args="offset len",
        altname="zo",
        least=2,
        most=2,
    ),
    Command(
        "zone_close",
        _manage("close"),
        "close a range of zones in zone block device",
        args="offset len",
        altname="zc",
        least=2,
        most=2,
    ),
    Command(
        "zone_finish",
        _manage("finish"),
        "finish a range of zones in zone block device",
        args="offset len",
        altname="zf",
        least=2,
        most=2,
    ),
    Command(
        "zone_reset",
        _manage("reset"),
        "reset a zone write pointer in zone block device",
        args="offset len",
        altname="zrs",
        least=2,
        most=2,
    ),
    Command(
        "zone_append",
        _append,
        "append write a number of bytes at a specified offset",
        args="offset len [len..]",
        altname="zap",
        least=3,
        most=4,
    ),
)
