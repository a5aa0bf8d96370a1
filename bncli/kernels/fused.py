"""The fused batch norm behind the seam: custom operators, their fake kernels and gradients, and where they can run.

Two operators without side effects, so that torch.compile, autocast, DDP and CUDA graphs take them as they take any
other: `bncli::fused_batch_norm` and `bncli::fused_batch_norm_backward`, the gradient of the first. The second's own
gradient is composed of torch's operators. Saved for backward: x, mean and var; with a residual and a relu also a bit
an element, with a residual and silu the residual.
"""

from __future__ import annotations

import importlib.util
import os
import sys

import torch
from torch import Tensor

from bncli.errors import Unavailable
from bncli.kernels.composed import SIGN_IS_ENOUGH, composed_backward
from bncli.kernels.layout import accumulation, dense, like, sign_bytes
from bncli.kernels.running import follow

OLDEST_CAPABILITY = (8, 0)  # Triton's own lower end for bfloat16
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def why_not(device: torch.device | None) -> str | None:
    """Why the fused kernel cannot run on `device` (None: anywhere on this machine), or None where it can.

    On a CPU it runs in Triton's interpreter alone, which TRITON_INTERPRET=1 asks for: right, and far too slow to train.
    """
    if importlib.util.find_spec("triton") is None:
        return "it is written in Triton, which is not installed (pip install triton)"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if interpreted and not getattr(sys.modules.get("bncli.kernels.fused_cuda"), "INTERPRETED", True):
        return "Triton was loaded before TRITON_INTERPRET=1 was set; set it before Python starts"
    if device is None:
        return None if interpreted or torch.cuda.is_available() else "it needs an NVIDIA GPU, and torch sees none here"
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < OLDEST_CAPABILITY and torch.version.hip is None:
            name, (major, minor) = torch.cuda.get_device_name(device), capability
            return f"it needs compute capability 8.0 or later, and {name} has {major}.{minor}"
        return None
    if device.type == "cpu" and interpreted:
        return None
    return f"it needs an NVIDIA GPU, and was asked to run on {device.type}"


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
    weight, bias = (None if vector is None else vector.contiguous() for vector in (weight, bias))
    inputs = [tensor for tensor in (x, weight, bias, residual) if tensor is not None]
    differentiable = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    keep_signs = differentiable and residual is not None and activation in SIGN_IS_ENOUGH
    given_mean, given_var = (each.contiguous() for each in statistics) if statistics is not None else (None, None)
    arguments = (x, weight, bias, residual, given_mean, given_var, float(eps), activation or "none", keep_signs)
    eager = _eager(x)
    inside = running if running is not None and eager and _movable(x, running) else None
    if eager:
        y, mean, var = Eager.apply(*arguments, inside)
    else:
        y, mean, var, _ = _forward(*arguments)
    if statistics is not None:
        return y, *statistics
    if running is not None and inside is None:
        running_mean, running_var, momentum = running
        follow(running_mean, running_var, mean.detach(), var.detach(), x.numel() // x.size(1), momentum)
    return y, mean.detach(), var.detach()


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
    constants = (*(statistics or ()), *(running or ())[:2])
    for vector in (weight, bias, *constants):
        if vector is not None and vector.numel() != channels:
            raise ValueError(f"a vector of {vector.numel()} values for {channels} channels")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"a residual of shape {tuple(residual.shape)} for x of shape {tuple(x.shape)}")
    if torch.is_grad_enabled() and any(vector.requires_grad for vector in constants):
        raise RuntimeError("batch norm is not differentiable in given or running statistics; one requires a gradient")
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
    """Whether the kernel can move these: it counts in float32, and expects no gaps."""
    mean, var, _ = running
    return accumulation(x) == torch.float32 and mean.is_contiguous() and var.is_contiguous()


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
    from bncli.kernels import fused_launch

    if reason := why_not(x.device):
        raise Unavailable(f"the fused kernel cannot run: {reason}")
    statistics = None if given_mean is None or given_var is None else (given_mean, given_var)
    if x.numel() == 0:
        y, mean, var, signs = _forward_fake(
            x, weight, bias, residual, given_mean, given_var, eps, activation, keep_signs
        )
        return y, mean.fill_(float("nan")), var.fill_(float("nan")), signs
    y, mean, var, signs = fused_launch.forward(x, weight, bias, residual, statistics, eps, activation, keep_signs)
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
    ctx.eps, ctx.activation, ctx.given = eps, activation, given_mean is not None
    ctx.has_residual = residual is not None


def _differentiate(ctx, dy: Tensor, *_):  # type: ignore[no-untyped-def]
    x, weight, bias, residual, mean, var, signs = ctx.saved_tensors
    through = ctx.has_residual and ctx.activation != "none" and ctx.needs_input_grad[3]
    run = _backward if torch.is_grad_enabled() or not _eager(dy) else _run_backward
    dx, dweight, dbias, dresidual = run(
        like(dy, x), x, weight, bias, residual, mean, var, signs, ctx.eps, ctx.activation, ctx.given, through
    )
    if ctx.activation == "none":
        dresidual = dy
    return (
        dx,
        None if weight is None else dweight,
        None if bias is None else dbias,
        dresidual if ctx.has_residual and ctx.needs_input_grad[3] else None,
        *(None,) * 5,
    )


_forward.register_autograd(_differentiate, setup_context=_remember)


class Eager(torch.autograd.Function):
    """The same without the dispatcher. Where backward is to be differentiated itself, it is the operator again."""

    @staticmethod
    def forward(ctx, *arguments):  # type: ignore[no-untyped-def]
        from bncli.kernels import fused_launch

        *inputs, running = arguments
        x, weight, bias, residual, given_mean, given_var, eps, activation, keep_signs = inputs
        statistics = None if given_mean is None else (given_mean, given_var)
        output = fused_launch.forward(
            x, weight, bias, residual, statistics, eps, activation, keep_signs, running=running
        )
        if running is not None:  # who saved them for a backward of their own must learn that they moved
            torch.autograd.graph.increment_version(running[:2])
        _remember(ctx, inputs, output)
        y, mean, var, _ = output
        ctx.mark_non_differentiable(mean, var)
        return y, mean, var

    @staticmethod
    def backward(ctx, dy, *_):  # type: ignore[no-untyped-def]
        return (*_differentiate(ctx, dy), None)


# --- backward -----------------------------------------------------------------------------------------------------


def _run_backward(
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
    """dx like x, dweight and dbias (C), dresidual like x or empty."""
    from bncli.kernels import fused_launch

    if x.numel() == 0:
        return tuple(
            each.zero_()
            for each in _backward_fake(
                dy, x, weight, bias, residual, mean, var, signs, eps, activation, given, residual_gradient
            )
        )
    return fused_launch.backward(
        dy, x, weight, bias, residual, (mean, var), signs, eps, activation, given, residual_gradient
    )


_backward = torch.library.custom_op("bncli::fused_batch_norm_backward", _run_backward, mutates_args=())


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
