"""Inputs on which kernels break: most judged like any case, against the definition, some by a rule of their own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from bncli.kernels.layout import per_channel
from bncli.measure.gradcheck.hard_cases import BOTH, FOR_ANY_NORM, ROWS, Input, far_from_zero
from bncli.measure.gradcheck.invariants import grouped, judge
from bncli.measure.reference import tolerance as tolerances
from bncli.measure.reference.candidate import native_in_the_same_dtype
from bncli.measure.reference.gradient_cases import Case, Inputs, away_from_the_kink, unit_roundoff
from bncli.measure.reference.observe import Check, Finding, Setting, Stage, compare, difference, fresh
from bncli.measure.reference.quantities import observe, why_not_like

WORDS = "as for values: NaN where the definition has NaN, its numbers everywhere else"


def stages(setting: Setting, refused: dict[str, str]) -> Iterator[Stage]:
    """A row for each kind of hard input."""
    batch = setting.subject.tracks
    for name, members in ROWS.items():
        if batch or name in FOR_ANY_NORM:
            chosen = members if setting.effort != "quick" else members[:4]
            checks = [check for member in chosen for check in _checks(setting, name, member, refused)]
            yield Stage("hard inputs", checks, WORDS, row=name)
    if batch:
        yield Stage("hard inputs", list(_variances(setting)), VARIANCE, row="variance far from zero")
        yield Stage("hard inputs", [_huge(setting)], HUGE, row="values of 1e30")
        refusing = [_one_value(setting, shape) for shape in ((1, 3), (1, 3, 1, 1))]
        yield Stage("hard inputs", refusing, "a ValueError, as torch raises", row="one value per channel is refused")
        empty = [_empty(setting, mode) for mode in BOTH if mode == "train" or setting.subject.evaluates]
        words = "an empty output, gradients of 0, running statistics unchanged, as torch"
        yield Stage("hard inputs", empty, words, row="empty batch")


def _slug(row: str) -> str:
    return row.replace(",", "").replace(" ", "-")


def _checks(setting: Setting, row: str, member: Input, refused: dict[str, str]) -> Iterator[Check]:
    channels = 3 if setting.subject.tracks else 4
    shape = (member.shape[0], channels, *member.shape[2:])
    for mode in member.modes:
        for dtype in member.dtypes:
            fused = member.fusion != "plain" and not setting.subject.fuses
            if fused or (mode == "eval" and not setting.subject.evaluates):
                continue
            case = Case(mode, dtype, member.layout, shape, member.fusion, member.eps, member.momentum)
            if case.needs & set(refused):
                continue
            yield Check(f"hard/{_slug(row)}/{member.name}/{mode}/{dtype}", ("",), _compared(setting, case, member))


def _compared(setting: Setting, case: Case, member: Input) -> Callable[[], list[Finding]]:
    """The worst of the case's quantities."""

    def run() -> list[Finding]:
        own, given = fresh(setting, case)
        given = member.change(given, own)
        if member.fusion != "plain":
            given = away_from_the_kink(given, own)
        # Second derivatives at such inputs are left out: the values section has them, and torch's own overflow here.
        found = compare(setting, own, given, second=False)
        worst = max(found, key=lambda finding: finding.error)
        message = f"{worst.quantity}: {worst.message}" if worst.failed else ""
        return [replace(worst, quantity="", message=message)]

    return run


# --- the variance -----------------------------------------------------------------------------------------------------

LIMITS = {1e2: 1e-6, 1e3: 1e-6, 1e4: 5e-6}  # relative error of the float32 variance at mean / deviation
VARIANCE = (
    "relative error of the float32 variance: 1e-6 at mean/deviation 1e2 and 1e3, 5e-6 at 1e4; twice that of the "
    "output's, whose own rounding counts too; of a function of yours, twice native's error and "
    "sqrt(m) roundings, of a sum in order, where these are larger"
)


def _variances(setting: Setting) -> Iterator[Check]:
    for ratio in LIMITS:

        def run(ratio: float = ratio) -> list[Finding]:
            case, given = fresh(setting, Case("train", "float32", "contiguous", (8, 3, 16, 16), momentum=1.0))
            given = far_from_zero(ratio)(given, case)
            seen = observe(setting.subject.call, case, given, second=False)
            if seen.problems:
                return [Finding("", math.inf, next(iter(seen.problems.values())))]
            return [_variance_error(setting, case, given, seen.wide(), LIMITS[ratio])]

        yield Check(f"hard/variance/{ratio:g}", ("",), run)


def _variance_error(setting: Setting, case: Case, given: Inputs, seen: dict[str, Tensor], limit: float) -> Finding:
    native = observe(native_in_the_same_dtype(), case, given, second=False).wide()
    exact = _far_variances(given.wide(), case)
    allowed = {"running_var": limit * exact["running_var"], "the variance of y": 2 * limit * exact["the variance of y"]}
    if setting.subject.own:
        more = _more_for_the_user(setting, case, given, exact)
        allowed = {name: torch.maximum(value, more[name]) for name, value in allowed.items()}
    findings = []
    for name, value in _measured(seen).items():
        own = (_measured(native)[name] - exact[name]).abs()
        error = (value - exact[name]).abs()
        tolerance = torch.maximum(allowed[name], 2 * own) if setting.subject.own else allowed[name]
        found = judge(name, value, exact[name], tolerance)
        relative = float((error / exact[name]).nan_to_num(math.inf).max())
        times = float(error.max() / own.max()) if not setting.native and own.max() > 0 else math.nan
        findings.append(replace(found, relative=relative, of_native=times))
    return max(findings, key=lambda finding: finding.error)


def _more_for_the_user(setting: Setting, case: Case, given: Inputs, exact: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a sum in order moves the variance by; and y = s x + t, with t large, is right but moves that of y."""
    truth = tolerances.reference(case, given)
    floor = grouped(setting.floors(case, given, truth)["forward"], "batch").mean(1)
    roundings = math.sqrt(case.m) * unit_roundoff(torch.float32)
    of_y = exact["the variance of y"]
    return {"running_var": roundings * exact["running_var"], "the variance of y": 2 * of_y.sqrt() * floor}


def _measured(seen: dict[str, Tensor]) -> dict[str, Tensor]:
    """The variances that a kernel gives away, (C): its running one, where it has one, and that of its output."""
    kept = {"running_var": seen["running_var"]} if "running_var" in seen else {}
    return {**kept, "the variance of y": seen["forward"].var([0, 2, 3], correction=0)}


def _far_variances(given: Inputs, case: Case) -> dict[str, Tensor]:
    """What they should be with a momentum of 1."""
    assert given.weight is not None
    over = [0, 2, 3]
    var = given.x.var(over, correction=0)
    expected = given.weight**2 * var / (var + case.eps)
    return {"running_var": given.x.var(over, correction=1), "the variance of y": expected}


HUGE = "y right, or the bias (an infinite variance), or NaN where the variance overflows; other channels as ever"


def _huge(setting: Setting) -> Check:
    def run() -> list[Finding]:
        case, given = fresh(setting, Case("train", "float32", "contiguous", (4, 3, 5, 7)))
        x = given.x.clone()
        x[:, 1] *= 1e30
        given = replace(given, x=x)
        truth = tolerances.reference(case, given)
        floors = setting.floors(case, given, truth)
        seen = observe(setting.subject.call, case, given, second=False)
        if seen.problems:
            return [Finding("", math.inf, next(iter(seen.problems.values())))]
        y, exact, floor = seen.wide()["forward"], truth["forward"], floors["forward"]
        assert given.bias is not None
        bias = per_channel(given.wide().bias, y).expand_as(y)  # type: ignore[arg-type]
        with_bias = [tolerances.in_floors(y[:, 1], other[:, 1], floor[:, 1]) for other in (exact, bias)]
        overflowed = 0.0 if y[:, 1].isnan().all() else min(with_bias)
        others = max(tolerances.in_floors(y[:, c], exact[:, c], floor[:, c]) for c in (0, 2))
        error = max(overflowed, others)
        return [Finding("", error, difference("y", y, exact) if not error <= 1 else "")]

    return Check("hard/huge/1e30", ("",), run)


# --- too few values ---------------------------------------------------------------------------------------------------


def _one_value(setting: Setting, shape: tuple[int, ...]) -> Check:
    def run() -> list[Finding]:
        case, given = fresh(setting, Case("train", "float32", "contiguous", shape))
        arguments = (given.x, given.running_mean, given.running_var, given.weight, given.bias, True, 0.1, case.eps)
        try:
            setting.subject.call(*arguments, None, None)
        except ValueError:
            return [Finding("", 0.0)]
        except (Exception, SystemExit) as error:
            return [Finding("", math.inf, f"raised {type(error).__name__}: {error}; expected a ValueError")]
        return [Finding("", math.inf, f"an input {shape} has a variance of 0 over one value; expected a ValueError")]

    return Check(f"hard/one-value/{'x'.join(map(str, shape))}", ("",), run)


def _empty(setting: Setting, mode: str) -> Check:
    def run() -> list[Finding]:
        case, given = fresh(setting, Case(mode, "float32", "contiguous", (0, 3, 4, 4)))
        seen = observe(setting.subject.call, case, given, second=False)
        problem = next(iter(seen.problems.values()), None) or why_not_like(seen.values["forward"], given.x)
        for name, value in seen.values.items():
            if problem is None and name.startswith("d") and not bool((value == 0).all()):
                problem = f"{name} is not 0"
            if problem is None and name.startswith("running") and not torch.equal(value, getattr(given, name)):
                problem = f"{name} moved"
        return [Finding("", math.inf if problem else 0.0, problem or "")]

    return Check(f"hard/empty/{mode}", ("",), run)
