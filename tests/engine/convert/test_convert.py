"""Models as people write them, converted, beside the same models left alone."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import bncli
from bncli.engine.convert import convert
from bncli.engine.models.norms import BatchNorm, BatchNorm2d, ignoring_statistics
from bncli.errors import Unavailable
from bncli.kernels import fused as fused_kernel
from tests.engine.convert.checks import FUSED_ADD, SEAM, converted, fused, operations, reason, report, same
from tests.engine.convert.models import (
    IMAGES,
    MODELS,
    BasicBlock,
    Bottleneck,
    DenseBlock,
    EfficientNet,
    FunctionalBottleneck,
    MobileNetV2,
    ResNet,
    conv,
    mlp,
    numbers,
    residual,
    small_resnet,
)

BY_ROUTE = pytest.mark.parametrize("kernel", ["native", SEAM], ids=["native", "as a function"])


@pytest.mark.parametrize("trace", [False, True])
@BY_ROUTE
@pytest.mark.parametrize(("make", "x"), MODELS.values(), ids=MODELS)
def test_a_converted_model_has_the_losses_gradients_and_state_of_the_original(
    kernel: Any, make: Callable[[], nn.Module], x: Tensor, trace: bool
) -> None:
    torch.manual_seed(0)
    model = make()
    same(model, converted(model, kernel, trace=trace), x)


@pytest.mark.parametrize("name", ["basic blocks", "bottlenecks", "mlp"])
def test_so_it_has_in_float64_and_channels_last(name: str) -> None:
    make, x = MODELS[name]
    layout = torch.channels_last if x.dim() == 4 else torch.contiguous_format
    model = make().to(torch.float64).to(memory_format=layout)  # type: ignore[call-overload]
    same(model, converted(model), x.double().contiguous(memory_format=layout))


# Family -> the model, its batch norms, and how many are fused without and with trace=True.
FAMILIES: dict[str, tuple[Callable[[], nn.Module], int, int, int]] = {
    "ResNet-18": (ResNet, 20, 16, 17),
    "ResNet-50": (lambda: ResNet(Bottleneck, (3, 4, 6, 3)), 53, 48, 49),
    "MobileNetV2": (MobileNetV2, 52, 0, 10),
    "EfficientNet-B0": (EfficientNet, 49, 33, 33),
    "ResNet of functions": (lambda: ResNet(FunctionalBottleneck, (3, 4, 6, 3)), 53, 0, 49),
    "dense block": (DenseBlock, 7, 0, 6),
}


@pytest.mark.parametrize(("make", "norms", "default", "traced"), FAMILIES.values(), ids=FAMILIES)
def test_how_many_norms_of_a_family_are_fused(
    make: Callable[[], nn.Module], norms: int, default: int, traced: int
) -> None:
    model = make()
    assert len(report(convert(model, SEAM)).norms) == norms
    assert fused(model) == default
    assert fused(convert(model, SEAM, trace=True)) == traced
    assert fused(model) == default  # the model itself is converted as without trace
    assert all(isinstance(part, BatchNorm) for part in model.modules() if isinstance(part, nn.BatchNorm2d))


def test_a_block_fuses_all_but_the_norm_before_its_shortcut() -> None:
    model = converted(ResNet(blocks=(1, 1)))
    assert reason(model, "layer2.0.bn2") == "what follows is layer2.0.downsample.0 (Conv2d)"
    assert operations(model) == {
        "bn1": "batch norm",
        "layer1.0.bn1": "batch norm + relu",
        "layer1.0.bn2": FUSED_ADD,
        "layer2.0.bn1": "batch norm + relu",
        "layer2.0.bn2": "batch norm",
        "layer2.0.downsample.1": FUSED_ADD,
    }


def test_the_report_says_what_stands_in_the_way() -> None:
    model = converted(nn.Sequential(nn.BatchNorm2d(4), nn.LeakyReLU(0.2), nn.BatchNorm2d(4)))
    assert reason(model, "0") == "what follows is 1 (LeakyReLU with slope 0.2)"
    assert reason(model, "2") == "nothing follows it here"
    assert reason(converted(DenseBlock()), "norm") == (
        "the forward that calls it is none that convert knows; trace=True looks into it"
    )


# --- what stays -----------------------------------------------------------------------------------------------------


def test_the_model_is_converted_in_place_with_its_class_methods_parameters_and_keys() -> None:
    model = small_resnet()
    keys, parameters, modules = list(model.state_dict()), list(model.parameters()), list(model.modules())
    assert convert(model, SEAM) is model
    assert type(model) is ResNet
    assert isinstance(model.layer1[0], BasicBlock)  # type: ignore[index]
    assert repr(model.layer1) == repr(converted(model, fuse=False).layer1)
    assert list(model.state_dict()) == keys
    assert all(one is other for one, other in zip(model.parameters(), parameters, strict=True))
    assert all(one is other for one, other in zip(model.modules(), modules, strict=True))
    torch.testing.assert_close(model.eval().features(IMAGES), converted(model.eval()).features(IMAGES))


@pytest.mark.parametrize("trace", [False, True])
def test_an_optimizer_made_before_still_trains_the_model(trace: bool) -> None:
    model = small_resnet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ours = convert(model, SEAM, trace=trace)
    assert all(one is other for one, other in zip(ours.parameters(), model.parameters(), strict=True))
    before = [parameter.clone() for parameter in model.parameters()]
    ours(IMAGES).square().mean().backward()
    optimizer.step()
    assert all(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


def test_checkpoints_load_both_ways() -> None:
    plain, ours = small_resnet(), converted(small_resnet())
    plain(IMAGES)
    ours.load_state_dict(plain.state_dict(), strict=True)
    small_resnet().load_state_dict(ours.state_dict(), strict=True)
    torch.testing.assert_close(ours.eval()(IMAGES), plain.eval()(IMAGES))


def test_frozen_and_evaluating_norms_stay_frozen_and_evaluating() -> None:
    model: Any = small_resnet()
    frozen = model.layer1[0].bn1.eval().requires_grad_(False)
    convert(model, SEAM)
    model(IMAGES)
    assert not frozen.training
    assert not frozen.weight.requires_grad
    assert torch.equal(frozen.running_mean, torch.zeros(4))
    assert model.layer1.training


@pytest.mark.parametrize("trace", [False, True])
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "pickle protocol 0", "torch.save"])
def test_copies_and_pickles_stay_fused(way: str, trace: bool) -> None:
    model = converted(small_resnet(), trace=trace)
    if way == "deepcopy":
        other = copy.deepcopy(model)
    elif way == "torch.save":
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    else:
        other = pickle.loads(pickle.dumps(model, 0 if way.endswith("0") else pickle.DEFAULT_PROTOCOL))
    assert calls_of_relu(other) == calls_of_relu(model) == (0 if trace else 1)
    assert report(other) == report(model)
    same(model, other, IMAGES)


def calls_of_relu(model: nn.Module) -> int:
    """How often torch's ReLU is called in one pass, beside the kernels."""
    calls = 0

    class Counted(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal calls
            calls += func is F.relu and bool((kwargs or {}).get("inplace"))  # the kernels' is not in place
            return func(*args, **(kwargs or {}))

    with Counted():
        model(IMAGES)
    return calls


def test_converting_twice_changes_nothing_more_and_converting_back_undoes_it() -> None:
    model = small_resnet()
    calls = calls_of_relu(model)
    once = report(convert(model, SEAM))
    classes = [type(module) for module in model.modules()]
    assert report(convert(model, SEAM)) == once
    assert [type(module) for module in model.modules()] == classes
    convert(model, "native", fuse=False)
    assert calls_of_relu(model) == calls == 7
    assert all(norm.operation == "batch norm" for norm in report(model).norms)
    assert type(model.layer1[0]) is BasicBlock  # type: ignore[index]


@pytest.mark.parametrize("trace", [False, True])
@BY_ROUTE
def test_a_converted_model_compiles_into_one_graph(kernel: Any, trace: bool) -> None:
    torch.compiler.reset()
    model = small_resnet()
    ours = converted(model, kernel, trace=trace)
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(IMAGES), model(IMAGES))
    torch.testing.assert_close(ours.state_dict(), model.state_dict())


@pytest.mark.slow
def test_a_converted_model_compiled_by_inductor_trains_as_the_original() -> None:
    model = small_resnet()
    ours = converted(model)
    compiled = torch.compile(ours, fullgraph=True)
    compiled(IMAGES).square().mean().backward()
    model(IMAGES).square().mean().backward()
    for one, other in zip(ours.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("trace", [False, True])
def test_a_converted_model_can_be_exported_and_traced_by_jit(trace: bool) -> None:
    ours = converted(small_resnet(), trace=trace).eval()
    torch.testing.assert_close(torch.export.export(ours, (IMAGES,)).module()(IMAGES), ours(IMAGES))
    torch.testing.assert_close(torch.jit.trace(ours, IMAGES)(IMAGES), ours(IMAGES))


# --- norms ----------------------------------------------------------------------------------------------------------


class Doubled(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def replaced() -> nn.Module:
    norm = nn.BatchNorm2d(3)
    norm.forward = lambda input: 2 * input  # type: ignore[method-assign]
    return norm


class BatchNormAct2d(nn.BatchNorm2d):
    """The shape of timm's: a norm with its own dropout and activation."""

    __module__ = "timm.layers.norm_act"

    def __init__(self, channels: int, drop: nn.Module, act: nn.Module) -> None:
        super().__init__(channels)
        self.drop, self.act = drop, act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


class ActivationFirst(BatchNormAct2d):
    """Another's class of that name."""

    __module__ = __name__

    def forward(self, x: Tensor) -> Tensor:
        return nn.BatchNorm2d.forward(self, self.act(x))


ActivationFirst.__name__ = "BatchNormAct2d"


def hooked(module: nn.Module) -> nn.Module:
    module.register_forward_hook(lambda *_: None)
    return module


LEFT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "synchronised": (lambda: nn.SyncBatchNorm(3), "statistics are those of several processes"),
    "lazy": (nn.LazyBatchNorm2d, "no parameters before its first forward"),
    "a subclass": (lambda: Doubled(3), "Doubled is a class with a forward of its own"),
    "not timm's": (
        lambda: ActivationFirst(3, nn.Identity(), nn.ReLU()),
        "BatchNormAct2d is a class with a forward of its own",
    ),
    "GELU": (lambda: BatchNormAct2d(3, nn.Identity(), nn.GELU()), "GELU"),
    "dropout": (lambda: BatchNormAct2d(3, nn.Dropout(0.5), nn.ReLU()), "Dropout"),
    "a slope": (lambda: BatchNormAct2d(3, nn.Identity(), nn.LeakyReLU(0.2)), "LeakyReLU with slope 0.2"),
    "hooks": (lambda: BatchNormAct2d(3, nn.Identity(), hooked(nn.ReLU())), "has hooks"),
    "replaced": (replaced, "its forward was replaced on this object"),
    "ignored statistics": (
        lambda: BatchNorm(3, kernel=ignoring_statistics),
        "its gradient ignores the batch's statistics",
    ),
}


def test_a_norm_of_all_ranks_stays_one() -> None:
    assert all(convert(BatchNorm(3, sync=sync), SEAM, sync=not sync).sync for sync in (False, True))
    assert not convert(nn.BatchNorm2d(3), SEAM).sync


@pytest.mark.parametrize(("make", "why"), LEFT.values(), ids=LEFT)
def test_norms_that_are_more_than_batch_norm_are_left_with_the_reason(make: Callable[[], nn.Module], why: str) -> None:
    model = nn.Sequential(make(), nn.ReLU())
    kind = type(model[0])
    convert(model, SEAM)
    assert type(model[0]) is kind
    assert getattr(model[0], "kernel", None) is not SEAM
    assert operations(model) == {"0": None}
    assert why in reason(model, "0")


@BY_ROUTE
@pytest.mark.parametrize(
    ("act", "operation"),
    [(nn.SiLU(True), "batch norm + silu"), (nn.LeakyReLU(), "batch norm + leaky_relu"), (nn.Identity(), "batch norm")],
)
def test_a_norm_with_an_activation_of_its_own_runs_both_in_one(kernel: Any, act: nn.Module, operation: str) -> None:
    model = nn.Sequential(conv(3, 4), BatchNormAct2d(4, nn.Identity(), act), nn.ReLU())
    ours = converted(model, kernel)
    expected = operation if type(act) is not nn.Identity else "batch norm + relu"
    assert operations(ours) == {"1": expected}
    assert operations(convert(ours, kernel)) == {"1": expected}
    same(model, ours, IMAGES)
    same(model, converted(model, kernel, trace=True), IMAGES)


def test_an_attribute_called_act_of_an_ordinary_norm_is_no_activation() -> None:
    for act in ("relu", nn.ReLU()):
        norm: Any = nn.BatchNorm2d(3)
        norm.act = act
        model = nn.Sequential(conv(3, 3), norm)
        ours = converted(model)
        assert operations(ours) == {"1": "batch norm"}
        same(model, ours, IMAGES)


def test_a_model_that_is_a_batch_norm_becomes_ours() -> None:
    model = convert(nn.BatchNorm2d(3), SEAM)
    assert isinstance(model, BatchNorm2d)
    assert operations(model) == {"": "batch norm"}


def test_a_model_without_batch_norms_is_left_alone() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    assert report(convert(model, SEAM)).norms == ()
    assert type(model) is nn.Sequential


def test_a_kernel_that_cannot_run_is_refused_before_anything_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_kernel, "unavailable_reason", lambda device: "it is not built")
    model = small_resnet()
    with pytest.raises(Unavailable, match="the fused kernel cannot run"):
        convert(model)
    assert type(model.bn1) is nn.BatchNorm2d


def test_a_shared_norm_keeps_one_state_over_all_its_calls() -> None:
    norm = nn.BatchNorm2d(3)
    model = nn.Sequential(conv(3, 3), norm, nn.ReLU(), nn.Sequential(conv(3, 3), norm, nn.SiLU()))
    for trace in (False, True):
        ours = converted(model, trace=trace)
        assert operations(ours) == {"1": "batch norm + relu, batch norm + silu"}
        same(model, ours, IMAGES)


# --- the report, and any sequence of layers -------------------------------------------------------------------------


def test_the_report_is_a_table_of_plain_text() -> None:
    lines = str(report(converted(residual(nn.ReLU6()), "native"))).splitlines()
    assert lines[0] == "2 of 2 batch norms run on kernel native: 1 together with the operations that follow, 1 alone"
    assert lines[1].split() == ["batch", "norm", "runs", "as", "why", "not", "more"]
    assert lines[2] == "body.1      batch norm                        what follows is body.2 (ReLU6)"
    assert lines[3] == "body.3      batch norm + residual add + silu"
    assert lines[4] == "Each is one call; native runs its operations one after the other."


def test_the_report_of_a_kernel_says_when_torch_adds_the_residual() -> None:
    text = str(report(converted(residual())))
    assert "2 together with the operations that follow, 0 alone" in text
    assert "A residual of another shape or dtype is added after the kernel" in text
    assert "residual of another" not in str(report(converted(mlp())))


def test_batch_norm_is_public() -> None:
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


class OwnBlock(BasicBlock):
    """A block with the forward of torchvision's, of any layers."""

    def __init__(self, body: list[nn.Module], shortcut: nn.Module | None) -> None:
        nn.Module.__init__(self)
        self.conv1, self.bn1, self.relu, self.conv2, self.bn2 = body  # type: ignore[assignment]
        self.downsample = shortcut


NAMES = st.sampled_from(sorted(LAYERS))
SKIP = st.tuples(st.lists(NAMES, max_size=4), st.booleans(), NAMES)
BLOCK = st.tuples(st.lists(NAMES, min_size=5, max_size=5), st.lists(NAMES, max_size=3) | st.none())


def made(plan: tuple[Any, ...]) -> nn.Module:
    if len(plan) == 2:
        names, others = plan
        shortcut = None if others is None else nn.Sequential(*(LAYERS[name]() for name in others))
        return OwnBlock([LAYERS[name]() for name in names], shortcut)
    names, in_place, last = plan
    return Skip(nn.Sequential(nn.Linear(4, 4), *(LAYERS[name]() for name in names)), in_place, LAYERS[last]())


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(SKIP | BLOCK, min_size=1, max_size=3), st.booleans())
def test_any_sequence_of_layers_and_skips_computes_the_same(plans: list[tuple[Any, ...]], trace: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), *map(made, plans))
    try:
        model(numbers(6, 4)).sum().backward()
    except RuntimeError:  # torch refuses the model itself: it writes into what the gradient needs
        assume(False)
    same(model, converted(model, trace=trace), numbers(6, 4), steps=1)
