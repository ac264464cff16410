"""open, close, reopen, help and quit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from qcow2x.cli.io.language import ANY, Command, Failed, WrongUsage, options
from qcow2x.cli.io.session import Opening, Session
from qcow2x.cli.report import CommandError

_FIXED = ("driver", "node-name")


def _option_string(text: str) -> dict[str, Any]:
    from qcow2x.drivers.errors import OptionError
    from qcow2x.drivers.options import parse_option_string

    try:
        return parse_option_string(text)
    except OptionError as exc:
        raise CommandError(str(exc)) from exc


def _open(session: Session, argv: list[str]) -> None:
    opening = Opening()
    given, rest = options(argv, "snCro:ki:t:d:U")
    for letter, value in given:
        if letter == "s":
            opening = replace(opening, snapshot=True)
        elif letter == "n":
            opening = opening.with_cache("none")
        elif letter == "C":
            opening = replace(opening, copy_on_read=True)
        elif letter == "r":
            opening = replace(opening, writable=False)
        elif letter == "t":
            opening = opening.with_cache(value)
        elif letter == "d":
            opening = opening.with_discard(value)
        elif letter == "i":
            opening = opening.with_aio(value)
        elif letter == "k":
            opening = opening.with_aio("native")
        elif letter == "o":
            if session.image_opts:
                raise Failed("--image-opts and 'open -o' are mutually exclusive")
            opening = opening.with_options(_option_string(value))
        elif letter == "U":
            opening = replace(opening, force_share=True)
    if len(rest) > 1:
        raise WrongUsage
    if rest and session.image_opts:
        opening = opening.with_options(_option_string(rest[0]))
    elif rest:
        opening = replace(opening, name=rest[0])
    session.open(opening)


def _close(session: Session, argv: list[str]) -> None:
    session.close()


def _reopen(session: Session, argv: list[str]) -> None:
    opening = session.opening
    given, rest = options(argv, "c:o:rw")
    changed: dict[str, Any] = {}
    for letter, value in given:
        if letter == "c":
            opening = opening.with_cache(value)
        elif letter == "o":
            changed.update(_option_string(value))
    flags = [letter for letter, _ in given]
    if flags.count("r") + flags.count("w") > 1:
        raise CommandError("Only one -r/-w option may be given")
    if rest:
        raise WrongUsage
    chosen = "r" in flags or "w" in flags
    if chosen and "read-only" in changed:
        raise CommandError("Cannot set both -r/-w and 'read-only'")
    if "c" in flags and changed.keys() & {"cache.direct", "cache.no-flush"}:
        raise CommandError("Cannot set both -c and the cache options")
    options_before = dict(opening.options)
    if chosen:
        opening = replace(opening, writable="w" in flags)
        options_before.pop("read-only", None)
    if "c" in flags:
        options_before.pop("cache.direct", None)
        options_before.pop("cache.no-flush", None)
    _refuse_fixed(session, changed)
    opening = replace(opening, options=options_before)
    merged = session.open_disk.node.join_options(changed, opening.options)
    session.reopen(replace(opening, options=merged))


def _refuse_fixed(session: Session, changed: dict[str, Any]) -> None:
    """What a node is, and what it is called, stays as it is."""
    for key, value in changed.items():
        *path, last = key.split(".")
        if last not in _FIXED:
            continue
        node = session.open_disk.node
        for name in path:
            node = node.children.get(name)
            if node is None:
                return
        if value != (node.driver if last == "driver" else node.node_name):
            raise CommandError(f"Cannot change the option '{last}'")


def _help(session: Session, argv: list[str]) -> None:
    if len(argv) < 2:
        for command in session.language.commands:
            print(command.synopsis(command.name))
        print("\nUse 'help commandname' for extended help.")
        return
    wanted = session.language.find(argv[1])
    if wanted is None:
        raise Failed(f"command {argv[1]} not found")
    print(wanted.synopsis(argv[1]))
    if wanted.help:
        print(wanted.help)


def _quit(session: Session, argv: list[str]) -> None:
    session.quitting = True


COMMANDS = (
    Command(
        "open",
        _open,
        "open the file specified by path",
        args="[-rsCnkU] [-t cache] [-d discard] [-o options] [path]",
        altname="o",
        least=1,
        most=ANY,
        no_file=True,
        help="""
 opens a new file in the requested mode

 Example:
 'open -n -o driver=raw /tmp/data' - opens raw data file read-write, uncached

 Opens a file for subsequent use by all of the other qemu-io commands.
 -r, -- open file read-only
 -s, -- use snapshot file
 -C, -- use copy-on-read
 -n, -- disable host cache, short for -t none
 -U, -- force shared permissions
 -k, -- use kernel AIO implementation (Linux only, prefer use of -i)
 -i, -- use AIO mode (threads, native or io_uring)
 -t, -- use the given cache mode for the image
 -d, -- use the given discard mode for the image
 -o, -- options to be given to the block driver
""",
    ),
    Command("close", _close, "close the current open file", altname="c"),
    Command(
        "reopen",
        _reopen,
        "reopens an image with new options",
        args="[(-r|-w)] [-c cache] [-o options]",
        most=ANY,
        help="""
 Changes the open options of an already opened image

 Example:
 'reopen -o lazy-refcounts=on' - activates lazy refcount writeback on a qcow2 image

 -r, -- Reopen the image read-only
 -w, -- Reopen the image read-write
 -c, -- Change the cache mode to the given value
 -o, -- Changes block driver options (cf. 'open' command)
""",
    ),
    Command(
        "help",
        _help,
        "help for one or all commands",
        args="[command]",
        altname="?",
        most=1,
        no_file=True,
    ),
    Command("quit", _quit, "exit the program", altname="q", least=-1, most=ANY, no_file=True),
)
