"""Fused batch norm on a GPU: launches of the device kernels according to a plan. No autograd here."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from bncli.kernels.fused import triton
from bncli.kernels.fused.tiling import Plan, Processors, plan
from bncli.kernels.layout import accumulation, is_channels_last, refuse_gaps, sign_bytes, sizes

AMPERE = (8, 0)  # from here on teams use a barrier in memory; older devices, two launches
COUNTER_STRIDE = 32  # int32 from one team's counter to the next: 128 bytes, a cache line each
MOST_OF_32_BITS = 2**31 - 1
STAGES = {"none": ("alone",), "grid": ("team",), "launch": ("statistics", "normalize")}


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    statistics: tuple[Tensor, Tensor] | None,
    eps: float,
    activation: str,
    keep_signs: bool,
    *,
    running: tuple[Tensor, Tensor, float] | None = None,
    plan: Plan | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """activation(batch_norm(x) + residual), the mean and variance (C) that normalized, and the sign bits.

    x and residual (N, C, *S), dense, in the same layout. Signs: one bit per element if `keep_signs`, else empty.
    running: a running mean and variance (C), which are updated in place, and a momentum.
    """
    frozen = statistics is not None
    launch = launch_for(x.shape, x.stride(), x.dtype, x.device, False, frozen, plan)
    y = torch.empty_like(x)
    mean, var = statistics or (x.new_empty(x.size(1), dtype=launch.accumulate) for _ in range(2))
    signs = x.new_empty(sign_bytes(x) if keep_signs else 0, dtype=torch.uint8)
    running_mean, running_var, momentum = running or (x, x, 0.0)
    launch.run(
        triton.forward,
        x,
        (x, _or(residual, x), _or(weight, x), _or(bias, x), y, mean, var, signs if keep_signs else x, running_mean,
         running_var),
        (float(momentum), launch.unbiased),
        EPS=eps, ACTIVATION=activation, RESIDUAL=residual is not None, WEIGHT=weight is not None, BIAS=bias is not None,
        SIGNS=keep_signs, TRACK=running is not None,
    )  # fmt: skip
    return y, mean, var, signs


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    statistics: tuple[Tensor, Tensor],
    signs: Tensor | None,
    eps: float,
    activation: str,
    frozen: bool,
    residual_gradient: bool,
    *,
    plan: Plan | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dweight (C), dbias (C), dresidual (empty unless `residual_gradient`).

    dy, x, residual (N, C, *S), dense, in the same layout; residual only where the activation's gradient needs it and
    there are no signs. frozen: the statistics are constants.
    """
    launch = launch_for(x.shape, x.stride(), x.dtype, x.device, True, frozen, plan)
    channels, accumulate = x.size(1), launch.accumulate
    dx = torch.empty_like(x)
    dr = torch.empty_like(x) if residual_gradient else x.new_empty(0)
    dweight = x.new_empty(channels, dtype=accumulate if weight is None else weight.dtype)
    dbias = x.new_empty(channels, dtype=accumulate if bias is None else bias.dtype)
    partial = launch.run(
        triton.backward,
        x,
        (dy, x, _or(residual, x), _or(weight, x), _or(bias, x), *statistics, _or(signs, x), dx,
         dr if residual_gradient else x, dweight, dbias),
        (),
        EPS=eps, ACTIVATION=activation, RESIDUAL=residual is not None, WEIGHT=weight is not None, BIAS=bias is not None,
        SIGNS=signs is not None, RESIDUAL_GRADIENT=residual_gradient,
    )  # fmt: skip
    if frozen:  # without a barrier the programs left partial sums
        dbias, dweight = (
            part.sum(1).flatten()[:channels].to(like.dtype)
            for part, like in zip(partial.unbind(2), (dbias, dweight), strict=True)
        )
    return dx, dweight, dbias, dr


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    """A valid pointer in place of a missing tensor; the kernel does not read it."""
    return other if tensor is None else tensor


# --- launching -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Launch:
    """The part of a launch that depends only on a tensor's shape, layout, dtype and device."""

    plan: Plan
    stages: tuple[str, ...]
    runtime: tuple[int, ...]  # channels, units, magic, shift, opaque_zero, L, H, P, teams, slices
    constants: dict[str, Any]
    partial: tuple[int, ...]  # the programs' vectors: (slices, P, 2, B); one number if unused
    accumulate: torch.dtype
    unbiased: float  # m / (m - 1)

    def run(
        self, kernel: Any, x: Tensor, tensors: tuple[Tensor, ...], numbers: tuple[float, ...], **chosen: Any
    ) -> Tensor:
        """Start the device kernel, once or twice. Returns the partial vectors of its programs."""
        partial = x.new_empty(self.partial, dtype=self.accumulate)
        arrived = _counters(x.device, self.plan.teams) if self.plan.barrier == "grid" else partial
        grid = (self.plan.teams * self.plan.team,)
        with on(x.device):
            for stage in self.stages:
                kernel[grid](
                    *tensors, partial, arrived, *numbers, *self.runtime, **self.constants, **chosen, STAGE=stage,
                    num_warps=self.plan.warps, maxnreg=self.plan.registers, num_stages=1, enable_fp_fusion=True,
                    launch_cooperative_grid=stage == "team",
                )  # fmt: skip
        return partial


@lru_cache(maxsize=4096)
def launch_for(
    shape: torch.Size,
    stride: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    backward: bool,
    frozen: bool,
    plan: Plan | None = None,
) -> Launch:
    """The launch for a tensor of that shape. plan: None for the best one. Raises ValueError if it is not dense."""
    x = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
    if not (is_channels_last(x) or x.is_contiguous()):
        refuse_gaps(x)
    _, channels, positions = sizes(x)
    plan = plan or plan_for(x, processors(device), backward=backward, frozen=frozen)
    units = (positions if plan.contiguous else channels) // plan.unit
    accumulate = accumulation(x)
    count = math.prod(shape) // channels
    return Launch(
        plan=plan,
        stages=("frozen",) if frozen else STAGES[plan.barrier],
        runtime=(
            channels, units, *reciprocal(units), 0, plan.lines, plan.tiles_each, plan.team, plan.teams, plan.slices
        ),
        constants={
            "FORM": triton.Form(
                plan.rows, plan.columns, plan.held, plan.unit, plan.contiguous, math.prod(shape) > MOST_OF_32_BITS,
                plan.overflow, triton.TYPES[accumulate],
            )
        },
        partial=(plan.slices, plan.team, 2, plan.columns)
        if (backward if frozen else plan.team > 1)
        else (1,),
        accumulate=accumulate,
        unbiased=count / max(count - 1, 1),
    )  # fmt: skip


def plan_for(x: Tensor, on: Processors, *, backward: bool = False, frozen: bool = False) -> Plan:
    """The best plan for a dense x (N, C, *S)."""
    return plan(
        sizes(x),
        contiguous=not is_channels_last(x),
        itemsize=x.element_size(),
        backward=backward,
        processors=on,
        frozen=frozen,
    )


@lru_cache(maxsize=64)
def processors(device: torch.device) -> Processors:
    """The device's multiprocessors. Triton's interpreter runs programs in sequence, so a barrier would hang."""
    if device.type != "cuda":
        return Processors(1, cooperative=False)
    found = torch.cuda.get_device_properties(device)
    nvidia = torch.version.hip is None  # such barriers hang on other devices: FlagTree 1029 and 1030
    return Processors(found.multi_processor_count, nvidia and (found.major, found.minor) >= AMPERE)


def reciprocal(divisor: int) -> tuple[int, int]:
    """(magic, shift): i // divisor is umulhi(2 i, magic) >> shift for all i < 2**30 (Granlund & Montgomery 1994)."""
    shift = (divisor - 1).bit_length()
    return (1 << (31 + shift)) // divisor + 1, shift


def on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Make the tensor's device the current one, on which kernels start."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


_COUNTERS: dict[int | None, Tensor] = {}


def _counters(device: torch.device, teams: int) -> Tensor:
    """One zeroed counter per team, which the barrier leaves at zero.

    They are cached for the default stream only, on which calls are sequential. Elsewhere each call gets new ones: calls
    on two streams, or a captured graph and another call, may overlap, and a graph owns what its warm-up allocates.
    """
    size = teams * COUNTER_STRIDE
    on_default = torch.cuda.current_stream(device) == torch.cuda.default_stream(device)
    if not on_default or torch.cuda.is_current_stream_capturing():
        return torch.zeros(size, dtype=torch.int32, device=device)
    if device.index not in _COUNTERS or _COUNTERS[device.index].numel() < size:
        _COUNTERS[device.index] = torch.zeros(max(size, 1024 * COUNTER_STRIDE), dtype=torch.int32, device=device)
    return _COUNTERS[device.index]
