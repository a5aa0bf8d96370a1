"""Files that are written whole or not at all, and reading and locking of files that anybody may have put there.

In bncli's own folders nothing is opened through a symbolic link, and pipes and devices are refused: a cloned repository
may contain either.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, TextIO

from bncli.errors import FileError, UsageError

TEMPORARY = re.compile(r"\..+\.[0-9a-f]{12}")  # a file that is being written, or that a killed process left behind
LONGEST_NAME = 255 - len("..") - 12  # bytes of a file system's names, of which a temporary one needs more
NO_LINK = getattr(os, "O_NOFOLLOW", 0)  # not on Windows
NO_WAIT = getattr(os, "O_NONBLOCK", 0)  # opening a pipe waits for its other end without it


def make(folder: Path) -> None:
    """Make a folder and those around it. Raises UsageError for one that cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot be created: {error.strerror}", field="out", value=folder) from error


def check_writable(path: Path) -> None:
    """Raise FileError now, before any work, for a path that `write_atomically` would refuse."""
    if os.path.isdir(path):
        raise FileError(f"{path}: is a folder; give a file's name")
    if not os.path.isdir(path.parent):
        raise FileError(f"{path}: its folder {path.parent} does not exist")
    if not os.access(path.parent, os.W_OK):
        raise FileError(f"{path}: its folder {path.parent} is not writable")
    if len(os.fsencode(path.name)) > LONGEST_NAME:
        raise FileError(f"{path}: its name is too long; give one of at most {LONGEST_NAME} bytes")


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file that the user named, whole or not at all, even when the process is killed or the power fails.

    A link's target is replaced, not the link; anything but a plain file (a pipe, /dev/stdout) is written to. Raises
    OSError with the path where that cannot be done.
    """
    data = content.encode(errors="backslashreplace") if isinstance(content, str) else content
    try:
        if path.exists() and not path.is_file():
            path.write_bytes(data)
        else:
            replace(Path(os.path.realpath(path)), data)
    except OSError as error:
        error.filename = str(path)  # which a full disk does not tell
        raise


def replace(path: Path, data: bytes, read_back: bool = False) -> None:
    """Replace a file (a link itself, not its target), or leave it as it was.

    A temporary file in the same folder is synced, takes the name's place, and is removed on failure; a killed process
    leaves it to `sweep`. read_back: whether the earlier file stays until the new one has been read from the disk as it
    was written; OSError if not.
    """
    temporary = path.with_name(f".{path.name}.{os.urandom(6).hex()}")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            if read_back and hasattr(os, "posix_fadvise"):  # so that it is read from the disk and not from memory
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if read_back and temporary.read_bytes() != data:
            raise OSError(f"{path}: what was written does not read back")
        if path.is_file() and not path.is_symlink():
            shutil.copymode(path, temporary)
        os.replace(temporary, path)
    except BaseException as error:
        if isinstance(error, OSError):
            error.filename = str(path)  # which a full disk does not tell
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    if os.name == "posix":
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # makes the new name durable
        finally:
            os.close(folder)


def sweep(*folders: Path, alone: Callable[[], bool] = lambda: True) -> None:
    """Delete what killed processes left half written.

    alone: whether nobody else writes there, by default since the caller holds a lock. It is asked after the files are
    listed, so that those of whoever comes later are not among them.
    """
    files = (file for folder in folders for file in folder.glob(".*") if TEMPORARY.fullmatch(file.name))
    left = [file for file in files if file.is_file() and not file.is_symlink()]
    if left and alone():
        for file in left:
            file.unlink(missing_ok=True)


def read_plain(file: Path, most: int | None = None, follow: bool = False) -> bytes:
    """The content of a plain file of at most `most` bytes.

    Raises OSError where it cannot be opened and FileError for a link (unless `follow`), a pipe, a device or a larger
    file; it never waits.
    """
    if not follow and file.is_symlink():
        raise FileError(f"{file}: is a symbolic link, which is not followed here")
    with open(os.open(file, os.O_RDONLY | NO_WAIT | (0 if follow else NO_LINK)), "rb") as opened:
        found = _size(opened, file)
        if most is not None and found > most:
            raise FileError(f"{file}: has {found:,} bytes, more than the {most:,} that such a file can have")
        return opened.read()


def locked(file: Path, flags: int = 0) -> TextIO | None:
    """A plain file to write to, locked until it is closed; None where another process holds the lock.

    It is created where it is missing, and not truncated. Raises OSError, and FileError for what is no plain file.
    """
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | NO_LINK | NO_WAIT | flags, 0o666)
    opened = os.fdopen(descriptor, "w", encoding="utf-8")
    try:
        _size(opened, file)
        with contextlib.suppress(ImportError):  # no such lock on Windows
            import fcntl

            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (OSError, FileError) as error:
        opened.close()
        if not isinstance(error, BlockingIOError):
            raise
        return None
    return opened


def _size(opened: IO[Any], file: Path) -> int:
    found = os.fstat(opened.fileno())
    if not stat.S_ISREG(found.st_mode):
        raise FileError(f"{file}: is not a plain file")
    return found.st_size
