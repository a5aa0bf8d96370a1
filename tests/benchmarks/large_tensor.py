"""A tensor larger than the last cache on a CPU: the share of a copy's bandwidth that a batch norm with ReLU reaches.

A new tensor of that size is new memory from the system, whose pages are handed out, zeroed, at their first touch: a
minor page fault each. Training pays for them. A second measurement lets the C library keep what is freed.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import re
import resource
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

import bncli
from bncli.measure.timing import clock
from bncli.measure.timing.clock import Work

TIMES_LAST_CACHE = 2
UNKNOWN_CACHE_BYTES = 64 * 2**20  # where the system does not say
MOST_BYTES = 3 * 2**29  # of a tensor, six of which are held at once
EXAMPLE = (64, 112, 112)  # (C, H, W)
ROUNDS = 7
TENSORS_MOVED = 5 / 2  # x and y; x, dy and dx: as many as the fewest to move, in those of a copy
# glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
DEFAULT_TRIM_BYTES, DEFAULT_MMAP_MAX = 64 * 2**20, 65536


def last_cache_bytes(folder: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> int | None:
    """Of the first CPU core's last cache, None where the system does not say (Linux's sysfs: 32K, 30M)."""
    sizes = [re.fullmatch(r"(\d+)([KMG]?)", file.read_text().strip()) for file in folder.glob("index*/size")]
    factor = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}
    return max((int(size[1]) * factor[size[2]] for size in sizes if size), default=None)


def shape_beyond(cache_bytes: int) -> tuple[int, ...]:
    """(N, C, H, W) of a float32 tensor TIMES_LAST_CACHE as large as the cache, up to MOST_BYTES."""
    examples = math.ceil(min(TIMES_LAST_CACHE * cache_bytes, MOST_BYTES) / (4 * math.prod(EXAMPLE)))
    return (max(2, examples), *EXAMPLE)


@contextlib.contextmanager
def kept_memory() -> Iterator[bool]:
    """Inside, freed memory stays with the process, whatever its size: whether the C library can do that."""
    try:
        library = ctypes.CDLL(None)
        mallopt, trim = library.mallopt, library.malloc_trim
    except (OSError, AttributeError, TypeError):
        yield False
        return
    try:
        yield bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, -1))
    finally:
        mallopt(M_MMAP_MAX, DEFAULT_MMAP_MAX)
        mallopt(M_TRIM_THRESHOLD, DEFAULT_TRIM_BYTES)
        trim(0)


def page_faults(work: Work) -> int:
    """Minor page faults of this process in one run of it."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    work.run(work.prepare())
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def share_of_copy(samples: Mapping[str, tuple[float, ...]]) -> float:
    """The bytes that have to be moved over a copy's, at each's own speed, by the median of the rounds: 1 is a copy."""
    pairs = zip(samples["copy"], samples["both"], strict=True)
    return statistics.median(TENSORS_MOVED * copy / both for copy, both in pairs)


def _assert_right(x: Tensor, dy: Tensor) -> None:
    """y and dx are native's, compared one example at a time to save memory."""
    kernels = ("fused", "native")
    ys = [bncli.batch_norm(x, None, None, training=True, activation="relu", kernel=kernel) for kernel in kernels]
    gradients = [torch.autograd.grad(y, x, dy)[0] for y in ys]
    for results in (ys, gradients):
        for fused, native in zip(*results, strict=True):
            torch.testing.assert_close(fused, native, rtol=1e-4, atol=1e-4)


def measure(shape: tuple[int, ...], channels_last: bool, rounds: int = ROUNDS) -> Iterator[tuple[str, float, int]]:
    """(new or kept memory, share of the copy's bandwidth, page faults of a call), forward and backward in float32.

    Raises AssertionError where the results are not native's: a wrong kernel is not timed.
    """
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x, dy = (torch.randn(shape).contiguous(memory_format=layout) for _ in range(2))
    weight, bias = torch.ones(shape[1], requires_grad=True), torch.zeros(shape[1], requires_grad=True)
    leaves = [x.requires_grad_(), weight, bias]

    def both(_: object) -> None:
        y = bncli.batch_norm(x, None, None, weight, bias, training=True, activation="relu", kernel="fused")
        torch.autograd.grad(y, leaves, dy)

    _assert_right(x, dy)
    copy, _ = clock.copy_work(4 * x.numel(), x.device)
    works, timer = {"copy": copy, "both": Work(both)}, clock.CpuClock(flush_bytes=2**20)
    for name, kept in (("new memory", contextlib.nullcontext(True)), ("kept memory", kept_memory())):
        with kept as can:
            if can:
                both(None)  # in kept memory all is there from here on
                samples = clock.interleaved(timer, works, rounds)
                yield name, share_of_copy(samples), page_faults(works["both"])
