"""The command language: what a command is, and how a line becomes a call."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qcow2x.cli.getopt_long import OptionError, getopt_long
from qcow2x.cli.report import CommandError, report

if TYPE_CHECKING:
    from qcow2x.cli.io.session import Session

ANY = -1


class Failed(Exception):
    """A command did not do what it was asked to. The text, if any, goes to standard output, among
    the reports of what went well."""


class WrongUsage(Exception):
    """A command was not given as it has to be; its synopsis is printed."""


@dataclass(frozen=True)
class Command:
    """One command: how it is called, what it takes, what ``help`` says of it."""

    name: str
    run: Callable[[Session, list[str]], None]
    oneline: str
    args: str | None = None
    help: str = ""
    altname: str | None = None
    least: int = 0
    most: int = 0
    #: Works without an open file.
    no_file: bool = False
    writes: bool = False

    def synopsis(self, called: str) -> str:
        args = f"{self.args} " if self.args is not None else ""
        return f"{called} {args}-- {self.oneline}"


class Language:
    """The table of commands."""

    def __init__(self, commands: Sequence[Command]) -> None:
        self.commands = sorted(commands, key=lambda command: command.name)
        self._by_name = {c.altname: c for c in self.commands if c.altname is not None}
        self._by_name.update({c.name: c for c in self.commands})

    def find(self, name: str) -> Command | None:
        return self._by_name.get(name)

    def run_line(self, session: Session, line: str) -> bool:
        """Runs one line; tells what went wrong, and returns whether nothing did."""
        words = [word for word in line.split(" ") if word]
        if not words:
            return True
        command = self.find(words[0])
        if command is None:
            _to_stderr(f'command "{words[0]}" not found')
            return False
        if session.disk is None and not command.no_file:
            _to_stderr("no file open, try 'help open'")
            return False
        given = len(words) - 1
        if given < command.least or (command.most != ANY and given > command.most):
            _to_stderr(f"bad argument count {given} to {words[0]}, expected {_wanted(command)}")
            return False
        try:
            if command.writes and session.disk is not None:
                session.disk.require_writable()
            command.run(session, words)
        except WrongUsage:
            print(command.synopsis(command.name))
            return False
        except Failed as exc:
            if exc.args:
                print(exc)
            return False
        except CommandError as exc:
            report(str(exc), exc.hint)
            return False
        return True


def options(words: list[str], shorts: str) -> tuple[list[tuple[str, str]], list[str]]:
    """The options of a command (each a letter and its argument) and what else it was given.
    Raises WrongUsage, after telling what is wrong."""
    try:
        found, rest = getopt_long(words[1:], shorts)
    except OptionError as exc:
        _to_stderr(f"{words[0]}: {exc}")
        raise WrongUsage from None
    return [(name[1:], value) for name, value in found], rest


def _wanted(command: Command) -> str:
    if command.most == ANY:
        return f"at least {command.least} arguments"
    if command.least == command.most:
        return f"{command.least} arguments"
    return f"between {command.least} and {command.most} arguments"


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr)
