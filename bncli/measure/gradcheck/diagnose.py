"""Diagnosis: the bugs that explain the failures of a gradcheck, with the evidence.

There are two methods. A known bug is a wrong kernel, computed in float64. It is named if the output of a failing case
is much closer to that kernel's than to the correct one, and no correct output contradicts it. A symptom is recognised
by which checks failed and which passed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain, islice, product, zip_longest

from torch import Tensor

from bncli.measure.gradcheck.known_bugs import KNOWN_BUGS, KnownBug, predicted
from bncli.measure.gradcheck.symptoms import SYMPTOMS, failed
from bncli.measure.reference.case import Case
from bncli.measure.reference.judge import Evidence, Verdict
from bncli.measure.reference.observe import SECOND
from bncli.measure.reference.tolerance import in_floors
from bncli.results.gradcheck import BugMatch, Diagnosis, Facet, FailureSummary

SHOWN = 3
CASES = 24  # failing cases that the known bugs are tried on
NEAR = 0.02  # largest distance to the wrong kernel's output, relative to the distance to the truth
EQUAL = 0.01  # largest relative distance of an example, if there is one so near
SHARE = 0.05  # smallest fraction of the failing results that a bug has to explain
UNKNOWN = "unknown bug"
FLOORS = 30  # smaller differences, in floors, are no evidence


def diagnose(verdicts: list[Verdict], norm: str) -> tuple[Diagnosis, ...]:
    """The most likely bugs, best supported first; empty if nothing failed."""
    if not failed(verdicts):
        return ()
    for symptom in SYMPTOMS:
        if symptom.decisive and (decisive := symptom.recognise(verdicts)):
            return (decisive,)
    likely = _likely(verdicts) if norm == "batch" else []
    others = [symptom for symptom in SYMPTOMS if not symptom.decisive and (symptom.compatible or not likely)]
    symptoms = [found for symptom in others if (found := symptom.recognise(verdicts))]
    return tuple([*likely, *symptoms][:SHOWN]) or (Diagnosis(UNKNOWN, summary=summary(verdicts)),)


# --- known bugs -------------------------------------------------------------------------------------------------------

Result = tuple[str, str]  # identifier of a case, quantity
Distances = tuple[float, float]  # relative l2 ones of what was seen from the wrong kernel's output and from the truth


def _likely(verdicts: list[Verdict]) -> list[Diagnosis]:
    """Known bugs chosen greedily: each explains most of the results that the earlier ones leave unexplained."""
    cases = _spread(verdicts)
    failing = {identifier: _failing(evidence) for identifier, evidence in cases.items()}
    matches: dict[KnownBug, dict[Result, Distances]] = {known: {} for known in KNOWN_BUGS}
    for known, (identifier, evidence) in product(KNOWN_BUGS, cases.items()):
        explained = _explained(known, evidence, failing[identifier])
        matches[known] |= {(identifier, quantity): near for quantity, near in explained.items()}
    count = sum(map(len, failing.values()))
    found: list[Diagnosis] = []
    while True:
        best = max(matches, key=lambda known: len(matches[known]))
        if len(matches[best]) < max(2 if found else 1, SHARE * count):
            return found
        ranked = sorted(matches[best].items(), key=lambda item: (item[1][0] >= EQUAL, item[1][0] / item[1][1]))
        (case, quantity), near = ranked[0]
        match = BugMatch(case, quantity, best.equals, *near, alike=len(matches[best]), failing=count)
        found.append(Diagnosis(best.bug, match))
        done = matches[best].keys()
        matches = {
            known: {result: near for result, near in its.items() if result not in done}
            for known, its in matches.items()
        }


def _spread(verdicts: list[Verdict]) -> dict[str, Evidence]:
    """Up to CASES failing cases with their evidence, taken from the rows in turn."""
    by_row: dict[tuple[str, str, str], list[tuple[str, Evidence]]] = {}
    seen: set[str] = set()
    for verdict in verdicts:
        identifier, evidence = verdict.check.identifier, verdict.evidence
        if verdict.failed and evidence is not None and identifier not in seen and evidence.seen:
            seen.add(identifier)
            row = (verdict.row, evidence.case.dtype, evidence.case.layout)
            by_row.setdefault(row, []).append((identifier, evidence))
    turns = chain.from_iterable(zip_longest(*by_row.values()))
    return dict(islice(filter(None, turns), CASES))


def _failing(evidence: Evidence) -> list[str]:
    """The wrong first-order quantities; second derivatives are left to the symptoms."""
    names = [name for name in evidence.truth if name not in SECOND and name in evidence.seen]
    return [name for name in names if _distance(evidence.seen[name], evidence.truth[name], evidence.floors[name]) > 1]


def _explained(known: KnownBug, evidence: Evidence, failing: list[str]) -> dict[str, Distances]:
    """The failing quantities of a case that the bug explains; none if it contradicts a correct quantity."""
    if not known.applies(evidence.case):
        return {}
    wrong = predicted(known, evidence)
    for name in (wrong.keys() & evidence.seen.keys() & evidence.floors.keys()) - set(failing):
        if _distance(wrong[name], evidence.truth[name], evidence.floors[name]) > FLOORS:
            return {}
    explained = [name for name in failing if name in wrong and _explains(evidence, name, wrong[name])]
    return {name: _distances(evidence.seen[name], wrong[name], evidence.truth[name]) for name in explained}


def _explains(evidence: Evidence, name: str, wrong: Tensor) -> bool:
    seen, truth, floor = evidence.seen[name], evidence.truth[name], evidence.floors[name]
    if seen.shape != truth.shape:
        return False
    near = float((seen - wrong).norm()) <= NEAR * float((seen - truth).norm())
    return near or _distance(seen, wrong, floor) <= 1 < _distance(wrong, truth, floor)


def _distances(seen: Tensor, wrong: Tensor, truth: Tensor) -> Distances:
    scale = float(truth.norm()) or 1.0
    return float((seen - wrong).norm()) / scale, float((seen - truth).norm()) / scale


def _distance(one: Tensor, other: Tensor, floor: Tensor) -> float:
    """The largest difference in floors; infinite if only one of the two is finite."""
    return in_floors(one, other, floor) if one.shape == other.shape else float("inf")


# --- no known bug -----------------------------------------------------------------------------------------------------

Part = Callable[[Case], str]


def _shape(case: Case) -> str:
    return "x".join(map(str, case.shape))


def _layout_and_shape(case: Case) -> str:
    return f"{case.layout} {_shape(case)}"


# Name, value of a case, and what a compared case must share with a failing one, since few shapes run in all dtypes.
FACETS: tuple[tuple[str, Part, Part], ...] = (
    ("shape", _shape, lambda case: ""),
    ("layout", lambda case: case.layout, _shape),
    ("mode", lambda case: case.mode, _layout_and_shape),
    ("dtype", lambda case: case.dtype, _layout_and_shape),
    ("operation", lambda case: case.fusion, _layout_and_shape),
)


def summary(verdicts: list[Verdict]) -> FailureSummary:
    """The quantities, modes, dtypes, layouts, shapes and operations that fail, and those that pass."""
    values = [verdict for verdict in verdicts if verdict.check.section == "values"]
    failing = failed(values)
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
        groups=_each(verdict.row for verdict in failed(verdicts) if verdict.check.section != "values"),
    )


def _each(names: Iterable[str]) -> tuple[str, ...]:
    """The distinct names, in order."""
    return tuple(dict.fromkeys(names))


def _facet(name: str, part: Part, shared: Part, failing: list[Case], cases: list[Case]) -> Facet:
    """The failing and the passing values; no passing ones if every value fails."""
    alike, wrong = {shared(case) for case in failing}, _each(map(part, failing))
    every = _each(part(case) for case in cases if shared(case) in alike)
    return Facet(name, wrong, tuple(one for one in every if one not in wrong))
