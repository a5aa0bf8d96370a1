"""Variants of batch norm, RMS norm and Dynamic Tanh, as modules for any input (N, C, *S).

Those with running statistics have the state_dict and the convention of nn.BatchNorm1d: `momentum` is the weight of the
new batch, the variance that is kept is the unbiased one, and num_batches_tracked counts the training batches. They are
no subclasses of torch's batch norms, so that tools which replace or fold those (bncli.convert,
SyncBatchNorm.convert_sync_batchnorm) leave them alone. Nothing waits for the device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase

from bncli.kernels import native
from bncli.kernels.layout import accumulation, over_channels, per_channel


class BatchVariant(_NormBase):
    """Batch norm's parameters, running statistics and evaluation; `train_forward` is a variant's training mode."""

    momentum: float
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, channels: int, eps: float = 1e-5, momentum: float = 0.1, affine: bool = True) -> None:
        super().__init__(channels, eps, momentum, affine)

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, *S) -> (N, C, *S). Raises ValueError for one value per channel in training, as torch does."""
        return self.train_forward(input) if self.training else self.batch_norm(input)

    def train_forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError  # each variant's

    def batch_norm(self, x: Tensor) -> Tensor:
        """Batch norm in the module's mode; in training the running statistics are updated."""
        running = self.running_mean, self.running_var
        return F.batch_norm(x, *running, self.weight, self.bias, self.training, self.momentum, self.eps)


class GhostBatchNorm(BatchVariant):
    """Batch norm of each slice of `size` examples by itself (Hoffer et al. 2017, arXiv 1705.08741, algorithm 1).

    The running statistics take one slice after the other, as there; num_batches_tracked counts slices. Where `size`
    does not divide a batch the last slice holds the rest.
    """

    def __init__(self, channels: int, size: int, **options: Any) -> None:
        super().__init__(channels, **options)
        self.size = size

    def train_forward(self, x: Tensor) -> Tensor:
        slices = x.split(self.size)
        y = torch.cat([self.batch_norm(part) for part in slices])
        self.num_batches_tracked.add_(len(slices))
        return y


class BatchRenorm(BatchVariant):
    """Batch Renormalization (Ioffe 2017, arXiv 1702.03275): xhat r + d, where r and d have no gradient.

    r = deviation / running deviation, limited to [1 / R, R]; d = (mean - running mean) / running deviation, limited to
    [-D, D]; deviation = sqrt(var + eps). Without limits the output is that of evaluation with the running statistics
    before the batch. The paper keeps running deviations, this module running variances, as batch norm does.

    Args:
        r_max, d_max: the final limits R and D.
        warmup: training batches with R = 1 and D = 0, which is batch norm.
        r_steps, d_steps: training batches at which R and D, growing linearly since `warmup`, are r_max and d_max.
    """

    def __init__(
        self, channels: int, r_max: float, d_max: float, warmup: int, r_steps: int, d_steps: int, **options: Any
    ) -> None:
        super().__init__(channels, **options)
        self.r_max, self.d_max = r_max, d_max
        self.warmup, self.r_steps, self.d_steps = warmup, r_steps, d_steps

    def limits(self) -> tuple[Tensor, Tensor]:
        """R and D for the next training batch."""
        since = self.num_batches_tracked.to(torch.float32) - self.warmup
        r_grown, d_grown = ((since / max(1, end - self.warmup)).clamp(0, 1) for end in (self.r_steps, self.d_steps))
        return 1 + (self.r_max - 1) * r_grown, self.d_max * d_grown

    def train_forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            var, mean = torch.var_mean(x.to(accumulation(x)), over_channels(x), correction=0)
            r_limit, d_limit = self.limits()
            running_deviation = (self.running_var + self.eps).sqrt()
            r = ((var + self.eps).sqrt() / running_deviation).clamp(1 / r_limit, r_limit)
            d = ((mean - self.running_mean) / running_deviation).clamp(-d_limit, d_limit)
        # (xhat r + d) weight + bias is batch norm with other vectors.
        weight = r if self.weight is None else r * self.weight
        bias = d if self.weight is None else d * self.weight + self.bias
        y = F.batch_norm(x, None, None, weight, bias, True, 0.0, self.eps)
        native.update_running_stats(
            (self.running_mean, self.running_var, self.momentum), mean, var, x.numel() // len(r)
        )
        self.num_batches_tracked.add_(1)
        return y


class NoisyBatchNorm(BatchVariant):
    """Batch norm, then noise with a mean and a scale that change each step.

    Santurkar et al. 2018 (arXiv 1805.11604, appendix A.2.1, algorithm 1), as a control for internal covariate shift.
    Each value becomes s y + m, with m uniform within `shift_spread` of a shift, and s normal about a scale with the
    deviation `scale_spread`; at each step the shift of a channel is drawn uniformly from [-shift, shift], its scale
    from [1, scale]. Positions count as examples. The random numbers are those of torch's global generator. Evaluation
    has no noise.
    """

    def __init__(
        self, channels: int, shift: float, scale: float, shift_spread: float, scale_spread: float, **options: Any
    ) -> None:
        super().__init__(channels, **options)
        self.shift, self.scale, self.shift_spread, self.scale_spread = shift, scale, shift_spread, scale_spread

    def train_forward(self, x: Tensor) -> Tensor:
        y = self.batch_norm(x)
        self.num_batches_tracked.add_(1)
        values = torch.empty_like(y, dtype=accumulation(y))
        channels = per_channel(values.new_empty(x.size(1)), x)
        shift = channels.uniform_(-self.shift, self.shift) + values.uniform_(-self.shift_spread, self.shift_spread)
        scale = channels.uniform_(1, self.scale) + self.scale_spread * values.normal_()
        return (y * scale + shift).to(y.dtype)


class FrozenBatchNorm(BatchVariant):
    """Batch norm for `after` training batches, then the running statistics as constants, in training too.

    Freezing for the last part of training removes the difference between training and evaluation (Wu & Johnson 2021,
    arXiv 2105.07576). From then on the running statistics and num_batches_tracked stay as they are.
    """

    def __init__(self, channels: int, after: int, **options: Any) -> None:
        super().__init__(channels, **options)
        self.after = after

    def train_forward(self, x: Tensor) -> Tensor:
        values, frozen = x.numel() // x.size(1), self.num_batches_tracked >= self.after
        if values == 1 and not frozen:  # only then the host waits for the device
            raise ValueError(f"expected more than 1 value per channel when training, got {tuple(x.shape)}")
        var, mean = torch.var_mean(x.to(accumulation(x)), over_channels(x), correction=0)
        used_mean, used_var = (
            torch.where(frozen, running, batch)
            for running, batch in ((self.running_mean, mean), (self.running_var, var))
        )
        y = (x - per_channel(used_mean, x)) * per_channel((used_var + self.eps).rsqrt(), x)
        with torch.no_grad():
            for running, batch in ((self.running_mean, mean), (self.running_var, var * values / max(1, values - 1))):
                running.copy_(torch.where(frozen, running, running.lerp(batch.to(running.dtype), self.momentum)))
            self.num_batches_tracked.add_(~frozen)
        return affine(y, self.weight, self.bias).to(x.dtype)


class RMSNorm(nn.Module):
    """x / sqrt(mean of x^2 over C and S + eps) * weight, for each example (Zhang & Sennrich 2019, arXiv 1910.07467)."""

    def __init__(self, channels: int, eps: float = 1e-5, affine: bool = True) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(accumulation(x))
        mean_square = wide.square().mean(list(range(1, x.dim())), keepdim=True)
        return affine(wide * (mean_square + self.eps).rsqrt(), self.weight, None).to(x.dtype)


class DynamicTanh(nn.Module):
    """weight * tanh(alpha x) + bias, with one learned alpha (Zhu et al. 2025, arXiv 2503.10622)."""

    def __init__(self, channels: int, alpha: float = 0.5, affine: bool = True) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.full((), alpha))
        self.weight = nn.Parameter(torch.ones(channels)) if affine else None
        self.bias = nn.Parameter(torch.zeros(channels)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        return affine(torch.tanh(self.alpha * x.to(accumulation(x))), self.weight, self.bias).to(x.dtype)


def affine(xhat: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """weight xhat + bias, per channel; None skips a step."""
    y = xhat if weight is None else xhat * per_channel(weight, xhat)
    return y if bias is None else y + per_channel(bias, y)
