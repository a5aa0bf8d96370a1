"""A check, what it found, and the rows of gradcheck's table that it is counted in."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from bncli.measure.reference import tolerance as tolerances
from bncli.measure.reference.candidate import Subject, native_in_the_same_dtype
from bncli.measure.reference.gradient_cases import Case, Inputs, inputs
from bncli.measure.reference.quantities import Observation, observe, quantities
from bncli.results.gradcheck import Effort


@dataclass(frozen=True)
class Setting:
    """What is checked, where, and how thoroughly."""

    subject: Subject
    device: torch.device
    effort: Effort

    @property
    def native(self) -> bool:
        """Whether torch's own operator is the one under test, and so no yardstick for itself."""
        return not self.subject.own and self.subject.name.startswith("native")

    @property
    def tolerance(self) -> str:
        """How large an error of a value may be, in words."""
        if self.native:
            return tolerances.WORDS_NATIVE
        return tolerances.WORDS_USER if self.subject.own else tolerances.WORDS

    def floors(self, case: Case, given: Inputs, truth: dict[str, Tensor]) -> dict[str, Tensor]:
        """The error that rounding alone explains in such a subject."""
        return tolerances.floors(case, given, truth, self.native, self.subject.interpreted, self.subject.own)


@dataclass(frozen=True)
class Evidence:
    """One case in full, for the diagnosis: what went in, what came out and what should have, in float64."""

    case: Case
    given: Inputs
    seen: dict[str, Tensor]
    truth: dict[str, Tensor]
    floors: dict[str, Tensor]
    problems: dict[str, str]


@dataclass(frozen=True)
class Finding:
    """A quantity of a check, judged. Errors are in units of the tolerance: up to 1 passes."""

    quantity: str
    error: float
    message: str = ""
    evidence: Evidence | None = None
    relative: float = math.nan  # the relative error, where the check is one of that
    of_native: float = math.nan  # the error over native's own, where native has one

    @property
    def failed(self) -> bool:
        return not self.error <= 1


@dataclass(frozen=True)
class Check:
    """What can be asked for by its identifier. `run` judges each of the quantities."""

    identifier: str
    quantities: tuple[str, ...]
    run: Callable[[], Iterable[Finding]]

    def named(self, quantity: str) -> str:
        return f"{self.identifier}/{quantity}" if quantity else self.identifier


@dataclass(frozen=True)
class Stage:
    """Checks that finish together the rows of their quantities; `rows` gives a quantity's row, `row` all others'."""

    section: str
    checks: list[Check]
    tolerance: str
    row: str = ""
    rows: dict[str, str] = field(default_factory=dict)


def compare(setting: Setting, case: Case, given: Inputs, second: bool = True) -> list[Finding]:
    """Every quantity of the subject on these inputs against the definition in float64."""
    truth = tolerances.reference(case, given)
    floors = setting.floors(case, given, truth)
    yardstick = Observation()
    if not setting.native:
        yardstick = observe(native_in_the_same_dtype(), case, given, second)
    native = yardstick.wide()
    wide = given.wide()  # before a kernel that writes into its input
    seen = observe(setting.subject.call, case, given, second)
    found = seen.wide()
    if changed := written(given, wide):
        seen.problems["forward"] = changed
    evidence = Evidence(case, wide, found, truth, floors, seen.problems)
    return [_judge(name, evidence, native) for name in quantities(case) if second or name != "double backward"]


def _judge(quantity: str, evidence: Evidence, native: dict[str, Tensor]) -> Finding:
    if quantity in evidence.problems:
        return Finding(quantity, math.inf, evidence.problems[quantity], evidence)
    worst, message, of_native = 0.0, "", math.nan
    for name, exact in evidence.truth.items():
        if name == quantity or (quantity == "double backward" and name.startswith(quantity)):
            if name not in evidence.seen:
                return Finding(quantity, math.inf, f"{name} was not computed", evidence)
            floor = evidence.floors[name]
            error = tolerances.in_tolerances(evidence.seen[name], exact, floor, native.get(name))
            if not error <= worst:
                worst, message = error, difference(name, evidence.seen[name], exact)
                of_native = tolerances.of_native(evidence.seen[name], exact, floor, native.get(name))
    if worst <= 1:
        return Finding(quantity, worst)
    return Finding(quantity, worst, message, evidence, of_native=of_native)


def written(given: Inputs, before: Inputs) -> str | None:
    """Which inputs are no longer what they were, `before` being a copy in float64; None where all are.

    The running statistics are left out: a call is handed copies of them, which `observe` looks at.
    """
    names = [name for name in vars(given) if name not in ("smooth", "running_mean", "running_var")]
    now = given.wide()
    changed = [name for name in names if not same_bits(getattr(now, name), getattr(before, name))]
    return f"{', '.join(changed)} changed during the call" if changed else None


def same_bits(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether two tensors are equal, NaN being equal to NaN; or both missing."""
    if one is None or other is None:
        return one is other
    return bool(((one == other) | (one.isnan() & other.isnan())).all())


def difference(name: str, found: Tensor, exact: Tensor) -> str:
    """Where two tensors differ most, with both values."""
    error = torch.nan_to_num((found - exact).abs(), math.inf, math.inf)
    error = torch.where(found.isfinite() | exact.isfinite(), error, 0.0)
    place = [int(i) for i in torch.unravel_index(error.argmax(), error.shape)]
    where = ", ".join(map(str, place))
    scale = float(exact[exact.isfinite()].norm())
    relative = f"; relative error {float(error.norm()) / scale:.2g}" if scale and error.isfinite().all() else ""
    return f"{name}[{where}] is {float(found[tuple(place)]):.7g}; expected {float(exact[tuple(place)]):.7g}{relative}"


def fresh(setting: Setting, case: Case) -> tuple[Case, Inputs]:
    """The case of the subject's norm, with the inputs that its identifier stands for."""
    case = replace(case, norm=setting.subject.norm)
    return case, inputs(case, setting.device)
