"""Models from recipes, and that arms begin alike."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from bncli.engine.models import Residual, build
from bncli.engine.models.whitening import Whitening
from bncli.errors import RecipeError
from bncli.recipe.sections import Recipe
from tests.conftest import tiny
from tests.engine.conftest import OwnRecipe

MODELS: dict[str, dict[str, Any]] = {
    "mlp": {"kind": "mlp"},
    "cnn": {"kind": "cnn", "channels": [4, 8]},
    "resnet": {"kind": "resnet", "depth": 20},
}


@pytest.mark.parametrize(
    "norm", ["none", "batch", "layer", "group", "instance", "whiten", "iternorm", "noisy", "rms", "dyt"]
)
@pytest.mark.parametrize("activation", ["sigmoid", "tanh", "relu", "leaky_relu", "gelu"])
@pytest.mark.parametrize("model", MODELS)
def test_every_model_takes_images_and_every_norm_and_activation(model: str, norm: str, activation: str) -> None:
    recipe = tiny(model={**MODELS[model], "activation": activation}, norm={"kind": norm})
    y = build(recipe, (1, 8, 8), 5)(torch.randn(6, 1, 8, 8))
    assert y.shape == (6, 5)
    assert torch.isfinite(y).all()


@pytest.mark.parametrize("depth", [18, 34, 50])
def test_imagenet_resnets_take_large_images(depth: int) -> None:
    net = build(tiny(model={"kind": "resnet", "depth": depth}), (3, 64, 64), 7)
    assert net(torch.randn(2, 3, 64, 64)).shape == (2, 7)


@pytest.mark.parametrize("norm", ["none", "batch"])
def test_inception_trains_on_small_images(norm: str) -> None:
    net = build(tiny(model={"kind": "inception"}, norm={"kind": norm}), (3, 64, 64), 7)
    y = net(torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    assert y.shape == (2, 7)
    y.square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in net.parameters())


def test_the_branches_of_inception_are_concatenated_along_the_channels() -> None:
    net = build(tiny(model={"kind": "inception"}, norm={"kind": "batch"}), (3, 64, 64), 7).eval()
    x = torch.randn(2, 192, 4, 4)
    module = net.get_submodule("inception3a")
    y = module(x)
    parts = dict(zip(["conv1x1", "conv3x3", "double3x3", "pool"], y.split([64, 64, 96, 32], dim=1), strict=True))
    for name, part in parts.items():
        assert torch.equal(module.get_submodule(name)(x), part)


def test_the_same_seed_gives_the_same_weights_in_every_arm_where_shapes_agree() -> None:
    plain, normed = (build(tiny(norm={"kind": kind}), (8,), 3).state_dict() for kind in ("none", "batch"))
    other = build(tiny(train={"seed": 1}), (8,), 3).state_dict()
    shared = [name for name in plain if name in normed]
    assert [name for name in shared if name.endswith("weight")] == ["hidden1.linear.weight", "output.weight"]
    assert all(torch.equal(plain[name], normed[name]) for name in shared)
    assert not torch.equal(other["output.weight"], plain["output.weight"])


def test_a_bias_before_batch_norm_is_left_out_since_it_is_dead() -> None:
    assert "hidden1.linear.bias" not in build(tiny(), (8,), 3).state_dict()
    assert "hidden1.linear.bias" in build(tiny(norm={"kind": "layer"}), (8,), 3).state_dict()


def test_a_whitening_norm_has_the_recipes_arguments_and_no_bias_before_it() -> None:
    norm = {"kind": "iternorm", "group_size": 2, "iterations": 3, "momentum": None, "eps": 0.01, "affine": False}
    found = build(tiny(norm=norm), (8,), 3)
    assert "hidden1.linear.bias" not in found.state_dict()
    module = next(each for each in found.modules() if isinstance(each, Whitening))
    given = (module.group_size, module.iterations, module.momentum, module.eps, module.weight)
    assert given == (2, 3, None, 0.01, None)


def test_the_norm_comes_before_or_after_the_activation_and_dropout_last() -> None:
    names = {}
    for position in ("before", "after"):
        model = {"kind": "mlp", "hidden": [16], "norm_position": position, "dropout": 0.3}
        hidden = build(tiny(model=model), (8,), 3).hidden1
        names[position] = [name for name, _ in hidden.named_children()]  # type: ignore[operator, union-attr]
        assert hidden.dropout.p == 0.3  # type: ignore[union-attr]
    assert names == {
        "before": ["linear", "norm", "activation", "dropout"],
        "after": ["linear", "activation", "norm", "dropout"],
    }
    cnn = build(tiny(model={"kind": "cnn", "channels": [4, 8], "dropout": 0.3}), (1, 8, 8), 3)
    assert sum(isinstance(module, nn.Dropout) for module in cnn.modules()) == 2
    without = build(tiny(model={"kind": "cnn"}), (1, 8, 8), 3)
    assert not any(isinstance(module, nn.Dropout) for module in without.modules())


def test_a_bias_is_kept_where_it_has_an_effect() -> None:
    alive = [
        build(tiny(norm={"kind": "batch", "backward": "ignore_statistics"}), (8,), 3),
        build(tiny(model={"kind": "mlp", "norm_position": "after"}), (8,), 3),
        *(build(tiny(norm={"kind": kind}), (8,), 3) for kind in ("rms", "dyt")),
        build(tiny(norm={"kind": "frozen", "after": 5}), (8,), 3),
    ]
    dead = [
        build(tiny(norm={"kind": "ghost", "size": 10}), (8,), 3),
        build(tiny(norm={"kind": "renorm", "warmup": 5}), (8,), 3),
        build(tiny(norm={"kind": "noisy"}), (8,), 3),
    ]
    assert all("hidden1.linear.bias" in model.state_dict() for model in alive)
    assert not any("hidden1.linear.bias" in model.state_dict() for model in dead)


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("depth", [20, 50])
def test_with_zero_gamma_each_block_starts_as_the_identity(depth: int, norm: str) -> None:
    model = build(
        tiny(model={"kind": "resnet", "depth": depth, "zero_gamma": True}, norm={"kind": norm}), (3, 16, 16), 5
    )
    blocks = [module for module in model.modules() if isinstance(module, Residual)]
    assert len(blocks) == {20: 9, 50: 16}[depth]
    for block in blocks:
        channels = next(module for module in block.body.modules() if isinstance(module, nn.Conv2d)).in_channels
        x = torch.rand(2, channels, 8, 8)  # not negative, as after a ReLU
        projected = torch.relu(block.shortcut(x))
        torch.testing.assert_close(block(x), projected, rtol=0, atol=0)
        assert len(list(block.shortcut.children())) > 0 or torch.equal(projected, x)
    plain = build(tiny(model={"kind": "resnet", "depth": depth}, norm={"kind": norm}), (3, 16, 16), 5)
    pairs = zip(model.parameters(), plain.parameters(), strict=True)
    assert sum(not torch.equal(one, other) for one, other in pairs) == len(blocks)


def built(recipe: Recipe) -> Any:
    return build(recipe, (8,), 3)


def test_the_users_own_model_is_called_with_shape_classes_and_norm(own_recipe: OwnRecipe) -> None:
    code = (
        "def make(shape, classes, norm, width):\n"
        "    return nn.Sequential(nn.Linear(shape[0], width), norm(width), nn.Linear(width, classes))"
    )
    assert built(own_recipe(code, "batch", {"width": 5}))(torch.randn(4, 8)).shape == (4, 3)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def made(shape, classes, norm): ...", "model.module: mine:make: module 'mine' has no attribute 'make'"),
        ("def make(shape): ...", r"mine:make raised TypeError: .*It is called with shape=\(8,\), classes=3, norm="),
        ("def make(shape, classes, norm): return 3", r"mine:make returned a int; expected a torch.nn.Module"),
    ],
)
def test_a_model_of_the_users_own_that_cannot_be_made_says_why(own_recipe: OwnRecipe, code: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        built(own_recipe(code))


# As bncli's own models: no bias in front of a norm. The output's bias is of the hidden layers' shape.
WITHOUT_DEAD_BIASES = """
def make(shape, classes, norm):
    layers, inputs = [], shape[0]
    for _ in range(3):
        layers += [nn.Linear(inputs, 16, bias=norm is None), *([norm(16)] if norm else []), nn.ReLU()]
        inputs = 16
    return nn.Sequential(*layers, nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, classes))
"""


def test_arms_of_a_model_of_the_users_own_begin_alike_also_without_a_bias(own_recipe: OwnRecipe) -> None:
    (plain, plain_after), (normed, normed_after), (other, _) = (
        (
            built(own_recipe(WITHOUT_DEAD_BIASES, norm, train={"seed": seed})),
            (torch.rand(1), np.random.rand(), random.random()),
        )
        for norm, seed in (("none", 0), ("batch", 0), ("none", 1))
    )
    layers = [[part for part in model.children() if isinstance(part, nn.Linear)] for model in (plain, normed, other)]
    for one, same, another in zip(*layers, strict=True):
        assert torch.equal(one.weight, same.weight)
        assert same.bias is None or torch.equal(one.bias, same.bias)
        assert not torch.equal(one.weight, another.weight)
    assert len({layer.weight.flatten()[0].item() for layer in layers[0]}) == 5
    assert plain_after == normed_after  # what dropout and the like draw


LAYER = "def make(shape, classes, norm):\n    layer = nn.Linear(8, 3)\n    {}\n    return layer"
SEVEN = torch.randn(3, 8, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("nn.init.zeros_(layer.weight)", torch.zeros(3, 8)),
        ("layer.load_state_dict({'weight': torch.ones(3, 8), 'bias': torch.zeros(3)})", torch.ones(3, 8)),
        ("torch.manual_seed(7); nn.init.normal_(layer.weight)", SEVEN),
        ("nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(7))", SEVEN),
    ],
)
def test_weights_set_by_the_users_constructor_stay(own_recipe: OwnRecipe, line: str, expected: torch.Tensor) -> None:
    assert torch.equal(built(own_recipe(LAYER.format(line))).weight, expected)


def test_orthogonal_weights_of_the_users_own_model_are_alike_in_arms(own_recipe: OwnRecipe) -> None:
    code = (
        "def make(shape, classes, norm):\n"
        "    layer = nn.Sequential(nn.Linear(8, 8, bias=norm is None), nn.Linear(8, 3))\n"
        "    nn.init.orthogonal_(layer[1].weight)\n"
        "    return nn.Sequential(*layer, norm(3)) if norm else layer"
    )
    plain, normed = (built(own_recipe(code, norm))[1].weight.detach() for norm in ("none", "batch"))
    assert torch.equal(plain, normed)
    torch.testing.assert_close(plain @ plain.T, torch.eye(3), atol=1e-5, rtol=0)


def test_a_model_of_the_users_own_that_ignores_its_norm_is_refused(own_recipe: OwnRecipe) -> None:
    code = "def make(shape, classes, norm):\n    return nn.Sequential(nn.Linear(8, 3), nn.BatchNorm1d(3))"
    with pytest.raises(RecipeError, match="never called norm, so the recipe's norm has no effect"):
        built(own_recipe(code, "batch"))
    built(own_recipe(code, "none"))


def test_the_users_own_constructor_may_compile_and_use_higher_order_operators(own_recipe: OwnRecipe) -> None:
    code = (
        "x = torch.ones(2, 8)\n"
        "    torch.compile(layer, backend='eager', fullgraph=True)(x)\n"
        "    torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,))"
    )
    assert built(own_recipe(LAYER.format(code)))(torch.ones(2, 8)).shape == (2, 3)


def test_the_users_own_model_may_draw_from_numpy_and_random_too(own_recipe: OwnRecipe) -> None:
    code = LAYER.format("layer.drawn = numpy.random.rand(), random.random(), torch.rand(2).tolist()")
    first, same, other = (built(own_recipe(code, train={"seed": seed})).drawn for seed in (0, 0, 1))
    assert first == same
    assert all(one != another for one, another in zip(first, other, strict=True))
