"""NumPy's files before torch is loaded: what they hold, and what is said of those that lack something."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bncli.errors import DataError
from bncli.recipe.npz import header

X, Y = np.zeros((3, 2)), np.array([0, 2, 1])


def array(values: np.ndarray) -> bytes:
    made = io.BytesIO()
    np.save(made, values)
    return made.getvalue()


def archive_of(x: bytes) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        archive.writestr("x.npy", x)
        archive.writestr("y.npy", x)
    return made.getvalue()


def test_a_header_has_the_shape_the_classes_and_whether_there_is_a_test_set(tmp_path: Path) -> None:
    path = str(tmp_path / "set.npz")
    np.savez(path, x=X, y=Y)
    assert header(path) == ((3, 2), 3, False)
    np.savez(path, x=X, y=Y, x_test=X, y_test=Y)
    assert header(path) == ((3, 2), 3, True)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"X": X, "y": Y}, "has no x; it holds X, y. Did you mean X? Required are x and y, and for a fixed test set "
                           "x_test and y_test as well: numpy.savez('{path}', x=X, y=y)"),
        ({"Images": X, "target": Y, "z": X}, "has no x and no y; it holds Images, target, z. Did you mean Images and "
                                             "target? "),
        ({"a": X, "b": Y}, "has no x and no y; it holds a, b. Required are"),
        ({"x": X, "y": Y, "x_test": X, "Y_test": Y}, "numpy.savez('{path}', x=x, y=y, x_test=x_test, y_test=Y_test)"),
        ({"x": X, "y": Y.astype(float)}, "has y of type float64 and shape (3,); labels must be integers, one per "
                                         "example (whole numbers as floats: y.astype(int))"),
        ({"x": X, "y": np.array([0.5, np.nan])}, "shape (2,); labels must be integers, one per example"),
        ({"x": X, "y": np.eye(3)}, "(one-hot rows: y.argmax(1))"),
        ({"x": X, "y": np.array(["a", "b"])}, "(names: numpy.unique(y, return_inverse=True)[1])"),
        ({"x": X, "y": Y[:0]}, "shape (0,); labels must be integers, one per example"),
        ({"x": X, "y": Y - 1}, "has labels from -1 to 1 in y; number the classes from 0"),
        ({"x": X, "y": np.array([None, 1], dtype=object)}, "cannot be read as arrays of numbers (Object arrays"),
        (b"not a zip file", "is not an .npz archive; create it with numpy.savez('{path}', x=..., y=...)"),
        (archive_of(b"\x93NUMPY\x01\x00\x02\x00{("), "cannot be read as arrays of numbers"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_what_to_write(tmp_path: Path, content: Any, reason: str) -> None:
    path = tmp_path / "set.npz"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.savez(path, **content)
    with pytest.raises(DataError) as caught:
        header(str(path))
    assert str(caught.value).startswith(f"data.path: {path} ")
    assert reason.format(path=path) in str(caught.value)


def test_a_missing_file_is_told_with_the_nearest_name_or_how_to_make_one(tmp_path: Path) -> None:
    path = str(tmp_path / "sets.npz")
    with pytest.raises(DataError, match=r"sets\.npz does not exist; create it with numpy\.savez\('.*sets\.npz', x="):
        header(path)
    np.savez(tmp_path / "set.npz", x=X, y=Y)
    with pytest.raises(DataError, match=r"sets\.npz does not exist; did you mean .*/set\.npz\?"):
        header(path)


def damaged(content: bytes, what: str) -> bytes:
    """An archive with another compression, version or size than it has; np.savez writes x first."""
    entry = content.index(b"PK\x01\x02")  # in the list at the end; its fields: version needed, flags, compression
    at, value = {"version": (entry + 6, 99), "compression": (entry + 10, 97)}[what]
    return content[:at] + value.to_bytes(2, "little") + content[at + 2 :]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda made: damaged(made, "version"), "cannot be read as arrays of numbers (zip file version 9.9); write it"),
        (lambda made: damaged(made, "compression"), "cannot be read as arrays of numbers (That compression method"),
        (lambda made: archive_of(array(X).replace(b"(3, 2), }          ", b"(3, 10000000000), }")),
         "(x has 48 bytes of values, and its header says (3, 10000000000) of float64); write it again"),
        (lambda made: archive_of(array(X).replace(b"(3, 2), }  ", b"(-3, -2), }")),
         "(x has 48 bytes of values, and its header says (-3, -2) of float64); write it again"),
        (lambda made: made.replace(b"x.npy", b"x.txt"), "has no x; it holds x.txt, y."),
        (lambda made: made[:-30], "is not an .npz archive"),
    ],
)  # fmt: skip
def test_a_damaged_archive_is_refused_with_its_reason(tmp_path: Path, change: Any, reason: str) -> None:
    path = tmp_path / "set.npz"
    np.savez(path, x=X, y=Y)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(DataError) as caught:
        header(str(path))
    assert reason in str(caught.value)
