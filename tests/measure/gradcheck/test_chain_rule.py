"""The three parts of dL/dx, the bound of their check by differences, and the bias that grows for nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bncli.engine.models.whitening import Whitening, newton, zca
from bncli.errors import Unavailable
from bncli.measure.gradcheck import chain_rule
from bncli.measure.gradcheck.chain_rule import Call, Inputs, as_rows, bias_demo, cases_of, paths, random_inputs, sets_of
from bncli.measure.reference.case import Case
from bncli.names import CHECKED_GROUP_SIZE, CHECKED_NEWTON_STEPS, CHECKED_NORMS
from tests.measure.gradcheck.conftest import CPU, context_of

CASES = cases_of("batch")
VALID = [pytest.param(case, id=f"{name}, {norm}") for norm in CHECKED_NORMS for name, case in cases_of(norm).items()]
EACH_VALID = pytest.mark.parametrize("case", VALID)
EACH_CASE = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def native(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.batch_norm(x, None, None, weight, bias, training=True, eps=eps)


def of_groups(groups: Callable[[Tensor], int]) -> Call:
    return lambda x, weight, bias, eps: F.group_norm(x, groups(x), weight, bias, eps)


def whitening(iterations: int | None) -> Call:
    def call(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        module = Whitening(x.size(1), CHECKED_GROUP_SIZE, eps, iterations=iterations)
        y: Tensor = torch.func.functional_call(module, {"weight": weight, "bias": bias}, (x,))
        return y

    return call


NORMS: dict[str, Call] = {
    "batch": native,
    "layer": of_groups(lambda x: 1),
    "group": of_groups(lambda x: 2),
    "instance": of_groups(lambda x: x.size(1)),
    "whiten": whitening(None),
    "iternorm": whitening(CHECKED_NEWTON_STEPS),
}


def rows_of(case: Case, seed: int = 0) -> Inputs:
    return as_rows(random_inputs(case, seed), sets_of(case))


def true_gradient(rows: Inputs, upstream: Tensor) -> Tensor:
    """dL/dx of the definition by autograd, which knows nothing of the three formulas."""
    x = rows.x.clone().requires_grad_()
    return torch.autograd.grad(chain_rule.normalized(rows._replace(x=x)), x, upstream)[0]


# --- the parts ----------------------------------------------------------------------------------------------------


def test_every_norm_is_looked_at() -> None:
    assert NORMS.keys() == set(CHECKED_NORMS)


@EACH_VALID
def test_the_three_parts_sum_to_the_gradient_that_autograd_finds(case: Case) -> None:
    rows = rows_of(case)
    parts = chain_rule.three_parts(rows)
    whole = true_gradient(rows, rows.upstream)
    rounding = chain_rule.arithmetic_bound(rows, torch.float64)
    assert (sum(parts) - whole).norm() <= 2 * rounding  # both sides round
    for part in parts:
        assert (sum(parts) - part - whole).norm() > 1e6 * rounding  # without any one of them it is another gradient


@EACH_CASE
def test_the_parts_of_batch_norm_are_the_papers(case: Case) -> None:
    """Ioffe & Szegedy 2015, section 3: dL/dxhat, then through the variance and through the mean."""
    rows = rows_of(case)
    m, centred = rows.x.size(-1), rows.x - rows.x.mean(-1, keepdim=True)
    v, to_xhat = centred.square().mean(-1, keepdim=True) + rows.eps, rows.upstream * rows.weight
    to_variance = (to_xhat * centred).sum(-1, keepdim=True) * -0.5 * v**-1.5
    to_mean = -(to_xhat / v.sqrt()).sum(-1, keepdim=True)
    expected = to_xhat / v.sqrt(), (to_mean / m).expand_as(centred), to_variance * 2 * centred / m
    torch.testing.assert_close(chain_rule.three_parts(rows), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("norm", ["whiten", "iternorm"])
def test_the_parts_of_whitening_are_those_of_the_module_with_a_statistic_held_constant(norm: str) -> None:
    case = cases_of(norm)["vectors"]
    rows = rows_of(case)

    def held(x: Tensor, mean: Tensor, covariance: Tensor) -> Tensor:
        steps = None if norm == "whiten" else CHECKED_NEWTON_STEPS
        root = zca(covariance, case.eps) if steps is None else newton(covariance, case.eps, steps)
        return rows.weight * (root @ (x - mean)) + rows.bias

    mean = rows.x.mean(-1, keepdim=True)
    covariance = (rows.x - mean) @ (rows.x - mean).mT / rows.x.size(-1)
    for index, part in enumerate(chain_rule.three_parts(rows)):
        x = rows.x.clone().requires_grad_()
        its_mean = x.mean(-1, keepdim=True)
        its = x, its_mean, (x - its_mean) @ (x - its_mean).mT / x.size(-1)
        y = held(*(its[i] if i == index else (rows.x, mean, covariance)[i] for i in range(3)))
        torch.testing.assert_close(torch.autograd.grad(y, x, rows.upstream)[0], part, rtol=1e-9, atol=1e-11)


@EACH_CASE
def test_an_upstream_gradient_of_ones_leaves_nothing_to_compare(case: Case) -> None:
    rows = rows_of(case)
    ones = rows._replace(upstream=torch.ones_like(rows.upstream))
    direct = chain_rule.three_parts(ones)[0]
    whole = sum(chain_rule.three_parts(ones), torch.zeros(()))
    assert direct.norm() > 1
    assert whole.norm() <= chain_rule.arithmetic_bound(ones, torch.float64)


@EACH_VALID
def test_sets_hold_every_value_once_and_share_the_statistics_that_the_norm_takes(case: Case) -> None:
    sets = sets_of(case)
    assert sorted(sets.flatten().tolist()) == list(range(math.prod(case.shape)))
    inputs = random_inputs(case, 0)
    y = NORMS[case.norm](inputs.x, inputs.weight, inputs.bias, case.eps)
    torch.testing.assert_close(y.flatten()[sets], chain_rule.normalized(as_rows(inputs, sets)))


# --- the bound ----------------------------------------------------------------------------------------------------


@EACH_VALID
def test_differences_of_the_true_loss_stay_within_their_bound_and_come_near_it(case: Case) -> None:
    shares = []
    for seed in range(30 if case.norm == "batch" else 15):
        rows = rows_of(case, seed)
        step = chain_rule.best_step(rows)
        error = (chain_rule.central_differences(rows, step) - true_gradient(rows, rows.upstream)).norm()
        bound = chain_rule.differences_bound(rows, step) + chain_rule.arithmetic_bound(rows, torch.float64)
        shares.append(float(error) / bound)
    assert max(shares) <= 1
    assert max(shares) > 0.1  # a bound that no error comes near would let a wrong gradient pass


@EACH_VALID
def test_a_long_step_leaves_nothing_but_the_truncation_which_the_bound_is(case: Case) -> None:
    rows = rows_of(case)
    step = 100 * chain_rule.best_step(rows)
    error = (chain_rule.central_differences(rows, step) - true_gradient(rows, rows.upstream)).norm()
    assert float(error) == pytest.approx(chain_rule.differences_bound(rows, step), rel=1e-2)


# --- kernels ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
def test_torchs_own_norms_are_within_the_bound_in_every_case(norm: str) -> None:
    found = paths(NORMS[norm], CPU, norm)
    assert (
        len(found) == len(cases_of(norm)) == (1 if norm == "instance" else len(CASES))
    )  # vectors have one value a channel
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


def constant_statistics(mean: bool, covariance: bool, root: Callable[[Tensor, float], Tensor] = zca) -> Call:
    """Whitening whose gradient ignores the mean, the covariance or both; x is (N, C)."""

    def call(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        values = x.transpose(0, 1).reshape(-1, CHECKED_GROUP_SIZE, x.numel() // x.size(1))
        its_mean = values.mean(-1, keepdim=True)
        centred = values - (its_mean.detach() if mean else its_mean)
        its_covariance = centred @ centred.mT / values.size(-1)
        xhat = root(its_covariance.detach() if covariance else its_covariance, eps) @ centred
        xhat = xhat.reshape(x.size(1), x.size(0), *x.shape[2:])
        over = (-1, *[1] * (x.dim() - 1))
        return (xhat * weight.reshape(over) + bias.reshape(over)).transpose(0, 1)

    return call


def test_a_whitening_gradient_that_ignores_a_statistic_is_beyond_its_bound() -> None:
    assert all(each.passed for each in paths(constant_statistics(False, False), CPU, "whiten"))
    for mean, covariance in ((True, False), (False, True), (True, True)):
        for each in paths(constant_statistics(mean, covariance), CPU, "whiten"):
            assert each.error > 1e6 * each.bound
            if mean and covariance:
                assert each.error == pytest.approx(each.lost, rel=1e-6)


def test_newton_steps_are_not_taken_for_the_exact_root_nor_the_exact_root_for_them() -> None:
    assert not any(each.passed for each in paths(NORMS["iternorm"], CPU, "whiten"))
    assert not any(each.passed for each in paths(NORMS["whiten"], CPU, "iternorm"))


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


@pytest.mark.parametrize("norm", ["batch", "whiten"])
def test_the_values_that_share_a_mean_have_their_parts_in_the_order_of_x(norm: str) -> None:
    case = cases_of(norm)["vectors"]
    found = torch.tensor(paths(NORMS[norm], CPU, norm)[0].values, dtype=torch.float64)
    rows = rows_of(case)
    assert torch.equal(found[:, 0], rows.x[0, 0].sort().values)
    torch.testing.assert_close(found[:, 1:].sum(1), true_gradient(rows, rows.upstream)[0, 0][rows.x[0, 0].argsort()])
    assert found[:, 2].std() < 1e-12 * found[:, 2].abs().max()  # the part through the mean is the same for all
