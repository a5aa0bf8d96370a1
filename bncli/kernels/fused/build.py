"""Compilation of a C file on first use, with the system's compiler, into a cache of shared libraries.

The cache is a folder that only the user can write. A file's name is a hash of the source, the flags, the compiler and
the CPU. It is written under a temporary name and then renamed, so that processes may compile at the same time.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

import torch

from bncli.errors import Unavailable

OPTIMIZED = ("-std=gnu11", "-O2", "-fPIC", "-fopenmp", "-fno-math-errno", "-Wno-psabi")
FOR_THIS_CPU = (("-march=native",), ("-mcpu=native",), ())  # the first that the compiler accepts is used
HOW_TO_GET_ONE = "Install one (Debian, Ubuntu: apt install gcc; Fedora: dnf install gcc; macOS: xcode-select --install)"
LONGEST_S = 120.0


@functools.cache
def library(source: Path, *definitions: str) -> ctypes.CDLL:
    """The shared library of that source with those macros defined, compiled unless it is cached.

    Raises Unavailable, with the reason and a remedy, if there is no compiler or it fails.
    """
    text, command = source.read_bytes(), compiler()
    native = [flag for flags in FOR_THIS_CPU for flag in flags]
    parts = [*command, *_identity(command[0]), *OPTIMIZED, *native, *definitions, _processor(), *_openmp()]
    name = hashlib.sha256(repr((text, parts)).encode()).hexdigest()[:24]
    built = _folder() / f"{source.stem}-{'-'.join(definitions).lower()}-{name}.so"
    if not built.exists():
        _compile(command, source, definitions, built)
    try:
        return ctypes.CDLL(str(built))
    except OSError as error:
        raise Unavailable(f"{built} cannot be loaded: {error}. Delete that file to compile it again") from error


def compiler() -> list[str]:
    """The C compiler as a command: $CC, or the first of cc, gcc and clang. Raises Unavailable without one."""
    asked = shlex.split(os.environ.get("CC", ""))
    for command in [asked] if asked else [["cc"], ["gcc"], ["clang"]]:
        found = shutil.which(command[0])
        if found:
            return [found, *command[1:]]
    if asked:
        raise Unavailable(f"there is no C compiler {asked[0]}, which the variable CC names. Unset or correct CC")
    raise Unavailable(
        f"there is no C compiler (cc, gcc or clang) to build it with. {HOW_TO_GET_ONE}, or name yours in CC"
    )


def _compile(command: list[str], source: Path, definitions: tuple[str, ...], built: Path) -> None:
    with tempfile.TemporaryDirectory(dir=built.parent) as temporary:
        unlinked, linked = Path(temporary) / "kernel.o", Path(temporary) / "kernel.so"
        macros = [f"-D{name}" for name in definitions]
        compiling = [*command, *OPTIMIZED, *macros, "-c", str(source), "-o", str(unlinked)]
        linking = [*command, "-shared", str(unlinked), "-o", str(linked), "-lm"]
        openmp = [flags for flags in (_openmp(), ["-fopenmp"]) if flags]  # torch's own, else the compiler's
        failed = _first_that_works([[*compiling, *native] for native in FOR_THIS_CPU])
        failed = failed or _first_that_works([[*linking, *flags] for flags in openmp])
        if failed:
            raise Unavailable(f"the C compiler {command[0]} could not build it: {failed}")
        os.replace(linked, built)


def _first_that_works(commands: list[list[str]]) -> str:
    """Run the commands until one succeeds. Returns the last one's error, or an empty string."""
    failed = ""
    for command in commands:
        if not (failed := _run(command)):
            break
    return failed


def _run(command: list[str]) -> str:
    """The error in one line; empty if there is none."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LONGEST_S)
    except subprocess.TimeoutExpired:
        return f"it had not finished after {LONGEST_S:.0f} s"
    except OSError as error:
        return str(error)
    if done.returncode == 0:
        return ""
    message = done.stderr.strip().splitlines() or [f"it ended with code {done.returncode}"]
    return next((line for line in message if "error" in line), message[0])


def _openmp() -> list[str]:
    """The OpenMP runtime that torch has loaded: threads of a second runtime would compete for the same cores."""
    folder = Path(torch.__file__).parent / "lib"
    return [str(file) for pattern in ("libgomp*", "libiomp5*", "libomp*") for file in sorted(folder.glob(pattern))][:1]


def _identity(program: str) -> list[str]:
    """Path, size and time of the compiler. Asking for its version would take longer than everything else here."""
    file = os.stat(program)
    return [os.path.realpath(program), str(file.st_size), str(file.st_mtime_ns)]


def _processor() -> str:
    """The processor's features, on which -march=native depends."""
    information = Path("/proc/cpuinfo")
    if information.exists():
        lines = information.read_text().splitlines()
        known = [line for line in lines if line.startswith(("flags", "Features", "model name"))]
        return platform.machine() + "".join(sorted(set(known)))
    return platform.machine() + platform.processor()


def _folder() -> Path:
    """The cache folder. Raises Unavailable if other users could put a file there."""
    caches = os.environ.get("XDG_CACHE_HOME")
    home = Path(caches) if caches else Path.home() / ".cache"
    named = os.environ.get("BNCLI_CACHE")
    for folder in [Path(named)] if named else [home / "bncli", Path(tempfile.gettempdir()) / f"bncli-{os.getuid()}"]:
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError:
            continue
        if not os.access(folder, os.W_OK | os.X_OK):
            continue
        status = folder.stat()
        if status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise Unavailable(
                f"{folder}, where compiled kernels are kept, can be written by others: chmod 700 it, or name another "
                "folder in BNCLI_CACHE"
            )
        return folder
    raise Unavailable("there is no folder to keep the compiled kernel in; name one that you can write in BNCLI_CACHE")
