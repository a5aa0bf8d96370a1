"""Memory of the machine that is available, and memory that this process has freed. No torch."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bncli.results.environment import FreedMemory

MAPPED_FROM_BYTES = 32 * 2**20  # by default glibc maps each block of this size or more anew (mallopt(3))
# The parameters of mallopt in glibc's malloc.h, and its default for the last one.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4
MMAP_MAX = 65536
SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TOP_PAD_")
_freed: FreedMemory = "default"  # of the process, like the settings of its allocator, which cannot be read


def available_mib(line: Path = Path("/proc/self/cgroup"), groups: Path = Path("/sys/fs/cgroup")) -> float:
    """Memory that this process can take without swapping: the machine's, or less under a control group's limit.

    A line of the first file is `0::/path` (version 2) or `4:memory:/path` (version 1). The groups around it count too;
    a container may see its own as the root of `groups`.
    """
    import psutil  # here, since it takes 10 ms that most commands can save

    left = [float(psutil.virtual_memory().available)]
    with contextlib.suppress(OSError):  # not Linux
        for number, controllers, path in (each.split(":", 2) for each in line.read_text().splitlines()):
            root = groups if number == "0" else groups / "memory"
            if number == "0" or "memory" in controllers.split(","):
                around = [each for each in (root / path.strip("/")).parents if each.is_relative_to(root)]
                left += [_left_in(group, number == "0") for group in (root / path.strip("/"), *around)]
    return max(0.0, min(left)) / 2**20


def _left_in(group: Path, version_2: bool) -> float:
    """Bytes that a group's limit leaves; the pages of files that it holds are given back when memory is short."""
    limit, used, prefix = ("max", "current", "") if version_2 else ("limit_in_bytes", "usage_in_bytes", "total_")
    try:
        bounds = [float((group / f"memory.{name}").read_text().replace("max", "inf")) for name in (limit, used)]
        stat = dict(each.split() for each in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no such group here, or the root, which has no limit
        return float("inf")
    return bounds[0] - bounds[1] + sum(float(stat.get(f"{prefix}{kind}active_file", 0)) for kind in ("", "in"))


# --- memory that the process has freed --------------------------------------------------------------------------------


def keep_freed_memory() -> None:
    """Let glibc keep what is freed for later tensors, unless the user has chosen settings or another allocator.

    Of a tensor of 32 MiB or more, and of the end of the heap, it otherwise returns the pages. New ones are filled with
    zeros at their first touch, a page fault each, which can take longer than a batch norm's arithmetic.
    """
    global _freed
    library = _glibc()
    if library is None:
        _freed = "not glibc"
    elif any(name in os.environ for name in SETTINGS) or re.search(
        r"glibc\.malloc\.(mmap|trim|top)", os.environ.get("GLIBC_TUNABLES", "")
    ):
        _freed = "set by the user"
    # Not by M_MMAP_THRESHOLD alone, which glibc before 2.35 takes up to 32 MiB only.
    elif library.mallopt(M_MMAP_MAX, 0) and library.mallopt(M_TRIM_THRESHOLD, -1):
        _freed = "kept"


def freed_memory() -> FreedMemory:
    """What becomes of the memory that this process frees."""
    return _freed


def give_back_freed_memory() -> None:
    """Return the pages that glibc keeps, wherever in the heap they are."""
    if _freed == "kept":
        _glibc().malloc_trim(0)


@contextlib.contextmanager
def new_memory() -> Iterator[Callable[[], object]]:
    """A context in which tensors of MAPPED_FROM_BYTES or more take new pages though freed memory is otherwise kept.

    The function that it gives returns the pages that were freed so far; without a call, a tensor may get them again.
    """
    library = _glibc()
    library.mallopt(M_MMAP_THRESHOLD, MAPPED_FROM_BYTES)
    library.mallopt(M_MMAP_MAX, MMAP_MAX)
    try:
        yield give_back_freed_memory
    finally:
        library.mallopt(M_MMAP_MAX, 0)


@functools.cache
def _glibc() -> Any:
    """The C library if it is glibc and allocates this process's memory, else None."""
    try:
        if "glibc" not in (os.confstr("CS_GNU_LIBC_VERSION") or ""):
            return None
        found = [ctypes.CDLL(name) for name in (None, "libc.so.6")]
    except (AttributeError, OSError, ValueError):  # there is no confstr on Windows, and no such name elsewhere
        return None
    first, second = (ctypes.cast(each.malloc, ctypes.c_void_p).value for each in found)
    return found[1] if first == second else None  # another allocator, such as one of LD_PRELOAD, comes first
