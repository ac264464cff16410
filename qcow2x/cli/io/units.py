"""Numbers, sizes and times, read and written as qemu-io does."""

from __future__ import annotations

import re

from qcow2x.cli.io.language import Failed
from qcow2x.sizes import MAX_SIZE, parse_size

SECTOR = 512
#: The longest request: what fits an int, in whole sectors.
MAX_REQUEST = (1 << 31) - SECTOR

_UNITS = (
    (60, " EiB"),
    (50, " PiB"),
    (40, " TiB"),
    (30, " GiB"),
    (20, " MiB"),
    (10, " KiB"),
)
_C_NUMBER = re.compile(r"\s*([-+]?)(0[xX][0-9a-fA-F]+|[0-9]+)")


def number(text: str) -> int:
    """An offset, a length or the like, with an optional suffix. Raises Failed."""
    if re.fullmatch(r"\s*-\d+", text):
        raise Failed(f"Parsing error: argument too large -- {text}")
    value = parse_size(text.lstrip())
    if value is None:
        raise Failed(
            f"Parsing error: non-numeric argument, or extraneous/unrecognized suffix -- {text}"
        )
    if value > MAX_SIZE:
        raise Failed(f"Parsing error: argument too large -- {text}")
    return value


def integer(text: str) -> int | None:
    """What C's strtol makes of all of a text, in any base; None where something is left over."""
    match = _C_NUMBER.fullmatch(text)
    if match is None:
        return None
    digits = match[2]
    if digits[:2] in ("0x", "0X"):
        value = int(digits, 16)
    elif digits[0] == "0":
        if not set(digits) <= set("01234567"):
            return None
        value = int(digits, 8)
    else:
        value = int(digits)
    return -value if match[1] == "-" else value


def pattern(text: str) -> int:
    """A byte to fill buffers with. Raises Failed."""
    value = integer(text)
    if value is None or not 0 <= value <= 255:
        raise Failed(f"{text} is not a valid pattern byte")
    return value


def size_text(value: float) -> str:
    """A size with its unit: at most three digits behind the point, none where they are zeros."""
    text, suffix = f"{value:f}", " bytes"
    for shift, unit in _UNITS:
        if value >= 1 << shift:
            text, suffix = f"{value / (1 << shift):.3f}", unit
            break
    at = text.find(".000")
    return (text[:at] if at >= 0 else text) + suffix


def time_text(nanoseconds: int, verbose: bool) -> str:
    seconds, rest = divmod(nanoseconds, 1_000_000_000)
    if not verbose and not seconds:
        return f"{rest / 1e9:05.2f} sec"
    hours, seconds = divmod(seconds, 3600)
    minutes, seconds = divmod(seconds, 60)
    return f"{hours}:{minutes:02}:{seconds + rest / 1e9:05.2f}"


def report_text(
    done: str, nanoseconds: int, offset: int, length: int, total: int, parsable: bool
) -> str:
    """What is printed of a request that went well."""
    seconds = nanoseconds / 1e9
    ops = 1 / seconds if seconds else float("inf")
    rate = total / seconds if seconds else float("inf")
    took = time_text(nanoseconds, parsable)
    if parsable:
        return f"{total},1,{took},{rate:.3f},{ops:.3f}"
    return (
        f"{done} {total}/{length} bytes at offset {offset}\n"
        f"{size_text(total)}, 1 ops; {took} ({size_text(rate)}/sec and {ops:.4f} ops/sec)"
    )


def dump_text(data: memoryview, offset: int) -> str:
    """A buffer in hexadecimal, 16 bytes a line."""
    lines = []
    for at in range(0, len(data), 16):
        row = bytes(data[at : at + 16])
        shown = "".join(chr(c) if chr(c).isascii() and chr(c).isalnum() else "." for c in row)
        lines.append(f"{offset + at:08x}:  {row.hex(' ')}  {shown}")
    return "\n".join(lines)
