"""Bugs that are read off which checks failed and which passed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from bncli.measure.gradient_verdicts import Verdict
from bncli.results import Diagnosis

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


def raises(verdicts: Verdicts) -> Diagnosis | None:
    found = [verdict for verdict in _plain_problems(verdicts) if verdict.finding.message.startswith("raised")]
    calls = [verdict for verdict in verdicts if verdict.identifier.endswith("/forward")]
    if not found or written(verdicts) is not None:
        return None
    return Diagnosis("it raises", f"{len(found)} of {len(calls)} calls; {_first(found)}")


def written(verdicts: Verdicts) -> Diagnosis | None:
    found = [verdict for verdict in _failed(verdicts, "^invariants/unwritten") if "changed" in verdict.finding.message]
    found += [v for v in verdicts if v.failed and re.search("in-place|inplace", v.finding.message)]
    return Diagnosis("an input is written to", _first(found)) if found else None


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
    if not missing and one_pass_variance(verdicts) is not None:
        return None
    name = "no second derivative" if missing else "a wrong second derivative"
    return Diagnosis(name, f"dx is right; {_first(found)}")


ZERO_TOLD = "double backward in x"


def one_pass_variance(verdicts: Verdicts) -> Diagnosis | None:
    """float32 is right near zero, and the worse the farther from it: E[x^2] - E[x]^2 loses (mean/deviation)^2."""
    far = {v.identifier: v.finding for v in verdicts if v.identifier.startswith("hard/variance/")}
    ordinary = [v.finding.error for v in verdicts if re.search("^train/float32/.*/forward$", v.identifier)]
    failing = {identifier: finding for identifier, finding in far.items() if finding.failed}
    if not failing or (ordinary and max(ordinary) > 0.01 * max(finding.error for finding in failing.values())):
        return None
    worst = max(failing.values(), key=lambda finding: finding.error)
    told = ", ".join(f"{identifier} {finding.error:.3g}" for identifier, finding in far.items())
    return Diagnosis("one-pass variance, E[x^2] - E[x]^2", f"errors in tolerances: {told}; {worst.message}")


def half_precision(verdicts: Verdicts) -> Diagnosis | None:
    """Every failure is in half precision, the running statistics (or, without them, the output) among them."""
    failures = [v for v in verdicts if v.failed]
    if not all(re.search("float16", v.identifier) for v in failures):
        return None
    kept = [v for v in failures if re.search("/running_(mean|var)$", v.identifier)]
    return Diagnosis("half-precision statistics", f"float32 and float64 pass; {_first(kept)}") if kept else None


def nan_swallowed(verdicts: Verdicts) -> Diagnosis | None:
    found = [v for v in _failed(verdicts, "^hard/NaN") if "expected nan" in v.finding.message]
    return Diagnosis("NaN swallowed", f"a number stands where torch has NaN: {_first(found)}") if found else None


def nan_leaks(verdicts: Verdicts) -> Diagnosis | None:
    found = [
        v for v in _failed(verdicts, "^hard/NaN") if re.search(r"is (nan|-?inf); expected -?\d", v.finding.message)
    ]
    return Diagnosis("NaN leaks into other channels", _first(found)) if found else None


def upstream_layout(verdicts: Verdicts) -> Diagnosis | None:
    found = _failed(verdicts, "^hard/upstream-gradient")
    if not found or _failed(verdicts, "^train/float32/contiguous/.*/dx$"):
        return None
    return Diagnosis("the upstream gradient taken for contiguous", _first(found))


def strided_input(verdicts: Verdicts) -> Diagnosis | None:
    found = _failed(verdicts, "^hard/x-not-contiguous")
    if not found or _failed(verdicts, "^train/float32/contiguous/"):
        return None
    return Diagnosis("an input's strides are ignored", _first(found))


def one_value(verdicts: Verdicts) -> Diagnosis | None:
    found = _failed(verdicts, "^hard/one-value")
    return Diagnosis("one value per channel accepted", _first(found)) if found else None


def empty(verdicts: Verdicts) -> Diagnosis | None:
    found = _failed(verdicts, "^hard/empty")
    return Diagnosis("an empty batch is not handled as torch does", _first(found)) if found else None


SYMPTOMS = (
    Symptom(something_else, certain=True),
    Symptom(written, certain=True),
    Symptom(raises, certain=True),
    Symptom(one_pass_variance),
    Symptom(half_precision),
    Symptom(second_derivative, beside=True),
    Symptom(nan_swallowed),
    Symptom(nan_leaks),
    Symptom(upstream_layout),
    Symptom(strided_input),
    Symptom(not_deterministic, beside=True),
    Symptom(one_value, beside=True),
    Symptom(empty, beside=True),
)
