"""Sizes as people and QEMU write them: ``64k``, ``1.5G``, ``0x200``."""

from __future__ import annotations

_SUFFIXES = {"": 0, "b": 0, "k": 10, "m": 20, "g": 30, "t": 40, "p": 50, "e": 60}
_SIZE = r"(?i:(0x[0-9a-f]+)|(-?\d+)?(?:(\.\d*))?([bkmgtpe]?))"
MAX_SIZE = (1 << 63) - 1


def parse_size(text: str) -> int | None:
    """Bytes of a size like ``64k``, ``1.5G`` or ``0x200``; None when it is none.

    The number is exact, however large, and less than 0 for a plain negative one: the caller knows
    what is in range.
    """
    import re

    match = re.fullmatch(_SIZE, text)
    if match is None:
        return None
    hexadecimal, whole, fraction, suffix = match.groups()
    if hexadecimal is not None:
        return int(hexadecimal, 16)
    if whole is None and fraction in (None, "."):
        return None
    if whole is not None and whole.startswith("-"):
        return int(whole) if not suffix and fraction is None else None
    digits = (fraction or ".")[1:]
    shift = _SUFFIXES[suffix.lower()]
    if not shift and digits.strip("0"):
        return None
    value = int(whole or "0") << shift
    if digits:
        value += (int(digits) * (1 << shift) + 10 ** len(digits) // 2) // 10 ** len(digits)
    return value
