"""The batch norm kernels by name, and why one is not available here.

The seam: `kernel(x, weight, bias, eps, residual, activation, statistics) -> y, mean, var` with x (N, C, *S), weight,
bias, mean and var (C). y is differentiable in x, weight, bias and residual. Without `statistics` x is normalized by
the batch's own mean and biased variance, and those are returned, in float32 or wider, without gradient; with
`statistics`, a pair (mean, var), by that pair, which is a constant (evaluation). Nothing is written into an argument:
running statistics are the affair of `functional.batch_norm` and the modules.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from bncli.errors import Unavailable
from bncli.kernels import fused, native


class Kernel(Protocol):
    def __call__(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        residual: Tensor | None = None,
        activation: str | None = None,
        statistics: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]: ...


KERNELS: dict[str, Kernel] = {"native": native.batch_norm, "fused": fused.batch_norm}

# Why a kernel cannot run on that device, or None where it can.
_WHY_NOT: dict[str, Callable[[torch.device | None], str | None]] = {"fused": fused.why_not}


def get(name: str, device: torch.device | None = None) -> Kernel:
    """The kernel of that name. Raises Unavailable, with the reason, where it cannot run on `device`, or here at all."""
    if name not in KERNELS:
        raise Unavailable(f"kernel {name}: expected one of {', '.join(KERNELS)}")
    reason = _WHY_NOT[name](device) if name in _WHY_NOT else None
    if reason is not None:
        raise Unavailable(
            f"the {name} kernel cannot run: {reason}. "
            "Nothing else is run in its place; the native kernel is torch's own operator and runs everywhere"
        )
    return KERNELS[name]
