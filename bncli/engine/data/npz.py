"""Reading of NumPy's .npz files into tensors in place, a few MiB at a time.

Letters: N examples, C channels, H height, W width.
"""

from __future__ import annotations

import math
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from bncli.engine.data.arrays import Arrays, Place, arrays
from bncli.engine.data.splits import parts
from bncli.errors import DataError
from bncli.recipe.npz import Header, blame, headers, labels

if TYPE_CHECKING:
    from bncli.recipe.sections import Npz

CHUNK = 2**22  # bytes of a file that are held at once


def read_npz(spec: Npz, place: Place) -> Arrays:
    """x (N, features) or (N, C, H, W) and y (N,) of a file; with x_test and y_test if it has a fixed test set.

    x is float32, or uint8 for images stored as uint8; vectors stored as uint8 become float32 in 0..1. The labels of y
    are 0 to classes - 1, each at least once. An array in Fortran's order is read in that order, not example by example.
    Raises DataError for a missing file or other contents.
    """
    with blame(spec.path):
        found = headers(spec.path)
        _check_shapes(found)
        y = {key: labels(spec.path, key, header) for key, header in found.items() if key[0] == "y"}
        _check_classes(y)
    (examples, *shape), has_test = found["x"].shape, "x_test" in found
    if has_test and spec.held_out is not None:
        raise DataError(f"data.held_out: {spec.path} has x_test and y_test to hold out; remove held_out")
    if not has_test and spec.held_out is None:
        count = f"set how many of its {examples} examples to hold out"
        raise DataError(f"data.held_out: {spec.path} has no x_test; {count}")
    if spec.augment == "crop-flip" and len(shape) != 3:
        name = Path(spec.path).name
        raise DataError(f"data.augment: crop-flip needs images, and {name} holds vectors; set augment: none")
    held_out = found["x_test"].shape[0] if has_test else spec.held_out or 0
    train, as_bytes = examples - held_out * (not has_test), found["x"].dtype == np.uint8 and len(shape) == 3
    made = arrays(place, tuple(shape), train, held_out, int(y["y"].max()) + 1, as_bytes)
    rows = made.rows(spec.split_seed) if has_test else [made.rows_of_whole(spec.split_seed)]
    with blame(spec.path), zipfile.ZipFile(Path(spec.path).expanduser()) as archive:
        for index, end in zip(rows, ("", "_test"), strict=False):
            made.y[index] = torch.from_numpy(y[f"y{end}"].astype(np.int64))
            _copy(archive, f"x{end}", found[f"x{end}"], made.x, index)
    return made


def _copy(archive: zipfile.ZipFile, key: str, header: Header, x: Tensor, rows: Tensor) -> None:
    """Copy an array of the archive into x, example i to x[rows[i]], and check that its values are finite."""
    # In Fortran's order the file holds the transpose, whose last dimension is that of the examples.
    fortran, floats = header.fortran_order, header.dtype.kind == "f"
    first, *others = header.shape[::-1] if fortran else header.shape
    target = x.permute(*reversed(range(x.dim()))) if fortran else x
    finite = torch.ones(len(rows), dtype=torch.bool)
    width = header.dtype.itemsize * math.prod(others)  # bytes of one index of the file's first dimension
    with archive.open(f"{key}.npy") as file:
        file.read(header.start)
        for at in parts(first, max(1, CHUNK // width)):
            content = np.frombuffer(file.read((at.stop - at.start) * width), header.dtype).reshape(-1, *others)
            with np.errstate(over="ignore"):
                values = torch.from_numpy(content.astype(np.float32 if floats else np.uint8))
            if x.is_floating_point() and not floats:
                values = values / 255
            of_examples = slice(None) if fortran else at
            finite[of_examples] &= values.isfinite().movedim(-1 if fortran else 0, 0).flatten(1).all(1)
            (target[at] if fortran else target).index_copy_(-1 if fortran else 0, rows[of_examples], values)
        file.read(1)  # so that the checksum is compared
    if not finite.all():
        raise DataError(
            f"has values in {key} that are not finite in float32, in {int((~finite).sum())} of {len(rows)} examples, "
            f"the first at index {int((~finite).nonzero()[0])}; remove or repair them"
        )


def _check_shapes(found: dict[str, Header]) -> None:
    for key in (key for key in found if key[0] == "x"):
        shape, dtype = found[key].shape, found[key].dtype
        if dtype != np.uint8 and dtype.kind != "f":
            raise DataError(f"has {key} of type {dtype}; it must be float, or uint8 for 0..255")
        if len(shape) not in (2, 4) or 0 in shape:
            raise DataError(
                f"has {key} of shape {shape}; it must be (examples, features) or (examples, channels, height, width), "
                "and not empty"
            )
        examples, of_y = shape[0], found[key.replace("x", "y")].shape
        if len(of_y) == 1 and 0 != of_y[0] != examples:
            raise DataError(f"has {examples} examples in {key} and {of_y[0]} labels in {key.replace('x', 'y')}")
    x, x_test = found["x"], found.get("x_test", found["x"])
    if x.shape[1:] != x_test.shape[1:]:
        raise DataError(f"has examples of shape {x.shape[1:]} in x and {x_test.shape[1:]} in x_test")
    if (x.dtype == np.uint8) != (x_test.dtype == np.uint8):
        raise DataError(f"has x of type {x.dtype} and x_test of type {x_test.dtype}; store both as the same type")


def _check_classes(y: dict[str, np.ndarray]) -> None:
    """y is one per class at least; y_test has no others."""
    present = np.unique(y["y"])
    if len(present) == 1:
        raise DataError(f"has only label {int(present[0])} in y; there must be at least 2 classes, 0 and 1")
    if len(present) <= present[-1]:
        absent = int((present != np.arange(len(present))).nonzero()[0][0])
        raise DataError(
            f"has labels up to {int(present[-1])} in y but no label {absent}; number them from 0, without gaps"
        )
    if "y_test" in y and y["y_test"].max() > present[-1]:
        raise DataError(f"has label {y['y_test'].max()} in y_test, beyond y's 0 to {present[-1]}")
