"""Models as people write them, converted, beside the same models left alone."""

from __future__ import annotations

import collections
import copy
import inspect
import io
import itertools
import operator
import os
import pickle
import random
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.nn import functional as F

import bncli
from bncli.engine.convert import Conversion, convert
from bncli.engine.models.norms import BatchNorm, BatchNorm2d
from bncli.errors import Unavailable
from bncli.kernels import fused, native

SEAM: Any = native.batch_norm
BY_ROUTE = pytest.mark.parametrize("kernel", ["native", SEAM], ids=["native", "through the seam"])
FUSED_ADD = "batch norm + residual add + relu"


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


IMAGES = numbers(4, 3, 8, 8)


def report(model: nn.Module) -> Conversion:
    found = model.bncli_conversion
    assert isinstance(found, Conversion)
    return found


def operations(model: nn.Module) -> dict[str, str | None]:
    return {norm.name: norm.operation for norm in report(model).norms}


def reason(model: nn.Module, name: str) -> str:
    found = next(norm.reason for norm in report(model).norms if norm.name == name)
    assert found is not None
    return found


def same(one: nn.Module, other: nn.Module, *inputs: Any, steps: int = 3) -> None:
    """Losses, gradients of weights and inputs, and state of two models over some steps of training, then evaluation."""
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.05) for model in (one, other)]
    for step in range(steps):
        found = []
        for model, optimizer in zip((one, other), optimizers, strict=True):
            torch.manual_seed(step)  # of dropout
            given = [copy.deepcopy(x).requires_grad_() if isinstance(x, Tensor) else x for x in inputs]
            optimizer.zero_grad()
            loss = model.train()(*given).square().mean()
            loss.backward()
            gradients = [parameter.grad for parameter in model.parameters()]
            found.append((loss.detach(), gradients, [x.grad for x in given if isinstance(x, Tensor)]))
            optimizer.step()
        torch.testing.assert_close(found[1], found[0])
    assert list(one.state_dict()) == list(other.state_dict())
    torch.testing.assert_close(other.state_dict(), one.state_dict())
    results = []
    for model in (one, other):
        torch.manual_seed(steps)
        results.append(model.eval()(*inputs))
    torch.testing.assert_close(results[1], results[0])
    one.train(), other.train()


def converted(model: nn.Module, kernel: Any = SEAM) -> nn.Module:
    return convert(copy.deepcopy(model), kernel)


# --- models ---------------------------------------------------------------------------------------------------------


def conv(inputs: int, outputs: int, size: int = 3, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)


def shortcut(inputs: int, outputs: int, stride: int) -> nn.Module | None:
    if inputs == outputs and stride == 1:
        return None
    return nn.Sequential(conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))


class BasicBlock(nn.Module):
    """He et al. 2015, figure 5 left; one ReLU module for both activations."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(inputs, outputs, 3, stride), nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = conv(outputs, outputs), nn.BatchNorm2d(outputs)
        self.downsample = shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class Bottleneck(nn.Module):
    """He et al. 2015, figure 5 right; functional activations, and the shortcut taken first."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        width = outputs // 2
        self.conv1, self.bn1 = conv(inputs, width, 1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv(width, width, 3, stride), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = conv(width, outputs, 1), nn.BatchNorm2d(outputs)
        self.downsample = shortcut(inputs, outputs, stride) or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        identity = self.downsample(x)
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out)).relu_()
        out = torch.add(identity, self.bn3(self.conv3(out)))
        return torch.relu(out)


class ResNet(nn.Module):
    def __init__(self, block: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu = conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(inplace=True)
        self.layer1 = nn.Sequential(block(8, 8), block(8, 8))
        self.layer2 = nn.Sequential(block(8, 16, 2), block(16, 16))
        self.fc = nn.Linear(16, 5)

    def features(self, x: Tensor) -> Tensor:
        return self.layer2(self.layer1(self.relu(self.bn1(self.conv1(x)))))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x).mean((2, 3)))


class PreActivation(nn.Module):
    """He et al. 2016 (arXiv 1603.05027): norm and ReLU come before the convolution."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), conv(inputs, outputs)
        self.bn2, self.conv2 = nn.BatchNorm2d(outputs), conv(outputs, outputs)
        self.shortcut = conv(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        residual = self.shortcut(out)
        out = self.conv2(F.relu(self.bn2(self.conv1(out))))
        return out + residual


class InvertedResidual(nn.Module):
    """MobileNetV2 (arXiv 1801.04381): layers in a Sequential that ends in a norm, the add outside, no activation."""

    def __init__(self, inputs: int, outputs: int, activation: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.add = inputs == outputs
        self.conv = nn.Sequential(
            nn.Sequential(conv(inputs, 12, 1), nn.BatchNorm2d(12), activation()),
            nn.Sequential(conv(12, 12, 3, groups=12), nn.BatchNorm2d(12), activation()),
            conv(12, outputs, 1),
            nn.BatchNorm2d(outputs),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.add else self.conv(x)


class DenseLayer(nn.Module):
    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.norm1, self.relu1, self.conv1 = nn.BatchNorm2d(inputs), nn.ReLU(inplace=True), conv(inputs, 8, 1)
        self.norm2, self.relu2, self.conv2 = nn.BatchNorm2d(8), nn.ReLU(inplace=True), conv(8, 4)

    def forward(self, *features: Tensor) -> Tensor:
        out = self.conv1(self.relu1(self.norm1(torch.cat(features, 1))))
        return self.conv2(self.relu2(self.norm2(out)))


class DenseBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DenseLayer(3 + 4 * k) for k in range(3))
        self.norm = nn.BatchNorm2d(15)

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.layers:
            features.append(layer(*features))
        return self.norm(torch.cat(features, 1))


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.middle, self.up = self.twice(3, 8), self.twice(8, 8), self.twice(16, 8)

    @staticmethod
    def twice(inputs: int, outputs: int) -> nn.Module:
        return nn.Sequential(conv(inputs, outputs), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True),
                             conv(outputs, outputs), nn.BatchNorm2d(outputs), nn.LeakyReLU(inplace=True))  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        skip = self.down(x)
        below = F.interpolate(self.middle(F.max_pool2d(skip, 2)), scale_factor=2)
        return self.up(torch.cat([skip, below], 1))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8, bias=False),
                         nn.BatchNorm1d(8), nn.SiLU(inplace=True), nn.Dropout(0.3), nn.Linear(8, 2))  # fmt: skip


MODELS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "basic blocks": (lambda: ResNet(BasicBlock), IMAGES),
    "bottlenecks": (lambda: ResNet(Bottleneck), IMAGES),
    "pre-activation": (lambda: nn.Sequential(PreActivation(3, 8), PreActivation(8, 4)), IMAGES),
    "mobile net": (lambda: nn.Sequential(*(InvertedResidual(3, 3, nn.ReLU6) for _ in range(2))), IMAGES),
    "efficient net": (lambda: nn.Sequential(*(InvertedResidual(3, 3, nn.SiLU) for _ in range(2))), IMAGES),
    "dense net": (DenseBlock, IMAGES),
    "u-net": (UNet, IMAGES),
    "mlp": (mlp, numbers(10, 6)),
}


@BY_ROUTE
@pytest.mark.parametrize(("make", "x"), MODELS.values(), ids=MODELS)
def test_a_converted_model_has_the_losses_gradients_and_state_of_the_original(
    kernel: Any, make: Callable[[], nn.Module], x: Tensor
) -> None:
    torch.manual_seed(0)
    model = make()
    same(model, converted(model, kernel), x)


def test_a_res_net_of_basic_blocks_is_fused_wherever_something_follows() -> None:
    model = converted(ResNet(BasicBlock))
    assert operations(model) == {
        "bn1": "batch norm + relu",
        "layer1.0.bn1": "batch norm + relu",
        "layer1.0.bn2": FUSED_ADD,
        "layer1.1.bn1": "batch norm + relu",
        "layer1.1.bn2": FUSED_ADD,
        "layer2.0.bn1": "batch norm + relu",
        "layer2.0.bn2": FUSED_ADD,
        "layer2.0.downsample.1": "batch norm",
        "layer2.1.bn1": "batch norm + relu",
        "layer2.1.bn2": FUSED_ADD,
    }
    assert reason(model, "layer2.0.downsample.1") == "it is the residual of layer2.0.bn2"


def test_functional_activations_and_an_add_in_the_other_order_are_fused_too() -> None:
    model = converted(ResNet(Bottleneck))
    assert operations(model)["layer2.0.bn2"] == "batch norm + relu"
    assert operations(model)["layer2.0.bn3"] == FUSED_ADD
    assert operations(model)["layer1.0.bn3"] == FUSED_ADD


def test_an_add_outside_the_sequential_that_ends_in_the_norm_is_fused() -> None:
    model = converted(InvertedResidual(3, 3, nn.ReLU6))
    assert operations(model) == {
        "conv.0.1": "batch norm",
        "conv.1.1": "batch norm",
        "conv.3": "batch norm + residual add",
    }
    assert reason(model, "conv.0.1") == "the activation is ReLU6, which the kernels do not have"
    assert operations(converted(InvertedResidual(3, 3, nn.SiLU)))["conv.1.1"] == "batch norm + silu"


def test_what_follows_without_being_fused_is_told() -> None:
    model = converted(InvertedResidual(3, 4, nn.SiLU))
    assert reason(model, "conv.3") == "its output is the model's"
    assert operations(converted(DenseBlock()))["layers.1.norm2"] == "batch norm"
    assert "layers.1" in reason(converted(DenseBlock()), "layers.1.norm1")


# --- what stays -----------------------------------------------------------------------------------------------------


def test_the_model_is_converted_in_place_with_its_class_methods_parameters_and_keys() -> None:
    model = ResNet(BasicBlock)
    keys, parameters, modules = list(model.state_dict()), list(model.parameters()), list(model.modules())
    assert convert(model, SEAM) is model
    assert isinstance(model, ResNet)
    assert isinstance(model.layer1[0], BasicBlock)
    assert list(model.state_dict()) == keys
    assert all(one is other for one, other in zip(model.parameters(), parameters, strict=True))
    assert all(one is other for one, other in zip(model.modules(), modules, strict=True))
    torch.testing.assert_close(model.eval().features(IMAGES), converted(model.eval()).features(IMAGES))


def test_an_optimizer_made_before_still_trains_the_model() -> None:
    model = ResNet(BasicBlock)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    convert(model, SEAM)
    before = [parameter.clone() for parameter in model.parameters()]
    model(IMAGES).square().mean().backward()
    optimizer.step()
    assert all(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


def test_checkpoints_load_both_ways() -> None:
    plain, fused_one = ResNet(BasicBlock), converted(ResNet(BasicBlock))
    plain(IMAGES)
    fused_one.load_state_dict(plain.state_dict(), strict=True)
    ResNet(BasicBlock).load_state_dict(fused_one.state_dict(), strict=True)
    torch.testing.assert_close(fused_one.eval()(IMAGES), plain.eval()(IMAGES))


def test_frozen_and_evaluating_norms_stay_frozen_and_evaluating() -> None:
    model = ResNet(BasicBlock)
    model.bn1.eval().requires_grad_(False)
    convert(model, SEAM)
    model(IMAGES)
    assert not model.bn1.training
    assert not model.bn1.weight.requires_grad
    assert torch.equal(model.bn1.running_mean, torch.zeros(8))
    assert model.layer1.training


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_and_pickles_stay_fused(way: str) -> None:
    model = converted(ResNet(BasicBlock))
    if way == "deepcopy":
        other = copy.deepcopy(model)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert calls_of_relu(other) == calls_of_relu(model) == 0
    assert report(other) == report(model)
    same(model, other, IMAGES)


def calls_of_relu(model: nn.Module) -> int:
    """How often the ReLU modules of a model run in one pass."""
    calls = 0

    def add_one(*_: Any) -> None:
        nonlocal calls
        calls += 1

    hooks = [module.register_forward_hook(add_one) for module in model.modules() if isinstance(module, nn.ReLU)]
    model(IMAGES)
    for hook in hooks:
        hook.remove()
    return calls


def test_converting_twice_changes_nothing_more_and_converting_back_undoes_it() -> None:
    model = ResNet(BasicBlock)
    calls = calls_of_relu(model)
    once = report(convert(model, SEAM))
    classes = [type(module) for module in model.modules()]
    assert report(convert(model, SEAM)) == once
    assert [type(module) for module in model.modules()] == classes
    convert(model, "native", fuse=False)
    assert calls_of_relu(model) == calls
    assert all(norm.operation == "batch norm" for norm in report(model).norms)
    assert type(model.layer1[0]) is BasicBlock


def test_a_slice_of_a_fused_sequential_is_a_plain_one() -> None:
    model = convert(mlp(), SEAM).eval()
    head = model[:2]  # type: ignore[index]
    assert type(head) is nn.Sequential
    torch.testing.assert_close(head(numbers(4, 6)), model[1](model[0](numbers(4, 6))))  # type: ignore[index]


def test_an_object_made_without_its_constructor_keeps_the_fused_forward() -> None:
    model = converted(ResNet(BasicBlock)).eval()
    replica = model._replicate_for_data_parallel()  # what nn.DataParallel does for each device
    torch.testing.assert_close(replica(IMAGES), model(IMAGES))


@BY_ROUTE
def test_a_converted_model_compiles_into_one_graph(kernel: Any) -> None:
    model = ResNet(BasicBlock)
    ours = converted(model, kernel)
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(IMAGES), model(IMAGES))
    torch.testing.assert_close(ours.state_dict(), model.state_dict())


def test_many_blocks_compiled_one_by_one_do_not_share_a_limit_of_recompilations() -> None:
    torch.compiler.reset()
    for activation in (nn.ReLU, nn.SiLU, nn.LeakyReLU, nn.Identity):
        for layers in range(1, 4):
            body = [part for _ in range(layers) for part in (conv(3, 3), nn.BatchNorm2d(3), nn.ReLU())]
            model = converted(nn.Sequential(*body, nn.BatchNorm2d(3), activation())).eval()
            compiled = torch.compile(model, fullgraph=True, backend="eager")
            torch.testing.assert_close(compiled(IMAGES), model(IMAGES))


@pytest.mark.slow
def test_a_converted_model_compiled_by_inductor_trains_as_the_original() -> None:
    model = ResNet(BasicBlock)
    ours = converted(model)
    compiled = torch.compile(ours, fullgraph=True)
    compiled(IMAGES).square().mean().backward()
    model(IMAGES).square().mean().backward()
    for one, other in zip(ours.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-5)


# --- hooks ----------------------------------------------------------------------------------------------------------


def test_hooks_on_blocks_layers_and_convolutions_still_fire() -> None:
    model = ResNet(BasicBlock)
    fired = []
    for name, module in model.named_modules():
        if isinstance(module, BasicBlock | nn.Sequential | nn.Conv2d):
            module.register_forward_hook(lambda module, inputs, output, name=name: fired.append(name))
    model(IMAGES)
    expected, fired[:] = list(fired), []
    convert(model, SEAM)(IMAGES)
    assert fired == expected
    assert operations(model)["layer1.0.bn2"] == FUSED_ADD


def test_a_norm_with_hooks_is_swapped_but_not_fused() -> None:
    model = ResNet(BasicBlock)
    seen: list[Tensor] = []
    model.bn1.register_forward_hook(lambda module, inputs, output: seen.append(output.clone()))
    convert(model, SEAM)(IMAGES)
    assert (seen[0] < 0).any()
    assert reason(model, "bn1") == "it has hooks, which must see its own output"


def test_an_activation_with_hooks_is_left_where_it_is() -> None:
    model = mlp()
    seen: list[Tensor] = []
    model[2].register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))  # type: ignore[index]
    convert(model, SEAM)(numbers(4, 6))
    assert (seen[0] < 0).any()
    assert reason(model, "1") == "2 (ReLU) has hooks, which must see its own input and output"


def test_a_sequential_with_hooks_is_not_opened() -> None:
    model = InvertedResidual(3, 3, nn.SiLU)
    fired = []
    model.conv.register_forward_hook(lambda *_: fired.append(1))
    convert(model, SEAM)(IMAGES)
    assert fired
    assert operations(model)["conv.3"] == "batch norm"
    assert reason(model, "conv.3") == "its output leaves conv, which has hooks"


# --- norms that are left --------------------------------------------------------------------------------------------


class Doubled(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


LEFT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "synchronised": (lambda: nn.SyncBatchNorm(3), "statistics are those of several processes"),
    "lazy": (nn.LazyBatchNorm2d, "no parameters before its first forward"),
    "a subclass": (lambda: Doubled(3), "Doubled is a class with a forward of its own"),
}


@pytest.mark.parametrize(("make", "why"), LEFT.values(), ids=LEFT)
def test_norms_that_are_more_than_batch_norm_are_left_with_the_reason(make: Callable[[], nn.Module], why: str) -> None:
    model = nn.Sequential(make(), nn.ReLU())
    kind = type(model[0])
    convert(model, SEAM)
    assert type(model[0]) is kind
    assert operations(model) == {"0": None}
    assert why in reason(model, "0")


class BatchNormAct2d(nn.BatchNorm2d):
    """The shape of timm's: a norm with its own dropout and activation."""

    def __init__(self, channels: int, drop: nn.Module, act: nn.Module) -> None:
        super().__init__(channels)
        self.drop, self.act = drop, act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


@BY_ROUTE
@pytest.mark.parametrize(
    ("act", "operation"),
    [(nn.SiLU(True), "batch norm + silu"), (nn.LeakyReLU(), "batch norm + leaky_relu"), (nn.Identity(), "batch norm")],
)
def test_a_norm_with_an_activation_of_its_own_runs_both_in_one(kernel: Any, act: nn.Module, operation: str) -> None:
    model = nn.Sequential(conv(3, 4), BatchNormAct2d(4, nn.Identity(), act))
    ours = converted(model, kernel)
    assert operations(ours) == {"1": operation}
    assert operations(convert(ours, kernel)) == {"1": operation}
    same(model, ours, IMAGES)


@pytest.mark.parametrize(
    ("drop", "act", "why"),
    [(nn.Identity(), nn.GELU(), "its activation is GELU"),
     (nn.Dropout(0.5), nn.ReLU(), "more than an activation: drop"),
     (nn.Identity(), nn.LeakyReLU(0.2), "its activation is LeakyReLU")],
)  # fmt: skip
def test_a_norm_whose_own_activation_no_kernel_has_is_left(drop: nn.Module, act: nn.Module, why: str) -> None:
    model = nn.Sequential(conv(3, 4), BatchNormAct2d(4, drop, act))
    assert why in reason(convert(model, SEAM), "1")
    assert type(model[1]) is BatchNormAct2d


def test_a_model_that_is_a_batch_norm_becomes_ours() -> None:
    model = convert(nn.BatchNorm2d(3), SEAM)
    assert isinstance(model, BatchNorm2d)
    assert operations(model) == {"": "batch norm"}


def test_a_model_without_batch_norms_is_left_alone() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    assert report(convert(model, SEAM)).norms == ()
    assert type(model) is nn.Sequential


def test_a_kernel_that_cannot_run_is_refused_before_anything_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "unavailable_reason", lambda device: "it is not built")
    model = ResNet(BasicBlock)
    with pytest.raises(Unavailable, match="the fused kernel cannot run"):
        convert(model)
    assert type(model.bn1) is nn.BatchNorm2d


# --- one forward, its graph and its norm ----------------------------------------------------------------------------


class One(nn.Module):
    """A forward handed in, over one norm, a second norm, and an activation."""

    def __init__(self, run: Callable[..., Tensor]) -> None:
        super().__init__()
        self.norm, self.other, self.relu, self.drop = (
            nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.ReLU(), nn.Dropout(0.5))  # fmt: skip
        self.scale = nn.Parameter(torch.full((3, 1, 1), 0.7))
        self.register_buffer("offset", torch.full((3, 1, 1), 0.3))
        self.entries: list[int] = []
        self.counter: collections.Counter[str] = collections.Counter()
        self.numbers = itertools.count(1)
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def add_in_place(m: Any, x: Tensor) -> Tensor:
    y = m.norm(x)
    y += x
    return y.relu_()


def add_into_the_residual(m: Any, x: Tensor) -> Tensor:
    y = x.clone().flatten(1)
    z = y.view_as(x)
    z += m.norm(x)
    return m.relu(z) + y.view_as(x)


def add_into_a_sum(m: Any, x: Tensor) -> Tensor:
    y = x + m.other(x)
    y += m.norm(x)
    return m.relu(y)


def write_through_a_view(m: Any, x: Tensor) -> Tensor:
    r = x * 1
    y = m.norm(x)
    r.flatten(1).add_(1)
    return m.relu(y + r)


def twice(m: Any, x: Tensor) -> Tensor:
    return m.relu(m.norm(F.silu(m.norm(x))))


def twice_with_a_late_residual(m: Any, x: Tensor) -> Tensor:
    y = m.norm(x)
    r = torch.tanh(m.norm(2 * x))
    return m.relu(y + r)


def three_branches(m: Any, x: Tensor) -> Tensor:
    return m.relu(m.norm(2 * x) + m.other(x) + x)


def used_twice(m: Any, x: Tensor) -> Tensor:
    y = m.norm(x)
    return m.relu(y) + y


FORWARDS: dict[str, tuple[Callable[..., Tensor], str, str | None]] = {
    "relu": (lambda m, x: m.relu(m.norm(x)), "batch norm + relu", None),
    "silu": (lambda m, x: F.silu(m.norm(x)), "batch norm + silu", None),
    "leaky relu": (lambda m, x: F.leaky_relu(m.norm(x)), "batch norm + leaky_relu", None),
    "method": (lambda m, x: m.norm(x).relu(), "batch norm + relu", None),
    "add method": (lambda m, x: m.norm(x).add(x).relu(), FUSED_ADD, None),
    "operator": (lambda m, x: torch.relu(operator.add(x, m.norm(x))), FUSED_ADD, None),
    "add alone": (lambda m, x: 3 * (m.norm(x) + x), "batch norm + residual add", "what follows is mul"),
    "add in place": (add_in_place, FUSED_ADD, None),
    "three branches": (three_branches, "batch norm + residual add", "what follows is add"),
    "twice": (twice, "batch norm + silu, batch norm + relu", None),
    "a broadcast residual": (lambda m, x: m.relu(m.norm(x) + x[:1]), FUSED_ADD, None),
    "a residual of one value": (lambda m, x: m.relu(m.norm(x) + x.mean()), FUSED_ADD, None),
    "a residual that is a number": (lambda m, x: m.relu(m.norm(x) + x.size(0)), FUSED_ADD, None),
    "other slope": (lambda m, x: F.leaky_relu(m.norm(x), 0.2), "batch norm", "the activation is leaky_relu"),
    "gelu": (lambda m, x: F.gelu(m.norm(x)), "batch norm", "the activation is gelu"),
    "used twice": (used_twice, "batch norm", "its output is also used by add"),
    "alpha": (lambda m, x: torch.add(x, m.norm(x), alpha=2), "batch norm", "scales its operand (alpha)"),
    "a constant": (lambda m, x: m.relu(m.norm(x) + 1.5), "batch norm", "what is added is the constant 1.5"),
    "a parameter": (lambda m, x: m.norm(x) + m.scale, "batch norm", "what is added is scale, a parameter"),
    "a buffer": (lambda m, x: m.norm(x) + m.offset, "batch norm", "what is added is offset, a parameter or a buffer"),
    "itself": (lambda m, x: (lambda y: y + y)(m.norm(x)), "batch norm", "its output is added to itself"),
    "into the residual": (add_into_the_residual, "batch norm", "the add writes into its other operand"),
    "into a sum": (add_into_a_sum, FUSED_ADD, None),
    "write through a view": (write_through_a_view, "batch norm", "may be written to before the add"),
    "late residual": (twice_with_a_late_residual, "batch norm", "called again before the residual is known"),
    "dropout of its own": (lambda m, x: F.dropout(m.relu(m.norm(x)), training=m.training), "batch norm + relu", None),
    "other ways": (lambda m, x: m.relu(m.norm(x)) if m.training else F.silu(m.norm(x)),
                   "batch norm + relu, batch norm + silu", None),
    "dropout module": (lambda m, x: m.drop(m.relu(m.norm(x))), "batch norm + relu", None),
}  # fmt: skip


@BY_ROUTE
@pytest.mark.parametrize(("run", "operation", "why"), FORWARDS.values(), ids=FORWARDS)
def test_each_forward_is_fused_or_left_with_the_reason_and_computes_the_same(
    kernel: Any, run: Callable[..., Tensor], operation: str, why: str | None
) -> None:
    model = One(run)
    ours = converted(model, kernel)
    assert operations(ours)["norm"] == operation
    if why is not None:
        assert why in reason(ours, "norm")
    same(model, ours, IMAGES.clone())


def test_a_norm_never_waits_for_its_residual_past_a_write_into_its_input() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        x = x * 1
        y = m.norm(x)
        r = x.mul_(2)
        return m.relu(y + r)

    model = One(run).eval()
    ours = converted(model)
    assert "may be written to before the add" in reason(ours, "norm")
    with torch.no_grad():  # with gradients torch itself refuses the write
        torch.testing.assert_close(ours(IMAGES), model(IMAGES))


def test_writes_by_augmented_assignment_reach_every_name_of_the_tensor() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        size = height = x.size(2)
        height //= 2
        y = z = m.relu(m.norm(x)) * 1
        z += 1
        z /= height
        return y[:, :, height - 1 : size - 1]

    model = One(run)
    ours = converted(model)
    assert operations(ours)["norm"] == "batch norm + relu"
    same(model, ours, IMAGES)


# --- forwards that a graph cannot hold ------------------------------------------------------------------------------


def branch(m: Any, x: Tensor) -> Tensor:
    return m.relu(m.norm(x)) if x.sum() > 0 else m.norm(x)


def ask_for_the_type(m: Any, x: Any) -> Tensor:
    y = m.drop(x)
    return m.relu(m.norm(y if isinstance(y, Tensor) else y[0]))


def ask_by_type(m: Any, x: Any) -> Tensor:
    return m.relu(m.norm(x if type(x) is Tensor else x[0]))


def without_gradient(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        x = m.norm(x)
    return m.relu(x)


@torch.no_grad()
def decorated(m: Any, x: Tensor) -> Tensor:
    return m.relu(m.norm(x))


def ask_for_gradients(m: Any, x: Tensor) -> Tensor:
    return m.relu(m.norm(x)) if torch.is_grad_enabled() else m.norm(x)


def throw_a_die(m: Any, x: Tensor) -> Tensor:
    return m.relu(m.norm(x)) if random.random() < 2 else m.norm(x)


def draw_a_number(m: Any, x: Tensor) -> Tensor:
    return m.relu(m.norm(x)) * torch.rand(1)


def remember(m: Any, x: Tensor) -> Tensor:
    m.seen = m.relu(m.norm(x))
    return m.seen


def remember_in_a_list(m: Any, x: Tensor) -> Tensor:
    m.__dict__.setdefault("seen", [])
    return m.relu(m.norm(x))


def recompute(m: Any, x: Tensor) -> Tensor:
    return torch.utils.checkpoint.checkpoint(m.relu, m.norm(x), use_reentrant=False)


LOG: list[int] = []


class Configuration:
    scale = 2.0


CONFIGURATION = Configuration()


def ask_a_submodule(m: Any, x: Tensor) -> Tensor:
    return F.dropout(m.relu(m.norm(x)), m.drop.p, m.drop.training)


def ask_the_norm(m: Any, x: Tensor) -> Tensor:
    return m.relu(m.norm(x)) if m.norm.training else m.norm(x)


def log(m: Any, x: Tensor) -> Tensor:
    (lambda entries: entries.append(1))(LOG)
    return m.relu(m.norm(x))


def fill_a_list(m: Any, x: Tensor) -> Tensor:
    m.entries.append(1)
    return m.relu(m.norm(x))


def count(m: Any, x: Tensor) -> Tensor:
    m.counter.update(["calls"])
    return m.relu(m.norm(x))


def draw_the_next(m: Any, x: Tensor) -> Tensor:
    return m.relu(m.norm(x)) * next(m.numbers)


def read_the_clock(m: Any, x: Tensor) -> Tensor:
    return m.relu(m.norm(x)) * (1 if time.time() > 0 else 2)


def read_the_environment(m: Any, x: Tensor) -> Tensor:
    return m.relu(m.norm(x)) * float(os.environ.get("BNCLI_NO_SUCH_VARIABLE", "1"))


def read_a_configuration(m: Any, x: Tensor) -> Tensor:
    return m.relu(m.norm(x)) * CONFIGURATION.scale


def ask_for_identity(m: Any, x: Tensor) -> Tensor:
    y = m.drop(x)
    return m.relu(m.norm(x)) if y is x else m.norm(y)


def ask_whether_an_attribute_is_none(m: Any, x: Tensor) -> Tensor:
    return m.relu(m.norm(x)) if x.grad_fn is None else m.norm(x)


def ask_whether_it_can_be_called(m: Any, x: Any) -> Tensor:
    return m.relu(m.norm(x)) if callable(x) else m.norm(x)


UNTRACEABLE: dict[str, tuple[Callable[..., Tensor], str]] = {
    "branch": (branch, "depends on the values of a tensor"),
    "isinstance": (ask_for_the_type, "asks for the type of what it computed"),
    "type": (ask_by_type, "calls type"),
    "no_grad": (without_gradient, "has a with statement"),
    "decorated": (decorated, "is decorated with a context manager"),
    "is_grad_enabled": (ask_for_gradients, "asks torch.is_grad_enabled"),
    "random": (throw_a_die, "calls random's random"),
    "torch.rand": (draw_a_number, "calls rand on what is not computed from its arguments"),
    "an attribute": (remember, "sets an attribute"),
    "checkpoint": (recompute, "calls torch.utils.checkpoint"),
    "__dict__": (remember_in_a_list, "reads __dict__"),
    "a submodule's flag": (ask_a_submodule, "asks whether a submodule is in training"),
    "the norm's flag": (ask_the_norm, "asks whether a submodule is in training"),
    "a global list": (log, "reads LOG, a global variable that may change"),
    "a list": (fill_a_list, "changes a list that it did not make (append)"),
    "a counter": (count, "changes a Counter that it did not make (update)"),
    "next": (draw_the_next, "calls next"),
    "clock": (read_the_clock, "calls time's time"),
    "environment": (read_the_environment, "calls os."),
    "configuration": (read_a_configuration, "reads CONFIGURATION, a global variable that may change"),
    "identity": (ask_for_identity, "asks whether something is the same object (is)"),
    "none": (ask_whether_an_attribute_is_none, "asks whether something is the same object (is)"),
    "callable": (ask_whether_it_can_be_called, "calls callable"),
}


@pytest.mark.parametrize(("run", "why"), UNTRACEABLE.values(), ids=UNTRACEABLE)
def test_a_forward_that_a_graph_cannot_hold_keeps_its_course(run: Callable[..., Tensor], why: str) -> None:
    model = nn.Sequential(One(run), nn.BatchNorm2d(3), nn.ReLU())
    ours = converted(model)
    assert operations(ours) == {"0.norm": "batch norm", "0.other": "batch norm", "1": "batch norm + relu"}
    assert reason(ours, "0.norm").startswith("the forward of 0 ")
    assert why in reason(ours, "0.norm")
    assert not hasattr(ours[0], "seen")  # type: ignore[index]
    assert not LOG
    assert not ours[0].entries  # type: ignore[index]
    assert not ours[0].counter  # type: ignore[index]
    same(model, ours, IMAGES)
    LOG.clear()


def test_lists_that_a_forward_makes_itself_may_grow() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        features = [m.relu(m.norm(x))]
        features.append(features[0] * 2)
        return torch.cat(features, 1)

    model = One(run)
    ours = converted(model)
    assert operations(ours)["norm"] == "batch norm + relu"
    same(model, ours, IMAGES)


class Teacher(nn.Module):
    """A block whose forward asks a submodule, inside a model that asks only itself."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.norm = One(ask_a_submodule), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(F.relu(self.norm(self.block(x))), 0.5, self.training)


def test_a_flag_set_on_a_submodule_alone_after_convert_counts() -> None:
    model = Teacher()
    ours = converted(model)
    assert operations(ours)["norm"] == "batch norm + relu"
    model.eval().block.drop.train()
    ours.eval().block.drop.train()  # type: ignore[union-attr, operator]
    assert not torch.equal(ours(IMAGES), ours(IMAGES))  # the inner dropout is on
    model.train().block.drop.eval()
    ours.train().block.drop.eval()  # type: ignore[union-attr, operator]
    results = []
    for one in (model, ours):
        torch.manual_seed(0)
        results.append(one(IMAGES))
    torch.testing.assert_close(results[1], results[0])


# --- submodules exchanged after convert -----------------------------------------------------------------------------


def append(m: Any) -> None:
    m.append(nn.Tanh())


def insert(m: Any) -> None:
    m.insert(2, nn.Tanh())


def exchange_the_activation(m: Any) -> None:
    m[2] = nn.Tanh()


def delete_the_activation(m: Any) -> None:
    del m[2]


def exchange_the_norm(m: Any) -> None:
    m[1] = nn.Identity()


def exchange_the_convolution(m: Any) -> None:
    m[0] = nn.Identity()


CHANGES = [append, insert, exchange_the_activation, delete_the_activation, exchange_the_norm, exchange_the_convolution]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("way", ["as it is", "copied", "compiled"])
def test_a_sequential_changed_after_convert_computes_what_the_changed_one_does(
    change: Callable[[Any], None], way: str
) -> None:
    model = nn.Sequential(conv(3, 3), nn.BatchNorm2d(3), nn.ReLU(), conv(3, 3))
    ours = converted(model)
    if way == "copied":
        ours = pickle.loads(pickle.dumps(ours))
    torch.compiler.reset()
    run: Any = torch.compile(ours, fullgraph=True, backend="eager") if way == "compiled" else ours
    torch.testing.assert_close(run(IMAGES), model(IMAGES))
    change(model), change(ours)
    if not isinstance(ours[0], nn.Identity):  # type: ignore[index]
        ours[0].load_state_dict(model[0].state_dict())  # type: ignore[index]
    torch.testing.assert_close(run(IMAGES), model(IMAGES))


def test_what_was_taken_in_from_inside_other_modules_may_be_exchanged_too() -> None:
    def inner(m: Any) -> Any:
        return m[0]

    model = nn.Sequential(
        nn.Sequential(nn.Sequential(conv(3, 3), nn.BatchNorm2d(3), nn.ReLU()), nn.BatchNorm2d(3)), nn.SiLU()
    )
    ours = converted(model)
    assert operations(ours) == {"0.0.1": "batch norm + relu", "0.1": "batch norm + silu"}
    for one in (model, ours):
        inner(one)[0][2] = nn.Tanh()
    torch.testing.assert_close(ours(IMAGES), model(IMAGES))
    for one in (model, ours):
        inner(one).append(nn.Tanh())
    torch.testing.assert_close(ours(IMAGES), model(IMAGES))


def test_a_block_of_a_list_added_after_convert_runs() -> None:
    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norms, self.relu = nn.ModuleList([nn.BatchNorm2d(3)]), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            for norm in self.norms:
                x = self.relu(norm(x))
            return x

    model = Blocks()
    ours = converted(model)
    assert operations(ours) == {"norms.0": "batch norm + relu"}
    for one in (model, ours):
        one.norms.append(nn.BatchNorm2d(3))
        one.relu = nn.Tanh()  # type: ignore[assignment]
    same(model, ours, IMAGES)


def test_the_signature_of_a_fused_forward_stays() -> None:
    assert inspect.signature(converted(Flagged()).forward) == inspect.signature(Flagged().forward)


@BY_ROUTE
def test_fx_traces_a_converted_model_when_its_norms_are_leaves(kernel: Any) -> None:
    class Tracer(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return isinstance(m, BatchNorm) or super().is_leaf_module(m, module_qualified_name)

    ours = converted(ResNet(BasicBlock), kernel).eval()
    traced = fx.GraphModule(ours, Tracer().trace(ours))
    torch.testing.assert_close(traced(IMAGES), ours(IMAGES))


class EitherWay(nn.Module):
    """A layer of torchvision's DenseNet takes a tensor or a list of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.relu = nn.BatchNorm2d(3), nn.ReLU()

    def forward(self, input: Any) -> Tensor:
        features = [input] if isinstance(input, Tensor) else input
        return F.dropout(self.relu(self.norm(torch.cat(features, 1))), 0.5, self.training)


@pytest.mark.parametrize("way", [IMAGES, [IMAGES[:, :1], IMAGES[:, 1:]], (IMAGES[:, :1], IMAGES[:, 1:])])
def test_a_forward_that_asks_for_a_tensor_or_a_list_takes_both_and_others_as_before(way: Any) -> None:
    model = EitherWay()
    ours = converted(model)
    assert operations(ours) == {"norm": "batch norm + relu"}
    same(model, ours, way)
    torch.testing.assert_close(ours.eval()(input=way), model.eval()(input=way))
    copied = pickle.loads(pickle.dumps(ours))
    torch.testing.assert_close(copied(way), model(way))
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(way), model(way))


class Optional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.block = nn.BatchNorm2d(3), BasicBlock(3, 3)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        y = self.block(self.norm(x))
        if skip is not None:
            y = y + skip
        return F.relu(y)


def test_a_forward_that_asks_whether_an_argument_is_none_still_serves_both() -> None:
    ours = converted(Optional())
    assert reason(ours, "norm") == "the forward of the model asks whether its argument skip is None"
    assert operations(ours)["block.bn2"] == FUSED_ADD
    assert not torch.equal(ours(IMAGES), ours(IMAGES, IMAGES))


class LongOptional(nn.Module):
    """The question lies so far from its answer that Python's jump needs an extended argument."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        y = F.relu(self.norm(x))
        if skip is not None:
            y = y + skip * 1.0 + skip * 2.0 + skip * 3.0 + skip * 4.0 + skip * 5.0 + skip * 6.0 + skip * 7.0
            y = y + skip * 1.1 + skip * 2.1 + skip * 3.1 + skip * 4.1 + skip * 5.1 + skip * 6.1 + skip * 7.1
            y = y + skip * 1.2 + skip * 2.2 + skip * 3.2 + skip * 4.2 + skip * 5.2 + skip * 6.2 + skip * 7.2
            y = y + skip * 1.3 + skip * 2.3 + skip * 3.3 + skip * 4.3 + skip * 5.3 + skip * 6.3 + skip * 7.3
            y = y + skip * 1.4 + skip * 2.4 + skip * 3.4 + skip * 4.4 + skip * 5.4 + skip * 6.4 + skip * 7.4
            y = y + skip * 1.5 + skip * 2.5 + skip * 3.5 + skip * 4.5 + skip * 5.5 + skip * 6.5 + skip * 7.5
        return y


class Flagged(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x: Tensor, scale: float = 2.0, *, shift: float = 1.0) -> Tensor:
        return F.relu(self.norm(x)) * scale + shift


def test_a_forward_that_asks_whether_an_argument_is_none_far_ahead_still_serves_both() -> None:
    model = LongOptional().eval()
    ours = converted(model)
    assert "asks whether its argument skip is None" in reason(ours, "norm")
    torch.testing.assert_close(ours(IMAGES), model(IMAGES))
    torch.testing.assert_close(ours(IMAGES, IMAGES), model(IMAGES, IMAGES))


def test_defaults_of_a_fused_forward_stay() -> None:
    model = Flagged()
    ours = converted(model)
    assert operations(ours) == {"norm": "batch norm + relu"}
    same(model, ours, IMAGES)
    torch.testing.assert_close(ours.eval()(IMAGES, 3.0, shift=0.0), model.eval()(IMAGES, 3.0, shift=0.0))


def test_a_shared_norm_keeps_one_state_over_all_its_calls() -> None:
    norm = nn.BatchNorm2d(3)
    model = nn.Sequential(conv(3, 3), norm, nn.ReLU(), nn.Sequential(conv(3, 3), norm, nn.SiLU()))
    ours = converted(model)
    assert operations(ours) == {"1": "batch norm + silu, batch norm + relu"}
    same(model, ours, IMAGES)


# --- the report, and any sequence of layers -------------------------------------------------------------------------


def test_the_report_is_a_table_of_plain_text() -> None:
    lines = str(report(converted(InvertedResidual(3, 3, nn.ReLU6), "native"))).splitlines()
    assert lines[0] == "3 of 3 batch norms on kernel native, 1 of them merged with what follows"
    assert lines[1].split() == ["batch", "norm", "runs", "as", "why", "not", "more"]
    assert lines[2] == "conv.0.1    batch norm                 the activation is ReLU6, which the kernels do not have"
    assert lines[4] == "conv.3      batch norm + residual add"
    assert lines[5] == "Each is one call; native runs its operations one after the other."


def test_the_report_of_a_kernel_tells_when_torch_adds_the_residual() -> None:
    text = str(report(converted(InvertedResidual(3, 3, nn.ReLU6))))
    assert "1 of them fused" in text
    assert "A residual of another shape or dtype is added after the kernel" in text
    assert "residual of another" not in str(report(converted(mlp())))


def test_a_norm_that_no_forward_calls_is_told() -> None:
    ours = converted(One(lambda m, x: m.relu(m.norm(x))))
    assert reason(ours, "other") == "no forward calls it"


def test_a_norm_whose_shape_is_read_names_that_read_as_what_stands_in_the_way() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        y = m.norm(x)
        return m.relu(y).reshape(y.shape[0], -1)

    assert reason(converted(One(run)), "norm") == "its output is also used by .shape"


def test_it_is_public() -> None:
    assert bncli.convert is convert


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "norm": lambda: nn.BatchNorm1d(4),
    "linear": lambda: nn.Linear(4, 4),
    "relu": nn.ReLU,
    "relu in place": lambda: nn.ReLU(inplace=True),
    "silu": nn.SiLU,
    "leaky": nn.LeakyReLU,
    "tanh": nn.Tanh,
    "identity": nn.Identity,
    "dropout": lambda: nn.Dropout(0.2),
}


class Skip(nn.Module):
    def __init__(self, body: nn.Module, in_place: bool, activation: nn.Module) -> None:
        super().__init__()
        self.body, self.in_place, self.activation = body, in_place, activation

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        if self.in_place:
            y += x
        else:
            y = x + y
        return self.activation(y)


NAMES = st.sampled_from(sorted(LAYERS))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.lists(NAMES, max_size=4), st.booleans(), NAMES), min_size=1, max_size=3))
def test_any_sequence_of_layers_and_skips_computes_the_same(plan: list[tuple[list[str], bool, str]]) -> None:
    torch.manual_seed(0)
    parts = [
        Skip(nn.Sequential(nn.Linear(4, 4), *(LAYERS[name]() for name in names)), in_place, LAYERS[last]())
        for names, in_place, last in plan
    ]
    model = nn.Sequential(nn.Linear(4, 4), *parts)
    try:
        model(numbers(6, 4)).sum().backward()
    except (
        RuntimeError
    ):  # an in-place ReLU or add over a tensor that the gradient needs: torch refuses the model itself
        return
    same(model, converted(model), numbers(6, 4), steps=1)
