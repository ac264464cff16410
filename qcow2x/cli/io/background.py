"""aio_read, aio_write, aio_discard and aio_flush: requests that go on beside the commands."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from qcow2x.cli.io import units
from qcow2x.cli.io.disk import failing_as
from qcow2x.cli.io.language import ANY, Command, Failed, WrongUsage, options
from qcow2x.cli.io.session import Session
from qcow2x.cli.io.transfers import buffer, lengths, matches


class Request:
    """One request on a thread of its own. ``report`` prints what came of it, from the main one."""

    def __init__(
        self,
        offset: int,
        length: int,
        *,
        changes: bool,
        failure: str,
        work: Callable[[], None],
        report: Callable[[int], None],
    ) -> None:
        self.offset, self.end = offset, offset + length
        self.changes = changes
        self.ended = threading.Event()
        self._failure = failure
        self._work = work
        self._report = report
        self._after: list[Request] = []
        self._outcome: Failed | None = None
        self._took = 0

    def overlaps(self, other: Request) -> bool:
        meet = self.offset < other.end and other.offset < self.end
        return meet and (self.changes or other.changes)

    def start(self, after: list[Request]) -> None:
        self._after = after
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        start = time.monotonic_ns()
        try:
            for request in self._after:
                request.ended.wait()
            with failing_as(self._failure):
                self._work()
        except Failed as exc:
            self._outcome = exc
        finally:
            self._after = []
            self._took = time.monotonic_ns() - start
            self.ended.set()

    def tell(self) -> None:
        if self._outcome is not None:
            print(self._outcome)
        else:
            self._report(self._took)


class Background:
    """The requests under way, in the order in which they were given.

    They run at the same time and are told of in that order, so that a script prints the same
    whenever it is run. Those that touch the same bytes also take effect in it; with breakpoints set
    they do not wait for each other, as then somebody else says what comes first.
    """

    def __init__(self) -> None:
        self._requests: list[Request] = []
        self.ordered = True

    def submit(self, request: Request) -> None:
        before = [other for other in self._requests if request.overlaps(other)]
        self._requests.append(request)
        request.start(before if self.ordered else [])

    def turn(self) -> None:
        """Tells of what has ended, up to the first that has not."""
        while self._requests and self._requests[0].ended.is_set():
            self._requests.pop(0).tell()

    def drain(self) -> None:
        """Waits for all of them."""
        while self._requests:
            self._requests[0].ended.wait()
            self.turn()


def _aio_read(session: Session, argv: list[str]) -> None:
    given, rest = options(argv, "CiP:qrv")
    byte: int | None = None
    for letter, value in given:
        if letter == "P":
            byte = units.pattern(value)
        elif letter == "i":
            print("injecting invalid read request")
            return
    flags = {letter for letter, _ in given}
    if len(rest) < 2:
        raise WrongUsage
    offset = units.number(rest[0])
    data = buffer(session, sum(lengths(rest[1:])), 0xAB)
    disk = session.open_disk

    def report(took: int) -> None:
        if byte is not None and not matches(data, byte):
            print(f"Pattern verification failed at offset {offset}, {len(data)} bytes")
        if "q" in flags:
            return
        if "v" in flags and len(data):
            print(units.dump_text(data, offset))
        print(units.report_text("read", took, offset, len(data), len(data), "C" in flags))

    session.background.submit(
        Request(
            offset,
            len(data),
            changes=False,
            failure="readv failed",
            work=lambda: disk.read(data, offset),
            report=report,
        )
    )


def _aio_write(session: Session, argv: list[str]) -> None:
    given, rest = options(argv, "CfiP:qruz")
    byte = 0xCD
    for letter, value in given:
        if letter == "P":
            byte = units.pattern(value)
        elif letter == "i":
            print("injecting invalid write request")
            return
    flags = {letter for letter, _ in given}
    if len(rest) < 2:
        raise WrongUsage
    if "z" in flags and len(rest) != 2:
        raise Failed("-z supports only a single length parameter")
    if "u" in flags and "z" not in flags:
        raise Failed("-u requires -z to be specified")
    if flags >= {"z", "P"}:
        raise Failed("-z and -P cannot be specified at the same time")
    if flags >= {"z", "r"}:
        raise Failed("cannot combine zero write with registered I/O buffer")
    offset = units.number(rest[0])
    disk, fua = session.open_disk, "f" in flags
    if "z" in flags:
        length = units.number(rest[1])

        def work() -> None:
            disk.write_zeroes(offset, length, unmap="u" in flags, fua=fua)
    else:
        length = sum(lengths(rest[1:]))
        data = buffer(session, length, byte)

        def work() -> None:
            disk.write(data, offset, fua=fua)

    session.background.submit(
        Request(
            offset,
            length,
            changes=True,
            failure="aio_write failed",
            work=work,
            report=_reporter("wrote", offset, length, flags),
        )
    )


def _aio_discard(session: Session, argv: list[str]) -> None:
    given, rest = options(argv, "Cq")
    flags = {letter for letter, _ in given}
    if len(rest) != 2:
        raise WrongUsage
    offset, length = units.number(rest[0]), units.number(rest[1])
    disk = session.open_disk
    session.background.submit(
        Request(
            offset,
            length,
            changes=True,
            failure="aio_discard failed",
            work=lambda: disk.discard(offset, length),
            # The second space is QEMU's.
            report=_reporter("discarded ", offset, length, flags),
        )
    )


def _reporter(done: str, offset: int, length: int, flags: set[str]) -> Callable[[int], None]:
    def report(took: int) -> None:
        if "q" not in flags:
            print(units.report_text(done, took, offset, length, length, "C" in flags))

    return report


def _aio_flush(session: Session, argv: list[str]) -> None:
    session.drain()


_NOTE = """ used to ensure all outstanding aio requests have been completed.
 Note that due to its asynchronous nature, this command will be
 considered successful once the request is submitted, independently
"""

COMMANDS = (
    Command(
        "aio_read",
        _aio_read,
        "asynchronously reads a number of bytes",
        args="[-Ciqrv] [-P pattern] off len [len..]",
        least=2,
        most=ANY,
        help=f"""
 asynchronously reads a range of bytes from the given offset

 Example:
 'aio_read -v 512 1k 1k ' - dumps 2 kilobytes read from 512 bytes into the file

 Reads a segment of the currently open file, optionally dumping it to the
 standard output stream (with -v option) for subsequent inspection.
 The read is performed asynchronously and the aio_flush command must be
{_NOTE} of potential I/O errors or pattern mismatches.
 -C, -- report statistics in a machine parsable format
 -i, -- treat request as invalid, for exercising stats
 -P, -- use a pattern to verify read data
 -q, -- quiet mode, do not show I/O statistics
 -r, -- register I/O buffer
 -v, -- dump buffer to standard output
""",
    ),
    Command(
        "aio_write",
        _aio_write,
        "asynchronously writes a number of bytes",
        args="[-Cfiqruz] [-P pattern] off len [len..]",
        least=2,
        most=ANY,
        writes=True,
        help=f"""
 asynchronously writes a range of bytes from the given offset source
 from multiple buffers

 Example:
 'aio_write 512 1k 1k' - writes 2 kilobytes at 512 bytes into the open file

 Writes into a segment of the currently open file, using a buffer
 filled with a set pattern (0xcdcdcdcd).
 The write is performed asynchronously and the aio_flush command must be
{_NOTE} of potential I/O errors or pattern mismatches.
 -C, -- report statistics in a machine parsable format
 -f, -- use Force Unit Access semantics
 -i, -- treat request as invalid, for exercising stats
 -P, -- use different pattern to fill file
 -q, -- quiet mode, do not show I/O statistics
 -r, -- register I/O buffer
 -u, -- with -z, allow unmapping
 -z, -- write zeroes using blk_aio_pwrite_zeroes
""",
    ),
    Command(
        "aio_discard",
        _aio_discard,
        "asynchronously discards a number of bytes",
        args="[-Cq] off len",
        least=2,
        most=ANY,
        writes=True,
        help=f"""
 asynchronously discards a range of bytes from the given offset

 Example:
 'aio_discard 512 1k' - discards 1 kilobyte from 512 bytes into the file

 Discards a segment of the currently open file.
 -C, -- report statistics in a machine parsable format
 -q, -- quiet mode, do not show I/O statistics
 The discard is performed asynchronously and the aio_flush command must be
{_NOTE} of potential I/O errors.
""",
    ),
    Command("aio_flush", _aio_flush, "completes all outstanding aio requests"),
)
