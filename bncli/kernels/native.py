"""torch's own batch norm as a kernel, and the update of running statistics in torch's operators."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from bncli.kernels.layout import accumulation, over_channels
from bncli.names import FUSED_ACTIVATIONS

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {name: getattr(F, name) for name in FUSED_ACTIVATIONS}


def unavailable_reason(device: torch.device | None) -> None:
    """None: it runs wherever torch does."""


def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None = None,
    activation: str | None = None,
    statistics: tuple[Tensor, Tensor] | None = None,
    running: tuple[Tensor, Tensor, float] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalize each channel over the batch and the positions (Ioffe & Szegedy 2015, algorithm 1).

    The arguments and results are those that bncli.kernels describes.
    """
    mean, var = statistics or (None, None)
    y = F.batch_norm(x, mean, var, weight, bias, training=statistics is None, momentum=0.0, eps=eps)
    y = finish(y, residual, activation)
    if statistics is not None:
        return y, *statistics
    if x.numel() == 0:  # no statistics exist, and torch would warn
        return y, *x.new_full((2, x.size(1)), float("nan"), dtype=accumulation(x))
    with torch.no_grad():
        var, mean = torch.var_mean(x.to(accumulation(x)), dim=over_channels(x), correction=0)
    if running is not None:
        update_running_stats(running, mean, var, x.numel() // x.size(1))
    return y, mean, var


def check_activation(activation: str | None) -> None:
    """Raises ValueError for an activation that is neither in ACTIVATIONS nor None."""
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r}: expected one of {', '.join(ACTIVATIONS)}, or None")


def finish(y: Tensor, residual: Tensor | None, activation: str | None) -> Tensor:
    """activation(y + residual); None skips a step."""
    if residual is not None:
        y = y + residual
    return y if activation is None else ACTIVATIONS[activation](y)


def update_running_stats(running: tuple[Tensor, Tensor, float], mean: Tensor, var: Tensor, count: int | Tensor) -> None:
    """Update in place with the mean and biased variance (C) of a batch with `count` values per channel.

    Ioffe & Szegedy 2015, algorithm 2, line 10: the running variance takes the unbiased one, m / (m - 1).
    """
    running_mean, running_var, momentum = running
    interpolate_(running_mean, mean, momentum)
    interpolate_(running_var, var * (count / (count - 1)), momentum)


@torch.no_grad()
def interpolate_(running: Tensor, batch: Tensor, momentum: float | Tensor) -> None:
    """running = (1 - momentum) running + momentum batch, in place, in the wider of the two dtypes; both (C)."""
    if running.dtype == batch.dtype:
        running.lerp_(batch, momentum)
        return
    wide = torch.promote_types(running.dtype, batch.dtype)
    running.copy_(running.to(wide).lerp(batch.to(wide), momentum))
