"""How a wrong kernel is written out in float64: the definition with one step changed, or its results changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from bncli.kernels.definition import Forward, Twist, batch_norm, definition
from bncli.measure.reference.gradient_cases import DTYPES, Case, Inputs
from bncli.measure.reference.observe import Evidence
from bncli.measure.reference.quantities import observe

Values = dict[str, Tensor]


def unchanged(given: Inputs, case: Case) -> Inputs:
    return given


def any_case(case: Case) -> bool:
    return True


@dataclass(frozen=True, eq=False)
class Hypothesis:
    """A bug, and what its kernel gives: `bug` names it, `equals` says what the failing quantity then equals."""

    bug: str
    equals: str
    twist: Callable[[Case], Twist] = lambda case: Twist()
    inputs: Callable[[Inputs, Case], Inputs] = unchanged
    results: Callable[[Values, Case], Values] = lambda values, case: values
    applies: Callable[[Case], bool] = any_case
    another: Callable[[], Forward] | None = None  # another normalization in place of the twisted batch norm


def predicted(hypothesis: Hypothesis, evidence: Evidence) -> Values:
    """Every first-order quantity of the case by the hypothesis, in float64; empty where it has no result."""
    case = evidence.case
    forward = hypothesis.another() if hypothesis.another else batch_norm(hypothesis.twist(case))
    seen = observe(forward, case, hypothesis.inputs(evidence.given, case), second=False)
    return {} if seen.problems else hypothesis.results(seen.wide(), case)


# --- what a changed step does -----------------------------------------------------------------------------------------


def detached(tensor: Tensor) -> Tensor:
    return tensor.detach()


def in_dtype_of(case: Case) -> Twist:
    """Mean and variance rounded to the case's dtype, before the running statistics too."""
    dtype = DTYPES[case.dtype]

    def rounded(tensor: Tensor) -> Tensor:
        return tensor + (tensor.to(dtype).double() - tensor).detach()

    def move_var(running: Tensor, var: Tensor, momentum: float, m: int) -> Tensor:
        return running.lerp(rounded(var) * (m / (m - 1)), momentum)

    return Twist(
        mean=rounded,
        var=rounded,
        move_mean=lambda running, mean, momentum: running.lerp(rounded(mean), momentum),
        move_var=move_var,
    )


def moving(mean: bool, var: bool, how: Callable[[Tensor, Tensor, float], Tensor]) -> Callable[[Case], Twist]:
    """The running mean, the running variance or both move by `how` in place of their definition."""
    right = Twist()

    def move_var(running: Tensor, batch: Tensor, momentum: float, m: int) -> Tensor:
        unbiased = batch * (m / (m - 1))
        return how(running, unbiased, momentum) if var else running.lerp(unbiased, momentum)

    return lambda case: Twist(move_mean=how if mean else right.move_mean, move_var=move_var)


def twice(running: Tensor, batch: Tensor, momentum: float) -> Tensor:
    return running.lerp(batch, momentum).lerp(batch, momentum)


def by_a_tenth(running: Tensor, batch: Tensor, momentum: float) -> Tensor:
    """Whatever the momentum is."""
    return running.lerp(batch, 0.1)


def by_the_deviation(running: Tensor, batch: Tensor, momentum: float) -> Tensor:
    return running.lerp(batch.sqrt(), momentum)


def without_running(values: Values, case: Case) -> Values:
    """Of a norm that has no running statistics; those of the kernel may be right."""
    return {name: value for name, value in values.items() if not name.startswith("running")}


def gradients_alone(values: Values, case: Case) -> Values:
    """Of a mistake in the backward pass; the forward one may be right."""
    return {name: value for name, value in values.items() if name.startswith("d")}


def by_itself() -> Forward:
    return definition("instance")


def swapped(values: Values, case: Case) -> Values:
    if "dweight" not in values or "dbias" not in values:
        return values
    return {**values, "dweight": values["dbias"], "dbias": values["dweight"]}


def divided_by(count: Callable[[Case], int], *names: str) -> Callable[[Values, Case], Values]:
    def results(values: Values, case: Case) -> Values:
        return {**values, **{name: values[name] / count(case) for name in names if name in values}}

    return results


def positions(case: Case) -> int:
    return max(case.m // max(case.shape[0], 1), 1)


def channels_last(case: Case) -> bool:
    return case.layout == "channels_last" and len(case.shape) > 3


def memory_of(tensor: Tensor | None) -> Tensor | None:
    """The memory of a channels_last tensor, (N, *S, C) in order, read as (N, C, *S)."""
    if tensor is None or tensor.dim() < 3:
        return tensor
    return tensor.permute(0, *range(2, tensor.dim()), 1).reshape(tensor.shape)


def back_in_memory(tensor: Tensor) -> Tensor:
    """The inverse of `memory_of`."""
    n, c, *s = tensor.shape
    return tensor.reshape(n, *s, c).movedim(-1, 1)


def all_misread(given: Inputs, case: Case) -> Inputs:
    x, residual, g = (memory_of(tensor) for tensor in (given.x, given.residual, given.g))
    assert x is not None
    assert g is not None
    return replace(given, x=x, residual=residual, g=g)


def read_back(values: Values, case: Case) -> Values:
    return {name: back_in_memory(value) if value.dim() > 1 else value for name, value in values.items()}


def g_misread(given: Inputs, case: Case) -> Inputs:
    g = memory_of(given.g)
    assert g is not None
    return replace(given, g=g)


def training(case: Case) -> bool:
    return case.training


def evaluation(case: Case) -> bool:
    return not case.training


def half(case: Case) -> bool:
    return case.training and case.dtype in ("float16", "bfloat16")
