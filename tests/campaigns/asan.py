"""The tests, a soak and the fuzzer under AddressSanitizer and UndefinedBehaviorSanitizer:
python -m campaigns.asan [--seconds N] [--seed N] [TEST ...]

Half of the time goes to the tests, in an order that the seed gives, as many as there is time for;
the rest to the campaigns. With tests named, those alone are run, to the end. The
first finding ends its part with the sanitizer's report. Prints what was run.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from campaigns import sanitizer

TESTS = Path(__file__).resolve().parents[1]
#: What they look at is not the core, or a core that they build, or what the soak does as well.
LEFT_OUT = {
    "test_packaging.py", "test_state_machine.py", "test_readme.py", "test_demo.py", "test_qemu_img_docs.py",
    "test_cli_getopt.py", "test_cli_options.py",
}  # fmt: skip
#: Measure memory, of which the sanitizer takes its own: for its shadow, which has no room in a bounded
#: address space, and for what was freed, which it holds back up to 256 MiB.
NOT_HERE = (
    "tests/test_codec.py::test_a_huge_zstd_window_costs_no_memory",
    "tests/test_image.py::test_many_calls_take_no_memory",
    "tests/test_attacks.py::test_zstd_stream_that_asks_for_a_window_of_gigabytes",
    "tests/test_convert.py::test_memory_stays_bounded",
)


def run_tests(
    python: Path, names: list[str], seconds: float | None = None, seed: int | None = None
) -> dict[str, Any]:
    """Outcomes of the tests that there was time for."""
    with tempfile.TemporaryDirectory(prefix="qcow2x-asan-") as folder:
        told = Path(folder, "told.json")
        command = [python, "-m", "pytest", "-q", "-x", "-p", "campaigns.deadline", f"--told={told}"]
        command += [f"--deselect={name}" for name in NOT_HERE]
        if seconds is not None:
            command += [f"--seconds={seconds}", f"--seed={seed}"]
        status = subprocess.run([*map(str, command), *names], cwd=TESTS).returncode
        counts = json.loads(told.read_text()) if told.exists() else {}
    return {"status": status, "tests": counts}


def run_campaign(python: Path, name: str, seconds: float, seed: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="qcow2x-asan-") as folder:
        told = Path(folder, "told.json")
        # The fuzzer loads the build by itself.
        runner = sys.executable if name == "fuzz" else python
        command = [runner, "-m", f"campaigns.{name}", f"--seconds={seconds}", f"--seed={seed}"]
        status = subprocess.run([*map(str, command), f"--json={told}"], cwd=TESTS).returncode
        figures = json.loads(told.read_text()) if told.exists() else {}
    return {"status": status, **figures}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m campaigns.asan", description=__doc__)
    parser.add_argument("--seconds", type=float, default=600, help="for all of it")
    parser.add_argument("--seed", type=int, default=0, help="of the order and of the campaigns")
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    parser.add_argument("test", nargs="*", help="run these alone, as pytest names them")
    args = parser.parse_args(argv)
    begun = time.monotonic()
    python = sanitizer.build("asan")
    print(f"built in {time.monotonic() - begun:.0f} s; seed {args.seed}", flush=True)

    covered: dict[str, Any] = {"seed": args.seed}
    if args.test:
        covered["suite"] = run_tests(python, args.test)
    else:
        names = sorted(p.name for p in TESTS.glob("test_*.py") if p.name not in LEFT_OUT)
        covered["suite"] = run_tests(python, names, args.seconds / 2, args.seed)
        for campaign in CAMPAIGNS:
            share = args.seconds / 2 / len(CAMPAIGNS)
            covered[campaign] = run_campaign(python, campaign, share, args.seed)
    parts = {name: part for name, part in covered.items() if isinstance(part, dict)}
    failed = [name for name, part in parts.items() if part["status"]]
    covered["seconds"] = round(time.monotonic() - begun)
    if args.json:
        args.json.write_text(json.dumps(covered, indent=1) + "\n")
    for name, part in parts.items():
        print(f"{name}: {'FAILED' if part['status'] else 'nothing found'}: {_told(part)}")
    print(f"{len(parts) - len(failed)} passed, {len(failed)} failed")
    return 1 if failed else 0


#: Each is also a command of its own, and takes the same options.
CAMPAIGNS = ("soak", "fuzz")


def _told(part: dict[str, Any]) -> str:
    figures = {**part, **part.get("tests", {})}
    return ", ".join(
        f"{value:,} {name}"
        for name, value in figures.items()
        if isinstance(value, int) and name not in ("status", "seed", "seconds")
    )


if __name__ == "__main__":
    sys.exit(main())
