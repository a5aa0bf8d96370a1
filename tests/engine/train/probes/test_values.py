"""Values of the probes on tensors whose answer is known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from bncli.engine.train.probes.values import (
    GradientMoments,
    change,
    landscape,
    percentiles,
    saturation,
    shift,
    whitening,
)


def gaussian(units: int = 5, m: int = 400) -> Tensor:
    """(units, m), sorted, each with mean 0 and deviation 1."""
    x = torch.randn(units, m, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    std, mean = torch.std_mean(x, 1, correction=0, keepdim=True)
    return ((x - mean) / std).sort(1).values


# --- inputs -----------------------------------------------------------------------------------------------------------


def test_percentiles_are_of_the_first_unit_and_the_median_over_units() -> None:
    units = torch.stack([torch.linspace(0, 100, 101) + offset for offset in (7, -5, 0)])
    found = percentiles(units)
    assert found == pytest.approx(
        {"unit_p15": 22, "unit_p50": 57, "unit_p85": 92, "p15": 15, "p50": 50, "p85": 85}, abs=1e-4
    )
    between = percentiles(torch.tensor([[0.0, 1.0]]))
    assert between["p15"] == pytest.approx(0.15)
    assert percentiles(torch.tensor([[3.0]]))["p85"] == 3.0


def test_a_shift_of_the_inputs_is_a_drift_of_as_many_deviations_all_of_it_location() -> None:
    found = change(2 * gaussian(), 2 * gaussian() + 3)
    expected = {"drift": 1.5, "location": 1.5, "scale": 0, "shape": 0, "drift_absolute": 3}
    assert found == pytest.approx(expected, abs=1e-12)


def test_a_rescaling_is_no_location_and_no_shape() -> None:
    x = gaussian()
    found = change(x, 3 * x)
    unit = math.sqrt((1 + 9) / 2)
    assert found["scale"] == pytest.approx(2 / unit)
    assert found["drift"] == pytest.approx(2 * x.abs().mean(1).median().item() / unit)
    assert (found["location"], found["shape"]) == pytest.approx((0, 0), abs=1e-12)


def test_another_shape_of_equal_mean_and_deviation_is_all_shape() -> None:
    x, coin = gaussian(), torch.tensor([-1.0] * 200 + [1.0] * 200).expand(5, 400)
    found = change(x, coin)
    assert found["drift"] == pytest.approx(found["shape"])
    assert found["drift"] == pytest.approx(0.535, abs=0.05)  # E ||z| - 1| of a normal z
    assert (found["location"], found["scale"]) == pytest.approx((0, 0), abs=1e-12)


def test_the_drift_from_a_plateau_stays_of_the_order_of_one() -> None:
    assert change(1e-6 * gaussian(), gaussian())["drift"] < math.sqrt(2)


def test_constant_units_are_at_a_distance_of_zero_or_infinity() -> None:
    still = torch.full((3, 10), 2.0)
    assert set(change(still, still).values()) == {0.0}
    moved = change(still, still + 1)
    assert (moved["drift"], moved["location"], moved["scale"]) == (math.inf, math.inf, 0)


# --- saturation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nonlinearity", "inputs", "share"),
    [
        (nn.Sigmoid(), [-10.0, 10.0], 1.0),
        (nn.Sigmoid(), [0.0, 10.0, -4.35, -4.4], 0.5),  # 4 s (1 - s) is 0.0502 at 4.35 and 0.0478 at 4.4
        (nn.Tanh(), [2.1, 2.2], 0.5),  # 1 - tanh^2 is 0.0583 and 0.0479
    ],
)
def test_outputs_with_under_a_twentieth_of_the_largest_derivative_are_saturated(
    nonlinearity: nn.Module, inputs: list[float], share: float
) -> None:
    x = torch.tensor(inputs, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(nonlinearity(x).sum(), x)
    largest = 0.25 if isinstance(nonlinearity, nn.Sigmoid) else 1.0
    assert (slope < 0.05 * largest).double().mean().item() == share
    assert saturation(nonlinearity, x.detach().unsqueeze(1)) == {"share": share}


def test_a_relu_is_dead_where_no_example_is_positive() -> None:
    x = torch.tensor([[-1.0, 2.0, 0.0, -3.0], [-1.0, -2.0, -5.0, 1e-9]])
    assert saturation(nn.ReLU(), x) == {"dead": 0.5}


def test_saturation_of_nan_is_nan_and_that_of_other_nonlinearities_is_not_given() -> None:
    nan = torch.tensor([[math.nan], [1.0]])
    assert math.isnan(saturation(nn.Sigmoid(), nan)["share"])
    assert math.isnan(saturation(nn.ReLU(), nan)["dead"])
    assert saturation(nn.GELU(), nan) == {}


# --- whitening --------------------------------------------------------------------------------------------------------


def test_white_activations_have_distance_zero() -> None:
    signs = torch.tensor([[a, b, c] for a in (-1.0, 1.0) for b in (-1.0, 1.0) for c in (-1.0, 1.0)])
    found = whitening(signs)
    assert (found["diagonal"], found["off_diagonal"], found["mean"]) == (0, 0, 0)


def test_variances_count_for_the_diagonal_and_correlations_for_the_rest() -> None:
    a = torch.tensor([1.0, -1.0] * 50)
    found = whitening(torch.stack([a, a, 2 * a + 1], dim=1))  # covariance [[1, 1, 2], [1, 1, 2], [2, 2, 4]]
    assert found["diagonal"] == pytest.approx(3 / math.sqrt(3))
    assert found["off_diagonal"] == pytest.approx(math.sqrt(2 * (1 + 4 + 4)) / math.sqrt(3))
    assert found["mean"] == pytest.approx(1 / math.sqrt(3))


def test_independent_features_are_as_far_from_white_as_is_said() -> None:
    found = whitening(torch.randn(500, 60, generator=torch.Generator().manual_seed(0)))
    assert found["off_diagonal"] == pytest.approx(found["off_diagonal_if_independent"], rel=0.05)
    assert found["diagonal"] == pytest.approx(math.sqrt(2 / 500), rel=0.3)


# --- gradients --------------------------------------------------------------------------------------------------------


def moments(gradients: Tensor) -> dict[str, float]:
    found = GradientMoments()
    for gradient in gradients:
        found.add(gradient)
    return found.values()


def test_equal_gradients_have_no_noise_and_opposite_ones_nothing_else() -> None:
    g = torch.tensor([3.0, 4.0])
    assert moments(torch.stack([g, g, g])) == {"norm": 5, "noise": 0}
    assert moments(torch.stack([g, -g])) == {"norm": 0, "noise": 1}
    assert moments(g.unsqueeze(0)) == {"norm": 5}
    assert moments(torch.zeros(2, 2)) == {"norm": 0, "noise": 0}


def test_a_small_noise_is_found_beside_a_large_mean() -> None:
    noise = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    gradients = 1000 + noise
    exact = gradients.double()
    expected = ((exact - exact.mean(0)) ** 2).sum() / (exact**2).sum()
    assert moments(gradients)["noise"] == pytest.approx(expected.item(), rel=1e-3)
    assert expected < 2e-6


def test_shift_is_relative_to_the_gradient_before() -> None:
    assert shift(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.0])) == {"distance": 0, "cosine": 1}
    assert shift(torch.tensor([2.0, 0.0]), torch.tensor([0.0, 1.0])) == pytest.approx(
        {"distance": math.sqrt(5) / 2, "cosine": 0}
    )
    undefined = shift(torch.zeros(2), torch.ones(2))
    assert undefined["distance"] == math.inf
    assert math.isnan(undefined["cosine"])


def test_smoothness_of_a_quadratic_is_its_hessian_along_the_gradient() -> None:
    hessian = torch.diag(torch.tensor([1.0, 10.0], dtype=torch.float64))
    w = torch.tensor([2.0, 1.0], dtype=torch.float64)
    g = hessian @ w

    def at(size: float) -> tuple[Tensor, Tensor]:
        there = w - size * g
        return there @ hessian @ there / 2, hessian @ there

    found = landscape(g, at, 0.1)
    assert found["smoothness"] == pytest.approx((hessian @ g).norm().item() / g.norm().item())
    assert found["predictiveness"] == pytest.approx(0.4 * (hessian @ g).norm().item())
    losses = [at(size)[0].item() for size in (0.05, 0.1, 0.2, 0.4)]
    assert found["loss_range"] == pytest.approx(max(losses) - min(losses))
    assert (found["loss_min"], found["loss_max"]) == (min(losses), max(losses))


@pytest.mark.parametrize("bad", [0, 1, 3])
def test_a_loss_that_is_nan_anywhere_makes_the_landscape_nan(bad: int) -> None:
    losses = iter(torch.tensor([math.nan if k == bad else 1.0 + k for k in range(4)]))

    def at(size: float) -> tuple[Tensor, Tensor]:
        loss = next(losses)
        return loss, loss.unsqueeze(0)

    assert all(math.isnan(value) for value in landscape(torch.ones(1), at, 0.1).values())
