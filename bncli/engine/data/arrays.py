"""A data set's tensors in memory: those of one process, or shared by several.

Letters: N examples, C channels, F features.
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bncli.engine.data.splits import evaluation_order, holdout_split, normalization
from bncli.engine.memory import available_mib
from bncli.errors import DataError, out_of_memory_is

ALIGNMENT = 64  # bytes, torch's own for new tensors: at another one, matrix products may differ in their last bits
UNCHECKED = 2**26  # bytes; asking for the available memory takes 10 ms
HEADER = 2**16  # bytes; a multiple of every page size

# Makes a tensor of a shape, not yet filled. Raises DataError without room.
Place = Callable[[tuple[int, ...], torch.dtype], Tensor]


class Arrays(NamedTuple):
    """Tensors on the CPU. Training examples come first, in order; held-out ones from `held_out` on, as evaluated."""

    x: Tensor  # (rows, F) or (rows, C, H, W), float32, or uint8 for images
    y: Tensor  # (rows,) int64
    mean: Tensor  # (F,) or (C, 1, 1) float32
    std: Tensor
    train: int
    classes: int

    @property
    def held_out(self) -> int:
        return -(-self.train // ALIGNMENT) * ALIGNMENT

    def rows(self, split_seed: int) -> tuple[Tensor, Tensor]:
        """The row of each training and of each held-out example, (N,) int64."""
        order = evaluation_order(len(self.y) - self.held_out, split_seed)
        return torch.arange(self.train), self.held_out + order.argsort()

    def rows_of_whole(self, split_seed: int) -> Tensor:
        """The row of each example of a set that some are held out from, (N,) int64."""
        rows = torch.empty(self.train + len(self.y) - self.held_out, dtype=torch.int64)
        parts = holdout_split(len(rows), len(self.y) - self.held_out, split_seed)
        for index, row in zip(parts, self.rows(split_seed), strict=True):
            rows[index] = row
        return rows

    def normalize(self, kind: str) -> None:
        """Write the mean and deviation of the training examples, and normalize the floats of all examples by them."""
        train = self.x[: self.train]
        for kept, value in zip((self.mean, self.std), normalization(train, kind), strict=True):
            kept.copy_(value)
        if self.x.is_floating_point() and kind == "standard":
            for x in (train, self.x[self.held_out :]):
                x.sub_(self.mean).div_(self.std)

    def put(self, rows: Tensor, x: Tensor, y: Tensor) -> None:
        self.x.index_copy_(0, rows, x)
        self.y.index_copy_(0, rows, y)


def arrays(
    place: Place, shape: tuple[int, ...], train: int, held_out: int, classes: int, as_bytes: bool = False
) -> Arrays:
    """Tensors for examples of that shape, to be filled."""
    rows = -(-train // ALIGNMENT) * ALIGNMENT + held_out
    x = place((rows, *shape), torch.uint8 if as_bytes else torch.float32)
    y, of_mean = place((rows,), torch.int64), (shape[0], 1, 1) if len(shape) == 3 else shape
    return Arrays(x, y, place(of_mean, torch.float32), place(of_mean, torch.float32), train, classes)


def in_memory(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor in this process's own memory. Raises DataError for more than is available."""
    with _room(math.prod(shape) * dtype.itemsize):
        return torch.empty(shape, dtype=dtype)


@contextmanager
def _room(nbytes: int, taken: bool = False) -> Iterator[None]:
    """A context that allocates so many bytes, or maps those `taken` before. Raises DataError where it cannot."""
    words = (
        f"data: the examples take {nbytes / 2**20:,.0f} MiB in memory, and {{}}; free memory, store fewer or smaller "
        "examples, or use images by data.source: hub, which decodes large sets batch by batch"
    )
    if not taken and nbytes > UNCHECKED and nbytes / 2**20 > (available := available_mib()):
        raise DataError(words.format(f"{available:,.0f} MiB are available"))
    with out_of_memory_is(DataError(words.format("the system refuses them to this process"))):
        yield


def shared(descriptor: int, key: str, read: Callable[[Place], Any]) -> Any:
    """What `read` gives; Arrays are read by the first process that asks, and mapped by all that ask for the same key.

    descriptor: an empty file in memory (`os.memfd_create`) that the processes inherit, for one data set, as all runs of
    a comparison have. It begins with a header in JSON, which is written when the tensors are filled, under a lock that
    ends with its process: the next one reads anew what one that died left unfinished. What a process writes into its
    tensors afterwards stays its own.
    """
    import fcntl  # not on Windows, which has no such files either

    with open(f"/proc/self/fd/{descriptor}", "r+b", buffering=0) as file:  # opened anew, since a lock is an opening's
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            header = json.loads(os.pread(file.fileno(), HEADER, 0).rstrip(b"\0") or b"{}")
            end, placed = HEADER, list[tuple[int, tuple[int, ...], str]]()

            def place(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
                nonlocal end
                placed.append((end, shape, str(dtype).removeprefix("torch.")))
                end += -(-math.prod(shape) * dtype.itemsize // HEADER) * HEADER
                os.truncate(file.fileno(), end)
                return _mapped(file.fileno(), mmap.ACCESS_WRITE, *placed[-1])

            if not header:
                os.truncate(file.fileno(), 0)
                if not isinstance(found := read(place), Arrays):
                    return found
                header = {"key": key, "tensors": placed, "counts": [found.train, found.classes]}
                os.pwrite(file.fileno(), json.dumps(header).encode(), 0)
            if header["key"] != key:
                return read(in_memory)
            x, y, mean, std = (_mapped(file.fileno(), mmap.ACCESS_COPY, *each) for each in header["tensors"])
            return Arrays(x, y, mean, std, *header["counts"])
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # closing is not enough: a mapping keeps the file open


def _mapped(file: int, access: int, start: int, shape: tuple[int, ...], dtype: str) -> Tensor:
    kind: torch.dtype = getattr(torch, dtype)
    nbytes = math.prod(shape) * kind.itemsize
    with _room(nbytes, taken=access == mmap.ACCESS_COPY):
        mapping = mmap.mmap(file, nbytes, access=access, offset=start)
    return torch.frombuffer(mapping, dtype=kind).view(shape)
