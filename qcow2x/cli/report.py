"""Messages on standard error, laid out as QEMU's tools have them: the program's name, the text."""

from __future__ import annotations

import os
import sys

_tool = _program = "qcow2x"


class CommandError(Exception):
    """A command cannot go on. ``hint`` is printed below the message, as it is."""

    def __init__(self, message: str, *, hint: str = "", status: int = 1) -> None:
        super().__init__(message)
        self.hint = hint
        self.status = status


def set_program(default: str, argv0: str | None) -> None:
    """Messages begin with the name in *argv0*, so that a link called qemu-img speaks as one; with
    *default* where that is None or a Python file (``python -m``)."""
    global _program, _tool
    _tool = default
    name = os.path.basename(argv0 or "")
    _program = default if not name or name.startswith("-") or name.endswith(".py") else name


def program() -> str:
    """The name that the program was called by, which stands before each message."""
    return _program


def tool() -> str:
    """The tool that runs, whatever it was called by."""
    return _tool


def report(message: str, hint: str = "") -> None:
    """Prints a message. What waits to go to standard output is not flushed: QEMU's tools do not
    either, and their users see messages first where both go into one pipe."""
    print(f"{_program}: {message}", file=sys.stderr)
    if hint:
        print(hint, file=sys.stderr)


def warn(message: str) -> None:
    """Prints a warning: something is done, but perhaps not what was meant."""
    report(f"warning: {message}")
