"""Fused batch norm: custom operators with their fake kernels and gradients, and their availability.

`bncli::fused_batch_norm` and `bncli::fused_batch_norm_backward` have no side effects, so that torch.compile, autocast,
DDP and CUDA graphs handle them like any other operator. The double backward is composed of torch operators. Saved for
backward are x, mean and var; with a residual and a ReLU also one bit per element, with a residual and SiLU the
residual.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
import os
import sys
from typing import Any

import torch
from torch import Tensor

from bncli import kernels
from bncli.kernels.fused import cpu, double_backward
from bncli.kernels.layout import accumulation, dense, match_layout, sign_bytes
from bncli.kernels.native import update_running_stats
from bncli.names import KERNELS, KINKED_ACTIVATIONS

OLDEST_CAPABILITY = (8, 0)  # the oldest for which Triton supports bfloat16
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def unavailable_reason(device: torch.device | None, interpreted: bool = False) -> str | None:
    """Why the kernel cannot run on `device` (None: on any device of this machine), or None if it can.

    On a GPU it is written in Triton, on a CPU in C, which this call compiles unless it is cached; interpreted: on the
    CPU in Triton's interpreter. Triton decides at its first import, for the whole process, whether it interprets.
    """
    if device is None and not interpreted:
        on_gpu = unavailable_reason(torch.device("cuda")) if torch.cuda.is_available() else ""
        on_cpu = None if on_gpu is None else cpu.unavailable_reason()
        return on_cpu and (f"{on_gpu}; on the CPU {on_cpu}" if on_gpu else on_cpu)
    kind = "cpu" if device is None else device.type
    if interpreted and kind != "cpu":
        return f"Triton's interpreter runs on the CPU, and it was asked to run on {kind}"
    if kind not in KERNELS["fused"].devices:
        return f"it needs a CPU or an NVIDIA GPU, and was asked to run on {kind}"
    if kind == "cpu" and not interpreted:
        return cpu.unavailable_reason()
    if importlib.util.find_spec("triton") is None:
        return "it is written in Triton, which is not installed (pip install triton)"
    if interpreted:
        compiles = "triton" in sys.modules and not is_interpreting()
        advice = "set TRITON_INTERPRET=1 before Python starts"
        return f"Triton was loaded in this process to compile; {advice}" if compiles else None
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_CAPABILITY and torch.version.hip is None:
        name, (major, minor) = torch.cuda.get_device_name(device), capability
        return f"it needs compute capability 8.0 or later, and {name} has {major}.{minor}"
    if is_interpreting():
        return (
            "Triton's interpreter is on in this process, so it cannot compile (TRITON_INTERPRET=1 was set, or the "
            "fused-interpreted kernel has run)"
        )
    return None


def is_interpreting() -> bool:
    """Whether Triton interprets its functions in this process. It decides that when it is first imported."""
    language = sys.modules.get("triton.language")
    if language is None:
        return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")  # as Triton reads it
    return not isinstance(language.sum, sys.modules["triton"].JITFunction)


@functools.cache
def launcher(device: torch.device, interpreted: bool = False) -> Any:
    """The module whose forward and backward run on that device: `cpu` (C) or `triton_launch`.

    The interpreted kernel turns Triton's interpreter on for the whole process. Raises Unavailable with the reason.
    """
    kernels.get("fused-interpreted" if interpreted else "fused", device)
    if device.type == "cpu" and not interpreted:
        return cpu
    if interpreted:
        os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it at its import
    return importlib.import_module("bncli.kernels.fused.triton_launch")


def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None = None,
    activation: str | None = None,
    statistics: tuple[Tensor, Tensor] | None = None,
    running: tuple[Tensor, Tensor, float] | None = None,
    *,
    interpreted: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """A kernel with the arguments and results that bncli.kernels describes.

    interpreted: run the GPU kernel on CPU tensors in Triton's interpreter.

    x is float32, float16, bfloat16 or float64, contiguous or channels last. Other strides are copied to contiguous
    first, and a residual or a gradient in another layout than x is copied to x's. Sums and statistics are float32, for
    float64 float64. Raises TypeError for another dtype, RuntimeError for vectors of another size and for statistics
    that require a gradient, and ValueError for a residual of another shape and for a channel of too many values.
    """
    if residual is None and statistics is None and not interpreted and not torch.compiler.is_compiling() and x.is_cpu:
        node = cpu.node()
        number = cpu.ACTIVATIONS[activation or "none"]
        if node and (results := node(x, weight, bias, *(running or (None, None, 0.0)), eps, number)):
            return results
    if x.dtype not in DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise TypeError(f"the fused kernel takes {names}; x is {str(x.dtype).removeprefix('torch.')}")
    _check_arguments(x, residual, (weight, bias, *(statistics or (None, None)), *(running[:2] if running else ())))
    x = x if x.is_contiguous() else dense(x)
    if residual is not None:
        residual = match_layout(residual.to(x.dtype), x)
    weight = None if weight is None else weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    frozen = None if statistics is None else (statistics[0].contiguous(), statistics[1].contiguous())
    differentiable = torch.is_grad_enabled() and (
        x.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
        or (residual is not None and residual.requires_grad)
    )
    eps, activation = float(eps), activation or "none"
    keep_signs = differentiable and residual is not None and activation in KINKED_ACTIVATIONS
    updated = False
    if not _is_eager(x):
        y, mean, var, _ = forward_operator(
            x, weight, bias, residual, *(frozen or (None, None)), eps, activation, keep_signs, interpreted
        )
        mean, var = mean.detach(), var.detach()
    else:
        updated = running is not None and _updates(x, running, interpreted)
        forward = launcher(x.device, interpreted).forward
        if torch._C._autograd._profiler_enabled():  # torch's profiler would not show the call otherwise
            forward = torch.profiler.record_function("bncli::fused_batch_norm")(forward)
        y, mean, var, signs = forward(
            x, weight, bias, residual, frozen, eps, activation, keep_signs, running=running if updated else None
        )
        if differentiable:
            kept = None if keep_signs or activation == "none" else residual
            options = eps, activation, frozen is not None, interpreted
            y = _apply(x, weight, bias, residual, (y, kept, mean, var, signs if keep_signs else None, options))
    if statistics is not None:
        return y, *statistics
    if running is not None and updated:  # autograd must know that tensors changed which other operators may have saved
        torch.autograd.graph.increment_version(running[:2])
    elif running is not None and x.numel():
        update_running_stats(running, mean, var, x.numel() // x.size(1))
    return y, mean, var


VECTORS = ("weight", "bias", "mean", "variance", "running_mean", "running_var")


def _check_arguments(x: Tensor, residual: Tensor | None, vectors: tuple[Tensor | None, ...]) -> None:
    """Reject wrong sizes and devices, since the kernel reads raw pointers, and gradients that are not implemented."""
    channels, device = x.size(1), x.device
    for place, vector in enumerate(vectors):
        if vector is None:
            continue
        if vector.numel() != channels:
            raise RuntimeError(f"{VECTORS[place]} has {vector.numel()} values; the input has {channels} channels")
        if vector.device != device:
            raise RuntimeError(f"x is on {device}; {VECTORS[place]} is on {vector.device}")
        if place > 1 and vector.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(f"batch norm is not differentiable in {VECTORS[place]}, which requires a gradient")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"a residual of shape {tuple(residual.shape)} for x of shape {tuple(x.shape)}")
    if residual is not None and residual.device != device:
        raise RuntimeError(f"x is on {device}; the residual is on {residual.device}")


def _is_eager(x: Tensor) -> bool:
    """Whether a plain autograd.Function can be used, which takes a third of the time of a dispatched operator.

    False under a compiler, a transform, a trace or a dispatch mode, which must see the operator. The public tests for
    these cost one Python call each, so private ones are used. Raises RuntimeError under torch.func.jvp and
    torch.autograd.forward_ad, whose derivative would be dropped as if it were zero.
    """
    if torch.compiler.is_compiling():
        return False
    if torch.autograd.forward_ad._current_level >= 0:
        raise RuntimeError("the fused kernel has no forward-mode derivative (torch.func.jvp); the native one has")
    watched = torch._C._len_torch_dispatch_stack() or torch._C._get_tracing_state() is not None
    plain = type(x) in (Tensor, torch.nn.Parameter) and x.numel() > 0
    return plain and not watched and not torch._C._are_functorch_transforms_active()


def _updates(x: Tensor, running: tuple[Tensor, Tensor, float], interpreted: bool) -> bool:
    """Whether the kernel itself can update the running statistics, which saves the launches of torch's operators.

    They must be contiguous. The Triton kernel computes in float32, the C kernel in their dtype.
    """
    mean, var, _ = running
    wide = accumulation(x)
    same = wide == torch.float32 if interpreted or x.is_cuda else mean.dtype == var.dtype == wide
    return same and mean.is_contiguous() and var.is_contiguous()


# --- forward ------------------------------------------------------------------------------------------------------


@torch.library.custom_op("bncli::fused_batch_norm", mutates_args=())
def forward_operator(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    frozen_mean: Tensor | None,
    frozen_var: Tensor | None,
    eps: float,
    activation: str,
    keep_signs: bool,
    interpreted: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y like x; the batch's mean and variance (C), empty for frozen statistics; the sign bits, empty unless kept."""
    launch = launcher(x.device, interpreted)
    frozen = None if frozen_mean is None or frozen_var is None else (frozen_mean, frozen_var)
    if x.numel() == 0:
        y, mean, var, signs = _fake_forward(
            x, weight, bias, residual, frozen_mean, frozen_var, eps, activation, keep_signs
        )
        return y, mean.fill_(math.nan), var.fill_(math.nan), signs
    y, mean, var, signs = launch.forward(x, weight, bias, residual, frozen, eps, activation, keep_signs)
    if frozen is not None:
        mean, var = mean.new_empty(0), var.new_empty(0)
    return y, mean, var, x.new_empty(0, dtype=torch.uint8) if signs is None else signs


@forward_operator.register_fake
def _fake_forward(x, weight, bias, residual, frozen_mean, frozen_var, eps, activation, keep_signs, interpreted=False):  # type: ignore[no-untyped-def]
    channels = x.size(1) if frozen_mean is None else 0
    dtype = accumulation(x) if frozen_mean is None else frozen_mean.dtype
    mean, var = x.new_empty(channels, dtype=dtype), x.new_empty(channels, dtype=dtype)
    return torch.empty_like(x), mean, var, x.new_empty(sign_bytes(x) if keep_signs else 0, dtype=torch.uint8)


def setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    """Save what backward needs. The residual is saved only if the pre-activation must be recomputed."""
    x, weight, bias, residual, frozen_mean, frozen_var, eps, activation, keep_signs, interpreted = inputs
    _, mean, var, signs = output
    frozen = frozen_mean is not None
    statistics = (frozen_mean, frozen_var) if frozen else (mean, var)
    kept = None if activation == "none" or keep_signs else residual
    ctx.save_for_backward(x, weight, bias, kept, *statistics, signs if keep_signs else None)
    ctx.options = eps, activation, frozen, interpreted


def backward(ctx, dy: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
    """The gradients of x, weight, bias and residual, and None for the other arguments."""
    if dy is None:
        return (None,) * 10
    x, weight, bias, residual, mean, var, signs = ctx.saved_tensors
    eps, activation, frozen, interpreted = ctx.options
    wanted = ctx.needs_input_grad[3]
    through = wanted and activation != "none"
    dy = match_layout(dy, x)
    if torch.is_grad_enabled() or not _is_eager(dy):
        dx, dweight, dbias, dresidual = backward_operator(
            dy, x, weight, bias, residual, mean, var, signs, eps, activation, frozen, through, interpreted
        )
    else:
        dx, dweight, dbias, dresidual = launcher(x.device, interpreted).backward(
            dy, x, weight, bias, residual, (mean, var), signs, eps, activation, frozen, through
        )
    gradients = dx, None if weight is None else dweight, None if bias is None else dbias
    return *gradients, (dresidual if through else dy) if wanted else None, *(None,) * 6


forward_operator.register_autograd(backward, setup_context=setup_context)


class FusedBatchNorm(torch.autograd.Function):
    """The operator's gradient for the results of a launcher, without the dispatcher.

    They are passed as one tuple, (y, residual, mean, var, signs, options), in which autograd sees no tensors: as
    outputs the mean and variance would cost gradients. With create_graph, backward calls the backward operator.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, residual, results):  # type: ignore[no-untyped-def]
        y, *kept, ctx.options = results
        ctx.save_for_backward(x, weight, bias, *kept)
        ctx.set_materialize_grads(False)
        return y

    backward = staticmethod(backward)


# Function.apply without its handling of torch.func tensors, which `_is_eager` has excluded.
_apply = super(torch.autograd.Function, FusedBatchNorm).apply


# --- backward -----------------------------------------------------------------------------------------------------


@torch.library.custom_op("bncli::fused_batch_norm_backward", mutates_args=())
def backward_operator(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor,
    var: Tensor,
    signs: Tensor | None,
    eps: float,
    activation: str,
    frozen: bool,
    residual_gradient: bool,
    interpreted: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx like x, dweight and dbias (C), dresidual like x or empty (an operator cannot return None)."""
    if x.numel() == 0:
        empty = _fake_backward(
            dy, x, weight, bias, residual, mean, var, signs, eps, activation, frozen, residual_gradient
        )
        return tuple(each.zero_() for each in empty)
    dx, dweight, dbias, dresidual = launcher(x.device, interpreted).backward(
        dy, x, weight, bias, residual, (mean, var), signs, eps, activation, frozen, residual_gradient
    )
    return dx, dweight, dbias, x.new_empty(0) if dresidual is None else dresidual


@backward_operator.register_fake
def _fake_backward(  # type: ignore[no-untyped-def]
    dy, x, weight, bias, residual, mean, var, signs, eps, activation, frozen, residual_gradient, interpreted=False
):
    channels = x.size(1)
    dweight, dbias = (
        x.new_empty(channels, dtype=accumulation(x) if vector is None else vector.dtype) for vector in (weight, bias)
    )
    return torch.empty_like(x), dweight, dbias, torch.empty_like(x) if residual_gradient else x.new_empty(0)


backward_operator.register_autograd(double_backward.backward, setup_context=double_backward.setup_context)
