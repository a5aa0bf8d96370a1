"""The plan of the values section: which cases, which rows, and what is left out."""

from __future__ import annotations

import torch

from bncli.measure.gradcheck import forward_backward
from bncli.measure.reference.candidate import candidate
from bncli.measure.reference.judge import CheckContext, CheckGroupPlan
from bncli.measure.reference.observe import GRADIENTS, RUNNING, quantities
from bncli.results.gradcheck import Effort

HERE = "tests.measure.reference.wrong_kernels"


def plans(*refused: str, kernel: str = "native", norm: str = "batch", effort: Effort = "quick") -> list[CheckGroupPlan]:
    device = torch.device("cpu")
    context = CheckContext(candidate(kernel, norm, device, allow_code=True), device, effort)
    return list(forward_backward.plans(context, refused))


def test_each_mode_has_a_row_for_each_quantity() -> None:
    train, evaluation = plans()
    everything = ("forward", *RUNNING, *GRADIENTS, "double backward")
    assert train.rows == {name: f"train {name}" for name in everything}
    assert evaluation.rows == {name: f"eval {name}" for name in everything if name not in RUNNING}
    assert {plan.section for plan in (train, evaluation)} == {"values"}


def test_a_candidate_that_fuses_nothing_or_only_trains_has_no_rows_for_the_rest() -> None:
    (train,) = plans(kernel=f"{HERE}:right_without_evaluation")
    assert "dresidual" in train.rows
    assert "dresidual" not in plans(kernel=f"{HERE}:right")[0].rows
    (layer,) = plans(norm="layer")
    assert list(layer.rows) == ["forward", *GRADIENTS[:3], "double backward"]


def test_a_check_is_a_case_and_is_asked_for_by_the_cases_identifier() -> None:
    checks = [check for plan in plans(effort="default") for check in plan.checks]
    for check in checks:
        assert check.case is not None
        assert check.identifier == check.case.identifier
        assert check.quantities == quantities(check.case)
    assert len({check.identifier for check in checks}) == len(checks)


def test_what_a_kernel_refuses_is_in_no_case() -> None:
    every, left = (
        [check.case for plan in plans(*refused, effort="default") for check in plan.checks]
        for refused in ((), ("float16", "silu"))
    )
    assert left == [case for case in every if case and case.dtype != "float16" and "silu" not in case.fusion.split("+")]
    assert 0 < len(left) < len(every)
    (train,) = [plan for plan in plans("eval") if plan.checks]
    assert {check.case.mode for check in train.checks if check.case} == {"train"}


def test_errors_are_held_to_the_rule_of_the_candidate() -> None:
    assert {plan.rule for plan in plans()} == {"native"}
    assert {plan.rule for plan in plans(kernel="fused")} == {"kernel"}
    assert {plan.rule for plan in plans(kernel=f"{HERE}:right")} == {"own function"}


def test_a_check_that_is_run_judges_each_of_its_quantities() -> None:
    identifier = "train/float32/contiguous/5x3x7/"
    right, wrong = (
        next(check for check in plans(kernel=f"{HERE}:{kernel}")[0].checks if check.identifier.startswith(identifier))
        for kernel in ("right", "mean_constant")
    )
    assert tuple(right.run().findings) == right.quantities
    assert right.run().wrong is None
    findings = wrong.run().findings
    assert [name for name, finding in findings.items() if finding.failed] == ["dx", "double backward"]
