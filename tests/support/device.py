"""A block device to try things on."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def block_device(backing: Path, nbytes: int, sector: int = 512) -> Iterator[Path]:
    """A loop device over the new file ``backing`` where this user may make one, else that file."""
    with backing.open("wb") as file:
        file.truncate(nbytes)
    losetup = shutil.which("losetup") or "/sbin/losetup"
    made = None
    if os.geteuid() == 0 and os.path.exists(losetup):
        made = subprocess.run(
            [losetup, "-f", "--show", "-b", str(sector), backing],
            capture_output=True,
            text=True,
            check=False,
        )
    if made is None or made.returncode != 0:
        yield backing
        return
    try:
        yield Path(made.stdout.strip())
    finally:
        subprocess.run([losetup, "-d", made.stdout.strip()], check=True)
