"""Kernels by name: torch's, bncli's, those of other packages, and the user's function; and what runs behind each name.

Other packages are imported when they are asked for. One that is not installed, or does not take a case, says why.
"""

from __future__ import annotations

import contextlib
import importlib
import io
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bncli import kernels
from bncli.errors import Unavailable
from bncli.kernels import native
from bncli.kernels.definition import Forward
from bncli.kernels.fused import cpu
from bncli.kernels.fused.tiling import Plan
from bncli.kernels.layout import dense
from bncli.measure.profile.timed_kernels import Source, TimedKernel
from bncli.measure.reference import candidate as reference
from bncli.measure.reference.candidate import NATIVE, by_name, compiled
from bncli.measure.reference.case import Case, with_layout
from bncli.names import ACTIVATIONS, PROFILE_KERNELS, check_kernel


def sources(names: Sequence[str], device: torch.device, allow_code: bool) -> dict[str, Source]:
    """Kernel -> its source. Raises UsageError for an unknown name or a function that is missing.

    Names: those of PROFILE_KERNELS, or the user's package.module:function (with allow_code). Whether a kernel can run
    is found out case by case, so that the others' rows stand.
    """
    for name in names:
        check_kernel(name, PROFILE_KERNELS, allow_code)
    return {name: _source(name, device, allow_code) for name in dict.fromkeys(names)}


def _source(name: str, device: torch.device, allow_code: bool) -> Source:
    if ":" in name:
        user_function = reference.candidate(name, "batch", device, allow_code)
        return lambda case: TimedKernel(case, _completed(user_function, case))
    if name in PEERS:
        return lambda case: PEERS[name](case, device)
    if name == "compiled":
        return lambda case: TimedKernel(case, compiled(NATIVE), ran(case, name, device), compiles=True)

    def run_by_name(case: Case) -> TimedKernel:
        kernels.get(name, device)
        return TimedKernel(case, by_name(name), lambda: ran(case, name, device))

    return run_by_name


def _completed(function: reference.Candidate, case: Case) -> Forward:
    """The user's function; where it takes no residual and no activation, torch's operators follow it."""
    if case.mode == "eval" and not function.evaluates:
        raise Unavailable("the function takes no statistics, so it has no evaluation mode")
    if function.fuses:
        return function.call

    def call(*arguments: Any) -> Tensor:
        *others, residual, activation = arguments
        return native.finish(function.call(*others, None, None), residual, activation)

    return call


# --- other packages ---------------------------------------------------------------------------------------------------


def _imported(name: str, module: str, install: str) -> Any:
    """Raises Unavailable where the package is missing, or breaks when it is imported."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # some print why they are of no use
            return importlib.import_module(module)
    except Exception as error:  # also a compiled extension that does not fit this torch
        if isinstance(error, ModuleNotFoundError) and error.name == module.split(".")[0]:
            raise Unavailable(f"not installed ({install})") from error
        kind = "" if isinstance(error, ModuleNotFoundError) else f"{type(error).__name__}: "
        raise Unavailable(f"{name} cannot be imported: {kind}{(str(error).splitlines() or [''])[0][:200]}") from error


def _only(name: str, **claims: bool) -> None:
    """Raises Unavailable naming what does not hold; a claim's underscores stand for spaces."""
    missing = [claim.replace("_", " ") for claim, holds in claims.items() if not holds]
    if missing:
        raise Unavailable(f"{name} takes {', '.join(missing)} only")


def apex(case: Case, device: torch.device) -> TimedKernel:
    """NVIDIA apex, contrib.groupbn: batch norm, batch norm + ReLU and batch norm + add + ReLU of float16 NHWC."""
    module = _imported("apex", "apex.contrib.groupbn", "build github.com/NVIDIA/apex with its option for bnp")
    if not hasattr(module, "BatchNorm2d_NHWC"):
        raise Unavailable("apex was built without contrib.groupbn (bnp)")
    _only(
        "apex",
        CUDA=device.type == "cuda",
        fp16=case.dtype == "float16",
        channels_last_2d=case.layout == "channels_last" and len(case.shape) == 4,
        a_multiple_of_4_channels=case.shape[1] % 4 == 0,
        bn_and_relu_and_add=case.fusion in ("plain", "relu", "relu+residual"),
        fp32_weights_and_running_statistics=case.affine == "wide" and case.tracked,
    )
    return nhwc(module.BatchNorm2d_NHWC, case, device)


def nhwc(module: Callable[..., Any], case: Case, device: torch.device) -> TimedKernel:
    """The module of apex, whose tensors are NHWC in sizes too, on a case of channels_last tensors."""
    norm = module(case.shape[1], fuse_relu=case.activation is not None).to(device).train(case.training)
    norm.eps, norm.momentum = case.eps, case.momentum

    def call(x: Tensor, *others: Any) -> Tensor:
        running_mean, running_var, weight, bias, *_, residual, _ = others
        state = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
        inputs = [t.permute(0, 2, 3, 1) for t in (x, residual) if t is not None]
        y: Tensor = torch.func.functional_call(norm, state, tuple(inputs))
        return y.permute(0, 3, 1, 2)

    return TimedKernel(case, call, "apex groupbn")


def inplace_abn(case: Case, device: torch.device) -> TimedKernel:
    """mapillary/inplace_abn: batch norm, alone or with a leaky ReLU, written over x, which backward rebuilds from y.

    It scales by |weight| + eps. Weights above 0, less eps, make it the same operation.
    """
    module = _imported("inplace_abn", "inplace_abn", "pip install inplace-abn")
    _only(
        "inplace_abn",
        bn_and_leaky_relu=case.fusion in ("plain", "leaky_relu"),
        an_affine_batch_norm=case.affine != "none",
    )

    def call(x: Tensor, *others: Any) -> Tensor:
        running_mean, running_var, weight, bias, training, momentum, eps, _, activation = others
        vectors = (weight - eps, bias, running_mean, running_var)
        slope = ACTIVATIONS["leaky_relu"].slope
        y: Tensor = module.inplace_abn(x, *vectors, training, momentum, eps, activation or "identity", slope)
        return y

    return TimedKernel(case, call, "inplace_abn", overwrites=True, positive_weight=True)


def flag_gems(case: Case, device: torch.device) -> TimedKernel:
    """FlagGems: a Triton batch norm, one program a channel; torch adds and activates after it."""
    module = _imported("flag_gems", "flag_gems", "pip install flag-gems")
    run, run_backward = (getattr(module.ops, name, None) for name in ("batch_norm", "batch_norm_backward"))
    if run is None or run_backward is None:
        raise Unavailable("this version of flag_gems has no ops.batch_norm and ops.batch_norm_backward")
    _only(
        "flag_gems",
        CUDA=device.type == "cuda",
        fp32_and_half_precision=case.dtype != "float64",
        running_statistics=case.tracked or not case.training,  # without them it writes into x
        an_affine_batch_norm=case.affine != "none",
    )
    operator = differentiable(run, run_backward)

    def call(x: Tensor, *others: Any) -> Tensor:
        running_mean, running_var, weight, bias, training, momentum, eps, residual, activation = others
        y: Tensor = operator.apply(x, weight, bias, running_mean, running_var, training, momentum, eps)
        return native.finish(y, residual, activation)

    return TimedKernel(case, call, "flag_gems" if case.fusion == "plain" else "flag_gems, then ATen")


def differentiable(run: Callable[..., Any], run_backward: Callable[..., Any]) -> Any:
    """The autograd operator of a forward function that returns (y, mean, 1 / deviation), and of its backward one."""

    class Operator(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, *rest: Any) -> Tensor:
            running_mean, running_var, ctx.training, momentum, ctx.eps = rest
            y, mean, rstd = run(x, weight, bias, running_mean, running_var, ctx.training, momentum, ctx.eps)
            ctx.save_for_backward(x, weight, running_mean, running_var, mean, rstd)
            return y

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
            (dy,) = gradients
            found = run_backward(dy, *ctx.saved_tensors, ctx.training, ctx.eps, [True, True, True])
            return (*found, *[None] * 5)

    return Operator


PEERS: dict[str, Callable[[Case, torch.device], TimedKernel]] = {
    "apex": apex,
    "inplace_abn": inplace_abn,
    "flag_gems": flag_gems,
}


# --- the implementation that runs behind a kernel's name --------------------------------------------------------------

NATIVE_NAMES = {"Native": "ATen", "Cudnn": "cuDNN", "Miopen": "MIOpen"}  # torch's names of its backends


def ran(case: Case, kernel: str, device: torch.device) -> str | None:
    """What runs as `kernel` on that case: cuDNN, ATen, on-chip, cooperative, two launches, C; None where unknown."""
    cuda = device.type == "cuda"
    if kernel == "native":
        return NATIVE_NAMES.get(native_backend(case, device) if cuda else "Native")
    if kernel == "compiled":
        return "Triton of inductor" if cuda else "C++ of inductor"
    if kernel != "fused":
        return None
    return _fused_on_cuda(case, device) if cuda else _fused_on_cpu(case)


def native_backend(case: Case, device: torch.device) -> str:
    """Which of torch's batch norms runs as `native` on that case, in torch's word: Native, Cudnn, ..., or unknown."""
    select = getattr(torch._C, "_select_batch_norm_backend", None)
    if select is None or case.affine == "none" or not (case.tracked or not case.training):
        return "unknown"  # it asks for all of the vectors
    x = with_layout(torch.empty(case.shape, dtype=case.stored, device=device), case.layout)
    vector = torch.empty(case.shape[1], dtype=case.stored if case.affine == "same" else case.working, device=device)
    return str(select(x, *[vector] * 4, case.training, case.eps)).rsplit(".", 1)[-1]


def execution_path(plan: Plan, frozen_stats: bool = False) -> str:
    """A plan in a word: each tensor is read once, by one program or by a team of them, or read twice."""
    if frozen_stats:
        return "streaming"
    if plan.barrier == "none":
        return "on-chip"
    if plan.barrier == "launch":
        return "two launches"
    share = f", {plan.resident_share:.0%} on-chip" if plan.overflow else ""
    return f"cooperative ({plan.team}{share})"


def _fused_on_cuda(case: Case, device: torch.device) -> str | None:
    try:
        from bncli.kernels.fused.triton_launch import has_refused, plan_for, processors

        x = torch.empty(case.shape, dtype=case.stored, device="meta")
        x = with_layout(x, "contiguous" if case.layout == "strided" else case.layout)
        on, frozen_stats = processors(device), not case.training
        plans = [plan_for(x, on, backward=backward, frozen=frozen_stats) for backward in (False, True)]
    except (ImportError, ValueError):  # no Triton, or no plan for the case
        return None
    forward, backward = (execution_path(plan, frozen_stats) for plan in plans)
    path = forward if forward == backward else f"{forward}; backward {backward}"
    if has_refused(device) and any(plan.barrier == "launch" for plan in plans):
        path += " (a cooperative launch was refused)"
    return f"copied, {path}" if case.layout == "strided" else path


def _fused_on_cpu(case: Case) -> str:
    x = with_layout(torch.empty(case.shape, dtype=case.stored, device="meta"), case.layout)
    words = ("C, copied, " if case.layout == "strided" else "C, ") + cpu.thread_division(dense(x))
    by_node = case.training and not case.adds and x.dtype == torch.float32 and x.is_contiguous()
    return f"{words}, C++ autograd node" if by_node and cpu.node() else words
