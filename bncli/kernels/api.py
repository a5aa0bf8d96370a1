"""`bncli.batch_norm`: torch.nn.functional.batch_norm's signature and meaning, a residual, an activation, a kernel."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bncli import kernels
from bncli.kernels import native


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

    In training the batch's statistics normalize, and the running ones, if given, move in place: running =
    (1 - momentum) running + momentum batch, with the variance's m/(m-1) (Ioffe & Szegedy 2015, algorithms 1 and 2).
    Otherwise the running ones normalize.

    Args:
        input: (N, C, *S).
        running_mean, running_var, weight, bias: (C) or None.
        training: Whether the batch's statistics normalize.
        momentum: Weight of the batch in the running statistics.
        eps: Added to the variance.
        residual: What torch can add to the result. The kernel adds it where it has the input's shape and dtype, torch
            after the kernel where it must be broadcast or converted.
        activation: relu, leaky_relu (slope 0.01), silu or None.
        kernel: native, fused, fused-interpreted, or a function with the arguments that bncli.kernels describes. One
            without `running` is followed by a move of the running statistics by those that it returns.

    Returns:
        A tensor like input.

    Raises:
        ValueError, RuntimeError: Where torch does (one value per channel in training, no running statistics in
            evaluation, sizes that disagree, eps out of range), and for an unknown activation.
        Unavailable: With the reason, where the kernel cannot run.
    """
    if activation is not None:
        native.check_activation(activation)
    if kernel == "native":  # the operator itself: as a kernel it would take the statistics once more, to return them
        y = F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
        return native.finish(y, residual, activation)
    count = _values_per_channel(input, running_mean, running_var, weight, bias)
    if eps < 0 or (training and eps == 0):
        raise ValueError(f"eps must be positive in training and not negative in evaluation; it is {eps}")
    if residual is not None and not (
        isinstance(residual, Tensor) and residual.shape == input.shape and residual.dtype == input.dtype
    ):
        y = batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps, kernel=kernel)
        return native.finish(y, residual, activation)
    run = _find(kernel, input.device)
    if not training:
        if running_mean is None or running_var is None:
            raise RuntimeError("evaluation normalizes by running_mean and running_var; one of them is None")
        return run(input, weight, bias, eps, residual, activation, (running_mean, running_var))[0]
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var must both be given or both be None")
    if count == 1:
        raise ValueError(f"training needs more than one value per channel; the input has shape {tuple(input.shape)}")
    if running_mean is None or running_var is None or input.numel() == 0:  # an empty batch has no statistics
        return run(input, weight, bias, eps, residual, activation)[0]
    return run(input, weight, bias, eps, residual, activation, None, running=(running_mean, running_var, momentum))[0]


def _find(kernel: str | kernels.Kernel, device: torch.device) -> kernels.Kernel:
    """The kernel of that name, or that function. Raises Unavailable where it cannot run.

    Whether it can, and what a function takes, is found out once; a compiler need not see how.
    """
    compiling = torch.compiler.is_dynamo_compiling()
    if isinstance(kernel, str):
        if not compiling:
            _check_available(kernel, device)
        return kernels.load(kernel)
    found: kernels.Kernel = kernels.adapted(kernel) if compiling or not _hashable(kernel) else _adapted(kernel)
    return found


def _hashable(kernel: kernels.Kernel) -> bool:
    return type(kernel).__hash__ is not None


_check_available = functools.cache(kernels.get)  # microseconds, which a small batch norm would notice
_adapted: Any = functools.lru_cache(maxsize=64)(kernels.adapted)


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
