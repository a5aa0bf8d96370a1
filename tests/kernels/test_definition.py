"""The definition of every norm held to torch's operator in float64, and what each mutation changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bncli.kernels.definition import Forward, Mutation, batch_norm, definition
from bncli.names import CHECKED_GROUPS, CHECKED_NORMS, FUSED_ACTIVATIONS, NORMS

MOMENTUM, EPS = 0.3, 1e-3


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def results(norm: Callable[..., Tensor], shape: tuple[int, ...], training: bool, activation: str | None) -> Any:
    """Name -> result of one call forward and backward: y, gradients, running statistics. All float64."""
    channels = shape[1]
    x, residual = 2 * numbers(*shape) + 3, numbers(*shape, seed=1)
    weight, bias = numbers(channels, seed=2), numbers(channels, seed=3)
    inputs = {"x": x, "weight": weight, "bias": bias, "residual": residual}
    for tensor in inputs.values():
        tensor.requires_grad_()
    mean, var = numbers(channels, seed=4), numbers(channels, seed=5).square() + 0.5
    y = norm(x, mean, var, weight, bias, training, MOMENTUM, EPS, residual, activation)
    gradients = torch.autograd.grad(
        y, [*inputs.values()], numbers(*shape, seed=6), materialize_grads=True, allow_unused=True
    )
    named = {f"d{name}": gradient for name, gradient in zip(inputs, gradients, strict=True)}
    return {"y": y.detach(), **named, "running_mean": mean, "running_var": var}


def of_torch(norm: str) -> Forward:
    """The same by torch.nn.functional."""

    def call(x, mean, var, weight, bias, training, momentum, eps, residual, activation):  # type: ignore[no-untyped-def]
        if norm == "batch":
            y = F.batch_norm(x, mean, var, weight, bias, training, momentum, eps)
        elif norm == "layer":
            over = (1, -1, *[1] * (x.dim() - 2))
            y = F.layer_norm(x, x.shape[1:], eps=eps) * weight.reshape(over) + bias.reshape(over)
        elif norm == "group":
            y = F.group_norm(x, CHECKED_GROUPS, weight, bias, eps)
        else:
            y = F.instance_norm(x, None, None, weight, bias, True, momentum, eps)
        y = y + residual
        return y if activation is None else getattr(F, activation)(y)

    return call


SHAPES = [(5, 4), (5, 4, 3), (3, 4, 2, 5), (2, 4, 3, 1, 2)]
CASES = [
    (row.name, mode == "train", shape)
    for row in map(NORMS.get, CHECKED_NORMS)
    for mode in row.modes
    for shape in SHAPES
    if row.values_per_mean(shape, CHECKED_GROUPS) > 1  # torch refuses a mean of one value
]


@pytest.mark.parametrize("activation", [None, *FUSED_ACTIVATIONS])
@pytest.mark.parametrize(("norm", "training", "shape"), CASES)
def test_results_gradients_and_running_statistics_are_torchs(
    norm: str, training: bool, shape: tuple[int, ...], activation: str | None
) -> None:
    found = results(definition(norm), shape, training, activation)
    torch.testing.assert_close(found, results(of_torch(norm), shape, training, activation), rtol=1e-11, atol=1e-11)


def test_without_any_vector_the_definition_is_torchs_too() -> None:
    x = numbers(5, 4, 3)
    nothing = (None, None, None, None, True, MOMENTUM, EPS)
    torch.testing.assert_close(batch_norm()(x, *nothing, None, None), F.batch_norm(x, *nothing), rtol=1e-12, atol=1e-12)


def test_gradients_of_gradients_are_those_of_finite_differences() -> None:
    x, weight, bias = 2 * numbers(4, 2, 2), numbers(2, seed=2), numbers(2, seed=3)

    def call(*inputs: Tensor) -> Tensor:
        x, weight, bias = inputs
        return batch_norm()(x, None, None, weight, bias, True, MOMENTUM, EPS, None, "silu")

    assert torch.autograd.gradgradcheck(call, [tensor.requires_grad_() for tensor in (x, weight, bias)])


# --- mutations ----------------------------------------------------------------------------------------------------

GRADIENTS = {"dx", "dweight", "dbias", "dresidual"}
ALL = {"y"} | GRADIENTS
# Field -> a mutated value, whether in training, and the results that it changes.
MUTATED: dict[str, tuple[Any, bool, set[str]]] = {
    "mean": (torch.detach, True, {"dx"}),
    "var": (torch.detach, True, {"dx"}),
    "bessel": (True, True, ALL),
    "inverse_deviation": (lambda var, eps: 1 / (var.sqrt() + eps), True, ALL),
    "batch_in_evaluation": (True, False, ALL),
    "running_in_training": (True, True, ALL),
    "linear_activation": (True, True, GRADIENTS),
    "residual": (torch.detach, True, {"dresidual"}),
    "residual_last": (True, True, ALL),
    "mean_path_in_evaluation": (True, False, {"dx"}),
    "variance_path_in_evaluation": (True, False, {"dx"}),
    "output": (lambda y: 2 * y, True, ALL),
    "rounding": (lambda tensor: tensor.float().double(), True, ALL | {"running_mean", "running_var"}),
    "move_mean": (lambda running, batch, momentum: batch, True, {"running_mean"}),
    "move_var": (lambda running, var, momentum, m: running.lerp(var, momentum), True, {"running_var"}),
}


def test_every_field_of_a_mutation_has_an_example_here() -> None:
    assert list(MUTATED) == [field.name for field in fields(Mutation)]


@pytest.mark.parametrize("field", MUTATED)
def test_a_mutation_changes_just_the_results_that_its_mistake_reaches(field: str) -> None:
    value, training, changed = MUTATED[field]
    right = results(batch_norm(), (4, 3, 5), training, "silu")
    wrong = results(batch_norm(Mutation(**{field: value})), (4, 3, 5), training, "silu")
    assert {name for name in right if not torch.allclose(right[name], wrong[name], rtol=1e-11, atol=1e-11)} == changed


@pytest.mark.parametrize("field", ["mean", "var", "bessel", "running_in_training", "move_mean", "move_var"])
def test_a_mistake_in_the_batchs_statistics_leaves_evaluation_alone(field: str) -> None:
    mutation = Mutation(**{field: MUTATED[field][0]})
    right, wrong = (results(batch_norm(each), (4, 3, 5), False, "silu") for each in (None, mutation))
    assert all(torch.equal(right[name], wrong[name]) for name in right)


@pytest.mark.parametrize("norm", CHECKED_NORMS)
def test_every_intermediate_and_the_result_are_rounded(norm: str) -> None:
    passed: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        passed.append(tensor.flatten())
        return tensor

    x, weight, bias, residual = numbers(4, 4, 5), numbers(4, seed=2), numbers(4, seed=3), numbers(4, 4, 5, seed=1)
    result = definition(norm, keep)(x, None, None, weight, bias, True, MOMENTUM, EPS, residual, "silu")
    groups = NORMS[norm].groups(4, CHECKED_GROUPS)
    grouped = x.movedim(0, 1).reshape(4, -1) if NORMS[norm].over_batch else x.reshape(4 * groups, -1)
    mean = grouped.mean(1)
    square = (grouped - mean[:, None]).square()
    inverse_deviation = (square.mean(1) + EPS).rsqrt()
    xhat = definition(norm)(x, None, None, None, None, True, MOMENTUM, EPS, None, None)
    y = xhat * weight[:, None] + bias[:, None]
    # Apart from the differences and their squares, which lie in the order of x and not in that of the groups.
    for each in (mean, square.mean(1), inverse_deviation, xhat, y, result):
        assert any(kept.shape == each.flatten().shape and torch.allclose(kept, each.flatten()) for kept in passed)
