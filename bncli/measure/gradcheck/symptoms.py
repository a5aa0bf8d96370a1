"""Symptoms: bugs that are recognised by which checks failed and which passed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf, isfinite, nan
from typing import Any

from bncli.measure.gradcheck.hard_inputs import HALF, NOT_FINITE, STRIDED_G, STRIDED_X
from bncli.measure.reference.judge import Verdict
from bncli.measure.reference.observe import GRADIENTS, RUNNING, SECOND
from bncli.names import KINKED_ACTIVATIONS
from bncli.results.finding import FindingKind
from bncli.results.gradcheck import Diagnosis

Verdicts = list[Verdict]
RAISED: tuple[FindingKind, ...] = ("raised", "no_memory", "leaf_written", "saved_written")
SOMETHING_ELSE: tuple[FindingKind, ...] = ("wrong_type", "wrong_shape", "wrong_dtype", "wrong_device")


@dataclass(frozen=True)
class Symptom:
    """A bug and the failures that indicate it; `shown_by` returns none if they indicate something else."""

    bug: str
    shown_by: Callable[[Verdicts], Verdicts]
    decisive: bool = False  # it explains all other failures, so no other bug is named
    compatible: bool = False  # named in addition to known bugs, since it does not follow from one
    numbers: Callable[[Verdicts, Verdicts], dict[str, Any]] = lambda verdicts, found: {}  # fields of the diagnosis

    def recognise(self, verdicts: Verdicts) -> Diagnosis | None:
        found = self.shown_by(verdicts)
        numbers = self.numbers(verdicts, found) if found else {}
        return Diagnosis(self.bug, first=found[0].failure(), **numbers) if found else None


def failed(verdicts: Verdicts) -> Verdicts:
    return [verdict for verdict in verdicts if verdict.failed]


def of_kind(*kinds: FindingKind) -> Callable[[Verdicts], Verdicts]:
    return lambda verdicts: [verdict for verdict in failed(verdicts) if verdict.finding.kind in kinds]


def of_check(name: str) -> Callable[[Verdicts], Verdicts]:
    return lambda verdicts: [verdict for verdict in failed(verdicts) if verdict.check.name == name]


# --- whole calls ------------------------------------------------------------------------------------------------------


def whole_calls(verdicts: Verdicts) -> Verdicts:
    """One verdict per call in the values section, that on its output, which fails if the whole call fails."""
    return [verdict for verdict in verdicts if verdict.quantity == "forward"]


def of_whole_calls(*kinds: FindingKind) -> Callable[[Verdicts], Verdicts]:
    return lambda verdicts: of_kind(*kinds)(whole_calls(verdicts))


def written(verdicts: Verdicts) -> Verdicts:
    return of_kind("input_written", "running_moved")(verdicts) + of_kind("leaf_written")(verdicts)


def mostly_raising(verdicts: Verdicts) -> Verdicts:
    """The calls that raise, if they are most of the failing ones."""
    found = of_whole_calls(*RAISED)(verdicts)
    return found if 2 * len(found) > len(failed(whole_calls(verdicts))) else []


def how_many(verdicts: Verdicts, found: Verdicts) -> dict[str, Any]:
    return {"alike": len(found), "of": len(whole_calls(verdicts))}


# --- derivatives ------------------------------------------------------------------------------------------------------


def second_alone(verdicts: Verdicts) -> Verdicts:
    """Second derivatives that fail while the first ones of the case are right, as they are in most plain cases."""
    wrong = failed(verdicts)
    wrong_first = {v.check.identifier for v in wrong if v.quantity in ("forward", "dx", "dweight", "dbias")}
    plain = {v.check.identifier for v in verdicts if v.check.section == "values"}
    found = [v for v in wrong if v.quantity == "double backward" and v.check.identifier not in wrong_first]
    if not found and not wrong_first:
        found = of_check("gradgradcheck")(wrong)
    return [] if of_check("gradcheck")(wrong) or 2 * len(plain & wrong_first) > len(plain) else found


def _is_missing(verdict: Verdict) -> bool:
    """Whether the second derivative is missing or zero."""
    if verdict.finding.kind in (*RAISED, "no_graph", "no_second_derivative"):
        return True
    seen = {} if verdict.evidence is None else verdict.evidence.seen
    return verdict.evidence is not None and not (SECOND[0] in seen and float(seen[SECOND[0]].norm()))


def second_missing(verdicts: Verdicts) -> Verdicts:
    found = second_alone(verdicts)
    return found if found and _is_missing(found[0]) else []


def second_wrong(verdicts: Verdicts) -> Verdicts:
    explained = second_missing(verdicts) or one_pass_variance(verdicts) or less_accurate(verdicts)
    return [] if explained else second_alone(verdicts)


# --- the variance -----------------------------------------------------------------------------------------------------

QUADRATIC = 30  # of the 100 that the error grows by from mean/deviation 100 to 1000
GONE = 1e-3  # relative error of the variance: 1000^2 roundings of float32 are 0.06, a sequential update's 1e-5
LINEAR = 1e-6  # relative error of the variance, times mean/deviation, of an update in order: sqrt(m) roundings are 3e-6


def variances(verdicts: Verdicts) -> dict[float | None, Verdict]:
    """Mean over deviation -> the verdict on the variance."""
    return {v.check.parameter: v for v in verdicts if v.check.name == "variance"}


def relative(verdict: Verdict) -> float:
    return _or(verdict.finding.relative, nan)


def relative_errors(verdicts: Verdicts, found: Verdicts) -> dict[str, Any]:
    return {"relative_errors": {f"{ratio:g}": relative(v) for ratio, v in variances(verdicts).items()}}


def one_pass_variance(verdicts: Verdicts) -> Verdicts:
    """float32 is right for small means and has an error of (mean/deviation)^2 roundings for large means.

    E[x^2] - E[x]^2 is the difference of two numbers of that size (Chan, Golub & LeVeque 1983); the error of a
    sequential update grows as mean/deviation.
    """
    far = variances(verdicts)
    near, farther = far.get(100), far.get(1000)
    if near is None or farther is None or not farther.failed:
        return []
    near_zero = [
        v for v in failed(verdicts) if v.check.section == "values" and v.quantity in ("forward", "running_var")
    ]
    if any(v.check.case and v.check.case.training and v.check.case.dtype == "float32" for v in near_zero):
        return []
    return [farther] if relative(farther) >= max(QUADRATIC * relative(near), GONE) else []


def _or(number: float | None, otherwise: float) -> float:
    return otherwise if number is None else number


def less_accurate(verdicts: Verdicts) -> Verdicts:
    """Only rounding: errors of a few tolerances everywhere, and of the variance growing with the mean."""
    far = list(variances(verdicts).values())
    wrong = sorted(failed(verdicts), key=lambda v: -v.finding.error)
    little = all(v.finding.error <= _most(v) for v in wrong if v.check.name != "variance")
    linear = all(_or(v.finding.relative, inf) <= LINEAR * _or(v.check.parameter, nan) for v in far if v.failed)
    grows = not any(v.failed for v in far) or relative(far[-1]) >= 3 * relative(far[0])
    return wrong if little and linear and grows else []


def _most(verdict: Verdict) -> float:
    """The largest error, in tolerances, that counts as less accurate; half precision has wide tolerances already."""
    return 2.0 if verdict.check.case and verdict.check.case.dtype in HALF else 20.0


def times_native(verdicts: Verdicts, found: Verdicts) -> dict[str, Any]:
    times = [v.finding.of_native for v in found if v.finding.of_native is not None]
    return {"alike": len(found), "of": len(verdicts), "of_native": max(times, default=None)}


def half_precision(verdicts: Verdicts) -> Verdicts:
    """The failing running statistics, if every failure is in half precision."""
    wrong = failed(verdicts)
    in_half = all(v.check.case and v.check.case.dtype in HALF for v in wrong)
    return [v for v in wrong if v.quantity in RUNNING] if in_half else []


# --- NaN and infinity -------------------------------------------------------------------------------------------------


def beside_nan(verdicts: Verdicts) -> Verdicts:
    """The failures at inputs with a NaN or an infinity, if there are no others."""
    wrong = failed(verdicts)
    return wrong if all(v.row == NOT_FINITE for v in wrong) else []


def derivative_at_nan(verdicts: Verdicts) -> Verdicts:
    """Wrong finite gradients at a NaN before an activation with a kink, if there are no other failures."""
    found = beside_nan(verdicts)
    kinked = all(v.check.case and v.check.case.activation in KINKED_ACTIVATIONS for v in found)
    finite = all(v.finding.kind == "off" and isfinite(_or(v.finding.expected, nan)) for v in found)
    return found if kinked and finite else []


# --- strides ----------------------------------------------------------------------------------------------------------

GROSS = 1000.0  # smallest error, in tolerances, of values read from the wrong address


def _gross(verdicts: Verdicts, there: Callable[[Verdict], bool]) -> Verdicts:
    """Gross failures in `there`, if other failures are all in channels_last."""
    wrong = failed(verdicts)
    elsewhere = [v for v in wrong if not there(v)]
    if not all(_in_channels_last(v) for v in elsewhere):
        return []
    found = [v for v in wrong if there(v) and v.finding.error > GROSS]
    if elsewhere:  # channels_last itself is wrong, so it is no evidence
        found = [v for v in found if not _in_channels_last(v)]
    return found


def _in_channels_last(verdict: Verdict) -> bool:
    return verdict.check.case is not None and verdict.check.case.layout == "channels_last"


def _broadcast_g(verdict: Verdict) -> bool:
    """Whether the upstream gradient is not contiguous, or is broadcast as x is."""
    return verdict.row == STRIDED_G or (verdict.row == STRIDED_X and verdict.check.variant == "broadcast")


def upstream_layout(verdicts: Verdicts) -> Verdicts:
    """Only gradients are wrong, and only if the upstream gradient is not contiguous."""
    found = _gross(verdicts, _broadcast_g)
    return found if all(verdict.finding.quantity in GRADIENTS for verdict in found) else []


def strided_input(verdicts: Verdicts) -> Verdicts:
    found = _gross(verdicts, lambda verdict: verdict.row in (STRIDED_X, STRIDED_G))
    return [verdict for verdict in found if verdict.row == STRIDED_X]


SYMPTOMS = (
    Symptom("the output has a wrong type, shape, dtype or device", of_whole_calls(*SOMETHING_ELSE), decisive=True),
    Symptom("an input is modified", written, decisive=True),
    Symptom("a tensor saved for the backward pass is modified", of_kind("saved_written"), decisive=True),
    Symptom("the kernel raises an exception", mostly_raising, decisive=True, numbers=how_many),
    Symptom("the output carries no gradient", of_kind("no_graph"), compatible=True),
    Symptom("one-pass variance, E[x^2] - E[x]^2", one_pass_variance, numbers=relative_errors),
    Symptom("less accurate than native", less_accurate, numbers=times_native),
    Symptom("half-precision statistics", half_precision),
    Symptom("no second derivative", second_missing, compatible=True),
    Symptom("a wrong second derivative", second_wrong, compatible=True),
    Symptom("NaN disappears", lambda verdicts: of_kind("nan_missing")(beside_nan(verdicts))),
    Symptom("NaN leaks into other channels", lambda verdicts: of_kind("nan_unexpected")(beside_nan(verdicts))),
    Symptom("the activation's derivative at NaN is not torch's", derivative_at_nan),
    Symptom("upstream gradient read as contiguous", upstream_layout),
    Symptom("an input's strides are ignored", strided_input),
    Symptom("the kernel raises an exception", of_whole_calls(*RAISED), compatible=True, numbers=how_many),
    Symptom("not deterministic", of_kind("not_deterministic"), compatible=True),
    Symptom("one value per channel accepted", of_check("one-value"), compatible=True),
    Symptom("an empty batch is not handled as in torch", of_check("empty"), compatible=True),
)
