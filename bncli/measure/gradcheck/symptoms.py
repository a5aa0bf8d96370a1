"""Bugs that are read off which checks failed and which passed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from bncli.measure.reference.judge import Finding, Verdict
from bncli.results.gradcheck import Diagnosis

Verdicts = list[Verdict]


@dataclass(frozen=True)
class Symptom:
    read: Callable[[Verdicts], Diagnosis | None]
    certain: bool = False  # it explains all other failures, so that nothing else is guessed
    beside: bool = False  # worth naming beside a hypothesis that explains failures: it does not follow from one


def _failed(verdicts: Verdicts, where: str) -> Verdicts:
    """The failures whose identifier matches."""
    return [verdict for verdict in verdicts if verdict.failed and re.search(where, verdict.identifier)]


def _first(failures: Iterable[Verdict]) -> str:
    for verdict in failures:
        return f"{verdict.identifier}: {verdict.finding.message}"
    return ""


def _plain_problems(verdicts: Verdicts) -> Verdicts:
    """Failures of whole calls, in the values section."""
    return [verdict for verdict in verdicts if verdict.failed and verdict.identifier.endswith("/forward")]


def something_else(verdicts: Verdicts) -> Diagnosis | None:
    """A result of another kind, shape, dtype or device."""
    pattern = r"^raised WrongResult|^returned a|^y has "
    found = [verdict for verdict in _plain_problems(verdicts) if re.search(pattern, verdict.finding.message)]
    return Diagnosis("the function returns something else", _first(found)) if found else None


def _raising(verdicts: Verdicts) -> Diagnosis | None:
    found = [verdict for verdict in _plain_problems(verdicts) if verdict.finding.message.startswith("raised")]
    calls = [verdict for verdict in verdicts if verdict.identifier.endswith("/forward")]
    return Diagnosis("it raises", f"{len(found)} of {len(calls)} calls; {_first(found)}") if found else None


def raises(verdicts: Verdicts) -> Diagnosis | None:
    """Most of the calls that fail raise."""
    problems = _plain_problems(verdicts)
    found = [verdict for verdict in problems if verdict.finding.message.startswith("raised")]
    return _raising(verdicts) if 2 * len(found) > len(problems) else None


def raises_too(verdicts: Verdicts) -> Diagnosis | None:
    """Some do, beside others that give wrong numbers."""
    return None if raises(verdicts) else _raising(verdicts)


def written(verdicts: Verdicts) -> Diagnosis | None:
    found = [v for v in verdicts if v.failed and "changed during the call" in v.finding.message]
    found += [v for v in verdicts if v.failed and re.search("leaf Variable .*in-place", v.finding.message)]
    return Diagnosis("an input is written to", _first(found)) if found else None


def saved_is_written(verdicts: Verdicts) -> Diagnosis | None:
    """As autograd tells by a tensor's version."""
    found = [v for v in verdicts if v.failed and "modified by an inplace operation" in v.finding.message]
    return Diagnosis("a tensor saved for the backward pass is written to", _first(found)) if found else None


def not_deterministic(verdicts: Verdicts) -> Diagnosis | None:
    found = [verdict for verdict in _failed(verdicts, "^invariants/same-bits") if "differ" in verdict.finding.message]
    return Diagnosis("not deterministic", _first(found)) if found else None


def second_derivative(verdicts: Verdicts) -> Diagnosis | None:
    """The second derivative fails where the first is right; a wrong first one would explain it."""
    wrong_first = {v.identifier.rpartition("/")[0] for v in _failed(verdicts, "/(dx|dweight|dbias|forward)$")}
    found = [
        verdict
        for verdict in _failed(verdicts, "/double backward$")
        if verdict.identifier.rpartition("/")[0] not in wrong_first
    ]
    found = found or ([] if wrong_first else _failed(verdicts, "^derivatives/.*gradgradcheck"))
    if not found or _failed(verdicts, "^derivatives/.*/gradcheck"):
        return None
    evidence = found[0].finding.evidence
    missing = found[0].finding.message.startswith("raised") or (
        evidence is not None and not any(float(v.norm()) for n, v in evidence.seen.items() if n == ZERO_TOLD)
    )
    if not missing and (one_pass_variance(verdicts) or less_accurate(verdicts)):
        return None
    name = "no second derivative" if missing else "a wrong second derivative"
    return Diagnosis(name, f"dx is right; {_first(found)}")


ZERO_TOLD = "double backward in x"


def one_pass_variance(verdicts: Verdicts) -> Diagnosis | None:
    """float32 is right near zero, and wrong by (mean/deviation)^2 roundings farther away, until nothing is left of it.

    E[x^2] - E[x]^2 is the difference of two numbers that large (Chan, Golub & LeVeque 1983); the error of an update
    taken in order grows as mean/deviation.
    """
    far = {v.identifier: v.finding for v in verdicts if v.identifier.startswith("hard/variance/")}
    near, farther = (far.get(f"hard/variance/{ratio}") for ratio in (100, 1000))
    if near is None or farther is None or not farther.failed:
        return None
    if _failed(verdicts, "^train/float32/.*/(forward|running_var)$"):
        return None
    if not farther.relative >= max(QUADRATIC * near.relative, GONE):
        return None
    told = ", ".join(f"{finding.relative:.2g} at {name.rpartition('/')[2]}" for name, finding in far.items())
    return Diagnosis(
        "one-pass variance, E[x^2] - E[x]^2", f"relative errors by mean/deviation: {told}; {farther.message}"
    )


QUADRATIC = 30  # of the 100 that the error grows by from mean/deviation 100 to 1000
GONE = 1e-3  # relative error of the variance: 1000^2 roundings of float32 are 0.06, a sequential update's 1e-5


def less_accurate(verdicts: Verdicts) -> Diagnosis | None:
    """Rounding alone: a few tolerances everywhere, and a variance that is the worse the farther from zero."""
    failures = [v for v in verdicts if v.failed]
    far = [v for v in failures if v.identifier.startswith("hard/variance/")]
    others = [v for v in failures if v not in far]
    little = all(v.finding.error <= _most(v) for v in others)
    if not failures or not little or not all(v.finding.relative <= LINEAR * _ratio(v) for v in far):
        return None
    if not _grows([v.finding for v in verdicts if v.identifier.startswith("hard/variance/")]):
        return None
    worst = max(failures, key=lambda v: v.finding.error)
    times = [v.finding.of_native for v in failures if v.finding.of_native == v.finding.of_native]
    by = f", up to {max(times):.2g} times native's error" if times else ""
    return Diagnosis(
        "less accurate than native",
        f"{len(failures)} of {len(verdicts)} cases miss by little{by}; the worst, "
        f"{worst.finding.error:.2g} tolerances, is {_first([worst])}. Sums or a variance "
        "taken in order can lose as much",
    )


LINEAR = 1e-6  # relative error of the variance, times mean/deviation, of an update in order: sqrt(m) roundings are 3e-6


def _ratio(far: Verdict) -> float:
    """Mean over deviation, in which its identifier ends."""
    return float(far.identifier.rpartition("/")[2])


def _most(verdict: Verdict) -> float:
    """Tolerances that a case may miss by and be called less accurate. Those of half precision are wide as they are."""
    return 2.0 if "float16" in verdict.identifier else 20.0


def _grows(far: list[Finding]) -> bool:
    """Whether the error of the variance grows with mean/deviation, where it is not small anyway."""
    if not any(finding.failed for finding in far):
        return True
    return far[-1].relative >= 3 * far[0].relative


def half_precision(verdicts: Verdicts) -> Diagnosis | None:
    """Every failure is in half precision, the running statistics (or, without them, the output) among them."""
    failures = [v for v in verdicts if v.failed]
    if not all(re.search("float16", v.identifier) for v in failures):
        return None
    kept = [v for v in failures if re.search("/running_(mean|var)$", v.identifier)]
    return Diagnosis("half-precision statistics", f"float32 and float64 pass; {_first(kept)}") if kept else None


def _only(verdicts: Verdicts, where: str) -> Verdicts:
    """The failures there, if there is none anywhere else."""
    found = _failed(verdicts, where)
    return found if len(found) == sum(verdict.failed for verdict in verdicts) else []


def nan_swallowed(verdicts: Verdicts) -> Diagnosis | None:
    found = [v for v in _only(verdicts, "^hard/NaN") if "expected nan" in v.finding.message]
    return Diagnosis("NaN swallowed", f"a number stands where torch has NaN: {_first(found)}") if found else None


def nan_leaks(verdicts: Verdicts) -> Diagnosis | None:
    found = [v for v in _only(verdicts, "^hard/NaN") if re.search(r"is (nan|-?inf); expected -?\d", v.finding.message)]
    return Diagnosis("NaN leaks into other channels", _first(found)) if found else None


def derivative_at_nan(verdicts: Verdicts) -> Diagnosis | None:
    """Numbers that are wrong beside a NaN, where an activation with a kink follows, and nothing else."""
    found = _only(verdicts, r"^hard/NaN.*/nan\+(leaky_)?relu")
    if not found or not all(re.search(r"is -?\d.*; expected -?\d", v.finding.message) for v in found):
        return None
    rule = "torch takes 1 for relu, whose result is not <= 0, and the slope for leaky_relu, whose input is not > 0"
    return Diagnosis("the activation's derivative at NaN is not torch's", f"{rule}; {_first(found)}")


# --- strides ----------------------------------------------------------------------------------------------------------

GROSS = 1000.0  # tolerances: numbers read from the wrong place are not nearly right
STRIDES = "^hard/(x-not-contiguous|upstream-gradient)"
G_BROADCAST = "^hard/(upstream-gradient|x-not-contiguous/broadcast)"  # the latter's gradient is broadcast too


def _of_strides(verdicts: Verdicts, where: str) -> Verdicts:
    """Gross failures there, where nothing fails elsewhere but what is in channels_last."""
    elsewhere = [v for v in verdicts if v.failed and not re.search(where, v.identifier)]
    if any(not re.search("channels_last", v.identifier) for v in elsewhere):
        return []
    found = [v for v in _failed(verdicts, where) if v.finding.error > GROSS]
    if elsewhere:  # channels_last is wrong by itself, and so is no evidence of strides
        found = [v for v in found if "for-channels_last" not in v.identifier]
    return found


def upstream_layout(verdicts: Verdicts) -> Diagnosis | None:
    """Gradients alone are wrong, and only where the upstream gradient's strides are not those of a contiguous one."""
    found = _of_strides(verdicts, G_BROADCAST)
    if not found or not all(re.match("(dx|dweight|dbias|dresidual):", v.finding.message) for v in found):
        return None
    return Diagnosis("the upstream gradient taken for contiguous", _first(found))


def strided_input(verdicts: Verdicts) -> Diagnosis | None:
    found = [v for v in _of_strides(verdicts, STRIDES) if v.identifier.startswith("hard/x-not-contiguous")]
    return Diagnosis("an input's strides are ignored", _first(found)) if found else None


def one_value(verdicts: Verdicts) -> Diagnosis | None:
    found = _failed(verdicts, "^hard/one-value")
    return Diagnosis("one value per channel accepted", _first(found)) if found else None


def empty(verdicts: Verdicts) -> Diagnosis | None:
    found = _failed(verdicts, "^hard/empty")
    return Diagnosis("an empty batch is not handled as torch does", _first(found)) if found else None


SYMPTOMS = (
    Symptom(something_else, certain=True),
    Symptom(written, certain=True),
    Symptom(saved_is_written, certain=True),
    Symptom(raises, certain=True),
    Symptom(one_pass_variance),
    Symptom(less_accurate),
    Symptom(half_precision),
    Symptom(second_derivative, beside=True),
    Symptom(nan_swallowed),
    Symptom(nan_leaks),
    Symptom(derivative_at_nan),
    Symptom(upstream_layout),
    Symptom(strided_input),
    Symptom(raises_too, beside=True),
    Symptom(not_deterministic, beside=True),
    Symptom(one_value, beside=True),
    Symptom(empty, beside=True),
)


FEW = 6  # names that are listed; more are counted
Part = Callable[[list[str]], str]


def _shape(parts: list[str]) -> str:
    return parts[3]


def _layout_and_shape(parts: list[str]) -> str:
    return "/".join(parts[2:4])


# A name, and which of them the cases looked at have to share with a failing one: few shapes are run in all dtypes.
FACETS: tuple[tuple[str, Part, Part], ...] = (
    ("shape", _shape, lambda parts: ""),
    ("layout", lambda parts: parts[2], _shape),
    ("mode", lambda parts: parts[0], _layout_and_shape),
    ("dtype", lambda parts: parts[1], _layout_and_shape),
    ("operation", lambda parts: parts[4].partition("~")[0], _layout_and_shape),
)


def facts(verdicts: list[Verdict]) -> str:
    """Which quantities, modes, dtypes, layouts, shapes and operations fail, and which of them are clean."""
    values = [verdict for verdict in verdicts if verdict.section == "values" and verdict.identifier.count("/") == 5]
    failing = [verdict for verdict in values if verdict.failed]
    told = []
    if failing:
        quantities = _names(failing, lambda parts: parts[5])
        clean = [name for name in _names(values, lambda parts: parts[5]) if name not in quantities]
        told.append(f"what fails: {_listed(quantities)}" + (f" (clean: {_listed(clean)})" if clean else ""))
        wrong = {verdict.identifier.rpartition("/")[0] for verdict in failing}
        told.append(f"{len(wrong)} of {len({v.identifier.rpartition('/')[0] for v in values})} plain cases")
        told += [words for facet in FACETS if (words := _facet(*facet, failing, values))]
    rows = dict.fromkeys(verdict.row for verdict in verdicts if verdict.failed and verdict.section != "values")
    if rows:
        told.append(f"{'besides' if failing else 'what fails, every plain case being right'}: {_listed(list(rows))}")
    return "; ".join(told)


def _names(verdicts: list[Verdict], of: Part) -> list[str]:
    return list(dict.fromkeys(of(verdict.identifier.split("/")) for verdict in verdicts))


def _facet(name: str, of: Part, shared: Part, failing: list[Verdict], values: list[Verdict]) -> str:
    """Empty where every one fails: then it makes no difference."""
    alike = set(_names(failing, shared))
    wrong = _names(failing, of)
    every = _names([verdict for verdict in values if shared(verdict.identifier.split("/")) in alike], of)
    clean = [one for one in every if one not in wrong]
    if not clean:
        return ""
    return f"{name} {_listed(wrong)} alone" if len(wrong) <= len(clean) else f"every {name} but {_listed(clean)}"


def _listed(names: list[str]) -> str:
    more = len(names) - FEW
    return ", ".join(names) if more <= 0 else f"{', '.join(names[:FEW])} and {more} more"
