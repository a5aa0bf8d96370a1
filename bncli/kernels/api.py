"""`bncli.batch_norm`: torch.nn.functional.batch_norm's signature and meaning, a residual, an activation, a kernel."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from bncli import kernels
from bncli.kernels import fused, native
from bncli.kernels.running_stats import follow


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
    kernel: str | kernels.Kernel = "native",
) -> Tensor:
    """activation(batch_norm(input) + residual); batch_norm as torch.nn.functional.batch_norm defines it.

    input (N, C, *S); running_mean, running_var, weight and bias (C) or None. In training the batch's statistics
    normalize, and the running ones, if given, move in place: running = (1 - momentum) running + momentum batch, with
    the variance's m/(m-1) (Ioffe & Szegedy 2015, algorithm 2, line 10). Otherwise the running ones normalize.
    residual: what torch can add to the result; the kernel adds it where it has the input's shape and dtype, torch after
    the kernel where it must be broadcast or converted. activation: relu, leaky_relu (slope 0.01), silu or None.
    kernel: native, fused, or a function of the kernels' seam.

    Raises ValueError and RuntimeError where torch does (one value per channel in training, no running statistics in
    evaluation, sizes that disagree, eps out of range), ValueError for an unknown activation, and Unavailable, with the
    reason, where the kernel cannot run.
    """
    if activation is not None:
        native.check_activation(activation)
    if kernel == "native":
        y = F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
        return native.finish(y, residual, activation)
    count = _values_per_channel(input, running_mean, running_var, weight, bias)
    if eps < 0 or (training and eps == 0):
        raise ValueError(f"eps must be positive in training and not negative in evaluation; it is {eps}")
    if residual is not None and not _alike(residual, input):
        y = batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps, kernel=kernel)
        return native.finish(y, residual, activation)
    run = _resolved(kernel, input.device) if isinstance(kernel, str) else kernel
    if not training:
        if running_mean is None or running_var is None:
            raise RuntimeError("evaluation normalizes by running_mean and running_var; one of them is None")
        return run(input, weight, bias, eps, residual, activation, (running_mean, running_var))[0]
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var must both be given or both be None")
    if count == 1:
        raise ValueError(f"training needs more than one value per channel; the input has shape {tuple(input.shape)}")
    if running_mean is None or running_var is None or count == 0:  # an empty batch has no statistics
        return run(input, weight, bias, eps, residual, activation)[0]
    if run is fused.batch_norm:
        running = running_mean, running_var, momentum
        return fused.batch_norm(input, weight, bias, eps, residual, activation, running=running)[0]
    y, mean, var = run(input, weight, bias, eps, residual, activation)
    follow(running_mean, running_var, mean, var, count, momentum)
    return y


def _resolved(kernel: str, device: torch.device) -> kernels.Kernel:
    """The kernel of that name. Raises Unavailable where it cannot run, which is found out once a device."""
    if not torch.compiler.is_compiling():  # a compiler need not see how that is found out
        _found(kernel, device)
    return kernels.KERNELS[kernel]


_found = functools.cache(kernels.get)  # microseconds, which a small batch norm would notice


def _values_per_channel(input: Tensor, *per_channel: Tensor | None) -> int:
    """m, the values that one channel's statistics are taken over. Raises RuntimeError for sizes that disagree."""
    if input.dim() < 2:
        raise RuntimeError(f"batch norm takes (N, C, *S), not an input of {input.dim()} dimensions")
    channels = input.size(1)
    for tensor in per_channel:
        if tensor is not None and tensor.numel() != channels:
            names = ("running_mean", "running_var", "weight", "bias")
            name = next(name for name, each in zip(names, per_channel, strict=True) if each is tensor)
            raise RuntimeError(f"{name} has {tensor.numel()} values; the input has {channels} channels")
    return input.numel() // channels if channels else input.size(0)


def _alike(residual: object, input: Tensor) -> bool:
    """Whether a kernel can add the residual itself."""
    return isinstance(residual, Tensor) and residual.shape == input.shape and residual.dtype == input.dtype
