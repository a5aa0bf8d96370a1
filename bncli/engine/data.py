"""Batches that are already on the device: where they come from, what is held out, and in which order.

N examples, B examples of a batch, C channels, H height, W width.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import torch
from torch import Generator, Tensor

from bncli.engine.npz import read_npz
from bncli.engine.preprocess import Conversion, crop_flip, normalisation, send
from bncli.errors import DataError

if TYPE_CHECKING:
    from bncli.recipe.sections import Digits, Hub, Npz, Synthetic

MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
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
        """Every example once, in a fixed order, without augmentation; the last chunk may be smaller than `size`."""
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
        for x, y in zip(self.x.split(size), self.y.split(size), strict=True):
            yield x if self.convert is None else self.convert(x), y


def load(
    spec: Digits | Synthetic | Npz | Hub,
    device: torch.device,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Dataset:
    """The data set that a recipe's `data` section names. Raises DataError for what is missing or does not fit."""
    if spec.source == "hub":
        from bncli.engine.hub import load_hub

        return load_hub(spec, device, memory_format)
    if spec.source == "npz":
        name, arrays, augment = Path(spec.path).name, _npz(spec), spec.augment == "crop-flip"
    elif spec.source == "synthetic":
        name, arrays, augment = "synthetic", _synthetic(spec), False
    else:
        name, arrays, augment = "digits (scikit-learn)", _digits(spec), False
    x, shape = arrays.x, tuple(arrays.x.shape[1:])
    if augment and len(shape) != 3:
        raise DataError(f"data.augment: crop-flip needs images, and {name} holds vectors; write augment: none")
    mean, std = normalisation(x, spec.normalize)
    held_out_x, convert = arrays.held_out_x, None
    if x.is_floating_point() and spec.normalize == "standard":
        x, held_out_x = (x - mean) / std, (held_out_x - mean) / std
    if x.dtype == torch.uint8 or (len(shape) == 3 and memory_format != torch.contiguous_format):
        convert = Conversion(mean.to(device), std.to(device), memory_format)
    train = InMemory(x.to(device), arrays.y.to(device), convert, augment)
    held_out = InMemory(held_out_x.to(device), arrays.held_out_y.to(device), convert)
    return Dataset(name, train, held_out, shape, arrays.classes)


# --- order --------------------------------------------------------------------------------------------------------


def order(examples: int, batch_size: int, generator: Generator, device: torch.device | str = "cpu") -> Iterator[Tensor]:
    """Endless shuffled epochs as index tensors (batch_size,) on `device`.

    An epoch's last, incomplete batch is left out: batch norm must not see a stray small one. The permutation is drawn
    on the CPU, so that the order is the same on every device, and moved once an epoch. Raises DataError where there
    are fewer examples than a batch takes.
    """
    if batch_size > examples:
        raise DataError(
            f"train.batch_size: {batch_size} is more than the {examples} training examples; "
            f"write {examples} or fewer, or hold fewer examples out"
        )
    return _epochs(examples, batch_size, generator, device)


def _epochs(examples: int, batch_size: int, generator: Generator, device: torch.device | str) -> Iterator[Tensor]:
    kept = examples - examples % batch_size
    while True:
        yield from send(torch.randperm(examples, generator=generator)[:kept], device).split(batch_size)


def carve(examples: int, held_out: int, split_seed: int) -> tuple[Tensor, Tensor]:
    """Indices of the training and of the held-out examples, both ascending; they depend on the arguments alone."""
    if held_out >= examples:
        raise DataError(
            f"data.held_out: {held_out} leaves nothing to train on, the data set has {examples} examples; "
            f"write {max(examples - 1, 0)} or fewer"
        )
    permutation = torch.randperm(examples, generator=Generator().manual_seed(split_seed))
    return permutation[held_out:].sort().values, permutation[:held_out].sort().values


# --- sources ------------------------------------------------------------------------------------------------------


class Arrays(NamedTuple):
    """On the CPU; x float32, or uint8 for images that are still bytes."""

    x: Tensor
    y: Tensor
    held_out_x: Tensor
    held_out_y: Tensor
    classes: int


def _carved(x: Tensor, y: Tensor, spec: Digits | Npz, classes: int) -> Arrays:
    train, held_out = carve(len(y), spec.held_out or 0, spec.split_seed)
    return Arrays(x[train], y[train], x[held_out], y[held_out], classes)


def _digits(spec: Digits) -> Arrays:
    pixels, labels = read_digits()
    x = torch.from_numpy(pixels).float() / 16
    return _carved(x.view(-1, 1, 8, 8) if spec.images else x, torch.from_numpy(labels), spec, classes=10)


def read_digits() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's digits: x (1797, 64) uint8 of 0..16, y (1797,) int64.

    Read from its file, since importing scikit-learn takes a second; by `load_digits` where the file has moved.
    """
    package = importlib.util.find_spec("sklearn")
    path = Path((package and package.origin) or "").parent / "datasets" / "data" / "digits.csv.gz"
    if path.is_file():
        table = np.loadtxt(path, delimiter=",", dtype=np.uint8)
        return table[:, :-1], table[:, -1].astype(np.int64)
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return x.astype(np.uint8), y.astype(np.int64)


def _synthetic(spec: Synthetic) -> Arrays:
    if len(spec.shape) not in (1, 3):
        raise DataError(
            f"data.shape: {list(spec.shape)} is neither [features] for vectors nor [channels, height, width] for images"
        )
    generator = Generator().manual_seed(spec.split_seed)
    prototypes = torch.randn(spec.classes, *spec.shape, generator=generator)
    y = torch.randint(spec.classes, (spec.examples + spec.held_out,), generator=generator)
    x = torch.randn(len(y), *spec.shape, generator=generator).mul_(spec.noise).add_(prototypes[y])
    train, held_out = slice(spec.examples), slice(spec.examples, None)
    return Arrays(x[train], y[train], x[held_out], y[held_out], spec.classes)


def _npz(spec: Npz) -> Arrays:
    arrays = read_npz(spec.path)
    x, y, classes = arrays["x"], arrays["y"], int(arrays["y"].max()) + 1
    fixed = "x_test" in arrays
    if fixed and spec.held_out is not None:
        raise DataError(f"data.held_out: {spec.path} has x_test and y_test to hold out; leave held_out away")
    if not fixed and spec.held_out is None:
        raise DataError(f"data.held_out: {spec.path} has no x_test; say how many of its {len(y)} examples to hold out")
    return Arrays(x, y, arrays["x_test"], arrays["y_test"], classes) if fixed else _carved(x, y, spec, classes)
