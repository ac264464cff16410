"""``qcow2x create``: a new, empty qcow2 or raw image."""

from __future__ import annotations

import os
from typing import Any

from qcow2x.cli.options import (
    CREATE_OPTIONS,
    QUIET,
    Option,
    UsageError,
    image_size,
    on_off,
    parse,
    parse_size,
    split_options,
    wants_option_help,
)

OPTIONS = (
    QUIET,
    Option("f", "format", "FMT", "format of the new image: qcow2 or raw (default)"),
    Option("b", "backing", "FILE", "backing file, whose content shows through"),
    Option("F", "backing-format", "FMT", "format of the backing file (required with -b)"),
    Option("u", "backing-unsafe", None, "do not open the backing file to look at it"),
    CREATE_OPTIONS,
)
USAGE = "[-q] [-f FMT] [-b BACKING -F FMT] [-u] [-o OPTS] FILE [SIZE]"

_TYPES = {"str": "<str>", "size": "<size>", "num": "<num>", "bool": "<bool (on/off)>"}

#: Name, kind and help of what ``-o`` takes.
QCOW2_OPTIONS = {
    "backing_file": ("str", "File name of a base image"),
    "backing_fmt": ("str", "Image format of the base image"),
    "cluster_size": ("size", "qcow2 cluster size"),
    "compat": ("str", "Compatibility level (v2 [0.10] or v3 [1.1])"),
    "compression_type": ("str", "Compression method used for image cluster compression"),
    "data_file": ("str", "File name of an external data file"),
    "data_file_raw": ("bool", "The external data file must stay valid as a raw image"),
    "extended_l2": ("bool", "Extended L2 tables"),
    "lazy_refcounts": ("bool", "Postpone refcount updates"),
    "preallocation": ("str", "Preallocation mode (allowed values: off, metadata, falloc, full)"),
    "refcount_bits": ("num", "Width of a reference count entry in bits"),
    "size": ("size", "Virtual disk size"),
}
RAW_OPTIONS = {
    "preallocation": ("str", "Preallocation mode (allowed values: off, falloc, full)"),
    "size": ("size", "Virtual disk size"),
}
#: Which come first in the line that create prints, and what they are when not given.
_QCOW2_ORDER = (
    ("cluster_size", 65536),
    ("extended_l2", False),
    ("preallocation", None),
    ("compression_type", "zlib"),
    ("size", None),
    ("compat", None),
    ("data_file", None),
    ("data_file_raw", None),
    ("backing_file", None),
    ("backing_fmt", None),
    ("lazy_refcounts", False),
    ("refcount_bits", 16),
)
_RAW_ORDER = (("size", None), ("preallocation", None))


def main(argv: list[str]) -> int:
    parsed = parse("create", USAGE, OPTIONS, argv)
    format = parsed.value("format", "raw") or ""
    known = options_of(format, parsed.args[0] if parsed.args else "")
    if wants_option_help(parsed.values("options")):
        print_option_help(format, known)
        return 0
    if not parsed.args:
        raise UsageError("Expecting image file name")
    if len(parsed.args) > 2:
        raise UsageError(f"Unexpected argument: {parsed.args[2]}")
    path = parsed.args[0]
    given = read_options(parsed.values("options"), known, path)
    if parsed.value("backing") is not None:
        given["backing_file"] = parsed.value("backing")
    if parsed.value("backing-format") is not None:
        given["backing_fmt"] = parsed.value("backing-format")
    if len(parsed.args) == 2:
        given["size"] = image_size(parsed.args[1])

    backing = given.get("backing_file")
    if backing is not None:
        _check_backing(path, given, unsafe=parsed.flag("backing-unsafe"))
    if "size" not in given:
        raise UsageError(f"{path}: Image creation needs a size parameter")
    if not parsed.flag("quiet"):
        order = _QCOW2_ORDER if format == "qcow2" else _RAW_ORDER
        print(f"Formatting '{path}', fmt={format} {_describe(given, order)}", flush=True)
    _create(path, format, given)
    return 0


def options_of(format: str, path: str = "") -> dict[str, tuple[str, str]]:
    """What ``-o`` takes for a new image of *format*; raises ValueError for a format unknown."""
    if format == "qcow2":
        return QCOW2_OPTIONS
    if format == "raw":
        return RAW_OPTIONS
    raise ValueError(f"{path}: Unknown file format '{format}'")


def print_option_help(format: str, known: dict[str, tuple[str, str]]) -> None:
    print(f"Supported {format} options:")
    for name, (kind, text) in known.items():
        left = f"{name}={_TYPES[kind]}"
        print(f"  {left:<22} - {text}")


def read_options(lists: list[str], known: dict[str, tuple[str, str]], path: str) -> dict[str, Any]:
    """The values of all ``-o`` arguments, typed."""
    values: dict[str, Any] = {}
    for name, text in split_options(lists).items():
        if name not in known:
            raise ValueError(f"{path}: Invalid parameter '{name}'")
        kind = known[name][0]
        if kind == "bool":
            values[name] = on_off(name, text)
        elif kind == "size":
            number = parse_size(text)
            if number is None:
                raise UsageError(f"{path}: Parameter '{name}' expects a size, not '{text}'")
            values[name] = number
        elif kind == "num":
            if not text.isdecimal():
                raise UsageError(f"{path}: Parameter '{name}' expects a number, not '{text}'")
            values[name] = int(text)
        else:
            values[name] = text
    return values


def library_options(given: dict[str, Any]) -> dict[str, Any]:
    """Options under the names that :func:`qcow2x.create` gives them."""
    names = {"backing_fmt": "backing_format"}
    options = {names.get(k, k): v for k, v in given.items() if k != "size"}
    if options.get("compat") in ("v2", "v3"):
        options["compat"] = {"v2": "0.10", "v3": "1.1"}[options["compat"]]
    return options


def _check_backing(path: str, given: dict[str, Any], *, unsafe: bool) -> None:
    """The backing file can be opened, and gives the disk its size if nothing else does."""
    if not given.get("backing_fmt"):
        raise UsageError(f"{path}: Backing file specified without backing format")
    if unsafe:
        return
    from qcow2x.ops.disk import open_disk

    name = os.path.join(os.path.dirname(path), given["backing_file"])
    disk, _ = open_disk(name, given["backing_fmt"], references="follow")
    try:
        given.setdefault("size", -(-disk.size // 512) * 512)
    finally:
        disk.close()


def _describe(given: dict[str, Any], order: tuple[tuple[str, Any], ...]) -> str:
    words = []
    for name, default in order:
        value = given.get(name, default)
        if value is None:
            continue
        if isinstance(value, bool):
            value = "on" if value else "off"
        words.append(f"{name}={str(value).replace(',', ',,')}")
    return " ".join(words)


def _create(path: str, format: str, given: dict[str, Any]) -> None:
    if format == "qcow2":
        import qcow2x

        qcow2x.create(path, given["size"], **library_options(given))
        return
    from qcow2x.ops.disk import RawDisk
    from qcow2x.ops.target import NewFile, is_device

    size = -(-given["size"] // 512) * 512
    if is_device(path):
        with RawDisk(path, "r+") as device:
            if device.size < size:
                raise ValueError(f"{path}: the device has only {device.size} bytes")
        return
    with NewFile(path) as new_file:
        with RawDisk(new_file.path, "r+") as disk:
            disk.resize(size, preallocation=given.get("preallocation", "off"))
        new_file.commit()
