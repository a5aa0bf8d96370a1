"""Known bugs as mutations of the reference, recognised by their output in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bncli.kernels.definition import Forward, Mutation, batch_norm, definition
from bncli.measure.reference.case import DTYPES, Case, Inputs
from bncli.measure.reference.judge import Evidence
from bncli.measure.reference.observe import GRADIENTS, RUNNING, observe

Values = dict[str, Tensor]


def unchanged(given: Inputs, case: Case) -> Inputs:
    return given


def any_case(case: Case) -> bool:
    return True


@dataclass(frozen=True, eq=False)
class KnownBug:
    """A bug, and what its kernel gives: `bug` names it, `equals` says what the failing quantity then equals."""

    bug: str
    equals: str
    mutation: Callable[[Case], Mutation] = lambda case: Mutation()
    inputs: Callable[[Inputs, Case], Inputs] = unchanged
    results: Callable[[Values, Case], Values] = lambda values, case: values
    applies: Callable[[Case], bool] = any_case
    another: Callable[[], Forward] | None = None  # another normalization in place of the mutated batch norm


def predicted(known: KnownBug, evidence: Evidence) -> Values:
    """Every first-order quantity of the case by a kernel with the bug, in float64; empty where it has no result."""
    case = evidence.case
    forward = known.another() if known.another else batch_norm(known.mutation(case))
    seen = observe(forward, case, known.inputs(evidence.given, case), second=False)
    return {} if seen.problems else known.results(seen.wide(), case)


# --- what a changed step does -----------------------------------------------------------------------------------------


def detached(tensor: Tensor) -> Tensor:
    return tensor.detach()


def in_dtype_of(case: Case) -> Mutation:
    """Mean and variance rounded to the case's dtype, before the running statistics too."""
    dtype = DTYPES[case.dtype]

    def rounded(tensor: Tensor) -> Tensor:
        return tensor + (tensor.to(dtype).double() - tensor).detach()

    def move_var(running: Tensor, var: Tensor, momentum: float, m: int) -> Tensor:
        return running.lerp(rounded(var) * (m / (m - 1)), momentum)

    return Mutation(
        mean=rounded,
        var=rounded,
        move_mean=lambda running, mean, momentum: running.lerp(rounded(mean), momentum),
        move_var=move_var,
    )


def moving(mean: bool, var: bool, how: Callable[[Tensor, Tensor, float], Tensor]) -> Callable[[Case], Mutation]:
    """The running mean, the running variance or both move by `how` in place of their definition."""
    right = Mutation()

    def move_var(running: Tensor, batch: Tensor, momentum: float, m: int) -> Tensor:
        unbiased = batch * (m / (m - 1))
        return how(running, unbiased, momentum) if var else running.lerp(unbiased, momentum)

    return lambda case: Mutation(move_mean=how if mean else right.move_mean, move_var=move_var)


def twice(running: Tensor, batch: Tensor, momentum: float) -> Tensor:
    return running.lerp(batch, momentum).lerp(batch, momentum)


def by_a_tenth(running: Tensor, batch: Tensor, momentum: float) -> Tensor:
    """Whatever the momentum is."""
    return running.lerp(batch, 0.1)


def by_the_deviation(running: Tensor, batch: Tensor, momentum: float) -> Tensor:
    return running.lerp(batch.sqrt(), momentum)


def without_running(values: Values, case: Case) -> Values:
    """Of a norm that has no running statistics; those of the kernel may be right."""
    return {name: value for name, value in values.items() if name not in RUNNING}


def gradients_alone(values: Values, case: Case) -> Values:
    """Of a mistake in the backward pass; the forward one may be right."""
    return {name: value for name, value in values.items() if name in GRADIENTS}


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


KNOWN_BUGS = (
    KnownBug(
        "statistics treated as constants",
        "the direct part alone",
        lambda case: Mutation(mean=detached, var=detached),
        applies=training,
    ),
    KnownBug(
        "the mean's path is missing",
        "the gradient without its path through the mean",
        lambda case: Mutation(mean=detached),
        applies=training,
    ),
    KnownBug(
        "the variance's path is missing",
        "the gradient without its path through the variance",
        lambda case: Mutation(var=detached),
        applies=training,
    ),
    KnownBug(
        "biased running variance",
        "the moving average of the variance over m, not m - 1,",
        lambda case: Mutation(move_var=lambda running, var, momentum, m: running.lerp(var, momentum)),
        applies=training,
    ),
    KnownBug(
        "unbiased normalization",
        "what the variance over m - 1 gives",
        lambda case: Mutation(bessel=True),
        applies=training,
    ),
    KnownBug(
        "momentum swapped",
        "momentum old + (1 - momentum) new",
        lambda case: Mutation(
            move_mean=lambda running, mean, momentum: running.lerp(mean, 1 - momentum),
            move_var=lambda running, var, momentum, m: running.lerp(var * (m / (m - 1)), 1 - momentum),
        ),
        applies=training,
    ),
    KnownBug(
        "no running update",
        "its value before the call",
        lambda case: Mutation(
            move_mean=lambda running, mean, momentum: running, move_var=lambda running, var, momentum, m: running
        ),
        applies=training,
    ),
    KnownBug("the running statistics move twice", "what two moves give", moving(True, True, twice), applies=training),
    KnownBug("momentum ignored", "what a momentum of 0.1 gives", moving(True, True, by_a_tenth), applies=training),
    KnownBug(
        "momentum ignored for the running mean",
        "what a momentum of 0.1 gives",
        moving(True, False, by_a_tenth),
        applies=training,
    ),
    KnownBug(
        "momentum ignored for the running variance",
        "what a momentum of 0.1 gives",
        moving(False, True, by_a_tenth),
        applies=training,
    ),
    KnownBug(
        "the deviation stored as the running variance",
        "the moving average of the deviation",
        moving(False, True, by_the_deviation),
        applies=training,
    ),
    KnownBug(
        "eps outside the root",
        "what 1/(sqrt(var) + eps) gives",
        lambda case: Mutation(inverse_deviation=lambda var, eps: 1 / (torch.where(var > 0, var, 1e-60).sqrt() + eps)),
    ),
    KnownBug(
        "eps ignored",
        "what 1/sqrt(var) gives",
        lambda case: Mutation(inverse_deviation=lambda var, eps: var.rsqrt()),
    ),
    KnownBug(
        "eps ignored in the gradient",
        "what 1/sqrt(var) gives",
        lambda case: Mutation(inverse_deviation=lambda var, eps: var.rsqrt()),
        results=gradients_alone,
    ),
    KnownBug("half-precision statistics", "what statistics rounded to half precision give", in_dtype_of, applies=half),
    KnownBug(
        "evaluation uses the batch's statistics",
        "what the batch's own statistics give",
        lambda case: Mutation(batch_in_evaluation=True),
        applies=evaluation,
    ),
    KnownBug(
        "evaluation differentiates through the batch's mean",
        "the gradient with its path through the mean, which evaluation has not,",
        lambda case: Mutation(mean_path_in_evaluation=True),
        applies=evaluation,
    ),
    KnownBug(
        "evaluation takes training's gradient",
        "the gradient with its paths through the mean and the variance, which evaluation has not,",
        lambda case: Mutation(mean_path_in_evaluation=True, variance_path_in_evaluation=True),
        applies=evaluation,
    ),
    KnownBug(
        "each example normalized by itself",
        "what instance norm gives",
        results=without_running,
        applies=lambda case: case.training and positions(case) > 1,
        another=by_itself,
    ),
    KnownBug(
        "training uses the running statistics",
        "what the running statistics give",
        lambda case: Mutation(running_in_training=True),
        applies=training,
    ),
    KnownBug("dweight and dbias swapped", "the other of the two", results=swapped),
    KnownBug(
        "a mean in place of a sum in dweight and dbias",
        "the true one divided by m",
        results=divided_by(lambda case: case.m, "dweight", "dbias"),
    ),
    KnownBug(
        "a mean in place of a sum in dbias",
        "the true one divided by the number of positions",
        results=divided_by(positions, "dbias"),
        applies=lambda case: positions(case) > 1,
    ),
    KnownBug(
        "a mean in place of a sum in dweight",
        "the true one divided by the number of positions",
        results=divided_by(positions, "dweight"),
        applies=lambda case: positions(case) > 1,
    ),
    KnownBug(
        "the residual's gradient is missing",
        "zero",
        lambda case: Mutation(residual=detached),
        applies=lambda case: case.adds,
    ),
    KnownBug(
        "the activation's gradient is ignored",
        "what an activation's derivative of 1 gives",
        lambda case: Mutation(linear_activation=True),
        applies=lambda case: case.activation is not None,
    ),
    KnownBug(
        "the residual is added after the activation",
        "what the sum after the activation gives",
        lambda case: Mutation(residual_last=True),
        applies=lambda case: case.adds and case.activation is not None,
    ),
    KnownBug(
        "channels_last memory taken for contiguous",
        "what the memory gives when it is read in the order of a contiguous tensor",
        inputs=all_misread,
        results=read_back,
        applies=channels_last,
    ),
    KnownBug(
        "the upstream gradient taken for contiguous",
        "what the upstream gradient's memory gives when it is read in the order of a contiguous tensor",
        inputs=g_misread,
        applies=channels_last,
    ),
)
