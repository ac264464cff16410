"""Options of block drivers: how they are written, nested, flattened and read.

Inside the drivers options are one flat dict whose keys have dots (``file.filename``), as in QEMU.
Values are what JSON has, or text where they come from an option string; the getters below turn
either into what is asked for, with QEMU's words where that fails.
"""

from __future__ import annotations

from qcow2x.drivers.errors import OptionError
from qcow2x.sizes import MAX_SIZE, parse_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from re import Match
    from typing import Any, TypeAlias

Options: TypeAlias = "dict[str, Any]"

_TRUE = ("on", "yes", "true", "y")
_FALSE = ("off", "no", "false", "n")
_SIZE_HINT = (
    "Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-\n"
    "and exabytes, respectively.\n"
)


# ---- Reading what was written --------------------------------------------------------------------


def parse_json_name(name: str) -> Options:
    """The options in a ``json:{...}`` file name, flat."""
    import json

    try:
        value = json.loads(_double_quoted(name.removeprefix("json:")), strict=False)
    except ValueError as exc:
        raise OptionError(
            f"Could not parse the JSON options: JSON parse error, {_json_reason(exc)}"
        ) from None
    if not isinstance(value, dict):
        raise OptionError("Invalid JSON object given")
    return flatten(value)


def _json_reason(exc: ValueError) -> str:
    text = str(exc)
    if "Expecting value" in text:
        return "expecting value"
    if "property name" in text:
        return "key is not a string in object"
    return "stray or missing token"


_JSON_PIECE = r"""(?s:"(?:[^"\\]|\\.)*"|'((?:[^'\\]|\\.)*)')"""


def _double_quoted(text: str) -> str:
    """QEMU takes 'single quotes' around strings in JSON as well."""

    import re

    def quote(match: Match[str]) -> str:
        inner = match.group(1)
        if inner is None:
            return match.group(0)
        return '"' + re.sub(r'\\\'|"', lambda m: "'" if m[0] == "\\'" else '\\"', inner) + '"'

    return re.sub(_JSON_PIECE, quote, text)


def parse_option_string(text: str, implied: str | None = None) -> Options:
    """``key=value,key=value``: a comma in a value is written twice. A first word without ``=`` is
    the value of ``implied``, else a word alone switches that option on (``no...``: off)."""
    import re

    options: Options = {}
    ends = re.compile("[=,]|$")
    at, first = 0, True
    while at < len(text):
        end = ends.search(text, at)
        assert end is not None
        if end[0] == "=":
            key = text[at : end.start()]
            value, at = _value_at(text, end.end())
            options[key] = value
        elif first and implied is not None:
            value, at = _value_at(text, at)
            options[implied] = value
        else:
            word, at = text[at : end.start()], end.end()
            switched_off = word.startswith("no")
            options[word[2:] if switched_off else word] = "off" if switched_off else "on"
        first = False
    return options


def _value_at(text: str, at: int) -> tuple[str, int]:
    """The value that starts at ``at``, its double commas undone, and where the next pair starts."""
    value = ""
    while True:
        comma = text.find(",", at)
        if comma < 0:
            return value + text[at:], len(text)
        value += text[at:comma]
        if not text.startswith(",,", comma):
            return value, comma + 1
        value += ","
        at = comma + 2


def flatten(options: Mapping[str, Any]) -> Options:
    """Nested objects and lists become keys with dots: ``{"a": {"b": 1}}`` is ``{"a.b": 1}``.
    Empty ones stay, as there is no key that could stand for them."""
    flat: Options = {}
    for key, value in options.items():
        if _is_mapping(value) and value:
            flat.update({f"{key}.{inner}": one for inner, one in flatten(value).items()})
        elif isinstance(value, (list, tuple)) and value:
            pairs = {str(i): one for i, one in enumerate(value)}
            flat.update({f"{key}.{inner}": one for inner, one in flatten(pairs).items()})
        else:
            flat[key] = value
    return flat


def _is_mapping(value: object) -> bool:
    if isinstance(value, (dict, str, int, list, tuple)) or value is None:
        return isinstance(value, dict)
    from collections.abc import Mapping

    return isinstance(value, Mapping)


def take_below(options: Options, prefix: str) -> Options:
    """The options whose keys start with ``prefix`` and a dot, without it; removed from options."""
    start = prefix + "."
    found = {key[len(start) :]: value for key, value in options.items() if key.startswith(start)}
    for key in found:
        del options[start + key]
    return found


# ---- Values, each with QEMU's words for what is none ---------------------------------------------


def take_text(options: Options, key: str) -> str | None:
    """The option as text, removed from options; None where it is not given."""
    value = options.pop(key, None)
    return None if value is None else as_text(value)


def as_text(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return str(value)


def as_bool(key: str, value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if value in _TRUE:
        return True
    if value in _FALSE:
        return False
    raise OptionError(f"Parameter '{key}' expects 'on' or 'off'")


def take_bool(options: Options, key: str, default: bool = False) -> bool:
    value = options.pop(key, None)
    return default if value is None else as_bool(key, value)


def take_size(options: Options, key: str) -> int | None:
    """A size in bytes, with or without suffix; None where it is not given."""
    value = options.pop(key, None)
    if value is None:
        return None
    nbytes = parse_size(as_text(value))
    if nbytes is None:
        raise OptionError(f"Parameter '{key}' expects a non-negative number below 2^64", _SIZE_HINT)
    if not 0 <= nbytes <= MAX_SIZE:
        raise OptionError(f"Value '{value}' is out of range for parameter '{key}'")
    return nbytes


def take_number(options: Options, key: str) -> int | None:
    value = options.pop(key, None)
    if value is None:
        return None
    try:
        number = int(as_text(value), 0)
    except ValueError:
        raise OptionError(f"Parameter '{key}' expects a number") from None
    if not -(1 << 64) < number < 1 << 64:
        raise OptionError(f"Value '{value}' is too large for parameter '{key}'")
    # As C has it: -1 is the largest there is.
    return number % (1 << 64)
