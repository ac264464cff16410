"""``qcow2x-img``: qemu-img's commands, options and output, under whatever name it is called."""

from __future__ import annotations

import sys

from qcow2x.cli.getopt_long import OptionError, getopt_long
from qcow2x.cli.main import IMG_COMMANDS, Program, run_command, run_safely
from qcow2x.cli.options import UsageError
from qcow2x.cli.report import program, set_program

#: The release whose qemu-img is stood in for.
QEMU_VERSION = "10.0"

PROGRAM = Program(
    "qcow2x-img",
    "the commands of qemu-img, for qcow2, raw and LUKS images",
    more=("  -T, --trace ARG accepted for qemu-img, without effect",),
)


def main(argv: list[str] | None = None) -> int:
    """Run one command line (without the program's name); returns the exit status."""
    set_program(PROGRAM.name, sys.argv[0] if argv is None else None)
    return run_safely(_run, sys.argv[1:] if argv is None else argv)


def _run(argv: list[str]) -> int:
    if not argv:
        raise UsageError("Not enough arguments")
    try:
        # Options of the tool stand before the command, those of the command behind it.
        given, rest = getopt_long(argv, "hVT:", ("help", "version", "trace="), permute=False)
    except OptionError as exc:
        problem = "missing argument for" if exc.missing else "unrecognized"
        raise UsageError(f"{problem} option '{exc.argument}'") from None
    for name, _ in given:
        if name in ("-h", "--help"):
            print(PROGRAM.help(IMG_COMMANDS))
            return 0
        if name in ("-V", "--version"):
            from qcow2x._version import __version__

            print(f"{program()} version {QEMU_VERSION} (qcow2x {__version__})")
            return 0
        # -T, --trace: QEMU's trace points are not there, so that none can be switched on.
    if not rest:
        return 0
    return run_command(IMG_COMMANDS, rest[0], rest[1:])


if __name__ == "__main__":
    sys.exit(main())
