"""Definition of each norm in plain torch operators: the float64 reference of every kernel.

It imports no other kernel module, so that they share no bug. A `Mutation` of `batch_norm` reproduces a bug that
kernels have, so that a diagnosis can compute the results of a wrong kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

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

    def call(*arguments: Any) -> Tensor:
        x, _, _, weight, bias, _, _, eps, residual, activation = arguments
        grouped = x.reshape(x.size(0), row.groups(x.size(1), names.CHECKED_GROUPS), -1)
        centred = grouped - rounding(grouped.mean(-1, keepdim=True))
        var = rounding(rounding(centred.square()).mean(-1, keepdim=True))
        xhat = rounding(rounding(centred) * rounding((var + eps).rsqrt()))
        return rounding(finish(rounding(affine(xhat.reshape(x.shape), weight, bias)), residual, activation))

    return call


def inverse_root(row: names.Norm) -> Change:
    """(G, k, k) covariances with eps on the diagonal -> the matrices (G, k, k) that a norm multiplies by."""
    if row.whitens is None:
        return torch.rsqrt  # of a variance, k = 1
    return exact_inverse_root if row.whitens == "exactly" else newton_inverse_root


def exact_inverse_root(regular: Tensor) -> Tensor:
    """The symmetric W with W A W = 1, for symmetric positive A (G, k, k); NaN for a matrix that is not finite.

    The derivative of eigenvectors is infinite for equal eigenvalues, so W is differentiated by way of the equation: two
    steps of Newton's method for it start from the eigenvectors' W, a constant. They leave its value, and each doubles
    the number of derivatives that are right.
    """
    k, finite = regular.size(-1), regular.isfinite().all(-1).all(-1)[:, None, None]
    identity = torch.eye(k, dtype=regular.dtype, device=regular.device)
    values, vectors = torch.linalg.eigh(torch.where(finite, regular, identity).detach())
    root = vectors @ torch.diag_embed(values.rsqrt()) @ vectors.mT
    for _ in range(2):
        # The derivative of W A W is dW A W + W A dW, a k^2 x k^2 matrix for dW row by row.
        product = torch.einsum("gij,gjl->gil", root, regular)
        operator = torch.einsum("ia,glb->gilab", identity, product) + torch.einsum("gia,lb->gilab", product, identity)
        residual = torch.einsum("gij,gjl->gil", product, root) - identity
        step = torch.linalg.solve(operator.reshape(-1, k * k, k * k), residual.reshape(-1, k * k, 1))
        root = root - step.reshape(regular.shape)
    return torch.where(finite, root, torch.nan)


def newton_inverse_root(regular: Tensor) -> Tensor:
    """The approximation of `exact_inverse_root` by Huang et al. 2019 (arXiv 1904.03441), algorithm 1.

    The step P = (3 P - P^3 S) / 2 is P = P (3 - M) / 2 with M = P^2 S; with M as a variable of its own, rounding errors
    do not grow from step to step.
    """
    trace = torch.einsum("gii->g", regular)[:, None, None]
    identity = torch.eye(regular.size(-1), dtype=regular.dtype, device=regular.device)
    p, m = identity, regular / trace
    for _ in range(names.CHECKED_NEWTON_STEPS):
        factor = (3 * identity - m) / 2
        p, m = p @ factor, m @ factor @ factor
    return p / trace.sqrt()


def whitening(row: names.Norm, rounding: Change = same) -> Forward:
    """Groups of channels times the inverse root of their covariance (Huang et al. 2018, arXiv 1804.08450), in training.

    The running statistics of a kernel's signature have no place for a covariance: none are used or updated.
    """
    root_of = inverse_root(row)

    def call(*arguments: Any) -> Tensor:
        x, _, _, weight, bias, _, _, eps, residual, activation = arguments
        channels, size = x.size(1), names.CHECKED_GROUP_SIZE
        values = x.transpose(0, 1).reshape(channels // size, size, -1)
        centred = rounding(values - rounding(values.mean(-1, keepdim=True)))
        covariance = rounding(rounding(centred[:, :, None] * centred[:, None]).mean(-1))
        regular = (covariance + covariance.mT) / 2 + eps * torch.eye(size, dtype=x.dtype, device=x.device)
        xhat = rounding(rounding(rounding(root_of(regular))[..., None] * centred[:, None]).sum(2))
        y = affine(xhat.reshape(channels, x.size(0), *x.shape[2:]).transpose(0, 1), weight, bias)
        return rounding(finish(rounding(y), residual, activation))

    return call


def definition(norm: str, rounding: Change = same) -> Forward:
    """The definition of a norm of `names.NORMS`, each intermediate passed through `rounding`."""
    row = names.NORMS[norm]
    if row.whitens:
        return whitening(row, rounding)
    return batch_norm(Mutation(rounding=rounding)) if row.over_batch else over_groups(row, rounding)
