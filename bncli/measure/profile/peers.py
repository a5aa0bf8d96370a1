"""Other people's batch norms, where they are installed: which cases each takes, and how it is called.

Nothing here is imported before it is asked for. A peer that is not installed, or does not take a case, says why.
"""

from __future__ import annotations

import contextlib
import importlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bncli.errors import Unavailable
from bncli.kernels import native
from bncli.kernels.definition import Forward
from bncli.measure.reference.case import Case
from bncli.names import ACTIVATIONS


@dataclass(frozen=True)
class Peer:
    """A peer's kernel on one case; see `candidates.Candidate` for the fields."""

    call: Forward
    ran: str
    overwrites: bool = False
    positive_weight: bool = False


def _imported(name: str, module: str, install: str) -> Any:
    """Raises Unavailable where the package is missing, or breaks when it is imported."""
    said = io.StringIO()  # some print why they are of no use
    try:
        with contextlib.redirect_stdout(said):
            return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name == module.split(".")[0]:
            raise Unavailable(f"not installed ({install})") from error
        raise Unavailable(f"{name} cannot be imported: {error}") from error
    except Exception as error:  # a compiled extension that does not fit this torch
        raise Unavailable(f"{name} cannot be imported: {type(error).__name__}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:200]


def _only(name: str, **claims: bool) -> None:
    """Raises Unavailable naming what does not hold; a claim's underscores stand for spaces."""
    missing = [claim.replace("_", " ") for claim, holds in claims.items() if not holds]
    if missing:
        raise Unavailable(f"{name} takes {', '.join(missing)} only")


def apex(case: Case, device: torch.device) -> Peer:
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
    norm = module.BatchNorm2d_NHWC(case.shape[1], fuse_relu=case.activation is not None).to(device).train(case.training)
    norm.eps, norm.momentum = case.eps, case.momentum

    def call(x: Tensor, *others: Any) -> Tensor:
        running_mean, running_var, weight, bias, *_, residual, _ = others
        state = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
        inputs = [t.permute(0, 2, 3, 1) for t in (x, residual) if t is not None]  # NHWC in sizes too
        y: Tensor = torch.func.functional_call(norm, state, tuple(inputs))
        return y.permute(0, 3, 1, 2)

    return Peer(call, "apex groupbn")


def inplace_abn(case: Case, device: torch.device) -> Peer:
    """mapillary/inplace_abn: batch norm, alone or with a leaky ReLU, written over x, which backward rebuilds from y.

    It scales by |weight| + eps: given weights above 0, less eps, it means the same operation.
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

    return Peer(call, "inplace_abn", overwrites=True, positive_weight=True)


def flag_gems(case: Case, device: torch.device) -> Peer:
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
    operator = _differentiable(run, run_backward)

    def call(x: Tensor, *others: Any) -> Tensor:
        running_mean, running_var, weight, bias, training, momentum, eps, residual, activation = others
        y: Tensor = operator.apply(x, weight, bias, running_mean, running_var, training, momentum, eps)
        return native.finish(y, residual, activation)

    return Peer(call, "flag_gems" if case.fusion == "plain" else "flag_gems, then ATen")


def _differentiable(run: Callable[..., Any], run_backward: Callable[..., Any]) -> Any:
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
            own = run_backward(dy, *ctx.saved_tensors, ctx.training, ctx.eps, [True, True, True])
            return (*own, *[None] * 5)

    return Operator


PEERS: dict[str, Callable[[Case, torch.device], Peer]] = {
    "apex": apex,
    "inplace_abn": inplace_abn,
    "flag_gems": flag_gems,
}
