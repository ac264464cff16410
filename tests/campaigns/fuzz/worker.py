"""The end of the fuzzer that runs under the sanitizers. A crash ends it; the image that was under way
lies in its folder then."""

from __future__ import annotations

import ctypes
import json
import random
import signal
import sys
import time
import zlib
from collections.abc import Sequence
from pathlib import Path

from campaigns.fuzz import CPU_LIMIT, seeds, store
from campaigns.fuzz.mutate import mutate
from campaigns.fuzz.target import Use, high_water

#: Bytes that the process may grow by while it uses an image; the sanitizer's own are among them.
MEMORY = 512 << 20
#: Of the images, one in so many is shown to qemu-img.
ASK_QEMU = 40
#: So many characters of what was wrong tell one fault from another.
KIND = 24
#: Of the images in the tree.
CORPUS_BYTES = 256 << 10


class Coverage:
    """The counters of campaigns/coverage.c, which is loaded ahead of the interpreter."""

    def __init__(self) -> None:
        self._lib = ctypes.CDLL(None)
        self._edges, self._steps = ctypes.c_uint32(), ctypes.c_uint32()
        self._operands = (ctypes.c_uint64 * 4096)()

    def begin(self) -> None:
        self._lib.q2_cov_begin()

    def end(self) -> tuple[int, int, int]:
        """Edges, counts of edges and comparisons that no run before has shown."""
        nearer = self._lib.q2_cov_end(ctypes.byref(self._edges), ctypes.byref(self._steps))
        return self._edges.value, self._steps.value, nearer

    @property
    def edges(self) -> int:
        return int(self._lib.q2_cov_edges())

    def operands(self) -> list[int]:
        return list(self._operands[: self._lib.q2_cov_operands(self._operands, 4096)])


class Worker:
    """The end that runs under the sanitizers. A crash ends it: the image that it has under way lies
    in ``folder`` as ``under-way``, and it answers each line of JSON with one."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = folder
        self.rng = random.Random(f"fuzz {seed}")
        self.coverage = Coverage()
        self.pool: list[bytes] = []
        self.told: dict[str, int] = {"executions": 0, "asked of qemu-img": 0}

    def begin(self) -> None:
        """What a run begins with; all of it is used, so that only what is new counts as new."""
        begun = {**seeds.make(self.folder), **store.corpus()}
        for name, data in begun.items():
            # A crash or a hang ends this process, which the other end tells of.
            wrong, _ = self.execute(data, keep=False)
            self.tell(name, wrong)
        self.pool = list(begun.values())

    def execute(self, data: bytes, keep: bool = True) -> tuple[list[str], int]:
        """What was wrong, and how many edges were new."""
        (self.folder / "under-way").write_bytes(data)
        path = self.folder / "image.qcow2"
        path.write_bytes(data)
        use = Use(path, ask_qemu=self.rng.randrange(ASK_QEMU) == 0)
        memory = high_water(reset=True)
        signal.setitimer(signal.ITIMER_PROF, CPU_LIMIT)
        self.coverage.begin()
        use.all()
        edges, steps, nearer = self.coverage.end()
        signal.setitimer(signal.ITIMER_PROF, 0)
        grown = high_water() - memory
        if grown > MEMORY:
            use.wrong.append(f"took {grown >> 20} MiB of memory")
        self.told["executions"] += 1
        self.told["asked of qemu-img"] += use.asked
        if keep and (edges or steps or (nearer and self.rng.random() < 0.2)):
            self.pool.append(data)
            if edges:
                store.save(store.FOUND / "corpus", data)
        return use.wrong, edges

    def serve(self) -> None:
        """Until the other end is closed."""
        self.begin()
        # Some find the same fault over and over; each is told of once.
        known: set[str] = set()
        while True:
            end = time.monotonic() + 1
            while time.monotonic() < end:
                # The younger half as often as all of the rest: there is more to be found near them.
                half = len(self.pool) // 2 if self.rng.random() < 0.5 else 0
                parent = self.pool[self.rng.randrange(half, len(self.pool))]
                data = mutate(parent, self.pool, self.coverage.operands(), self.rng)
                wrong, _ = self.execute(data)
                fresh = [what for what in wrong if what[:KIND] not in known]
                if fresh:
                    known.update(what[:KIND] for what in fresh)
                    store.save(store.FOUND / "wrong", data)
                    self.tell(store.name_of(data), fresh)
            self.tell()

    def minimise(self) -> int:
        """The smallest images first; one stays if it shows an edge that none before it does."""
        for data in seeds.make(self.folder).values():
            self.execute(data, keep=False)
        found = dict(store.corpus())
        for path in (store.FOUND / "corpus").glob("*" + store.SUFFIX):
            found[path.name.removesuffix(store.SUFFIX)] = store.load(str(path))
        for path in store.CORPUS.glob("*" + store.SUFFIX):
            path.unlink()
        kept = room = 0
        for data in sorted(found.values(), key=lambda data: len(zlib.compress(data, 9))):
            if room < CORPUS_BYTES and self.execute(data, keep=False)[1]:
                room += store.save(store.CORPUS, data).stat().st_size
                kept += 1
        print(f"{kept} of {len(found)} images, {room >> 10} KiB, {self.coverage.edges} edges")
        return 0

    def tell(self, name: str = "", wrong: Sequence[str] = ()) -> None:
        told = {**self.told, "edges": self.coverage.edges, "kept": len(self.pool)}
        sys.stdout.write(json.dumps({"covered": told, "name": name, "wrong": wrong}) + "\n")
        sys.stdout.flush()
