"""What people get: headers, stubs, the cimport surface, a source distribution that builds, and a
clear word when the machine lacks something."""

from __future__ import annotations

import ast
import importlib
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

import qcow2x

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(qcow2x.__file__).resolve().parent
# The folder that makes `import qcow2x` find the package under test, also in another folder.
IMPORT_ENV = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}


def _build_support() -> ModuleType:
    """The checkout's build helpers. The checkout must not stay importable: the other tests are to
    meet the installed package, also in the programs that they start."""
    sys.path.insert(0, str(ROOT))
    try:
        return importlib.import_module("build_support.needs")
    finally:
        sys.path.remove(str(ROOT))


needs = _build_support()


def run(*command, **kwargs):
    done = subprocess.run(command, capture_output=True, text=True, **kwargs)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


# -- what an installed package brings -----------------------------------------------------------


def test_get_include_has_the_headers():
    headers = {path.name for path in Path(qcow2x.get_include(), "qcow2x").iterdir()}
    assert {"format.h", "wire.h", "status.h", "plan.h"} <= headers


def test_types_are_announced():
    assert (PACKAGE / "py.typed").is_file()


@pytest.mark.parametrize("stub", sorted(path.stem for path in (PACKAGE / "_core").glob("*.pyi")))
def test_stub_names_exist_in_the_compiled_module(stub):
    module = importlib.import_module(f"qcow2x._core.{stub}")
    assert module.__file__.endswith(".so")
    tree = ast.parse((PACKAGE / "_core" / f"{stub}.pyi").read_text())
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            assert callable(getattr(module, node.name))
        elif isinstance(node, ast.ClassDef) and node.name[0] != "_":
            compiled = getattr(module, node.name)
            members = [item.name for item in node.body if isinstance(item, ast.FunctionDef)]
            assert [name for name in members if not hasattr(compiled, name)] == []


def test_import_brings_only_what_it_uses():
    """A program that embeds qcow2x pays for no command line, server or build machinery."""
    brought = run(
        sys.executable,
        "-c",
        "import sys; before = set(sys.modules); import qcow2x;"
        "print(*sorted(set(sys.modules) - before))",
        env=IMPORT_ENV,
    ).split()
    unwanted = {
        "argparse", "asyncio", "concurrent", "email", "http", "importlib.metadata", "json",
        "logging", "multiprocessing", "qcow2x.cli", "qcow2x.nbd", "shlex", "socket", "subprocess",
        "tempfile", "unittest", "urllib",
    }  # fmt: skip
    assert unwanted & set(brought) == set()


# -- an extension of someone else's -------------------------------------------------------------


@pytest.fixture(scope="module")
def consumer(tmp_path_factory):
    """Runs a piece of Python, from a folder of its own, that can import the consumer."""
    source = tmp_path_factory.mktemp("consumer") / "source"
    shutil.copytree(ROOT / "tests" / "consumer", source)
    run(sys.executable, "setup.py", "build_ext", "--inplace", cwd=source, env=IMPORT_ENV)

    def run_there(code, *arguments, cwd):
        path = os.pathsep.join([str(source), IMPORT_ENV["PYTHONPATH"]])
        env = {**os.environ, "PYTHONPATH": path}
        return run(sys.executable, "-c", code, *map(str, arguments), cwd=cwd, env=env)

    return run_there


def test_consumer_extension_uses_format_h(consumer, tmp_path):
    assert consumer("import q2consumer; print(hex(q2consumer.MAGIC))", cwd=tmp_path) == (
        "0x514649fb\n"
    )


def test_consumer_extension_reads_and_writes_a_storage(consumer, tmp_path):
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(8192))
    consumer(
        """
import sys
import q2consumer
from qcow2x._core.storage import FileStorage

storage = FileStorage(sys.argv[1], writable=True)
q2consumer.write(storage, 4000, b"from outside")
assert q2consumer.read(storage, 3999, 14) == b"\\0from outside\\0"
""",
        disk,
        cwd=tmp_path,
    )
    assert disk.read_bytes() == bytes(4000) + b"from outside" + bytes(4180)


def test_consumer_extension_reads_and_writes_an_open_image(consumer, tmp_path):
    disk = tmp_path / "disk.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", str(disk), "1M")
    consumer(
        """
import sys
import q2consumer
import qcow2x

with qcow2x.open(sys.argv[1], "r+") as image:
    q2consumer.write(image, 65530, b"across a cluster's end")
    assert q2consumer.read(image, 65530, 23) == b"across a cluster's end\\0"
    assert q2consumer.is_image(image)
""",
        disk,
        cwd=tmp_path,
    )
    run("qemu-img", "check", str(disk))
    run("qemu-img", "convert", "-O", "raw", str(disk), str(tmp_path / "raw"))
    guest = (tmp_path / "raw").read_bytes()
    assert guest.replace(b"across a cluster's end", bytes(22)) == bytes(1 << 20)
    assert guest.index(b"across") == 65530


def test_consumer_extension_gets_the_typed_error(consumer, tmp_path):
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(512))
    printed = consumer(
        """
import sys
import q2consumer
from qcow2x._core.storage import FileStorage

try:
    q2consumer.write(FileStorage(sys.argv[1]), 0, b"x")
except OSError as refused:
    print(refused)
""",
        disk,
        cwd=tmp_path,
    )
    assert str(disk) in printed


# -- the source distribution and the wheel ------------------------------------------------------


@pytest.fixture(scope="module")
def tracked():
    """The files of the project, relative to its root."""
    listing = run(
        "git", "-c", "safe.directory=*", "ls-files", "--cached", "--others", "--exclude-standard",
        cwd=ROOT,
    )  # fmt: skip
    return sorted(name for name in listing.splitlines() if (ROOT / name).is_file())


def build(target, out, cwd, **env):
    """Build with this interpreter's setuptools, as pip would with --no-build-isolation."""
    code = f"import sys; from setuptools import build_meta; build_meta.build_{target}(sys.argv[1])"
    run(sys.executable, "-c", code, str(out), cwd=cwd, env={**os.environ, **env})
    (built,) = out.iterdir()
    return built


@pytest.fixture(scope="module")
def sdist(tracked, tmp_path_factory):
    """Built on a machine without compiler and pkg-config: packing sources needs neither."""
    checkout = tmp_path_factory.mktemp("checkout")
    for name in tracked:
        copy = checkout / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, copy)
    return build(
        "sdist", tmp_path_factory.mktemp("sdist"), checkout, CC="no-compiler", PKG_CONFIG="none"
    )


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    """From the unpacked source distribution, of one module: the others are built the same way,
    and a wheel of all of them has been tested by everything else here."""
    unpacked = tmp_path_factory.mktemp("unpacked")
    shutil.unpack_archive(sdist, unpacked)
    (source,) = unpacked.iterdir()
    for module in (source / "qcow2x" / "_core").glob("*.pyx"):
        if module.stem != "errors":
            module.unlink()
    return build("wheel", tmp_path_factory.mktemp("wheel"), source)


def test_sdist_has_every_tracked_file_and_nothing_generated(sdist, tracked):
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive if member.isfile()}
    assert set(tracked) - names == set()
    beyond = {name for name in names - set(tracked) if not name.startswith("qcow2x.egg-info/")}
    assert beyond == {"PKG-INFO", "setup.cfg"}


def test_wheel_has_what_users_need_and_no_more(wheel, tracked):
    names = set(zipfile.ZipFile(wheel).namelist())
    package = {name for name in tracked if name.startswith("qcow2x/")}
    headers = {f"qcow2x/{name}" for name in tracked if name.startswith("include/")}
    sources = {name for name in package if name.endswith(".pyx")}
    assert (package - sources) | headers <= names
    (compiled,) = (name for name in names if name.endswith(".so"))
    assert compiled.startswith("qcow2x/_core/errors.")
    metadata = {name for name in names if ".dist-info/" in name}
    assert names - metadata - {compiled} == (package - sources) | headers


def test_wheel_metadata_names_version_and_licence(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("dist-info/METADATA"))
        metadata = archive.read(name).decode()
    assert f"Version: {qcow2x.__version__}\n" in metadata
    assert "License-Expression: MIT\n" in metadata


# -- a machine that lacks something -------------------------------------------------------------


def failed_build(tmp_path, **env):
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "-b", str(tmp_path), "-t", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert list(tmp_path.glob("**/*.so")) == []
    return done.stderr


def test_missing_libraries_end_with_the_command(tmp_path):
    nowhere = tmp_path / "nowhere"
    nowhere.mkdir()
    message = failed_build(tmp_path, PKG_CONFIG_LIBDIR=str(nowhere), PKG_CONFIG_PATH="")
    assert "liburing" in message
    if needs.package_manager(needs.read_os_release()) in ("apt", None):
        assert (
            "sudo apt install libzstd-dev libisal-dev libssl-dev liburing-dev zlib1g-dev" in message
        )
    else:
        assert "sudo dnf install" in message
    assert "pkg-config" not in message


def test_missing_pkg_config_ends_with_the_command(tmp_path):
    message = failed_build(tmp_path, PKG_CONFIG="no-such-program")
    assert "pkg-config" in message
    assert " install pkg" in message


def test_missing_compiler_ends_with_the_command(tmp_path):
    message = failed_build(tmp_path, CC="no-such-compiler -pthread")
    assert "a C compiler (no-such-compiler)" in message
    assert " install gcc" in message


def test_missing_python_headers_name_the_interpreters_package(monkeypatch, tmp_path):
    monkeypatch.setattr(needs.sysconfig, "get_path", lambda name: str(tmp_path))
    version = f"{sys.version_info.major}.{sys.version_info.minor}"

    monkeypatch.setattr(needs.sys, "base_prefix", "/usr")
    (missing,) = needs.missing_for_build()
    assert "Python.h" in missing.what
    assert missing.apt == (f"python{version}-dev",)

    # Somebody's own Python has no package; saying `apt install` would send them astray.
    monkeypatch.setattr(needs.sys, "base_prefix", "/opt/python")
    (missing,) = needs.missing_for_build()
    message = needs.explain([missing], "ID=debian\n")
    assert "apt" not in message
    assert sys.executable in message


@pytest.mark.parametrize(
    ("os_release", "apt", "dnf"),
    [
        ('ID=debian\nVERSION_ID="12"\n', True, False),
        ('NAME="Linux Mint"\nID=linuxmint\nID_LIKE="ubuntu debian"\n', True, False),
        ("NAME='Fedora Linux'\nID=fedora\n", False, True),
        ('ID="rocky"\nID_LIKE="rhel centos fedora"\n', False, True),
        ("ID=alpine\n", True, True),
        ("", True, True),
    ],
)
def test_command_fits_the_distribution(os_release, apt, dnf):
    missing = [needs.Need("liburing", ("liburing-dev",), ("liburing-devel",))]
    message = needs.explain(missing, os_release)
    assert ("sudo apt install liburing-dev" in message) == apt
    assert ("sudo dnf install liburing-devel" in message) == dnf
