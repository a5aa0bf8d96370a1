from __future__ import annotations

import numpy as np
import pytest
import torch

from bncli.engine.data import read_npz
from bncli.errors import USAGE, DataError

VECTORS = np.arange(12, dtype=np.float64).reshape(4, 3)
LABELS = np.array([0, 1, 0, 1])


def save(folder, **arrays) -> str:
    np.savez(folder / "set.npz", **arrays)
    return str(folder / "set.npz")


def test_arrays_come_back_as_float32_and_int64(tmp_path):
    arrays = read_npz(save(tmp_path, x=VECTORS, y=LABELS.astype(np.uint8), unrelated=np.zeros(3)))
    assert list(arrays) == ["x", "y"]
    assert arrays["x"].dtype == torch.float32
    assert arrays["x"].tolist() == VECTORS.tolist()
    assert arrays["y"].dtype == torch.int64
    assert arrays["y"].tolist() == LABELS.tolist()


def test_a_fixed_test_set_comes_with_them(tmp_path):
    arrays = read_npz(save(tmp_path, x=VECTORS, y=LABELS, x_test=VECTORS[:2] + 1, y_test=LABELS[:2]))
    assert arrays["x_test"].tolist() == (VECTORS[:2] + 1).tolist()
    assert arrays["y_test"].tolist() == [0, 1]


def test_byte_images_stay_bytes_and_byte_vectors_become_0_to_1(tmp_path):
    images = np.full((4, 1, 2, 2), 51, dtype=np.uint8)
    assert read_npz(save(tmp_path, x=images, y=LABELS))["x"].dtype == torch.uint8
    vectors = read_npz(save(tmp_path, x=images.reshape(4, 4), y=LABELS))["x"]
    assert vectors.tolist() == torch.full((4, 4), 51 / 255).tolist()


def test_numbers_in_the_other_byte_order_are_read(tmp_path):
    arrays = read_npz(save(tmp_path, x=VECTORS.astype(">f4"), y=LABELS.astype(">i2")))
    assert arrays["x"].tolist() == VECTORS.tolist()
    assert arrays["y"].tolist() == LABELS.tolist()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y": None}, "has no y; it holds x. Needed are x and y"),
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
            r"has y of type float64 and shape \(4,\); labels are whole numbers, one an example",
        ),
        ({"y": np.eye(4, dtype=int)}, r"has y of type int64 and shape \(4, 4\); labels are"),
        ({"y": LABELS[:0]}, r"shape \(0,\); labels are"),
        ({"y": LABELS - 1}, "has labels from -1 to 0 in y; number the classes from 0 up"),
        ({"y": LABELS.astype(np.uint64) + 2**63}, "has labels from 9223372036854775808 to"),
        ({"y": LABELS + 1}, "has labels up to 2 in y and none that is 0; number them from 0, without gaps"),
        ({"y": LABELS * 2}, "has labels up to 2 in y and none that is 1"),
        ({"y": LABELS * 0}, "has label 0 alone in y; there must be at least 2 classes"),
        ({"y": LABELS[:3]}, "has 4 examples in x and 3 labels in y"),
        ({"x_test": VECTORS, "y_test": LABELS[:3]}, "has 4 examples in x_test and 3 labels in y_test"),
        ({"x_test": VECTORS[:, :2], "y_test": LABELS}, r"has examples of shape \(3,\) in x and \(2,\) in x_test"),
        ({"x_test": VECTORS.astype(np.uint8), "y_test": LABELS}, "has x of type float64 and x_test of type uint8"),
        ({"x_test": VECTORS, "y_test": LABELS + 1}, "has label 2 in y_test, beyond y's 0 to 1"),
        ({"x": np.array([{}, {}])}, "cannot be read as arrays of numbers"),
    ],
)
def test_what_does_not_fit_is_named_with_its_file(tmp_path, changes, message):
    arrays = {"x": VECTORS, "y": LABELS} | changes
    path = save(tmp_path, **{key: array for key, array in arrays.items() if array is not None})
    with pytest.raises(DataError, match=message) as caught:
        read_npz(path)
    assert str(caught.value).startswith(f"data.path: {path} ")
    assert caught.value.exit_code == USAGE


def test_a_file_that_is_not_there_comes_with_the_call_that_makes_it(tmp_path):
    with pytest.raises(DataError, match=r"none\.npz is not there; make it with numpy\.savez\('.*none\.npz', x=\.\.\."):
        read_npz(str(tmp_path / "none.npz"))


def test_a_folder_is_not_a_file(tmp_path):
    with pytest.raises(DataError, match="is not there"):
        read_npz(str(tmp_path))


@pytest.mark.parametrize("content", [b"", b"label,pixel\n1,2\n", b"\x93NUMPY\x01\x00"], ids=["empty", "csv", "npy"])
def test_another_kind_of_file_is_refused(tmp_path, content):
    (tmp_path / "set.npz").write_bytes(content)
    with pytest.raises(DataError, match=r"is not an \.npz archive"):
        read_npz(str(tmp_path / "set.npz"))


def test_a_damaged_archive_is_refused(tmp_path):
    path = save(tmp_path, x=VECTORS, y=LABELS)
    content = bytearray((tmp_path / "set.npz").read_bytes())
    content[200:210] = bytes(10)  # inside x: its checksum no longer holds
    (tmp_path / "set.npz").write_bytes(content)
    with pytest.raises(DataError, match="cannot be read as arrays of numbers"):
        read_npz(path)
