"""The fused batch norm behind the seam: custom operators, their fake kernels and gradients, and where they can run.

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
from typing import Any

import torch
from torch import Tensor

from bncli.errors import Unavailable
from bncli.kernels.fused import cpu
from bncli.kernels.fused.double_backward import composed_backward
from bncli.kernels.layout import accumulation, dense, like, sign_bytes
from bncli.kernels.running_stats import follow
from bncli.names import KINKED_ACTIVATIONS

OLDEST_CAPABILITY = (8, 0)  # Triton's own lower end for bfloat16
# Whether the GPU's kernel runs on CPU tensors too, in Triton's interpreter: for checking it, never for speed. Triton
# itself reads the variable once, when it is first imported.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
NOTHING = contextlib.nullcontext()
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def why_not(device: torch.device | None) -> str | None:
    """Why the fused kernel cannot run on `device` (None: on no device of this machine), or None where it can.

    On a GPU it is written in Triton, on a CPU in C, which is compiled here if that has not been done yet. With
    TRITON_INTERPRET=1 the GPU's kernel runs on the CPU, in Triton's interpreter.
    """
    if device is None:
        reasons = []
        for name in ["cuda", "cpu"] if torch.cuda.is_available() and not INTERPRETED else ["cpu"]:
            reason = why_not(torch.device(name))
            if reason is None:
                return None
            reasons.append(reason)
        return "; on the CPU ".join(reasons)
    if device.type == "cpu" and not INTERPRETED:
        return cpu.why_not()
    if device.type not in ("cpu", "cuda"):
        return f"it needs a CPU or an NVIDIA GPU, and was asked to run on {device.type}"
    if importlib.util.find_spec("triton") is None:
        return "it is written in Triton, which is not installed (pip install triton)"
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < OLDEST_CAPABILITY and torch.version.hip is None:
            name, (major, minor) = torch.cuda.get_device_name(device), capability
            return f"it needs compute capability 8.0 or later, and {name} has {major}.{minor}"
    elif not getattr(sys.modules.get("bncli.kernels.fused.triton"), "INTERPRETED", True):
        return "Triton was loaded before TRITON_INTERPRET=1 was set; set it before Python starts"
    return None


def _launchers(x: Tensor) -> Any:
    """The module whose forward and backward run on x: Triton's, or what calls the C file."""
    if x.is_cpu and not INTERPRETED:
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
    *,
    running: tuple[Tensor, Tensor, float] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The kernels' seam (see bncli.kernels): y, and the mean and variance (C) that were used, without gradient.

    running: a running mean and variance (C) and a momentum, by which they move in place; the kernel does that itself
    where the launches of its own would cost as much as a small batch norm.

    float32, float16, bfloat16 or float64; contiguous or channels last. Other strides are copied to contiguous first,
    and a residual or a gradient that lies otherwise than x is copied to x's layout. Sums and statistics are float32,
    of float64 float64. Raises TypeError for another dtype, and ValueError for sizes that disagree or a channel too
    long to count, and RuntimeError for statistics that require a gradient.
    """
    if x.dtype not in DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise TypeError(f"the fused kernel takes {names}; x is {str(x.dtype).removeprefix('torch.')}")
    _check(x, weight, bias, residual, statistics, running)
    x = dense(x)
    if residual is not None:
        residual = like(residual.to(x.dtype), x)
    weight = None if weight is None else weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    keep_signs = (
        residual is not None and activation in KINKED_ACTIVATIONS and _differentiable(x, weight, bias, residual)
    )
    given_mean, given_var = (each.contiguous() for each in statistics) if statistics is not None else (None, None)
    others = (given_mean, given_var, float(eps), activation or "none", keep_signs)
    inside = None
    if _eager(x):
        inside = running if running is not None and _movable(x, running) else None
        if _differentiable(x, weight, bias, residual):
            found: list[Tensor] = []
            y = _apply(x, weight, bias, residual, (*others, inside), found)
            mean, var = found
        else:  # where nothing else would show in a profile, it does so under the operator's name
            seen = torch._C._autograd._profiler_enabled()
            with torch.profiler.record_function("bncli::fused_batch_norm") if seen else NOTHING:
                y, mean, var, _ = _run(x, weight, bias, residual, *others, inside)
    else:
        _check_transforms()
        y, mean, var, _ = _forward(x, weight, bias, residual, *others)
        mean, var = mean.detach(), var.detach()
    if statistics is not None:
        return y, *statistics
    if running is not None and inside is None:
        running_mean, running_var, momentum = running
        follow(running_mean, running_var, mean, var, x.numel() // x.size(1), momentum)
    return y, mean, var


def _differentiable(*inputs: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in inputs)


def _check(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    statistics: tuple[Tensor, Tensor] | None,
    running: tuple[Tensor, Tensor, float] | None,
) -> None:
    """The kernel follows pointers: what does not fit is refused here. A gradient that it cannot give, too."""
    channels = x.size(1)
    for vector in (weight, bias):
        if vector is not None and vector.numel() != channels:
            raise ValueError(f"a vector of {vector.numel()} values for {channels} channels")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"a residual of shape {tuple(residual.shape)} for x of shape {tuple(x.shape)}")
    for constant in statistics or ():
        _check_constant(constant, channels)
    if running is not None:
        _check_constant(running[0], channels)
        _check_constant(running[1], channels)


def _check_constant(vector: Tensor, channels: int) -> None:
    if vector.numel() != channels:
        raise ValueError(f"a vector of {vector.numel()} values for {channels} channels")
    if vector.requires_grad and torch.is_grad_enabled():
        raise RuntimeError("batch norm is not differentiable in given or running statistics; one requires a gradient")


def _check_transforms() -> None:
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        levels = torch._C._functorch.get_interpreter_stack() or ()
        if any(level.key() == torch._C._functorch.TransformType.Jvp for level in levels):
            raise RuntimeError("the fused kernel has no forward-mode derivative (torch.func.jvp); the native one has")


def _eager(x: Tensor) -> bool:
    """Whether plain autograd will do, which costs a third of an operator's way through the dispatcher.

    Not under a compiler, a transform, a trace or a dispatch mode: they must see an operator.
    """
    if type(x) not in (Tensor, torch.nn.Parameter) or x.numel() == 0 or torch.compiler.is_compiling():
        return False
    watched = torch._C._len_torch_dispatch_stack() > 0 or torch._C._get_tracing_state() is not None
    return not watched and not torch._C._are_functorch_transforms_active()


def _movable(x: Tensor, running: tuple[Tensor, Tensor, float]) -> bool:
    """Whether the kernel can move these: it expects no gaps, counts in float32 on a GPU, and in C in theirs alone."""
    mean, var, _ = running
    wide = accumulation(x)
    counts = wide == torch.float32 if x.is_cuda or INTERPRETED else mean.dtype == var.dtype == wide
    return counts and mean.is_contiguous() and var.is_contiguous()


# --- forward ------------------------------------------------------------------------------------------------------


@torch.library.custom_op("bncli::fused_batch_norm", mutates_args=())
def _forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    given_mean: Tensor | None,
    given_var: Tensor | None,
    eps: float,
    activation: str,
    keep_signs: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y like x; the batch's mean and variance (C), empty where they are given; the signs in bits, empty unless kept."""
    if reason := why_not(x.device):
        raise Unavailable(f"the fused kernel cannot run: {reason}")
    statistics = None if given_mean is None or given_var is None else (given_mean, given_var)
    if x.numel() == 0:
        y, mean, var, signs = _forward_fake(
            x, weight, bias, residual, given_mean, given_var, eps, activation, keep_signs
        )
        return y, mean.fill_(float("nan")), var.fill_(float("nan")), signs
    y, mean, var, signs = _launchers(x).forward(x, weight, bias, residual, statistics, eps, activation, keep_signs)
    if signs is None:
        signs = x.new_empty(0, dtype=torch.uint8)
    return (y, mean, var, signs) if statistics is None else (y, mean.new_empty(0), var.new_empty(0), signs)


@_forward.register_fake
def _forward_fake(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    given_mean: Tensor | None,
    given_var: Tensor | None,
    eps: float,
    activation: str,
    keep_signs: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    channels = x.size(1) if given_mean is None else 0
    dtype = accumulation(x) if given_mean is None else given_mean.dtype
    mean, var = x.new_empty(channels, dtype=dtype), x.new_empty(channels, dtype=dtype)
    return torch.empty_like(x), mean, var, x.new_empty(sign_bytes(x) if keep_signs else 0, dtype=torch.uint8)


def _remember(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, weight, bias, residual, given_mean, given_var, eps, activation, keep_signs = inputs
    _, mean, var, signs = output
    mean, var = (mean, var) if given_mean is None else (given_mean, given_var)
    again = None if activation == "none" or keep_signs else residual  # the pre-activation is computed again
    ctx.save_for_backward(x, weight, bias, again, mean, var, signs if keep_signs else None)
    ctx.asked = eps, activation, given_mean is not None, residual is not None


def _differentiate(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
    """The gradients of x, weight, bias and residual."""
    x, weight, bias, residual, mean, var, signs = ctx.saved_tensors
    eps, activation, given, has_residual = ctx.asked
    wanted = has_residual and ctx.needs_input_grad[3]
    through = wanted and activation != "none"
    dy = like(dy, x)
    if torch.is_grad_enabled() or not _eager(dy):
        dx, dweight, dbias, dresidual = _backward(
            dy, x, weight, bias, residual, mean, var, signs, eps, activation, given, through
        )
    else:
        dx, dweight, dbias, dresidual = _launchers(x).backward(
            dy, x, weight, bias, residual, (mean, var), signs, eps, activation, given, through
        )
    if activation == "none":
        dresidual = dy
    return dx, None if weight is None else dweight, None if bias is None else dbias, dresidual if wanted else None


_forward.register_autograd(lambda ctx, dy, *_: (*_differentiate(ctx, dy), *(None,) * 5), setup_context=_remember)


def _run(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    given_mean: Tensor | None,
    given_var: Tensor | None,
    eps: float,
    activation: str,
    keep_signs: bool,
    running: tuple[Tensor, Tensor, float] | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """y, the mean and variance that were used, the signs if they are kept; nothing for autograd. Moves `running`."""
    given = None if given_mean is None else (given_mean, given_var)
    found: tuple[Tensor, Tensor, Tensor, Tensor | None] = _launchers(x).forward(
        x, weight, bias, residual, given, eps, activation, keep_signs, running=running
    )
    if running is not None:  # who saved them for a backward of their own must learn that they moved
        torch.autograd.graph.increment_version(running[:2])
    return found


class Eager(torch.autograd.Function):
    """The same without the dispatcher. Where backward is to be differentiated itself, it is the operator again.

    `asked` holds the operator's other arguments and (a mean, a variance, a momentum) to move, or None. `statistics`, a
    list, takes the mean and variance that were used: as outputs they would cost gradients of their own.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, residual, asked, statistics):  # type: ignore[no-untyped-def]
        output = _run(x, weight, bias, residual, *asked)
        _remember(ctx, (x, weight, bias, residual, *asked[:-1]), output)
        ctx.set_materialize_grads(False)
        statistics += output[1:3]
        return output[0]

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        return (None,) * 6 if dy is None else (*_differentiate(ctx, dy), None, None)


# Function.apply itself, without what it does first for tensors of torch.func: `_eager` has seen that there are none.
_apply = super(torch.autograd.Function, Eager).apply


# --- backward -----------------------------------------------------------------------------------------------------


@torch.library.custom_op("bncli::fused_batch_norm_backward", mutates_args=())
def _backward(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx like x, dweight and dbias (C), dresidual like x or empty: an operator returns tensors alone."""
    if x.numel() == 0:
        return tuple(
            each.zero_()
            for each in _backward_fake(
                dy, x, weight, bias, residual, mean, var, signs, eps, activation, given, residual_gradient
            )
        )
    dx, dweight, dbias, dresidual = _launchers(x).backward(
        dy, x, weight, bias, residual, (mean, var), signs, eps, activation, given, residual_gradient
    )
    return dx, dweight, dbias, x.new_empty(0) if dresidual is None else dresidual


@_backward.register_fake
def _backward_fake(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    channels = x.size(1)
    dweight, dbias = (
        x.new_empty(channels, dtype=accumulation(x) if vector is None else vector.dtype) for vector in (weight, bias)
    )
    return torch.empty_like(x), dweight, dbias, torch.empty_like(x) if residual_gradient else x.new_empty(0)


# --- the gradient of backward -------------------------------------------------------------------------------------


def _remember_backward(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    dy, x, weight, bias, residual, mean, var, signs, eps, activation, given, _ = inputs
    ctx.save_for_backward(dy, x, weight, bias, residual, mean, var, signs)
    ctx.eps, ctx.activation, ctx.given = eps, activation, given


def _differentiate_twice(ctx, *upstream):  # type: ignore[no-untyped-def]
    """The exact second derivative: torch's own, of `composed_backward`; differentiable in turn where that is asked.

    Then of views, in which the inputs are apart: dy may itself come from x.
    """
    dy, x, weight, bias, residual, mean, var, signs = ctx.saved_tensors
    again = torch.is_grad_enabled()
    inputs = [
        None if each is None else each.view_as(each) if again and each.requires_grad else each.detach().requires_grad_()
        for each in (dy, x, weight, bias, residual)
    ]
    with torch.enable_grad():
        outputs = composed_backward(*inputs, (mean, var) if ctx.given else None, signs, ctx.eps, ctx.activation)
        pairs = [
            (output, gradient.to(output.dtype))
            for output, gradient in zip(outputs, upstream, strict=True)
            if gradient is not None and gradient.numel() == output.numel() and output.requires_grad
        ]
        found = torch.autograd.grad(
            [output for output, _ in pairs],
            [each for each in inputs if each is not None],
            [gradient for _, gradient in pairs],
            allow_unused=True,
            create_graph=again,
        )
    gradients = iter(found)
    return (*(None if each is None else next(gradients) for each in inputs), *(None,) * 7)


_backward.register_autograd(_differentiate_twice, setup_context=_remember_backward)
