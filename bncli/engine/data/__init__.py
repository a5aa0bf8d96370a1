"""The data sets that a recipe can name, read and put on the device.

N examples, B examples of a batch, C channels, H height, W width.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Generator, Tensor

from bncli.engine.data.npz import read_npz
from bncli.engine.data.preprocess import Conversion, normalisation
from bncli.engine.data.splits import Dataset, InMemory, carve, evaluation_order
from bncli.errors import DataError

if TYPE_CHECKING:
    from bncli.recipe.sections import Digits, Hub, Npz, Synthetic

MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def load(
    spec: Digits | Synthetic | Npz | Hub,
    device: torch.device,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Dataset:
    """The data set that a recipe's `data` section names. Raises DataError for what is missing or does not fit."""
    if spec.source == "hub":
        from bncli.engine.data.hub import load_hub

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
    order = evaluation_order(len(held_out_x), spec.split_seed)
    held_out = InMemory(held_out_x[order].to(device), arrays.held_out_y[order].to(device), convert)
    return Dataset(name, train, held_out, shape, arrays.classes)


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
    return Arrays(x[train].clone(), y[train], x[held_out], y[held_out], spec.classes)  # a copy, to let go of the rest


def _npz(spec: Npz) -> Arrays:
    arrays = read_npz(spec.path)
    x, y, classes = arrays["x"], arrays["y"], int(arrays["y"].max()) + 1
    fixed = "x_test" in arrays
    if fixed and spec.held_out is not None:
        raise DataError(f"data.held_out: {spec.path} has x_test and y_test to hold out; leave held_out away")
    if not fixed and spec.held_out is None:
        raise DataError(f"data.held_out: {spec.path} has no x_test; say how many of its {len(y)} examples to hold out")
    return Arrays(x, y, arrays["x_test"], arrays["y_test"], classes) if fixed else _carved(x, y, spec, classes)
