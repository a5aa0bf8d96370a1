"""Whitening norms: decorrelated output, batch norm for groups of one, and finite gradients of any order."""

from __future__ import annotations

import copy
import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bncli.engine.models.norms import BatchNorm
from bncli.engine.models.whitening import Whitening, newton, zca

EXACT_AND_BY_STEPS = pytest.mark.parametrize("iterations", [None, 5], ids=["whiten", "iternorm"])


def correlated(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """(N, C, *S) with means, deviations of 0.3 to 3 and correlated channels."""
    draw = torch.Generator().manual_seed(seed)
    channels = shape[1]
    mix = torch.randn(channels, channels, generator=draw, dtype=torch.float64) / 2 + torch.eye(channels).double()
    values = torch.randn(*shape, generator=draw, dtype=torch.float64)
    values = torch.einsum("ij,nj...->ni...", mix, values) * 10 ** torch.linspace(-0.5, 0.5, channels).double().reshape(
        1, -1, *[1] * (len(shape) - 2)
    )
    return (values + 2).to(dtype)


def covariances(x: Tensor, size: int) -> Tensor:
    """(N, C, *S) -> (G, k, k), each of m values, biased."""
    values = x.transpose(0, 1).reshape(x.size(1) // size, size, -1)
    return torch.stack([torch.cov(group, correction=0).reshape(size, size) for group in values])


def gradients(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """y, and the gradients of sum(g y) in x and the parameters."""
    x = x.detach().requires_grad_()
    y = module(x)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=y.dtype)
    inputs = {"x": x, **dict(module.named_parameters())}
    return {"y": y.detach(), **dict(zip(inputs, torch.autograd.grad(y, [*inputs.values()], upstream), strict=True))}


# --- what it does -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(60, 12), (40, 12, 3), (9, 12, 4, 2), (5, 12, 2, 3, 2)])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 6])
def test_the_groups_of_channels_have_mean_zero_and_the_identity_as_covariance(
    shape: tuple[int, ...], size: int
) -> None:
    x = correlated(*shape)
    eps = 1e-3
    y = Whitening(12, size, eps=eps).double()(x)
    torch.testing.assert_close(y.transpose(0, 1).flatten(1).mean(1), torch.zeros(12).double(), atol=1e-12, rtol=0)
    before, after = covariances(x, size), covariances(y, size)
    # W C W = C / (C + eps), which eps alone keeps from the identity.
    expected = torch.linalg.solve(before + eps * torch.eye(size).double(), before)
    torch.testing.assert_close(after, expected, atol=1e-10, rtol=0)
    smallest = torch.linalg.eigvalsh(before).amin()
    assert (after - torch.eye(size).double()).abs().amax() <= eps / (smallest + eps) + 1e-12


def test_batch_norm_leaves_the_correlations_that_whitening_removes() -> None:
    x = correlated(60, 4)
    of_batch, of_whitening = (covariances(norm.double()(x), 4)[0] for norm in (BatchNorm(4), Whitening(4, eps=1e-9)))
    off_diagonal = ~torch.eye(4, dtype=torch.bool)
    assert of_batch[off_diagonal].abs().max() > 0.3
    assert of_whitening[off_diagonal].abs().max() < 1e-6


def test_zca_is_the_symmetric_inverse_root() -> None:
    covariance = covariances(correlated(50, 6), 3)
    root = zca(covariance, 1e-3)
    torch.testing.assert_close(root, root.mT)
    identity = torch.eye(3).double()
    product = root @ (covariance + 1e-3 * identity) @ root
    torch.testing.assert_close(product, identity.expand_as(product), atol=1e-11, rtol=0)
    assert torch.linalg.eigvalsh(root).min() > 0


def test_the_error_of_newton_steps_to_zca_falls_to_rounding_and_stays_there() -> None:
    covariance = covariances(correlated(200, 8), 4)
    exact = zca(covariance, 1e-3)
    errors = [float((newton(covariance, 1e-3, steps) - exact).norm()) for steps in range(25)]
    assert all(after < before for before, after in pairwise(errors[:10]))
    assert max(errors[12:]) < 1e-12


def test_newton_steps_are_the_papers() -> None:
    covariance, identity = covariances(correlated(200, 8), 4), torch.eye(4).double()
    regular = covariance + 1e-3 * identity
    trace = torch.einsum("gii->g", regular)[:, None, None]
    p = identity
    for steps in range(6):
        torch.testing.assert_close(newton(covariance, 1e-3, steps), p / trace.sqrt(), rtol=1e-9, atol=1e-10)
        p = (3 * p - p @ p @ p @ regular / trace) / 2


def test_no_newton_step_only_scales_by_the_total_variance() -> None:
    x = correlated(30, 6)
    y = Whitening(6, 3, eps=1e-3, iterations=0).double()(x)
    centred = x - x.mean(0)
    for group in (slice(0, 3), slice(3, 6)):
        scale = (centred[:, group].square().mean(0) + 1e-3).sum().sqrt()
        torch.testing.assert_close(y[:, group], centred[:, group] / scale)


def test_weight_and_bias_belong_to_the_channels() -> None:
    x, plain, module = correlated(20, 4, 3), Whitening(4, 2, affine=False).double(), Whitening(4, 2).double()
    assert not list(plain.parameters())
    with torch.no_grad():
        module.weight.copy_(torch.arange(1.0, 5))  # type: ignore[union-attr]
        module.bias.copy_(torch.arange(4.0))  # type: ignore[union-attr]
    scaled = plain(x) * torch.arange(1.0, 5).reshape(4, 1) + torch.arange(4.0).reshape(4, 1)
    torch.testing.assert_close(module(x), scaled.double())


# --- a group of one channel -------------------------------------------------------------------------------------------


@EXACT_AND_BY_STEPS
@pytest.mark.parametrize("momentum", [0.1, 1.0, None])
@pytest.mark.parametrize("shape", [(7, 3), (4, 3, 5), (4, 3, 2, 3)])
def test_groups_of_one_channel_are_batch_norm_in_both_modes(
    iterations: int | None, momentum: float | None, shape: tuple[int, ...]
) -> None:
    ours = Whitening(3, 1, 1e-3, momentum, iterations=iterations).double()
    theirs = BatchNorm(3, 1e-3, momentum).double()
    for seed in range(3):
        x = correlated(*shape, seed=seed)
        torch.testing.assert_close(gradients(ours, x), gradients(theirs, x), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.running_covariance.flatten(), theirs.running_var)
    assert ours.num_batches_tracked == theirs.num_batches_tracked == 3
    x = correlated(*shape, seed=9)
    torch.testing.assert_close(gradients(ours.eval(), x), gradients(theirs.eval(), x), rtol=1e-9, atol=1e-10)


# --- gradients --------------------------------------------------------------------------------------------------------


@EXACT_AND_BY_STEPS
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_first_and_second_derivatives_are_those_of_differences(
    iterations: int | None, training: bool, size: int
) -> None:
    module = Whitening(2 * size, size, 1e-2, iterations=iterations).double().train(training)
    x = correlated(3, 2 * size, 2).requires_grad_()
    assert torch.autograd.gradcheck(module, x)
    assert torch.autograd.gradgradcheck(module, x)


def test_a_third_derivative_is_right_too() -> None:
    matrix = covariances(correlated(9, 3), 3).requires_grad_()

    def second(matrix: Tensor) -> Tensor:
        symmetric = (matrix + matrix.mT) / 2
        (first,) = torch.autograd.grad(zca(symmetric, 1e-2).square().sum(), symmetric, create_graph=True)
        return first

    assert torch.autograd.gradgradcheck(second, matrix)


@pytest.mark.parametrize("values", [(2.0, 2.0, 2.0), (1.0, 1.0, 3.0), (0.0, 0.0, 0.0), (1.0, 1 + 1e-15, 0.0)])
def test_equal_eigenvalues_have_right_derivatives(values: tuple[float, ...]) -> None:
    vectors = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    matrix = ((vectors * torch.tensor(values).double()) @ vectors.T)[None].requires_grad_()

    def root(matrix: Tensor) -> Tensor:
        # The eps keeps the differences of an eigenvalue 0 from the clamp.
        return zca((matrix + matrix.mT) / 2 + 0.1 * torch.eye(3).double(), 1e-2)

    assert torch.autograd.gradcheck(root, matrix)
    assert torch.autograd.gradgradcheck(root, matrix)


@EXACT_AND_BY_STEPS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_constant_and_independent_channels_have_finite_gradients(
    iterations: int | None, dtype: torch.dtype
) -> None:
    equal = correlated(20, 1, dtype=dtype).repeat(1, 4)
    orthogonal = torch.eye(4, dtype=dtype).repeat(5, 1) * math.sqrt(8)  # equal variances: equal eigenvalues but one
    constant = torch.full((20, 4), 1.5, dtype=dtype)
    for x in (equal, orthogonal, constant):
        module = Whitening(4, 4, iterations=iterations).to(dtype)
        found = gradients(module, x)
        assert all(value.isfinite().all() for value in found.values())
        assert found["y"].abs().max() < 10


def test_the_gradient_of_torchs_eigenvectors_is_not_finite_there() -> None:
    """What the closed form is for."""
    x = (torch.eye(4).double().repeat(5, 1) * math.sqrt(8)).requires_grad_()
    values, vectors = torch.linalg.eigh(torch.cov(x.T, correction=0) + 1e-3 * torch.eye(4).double())
    y = (x - x.mean(0)) @ (vectors * values.rsqrt()) @ vectors.T
    (gradient,) = torch.autograd.grad(y.square().sum() + y[0, 0], x)
    assert not gradient.abs().max() < 1e6


def test_every_value_of_a_group_has_a_gradient_in_all_the_others() -> None:
    x = correlated(5, 4).requires_grad_()
    (reached,) = torch.autograd.grad(Whitening(4, 2).double()(x)[1, 0], x)
    assert (reached != 0).all(0).tolist() == [True, True, False, False]
    assert reached[:, :2].all()


# --- evaluation and state ---------------------------------------------------------------------------------------------


@EXACT_AND_BY_STEPS
def test_evaluation_normalizes_by_running_statistics_which_training_moves(iterations: int | None) -> None:
    module = Whitening(6, 3, momentum=0.3, iterations=iterations).double()
    mean, covariance = torch.zeros(6).double(), torch.eye(3).double().repeat(2, 1, 1)
    for seed in range(4):
        x = correlated(10, 6, seed=seed)
        module(x)
        mean = 0.7 * mean + 0.3 * x.mean(0)
        covariance = 0.7 * covariance + 0.3 * covariances(x, 3) * 10 / 9
    torch.testing.assert_close(module.running_mean, mean)
    torch.testing.assert_close(module.running_covariance, covariance)
    before = copy.deepcopy(module.state_dict())
    x = correlated(3, 6, seed=9)
    y = module.eval()(x)
    torch.testing.assert_close(module.state_dict(), before)
    root = zca(covariance, 1e-3) if iterations is None else newton(covariance, 1e-3, iterations)
    expected = torch.einsum("gij,ngj->ngi", root, (x - mean).reshape(3, 2, 3)).reshape(3, 6)
    torch.testing.assert_close(y, expected)
    assert torch.equal(module(x[:1]), y[:1])  # a single example, with nothing of the others


def test_after_many_batches_fresh_examples_are_white_in_evaluation() -> None:
    module = Whitening(4, momentum=None, eps=1e-6).double()
    population = correlated(4000, 4)
    for batch in population.split(20):
        module(batch)
    after = covariances(module.eval()(population), 4)[0]
    assert (after - torch.eye(4).double()).norm() < 0.05


@EXACT_AND_BY_STEPS
def test_the_state_dict_restores_the_module(iterations: int | None) -> None:
    module = Whitening(6, 3, iterations=iterations)
    module(correlated(10, 6, dtype=torch.float32))
    state = module.state_dict()
    assert set(state) == {"weight", "bias", "running_mean", "running_covariance", "num_batches_tracked"}
    other = Whitening(6, 3, iterations=iterations)
    other.load_state_dict(state)
    x = correlated(3, 6, seed=5, dtype=torch.float32)
    assert torch.equal(other.eval()(x), module.eval()(x))


# --- dtypes and refusals ----------------------------------------------------------------------------------------------


@EXACT_AND_BY_STEPS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [True, False])
def test_half_precision_inputs_are_whitened_in_float32(
    iterations: int | None, dtype: torch.dtype, autocast: bool
) -> None:
    x = correlated(40, 6).to(dtype)
    module = Whitening(6, 3, iterations=iterations)
    exact = copy.deepcopy(module).double()(x.double())
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = module(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-4)


@EXACT_AND_BY_STEPS
@pytest.mark.parametrize("training", [True, False])
def test_the_layout_of_the_output_is_that_of_the_input(iterations: int | None, training: bool) -> None:
    images = correlated(5, 4, 3, 2)
    module = Whitening(4, 2, iterations=iterations).double().train(training)
    for x in (correlated(10, 4), images, images.contiguous(memory_format=torch.channels_last)):
        assert module(x).stride() == x.stride()
    assert module(images.transpose(2, 3)).is_contiguous()


@EXACT_AND_BY_STEPS
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_infinity_stay_in_their_group_and_raise_nothing(iterations: int | None, value: float) -> None:
    x = correlated(10, 4)
    x[3, 1] = value
    found = gradients(Whitening(4, 2, iterations=iterations).double(), x)
    for tensor in (found["y"], found["x"]):
        assert tensor[:, :2].isnan().any()
        assert tensor[:, 2:].isfinite().all()


@pytest.mark.parametrize("shape", [(1, 4), (2, 4), (4, 4), (2, 4, 2), (0, 4)])
def test_no_more_values_than_channels_of_a_group_are_refused_in_training(shape: tuple[int, ...]) -> None:
    module = Whitening(4, 4)
    with pytest.raises(ValueError, match="more than 4 values per channel when training with 4 channels per group"):
        module(torch.ones(shape))
    assert module.num_batches_tracked == 0
    assert module.eval()(torch.ones(shape)).shape == shape


@pytest.mark.parametrize("x", [torch.ones(4), torch.ones(3, 5), torch.ones(4, 3)])
def test_an_input_of_other_channels_is_refused(x: Tensor) -> None:
    with pytest.raises(ValueError, match=r"expected \(N, 4, \*S\), got"):
        Whitening(4, 2)(x)


def test_a_group_that_does_not_divide_the_channels_is_refused() -> None:
    with pytest.raises(ValueError, match="groups of 4 channels do not divide 6 channels"):
        Whitening(6, 4)


def test_the_module_tells_its_arguments() -> None:
    words: Any = repr(Whitening(6, 3, iterations=4))
    assert words == "Whitening(6, group_size=3, eps=0.001, momentum=0.1, iterations=4)"
