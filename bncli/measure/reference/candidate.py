"""Candidate: a kernel by name, a norm module, or a user's function, with one common signature."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from bncli import kernels
from bncli.engine.models import factory
from bncli.engine.user_code import imported
from bncli.errors import UsageError
from bncli.kernels import api
from bncli.kernels.definition import Forward
from bncli.names import (
    CHECKED_GROUP_SIZE,
    CHECKED_GROUPS,
    CHECKED_NEWTON_STEPS,
    CHECKED_NORMS,
    GRADCHECK_KERNELS,
    KERNELS,
    NORMS,
    check_kernel,
)
from bncli.recipe import sections
from bncli.results.finding import Finding

# The tolerance rule: for bncli's kernels and modules, for torch's operator, or for a user's function.
Rule = Literal["kernel", "module", "native", "own function"]  # of results.gradcheck.ToleranceRule, those for values


def rule(kernel: str) -> Rule:
    """The rule for a kernel of that name."""
    if kernel == "native":
        return "native"
    return "kernel" if kernel in KERNELS and KERNELS[kernel].module else "own function"


@dataclass(frozen=True)
class Candidate:
    """A kernel or module under test, and what it supports besides a forward pass in training mode."""

    name: str
    norm: str
    call: Forward
    ran: str  # the implementation that runs, in words
    rule: Rule
    fuses: bool = True  # takes a residual and an activation
    evaluates: bool = True  # has an evaluation mode
    differentiates_twice: bool = True  # its backward pass can be differentiated

    @property
    def interpreted(self) -> bool:
        """Whether Triton's interpreter runs it instead of a GPU: it truncates to bfloat16 and is slow."""
        return self.name == "fused-interpreted"


F_SIGNATURE = "(input, running_mean, running_var, weight, bias, training, momentum, eps)"
KERNEL_SIGNATURE = "(x, weight, bias, eps, residual, activation[, statistics][, running])"
F_NAMES = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
KERNEL_NAMES = ("x", "weight", "bias", "eps", "residual", "activation")


def candidate(kernel: str, norm: str, device: torch.device, allow_code: bool) -> Candidate:
    """The candidate of that name. Raises UsageError for a name, a norm or a function that cannot be checked.

    Raises Unavailable, with the reason, where the kernel cannot run on the device.
    """
    if norm not in CHECKED_NORMS:
        raise UsageError(f"expected one of {', '.join(CHECKED_NORMS)}", field="norm", value=norm)
    if not NORMS[norm].has_kernels:
        if kernel != "native":
            raise UsageError(f"has only the native kernel; {kernel} is a batch norm", field="norm", value=norm)
        whitens = NORMS[norm].whitens
        ran = f"bncli's module, {CHECKED_GROUP_SIZE} channels per group" if whitens else "torch's own operator"
        held_to: Rule = "module" if whitens else "native"
        return Candidate(f"native {norm} norm", norm, _module(norm), ran, held_to, fuses=False, evaluates=False)
    check_kernel(kernel, GRADCHECK_KERNELS, allow_code)
    if ":" in kernel:
        return _user_function(kernel)
    if kernel == "compiled":
        return Candidate(kernel, norm, compiled(NATIVE), "torch.compile of torch's own operator", rule(kernel))
    kernels.get(kernel, device)
    return Candidate(kernel, norm, by_name(kernel), _what_runs(kernel, device), rule(kernel))


def _what_runs(kernel: str, device: torch.device) -> str:
    if kernel == "native":
        return "torch's own operator"
    if kernel == "fused-interpreted":
        return "the GPU's kernel in Triton's interpreter: correctness, not speed"
    if device.type != "cpu":
        return "Triton kernels on the GPU"
    return "C, compiled for this CPU; the fused-interpreted kernel is the GPU's instead"


def by_name(kernel: str | kernels.Kernel) -> Forward:
    """A kernel by its name, or a function of the kernels' signature, called like bncli.batch_norm by position."""

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


NATIVE = by_name("native")  # torch's batch norm, whose error in a dtype bounds the tolerance of other kernels


def compiled(call: Forward) -> Forward:
    """The same function, compiled for each shape that it meets, with nothing left outside the graph."""
    import torch._inductor.config

    # Each process picks its launch settings. Those picked while other programs ran would be a weaker opponent.
    if hasattr(torch._inductor.config, "autotune_local_cache"):
        torch._inductor.config.autotune_local_cache = False
    torch.compiler.reset()  # or a second shape would be compiled as a dynamic one, which is slower
    return torch.compile(call, fullgraph=True, dynamic=False)


def _module(norm: str) -> Forward:
    """The recipe's norm modules, with the weight and the bias of each call."""
    checked = {"groups": CHECKED_GROUPS, "group_size": CHECKED_GROUP_SIZE, "iterations": CHECKED_NEWTON_STEPS}
    kind = getattr(sections, NORMS[norm].section)
    section = kind(kind=norm, **{name: value for name, value in checked.items() if name in kind.model_fields})

    def call(*arguments: Any) -> Tensor:
        x, _, _, weight, bias, _, _, eps, _, _ = arguments
        make = factory(section.model_copy(update={"eps": eps, "affine": weight is not None}))
        assert make is not None
        vectors = {} if weight is None else {"weight": weight, "bias": bias}
        y: Tensor = torch.func.functional_call(make(x.size(1)).to(x.device), vectors, (x,))
        return y

    return call


# --- the user's own function ------------------------------------------------------------------------------------------


def _user_function(kernel: str) -> Candidate:
    function = _load(kernel)
    names = _parameter_names(function)
    for_torch, for_kernels = ({first, *(names if first in names else names[1:])} for first in ("input", "x"))
    if set(F_NAMES) <= for_torch:
        fuses = {"residual", "activation"} <= for_torch
        called, ran = _like_torch(_by_names(function, names, "input"), fuses), f"your function {kernel}"
        return Candidate(kernel, "batch", called, ran, rule(kernel), fuses)
    if set(KERNEL_NAMES) <= for_kernels:
        called = by_name(_as_a_kernel(_by_names(function, names, "x"), for_kernels))
        ran = f"your function {kernel}, called as bncli's kernels are"
        return Candidate(kernel, "batch", called, ran, rule(kernel), evaluates="statistics" in names)
    raise UsageError(
        f"its parameters are ({', '.join(names)}). Expected those of torch.nn.functional.batch_norm, {F_SIGNATURE} -> "
        f"y, or those of bncli's kernels, {KERNEL_SIGNATURE} -> (y, mean, var); the first may have any name",
        field="kernel",
        value=kernel,
    )


def _load(kernel: str) -> Callable[..., Any]:
    module_name, _, function_name = kernel.partition(":")
    parts = [*module_name.split("."), function_name]
    if module_name.endswith(".py") or not all(part.isidentifier() for part in parts):
        raise UsageError(
            "expected package.module:function, a module's name and not its file, as in mine:batch_norm",
            field="kernel",
            value=kernel,
        )
    try:
        function: Callable[..., Any] = imported(kernel)
    except (Exception, SystemExit) as error:  # importing runs the user's code, which may raise anything
        raise UsageError(
            f"{type(error).__name__}: {error}; the current folder and the environment were searched",
            field="kernel",
            value=kernel,
        ) from error
    if not callable(function):
        raise UsageError(f"a {type(function).__name__}, which cannot be called", field="kernel", value=kernel)
    return function


def _parameter_names(function: Callable[..., Any]) -> tuple[str, ...]:
    try:
        return tuple(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # written in C, without a signature
        return ()


def _by_names(function: Callable[..., Any], names: Sequence[str], first: str) -> Callable[..., Any]:
    """The function, called by names alone, where its first parameter, which takes x by position, has another one."""
    renamed = functools.wraps(function)(lambda **named: function(named.pop(first), **named))
    return function if first in names else renamed


def _like_torch(function: Callable[..., Any], fuses: bool) -> Forward:
    def call(*arguments: Any) -> Tensor:
        *plain, residual, activation = arguments
        fused = {"residual": residual, "activation": activation} if fuses else {}
        y: Tensor = function(**dict(zip(F_NAMES, plain, strict=True)), **fused)
        return y

    return call


class KernelFailed(Exception):
    """The kernel under test returned no valid result."""

    def __init__(self, finding: Finding) -> None:
        self.finding = finding
        super().__init__(finding.kind)


def _as_a_kernel(function: Callable[..., Any], names: set[str]) -> kernels.Kernel:
    """The function, called by parameter name, with its result checked. See also `kernels.adapted`."""

    @functools.wraps(function)  # `kernels.adapted` reads its signature
    def kernel(*positional: Any, **named: Any) -> tuple[Tensor, Tensor, Tensor]:
        asked: dict[str, Any] = dict(zip((*KERNEL_NAMES, "statistics", "running"), positional, strict=False)) | named
        result: Any = function(**{name: value for name, value in asked.items() if name in names})
        if not (isinstance(result, tuple) and len(result) == 3 and all(isinstance(part, Tensor) for part in result)):
            wanted = "the three tensors (y, mean, var)"
            raise KernelFailed(Finding("wrong_type", given=_kind(result), wanted=wanted, exception="WrongResult"))
        y, mean, var = result
        channels = (asked["x"].size(1),)
        if asked.get("statistics") is None and (mean.shape != channels or var.shape != channels):
            given, wanted = f"{tuple(mean.shape)} and {tuple(var.shape)}", f"({channels[0]},)"
            raise KernelFailed(Finding("wrong_shape", given=given, wanted=wanted, exception="WrongResult"))
        return y, mean, var

    return kernel


def _kind(value: object) -> str:
    if isinstance(value, tuple):
        return f"tuple of {len(value)}: {', '.join(type(part).__name__ for part in value)}"
    return type(value).__name__
