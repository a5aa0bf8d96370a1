"""The order of the batches, what is held out, a split in memory, and normalization and augmentation."""

from __future__ import annotations

from itertools import islice

import pytest
import torch

from bncli.engine.data import splits
from bncli.engine.data.splits import (
    Conversion,
    InMemory,
    byte_counts,
    byte_statistics,
    chunk_count,
    crop_flip,
    evaluation_order,
    holdout_split,
    normalization,
    order,
)
from bncli.errors import DataError


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- order and what is held out -----------------------------------------------------------------------------------


def test_epochs_differ_and_hold_every_example_of_their_whole_batches_once():
    indices = order(10, 3, seeded(0))
    epochs = [torch.cat(list(islice(indices, 3))) for _ in range(4)]
    assert all(len(epoch.unique()) == 9 for epoch in epochs)
    assert not torch.equal(epochs[0], epochs[1])


@pytest.mark.parametrize("start", [0, 1, 3, 4, 11])
def test_the_order_follows_from_the_seed_and_can_start_at_any_batch(start: int):
    whole, other = (list(islice(order(10, 3, seeded(seed)), 15)) for seed in (5, 6))
    assert all(map(torch.equal, islice(order(10, 3, seeded(5), start=start), 15 - start), whole[start:]))
    assert not all(map(torch.equal, whole, other))


def test_a_batch_larger_than_the_training_set_is_refused_at_once():
    with pytest.raises(DataError, match=r"train\.batch_size: 60 is more than the 59 training examples; set 59"):
        order(59, 60, seeded(0))
    assert len(next(order(60, 60, seeded(0)))) == 60


def test_a_holdout_split_parts_the_examples_and_depends_on_its_seed_alone():
    train, held_out = holdout_split(100, 30, 0)
    assert len(held_out) == 30
    assert sorted(train.tolist() + held_out.tolist()) == list(range(100))
    assert torch.equal(holdout_split(100, 30, 0)[1], held_out)
    assert not torch.equal(holdout_split(100, 30, 1)[1], held_out)


def test_holding_everything_out_is_refused():
    with pytest.raises(
        DataError, match=r"data\.held_out: 100 leaves nothing to train on, the data set has 100 examples"
    ):
        holdout_split(100, 100, 0)


def test_the_order_of_evaluation_follows_from_its_arguments_alone():
    found = evaluation_order(50, 3)
    assert sorted(found.tolist()) == list(range(50))
    assert found.tolist() != list(range(50))
    torch.manual_seed(99)
    assert torch.equal(evaluation_order(50, 3), found)
    assert not torch.equal(evaluation_order(50, 4), found)


# --- splits -------------------------------------------------------------------------------------------------------


def test_batches_are_the_rows_of_the_indices_and_nothing_else():
    x, y = torch.randn(10, 4, generator=seeded(0)), torch.arange(10)
    indices = list(islice(order(10, 4, seeded(1)), 5))
    for index, (batch_x, batch_y) in zip(indices, InMemory(x, y).batches(indices), strict=True):
        assert torch.equal(batch_x, x[index])
        assert torch.equal(batch_y, y[index])


@pytest.mark.parametrize("size", [1, 2, 3, 60, 1000])
@pytest.mark.parametrize("examples", [2, 3, 7, 61, 121, 1001])
def test_chunks_are_even_of_about_the_size_and_never_of_one_example(examples, size):
    split = InMemory(torch.zeros(examples, 1), torch.arange(examples))
    labels = [y for _, y in split.chunks(size)]
    sizes = [len(y) for y in labels]
    assert torch.equal(torch.cat(labels), split.y)
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) > 1
    assert max(sizes) <= max(size, 3)
    assert len(sizes) == chunk_count(examples, size) <= -(-examples // size)
    every_third = [y for _, y in split.chunks(size, slice(1, None, 3))]
    assert all(map(torch.equal, every_third, labels[1::3]))
    assert len(every_third) == len(labels[1::3])


def test_training_batches_alone_are_augmented_and_both_are_converted():
    x, y = torch.rand(6, 1, 4, 4, generator=seeded(0)), torch.arange(6)
    split = InMemory(x, y, convert=lambda stored: stored + 100, augment=True)
    ((batch, _),) = split.batches([y], seeded(1))
    ((chunk, _),) = split.chunks(6)
    assert torch.equal(chunk, x + 100)
    assert not torch.equal(batch, chunk)
    # a crop is cut out of the image with zeros around it, so no number is a new one
    assert set(batch.unique().tolist()) <= {100.0, *chunk.unique().tolist()}


# --- normalization ------------------------------------------------------------------------------------------------


def bytes_like(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=seeded(0))


def test_unit_brings_bytes_to_0_to_1_and_leaves_floats_as_they_are():
    images, vectors = torch.tensor([0, 51, 255], dtype=torch.uint8).view(3, 1, 1, 1), torch.tensor([[7.0], [-3.0]])
    mean, std = normalization(images, "unit")
    assert Conversion(mean, std)(images).flatten().tolist() == pytest.approx([0, 0.2, 1])
    mean, std = normalization(vectors, "unit")
    assert torch.equal((vectors - mean) / std, vectors)


@pytest.mark.parametrize("shape", [(1000, 5), (700, 3, 4, 2)])
@pytest.mark.parametrize("as_bytes", [False, True])
def test_the_statistics_of_parts_are_those_of_the_whole(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], as_bytes: bool
) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).mul_(5).add_(100)
    x += torch.arange(len(x)).view(-1, *[1] * (x.dim() - 1)) / 100  # the parts differ in their means
    x[:, 1] = 3.0
    x = x.byte() if as_bytes else x
    whole = normalization(x, "standard")
    monkeypatch.setattr(splits, "PART", 7 * x[0].numel() + 1)
    assert len(splits.examples_of(x)) == -(-len(x) // 7)
    for of_parts, of_whole in zip(normalization(x, "standard"), whole, strict=True):
        torch.testing.assert_close(of_parts, of_whole, rtol=2**-23, atol=0)


@pytest.mark.parametrize("shape", [(200, 5), (40, 3, 6, 4)], ids=["vectors", "images"])
def test_standard_gives_each_feature_or_channel_mean_0_and_deviation_1(shape):
    x = 10_000 + torch.randn(shape, generator=seeded(1))
    mean, std = normalization(x, "standard")
    around = (0, 2, 3) if x.dim() == 4 else (0,)
    normalised = ((x - mean) / std).double()
    # the mean is rounded once to float32, at 10,000 by at most 2**-11
    assert normalised.mean(around).abs().max() < 2**-10
    torch.testing.assert_close(normalised.std(around, correction=0), torch.ones(x.shape[1]).double(), rtol=1e-5, atol=0)


def test_the_statistics_of_bytes_are_those_of_the_same_numbers_as_floats():
    x = bytes_like(30, 3, 5, 7)
    for of_bytes, of_floats in zip(normalization(x, "standard"), normalization(x.float(), "standard"), strict=True):
        torch.testing.assert_close(of_bytes, of_floats, rtol=2**-23, atol=0)


def test_byte_counts_of_parts_add_up_to_those_of_the_whole():
    x = bytes_like(30, 3, 5, 7)
    assert torch.equal(sum(byte_counts(part) for part in x.split(11)), byte_counts(x))
    assert byte_statistics(byte_counts(x))[0].shape == (3, 1, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_a_constant_channel_ends_as_exactly_0(dtype):
    x = bytes_like(37, 2, 3, 3).to(dtype)
    x[:, 1] = 201 if dtype == torch.uint8 else 0.1
    mean, std = normalization(x, "standard")
    assert std[1].item() == 1
    assert not ((x.float() - mean) / std)[:, 1].any()


def test_a_conversion_gives_float32_in_the_asked_layout():
    x = bytes_like(4, 3, 5, 5)
    mean, std = normalization(x, "standard")
    converted = Conversion(mean, std, torch.channels_last)(x)
    assert converted.dtype == torch.float32
    assert converted.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(converted, (x.float() - mean) / std)


def moves(image: torch.Tensor, margin: int) -> list[torch.Tensor]:
    """Every result that crop and flip may have for image (C, H, W), one at a time."""
    channels, height, width = image.shape
    padded = image.new_zeros(channels, height + 2 * margin, width + 2 * margin)
    padded[:, margin : margin + height, margin : margin + width] = image
    places = [(top, left) for top in range(2 * margin + 1) for left in range(2 * margin + 1)]
    crops = [padded[:, top : top + height, left : left + width] for top, left in places]
    return crops + [crop.flip(2) for crop in crops]


@pytest.mark.parametrize(("height", "width", "margin"), [(8, 8, 1), (16, 12, 2), (7, 9, 0)])
def test_crop_flip_gives_every_shift_by_an_eighth_of_the_height_mirrored_too(height, width, margin):
    image = bytes_like(2, height, width)
    expected = {tuple(move.flatten().tolist()) for move in moves(image, margin)}
    moved = crop_flip(image.expand(2000, -1, -1, -1), seeded(0))  # each by itself
    assert {tuple(one) for one in moved.flatten(1).tolist()} == expected


def test_crop_flip_draws_from_its_generator_alone():
    x, state = bytes_like(16, 3, 8, 8), torch.get_rng_state()
    first, same, other = (crop_flip(x, seeded(seed)) for seed in (5, 5, 6))
    assert all(any(torch.equal(moved, move) for move in moves(image, 1)) for image, moved in zip(x, first, strict=True))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)
