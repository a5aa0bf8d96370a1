"""Every data set that a recipe can name but those of the hub."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
import torch

from bncli.engine import data
from bncli.engine.data import load
from bncli.engine.data.splits import evaluation_order, holdout_split, order
from bncli.errors import DataError
from bncli.recipe.sections import Digits, Npz, Synthetic

CPU = torch.device("cpu")


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def digits(**fields) -> data.Dataset:
    return load(Digits(source="digits", **fields), CPU)


def save(folder, **arrays) -> str:
    np.savez(folder / "set.npz", **arrays)
    return str(folder / "set.npz")


def synthetic(**fields) -> data.Dataset:
    return load(Synthetic(source="synthetic", **fields), CPU)


def npz(path: str, memory_format: torch.memory_format = torch.contiguous_format, **fields) -> data.Dataset:
    return load(Npz(source="npz", path=path, **fields), CPU, memory_format)


# --- splits, as they are loaded -----------------------------------------------------------------------------------


def test_float_vectors_are_converted_at_load_and_byte_images_per_batch(byte_images):
    assert digits().train.convert is None
    images = npz(byte_images, held_out=10)
    assert images.train.x.dtype == torch.uint8
    assert next(images.held_out.chunks(5))[0].dtype == torch.float32


def test_held_out_batches_hold_every_example_once_in_a_fixed_order(byte_images):
    images = npz(byte_images, held_out=10)
    chunks = list(images.held_out.chunks(4))
    assert [len(y) for _, y in chunks] == [4, 3, 3]
    whole, labels = next(images.held_out.chunks(1000))
    assert torch.equal(torch.cat([x for x, _ in chunks]), whole)
    assert torch.equal(torch.cat([y for _, y in chunks]), labels)
    assert images.train.index_device == CPU


@pytest.mark.parametrize("augment", ["none", "crop-flip"])
def test_images_come_in_the_asked_layout_with_the_same_values(byte_images, augment):
    contiguous, channels_last = (
        npz(byte_images, layout, held_out=10, augment=augment, normalize="standard")
        for layout in (torch.contiguous_format, torch.channels_last)
    )
    index = [torch.arange(20)]
    (x, _), (z, _) = (next(one.train.batches(index, seeded(0))) for one in (contiguous, channels_last))
    assert x.is_contiguous()
    assert z.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(x, z)


def test_float_images_come_channels_last_too_and_vectors_do_not_mind():
    spec = Synthetic(source="synthetic", shape=(3, 4, 4), examples=20, held_out=5)
    x, _ = next(load(spec, CPU, torch.channels_last).held_out.chunks(5))
    assert x.is_contiguous(memory_format=torch.channels_last)
    vectors = load(Digits(source="digits"), CPU, torch.channels_last)
    assert torch.equal(vectors.train.x, digits().train.x)


def test_augmentation_changes_training_batches_alone_and_follows_its_generator(byte_images):
    plain, augmented = npz(byte_images, held_out=10), npz(byte_images, held_out=10, augment="crop-flip")
    index = [torch.arange(30)]
    (x, y), *_ = plain.train.batches(index, seeded(0))
    (first, labels), (again, _), (other, _) = (next(augmented.train.batches(index, seeded(s))) for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first, x)
    assert torch.equal(labels, y)
    for ours, theirs in (
        (augmented.held_out.chunks(10), plain.held_out.chunks(10)),
        (augmented.train.chunks(30), [(x, y)]),
    ):
        assert torch.equal(next(iter(ours))[0], next(iter(theirs))[0])


@pytest.mark.parametrize("has_test_set", [False, True])
def test_held_out_examples_of_a_sorted_file_are_evaluated_shuffled(tmp_path, has_test_set):
    arrays = {"x": np.arange(1200.0)[:, None], "y": np.arange(3).repeat(400)}
    test_set = {f"{name}_test": array for name, array in arrays.items()} if has_test_set else {}
    path = save(tmp_path, **arrays, **test_set)
    fields = {} if has_test_set else {"held_out": 600}
    one, again, other = (npz(path, split_seed=seed, **fields).held_out for seed in (1, 1, 2))
    assert torch.equal(one.x, again.x)
    assert not torch.equal(one.x, other.x)
    # 60 draws from thirds: expected 20 of each class, deviation 3.6
    assert all((y.bincount(minlength=3) > 5).all() for _, y in one.chunks(60))
    assert torch.equal(one.x[:, 0] // 400, one.y.float())


# --- sources ------------------------------------------------------------------------------------------------------


def test_digits_are_those_of_scikit_learn_also_where_its_file_has_moved(monkeypatch):
    from sklearn.datasets import load_digits

    expected = load_digits(return_X_y=True)
    assert all(map(np.array_equal, data.read_digits(), expected))
    monkeypatch.setattr(data.importlib.util, "find_spec", lambda name: None)
    assert all(map(np.array_equal, data.read_digits(), expected))


def test_digits_are_64_features_or_8x8_pixels_of_0_to_1_in_10_classes():
    loaded, images = digits(), digits(images=True)
    assert (loaded.name, loaded.shape, loaded.classes) == ("digits (scikit-learn)", (64,), 10)
    assert (len(loaded.train), len(loaded.held_out)) == (1297, 500)
    assert (loaded.train.x.min(), loaded.train.x.max()) == (0, 1)
    assert images.shape == (1, 8, 8)
    assert torch.equal(images.train.x.flatten(1), loaded.train.x)


def test_the_held_out_digits_follow_from_the_split_seed():
    one, same, other = (digits(split_seed=seed).held_out.x for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_standard_takes_mean_and_deviation_from_the_training_examples_alone():
    unit, standard = digits(), digits(normalize="standard")
    mean, std = unit.train.x.double().mean(0), unit.train.x.double().std(0, correction=0)
    varies = std > 1e-6
    assert 0 < (~varies).sum() < 64  # some corner pixels are always 0
    torch.testing.assert_close(
        standard.train.x[:, varies].double().mean(0), torch.zeros(64).double()[varies], atol=1e-6, rtol=0
    )
    expected = ((unit.held_out.x - mean) / std)[:, varies].float()
    torch.testing.assert_close(standard.held_out.x[:, varies], expected)
    assert not standard.train.x[:, ~varies].any()


def test_synthetic_examples_are_class_prototypes_plus_noise():
    clean, noisy = synthetic(noise=0.0, classes=3, shape=(4,)), synthetic(noise=0.5, classes=3, shape=(4,))
    for label in range(3):
        assert len(clean.train.x[clean.train.y == label].unique(dim=0)) == 1
    assert torch.equal(noisy.train.y, clean.train.y)
    # 2,000 x 4 draws: the deviation's own standard error is 0.5 / sqrt(16,000) = 0.004
    assert (noisy.train.x - clean.train.x).std().item() == pytest.approx(0.5, abs=0.02)


def test_synthetic_data_have_the_size_asked_for_and_follow_from_the_seed():
    images = [synthetic(shape=(2, 6, 5), classes=7, examples=30, held_out=9, split_seed=seed) for seed in (0, 0, 1)]
    assert (images[0].name, images[0].shape, images[0].classes) == ("synthetic", (2, 6, 5), 7)
    assert (len(images[0].train), len(images[0].held_out)) == (30, 9)
    assert torch.equal(images[0].train.x, images[1].train.x)
    assert not torch.equal(images[0].train.x, images[2].train.x)


def test_a_synthetic_shape_is_that_of_vectors_or_images():
    with pytest.raises(DataError, match=r"data\.shape: \[8, 8\] is neither \[features\] for vectors nor"):
        synthetic(shape=(8, 8))


def test_npz_examples_are_held_out_by_split_seed(byte_images):
    images = npz(byte_images, held_out=10)
    assert (images.name, images.shape, images.classes) == ("images.npz", (3, 16, 16), 4)
    assert (len(images.train), len(images.held_out)) == (150, 10)
    x, y = next(images.held_out.chunks(10))
    stored = np.load(byte_images)
    held_out = holdout_split(160, 10, 0)[1][evaluation_order(10, 0)].numpy()
    assert np.array_equal(x.numpy(), stored["x"][held_out].astype(np.float32) / 255)
    assert np.array_equal(y.numpy(), stored["y"][held_out])


def test_an_npz_with_its_own_test_set_keeps_it(tmp_path):
    path = save(tmp_path, x=np.eye(4), y=[0, 1, 2, 0], x_test=2 * np.eye(4)[:2], y_test=[1, 0])
    arrays = npz(path)
    assert (arrays.train.x.tolist(), arrays.held_out.x.tolist()) == (np.eye(4).tolist(), (2 * np.eye(4)[:2]).tolist())
    assert (arrays.held_out.y.tolist(), arrays.classes) == ([1, 0], 3)
    with pytest.raises(DataError, match=r"data\.held_out: .*set\.npz has x_test and y_test .*remove held_out"):
        npz(path, held_out=2)


def test_an_npz_without_a_test_set_needs_held_out_and_crop_flip_needs_images(tmp_path):
    path = save(tmp_path, x=np.eye(4), y=[0, 1, 0, 1])
    with pytest.raises(DataError, match=r"data\.held_out: .* has no x_test; set how many of its 4 examples to"):
        npz(path)
    with pytest.raises(DataError, match=r"data\.augment: crop-flip needs images, and set\.npz holds vectors"):
        npz(path, held_out=1, augment="crop-flip")


@pytest.mark.cuda
def test_a_gpu_gets_the_batches_that_the_cpu_gets(byte_images):
    spec = Npz(source="npz", path=byte_images, held_out=10, augment="crop-flip", normalize="standard")
    batches = []
    for device in (CPU, torch.device("cuda")):
        split = load(spec, device).train
        indices = islice(order(len(split), 8, seeded(0), split.index_device), 5)
        batches.append([x.cpu() for x, _ in split.batches(indices, seeded(1))])
    assert all(map(torch.equal, *batches))
