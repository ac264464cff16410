"""``amend``: change what an image is without copying it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from qcow2x.cli.formatopts import (
    FormatOptions,
    amend_descriptions,
    create_descriptions,
    help_lines,
    join_option_lists,
    wants_help,
)
from qcow2x.cli.objects import read_objects
from qcow2x.cli.opening import failure, open_disk, stored_in
from qcow2x.cli.options import (
    CREATE_OPTIONS,
    FORMAT,
    IMAGE_OPTS,
    OBJECT,
    PROGRESS,
    QUIET,
    Option,
    UsageError,
    parse,
)
from qcow2x.cli.report import CommandError, report
from qcow2x.cli.text import ProgressBar
from qcow2x.cli.words import misplaced_l1, reason

if TYPE_CHECKING:
    from collections.abc import Mapping

    from qcow2x.drivers import Node

OPTIONS = (
    PROGRESS,
    QUIET,
    FORMAT,
    Option("t", "cache", "MODE", "cache mode of the image (default: writeback)"),
    Option("", "force", None, "also what may lose the key to all data"),
    OBJECT,
    IMAGE_OPTS,
    CREATE_OPTIONS,
)
USAGE = "[--object OBJECT] [--image-opts] [-p] [-q] [-f FMT] [-t CACHE] [--force] -o OPTIONS FILE"
OPERANDS = (("FILE", "the image"),)


def main(argv: list[str]) -> int:
    parsed = parse("amend", USAGE, OPTIONS, argv, OPERANDS)
    lists = join_option_lists(parsed.values("options"))
    if not lists:
        raise UsageError("Must specify options (-o)")
    format = parsed.value("format")
    if format is not None and wants_help(lists):
        print_help(format)
        return 0
    if len(parsed.args) != 1:
        raise CommandError("Expecting one image file name")
    cache = parsed.value("cache", "writeback") or ""
    from qcow2x.drivers.opening import CACHE_FLAGS
    from qcow2x.errors import KeyRequired

    if cache not in CACHE_FLAGS:
        raise CommandError(f"Invalid cache option: {cache}")
    secrets = read_objects(parsed.values("object"))
    with open_disk(
        parsed.args[0],
        format,
        image_opts=parsed.flag("image-opts"),
        secrets=secrets,
        writable=True,
        cache=cache,
    ) as node:
        if wants_help(lists):
            print_help(node.driver)
            return 0
        options = _read(node.driver, lists)
        with ProgressBar(parsed.flag("progress") and not parsed.flag("quiet")) as bar:
            try:
                _amend(node, options, secrets, parsed.flag("force"), bar)
                bar.finish()
            except KeyRequired:
                raise CommandError(
                    "No keyslots match given (old) password for erase operation"
                ) from None
            except Exception as exc:
                if unusable := misplaced_l1(exc):
                    report(reason(exc))
                    doing = "Failed to turn zero into data clusters"
                    raise CommandError(f"{doing}: {os.strerror(unusable)}") from exc
                raise failure(exc, name=stored_in(node)) from exc
    return 0


def print_help(format: str) -> None:
    known = amend_descriptions(format)
    if not known:
        if not create_descriptions(format, None):
            raise CommandError(f"Unknown file format '{format}'")
        raise CommandError(f"Format driver '{format}' does not support option amendment")
    print(f"Amend options for '{format}':")
    print("\n".join(help_lines(known)))


def _read(format: str, lists: str) -> FormatOptions:
    known = amend_descriptions(format)
    if not known:
        raise CommandError(f"Format driver '{format}' does not support option amendment")
    options = FormatOptions(known)
    try:
        options.parse(lists)
    except CommandError as exc:
        if exc.hint:
            raise
        both = FormatOptions([*known, *create_descriptions(format, None)])
        try:
            both.parse(lists)
        except CommandError:
            raise exc from None
        raise CommandError(
            str(exc), hint="This option is only supported for image creation"
        ) from None
    return options


def _amend(
    node: Node, options: FormatOptions, secrets: Mapping[str, bytes], force: bool, bar: Any
) -> None:
    given = options.given()
    if node.driver == "luks":
        from qcow2x import encryption

        keys = _key_changes(node, options, "", secrets)
        disk: Any = node
        storage = disk.header_file
        if "new_key" in keys:
            encryption.add_key(
                storage,
                None,
                keys["key"],
                keys["new_key"],
                slot=keys["key_slot"],
                iter_time_ms=keys["iter_time_ms"],
                force=force,
            )
        else:
            encryption.erase_key(
                storage, None, slot=keys["erase_slot"], key=keys["erase_key"], force=force
            )
        return
    image: Any = node.image
    arguments: dict[str, Any] = {}
    if any(name.startswith("encrypt.") for name in given):
        if image._header.encryption is None:
            raise CommandError("Can't amend encryption options - encryption not present")
        if image._header.encryption != "luks":
            raise CommandError("Only LUKS encryption options can be amended")
        arguments = _key_changes(node, options, "encrypt.", secrets)
    if "compat" in given:
        arguments["compat"] = options.text("compat")
    if "refcount_bits" in given:
        arguments["refcount_bits"] = options.number("refcount_bits")
    if "data_file" in given:
        arguments["data_file"] = options.text("data_file")
    for name in ("lazy_refcounts", "data_file_raw"):
        if name in given:
            arguments[name] = options.flag(name)
    if options.number("size"):
        arguments["size"] = options.number("size")
    _refuse_other_backing(options, image._header)
    from qcow2x.ops.amend import amend

    amend(image, force=force, progress=bar, **arguments)


def _refuse_other_backing(options: FormatOptions, header: Any) -> None:
    name, format = options.text("backing_file"), options.text("backing_fmt")
    if name is None and format is None:
        return
    if (name, format) != (header.backing_file, header.backing_format):
        raise CommandError(
            "Cannot amend the backing file", hint="You can use 'qemu-img rebase' instead."
        )


def _key_changes(
    node: Node, options: FormatOptions, prefix: str, secrets: Mapping[str, bytes]
) -> dict[str, Any]:
    """What happens to the key slots, under the names that :func:`qcow2x.amend` has for it."""
    state = options.text(f"{prefix}state")
    new, old = options.text(f"{prefix}new-secret"), options.text(f"{prefix}old-secret")
    slot, milliseconds = options.number(f"{prefix}keyslot"), options.number(f"{prefix}iter-time")
    if state is None:
        raise CommandError("Parameter 'state' is missing")
    if state == "active":
        if new is None:
            raise CommandError("'new-secret' is required to activate a keyslot")
        if old is not None:
            raise CommandError("'old-secret' must not be given when activating keyslots")
        current = node.options.get(f"{prefix}key-secret")
        return {
            "key": _secret(secrets, current),
            "new_key": _secret(secrets, new),
            "key_slot": slot,
            "iter_time_ms": 2000 if milliseconds is None else milliseconds,
        }
    if state != "inactive":
        raise CommandError(f"Parameter 'state' does not accept value '{state}'")
    if new is not None:
        raise CommandError("'new-secret' must not be given when erasing keyslots")
    if milliseconds is not None:
        raise CommandError("'iter-time' must not be given when erasing keyslots")
    if old is None and slot is None:
        raise CommandError(
            "To erase keyslot(s), either explicit keyslot index or the password currently "
            "contained in them must be given"
        )
    return {"erase_key": None if old is None else _secret(secrets, old), "erase_slot": slot}


def _secret(secrets: Mapping[str, bytes], name: Any) -> bytes:
    if name not in secrets:
        raise CommandError(f"No secret with id '{name}'")
    return secrets[name]
