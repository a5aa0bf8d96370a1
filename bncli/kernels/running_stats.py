"""The running statistics' step, for kernels that return the batch's statistics."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def move(running: Tensor, batch: Tensor, momentum: float | Tensor) -> None:
    """running = (1 - momentum) running + momentum batch, in place, in the wider of the two dtypes; both (C)."""
    if running.dtype == batch.dtype:
        running.lerp_(batch, momentum)
        return
    wide = torch.promote_types(running.dtype, batch.dtype)
    running.copy_(running.to(wide).lerp(batch.to(wide), momentum))


def follow(
    running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, count: int, momentum: float | Tensor
) -> None:
    """Move both (C) towards a batch's mean and biased variance (C) of `count` values a channel, m.

    Ioffe & Szegedy 2015, algorithm 2, line 10: the running variance takes the unbiased one, m / (m - 1).
    """
    move(running_mean, mean, momentum)
    move(running_var, var * (count / (count - 1)), momentum)
