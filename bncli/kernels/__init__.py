"""Registry of batch norm kernels: their common signature and their availability on a device. No torch at import.

A kernel is `kernel(x, weight, bias, eps, residual, activation, statistics, running) -> y, mean, var` with x (N, C, *S),
weight, bias, mean and var (C). y is differentiable in x, weight, bias and residual, and sums are taken in float32 or
wider. Without `statistics`, x is normalized by the mean and biased variance of the batch, which are returned without
a gradient. With `statistics`, a pair (mean, var) of constants (evaluation), x is normalized by that pair. `running` is
(running_mean, running_var, momentum): both (C) are updated in place with the statistics of the batch, the variance
times m / (m - 1); momentum is the weight of the batch. A kernel writes to no other argument.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from typing import TYPE_CHECKING, Any, Protocol

from bncli.errors import Unavailable
from bncli.names import KERNELS

if TYPE_CHECKING:
    import torch
    from torch import Tensor


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
        running: tuple[Tensor, Tensor, float] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]: ...


def get(name: str, device: torch.device | None = None) -> Kernel:
    """The kernel of that name. Raises Unavailable, with the reason, where it cannot run on `device`, or here at all."""
    kernel = load(name)
    reason: str | None = sys.modules[KERNELS[name].module].unavailable_reason(device)
    if reason is not None:
        raise Unavailable(
            f"the {name} kernel cannot run: {reason}. "
            "No other kernel replaces it; the native kernel is torch's own operator and runs everywhere"
        )
    return kernel


def load(name: str) -> Kernel:
    """The kernel of that name, whether or not it can run here. Raises Unavailable for an unknown name."""
    row = KERNELS.get(name)
    if row is None or not row.module:
        known = ", ".join(row.name for row in KERNELS.values() if row.module)
        raise Unavailable(f"kernel {name}: expected one of {known}")
    if row.module not in sys.modules:
        importlib.import_module(row.module)
    kernel: Kernel = sys.modules[row.module].batch_norm
    return kernel


def adapted(function: Any) -> Kernel:
    """A function as a kernel. Without a parameter `running`, the running statistics are updated after each call."""
    try:
        if "running" in inspect.signature(function).parameters:
            return function
    except (TypeError, ValueError):  # written in C, without a signature
        pass
    return functools.partial(_run_and_update, function)


def _run_and_update(
    function: Any,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None = None,
    activation: str | None = None,
    statistics: tuple[Tensor, Tensor] | None = None,
    running: tuple[Tensor, Tensor, float] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    from bncli.kernels.native import update_running_stats

    extra = () if statistics is None else (statistics,)  # optional for a function that only trains
    y, mean, var = function(x, weight, bias, eps, residual, activation, *extra)
    if running is not None:
        update_running_stats(running, mean, var, x.numel() // x.size(1))
    return y, mean, var
