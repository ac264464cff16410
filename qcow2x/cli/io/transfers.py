"""read, readv, write, writev and discard: requests that are waited for."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from qcow2x.cli.io import units
from qcow2x.cli.io.disk import failing_as
from qcow2x.cli.io.language import ANY, Command, Failed, WrongUsage, options
from qcow2x.cli.io.session import Session

#: What keeps buffers off the alignment that O_DIRECT wants, with --misalign.
_MISALIGNED = 16


def buffer(session: Session, length: int, byte: int) -> memoryview:
    skip = _MISALIGNED if session.misalign else 0
    filled = bytearray(length + skip) if byte == 0 else bytearray([byte]) * (length + skip)
    return memoryview(filled)[skip:]


def _buffer_from_file(session: Session, length: int, path: str) -> memoryview:
    """The bytes of a file, over and over."""
    try:
        with open(path, "rb") as file:
            content = file.read(length)
    except OSError as exc:
        print(f"{path}: {exc.strerror}", file=sys.stderr)
        raise Failed from exc
    if not content:
        print(f"{path}: file is empty", file=sys.stderr)
        raise Failed
    data = buffer(session, length, 0)
    data[:] = (content * (-(-length // len(content))))[:length]
    return data


def lengths(texts: list[str]) -> list[int]:
    """The lengths of the parts of a vectored request. Raises Failed."""
    found: list[int] = []
    for text in texts:
        length = units.number(text)
        if length > units.MAX_REQUEST:
            raise Failed(f"Argument '{text}' exceeds maximum size {units.MAX_REQUEST}")
        if sum(found) > units.MAX_REQUEST - length:
            raise Failed(f"The total number of bytes exceed the maximum size {units.MAX_REQUEST}")
        found.append(length)
    return found


def _require_aligned(offset: int, count: int) -> None:
    for value, name in ((offset, "offset"), (count, "count")):
        if value % units.SECTOR:
            raise Failed(f"{value} is not a sector-aligned value for '{name}'")


def matches(data: memoryview, byte: int) -> bool:
    return bool(data == bytes([byte]) * len(data))


def timed(request: Callable[[], None]) -> int:
    """Nanoseconds that a request took."""
    start = time.monotonic_ns()
    request()
    return time.monotonic_ns() - start


# ---- Reading -------------------------------------------------------------------------------------


def _read(session: Session, argv: list[str]) -> None:
    given, rest = options(argv, "bCl:pP:qrs:v")
    byte: int | None = None
    skip, checked = 0, None
    for letter, value in given:
        if letter == "l":
            checked = units.number(value)
        elif letter == "s":
            skip = units.number(value)
        elif letter == "P":
            byte = units.pattern(value)
    flags = {letter for letter, _ in given}
    if len(rest) != 2:
        raise WrongUsage
    offset, count = units.number(rest[0]), units.number(rest[1])
    if count > units.MAX_REQUEST:
        raise Failed(f"length cannot exceed {units.MAX_REQUEST}, given {rest[1]}")
    if byte is None and flags & {"l", "s"}:
        raise WrongUsage
    if checked is None:
        checked = count - skip
    if checked < 0 or checked + skip > count:
        raise Failed("pattern verification range exceeds end of read data")
    if "b" in flags:
        _require_aligned(offset, count)
        if "r" in flags:
            raise Failed("I/O buffer registration is not supported when reading from vmstate")
    disk = session.open_disk
    data = buffer(session, count, 0xAB)
    with failing_as("read failed"):
        read = disk.read_vmstate if "b" in flags else disk.read
        took = timed(lambda: read(data, offset))
    session.turn()
    wrong = byte is not None and not matches(data[skip : skip + checked], byte)
    if wrong:
        print(f"Pattern verification failed at offset {offset + skip}, {checked} bytes")
    _tell_read(flags, data, took, offset)
    if wrong:
        raise Failed


def _readv(session: Session, argv: list[str]) -> None:
    given, rest = options(argv, "CP:qrv")
    byte: int | None = None
    for letter, value in given:
        if letter == "P":
            byte = units.pattern(value)
    flags = {letter for letter, _ in given}
    if len(rest) < 2:
        raise WrongUsage
    offset = units.number(rest[0])
    data = buffer(session, sum(lengths(rest[1:])), 0xAB)
    with failing_as("readv failed"):
        took = timed(lambda: session.open_disk.read(data, offset))
    session.turn()
    wrong = byte is not None and not matches(data, byte)
    if wrong:
        print(f"Pattern verification failed at offset {offset}, {len(data)} bytes")
    _tell_read(flags, data, took, offset)
    if wrong:
        raise Failed


def _tell_read(flags: set[str], data: memoryview, took: int, offset: int) -> None:
    if "q" in flags:
        return
    if "v" in flags and len(data):
        print(units.dump_text(data, offset))
    count = len(data)
    print(units.report_text("read", took, offset, count, count, "C" in flags))


# ---- Writing -------------------------------------------------------------------------------------


def _write(session: Session, argv: list[str]) -> None:
    given, rest = options(argv, "bcCfnpP:qrs:uz")
    byte, path = 0xCD, ""
    for letter, value in given:
        if letter == "P":
            byte = units.pattern(value)
        elif letter == "s":
            path = value
    flags = {letter for letter, _ in given}
    if len(rest) != 2:
        raise WrongUsage
    _refuse_contradictions(flags)
    offset, count = units.number(rest[0]), units.number(rest[1])
    if count > units.MAX_REQUEST and "n" not in flags:
        raise Failed(f"length cannot exceed {units.MAX_REQUEST} without -n, given {rest[1]}")
    if flags & {"b", "c"}:
        _require_aligned(offset, count)
    disk = session.open_disk
    if "z" in flags:
        if "r" in flags:
            raise Failed("cannot combine zero write with registered I/O buffer")

        def request() -> None:
            disk.write_zeroes(
                offset, count, unmap="u" in flags, fua="f" in flags, fast="n" in flags
            )
    else:
        if "s" in flags:
            data = _buffer_from_file(session, count, path)
        else:
            data = buffer(session, count, byte)

        def request() -> None:
            if "b" in flags:
                disk.write_vmstate(data, offset)
            elif "c" in flags:
                disk.write_compressed(data, offset)
            else:
                disk.write(data, offset, fua="f" in flags)

    with failing_as("write failed"):
        took = timed(request)
    session.turn()
    if "q" not in flags:
        print(units.report_text("wrote", took, offset, count, count, "C" in flags))


def _refuse_contradictions(flags: set[str]) -> None:
    if flags >= {"b", "z"}:
        raise Failed("-b and -z cannot be specified at the same time")
    if "f" in flags and flags & {"b", "c"}:
        raise Failed("-f and -b or -c cannot be specified at the same time")
    for letter in "nu":
        if letter in flags and "z" not in flags:
            raise Failed(f"-{letter} requires -z to be specified")
    if len(flags & {"z", "P", "s"}) > 1:
        raise Failed("Only one of -z, -P, and -s can be specified at the same time")


def _writev(session: Session, argv: list[str]) -> None:
    given, rest = options(argv, "CfP:qr")
    byte = 0xCD
    for letter, value in given:
        if letter == "P":
            byte = units.pattern(value)
    flags = {letter for letter, _ in given}
    if len(rest) < 2:
        raise WrongUsage
    offset = units.number(rest[0])
    data = buffer(session, sum(lengths(rest[1:])), byte)
    with failing_as("writev failed"):
        took = timed(lambda: session.open_disk.write(data, offset, fua="f" in flags))
    session.turn()
    if "q" not in flags:
        count = len(data)
        print(units.report_text("wrote", took, offset, count, count, "C" in flags))


def _discard(session: Session, argv: list[str]) -> None:
    given, rest = options(argv, "Cq")
    flags = {letter for letter, _ in given}
    if len(rest) != 2:
        raise WrongUsage
    offset, count = units.number(rest[0]), units.number(rest[1])
    if count > units.MAX_REQUEST:
        raise Failed(f"length cannot exceed {units.MAX_REQUEST}, given {rest[1]}")
    with failing_as("discard failed"):
        took = timed(lambda: session.open_disk.discard(offset, count))
    session.turn()
    if "q" not in flags:
        print(units.report_text("discard", took, offset, count, count, "C" in flags))


COMMANDS = (
    Command(
        "read",
        _read,
        "reads a number of bytes at a specified offset",
        args="[-abCqrv] [-P pattern [-s off] [-l len]] off len",
        altname="r",
        least=2,
        most=ANY,
        help="""
 reads a range of bytes from the given offset

 Example:
 'read -v 512 1k' - dumps 1 kilobyte read from 512 bytes into the file

 Reads a segment of the currently open file, optionally dumping it to the
 standard output stream (with -v option) for subsequent inspection.
 -b, -- read from the VM state rather than the virtual disk
 -C, -- report statistics in a machine parsable format
 -l, -- length for pattern verification (only with -P)
 -p, -- ignored for backwards compatibility
 -P, -- use a pattern to verify read data
 -q, -- quiet mode, do not show I/O statistics
 -r, -- register I/O buffer
 -s, -- start offset for pattern verification (only with -P)
 -v, -- dump buffer to standard output
""",
    ),
    Command(
        "readv",
        _readv,
        "reads a number of bytes at a specified offset",
        args="[-Cqrv] [-P pattern] off len [len..]",
        least=2,
        most=ANY,
        help="""
 reads a range of bytes from the given offset into multiple buffers

 Example:
 'readv -v 512 1k 1k ' - dumps 2 kilobytes read from 512 bytes into the file

 Reads a segment of the currently open file, optionally dumping it to the
 standard output stream (with -v option) for subsequent inspection.
 Uses multiple iovec buffers if more than one byte range is specified.
 -C, -- report statistics in a machine parsable format
 -P, -- use a pattern to verify read data
 -q, -- quiet mode, do not show I/O statistics
 -r, -- register I/O buffer
 -v, -- dump buffer to standard output
""",
    ),
    Command(
        "write",
        _write,
        "writes a number of bytes at a specified offset",
        args="[-bcCfnqruz] [-P pattern | -s source_file] off len",
        altname="w",
        least=2,
        most=ANY,
        writes=True,
        help="""
 writes a range of bytes from the given offset

 Example:
 'write 512 1k' - writes 1 kilobyte at 512 bytes into the open file

 Writes into a segment of the currently open file, using a buffer
 filled with a set pattern (0xcdcdcdcd).
 -b, -- write to the VM state rather than the virtual disk
 -c, -- write compressed data with blk_write_compressed
 -C, -- report statistics in a machine parsable format
 -f, -- use Force Unit Access semantics
 -n, -- with -z, don't allow slow fallback
 -p, -- ignored for backwards compatibility
 -P, -- use different pattern to fill file
 -q, -- quiet mode, do not show I/O statistics
 -r, -- register I/O buffer
 -s, -- use a pattern file to fill the write buffer
 -u, -- with -z, allow unmapping
 -z, -- write zeroes using blk_pwrite_zeroes
""",
    ),
    Command(
        "writev",
        _writev,
        "writes a number of bytes at a specified offset",
        args="[-Cfqr] [-P pattern] off len [len..]",
        least=2,
        most=ANY,
        writes=True,
        help="""
 writes a range of bytes from the given offset source from multiple buffers

 Example:
 'writev 512 1k 1k' - writes 2 kilobytes at 512 bytes into the open file

 Writes into a segment of the currently open file, using a buffer
 filled with a set pattern (0xcdcdcdcd).
 -C, -- report statistics in a machine parsable format
 -f, -- use Force Unit Access semantics
 -P, -- use different pattern to fill file
 -q, -- quiet mode, do not show I/O statistics
 -r, -- register I/O buffer
""",
    ),
    Command(
        "discard",
        _discard,
        "discards a number of bytes at a specified offset",
        args="[-Cq] off len",
        altname="d",
        least=2,
        most=ANY,
        writes=True,
        help="""
 discards a range of bytes from the given offset

 Example:
 'discard 512 1k' - discards 1 kilobyte from 512 bytes into the file

 Discards a segment of the currently open file.
 -C, -- report statistics in a machine parsable format
 -q, -- quiet mode, do not show I/O statistics
""",
    ),
)
