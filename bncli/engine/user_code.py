"""The user's own code: its import, its errors as one sentence, and the files that a run loaded."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import os
import site
import sys
import sysconfig
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from bncli.errors import BncliError, FileError, RunFailed
from bncli.storage import read_plain

HERE = str(Path(__file__).parents[1])  # bncli's own code
PACKAGES = ("site-packages", "dist-packages")  # names of folders with installed packages, anywhere


def imported(name: str) -> Any:
    """The object package.module:function, from the folder in front of it, or the current one, or the environment.

    Raises what the import raises, which runs the user's code, and AttributeError if the module has no such name.
    """
    path, _, function = name.rpartition(":")
    folder, module = os.path.split(path)
    if folder not in sys.path:
        sys.path.insert(0, folder)  # a console script's path lacks the current folder, where the user's code is
    found = importlib.import_module(module)
    inside = os.path.join(os.path.realpath(folder), "")
    if folder and not os.path.realpath(file := _file_of(found)).startswith(inside):
        raise ImportError(f"another module named {module} is imported already, from {file}; rename one of them")
    return getattr(found, function)


@contextlib.contextmanager
def blame_user_code(name: str, contract: str, kind: type[BncliError] = RunFailed) -> Iterator[None]:
    """Convert an exception of the user's code to an error of that kind: one sentence with the line that raised it.

    name: the user's name of the called object. contract: how it is called and what it has to return, said where the
    error is of a call or of shapes. Errors of bncli itself pass unchanged.
    """
    try:
        yield
    except (Exception, SystemExit) as error:
        if isinstance(error, BncliError):
            raise
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "site-packages" not in frame.filename]
        where = [f", in {frame.filename}:{frame.lineno}" for frame in frames if not frame.filename.startswith(HERE)]
        text = " ".join(str(error).split())
        raised = f"{name} raised {type(error).__name__}{': ' * bool(text)}{text}{where[-1] if where else ''}"
        explained = isinstance(error, TypeError) or any(word in text for word in ("shape", "size", "dimension"))
        raise kind(raised + f". {contract}" * explained) from error


class LoadedFiles:
    """The files of modules that are neither installed nor part of Python or bncli: file -> SHA-256.

    Modules that were imported before are left out. Files in the current folder have relative paths. A file keeps the
    digest of its first `note`, so call `note` soon after each import.
    """

    def __init__(self) -> None:
        self.files: dict[str, str] = {}
        self._seen = set(sys.modules)

    def note(self, function: str = "") -> None:
        """Take in what was imported since; function: `package.module:function`, whose module counts in any case."""
        here = os.getcwd() + os.sep
        self._seen.discard(os.path.basename(function.rpartition(":")[0]))
        for name in sys.modules.keys() - self._seen:
            self._seen.add(name)
            file = os.path.abspath(_file_of(sys.modules[name]))
            package = sys.modules.get(name.partition(".")[0])
            if not _is_installed(file) and not _is_installed(_file_of(package)) and (digest := digest_of(file)):
                self.files[file.removeprefix(here)] = digest


def digest_of(file: str) -> str | None:
    """The SHA-256 of a file's contents; None if it cannot be read."""
    with contextlib.suppress(OSError, ValueError, FileError):  # no name that a file can have, or no plain file
        return hashlib.sha256(read_plain(Path(file), follow=True)).hexdigest()
    return None


def _file_of(module: ModuleType | None) -> str:
    return getattr(module, "__file__", None) or ""


def _is_installed(file: str) -> bool:
    """Whether a file belongs to Python, to an installed package, or to bncli."""
    real = os.path.realpath(file)
    return real.startswith(_installed()) or any(part in PACKAGES for part in Path(real).parts)


@functools.cache
def _installed() -> tuple[str, ...]:
    paths = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    paths += [*site.getsitepackages(), site.getusersitepackages(), HERE]
    return tuple(os.path.realpath(path) + os.sep for path in paths)
