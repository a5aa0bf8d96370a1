"""Layouts of tensors, and what a kernel takes from them: copies, sizes, signs in bits."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bncli.kernels import layout
from bncli.kernels.layout import is_channels_last

SHAPES = [(4, 3), (2, 3, 5), (2, 3, 4, 5), (2, 3, 2, 4, 2)]


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def channels_last(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


LAYOUTS = [torch.clone, channels_last]


@pytest.mark.parametrize("shape", SHAPES)
def test_channels_last_is_where_the_channels_of_a_position_are_neighbours(shape: tuple[int, ...]) -> None:
    x = numbers(*shape)
    assert is_channels_last(channels_last(x))
    assert is_channels_last(x) == (x.dim() == 2)
    assert not is_channels_last(x[:, :1])


def test_images_are_told_apart_as_tensors_of_any_rank_are() -> None:
    """The short way for four dimensions beside the same with one more position."""
    for shape in itertools.product((1, 2), (1, 2, 3), (1, 4), (1, 5)):
        for x in (numbers(*shape), channels_last(numbers(*shape)), numbers(*shape).transpose(2, 3)):
            assert is_channels_last(x) == (x.size(1) > 1 and x.movedim(1, -1).is_contiguous()), (shape, x.stride())
            assert is_channels_last(x) == is_channels_last(x.unsqueeze(-1)), (shape, x.stride())


@pytest.mark.parametrize("x", [numbers(4, 6)[:, ::2], numbers(4, 3, 6)[..., ::2], numbers(4, 3, 5, 6).transpose(2, 3)])
def test_gaps_are_refused_with_the_strides_and_copied_where_asked(x: Tensor) -> None:
    with pytest.raises(ValueError, match="neither contiguous nor channels last: strides") as refused:
        layout.refuse_gaps(x)
    assert str(x.stride()) in str(refused.value)
    assert str(tuple(x.shape)) in str(refused.value)
    copy = layout.dense(x)
    assert copy.is_contiguous()
    assert torch.equal(copy, x)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("one", "other"), [*itertools.product(LAYOUTS, LAYOUTS)])
def test_a_tensor_takes_anothers_layout_and_is_copied_only_for_that(
    one: Any, other: Any, shape: tuple[int, ...]
) -> None:
    tensor, x = one(numbers(*shape)), other(numbers(*shape) + 1)
    assert layout.dense(x) is x
    found = layout.match_layout(tensor, x)
    assert (found is tensor) == (one is other or len(shape) == 2)
    strided = layout.match_layout(tensor[:1].expand(shape), x)
    assert found.stride() == strided.stride() == x.stride()
    assert torch.equal(found, tensor)
    assert torch.equal(strided, tensor[:1].expand(shape))


@pytest.mark.parametrize("shape", SHAPES)
def test_sizes_and_reductions_are_those_of_channels(shape: tuple[int, ...]) -> None:
    x = numbers(*shape)
    examples, channels, positions = layout.sizes(x)
    assert (examples, channels, examples * channels * positions) == (*shape[:2], x.numel())
    mean = x.mean(layout.over_channels(x))
    assert mean.shape == (channels,)
    assert torch.equal(layout.per_channel(mean, x), x.mean(layout.over_channels(x), keepdim=True))
    assert layout.sizes(x[:0]) == (0, channels, 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_sums_are_taken_in_float32_or_wider(dtype: torch.dtype) -> None:
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert layout.accumulation(torch.empty(1, dtype=dtype)) == expected


@pytest.mark.parametrize("channels", [1, 3, 8, 17])
@pytest.mark.parametrize("lay", LAYOUTS)
@pytest.mark.parametrize("positions", [(), (5,), (4, 2), (3, 2, 2)])
def test_signs_in_bits_are_read_back(lay: Any, channels: int, positions: tuple[int, ...]) -> None:
    """A channel's bits (contiguous) or a position's (channels last) begin with a byte, lowest bit first."""
    x = lay(numbers(3, channels, *positions))
    wanted = x > 0
    last = is_channels_last(x)
    lines = wanted.movedim(1, -1).reshape(-1, channels) if last else wanted.movedim(1, 0).reshape(channels, -1)
    signs = torch.from_numpy(np.packbits(lines.numpy(), axis=1, bitorder="little")).flatten()
    assert layout.sign_bytes(x) == signs.numel()
    assert torch.equal(layout.unpacked_signs(signs, x), wanted)
