"""Splits of a data set: hold-out, order, normalization and augmentation of batches.

Letters: N examples, B batch size, C channels, H height, W width.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Generator, Tensor
from torch.nn.functional import pad

from bncli.errors import DataError

Batch = tuple[Tensor, Tensor]  # x (B, *shape) float32, y (B,) int64
ALL = slice(None)
PART = 2**22  # values, 32 MiB of float64; with as many or fewer, statistics are those of one pass


class Split(Protocol):
    """The training or the held-out examples. Create index tensors for `batches` on `index_device`."""

    @property
    def index_device(self) -> torch.device: ...

    @property
    def labels(self) -> Tensor:
        """(N,) int64 of 0 to classes - 1."""
        ...

    def __len__(self) -> int: ...

    def batches(self, order: Iterable[Tensor], generator: Generator | None = None) -> Iterator[Batch]:
        """A batch for each tensor of indices; `generator` draws the augmentation, and must not be that of the order."""
        ...

    def chunks(self, size: int, which: slice = ALL) -> Iterator[Batch]:
        """All examples once, in order, not augmented, in chunks of about `size` (`chunk_count`), or `which` of them."""
        ...


@dataclass(frozen=True)
class Dataset:
    """The result of `load`; `shape` is that of one example, (features,) or (C, H, W)."""

    name: str
    train: Split
    held_out: Split
    shape: tuple[int, ...]
    classes: int


# --- normalization and augmentation -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Conversion:
    """Conversion of stored examples to model input: bytes become float32, (x - mean) / std; images get their layout."""

    mean: Tensor  # (C, 1, 1), in units of the stored values
    std: Tensor
    memory_format: torch.memory_format = torch.contiguous_format

    def __call__(self, x: Tensor) -> Tensor:
        if x.dtype == torch.uint8:
            return x.to(torch.float32, memory_format=self.memory_format).sub_(self.mean).div_(self.std)
        return x.contiguous(memory_format=self.memory_format)


def normalization(x: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Mean and deviation for the normalization (x - mean) / std: (C, 1, 1) for images, (features,) for vectors.

    `unit` maps bytes to 0..1 and leaves floats unchanged. `standard` is over the examples of x and, for images, the
    positions; the deviation of a constant feature is 1, so that it becomes 0.
    """
    size = (x.shape[1], 1, 1) if x.dim() == 4 else (x.shape[1],)
    if kind == "unit":
        return torch.zeros(size), torch.full(size, 255.0 if x.dtype == torch.uint8 else 1.0)
    if x.dtype == torch.uint8:
        return byte_statistics(
            sum((byte_counts(x[at]) for at in examples_of(x)), start=torch.zeros((), dtype=torch.int64))
        )
    around = (0, 2, 3) if x.dim() == 4 else (0,)
    mean, variance = _mean_and_variance(x, around)
    low, high = x.amin(around), x.amax(around)
    mean = torch.where(low == high, low, mean)  # the rounded mean of equal values need not be that value
    std = torch.where(low == high, 1.0, variance.sqrt())
    return mean.float().view(size), std.float().view(size)


def parts(count: int, size: int) -> list[slice]:
    """0 to count in slices of at most `size`, so that what is computed of them takes little memory."""
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def examples_of(x: Tensor) -> list[slice]:
    """Slices of x's examples with about PART values each."""
    return parts(len(x), max(1, PART // max(1, math.prod(x.shape[1:]))))


def _mean_and_variance(x: Tensor, around: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """In float64, part by part, put together as in Chan, Golub & LeVeque 1983 (American Statistician 37, eq. 2.1)."""
    mean = variance = torch.zeros((), dtype=torch.float64)
    for at in examples_of(x):
        of_part, part_mean = torch.var_mean(x[at].double(), dim=around, correction=0)
        share, off = (at.stop - at.start) / at.stop, part_mean - mean
        mean = mean + share * off
        variance = (1 - share) * variance + share * of_part + share * (1 - share) * off**2
    return mean, variance


def byte_counts(x: Tensor) -> Tensor:
    """Histogram of each channel of x (N, C, H, W) uint8: (C, 256) int64."""
    return torch.stack([torch.bincount(x[:, channel].flatten(), minlength=256) for channel in range(x.shape[1])])


def byte_statistics(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation (C, 1, 1) from the histograms (C, 256); the deviation of a constant channel is 1."""
    values, share = torch.arange(256.0, dtype=torch.float64), counts.double() / counts.sum(1, keepdim=True)
    mean = (share * values).sum(1, keepdim=True)
    std = (share * (values - mean) ** 2).sum(1, keepdim=True).sqrt()
    std = torch.where((counts > 0).sum(1, keepdim=True) == 1, 1.0, std)
    return mean.float().unsqueeze(2), std.float().unsqueeze(2)


def crop_flip(x: Tensor, generator: Generator | None) -> Tensor:
    """Random crop with H // 8 pixels of zero padding and random horizontal flip of each image of x (B, C, H, W).

    He et al. 2015 (arXiv 1512.03385), section 4.2. One draw per batch, from `generator` on its device.
    """
    batch, _, height, width = x.shape
    margin, origin = height // 8, torch.device("cpu") if generator is None else generator.device
    draw = torch.rand(3, batch, 1, generator=generator, device=origin)
    draw = send(draw, x.device)
    top, left = (draw[:2] * (2 * margin + 1)).long()
    rows, columns = (torch.arange(size, device=x.device) for size in (height, width))
    columns = torch.where(draw[2] < 0.5, columns.flip(0), columns)
    example = torch.arange(batch, device=x.device)[:, None, None]
    padded = pad(x, (margin, margin, margin, margin))
    moved = padded[example, :, (top + rows)[:, :, None], (left + columns)[:, None, :]]  # (B, H, W, C)
    return moved.permute(0, 3, 1, 2).contiguous()


def send(x: Tensor, device: torch.device | str) -> Tensor:
    """x on the device; to a GPU through pinned memory, so that the host does not wait for the copy."""
    if torch.device(device).type == "cuda" and not x.is_cuda:
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


# --- in memory ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class InMemory:
    """A split that is held on the device; without a conversion, batches are index lookups."""

    x: Tensor  # (N, *shape), float32 or (images only) uint8
    y: Tensor  # (N,) int64
    convert: Conversion | None = None
    augment: bool = False

    @property
    def index_device(self) -> torch.device:
        return self.x.device

    @property
    def labels(self) -> Tensor:
        return self.y

    def __len__(self) -> int:
        return len(self.y)

    def batches(self, order: Iterable[Tensor], generator: Generator | None = None) -> Iterator[Batch]:
        for index in order:  # index_select is x[index], at half the cost or less on a CPU
            x = self.x.index_select(0, index)
            if self.augment:
                x = crop_flip(x, generator)
            yield x if self.convert is None else self.convert(x), self.y.index_select(0, index)

    def chunks(self, size: int, which: slice = ALL) -> Iterator[Batch]:
        count = chunk_count(len(self), size)
        for x, y in zip(self.x.tensor_split(count)[which], self.y.tensor_split(count)[which], strict=True):
            yield x if self.convert is None else self.convert(x), y


# --- order and split -------------------------------------------------------------------------------------------------


def order(
    examples: int, batch_size: int, generator: Generator, device: torch.device | str = "cpu", start: int = 0
) -> Iterator[Tensor]:
    """Endless shuffled epochs as index tensors (batch_size,) on `device`, without the first `start` batches.

    The last, incomplete batch of an epoch is dropped, since batch norm must not see a small batch. The permutation is
    drawn on the CPU, so that the order is the same on every device, and copied once per epoch. The position is the
    number of batches taken; past epochs are redrawn and skipped. Raises DataError if there are fewer examples
    than the batch size.
    """
    if batch_size > examples:
        raise DataError(
            f"train.batch_size: {batch_size} is more than the {examples} training examples; "
            f"set {examples} or fewer, or hold out fewer examples"
        )

    def epochs() -> Iterator[Tensor]:
        past, taken = divmod(start, examples // batch_size)
        for _ in range(past):
            torch.randperm(examples, generator=generator)
        while True:
            shuffled = torch.randperm(examples, generator=generator)[: examples - examples % batch_size]
            yield from send(shuffled, device).split(batch_size)[taken:]
            taken = 0

    return epochs()


def evaluation_order(examples: int, split_seed: int) -> Tensor:
    """The order in which held-out examples are evaluated, (examples,) int64; a function of the arguments.

    Files are often sorted by class, and a norm without running statistics uses those of the chunk.
    """
    return torch.randperm(examples, generator=Generator().manual_seed(split_seed))


def chunk_count(examples: int, size: int) -> int:
    """The number of chunks of at most `size` for Tensor.tensor_split, whose chunks differ by one example at most.

    Two or more examples are never split into chunks of one, whose batch statistics would be undefined; a chunk may then
    be larger than `size`.
    """
    return max(1, min(-(-examples // size), examples // 2))


def holdout_split(examples: int, held_out: int, split_seed: int) -> tuple[Tensor, Tensor]:
    """Indices of the training and of the held-out examples, both ascending; a function of the arguments."""
    if held_out >= examples:
        raise DataError(
            f"data.held_out: {held_out} leaves nothing to train on, the data set has {examples} examples; "
            f"set {max(examples - 1, 0)} or fewer"
        )
    permutation = torch.randperm(examples, generator=Generator().manual_seed(split_seed))
    return permutation[held_out:].sort().values, permutation[:held_out].sort().values
