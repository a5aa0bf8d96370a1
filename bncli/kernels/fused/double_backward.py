"""Double backward of the fused batch norm: torch's derivative of a backward composed of differentiable operators."""

from __future__ import annotations

import torch
from torch import Tensor

from bncli.kernels.layout import accumulation, over_channels, per_channel, unpacked_signs
from bncli.names import ACTIVATIONS, KINKED_ACTIVATIONS


def composed_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    frozen: tuple[Tensor, Tensor] | None,
    signs: Tensor | None,
    eps: float,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dweight, dbias, dresidual from differentiable operators (Ioffe & Szegedy 2015, section 3).

    Shapes are the operator's, dtypes the accumulation dtype. `signs` replaces a residual that was not saved: it says
    where the activation's derivative is 1. `frozen`: constant mean and variance.
    """
    wide = accumulation(x)
    dy, x = dy.to(wide), x.to(wide)
    around = over_channels(x)
    scale, shift = (
        torch.full((), value, dtype=wide, device=x.device) if vector is None else per_channel(vector.to(wide), x)
        for vector, value in ((weight, 1.0), (bias, 0.0))
    )
    if frozen is None:
        # The mean's rounding, which with few values far from zero is large beside their deviation, is taken out again.
        centred_x = x - x.mean(around, keepdim=True)
        centred_x = centred_x - centred_x.mean(around, keepdim=True)
        var = centred_x.square().mean(around, keepdim=True)
    else:
        mean, var = (per_channel(each.to(wide), x) for each in frozen)
        centred_x = x - mean
    reciprocal = torch.rsqrt(var + eps)
    xhat = centred_x * reciprocal
    z = xhat * scale + shift if residual is None else xhat * scale + shift + residual.to(wide)
    if activation in KINKED_ACTIVATIONS:
        relu, slope = activation == "relu", ACTIVATIONS[activation].slope
        # At a NaN as in torch: relu stops dy where z <= 0, leaky_relu scales it unless z > 0.
        whole = unpacked_signs(signs, x) if signs is not None else ~(z <= 0) if relu else z > 0
        g = torch.where(whole, dy, torch.zeros_like(dy) if slope is None else dy * slope)
    elif activation == "silu":
        s = torch.sigmoid(z)
        g = dy * (s * (1 + z * (1 - s)))
    else:
        g = dy
    dweight, dbias = (g * xhat).sum(around), g.sum(around)
    dx = g
    if frozen is None:
        # Center before projecting: with 2 or 3 values per channel this halves the error.
        centred = g - g.mean(around, keepdim=True)
        dx = centred - xhat * (centred * xhat).mean(around, keepdim=True)
    dx = dx * (scale * reciprocal)
    return dx, dweight, dbias, g


def setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    dy, x, weight, bias, residual, mean, var, signs, eps, activation, frozen, *_ = inputs
    ctx.save_for_backward(dy, x, weight, bias, residual, mean, var, signs)
    ctx.eps, ctx.activation, ctx.frozen = eps, activation, frozen


def backward(ctx, *upstream):  # type: ignore[no-untyped-def]
    """The exact second derivative: torch's derivative of `composed_backward`, differentiable in turn.

    The inputs are views, since dy may depend on x but is an independent input here.
    """
    dy, x, weight, bias, residual, mean, var, signs = ctx.saved_tensors
    create_graph = torch.is_grad_enabled()
    inputs = [
        None
        if each is None
        else each.view_as(each)
        if create_graph and each.requires_grad
        else each.detach().requires_grad_()
        for each in (dy, x, weight, bias, residual)
    ]
    with torch.enable_grad():
        outputs = composed_backward(*inputs, (mean, var) if ctx.frozen else None, signs, ctx.eps, ctx.activation)
        pairs = [
            (output, gradient.to(output.dtype))
            for output, gradient in zip(outputs, upstream, strict=True)
            if gradient is not None and gradient.numel() == output.numel() and output.requires_grad
        ]
        found = torch.autograd.grad(
            [output for output, _ in pairs],
            [each for each in inputs if each is not None],
            [gradient for _, gradient in pairs],
            allow_unused=True,
            create_graph=create_graph,
        )
    gradients = iter(found)
    return (*(None if each is None else next(gradients) for each in inputs), *(None,) * 8)
