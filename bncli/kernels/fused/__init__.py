"""The fused batch norm: custom operators with their fake kernels and gradients, and where they can run.

Two operators without side effects, so that torch.compile, autocast, DDP and CUDA graphs take them as they take any
other: `bncli::fused_batch_norm` and `bncli::fused_batch_norm_backward`, the gradient of the first. The second's own
gradient is composed of torch's operators. Saved for backward: x, mean and var; with a residual and a relu also a bit
an element, with a residual and silu the residual.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bncli import kernels
from bncli.kernels.fused import cpu, double_backward
from bncli.kernels.layout import accumulation, dense, match_layout, sign_bytes
from bncli.kernels.native import update_running_stats
from bncli.names import KERNELS, KINKED_ACTIVATIONS

OLDEST_CAPABILITY = (8, 0)  # Triton's own lower end for bfloat16
NOTHING = contextlib.nullcontext()
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
WITHOUT_TRITON = "it is written in Triton, which is not installed (pip install triton)"


def unavailable_reason(device: torch.device | None) -> str | None:
    """Why the fused kernel cannot run on `device` (None: on no device of this machine), or None where it can.

    On a GPU it is written in Triton, on a CPU in C, which is compiled here if that has not been done yet.
    """
    if device is None:
        on_gpu = unavailable_reason(torch.device("cuda")) if torch.cuda.is_available() else ""
        on_cpu = None if on_gpu is None else cpu.unavailable_reason()
        return on_cpu and (f"{on_gpu}; on the CPU {on_cpu}" if on_gpu else on_cpu)
    if device.type not in KERNELS["fused"].devices:
        return f"it needs a CPU or an NVIDIA GPU, and was asked to run on {device.type}"
    if device.type == "cpu":
        return cpu.unavailable_reason()
    if importlib.util.find_spec("triton") is None:
        return WITHOUT_TRITON
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_CAPABILITY and torch.version.hip is None:
        name, (major, minor) = torch.cuda.get_device_name(device), capability
        return f"it needs compute capability 8.0 or later, and {name} has {major}.{minor}"
    if is_interpreting():
        return (
            "Triton interprets in this process and compiles nothing (TRITON_INTERPRET=1 was set, or the "
            "fused-interpreted kernel was asked for)"
        )
    return None


def is_interpreting() -> bool:
    """Whether Triton's functions are interpreted in this process, or will be: settled when it is first imported."""
    language = sys.modules.get("triton.language")
    if language is None:
        return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")  # as Triton reads it
    return not isinstance(language.sum, sys.modules["triton"].JITFunction)


class Options(NamedTuple):
    """What one call asks for besides its tensors."""

    eps: float
    activation: str  # of FUSED_ACTIVATIONS, or "none"
    keep_signs: bool  # the signs of the pre-activation are saved, a bit each, and not the residual
    interpreted: bool  # on the CPU by Triton's interpreter, not in C

    def launcher(self, x: Tensor) -> Any:
        """The module whose forward and backward run on x: what calls the C file, or what starts Triton's kernels."""
        if x.is_cpu and not self.interpreted:
            return cpu
        from bncli.kernels.fused import triton_launch

        return triton_launch


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
    """A kernel as bncli.kernels describes it: y, and the mean and variance (C) that were used, without gradient.

    The running statistics move in the kernel itself where the launches of a move would cost as much as a small batch
    norm. interpreted: on CPU tensors, by the GPU's kernel in Triton's interpreter.

    float32, float16, bfloat16 or float64; contiguous or channels last. Other strides are copied to contiguous first,
    and a residual or a gradient that lies otherwise than x is copied to x's layout. Sums and statistics are float32,
    of float64 float64. Raises TypeError for another dtype, and ValueError for sizes that disagree or a channel too
    long to count, and RuntimeError for statistics that require a gradient.
    """
    if x.dtype not in DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise TypeError(f"the fused kernel takes {names}; x is {str(x.dtype).removeprefix('torch.')}")
    _check(x, weight, bias, residual, (*(statistics or ()), *(running[:2] if running is not None else ())))
    if not x.is_contiguous():
        x = dense(x)
    if residual is not None:
        residual = match_layout(residual.to(x.dtype), x)
    weight = None if weight is None else weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    given = None if statistics is None else (statistics[0].contiguous(), statistics[1].contiguous())
    differentiable = torch.is_grad_enabled() and (
        x.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
        or (residual is not None and residual.requires_grad)
    )
    keep_signs = differentiable and residual is not None and activation in KINKED_ACTIVATIONS
    options = Options(float(eps), activation or "none", keep_signs, interpreted)
    updated = False
    if not _is_eager(x):
        _refuse_forward_mode()
        y, mean, var, _ = forward_operator(x, weight, bias, residual, *(given or (None, None)), *options)
        mean, var = mean.detach(), var.detach()
    else:
        updated = running is not None and _updates(x, running, interpreted)
        inside = running if updated else None
        if differentiable:
            used: list[Tensor] = []
            y = _apply(x, weight, bias, residual, given, options, inside, used)
            mean, var = used
        else:  # where nothing else would show in a profile, it does so under the operator's name
            profiled = torch._C._autograd._profiler_enabled()  # torch.autograd's own name for it is private too
            with torch.profiler.record_function("bncli::fused_batch_norm") if profiled else NOTHING:
                y, mean, var, _ = options.launcher(x).forward(
                    x, weight, bias, residual, given, options.eps, options.activation, keep_signs, running=inside
                )
    if statistics is not None:
        return y, *statistics
    if updated:  # who saved them for a backward of their own must learn that they moved
        assert running is not None
        torch.autograd.graph.increment_version(running[:2])
    elif running is not None and x.numel():
        update_running_stats(running, mean, var, x.numel() // x.size(1))
    return y, mean, var


def _check(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    constants: tuple[Tensor, ...],
) -> None:
    """The kernel follows pointers: what does not fit is refused here. A gradient that it cannot give, too."""
    channels = x.size(1)
    for vector in (weight, bias, *constants):
        if vector is not None and vector.numel() != channels:
            raise ValueError(f"a vector of {vector.numel()} values for {channels} channels")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"a residual of shape {tuple(residual.shape)} for x of shape {tuple(x.shape)}")
    for constant in constants:
        if constant.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                "batch norm is not differentiable in given or running statistics; one requires a gradient"
            )


# torch has no public way to ask for a dispatch mode, a trace or a transform without a Python call for each.


def _is_eager(x: Tensor) -> bool:
    """Whether plain autograd will do, which costs a third of an operator's way through the dispatcher.

    Not under a compiler, a transform, a trace or a dispatch mode: they must see an operator.
    """
    if type(x) not in (Tensor, torch.nn.Parameter) or x.numel() == 0 or torch.compiler.is_dynamo_compiling():
        return False
    watched = torch._C._len_torch_dispatch_stack() > 0 or torch._C._get_tracing_state() is not None
    return not watched and not torch._C._are_functorch_transforms_active()


def _refuse_forward_mode() -> None:
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        levels = torch._C._functorch.get_interpreter_stack() or ()
        if any(level.key() == torch._C._functorch.TransformType.Jvp for level in levels):
            raise RuntimeError("the fused kernel has no forward-mode derivative (torch.func.jvp); the native one has")


def _updates(x: Tensor, running: tuple[Tensor, Tensor, float], interpreted: bool) -> bool:
    """Whether the kernel can move these: it expects no gaps, counts in float32 on a GPU, and in C in theirs alone."""
    mean, var, _ = running
    wide = accumulation(x)
    counts = wide == torch.float32 if interpreted or x.is_cuda else mean.dtype == var.dtype == wide
    return counts and mean.is_contiguous() and var.is_contiguous()


# --- forward ------------------------------------------------------------------------------------------------------


@torch.library.custom_op("bncli::fused_batch_norm", mutates_args=())
def forward_operator(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    given_mean: Tensor | None,
    given_var: Tensor | None,
    eps: float,
    activation: str,
    keep_signs: bool,
    interpreted: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y like x; the batch's mean and variance (C), empty where they are given; the signs in bits, empty unless kept."""
    kernels.get("fused-interpreted" if interpreted else "fused", x.device)
    options = Options(eps, activation, keep_signs, interpreted)
    given = None if given_mean is None or given_var is None else (given_mean, given_var)
    if x.numel() == 0:
        y, mean, var, signs = _fake_forward(x, weight, bias, residual, given_mean, given_var, *options)
        return y, mean.fill_(float("nan")), var.fill_(float("nan")), signs
    y, mean, var, signs = options.launcher(x).forward(x, weight, bias, residual, given, eps, activation, keep_signs)
    if given is not None:
        mean, var = mean.new_empty(0), var.new_empty(0)
    return y, mean, var, x.new_empty(0, dtype=torch.uint8) if signs is None else signs


@forward_operator.register_fake
def _fake_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    given_mean: Tensor | None,
    given_var: Tensor | None,
    eps: float,
    activation: str,
    keep_signs: bool,
    interpreted: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    channels = x.size(1) if given_mean is None else 0
    dtype = accumulation(x) if given_mean is None else given_mean.dtype
    mean, var = x.new_empty(channels, dtype=dtype), x.new_empty(channels, dtype=dtype)
    return torch.empty_like(x), mean, var, x.new_empty(sign_bytes(x) if keep_signs else 0, dtype=torch.uint8)


def setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, weight, bias, residual, given_mean, given_var, *options = inputs
    _, mean, var, signs = output
    given = None if given_mean is None else (given_mean, given_var)
    _save(ctx, x, weight, bias, residual, given, mean, var, signs, Options(*options))


def _save(  # type: ignore[no-untyped-def]
    ctx,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    given: tuple[Tensor, Tensor] | None,
    mean: Tensor,
    var: Tensor,
    signs: Tensor | None,
    options: Options,
) -> None:
    """What backward needs. The residual only where the pre-activation is computed again, of which no signs are kept."""
    mean, var = given or (mean, var)
    again = None if options.activation == "none" or options.keep_signs else residual
    ctx.save_for_backward(x, weight, bias, again, mean, var, signs if options.keep_signs else None)
    ctx.options, ctx.given, ctx.has_residual = options, given is not None, residual is not None


def gradients(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
    """Those of x, weight, bias and residual."""
    x, weight, bias, residual, mean, var, signs = ctx.saved_tensors
    eps, activation, _, interpreted = options = ctx.options
    wanted = ctx.has_residual and ctx.needs_input_grad[3]
    through = wanted and activation != "none"
    dy = match_layout(dy, x)
    if torch.is_grad_enabled() or not _is_eager(dy):
        dx, dweight, dbias, dresidual = backward_operator(
            dy, x, weight, bias, residual, mean, var, signs, eps, activation, ctx.given, through, interpreted
        )
    else:
        dx, dweight, dbias, dresidual = options.launcher(x).backward(
            dy, x, weight, bias, residual, (mean, var), signs, eps, activation, ctx.given, through
        )
    if activation == "none":
        dresidual = dy
    return dx, None if weight is None else dweight, None if bias is None else dbias, dresidual if wanted else None


def backward(ctx, dy: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
    return (*gradients(ctx, dy), *(None,) * 6)


forward_operator.register_autograd(backward, setup_context=setup_context)


class Eager(torch.autograd.Function):
    """The same without the dispatcher. Where backward is to be differentiated itself, it is the operator again.

    `used`, a list, takes the mean and variance that were used: as outputs they would cost gradients of their own.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, residual, given, options, running, used):  # type: ignore[no-untyped-def]
        y, mean, var, signs = options.launcher(x).forward(
            x, weight, bias, residual, given, options.eps, options.activation, options.keep_signs, running=running
        )
        _save(ctx, x, weight, bias, residual, given, mean, var, signs, options)
        ctx.set_materialize_grads(False)
        used += mean, var
        return y

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        return (None,) * 8 if dy is None else (*gradients(ctx, dy), None, None, None, None)


# Function.apply itself, without what it does first for tensors of torch.func: `_is_eager` has seen that there are none.
_apply = super(torch.autograd.Function, Eager).apply


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
    given: bool,
    residual_gradient: bool,
    interpreted: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx like x, dweight and dbias (C), dresidual like x or empty: an operator returns tensors alone."""
    if x.numel() == 0:
        return tuple(
            each.zero_()
            for each in _fake_backward(
                dy, x, weight, bias, residual, mean, var, signs, eps, activation, given, residual_gradient
            )
        )
    dx, dweight, dbias, dresidual = (
        Options(eps, activation, signs is not None, interpreted)
        .launcher(x)
        .backward(dy, x, weight, bias, residual, (mean, var), signs, eps, activation, given, residual_gradient)
    )
    return dx, dweight, dbias, x.new_empty(0) if dresidual is None else dresidual


@backward_operator.register_fake
def _fake_backward(
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
    given: bool,
    residual_gradient: bool,
    interpreted: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    channels = x.size(1)
    dweight, dbias = (
        x.new_empty(channels, dtype=accumulation(x) if vector is None else vector.dtype) for vector in (weight, bias)
    )
    return torch.empty_like(x), dweight, dbias, torch.empty_like(x) if residual_gradient else x.new_empty(0)


backward_operator.register_autograd(double_backward.backward, setup_context=double_backward.setup_context)
