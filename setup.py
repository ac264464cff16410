"""Build the compiled core: one extension per qcow2x/_core/*.pyx."""
import subprocess
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup

CORE = sorted(Path("qcow2x/_core").glob("*.pyx"))
LIBS = ["libzstd", "libdeflate", "libisal", "libcrypto", "liburing", "zlib"]


def pkg_config(flag):
    return subprocess.check_output(["pkg-config", flag, *LIBS], text=True).split()


extensions = [
    Extension(
        f"qcow2x._core.{p.stem}",
        [str(p)],
        include_dirs=["include"],
        extra_compile_args=["-O2", "-g", "-std=gnu11", *pkg_config("--cflags")],
        extra_link_args=["-Wl,--as-needed", *pkg_config("--libs")],
        define_macros=[("_GNU_SOURCE", "1")],
    )
    for p in CORE
]
setup(ext_modules=cythonize(extensions, nthreads=2, compiler_directives={"language_level": "3", "boundscheck": False, "wraparound": False, "cdivision": True, "initializedcheck": False}))
