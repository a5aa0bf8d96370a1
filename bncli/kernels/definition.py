"""Definition of batch, layer, group and instance norm in plain torch operators: the float64 reference of every kernel.

It imports no other kernel module, so that they share no bug. A `Mutation` of `batch_norm` reproduces a bug that
kernels have, so that a diagnosis can compute the results of a wrong kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bncli import names

Change = Callable[[Tensor], Tensor]
# (x, running_mean, running_var, weight, bias, training, momentum, eps, residual, activation) -> y, by position: the
# meaning of bncli.batch_norm; the running statistics are updated in place in training.
Forward = Callable[..., Tensor]


def same(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True)
class Mutation:
    """Departures from batch norm's definition; the defaults are none."""

    mean: Change = same  # applied to the mean (C) that normalizes in training
    var: Change = same  # applied to the variance (C) that normalizes in training
    bessel: bool = False  # normalize by the unbiased variance, m/(m-1)
    inverse_deviation: Callable[[Tensor, float], Tensor] = lambda var, eps: (var + eps).rsqrt()
    batch_in_evaluation: bool = False
    running_in_training: bool = False
    linear_activation: bool = False  # the activation's gradient is taken to be 1
    residual: Change = same
    residual_last: bool = False  # added after the activation
    mean_path_in_evaluation: bool = False  # the gradient goes through the batch's mean though the output does not
    variance_path_in_evaluation: bool = False
    output: Change = same
    rounding: Change = same  # applied to every intermediate, and so to its gradient
    move_mean: Callable[[Tensor, Tensor, float], Tensor] = torch.lerp  # running, batch, momentum
    move_var: Callable[[Tensor, Tensor, float, int], Tensor] = lambda running, var, momentum, m: running.lerp(
        var * (m / (m - 1)), momentum
    )


def batch_norm(mutation: Mutation | None = None) -> Forward:
    """Ioffe & Szegedy 2015, algorithms 1 and 2. With a mutation, a wrong kernel."""
    mutation = mutation or Mutation()

    def call(
        x: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        training: bool,
        momentum: float,
        eps: float,
        residual: Tensor | None,
        activation: str | None,
        /,
    ) -> Tensor:
        m = x.numel() // x.size(1)
        over, rounding = [0, *range(2, x.dim())], mutation.rounding
        mean = rounding(x.mean(over))
        var = rounding(rounding((x - per_channel(mean, x)).square()).mean(over))
        if training and running_mean is not None and running_var is not None:
            with torch.no_grad():
                running = running_mean.clone(), running_var.clone()
                running_mean.copy_(mutation.move_mean(running_mean, mean, momentum))
                running_var.copy_(mutation.move_var(running_var, var, momentum, m))
        if training and mutation.running_in_training:
            mean, var = running
        elif training or mutation.batch_in_evaluation:
            mean, var = mutation.mean(mean), mutation.var(var) * (m / (m - 1) if mutation.bessel else 1)
        else:
            assert running_mean is not None
            assert running_var is not None
            mean, var = running_mean, running_var
            if mutation.mean_path_in_evaluation:
                mean = mean + x.mean(over) - x.mean(over).detach()
            if mutation.variance_path_in_evaluation:
                squares = (x - per_channel(running_mean, x)).square().mean(over)
                var = var + squares - squares.detach()
        inverse_deviation = rounding(mutation.inverse_deviation(var, eps))
        xhat = rounding(rounding(x - per_channel(mean, x)) * per_channel(inverse_deviation, x))
        y = rounding(affine(xhat, weight, bias))
        residual = None if residual is None else mutation.residual(residual)
        last = residual if mutation.residual_last else None
        first = None if mutation.residual_last else residual
        z = finish(finish(y, first, activation), last, None)
        if mutation.linear_activation:
            linear = finish(y, residual, None)
            z = linear + (z - linear).detach()
        return rounding(mutation.output(z))

    return call


def per_channel(values: Tensor, x: Tensor) -> Tensor:
    """(C) -> (1, C, 1, ...) with the dimensions of x."""
    return values.reshape(1, -1, *[1] * (x.dim() - 2))


def affine(xhat: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """weight xhat + bias, per channel."""
    y = xhat if weight is None else xhat * per_channel(weight, xhat)
    return y if bias is None else y + per_channel(bias, y)


def finish(y: Tensor, residual: Tensor | None, activation: str | None) -> Tensor:
    """activation(y + residual); None skips a step."""
    z = y if residual is None else y + residual
    if activation is None:
        return z
    function: Change = getattr(torch.nn.functional, activation)
    return function(z)


def over_groups(row: names.Norm, rounding: Change = same) -> Forward:
    """Group norm: statistics of each group of channels of each example (Wu & He 2018, section 3.1).

    With one group it is layer norm over (C, *S), with one group per channel instance norm.
    """

    def call(
        x: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        training: bool,
        momentum: float,
        eps: float,
        residual: Tensor | None,
        activation: str | None,
        /,
    ) -> Tensor:
        grouped = x.reshape(x.size(0), row.groups(x.size(1), names.CHECKED_GROUPS), -1)
        centred = grouped - rounding(grouped.mean(-1, keepdim=True))
        var = rounding(rounding(centred.square()).mean(-1, keepdim=True))
        xhat = rounding(rounding(centred) * rounding((var + eps).rsqrt()))
        return rounding(finish(rounding(affine(xhat.reshape(x.shape), weight, bias)), residual, activation))

    return call


def definition(norm: str, rounding: Change = same) -> Forward:
    """The definition of a norm of `names.NORMS`, each intermediate passed through `rounding`."""
    row = names.NORMS[norm]
    return batch_norm(Mutation(rounding=rounding)) if row.over_batch else over_groups(row, rounding)
