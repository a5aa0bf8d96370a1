"""The judge: each quantity of a kernel's run against the definition in float64; checks and their verdicts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from bncli.measure.reference import tolerance as tolerances
from bncli.measure.reference.candidate import Candidate, native_in_the_same_dtype
from bncli.measure.reference.case import DTYPES, Case, Inputs, inputs
from bncli.measure.reference.observe import SECOND, Observation, observe, poisoned, quantities
from bncli.names import FUSED_ACTIVATIONS
from bncli.results.finding import Finding, FindingKind
from bncli.results.gradcheck import CheckedCall, CheckFailure, Effort, NotChecked, ToleranceRule


@dataclass(frozen=True)
class CheckContext:
    """What is checked, where, and how thoroughly."""

    candidate: Candidate
    device: torch.device
    effort: Effort = "quick"

    @property
    def native(self) -> bool:
        """Whether torch's own operator is the one under test, and so no yardstick for itself."""
        return self.candidate.native

    @property
    def interpreted(self) -> bool:
        """Whether Triton's interpreter runs in place of a GPU."""
        return self.candidate.interpreted

    @property
    def rule(self) -> tolerances.Rule:
        """How large an error of a value may be."""
        return "native" if self.native else "own function" if self.candidate.own else "kernel"

    def floors(self, case: Case, given: Inputs, truth: dict[str, Tensor]) -> dict[str, Tensor]:
        """The error that rounding alone explains in such a candidate, of the quantities in `truth`."""
        found = tolerances.expected(case, given).floors(self.rule, self.interpreted)
        return {name: found[name] for name in truth}

    def fresh(self, case: Case) -> tuple[Case, Inputs]:
        """The case of the candidate's norm, with the inputs that its identifier stands for."""
        case = replace(case, norm=self.candidate.norm)
        return case, inputs(case, self.device)


# --- one call of the kernel -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Evidence:
    """One case in full, for the diagnosis: what went in, what came out and what should have, in float64."""

    case: Case
    given: Inputs
    seen: dict[str, Tensor]
    truth: dict[str, Tensor]
    floors: dict[str, Tensor]


@dataclass(frozen=True)
class Outcome:
    """What a check found of each of its quantities; "" for the single result of a check that has one."""

    findings: dict[str, Finding]
    evidence: Evidence | None = None

    @property
    def wrong(self) -> Finding | None:
        """The first quantity that is wrong, in the order in which they are computed."""
        return next((finding for finding in self.findings.values() if finding.failed), None)


def compare(context: CheckContext, case: Case, given: Inputs, second: bool = True) -> Outcome:
    """Every quantity of the candidate on these inputs against the definition in float64."""
    expected = tolerances.expected(case, given, second)
    yardstick = Observation()
    if not context.native:
        yardstick = observe(native_in_the_same_dtype(), case, given, second)
    native = yardstick.wide()
    wide = given.wide()  # before a kernel that writes into its input
    with poisoned():
        seen = observe(context.candidate.call, case, given, second)
    if changed := written(given, wide):
        seen.problems["forward"] = Finding("input_written", names=changed)
    evidence = Evidence(case, wide, seen.wide(), expected.truth, expected.floors(context.rule, context.interpreted))
    return judged(evidence, seen.problems, native)


def judged(evidence: Evidence, problems: dict[str, Finding], native: dict[str, Tensor]) -> Outcome:
    """Every quantity of a run: its error in tolerances. native: the values of torch's own kernel in the same dtype."""
    second = any(name in SECOND for name in evidence.truth)
    names = [name for name in quantities(evidence.case) if second or name != "double backward"]
    return Outcome({name: problems.get(name) or _judge(name, evidence, native) for name in names}, evidence)


def _judge(quantity: str, evidence: Evidence, native: dict[str, Tensor]) -> Finding:
    """The worst of the tensors of that name; of a double backward there are several."""
    worst = Finding("right", quantity, 0.0)
    for name in SECOND if quantity == "double backward" else (quantity,):
        if name not in evidence.truth:
            continue
        if name not in evidence.seen:
            return Finding("not_computed", name)
        found, exact, floor = evidence.seen[name], evidence.truth[name], evidence.floors[name]
        error = tolerances.in_tolerances(found, exact, floor, native.get(name))
        if error > 1 and error > worst.error:
            of_native = tolerances.of_native(found, exact, floor, native.get(name))
            worst = difference(name, found, exact, error, None if math.isnan(of_native) else of_native)
        elif error > worst.error:
            worst = replace(worst, error=error)
    return worst


def difference(name: str, found: Tensor, exact: Tensor, error: float, of_native: float | None = None) -> Finding:
    """Where two tensors differ most, with both values."""
    gap = torch.nan_to_num((found - exact).abs(), math.inf, math.inf)
    gap = torch.where(found.isfinite() | exact.isfinite(), gap, 0.0)
    at = tuple(int(i) for i in torch.unravel_index(gap.argmax(), gap.shape))
    scale = float(exact[exact.isfinite()].norm())
    relative = float(gap.norm()) / scale if scale and gap.isfinite().all() else None
    value, expected = float(found[at]), float(exact[at])
    return Finding(
        number_kind(value, expected),
        name,
        error,
        at=at,
        found=value,
        expected=expected,
        relative=relative,
        of_native=of_native,
    )


def number_kind(found: float, expected: float) -> FindingKind:
    """The kind of a wrong number."""
    if math.isnan(expected):
        return "nan_missing"
    return "nan_unexpected" if math.isfinite(expected) and not math.isfinite(found) else "off"


def written(given: Inputs, before: Inputs) -> tuple[str, ...]:
    """Which inputs are no longer what they were, `before` being a copy in float64.

    The running statistics are left out: a call is handed copies of them, which `observe` looks at.
    """
    names = [name for name in vars(given) if name not in ("smooth", "running_mean", "running_var")]
    now = given.wide(before.x.device)
    return tuple(name for name in names if not same_bits(getattr(now, name), getattr(before, name)))


def same_bits(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether two tensors are equal, NaN being equal to NaN; or both missing."""
    if one is None or other is None:
        return one is other
    return bool(((one == other) | (one.isnan() & other.isnan())).all())


# --- what a kernel refuses --------------------------------------------------------------------------------------------

PROBE = Case("train", "float32", "contiguous", (4, 4, 3))


def refusals(context_of: Callable[[Case], CheckContext | None]) -> dict[str, NotChecked]:
    """What a kernel refuses by raising, though it takes a plain float32 input: name -> its reason.

    The name of a dtype: any exception counts. Of a fused operation, or `eval`: NotImplementedError alone, which says
    that it was never offered; any other is a bug. context_of: a kernel for each case, None where it does not take it.
    """
    reasons: dict[str, NotChecked] = {}
    context = context_of(PROBE)
    if context is None or _raised(context, PROBE):
        return reasons
    if context.device.type == "mps":
        reasons["float64"] = NotChecked("no float64 on the device")
    more = (*FUSED_ACTIVATIONS, "residual") if context.candidate.fuses else ()
    probes = {name: replace(PROBE, dtype=name) for name in DTYPES if name not in reasons}
    probes |= {name: replace(PROBE, fusion=name) for name in more}
    if context.candidate.evaluates:
        probes["eval"] = replace(PROBE, mode="eval")
    for name, case in probes.items():
        context = context_of(case)
        raised = context and _raised(context, case)
        if raised and (name in DTYPES or raised.exception == "NotImplementedError"):
            reasons[name] = NotChecked("refused", raised)
    return reasons


def _raised(context: CheckContext, case: Case) -> Finding | None:
    """What the forward pass of a plain case raised."""
    case, given = context.fresh(case)
    problem = observe(context.candidate.call, case, given, second=False).problems.get("forward")
    return problem if problem and problem.exception else None


# --- checks -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Check:
    """What can be asked for by its identifier. `run` judges each of the quantities."""

    section: str
    identifier: str  # made of the fields, for people
    run: Callable[[], Outcome]
    name: str = ""  # gradcheck, same-bits, variance, ...; empty in the values section
    case: Case | None = None  # None: inputs of the check's own
    parameter: float | None = None  # mean over deviation, where the check varies that
    variant: str = ""  # of a hard input: nan+relu, transposed, ...
    quantities: tuple[str, ...] = ("",)

    def named(self, quantity: str) -> str:
        return f"{self.identifier}/{quantity}" if quantity else self.identifier


@dataclass(frozen=True)
class CheckGroupPlan:
    """Checks that finish together the rows of their quantities; `rows` gives a quantity's row, `row` all others'."""

    section: str
    checks: list[Check]
    rule: ToleranceRule
    row: str = ""
    rows: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    """What was found of one quantity of a check, and the row of the table that counts it."""

    check: Check
    row: str
    quantity: str
    finding: Finding
    evidence: Evidence | None = None

    @property
    def failed(self) -> bool:
        return self.finding.failed

    @property
    def identifier(self) -> str:
        return self.check.named(self.quantity)

    def failure(self) -> CheckFailure:
        check, case = self.check, self.check.case
        call = CheckedCall(case.mode, case.dtype, case.layout, case.shape, case.fusion, case.eps) if case else None
        return CheckFailure(
            self.identifier, check.section, check.name, call, check.parameter, self.quantity, self.finding
        )
