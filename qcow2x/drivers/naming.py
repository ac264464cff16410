"""What a node is called: the plain file name where that alone leads to the same graph again, else
``json:{...}``, with the keys in the order in which QEMU prints them."""

from __future__ import annotations

import os

from qcow2x.drivers.errors import OptionError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_BUCKETS = 512
#: QEMU cuts longer names, and ends them in three dots.
_MAX_NAME = 4096


def _hash(name: str) -> int:
    """The hash of QEMU's dictionaries (that of TDB): the order of a ``json:`` name comes from it."""
    raw = os.fsencode(name)
    value = 0x238F13AF * len(raw)
    for i, byte in enumerate(raw):
        value += byte << (i * 5 % 24)
    return (1103515243 * value + 12345) & 0xFFFFFFFF


def in_qemu_order(keys: list[str]) -> list[str]:
    """Keys sorted as QEMU walks a dictionary; in one bucket the last one put in comes first."""
    last_first = keys[::-1]
    return sorted(last_first, key=lambda key: _hash(key) % _BUCKETS)


def json_name(options: dict[str, Any]) -> str:
    """The options of a node, its children's nested, as a ``json:`` file name."""
    name = "json:" + _encode(options)
    return name if len(name) < _MAX_NAME else name[: _MAX_NAME - 4] + "..."


def _encode(value: Any) -> str:
    if isinstance(value, dict):
        pairs = (f"{_encode(key)}: {_encode(value[key])}" for key in in_qemu_order(list(value)))
        return "{" + ", ".join(pairs) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_encode(one) for one in value) + "]"
    import json

    return json.dumps(value)


# ---- Names against names -------------------------------------------------------------------------


def has_protocol(name: str) -> bool:
    """Whether a name starts with a protocol, ``nbd:...``, rather than being a path."""
    head = name.split("/", 1)[0]
    return ":" in head


def combine(base: str, name: str) -> str:
    """``name`` against the folder of ``base``, which may start with a protocol."""
    if os.path.isabs(name):
        return name
    start = base.index(":") + 1 if has_protocol(base) else 0
    return base[: max(start, base.rfind("/") + 1)] + name


def full_backing_name(backed: str, backing: str) -> str:
    """The name of a backing file as it stands in an image, made to count from the working folder.

    Raises OptionError where ``backed`` is no name that another could be relative to.
    """
    if not backing or has_protocol(backing) or os.path.isabs(backing):
        return backing
    if not backed or backed.startswith("json:"):
        raise OptionError(f"Cannot use relative backing file names for '{backed}'")
    return combine(backed, backing)
