"""Fused batch norm on a GPU: device kernels started on tensors by a plan. No autograd here."""

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

HOPPER = (9, 0)  # from here on a team meets at a barrier in memory; before, two launches
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
    cut: Plan | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """activation(batch_norm(x) + residual), the mean and variance (C) that were used, and the signs.

    x and residual (N, C, *S), dense, in the same layout. Signs: one bit an element if they are kept, else empty.
    running: a running mean and variance (C), which are updated in place, and a momentum.
    """
    given = statistics is not None
    start = prepared(x.shape, x.stride(), x.dtype, x.device, False, given, cut)
    y = torch.empty_like(x)
    mean, var = statistics or (x.new_empty(x.size(1), dtype=start.accumulate) for _ in range(2))
    signs = x.new_empty(sign_bytes(x) if keep_signs else 0, dtype=torch.uint8)
    running_mean, running_var, momentum = running or (x, x, 0.0)
    start.run(
        triton.forward,
        x,
        (x, _or(residual, x), _or(weight, x), _or(bias, x), y, mean, var, signs if keep_signs else x, running_mean,
         running_var),
        (float(momentum), start.unbiased),
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
    given: bool,
    residual_gradient: bool,
    *,
    cut: Plan | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dweight (C), dbias (C), dresidual (empty if not asked for).

    dy, x, residual (N, C, *S), dense, in the same layout; residual only where the activation's gradient needs it and
    there are no signs. given: the statistics are constants.
    """
    start = prepared(x.shape, x.stride(), x.dtype, x.device, True, given, cut)
    channels, accumulate = x.size(1), start.accumulate
    dx = torch.empty_like(x)
    dr = torch.empty_like(x) if residual_gradient else x.new_empty(0)
    dweight = x.new_empty(channels, dtype=accumulate if weight is None else weight.dtype)
    dbias = x.new_empty(channels, dtype=accumulate if bias is None else bias.dtype)
    partial = start.run(
        triton.backward,
        x,
        (dy, x, _or(residual, x), _or(weight, x), _or(bias, x), *statistics, _or(signs, x), dx,
         dr if residual_gradient else x, dweight, dbias),
        (),
        EPS=eps, ACTIVATION=activation, RESIDUAL=residual is not None, WEIGHT=weight is not None, BIAS=bias is not None,
        SIGNS=signs is not None, RESIDUAL_GRADIENT=residual_gradient,
    )  # fmt: skip
    if given:  # no program waited for the others: the sums over a slice's programs are still to be taken
        dbias, dweight = (
            part.sum(1).flatten()[:channels].to(like.dtype)
            for part, like in zip(partial.unbind(2), (dbias, dweight), strict=True)
        )
    return dx, dweight, dbias, dr


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    """Some pointer where there is no tensor; the kernel does not follow it."""
    return other if tensor is None else tensor


# --- launching -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Launch:
    """The part of a launch that depends on a tensor's shape, layout, dtype and device alone."""

    cut: Plan
    stages: tuple[str, ...]
    runtime: tuple[int, ...]  # channels, units, magic, shift, nothing, L, H, P, teams, slices
    constants: dict[str, Any]
    partial: tuple[int, ...]  # the programs' vectors: (slices, P, 2 or 3, B); one number where nobody reads them
    accumulate: torch.dtype
    unbiased: float  # m / (m - 1)

    def run(
        self, kernel: Any, x: Tensor, tensors: tuple[Tensor, ...], numbers: tuple[float, ...], **chosen: Any
    ) -> Tensor:
        """Start the device kernel, once or twice. Returns the vectors that its programs left."""
        partial = x.new_empty(self.partial, dtype=self.accumulate)
        arrived = _counters(x.device, self.cut.teams) if self.cut.barrier == "grid" else partial
        grid = (self.cut.teams * self.cut.team,)
        with on(x.device):
            for stage in self.stages:
                kernel[grid](
                    *tensors, partial, arrived, *numbers, *self.runtime, **self.constants, **chosen, STAGE=stage,
                    num_warps=self.cut.warps, maxnreg=self.cut.registers, num_stages=1, enable_fp_fusion=True,
                    launch_cooperative_grid=stage == "team",
                )  # fmt: skip
        return partial


@lru_cache(maxsize=4096)
def prepared(
    shape: torch.Size,
    stride: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    backward: bool,
    given: bool,
    cut: Plan | None = None,
) -> Launch:
    """cut: another plan than the best one. Raises ValueError for an x that is not dense."""
    x = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
    if not (is_channels_last(x) or x.is_contiguous()):
        refuse_gaps(x)
    _, channels, positions = sizes(x)
    cut = cut or plan_for(x, processors(device), backward=backward, given=given)
    units = (positions if cut.contiguous else channels) // cut.unit
    accumulate = accumulation(x)
    count = math.prod(shape) // channels
    return Launch(
        cut=cut,
        stages=("given",) if given else STAGES[cut.barrier],
        runtime=(
            channels, units, *reciprocal(units), 0, cut.lines, cut.tiles_each, cut.team, cut.teams, cut.slices
        ),
        constants={
            "R": cut.rows, "B": cut.columns, "K": cut.held, "UNIT": cut.unit, "PLANES": cut.contiguous,
            "WIDE": math.prod(shape) > MOST_OF_32_BITS, "OVERFLOW": cut.overflow,
            "ACC": triton.TYPES[accumulate],
        },
        partial=(cut.slices, cut.team, 2 if backward else 3, cut.columns)
        if (backward if given else cut.team > 1)
        else (1,),
        accumulate=accumulate,
        unbiased=count / max(count - 1, 1),
    )  # fmt: skip


def plan_for(x: Tensor, on: Processors, *, backward: bool = False, given: bool = False) -> Plan:
    """The best plan for a dense x (N, C, *S)."""
    return plan(
        sizes(x),
        contiguous=not is_channels_last(x),
        itemsize=x.element_size(),
        backward=backward,
        processors=on,
        given=given,
    )


@lru_cache(maxsize=64)
def processors(device: torch.device) -> Processors:
    """The device's multiprocessors. Triton's interpreter runs programs one after another: a barrier would never end."""
    if device.type != "cuda":
        return Processors(1, cooperative=False)
    found = torch.cuda.get_device_properties(device)
    nvidia = torch.version.hip is None  # such barriers were seen to hang elsewhere: FlagTree 1029 and 1030
    return Processors(found.multi_processor_count, nvidia and (found.major, found.minor) >= HOPPER)


def reciprocal(divisor: int) -> tuple[int, int]:
    """(magic, shift): i // divisor is umulhi(2 i, magic) >> shift for all i < 2**30 (Granlund & Montgomery 1994)."""
    shift = (divisor - 1).bit_length()
    return (1 << (31 + shift)) // divisor + 1, shift


def on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Kernels start on the current device: make it the tensor's."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


_COUNTERS: dict[int | None, Tensor] = {}


def _counters(device: torch.device, teams: int) -> Tensor:
    """A zeroed counter a team, that the barrier leaves as it found it.

    Kept for the default stream alone, on which calls follow each other. Elsewhere a call gets its own: calls on two
    streams may run at once, a captured graph beside anything, and what a graph's warm-up allocates is the graph's.
    """
    size = teams * COUNTER_STRIDE
    on_default = torch.cuda.current_stream(device) == torch.cuda.default_stream(device)
    if not on_default or torch.cuda.is_current_stream_capturing():
        return torch.zeros(size, dtype=torch.int32, device=device)
    if device.index not in _COUNTERS or _COUNTERS[device.index].numel() < size:
        _COUNTERS[device.index] = torch.zeros(max(size, 1024 * COUNTER_STRIDE), dtype=torch.int32, device=device)
    return _COUNTERS[device.index]
