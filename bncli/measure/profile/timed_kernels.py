"""Kernels under test in the kernel view: a common signature, and checks before the timing."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from bncli.errors import Unavailable
from bncli.kernels.definition import Forward
from bncli.measure.reference import candidate as reference
from bncli.measure.reference import case as cases
from bncli.measure.reference.candidate import rule
from bncli.measure.reference.case import Inputs
from bncli.measure.reference.judge import CheckContext, Large, compare, large, refusals
from bncli.measure.reference.observe import finding_of
from bncli.measure.timing.clock import Work
from bncli.results.finding import Finding
from bncli.results.profile import Case, Direction, KernelCost


@dataclass(frozen=True)
class TimedKernel:
    """One kernel on one case. implementation: in words, None if unknown; or what tells it after a call."""

    case: cases.Case
    call: Forward
    implementation: str | Callable[[], str | None] | None = None
    overwrites: bool = False  # it overwrites x, so each call needs a copy
    positive_weight: bool = False  # it is batch norm only for weights above 0
    compiles: bool = False  # on its first call

    @property
    def ran(self) -> str | None:
        """The implementation that really ran: a call may have found that a device refuses a cooperative launch."""
        return self.implementation() if callable(self.implementation) else self.implementation

    def arguments(self, inputs: Inputs) -> tuple[Any, ...]:
        """The arguments of one call, with a copy of x where the call writes over it."""
        x, *others = cases.arguments(self.case, inputs)
        return (x.clone() if self.overwrites else x, *others)

    def on_a_copy(self, x: Tensor, *others: Any) -> Tensor:
        """The call on a copy of x, if it overwrites x."""
        return self.call(x.clone() if self.overwrites else x, *others)

    def step(self, inputs: Inputs) -> Callable[[], object]:
        """One forward and backward pass, to be run once."""
        both = self.works(inputs)["both"]
        arguments = both.prepare()
        return lambda: both.run(arguments)

    def works(self, inputs: Inputs) -> dict[Direction, Work]:
        """Direction -> what a sample runs. The inputs require gradients from here on, which are not accumulated."""
        leaves = list(inputs.leaves().values())
        kept = None if self.overwrites else self.arguments(inputs)

        def arguments() -> tuple[Any, ...]:
            return kept or self.arguments(inputs)

        def backward(y: Tensor) -> object:
            return torch.autograd.grad(y, leaves, inputs.g)

        return {
            "both": Work(lambda prepared: backward(self.call(*prepared)), arguments),
            "forward": Work(lambda prepared: self.call(*prepared), arguments),
            "backward": Work(backward, lambda: self.call(*arguments())),
        }


Source = Callable[[cases.Case], TimedKernel]  # raises Unavailable, with the reason, for a case that it does not take


# --- judged on small cases, once --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Wrong:
    """A wrong result of a kernel, and the identifier of the small case that gives it; None for the timed shape."""

    finding: Finding
    case: str | None = None


def wrong_on_cases(kernel: str, source: Source, device: torch.device) -> Wrong | None:
    """The first wrong result on gradcheck's quick cases without second derivatives, of those that the kernel takes.

    A kernel that is compiled is left out: each case would be compiled.
    """

    def taken(case: cases.Case) -> TimedKernel | None:
        try:
            return source(case)
        except Unavailable:
            return None

    def context_of(case: cases.Case) -> CheckContext | None:
        timed = taken(case)
        return None if timed is None else context(timed)

    def context(timed: TimedKernel) -> CheckContext:
        return CheckContext(reference.Candidate(kernel, "batch", timed.on_a_copy, "", rule(kernel)), device)

    chosen = cases.cases("quick", "batch", fuses=True, evaluates=True)
    first = taken(chosen[0])
    if first is not None and first.compiles:
        return None
    refused = refusals(context_of).keys()
    for case in chosen:
        timed = None if case.needs & refused else taken(case)
        if timed is None:
            continue
        inputs = cases.inputs(case, device)
        if timed.positive_weight:
            inputs = cases.with_positive_weight(inputs, case)
        wrong = compare(context(timed), case, inputs, second=False).wrong
        if wrong is not None:
            return Wrong(wrong, case.identifier)
    return None


# --- judged on the case that is timed ---------------------------------------------------------------------------------


@dataclass
class JudgedCase:
    """The kernels of one case: the correct ones, with the tensors that all of them are timed on, and rows of others."""

    case: Case
    calls: int
    inputs: Inputs | None = None
    correct: dict[str, TimedKernel] = field(default_factory=dict)
    refused: dict[str, KernelCost] = field(default_factory=dict)
    compile_s: dict[str, float] = field(default_factory=dict)
    judged_channels: int = 0

    def refuse(self, kernel: str, reason: Unavailable | Wrong, timed: TimedKernel | None = None) -> None:
        """Add a row with the reason. A kernel that raises is wrong, except for lack of memory or failed compilation."""
        self.correct.pop(kernel, None)
        row = KernelCost(self.case, kernel, self.calls, None if timed is None else timed.ran)
        if isinstance(reason, Unavailable):
            self.refused[kernel] = replace(row, error=str(reason))
            return
        finding = reason.finding
        if finding.text is None:
            row = replace(row, error="wrong result")
        elif timed is not None and timed.compiles:
            self.refused[kernel] = replace(row, error=f"torch.compile: {finding.exception}: {finding.text}")
            return
        else:
            row = replace(row, error=f"{finding.exception}: {finding.text}")
        if finding.kind != "no_memory":
            row = replace(row, wrong=True, finding=finding, wrong_case=reason.case)
        self.refused[kernel] = row


def judged_case(
    case: Case,
    calls: int,
    sources: Mapping[str, Source],
    device: torch.device,
    *,
    may_compile: bool = True,
    wrong: Mapping[str, Wrong] | None = None,
    now_s: Callable[[], float] = time.monotonic,
) -> JudgedCase:
    """Run each kernel once, forward and backward, and judge its results.

    wrong: the kernels that are known to be wrong, which are not run.
    """
    judged = JudgedCase(case, calls)
    larges: dict[bool, Large] = {}  # by whether all weights are above 0
    for kernel, source in sources.items():
        timed: TimedKernel | None = None
        if wrong is not None and kernel in wrong:
            judged.refuse(kernel, wrong[kernel])
            continue
        try:
            timed = source(cases.timed(case))
            if timed.compiles and not may_compile:
                continue
            positive = timed.positive_weight
            if positive not in larges:
                larges[positive] = large(timed.case, device, positive_weight=positive)
            _judge(judged, kernel, timed, larges[positive], now_s)
        except Unavailable as reason:
            judged.refuse(kernel, reason, timed)
        except Exception as raised:  # a kernel may raise anything, and the others' rows stand
            judged.refuse(kernel, Wrong(finding_of(raised)), timed)
    return judged


def _judge(judged: JudgedCase, kernel: str, timed: TimedKernel, shape: Large, now_s: Callable[[], float]) -> None:
    began_s = now_s()
    wrong = shape.judge(timed.on_a_copy, rule(kernel), poison=not timed.compiles).wrong
    if timed.compiles:
        judged.compile_s[kernel] = now_s() - began_s
    if wrong is not None:
        judged.refuse(kernel, Wrong(wrong), timed)
        return
    judged.correct[kernel] = timed
    judged.inputs = judged.inputs or shape.given
    judged.judged_channels = len(shape.channels)
