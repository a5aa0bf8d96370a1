"""The batch norm kernels by name, and why one is not available here.

The seam: `kernel(x, weight, bias, eps, residual, activation) -> y, mean, var` with x (N, C, *S), weight, bias, mean
and var (C). y is differentiable in x, weight, bias and residual; mean and var are the batch's own (var with 1/m), in
float32 or wider; nothing is written into an argument. Running statistics are the norm module's affair.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from bncli.errors import Unavailable
from bncli.kernels import native


class Kernel(Protocol):
    def __call__(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        residual: Tensor | None = None,
        activation: str | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]: ...


KERNELS: dict[str, Kernel] = {"native": native.batch_norm}


def get(name: str) -> Kernel:
    """The kernel of that name. Raises Unavailable, with the reason, for one that cannot run here."""
    if name not in KERNELS:
        raise Unavailable(
            f"norm.kernel: {name} is not part of this version of bncli; it has {', '.join(KERNELS)}. "
            "Nothing else is run in its place: set norm.kernel=native to use torch's own operator"
        )
    return KERNELS[name]
