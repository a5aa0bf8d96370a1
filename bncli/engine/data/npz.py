"""The user's own arrays: a NumPy .npz file, read and checked."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bncli.errors import DataError

KEYS = ("x", "y", "x_test", "y_test")


def read_npz(path: str) -> dict[str, Tensor]:
    """x (N, features) or (N, C, H, W) and y (N,) int64; if the file has a fixed test set, x_test and y_test as well.

    x is float32, and uint8 for images that are stored so; vectors stored as uint8 come as float32 of 0..1. The labels
    of y are 0 to classes - 1, each at least once. Raises DataError for a file that is not there or not so.
    """
    try:
        found, arrays = _read(Path(path).expanduser())
        test = [key for key in KEYS[2:] if key in found]
        if missing := [key for key in (KEYS if test else KEYS[:2]) if key not in found]:
            raise DataError(
                f"has no {' and no '.join(missing)}; it holds {', '.join(found) or 'nothing'}. "
                "Needed are x and y, and for a fixed test set x_test and y_test as well"
            )
        tensors = {key: (_examples if key[0] == "x" else _labels)(key, arrays[key]) for key in arrays}
        _check_classes(tensors["y"])
        _check_lengths(tensors, "x", "y")
        if test:
            _check_lengths(tensors, "x_test", "y_test")
            _check_test_set(arrays, int(tensors["y"].max()))
    except DataError as error:
        raise DataError(f"data.path: {path} {error}") from None
    return tensors


def _read(path: Path) -> tuple[list[str], dict[str, np.ndarray]]:
    if not path.is_file():
        raise DataError(f"is not there; make it with numpy.savez('{path}', x=..., y=...)")
    if not zipfile.is_zipfile(path):
        raise DataError(f"is not an .npz archive; make it with numpy.savez('{path}', x=..., y=...)")
    try:
        with np.load(path, allow_pickle=False) as archive:
            return archive.files, {key: archive[key] for key in KEYS if key in archive.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"cannot be read as arrays of numbers ({error}); write it again with numpy.savez") from None


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
    if y.dtype.kind not in "iu" or y.ndim != 1 or not len(y):
        raise DataError(f"has {key} of type {y.dtype} and shape {y.shape}; labels are whole numbers, one an example")
    if y.min() < 0 or y.max() >= 2**31:
        raise DataError(f"has labels from {y.min()} to {y.max()} in {key}; number the classes from 0 up")
    return torch.from_numpy(y.astype(np.int64))


def _check_classes(y: Tensor) -> None:
    present = y.unique()
    if len(present) == 1:
        raise DataError(f"has label {int(present[0])} alone in y; there must be at least 2 classes, 0 and 1")
    if len(present) <= present[-1]:
        absent = int((present != torch.arange(len(present))).nonzero()[0])
        raise DataError(
            f"has labels up to {int(present[-1])} in y and none that is {absent}; number them from 0, without gaps"
        )


def _check_lengths(tensors: dict[str, Tensor], x: str, y: str) -> None:
    if len(tensors[x]) != len(tensors[y]):
        raise DataError(f"has {len(tensors[x])} examples in {x} and {len(tensors[y])} labels in {y}")


def _check_test_set(arrays: dict[str, np.ndarray], last_class: int) -> None:
    x, x_test, y_test = arrays["x"], arrays["x_test"], arrays["y_test"]
    if x.shape[1:] != x_test.shape[1:]:
        raise DataError(f"has examples of shape {x.shape[1:]} in x and {x_test.shape[1:]} in x_test")
    if (x.dtype == np.uint8) != (x_test.dtype == np.uint8):
        raise DataError(f"has x of type {x.dtype} and x_test of type {x_test.dtype}; store both in one type")
    if y_test.max() > last_class:
        raise DataError(f"has label {y_test.max()} in y_test, beyond y's 0 to {last_class}")
