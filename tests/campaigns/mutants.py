"""Whether the crash tests would notice: python -m campaigns.mutants [--edge NAME ...] [--json FILE]

The order of writes is kept by edges: this is durable before that is written. Each edge is left out in
turn, and the crash campaign has to find a state in which a file is damaged or an acknowledged byte is
gone. An edge that it does not miss is either none or badly tested; both end this with status 1.

The edges of the core are those of include/qcow2x/edges.h; leaving one out takes a build of its own,
made by scripts/build_mutant.py and found here by --build. Those of the Python modules are the
statements that make something durable: each is taken out of the module as it is imported.
"""

from __future__ import annotations

import argparse
import ast
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

TESTS = Path(__file__).resolve().parent.parent
VARIABLE = "QCOW2X_DROPPED_EDGE"

#: What makes something durable: a call that is a statement of its own.
DURABLE = ("flush", "_barrier", "_patch_header")

#: Those in Python modules that keep an edge: module, function and which of those in it; and what goes
#: wrong without. The others make a result durable, or something durable that the next one waits for
#: as well.
IN_PYTHON = {
    "qcow2x.bitmap:_write_anew:2": "the header names bitmaps that are not there",
    "qcow2x.bitmap:_insert_extension:3": "the header names a backing file in an empty place",
    "qcow2x.ops.commit:commit_layers:1": "the overlay is emptied and the base has not all of it",
    "qcow2x.ops.emptying:_start_anew:1": "half of an emptied layer is back",
    "qcow2x.ops.emptying:_start_anew:2": "the header names tables that are something else",
    "qcow2x.ops.emptying:_write_tables:1": "the header names tables that are not there",
    "qcow2x.ops.newbacking:_switch:1": "the new backing file's name overwrites the old one's",
    "qcow2x.ops.newbacking:_switch:6": "a passing header names a file in an empty place",
    "qcow2x.ops.overlay:apply:2": "a repair's entries name copies that are not there",
    "qcow2x.ops.rebase:rebase_layers:1": "the image has not all of it and names the new file",
}

#: Edges that another one keeps as well, so that nothing shows when they alone are gone.
KEPT_TWICE = {
    "DIRTY_BEFORE_LAZY": "a new mapping waits for its data, and with it for the dirty bit",
}

#: The workloads that an edge's name stands for; others follow.
FIRST = {
    "DATA_FILE": ("external data file",),
    "DATA_BEFORE": ("lazy refcounts",),
    "DIRTY_BEFORE_LAZY": ("lazy refcounts",),
    "RESERVE": ("growth, over what was there before",),
    "L2_BEFORE": ("lazy refcounts",),
    "BEFORE_L2": ("growth",),
    "REFTABLE": ("growth of refcount blocks and table",),
    "L1_": ("resize",),
    "SHRUNK": ("resize",),
    "ZEROED": ("resize",),
    "RESIZE": ("resize",),
    "SNAPSHOT": ("snapshot create", "snapshot delete", "snapshot apply"),
    "COPIED": ("snapshot delete", "snapshot apply"),
    "DISK_SWITCHED": ("snapshot apply",),
    "WIDTH": ("amend of the refcount width",),
    "BITMAPS": ("bitmaps",),
    "AUTOCLEAR": ("unknown autoclear feature",),
    "qcow2x.bitmap": ("bitmaps",),
    "qcow2x.ops.commit": ("commit",),
    "qcow2x.ops.emptying": ("commit",),
    "qcow2x.ops.newbacking": ("rebase",),
    "qcow2x.ops.overlay": ("repair",),
    "qcow2x.ops.rebase": ("rebase",),
}


class Edge(NamedTuple):
    name: str
    #: What goes wrong without it.
    why: str


class Found(NamedTuple):
    """The first state in which something was wrong, or how far was looked."""

    edge: str
    workload: str | None
    states: int
    seconds: float
    what: str


# ---- Which edges there are -----------------------------------------------------------------------


def edges_of_the_core(include: Path) -> list[Edge]:
    text = (include / "qcow2x" / "edges.h").read_text()
    return [Edge(*found) for found in re.findall(r'X\((\w+), "(.*)"\)', text)]


def _statements(
    module: str, tree: ast.Module
) -> Iterator[tuple[str, ast.Expr, tuple[list[ast.stmt], int]]]:
    """Name, statement, and where it stands: in which list, at what place."""
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef):
            continue
        number = 0
        for parent in ast.walk(function):
            for _, block in ast.iter_fields(parent):
                if not isinstance(block, list):
                    continue
                for at, statement in enumerate(block):
                    if (
                        isinstance(statement, ast.Expr)
                        and isinstance(statement.value, ast.Call)
                        and isinstance(statement.value.func, ast.Attribute)
                        and statement.value.func.attr in DURABLE
                    ):
                        number += 1
                        name = f"{module}:{function.name}:{number}"
                        yield name, statement, (block, at)


# ---- Leaving one out -----------------------------------------------------------------------------


class _Cutter(importlib.machinery.SourceFileLoader):
    """Loads a module with one statement less."""

    edge = ""

    def source_to_code(self, data, path, *, _optimization=-1):  # type: ignore[no-untyped-def]
        tree = ast.parse(data)
        for name, statement, (block, at) in _statements(self.name, tree):
            if name == self.edge:
                block[at] = _without(statement)
                return compile(ast.fix_missing_locations(tree), path, "exec")
        raise LookupError(f"{self.edge} is no edge of {self.name}")

    def path_stats(self, path):  # type: ignore[no-untyped-def]
        # No compiled file is read or left behind.
        raise OSError


def _without(statement: ast.Expr) -> ast.stmt:
    call = statement.value
    assert isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute)
    if call.func.attr == "flush":
        return ast.copy_location(ast.Pass(), statement)
    # It writes as well as it makes durable: only the latter is left out.
    (guarded,) = ast.parse("with __import__('campaigns.power').power.unsynced(): pass").body
    assert isinstance(guarded, ast.With)
    guarded.body = [statement]
    return ast.copy_location(guarded, statement)


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, edge: str) -> None:
        self.edge = edge
        self.module = edge.split(":")[0]

    def find_spec(self, name, path, target=None):  # type: ignore[no-untyped-def]
        if name != self.module:
            return None
        found = importlib.machinery.PathFinder.find_spec(name, path)
        assert found is not None and found.origin is not None
        loader = _Cutter(name, found.origin)
        loader.edge = self.edge
        return importlib.util.spec_from_file_location(name, found.origin, loader=loader)


def look_for(edge: str, states: int, seconds: float) -> Found:
    """In a process of its own, in which the edge is left out before anything is imported."""
    if ":" in edge:
        sys.meta_path.insert(0, _Finder(edge))
    from campaigns.catalog import WORKLOADS
    from campaigns.crash import SAMPLES
    from campaigns.workloads import Corrupt, Lost

    first = [name for key, names in FIRST.items() if key in edge for name in names]
    order = [name for name in first if name in WORKLOADS]
    rest = [name for name in WORKLOADS if name not in order]
    began, tried, seed = time.monotonic(), 0, 0
    while tried < states and time.monotonic() - began < seconds:
        # All others have a turn after some of those that it should show in.
        names = [*order, rest[seed // 4 % len(rest)]] if order and seed % 4 == 3 else order or rest
        for name in names:
            rng = random.Random(f"{name} {seed}")
            try:
                case = WORKLOADS[name](rng)
                for state in case.machine.states(rng, SAMPLES):
                    tried += 1
                    case.verify(state)
            except (Corrupt, Lost, Exception) as exc:
                kind = {Corrupt: "corrupt", Lost: "lost"}.get(type(exc), type(exc).__name__)
                what = f"{kind}: {exc}".splitlines()[0]
                return Found(edge, name, tried, time.monotonic() - began, what)
        seed += 1
    return Found(edge, None, tried, time.monotonic() - began, "nothing")


# ---- All of them ---------------------------------------------------------------------------------


def all_edges(include: Path) -> list[Edge]:
    edges = [edge for edge in edges_of_the_core(include) if edge.name not in KEPT_TWICE]
    return edges + [Edge(*item) for item in IN_PYTHON.items()]


def run(build: Path, edge: Edge, states: int, seconds: float) -> Found:
    """In another process, with the build that can leave edges out."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(build), str(TESTS))),
        VARIABLE: edge.name,
    }
    arguments = ["--child", "--states", str(states), "--seconds", str(seconds)]
    done = subprocess.run(
        [sys.executable, "-m", "campaigns.mutants", *arguments, "--edge", edge.name],
        env=environment,
        cwd=build,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{edge.name}: {done.stderr}")
    return Found(*json.loads(done.stdout))


def table(edges: Sequence[Edge], found: Sequence[Found]) -> str:
    """As Markdown."""
    rows = ["| edge left out | found by | after states | as |", "|---|---|---:|---|"]
    for edge, seen in zip(edges, found, strict=True):
        where = seen.workload or "**not found**"
        rows.append(f"| {edge.name} | {where} | {seen.states:,} | {seen.what[:90]} |")
    return "\n".join(rows)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m campaigns.mutants", description=__doc__)
    parser.add_argument("--edge", action="append", help="only this one; may be repeated")
    parser.add_argument("--build", type=Path, default=TESTS.parent / "build" / "mutant")
    parser.add_argument("--states", type=int, default=20000, help="tried at most per edge")
    parser.add_argument("--seconds", type=float, default=120, help="taken at most per edge")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        print(json.dumps(look_for(args.edge[0], args.states, args.seconds)))
        return 0
    build = args.build.resolve()
    edges = all_edges(TESTS.parent / "include")
    if args.edge:
        edges = [edge for edge in edges if edge.name in args.edge]
    with ThreadPoolExecutor(args.jobs) as pool:
        found = list(pool.map(lambda edge: run(build, edge, args.states, args.seconds), edges))
    print(table(edges, found))
    if args.json:
        figures = [
            {**edge._asdict(), **seen._asdict()} for edge, seen in zip(edges, found, strict=True)
        ]
        args.json.write_text(json.dumps({"mutants": figures}, indent=1) + "\n")
    missed = [seen.edge for seen in found if seen.workload is None]
    print(f"{len(found) - len(missed)} edges are missed when they are gone, {len(missed)} are not")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
