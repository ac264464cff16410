"""What the commands print: sizes, JSON as QEMU lays it out, and the progress bar."""

from __future__ import annotations

import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

_UNITS = ("", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei")
_SHORT = {'"': '\\"', "\\": "\\\\", "\b": "\\b", "\f": "\\f", "\n": "\\n", "\r": "\\r", "\t": "\\t"}


def human_size(nbytes: int) -> str:
    """``1.32 MiB``: three digits, the next unit from 1000 on."""
    import math

    exponent = math.frexp(nbytes / (1000 / 1024))[1]
    unit = max(0, (exponent - 1) // 10)
    return f"{nbytes / (1 << (10 * unit)):.3g} {_UNITS[unit]}B"


def json_text(value: object, indent: int = 0) -> str:
    """JSON in QEMU's layout: four spaces, one item a line also when there are none, ASCII only."""
    inner, outer = " " * (indent + 4), " " * indent
    if isinstance(value, dict):
        rows = [f"{inner}{json_text(k)}: {json_text(v, indent + 4)}" for k, v in value.items()]
        return "{\n" + ",\n".join(rows) + ("\n" if rows else "") + outer + "}"
    if isinstance(value, (list, tuple)):
        rows = [inner + json_text(item, indent + 4) for item in value]
        return "[\n" + ",\n".join(rows) + ("\n" if rows else "") + outer + "]"
    if isinstance(value, str):
        return f'"{"".join(map(_escape, value))}"'
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value)


def _escape(char: str) -> str:
    if char in _SHORT:
        return _SHORT[char]
    if " " <= char <= "~":
        return char
    code = ord(char)
    if 0xDC80 <= code <= 0xDCFF:
        # A byte of a file name that is no UTF-8.
        return "\\uFFFD"
    if code > 0xFFFF:
        code -= 0x10000
        return f"\\u{0xD800 | code >> 10:04X}\\u{0xDC00 | code & 0x3FF:04X}"
    return f"\\u{code:04X}"


class ProgressBar:
    """``    (12.34/100%)`` on one line of standard output, redrawn when it moved by a percent.

    An instance is a ``progress`` callable. With ``shown=False`` it prints that on standard error
    whenever the process gets SIGUSR1, and nothing else.
    """

    def __init__(self, shown: bool) -> None:
        self._shown = shown
        self._last = -1.0
        self._asked = False
        self._before: Any = None

    def __call__(self, done: int, total: int, phase: str) -> None:
        self.show(100.0 * done / total if total else 0.0)

    def show(self, percent: float) -> None:
        if self._asked:
            self._asked = False
            print(f"    ({percent:.2f}/100%)", file=sys.stderr, flush=True)
        if self._shown and (percent - self._last >= 1 or percent == 100.0 != self._last):
            self._last = percent
            print(f"    ({percent:.2f}/100%)\r", end="", flush=True)

    def finish(self) -> None:
        """Tells the end, also where the operation itself came to 100 percent before."""
        self._last = -1.0
        self.show(100.0)

    def _ask(self, number: int, frame: object) -> None:
        self._asked = True

    def __enter__(self) -> ProgressBar:
        if not self._shown:
            import signal

            try:
                self._before = signal.signal(signal.SIGUSR1, self._ask)
            except ValueError:
                # Not in the main thread: whoever runs this there has other ways to know.
                pass
        self.show(0.0)
        return self

    def __exit__(self, kind: object, value: object, trace: object) -> None:
        if self._before is not None:
            import signal

            signal.signal(signal.SIGUSR1, self._before)
        if self._shown:
            if kind is None:
                self.show(100.0)
            print(flush=True)


def snapshot_lines(snapshots: Sequence[Mapping[str, Any]]) -> list[str]:
    """The table of internal snapshots, from members of QEMU's ``SnapshotInfo``, with its head."""
    rows = [("ID", "TAG", "VM_SIZE", "DATE", "VM_CLOCK", "ICOUNT")]
    for one in snapshots:
        seconds, milliseconds = one["vm-clock-sec"], one["vm-clock-nsec"] // 10**6
        clock = (
            f"{seconds // 3600:04d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}.{milliseconds:03d}"
        )
        made = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(one["date-sec"]))
        icount = str(one.get("icount", "--"))
        size = human_size(one["vm-state-size"])
        rows.append((one["id"], one["name"], size, made, clock, icount))
    return [
        f"{ident:<7} {name:<16} {size:>8} {made:>19} {clock:>15} {icount:>10}"
        for ident, name, size, made, clock, icount in rows
    ]
