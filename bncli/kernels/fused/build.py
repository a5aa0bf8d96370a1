"""Compilation of a C++ file on first use, with the system's compiler, into a cache of shared libraries.

The cache is a folder that only the user can write. A file's name has a hash of the source, the flags, the compiler and
the CPU, and one of the file's content: a damaged library can kill the process that loads it, so it is found before and
compiled again. One process compiles at a time, and the others wait for it.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from bncli.errors import FileError, Unavailable
from bncli.storage import locked, read_plain, replace, sweep

LANGUAGE = ("-std=gnu++17", "-fno-exceptions", "-fno-rtti")  # so that nothing of the C++ library is needed
OPTIMIZED = (*LANGUAGE, "-O2", "-fPIC", "-fopenmp", "-fno-math-errno", "-Wno-psabi")
FOR_THIS_CPU = (("-march=native",), ("-mcpu=native",), ())  # the first that the compiler accepts is used
HOW_TO_GET_ONE = "Install one (Debian: apt install g++; Fedora: dnf install gcc-c++; macOS: xcode-select --install)"
LONGEST_S = 120.0  # of one call of the compiler, of which there are two: compiling and linking
BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH
Flags = tuple[list[list[str]], list[list[str]]]  # for compiling and for linking; of each the first that works is used


@functools.cache
def library(source: Path, *definitions: str) -> ctypes.CDLL:
    """The shared library of that source with those macros defined, compiled unless it is cached.

    Raises Unavailable, with the reason and a remedy, if there is no compiler or it fails.
    """
    macros = [f"-D{name}" for name in definitions]
    compiling = [[*OPTIMIZED, *macros, *native] for native in FOR_THIS_CPU]
    linking = [["-lm", *flags] for flags in (_openmp(), ["-fopenmp"]) if flags]  # torch's own, else the compiler's
    return _built(source, "-".join(definitions).lower(), (compiling, linking))


def node(or_compile: bool = False) -> ctypes.CDLL | None:
    """node.cpp compiled for this PyTorch, or None if it is not cached. Compiling it takes half a minute.

    Raises Unavailable, with the reason and a remedy, if there is no compiler or it fails.
    """
    package, python = Path(torch.__file__).parent, sysconfig.get_paths()["include"]
    compiling = ["-std=gnu++20", "-O1", "-fPIC", f"-I{package / 'include'}", f"-I{python}"]
    linking = [f"-L{package / 'lib'}", "-ltorch_python", "-ltorch_cpu", "-lc10"]
    variant = f"{torch.__version__}-{sys.implementation.cache_tag}"
    return _built(Path(__file__).with_name("node.cpp"), variant, ([compiling], [linking]), or_compile)


def _built(source: Path, variant: str, flags: Flags, or_compile: bool = True) -> Any:
    """The cached library of that source, which is compiled where there is none, unless `or_compile` is false."""
    text, command = source.read_bytes(), compiler()
    program = os.stat(command[0])  # to ask for its version would take longer than everything else here
    identity = os.path.realpath(command[0]), program.st_size, program.st_mtime_ns
    name = f"{source.stem}-{variant}-{_hash(repr((text, command, identity, flags, _processor())).encode())}"
    try:
        folder = _folder()
        if (built := _cached(folder, name)) is None and or_compile:
            with _one_at_a_time(folder):
                built = _cached(folder, name) or _compile(command, source, flags, folder, name)
        return built and ctypes.CDLL(str(built))
    except (OSError, FileError) as error:
        why = f"the compiled kernel cannot be kept or loaded ({error})"
        raise Unavailable(f"{why}; mend that, or name another folder in BNCLI_CACHE or compiler in CXX") from error


def compiler() -> list[str]:
    """The C++ compiler as a command: $CXX, or the first of c++, g++ and clang++. Raises Unavailable without one."""
    try:
        asked = shlex.split(os.environ.get("CXX", ""))
    except ValueError as error:
        raise Unavailable(f"the variable CXX has a quotation mark without its second: {os.environ['CXX']}") from error
    for command in [asked] if asked else [["c++"], ["g++"], ["clang++"]]:
        if found := shutil.which(command[0]):
            return [found, *command[1:]]
    if asked:
        raise Unavailable(f"there is no C++ compiler {asked[0]!r}, which the variable CXX names. Unset or correct CXX")
    none = "there is no C++ compiler (c++, g++ or clang++) to build it with"
    raise Unavailable(f"{none}. {HOW_TO_GET_ONE}, or name yours in CXX")


def _cached(folder: Path, name: str) -> Path | None:
    """The library of that name, if its content is whole and nobody else can have written it."""
    for file in folder.glob(f"{name}-*.so"):
        with contextlib.suppress(OSError, FileError):
            status = file.lstat()
            ours = status.st_uid == os.getuid() and not status.st_mode & BY_OTHERS
            if ours and file.name == f"{name}-{_hash(read_plain(file, most=1 << 26))}.so":
                return file
    return None


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:24]


@contextlib.contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """The lock of the cache folder. Deletes the temporary files of killed processes."""
    began = time.monotonic()
    while (file := locked(folder / ".lock")) is None:
        if time.monotonic() - began > 2 * LONGEST_S:
            holds = f"another process had {folder / '.lock'} locked for {2 * LONGEST_S:.0f} s in order to compile"
            raise Unavailable(f"{holds}. Try again when it has ended, or name another folder in BNCLI_CACHE")
        time.sleep(0.05)
    with file:
        for stale in folder.glob("build-*"):
            shutil.rmtree(stale, ignore_errors=True)
        sweep(folder)
        yield


def _compile(command: list[str], source: Path, flags: Flags, folder: Path, name: str) -> Path:
    for damaged in folder.glob(f"{name}-*.so"):
        damaged.unlink()
    with tempfile.TemporaryDirectory(prefix="build-", dir=folder, ignore_cleanup_errors=True) as temporary:
        unlinked, linked = Path(temporary) / "kernel.o", Path(temporary) / "kernel.so"
        compiling = [[*command, *each, "-c", str(source), "-o", str(unlinked)] for each in flags[0]]
        attempts = compiling, [[*command, "-shared", str(unlinked), "-o", str(linked), *each] for each in flags[1]]
        for commands in attempts:
            for each in commands:  # until one works
                if not (failed := _run(each, temporary)):
                    break
            else:
                raise Unavailable(f"the C++ compiler {shlex.join(command)} could not build it: {failed}")
        content = linked.read_bytes()
    built = folder / f"{name}-{_hash(content)}.so"
    replace(built, content)
    built.chmod(0o600)
    return built


def _run(command: list[str], temporary: str) -> str:
    """The error in one line; empty if there is none. Raises Unavailable if it takes too long.

    The compiler's own temporary files are in the folder `temporary`, and the processes that it starts end with it.
    """
    said, none, environment = Path(temporary) / "messages", subprocess.DEVNULL, {**os.environ, "TMPDIR": temporary}
    try:
        with (
            said.open("wb") as file,
            subprocess.Popen(
                command, stdin=none, stdout=none, stderr=file, env=environment, start_new_session=True
            ) as process,
        ):
            try:
                code = process.wait(LONGEST_S)
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
    except subprocess.TimeoutExpired as error:
        late = f"the C++ compiler {command[0]} had not finished after {LONGEST_S:.0f} s"
        raise Unavailable(f"{late}. Try again when the machine is less busy, or name another one in CXX") from error
    except OSError as error:
        return str(error)
    lines = said.read_text(errors="replace").strip().splitlines() or [f"it ended with code {code}"]
    return "" if code == 0 else next((line for line in lines if "error" in line), lines[0])


def _openmp() -> list[str]:
    """The OpenMP runtime that torch has loaded: threads of a second runtime would compete for the same cores."""
    folder = Path(torch.__file__).parent / "lib"
    return [str(file) for pattern in ("libgomp*", "libiomp5*", "libomp*") for file in sorted(folder.glob(pattern))][:1]


def _processor() -> str:
    """The processor's features, on which -march=native depends."""
    information = Path("/proc/cpuinfo")
    if information.exists():
        lines = information.read_text().splitlines()
        known = [line for line in lines if line.startswith(("flags", "Features", "model name"))]
        return platform.machine() + "".join(sorted(set(known)))
    return platform.machine() + platform.processor()


def _folder() -> Path:
    """The cache folder: the first that can be used. Raises Unavailable with the reasons if there is none."""
    named, caches = os.environ.get("BNCLI_CACHE"), os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    reasons = []
    for name in [named] if named else [f"{caches}/bncli", f"{tempfile.gettempdir()}/bncli-{os.getuid()}"]:
        folder = Path(os.path.realpath(os.path.expanduser(name)))
        reason = "its user is unknown" if os.path.expanduser(name)[0] == "~" else _unusable_reason(folder)
        if reason is None:
            return folder
        reasons.append(f"{name}: {reason}")
    raise Unavailable(f"there is no folder for the compiled kernel ({'; '.join(reasons)}); name one in BNCLI_CACHE")


def _unusable_reason(folder: Path) -> str | None:
    """Why a folder, which is made where it is missing, cannot be the cache; None if it can."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        return f"it cannot be created ({error.strerror})"
    if not os.access(folder, os.W_OK | os.X_OK):
        return "it is not writable"
    if os.statvfs(folder).f_flag & getattr(os, "ST_NOEXEC", 0):
        return "it is on a file system that is mounted with noexec, from which no code can be loaded"
    # Who can write in a folder above it could put another in its place. Who owns the topmost one owns the machine.
    trusted = {0, os.stat("/").st_uid}
    for each in (folder, *folder.parents):
        status, above = each.stat(), each != folder
        if status.st_uid != os.getuid() and not (above and status.st_uid in trusted):
            return f"{each} belongs to another user"
        if status.st_mode & BY_OTHERS and not (above and status.st_mode & stat.S_ISVTX):
            return f"{each} can be written by others; chmod {'go-w' if above else '700'} it"
    return None


if __name__ == "__main__":
    began = time.monotonic()
    try:
        found = node(or_compile=True)
    except Unavailable as error:
        sys.exit(f"the autograd node: {error}")
    print(f"the autograd node is {found and found._name} ({time.monotonic() - began:.0f} s)")
