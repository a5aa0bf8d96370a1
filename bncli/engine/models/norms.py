"""Normalization modules: parameters and running statistics. The computation is delegated to a kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bncli import kernels
from bncli.kernels import native
from bncli.kernels.api import batch_norm
from bncli.kernels.synchronized import ranks


def kernel_name(kernel: str | kernels.Kernel) -> str:
    """A kernel's name, or package.module:function for a function."""
    if isinstance(kernel, str):
        return kernel
    return f"{getattr(kernel, '__module__', '')}:{getattr(kernel, '__qualname__', kernel)}".lstrip(":")


class BatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm (Ioffe & Szegedy 2015, algorithm 1) for any input (N, C, *S): nn.BatchNorm1d, 2d and 3d in one class.

    The state_dict is the same. `forward(input, residual, activation)` is activation(batch_norm(input) + residual).
    Tools that replace or absorb a batch norm by its parameters alone (SyncBatchNorm.convert_sync_batchnorm, folding
    into a convolution) do not see `activation`: leave it None for them, and name it in the call or apply it separately.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype, bias: as nn.BatchNorm2d's;
            num_features is C, momentum None a cumulative average.
        activation: relu, leaky_relu (slope 0.01) or silu, the default of every call; None for no activation.
        kernel: native, torch's own operator; fused, one operator for everything; or a function with the signature of
            `bncli.kernels.Kernel`.
        sync: normalize in training by the statistics of all ranks' examples, as `bncli.batch_norm` says.

    Raises:
        Unavailable: with the reason, for a kernel that cannot run on this machine.
        ValueError: for an activation that kernels do not have.
    """

    activation: str | None = None
    kernel: str | kernels.Kernel = "native"
    sync: bool = False

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: str | None = None,
        kernel: str | kernels.Kernel = "native",
        sync: bool = False,
    ) -> None:
        without_bias: dict[str, Any] = {} if bias else {"bias": False}  # newer than the oldest torch supported
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, **without_bias)
        native.check_activation(activation)
        if isinstance(kernel, str):
            kernels.get(kernel)
        self.activation, self.kernel, self.sync = activation, kernel, sync

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"batch norm takes (N, C, *S), not an input of {input.dim()} dimensions")

    def forward(self, input: Tensor, residual: Tensor | None = None, activation: str | None = None) -> Tensor:
        """activation(batch_norm(input) + residual).

        Args:
            input: (N, C, *S).
            residual: (N, C, *S); None for no addition.
            activation: relu, leaky_relu or silu; None for the constructor's.

        Returns:
            (N, C, *S).

        Raises:
            ValueError: for an input of other dimensions than the class takes, or one value per channel in training.
        """
        activation = activation or self.activation
        sync = self.sync and self.training and ranks() > 1
        plain = self.kernel == "native" and not sync and self.momentum is not None
        if plain and residual is None and activation is None:
            return super().forward(input)
        self._check_input_dim(input)
        mean, var, momentum = self.running_mean, self.running_var, self.momentum or 0.0
        average = None  # running mean and variance of a cumulative average
        if self.training and (not self.track_running_stats or mean is None or var is None):
            mean = var = None
        elif self.training and mean is not None and var is not None and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                average = mean, var
                mean, var, momentum = torch.zeros_like(mean), torch.zeros_like(var), 1.0  # will hold the batch's
        y = batch_norm(
            input,
            mean,
            var,
            self.weight,
            self.bias,
            self.training or (mean is None and var is None),
            momentum,
            self.eps,
            residual=residual,
            activation=activation,
            kernel=self.kernel,
            sync=sync,
        )
        if average is not None and (input.numel() > 0 or sync):  # an empty batch has no statistics
            self._average(average, (mean, var))
        return y

    def _average(self, running: tuple[Tensor, Tensor], batch: tuple[Tensor | None, Tensor | None]) -> None:
        """Update each running statistic with momentum 1 / batches, which stays on the device, without a host sync."""
        assert self.num_batches_tracked is not None
        wide = torch.promote_types(running[0].dtype, torch.float32)
        share = self.num_batches_tracked.to(wide).reciprocal()
        for old, new in zip(running, batch, strict=True):
            assert new is not None
            native.interpolate_(old, new.to(wide), share)

    def extra_repr(self) -> str:
        """nn.BatchNorm's, with the activation and the kernel where they are not the default."""
        activation = f", activation={self.activation}" if self.activation else ""
        kernel = "" if self.kernel == "native" else f", kernel={kernel_name(self.kernel)}"
        return super().extra_repr() + activation + kernel + ", sync=True" * self.sync


# torch's class comes first for its check of the input's dimensions, the only method that it defines.
class BatchNorm1d(nn.BatchNorm1d, BatchNorm):
    """nn.BatchNorm1d for (N, C) or (N, C, L), with the arguments, results and errors of `BatchNorm`."""


class BatchNorm2d(nn.BatchNorm2d, BatchNorm):
    """nn.BatchNorm2d for (N, C, H, W), with the arguments, results and errors of `BatchNorm`."""


class BatchNorm3d(nn.BatchNorm3d, BatchNorm):
    """nn.BatchNorm3d for (N, C, D, H, W), with the arguments, results and errors of `BatchNorm`."""


def ignoring_statistics(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None = None,
    activation: str | None = None,
    statistics: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """A kernel of `BatchNorm` whose gradient takes the batch's mean and variance for constants: to be seen to fail.

    Ioffe & Szegedy 2015, section 2: a gradient step that ignores how the normalization depends on the parameters can
    grow a bias without bound while the loss stays. Arguments and results are those of bncli.kernels.
    """
    if statistics is None:
        with torch.no_grad():
            _, mean, var = native.batch_norm(x, None, None, eps)
        statistics = mean, var
    weight, bias = (each if each is None else each.to(statistics[0].dtype) for each in (weight, bias))
    y = F.batch_norm(x, *statistics, weight, bias, False, 0.0, eps)
    return native.finish(y, residual, activation), *statistics


class LayerNormOverChannels(nn.GroupNorm):
    """Layer norm of (N, C, *S) over C and S with one weight per channel: group norm with one group (Wu & He 2018)."""

    def __init__(self, channels: int, eps: float, affine: bool) -> None:
        super().__init__(1, channels, eps, affine)
