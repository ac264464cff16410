"""The build commands: from qcow2x/_core/*.pyx to extension modules.

The environment says how: QCOW2X_DEBUG=1 builds with bounds checks and assertions,
QCOW2X_SANITIZE=address,undefined with the compiler's sanitizers, QCOW2X_COVERAGE=1 with a call at
every branch and comparison (tests/campaigns/coverage.c answers it). ``build --build-base`` keeps
such a build, and what it was compiled with, apart from the usual one.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from setuptools import Distribution, Extension
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

from build_support import needs

CORE = "qcow2x/_core"
HEADERS = "include/qcow2x"
THIRD_PARTY = "third_party"

DIRECTIVES = {
    "language_level": 3,
    "boundscheck": False,
    "wraparound": False,
    "cdivision": True,
    "initializedcheck": False,
}
DEBUG_DIRECTIVES = {**DIRECTIVES, "boundscheck": True, "initializedcheck": True}

WARNINGS = [
    "-Wall",
    "-Wextra",
    # What Cython generates for every module and no one here can change.
    "-Wno-unused-parameter",
    "-Wno-unused-function",
    "-Wno-missing-field-initializers",
    "-Wno-cast-function-type",
]
COMMON = [
    "-std=gnu11",
    # Tables on disk are looked at as bytes and as words; no optimisation is worth a wrong one.
    "-fno-strict-aliasing",
    "-fvisibility=hidden",
    "-fstack-protector-strong",
    "-U_FORTIFY_SOURCE",
    "-D_FORTIFY_SOURCE=2",
]
RELEASE = ["-O3", "-g1", "-DCYTHON_WITHOUT_ASSERTIONS"]
DEBUG = ["-Og", "-g3", "-UNDEBUG", "-fno-omit-frame-pointer"]


def debug_build() -> bool:
    return os.environ.get("QCOW2X_DEBUG", "") not in ("", "0")


def sanitizers() -> list[str]:
    """A finding ends the process: what goes on after one proves nothing."""
    wanted = os.environ.get("QCOW2X_SANITIZE", "")
    if not wanted:
        return []
    return [f"-fsanitize={wanted}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]


def coverage() -> list[str]:
    wanted = os.environ.get("QCOW2X_COVERAGE", "") not in ("", "0")
    return ["-fsanitize-coverage=trace-pc,trace-cmp"] if wanted else []


def core_extensions() -> list[Extension]:
    """One extension per .pyx; how it is compiled is settled when the build begins, so that
    asking for metadata or a source distribution needs no compiler and no library."""
    return [_extension(source) for source in sorted(Path(CORE).glob("*.pyx"))]


def _extension(source: Path) -> Extension:
    extension = Extension(
        f"{CORE.replace('/', '.')}.{source.stem}",
        [str(source)],
        include_dirs=["include"],
        depends=sorted(str(header) for header in Path(HEADERS).glob("*.h")),
    )
    if source.stem == "codec":
        extension.sources += [f"{THIRD_PARTY}/deflate12.c", f"{THIRD_PARTY}/inflate.c"]
        extension.include_dirs.append(THIRD_PARTY)
        extension.depends += sorted(str(file) for file in Path(THIRD_PARTY).rglob("*.[ch]"))
    return extension


class BuildCore(build_ext):
    #: For a build of another kind: what the compiler is told besides.
    more_arguments: tuple[str, ...] = ()

    def run(self) -> None:
        needs.require_toolchain()
        try:
            from Cython.Build import cythonize
        except ImportError:
            raise SystemExit(
                "qcow2x is built with Cython, which pip brings by itself: pip install ."
            ) from None

        if self.editable_mode:
            # Not setuptools' throw-away folders: linking a checkout compiles only what changed.
            usual = build(Distribution())
            usual.ensure_finalized()
            self.build_lib, self.build_temp = usual.build_platlib, usual.build_temp

        jobs = self.parallel or len(os.sched_getaffinity(0))
        self.parallel = jobs
        directives = DEBUG_DIRECTIVES if debug_build() else DIRECTIVES
        generated = cythonize(
            self.extensions,
            # Directives are part of what the C file depends on, so each kind has its own folder.
            build_dir=str(Path("build", "cython-debug" if debug_build() else "cython")),
            compiler_directives=directives,
            nthreads=jobs,
            force=self.force,
        )
        c_files = {extension.name: extension.sources for extension in generated}

        compile_args = [
            *COMMON,
            *WARNINGS,
            *(DEBUG if debug_build() else RELEASE),
            *sanitizers(),
            *coverage(),
            *needs.pkg_config("--cflags", *needs.LIBRARIES),
            *self.more_arguments,
        ]
        link_args = [
            "-Wl,--as-needed",
            "-Wl,-z,relro,-z,now",
            *sanitizers(),
            *needs.pkg_config("--libs", *needs.LIBRARIES),
        ]
        stamp = self._stamp([*compile_args, *link_args])
        for extension in self.extensions:
            extension.sources = c_files[extension.name]
            extension.extra_compile_args = compile_args
            extension.extra_link_args = link_args
            extension.depends = [*extension.depends, stamp]
        super().run()

    def _stamp(self, arguments: list[str]) -> str:
        """A file that is younger than the modules exactly when the arguments have changed since,
        which distutils by itself does not notice."""
        stamp = Path(self.get_finalized_command("build").build_base, "compiled-with")
        text = "\n".join([sys.version, os.environ.get("CFLAGS", ""), *arguments])
        if not stamp.exists() or stamp.read_text() != text:
            stamp.parent.mkdir(parents=True, exist_ok=True)
            stamp.write_text(text)
        return str(stamp)


class Build(build):
    def run(self) -> None:
        super().run()
        self._prune()

    def _prune(self) -> None:
        """Drop what an earlier build left of files that have gone since: a wheel is made of
        everything that lies in the build folder."""
        outputs = {
            Path(name).resolve()
            for command in self.get_sub_commands()
            for name in self.get_finalized_command(command).get_outputs()
        }
        for path in Path(self.build_lib).rglob("*"):
            if path.is_file() and path.resolve() not in outputs:
                path.unlink()
