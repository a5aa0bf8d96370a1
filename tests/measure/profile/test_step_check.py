"""Steps with another kernel compared with native's: right ones pass, wrong ones are told by their worst tensor."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from bncli import kernels
from bncli.engine.convert.fold import fold
from bncli.kernels import fused, native
from bncli.measure.profile.step_check import difference, folding_difference
from bncli.measure.profile.step_models import RecipeModel
from bncli.results.profile import StepDifference
from tests.conftest import tiny
from tests.measure.reference import wrong_kernels

CPU = torch.device("cpu")
CNN = {"kind": "cnn", "channels": [8, 8]}
RESNET = {"kind": "resnet", "depth": 20}
IMAGES = {"source": "synthetic", "shape": [3, 8, 8], "classes": 3, "examples": 40, "held_out": 20}


@pytest.mark.parametrize("kernel", [wrong_kernels.right_by_the_seam, native.batch_norm])
def test_a_right_kernel_passes(kernel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert checked(kernel, monkeypatch) is None


@pytest.mark.parametrize(("seed", "batch_size"), [(0, 8), (1, 32)])
def test_a_relu_that_a_rounding_opens_is_no_kernels_fault(
    seed: int, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In these one element does so, and a gradient is up to 5 % off that of float64."""
    assert checked(wrong_kernels.right_by_the_seam, monkeypatch, RESNET, seed=seed, batch_size=batch_size) is None


def checked(kernel: Any, monkeypatch: pytest.MonkeyPatch, model: Any = CNN, **train: Any) -> StepDifference | None:
    """What the check says of a model with that kernel."""
    monkeypatch.setattr(fused, "batch_norm", kernels.adapted(kernel))
    monkeypatch.setattr(fused, "unavailable_reason", lambda device: None)
    recipe = tiny(data=IMAGES, model=model, train={"batch_size": 8, **train})
    step_model = RecipeModel("resnet", recipe)
    dataset = step_model.dataset(CPU)
    return difference(step_model, "fused", step_model.trainable("fused", dataset, CPU), dataset, CPU)


def folded(fold: Any, recipe: Any = None) -> StepDifference | None:
    """What the check says of a way to fold, for a model whose running statistics have moved."""
    model = RecipeModel("net", recipe or tiny(data=IMAGES, model=RESNET, train={"batch_size": 8}))
    trainable = model.trainable("native", model.dataset(CPU), CPU)
    trainable.step(*trainable.batch())
    return folding_difference(trainable, fold)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_folded_model_passes(precision: str) -> None:
    recipe = tiny(data=IMAGES, model=RESNET, train={"batch_size": 8, "precision": precision})
    assert folded(fold, recipe) is None


def test_a_model_with_a_wrong_bias_after_folding_is_told() -> None:
    def without_the_mean(model: nn.Module) -> nn.Module:
        wrong: Any = copy.deepcopy(model)
        wrong.stem.norm.running_mean.zero_()
        return fold(wrong)

    found = folded(without_the_mean)
    assert found is not None
    assert (found.kind, found.tensor, found.in_float64) == ("output", "", True)
    assert found.error > 1e3 * found.allowed


def constant_statistics(x, weight, bias, eps, residual=None, activation=None, statistics=None):  # type: ignore[no-untyped-def]
    """Right forward; its gradient takes the batch's mean and variance for constants."""
    if statistics is None:
        var, mean = torch.var_mean(wrong_kernels.work(x.detach()), wrong_kernels.over(x), correction=0)
        statistics = (mean, var)
    return native.batch_norm(x, weight, bias, eps, residual, activation, statistics)


def no_bias_gradient(x, weight, bias, eps, residual=None, activation=None, statistics=None):  # type: ignore[no-untyped-def]
    return native.batch_norm(x, weight, bias.detach() + 0 * bias, eps, residual, activation, statistics)


def biased_variance(x, weight, bias, eps, residual=None, activation=None, statistics=None):  # type: ignore[no-untyped-def]
    """Right but for the variance that it says it used, which the running one follows."""
    y, mean, var = native.batch_norm(x, weight, bias, eps, residual, activation, statistics)
    return y, mean, var * 0.99


def wrong_in_float32(x, *arguments):  # type: ignore[no-untyped-def]
    return (native.batch_norm if x.dtype == torch.float64 else constant_statistics)(x, *arguments)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("kernel", "of"),
    [
        (constant_statistics, "gradient"),
        (no_bias_gradient, "gradient"),
        (biased_variance, "running statistic"),
        (wrong_in_float32, "gradient"),
    ],
)
def test_a_wrong_kernel_is_described_by_what_is_wrong(
    kernel: Any, of: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = checked(kernel, monkeypatch, precision=precision)
    assert found is not None
    assert (found.kind, bool(found.tensor)) == (of, True)
    assert not found.error <= found.allowed
