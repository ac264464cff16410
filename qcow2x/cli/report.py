"""Messages on standard error, laid out as QEMU's tools have them: the program's name, the text."""

from __future__ import annotations

import os
import sys


class CommandError(Exception):
    """A command cannot go on. ``hint`` is printed below the message, as it is."""

    def __init__(self, message: str, *, hint: str = "", status: int = 1) -> None:
        super().__init__(message)
        self.hint = hint
        self.status = status


def program() -> str:
    """The name that the program was called by, which stands before each message."""
    name = os.path.basename(sys.argv[0])
    return name if name and not name.startswith("-") and not name.endswith(".py") else "qcow2x"


def report(message: str, hint: str = "") -> None:
    """Prints a message, behind all that went to standard output before."""
    sys.stdout.flush()
    print(f"{program()}: {message}", file=sys.stderr)
    if hint:
        print(hint, file=sys.stderr)
    sys.stderr.flush()
