"""Kernels that each do one thing for tests of the compiling harness to find. Imported by its workers, not by pytest."""

from __future__ import annotations

import os
import signal

import triton
import triton.language as tl


@triton.jit
def scale(x, y, n, BLOCK: tl.constexpr, ACC: tl.constexpr = tl.float32):
    """y = 2 x + 1 by way of ACC, one access of each a program."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + i, mask=i < n, other=0.0).to(ACC)
    tl.store(y + i, (value * 2.0 + 1.0).to(y.dtype.element_ty), mask=i < n)


@triton.jit
def gather(x, index, y, n, BLOCK: tl.constexpr):
    """y = x[index]: x is read one value at a time, wherever it is; index and y are not."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + tl.load(index + i, mask=i < n, other=0), mask=i < n, other=0.0), mask=i < n)


@triton.jit
def hold(x, y, n, TILES: tl.constexpr, BLOCK: tl.constexpr):
    """y = x - mean(x), with TILES tiles of x held until their sum is known."""
    i = tl.arange(0, BLOCK)
    tiles = ()
    total = tl.zeros([BLOCK], tl.float32)
    for k in tl.static_range(TILES):
        tiles = tiles + (tl.load(x + k * BLOCK + i),)  # noqa: RUF005 - Triton reads this
        total += tiles[k]
    mean = tl.sum(total, axis=0) / n
    for k in tl.static_range(TILES):
        tl.store(y + k * BLOCK + i, tiles[k] - mean)


@triton.jit
def wait(counter, x, y, n, PROGRAMS: tl.constexpr):
    """n times: arrive, poll until all programs have, then copy a value that another program wrote."""
    for step in range(n):
        tl.atomic_add(counter + step, 1, sem="release")
        while tl.atomic_add(counter + step, 0, sem="acquire") < PROGRAMS:
            pass
        tl.store(y + step, tl.load(x + step, cache_modifier=".cg"))


@triton.jit
def count(x, total, last, n, BLOCK: tl.constexpr):
    """total += sum(x), in a loop over blocks, and who came last: atomics in a loop that waits for nobody."""
    for start in range(tl.program_id(0) * BLOCK, n, BLOCK * tl.num_programs(0)):
        i = start + tl.arange(0, BLOCK)
        before = tl.atomic_add(total, tl.sum(tl.load(x + i, mask=i < n, other=0.0), axis=0))
        if before > 1.0:
            tl.store(last, start + tl.load(x + n, cache_modifier=".cg"))


@triton.jit
def mistaken(x, y, n, BLOCK: tl.constexpr):
    """Adds vectors of two lengths: does not compile."""
    tl.store(y + tl.arange(0, BLOCK), tl.load(x + tl.arange(0, BLOCK)) + tl.arange(0, BLOCK * 2))


def __getattr__(name: str) -> object:
    """`toy_kernels.deadly` ends the process, as a compiler does that crashes."""
    if name == "deadly":
        os.kill(os.getpid(), signal.SIGKILL)
    raise AttributeError(name)
