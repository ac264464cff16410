"""``qcow2x inspect``: is an untrusted image safe to use? Opens nothing that the image names."""

from __future__ import annotations

import sys
from typing import Any

from qcow2x.cli.options import OUTPUT, Option, image_size, one_file, output_format, parse
from qcow2x.cli.text import human_size, json_text

OPTIONS = (
    OUTPUT,
    Option("", "max-virtual-size", "SIZE", "reject a disk, or snapshot, larger than this"),
    Option("", "allow-references", None, "let backing and data files pass if plainly named"),
)
USAGE = "[--output=human|json] [--max-virtual-size SIZE] [--allow-references] FILE|-"

STATUS = {"ok": 0, "reject": 1, "caution": 2}


def main(argv: list[str]) -> int:
    """Exit status 0 for "ok", 2 for "caution", 1 for "reject" and where FILE cannot be read."""
    from qcow2x.inspection import inspect

    parsed = parse("inspect", USAGE, OPTIONS, argv)
    style = output_format(parsed)
    limit = parsed.value("max-virtual-size")
    path = one_file(parsed)
    found = inspect(
        sys.stdin.buffer if path == "-" else path,
        max_virtual_size=None if limit is None else image_size(limit),
        allow_references=parsed.flag("allow-references"),
    )
    if style == "json":
        print(json_text({"filename": path, **_hyphened(found.as_dict())}))
    else:
        print("\n".join(_human(path, found)))
    return STATUS[found.verdict]


def _hyphened(value: Any) -> Any:
    if isinstance(value, dict):
        return {name.replace("_", "-"): _hyphened(item) for name, item in value.items()}
    if isinstance(value, tuple):
        return [_hyphened(item) for item in value]
    return value


def _human(path: str, found: Any) -> list[str]:
    lines = [f"image: {path}", f"verdict: {found.verdict}", f"file format: {found.format}"]
    if found.virtual_size is not None:
        size = found.virtual_size
        lines.append(f"virtual size: {human_size(size)} ({size} bytes)")
    for label, value in (
        ("version", found.version),
        ("cluster_size", found.cluster_size),
        ("compression type", found.compression_type),
        ("encryption", found.encryption),
        ("snapshots", found.snapshot_count),
        ("bitmaps", found.bitmap_count),
        ("incompatible features", ", ".join(found.incompatible_features)),
        ("compatible features", ", ".join(found.compatible_features)),
        ("autoclear features", ", ".join(found.autoclear_features)),
        ("also looks like", ", ".join(found.also_looks_like)),
    ):
        if value:
            lines.append(f"{label}: {value}")
    for named in found.references:
        # As JSON, since a name may hold what drives a terminal.
        flags = f" ({', '.join(named.flags)})" if named.flags else ""
        lines.append(f"{named.kind} name: {json_text(named.name)}{flags}")
    lines += [f"{item.severity}: {item.message}" for item in found.anomalies]
    return lines
