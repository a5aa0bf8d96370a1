"""Symptoms: bugs that are recognised by which checks failed and which passed; and a summary of failures without one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import inf, isfinite, nan

from bncli.measure.gradcheck.hard_inputs import NOT_FINITE, STRIDED_G, STRIDED_X
from bncli.measure.reference.case import Case
from bncli.measure.reference.judge import Verdict
from bncli.measure.reference.observe import GRADIENTS, RUNNING, SECOND
from bncli.names import KINKED_ACTIVATIONS
from bncli.results.finding import FindingKind
from bncli.results.gradcheck import Diagnosis, Facet, FailureSummary

Verdicts = list[Verdict]
RAISED: tuple[FindingKind, ...] = ("raised", "no_memory", "leaf_written", "saved_written")
SOMETHING_ELSE: tuple[FindingKind, ...] = ("wrong_type", "wrong_shape", "wrong_dtype", "wrong_device")
HALF = ("float16", "bfloat16")


@dataclass(frozen=True)
class Symptom:
    recognise: Callable[[Verdicts], Diagnosis | None]
    decisive: bool = False  # it explains all other failures, so that nothing else is guessed
    compatible: bool = False  # worth naming beside a known bug that explains failures: it does not follow from one


def _failed(verdicts: Verdicts) -> Verdicts:
    return [verdict for verdict in verdicts if verdict.failed]


def _of_kind(verdicts: Verdicts, *kinds: FindingKind) -> Verdicts:
    return [verdict for verdict in _failed(verdicts) if verdict.finding.kind in kinds]


def _shown_by(bug: str, failures: Verdicts) -> Diagnosis | None:
    """The bug, if there are failures that show it."""
    return Diagnosis(bug, first=failures[0].failure()) if failures else None


def _whole_calls(verdicts: Verdicts) -> Verdicts:
    """Of each call in the values section one verdict: on its output, which a failure of the whole call fails too."""
    return [verdict for verdict in verdicts if verdict.quantity == "forward"]


def something_else(verdicts: Verdicts) -> Diagnosis | None:
    """A result of another kind, shape, dtype or device."""
    return _shown_by("the function returns something else", _of_kind(_whole_calls(verdicts), *SOMETHING_ELSE))


def _raising(verdicts: Verdicts) -> Diagnosis | None:
    calls = _whole_calls(verdicts)
    found = _of_kind(calls, *RAISED)
    return Diagnosis("it raises", first=found[0].failure(), alike=len(found), of=len(calls)) if found else None


def raises(verdicts: Verdicts) -> Diagnosis | None:
    """Most of the calls that fail raise."""
    failed = _failed(_whole_calls(verdicts))
    return _raising(verdicts) if 2 * len(_of_kind(failed, *RAISED)) > len(failed) else None


def raises_too(verdicts: Verdicts) -> Diagnosis | None:
    """Some do, beside others that give wrong numbers."""
    return None if raises(verdicts) else _raising(verdicts)


def written(verdicts: Verdicts) -> Diagnosis | None:
    found = _of_kind(verdicts, "input_written", "running_moved") + _of_kind(verdicts, "leaf_written")
    return _shown_by("an input is written to", found)


def saved_is_written(verdicts: Verdicts) -> Diagnosis | None:
    return _shown_by("a tensor saved for the backward pass is written to", _of_kind(verdicts, "saved_written"))


def not_deterministic(verdicts: Verdicts) -> Diagnosis | None:
    return _shown_by("not deterministic", _of_kind(verdicts, "not_deterministic"))


def second_derivative(verdicts: Verdicts) -> Diagnosis | None:
    """The second derivative fails where the first is right; a wrong first one would explain it."""
    failed = _failed(verdicts)
    wrong_first = {v.check.identifier for v in failed if v.quantity in ("forward", "dx", "dweight", "dbias")}
    found = [v for v in failed if v.quantity == "double backward" and v.check.identifier not in wrong_first]
    if not found and not wrong_first:
        found = [v for v in failed if v.check.name == "gradgradcheck"]
    if not found or any(v.check.name == "gradcheck" for v in failed):
        return None
    first = found[0]
    zero = first.evidence is not None and not any(
        float(value.norm()) for name, value in first.evidence.seen.items() if name == SECOND[0]
    )
    missing = zero or first.finding.kind in (*RAISED, "no_second_derivative")
    if not missing and (one_pass_variance(verdicts) or less_accurate(verdicts)):
        return None
    return _shown_by("no second derivative" if missing else "a wrong second derivative", found)


def one_pass_variance(verdicts: Verdicts) -> Diagnosis | None:
    """float32 is right near zero, and wrong by (mean/deviation)^2 roundings farther away, until nothing is left of it.

    E[x^2] - E[x]^2 is the difference of two numbers that large (Chan, Golub & LeVeque 1983); the error of an update
    taken in order grows as mean/deviation.
    """
    far = {v.check.parameter: v for v in verdicts if v.check.name == "variance"}
    near, farther = far.get(100), far.get(1000)
    if near is None or farther is None or not farther.failed:
        return None
    if any(
        v.check.case.mode == "train" and v.check.case.dtype == "float32" and v.quantity in ("forward", "running_var")
        for v in _failed(verdicts)
        if v.check.section == "values" and v.check.case
    ):
        return None
    errors = [_or(v.finding.relative, nan) for v in (near, farther)]
    if not errors[1] >= max(QUADRATIC * errors[0], GONE):
        return None
    relative_errors = {f"{ratio:g}": _or(v.finding.relative, nan) for ratio, v in far.items()}
    bug = "one-pass variance, E[x^2] - E[x]^2"
    return Diagnosis(bug, first=farther.failure(), relative_errors=relative_errors)


QUADRATIC = 30  # of the 100 that the error grows by from mean/deviation 100 to 1000
GONE = 1e-3  # relative error of the variance: 1000^2 roundings of float32 are 0.06, a sequential update's 1e-5


def _or(number: float | None, otherwise: float) -> float:
    return otherwise if number is None else number


def less_accurate(verdicts: Verdicts) -> Diagnosis | None:
    """Rounding alone: a few tolerances everywhere, and a variance that is the worse the farther from zero."""
    failed = _failed(verdicts)
    far = [v for v in failed if v.check.name == "variance"]
    little = all(v.finding.error <= _most(v) for v in failed if v.check.name != "variance")
    linear = all(_or(v.finding.relative, inf) <= LINEAR * _or(v.check.parameter, nan) for v in far)
    if not failed or not little or not linear or not _grows([v for v in verdicts if v.check.name == "variance"]):
        return None
    worst = max(failed, key=lambda v: v.finding.error)
    times = [v.finding.of_native for v in failed if v.finding.of_native is not None]
    return Diagnosis(
        "less accurate than native",
        first=worst.failure(),
        alike=len(failed),
        of=len(verdicts),
        of_native=max(times, default=None),
    )


LINEAR = 1e-6  # relative error of the variance, times mean/deviation, of an update in order: sqrt(m) roundings are 3e-6


def _most(verdict: Verdict) -> float:
    """Tolerances that a case may miss by and be called less accurate. Those of half precision are wide as they are."""
    return 2.0 if verdict.check.case and verdict.check.case.dtype in HALF else 20.0


def _grows(far: Verdicts) -> bool:
    """Whether the error of the variance grows with mean/deviation, where it is not small anyway."""
    if not any(verdict.failed for verdict in far):
        return True
    return _or(far[-1].finding.relative, nan) >= 3 * _or(far[0].finding.relative, nan)


def half_precision(verdicts: Verdicts) -> Diagnosis | None:
    """Every failure is in half precision, the running statistics (or, without them, the output) among them."""
    failed = _failed(verdicts)
    if not all(v.check.case and v.check.case.dtype in HALF for v in failed):
        return None
    kept = [v for v in failed if v.quantity in RUNNING]
    return _shown_by("half-precision statistics", kept)


def _beside_nan(verdicts: Verdicts) -> Verdicts:
    """The failures at inputs with a NaN or an infinity, if there is none anywhere else."""
    failed = _failed(verdicts)
    return failed if all(v.row == NOT_FINITE for v in failed) else []


def nan_swallowed(verdicts: Verdicts) -> Diagnosis | None:
    return _shown_by("NaN swallowed", _of_kind(_beside_nan(verdicts), "nan_missing"))


def nan_leaks(verdicts: Verdicts) -> Diagnosis | None:
    return _shown_by("NaN leaks into other channels", _of_kind(_beside_nan(verdicts), "nan_unexpected"))


def derivative_at_nan(verdicts: Verdicts) -> Diagnosis | None:
    """Numbers that are wrong beside a NaN, where an activation with a kink follows, and nothing else."""
    found = _beside_nan(verdicts)
    kinked = all(v.check.case and v.check.case.activation in KINKED_ACTIVATIONS for v in found)
    finite = all(v.finding.kind == "off" and isfinite(_or(v.finding.expected, nan)) for v in found)
    return _shown_by("the activation's derivative at NaN is not torch's", found) if kinked and finite else None


# --- strides ----------------------------------------------------------------------------------------------------------

GROSS = 1000.0  # tolerances: numbers read from the wrong place are not nearly right


def _gross(verdicts: Verdicts, there: Callable[[Verdict], bool]) -> Verdicts:
    """Gross failures there, where nothing fails elsewhere but what is in channels_last."""
    failed = _failed(verdicts)
    elsewhere = [v for v in failed if not there(v)]
    if not all(_in_channels_last(v) for v in elsewhere):
        return []
    found = [v for v in failed if there(v) and v.finding.error > GROSS]
    if elsewhere:  # channels_last is wrong by itself, and so is no evidence of strides
        found = [v for v in found if not _in_channels_last(v)]
    return found


def _in_channels_last(verdict: Verdict) -> bool:
    return verdict.check.case is not None and verdict.check.case.layout == "channels_last"


def _broadcast_g(verdict: Verdict) -> bool:
    """Whether the upstream gradient is not contiguous, or is broadcast as x is."""
    return verdict.row == STRIDED_G or (verdict.row == STRIDED_X and verdict.check.variant == "broadcast")


def upstream_layout(verdicts: Verdicts) -> Diagnosis | None:
    """Gradients alone are wrong, and only where the upstream gradient's strides are not those of a contiguous one."""
    found = _gross(verdicts, _broadcast_g)
    gradients = all(verdict.finding.quantity in GRADIENTS for verdict in found)
    return _shown_by("the upstream gradient taken for contiguous", found) if gradients else None


def strided_input(verdicts: Verdicts) -> Diagnosis | None:
    found = _gross(verdicts, lambda verdict: verdict.row in (STRIDED_X, STRIDED_G))
    return _shown_by("an input's strides are ignored", [v for v in found if v.row == STRIDED_X])


def one_value(verdicts: Verdicts) -> Diagnosis | None:
    return _shown_by("one value per channel accepted", [v for v in _failed(verdicts) if v.check.name == "one-value"])


def empty(verdicts: Verdicts) -> Diagnosis | None:
    found = [v for v in _failed(verdicts) if v.check.name == "empty"]
    return _shown_by("an empty batch is not handled as torch does", found)


SYMPTOMS = (
    Symptom(something_else, decisive=True),
    Symptom(written, decisive=True),
    Symptom(saved_is_written, decisive=True),
    Symptom(raises, decisive=True),
    Symptom(one_pass_variance),
    Symptom(less_accurate),
    Symptom(half_precision),
    Symptom(second_derivative, compatible=True),
    Symptom(nan_swallowed),
    Symptom(nan_leaks),
    Symptom(derivative_at_nan),
    Symptom(upstream_layout),
    Symptom(strided_input),
    Symptom(raises_too, compatible=True),
    Symptom(not_deterministic, compatible=True),
    Symptom(one_value, compatible=True),
    Symptom(empty, compatible=True),
)


# --- no known bug -----------------------------------------------------------------------------------------------------

Part = Callable[[Case], str]


def _shape(case: Case) -> str:
    return "x".join(map(str, case.shape))


def _layout_and_shape(case: Case) -> str:
    return f"{case.layout} {_shape(case)}"


# A name, and which of them the cases looked at have to share with a failing one: few shapes are run in all dtypes.
FACETS: tuple[tuple[str, Part, Part], ...] = (
    ("shape", _shape, lambda case: ""),
    ("layout", lambda case: case.layout, _shape),
    ("mode", lambda case: case.mode, _layout_and_shape),
    ("dtype", lambda case: case.dtype, _layout_and_shape),
    ("operation", lambda case: case.fusion, _layout_and_shape),
)


def summary(verdicts: Verdicts) -> FailureSummary:
    """Which quantities, modes, dtypes, layouts, shapes and operations fail, and which of them are clean."""
    values = [verdict for verdict in verdicts if verdict.check.section == "values"]
    failing = _failed(values)
    quantities = _each(verdict.quantity for verdict in failing)
    cases, wrong = (
        [verdict.check.case for verdict in each if verdict.check.case is not None] for each in (values, failing)
    )
    facets = [_facet(name, part, shared, wrong, cases) for name, part, shared in FACETS]
    return FailureSummary(
        quantities=quantities,
        clean=_each(verdict.quantity for verdict in values if verdict.quantity not in quantities),
        failing=len({verdict.check.identifier for verdict in failing}),
        cases=len({verdict.check.identifier for verdict in values}),
        facets=tuple(facet for facet in facets if facet.failing and facet.clean),
        groups=_each(verdict.row for verdict in _failed(verdicts) if verdict.check.section != "values"),
    )


def _each(names: Iterable[str]) -> tuple[str, ...]:
    """Each name once, in their order."""
    return tuple(dict.fromkeys(names))


def _facet(name: str, part: Part, shared: Part, failing: list[Case], cases: list[Case]) -> Facet:
    """Without clean ones where every one fails: then it makes no difference."""
    alike, wrong = {shared(case) for case in failing}, _each(map(part, failing))
    every = _each(part(case) for case in cases if shared(case) in alike)
    return Facet(name, wrong, tuple(one for one in every if one not in wrong))
