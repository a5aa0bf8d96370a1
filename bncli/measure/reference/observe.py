"""One run of a kernel on a case's inputs: the output, every gradient, the second derivative, the running statistics."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bncli.errors import is_out_of_memory
from bncli.kernels.definition import Forward
from bncli.measure.reference.candidate import KernelFailed
from bncli.measure.reference.case import CPU, Case, Inputs, arguments
from bncli.names import NORMS
from bncli.results.finding import Finding, FindingKind

RUNNING = ("running_mean", "running_var")
GRADIENTS = ("dx", "dweight", "dbias", "dresidual")
SECOND = ("double backward in x", "double backward in weight", "double backward in g")


@dataclass
class Observation:
    """Results of a run: quantity -> tensor. Quantities that could not be computed are in `problems`."""

    values: dict[str, Tensor] = field(default_factory=dict)
    problems: dict[str, Finding] = field(default_factory=dict)

    @property
    def problem(self) -> Finding | None:
        """The first problem."""
        return next(iter(self.problems.values()), None)

    def wide(self, device: torch.device = CPU) -> dict[str, Tensor]:
        """The values in float64 on the device."""
        return {name: value.detach().to(device).double() for name, value in self.values.items()}


def quantities(case: Case) -> tuple[str, ...]:
    """The quantities of a case that are checked, in the order of computation."""
    running = RUNNING if case.training and NORMS[case.norm].has_running_variance else ()
    return ("forward", *running, *(GRADIENTS if case.adds else GRADIENTS[:3]), "double backward")


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """A context that fills uninitialized tensors with NaN (torch.utils.deterministic.fill_uninitialized_memory)."""
    before = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("warn")  # use_deterministic_algorithms would import the compiler for it: 1 s
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)


def observe(call: Forward, case: Case, given: Inputs, second: bool = True) -> Observation:
    """The forward pass, the backward pass as a training step runs it, and the backward pass of the backward pass."""
    seen = Observation()
    taken = given.for_one_call().each(Tensor.detach)  # the same memory and strides
    wanted = taken.leaves()
    try:
        y = call(*arguments(case, taken))
    except (Exception, SystemExit) as error:  # a kernel may raise anything
        return _failed(seen, quantities(case), error)
    if wrong := unlike(y, given.x):
        seen.problems = dict.fromkeys(quantities(case), wrong)
        return seen
    seen.values["forward"] = y.detach()
    running = {name: getattr(taken, name) for name in RUNNING if getattr(taken, name) is not None}
    moved = tuple(name for name, value in running.items() if not torch.equal(value, getattr(given, name)))
    if not case.training and moved:
        seen.problems["forward"] = Finding("running_moved", names=moved)
    if case.training and NORMS[case.norm].has_running_variance:
        seen.values |= running
    try:
        first = torch.autograd.grad(y, list(wanted.values()), given.g, allow_unused=True)
    except (Exception, SystemExit) as error:
        return _failed(seen, [*wanted, "double backward"], error)
    seen.values |= {name: _or_zero(t, wanted[name]) for name, t in zip(wanted, first, strict=True)}
    if second:
        try:
            seen.values.update(_second(call, case, given))
        except (Exception, SystemExit) as error:
            return _failed(seen, ["double backward"], error)
    return seen


def _second(call: Forward, case: Case, given: Inputs) -> dict[str, Tensor]:
    """The gradient in x, weight and g of <dx, v> + <dweight, v_weight> + <dbias, v_bias>.

    Of a forward pass of its own: a compiled function allows one backward pass for each.
    """
    taken = given.for_one_call().each(Tensor.detach)
    wanted, g = taken.leaves(), given.g.detach().clone().requires_grad_()
    y = call(*arguments(case, taken))
    first = torch.autograd.grad(y, list(wanted.values()), g, create_graph=True, allow_unused=True)
    directions: dict[str, Any] = {"dx": given.v, "dweight": given.v_weight, "dbias": given.v_bias}
    pairs = [
        (gradient, directions[name])
        for name, gradient in zip(wanted, first, strict=True)
        if name in directions and gradient is not None and gradient.requires_grad
    ]
    into = [tensor for name, tensor in wanted.items() if name in ("dx", "dweight")] + [g]
    if not pairs:
        raise KernelFailed(Finding("no_second_derivative", exception="NoSecondDerivative"))
    found = torch.autograd.grad(
        [gradient for gradient, _ in pairs], into, [v.to(gradient) for gradient, v in pairs], allow_unused=True
    )
    names = SECOND if "dweight" in wanted else (SECOND[0], SECOND[2])
    values = {name: _or_zero(*pair) for name, *pair in zip(names, found, into, strict=True)}
    if given.smooth is not None:  # at a kink either one-sided value is right
        values[SECOND[2]] = values[SECOND[2]] * given.smooth
    return values


def _or_zero(gradient: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if gradient is None else gradient


def unlike(y: object, x: Tensor) -> Finding | None:
    """What is wrong with the type, shape, dtype or device of a kernel's output, or None."""
    if not isinstance(y, Tensor):
        return Finding("wrong_type", given=type(y).__name__, wanted="a tensor")
    pairs: tuple[tuple[FindingKind, object, object], ...] = (
        ("wrong_shape", tuple(y.shape), tuple(x.shape)),
        ("wrong_dtype", y.dtype, x.dtype),
        ("wrong_device", y.device, x.device),
    )
    for kind, given, wanted in pairs:
        if given != wanted:
            return Finding(kind, given=str(given), wanted=str(wanted))
    return None


def finding_of(error: BaseException) -> Finding:
    """The finding for an exception of a kernel or of autograd, whose errors are recognised by their text."""
    if isinstance(error, KernelFailed):
        return error.finding
    text = str(error)
    kind: FindingKind = "raised"
    if is_out_of_memory(error):
        kind = "no_memory"
    elif "modified by an inplace operation" in text:
        kind = "saved_written"
    elif "leaf Variable" in text and "in-place" in text:
        kind = "leaf_written"
    elif "does not require grad and does not have a grad_fn" in text:
        kind = "no_graph"
    return Finding(kind, exception=type(error).__name__, text=text.strip().split("\n")[0])


def _failed(seen: Observation, names: tuple[str, ...] | list[str], error: BaseException) -> Observation:
    seen.problems.update(dict.fromkeys(names, finding_of(error)))
    return seen
