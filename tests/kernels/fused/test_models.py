"""Models with the fused kernel: a step's loss, gradients and running statistics are those with torch's kernel."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import bncli
from bncli.engine.models import build
from bncli.engine.models.norms import BatchNorm
from bncli.engine.train.state import fuse
from tests.conftest import tiny
from tests.kernels.fused.checks import UnderTest
from tests.resnet import ResNet


def step(model: nn.Module, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    loss = F.cross_entropy(model(x), labels)
    loss.backward()
    gradients = {f"gradient of {name}": each.grad for name, each in model.named_parameters() if each.grad is not None}
    return {"loss": loss.detach(), **gradients, **dict(model.named_buffers())}


def test_a_converted_resnet_gives_natives_loss_gradients_and_statistics(kernel: UnderTest) -> None:
    for channels_last in (True,) if kernel.interpreted else (False, True):
        assert_converted_resnet_is_right(channels_last, kernel)


def assert_converted_resnet_is_right(channels_last: bool, kernel: UnderTest) -> None:
    torch.manual_seed(0)
    model = ResNet((1, 1), 4, 5).to(kernel.device, torch.float64)
    x = torch.randn(3, 3, 16, 16, dtype=torch.float64, device=kernel.device)
    if channels_last:
        model, x = model.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)  # type: ignore[call-overload]
    labels = torch.tensor([0, 1, 2], device=kernel.device)
    converted = bncli.convert(copy.deepcopy(model), kernel.name, trace=True)
    fused = [line.operation for line in converted.bncli_conversion.norms]  # type: ignore[union-attr]
    assert fused.count("batch norm + relu") == 5
    assert fused.count("batch norm + residual add + relu") == 2
    theirs, ours = step(model, x, labels), step(converted, x, labels)
    assert theirs.keys() == ours.keys()
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_a_recipes_model_takes_its_activations_into_the_kernel(device: str) -> None:
    recipe = tiny(norm={"kind": "batch", "kernel": "fused"})
    model = build(recipe, (8,), 3)
    fuse(model, recipe)
    model.to(device)
    native = build(tiny(norm={"kind": "batch"}), (8,), 3).to(device)
    assert [line.operation for line in model.bncli_conversion.norms] == ["batch norm + relu"]  # type: ignore[union-attr]
    assert all(module.kernel == "fused" for module in model.modules() if isinstance(module, BatchNorm))
    assert list(model.state_dict()) == list(native.state_dict())
    x, labels = torch.randn(20, 8, device=device), torch.arange(20, device=device) % 3
    ours = step(model, x, labels)
    for name, expected in step(native, x, labels).items():
        torch.testing.assert_close(ours[name], expected, rtol=1e-4, atol=1e-5)
