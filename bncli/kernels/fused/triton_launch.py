"""Fused batch norm on a GPU: launches of the device kernels according to a plan. No autograd here."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache, wraps
from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.runtime import driver

from bncli.kernels.fused import triton
from bncli.kernels.fused.tiling import Plan, Processors, plan
from bncli.kernels.layout import accumulation, is_channels_last, refuse_gaps, sign_bytes, sizes

COUNTER_STRIDE = 32  # int32 from one team's counter to the next: 128 bytes, a cache line each
LEAST_SHARED = 1024 * COUNTER_STRIDE  # elements of memory that a device's calls share
DEFAULT_STREAM = 0  # as CUDA numbers it
NOTHING = contextlib.nullcontext()
COMPILED = not triton.INTERPRETED and torch.version.hip is None  # for HIP the size of a tensor's storage matters too
MOST_OF_32_BITS = 2**31 - 1
STAGES = {"none": ("alone",), "grid": ("team",), "launch": ("statistics", "normalize")}
REFUSAL = "too many blocks in cooperative launch"  # CUDA's error 720: MPS or a green context leaves too little room
REFUSED: set[int] = set()  # the devices that answered so, by index; their plans have two launches instead of a barrier


def _retried_without_barrier(function: Callable[..., Any]) -> Callable[..., Any]:
    """Repeat a call in two launches if the device refuses a cooperative one. The caller's own plan is not replaced."""

    @wraps(function)
    def call(first: Tensor, *arguments: Any, **named: Any) -> Any:
        try:
            return function(first, *arguments, **named)
        except RuntimeError as error:
            if named.get("plan") or REFUSAL not in str(error):
                raise
        REFUSED.add(first.get_device())
        processors.cache_clear()
        launch_for.cache_clear()
        return function(first, *arguments, **named)

    return call


@_retried_without_barrier
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
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """activation(batch_norm(x) + residual), the mean and variance (C) that normalized, and the sign bits.

    x and residual (N, C, *S), dense, in the same layout. Signs: one bit per element if `keep_signs`, else None.
    running: a running mean and variance (C), which are updated in place, and a momentum.
    """
    frozen = statistics is not None
    launch = launch_for(x.shape, x.stride(), x.dtype, x.device, False, frozen, plan)
    y = torch.empty_like(x)
    if statistics is None:  # two allocations take less time than the two halves of one
        mean = x.new_empty(x.size(1), dtype=launch.accumulate)
        var = torch.empty_like(mean)
    else:
        mean, var = statistics
    signs = x.new_empty(sign_bytes(x), dtype=torch.uint8) if keep_signs else None
    running_mean, running_var, momentum = running or (x, x, 0.0)
    launch.run(
        triton.forward,
        (x, _or(residual, x), _or(weight, x), _or(bias, x), y, mean, var, _or(signs, x), running_mean, running_var),
        (float(momentum), launch.unbiased),
        EPS=eps, ACTIVATION=activation, RESIDUAL=residual is not None, WEIGHT=weight is not None, BIAS=bias is not None,
        SIGNS=keep_signs, TRACK=running is not None,
    )  # fmt: skip
    return y, mean, var, signs


@_retried_without_barrier
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
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """dx, dweight (C), dbias (C), dresidual (None unless `residual_gradient`).

    dy, x, residual (N, C, *S), dense, in the same layout; residual only where the activation's gradient needs it and
    there are no signs. frozen: the statistics are constants.
    """
    launch = launch_for(x.shape, x.stride(), x.dtype, x.device, True, frozen, plan)
    channels, accumulate = x.size(1), launch.accumulate
    dx = torch.empty_like(x)
    dr = torch.empty_like(x) if residual_gradient else None
    dweight = x.new_empty(channels, dtype=accumulate if weight is None else weight.dtype)
    dbias = x.new_empty(channels, dtype=accumulate if bias is None else bias.dtype)
    partial = launch.run(
        triton.backward,
        (dy, x, _or(residual, x), _or(weight, x), _or(bias, x), *statistics, _or(signs, x), dx,
         _or(dr, x), dweight, dbias),
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
    kept: dict[tuple[Any, ...], tuple[Any, ...]] = field(default_factory=dict)  # how to start what is compiled

    def run(self, kernel: Any, tensors: tuple[Tensor, ...], numbers: tuple[float, ...], **chosen: Any) -> Tensor:
        """Start the device kernel, once or twice. Returns the partial sums of its programs.

        Memory for what one launch both writes and reads is shared by the calls on the default stream, which are
        sequential. Elsewhere each call gets its own: calls on two streams, or a captured graph and another call, may
        overlap, and a graph owns what its warm-up allocates.
        """
        device = tensors[0].device
        with on(device):
            active = None if triton.INTERPRETED else driver.active
            stream = active.get_current_stream(active.get_current_device()) if active else DEFAULT_STREAM
            shared = stream == DEFAULT_STREAM and self.stages in (STAGES["none"], STAGES["grid"])
            partial = (_shared if shared else torch.empty)(self.partial, dtype=self.accumulate, device=device)
            counters = partial
            if self.plan.barrier == "grid":
                size = (self.plan.teams, COUNTER_STRIDE)
                counters = (_shared if shared else torch.zeros)(size, dtype=torch.int32, device=device)
            for stage in self.stages:
                self._start(kernel, stream, (*tensors, partial, counters), numbers, chosen | {"STAGE": stage})
        return partial

    def _start(
        self, kernel: Any, stream: int, tensors: tuple[Tensor, ...], numbers: tuple[float, ...], chosen: dict[str, Any]
    ) -> None:
        """Launch one stage: the first time through Triton's binder, which takes half of a call's time, then without.

        What the binder tells apart is in the key, but for pointers to no multiple of 16 bytes, which are left to it.
        """
        grid = self.plan.teams * self.plan.team
        addresses = [tensor.data_ptr() for tensor in tensors]
        key = (*chosen.values(), *[tensor.dtype for tensor in tensors])
        keep = COMPILED and math.gcd(16, *addresses) == 16 and not _is_watched(kernel)
        if keep and key in self.kept:
            start, function, packed, constants = self.kept[key]
            no_hooks = (None, None, None)  # no launch metadata either, which is for them
            start(grid, 1, 1, stream, function, packed, *no_hooks, *addresses, *numbers, *self.runtime, *constants)
            return
        named = self.constants | chosen
        found = kernel[(grid,)](
            *tensors, *numbers, *self.runtime, **named, num_warps=self.plan.warps, maxnreg=self.plan.registers,
            num_stages=1, enable_fp_fusion=True, launch_cooperative_grid=chosen["STAGE"] == "team",
        )  # fmt: skip
        if keep:
            constants = [named[name] for name in kernel.arg_names if name in named]
            self.kept[key] = (found.run, found.function, found.packed_metadata, constants)


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
    return Processors(found.multi_processor_count, nvidia and not has_refused(device))


def has_refused(device: torch.device) -> bool:
    """Whether the device has refused a cooperative launch in this process, so that two launches replace it."""
    return device.type == "cuda" and (torch.cuda.current_device() if device.index is None else device.index) in REFUSED


def reciprocal(divisor: int) -> tuple[int, int]:
    """(magic, shift): i // divisor is umulhi(2 i, magic) >> shift for all i < 2**30 (Granlund & Montgomery 1994)."""
    shift = (divisor - 1).bit_length()
    return (1 << (31 + shift)) // divisor + 1, shift


def on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Make the tensor's device the current one, on which kernels start."""
    if device.type != "cuda" or device.index == driver.active.get_current_device():
        return NOTHING
    return torch.cuda.device(device)


def _is_watched(kernel: Any) -> bool:
    """Whether a profiler's hooks or Triton's debugging are on, which are left to Triton's own launch."""
    runtime = knobs.runtime
    hooks = (getattr(hook, "calls", hook) for hook in (runtime.launch_enter_hook, runtime.launch_exit_hook))
    return bool(kernel.pre_run_hooks or runtime.debug or knobs.compilation.instrumentation_mode or any(hooks))


_SHARED: dict[tuple[torch.device, torch.dtype], Tensor] = {}


def _shared(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """At least as many elements of the device's shared memory, zero when it is new. A barrier leaves counters at 0."""
    size, found = math.prod(shape), _SHARED.get((device, dtype))
    if found is None or found.numel() < size:
        found = _SHARED[device, dtype] = torch.zeros(max(size, LEAST_SHARED), dtype=dtype, device=device)
    return found
