"""The ``qcow2x`` command: finds the subcommand and turns exceptions into one line and a status."""

from __future__ import annotations

import os
import sys
from importlib import import_module

from qcow2x.cli.options import UsageError
from qcow2x.cli.report import CommandError, program, report, set_program

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

#: The commands that qemu-img has too.
IMG_COMMANDS = {
    "amend": "change what an image is without copying it",
    "bench": "time a series of reads or writes",
    "bitmap": "change the persistent dirty bitmaps of an image",
    "check": "check an image for corruption and leaked clusters, and repair them",
    "commit": "write what an overlay holds into a layer below it",
    "compare": "compare what two disks read as",
    "convert": "copy a disk into a new image",
    "create": "make a new image",
    "dd": "copy a part of a disk, counted in blocks",
    "info": "tell what an image says of itself",
    "map": "list which parts of a disk are stored, and where",
    "measure": "tell how large a file a new image needs",
    "rebase": "give an image another backing file",
    "resize": "grow or shrink a disk",
    "snapshot": "list, make, apply and delete internal snapshots",
}
OWN_COMMANDS = {
    "demo": "show what qcow2x does on a real disk made from this machine's files",
    "inspect": "tell whether an untrusted image is safe to use, opening nothing that it names",
}
#: They have nothing to take away when they are stopped.
_ONLY_LOOKS = ("info",)
COMMANDS = dict(sorted({**IMG_COMMANDS, **OWN_COMMANDS}.items()))


class Program:
    """A command line tool: the name that it has where it was not called by another, and what it is for."""

    def __init__(self, name: str, purpose: str, more: tuple[str, ...] = ()) -> None:
        self.name = name
        self.purpose = purpose
        #: Lines of help on options that only it has.
        self.more = more

    def help(self, commands: Mapping[str, str]) -> str:
        lines = [
            f"usage: {program()} <command> [options] ...",
            "",
            f"{self.purpose}.",
            "",
            "commands:",
            *(f"  {name:<10}{text}" for name, text in commands.items()),
            "",
            "options before the command:",
            "  -h, --help      print this and exit",
            "  -V, --version   print the version and exit",
            *self.more,
            "",
            f"'{program()} <command> --help' lists the options of a command; they are those of qemu-img.",
        ]
        return "\n".join(lines)


PROGRAM = Program("qcow2x", "qcow2 disk images: make, convert, check and look into them")


class Terminated(BaseException):
    """SIGTERM arrived. Not an Exception, so that nothing on the way out takes it for an error."""


def main(argv: list[str] | None = None) -> int:
    """Run one command line (without the program's name); returns the exit status."""
    set_program(PROGRAM.name, sys.argv[0] if argv is None else None)
    return run_safely(_run, sys.argv[1:] if argv is None else argv)


def _run(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help", "help"):
        print(PROGRAM.help(COMMANDS), file=sys.stdout if args else sys.stderr)
        return 0 if args else 1
    if args[0] in ("-V", "--version"):
        from qcow2x._version import __version__

        print(f"{program()} version {__version__}")
        return 0
    return run_command(COMMANDS, args[0], args[1:])


def run_command(commands: Mapping[str, str], name: str, args: list[str]) -> int:
    """Run one of *commands*, each a module of this package. Raises CommandError."""
    if name not in commands:
        raise UsageError(f"Command not found: {name}")
    command = import_module(f"qcow2x.cli.{name}")
    try:
        if name in _ONLY_LOOKS:
            return int(command.main(args) or 0)
        with Tidied():
            return int(command.main(args) or 0)
    except Exception as exc:
        if isinstance(exc, (CommandError, BrokenPipeError)) or not is_expected(exc):
            raise
        raise CommandError(describe(exc), status=getattr(command, "EXIT_ERROR", 1)) from exc


def run_safely(run: Callable[[list[str]], int], args: list[str]) -> int:
    """What *run* makes of a command line, with every error told on standard error."""
    for stream in (sys.stdout, sys.stderr):
        # File names are bytes: print those that are not valid UTF-8 as they are.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="surrogateescape")
    out = sys.__stdout__
    if out is not None and sys.stdout is out:
        # As C's stdio has it, also where PYTHONUNBUFFERED is set: what order output and messages
        # come in, where both go into one pipe, is not to hang on it.
        out.reconfigure(write_through=False, line_buffering=out.isatty())
    try:
        status = run(args)
        sys.stdout.flush()
        return status
    except CommandError as exc:
        report(str(exc), exc.hint)
        return exc.status
    except KeyboardInterrupt:
        return 128 + 2  # SIGINT
    except Terminated:
        return 128 + 15  # SIGTERM
    except BrokenPipeError:
        # The reader went away (`| head`): nobody is left to tell. Keep the interpreter from
        # flushing into the same pipe once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


class Tidied:
    """Within it SIGTERM raises Terminated, so that what is half made is taken away. Entered by what
    changes something: what only looks can end at once, and need not load the module."""

    _before: Any = None

    def __enter__(self) -> None:
        import signal

        try:
            self._before = signal.signal(signal.SIGTERM, self._on_signal)
        except ValueError:
            # Only the main thread may; a caller in another one has its own ways to stop us.
            pass

    @staticmethod
    def _on_signal(number: int, frame: object) -> None:
        raise Terminated

    def __exit__(self, *exc: object) -> None:
        if self._before is not None:
            import signal

            signal.signal(signal.SIGTERM, self._before)


def is_expected(exc: Exception) -> bool:
    """Whether an exception tells of a mistake or of the outside world, and not of a bug."""
    from qcow2x.errors import Qcow2Error

    return isinstance(exc, (Qcow2Error, OSError, ValueError, MemoryError))


def describe(exc: BaseException) -> str:
    """An exception as one line for a user."""
    from qcow2x.errors import ImageLocked

    if isinstance(exc, MemoryError):
        return "out of memory"
    if isinstance(exc, ImageLocked) and exc.path is not None:
        return f"'{exc.path}' is in use by another process"
    if isinstance(exc, OSError) and exc.strerror:
        text = exc.strerror
        if exc.filename is not None:
            text = f"Could not open '{os.fsdecode(exc.filename)}': {text}"
    else:
        text = str(exc) or type(exc).__name__
    return " ".join(text.splitlines())
