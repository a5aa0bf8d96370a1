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
from bncli.measure.reference import case as cases
from bncli.measure.reference.case import Apply, Inputs
from bncli.results.profile import Case


@dataclass(frozen=True)
class Peer:
    """A peer's kernel on one case; see `candidates.Candidate` for the fields."""

    forward: Apply
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
        fp16=case.dtype == "fp16",
        channels_last_2d=case.layout == "channels_last" and len(case.shape) == 4,
        a_multiple_of_4_channels=case.shape[1] % 4 == 0,
        bn_and_relu_and_add=case.operation in ("bn", "bn+relu", "bn+add+relu"),
        fp32_weights_and_running_statistics=case.affine == "wide" and case.tracked,
    )
    added, activation = cases.OPERATIONS[case.operation]
    norm = module.BatchNorm2d_NHWC(case.shape[1], fuse_relu=activation is not None).to(device).train(case.training)
    norm.eps, norm.momentum = cases.EPS, cases.MOMENTUM

    def forward(given: Inputs) -> Tensor:
        state = {
            "weight": given.weight,
            "bias": given.bias,
            "running_mean": given.running_mean,
            "running_var": given.running_var,
        }
        arguments = [given.x.permute(0, 2, 3, 1)]  # NHWC in sizes too
        if added:
            assert given.residual is not None
            arguments.append(given.residual.permute(0, 2, 3, 1))
        y: Tensor = torch.func.functional_call(norm, state, tuple(arguments))  # type: ignore[arg-type]
        return y.permute(0, 3, 1, 2)

    return Peer(forward, "apex groupbn")


def inplace_abn(case: Case, device: torch.device) -> Peer:
    """mapillary/inplace_abn: batch norm, alone or with a leaky ReLU, written over x, which backward rebuilds from y.

    It scales by |weight| + eps: given weights above 0, less eps, it means the same operation.
    """
    module = _imported("inplace_abn", "inplace_abn", "pip install inplace-abn")
    _only(
        "inplace_abn",
        bn_and_leaky_relu=case.operation in ("bn", "bn+leaky_relu"),
        an_affine_batch_norm=case.affine != "none",
    )
    activation = cases.OPERATIONS[case.operation][1] or "identity"

    def forward(given: Inputs) -> Tensor:
        assert given.weight is not None
        vectors = (given.weight - cases.EPS, given.bias, given.running_mean, given.running_var)
        y: Tensor = module.inplace_abn(
            given.x, *vectors, case.training, cases.MOMENTUM, cases.EPS, activation, SLOPE
        )  # fmt: skip
        return y

    return Peer(forward, "inplace_abn", overwrites=True, positive_weight=True)


SLOPE = 0.01  # of torch's leaky ReLU


def flag_gems(case: Case, device: torch.device) -> Peer:
    """FlagGems: a Triton batch norm, one program a channel; torch adds and activates after it."""
    module = _imported("flag_gems", "flag_gems", "pip install flag-gems")
    run, run_backward = (getattr(module.ops, name, None) for name in ("batch_norm", "batch_norm_backward"))
    if run is None or run_backward is None:
        raise Unavailable("this version of flag_gems has no ops.batch_norm and ops.batch_norm_backward")
    _only(
        "flag_gems",
        CUDA=device.type == "cuda",
        fp32_and_half_precision=case.dtype != "fp64",
        running_statistics=case.tracked or not case.training,  # without them it writes into x
        an_affine_batch_norm=case.affine != "none",
    )
    operator, activation = _differentiable(run, run_backward), cases.OPERATIONS[case.operation][1]

    def forward(given: Inputs) -> Tensor:
        vectors = (given.weight, given.bias, given.running_mean, given.running_var)
        y: Tensor = operator.apply(given.x, *vectors, case.training)
        return native.finish(y, given.residual, activation)

    return Peer(forward, "flag_gems" if case.operation == "bn" else "flag_gems, then ATen")


def _differentiable(run: Callable[..., Any], run_backward: Callable[..., Any]) -> Any:
    """The autograd operator of a forward function that returns (y, mean, 1 / deviation), and of its backward one."""

    class Operator(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, *rest: Any) -> Tensor:
            running_mean, running_var, training = rest
            y, mean, rstd = run(x, weight, bias, running_mean, running_var, training, cases.MOMENTUM, cases.EPS)
            ctx.save_for_backward(x, weight, running_mean, running_var, mean, rstd)
            ctx.training = training
            return y

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
            (dy,) = gradients
            own = run_backward(dy, *ctx.saved_tensors, ctx.training, cases.EPS, [True, True, True])
            return (*own, None, None, None)

    return Operator


PEERS: dict[str, Callable[[Case, torch.device], Peer]] = {
    "apex": apex,
    "inplace_abn": inplace_abn,
    "flag_gems": flag_gems,
}
