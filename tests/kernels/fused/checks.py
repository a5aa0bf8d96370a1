"""Inputs of one call of the fused kernel, and its results held to torch's own in float64. No Triton."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bncli.kernels import Kernel, native

EPS = 1e-5
ROUNDOFF = {torch.float64: 2**-53, torch.float32: 2**-24, torch.float16: 2**-11, torch.bfloat16: 2**-8}
# Positions of 3 and 15 values are aligned to one element, of 12 to four, of 8 to eight.
SHAPES = [(6, 13), (9, 3, 1), (5, 3, 3), (3, 2, 3, 5), (2, 9, 2, 6), (3, 5, 2, 2, 2), (4, 8, 4)]
FUSED = [
    (activation, residual) for activation in (None, "relu", "leaky_relu", "silu") for residual in (False, True)
]  # fmt: skip


@dataclass(frozen=True)
class UnderTest:
    """An implementation of the fused kernel on the device that it runs on."""

    name: str
    device: torch.device
    run: Kernel

    @property
    def interpreted(self) -> bool:
        return self.name == "fused-interpreted"


@dataclass
class Case:
    """Inputs of one call, all on one device, and the gradient that comes from above."""

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    residual: Tensor | None
    statistics: tuple[Tensor, Tensor] | None
    dy: Tensor
    activation: str | None

    def inputs(self, dtype: torch.dtype | None = None) -> list[Tensor | None]:
        """x, weight, bias and residual as fresh leaves."""
        found = (self.x, self.weight, self.bias, self.residual)
        return [None if each is None else each.detach().to(dtype or each.dtype).requires_grad_() for each in found]


def lay(tensor: Tensor, channels_last: bool) -> Tensor:
    return tensor.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else tensor.contiguous()


def case(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    *,
    channels_last: bool = False,
    activation: str | None = None,
    residual: bool = False,
    frozen: bool = False,
    affine: bool = True,
    seed: int = 0,
) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    vector = torch.promote_types(dtype, torch.float32)
    channels = shape[1]
    weight, bias = (0.5 + normal(2, channels).abs()).to(device, vector) if affine else (None, None)
    return Case(
        lay((2 * normal(*shape) + 1).to(device, dtype), channels_last),
        weight,
        bias,
        lay(normal(*shape).to(device, dtype), channels_last) if residual else None,
        (normal(channels).to(device, vector), (0.5 + normal(channels).abs()).to(device, vector)) if frozen else None,
        lay(normal(*shape).to(device, dtype), channels_last),
        activation,
    )


def outcome(kernel: Any, case: Case, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """y and every gradient, in float64 on the CPU."""
    inputs = case.inputs(dtype)
    x, weight, bias, residual = inputs
    assert x is not None
    statistics = case.statistics
    if dtype is not None and statistics is not None:
        statistics = (statistics[0].to(dtype), statistics[1].to(dtype))
    y, mean, var = kernel(x, weight, bias, EPS, residual, case.activation, statistics)
    y.backward(case.dy.to(y.dtype))
    found = {"y": y, "mean": mean, "var": var}
    names = ("dx", "dweight", "dbias", "dresidual")
    found |= {name: each.grad for name, each in zip(names, inputs, strict=True) if each is not None}
    return {name: each.detach().double().cpu() for name, each in found.items()}


def assert_right(kernel: Any, case: Case) -> None:
    """Each result within twice native's own error, or a few roundings of the dtype at the result's largest value.

    The roundings: the result's own, twice where the interpreter truncates, and 64 of the accumulation's (16 additions
    that lie on the way of any of these sums, four operations each).
    """
    truth, ours = outcome(native.batch_norm, case, torch.float64), outcome(kernel, case)
    theirs = outcome(native.batch_norm, case)
    assert truth.keys() == ours.keys()
    for name, exact in truth.items():
        assert ours[name].shape == exact.shape, name
        scale = max(exact.abs().max().item(), case.dy.abs().max().item())
        stored = ROUNDOFF[case.x.dtype] if name in ("y", "dx", "dresidual") else 0.0
        accumulated = ROUNDOFF[torch.promote_types(case.x.dtype, torch.float32)]
        floor = (2 * stored + 64 * accumulated) * scale
        bound = max(2 * (theirs[name] - exact).abs().max().item(), floor)
        error = (ours[name] - exact).abs().max().item()
        assert error <= bound, f"{name}: error {error:.3g}, bound {bound:.3g}"
