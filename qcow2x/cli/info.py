"""``info``: what an image says of itself, and of the files that it lies in."""

from __future__ import annotations

import os

from qcow2x.cli.objects import read_objects
from qcow2x.cli.opening import open_disk
from qcow2x.cli.options import (
    FORMAT,
    IMAGE_OPTS,
    OBJECT,
    OUTPUT,
    SHARE,
    Option,
    one_file,
    output_format,
    parse,
)
from qcow2x.cli.report import CommandError
from qcow2x.cli.text import human_size, json_text, snapshot_lines

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from qcow2x.drivers import Node

OPTIONS = (
    FORMAT,
    OUTPUT,
    Option("", "backing-chain", None, "also describe the backing file, its backing file, ..."),
    SHARE,
    OBJECT,
    IMAGE_OPTS,
)
USAGE = (
    "[--object OBJECT] [--image-opts] [-f FMT] [--output=human|json] [--backing-chain] [-U] FILE"
)
OPERANDS = (("FILE", "the image"),)


def main(argv: list[str]) -> int:
    parsed = parse("info", USAGE, OPTIONS, argv, OPERANDS)
    path = one_file(parsed)
    style = output_format(parsed)
    whole = parsed.flag("backing-chain")
    options = {
        "image_opts": parsed.flag("image-opts"),
        "secrets": read_objects(parsed.values("object")),
        "force_share": parsed.flag("force-share"),
    }
    infos = _describe_chain(path, parsed.value("format"), whole, options)
    if style == "json":
        ordered = [_in_qemu_order(info) for info in infos]
        print(json_text(ordered if whole else ordered[0]))
    else:
        print("\n\n".join("\n".join(_human(info, 0, "/")) for info in infos))
    return 0


def _describe_chain(
    name: str, format: str | None, whole: bool, options: dict[str, Any]
) -> list[dict[str, Any]]:
    # Each layer is opened alone: what is below one that cannot be used is still told of.
    infos: list[dict[str, Any]] = []
    seen: set[str] = set()
    while True:
        if name in seen:
            raise CommandError(f"Backing file '{name}' creates an infinite loop.")
        seen.add(name)
        with open_disk(name, format, io=False, backing=False, **options) as node:
            info = describe(node)
        infos.append(info)
        if not whole or "backing-filename" not in info:
            return infos
        if "full-backing-filename" not in info:
            raise CommandError(
                "Could not determine absolute backing filename, but backing filename "
                f"'{info['backing-filename']}' present"
            )
        name, format = info["full-backing-filename"], info.get("backing-filename-format")
        options = {**options, "image_opts": False}


# ---- What there is to tell -----------------------------------------------------------------------


def describe(node: Node) -> dict[str, Any]:
    """The members of QEMU's ``BlockGraphInfo`` for a node and those below it."""
    info: dict[str, Any] = {
        "children": [
            {"name": name, "info": describe(child)}
            # The one that was opened last comes first.
            for name, child in reversed(node.children.items())
        ],
        "virtual-size": node.size,
        "filename": node.filename,
        "format": node.driver,
    }
    allocated = allocated_bytes(node)
    if allocated is not None:
        info["actual-size"] = allocated
    if _is_cleanly_described(node):
        info["dirty-flag"] = False
    if node.driver in ("file", "host_device"):
        info["format-specific"] = {"type": "file", "data": {}}
    elif node.driver == "qcow2":
        _describe_qcow2(node, info)
    elif node.driver == "luks":
        info["encrypted"] = True
        from qcow2x.encryption import describe as describe_luks

        disk: Any = node
        container = describe_luks(disk.header_file, None)
        info["format-specific"] = {"type": "luks", "data": _luks_members(container)}
    return info


def _is_cleanly_described(node: Node) -> bool:
    """Whether the driver says of itself whether it was shut down cleanly; filters and raw say what
    their child says."""
    if node.driver in ("file", "host_device", "qcow2", "luks"):
        return True
    return node.file is not None and _is_cleanly_described(node.file)


def allocated_bytes(node: Node) -> int | None:
    """Bytes that the host gives to a node's files; None where a driver cannot tell."""
    if node.is_protocol and not node.children:
        try:
            descriptor: Any = node.storage
            return os.fstat(descriptor.fileno()).st_blocks * 512
        except (AttributeError, OSError):
            return None
    total = 0
    for name, child in node.children.items():
        if name != "backing":
            part = allocated_bytes(child)
            if part is None:
                return None
            total += part
    return total


def _describe_qcow2(node: Node, info: dict[str, Any]) -> None:
    from qcow2x.drivers.errors import OptionError

    described: Any = node
    header = described.header
    storage = node.children["file"].storage
    info["cluster-size"] = header.cluster_size
    info["dirty-flag"] = header.dirty
    if header.encryption:
        info["encrypted"] = True
    info["format-specific"] = {"type": "qcow2", "data": _qcow2_members(node, header, storage)}
    if header.backing_file:
        info["backing-filename"] = header.backing_file
        if header.backing_format:
            info["backing-filename-format"] = header.backing_format
        try:
            info["full-backing-filename"] = node.full_backing_filename
        except OptionError:
            pass
    if header.nb_snapshots:
        from qcow2x.snapshot import read_table

        info["snapshots"] = [snapshot_members(entry) for entry in read_table(storage, header)]


def snapshot_members(entry: Any) -> dict[str, Any]:
    """An internal snapshot as QEMU's ``SnapshotInfo``."""
    told = {
        # Both end at their first NUL for who holds them in C strings.
        "id": entry.id.split("\0", 1)[0],
        "name": entry.name.split("\0", 1)[0],
        "vm-state-size": entry.vm_state_size,
        "date-sec": entry.date_sec,
        "date-nsec": entry.date_nsec,
        "vm-clock-sec": entry.vm_clock_nsec // 10**9,
        "vm-clock-nsec": entry.vm_clock_nsec % 10**9,
    }
    if entry.icount is not None:
        told["icount"] = entry.icount
    return told


def _qcow2_members(node: Node, header: Any, storage: Any) -> dict[str, Any]:
    data: dict[str, Any] = {
        "compat": header.compat,
        "compression-type": header.compression_type,
        "refcount-bits": header.refcount_bits,
    }
    if header.encryption:
        data["encrypt"] = _encryption(storage, header)
    if header.version < 3:
        return data
    data["lazy-refcounts"] = header.lazy_refcounts
    data["corrupt"] = header.corrupt
    data["extended-l2"] = header.extended_l2
    if header.bitmap_directory is not None:
        from qcow2x.bitmap import read_directory_of

        directory = read_directory_of(storage, header, header.size, node.filename)
        data["bitmaps"] = [
            {
                "name": entry.name.decode("utf-8", "surrogateescape"),
                "granularity": 1 << entry.granularity_bits,
                "flags": ["in-use"] * entry.broken + ["auto"] * entry.auto,
            }
            for entry in directory.entries
        ]
    if header.has_data_file:
        if header.data_file:
            data["data-file"] = header.data_file
        data["data-file-raw"] = header.data_file_raw
    return data


def _encryption(storage: Any, header: Any) -> dict[str, Any]:
    if header.encryption != "luks":
        return {"format": header.encryption}
    from qcow2x.encryption import describe as describe_luks
    from qcow2x.errors import FormatError

    try:
        return {"format": "luks", **_luks_members(describe_luks(storage, header))}
    except FormatError:
        # A cipher that is not known here, or damage: all else can still be told.
        return {"format": "luks"}


def _luks_members(luks: Any) -> dict[str, Any]:
    told: dict[str, Any] = {
        "cipher-alg": luks.cipher,
        "cipher-mode": luks.mode,
        "ivgen-alg": luks.ivgen,
        "hash-alg": luks.hash,
        "detached-header": luks.payload_offset == 0,
        "payload-offset": luks.payload_offset,
        "master-key-iters": luks.master_key_iterations,
        "uuid": luks.uuid,
    }
    if luks.ivgen_hash is not None:
        told["ivgen-hash-alg"] = luks.ivgen_hash
    told["slots"] = [
        {"active": True, "iters": s.iterations, "key-offset": s.key_offset, "stripes": s.stripes}
        if s.active
        else {"active": False, "key-offset": s.key_offset}
        for s in luks.slots
    ]
    return told


# ---- Printing it ---------------------------------------------------------------------------------


def _in_qemu_order(value: Any) -> Any:
    from qcow2x.drivers.naming import in_qemu_order

    if isinstance(value, dict):
        return {key: _in_qemu_order(value[key]) for key in in_qemu_order(list(value))}
    if isinstance(value, list):
        return [_in_qemu_order(item) for item in value]
    return value


def _human(info: dict[str, Any], depth: int, path: str) -> list[str]:
    indent = "    " * depth
    # Below the top a node without children is no disk but what one is stored in.
    stores = depth > 0 and not info["children"]
    name, kind, size_name = (
        ("filename", "protocol type", "file length")
        if stores
        else ("image", "file format", "virtual size")
    )
    size = info["virtual-size"]
    allocated = info.get("actual-size")
    lines = [
        f"{name}: {info['filename']}",
        f"{kind}: {info['format']}",
        f"{size_name}: {human_size(size)} ({size} bytes)",
        f"disk size: {'unavailable' if allocated is None else human_size(allocated)}",
    ]
    if info.get("encrypted"):
        lines.append("encrypted: yes")
    if "cluster-size" in info:
        lines.append(f"cluster_size: {info['cluster-size']}")
    if info.get("dirty-flag"):
        lines.append("cleanly shut down: no")
    if "backing-filename" in info:
        lines.append(f"backing file: {_backing_words(info)}")
        if "backing-filename-format" in info:
            lines.append(f"backing file format: {info['backing-filename-format']}")
    if "snapshots" in info:
        lines.append("Snapshot list:")
        lines += snapshot_lines(info["snapshots"])
    if info.get("format-specific", {}).get("data"):
        lines.append("Format specific information:")
        lines += _human_members(_in_qemu_order(info["format-specific"]["data"]), "    ")
    lines = [indent + line for line in lines]
    for child in info["children"]:
        lines.append(f"{indent}Child node '{path}{child['name']}':")
        lines += _human(child["info"], depth + 1, f"{path}{child['name']}/")
    return lines


def _backing_words(info: dict[str, Any]) -> str:
    name, full = info["backing-filename"], info.get("full-backing-filename")
    if full is None:
        return f"{name} (cannot determine actual path)"
    return name if name == full else f"{name} (actual path: {full})"


def specific_lines(node: Node) -> list[str]:
    """What only the node's driver knows of it, a line each; empty where there is nothing."""
    found = describe(node).get("format-specific")
    return [] if found is None else _human_members(found["data"], "    ")


def _human_members(members: dict[str, Any], indent: str) -> list[str]:
    lines = []
    for name, value in members.items():
        label = indent + name.replace("-", " ")
        if isinstance(value, list):
            value = {f"[{number}]": item for number, item in enumerate(value)}
        if isinstance(value, dict):
            lines += [f"{label}:", *_human_members(value, indent + "    ")]
        else:
            text = str(value).lower() if isinstance(value, bool) else value
            lines.append(f"{label}: {text}")
    return lines
