"""Folding: the same outputs as the evaluation forward, and what is left alone, with the reason."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import bncli
from bncli.engine.convert import convert
from bncli.engine.convert.fold import Folding, fold
from bncli.engine.models import build
from bncli.errors import UsageError
from tests.conftest import tiny
from tests.engine.convert.checks import SEAM
from tests.engine.convert.models import IMAGES, MODELS, ConvNormActivation, EfficientNet, MobileNetV2, numbers


def randomized(model: nn.Module) -> nn.Module:
    """The model in float64 with weights, biases, gammas, betas and running statistics that are none of the defaults."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in (*model.double().named_parameters(), *model.named_buffers()):
            if name.endswith("running_var"):
                tensor.uniform_(0.2, 4, generator=generator)
            elif tensor.is_floating_point():
                tensor.normal_(0, 0.4, generator=generator)
    return model


def check(model: nn.Module, x: Tensor) -> nn.Module:
    """The folded model, whose output is that of the model in evaluation mode."""
    model, x = randomized(model), x.double()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    folded = fold(model)
    with torch.no_grad():
        expected, found = copy.deepcopy(model).eval()(x), folded(x)
    assert float((found - expected).norm() / expected.norm()) < 1e-12
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module.training for module in folded.modules())
    return folded


def report(model: nn.Module) -> Folding:
    found = model.bncli_folding
    assert isinstance(found, Folding)
    return found


def reasons(model: nn.Module) -> dict[str, str]:
    return {norm.name: norm.reason for norm in report(fold(randomized(model))).norms if norm.reason is not None}


# --- what is folded -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "norms"), [("mlp", 3), ("cnn", 2), ("resnet", 21), ("inception", 69)])
@pytest.mark.parametrize("kernel", ["native", "fused"])
def test_every_norm_of_a_recipes_model_is_folded(kind: str, norms: int, kernel: str) -> None:
    """Also after `convert`, where the norms have taken along activations and residuals."""
    model = {"kind": kind, "depth": 20} if kind == "resnet" else {"kind": kind}
    net = build(tiny(model=model), (3, 32, 32), 7)
    if kernel == "fused":
        convert(net, SEAM)
    folded = check(net, numbers(2, 3, 32, 32))
    assert sum(norm.into is not None for norm in report(folded).norms) == norms
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in folded.modules())
    assert not hasattr(folded, "bncli_conversion")


@pytest.mark.parametrize("trace", [None, False, True])
@pytest.mark.parametrize("name", MODELS)
def test_a_users_model_is_folded_also_after_convert(name: str, trace: bool | None) -> None:
    make, x = MODELS[name]
    net = make()
    if trace is not None:
        try:
            net = convert(net, SEAM, trace=trace)
        except UsageError:
            pytest.skip("convert cannot trace it")
    folded = check(net, x)
    assert any(norm.into for norm in report(folded).norms) or name == "dense net"


@pytest.mark.parametrize("make", [MobileNetV2, EfficientNet])
def test_a_whole_net_of_torchvision_is_folded(make: Callable[[], nn.Module]) -> None:
    assert all(norm.into for norm in report(check(make(), numbers(1, 3, 32, 32))).norms)


CONVS = [
    (nn.Conv1d(4, 6, 3, groups=2), nn.BatchNorm1d(6), (4, 9)),
    (nn.Conv2d(4, 6, 3, stride=2, padding=1, padding_mode="reflect", bias=False), nn.BatchNorm2d(6), (4, 9, 8)),
    (nn.Conv3d(4, 6, 2, dilation=2), nn.BatchNorm3d(6), (4, 5, 5, 5)),
    (nn.ConvTranspose1d(4, 6, 3, stride=2), nn.BatchNorm1d(6), (4, 9)),
    (nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False), nn.BatchNorm2d(6), (4, 5, 5)),
    (nn.ConvTranspose3d(6, 6, 2, groups=3), nn.BatchNorm3d(6), (6, 3, 3, 3)),
    (nn.Linear(4, 6), nn.BatchNorm1d(6), (4,)),
    (nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6, affine=False), (4,)),
    (nn.Linear(4, 6), nn.BatchNorm1d(6, eps=0.5, momentum=None), (4,)),
    (nn.Linear(4, 6), bncli.BatchNorm(6, activation="silu"), (4,)),
    (nn.Conv2d(4, 6, 1), nn.SyncBatchNorm(6), (4, 3, 3)),
]


@pytest.mark.parametrize(("layer", "norm", "shape"), CONVS, ids=str)
def test_every_layer_and_norm_is_folded(layer: nn.Module, norm: nn.Module, shape: tuple[int, ...]) -> None:
    folded = check(nn.Sequential(layer, norm), numbers(3, *shape))
    assert str(report(folded)) == "1 of 1 batch norms folded\nbatch norm  folded into  why not\n1           0"
    assert [name for name, _ in folded.named_parameters()] == ["0.weight", "0.bias"]


class InTheCall(nn.Module):
    """A norm of bncli that is called with a residual and an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = bncli.BatchNorm1d(5), nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.linear(x), residual=x, activation="leaky_relu")
        return y


def test_the_activation_and_the_residual_of_a_call_stay() -> None:
    """The norm is registered before its layer: what counts is the data flow."""
    assert report(check(InTheCall(), numbers(4, 5))).norms[0].into == "linear"


def test_the_dtype_and_the_gradients_flag_of_a_weight_stay() -> None:
    net = nn.Sequential(nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6)).bfloat16()
    net[0].weight.requires_grad_(False)
    folded = fold(net)
    assert all(each.dtype == torch.bfloat16 and not each.requires_grad for each in folded.parameters())


def test_a_norm_with_two_names_is_replaced_under_both() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = self.second = nn.BatchNorm1d(5)
            self.linear = nn.Linear(5, 5)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.second(self.linear(x))
            return y

    assert report(check(Twice(), numbers(4, 5))).norms[0].into == "linear"


def test_a_compiled_or_frozen_model_is_folded_and_the_copy_can_be_pickled() -> None:
    net = MODELS["mlp"][0]()
    net.compile()
    folded = fold(randomized(net))
    again = pickle.loads(pickle.dumps(folded))
    x = numbers(3, 6).double()
    assert torch.equal(again(x), folded(x))
    wrapped: Any = torch.compile(net, backend="eager")
    assert torch.equal(fold(wrapped)(x), folded(x))


# --- what is left -------------------------------------------------------------------------------------------------


class Own(nn.Module):
    """A net with a layer, a norm and a second layer, whose forward is a function of the net and its input."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor], **modules: nn.Module) -> None:
        super().__init__()
        self.layer, self.norm, self.other = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)
        for name, module in modules.items():
            setattr(self, name, module)
        self.way = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.way(self, x)


def tied() -> nn.Module:
    net = Own(lambda own, x: own.other(own.norm(own.layer(x))))
    net.other.weight = net.layer.weight
    return net


def hooked() -> nn.Module:
    net = Own(lambda own, x: own.norm(own.layer(x)))
    net.layer.register_forward_hook(lambda module, inputs, output: output + 1)
    return net


LEFT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a layer that is called twice": (
        lambda: Own(lambda own, x: own.norm(own.layer(own.layer(x)))),
        "layer, which comes before, or a weight of it is used more than once",
    ),
    "a norm that is called twice": (
        lambda: Own(lambda own, x: own.norm(own.other(own.norm(own.layer(x))))),
        "it is used more than once",
    ),
    "tied weights": (tied, "layer, which comes before, or a weight of it is used more than once"),
    "a weight that is read": (
        lambda: Own(lambda own, x: F.linear(own.norm(own.layer(x)), own.layer.weight)),
        "layer, which comes before, or a weight of it is used more than once",
    ),
    "a statistic that is read": (
        lambda: Own(lambda own, x: own.norm(own.layer(x)) + own.norm.running_mean),
        "it is used more than once",
    ),
    "an output that is used elsewhere": (
        lambda: Own(lambda own, x: own.norm(y := own.layer(x)) + y),
        "the output of layer, which comes before, is used elsewhere too",
    ),
    "an activation before the norm": (
        lambda: Own(lambda own, x: own.norm(torch.relu(own.layer(x)))),
        "what comes before is relu, no linear or convolution layer",
    ),
    "the input": (
        lambda: Own(lambda own, x: own.layer(own.norm(x))),
        "what comes before is x, no linear or convolution layer",
    ),
    "a parametrized layer": (
        lambda: Own(lambda own, x: own.norm(own.layer(x)), layer=parametrizations.weight_norm(nn.Linear(4, 4))),
        "what comes before is layer (ParametrizedLinear), no linear or convolution layer",
    ),
    "hooks": (hooked, "what comes before is layer, which has hooks or a forward of its own"),
    "no running statistics": (
        lambda: Own(lambda own, x: own.norm(own.layer(x)), norm=nn.BatchNorm1d(4, track_running_stats=False)),
        "it has no running statistics: in evaluation too it normalizes by the batch",
    ),
    "other channels": (
        lambda: Own(lambda own, x: own.norm(own.layer(x)), norm=nn.BatchNorm1d(3)),
        "its channels are not the outputs of layer, which comes before",
    ),
    "other dimensions": (
        lambda: Own(lambda own, x: own.norm(own.layer(x)), norm=nn.BatchNorm2d(4)),
        "its channels are not the outputs of layer, which comes before",
    ),
    "a norm that is not called": (
        lambda: Own(lambda own, x: own.layer(x)),
        "the evaluation forward does not call it",
    ),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_cannot_be_folded_is_left_with_the_reason(name: str) -> None:
    make, reason = LEFT[name]
    net = make()
    assert reasons(net) == {"norm": reason}
    if not name.startswith("other"):
        check(net, numbers(3, 4))


def test_a_norm_whose_channels_turn_out_to_be_positions_is_refused_when_it_is_called() -> None:
    """(N, L, C) with L = C: batch norm normalizes the positions, which no shape of the modules shows."""
    folded = fold(nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5)))
    assert folded(torch.ones(2, 5)).shape == (2, 5)
    with pytest.raises(ValueError, match="folded for inputs of 2 dimensions and meets 3"):
        folded(torch.ones(2, 5, 5))


def test_a_layer_inside_a_part_that_is_called_as_a_whole_counts() -> None:
    net = Own(lambda own, x: own.norm(own.layer(x)) + own.head(x))
    net.head = nn.Sequential(net.layer, nn.ReLU())
    assert reasons(net) == {"norm": "layer, which comes before, or a weight of it is used more than once"}


def test_another_way_in_training_does_not_matter_and_what_fx_cannot_hold_is_refused() -> None:
    check(Own(lambda own, x: own.norm(own.layer(x)) if not own.training else own.other(x)), numbers(3, 4))
    with pytest.raises(UsageError, match=r"torch\.fx cannot hold .*; fold has to know which layer") as refused:
        fold(Own(lambda own, x: own.norm(own.layer(x)) if x.sum() > 0 else x))
    assert refused.value.field == "model"


@pytest.mark.parametrize(
    ("asks", "why"),
    [
        (lambda own: isinstance(own.norm, nn.BatchNorm1d), "asks for what fold changes"),
        (lambda own: own.layer.bias is None, "asks for what fold changes"),
        (lambda own: own.norm.num_features == 4, "no attribute 'num_features'"),
    ],
)
def test_a_forward_that_would_notice_is_refused(asks: Callable[[Any], bool], why: str) -> None:
    with pytest.raises(UsageError, match=why):
        fold(Own(lambda own, x: own.norm(own.layer(x)) if asks(own) else x, layer=nn.Linear(4, 4, bias=False)))


def test_a_layer_at_the_end_of_a_sequential_is_found() -> None:
    net = nn.Sequential(nn.Sequential(nn.Linear(5, 4), nn.Sequential(nn.ReLU(), nn.Linear(4, 5))), nn.BatchNorm1d(5))
    assert report(check(net, numbers(3, 5))).norms[0].into == "0.1.1"


def test_a_block_that_keeps_an_activation_between_folds_what_it_can() -> None:
    folded = check(nn.Sequential(ConvNormActivation(3, 4, nn.ReLU), nn.BatchNorm2d(4)), IMAGES)
    assert [norm.into for norm in report(folded).norms] == ["0.0", None]
