"""``qcow2x-io``: qemu-io's commands, options and output, under whatever name it is called."""

from __future__ import annotations


def main(argv: list[str] | None = None) -> int:
    """Run one command line (without the program's name); returns the exit status."""
    from qcow2x.cli.io.program import main

    return main(argv)
