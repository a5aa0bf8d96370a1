"""NumPy's .npz files of a recipe's data: which arrays they hold, the shape of the examples and the labels. No torch."""

from __future__ import annotations

import difflib
import math
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from os.path import exists, expanduser, isfile
from pathlib import Path
from typing import Any, NamedTuple

from bncli.errors import DataError

KEYS = ("x", "y", "x_test", "y_test")
USUAL_NAMES = {"x": ("images", "data", "features", "inputs"), "y": ("labels", "label", "targets", "target", "classes")}
# What labels of a type of numpy's probably are.
HINTS = {"f": " (whole numbers as floats: y.astype(int))", "U": " (names: numpy.unique(y, return_inverse=True)[1])"}


class Header(NamedTuple):
    """What an array's file says about it before its values."""

    shape: tuple[int, ...]
    fortran_order: bool  # whether the first dimension varies fastest in the file
    dtype: Any  # NumPy's
    start: int  # bytes before the values


def header(path: str) -> tuple[tuple[int, ...], int, bool]:
    """The shape of x with its examples, the number of classes, and whether there is a fixed test set; x is not read."""
    with blame(path):
        found = headers(path)
        return found["x"].shape, int(labels(path, "y", found["y"]).max()) + 1, "x_test" in found


@contextmanager
def blame(path: str) -> Iterator[None]:
    """A context in which an error of a file or of its reading becomes a DataError that names it."""
    try:
        yield
    except DataError as error:
        raise DataError(f"data.path: {path} {error}") from error
    except Exception as error:  # what a damaged file raises is zipfile's, zlib's, NumPy's or tokenize's
        why = f"cannot be read as arrays of numbers ({str(error) or type(error).__name__})"
        raise DataError(f"data.path: {path} {why}; write it again with numpy.savez") from error


def headers(path: str) -> dict[str, Header]:
    """The headers of the arrays that a recipe uses, compared with the sizes that the archive says.

    Raises DataError, without the path, and whatever a damaged archive raises.
    """
    import numpy as np

    file, found = Path(expanduser(path)), dict[str, Header]()
    if not isfile(file):
        if exists(file):
            raise DataError("is not a plain file; name an .npz archive")
        near = difflib.get_close_matches(file.name, [each.name for each in file.parent.glob("*.npz")], n=1)
        did_you_mean = "".join(f"; did you mean {file.with_name(name)}?" for name in near)
        raise DataError(f"does not exist{did_you_mean or f'; create it with numpy.savez({path!r}, x=..., y=...)'}")
    if not zipfile.is_zipfile(file):
        raise DataError(f"is not an .npz archive; create it with numpy.savez({path!r}, x=..., y=...)")
    with zipfile.ZipFile(file) as archive:
        names = [name.removesuffix(".npy") for name in archive.namelist()]
        _check_names(names, path)
        for key in (key for key in KEYS if key in names):
            with archive.open(f"{key}.npy") as array:
                version = np.lib.format.read_magic(array)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                found[key] = Header(*read(array), array.tell())
            shape, _, dtype, start = found[key]
            if dtype.hasobject:
                raise ValueError(f"Object arrays are not loaded, and {key} is one")
            held = archive.getinfo(f"{key}.npy").file_size - start
            if math.prod(shape) * dtype.itemsize != held or min(shape, default=0) < 0:
                raise ValueError(f"{key} has {held:,} bytes of values, and its header says {shape} of {dtype}")
    return found


def _check_names(found: list[str], path: str) -> None:
    needed = KEYS if set(KEYS[2:]) & set(found) else KEYS[:2]
    if missing := [key for key in needed if key not in found]:
        meant = {key: name for name in found for key in missing if name.lower() in (key, *USUAL_NAMES.get(key, ()))}
        arrays = ", ".join(f"{key}={meant.get(key, '...' if key in missing else key)}" for key in needed)
        did_you_mean = f"Did you mean {' and '.join(meant.values())}? " if meant else ""
        raise DataError(
            f"has no {' and no '.join(missing)}; it holds {', '.join(found) or 'nothing'}. {did_you_mean}Required are "
            f"x and y, and for a fixed test set x_test and y_test as well: numpy.savez({path!r}, {arrays})"
        )


def labels(path: str, key: str, found: Header) -> Any:
    """The labels of a file as an array of integers. Raises DataError, without the path."""
    import numpy as np

    if found.dtype.kind not in "iu" or len(found.shape) != 1 or not found.shape[0]:
        hint = " (one-hot rows: y.argmax(1))" if len(found.shape) == 2 else HINTS.get(found.dtype.kind, "")
        raise DataError(
            f"has {key} of type {found.dtype} and shape {found.shape}; labels must be integers, one per example{hint}"
        )
    with np.load(Path(path).expanduser(), allow_pickle=False) as arrays:
        y = arrays[key]
    if y.min() < 0 or y.max() >= 2**31:
        raise DataError(f"has labels from {y.min()} to {y.max()} in {key}; number the classes from 0")
    return y
