"""Diagnosis: what kind of bug the failures look like, with the evidence.

Two methods. A known bug is a wrong kernel written out in float64: where a failing case's output is much closer to the
wrong kernel's than to the truth, and nothing that came out right speaks against it, that bug is named. A symptom is
recognised by which checks failed and which passed.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from bncli.measure.gradcheck.known_bugs import KNOWN_BUGS, KnownBug, predicted
from bncli.measure.gradcheck.symptoms import SYMPTOMS, summary
from bncli.measure.reference.judge import Evidence, Verdict
from bncli.measure.reference.observe import SECOND
from bncli.measure.reference.tolerance import in_floors
from bncli.results.gradcheck import BugMatch, Diagnosis

SHOWN = 3
CASES = 24  # failing cases that the known bugs are tried on
NEAR = 0.02  # of the distance to the truth: how near the wrong kernel's output has to be
SHARE = 0.05  # of the failing results looked at, which a bug has to explain
UNKNOWN = "no bug that is known here"
FLOORS = 30  # a difference of fewer floors shows nothing


def diagnose(verdicts: list[Verdict], norm: str) -> tuple[Diagnosis, ...]:
    """The bugs that the failures look like, the best founded first; none where nothing failed."""
    if not any(verdict.failed for verdict in verdicts):
        return ()
    decisive = [found for symptom in SYMPTOMS if symptom.decisive and (found := symptom.recognise(verdicts))]
    if decisive:
        return tuple(decisive[:1])
    likely = _likely(verdicts) if norm == "batch" else []
    others = [symptom for symptom in SYMPTOMS if not symptom.decisive and (symptom.compatible or not likely)]
    symptoms = [found for symptom in others if (found := symptom.recognise(verdicts))]
    return tuple([*likely, *symptoms][:SHOWN]) or (Diagnosis(UNKNOWN, summary=summary(verdicts)),)


# --- known bugs -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Failing:
    """A case that failed, and its quantities that are clearly wrong."""

    identifier: str
    evidence: Evidence
    quantities: list[str]


@dataclass(frozen=True)
class Match:
    """One quantity of one case that a known bug explains."""

    identifier: str
    quantity: str
    from_truth: float  # relative l2 distances of what was seen
    from_wrong: float


def _likely(verdicts: list[Verdict]) -> list[Diagnosis]:
    """The known bugs that explain most, each of what those before it leave unexplained."""
    cases = [Failing(identifier, evidence, _failing(evidence)) for identifier, evidence in _spread(verdicts)]
    matches = {known: _matches(known, cases) for known in KNOWN_BUGS}
    found: list[Diagnosis] = []
    explained: set[tuple[str, str]] = set()
    failing = sum(len(case.quantities) for case in cases)
    while True:
        left = {
            known: [match for match in own if (match.identifier, match.quantity) not in explained]
            for known, own in matches.items()
        }
        best = max(left, key=lambda known: (len(left[known]), -KNOWN_BUGS.index(known)))
        if len(left[best]) < max(2 if found else 1, SHARE * failing):
            return found
        explained |= {(match.identifier, match.quantity) for match in matches[best]}
        found.append(_diagnosis(best, left[best], failing))


def _diagnosis(known: KnownBug, matches: list[Match], failing: int) -> Diagnosis:
    sharpest = min(matches, key=lambda match: match.from_wrong / match.from_truth)
    match = BugMatch(
        case=sharpest.identifier,
        quantity=sharpest.quantity,
        equals=known.equals,
        from_wrong=sharpest.from_wrong,
        from_truth=sharpest.from_truth,
        alike=len(matches),
        failing=failing,
    )
    return Diagnosis(known.bug, match)


def _spread(verdicts: list[Verdict]) -> list[tuple[str, Evidence]]:
    """Failing cases with their evidence, each once, as many rows as possible before a second of any."""
    by_row: dict[tuple[str, str, str], list[tuple[str, Evidence]]] = {}
    seen: set[int] = set()
    for verdict in verdicts:
        evidence = verdict.evidence
        if verdict.failed and evidence is not None and id(evidence) not in seen and evidence.seen:
            seen.add(id(evidence))
            row = (verdict.row, evidence.case.dtype, evidence.case.layout)
            by_row.setdefault(row, []).append((verdict.check.identifier, evidence))
    turns = max((len(members) for members in by_row.values()), default=0)
    return [members[turn] for turn in range(turns) for members in by_row.values() if turn < len(members)][:CASES]


def _failing(evidence: Evidence) -> list[str]:
    """The quantities that are clearly wrong; the second derivative follows the first and is left to the symptoms."""
    names = [name for name in evidence.truth if name not in SECOND and name in evidence.seen]
    return [name for name in names if _distance(evidence.seen[name], evidence.truth[name], evidence.floors[name]) > 1]


def _matches(known: KnownBug, cases: list[Failing]) -> list[Match]:
    found = []
    for failing in cases:
        evidence = failing.evidence
        if not known.applies(evidence.case):
            continue
        wrong = predicted(known, evidence)
        explained = [name for name in failing.quantities if name in wrong and _explains(evidence, name, wrong[name])]
        right = [
            name
            for name in wrong
            if name in evidence.seen and name not in failing.quantities and name in evidence.floors
        ]
        against = [
            name for name in right if _distance(wrong[name], evidence.truth[name], evidence.floors[name]) > FLOORS
        ]
        if not against:
            found += [_match(failing.identifier, name, evidence, wrong[name]) for name in explained]
    return found


def _explains(evidence: Evidence, name: str, wrong: Tensor) -> bool:
    seen, truth, floor = evidence.seen[name], evidence.truth[name], evidence.floors[name]
    if seen.shape != truth.shape:
        return False
    near = float((seen - wrong).norm()) <= NEAR * float((seen - truth).norm())
    return near or _distance(seen, wrong, floor) <= 1 < _distance(wrong, truth, floor)


def _match(identifier: str, name: str, evidence: Evidence, wrong: Tensor) -> Match:
    seen, truth = evidence.seen[name], evidence.truth[name]
    scale = float(truth.norm()) or 1.0
    return Match(identifier, name, float((seen - truth).norm()) / scale, float((seen - wrong).norm()) / scale)


def _distance(one: Tensor, other: Tensor, floor: Tensor) -> float:
    """The largest difference in floors; infinite where only one of the two is finite."""
    return in_floors(one, other, floor) if one.shape == other.shape else float("inf")
