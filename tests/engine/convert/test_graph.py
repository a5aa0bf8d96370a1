"""Graphs of whole models: what is fused, what is refused, and what is changed afterwards."""

from __future__ import annotations

import copy
import operator
import pickle
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from bncli.engine.convert import convert
from bncli.engine.models.norms import BatchNorm2d
from bncli.errors import UsageError
from tests.engine.convert.checks import (
    CHANGES,
    FUSED_ADD,
    SEAM,
    LeafNorms,
    converted,
    fused,
    operations,
    reason,
    report,
    same,
)
from tests.engine.convert.models import IMAGES, BasicBlock, conv, small_resnet


class One(nn.Module):
    """A forward handed in, over one norm, a second norm, and an activation."""

    def __init__(self, run: Callable[..., Tensor]) -> None:
        super().__init__()
        self.norm, self.other, self.relu, self.drop = (
            nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.ReLU(), nn.Dropout(0.5))  # fmt: skip
        self.scale = nn.Parameter(torch.full((3, 1, 1), 0.7))
        self.register_buffer("offset", torch.full((3, 1, 1), 0.3))
        self.outputs: list[Tensor] = []
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def traced(model: nn.Module) -> Any:
    return converted(model, trace=True)


# --- what is fused ----------------------------------------------------------------------------------------------------


def add_in_place(m: Any, x: Tensor) -> Tensor:
    y = m.norm(x)
    y += x
    return y.relu_()


def add_in_place_of_a_later_norm(m: Any, x: Tensor) -> Tensor:
    y = m.other(x)
    y += m.norm(x)
    return y.relu_()


def add_into_the_residual(m: Any, x: Tensor) -> Tensor:
    y = x.clone().flatten(1)
    z = y.view_as(x)
    z += m.norm(x)
    return m.relu(z) + y.view_as(x)


def write_before_the_add(m: Any, x: Tensor) -> Tensor:
    r = x * 1
    y = m.norm(x)
    r.flatten(1).add_(1)
    return m.relu(y + r)


def twice_with_a_late_residual(m: Any, x: Tensor) -> Tensor:
    y = m.norm(x)
    r = torch.tanh(m.norm(2 * x))
    return m.relu(y + r)


def used_twice(m: Any, x: Tensor) -> Tensor:
    y = m.norm(x)
    return m.relu(y) + y


def shape_read(m: Any, x: Tensor) -> Tensor:
    y = m.norm(x)
    return m.relu(y).reshape(y.shape[0], -1)


FORWARDS: dict[str, tuple[Callable[..., Tensor], str, str | None]] = {
    "relu": (lambda m, x: m.relu(m.norm(x)), "batch norm + relu", None),
    "silu": (lambda m, x: F.silu(m.norm(x)), "batch norm + silu", None),
    "leaky relu": (lambda m, x: F.leaky_relu(m.norm(x)), "batch norm + leaky_relu", None),
    "method": (lambda m, x: m.norm(x).relu(), "batch norm + relu", None),
    "method in place": (lambda m, x: m.norm(x).relu_(), "batch norm + relu", None),
    "add method": (lambda m, x: m.norm(x).add(x).relu(), FUSED_ADD, None),
    "add method in place": (lambda m, x: m.norm(x).add_(x).relu(), FUSED_ADD, None),
    "operator": (lambda m, x: torch.relu(operator.add(x, m.norm(x))), FUSED_ADD, None),
    "add alone": (lambda m, x: 3 * (m.norm(x) + x), "batch norm + residual add", "what follows is mul"),
    "add in place": (add_in_place, FUSED_ADD, None),
    "in place of a later norm": (add_in_place_of_a_later_norm, FUSED_ADD, None),
    "two norms": (lambda m, x: m.relu(m.other(2 * x) + m.norm(x)), FUSED_ADD, None),
    "twice": (lambda m, x: m.relu(m.norm(F.silu(m.norm(x)))), "batch norm + silu, batch norm + relu", None),
    "a broadcast residual": (lambda m, x: m.relu(m.norm(x) + x[:1]), "batch norm", "what follows is add"),
    "broadcast before": (lambda m, x: m.relu(x[:1] + m.norm(x)), FUSED_ADD, None),
    "a number before": (lambda m, x: m.relu(x.size(0) + m.norm(x)), FUSED_ADD, None),
    "other slope": (lambda m, x: F.leaky_relu(m.norm(x), 0.2), "batch norm", "what follows is leaky_relu"),
    "same slope": (lambda m, x: F.leaky_relu(m.norm(x), negative_slope=0.01), "batch norm + leaky_relu", None),
    "gelu": (lambda m, x: F.gelu(m.norm(x)), "batch norm", "what follows is gelu"),
    "used twice": (used_twice, "batch norm", "what follows is relu (ReLU) and what follows is add"),
    "its shape": (shape_read, "batch norm", "what follows is getattr_1"),
    "alpha": (lambda m, x: torch.add(x, m.norm(x), alpha=2), "batch norm", "what follows is add"),
    "a constant": (lambda m, x: m.relu(m.norm(x) + 1.5), "batch norm", "what follows is add"),
    "a buffer": (lambda m, x: m.offset + m.norm(x), "batch norm + residual add", "the end of the model"),
    "itself": (lambda m, x: (lambda y: y + y)(m.norm(x)), "batch norm", "what follows is add"),
    "into the residual": (add_into_the_residual, "batch norm", "what follows is y += x"),
    "a write before the add": (write_before_the_add, "batch norm", "what follows is add"),
    "late residual": (twice_with_a_late_residual, "batch norm", "what follows is add"),
    "a size": (lambda m, x: F.avg_pool2d(m.relu(m.norm(x)), x.size()[2:]), "batch norm + relu", None),
    "dropout module": (lambda m, x: m.drop(m.relu(m.norm(x))), "batch norm + relu", None),
    "its argument by name": (lambda m, x: m.relu(m.norm(input=x)), "batch norm", "called with more than its input"),
}  # fmt: skip


@pytest.mark.parametrize(("run", "operation", "why"), FORWARDS.values(), ids=FORWARDS)
def test_each_forward_is_fused_or_left_with_the_reason_and_computes_the_same(
    run: Callable[..., Tensor], operation: str, why: str | None
) -> None:
    model = One(run)
    ours = traced(model)
    assert operations(ours)["norm"] == operation
    if why is not None:
        assert why in reason(ours, "norm")
    same(model, ours, IMAGES.clone())
    same(model, pickle.loads(pickle.dumps(ours)), IMAGES.clone(), steps=0)


def test_writes_by_augmented_assignment_reach_every_name_of_the_tensor() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        size = height = x.size(2)
        height //= 2
        y = z = m.relu(m.norm(x)) * 1
        z += 1
        z /= height
        return y[:, :, height - 1 : size - 1]

    model = One(run)
    ours = traced(model)
    assert operations(ours)["norm"] == "batch norm + relu"
    same(model, ours, IMAGES)
    same(model, pickle.loads(pickle.dumps(ours)), IMAGES)


def test_an_add_has_the_layout_of_its_first_operand() -> None:
    model = One(lambda m, x: x.contiguous(memory_format=torch.channels_last) + m.norm(x))
    ours = traced(model)
    assert operations(ours)["norm"] == "batch norm + residual add"
    assert ours(IMAGES).stride() == model(IMAGES).stride() == (192, 1, 24, 3)


def test_an_identity_between_is_passed_through() -> None:
    model = nn.Sequential(conv(3, 3), nn.BatchNorm2d(3), nn.Identity(), nn.ReLU())
    assert operations(traced(model)) == {"1": "batch norm + relu"}
    assert operations(converted(model)) == {"1": "batch norm"}


def test_a_norm_that_the_graph_does_not_call_is_reported_and_keeps_its_place_in_the_state() -> None:
    model = One(lambda m, x: m.relu(m.norm(x)))
    ours = traced(model)
    assert reason(ours, "other") == "the graph does not call it"
    assert list(ours.state_dict()) == list(model.state_dict())


def test_a_module_with_hooks_stays_one_call_and_is_fused_inside() -> None:
    model: Any = small_resnet()
    seen: list[str] = []
    model.layer1[1].register_forward_hook(lambda *_: seen.append("block"))
    model.relu.register_forward_hook(lambda *_: seen.append("relu"))
    ours = convert(copy.deepcopy(model), SEAM, trace=True)
    assert fused(ours) == fused(traced(small_resnet())) - 1
    assert operations(ours)["layer1.1.bn2"] == FUSED_ADD
    assert reason(ours, "bn1") == "what follows is relu (ReLU), which has hooks"
    ours(IMAGES)
    assert seen == ["relu", "block"]


def test_the_graph_shares_the_models_modules_and_can_be_traced_again() -> None:
    model: Any = small_resnet()
    ours: Any = convert(model, SEAM, trace=True)
    assert isinstance(ours, fx.GraphModule)
    assert type(ours).__name__ == "ResNet"
    assert isinstance(model.bn1, BatchNorm2d)
    assert ours.bn1 is model.bn1
    assert ours.get_parameter("fc.bias") is model.fc.bias
    assert not hasattr(ours, "features")  # methods other than forward are gone
    again = fx.GraphModule(ours, LeafNorms().trace(ours)).eval()
    torch.testing.assert_close(again(IMAGES), model.eval()(IMAGES))


def test_a_graph_is_not_converted_again_but_its_model_is() -> None:
    model = small_resnet()
    ours = convert(model, SEAM, trace=True)
    for graph in (ours, nn.Sequential(ours)):
        for options in ({}, {"fuse": False}, {"trace": True}):
            with pytest.raises(UsageError, match="convert the model itself again"):
                convert(graph, "native", **options)
    assert fused(convert(model, "native", trace=True)) == fused(ours)


# --- changes afterwards -----------------------------------------------------------------------------------------------


class Leaky(nn.Module):
    def __init__(self, adds: bool) -> None:
        super().__init__()
        self.conv, self.norm, self.act, self.adds = conv(3, 3), nn.BatchNorm2d(3), nn.LeakyReLU(), adds

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        if self.adds:
            y += x
        return self.act(y)


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_module_of_the_graph_that_is_changed_has_its_effect(
    change: Callable[[Any], Any], copied: bool, adds: bool
) -> None:
    model = Leaky(adds)
    ours = traced(model)
    assert fused(ours) == 1
    if copied:
        ours = pickle.loads(pickle.dumps(ours))
    change(model), change(ours)
    torch.testing.assert_close(ours(IMAGES), model(IMAGES))


# --- what is refused --------------------------------------------------------------------------------------------------


@torch.no_grad()
def decorated(m: Any, x: Tensor) -> Tensor:
    return m.relu(m.norm(x))


def under_autocast(m: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        x = m.norm(x)
    return m.relu(x)


def remember(m: Any, x: Tensor) -> Tensor:
    m.seen = m.relu(m.norm(x))
    return m.seen


def remember_in_a_list(m: Any, x: Tensor) -> Tensor:
    m.outputs.append(m.relu(m.norm(x)))
    return m.outputs[-1]


def under_checkpoint(m: Any, x: Tensor) -> Tensor:
    with saved_tensors_hooks(lambda x: x, lambda x: x):  # what torch.utils.checkpoint does
        return m.relu(m.norm(x))


def assign_an_item(m: Any, x: Tensor) -> Tensor:
    y = m.relu(m.norm(x))
    y[0] = 0
    return y


CONSTANT = torch.ones(3, 1, 1)

REFUSED: dict[str, tuple[Callable[..., Tensor], str]] = {
    "branch": (lambda m, x: m.relu(m.norm(x)) if x.sum() > 0 else m.norm(x), "control flow"),
    "training": (lambda m, x: F.dropout(m.relu(m.norm(x)), training=m.training), "in training than in evaluation"),
    "other way": (lambda m, x: m.relu(m.norm(x)) if m.training else m.norm(x), "in training than in evaluation"),
    "the norm's flag": (lambda m, x: m.norm(x) if m.norm.training else x, "in training than in evaluation"),
    "decorated": (decorated, "no_grad, autocast, checkpoint or the like"),
    "autocast": (under_autocast, "no_grad, autocast, checkpoint or the like"),
    "random": (lambda m, x: m.relu(m.norm(x)) if random.random() < 2 else m.norm(x), "draws random numbers"),
    "torch.rand": (lambda m, x: m.relu(m.norm(x)) * torch.rand(1), "draws random numbers"),
    "a constant": (lambda m, x: m.relu(m.norm(x)) * CONSTANT, "a tensor that is no parameter or buffer"),
    "an attribute": (remember, "changes the attribute seen"),
    "a list": (remember_in_a_list, "changes the attribute outputs"),
    "checkpoint": (under_checkpoint, "no_grad, autocast, checkpoint or the like"),
    "a type": (lambda m, x: m.norm(x if isinstance(x, Tensor) else x[0]), "asks whether a value is a tensor"),
    "is_tensor": (lambda m, x: m.norm(x if torch.is_tensor(x) else x[0]), "asks whether a value is a tensor"),
    "an item": (assign_an_item, "TypeError"),
    "a loop": (lambda m, x: torch.stack([m.norm(each[None]) for each in x]), "iterated"),
}  # fmt: skip


@pytest.mark.parametrize(("run", "why"), REFUSED.values(), ids=REFUSED)
def test_what_a_graph_cannot_hold_is_refused_with_the_reason_and_what_to_do(
    run: Callable[..., Tensor], why: str
) -> None:
    model = nn.Sequential(conv(3, 3), One(run))
    attributes = {module: dict(vars(module)) for module in model.modules()}
    random_state = torch.get_rng_state()
    with pytest.raises(UsageError, match=r"torch\.fx cannot hold the forward of this model") as caught:
        convert(model, SEAM, trace=True)
    assert why in str(caught.value)
    assert "leave trace out" in str(caught.value)
    assert type(model[1].norm) is nn.BatchNorm2d
    assert all(vars(module) == before for module, before in attributes.items())
    assert model[1].outputs == []
    torch.set_rng_state(random_state)


def test_a_model_with_hooks_of_its_own_is_refused() -> None:
    model = small_resnet()
    model.register_forward_hook(lambda *_: None)
    with pytest.raises(UsageError, match="the model has hooks"):
        convert(model, SEAM, trace=True)


def test_a_refusal_leaves_a_converted_model_as_it_was() -> None:
    model: Any = convert(nn.Sequential(nn.Sequential(conv(3, 3), nn.BatchNorm2d(3), nn.ReLU()), One(decorated)), SEAM)
    kinds, before = [type(module) for module in model.modules()], report(model)
    with pytest.raises(UsageError, match="no_grad"):
        convert(model, "native", trace=True)
    assert [type(module) for module in model.modules()] == kinds
    assert report(model) is before
    assert model[0][1].kernel is SEAM


class Stateful(nn.Sequential):
    def get_extra_state(self) -> int:
        return 1

    def set_extra_state(self, state: int) -> None: ...


def test_extra_state_is_kept_of_parts_and_refused_of_the_model() -> None:
    model = Stateful(conv(3, 3), nn.BatchNorm2d(3), nn.ReLU())
    outer = nn.Sequential(model)
    ours = traced(outer)
    for copied in (ours, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert list(copied.state_dict()) == list(outer.state_dict())
    with pytest.raises(UsageError, match="its state_dict has more"):
        traced(model)


class Options(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = BasicBlock(3, 3)

    def forward(self, x: Tensor, scale: float = 2.0) -> Tensor:
        return self.block(x) * scale


class Optional(Options):
    def forward(self, x: Tensor, scale: float | None = None) -> Tensor:
        return self.block(x) if scale is None else self.block(x) * scale


class Flagged(Options):
    def forward(self, x: Tensor, scale: float = True) -> Tensor:
        return self.block(x) * 2 if scale else self.block(x)


class AnyNumber(Options):
    def forward(self, *xs: Tensor, scale: float = 2.0) -> Tensor:  # type: ignore[override]
        return self.block(xs[0]) * scale


def test_an_argument_keeps_its_default_unless_it_may_decide_what_is_computed() -> None:
    model = Options().eval()
    ours = traced(model)
    torch.testing.assert_close(ours(IMAGES), model(IMAGES))
    torch.testing.assert_close(ours(IMAGES, scale=3.0), model(IMAGES, scale=3.0))
    for other, name in ((Optional(), "scale is None"), (Flagged(), "scale is True")):
        with pytest.raises(UsageError, match=f"its argument {name} by default"):
            traced(other)
    with pytest.raises(UsageError, match="take its arguments in another order"):
        traced(AnyNumber())


def test_random_layers_and_flags_inside_modules_without_norms_stay_their_own() -> None:
    class Noise(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.rand(1) if self.training and random.random() < 2 else x

    model = nn.Sequential(conv(3, 3), nn.BatchNorm2d(3), nn.ReLU(), Noise())
    ours = traced(model)
    same(model, ours, IMAGES)
    assert not torch.equal(ours(IMAGES), ours(IMAGES))
