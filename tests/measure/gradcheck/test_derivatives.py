"""Finite differences in float64: what a wrong first or second derivative, or no result at all, gives."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from torch import Tensor

from bncli.kernels.definition import definition
from bncli.measure.gradcheck import derivatives
from bncli.measure.reference.judge import CheckContext
from bncli.results.finding import Finding
from tests.measure.gradcheck.conftest import context_of

ROWS = ("train gradcheck", "train gradgradcheck", "eval gradcheck", "eval gradgradcheck")


def found(context: CheckContext, *refused: str) -> dict[str, list[Finding]]:
    """Row -> what each of its checks found."""
    plans = derivatives.plans(context, refused)
    return {plan.rows[""]: [check.run().findings[""] for check in plan.checks] for plan in plans}


@pytest.mark.parametrize("kernel", ["right", "right_by_the_seam"])
def test_a_right_kernel_is_right_in_each_mode_and_order(kernel: str) -> None:
    rows = found(context_of(kernel))
    assert tuple(rows) == ROWS
    assert all(finding == Finding("right", "derivative", 0.0) for row in rows.values() for finding in row)


@pytest.mark.parametrize(
    ("kernel", "wrong"),
    [
        ("statistics_constant", ROWS[:2]),
        ("variance_constant", ROWS[:2]),
        # These two's second derivative is the true one of their wrong first.
        ("dweight_dbias_swapped", (ROWS[0], ROWS[2])),
        ("mean_taken_off_in_evaluation", (ROWS[2],)),
        ("second_derivative_zero", (ROWS[1], ROWS[3])),
        ("second_derivative_refused", (ROWS[1], ROWS[3])),
        ("residual_without_gradient", ROWS),
    ],
)
def test_a_wrong_derivative_is_seen_in_its_own_order_and_mode(kernel: str, wrong: tuple[str, ...]) -> None:
    rows = found(context_of(kernel))
    failed = {row: [finding for finding in findings if finding.failed] for row, findings in rows.items()}
    assert tuple(row for row in ROWS if failed[row]) == wrong
    assert {finding.kind for findings in failed.values() for finding in findings} == {"not_derivative"}


def test_an_exception_keeps_its_words_and_a_wrong_result_its_finding() -> None:
    (finding,) = found(context_of("raises"))["train gradcheck"]
    assert (finding.kind, finding.quantity, finding.exception) == ("not_derivative", "derivative", "KeyError")
    assert "no such thing" in str(finding.text)
    (finding,) = found(context_of("exits"))["train gradcheck"]
    assert finding.exception == "SystemExit"
    for finding in found(context_of("returns_y_alone"))["train gradcheck"]:
        assert (finding.kind, finding.quantity) == ("wrong_type", "derivative")


def test_a_mode_a_dtype_or_an_operation_that_is_refused_is_left_out() -> None:
    assert found(context_of("right"), "float64") == {}
    assert tuple(found(context_of("right_without_evaluation"))) == ROWS[:2]
    context = context_of("right_by_the_seam")
    for refused, fusions in (((), {"plain", "silu+residual"}), (("silu",), {"plain"})):
        cases = [check.case for plan in derivatives.plans(context, refused) for check in plan.checks]
        assert {case.fusion for case in cases if case} == fusions
        assert all(case and case.dtype == "float64" for case in cases)


def test_no_activation_is_differentiated_across_its_kink(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a residual or a bias that is moved; a third of the activation's inputs would else be as near to 0 as this."""
    monkeypatch.setattr(derivatives, "KINK", 0.3)
    nearest: list[tuple[bool, float]] = []

    def call(*arguments: Any) -> Tensor:
        *before, activation = arguments
        if activation is not None:
            z = definition("batch")(*before, None)
            nearest.append((arguments[8] is not None, float(z.detach().abs().min())))
        return definition("batch")(*arguments)

    context = context_of("right_by_the_seam", effort="default")
    context = replace(context, candidate=replace(context.candidate, call=call))
    assert all(finding.kind == "right" for row in found(context).values() for finding in row)
    assert {moved for moved, _ in nearest} == {True, False}  # the residual, and without one the bias
    assert min(z for _, z in nearest) > 0.3 - 1e-4  # the step of the differences
