"""Running tests of QEMU's suite one by one, against any qemu-img and qemu-io."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
STUB = HERE / "qemu-stub"

_STATUS = re.compile(r"^(\S+) +(pass|fail|not run) +\[[\d:]+\] *(?:\[[\d:]+\])? *(?:[\d.]+s)?(.*)$")
_START = """#!{python} -I
import sys
sys.path.insert(0, {root!r})
from {module} import main
sys.exit(main())
"""


@dataclass
class Outcome:
    """What became of one test. ``state`` is ``pass``, ``fail`` or ``not run``. One that was not
    ``judged`` ran into the time limit, or the suite could not run it: that it failed says nothing."""

    test: str
    state: str
    seconds: float
    reason: str = ""
    diff: str = ""
    judged: bool = True


class Programs:
    """The programs under test, put into a folder under QEMU's names."""

    def __init__(self, folder: Path, img: str, io: str, nbd: Path | None = None) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self.img = self._place(folder / "qemu-img", img, "qcow2x-img", "qcow2x.cli.img")
        self.io = self._place(folder / "qemu-io", io, "qcow2x-io", "qcow2x.cli.io")
        self.nbd = nbd or _find("qemu-nbd")
        # The suite finds out the architecture from the name.
        self.emulator = folder / f"qemu-system-{os.uname().machine}"
        self.emulator.symlink_to(STUB)

    @staticmethod
    def _place(path: Path, whose: str, script: str, module: str) -> Path:
        """Ours as installed beside this Python, else as it is in the checkout; or the system's."""
        if whose == "system":
            return _find(path.name)
        installed = Path(sys.executable).parent / script
        if installed.exists():
            path.symlink_to(installed)
        else:
            path.write_text(_START.format(python=sys.executable, root=str(ROOT), module=module))
            path.chmod(0o755)
        return path

    def versions(self) -> str:
        lines = []
        for program in (self.img, self.io, self.nbd):
            told = subprocess.run([program, "--version"], capture_output=True, text=True)
            lines.append(f"{program}: {(told.stdout or told.stderr).partition(chr(10))[0]}")
        return "\n".join(lines)


def _find(name: str) -> Path:
    found = shutil.which(name)
    if found is None:
        raise FileNotFoundError(f"{name} is not installed (Debian: qemu-utils)")
    return Path(found)


class Suite:
    """The tests in *folder* (``tests/qemu-iotests`` of QEMU's source), run with *programs*.

    *options* are those that the suite gives to each image it makes (its ``-o``); *timeout* is in
    seconds and for one test.
    """

    def __init__(
        self, folder: Path, programs: Programs, *, options: str | None = None, timeout: float = 180
    ) -> None:
        self._folder = folder
        self._programs = programs
        self._options = options
        self._timeout = timeout
        self._running: set[subprocess.Popen[bytes]] = set()

    def run(
        self, tests: Sequence[str], jobs: int, tell: Callable[[Outcome], None]
    ) -> list[Outcome]:
        """Run *tests*, each in folders of its own; *tell* hears of each as soon as it is done."""
        with _scratch() as scratch, ThreadPoolExecutor(jobs) as pool:

            def one(test: str) -> Outcome:
                outcome = self._run_one(test, scratch)
                tell(outcome)
                return outcome

            try:
                return list(pool.map(one, tests))
            except BaseException:
                # Interrupted: what runs is in sessions of its own and hears of no signal to us.
                pool.shutdown(wait=False, cancel_futures=True)
                for process in list(self._running):
                    _kill(process)
                raise

    def _run_one(self, test: str, scratch: Path) -> Outcome:
        work = scratch / test
        for name in ("images", "sockets"):
            (work / name).mkdir(parents=True)
        command = [sys.executable, str(self._folder / "check"), "-qcow2", "--color", "off"]
        command += ["--source-dir", str(self._folder), "--build-dir", str(work)]
        if self._options:
            command += ["-o", self._options]
        start = time.monotonic()
        process = subprocess.Popen(
            [*command, test],
            cwd=work,
            env=self._environment(work),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._running.add(process)
        try:
            output, _ = process.communicate(timeout=self._timeout)
            late = False
        except subprocess.TimeoutExpired:
            late = True
            _kill(process)
            output, _ = process.communicate()
        self._running.discard(process)
        seconds = time.monotonic() - start
        _stop_daemons(work)
        outcome = _judge(test, output.decode(errors="replace"), seconds)
        if late:
            diff = _partial_diff(self, test, work)
            outcome = Outcome(test, "fail", seconds, "took too long", diff, judged=False)
        shutil.rmtree(work, ignore_errors=True)
        return outcome

    def _path_of(self, test: str) -> str:
        return test if (self._folder / test).exists() else f"tests/{test}"

    def _environment(self, work: Path) -> dict[str, str]:
        programs = self._programs
        return {
            **os.environ,
            "QEMU_PROG": str(programs.emulator),
            "QEMU_IMG_PROG": str(programs.img),
            "QEMU_IO_PROG": str(programs.io),
            "QEMU_NBD_PROG": str(programs.nbd),
            "QSD_PROG": str(programs.emulator),
            "TEST_DIR": str(work / "images"),
            "SOCK_DIR": str(work / "sockets"),
            # Memory that nobody has written to is no zeros; the same in each run.
            "MALLOC_PERTURB_": "85",
        }

    def reference(self, test: str) -> Path:
        return self._folder / f"{self._path_of(test)}.out"


@contextmanager
def _scratch() -> Iterator[Path]:
    """A folder with a short name, as the paths of sockets must be, on a disk: files on tmpfs have
    no O_DIRECT."""
    base = os.environ.get("TEST_DIR", "/var/tmp")
    with tempfile.TemporaryDirectory(prefix="iotests-", dir=base) as name:
        yield Path(name)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """A test with all that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _judge(test: str, output: str, seconds: float) -> Outcome:
    lines = output.replace("\r", "\n").split("\n")
    for number, line in enumerate(lines):
        match = _STATUS.match(line)
        if match and match[1] == test:
            rest = lines[number + 1 :]
            diff = "\n".join(text for text in rest if not text.startswith(("Failures:", "Failed ")))
            # The suite's own copy of the output is gone when it is read.
            reason = re.sub(r"^\.\.\. *|output mismatch .*", "", match[3].strip())
            return Outcome(test, match[2], seconds, reason, diff.strip("\n"))
    return Outcome(test, "fail", seconds, "the suite did not run it", output, judged=False)


def _partial_diff(suite: Suite, test: str, work: Path) -> str:
    """How far a test came that was stopped."""
    import difflib

    written = list(work.glob(f"images/*/{test}.out.bad"))
    got = written[0].read_text(errors="replace").splitlines() if written else []
    expected = suite.reference(test).read_text().splitlines()
    return "\n".join(difflib.unified_diff(expected, got, "expected", "written", lineterm=""))


def _stop_daemons(work: Path) -> None:
    """A test that was stopped may have left its NBD server behind."""
    for pid_file in work.glob("images/*/*.pid"):
        with suppress(OSError, ValueError):
            os.kill(int(pid_file.read_text()), signal.SIGTERM)
