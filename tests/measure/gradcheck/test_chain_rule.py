"""The three parts of dL/dx, the bound of their check by differences, and the bias that grows for nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bncli.errors import Unavailable
from bncli.measure.gradcheck import chain_rule
from bncli.measure.gradcheck.chain_rule import CASES, Call, Inputs, as_rows, bias_demo, paths, random_inputs, sets_of
from bncli.measure.reference.case import Case
from tests.measure.gradcheck.conftest import CPU, context_of

VALID = [
    pytest.param(case, norm, id=f"{name}, {norm}")
    for name, case in CASES.items()
    for norm in ("batch", "layer", "group", "instance")
    if sets_of(case, norm).size(1) > 1
]
EACH_CASE = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def native(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.batch_norm(x, None, None, weight, bias, training=True, eps=eps)


def of_groups(groups: Callable[[Tensor], int]) -> Call:
    return lambda x, weight, bias, eps: F.group_norm(x, groups(x), weight, bias, eps)


NORMS: dict[str, Call] = {
    "batch": native,
    "layer": of_groups(lambda x: 1),
    "group": of_groups(lambda x: 2),
    "instance": of_groups(lambda x: x.size(1)),
}


def rows_of(case: Case, seed: int = 0, norm: str = "batch") -> Inputs:
    return as_rows(random_inputs(case, seed), sets_of(case, norm))


def true_gradient(rows: Inputs, upstream: Tensor) -> Tensor:
    """dL/dx of the definition by autograd, which knows nothing of the three formulas."""
    x = rows.x.clone().requires_grad_()
    return torch.autograd.grad(chain_rule.normalized(rows._replace(x=x)), x, upstream)[0]


# --- the parts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("case", "norm"), VALID)
def test_the_three_parts_sum_to_the_gradient_that_autograd_finds(case: Case, norm: str) -> None:
    rows = rows_of(case, norm=norm)
    parts = chain_rule.three_parts(rows)
    whole = true_gradient(rows, rows.upstream)
    rounding = chain_rule.arithmetic_bound(rows, torch.float64)
    assert (sum(parts) - whole).norm() <= 2 * rounding  # both sides round
    for part in parts:
        assert (sum(parts) - part - whole).norm() > 1e6 * rounding  # without any one of them it is another gradient


@EACH_CASE
def test_each_part_is_the_derivative_along_its_own_path_alone(case: Case) -> None:
    rows = rows_of(case)
    mean, centred = rows.x.mean(1, keepdim=True), rows.x - rows.x.mean(1, keepdim=True)
    variance = centred.square().mean(1, keepdim=True)

    def held(which: str) -> Tensor:
        """The gradient with all paths but one cut."""
        x = rows.x.clone().requires_grad_()
        through = {"direct": x, "mean": x.mean(1, keepdim=True), "variance": (x - mean).square().mean(1, keepdim=True)}
        value, its_mean, its_variance = (
            through[name] if name == which else constant
            for name, constant in (("direct", rows.x), ("mean", mean), ("variance", variance))
        )
        y = rows.weight * (value - its_mean) / (its_variance + rows.eps).sqrt() + rows.bias
        return torch.autograd.grad(y, x, rows.upstream)[0]

    for name, part in zip(("direct", "mean", "variance"), chain_rule.three_parts(rows), strict=True):
        torch.testing.assert_close(held(name), part, rtol=1e-12, atol=1e-13)


@EACH_CASE
def test_an_upstream_gradient_of_ones_leaves_nothing_to_compare(case: Case) -> None:
    rows = rows_of(case)
    ones = rows._replace(upstream=torch.ones_like(rows.upstream))
    direct = chain_rule.three_parts(ones)[0]
    whole = sum(chain_rule.three_parts(ones), torch.zeros(()))
    assert direct.norm() > 1
    assert whole.norm() <= chain_rule.arithmetic_bound(ones, torch.float64)


@pytest.mark.parametrize(("case", "norm"), VALID)
def test_sets_hold_every_value_once_and_share_the_statistics_that_the_norm_takes(case: Case, norm: str) -> None:
    sets = sets_of(case, norm)
    assert sorted(sets.flatten().tolist()) == list(range(math.prod(case.shape)))
    inputs = random_inputs(case, 0)
    y = NORMS[norm](inputs.x, inputs.weight, inputs.bias, case.eps)
    torch.testing.assert_close(y.flatten()[sets], chain_rule.normalized(as_rows(inputs, sets)))


# --- the bound ----------------------------------------------------------------------------------------------------


@EACH_CASE
@pytest.mark.parametrize("norm", ["batch", "layer", "group"])
def test_differences_of_the_true_loss_stay_within_their_bound_and_come_near_it(case: Case, norm: str) -> None:
    shares = []
    for seed in range(30):
        rows = rows_of(case, seed, norm)
        error = (chain_rule.central_differences(rows) - true_gradient(rows, rows.upstream)).norm()
        bound = chain_rule.differences_bound(rows) + chain_rule.arithmetic_bound(rows, torch.float64)
        shares.append(float(error) / bound)
    assert max(shares) <= 1
    assert max(shares) > 0.1  # a bound that no error comes near would let a wrong gradient pass


def test_the_truncation_is_the_third_derivative_of_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a step a thousand times as long truncation is all there is, and the bound is its exact size."""
    step = chain_rule._step
    monkeypatch.setattr(chain_rule, "_step", lambda rows: 1000 * step(rows))
    for case in CASES.values():
        rows = rows_of(case)
        error = (chain_rule.central_differences(rows) - true_gradient(rows, rows.upstream)).norm()
        assert float(error) == pytest.approx(chain_rule.differences_bound(rows), rel=1e-3)


# --- kernels ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
def test_torchs_own_norms_are_within_the_bound_in_every_case(norm: str) -> None:
    found = paths(NORMS[norm], CPU, norm)
    assert len(found) == (1 if norm == "instance" else len(CASES))  # vectors have one value a channel
    for each in found:
        assert 0 < each.error <= each.bound < 1e-8


def test_lost_is_the_norm_of_the_ignored_parts() -> None:
    """At eps << var the parts are projections: direct**2 = full**2 + mean**2 + variance**2, lost = the rest / full."""
    found = dict(zip(CASES, paths(native, CPU), strict=True))
    for name, each in found.items():
        if CASES[name].eps < 1e-3:
            rest = math.hypot(each.through_mean, each.through_variance)
            assert each.direct == pytest.approx(math.hypot(each.full, rest), rel=1e-3)
            assert each.lost == pytest.approx(rest / each.full, rel=1e-3)
    # 2 of 3 degrees of freedom against 2 of 16
    assert found["small batch"].lost > 2 * found["vectors"].lost > 2 * found["large eps"].lost


def by_name(kernel: str) -> Call:
    """One of the wrong kernels."""
    call = context_of(kernel).candidate.call
    return lambda x, weight, bias, eps: call(x, None, None, weight, bias, True, 0.1, eps, None, None)


def secretly_float32(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return native(x.float(), weight.float(), bias.float(), eps).to(x.dtype)


WRONG = {name: by_name(name) for name in ("statistics_constant", "variance_constant", "eps_outside_the_root")}


@pytest.mark.parametrize("wrong", [*WRONG.values(), secretly_float32], ids=[*WRONG, "secretly_float32"])
def test_a_wrong_gradient_is_beyond_its_bound_in_every_case(wrong: Call) -> None:
    for each in paths(wrong, CPU):
        assert each.error > 10 * each.bound


def test_a_gradient_that_ignores_the_statistics_is_off_by_what_is_lost() -> None:
    for each in paths(WRONG["statistics_constant"], CPU):
        assert each.error == pytest.approx(each.lost, rel=1e-6)


def only_float32(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    if x.dtype != torch.float32:
        raise TypeError("float32 only")
    return native(x, weight, bias, eps)


def always_float32(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return native(x.float(), weight.float(), bias.float(), eps)


@pytest.mark.parametrize("kernel", [only_float32, always_float32])
def test_a_kernel_without_float64_is_measured_in_float32_with_a_bound_to_match(kernel: Call) -> None:
    for each, exact in zip(paths(kernel, CPU), paths(native, CPU), strict=True):
        assert 100 * exact.bound < each.bound < 1e-4
        assert 1e-8 < each.error <= each.bound
        assert replace(each, error=0, bound=0) == replace(exact, error=0, bound=0)  # the truth is the same


NO_GRADIENT = {
    "raises": by_name("raises"),
    "not differentiable": lambda *given: native(*given).detach(),
    "not a number": lambda *given: native(*given) * math.nan,
}


@pytest.mark.parametrize("kernel", NO_GRADIENT.values(), ids=NO_GRADIENT)
def test_a_kernel_that_gives_no_gradient_is_infinitely_wrong_and_stops_nothing(kernel: Call) -> None:
    found = paths(kernel, CPU)
    assert [each.error for each in found] == [math.inf] * len(CASES)
    assert all(each.lost > 0 for each in found)


def test_an_unavailable_kernel_is_not_taken_for_a_wrong_one() -> None:
    def unavailable(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        raise Unavailable("no GPU")

    with pytest.raises(Unavailable, match="no GPU"):
        paths(unavailable, CPU)


def test_the_kernels_arguments_are_copies_and_the_result_is_the_same_each_time() -> None:
    def writes(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        y = native(x, weight, bias, eps)
        weight.zero_()
        return y

    once = paths(native, CPU)
    paths(writes, CPU)
    assert paths(native, CPU) == once


# --- section 2 ----------------------------------------------------------------------------------------------------


def test_ignoring_the_mean_makes_the_bias_drift_at_constant_loss() -> None:
    first, *steps = bias_demo()
    assert [step.step for step in steps] == [1, 10, 100, 1000]
    assert (first.step, first.bias_ignoring, first.bias_full) == (0, 0.0, 0.0)
    for step in steps:
        assert step.bias_ignoring == pytest.approx(step.step * steps[0].bias_ignoring, rel=1e-12)
        assert step.loss_ignoring == pytest.approx(first.loss_ignoring, rel=1e-12)
        assert abs(step.bias_full) < 1e-15
        assert step.loss_full == pytest.approx(first.loss_full, rel=1e-15)
    assert abs(steps[-1].bias_ignoring) > 50


def test_the_drift_is_the_rate_times_the_mean_of_the_targets() -> None:
    slow, fast = (bias_demo(steps=20, rate=rate)[-1] for rate in (0.01, 0.1))
    assert fast.step == 20
    assert fast.bias_ignoring == pytest.approx(10 * slow.bias_ignoring, rel=1e-12)
    assert bias_demo(steps=20, seed=1)[-1].bias_ignoring != fast.bias_ignoring
