"""Batch norm's backward from differentiable operators: what the fused backward's own gradient is taken of."""

from __future__ import annotations

import torch
from torch import Tensor

from bncli.kernels.layout import accumulation, over_channels, per_channel, unpacked_signs
from bncli.names import KINKED_ACTIVATIONS


def composed_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    given: tuple[Tensor, Tensor] | None,
    signs: Tensor | None,
    eps: float,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dweight, dbias, dresidual from differentiable operators (Ioffe & Szegedy 2015, section 3).

    Shapes as the operator's, all in the accumulation dtype. `signs` tells where dy passes the activation whole
    where the residual was not kept. `given`: mean and variance that are constants.
    """
    wide = accumulation(x)
    dy, x = dy.to(wide), x.to(wide)
    around = over_channels(x)
    scale, shift = (
        torch.full((), value, dtype=wide, device=x.device) if vector is None else per_channel(vector.to(wide), x)
        for vector, value in ((weight, 1.0), (bias, 0.0))
    )
    if given is None:
        var, mean = torch.var_mean(x, around, correction=0, keepdim=True)
    else:
        mean, var = (per_channel(each.to(wide), x) for each in given)
    reciprocal = torch.rsqrt(var + eps)
    xhat = (x - mean) * reciprocal
    z = xhat * scale + shift if residual is None else xhat * scale + shift + residual.to(wide)
    if activation in KINKED_ACTIVATIONS:
        relu = activation == "relu"
        # At a NaN as in torch: relu stops dy where z <= 0, leaky_relu scales it unless z > 0.
        whole = unpacked_signs(signs, x) if signs is not None else ~(z <= 0) if relu else z > 0
        g = torch.where(whole, dy, torch.zeros_like(dy) if relu else dy * 0.01)
    elif activation == "silu":
        s = torch.sigmoid(z)
        g = dy * (s * (1 + z * (1 - s)))
    else:
        g = dy
    dweight, dbias = (g * xhat).sum(around), g.sum(around)
    dx = g * (scale * reciprocal)
    if given is None:
        m = x.numel() // x.size(1)
        dx = dx - (per_channel(dbias, x) + xhat * per_channel(dweight, x)) * (scale * reciprocal / m)
    return dx, dweight, dbias, g
