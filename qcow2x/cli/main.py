"""The ``qcow2x`` command: finds the subcommand and turns exceptions into one line and a status."""

from __future__ import annotations

import os
import signal
import sys
from importlib import import_module
from typing import Any

from qcow2x.cli.options import UsageError
from qcow2x.cli.report import CommandError, report

PROGRAM = "qcow2x"

COMMANDS = {
    "bench": "time a series of reads or writes",
    "check": "check an image for corruption and leaked clusters, and repair leaks",
    "compare": "compare what two disks read as",
    "convert": "copy a disk into a new image",
    "create": "make a new image",
    "demo": "show what qcow2x does on a real disk made from this machine's files",
    "info": "tell what an image says of itself",
    "inspect": "tell whether an untrusted image is safe to use, opening nothing that it names",
    "map": "list which parts of a disk are stored, and where",
    "resize": "grow or shrink a disk",
}


class Terminated(BaseException):
    """SIGTERM arrived. Not an Exception, so that nothing on the way out takes it for an error."""


def main(argv: list[str] | None = None) -> int:
    """Run one command line (without the program's name); returns the exit status."""
    args = sys.argv[1:] if argv is None else argv
    for stream in (sys.stdout, sys.stderr):
        # File names are bytes: print those that are not valid UTF-8 as they are.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="surrogateescape")
    if not args or args[0] in ("-h", "--help", "help"):
        print(_help(), file=sys.stdout if args else sys.stderr)
        return 0 if args else 1
    if args[0] in ("-V", "--version"):
        from qcow2x._version import __version__

        print(f"{PROGRAM} version {__version__}")
        return 0
    if args[0] not in COMMANDS:
        return _fail(f"Command not found: {args[0]} (try '{PROGRAM} --help')")
    return _run(args[0], args[1:])


def _run(name: str, args: list[str]) -> int:
    command = import_module(f"qcow2x.cli.{name}")
    failure = getattr(command, "EXIT_ERROR", 1)
    before = _terminate_on_sigterm()
    try:
        status = command.main(args)
        sys.stdout.flush()
        return int(status or 0)
    except UsageError as exc:
        return _fail(f"{exc} (try '{PROGRAM} {name} --help')")
    except CommandError as exc:
        report(str(exc), exc.hint)
        return exc.status
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except Terminated:
        return 128 + signal.SIGTERM
    except BrokenPipeError:
        # The reader went away (`| head`): nobody is left to tell. Keep the interpreter from
        # flushing into the same pipe once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except MemoryError:
        return _fail("out of memory", failure)
    except Exception as exc:
        if not _is_expected(exc):
            raise
        return _fail(describe(exc), failure)
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def _terminate_on_sigterm() -> Any:
    def on_signal(number: int, frame: object) -> None:
        raise Terminated

    try:
        return signal.signal(signal.SIGTERM, on_signal)
    except ValueError:
        # Only the main thread may; a caller in another one has its own ways to stop us.
        return None


def _is_expected(exc: Exception) -> bool:
    from qcow2x.errors import Qcow2Error

    return isinstance(exc, (Qcow2Error, OSError, ValueError))


def describe(exc: BaseException) -> str:
    """An exception as one line for a user."""
    from qcow2x.errors import ImageLocked

    if isinstance(exc, ImageLocked) and exc.path is not None:
        return f"'{exc.path}' is in use by another process"
    if isinstance(exc, OSError) and exc.strerror:
        text = exc.strerror
        if exc.filename is not None:
            text = f"Could not open '{os.fsdecode(exc.filename)}': {text}"
    else:
        text = str(exc) or type(exc).__name__
    return " ".join(text.splitlines())


def _fail(message: str, status: int = 1) -> int:
    sys.stdout.flush()
    print(f"{PROGRAM}: {message}", file=sys.stderr)
    return status


def _help() -> str:
    lines = [
        f"usage: {PROGRAM} <command> [options] ...",
        "",
        "qcow2 disk images: make, convert, check and look into them.",
        "",
        "commands:",
        *(f"  {name:<10}{text}" for name, text in COMMANDS.items()),
        "",
        f"'{PROGRAM} <command> --help' lists the options of a command; they are those of qemu-img.",
    ]
    return "\n".join(lines)
