from __future__ import annotations

import pytest
import torch

from bncli.engine.data.splits import Conversion, byte_counts, byte_statistics, crop_flip, normalization


def bytes_like(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_unit_brings_bytes_to_0_to_1_and_leaves_floats_as_they_are():
    images, vectors = torch.tensor([0, 51, 255], dtype=torch.uint8).view(3, 1, 1, 1), torch.tensor([[7.0], [-3.0]])
    mean, std = normalization(images, "unit")
    assert Conversion(mean, std)(images).flatten().tolist() == pytest.approx([0, 0.2, 1])
    mean, std = normalization(vectors, "unit")
    assert torch.equal((vectors - mean) / std, vectors)


@pytest.mark.parametrize("shape", [(200, 5), (40, 3, 6, 4)], ids=["vectors", "images"])
def test_standard_gives_each_feature_or_channel_mean_0_and_deviation_1(shape):
    x = 10_000 + torch.randn(shape, generator=torch.Generator().manual_seed(1))
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
def test_crop_flip_gives_every_shift_by_an_eighth_of_the_height_and_its_mirror_image(height, width, margin):
    image = bytes_like(2, height, width)
    expected = {tuple(move.flatten().tolist()) for move in moves(image, margin)}
    moved = crop_flip(image.expand(2000, -1, -1, -1), torch.Generator().manual_seed(0))
    assert {tuple(one) for one in moved.flatten(1).tolist()} == expected


def test_crop_flip_moves_each_image_of_a_batch_by_itself():
    x = bytes_like(64, 3, 8, 8)
    for image, moved in zip(x, crop_flip(x, torch.Generator().manual_seed(0)), strict=True):
        assert any(torch.equal(moved, move) for move in moves(image, 1))


def test_crop_flip_draws_from_its_generator_alone():
    x, state = bytes_like(16, 3, 8, 8), torch.get_rng_state()
    first, again, other = (crop_flip(x, torch.Generator().manual_seed(seed)) for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)
