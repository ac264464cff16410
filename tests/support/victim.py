"""A child process that opens damaged images, so that a crash, a hang or a greedy allocation is an
outcome that the test can name rather than the end of the test run.

The parent sends one damage per line (JSON) and gets one answer per line. The child's address space
is bounded to what it has after a warm-up plus 64 MiB.
"""

import json
import os
import resource
import select
import signal
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

#: Bytes a hostile image may make us take, as SECURITY.md promises.
HEADROOM = 64 << 20
#: Longer is a hang, on any machine.
HANG = 60


class Victim:
    """The parent's end."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None

    def suffer(self, base: Path, patches: list[tuple[int, bytes]], length: int | None = None,
               **more: Any) -> dict[str, Any]:  # fmt: skip
        """Damages a copy of ``base`` (bytes at offsets, then cut to ``length``) and uses it in every
        way. Returns what each step ended with; raises AssertionError on a crash or hang."""
        child = self._running()
        request = {"base": str(base), "length": length, **more}
        request["patches"] = [(offset, data.hex()) for offset, data in patches]
        assert child.stdin is not None and child.stdout is not None
        child.stdin.write(json.dumps(request).encode() + b"\n")
        child.stdin.flush()
        ready, _, _ = select.select([child.stdout], [], [], HANG)
        answer = child.stdout.readline() if ready else b""
        if not answer:
            self.close(kill=True)
            how = f"died of {_name(child.returncode)}" if ready else f"hung for {HANG} s"
            raise AssertionError(f"the child {how} on {json.dumps(request)[:600]}")
        told = json.loads(answer)
        assert isinstance(told, dict)
        return told

    def _running(self) -> subprocess.Popen[bytes]:
        if self._child is None:
            env = dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, sys.path)))
            self._child = subprocess.Popen(
                [sys.executable, "-X", "faulthandler", __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=env,
            )
        return self._child

    def close(self, kill: bool = False) -> None:
        child, self._child = self._child, None
        if child is None:
            return
        assert child.stdin is not None and child.stdout is not None
        child.stdin.close()
        if kill:
            child.kill()
        child.wait(HANG)
        child.stdout.close()


def _name(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


# ---- The child's end ----


class Steps:
    """What came of each step: "ok", or the name of the exception and its text."""

    def __init__(self) -> None:
        self.told: dict[str, str] = {}
        self.untyped: list[str] = []

    def run(self, name: str, step: Any) -> Any:
        from qcow2x.errors import Qcow2Error

        try:
            value = step()
        except (Qcow2Error, ValueError, OSError) as exc:
            self.told[name] = f"{type(exc).__name__}: {exc}"
            return None
        except Exception as exc:
            self.told[name] = f"{type(exc).__name__}: {exc}"
            self.untyped.append(f"{name}: {type(exc).__name__}: {exc}")
            return None
        self.told[name] = "ok"
        return value


def damage(request: dict[str, Any]) -> str:
    data = bytearray(Path(request["base"]).read_bytes())
    for offset, value in request["patches"]:
        fresh = bytes.fromhex(value)
        data[offset : offset + len(fresh)] = fresh
    if request["length"] is not None:
        del data[request["length"] :]
    path = request["base"] + ".damaged"
    Path(path).write_bytes(data)
    return path


def use(request: dict[str, Any]) -> dict[str, Any]:
    import qcow2x

    path = damage(request)
    steps = Steps()
    reads: list[str] = []
    policy = request.get("references", "deny")
    image = steps.run("open", lambda: qcow2x.open(path, references=policy))
    if image is not None:
        steps.run("info", image.info)
        step = 65536
        for offset in range(0, min(image.size, 1 << 20), step):
            data = steps.run(f"read {offset}", lambda o=offset: image.pread(step, o))
            reads.append("" if data is None else data.hex() if request.get("want_data") else "ok")
        far = max(0, image.size - 4096)
        steps.run("read the end", lambda: image.pread(4096, far))
        steps.run("extents", lambda: list(islice(image.extents(), 20_000)))
        steps.run("check", image.check)
        steps.run("close", image.close)
    image = steps.run("open r+", lambda: qcow2x.open(path, "r+", references=policy, cache="unsafe"))
    if image is not None:
        size = image.size
        cluster = image.cluster_size
        steps.run("write", lambda: image.pwrite(b"new" * 500, min(1000, max(0, size - 1500))))
        steps.run("write last", lambda: image.pwrite(b"z", size - 1))
        steps.run("compress", lambda: image.pwrite_compressed(bytes(min(cluster, size)), 0))
        steps.run("zero", lambda: image.write_zeroes(0, min(size, 3 * cluster + 5), unmap=True))
        steps.run("discard", lambda: image.discard(0, min(size, 1 << 20)))
        steps.run("flush", image.flush)
        steps.run("write again", lambda: image.pwrite(b"x" * min(size, 9000), 0))
        steps.run("grow", lambda: image.resize(size + (1 << 20) & ~511))
        steps.run("flush again", image.flush)
        steps.run("close r+", image.close)
    return {"steps": steps.told, "untyped": steps.untyped, "reads": reads}


def main() -> None:
    import qcow2x.image
    import qcow2x.ops.create  # noqa: F401

    bounded = False
    for line in sys.stdin:
        answer = use(json.loads(line))
        if not bounded:
            # The first one warms up every module and pool.
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limit = pages * os.sysconf("SC_PAGE_SIZE") + HEADROOM
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            bounded = True
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
