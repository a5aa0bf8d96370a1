"""NumPy's .npz files of a recipe's data: which arrays they hold, the shape of the examples and the labels. No torch."""

from __future__ import annotations

import difflib
import zipfile
from os.path import exists, expanduser, isfile
from pathlib import Path
from typing import Any

from bncli.errors import DataError

KEYS = ("x", "y", "x_test", "y_test")
USUAL_NAMES = {"x": ("images", "data", "features", "inputs"), "y": ("labels", "label", "targets", "target", "classes")}
# What labels of a type of numpy's probably are.
HINTS = {"f": " (whole numbers as floats: y.astype(int))", "U": " (names: numpy.unique(y, return_inverse=True)[1])"}
UNREADABLE = "cannot be read as arrays of numbers ({}); write it again with numpy.savez"


def header(path: str) -> tuple[tuple[int, ...], int, bool]:
    """The shape of x with its examples, the number of classes, and whether there is a fixed test set; x is not read."""
    import numpy as np

    file = Path(expanduser(path))
    try:
        names = array_names(path)
        with zipfile.ZipFile(file) as archive, archive.open("x.npy") as start:
            version = np.lib.format.read_magic(start)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape: tuple[int, ...] = tuple(read(start)[0])
        with np.load(file, allow_pickle=False) as arrays:
            y = np.asarray(arrays["y"])
        check_labels("y", y)
    except DataError as error:
        raise DataError(f"data.path: {path} {error}") from error
    except Exception as error:  # what a damaged file raises is zipfile's, zlib's, NumPy's or tokenize's
        raise DataError(f"data.path: {path} {UNREADABLE.format(error)}") from error
    return shape, int(y.max()) + 1, "x_test" in names


def array_names(path: str) -> list[str]:
    """The names of a file's arrays. Raises DataError, without the path, for no archive or one without x and y."""
    file = Path(expanduser(path))
    if not isfile(file):
        if exists(file):
            raise DataError("is not a plain file; name an .npz archive")
        near = difflib.get_close_matches(file.name, [each.name for each in file.parent.glob("*.npz")], n=1)
        did_you_mean = "".join(f"; did you mean {file.with_name(name)}?" for name in near)
        raise DataError(f"does not exist{did_you_mean or f'; create it with numpy.savez({path!r}, x=..., y=...)'}")
    if not zipfile.is_zipfile(file):
        raise DataError(f"is not an .npz archive; create it with numpy.savez({path!r}, x=..., y=...)")
    try:
        with zipfile.ZipFile(file) as archive:
            found = [name.removesuffix(".npy") for name in archive.namelist()]
    except Exception as error:  # see `header`
        raise DataError(UNREADABLE.format(error)) from error
    needed = KEYS if set(KEYS[2:]) & set(found) else KEYS[:2]
    if missing := [key for key in needed if key not in found]:
        meant = {key: name for name in found for key in missing if name.lower() in (key, *USUAL_NAMES.get(key, ()))}
        arrays = ", ".join(f"{key}={meant.get(key, '...' if key in missing else key)}" for key in needed)
        did_you_mean = f"Did you mean {' and '.join(meant.values())}? " if meant else ""
        raise DataError(
            f"has no {' and no '.join(missing)}; it holds {', '.join(found) or 'nothing'}. {did_you_mean}Required are "
            f"x and y, and for a fixed test set x_test and y_test as well: numpy.savez({path!r}, {arrays})"
        )
    return found


def check_labels(key: str, y: Any) -> None:
    """Raises DataError, without the path, for what cannot be the numbers of classes."""
    if y.dtype.kind not in "iu" or y.ndim != 1 or not len(y):
        hint = " (one-hot rows: y.argmax(1))" if y.ndim == 2 else HINTS.get(y.dtype.kind, "")
        raise DataError(
            f"has {key} of type {y.dtype} and shape {y.shape}; labels must be integers, one per example{hint}"
        )
    if y.min() < 0 or y.max() >= 2**31:
        raise DataError(f"has labels from {y.min()} to {y.max()} in {key}; number the classes from 0")
