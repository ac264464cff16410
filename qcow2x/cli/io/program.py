"""The program around the commands: its options, the file it opens, where commands come from."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from dataclasses import replace

from qcow2x.cli.getopt_long import OptionError, getopt_long
from qcow2x.cli.io.language import Language
from qcow2x.cli.io.session import Opening, Session
from qcow2x.cli.report import CommandError, program, report, set_program

#: The release whose qemu-io is stood in for.
QEMU_VERSION = "10.0"

_SHORTS = "hVc:d:f:rsnCmki:t:T:U"
_LONGS = {
    "help": "h",
    "version": "V",
    "cmd=": "c",
    "format=": "f",
    "read-only": "r",
    "snapshot": "s",
    "nocache": "n",
    "copy-on-read": "C",
    "misalign": "m",
    "native-aio": "k",
    "aio=": "i",
    "discard=": "d",
    "cache=": "t",
    "trace=": "T",
    "object=": "object",
    "image-opts": "image-opts",
    "force-share": "U",
}

USAGE = """Usage: {name} [OPTIONS]... [-c STRING]... [file]
QEMU Disk exerciser

  --object OBJECTDEF   define an object such as 'secret' for
                       passwords and/or encryption keys
  --image-opts         treat file as option string
  -c, --cmd STRING     execute command with its arguments
                       from the given string
  -f, --format FMT     specifies the block driver to use
  -r, --read-only      export read-only
  -s, --snapshot       use snapshot file
  -n, --nocache        disable host cache, short for -t none
  -C, --copy-on-read   enable copy-on-read
  -m, --misalign       misalign allocations for O_DIRECT
  -k, --native-aio     use kernel AIO implementation
                       (Linux only, prefer use of -i)
  -i, --aio=MODE       use AIO mode (threads, native or io_uring)
  -t, --cache=MODE     use the given cache mode for the image
  -d, --discard=MODE   use the given discard mode for the image
  -T, --trace [[enable=]<pattern>][,events=<file>][,file=<file>]
                       specify tracing options
                       see qemu-img(1) man page for full description
  -U, --force-share    force shared permissions
  -h, --help           display this help and exit
  -V, --version        output version information and exit

See '{name} -c help' for information on available commands.
"""


def main(argv: list[str] | None = None) -> int:
    from qcow2x.cli.main import Tidied, run_safely

    set_program("qcow2x-io", sys.argv[0] if argv is None else None)
    with Tidied():
        return run_safely(_run, sys.argv[1:] if argv is None else argv)


def language() -> Language:
    """All commands there are."""
    from qcow2x.cli.io import background, control, files, transfers, zones

    modules = (files, transfers, background, control, zones)
    return Language([command for module in modules for command in module.COMMANDS])


def _run(argv: list[str]) -> int:
    try:
        given, rest = getopt_long(argv, _SHORTS, tuple(_LONGS))
    except OptionError as exc:
        print(f"{program()}: {exc}", file=sys.stderr)
        print(USAGE.format(name=program()))
        return 1
    letters = {"--" + name.rstrip("="): letter for name, letter in _LONGS.items()}
    opening, format = Opening(), None
    commands: list[str] = []
    objects: list[str] = []
    flags: set[str] = set()
    for name, value in given:
        letter = letters.get(name, name[1:])
        flags.add(letter)
        if letter == "h":
            print(USAGE.format(name=program()))
            return 0
        if letter == "V":
            from qcow2x._version import __version__

            print(f"{program()} version {QEMU_VERSION} (qcow2x {__version__})")
            return 0
        if letter == "c":
            commands.append(value)
        elif letter == "f":
            format = value
        elif letter == "n":
            opening = opening.with_cache("none")
        elif letter == "t":
            opening = opening.with_cache(value)
        elif letter == "d":
            opening = opening.with_discard(value)
        elif letter == "i":
            opening = opening.with_aio(value)
        elif letter == "k":
            opening = opening.with_aio("native")
        elif letter == "object":
            objects.append(value)
    if len(rest) > 1:
        print(USAGE.format(name=program()))
        return 1
    if format is not None and "image-opts" in flags:
        raise CommandError("--image-opts and -f are mutually exclusive")
    opening = replace(
        opening,
        writable="r" not in flags,
        snapshot="s" in flags,
        copy_on_read="C" in flags,
        force_share="U" in flags,
        options={} if format is None else {"driver": format},
    )
    secrets = _read_secrets(objects)
    session = Session(language(), lambda: secrets)
    session.image_opts = "image-opts" in flags
    session.misalign = "m" in flags
    if rest:
        session.open(_opening_of(rest[0], opening, session.image_opts))
    return _run_commands(session, commands)


def _closed(session: Session) -> bool:
    """Closes the file. What cannot be written now is lost."""
    from qcow2x.cli import words
    from qcow2x.cli.io.disk import is_expected
    from qcow2x.errors import ImageBroken

    try:
        session.close()
    except ImageBroken:
        # What broke it was told when it did.
        return False
    except Exception as exc:
        if not is_expected(exc):
            raise
        # Of a write that was refused, not failed, only refcounts are left to write.
        refused = words.number(exc) in (errno.EINVAL, errno.EFBIG)
        if not refused or getattr(exc, "site", None) != "refblock_update":
            report(f"Failed to flush the L2 table cache: {words.reason(exc)}")
        report(f"Failed to flush the refcount block cache: {words.reason(exc)}")
        return False
    return True


def _read_secrets(objects: list[str]) -> dict[str, bytes]:
    if not objects:
        return {}
    from qcow2x.cli.objects import read_objects

    return read_objects(objects)


def _opening_of(file: str, opening: Opening, image_opts: bool) -> Opening:
    if not image_opts:
        return replace(opening, name=file)
    from qcow2x.drivers.errors import OptionError as WrongOption
    from qcow2x.drivers.options import parse_option_string

    try:
        return replace(opening, options=parse_option_string(file, "file"))
    except WrongOption as exc:
        raise CommandError(str(exc)) from exc


def _run_commands(session: Session, commands: list[str]) -> int:
    """Runs all commands, then closes; 1 if any of them failed."""
    failed = False
    lines = iter(commands) if commands else _typed_lines(session)
    try:
        for line in lines:
            failed |= not session.language.run_line(session, line)
            if session.quitting:
                break
        session.drain()
    finally:
        failed |= not _closed(session)
    return 1 if failed else 0


def _typed_lines(session: Session) -> Iterator[str]:
    prompt = f"{program()}> "
    if os.isatty(0):
        yield from _edited_lines(session, prompt)
        return
    while True:
        sys.stdout.write(prompt)
        sys.stdout.flush()
        session.turn()
        line = sys.stdin.readline()
        if not line:
            return
        yield line.removesuffix("\n")


def _edited_lines(session: Session, prompt: str) -> Iterator[str]:
    """Lines from a terminal, with history and completion of the commands' names."""
    import readline

    names = [command.name for command in session.language.commands]
    readline.set_completer(
        lambda text, n: ([name for name in names if name.startswith(text)] + [None])[n]
    )
    readline.parse_and_bind("tab: complete")
    while True:
        session.turn()
        try:
            yield input(prompt)
        except EOFError:
            print()
            return
