"""The options that a format takes when an image is made (``-o`` of create and convert) or amended.

A description lists the options in the order in which QEMU's driver has them: that is the order of
the line that ``create`` prints. A value is checked when it is given, so that a mistake is found
before anything is opened.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from qcow2x.cli.report import CommandError
from qcow2x.sizes import parse_size

_KINDS = {"str": "str", "bool": "bool (on/off)", "num": "num", "size": "size"}
_TRUE = ("on", "yes", "true", "y")
_FALSE = ("off", "no", "false", "n")
_SIZE_HINT = (
    "Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-\n"
    "and exabytes, respectively."
)


class Description(NamedTuple):
    """One option; ``default`` is the text that stands for it when it is not given."""

    name: str
    kind: str
    help: str
    default: str | None = None


def _luks(prefix: str, secret_help: str) -> list[Description]:
    return [
        Description(f"{prefix}key-secret", "str", secret_help),
        Description(f"{prefix}cipher-alg", "str", "Name of encryption cipher algorithm"),
        Description(f"{prefix}cipher-mode", "str", "Name of encryption cipher mode"),
        Description(f"{prefix}ivgen-alg", "str", "Name of IV generator algorithm"),
        Description(f"{prefix}ivgen-hash-alg", "str", "Name of IV generator hash algorithm"),
        Description(f"{prefix}hash-alg", "str", "Name of encryption hash algorithm"),
        Description(f"{prefix}iter-time", "num", "Time to spend in PBKDF in milliseconds"),
    ]


def _luks_amend(prefix: str) -> list[Description]:
    return [
        Description(
            f"{prefix}state", "str", "Select new state of affected keyslots (active/inactive)"
        ),
        Description(f"{prefix}keyslot", "num", "Select a single keyslot to modify explicitly"),
        Description(f"{prefix}old-secret", "str", "Select all keyslots that match this password"),
        Description(
            f"{prefix}new-secret",
            "str",
            "New secret to set in the matching keyslots. Empty string to erase",
        ),
        Description(f"{prefix}iter-time", "num", "Time to spend in PBKDF in milliseconds"),
    ]


_SIZE_OPTION = Description("size", "size", "Virtual disk size")
_QCOW2_COMMON = [
    _SIZE_OPTION,
    Description("compat", "str", "Compatibility level (v2 [0.10] or v3 [1.1])"),
    Description("backing_file", "str", "File name of a base image"),
    Description("backing_fmt", "str", "Image format of the base image"),
    Description("data_file", "str", "File name of an external data file"),
    Description("data_file_raw", "bool", "The external data file must stay valid as a raw image"),
    Description("lazy_refcounts", "bool", "Postpone refcount updates", "off"),
    Description("refcount_bits", "num", "Width of a reference count entry in bits", "16"),
]
_CREATE: dict[str, list[Description]] = {
    "qcow2": [
        Description(
            "encryption",
            "bool",
            "Encrypt the image with format 'aes'. (Deprecated in favor of encrypt.format=aes)",
        ),
        Description("encrypt.format", "str", "Encrypt the image, format choices: 'aes', 'luks'"),
        *_luks("encrypt.", "ID of secret providing qcow AES key or LUKS passphrase"),
        Description("cluster_size", "size", "qcow2 cluster size", "65536"),
        Description("extended_l2", "bool", "Extended L2 tables", "off"),
        Description(
            "preallocation",
            "str",
            "Preallocation mode (allowed values: off, metadata, falloc, full)",
        ),
        Description(
            "compression_type",
            "str",
            "Compression method used for image cluster compression",
            "zlib",
        ),
        *_QCOW2_COMMON,
    ],
    "luks": [
        _SIZE_OPTION,
        *_luks("", "ID of the secret that provides the keyslot passphrase"),
        Description("detached-header", "bool", "Create a detached LUKS header"),
    ],
    "raw": [_SIZE_OPTION],
    "file": [
        _SIZE_OPTION,
        Description("nocow", "bool", "Turn off copy-on-write (valid only on btrfs)"),
        Description(
            "preallocation", "str", "Preallocation mode (allowed values: off, falloc, full)"
        ),
        Description(
            "extent_size_hint", "size", "Extent size hint for the image file, 0 to disable"
        ),
    ],
}
_AMEND: dict[str, list[Description]] = {
    "qcow2": [*_luks_amend("encrypt."), *_QCOW2_COMMON],
    "luks": _luks_amend(""),
}


def create_descriptions(format: str, protocol: str | None = "file") -> list[Description]:
    """What an image of *format* takes when it is made in a file of *protocol* (None: not said)."""
    found: dict[str, Description] = {}
    for name in (format, protocol):
        for one in _CREATE.get(name or "", ()):
            found.setdefault(one.name, one)
    return list(found.values())


def amend_descriptions(format: str) -> list[Description]:
    """What of an image of *format* can be amended; empty if nothing can."""
    return _AMEND.get(format, [])


def help_lines(descriptions: Sequence[Description]) -> list[str]:
    """The list that ``-o help`` prints, sorted by name."""
    lines = []
    for one in descriptions:
        left = f"  {one.name}=<{_KINDS[one.kind]}>"
        lines.append(f"{left:<24} - {one.help}")
    return sorted(lines)


def is_option_list(text: str) -> bool:
    """Whether *text* can be joined to others with a comma without changing what they mean."""
    commas = len(text) - len(text.rstrip(","))
    return bool(text) and text[0] != "," and commas % 2 == 0


def join_option_lists(lists: Sequence[str]) -> str:
    """All ``-o`` arguments as one list. Raises CommandError."""
    for text in lists:
        if not is_option_list(text):
            raise CommandError(f"Invalid option list: {text}")
    return ",".join(lists)


def split_options(text: str) -> Iterator[tuple[str, str | None]]:
    """The name and value of each option; the value is None for a name alone. A comma in a value is
    written twice."""
    at = 0
    while at < len(text):
        end = at
        while end < len(text) and text[end] not in "=,":
            end += 1
        name = text[at:end]
        if end == len(text) or text[end] == ",":
            yield name, None
            at = end + 1
            continue
        value, at = _value(text, end + 1)
        yield name, value


def _value(text: str, at: int) -> tuple[str, int]:
    value = ""
    while at < len(text):
        if text[at] == ",":
            if text[at : at + 2] != ",,":
                break
            at += 1
        value += text[at]
        at += 1
    return value, at + 1


def wants_help(text: str) -> bool:
    """Whether ``help`` or ``?`` stands among the options."""
    return any(value is None and name in ("help", "?") for name, value in split_options(text))


class FormatOptions:
    """The options given for one image, over what is described."""

    def __init__(self, descriptions: Sequence[Description]) -> None:
        self._known = {one.name: one for one in descriptions}
        self._given: dict[str, tuple[str, int]] = {}

    def parse(self, text: str) -> None:
        """Takes in a list of options; later ones win. Raises CommandError in QEMU's words."""
        for name, value in split_options(text):
            if value is None:
                # A flag: "lazy_refcounts", or "nolazy_refcounts".
                value = "on"
                if name.startswith("no"):
                    name, value = name[2:], "off"
            if name != "id":
                self.set(name, value)

    def set(self, name: str, text: str) -> None:
        """Gives one option. Raises CommandError if there is none like that, or for its value."""
        if name not in self._known:
            raise CommandError(f"Invalid parameter '{name}'")
        kind = self._known[name].kind
        number = 0
        if kind == "bool":
            if text not in _TRUE + _FALSE:
                raise CommandError(f"Parameter '{name}' expects 'on' or 'off'")
            text = "on" if text in _TRUE else "off"
        if kind == "size":
            number = size_value(name, text)
        elif kind == "num":
            number = _number(name, text)
        self._given[name] = (text, number)

    def knows(self, name: str) -> bool:
        return name in self._known

    def given(self) -> list[str]:
        """The names of what was given, in the order of the description."""
        return [name for name in self._known if name in self._given]

    def text(self, name: str) -> str | None:
        """The value of an option as text, or its default."""
        if name in self._given:
            return self._given[name][0]
        known = self._known.get(name)
        return None if known is None else known.default

    def flag(self, name: str) -> bool:
        return self.text(name) == "on"

    def number(self, name: str) -> int | None:
        """The value of a number or a size; None where it was not given and has no default."""
        if name in self._given:
            return self._given[name][1]
        default = self._known[name].default if name in self._known else None
        return None if default is None else int(default)

    def described(self) -> str:
        """All that is set, as the line that announces a new image has it."""
        words = []
        for name, one in self._known.items():
            text = self.text(name)
            if text is None:
                continue
            if one.kind in ("size", "num") and name in self._given:
                number = self._given[name][1]
                text = str(number - (1 << 64) if number >> 63 else number)
            elif one.kind == "str":
                text = text.replace(",", ",,")
            words.append(f"{name}={text}")
        return " ".join(words)


def _number(name: str, text: str) -> int:
    stripped = text.strip()
    match = re.fullmatch(r"([+-]?)(0x[0-9a-f]+|0[0-7]*|[1-9]\d*)", stripped, re.IGNORECASE)
    if match is None:
        raise CommandError(f"Parameter '{name}' expects a number")
    sign, digits = match.groups()
    if digits[:2].lower() == "0x":
        value = int(digits, 16)
    else:
        value = int(digits, 8 if digits[0] == "0" else 10)
    if value >> 64:
        raise CommandError(f"Value '{text}' is too large for parameter '{name}'")
    return -value & ((1 << 64) - 1) if sign == "-" else value


def size_value(name: str, text: str) -> int:
    value = parse_size(text)
    if value is None:
        raise CommandError(
            f"Parameter '{name}' expects a non-negative number below 2^64", hint=_SIZE_HINT
        )
    if not 0 <= value < 1 << 64:
        raise CommandError(f"Value '{text}' is out of range for parameter '{name}'")
    return value
