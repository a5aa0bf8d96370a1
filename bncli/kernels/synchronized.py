"""Batch statistics over all ranks of torch's default process group, with their gradients; for any kernel and device.

Each rank's count, mean and covariance are exchanged and merged as in Chan, Golub & LeVeque 1983, so that the ranks may
have different numbers of examples. torch.nn.SyncBatchNorm takes no CPU tensors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from bncli.kernels import Kernel
from bncli.kernels.layout import accumulation, over_channels
from bncli.kernels.native import update_running_stats


def ranks() -> int:
    """The number of processes in the default group; 1 where there is none."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class _Sum(torch.autograd.Function):
    """The sum of a tensor over all ranks. Its gradient is of the sum of all ranks' losses, which each rank's adds to.

    Every rank has to call it, and its backward pass, in the same order.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        total: Tensor = _Sum.apply(g)
        return total


def merged(mean: Tensor, covariance: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and covariance over the values of all ranks, from those of this one; differentiable any number of times.

    Args:
        mean: (G, k, 1) of G groups of k channels, in the dtype of the sums; (C, 1, 1) of C channels.
        covariance: (G, k, k), biased; (C, 1, 1) of C variances.
        count: values per channel on this rank. With 0, mean and covariance are 0, and take part in the backward pass.

    Returns:
        The mean (G, k, 1), the covariance (G, k, k) and the number of values per channel (1), the same bits on every
        rank. They are merged in float64, since the mean of rounded means is rounded too.
    """
    own = torch.cat([mean.flatten(), covariance.flatten(), mean.new_tensor([count])]).double()
    rows = [own if rank == dist.get_rank() else torch.zeros_like(own) for rank in range(ranks())]
    sizes = [mean.numel(), covariance.numel(), 1]
    means, covariances, counts = _Sum.apply(torch.stack(rows)).split(sizes, 1)  # (ranks, size); zeros add nothing
    total = counts.detach().sum(0)
    shares = (counts.detach() / total)[:, :, None, None]
    means, covariances = means.view(-1, *mean.shape), covariances.view(-1, *covariance.shape)
    whole = (shares * means).sum(0)
    off = means - whole
    return whole.to(mean.dtype), (shares * (covariances + off @ off.mT)).sum(0).to(mean.dtype), total


def batch_norm(
    kernel: Kernel,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None = None,
    activation: str | None = None,
    statistics: None = None,
    running: tuple[Tensor, Tensor, float] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """A kernel in training, with the statistics of all ranks' batches; arguments and results as in bncli.kernels.

    The kernel normalizes by mean and variance as constants. Their gradient comes through its weight and bias, of which
    factors are written out that are 1 and terms that are 0: (x - m) / s w + b is (x - c) / d (d / s) w + (c - m) / s w
    + b for constants c = m and d = s. Raises ValueError for one value per channel on all ranks together.
    """
    values = x.numel() // x.size(1)
    wide, around = x.to(accumulation(x)), over_channels(x)
    var, mean = torch.var_mean(wide, around, correction=0) if values else (wide.sum(around), wide.sum(around))
    mean, var, count = merged(mean[:, None, None], var[:, None, None], values)
    mean, var = mean.flatten(), var.flatten()
    if values < 2 and count < 2:
        raise ValueError(f"training needs more than one value per channel over all ranks; here is {tuple(x.shape)}")
    inverse = (var + eps).rsqrt()
    scale, shift = inverse / inverse.detach(), (mean.detach() - mean) * inverse
    if weight is not None:
        scale, shift = scale * weight, shift * weight
    shift = shift if bias is None else shift + bias
    y, mean, var = kernel(x, scale, shift, eps, residual, activation, (mean.detach(), var.detach()))
    if running is not None:
        update_running_stats(running, mean, var, count)
    return y, mean, var
