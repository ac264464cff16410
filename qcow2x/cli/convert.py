"""``convert``: copy one or more disks into a new image, or into one that is there."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from qcow2x.cli.copying import told_as, why
from qcow2x.cli.create import (
    create_image,
    descriptions_for,
    is_export,
    print_option_help,
    qcow2_arguments,
)
from qcow2x.cli.formatopts import FormatOptions, join_option_lists, wants_help
from qcow2x.cli.objects import read_objects
from qcow2x.cli.opening import failure, open_disk
from qcow2x.cli.options import (
    IMAGE_OPTS,
    OBJECT,
    PROGRESS,
    QUIET,
    SHARE,
    Option,
    Parsed,
    cache_mode,
    image_size,
    number,
    parse,
)
from qcow2x.cli.report import CommandError, warn
from qcow2x.cli.snapshots import Wanted
from qcow2x.cli.text import ProgressBar

if TYPE_CHECKING:
    from qcow2x.ops.convert import ConvertResult, Damage

OPTIONS = (
    Option("c", "compress", None, "compress the clusters of the target (qcow2 only)"),
    Option("C", "copy-offload", None, "let the kernel copy from file to file where it can"),
    Option("f", "format", "FMT", "format of the sources (default: look)"),
    Option("O", "output-format", "FMT", "format of the target: raw (default), qcow2 or luks"),
    Option(
        "o",
        "options",
        "OPTS",
        "comma separated name=value list for a new target; 'help' lists them",
    ),
    Option(
        "B", "target-backing", "FILE", "backing file of the target; only the source's top is copied"
    ),
    Option("b", "backing", "FILE", "the same as -B"),
    Option("F", "backing-format", "FMT", "format of that backing file"),
    Option("l", "snapshot", "SNAPSHOT", "copy this internal snapshot of the source"),
    Option("m", "parallel", "N", "worker threads, 1 to 16 (default: one per CPU)"),
    Option("n", "no-create", None, "write into a target that is there already"),
    Option("r", "rate-limit", "RATE", "write no more than so many bytes per second"),
    Option("S", "sparse-size", "SIZE", "zero runs of this size are not stored (4k; 0: store all)"),
    Option("t", "cache", "MODE", "cache mode of the target (default: writeback)"),
    Option("T", "src-cache", "MODE", "cache mode of the sources (default: writeback)"),
    Option(
        "W",
        "out-of-order",
        None,
        "accepted for qemu-img: raw targets are always written out of order",
    ),
    Option("", "bitmaps", None, "copy the persistent bitmaps too"),
    Option("", "skip-broken-bitmaps", None, "with --bitmaps: leave out those that missed writes"),
    Option("", "salvage", None, "sectors that cannot be read become zeros"),
    Option("", "target-is-zero", None, "with -n: the target reads as zeros, do not write any"),
    Option("", "target-image-opts", None, "with -n: the target is a list of options of its driver"),
    Option("", "level", "N", "compression level: 1..9 for zlib, 1..19 for zstd"),
    PROGRESS,
    QUIET,
    SHARE,
    OBJECT,
    IMAGE_OPTS,
)
USAGE = (
    "[--object OBJECT] [--image-opts] [--target-image-opts] [--target-is-zero] "
    "[--bitmaps [--skip-broken-bitmaps]] [--salvage] [-U] [-C] [-c] [--level N] [-p] [-q] [-n] "
    "[-f FMT] [-t MODE] [-T MODE] [-O FMT] [-B|-b BACKING [-F FMT]] [-o OPTS] [-l SNAPSHOT] "
    "[-S SIZE] [-r RATE] [-m N] [-W] FILE [FILE2 ...] TARGET"
)
OPERANDS = (
    ("FILE ...", "what is copied; several follow each other on the target's disk"),
    ("TARGET", "the new image, or with -n one that is there"),
)
MAX_SPARSE = 16 << 20
MAX_WORKERS = 16


def main(argv: list[str]) -> int:
    parsed = parse("convert", USAGE, OPTIONS, argv, OPERANDS)
    lists = join_option_lists(parsed.values("options"))
    numbers = _numbers(parsed)
    snapshot = parsed.value("snapshot")
    wanted = None if snapshot is None else Wanted(snapshot)
    _refuse_conflicts(parsed)
    format = parsed.value("output-format", None if parsed.flag("target-image-opts") else "raw")
    if wants_help(lists):
        if format is None:
            raise CommandError("Option help requires a format be specified")
        print_option_help(format, parsed.args[-1] if len(parsed.args) > 1 else None)
        return 0
    if len(parsed.args) < 2:
        raise CommandError("Must specify image file name")
    *sources, target = parsed.args
    src_cache = cache_mode(parsed, "src-cache", "source cache")
    cache = cache_mode(parsed)
    secrets = read_objects(parsed.values("object"))
    quiet = parsed.flag("quiet")
    with ExitStack() as stack:
        bar = stack.enter_context(ProgressBar(parsed.flag("progress") and not quiet))
        disks = [
            stack.enter_context(
                open_disk(
                    name,
                    parsed.value("format"),
                    image_opts=parsed.flag("image-opts"),
                    secrets=secrets,
                    cache=src_cache,
                    force_share=parsed.flag("force-share"),
                )
            )
            for name in sources
        ]
        if wanted is not None:
            if len(disks) > 1 and wanted.key is not None:
                raise CommandError("No support for concatenating multiple snapshot")
            disks[0] = stack.enter_context(wanted.open(disks[0]))
        size = sum(disk.size for disk in disks)
        options = _target_options(parsed, format, lists, target, secrets, len(disks), size)
        destination: Any = target.removeprefix("file:")
        is_there = parsed.flag("no-create") or is_export(target)
        if is_there:
            destination = stack.enter_context(
                open_disk(
                    target,
                    format,
                    image_opts=parsed.flag("target-image-opts"),
                    secrets=secrets,
                    cache=cache,
                    writable=True,
                    options=options.pop("opened_with", None),
                    discard=numbers["sparse_size"] > 0,
                )
            )
            if destination.size < sum(disk.size for disk in disks):
                raise CommandError("output file is smaller than input file")
        options |= numbers
        result = _convert(parsed, disks, destination, is_there, target, format, options, bar)
        bar.finish()
    for name in reversed(result.skipped_bitmaps):
        warn(f"Skipping inconsistent bitmap '{name}'")
    return 0


def _convert(
    parsed: Parsed,
    disks: list[Any],
    destination: Any,
    is_there: bool,
    target: str,
    format: str | None,
    options: dict[str, Any],
    bar: ProgressBar,
) -> ConvertResult:
    from qcow2x.ops.convert import BrokenBitmap, convert

    bitmaps = "none"
    if parsed.flag("bitmaps"):
        bitmaps = "usable" if parsed.flag("skip-broken-bitmaps") else "all"
    level = parsed.value("level")
    try:
        with told_as(f"{target}: error while converting {format}: "):
            return convert(
                disks if len(disks) > 1 else disks[0],
                destination,
                dst_format=format or "raw",
                compress=parsed.flag("compress"),
                level=None if level is None else number(level, "compression level", 1, 22, 1),
                target_exists=is_there,
                target_is_zero=parsed.flag("target-is-zero"),
                bitmaps=bitmaps,
                salvage=parsed.flag("salvage"),
                on_damage=None if parsed.flag("quiet") else _tell_damage,
                copy_offload=parsed.flag("copy-offload"),
                cache=parsed.value("cache", "writeback") or "",
                references="follow",
                progress=bar,
                **options,
            )
    except BrokenBitmap as exc:
        raise CommandError(
            f"Cannot copy inconsistent bitmap '{exc.bitmap}'",
            hint="Try --skip-broken-bitmaps, or use 'qemu-img bitmap --remove' to delete it",
        ) from exc


def _tell_damage(damage: Damage) -> None:
    what = "block status at " if damage.what == "status" else ""
    warn(f"error while reading {what}offset {damage.offset}: {why(damage.error)}")


# ---- Options -------------------------------------------------------------------------------------


def _numbers(parsed: Parsed) -> dict[str, Any]:
    """The options with a number in them, under the names of the library."""
    sparse = image_size(parsed.value("sparse-size") or "4k", "buffer size for sparse output")
    if sparse % 512 or sparse > MAX_SPARSE:
        raise CommandError(
            "Invalid buffer size for sparse output specified. Valid sizes are multiples of 512 up "
            f"to {MAX_SPARSE}. Select 0 to disable sparse detection (fully allocates output)."
        )
    threads = parsed.value("parallel")
    workers = None
    if threads is not None:
        try:
            workers = int(threads, 0)
        except ValueError:
            workers = 0
        if not 1 <= workers <= MAX_WORKERS:
            raise CommandError(
                "Invalid number of coroutines. Allowed number of coroutines is between 1 and "
                f"{MAX_WORKERS}"
            )
    rate = image_size(parsed.value("rate-limit") or "0", "rate limit")
    return {"sparse_size": sparse, "threads": workers, "rate_limit": rate or None}


def _refuse_conflicts(parsed: Parsed) -> None:
    given = parsed.flag
    for wrong, message in (
        (
            given("skip-broken-bitmaps") and not given("bitmaps"),
            "Use of --skip-broken-bitmaps requires --bitmaps",
        ),
        (
            given("compress") and given("copy-offload"),
            "Cannot enable copy offloading when -c is used",
        ),
        (
            given("sparse-size") and given("copy-offload"),
            "Cannot enable copy offloading when -S is used",
        ),
        (
            given("copy-offload") and given("salvage"),
            "Cannot use copy offloading in salvaging mode",
        ),
        (
            given("target-image-opts") and not given("no-create"),
            "--target-image-opts requires use of -n flag",
        ),
        (given("no-create") and given("options"), "-o has no effect when skipping image creation"),
        (
            given("target-is-zero") and not given("no-create"),
            "--target-is-zero requires use of -n flag",
        ),
    ):
        if wrong:
            raise CommandError(message)


def _target_options(
    parsed: Parsed,
    format: str | None,
    lists: str,
    target: str,
    secrets: dict[str, bytes],
    n_sources: int,
    size: int,
) -> dict[str, Any]:
    """How the target is to be made, under the names of the library. One that a server shows is made
    here, of ``size`` bytes if nothing else is said; ``opened_with`` then has the options that it
    takes to open it."""
    backing = parsed.value("target-backing", parsed.value("backing"))
    given = None
    if not parsed.flag("no-create"):
        given = FormatOptions(descriptions_for(format or "", target))
        given.parse(lists)
        for name, value, what in (
            ("backing_file", backing, "Backing file"),
            ("backing_fmt", parsed.value("backing-format"), "Backing file format"),
        ):
            if value is not None:
                if not given.knows(name):
                    raise CommandError(f"{what} not supported for file format '{format}'")
                given.set(name, value)
        backing = given.text("backing_file")
    if backing is not None and parsed.flag("target-is-zero"):
        raise CommandError(
            "Cannot use --target-is-zero when the destination image has a backing file"
        )
    if backing is not None and n_sources > 1:
        raise CommandError(
            "Having a backing file for the target makes no sense when concatenating multiple "
            "input images"
        )
    if given is None:
        return {"backing_file": backing}
    if backing is not None and given.text("backing_fmt") is None:
        raise CommandError("Use of backing file requires explicit backing format")
    _refuse_compression(parsed, format, given)
    if is_export(target):
        if "size" not in given.given():
            given.set("size", str(size))
        try:
            create_image(target, format or "raw", given, secrets)
        except Exception as exc:
            raise failure(exc, f"{target}: error while converting {format}") from exc
        keys = {n: given.text(n) for n in given.given() if n.endswith("key-secret")}
        return {"backing_file": backing, "opened_with": keys}
    return _creation(format, given, secrets)


def _refuse_compression(parsed: Parsed, format: str | None, given: FormatOptions) -> None:
    if not parsed.flag("compress"):
        return
    if format != "qcow2":
        raise CommandError("Compression not supported for this file format")
    if given.flag("encryption") or given.text("encrypt.format") is not None:
        raise CommandError("Compression and encryption not supported at the same time")
    if given.text("preallocation") not in (None, "off"):
        raise CommandError("Compression and preallocation not supported at the same time")


def _creation(
    format: str | None, given: FormatOptions, secrets: dict[str, bytes]
) -> dict[str, Any]:
    from qcow2x.cli.create import encryption_of

    options: dict[str, Any] = {
        "nocow": given.flag("nocow"),
        "extent_size_hint": given.number("extent_size_hint") or 0,
    }
    if "size" in given.given():
        options["size"] = given.number("size")
    if format == "qcow2":
        return options | qcow2_arguments(given, secrets)
    options["preallocation"] = given.text("preallocation") or "off"
    if format == "luks":
        options["encryption"] = encryption_of("luks", given, "", secrets)
    return options
