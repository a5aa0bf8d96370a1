"""Comparison of a kernel's results with the definition in float64; checks and their verdicts."""

from __future__ import annotations

import contextlib
import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bncli.errors import Unavailable
from bncli.kernels.definition import Forward
from bncli.measure.reference import tolerance as tolerances
from bncli.measure.reference.candidate import NATIVE, Candidate, Rule
from bncli.measure.reference.case import (
    CPU,
    DTYPES,
    Case,
    Inputs,
    away_from_the_kink,
    channels_of,
    inputs,
    timed_inputs,
)
from bncli.measure.reference.observe import SECOND, finding_of, observe, poisoned, quantities
from bncli.measure.reference.tolerance import Expected
from bncli.names import FUSED_ACTIVATIONS
from bncli.results.finding import Finding, FindingKind
from bncli.results.gradcheck import CheckedCall, CheckFailure, Effort, NotChecked, ToleranceRule

MOST_ELEMENTS = {"cpu": 2**18, "cuda": 2**24}  # of a large case, judged in float64, in some 20 passes over them
PERTURBED_ELEMENTS = 2**15  # of these, in some 200 passes
FEWEST_CHANNELS = 3  # of a large case: the first, one within, and the last
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # bytes of an element -> integers of that size


@dataclass(frozen=True)
class CheckContext:
    """What is checked, where, and how thoroughly."""

    candidate: Candidate
    device: torch.device
    effort: Effort = "quick"

    def floors(self, held_to: Expected) -> dict[str, Tensor]:
        """The error that rounding explains, by the candidate's rule."""
        return held_to.floors(self.candidate.rule, self.candidate.interpreted)

    def fresh(self, case: Case) -> tuple[Case, Inputs]:
        """The case of the candidate's norm, with the inputs that its identifier stands for."""
        case = replace(case, norm=self.candidate.norm)
        return case, inputs(case, self.device)


# --- one call of the kernel -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Evidence:
    """Inputs, results, and correct results of a case in float64, for the diagnosis."""

    case: Case
    given: Inputs
    seen: dict[str, Tensor]
    truth: dict[str, Tensor]
    floors: dict[str, Tensor]


@dataclass(frozen=True)
class Outcome:
    """The finding for each quantity of a check; the quantity of a check with one result is ""."""

    findings: dict[str, Finding]
    evidence: Evidence | None = None

    @property
    def wrong(self) -> Finding | None:
        """The first quantity that is wrong, in the order in which they are computed."""
        return next((finding for finding in self.findings.values() if finding.failed), None)


def compare(context: CheckContext, case: Case, given: Inputs, second: bool = True) -> Outcome:
    """Every quantity of the candidate on these inputs against the definition in float64."""
    held_to = tolerances.expected(case, given, second)
    # The tolerance of torch's operator does not depend on its own error, and it has no whitening.
    alone = context.candidate.rule in ("native", "module")
    native = {} if alone else tolerances.native_results(case, given, second)
    wide = given.wide()  # before a kernel that writes into its input
    with poisoned():
        seen = observe(context.candidate.call, case, given, second)
    if changed := written(given, wide):
        seen.problems["forward"] = Finding("input_written", names=changed)
    evidence = Evidence(case, wide, seen.wide(), held_to.truth, context.floors(held_to))
    return judged(evidence, seen.problems, native)


def judged(evidence: Evidence, problems: dict[str, Finding], native: dict[str, Tensor]) -> Outcome:
    """Every quantity of a run: its error in tolerances. native: the values of torch's own kernel in the same dtype."""
    second = any(name in SECOND for name in evidence.truth)
    names = [name for name in quantities(evidence.case) if second or name != "double backward"]
    return Outcome({name: problems.get(name) or _judge(name, evidence, native) for name in names}, evidence)


def _judge(quantity: str, evidence: Evidence, native: dict[str, Tensor]) -> Finding:
    """The finding for a quantity: the worst of its tensors, of which a double backward has several."""
    worst = Finding("right", quantity, 0.0)
    for name in SECOND if quantity == "double backward" else (quantity,):
        if name not in evidence.truth:
            continue
        if name not in evidence.seen:
            return Finding("not_computed", name)
        found, exact, floor = evidence.seen[name], evidence.truth[name], evidence.floors[name]
        error, of_native = tolerances.in_tolerances(found, exact, floor, native.get(name))
        if error > 1 and error > worst.error:
            worst = difference(name, found, exact, error, of_native, floor)
        elif error > worst.error:
            worst = replace(worst, error=error)
    return worst


def difference(
    name: str, found: Tensor, exact: Tensor, error: float, of_native: float | None = None, floor: Tensor | float = 1.0
) -> Finding:
    """Where two tensors differ most, in units of `floor`, with both values."""
    gap = torch.nan_to_num((found - exact).abs(), math.inf, math.inf)
    gap = torch.where(found.isfinite() | exact.isfinite(), gap, 0.0)
    at = tuple(int(i) for i in torch.unravel_index((gap / floor).argmax(), gap.shape))
    scale = float(exact[exact.isfinite()].norm())
    relative = float(gap.norm()) / scale if scale and gap.isfinite().all() else None
    value, right = float(found[at]), float(exact[at])
    kind = number_kind(value, right)
    return Finding(kind, name, error, at, value, right, relative=relative, of_native=of_native)


def number_kind(found: float, expected: float) -> FindingKind:
    """The kind of a wrong number."""
    if math.isnan(expected):
        return "nan_missing"
    return "nan_unexpected" if math.isfinite(expected) and not math.isfinite(found) else "off"


def written(given: Inputs, before: Inputs) -> tuple[str, ...]:
    """The inputs that differ from `before`, a copy in float64.

    Running statistics are left out: a call gets copies of them, which `observe` checks.
    """
    names = [name for name in vars(given) if name not in ("smooth", "running_mean", "running_var")]
    now = given.wide(before.x.device)
    return tuple(name for name in names if not same_bits(getattr(now, name), getattr(before, name)))


def same_bits(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether two tensors are equal, NaN being equal to NaN; or both missing."""
    if one is None or other is None:
        return one is other
    return bool(((one == other) | (one.isnan() & other.isnan())).all())


# --- a large case -----------------------------------------------------------------------------------------------------
# Batch norm treats each channel by itself, so the definition in float64 of some channels needs those alone. The kernel
# runs on the whole tensor, with the same tiles, threads and cache misses as in the timing.


@dataclass(frozen=True)
class Large:
    """The inputs of a large case, and the expected results of its judged channels."""

    case: Case
    given: Inputs  # of all channels
    channels: Tensor  # (k) int64, those that are judged
    part: Inputs  # of those channels, in float64
    expected: Expected
    native: dict[str, Tensor]  # results of torch's kernel in the case's dtype, as float64

    def judge(self, call: Forward, rule: Rule, *, poison: bool = True) -> Outcome:
        """Every quantity of the judged channels; those of the other channels must be finite.

        poison: fill uninitialized memory with NaN; not for a compiled function, which would be recompiled.
        """
        before = _checksums(self.given)
        with poisoned() if poison else contextlib.nullcontext():
            seen = observe(call, self.case, self.given, second=False)
        changed = written(self.given.of_channels(self.channels, self.case.layout), self.part)
        changed = changed or tuple(name for name, bits in _checksums(self.given).items() if bits != before[name])
        problems = {name: Finding("nan_unexpected", name) for name, t in seen.values.items() if not _finite(t)}
        problems |= seen.problems
        if changed:
            problems["forward"] = Finding("input_written", names=changed)
        device = self.part.x.device
        values = {name: channels_of(t.detach(), self.channels).to(device).double() for name, t in seen.values.items()}
        floors = self.expected.floors(rule)
        evidence = Evidence(self.expected.case, self.part, values, self.expected.truth, floors)
        # Torch's kernel gets the same tolerance here: the error of its sums may grow as m, depending on their order.
        return judged(evidence, problems, self.native)


def large(
    case: Case, device: torch.device, *, seed: int = 0, positive_weight: bool = False, most_elements: int | None = None
) -> Large:
    """Inputs of a case and the expected results of up to `most_elements` elements, in whole channels."""
    given = timed_inputs(case, device, seed)
    if positive_weight and given.weight is not None:
        given = replace(given, weight=given.weight.abs())
    most = most_elements if most_elements is not None else MOST_ELEMENTS[device.type]
    channels = _spread_out(case.shape[1], max(FEWEST_CHANNELS, most // case.m), device)
    wide_on = device if device.type == "cuda" else CPU
    small = replace(case, shape=(case.shape[0], len(channels), *case.shape[2:]))
    part = away_from_the_kink(given.of_channels(channels, case.layout), small, wide_on)
    given.g.index_copy_(1, channels, part.g)
    native = observe(NATIVE, case, given, second=False)  # on all channels: the size sets the order of its sums
    values = {name: channels_of(t, channels) for name, t in native.values.items()}
    if native.problems:  # it may run out of memory where another kernel does not
        values = observe(NATIVE, small, part, second=False).values
    held_to = tolerances.computed(small, part, False, wide_on, PERTURBED_ELEMENTS)
    wide = {name: t.to(wide_on, torch.float64) for name, t in values.items()}
    return Large(case, given, channels, part.wide(wide_on), held_to, wide)


def _spread_out(channels: int, count: int, device: torch.device) -> Tensor:
    if count >= channels:
        return torch.arange(channels, device=device)
    return torch.linspace(0, channels - 1, count, dtype=torch.float64, device=device).round().long()


def _checksums(given: Inputs) -> dict[str, int]:
    """The sum of each tensor's bits, as integers that wrap around: exact in any order, without another such tensor."""
    found = {}
    for name, t in vars(given).items():
        if t is not None and not name.startswith("running"):  # every call gets copies of these
            integers = BITS[t.element_size()]
            found[name] = int(t.detach().view(integers).sum(dtype=integers))
    return found


def _finite(t: Tensor) -> bool:
    """Whether all values are finite, by their sum, without a temporary tensor of that size."""
    return math.isfinite(float(t.detach().sum(dtype=torch.float64 if t.dtype == torch.float64 else torch.float32)))


# --- what a kernel supports -------------------------------------------------------------------------------------------

PROBE = Case("train", "float32", "contiguous", (4, 4, 3))
MOST_COMPILATIONS = 100_000  # more than there are cases
# In torch's messages on the double backward of a compiled function.
COMPILED_ONCE = re.compile("does not currently support double backward|non-empty donated buffers")


def supported(context: CheckContext, dtypes: Sequence[str]) -> tuple[CheckContext, dict[str, NotChecked]]:
    """The context with what the kernel supports, and what it refuses. Raises Unavailable where nothing compiles."""
    if dynamo := sys.modules.get("torch._dynamo"):
        # Above its limit of 8 compilations torch.compile would run the function uncompiled.
        dynamo.config.recompile_limit = dynamo.config.accumulated_recompile_limit = MOST_COMPILATIONS
    checked, probe = context.candidate, replace(PROBE, dtype=dtypes[0])
    if checked.name == "compiled" and (raised := _raised(context, probe)):
        raise Unavailable(f"torch.compile cannot compile here: {raised.exception}: {raised.text}")
    refused = refusals(lambda case: context, dtypes)
    twice = _raised(context, probe, "double backward")
    if twice and COMPILED_ONCE.search(str(twice.text)):
        refused["double backward"] = NotChecked("compiled once", twice)
    evaluates, again = checked.evaluates and "eval" not in refused, "double backward" not in refused
    return replace(context, candidate=replace(checked, evaluates=evaluates, differentiates_twice=again)), refused


def refusals(
    context_of: Callable[[Case], CheckContext | None], dtypes: Sequence[str] = tuple(DTYPES)
) -> dict[str, NotChecked]:
    """What a kernel refuses by raising, although it accepts a plain input of the first dtype: name -> reason.

    For a dtype any exception counts. For a fused operation or `eval` only NotImplementedError counts, which means that
    it is not supported; any other is a bug. context_of: the context of a case, None if the kernel does not accept it.
    """
    reasons: dict[str, NotChecked] = {}
    probe = replace(PROBE, dtype=dtypes[0])
    context = context_of(probe)
    if context is None or _raised(context, probe):
        return reasons
    if context.device.type == "mps":
        reasons["float64"] = NotChecked("no float64 on the device")
    more = (*FUSED_ACTIVATIONS, "residual") if context.candidate.fuses else ()
    probes = {name: replace(PROBE, dtype=name) for name in dtypes if name not in reasons}
    probes |= {name: replace(probe, fusion=name) for name in more}
    if context.candidate.evaluates:
        probes["eval"] = replace(probe, mode="eval")
    for name, case in probes.items():
        context = context_of(case)
        raised = context and _raised(context, case)
        if raised and (name in DTYPES or raised.exception == "NotImplementedError"):
            reasons[name] = NotChecked("refused", raised)
    return reasons


def _raised(context: CheckContext, case: Case, quantity: str = "forward") -> Finding | None:
    """The exception of the forward pass of a plain case, or of the double backward."""
    case, given = context.fresh(case)
    problem = observe(context.candidate.call, case, given, second=quantity != "forward").problems.get(quantity)
    return problem if problem and problem.exception else None


# --- checks -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Check:
    """A check that can be selected by its identifier. `run` judges each of the quantities."""

    section: str
    identifier: str  # made of the fields, for people
    run: Callable[[], Outcome]
    name: str = ""  # gradcheck, same-bits, variance, ...; empty in the values section
    case: Case | None = None  # None: the check makes its own inputs
    parameter: float | None = None  # mean over deviation, where the check varies that
    variant: str = ""  # of a hard input: nan+relu, transposed, ...
    quantities: tuple[str, ...] = ("",)

    def named(self, quantity: str) -> str:
        return f"{self.identifier}/{quantity}" if quantity else self.identifier


def single(context: CheckContext, case: Case, judge: Callable[[CheckContext, Case, Inputs], Finding]) -> Outcome:
    """A check with one result, on the inputs of its case. An exception of the kernel is a finding."""
    try:
        finding = judge(context, *context.fresh(case))
    except (Exception, SystemExit) as error:  # a kernel may raise anything
        finding = finding_of(error)
    return Outcome({"": finding})


@dataclass(frozen=True)
class CheckGroupPlan:
    """Checks that run together, and the table rows that they fill."""

    section: str
    checks: list[Check]
    rule: ToleranceRule
    rows: dict[str, str]  # quantity -> row


@dataclass(frozen=True)
class Verdict:
    """The finding for one quantity of a check, and the table row that counts it."""

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
            self.identifier, check.section, check.name, call, check.parameter, self.quantity, self.finding, self.row
        )
