"""`bncli.batch_norm` held to torch.nn.functional.batch_norm, with kernels by name and kernels that are functions."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import bncli
from bncli.errors import Unavailable
from bncli.kernels import fused, native
from bncli.kernels.api import batch_norm


def without_running(x, weight, bias, eps, residual=None, activation=None, statistics=None):  # type: ignore[no-untyped-def]
    """A user's kernel, which returns statistics and does not update the running ones."""
    return native.batch_norm(x, weight, bias, eps, residual, activation, statistics)


def broadcasting(x, weight, bias, eps, residual=None, activation=None, statistics=None):  # type: ignore[no-untyped-def]
    """A user's kernel whose operators would take vectors of one value for all channels."""
    mean, var = statistics or (x.mean(0), x.var(0, correction=0))
    return (x - mean) * (var + eps).rsqrt() * weight + bias, mean, var


ROUTES = pytest.mark.parametrize("kernel", ["native", native.batch_norm, without_running])
SHAPES = [(5, 3), (4, 3, 7), (2, 3, 5, 2), (2, 3, 2, 3, 2), (1, 3, 2), (2, 3)]


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return (2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) + 3).to(dtype)


def arguments(affine: tuple[bool, bool], dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """running_mean, running_var, weight and bias of 3 channels."""
    return {
        "running_mean": torch.tensor([0.5, -1.0, 2.0], dtype=dtype),
        "running_var": torch.tensor([0.5, 1.0, 2.0], dtype=dtype),
        "weight": torch.tensor([1.0, -2.0, 0.5], dtype=dtype, requires_grad=True) if affine[0] else None,
        "bias": torch.tensor([0.1, 0.2, -0.3], dtype=dtype, requires_grad=True) if affine[1] else None,
    }


@ROUTES
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("affine", [(True, True), (True, False), (False, True), (False, False)])
def test_outputs_gradients_and_running_statistics_are_torchs(
    kernel: Any, shape: tuple[int, ...], training: bool, affine: tuple[bool, bool]
) -> None:
    ours, theirs = arguments(affine), arguments(affine)
    one, other = numbers(*shape).requires_grad_(), numbers(*shape).requires_grad_()
    upstream = numbers(*shape, seed=1)
    for momentum in (0.1, 0.7):
        options = {"training": training, "momentum": momentum, "eps": 1e-3}
        y = batch_norm(one, **ours, **options, kernel=kernel)
        expected = F.batch_norm(other, **theirs, **options)
        y.backward(upstream)
        expected.backward(upstream)
        torch.testing.assert_close(y, expected)
    torch.testing.assert_close(one.grad, other.grad)
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor)
        if tensor is not None and tensor.requires_grad:
            torch.testing.assert_close(ours[name].grad, tensor.grad)


@ROUTES
@pytest.mark.parametrize("momentum", [0.0, 1.0])
def test_a_momentum_of_0_keeps_the_running_statistics_and_1_replaces_them(kernel: Any, momentum: float) -> None:
    mean, var, x = torch.zeros(3), torch.ones(3), numbers(6, 3)
    batch_norm(x, mean, var, training=True, momentum=momentum, kernel=kernel)
    torch.testing.assert_close(mean, x.mean(0) * momentum)
    torch.testing.assert_close(var, x.var(0, correction=1) if momentum else torch.ones(3))


@ROUTES
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("parameters", ["half", "float32"])
def test_half_precision_moves_its_running_statistics_as_torch_does(
    kernel: Any, dtype: torch.dtype, parameters: str
) -> None:
    kept = dtype if parameters == "half" else torch.float32
    ours, theirs = arguments((True, True), kept), arguments((True, True), kept)
    for seed in range(3):
        x = numbers(8, 3, 5, seed=seed, dtype=dtype)
        y = batch_norm(x, **ours, training=True, kernel=kernel)
        torch.testing.assert_close(y, F.batch_norm(x, **theirs, training=True))
    assert y.dtype == dtype
    for name in ("running_mean", "running_var"):
        assert ours[name].dtype == kept
        # Either one rounds three moves, each by at most half an eps of a value that is never above 2.
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=3 * 2 * torch.finfo(kept).eps)


def test_running_statistics_of_half_precision_are_moved_in_float32() -> None:
    running = torch.full((1,), 100.0, dtype=torch.bfloat16)  # its neighbour is 100.5
    native.interpolate_(
        running, torch.full((1,), 100.26), 0.6
    )  # 100.156; a batch rounded first, to 100.5, would give 100.3
    assert running.item() == 100.0


@ROUTES
@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4), (2, 3, 0)])
def test_an_empty_batch_leaves_the_running_statistics_alone(kernel: Any, shape: tuple[int, ...]) -> None:
    given = arguments((True, True))
    y = batch_norm(torch.zeros(shape), **given, training=True, kernel=kernel)
    assert y.shape == shape
    for name, tensor in arguments((True, True)).items():
        torch.testing.assert_close(given[name], tensor)


@ROUTES
def test_training_without_running_statistics_uses_the_batchs(kernel: Any) -> None:
    x = numbers(6, 3)
    torch.testing.assert_close(
        batch_norm(x, None, None, training=True, kernel=kernel), F.batch_norm(x, None, None, training=True)
    )


WRONG: dict[str, dict[str, Any]] = {
    "one value per channel": {"input": torch.ones(1, 3), "training": True},
    "one value per channel of an image": {"input": torch.ones(1, 3, 1, 1), "training": True},
    "no running statistics in evaluation": {"running_mean": None, "running_var": None},
    "no running mean in evaluation": {"running_mean": None},
    "no running variance in evaluation": {"running_var": None},
    "a running mean alone": {"running_var": None, "training": True},
    "a running variance alone": {"running_mean": None, "training": True},
    "eps 0 in training": {"eps": 0.0, "training": True},
    "a negative eps": {"eps": -1.0},
    "other channels": {"input": torch.ones(4, 5)},
    "other channels in training": {"input": torch.ones(4, 5), "training": True},
    "a weight of another size": {"weight": torch.ones(4)},
    "a bias of another size": {"bias": torch.ones(4), "training": True},
    "one weight for all channels": {"weight": torch.ones(1)},
    "one bias for all channels": {"bias": torch.ones(1), "training": True},
    "one running mean for all channels": {"running_mean": torch.zeros(1)},
    "one running variance for all channels": {"running_var": torch.ones(1)},
    "one channel for vectors of three": {"input": torch.ones(4, 1), "training": True},
    "no channels": {"input": torch.ones(3)},
    "no momentum": {"momentum": None, "training": True},
}


@pytest.mark.parametrize("kernel", ["native", native.batch_norm, without_running, broadcasting])
@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_what_torch_refuses_is_refused_with_the_same_kind_of_error(kernel: Any, wrong: dict[str, Any]) -> None:
    given = {"input": numbers(4, 3), **arguments((True, True)), **wrong}
    with pytest.raises((ValueError, RuntimeError, TypeError)) as theirs:
        F.batch_norm(**given)
    with pytest.raises(type(theirs.value)):
        batch_norm(**given, kernel=kernel)


@ROUTES
def test_eps_0_in_evaluation_is_allowed_as_in_torch(kernel: Any) -> None:
    x, given = numbers(4, 3), arguments((True, True))
    torch.testing.assert_close(batch_norm(x, **given, eps=0.0, kernel=kernel), F.batch_norm(x, **given, eps=0.0))


# --- more than torch's ------------------------------------------------------------------------------------------------


@ROUTES
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", [None, *native.ACTIVATIONS])
@pytest.mark.parametrize("residual_shape", [None, (4, 3, 5), (1, 3, 1), (2, 4, 3, 5)])
def test_the_residual_is_added_with_torchs_broadcasting_and_then_activated(
    kernel: Any, training: bool, activation: str | None, residual_shape: tuple[int, ...] | None
) -> None:
    given, x = arguments((True, True)), numbers(4, 3, 5)
    residual = None if residual_shape is None else numbers(*residual_shape, seed=7) - 3
    expected = F.batch_norm(x, **arguments((True, True)), training=training)
    expected = expected if residual is None else expected + residual
    expected = expected if activation is None else native.ACTIVATIONS[activation](expected)
    y = batch_norm(x, **given, training=training, residual=residual, activation=activation, kernel=kernel)
    torch.testing.assert_close(y, expected)


def test_a_kernel_gets_the_residual_only_in_the_inputs_shape_and_dtype() -> None:
    seen = []

    def kernel(x: Tensor, weight: Any, bias: Any, eps: float, residual: Any = None, *rest: Any) -> Any:
        seen.append(residual)
        return native.batch_norm(x, weight, bias, eps, residual, *rest)

    x = numbers(4, 3, 5, dtype=torch.bfloat16)
    for residual in (torch.ones_like(x), torch.ones(4, 3, 5), torch.ones(3, 1, dtype=torch.bfloat16)):
        y = batch_norm(x, None, None, training=True, residual=residual, activation="relu", kernel=kernel)
        assert y.dtype == torch.promote_types(x.dtype, residual.dtype)
    assert [residual is not None for residual in seen] == [True, False, False]


@ROUTES
def test_nothing_is_written_into_input_or_residual(kernel: Any) -> None:
    x, residual = numbers(4, 3), numbers(4, 3, seed=1)
    batch_norm(x, None, None, training=True, residual=residual, activation="relu", kernel=kernel)
    assert torch.equal(x, numbers(4, 3))
    assert torch.equal(residual, numbers(4, 3, seed=1))


def test_a_kernel_that_takes_the_running_statistics_moves_them_alone() -> None:
    seen = []

    def kernel(x, weight, bias, eps, residual, activation, statistics, running=None):  # type: ignore[no-untyped-def]
        seen.append(running)
        return native.batch_norm(x, weight, bias, eps)

    mean, var = torch.zeros(3), torch.ones(3)
    batch_norm(numbers(4, 3), mean, var, training=True, momentum=0.3, kernel=kernel)
    assert seen[0][0] is mean
    assert seen[0][1] is var
    assert seen[0][2] == 0.3
    assert torch.equal(mean, torch.zeros(3))


def running_by_keyword(x, weight, bias, eps, residual=None, activation=None, statistics=None, *, running=None):  # type: ignore[no-untyped-def]
    return native.batch_norm(x, weight, bias, eps, residual, activation, statistics, running)


class Unhashable(dict):  # type: ignore[type-arg]
    """A kernel with parameters of its own, that no cache can keep."""

    def __call__(self, x: Tensor, *rest: Any) -> Any:
        return native.batch_norm(x, *rest)


class WithoutSignature(Unhashable):
    __signature__ = "none"  # for which inspect.signature raises, as for a function in C


@pytest.mark.parametrize("kernel", [running_by_keyword, Unhashable(), WithoutSignature()])
def test_any_callable_is_a_kernel(kernel: Any) -> None:
    x, mean, var = numbers(4, 3), torch.zeros(3), torch.ones(3)
    y = batch_norm(x, mean, var, training=True, kernel=kernel)
    assert torch.equal(y, batch_norm(x, torch.zeros(3), torch.ones(3), training=True))
    assert mean.any()


def test_a_functions_signature_is_inspected_once(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at = []
    monkeypatch.setattr("inspect.signature", lambda f, signature=inspect.signature: looked_at.append(f) or signature(f))

    def kernel(x: Tensor, *rest: Any) -> Any:
        return native.batch_norm(x, *rest)

    for _ in range(3):
        batch_norm(numbers(4, 3), torch.zeros(3), torch.ones(3), training=True, kernel=kernel)
    assert looked_at == [kernel]


def test_running_statistics_never_hold_on_to_a_graph() -> None:
    def kernel(x: Tensor, *rest: Any) -> Any:  # a careless one, whose statistics have a gradient
        y, _, _ = native.batch_norm(x, *rest)
        return y, x.mean(0), x.var(0, correction=0)

    mean, var = torch.zeros(3), torch.ones(3)
    batch_norm(numbers(4, 3).requires_grad_(), mean, var, training=True, kernel=kernel)
    assert not mean.requires_grad
    assert not var.requires_grad


def test_an_unknown_activation_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="activation 'gelu': expected one of relu, leaky_relu, silu, or None"):
        batch_norm(numbers(4, 3), None, None, training=True, activation="gelu")


def test_an_unknown_kernel_is_refused_with_the_known_ones() -> None:
    with pytest.raises(Unavailable, match="expected one of native"):
        batch_norm(numbers(4, 3), None, None, training=True, kernel="nativ")


@pytest.mark.skipif(fused.unavailable_reason(torch.device("cpu")) is None, reason="the fused kernel runs here")
def test_a_kernel_that_cannot_run_is_refused_and_not_replaced() -> None:
    with pytest.raises(Unavailable, match="the fused kernel cannot run"):
        batch_norm(numbers(4, 3), None, None, training=True, kernel="fused")


def test_batch_norm_is_public() -> None:
    assert bncli.batch_norm is batch_norm


@ROUTES
@pytest.mark.parametrize("training", [True, False])
def test_it_compiles_into_one_graph(kernel: Any, training: bool) -> None:
    def run(x: Tensor, residual: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        return batch_norm(x, mean, var, training=training, residual=residual, activation="silu", kernel=kernel)

    x, residual = numbers(4, 3), numbers(4, 3, seed=1)
    eager, compiled = (torch.zeros(3), torch.ones(3)), (torch.zeros(3), torch.ones(3))
    expected = run(x, residual, *eager)
    torch.testing.assert_close(
        torch.compile(run, fullgraph=True, backend="aot_eager")(x, residual, *compiled), expected
    )
    torch.testing.assert_close(compiled, eager)
