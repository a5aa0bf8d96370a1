from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from bncli.measure.reference import tolerance as tolerances
from bncli.measure.reference.candidate import NATIVE
from bncli.measure.reference.case import DTYPES, FUSIONS, Case, inputs
from bncli.measure.reference.observe import observe
from tests.measure.reference.wrong_kernels import right_by_the_seam

CPU = torch.device("cpu")


def accurate(x, running_mean, running_var, weight, bias, training, momentum, eps, residual, activation):
    """Everything in float32, rounded once at the end: what a fused kernel does."""
    from bncli.kernels import api

    arguments = (x, running_mean, running_var, weight, bias, training, momentum, eps)
    return api.batch_norm(*arguments, residual=residual, activation=activation, kernel=right_by_the_seam)


def test_the_definition_is_torchs_batch_norm_in_float64() -> None:
    for fusion in FUSIONS:
        for mode in ("train", "eval"):
            case = Case(mode, "float64", "contiguous", (4, 3, 5, 7), fusion)
            given = inputs(case, CPU)
            truth = tolerances.expected(case, given).truth
            native = observe(NATIVE, case, given).wide()
            assert truth.keys() == native.keys()
            for name, exact in truth.items():
                torch.testing.assert_close(native[name], exact, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("seeds", [range(100, 101), pytest.param(range(101, 110), marks=pytest.mark.slow)], ids=len)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 3), (2, 8, 1, 1), (5, 3, 3), (4, 3, 5, 7)])
def test_a_kernel_that_rounds_once_stays_below_the_tolerance_over_seeds(
    dtype: str, shape: tuple[int, ...], seeds: range
) -> None:
    for seed in seeds:
        for fusion in ("plain", "silu", "relu+residual"):
            case = Case("train", dtype, "contiguous", shape, fusion, repeat=seed)
            given = inputs(case, CPU)
            held_to = tolerances.expected(case, given)
            truth, floors = held_to.truth, held_to.floors("kernel")
            native = observe(NATIVE, case, given).wide()
            found = observe(accurate, case, given).wide()
            for name, exact in truth.items():
                error, _ = tolerances.in_tolerances(found[name], exact, floors[name], native[name])
                assert error <= 1, f"{case.identifier}/{name}: {error}"


def test_a_relative_error_of_a_thousand_roundings_is_far_outside() -> None:
    for dtype in ("float32", "float64"):
        case = Case("train", dtype, "contiguous", (4, 3, 5, 7))
        given = inputs(case, CPU)
        held_to = tolerances.expected(case, given)
        truth, floors = held_to.truth, held_to.floors("kernel")
        factor = 1 + 2000 * torch.finfo(DTYPES[dtype]).eps
        for name in ("forward", "dx", "running_var"):
            assert tolerances.in_floors(truth[name] * factor, truth[name], floors[name]) > 10


def test_nan_against_a_number_is_an_infinite_error_and_against_nan_none() -> None:
    nan, one, floor = torch.tensor([math.nan]), torch.ones(1), torch.ones(1)
    assert tolerances.in_floors(nan, one, floor) == math.inf
    assert tolerances.in_floors(one, nan, floor) == math.inf
    assert tolerances.in_floors(nan, nan, floor) == 0


def test_any_order_allows_the_error_of_a_sum_in_order_and_not_that_of_half_precision() -> None:
    """At m = 5041: sqrt(m) and 32 roundings, against the log2(m) and 4 of a tree."""
    case = Case("train", "float32", "contiguous", (1, 2, 71, 71))
    given = inputs(case, CPU)
    held_to = tolerances.expected(case, given)
    truth, tree, any_order = held_to.truth, held_to.floors("kernel"), held_to.floors("own function")
    ratio = (math.sqrt(5041) + 32) / (math.log2(5041) + 4)
    for name in ("dx", "dbias", "running_mean"):
        assert 0.8 * ratio < float((any_order[name] / tree[name]).max()) <= ratio * (1 + 1e-9)
    rounded = truth["running_mean"].to(torch.bfloat16).double()
    assert tolerances.in_floors(rounded, truth["running_mean"], any_order["running_mean"]) > 10


def test_a_mean_near_0_may_be_taken_about_a_value_of_x() -> None:
    """Its error is of the value's size and not of the mean's: of many channels the fused kernel shows it in some."""
    x = torch.tensor([3.0, -1.0, -2.5, 0.5]).reshape(4, 1)
    given = replace(inputs(Case("train", "float32", "contiguous", (4, 1)), CPU), x=x, running_mean=torch.zeros(1))
    held_to = tolerances.expected(Case("train", "float32", "contiguous", (4, 1)), given)
    truth, floor = held_to.truth["running_mean"], held_to.floors("kernel")["running_mean"]
    assert float(truth) == 0
    assert tolerances.in_floors(truth + 0.3 * 2 * 3.0 * 2.0**-24, truth, floor) < 1
    assert tolerances.in_floors(truth + 100 * 3.0 * 2.0**-24, truth, floor) > 1


def test_expected_results_are_cached_by_the_inputs_values() -> None:
    case = Case("train", "float32", "contiguous", (4, 3, 5, 7))
    given = inputs(case, CPU)
    for remembered in (tolerances.expected, tolerances.native_results):
        held_to = remembered(case, given)
        assert remembered(case, inputs(case, CPU)) is held_to
        assert remembered(case, inputs(case, CPU), second=False) is not held_to
        assert remembered(case, given.each(torch.Tensor.double)) is not held_to
        assert remembered(replace(case, norm="layer"), given) is not held_to
        changed = inputs(case, CPU)
        changed.x[0, 0, 0] += 1
        assert remembered(case, changed) is not held_to
    # torch's own kernel adds in another order where the strides are others; the truth is the same
    strided = given.each(lambda t: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t)
    assert tolerances.expected(case, strided) is tolerances.expected(case, given)
    assert tolerances.native_results(case, strided) is not tolerances.native_results(case, given)


def test_a_kernel_that_writes_to_g_does_not_change_what_is_remembered() -> None:
    case = Case("train", "float64", "contiguous", (4, 3, 5, 7), "residual")
    given = inputs(case, CPU)
    tolerances.native_results(case, given)
    given.g.zero_()
    assert torch.equal(tolerances.native_results(case, inputs(case, CPU))["dresidual"], inputs(case, CPU).g)


def test_twice_the_native_error_is_allowed_and_reported() -> None:
    exact, floor = torch.tensor([[1.0], [2.0]]), torch.full((2, 1), 0.1)
    native = exact + torch.tensor([[0.2], [0.0]])
    assert tolerances.in_tolerances(exact + 0.3, exact, floor, None) == (pytest.approx(3.0), None)
    assert tolerances.in_tolerances(exact + 0.3, exact, floor, exact) == (pytest.approx(3.0), None)
    assert tolerances.in_tolerances(exact + 0.3, exact, floor, native) == (pytest.approx(0.75), pytest.approx(1.5))
    assert tolerances.in_tolerances(exact + 0.3, exact, floor, native * math.nan) == (pytest.approx(3.0), None)


def test_a_channel_that_an_activation_nearly_cuts_off_is_perturbed_where_it_is_not() -> None:
    case = Case("train", "float32", "contiguous", (32, 3, 14, 14), "relu")
    given = inputs(case, CPU)
    assert given.bias is not None
    x = given.x.double()
    highest = ((x.amax((0, 2, 3)) - x.mean((0, 2, 3))) / x.var((0, 2, 3), correction=0).sqrt()).float()
    given = replace(given, weight=torch.ones(3), bias=0.2 - highest)
    held_to = tolerances.computed(case, given, False, CPU, most=3 * tolerances.FEWEST_VALUES)
    assert 0 < (held_to.truth["forward"] > 0).sum() < 20
    assert held_to.moved["forward"].min() > 1e-8
