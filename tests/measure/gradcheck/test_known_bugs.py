"""Known bugs, as wrong kernels in float64: each is another than the right one, and than each other."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from bncli.measure.gradcheck.diagnose import FLOORS
from bncli.measure.gradcheck.known_bugs import KNOWN_BUGS, KnownBug, Values, back_in_memory, memory_of, predicted
from bncli.measure.reference.case import Case
from bncli.measure.reference.observe import GRADIENTS, RUNNING, observe
from bncli.measure.reference.tolerance import in_floors
from tests.measure.gradcheck.conftest import BUG_CASES, context_of, evidence_of
from tests.measure.reference import wrong_kernels

BY_NAME = {known.bug: known for known in KNOWN_BUGS}
EVIDENCE = [evidence_of(case) for case in BUG_CASES]
EACH_BUG = pytest.mark.parametrize("known", KNOWN_BUGS, ids=lambda known: known.bug)


def predictions(known: KnownBug) -> dict[Case, Values]:
    return {each.case: predicted(known, each) for each in EVIDENCE if known.applies(each.case)}


def test_names_of_bugs_are_unique() -> None:
    assert len(BY_NAME) == len(KNOWN_BUGS)


@EACH_BUG
def test_a_bug_gives_something_else_than_the_truth_by_far_and_gives_every_number(known: KnownBug) -> None:
    """So that a right kernel, whose errors are of a floor, has none of them."""
    furthest = 0.0
    for evidence in EVIDENCE:
        if not known.applies(evidence.case):
            continue
        wrong = predicted(known, evidence)
        assert wrong
        for name, value in wrong.items():
            assert value.isfinite().all()
            furthest = max(furthest, in_floors(value, evidence.truth[name], evidence.floors[name]))
    assert furthest > 5 * FLOORS


def test_some_case_distinguishes_any_two_bugs() -> None:
    found = {known.bug: predictions(known) for known in KNOWN_BUGS}
    for (one, its), (other, others) in itertools.combinations(found.items(), 2):
        shared = its.keys() & others.keys()
        same = [
            case
            for case in shared
            if its[case].keys() == others[case].keys()
            and all(torch.allclose(value, others[case][name], rtol=1e-6) for name, value in its[case].items())
        ]
        assert not shared or len(same) < len(shared), f"{one} and {other}"


# Of a kernel that rounds statistics to half precision the running ones alone can be compared, as below.
WRITTEN_OUT = {
    kernel: bug
    for kernel, bug in wrong_kernels.BUGS.items()
    if bug in BY_NAME and kernel != "half_precision_statistics"
}


@pytest.mark.parametrize("kernel", WRITTEN_OUT)
def test_the_prediction_is_what_a_kernel_with_the_bug_computes(kernel: str) -> None:
    """By kernels that were written for themselves, in float64, on each case's own numbers."""
    known = BY_NAME[WRITTEN_OUT[kernel]]
    written = context_of(kernel).candidate
    cases = [case if written.fuses else replace(case, fusion="plain") for case in BUG_CASES]
    cases = [case for case in cases if known.applies(case)]
    assert cases
    for case in cases:
        evidence = evidence_of(case)
        seen = observe(written.call, case, evidence.given.wide(), second=False)
        wrong = predicted(known, evidence)
        assert wrong
        for name, value in wrong.items():
            torch.testing.assert_close(seen.wide()[name], value, rtol=1e-8, atol=1e-8)


def test_statistics_in_half_precision_are_those_that_the_dtype_holds() -> None:
    known = BY_NAME["half-precision statistics"]
    case = Case("train", "bfloat16", "contiguous", (4, 3, 5, 7), momentum=1.0)
    evidence = evidence_of(case)
    mean = predicted(known, evidence)["running_mean"]
    assert torch.equal(mean, evidence.given.x.mean((0, 2, 3)).bfloat16().double())
    assert not known.applies(replace(case, dtype="float32"))


def test_a_bug_of_the_backward_pass_says_nothing_of_the_output() -> None:
    known = BY_NAME["eps ignored in the gradient"]
    assert set(predicted(known, EVIDENCE[0])) == set(GRADIENTS[:3])
    instance = predicted(BY_NAME["each example normalized separately, as in instance norm"], EVIDENCE[0])
    assert not instance.keys() & set(RUNNING)


def test_where_a_wrong_kernel_has_no_result_nothing_is_predicted() -> None:
    case = Case("train", "float32", "contiguous", (4, 3, 5), tracked=False)
    assert predicted(BY_NAME["training uses the running statistics"], evidence_of(case)) == {}


def case_of(
    mode: str = "train", layout: str = "contiguous", shape: tuple[int, ...] = (4, 3, 5), fusion: str = "plain"
) -> Case:
    return Case(mode, "float32", layout, shape, fusion)


@pytest.mark.parametrize(
    ("bug", "case", "applies"),
    [
        ("channels_last memory read as contiguous", case_of("eval", "channels_last", (4, 3, 5, 7)), True),
        ("channels_last memory read as contiguous", case_of("eval", "channels_last", (4, 3)), False),
        ("channels_last memory read as contiguous", case_of("eval", shape=(4, 3, 5, 7)), False),
        ("each example normalized separately, as in instance norm", case_of(shape=(4, 3)), False),
        ("evaluation uses the training gradient", case_of(), False),
        ("biased running variance", case_of("eval"), False),
        ("the gradient of the residual is missing", case_of(fusion="relu"), False),
        ("the activation's gradient is ignored", case_of(fusion="relu"), True),
        ("the residual is added after the activation", case_of(fusion="relu"), False),
    ],
)
def test_a_bug_applies_where_its_step_is_taken(bug: str, case: Case, applies: bool) -> None:
    assert BY_NAME[bug].applies(case) is applies


def test_memory_is_read_in_the_order_of_a_contiguous_tensor_and_back() -> None:
    x = torch.arange(2 * 3 * 2 * 2).reshape(2, 3, 2, 2).contiguous(memory_format=torch.channels_last)
    read = memory_of(x)
    assert read.flatten().tolist() == x.permute(0, 2, 3, 1).flatten().tolist()
    assert not torch.equal(read, x)
    assert torch.equal(back_in_memory(read), x)
    vector = torch.arange(3)
    assert memory_of(vector) is vector
