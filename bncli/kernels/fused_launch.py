"""The fused batch norm's launchers: tensors and a plan in, device kernels started, tensors out. No autograd here."""

from __future__ import annotations

import contextlib
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from bncli.kernels import fused_cuda
from bncli.kernels.layout import accumulation, is_rows, sign_bytes, sizes
from bncli.kernels.plan import Plan, Processors, plan

HOPPER = (9, 0)  # from here on a team meets at a barrier in memory; before, two launches
COUNTER_STRIDE = 32  # int32 from one team's counter to the next: 128 bytes, a cache line each
MOST_ELEMENTS_OF_32_BITS = 2**31 - 1


def plan_for(x: Tensor, *, backward: bool = False, given: bool = False) -> Plan:
    """How the fused kernel cuts this dense tensor up on its own device."""
    return plan(
        sizes(x),
        planes=not is_rows(x),
        itemsize=x.element_size(),
        backward=backward,
        processors=processors(x.device),
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


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    statistics: tuple[Tensor, Tensor] | None,
    eps: float,
    activation: str,
    keep_signs: bool,
    cut: Plan | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """activation(batch_norm(x) + residual), the mean and variance (C) that were used, and the signs.

    x and residual (N, C, *S), dense, lying alike. Signs: one bit an element if they are kept, else empty.
    """
    cut = cut or plan_for(x, given=statistics is not None)
    accumulate = accumulation(x)
    y = torch.empty_like(x)
    mean, var = statistics or (x.new_empty(x.size(1), dtype=accumulate), x.new_empty(x.size(1), dtype=accumulate))
    signs = x.new_empty(sign_bytes(x) if keep_signs else 0, dtype=torch.uint8)
    tensors = [x, _or(residual, x), _or(weight, x), _or(bias, x), y, mean, var, _or(signs, x)]
    constants = {"EPS": eps, "ACTIVATION": activation, "SIGNS": keep_signs, **_presence(residual, weight, bias)}
    _start(fused_cuda.forward, cut, x, tensors, constants, given=statistics is not None)
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
    cut: Plan | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dweight (C), dbias (C), dresidual (empty if not asked for).

    dy, x, residual (N, C, *S), dense, lying alike; residual only where the activation's gradient needs it and there
    are no signs. given: the statistics are constants.
    """
    cut = cut or plan_for(x, backward=True, given=given)
    channels = x.size(1)
    accumulate = accumulation(x)
    dx = torch.empty_like(x)
    dr = torch.empty_like(x) if residual_gradient else x.new_empty(0)
    dweight = x.new_empty(channels, dtype=accumulate if weight is None else weight.dtype)
    dbias = x.new_empty(channels, dtype=accumulate if bias is None else bias.dtype)
    tensors = [
        dy, x, _or(residual, x), _or(weight, x), _or(bias, x), *statistics, _or(signs, x), dx, _or(dr, x), dweight,
        dbias
    ]  # fmt: skip
    constants = {
        "EPS": eps,
        "ACTIVATION": activation,
        "SIGNS": signs is not None,
        "RESIDUAL_GRADIENT": residual_gradient,
        **_presence(residual, weight, bias),
    }
    partial = _start(fused_cuda.backward, cut, x, tensors, constants, given=given)
    if given:  # no program waited for the others: the sums over a slice's programs are still to be taken
        dbias, dweight = (
            part.sum(1).flatten()[:channels].to(like.dtype)
            for part, like in zip(partial.unbind(2), (dbias, dweight), strict=True)
        )
    return dx, dweight, dbias, dr


def _presence(residual: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> dict[str, bool]:
    return {"RESIDUAL": residual is not None, "WEIGHT": weight is not None, "BIAS": bias is not None}


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    """Some pointer where there is no tensor; the kernel does not follow it."""
    return other if tensor is None or tensor.numel() == 0 else tensor


def reciprocal(divisor: int) -> tuple[int, int]:
    """(magic, shift): i // divisor is umulhi(2 i, magic) >> shift for all i < 2**30 (Granlund & Montgomery 1994)."""
    shift = (divisor - 1).bit_length()
    return (1 << (31 + shift)) // divisor + 1, shift


def _start(
    kernel: Any, cut: Plan, x: Tensor, tensors: list[Tensor], constants: dict[str, Any], *, given: bool
) -> Tensor:
    """Run a device kernel by its plan. Returns the programs' partial results (slices, P, 2, B)."""
    _, channels, positions = sizes(x)
    units = (positions if cut.planes else channels) // cut.unit
    accumulate = accumulation(x)
    alone = cut.team == 1 and not given
    partial = x.new_empty(() if alone else (cut.slices, cut.team, 2, cut.columns), dtype=accumulate)
    arrived = _counters(x.device, cut.teams) if cut.barrier == "grid" else partial
    runtime = (channels, units, *reciprocal(units), 0, cut.lines, cut.tiles_each, cut.team, cut.teams, cut.slices)
    stages = (
        ("given",)
        if given
        else {"none": ("alone",), "grid": ("team",), "launch": ("statistics", "normalize")}[cut.barrier]
    )
    with on(x.device):
        for stage in stages:
            kernel[(cut.teams * cut.team,)](
                *tensors, partial, arrived, *runtime,
                R=cut.rows, B=cut.columns, K=cut.held, UNIT=cut.unit, PLANES=cut.planes,
                WIDE=x.numel() > MOST_ELEMENTS_OF_32_BITS, OVERFLOW=cut.overflow, MANY=cut.many, STAGE=stage,
                ACC=fused_cuda.TYPES[accumulate], **constants,
                num_warps=cut.warps, num_stages=1, enable_fp_fusion=True, launch_cooperative_grid=stage == "team",
            )  # fmt: skip
    return partial


def on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Kernels start on the current device: make it the tensor's."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


_COUNTERS: dict[tuple[int | None, int], Tensor] = {}


def _counters(device: torch.device, teams: int) -> Tensor:
    """A zeroed counter a team, that the barrier leaves as it found it. Kept for each stream: on one stream calls follow
    each other. A captured graph may be replayed on any stream beside others, and gets its own, zeroed in the graph.
    """
    size = teams * COUNTER_STRIDE
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros(size, dtype=torch.int32, device=device)
    key = (device.index, torch.cuda.current_stream(device).cuda_stream)
    if key not in _COUNTERS or _COUNTERS[key].numel() < size:
        _COUNTERS[key] = torch.zeros(max(size, 1024 * COUNTER_STRIDE), dtype=torch.int32, device=device)
    return _COUNTERS[key]
