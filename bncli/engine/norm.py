"""The normalization modules: parameters, running statistics and their momentum. The arithmetic is a kernel's."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bncli import kernels
from bncli.recipe.sections import BatchNorm as BatchNormSection
from bncli.recipe.sections import GroupNorm, InstanceNorm, LayerNorm, NormSection

NormFactory = Callable[[int], nn.Module]  # channels -> a module for inputs (N, channels, *S)


class BatchNorm(nn.modules.batchnorm._BatchNorm):
    """nn.BatchNorm1d/2d/3d in one class for any input (N, C, *S), with its arguments and its state_dict.

    `kernel` "native" is torch's own operator, which updates the running statistics itself. Any other kernel returns the
    batch's statistics, and they are updated here: running = (1 - momentum) running + momentum batch, with the unbiased
    variance, m/(m-1) (algorithm 2, line 10 of Ioffe & Szegedy 2015; momentum None: the average over all batches).
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        kernel: str | kernels.Kernel = "native",
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats)
        self.kernel = None if kernel == "native" else kernels.get(kernel) if isinstance(kernel, str) else kernel

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"batch norm takes (N, C, *S), not an input of {input.dim()} dimensions")

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, *S) -> the same shape."""
        if self.kernel is None:
            return super().forward(input)
        self._check_input_dim(input)
        if not self.training and self.running_mean is not None:
            return F.batch_norm(
                input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
            )
        y, mean, var = self.kernel(input, self.weight, self.bias, self.eps)
        if self.training and self.running_mean is not None:
            self._update(mean, var, input.numel() // input.size(1))
        return y

    @torch.no_grad()
    def _update(self, mean: Tensor, var: Tensor, count: int) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        new = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean), new)
        self.running_var.lerp_((var * (count / (count - 1))).to(self.running_var), new)


class LayerNormOverChannels(nn.GroupNorm):
    """Layer norm of (N, C, *S) over C and S with a weight a channel: group norm with one group (Wu & He 2018)."""

    def __init__(self, channels: int, eps: float, affine: bool) -> None:
        super().__init__(1, channels, eps, affine)


def factory(norm: NormSection) -> NormFactory | None:
    """A maker of norm modules for `channels`, or None for no norm. Raises Unavailable for a kernel that cannot run."""
    if isinstance(norm, BatchNormSection):
        kernels.get(norm.kernel)
        arguments = norm.model_dump(exclude={"kind"})
        return lambda channels: BatchNorm(channels, **arguments)
    if isinstance(norm, LayerNorm):
        return lambda channels: LayerNormOverChannels(channels, norm.eps, norm.affine)
    if isinstance(norm, GroupNorm):
        return lambda channels: nn.GroupNorm(norm.groups, channels, norm.eps, norm.affine)
    if isinstance(norm, InstanceNorm):  # of its own group each channel: one class for any number of positions
        return lambda channels: nn.GroupNorm(channels, channels, norm.eps, norm.affine)
    return None
