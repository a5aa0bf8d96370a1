"""What gradcheck checks: a kernel by name, a norm module, or the user's own function, all called alike."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bncli import kernels
from bncli.engine.models import factory
from bncli.engine.user_code import imported
from bncli.errors import RecipeError
from bncli.kernels import api
from bncli.kernels.definition import Forward
from bncli.kernels.native import update_running_stats
from bncli.names import CHECKED_GROUPS, GRADCHECK_KERNELS, NORMS
from bncli.recipe import sections


@dataclass(frozen=True)
class Subject:
    """One kernel or module under test, and what it offers besides a training-mode forward pass."""

    name: str
    norm: str
    call: Forward
    ran: str  # what really runs, in words
    interpreted: bool = False  # by Triton's interpreter, which truncates to bfloat16 and takes long
    fuses: bool = True  # takes a residual and an activation
    evaluates: bool = True  # has an evaluation mode
    own: bool = False  # the user's function, named package.module:function

    @property
    def tracks(self) -> bool:
        """Whether it is a batch norm, with running statistics."""
        return NORMS[self.norm].over_batch


F_SIGNATURE = "(input, running_mean, running_var, weight, bias, training, momentum, eps)"
SEAM_SIGNATURE = "(x, weight, bias, eps, residual, activation[, statistics][, running])"
F_NAMES = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
SEAM_NAMES = ("x", "weight", "bias", "eps", "residual", "activation")


def subject(kernel: str, norm: str, device: torch.device, allow_code: bool) -> Subject:
    """The subject of that name. Raises RecipeError for a name, a norm or a function that cannot be checked.

    Raises Unavailable, with the reason, where the kernel cannot run on the device.
    """
    if norm not in NORMS:
        raise RecipeError(f"--norm {norm}: expected one of {', '.join(NORMS)}")
    if not NORMS[norm].has_kernels:
        if kernel != "native":
            raise RecipeError(f"--norm {norm} has the native kernel alone; --kernel {kernel} is a batch norm")
        return Subject(f"native {norm} norm", norm, _module(norm), "torch's own operator", fuses=False, evaluates=False)
    if ":" in kernel:
        return _own(kernel, allow_code)
    if kernel not in GRADCHECK_KERNELS:
        known = ", ".join(GRADCHECK_KERNELS)
        raise RecipeError(f"--kernel {kernel}: expected one of {known}, or your own as package.module:function")
    kernels.get(kernel, device)
    return Subject(kernel, norm, _by_name(kernel), _what_runs(kernel, device), kernel == "fused-interpreted")


def _what_runs(kernel: str, device: torch.device) -> str:
    if kernel == "native":
        return "torch's own operator"
    if kernel == "fused-interpreted":
        return "the GPU's kernel in Triton's interpreter: correctness, not speed"
    if device.type != "cpu":
        return "Triton kernels on the GPU"
    return "C, compiled for this CPU; the fused-interpreted kernel is the GPU's instead"


def _by_name(kernel: str | kernels.Kernel) -> Forward:
    def call(
        x: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        training: bool,
        momentum: float,
        eps: float,
        residual: Tensor | None,
        activation: str | None,
        /,
    ) -> Tensor:
        arguments = (x, running_mean, running_var, weight, bias, training, momentum, eps)
        return api.batch_norm(*arguments, residual=residual, activation=activation, kernel=kernel)

    return call


def _module(norm: str) -> Forward:
    """The norm modules of bncli.engine.models.norms, with the weight and the bias that each call is given."""
    groups = {"groups": CHECKED_GROUPS} if NORMS[norm].channel_groups == "given" else {}
    section = getattr(sections, NORMS[norm].section)(kind=norm, **groups)

    def call(*arguments: Any) -> Tensor:
        x, _, _, weight, bias, _, _, eps, _, _ = arguments
        make = factory(section.model_copy(update={"eps": eps, "affine": weight is not None}))
        assert make is not None
        given = {} if weight is None else {"weight": weight, "bias": torch.zeros_like(weight) if bias is None else bias}
        y: Tensor = torch.func.functional_call(make(x.size(1)), given, (x,))
        return y

    return call


# --- the user's own function ------------------------------------------------------------------------------------------


def _own(kernel: str, allow_code: bool) -> Subject:
    if not allow_code:
        raise RecipeError(
            f"--kernel {kernel}: this imports and runs code of yours; add --allow-code to say that you trust it"
        )
    function = _load(kernel)
    names = _parameter_names(function)
    if set(F_NAMES) <= names:
        fuses = {"residual", "activation"} <= names
        return Subject(kernel, "batch", _like_torch(function, fuses), f"your function {kernel}", fuses=fuses, own=True)
    if set(SEAM_NAMES) <= names:
        ran = f"your function {kernel}, by the kernels' seam"
        seam = _like_the_seam(function, names & {"statistics", "running"})
        return Subject(kernel, "batch", _by_name(seam), ran, evaluates="statistics" in names, own=True)
    raise RecipeError(
        f"--kernel {kernel}: its parameters are ({', '.join(sorted(names))}). Expected those of "
        f"torch.nn.functional.batch_norm, {F_SIGNATURE} -> y, or those of the kernels' seam, {SEAM_SIGNATURE} -> "
        "(y, mean, var)"
    )


def _load(kernel: str) -> Callable[..., Any]:
    module_name, _, function_name = kernel.partition(":")
    parts = [*module_name.split("."), function_name]
    if module_name.endswith(".py") or not all(part.isidentifier() for part in parts):
        name = Path(module_name.removesuffix(".py")).name or "module"
        raise RecipeError(
            f"--kernel {kernel}: expected package.module:function, a module's name and not its file, as in "
            f"{name}:{function_name or 'batch_norm'}"
        )
    try:
        function: Callable[..., Any] = imported(kernel)
    except (Exception, SystemExit) as error:  # importing runs the user's code, which may raise anything
        raise RecipeError(
            f"--kernel {kernel}: {type(error).__name__}: {error}; it is looked for in the current folder and the "
            "environment"
        ) from error
    if not callable(function):
        raise RecipeError(f"--kernel {kernel}: a {type(function).__name__}, which cannot be called")
    return function


def _parameter_names(function: Callable[..., Any]) -> set[str]:
    try:
        return set(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # written in C, without a signature
        return set()


def _like_torch(function: Callable[..., Any], fuses: bool) -> Forward:
    def call(*arguments: Any) -> Tensor:
        *own, residual, activation = arguments
        more = {"residual": residual, "activation": activation} if fuses else {}
        y: Tensor = function(**dict(zip(F_NAMES, own, strict=True)), **more)
        return y

    return call


class WrongResult(Exception):
    """The user's function returned what its signature does not allow. The message says what was expected."""


def _like_the_seam(function: Callable[..., Any], optional: set[str]) -> kernels.Kernel:
    def kernel(
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        residual: Tensor | None = None,
        activation: str | None = None,
        statistics: tuple[Tensor, Tensor] | None = None,
        running: tuple[Tensor, Tensor, float] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        arguments: dict[str, Any] = dict(zip(SEAM_NAMES, (x, weight, bias, eps, residual, activation), strict=True))
        more = {"statistics": statistics, "running": running}
        result: Any = function(**arguments, **{name: more[name] for name in optional})
        if not (isinstance(result, tuple) and len(result) == 3 and all(isinstance(part, Tensor) for part in result)):
            raise WrongResult(f"returned {_kind(result)}; expected the three tensors (y, mean, var)")
        y, mean, var = result
        if statistics is None and (mean.shape != (x.size(1),) or var.shape != (x.size(1),)):
            raise WrongResult(
                f"returned mean and var of shapes {tuple(mean.shape)} and {tuple(var.shape)}; expected ({x.size(1)},)"
            )
        if running is not None and "running" not in optional:
            update_running_stats(running, mean, var, x.numel() // x.size(1))
        return y, mean, var

    return kernel


def _kind(value: object) -> str:
    if isinstance(value, tuple):
        return f"a tuple of {len(value)}: {', '.join(type(part).__name__ for part in value)}"
    return f"a {type(value).__name__}"


def native_in_the_same_dtype() -> Forward:
    """torch's own batch norm, whose error in a dtype sets what another kernel's may be."""
    return _by_name("native")
