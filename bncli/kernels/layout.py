"""Memory layout of a tensor (N, C, *S): contiguous or channels last, and what follows from it for a kernel."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor


def is_channels_last(x: Tensor) -> bool:
    """Whether the channels of a position are adjacent in memory, for any rank; true for (N, C).

    A tensor with one channel has both layouts and counts as contiguous, which is faster.
    """
    if x.size(1) == 1:
        return False
    if x.dim() == 4:  # the same as below in a tenth of the time
        return x.is_contiguous(memory_format=torch.channels_last)
    return x.is_contiguous() if x.dim() == 2 else x.movedim(1, -1).is_contiguous()


def refuse_gaps(x: Tensor) -> NoReturn:
    raise ValueError(f"x is neither contiguous nor channels last: strides {x.stride()} for {tuple(x.shape)}")


def dense(x: Tensor) -> Tensor:
    """x itself if it is contiguous or channels last without gaps, else a contiguous copy."""
    return x if x.is_contiguous() or is_channels_last(x) else x.contiguous()


def match_layout(tensor: Tensor, x: Tensor) -> Tensor:
    """`tensor`, of x's shape, in the layout of a dense x: itself or a copy."""
    if tensor.stride() == x.stride():
        return tensor
    return tensor.movedim(1, -1).contiguous().movedim(-1, 1) if is_channels_last(x) else tensor.contiguous()


def over_channels(x: Tensor) -> list[int]:
    """The dimensions of (N, C, *S) that batch norm reduces over."""
    return [0, *range(2, x.dim())]


def per_channel(values: Tensor, x: Tensor) -> Tensor:
    """(C) -> (1, C, 1, ...) with the dimensions of x."""
    return values.reshape(1, -1, *[1] * (x.dim() - 2))


def sizes(x: Tensor) -> tuple[int, int, int]:
    """(N, C, S), where S is the number of positions."""
    examples, channels = x.shape[:2]
    return examples, channels, x.numel() // max(examples * channels, 1)


def accumulation(x: Tensor) -> torch.dtype:
    """The dtype of statistics and sums: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def sign_bytes(x: Tensor) -> int:
    """Bytes of a sign mask: one bit per element, whole bytes per channel (contiguous) or per row (channels last)."""
    examples, channels, positions = sizes(x)
    if is_channels_last(x):
        return examples * positions * ((channels + 7) // 8)
    return channels * ((examples * positions + 7) // 8)


def unpacked_signs(signs: Tensor, x: Tensor) -> Tensor:
    """A sign mask in bits (uint8) as booleans of x's shape."""
    examples, channels, positions = sizes(x)
    bits = ((signs.unsqueeze(-1) >> torch.arange(8, device=signs.device, dtype=torch.uint8)) & 1).bool()
    if is_channels_last(x):
        bits = bits.view(examples * positions, -1)[:, :channels]
        return bits.reshape(examples, *x.shape[2:], channels).movedim(-1, 1)
    bits = bits.view(channels, -1)[:, : examples * positions]
    return bits.reshape(channels, examples, *x.shape[2:]).transpose(0, 1)
