"""The judge: kinds of wrong numbers, and what is wrong with a call as a whole."""

from __future__ import annotations

import math

import pytest
import torch

from bncli.measure.reference.candidate import candidate
from bncli.measure.reference.case import Case
from bncli.measure.reference.judge import CheckContext, Outcome, compare, difference, number_kind, same_bits
from bncli.results.finding import Finding

CPU = torch.device("cpu")
CASE = Case("train", "float32", "contiguous", (4, 3, 5))


def judged(kernel: str, case: Case = CASE) -> Outcome:
    own = candidate(f"tests.measure.reference.wrong_kernels:{kernel}", "batch", CPU, allow_code=True)
    context = CheckContext(own, CPU)
    return compare(context, *context.fresh(case))


@pytest.mark.parametrize(
    ("found", "expected", "kind"),
    [
        (1.0, 2.0, "off"),
        (1.0, math.inf, "off"),
        (1.0, math.nan, "nan_missing"),
        (math.nan, 2.0, "nan_unexpected"),
        (-math.inf, 2.0, "nan_unexpected"),
    ],
)
def test_a_wrong_number_has_a_kind(found: float, expected: float, kind: str) -> None:
    assert number_kind(found, expected) == kind


def test_the_place_of_the_largest_difference_is_found_past_the_places_where_neither_is_a_number() -> None:
    exact = torch.tensor([[0.0, math.nan], [3.0, 4.0]])
    found = torch.tensor([[0.5, math.nan], [3.0, 6.0]])
    assert difference("dx", found, exact, 7.0) == Finding(
        "off", "dx", 7.0, at=(1, 1), found=6.0, expected=4.0, relative=pytest.approx(math.hypot(0.5, 2) / 5)
    )
    assert difference("dx", torch.tensor([math.nan]), torch.ones(1), math.inf).relative is None


def test_a_right_kernel_is_right_in_every_quantity() -> None:
    outcome = judged("right")
    assert {finding.kind for finding in outcome.findings.values()} == {"right"}
    assert not any(finding.failed for finding in outcome.findings.values())


def test_a_wrong_gradient_is_off_at_a_place_and_the_output_is_right() -> None:
    findings = judged("statistics_constant").findings
    assert findings["forward"].kind == "right"
    wrong = findings["dx"]
    assert wrong.failed
    assert (wrong.kind, wrong.quantity) == ("off", "dx")
    assert wrong.at is not None
    assert len(wrong.at) == 3
    assert wrong.of_native is not None
    assert wrong.of_native > 100
    assert findings["double backward"].quantity.startswith("double backward in ")


def test_an_input_that_is_written_to_is_named() -> None:
    assert judged("writes_into_its_input").findings["forward"] == Finding("input_written", names=("x",))


def test_statistics_of_a_wrong_shape_are_told_with_both_shapes() -> None:
    finding = judged("returns_y_alone").findings["dx"]
    assert (finding.kind, finding.given) == ("wrong_type", "Tensor")


def test_nan_is_equal_to_nan_and_nothing_to_nothing() -> None:
    nan = torch.tensor([1.0, math.nan])
    assert same_bits(nan, nan.clone())
    assert same_bits(None, None)
    assert not same_bits(nan, None)
    assert not same_bits(nan, torch.tensor([1.0, 2.0]))
