"""The reading of NumPy's .npz files into tensors: types, orders, chunks, and what is refused."""

from __future__ import annotations

import zipfile

import numpy as np
import pytest
import torch

from bncli.engine.data import npz as npz_module
from bncli.engine.data.arrays import Arrays, in_memory
from bncli.engine.data.npz import read_npz
from bncli.errors import USAGE, DataError
from bncli.recipe.sections import Npz

VECTORS = np.arange(12, dtype=np.float64).reshape(4, 3)
LABELS = np.array([0, 1, 0, 1])


def save(folder, **arrays) -> str:
    np.savez(folder / "set.npz", **arrays)
    return str(folder / "set.npz")


def read(path: str, held_out: int | None = None) -> Arrays:
    return read_npz(Npz(source="npz", path=path, held_out=held_out), in_memory)


def whole(arrays: Arrays) -> tuple[torch.Tensor, torch.Tensor]:
    """x and y in the order of the file, from which one example or more were held out."""
    rows = arrays.rows_of_whole(0)
    return arrays.x[rows], arrays.y[rows]


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize(("x_type", "y_type"), [("f8", "u1"), (">f4", ">i2")])
def test_arrays_of_either_byte_order_come_back_as_float32_and_int64(tmp_path, x_type, y_type, order, write):
    path = str(tmp_path / "set.npz")
    write(path, x=VECTORS.astype(x_type, order), y=LABELS.astype(y_type), unrelated=np.zeros(3))
    x, y = whole(read(path, held_out=2))
    assert (x.dtype, y.dtype) == (torch.float32, torch.int64)
    assert (x.tolist(), y.tolist()) == (VECTORS.tolist(), LABELS.tolist())


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("x_type", ["u1", "f2", "f4"])
def test_an_array_of_many_chunks_is_that_of_one(tmp_path, monkeypatch, order, x_type):
    """Rows of 24 values, 2 to a chunk in C's order; in Fortran's, a chunk is a part of the last dimension."""
    images = (np.random.default_rng(0).random((9, 2, 3, 4)) * 100).astype(x_type, order)
    monkeypatch.setattr(npz_module, "CHUNK", 2 * 24 * images.itemsize)
    x, y = whole(read(save(tmp_path, x=images, y=[0, 1, 2] * 3), held_out=4))
    assert np.array_equal(x.numpy(), images.astype(np.uint8 if x_type == "u1" else np.float32))
    assert y.tolist() == [0, 1, 2] * 3
    spoiled = images.astype("f4", order)
    spoiled[[5, 7], 1, 0, 3] = np.inf
    with pytest.raises(DataError, match="not finite in float32, in 2 of 9 examples, the first at index 5;"):
        read(save(tmp_path, x=spoiled, y=[0, 1, 2] * 3), held_out=4)


def test_a_fixed_test_set_comes_with_them(tmp_path):
    arrays = read(save(tmp_path, x=VECTORS, y=LABELS, x_test=VECTORS[:2] + 1, y_test=LABELS[:2]))
    _, rows = arrays.rows(0)
    assert arrays.x[:4].tolist() == VECTORS.tolist()
    assert arrays.x[rows].tolist() == (VECTORS[:2] + 1).tolist()
    assert arrays.y[rows].tolist() == [0, 1]


def test_byte_images_stay_bytes_and_byte_vectors_become_0_to_1(tmp_path):
    images = np.full((4, 1, 2, 2), 51, dtype=np.uint8)
    assert read(save(tmp_path, x=images, y=LABELS), held_out=1).x.dtype == torch.uint8
    vectors, _ = whole(read(save(tmp_path, x=images.reshape(4, 4), y=LABELS), held_out=1))
    assert vectors.tolist() == torch.full((4, 4), 51 / 255).tolist()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y": None}, r"has no y; it holds x\. Required are x and y, .*: numpy\.savez\('.*', x=x, y=\.\.\.\)"),
        ({"x": None, "y": None, "images": VECTORS}, "has no x and no y; it holds images."),
        ({"x": None, "y": None}, "it holds nothing"),
        ({"x_test": VECTORS}, "has no y_test; it holds x, y, x_test"),
        ({"x": VECTORS.astype(np.int64)}, "has x of type int64; it must be float, or uint8 for 0..255"),
        ({"x": VECTORS.astype(str)}, "it must be float, or uint8"),
        ({"x": VECTORS[0]}, r"has x of shape \(3,\); it must be \(examples, features\) or \(examples, channels"),
        ({"x": VECTORS[:, :0]}, r"has x of shape \(4, 0\).*not empty"),
        (
            {"x": np.where(VECTORS == 5, np.nan, VECTORS)},
            "not finite in float32, in 1 of 4 examples, the first at index 1",
        ),
        ({"x": VECTORS * 1e300}, "not finite in float32, in 4 of 4 examples"),
        (
            {"y": LABELS.astype(float)},
            r"has y of type float64 and shape \(4,\); labels must be integers, one per example",
        ),
        ({"y": np.eye(4, dtype=int)}, r"has y of type int64 and shape \(4, 4\); labels must be"),
        ({"y": LABELS[:0]}, r"shape \(0,\); labels must be"),
        ({"y": LABELS - 1}, "has labels from -1 to 0 in y; number the classes from 0"),
        ({"y": LABELS.astype(np.uint64) + 2**63}, "has labels from 9223372036854775808 to"),
        ({"y": LABELS + 1}, "has labels up to 2 in y but no label 0; number them from 0, without gaps"),
        ({"y": LABELS * 2}, "has labels up to 2 in y but no label 1"),
        ({"y": LABELS * 0}, "has only label 0 in y; there must be at least 2 classes"),
        ({"y": LABELS[:3]}, "has 4 examples in x and 3 labels in y"),
        ({"x_test": VECTORS, "y_test": LABELS[:3]}, "has 4 examples in x_test and 3 labels in y_test"),
        ({"x_test": VECTORS[:, :2], "y_test": LABELS}, r"has examples of shape \(3,\) in x and \(2,\) in x_test"),
        ({"x_test": VECTORS.astype(np.uint8), "y_test": LABELS}, "has x of type float64 and x_test of type uint8"),
        ({"x_test": VECTORS, "y_test": LABELS + 1}, "has label 2 in y_test, beyond y's 0 to 1"),
        ({"x": np.array([{}, {}])}, "cannot be read as arrays of numbers"),
    ],
)
def test_unsuitable_arrays_are_named_with_their_file(tmp_path, changes, message):
    arrays = {"x": VECTORS, "y": LABELS} | changes
    path = save(tmp_path, **{key: array for key, array in arrays.items() if array is not None})
    with pytest.raises(DataError, match=message) as caught:
        read(path, held_out=1)
    assert str(caught.value).startswith(f"data.path: {path} ")
    assert caught.value.exit_code == USAGE


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"set\.npz does not exist; create it with numpy\.savez\('.*set\.npz', x=\.\.\."),
        ("a folder", "is not a plain file"),
        (b"", r"is not an \.npz archive"),
        (b"label,pixel\n1,2\n", r"is not an \.npz archive"),
        (b"\x93NUMPY\x01\x00", r"is not an \.npz archive"),
    ],
    ids=["missing", "folder", "empty", "csv", "npy"],
)
def test_what_is_no_archive_is_refused(tmp_path, content, message):
    if isinstance(content, bytes):
        (tmp_path / "set.npz").write_bytes(content)
    elif content:
        (tmp_path / "set.npz").mkdir()
    with pytest.raises(DataError, match=message):
        read(str(tmp_path / "set.npz"), held_out=1)


@pytest.mark.parametrize(
    ("x", "message"),
    [(b"no array", "the magic string is not correct"), (b"\x93NUMPY\x01\x00\x02\x00{(", "cannot be read as arrays")],
)
def test_an_archive_of_no_arrays_is_refused(tmp_path, x, message):
    with zipfile.ZipFile(tmp_path / "set.npz", "w") as archive:
        archive.writestr("x.npy", x)
        archive.writestr("y.npy", b"junk")
    with pytest.raises(DataError, match=message):
        read(str(tmp_path / "set.npz"), held_out=1)


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
def test_a_damaged_archive_is_refused(tmp_path, write):
    path = tmp_path / "set.npz"
    write(path, x=np.zeros((2**15, 33), np.float32), y=np.arange(2**15) % 2)  # x is more than one chunk
    content = bytearray(path.read_bytes())
    entry = content.index(b"PK\x01\x02")  # of x, in the list at the end; its checksum is 16 bytes on
    content[entry + 16] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"cannot be read as arrays of numbers \(Bad CRC-32 for file 'x\.npy'\)"):
        read(str(path), held_out=1)
