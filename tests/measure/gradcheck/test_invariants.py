"""The invariants: a right kernel has each, and a kernel that is broken on purpose lacks the ones that it breaks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from bncli.measure.gradcheck import invariants
from bncli.measure.gradcheck.invariants import ROWS, grouped, judge, statistics
from bncli.measure.reference.candidate import NATIVE, KernelFailed
from bncli.measure.reference.case import Case, inputs
from bncli.measure.reference.judge import Check, CheckContext
from bncli.names import CHECKED_GROUPS, CHECKED_NORMS
from bncli.results.finding import Finding
from tests.measure.gradcheck.conftest import CPU, context_of, context_with


def checks(context: CheckContext, *refused: str) -> list[Check]:
    return [check for plan in invariants.plans(context, refused) for check in plan.checks]


def failed(context: CheckContext) -> dict[str, Finding]:
    """Invariant -> the first finding of it that failed."""
    found: dict[str, Finding] = {}
    for check in checks(context):
        finding = check.run().findings[""]
        if finding.failed:
            found.setdefault(check.name, finding)
    return found


# --- what is right has them -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", CHECKED_NORMS)
def test_torchs_operator_in_float64_has_each_invariant(norm: str) -> None:
    context = context_of(norm=norm)
    for row in ROWS:
        shape = tuple(size or 4 for size in row.shapes[0])
        for mode in row.modes if norm in row.norms else ():
            plain = context.fresh(Case(mode, "float64", "contiguous", shape, eps=row.eps[0]))
            assert row.check(context, *plain).kind == "right", row.slug


def test_the_fused_kernel_and_a_right_function_have_all_invariants() -> None:
    assert failed(context_of("fused")) == {}
    assert failed(context_of("right_by_the_seam")) == {}


# --- what is broken lacks them ----------------------------------------------------------------------------------------


class Backward(torch.autograd.Function):
    """x itself, and a change of its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.change = change
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.change(gradients[0]), None


def with_dx(change: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda x, *others: NATIVE(Backward.apply(x, change), *others)


# What a wrong kernel breaks, and all else that follows from the same mistake.
BROKEN = {
    # a constant is in no sum with xhat, which is centred, and in evaluation the whole gradient is known
    "dx moved by a constant": (with_dx(lambda dx: dx + 0.1), {"sum-dx", "ones", "scale", "eval-gradient"}),
    "output moved": (lambda *given: NATIVE(*given) + 0.01, {"moments", "no-grad"}),
    "eps of its own": (
        lambda *given: NATIVE(*given[:7], 0.1, *given[8:]),
        {"sum-xhat-dx", "scale", "moments", "eval-gradient", "no-grad"},
    ),
}
BROKEN_BY_NAME = {
    # both gradients still scale as 1/a; without the variance's path dx still adds up to 0
    "mean_constant": {"sum-dx", "ones"},
    "variance_constant": {"sum-xhat-dx"},
    "biased_running_variance": {"running"},
    "momentum_swapped": {"running"},
    "running_never_updated": {"running"},
    "unbiased_normalization": {"moments", "no-grad", "sum-xhat-dx"},
    "mean_taken_off_in_evaluation": {"eval-gradient"},
    "writes_into_its_input": {"unwritten", "no-grad", "same-bits"},  # the second run finds another x
    "not_deterministic": {"same-bits"},
    "wrong_without_gradients": {"no-grad"},
    "drops_gradients_of_a_frozen_input": {"no-grad"},
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_kernel_that_is_broken_on_purpose_lacks_what_it_breaks(name: str) -> None:
    call, slugs = BROKEN[name]
    assert failed(context_with(call)).keys() == slugs


@pytest.mark.parametrize("name", BROKEN_BY_NAME)
def test_a_wrong_kernel_lacks_the_invariants_of_its_bug_and_no_other(name: str) -> None:
    assert failed(context_of(name)).keys() == BROKEN_BY_NAME[name]


def test_each_invariant_is_lacked_by_some_wrong_kernel() -> None:
    lacked = set().union(*(slugs for _, slugs in BROKEN.values()), *BROKEN_BY_NAME.values())
    assert lacked == {row.slug for row in ROWS}


def test_findings_name_their_inputs_and_results() -> None:
    assert failed(context_of("writes_into_its_input"))["unwritten"] == Finding("input_written", names=("x",))
    finding = failed(context_of("not_deterministic"))["same-bits"]
    assert (finding.kind, finding.names[0]) == ("not_deterministic", "forward")
    finding = failed(context_of("drops_gradients_of_a_frozen_input"))["no-grad"]
    assert (finding.kind, finding.quantity) == ("no_gradient", "dweight")
    finding = failed(context_of("running_never_updated"))["running"]
    assert finding.quantity in ("running_mean with momentum 1", "running_var with momentum 1")


def test_what_a_kernel_raises_fails_the_check_and_ends_none() -> None:
    found = failed(context_of("exits"))
    assert found.keys() == {row.slug for row in ROWS}
    assert {finding.exception for finding in found.values()} == {"SystemExit"}


def test_an_invalid_result_ends_the_run() -> None:
    context = context_of("returns_a_list")
    case, given = context.fresh(Case("train", "float32", "contiguous", (4, 3)))
    with pytest.raises(KernelFailed) as caught:
        invariants.run(context, case, given)
    assert caught.value.finding.kind == "wrong_type"


# --- the sums ---------------------------------------------------------------------------------------------------------


def test_a_group_holds_the_values_that_share_a_mean() -> None:
    x = torch.arange(2 * 4 * 3.0).reshape(2, 4, 3)
    assert grouped(x, "batch")[1].tolist() == [3, 4, 5, 15, 16, 17]
    assert grouped(x, "layer").tolist() == [list(range(12)), list(range(12, 24))]
    assert grouped(x, "instance")[5].tolist() == [15, 16, 17]
    assert grouped(x, "group").shape == (2 * CHECKED_GROUPS, 6)
    assert grouped(x, "group")[1].tolist() == [6, 7, 8, 9, 10, 11]


@pytest.mark.parametrize("norm", CHECKED_NORMS)
def test_normalized_values_have_mean_zero_and_a_variance_below_one(norm: str) -> None:
    case = Case("train", "float64", "contiguous", (4, 6, 5), norm=norm)
    xhat, var = statistics(inputs(case, CPU), case)
    assert xhat.shape[1] == case.m
    torch.testing.assert_close(xhat.mean(1), torch.zeros(len(xhat)).double(), atol=1e-12, rtol=0)
    torch.testing.assert_close(xhat.var(1, correction=0), (var / (var + case.eps)).squeeze(1))


def test_tolerances_are_per_element_and_the_worst_is_reported() -> None:
    expected, allowed = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.1, 1.0, 0.5])
    assert judge("dx", expected + allowed, expected, 1.001 * allowed).kind == "right"
    finding = judge("dx", torch.tensor([1.25, 3.5, 3.25]), expected, allowed)
    assert finding == Finding(
        "off",
        "dx",
        pytest.approx(2.5),
        found=1.25,
        expected=1.0,
        allowed=pytest.approx(0.1),
    )
    assert judge("dx", torch.tensor([1.0, torch.nan, 3.0]), expected, allowed).kind == "nan_unexpected"


# --- as checks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("effort", ["quick", "default", "full"])
def test_identifiers_are_unique(effort: Any) -> None:
    names = [check.identifier for check in checks(context_of(effort=effort))]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("norm", CHECKED_NORMS)
def test_each_norm_has_its_invariants(norm: str) -> None:
    plans = list(invariants.plans(context_of(norm=norm), ()))
    assert [plan.rows[""] for plan in plans] == [row.name for row in ROWS if norm in row.norms]
    assert ("moments" in {check.name for plan in plans for check in plan.checks}) is (norm == "batch")


def test_what_is_refused_or_not_offered_is_left_out() -> None:
    context = context_of("right_without_evaluation", effort="default")
    assert "eval-gradient" not in {check.name for check in checks(context)}
    cases = [check.case for check in checks(context_of(effort="default"), "bfloat16", "relu", "eval")]
    assert cases
    for case in cases:
        assert case is not None
        assert (case.dtype != "bfloat16", case.activation, case.mode) == (True, None, "train")


def test_triton_is_interpreted_on_the_small_shape_alone_for_two_runs() -> None:
    context = context_of(effort="default")
    interpreted = replace(context, candidate=replace(context.candidate, name="fused-interpreted"))
    for each, shapes in ((context, {(4, 3, 5, 7), (8, 3, 33, 35)}), (interpreted, {(4, 3, 5, 7)})):
        assert {check.case.shape for check in checks(each) if check.case and check.name == "same-bits"} == shapes
