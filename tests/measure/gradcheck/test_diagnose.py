"""The diagnosis of failures made by hand: which known bugs explain them, and how well."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from bncli.measure.gradcheck.diagnose import NEAR, SHOWN, UNKNOWN, diagnose
from bncli.measure.gradcheck.known_bugs import KNOWN_BUGS, KnownBug, Values, predicted
from bncli.measure.reference.judge import Check, Evidence, Outcome, Verdict, judged
from bncli.results.finding import Finding
from tests.measure.gradcheck.conftest import BUG_CASES, evidence_of

BY_NAME = {known.bug: known for known in KNOWN_BUGS}
CONSTANTS = BY_NAME["statistics treated as constants"]
TRUTH = [evidence_of(case) for case in BUG_CASES]


def with_bug(*bugs: KnownBug, truth: Sequence[Evidence] = TRUTH) -> list[Evidence]:
    """The same runs by a kernel that has all of these bugs."""
    found = []
    for evidence in truth:
        seen = evidence.truth
        for known in bugs:
            if known.applies(evidence.case):
                # of two bugs each changes what it changes of the truth
                wrong = predicted(known, evidence)
                seen = {**seen, **{name: t for name, t in wrong.items() if not torch.equal(t, evidence.truth[name])}}
        found.append(replace(evidence, seen=seen))
    return found


def verdicts(runs: Sequence[Evidence]) -> list[Verdict]:
    """A verdict of each quantity of each run, as the values section makes them."""
    found = []
    for evidence in runs:
        check = Check("values", evidence.case.identifier, lambda: Outcome({}), case=evidence.case)
        for name, finding in judged(evidence, {}, {}).findings.items():
            row = f"{evidence.case.mode} {name}"
            found.append(Verdict(check, row, name, finding, evidence if finding.failed else None))
    return found


def bugs(runs: Sequence[Evidence], norm: str = "batch") -> list[str]:
    return [diagnosis.bug for diagnosis in diagnose(verdicts(runs), norm)]


def changed(evidence: Evidence, **values: torch.Tensor) -> Evidence:
    return replace(evidence, seen={**evidence.seen, **values})


def test_a_right_kernel_has_no_diagnosis() -> None:
    assert bugs(TRUTH) == []


@pytest.mark.parametrize("known", KNOWN_BUGS, ids=lambda known: known.bug)
def test_each_known_bug_is_named_first_by_what_its_kernel_gives(known: KnownBug) -> None:
    assert bugs(with_bug(known))[0] == known.bug


def test_the_evidence_is_the_result_that_the_wrong_kernel_is_nearest_to() -> None:
    runs = with_bug(CONSTANTS, truth=TRUTH[:1])
    near = runs[0].seen["dx"]
    near = near + 0.5 * NEAR * (near - runs[0].truth["dx"])
    (found,) = diagnose(verdicts([changed(runs[0], dx=near)]), "batch")
    match = found.match
    assert match is not None
    assert (match.case, match.quantity) == ("train/float64/contiguous/4x3x5/plain", "dx")
    assert match.equals == CONSTANTS.equals
    assert (match.alike, match.failing) == (1, 1)
    assert match.from_wrong / match.from_truth == pytest.approx(0.5 * NEAR / (1 + 0.5 * NEAR))
    truth = runs[0].truth["dx"]
    assert match.from_truth == pytest.approx(float((near - truth).norm() / truth.norm()))


def test_the_example_is_one_that_is_near_the_wrong_kernels_in_size_too() -> None:
    """A gradient that is nearly 0 gives huge relative distances, however near the wrong kernel's it is."""
    plain, vanishing = with_bug(CONSTANTS, truth=TRUTH[:2])
    near, nearer = (
        each.seen["dx"] + away * (each.seen["dx"] - each.truth["dx"])
        for each, away in ((plain, 1e-4), (vanishing, 1e-8))
    )
    tiny = replace(changed(vanishing, dx=nearer), truth={**vanishing.truth, "dx": 1e-20 * vanishing.truth["dx"]})
    found = diagnose(verdicts([tiny, changed(plain, dx=near)]), "batch")[0].match
    assert found is not None
    assert found.from_wrong < 0.01


@pytest.mark.parametrize(("away", "named"), [(0.01, True), (0.06, False)])
def test_a_result_has_to_be_much_nearer_to_the_wrong_kernels_than_to_the_truth(away: float, named: bool) -> None:
    def moved(evidence: Evidence) -> Evidence:
        wrong, truth = evidence.seen["dx"], evidence.truth["dx"]
        return changed(evidence, dx=wrong + away * (wrong - truth))

    runs = [moved(evidence) for evidence in with_bug(CONSTANTS, truth=TRUTH[:1])]
    assert bugs(runs) == [CONSTANTS.bug if named else UNKNOWN]


def test_a_right_result_contradicts_a_bug_that_would_change_it() -> None:
    known = BY_NAME["unbiased normalization"]
    (run,) = with_bug(known, truth=TRUTH[:1])
    assert bugs([run]) == [known.bug]
    assert known.bug not in bugs([changed(run, forward=run.truth["forward"])])


def test_two_bugs_at_once_are_both_named() -> None:
    both = BY_NAME["biased running variance"], BY_NAME["dweight and dbias swapped"]
    assert set(bugs(with_bug(*both))) == {known.bug for known in both}


def test_an_unknown_bug_has_a_summary() -> None:
    (diagnosis,) = diagnose(verdicts([changed(e, dx=1.5 * e.truth["dx"]) for e in TRUTH]), "batch")
    assert (diagnosis.bug, diagnosis.match) == (UNKNOWN, None)
    assert diagnosis.summary is not None
    assert diagnosis.summary.quantities == ("dx",)


def test_a_result_that_has_no_number_or_another_shape_is_explained_by_no_bug() -> None:
    spoilt: list[Values] = [
        {"dx": torch.full_like(TRUTH[0].truth["dx"], torch.nan)},
        {"dx": TRUTH[0].truth["dx"][:1] * 1.5},
    ]
    for values in spoilt:
        verdict = verdicts(with_bug(CONSTANTS, truth=TRUTH[:1]))[3]
        assert verdict.failed
        evidence = replace(TRUTH[0], seen={**TRUTH[0].seen, **values})
        (diagnosis,) = diagnose([replace(verdict, evidence=evidence)], "batch")
        assert diagnosis.bug == UNKNOWN


def test_known_bugs_are_those_of_batch_norm() -> None:
    runs = with_bug(CONSTANTS)
    assert bugs(runs, "batch") == [CONSTANTS.bug]
    assert bugs(runs, "layer") == [UNKNOWN]


def test_a_decisive_symptom_is_the_only_diagnosis() -> None:
    found = verdicts(with_bug(CONSTANTS))
    raised = [
        replace(v, finding=Finding("input_written", names=("x",))) if v.quantity == "forward" else v for v in found
    ]
    assert [diagnosis.bug for diagnosis in diagnose(raised, "batch")] == ["an input is modified"]


def test_at_most_three_bugs_are_named() -> None:
    """Four that have nothing to do with each other."""
    names = ("biased running variance", "dweight and dbias swapped", "the gradient of the residual is missing")
    several = [BY_NAME[name] for name in (*names, "evaluation uses batch statistics")]
    found = bugs(with_bug(*several))
    assert len(found) == SHOWN
    assert set(found) < {known.bug for known in several}
