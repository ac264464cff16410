"""Commands that look at the open file or change it as a whole, and those that stop requests."""

from __future__ import annotations

import os
import signal
import sys
import time

from qcow2x.cli import words
from qcow2x.cli.io import units
from qcow2x.cli.io.disk import error_number, failing_as, is_expected
from qcow2x.cli.io.language import Command, Failed, WrongUsage, options
from qcow2x.cli.io.session import Session
from qcow2x.cli.report import CommandError

PREALLOCATIONS = ("off", "metadata", "falloc", "full")


def _flush(session: Session, argv: list[str]) -> None:
    try:
        session.open_disk.flush()
    except Exception as exc:
        if not is_expected(exc):
            raise
        raise Failed from exc


def _truncate(session: Session, argv: list[str]) -> None:
    given, rest = options(argv, "m:")
    mode = "off"
    for _, value in given:
        mode = value
        if mode not in PREALLOCATIONS:
            raise CommandError(f"Invalid preallocation mode '{mode}'")
    if not rest:
        raise WrongUsage
    size = units.number(rest[0])
    session.open_disk.require_writable()
    try:
        session.open_disk.node.resize(size, shrink=True, preallocation=mode)
    except Exception as exc:
        if not is_expected(exc):
            raise
        # QEMU does not say which file: there is one.
        image = session.open_disk.image
        name = "" if image is None else f"{image.name}: "
        raise CommandError(words.reason(exc).removeprefix(name)) from exc


def _length(session: Session, argv: list[str]) -> None:
    print(units.size_text(session.open_disk.size))


def _info(session: Session, argv: list[str]) -> None:
    node = session.open_disk.node
    print(f"format name: {node.driver}")
    if node.is_protocol:
        print(f"format name: {node.driver}")
    if node.driver.startswith("null"):
        # It has no clusters, nor anything else to tell.
        raise Failed
    image = session.open_disk.image
    cluster, state = (0, 0) if image is None else (image.cluster_size, image.vmstate_offset)
    print(f"cluster size: {units.size_text(cluster)}")
    print(f"vm state offset: {units.size_text(state)}")
    from qcow2x.cli.info import specific_lines

    lines = specific_lines(node)
    if lines:
        print("\n".join(["Format specific information:", *lines]))


def _alloc(session: Session, argv: list[str]) -> None:
    start = units.number(argv[1])
    count = units.number(argv[2]) if len(argv) == 3 else units.SECTOR
    with failing_as("is_allocated failed"):
        runs = list(session.open_disk.allocation(start, count))
    allocated = sum(length for length, there in runs if there)
    looked_at = sum(length for length, _ in runs)
    print(f"{allocated}/{looked_at} bytes allocated at offset {units.size_text(start)}")


def _map(session: Session, argv: list[str]) -> None:
    offset = 0
    try:
        for length, there in session.open_disk.allocation(0, session.open_disk.size):
            state = "    allocated" if there else "not allocated"
            print(
                f"{units.size_text(length)} ({length:#x}) bytes {state} "
                f"at offset {units.size_text(offset)} ({offset:#x})"
            )
            offset += length
    except Exception as exc:
        if not is_expected(exc):
            raise
        reason = os.strerror(error_number(exc))
        raise CommandError(f"Failed to get allocation status: {reason}") from exc


# ---- Breakpoints (blkdebug) ----------------------------------------------------------------------


def _break(session: Session, argv: list[str]) -> None:
    with failing_as("Could not set breakpoint"):
        session.open_disk.debugger().debug_breakpoint(argv[1], argv[2])
    session.background.ordered = False


def _remove_break(session: Session, argv: list[str]) -> None:
    with failing_as(f"Could not remove breakpoint {argv[1]}"):
        session.open_disk.debugger().debug_remove_breakpoint(argv[1])


def _resume(session: Session, argv: list[str]) -> None:
    with failing_as("Could not resume request"):
        session.open_disk.debugger().debug_resume(argv[1])


def _wait_break(session: Session, argv: list[str]) -> None:
    with failing_as("Could not wait for breakpoint"):
        debugger = session.open_disk.debugger()
        while not debugger.debug_is_suspended(argv[1]):
            time.sleep(0.001)
    session.turn()


# ---- The process itself --------------------------------------------------------------------------


def _abort(session: Session, argv: list[str]) -> None:
    os.abort()


def _sigraise(session: Session, argv: list[str]) -> None:
    number = units.number(argv[1])
    if number > signal.NSIG:
        raise Failed(f"signal argument '{argv[1]}' is too large to be a valid signal")
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        signal.raise_signal(number)
    except (OSError, ValueError):
        # No such signal: raise() tells its caller, and nobody asks.
        return


def _sleep(session: Session, argv: list[str]) -> None:
    milliseconds = units.integer(argv[1])
    if milliseconds is None or milliseconds < 0:
        raise Failed(f"{argv[1]} is not a valid number")
    time.sleep(milliseconds / 1000)
    session.turn()


COMMANDS = (
    Command("flush", _flush, "flush all in-core file state to disk", altname="f"),
    Command(
        "truncate",
        _truncate,
        "truncates the current file at the given offset",
        args="[-m prealloc_mode] off",
        altname="t",
        least=1,
        most=3,
        writes=True,
    ),
    Command("length", _length, "gets the length of the current file", altname="l"),
    Command("info", _info, "prints information about the current file", altname="i"),
    Command(
        "alloc",
        _alloc,
        "checks if offset is allocated in the file",
        args="offset [count]",
        altname="a",
        least=1,
        most=2,
    ),
    Command("map", _map, "prints the allocated areas of a file", args=""),
    Command(
        "break",
        _break,
        "sets a breakpoint on event and tags the stopped request as tag",
        args="event tag",
        least=2,
        most=2,
    ),
    Command(
        "remove_break", _remove_break, "remove a breakpoint by tag", args="tag", least=1, most=1
    ),
    Command("resume", _resume, "resumes the request tagged as tag", args="tag", least=1, most=1),
    Command(
        "wait_break",
        _wait_break,
        "waits for the suspension of a request",
        args="tag",
        least=1,
        most=1,
    ),
    Command("abort", _abort, "simulate a program crash using abort(3)", no_file=True),
    Command(
        "sigraise",
        _sigraise,
        "raises a signal",
        args="signal",
        least=1,
        most=1,
        no_file=True,
        help=f"""
 raises the given signal

 Example:
 'sigraise {int(signal.SIGTERM)}' - raises SIGTERM

 Invokes raise(signal), where "signal" is the mandatory integer argument
 given to sigraise.
""",
    ),
    Command(
        "sleep",
        _sleep,
        "waits for the given value in milliseconds",
        least=1,
        most=1,
        no_file=True,
    ),
)
