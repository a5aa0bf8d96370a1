"""Known bugs as mutations of the reference, recognised by their output in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from bncli.kernels.definition import Forward, Mutation, batch_norm, definition
from bncli.measure.reference.case import Case, Inputs
from bncli.measure.reference.judge import Evidence
from bncli.measure.reference.observe import GRADIENTS, observe

Values = dict[str, Tensor]
Kernel = Callable[[Case], Forward]
Results = Callable[[Values, Case], Values]


@dataclass(frozen=True, eq=False)
class KnownBug:
    """A bug and the results of a kernel with it. `bug`: its name. `equals`: what the failing quantity then equals."""

    bug: str
    equals: str
    forward: Kernel | None = None  # None: the right results, changed by `results`
    applies: Callable[[Case], bool] = lambda case: True
    results: Results = lambda values, case: values
    inputs: Callable[[Inputs], Inputs] = lambda given: given


def predicted(known: KnownBug, evidence: Evidence) -> Values:
    """The first-order quantities of the case from a kernel with the bug, in float64; empty if it has no result."""
    case = evidence.case
    if known.forward is None:
        return known.results(evidence.truth, case)
    seen = observe(known.forward(case), case, known.inputs(evidence.given), second=False)
    return {} if seen.problems else known.results(seen.wide(), case)


# --- the wrong kernel -------------------------------------------------------------------------------------------------


def mutated(**changes: Any) -> Kernel:
    """Batch norm with a `Mutation` of these fields."""
    return lambda case: batch_norm(Mutation(**changes))


def right(case: Case) -> Forward:
    return batch_norm()


def half_statistics(case: Case) -> Forward:
    """Mean and variance rounded to the case's dtype, also for the update of the running statistics."""

    def rounded(tensor: Tensor) -> Tensor:
        return tensor + (tensor.to(case.stored).double() - tensor).detach()

    def move_mean(running: Tensor, mean: Tensor, momentum: float) -> Tensor:
        return running.lerp(rounded(mean), momentum)

    def move_var(running: Tensor, var: Tensor, momentum: float, m: int) -> Tensor:
        return running.lerp(rounded(var) * (m / (m - 1)), momentum)

    return batch_norm(Mutation(mean=rounded, var=rounded, move_mean=move_mean, move_var=move_var))


def moving(how: Callable[[Tensor, Tensor, float], Tensor], mean: bool = True, var: bool = True) -> Kernel:
    """The running statistics are updated by `how(running, batch, momentum)`."""

    def move_var(running: Tensor, var: Tensor, momentum: float, m: int) -> Tensor:
        return how(running, var * (m / (m - 1)), momentum)

    return mutated(**({"move_mean": how} if mean else {}), **({"move_var": move_var} if var else {}))


def by_a_tenth(running: Tensor, batch: Tensor, momentum: float) -> Tensor:
    return running.lerp(batch, 0.1)


def without_eps(var: Tensor, eps: float) -> Tensor:
    return var.rsqrt()


# --- a change of its results or inputs --------------------------------------------------------------------------------


def only(*names: str) -> Results:
    """Only these quantities, if the bug does not affect the others."""
    return lambda values, case: {name: value for name, value in values.items() if name in names}


def swapped(values: Values, case: Case) -> Values:
    if "dweight" not in values or "dbias" not in values:
        return values
    return {**values, "dweight": values["dbias"], "dbias": values["dweight"]}


def divided_by(count: Callable[[Case], int], *names: str) -> Results:
    return lambda values, case: {n: value / count(case) if n in names else value for n, value in values.items()}


def memory_of(tensor: Tensor) -> Tensor:
    """The memory of a channels_last tensor, (N, *S, C) in order, read as (N, C, *S)."""
    return tensor if tensor.dim() < 3 else tensor.movedim(1, -1).reshape(tensor.shape)


def back_in_memory(tensor: Tensor) -> Tensor:
    """The inverse of `memory_of`."""
    if tensor.dim() < 3:
        return tensor
    n, c, *s = tensor.shape
    return tensor.reshape(n, *s, c).movedim(-1, 1)


# --- the cases that show it -------------------------------------------------------------------------------------------


training, adds, m = attrgetter("training"), attrgetter("adds"), attrgetter("m")


def evaluation(case: Case) -> bool:
    return not case.training


def half(case: Case) -> bool:
    return case.training and case.dtype in ("float16", "bfloat16")


def activates(case: Case) -> bool:
    return case.activation is not None


def positions(case: Case) -> int:
    return max(case.m // max(case.shape[0], 1), 1)


def several_positions(case: Case) -> bool:
    return positions(case) > 1


def channels_last(case: Case) -> bool:
    return case.layout == "channels_last" and len(case.shape) > 3


DETACHED = Tensor.detach
KNOWN_BUGS = (
    KnownBug(
        "statistics treated as constants", "the direct part alone", mutated(mean=DETACHED, var=DETACHED), training
    ),
    KnownBug(
        "gradient through the mean is missing",
        "the gradient without its path through the mean",
        mutated(mean=DETACHED),
        training,
    ),
    KnownBug(
        "gradient through the variance is missing",
        "the gradient without its path through the variance",
        mutated(var=DETACHED),
        training,
    ),
    KnownBug(
        "biased running variance",
        "the moving average of the variance over m, not m - 1,",
        mutated(move_var=lambda running, var, momentum, m: running.lerp(var, momentum)),
        training,
    ),
    KnownBug("unbiased normalization", "what the variance over m - 1 gives", mutated(bessel=True), training),
    KnownBug(
        "momentum swapped",
        "momentum old + (1 - momentum) new",
        moving(lambda running, batch, momentum: running.lerp(batch, 1 - momentum)),
        training,
    ),
    KnownBug(
        "running statistics not updated",
        "its value before the call",
        moving(lambda running, batch, momentum: running),
        training,
    ),
    KnownBug(
        "running statistics updated twice",
        "what two moves give",
        moving(lambda running, batch, momentum: running.lerp(batch, momentum).lerp(batch, momentum)),
        training,
    ),
    KnownBug("momentum ignored", "what a momentum of 0.1 gives", moving(by_a_tenth), training),
    KnownBug(
        "momentum ignored for the running mean", "what a momentum of 0.1 gives", moving(by_a_tenth, var=False), training
    ),
    KnownBug(
        "momentum ignored for the running variance",
        "what a momentum of 0.1 gives",
        moving(by_a_tenth, mean=False),
        training,
    ),
    KnownBug(
        "standard deviation stored as the running variance",
        "the moving average of the deviation",
        moving(lambda running, batch, momentum: running.lerp(batch.sqrt(), momentum), mean=False),
        training,
    ),
    KnownBug(
        "eps added outside the square root",
        "what 1/(sqrt(var) + eps) gives",
        mutated(inverse_deviation=lambda var, eps: 1 / (torch.where(var > 0, var, 1e-60).sqrt() + eps)),
    ),
    KnownBug("eps ignored", "what 1/sqrt(var) gives", mutated(inverse_deviation=without_eps)),
    KnownBug(
        "eps ignored in the gradient",
        "what 1/sqrt(var) gives",
        mutated(inverse_deviation=without_eps),
        results=only(*GRADIENTS),
    ),
    KnownBug("half-precision statistics", "what statistics rounded to half precision give", half_statistics, half),
    KnownBug(
        "evaluation uses batch statistics",
        "what the batch's own statistics give",
        mutated(batch_in_evaluation=True),
        evaluation,
    ),
    KnownBug(
        "evaluation differentiates through the batch mean",
        "the gradient with its path through the mean, which evaluation has not,",
        mutated(mean_path_in_evaluation=True),
        evaluation,
    ),
    KnownBug(
        "evaluation uses the training gradient",
        "the gradient with its paths through the mean and the variance, which evaluation has not,",
        mutated(mean_path_in_evaluation=True, variance_path_in_evaluation=True),
        evaluation,
    ),
    KnownBug(
        "each example normalized separately, as in instance norm",
        "what instance norm gives",
        lambda case: definition("instance"),
        lambda case: case.training and several_positions(case),
        only("forward", *GRADIENTS),  # the running statistics may be right
    ),
    KnownBug(
        "training uses the running statistics",
        "what the running statistics give",
        mutated(running_in_training=True),
        training,
    ),
    KnownBug("dweight and dbias swapped", "the other of the two", results=swapped),
    KnownBug(
        "dweight and dbias averaged instead of summed",
        "the true one divided by m",
        results=divided_by(m, "dweight", "dbias"),
    ),
    KnownBug(
        "dbias averaged instead of summed",
        "the true one divided by the number of positions",
        applies=several_positions,
        results=divided_by(positions, "dbias"),
    ),
    KnownBug(
        "dweight averaged instead of summed",
        "the true one divided by the number of positions",
        applies=several_positions,
        results=divided_by(positions, "dweight"),
    ),
    KnownBug("the gradient of the residual is missing", "zero", mutated(residual=DETACHED), adds),
    KnownBug(
        "the activation's gradient is ignored",
        "what an activation's derivative of 1 gives",
        mutated(linear_activation=True),
        activates,
    ),
    KnownBug(
        "the residual is added after the activation",
        "what the sum after the activation gives",
        mutated(residual_last=True),
        lambda case: adds(case) and activates(case),
    ),
    KnownBug(
        "channels_last memory read as contiguous",
        "what the memory gives when it is read in the order of a contiguous tensor",
        right,
        channels_last,
        lambda values, case: {name: back_in_memory(value) for name, value in values.items()},
        lambda given: given.each(memory_of),
    ),
    KnownBug(
        "upstream gradient read as contiguous",
        "what the upstream gradient's memory gives when it is read in the order of a contiguous tensor",
        right,
        channels_last,
        inputs=lambda given: replace(given, g=memory_of(given.g)),
    ),
)
