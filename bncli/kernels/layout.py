"""How a tensor (N, C, *S) lies in memory and along its axes, and what follows from it for a kernel."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor


def is_rows(x: Tensor) -> bool:
    """Whether the channels of a position lie side by side: channels last of any rank, or a batch of vectors.

    A single channel lies both ways, and is better taken as planes.
    """
    if x.size(1) == 1:
        return False
    if x.dim() == 4:  # the same as below in a tenth of the time
        return x.is_contiguous(memory_format=torch.channels_last)
    return x.is_contiguous() if x.dim() == 2 else x.movedim(1, -1).is_contiguous()


def rows_of_dense(x: Tensor) -> bool:
    """`is_rows`, for a kernel that follows pointers. Raises ValueError for an x with gaps."""
    rows = is_rows(x)
    if not (rows or x.is_contiguous()):
        refuse_gaps(x)
    return rows


def refuse_gaps(x: Tensor) -> NoReturn:
    raise ValueError(f"x is neither contiguous nor channels last: strides {x.stride()} for {tuple(x.shape)}")


def dense(x: Tensor) -> Tensor:
    """x itself where it is contiguous or channels last, without gaps; else a contiguous copy."""
    return x if x.is_contiguous() or is_rows(x) else x.contiguous()


def match_layout(tensor: Tensor, x: Tensor) -> Tensor:
    """`tensor`, of x's shape, in the layout of a dense x: itself if it lies so, else a copy."""
    if tensor.stride() == x.stride():
        return tensor
    return tensor.movedim(1, -1).contiguous().movedim(-1, 1) if is_rows(x) else tensor.contiguous()


def over_channels(x: Tensor) -> list[int]:
    """The dimensions of (N, C, *S) that batch norm reduces over."""
    return [0, *range(2, x.dim())]


def per_channel(values: Tensor, like: Tensor) -> Tensor:
    """(C) -> (1, C, 1, ...) of `like`'s dimensions."""
    return values.reshape(1, -1, *[1] * (like.dim() - 2))


def sizes(x: Tensor) -> tuple[int, int, int]:
    """(N, C, S), S the number of positions."""
    examples, channels = x.shape[:2]
    return examples, channels, x.numel() // max(examples * channels, 1)


def accumulation(x: Tensor) -> torch.dtype:
    """The dtype of statistics and sums: float32, of float64 itself."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def sign_bytes(x: Tensor) -> int:
    """How many bytes a bit for each element takes, in whole bytes a channel (contiguous) or a row (channels last)."""
    examples, channels, positions = sizes(x)
    if is_rows(x):
        return examples * positions * ((channels + 7) // 8)
    return channels * ((examples * positions + 7) // 8)


def unpacked_signs(signs: Tensor, x: Tensor) -> Tensor:
    """Those bits (uint8) as booleans like x."""
    examples, channels, positions = sizes(x)
    bits = ((signs.unsqueeze(-1) >> torch.arange(8, device=signs.device, dtype=torch.uint8)) & 1).bool()
    if is_rows(x):
        rows = bits.view(examples * positions, -1)[:, :channels]
        return rows.reshape(examples, *x.shape[2:], channels).movedim(-1, 1)
    planes = bits.view(channels, -1)[:, : examples * positions]
    return planes.reshape(channels, examples, *x.shape[2:]).transpose(0, 1)
