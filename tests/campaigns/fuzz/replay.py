"""Every image of the corpus used once in a plain build: python -m campaigns.fuzz.replay

What each of them led to once is mended; this says so without sanitizers, in seconds, and with
tighter bounds: a crash, a hang, memory, or a finding of target.py is told with the image's name.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from campaigns.fuzz import store
from campaigns.fuzz.target import Use, high_water

#: Seconds without a word, after which the image under way hangs; none takes half of one.
HANG = 100
#: Bytes that an image may make a process grow by, as SECURITY.md promises.
MEMORY = 64 << 20


def replay(folder: Path, images: dict[str, bytes], hang: float = HANG) -> tuple[int, list[str]]:
    """How many were used, and what was wrong."""
    for name, data in images.items():
        (folder / name).write_bytes(data)
    used, wrong = 0, []
    left = list(images)
    while left:
        done, what = _in_child(folder, left, hang)
        used += done
        wrong += what
        # Whatever ended the child, the images behind it are used by the next one.
        left = left[done:]
    return used, wrong


def _in_child(folder: Path, names: list[str], hang: float) -> tuple[int, list[str]]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", "campaigns.fuzz.replay", folder, *names]
    with tempfile.TemporaryFile() as said:
        child = subprocess.Popen([*map(str, command)], env=env, stdout=subprocess.PIPE, stderr=said)
        assert child.stdout is not None
        done, wrong = 0, []
        while done < len(names):
            ready, _, _ = select.select([child.stdout], [], [], hang)
            line = child.stdout.readline() if ready else b""
            if not line:
                child.kill()
                how = f"died with {child.wait()}" if ready else f"said nothing for {hang} s"
                said.seek(0)
                last = said.read().decode(errors="replace").strip()[-300:]
                wrong.append(f"{names[done]}: {how}: {last}")
                done += 1
                break
            wrong += [f"{names[done]}: {what}" for what in json.loads(line)]
            done += 1
        child.wait()
        child.stdout.close()
    return done, wrong


def _work(folder: Path, names: list[str]) -> int:
    path = folder / "image.qcow2"
    # What is imported and made on first use is here before anybody counts.
    path.write_bytes((folder / names[0]).read_bytes())
    Use(path, ask_qemu=False).all()
    for name in names:
        path.write_bytes((folder / name).read_bytes())
        before = high_water(reset=True)
        use = Use(path, ask_qemu=False)
        use.all()
        grown = high_water() - before
        if grown > MEMORY:
            use.wrong.append(f"took {grown >> 20} MiB of memory")
        sys.stdout.write(json.dumps(use.wrong) + "\n")
        sys.stdout.flush()
    return 0


def main() -> int:
    if len(sys.argv) > 1:
        return _work(Path(sys.argv[1]), sys.argv[2:])
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="qcow2x-fuzz-") as folder:
        used, wrong = replay(Path(folder), store.corpus())
    for what in wrong:
        print(what)
    print(f"{used} images in {time.monotonic() - begun:.0f} s; {len(wrong)} failed")
    return 1 if wrong or not used else 0


if __name__ == "__main__":
    sys.exit(main())
