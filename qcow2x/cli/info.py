"""``qcow2x info``: what an image says of itself. Opens nothing that the image names."""

from __future__ import annotations

import os
import stat
from typing import Any

from qcow2x.cli.options import FORMAT, OUTPUT, SHARE, Option, one_file, output_format, parse
from qcow2x.cli.text import human_size, json_text

OPTIONS = (
    FORMAT,
    OUTPUT,
    Option("", "backing-chain", None, "also describe the backing file, its backing file, ..."),
    SHARE,
)
QCOW2_MAGIC = b"QFI\xfb"
USAGE = "[-f FMT] [--output=human|json] [--backing-chain] [-U] FILE"


def main(argv: list[str]) -> int:
    parsed = parse("info", USAGE, OPTIONS, argv)
    style = output_format(parsed)
    chain = parsed.flag("backing-chain")
    infos = _describe_chain(one_file(parsed), parsed.value("format"), chain)
    if style == "json":
        print(json_text(infos if chain else infos[0]))
    else:
        print("\n\n".join("\n".join(_human(info)) for info in infos))
    return 0


def _describe_chain(path: str, format: str | None, whole: bool) -> list[dict[str, Any]]:
    infos: list[dict[str, Any]] = []
    seen: set[tuple[int, int]] = set()
    while True:
        info = describe(path, format)
        status = os.stat(path)
        if (status.st_dev, status.st_ino) in seen:
            raise ValueError(f"Backing file '{path}' creates an infinite loop.")
        seen.add((status.st_dev, status.st_ino))
        infos.append(info)
        if not whole or "full-backing-filename" not in info:
            return infos
        path, format = info["full-backing-filename"], info.get("backing-filename-format")


def describe(path: str, format: str | None) -> dict[str, Any]:
    """The members of QEMU's ``BlockGraphInfo``, in the order in which QEMU prints them."""
    # Not qcow2x.ops.disk: what it imports besides would be half of this command's time.
    from qcow2x.storage import open_storage

    with open_storage(path) as storage:
        if format is None:
            format = "qcow2" if storage.pread(4, 0) == QCOW2_MAGIC else "raw"
        if format not in ("qcow2", "raw"):
            raise ValueError(f"Could not open '{path}': Unknown driver '{format}'")
        file_size = storage.size()
        header = encryption = None
        if format == "qcow2":
            from qcow2x._core.header import Header

            header = Header.load(storage.pread, file_size, path)
            if header.encryption:
                encryption = _encryption(storage, header)
    status = os.stat(path)
    actual_size = status.st_blocks * 512
    protocol = "host_device" if stat.S_ISBLK(status.st_mode) else "file"
    whole_sectors = -(-file_size // 512) * 512

    info: dict[str, Any] = {"children": [_file_node(path, protocol, whole_sectors, actual_size)]}
    if header is None:
        info["virtual-size"] = whole_sectors
        info["filename"] = path
        info["format"] = "raw"
        info["actual-size"] = actual_size
        info["dirty-flag"] = False
        return info
    if header.backing_format:
        info["backing-filename-format"] = header.backing_format
    info["virtual-size"] = header.size
    info["filename"] = path
    info["cluster-size"] = header.cluster_size
    info["format"] = "qcow2"
    info["actual-size"] = actual_size
    info["format-specific"] = {"type": "qcow2", "data": _specific(header, encryption)}
    if header.backing_file:
        info["full-backing-filename"] = _resolve(path, header.backing_file)
    if header.encryption:
        info["encrypted"] = True
    if header.backing_file:
        info["backing-filename"] = header.backing_file
    info["dirty-flag"] = header.dirty
    return info


def _file_node(path: str, protocol: str, size: int, actual_size: int) -> dict[str, Any]:
    return {
        "name": "file",
        "info": {
            "children": [],
            "virtual-size": size,
            "filename": path,
            "format": protocol,
            "actual-size": actual_size,
            "format-specific": {"type": "file", "data": {}},
            "dirty-flag": False,
        },
    }


def _encryption(storage: Any, header: Any) -> dict[str, Any]:
    if header.encryption != "luks":
        return {"format": header.encryption}
    from qcow2x.encryption import describe
    from qcow2x.errors import FormatError

    try:
        luks = describe(storage, header)
    except FormatError:
        # A cipher that is not known here, or damage: all else can still be told.
        return {"format": "luks"}
    told: dict[str, Any] = {
        "ivgen-alg": luks.ivgen,
        "hash-alg": luks.hash,
        "cipher-alg": luks.cipher,
        "uuid": luks.uuid,
    }
    if luks.ivgen_hash is not None:
        told["ivgen-hash-alg"] = luks.ivgen_hash
    told.update({"format": "luks", "cipher-mode": luks.mode})
    told["slots"] = [
        {"active": True, "iters": s.iterations, "key-offset": s.key_offset, "stripes": s.stripes}
        if s.active
        else {"active": False, "key-offset": s.key_offset}
        for s in luks.slots
    ]
    told["payload-offset"] = luks.payload_offset
    told["master-key-iters"] = luks.master_key_iterations
    return told


def _specific(header: Any, encryption: dict[str, Any] | None) -> dict[str, Any]:
    is_v3 = header.version >= 3
    data: dict[str, Any] = {"compat": header.compat, "compression-type": header.compression_type}
    if is_v3:
        data["lazy-refcounts"] = header.lazy_refcounts
    data["refcount-bits"] = header.refcount_bits
    if header.has_data_file and header.data_file:
        data["data-file"] = header.data_file
    if encryption is not None:
        data["encrypt"] = encryption
    if header.has_data_file:
        data["data-file-raw"] = header.data_file_raw
    if is_v3:
        data["corrupt"] = header.corrupt
        data["extended-l2"] = header.extended_l2
    return data


def _resolve(path: str, name: str) -> str:
    """A backing file's name as seen from here: relative names count from the image's folder."""
    protocol = name.partition("/")[0].find(":") > 0
    return name if protocol else os.path.join(os.path.dirname(path), name)


def _human(info: dict[str, Any]) -> list[str]:
    lines = [
        f"image: {info['filename']}",
        f"file format: {info['format']}",
        f"virtual size: {human_size(info['virtual-size'])} ({info['virtual-size']} bytes)",
        f"disk size: {human_size(info['actual-size'])}",
    ]
    if info.get("encrypted"):
        lines.append("encrypted: yes")
    if "cluster-size" in info:
        lines.append(f"cluster_size: {info['cluster-size']}")
    if info["dirty-flag"]:
        lines.append("cleanly shut down: no")
    if "backing-filename" in info:
        name, full = info["backing-filename"], info["full-backing-filename"]
        lines.append(f"backing file: {name}" + ("" if name == full else f" (actual path: {full})"))
    if "backing-filename-format" in info:
        lines.append(f"backing file format: {info['backing-filename-format']}")
    if "format-specific" in info:
        lines.append("Format specific information:")
        lines += _human_members(info["format-specific"]["data"], "    ")
    node = info["children"][0]["info"]
    size = node["virtual-size"]
    return [
        *lines,
        "Child node '/file':",
        f"    filename: {node['filename']}",
        f"    protocol type: {node['format']}",
        f"    file length: {human_size(size)} ({size} bytes)",
        f"    disk size: {human_size(node['actual-size'])}",
    ]


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
