"""Command lines as qemu-img reads them: GNU options anywhere, sizes with suffixes, ``-o k=v,...``."""

from __future__ import annotations

import sys

from qcow2x.cli.getopt_long import OptionError, getopt_long
from qcow2x.cli.report import CommandError, program
from qcow2x.sizes import MAX_SIZE as MAX_SIZE
from qcow2x.sizes import parse_size as parse_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence


class UsageError(CommandError):
    """The command line is wrong; printed with a hint at ``--help``."""

    def __init__(self, message: str) -> None:
        super().__init__(message, hint=f"Try '{program()} --help' for more information")


class Option:
    """One option of a command; ``metavar`` is None for a flag."""

    def __init__(self, short: str, long: str, metavar: str | None, help: str) -> None:
        self.short = short
        self.long = long
        self.metavar = metavar
        self.help = help

    @property
    def key(self) -> str:
        return self.long or self.short


class Parsed:
    """The options that were given, by long name (by short name those that have no other), and the
    remaining arguments. ``pairs`` has the options in the order in which they were given."""

    def __init__(self, pairs: list[tuple[str, str]], args: list[str]) -> None:
        self.pairs = pairs
        self.args = args
        self._given: dict[str, list[str]] = {}
        for key, value in pairs:
            self._given.setdefault(key, []).append(value)

    def flag(self, key: str) -> bool:
        return key in self._given

    def value(self, key: str, default: str | None = None) -> str | None:
        """The last value given for *key*: later options win."""
        return self._given[key][-1] if key in self._given else default

    def values(self, key: str) -> list[str]:
        return self._given.get(key, [])


# Options that several commands share.
_HELP = Option("h", "help", None, "print this and exit")
QUIET = Option("q", "quiet", None, "print nothing but errors")
PROGRESS = Option("p", "progress", None, "show a progress bar")
FORMAT = Option("f", "format", "FMT", "format of the image: qcow2, raw or luks (default: look)")
OUTPUT = Option("", "output", "FMT", "human (default) or json")
SHARE = Option("U", "force-share", None, "open also what another process is writing")
OBJECT = Option("", "object", "OBJECT", "define an object, such as secret,id=ID,data=PASSWORD")
IMAGE_OPTS = Option("", "image-opts", None, "a file name is a list of options of its driver")
CREATE_OPTIONS = Option(
    "o", "options", "OPTS", "comma separated name=value list; 'help' lists them"
)


def parse(
    command: str,
    usage: str,
    options: Sequence[Option],
    argv: Sequence[str],
    operands: Sequence[tuple[str, str]] = (),
) -> Parsed:
    """Read *argv*; raises UsageError, or SystemExit after printing the help. ``operands`` are names and
    meanings of what stands besides options, for the help."""
    shorts = "h" + "".join(o.short + (":" if o.metavar else "") for o in options if o.short)
    longs = ["help"] + [o.long + ("=" if o.metavar else "") for o in options if o.long]
    by_name = {f"-{o.short}": o.key for o in options if o.short}
    by_name.update({f"--{o.long}": o.key for o in options if o.long})
    try:
        found, args = getopt_long(argv, shorts, longs)
    except OptionError as exc:
        problem = "missing argument for" if exc.missing else "unrecognized"
        raise UsageError(f"{problem} option '{exc.argument}'") from None
    if any(name in ("-h", "--help") for name, _ in found):
        print(_help(command, usage, options, operands))
        sys.exit(0)
    return Parsed([(by_name[name], value) for name, value in found], args)


def _help(
    command: str, usage: str, options: Sequence[Option], operands: Sequence[tuple[str, str]]
) -> str:
    from qcow2x.cli.main import COMMANDS

    rows = []
    for option in (*options, _HELP):
        names = [f"-{option.short}"] if option.short else []
        if option.long:
            names.append(f"--{option.long}")
        left = ", ".join(names) + (f" {option.metavar}" if option.metavar else "")
        rows.append(f"  {left:<30}{option.help}")
    named = [f"  {name:<30}{meaning}" for name, meaning in operands]
    return "\n".join(
        [
            f"usage: {program()} {command} {usage}",
            "",
            f"{COMMANDS[command]}.",
            *(["", "operands:", *named] if named else []),
            "",
            "options:",
            *rows,
            "",
            "sizes take the suffixes k, M, G, T, P and E, powers of 1024.",
        ]
    )


def image_size(text: str, what: str = "image size", low: int = 0, high: int = MAX_SIZE) -> int:
    """A size in bytes from the command line; raises CommandError in qemu-img's words."""
    value = parse_size(text)
    if value is None:
        # Two messages, each with the name in front, as qemu-img has it.
        raise CommandError(
            f"Invalid {what} specified. You may use k, M, G, T, P or E suffixes for",
            hint=f"{program()}: kilobytes, megabytes, gigabytes, terabytes, petabytes and exabytes.",
        )
    if not low <= value <= high:
        raise CommandError(f"Invalid {what} specified. Must be between {low} and {high}.")
    return value


def number(text: str | None, what: str, low: int, high: int, default: int) -> int:
    """A plain number between *low* and *high*, or *default* for None."""
    if text is None:
        return default
    try:
        value = int(text, 0)
    except ValueError:
        raise CommandError(f"Invalid {what} specified: '{text}'") from None
    if not low <= value <= high:
        raise CommandError(f"Invalid {what} specified. Must be between {low} and {high}.")
    return value


def cache_mode(parsed: Parsed, key: str = "cache", what: str = "cache") -> str:
    """A cache mode of QEMU's tools; raises CommandError for another."""
    from qcow2x.drivers.opening import CACHE_FLAGS

    mode = parsed.value(key, "writeback") or ""
    if mode not in CACHE_FLAGS:
        raise CommandError(f"Invalid {what} option: {mode}")
    return mode


def output_format(parsed: Parsed) -> str:
    value = parsed.value("output", "human") or ""
    if value not in ("human", "json"):
        raise CommandError("--output must be used with human or json as argument.")
    return value


def one_file(parsed: Parsed) -> str:
    if len(parsed.args) != 1:
        raise UsageError("Expecting one image file name")
    return parsed.args[0]


def split_options(lists: Sequence[str]) -> dict[str, str]:
    """The name=value pairs of all ``-o`` arguments; ``,,`` stands for a comma in a value."""
    pairs: dict[str, str] = {}
    for text in lists:
        for part in _split_commas(text):
            name, equals, value = part.partition("=")
            if not name:
                raise UsageError(f"Invalid option list: {text}")
            pairs[name] = value if equals else "on"
    return pairs


def _split_commas(text: str) -> list[str]:
    parts, current, at = [], "", 0
    while at < len(text):
        if text.startswith(",,", at):
            current += ","
            at += 2
        elif text[at] == ",":
            parts.append(current)
            current = ""
            at += 1
        else:
            current += text[at]
            at += 1
    return [*parts, current]


def wants_option_help(lists: Sequence[str]) -> bool:
    return any(part in ("help", "?") for text in lists for part in _split_commas(text))


def on_off(name: str, text: str) -> bool:
    if text not in ("on", "off"):
        raise UsageError(f"Parameter '{name}' expects 'on' or 'off'")
    return text == "on"
