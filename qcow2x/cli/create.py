"""``create``: a new, empty image in any of the formats that can be made here."""

from __future__ import annotations

from typing import Any

from qcow2x.cli.formatopts import (
    Description,
    FormatOptions,
    create_descriptions,
    help_lines,
    join_option_lists,
    wants_help,
)
from qcow2x.cli.objects import read_objects
from qcow2x.cli.opening import failure
from qcow2x.cli.options import (
    CREATE_OPTIONS,
    OBJECT,
    QUIET,
    Option,
    UsageError,
    image_size,
    parse,
)
from qcow2x.cli.report import CommandError

OPTIONS = (
    QUIET,
    OBJECT,
    Option("f", "format", "FMT", "format of the new image: qcow2, luks or raw (default)"),
    Option("b", "backing", "FILE", "backing file, whose content shows through"),
    Option("F", "backing-format", "FMT", "format of the backing file (required with -b)"),
    Option("u", "backing-unsafe", None, "do not open the backing file to look at it"),
    CREATE_OPTIONS,
)
USAGE = "[-q] [--object OBJECT] [-f FMT] [-b BACKING -F FMT] [-u] [-o OPTS] FILE [SIZE]"
OPERANDS = (
    ("FILE", "the new image; one that is there is replaced"),
    ("SIZE", "size of its disk; that of the backing file if left out"),
)

#: Formats that are known by name but never made.
READ_ONLY_FORMATS = ("bochs", "cloop", "dmg", "blkdebug", "compress", "copy-on-read", "null-co")
#: Protocols that nothing can be created over.
FOREIGN_PROTOCOLS = ("nbd", "blkdebug", "json", "null-co")
_SECTOR = 512


def main(argv: list[str]) -> int:
    parsed = parse("create", USAGE, OPTIONS, argv, OPERANDS)
    format = parsed.value("format", "raw") or ""
    path = parsed.args[0] if parsed.args else None
    lists = join_option_lists(parsed.values("options"))
    if wants_help(lists):
        print_option_help(format, path)
        return 0
    if path is None:
        raise UsageError("Expecting image file name")
    size = image_size(parsed.args[1]) if len(parsed.args) > 1 else None
    if len(parsed.args) > 2:
        raise UsageError(f"Unexpected argument: {parsed.args[2]}")
    secrets = read_objects(parsed.values("object"))
    try:
        options = _read(
            path, format, lists, size, parsed.value("backing"), parsed.value("backing-format")
        )
        _check_backing(path, options, unsafe=parsed.flag("backing-unsafe"))
        detached = format == "luks" and options.flag("detached-header")
        if options.number("size") is None and not detached:
            raise CommandError("Image creation needs a size parameter")
        if not parsed.flag("quiet"):
            print(f"Formatting '{path}', fmt={format} {options.described()}", flush=True)
        create_image(path, format, options, secrets)
    except CommandError as exc:
        raise CommandError(f"{path}: {exc}", hint=exc.hint) from exc
    except Exception as exc:
        raise failure(exc, path) from exc
    return 0


def print_option_help(format: str, path: str | None) -> None:
    """What ``-o`` takes; with a file name also what the protocol of that takes."""
    known = descriptions_for(format, path)
    print("Supported options:" if path is not None else f"Supported {format} options:")
    print("\n".join(help_lines(known)))
    if path is None:
        print("\nThe protocol level may support further options.")
        print("Specify the target filename to include those options.")


def descriptions_for(format: str, path: str | None) -> list[Description]:
    """What a new image of *format* takes, at *path* if one is given. Raises CommandError."""
    known = create_descriptions(format, None)
    if not known:
        if format in READ_ONLY_FORMATS:
            raise CommandError(f"Format driver '{format}' does not support image creation")
        raise CommandError(f"Unknown file format '{format}'")
    return known if path is None else create_descriptions(format, protocol_of(path))


def protocol_of(path: str) -> str:
    """The protocol that a file name stands for. Raises CommandError if nothing can be created so."""
    if is_export(path):
        return "nbd"
    head, colon, _ = path.partition(":")
    if not colon or "/" in head or head == "file":
        return "file"
    if head in FOREIGN_PROTOCOLS:
        raise CommandError(f"Protocol driver '{head}' does not support image creation")
    raise CommandError(f"Unknown protocol '{head}'")


def _read(
    path: str,
    format: str,
    lists: str,
    size: int | None,
    backing: str | None,
    backing_format: str | None,
) -> FormatOptions:
    options = FormatOptions(descriptions_for(format, path))
    options.parse(lists)
    if options.number("size") is not None:
        if size is not None:
            raise CommandError("The image size must be specified only once")
    elif size is not None:
        options.set("size", str(size))
    if backing is not None:
        if not options.knows("backing_file"):
            raise CommandError(f"Backing file not supported for file format '{format}'")
        options.set("backing_file", backing)
    if backing_format is not None:
        if not options.knows("backing_fmt"):
            raise CommandError(f"Backing file format not supported for file format '{format}'")
        options.set("backing_fmt", backing_format)
    name = options.text("backing_file")
    if name == path:
        raise CommandError(
            "Error: Trying to create an image with the same filename as the backing file"
        )
    if name == "":
        raise CommandError("Expected backing file name, got empty string")
    return options


def _check_backing(path: str, options: FormatOptions, *, unsafe: bool) -> None:
    """The backing file can be opened, and gives the disk its size if nothing else does."""
    name, format = options.text("backing_file"), options.text("backing_fmt")
    if name is None:
        return
    no_format = "Backing file specified without backing format"
    if unsafe:
        if format is None:
            raise CommandError(no_format)
        return
    from qcow2x.cli.words import hint, reason
    from qcow2x.drivers import open_node
    from qcow2x.drivers.naming import full_backing_name

    try:
        node = open_node(full_backing_name(path, name), format=format, io=False, force_share=True)
    except Exception as exc:
        more = f"{hint(exc)}\nCould not open backing image.".lstrip()
        raise CommandError(reason(exc), hint=more) from exc
    with node:
        if format is None:
            raise CommandError(no_format, hint=f"Detected format of {node.driver}.")
        if options.number("size") is None:
            options.set("size", str(node.size))


# ---- Making it -----------------------------------------------------------------------------------


def is_export(path: str) -> bool:
    """Whether a name stands for a disk that a server shows."""
    return path.startswith(("nbd:", "nbd+", "nbds:", "nbds+"))


def create_image(path: str, format: str, options: FormatOptions, secrets: dict[str, bytes]) -> None:
    """Makes the image. Raises CommandError in QEMU's words, or what the library raises."""
    if not is_export(path):
        _create_in(path.removeprefix("file:"), format, options, secrets)
        return
    # A server's disk is there already, as large as it is: an image can be made in it.
    from qcow2x.cli.words import reason
    from qcow2x.drivers import open_node

    try:
        node = open_node(path, format="nbd", writable=True)
    except Exception as exc:
        raise CommandError(
            "Protocol driver 'nbd' does not support creating new images, so an existing image must "
            "be selected as the target; however, opening the given target as an existing image "
            f"failed: {reason(exc)}"
        ) from exc
    with node:
        if format == "raw" and node.size < (options.number("size") or 0):
            raise CommandError("Cannot grow NBD nodes")
        _create_in(node.storage, format, options, secrets)
        if format == "raw":
            # What an older image says of itself in its first sector is not true any more.
            node.write_zeroes(0, min(_SECTOR, node.size))
            node.flush()


def _create_in(target: Any, format: str, options: FormatOptions, secrets: dict[str, bytes]) -> None:
    from qcow2x.ops.create import DiskTooLarge

    size = options.number("size") or 0
    size += -size % _SECTOR
    hints: dict[str, Any] = {
        "nocow": options.flag("nocow"),
        "extent_size_hint": options.number("extent_size_hint") or 0,
    }
    try:
        if format == "qcow2":
            import qcow2x

            qcow2x.create(target, size, **qcow2_arguments(options, secrets), **hints)
            return
        from qcow2x.ops import newfile

        mode = _preallocation(options)
        if format == "luks":
            newfile.create_luks(
                target,
                size,
                encryption_of("luks", options, "", secrets),
                preallocation=mode,
                detached_header=options.flag("detached-header"),
                **hints,
            )
        else:
            newfile.create_raw(target, size, preallocation=mode, **hints)
    except DiskTooLarge as exc:
        hint = " (try using a larger cluster size)" if options.number("cluster_size") else ""
        raise CommandError(f"The image size is too large for file format '{format}'{hint}") from exc


_COMPAT = {"0.10": "0.10", "1.1": "1.1", "v2": "0.10", "v3": "1.1"}


def qcow2_arguments(options: FormatOptions, secrets: dict[str, bytes]) -> dict[str, Any]:
    """The options under the names that :func:`qcow2x.create` has for them."""
    arguments: dict[str, Any] = {
        "cluster_size": options.number("cluster_size"),
        "refcount_bits": options.number("refcount_bits"),
        "extended_l2": options.flag("extended_l2"),
        "lazy_refcounts": options.flag("lazy_refcounts"),
        "data_file_raw": options.flag("data_file_raw"),
        "compression_type": options.text("compression_type"),
        "backing_file": options.text("backing_file"),
        "backing_format": options.text("backing_fmt"),
        "data_file": _without_protocol(options.text("data_file")),
        "preallocation": options.text("preallocation") or "off",
    }
    compat = options.text("compat") or "1.1"
    arguments["compat"] = _COMPAT.get(compat, compat)
    format = options.text("encrypt.format")
    if options.text("encryption") is not None:
        if format is not None:
            raise CommandError(
                "'encrypt.format' and its alias 'encryption' can't be used at the same time"
            )
        format = "aes" if options.flag("encryption") else None
    if format is not None:
        arguments["encryption"] = encryption_of(format, options, "encrypt.", secrets)
    elif any(name.startswith("encrypt.") for name in options.given()):
        raise CommandError("Parameter 'encrypt.format' is missing")
    return arguments


def _without_protocol(name: str | None) -> str | None:
    """The path that a name with or without ``file:`` stands for, in a form that is not taken for a
    protocol when it is read again."""
    if name is None or not name.startswith("file:"):
        return name
    path = name.removeprefix("file:")
    return f"./{path}" if ":" in path.split("/", 1)[0] else path


def encryption_of(
    format: str, options: FormatOptions, prefix: str, secrets: dict[str, bytes]
) -> Any:
    """How the new image is to be encrypted; its options begin with *prefix*."""
    from qcow2x.encryption import Encryption

    if format == "qcow":
        format = "aes"
    if format not in ("aes", "luks"):
        raise CommandError(f"Parameter '{prefix}format' does not accept value '{format}'")
    if format == "aes":
        for name in options.given():
            if name.startswith(prefix) and name[len(prefix) :] not in ("format", "key-secret"):
                raise CommandError(f"Parameter '{name}' is unexpected")
    secret = options.text(f"{prefix}key-secret")
    if secret is None:
        raise CommandError(f"Parameter '{prefix}key-secret' is required for cipher")
    if secret not in secrets:
        raise CommandError(f"No secret with id '{secret}'")
    given: dict[str, Any] = {
        "cipher": options.text(f"{prefix}cipher-alg"),
        "mode": options.text(f"{prefix}cipher-mode"),
        "ivgen": options.text(f"{prefix}ivgen-alg"),
        "ivgen_hash": options.text(f"{prefix}ivgen-hash-alg"),
        "hash": options.text(f"{prefix}hash-alg"),
        "iter_time_ms": options.number(f"{prefix}iter-time"),
    }
    known = {key: value for key, value in given.items() if value is not None}
    return Encryption(secrets[secret], format=format, **known)


def _preallocation(options: FormatOptions) -> str:
    mode = options.text("preallocation") or "off"
    if mode not in ("off", "metadata", "falloc", "full"):
        raise CommandError(f"Parameter 'preallocation' does not accept value '{mode}'")
    return mode
