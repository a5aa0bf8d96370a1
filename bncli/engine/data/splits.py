"""What training takes its batches from: a split of a data set, in which order, and what is held out.

N examples, B examples of a batch, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Generator, Tensor

from bncli.engine.data.preprocess import Conversion, crop_flip, send
from bncli.errors import DataError

Batch = tuple[Tensor, Tensor]  # x (B, *shape) float32, y (B,) int64


class Split(Protocol):
    """The training or the held-out examples. Index tensors for `batches` are best made on `index_device`."""

    @property
    def index_device(self) -> torch.device: ...

    def __len__(self) -> int: ...

    def batches(self, order: Iterable[Tensor], generator: Generator | None = None) -> Iterator[Batch]:
        """A batch for each tensor of indices; `generator` draws the augmentation and should not be the order's own."""
        ...

    def chunks(self, size: int) -> Iterator[Batch]:
        """Every example once, in a fixed order, without augmentation, in chunks of about `size` (see `chunk_count`)."""
        ...


@dataclass(frozen=True)
class Dataset:
    """What `load` returns; `shape` is that of one example, (features,) or (C, H, W)."""

    name: str
    train: Split
    held_out: Split
    shape: tuple[int, ...]
    classes: int

    def held_out_batches(self, size: int) -> Iterator[Batch]:
        return self.held_out.chunks(size)


@dataclass(frozen=True)
class InMemory:
    """A split that lies on the device as a whole; without a conversion its batches are nothing but an index."""

    x: Tensor  # (N, *shape), float32 or (images only) uint8
    y: Tensor  # (N,) int64
    convert: Conversion | None = None
    augment: bool = False

    @property
    def index_device(self) -> torch.device:
        return self.x.device

    def __len__(self) -> int:
        return len(self.y)

    def batches(self, order: Iterable[Tensor], generator: Generator | None = None) -> Iterator[Batch]:
        for index in order:  # index_select is x[index], at half the cost or less on a CPU
            x = self.x.index_select(0, index)
            if self.augment:
                x = crop_flip(x, generator)
            yield x if self.convert is None else self.convert(x), self.y.index_select(0, index)

    def chunks(self, size: int) -> Iterator[Batch]:
        count = chunk_count(len(self), size)
        for x, y in zip(self.x.tensor_split(count), self.y.tensor_split(count), strict=True):
            yield x if self.convert is None else self.convert(x), y


# --- order and split -------------------------------------------------------------------------------------------------


def order(
    examples: int, batch_size: int, generator: Generator, device: torch.device | str = "cpu", start: int = 0
) -> Iterator[Tensor]:
    """Endless shuffled epochs as index tensors (batch_size,) on `device`, without the first `start` batches.

    An epoch's last, incomplete batch is left out: batch norm must not see a stray small one. The permutation is drawn
    on the CPU, so that the order is the same on every device, and moved once an epoch. The place in the order is the
    number of batches taken: those of past epochs are drawn again and left out. Raises DataError where there are fewer
    examples than a batch takes.
    """
    if batch_size > examples:
        raise DataError(
            f"train.batch_size: {batch_size} is more than the {examples} training examples; "
            f"write {examples} or fewer, or hold fewer examples out"
        )
    return _epochs(examples, batch_size, generator, device, start)


def _epochs(
    examples: int, batch_size: int, generator: Generator, device: torch.device | str, start: int
) -> Iterator[Tensor]:
    kept = examples - examples % batch_size
    epochs, taken = divmod(start, examples // batch_size)
    for _ in range(epochs):
        torch.randperm(examples, generator=generator)
    while True:
        yield from send(torch.randperm(examples, generator=generator)[:kept], device).split(batch_size)[taken:]
        taken = 0


def evaluation_order(examples: int, split_seed: int) -> Tensor:
    """The order in which held-out examples are evaluated, (examples,) int64; it depends on the arguments alone.

    Files are often sorted by class, and a norm without running statistics takes those of the chunk.
    """
    return torch.randperm(examples, generator=Generator().manual_seed(split_seed))


def chunk_count(examples: int, size: int) -> int:
    """How many chunks of at most `size` to cut examples into; Tensor.tensor_split's differ by one example at most.

    Two or more examples are never cut into chunks of one, whose batch statistics would be undefined: there a chunk may
    be larger than `size`.
    """
    return max(1, min(-(-examples // size), examples // 2))


def carve(examples: int, held_out: int, split_seed: int) -> tuple[Tensor, Tensor]:
    """Indices of the training and of the held-out examples, both ascending; they depend on the arguments alone."""
    if held_out >= examples:
        raise DataError(
            f"data.held_out: {held_out} leaves nothing to train on, the data set has {examples} examples; "
            f"write {max(examples - 1, 0)} or fewer"
        )
    permutation = torch.randperm(examples, generator=Generator().manual_seed(split_seed))
    return permutation[held_out:].sort().values, permutation[:held_out].sort().values
