"""`bncli.batch_norm`: torch.nn.functional.batch_norm with a residual, an activation and a choice of kernels."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bncli import kernels
from bncli.kernels import native, synchronized


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
    sync: bool = False,
) -> Tensor:
    """Batch normalization, then the addition of a residual, then an activation.

    The normalization is that of torch.nn.functional.batch_norm: y = (x - mean) / sqrt(var + eps) * weight + bias, with
    the mean and the biased variance of the m = N * S values of each channel. (Ioffe & Szegedy 2015, arXiv 1502.03167:
    algorithm 1 in training, algorithm 2 in evaluation.)

    Args:
        input: x, shape (N, C, *S), with up to three positions *S; its dtype is that of the result.
        running_mean: Shape (C), or None. In training it becomes (1 - momentum) * running_mean + momentum * mean, in
            place; in evaluation it normalizes instead of the batch's mean.
        running_var: The same for the variance, which is multiplied by m / (m - 1) before it is averaged.
        weight: Shape (C), or None for 1.
        bias: Shape (C), or None for 0.
        training: Whether to normalize by the statistics of the batch.
        momentum: The share of the batch in the running statistics, from 0 to 1.
        eps: Added to the variance, in units of x squared.
        residual: Added to y. Any shape and dtype that torch can add to it: the kernel adds one of the input's shape and
            dtype, torch any other, after the kernel.
        activation: "relu", "leaky_relu" (with the slope 0.01), "silu" or None; applied last.
        kernel: "native", "fused", "fused-interpreted", or a function with the arguments that bncli.kernels describes.
            For a function without `running`, the running statistics are updated with the statistics that it returns.
        sync: Whether the batch is that of all ranks of torch's default process group together, which may have different
            numbers of examples. Its gradients are those of the sum of all ranks' losses, as DistributedDataParallel
            expects; every rank makes the same calls. Without a group the batch is this process's.

    Returns:
        A tensor of the input's shape and layout, differentiable in input, weight, bias and residual.

    Raises:
        ValueError: If training has one value per channel, if only one of the running statistics is passed, if eps is
            out of range, or if the activation is unknown.
        RuntimeError: If sizes disagree, or if evaluation has no running statistics, as in torch.
        Unavailable: With the reason, where the kernel cannot run.
    """
    if activation is not None:
        native.check_activation(activation)
    sync = sync and training and synchronized.ranks() > 1
    if kernel == "native" and not sync:
        # torch's operator directly: the kernel computes the statistics twice, to return them.
        y = F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
        return native.finish(y, residual, activation)
    if input.dim() < 2:
        raise RuntimeError(f"batch norm takes (N, C, *S), not an input of {input.dim()} dimensions")
    if sync or not isinstance(kernel, str):  # which may broadcast what does not fit; the kernels with names refuse it
        vectors = {"running_mean": running_mean, "running_var": running_var, "weight": weight, "bias": bias}
        for name, vector in vectors.items():
            if vector is not None and vector.numel() != input.size(1):
                raise RuntimeError(f"{name} has {vector.numel()} values; the input has {input.size(1)} channels")
    if eps < 0 or (training and eps == 0):
        raise ValueError(f"eps must be positive in training and not negative in evaluation; it is {eps}")
    if residual is not None and not (
        isinstance(residual, Tensor) and residual.shape == input.shape and residual.dtype == input.dtype
    ):
        running = running_mean, running_var
        y = batch_norm(input, *running, weight, bias, training, momentum, eps, kernel=kernel, sync=sync)
        return native.finish(y, residual, activation)
    run = _find(kernel)
    if not training:
        if running_mean is None or running_var is None:
            raise RuntimeError("evaluation normalizes by running_mean and running_var; one of them is None")
        return run(input, weight, bias, eps, residual, activation, (running_mean, running_var))[0]
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var must both be tensors or both be None")
    if sync:
        run = functools.partial(synchronized.batch_norm, run)
    elif input.size(0) == 1 and math.prod(input.shape[2:]) == 1:
        raise ValueError(f"training needs more than one value per channel; the input has shape {tuple(input.shape)}")
    if running_mean is None or running_var is None or (input.numel() == 0 and not sync):  # which has no statistics
        return run(input, weight, bias, eps, residual, activation)[0]
    return run(input, weight, bias, eps, residual, activation, None, running=(running_mean, running_var, momentum))[0]


def _find(kernel: str | kernels.Kernel) -> kernels.Kernel:
    """The kernel of that name, or that function, whose signature is cached but not while torch.compile traces."""
    if isinstance(kernel, str):
        return kernels.load(kernel)
    cached = type(kernel).__hash__ is not None and not torch.compiler.is_dynamo_compiling()
    return _adapted(kernel) if cached else kernels.adapted(kernel)


_adapted: Any = functools.lru_cache(maxsize=64)(kernels.adapted)
