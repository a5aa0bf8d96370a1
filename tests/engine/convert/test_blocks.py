"""Fused forwards of Sequential and of residual blocks: what is changed after convert has its effect."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from bncli.engine.convert import convert
from tests.engine.convert.checks import CHANGES, FUSED_ADD, SEAM, LeafNorms, converted, operations, reason, same
from tests.engine.convert.models import (
    IMAGES,
    BasicBlock,
    Bottleneck,
    ConvNormActivation,
    ResNet,
    block,
    conv,
    mlp,
    numbers,
    residual,
    small_resnet,
)


def sequential() -> Any:
    return nn.Sequential(OrderedDict(conv=conv(3, 3), norm=nn.BatchNorm2d(3), act=nn.LeakyReLU(), last=conv(3, 3)))


# --- changes after convert --------------------------------------------------------------------------------------------

SEQUENTIAL_CHANGES: dict[str, Callable[[Any], Any]] = CHANGES | {
    "append": lambda m: m.append(nn.Tanh()),
    "no activation": lambda m: m.__delitem__(2),
    "no convolution": lambda m: m.__setitem__(0, nn.Identity()),
}
UNSEEN_BY_A_COMPILER = {"a hook on the norm", "a hook on the activation", "the norm's forward"}  # torch's own limit
WAYS = [
    pytest.param(change, way, id=f"{name}, {way}")
    for name, change in SEQUENTIAL_CHANGES.items()
    for way in ("as it is", "nested", "copied", "compiled")
    if way != "compiled" or name not in UNSEEN_BY_A_COMPILER
]


@pytest.mark.parametrize(("change", "way"), WAYS)
def test_a_sequential_changed_after_convert_computes_what_the_changed_one_does(
    change: Callable[[Any], None], way: str
) -> None:
    model = sequential()
    ours = converted(model)
    assert operations(ours) == {"norm": "batch norm + leaky_relu"}
    if way == "copied":
        ours = pickle.loads(pickle.dumps(ours))
    outer = convert(nn.Sequential(ours, nn.Tanh()), SEAM)[0] if way == "nested" else ours  # type: ignore[index]
    torch.compiler.reset()
    run: Any = torch.compile(outer, fullgraph=True, backend="eager") if way == "compiled" else outer
    torch.testing.assert_close(run(IMAGES), model(IMAGES))
    for one in (model, ours):
        change(one)
    if not isinstance(ours[0], nn.Identity):
        ours[0].load_state_dict(model[0].state_dict())
    torch.testing.assert_close(run(IMAGES), model(IMAGES))


def test_a_module_that_is_inserted_has_its_effect() -> None:
    model: Any = mlp().eval()
    ours = converted(model)
    for one in (model, ours):
        one.insert(2, nn.Tanh())
    torch.testing.assert_close(ours(numbers(4, 6)), model(numbers(4, 6)))


def exchange_the_activation_for_a_function(m: Any) -> None:
    del m.relu
    m.relu = F.silu


BLOCK_CHANGES: dict[str, Callable[[Any], Any]] = {
    "another activation": lambda m: setattr(m, "relu", nn.Tanh()),
    "a function": exchange_the_activation_for_a_function,
    "another slope": lambda m: setattr(m, "relu", nn.LeakyReLU(0.5)),
    "no norm": lambda m: setattr(m, "bn2", nn.Identity()),
    "no first norm": lambda m: setattr(m, "bn1", nn.Identity()),
    "no shortcut": lambda m: setattr(m, "downsample", None),
    "a shortcut": lambda m: setattr(m, "downsample", nn.Sequential(nn.Tanh(), nn.BatchNorm2d(4))),
    "a shortcut with an activation": lambda m: setattr(m, "downsample", nn.Sequential(nn.BatchNorm2d(4), nn.SiLU())),
    "a shortcut that writes": lambda m: setattr(m, "downsample", nn.ReLU(inplace=True)),
    "a shared norm": lambda m: setattr(m, "downsample", m.bn2),
    "a hook on the activation": lambda m: m.relu.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,)),
    "a hook on the norm": lambda m: m.bn2.register_forward_hook(lambda module, inputs, output: output - 1),
    "evaluation": lambda m: m.bn2.eval(),
}


@pytest.mark.parametrize("shortcut", [False, True])
@pytest.mark.parametrize("change", BLOCK_CHANGES.values(), ids=BLOCK_CHANGES)
def test_a_block_changed_after_convert_computes_what_the_changed_one_does(
    change: Callable[[Any], None], shortcut: bool
) -> None:
    model: Any = block(BasicBlock, 4, 4)
    if shortcut:
        model.downsample = nn.Sequential(conv(4, 4, 1), nn.BatchNorm2d(4))
    ours = converted(model)
    x = numbers(4, 4, 6, 6)
    same(model, ours, x, steps=1)
    for one in (model, ours):
        change(one)
    results = [one(x.clone()) for one in (model, ours)]
    torch.testing.assert_close(results[1], results[0])
    torch.testing.assert_close(ours.state_dict(), model.state_dict())


def test_a_hook_that_keeps_the_output_of_a_norm_sees_the_add_in_place() -> None:
    model: Any = block(BasicBlock, 4, 8)
    ours, kept = converted(model), []
    for one in (model, ours):
        one.bn2.register_forward_hook(lambda module, inputs, output: kept.append(output))
        one(numbers(4, 4, 6, 6))
    torch.testing.assert_close(kept[1], kept[0])


def test_a_forward_that_is_replaced_in_its_class_has_its_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    model = converted(BasicBlock(3, 3))
    monkeypatch.setattr(BasicBlock, "forward", lambda self, x: 2 * x)
    torch.testing.assert_close(model(IMAGES), 2 * IMAGES)
    torch.testing.assert_close(converted(BasicBlock(3, 3))(IMAGES), 2 * IMAGES)


def test_a_forward_of_sequential_that_is_replaced_has_its_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(conv(3, 3), nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()))
    blocks = block(BasicBlock, 4, 8)
    ours, our_blocks = converted(model), converted(blocks)
    original = nn.Sequential.forward
    monkeypatch.setattr(nn.Sequential, "forward", lambda self, x: original(self, x) + 1)
    torch.testing.assert_close(ours(IMAGES), model(IMAGES))
    torch.testing.assert_close(our_blocks(numbers(4, 4, 6, 6)), blocks(numbers(4, 4, 6, 6)))


def test_an_inner_sequential_that_compiles_itself_runs_compiled() -> None:
    torch.compiler.reset()
    model: Any = converted(nn.Sequential(conv(3, 3), nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())))
    compiled = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph

    model[1].compile(backend=backend)
    model(IMAGES)
    assert compiled


# --- the add in place (finding 6 of the review) -----------------------------------------------------------------------


@pytest.mark.parametrize("outputs", [4, 8])
@pytest.mark.parametrize("trace", [False, True])
def test_an_add_in_place_keeps_its_dtype(trace: bool, outputs: int) -> None:
    model = block(BasicBlock, 4, outputs)
    ours = converted(model, trace=trace)
    x = numbers(4, 4, 6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = ours(x), model(x)
    assert found.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("trace", [False, True])
def test_an_add_in_place_refuses_a_residual_that_would_make_it_larger(trace: bool) -> None:
    model: Any = block(BasicBlock, 4, 4)
    model.downsample = nn.Unflatten(0, (1, 4))
    for one in (model, converted(model, trace=trace)):
        with pytest.raises(RuntimeError, match="doesn't match the broadcast shape"):
            one(numbers(4, 4, 6, 6))


def test_an_add_in_place_of_a_shortcut_that_is_smaller_is_broadcast() -> None:
    model: Any = block(BasicBlock, 4, 8)
    model.downsample[0].stride = (8, 8)
    ours = converted(model)
    assert operations(ours)["downsample.1"] == FUSED_ADD
    same(model, ours, numbers(4, 4, 6, 6))


def test_an_add_out_of_place_is_promoted_and_broadcast() -> None:
    model: Any = residual()
    model.body[0].stride = (8, 8)
    ours = converted(model)
    same(model, ours, IMAGES)
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(IMAGES).dtype == model(IMAGES).dtype == torch.float32


def test_an_add_out_of_place_has_the_layout_of_its_first_operand() -> None:
    model: Any = residual()
    model.body[0] = nn.Identity()
    model.shortcut.append(nn.BatchNorm2d(3))
    model.body.append(ChannelsLast())
    ours = converted(model)
    assert operations(ours)["shortcut.0"] == "batch norm + residual add + silu"
    assert ours(IMAGES).stride() == model(IMAGES).stride() == (192, 1, 24, 3)
    same(model, ours, IMAGES)


class ChannelsLast(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.contiguous(memory_format=torch.channels_last)


def test_a_residual_may_be_added_to_a_number() -> None:
    class Number(nn.Module):
        def forward(self, x: Tensor) -> float:
            return 2.0

    model: Any = residual()
    model.body.append(Number())
    torch.testing.assert_close(converted(model)(IMAGES), model(IMAGES))


# --- which forwards are known -----------------------------------------------------------------------------------------


class Renamed(BasicBlock):
    def forward(self, x):  # type: ignore[no-untyped-def]  # as before torchvision 0.3, without annotations
        """The same."""
        residual = x
        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)
        out = self.conv2(out)
        out = self.bn2(out)
        if self.downsample is not None:
            residual = self.downsample(x)
        out += residual  # in place
        out = self.relu(out)
        return out  # noqa: RET504


class TwoNames(BasicBlock):
    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)
        out = self.conv2(out)
        out = self.bn2(out)
        if self.downsample is not None:
            residual = self.downsample(x)  # noqa: F841
        out += identity
        out = self.relu(out)
        return out  # noqa: RET504


class OtherOrder(BasicBlock):
    def forward(self, x: Tensor) -> Tensor:
        out = self.bn1(self.conv1(x))
        return self.relu(self.bn2(self.conv2(out)) + x)


class Decorated(BasicBlock):
    forward = torch.no_grad()(BasicBlock.forward)


class Scripted(BasicBlock):
    exec(
        "def forward(self, x):\n    return self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))"
    )  # without a source


@pytest.mark.parametrize(
    ("kind", "known"),
    [(BasicBlock, True), (Renamed, True), (TwoNames, False), (OtherOrder, False), (Decorated, False),
     (Scripted, False)],
)  # fmt: skip
def test_a_block_is_known_by_its_forward(kind: Any, known: bool) -> None:
    model = kind(3, 3)
    ours = converted(model)
    assert operations(ours)["bn2"] == (FUSED_ADD if known else "batch norm")
    assert isinstance(ours, kind)
    assert type(ours).__name__ == kind.__name__
    assert inspect.signature(ours.forward) == inspect.signature(model.forward) or kind is not Scripted
    torch.testing.assert_close(ours(IMAGES), model(IMAGES))


def test_an_activation_after_an_inner_sequential_is_fused_too() -> None:
    inner = nn.Sequential(nn.Sequential(conv(3, 3), nn.BatchNorm2d(3), nn.ReLU()), nn.BatchNorm2d(3))
    model: Any = nn.Sequential(inner, nn.SiLU())
    ours = converted(model)
    assert operations(ours) == {"0.0.1": "batch norm + relu", "0.1": "batch norm + silu"}
    same(model, ours, IMAGES)
    for one in (model, ours):
        one[0][0][2] = nn.Tanh()
    torch.testing.assert_close(ours(IMAGES), model(IMAGES))
    for one in (model, ours):
        one[0].append(nn.Tanh())
    torch.testing.assert_close(ours(IMAGES), model(IMAGES))


# --- objects with a class made for them -------------------------------------------------------------------------------


def test_a_slice_of_a_fused_sequential_computes_the_same() -> None:
    model: Any = mlp().eval()
    ours = converted(model)
    for part, x in ((slice(2), numbers(4, 6)), (slice(1, 3), numbers(4, 8))):
        torch.testing.assert_close(ours[part](x), model[part](x))


def test_a_subclass_of_sequential_keeps_its_class_and_constructor() -> None:
    ours: Any = converted(ConvNormActivation(3, 3, nn.ReLU))
    assert operations(ours) == {"1": "batch norm + relu"}
    assert isinstance(ours, ConvNormActivation)
    assert type(ours)(3, 5, nn.SiLU)(IMAGES).shape == (4, 5, 8, 8)


def test_a_subclass_of_sequential_with_an_order_of_its_own_keeps_it() -> None:
    class Reversed(nn.Sequential):
        def __iter__(self) -> Iterator[nn.Module]:
            return reversed(list(self._modules.values()))

    model = Reversed(nn.ReLU(), nn.BatchNorm2d(3), conv(3, 3))
    ours = converted(model)
    assert operations(ours) == {"1": "batch norm + relu"}
    same(model, ours, IMAGES)
    same(nn.Sequential(model), converted(nn.Sequential(model)), IMAGES)


def test_an_object_made_without_its_constructor_keeps_the_fused_forward() -> None:
    model: Any = converted(small_resnet()).eval()
    replica = model._replicate_for_data_parallel()  # what nn.DataParallel does for each device
    torch.testing.assert_close(replica(IMAGES), model(IMAGES))


def test_a_class_with_its_own_way_of_being_pickled_keeps_it() -> None:
    ours = converted(Restored(3, 3))
    other = pickle.loads(pickle.dumps(ours))
    assert type(other) is type(ours)
    assert not hasattr(other, "unpicklable")
    torch.testing.assert_close(other(IMAGES), ours(IMAGES))


class Restored(BasicBlock):
    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "unpicklable"}

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.unpicklable = lambda: None


def test_a_parametrization_of_a_block_may_come_and_go() -> None:
    model: Any = converted(small_resnet())
    expected = model.eval()(IMAGES)
    first = model.layer1[0].conv1
    parametrize.register_parametrization(first, "weight", nn.Identity())
    torch.testing.assert_close(copy.deepcopy(model)(IMAGES), expected)
    parametrize.remove_parametrizations(first, "weight")
    torch.testing.assert_close(model(IMAGES), expected)


class Sharded(BasicBlock):
    """A class made as FSDP2 makes them: its objects are those of the class below it."""

    def __new__(cls, *args: Any) -> Any:
        return cls.__mro__[1](*args)


def test_a_class_that_makes_its_objects_in_its_own_way_is_left() -> None:
    model = BasicBlock(3, 3)
    model.__class__ = Sharded
    assert operations(convert(model, SEAM)) == {"bn1": "batch norm", "bn2": "batch norm"}
    assert type(model) is Sharded


class Scaled(BasicBlock):
    def __init__(self) -> None:
        super().__init__(3, 3)
        self.scale = nn.Parameter(torch.ones(3))


def test_a_parametrization_of_the_block_itself_may_come_before_or_after() -> None:
    before = Scaled()
    parametrize.register_parametrization(before, "scale", nn.Identity())
    assert operations(convert(before, SEAM))["bn2"] == "batch norm"
    parametrize.remove_parametrizations(before, "scale")
    assert type(before) is Scaled
    after = convert(Scaled(), SEAM)
    parametrize.register_parametrization(after, "scale", nn.Identity())
    assert operations(convert(after, SEAM))["bn2"] == FUSED_ADD  # whose forward is still the fused one
    parametrize.remove_parametrizations(after, "scale")
    model = Scaled()
    model.load_state_dict(after.state_dict())
    same(model, after, IMAGES)


def test_fx_traces_a_converted_model_when_its_norms_are_leaves() -> None:
    ours = converted(small_resnet()).eval()
    traced = fx.GraphModule(ours, LeafNorms().trace(ours))
    torch.testing.assert_close(traced(IMAGES), ours(IMAGES))


# --- hooks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trace", [False, True])
def test_hooks_on_blocks_layers_and_convolutions_still_fire(trace: bool) -> None:
    model = ResNet(Bottleneck, (2, 1))
    fired = []
    for name, module in model.named_modules():
        if isinstance(module, Bottleneck | nn.Sequential | nn.Conv2d):
            module.register_forward_hook(lambda module, inputs, output, name=name: fired.append(name))
    model(IMAGES)
    expected, fired[:] = list(fired), []
    convert(model, SEAM, trace=trace)(IMAGES)
    assert fired == expected
    assert operations(model)["layer1.1.bn3"] == FUSED_ADD


@pytest.mark.parametrize(
    ("place", "why"),
    [(1, "it has hooks, which must see its own output"), (2, "what follows is 2 (ReLU), which has hooks")],
)
def test_a_norm_or_an_activation_with_hooks_is_not_fused(place: int, why: str) -> None:
    model = mlp()
    seen: list[Tensor] = []
    model[place].register_forward_hook(lambda module, inputs, output: seen.append(output if place == 1 else inputs[0]))
    convert(model, SEAM)(numbers(4, 6))
    assert (seen[0] < 0).any()
    assert why in reason(model, "1")


def test_a_sequential_with_hooks_is_not_opened() -> None:
    model = residual()
    fired = []
    model.body.register_forward_hook(lambda *_: fired.append(1))
    convert(model, SEAM)(IMAGES)
    assert fired
    assert operations(model)["body.3"] == "batch norm"
    assert reason(model, "body.3") == "nothing follows it here"


def test_a_hook_on_all_modules_sees_each_of_them() -> None:
    model = converted(mlp())
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, inputs, output: seen.append(type(module)))
    try:
        model(numbers(4, 6))
    finally:
        handle.remove()
    assert nn.ReLU in seen
    assert nn.SiLU in seen
