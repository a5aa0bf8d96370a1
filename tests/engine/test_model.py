"""Models from recipes, and that arms begin alike."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bncli.engine.model import build
from bncli.errors import RecipeError
from tests.conftest import tiny

NORMS: list[dict[str, Any]] = [
    {"kind": "none"},
    {"kind": "batch"},
    {"kind": "layer"},
    {"kind": "group", "groups": 4},
    {"kind": "instance"},
]


@pytest.mark.parametrize("norm", NORMS, ids=lambda norm: norm["kind"])
@pytest.mark.parametrize("activation", ["sigmoid", "tanh", "relu", "leaky_relu", "gelu"])
@pytest.mark.parametrize("model", [{"kind": "cnn", "channels": [4, 8]}, {"kind": "resnet", "depth": 20}],
                         ids=lambda model: model["kind"])  # fmt: skip
def test_every_model_takes_every_norm_and_activation(
    model: dict[str, Any], norm: dict[str, Any], activation: str
) -> None:
    built = build(tiny(model={**model, "activation": activation}, norm=norm), (1, 8, 8), 5)
    y = built(torch.randn(2, 1, 8, 8))
    assert y.shape == (2, 5)
    assert torch.isfinite(y).all()


@pytest.mark.parametrize("depth", [18, 34, 50])
def test_imagenet_resnets_take_large_images(depth: int) -> None:
    built = build(tiny(model={"kind": "resnet", "depth": depth}), (3, 64, 64), 7)
    assert built(torch.randn(2, 3, 64, 64)).shape == (2, 7)


def test_an_mlp_flattens_images() -> None:
    assert build(tiny(), (1, 8, 8), 5)(torch.randn(2, 1, 8, 8)).shape == (2, 5)


def test_the_same_seed_gives_the_same_weights_in_every_arm_where_shapes_agree() -> None:
    plain, normed = (build(tiny(norm={"kind": kind}), (8,), 3).state_dict() for kind in ("none", "batch"))
    shared = [name for name in plain if name in normed]
    assert [name for name in shared if name.endswith("weight")] == ["hidden1.linear.weight", "output.weight"]
    assert all(torch.equal(plain[name], normed[name]) for name in shared)


def test_another_seed_gives_other_weights_and_the_() -> None:
    one, other = (build(tiny(train={"seed": seed}), (8,), 3).state_dict()["output.weight"] for seed in (0, 1))
    assert not torch.equal(one, other)


def test_a_bias_before_batch_norm_is_left_out_since_it_is_dead() -> None:
    assert "hidden1.linear.bias" not in build(tiny(), (8,), 3).state_dict()
    assert "hidden1.linear.bias" in build(tiny(norm={"kind": "layer"}), (8,), 3).state_dict()


INITS: dict[str, tuple[dict[str, Any], float]] = {
    "gaussian": ({"kind": "gaussian", "std": 0.03}, 0.03),
    "xavier": ({"kind": "xavier"}, (2 / (400 + 300)) ** 0.5),
    "he": ({"kind": "he"}, (2 / 400) ** 0.5),
    "orthogonal": ({"kind": "orthogonal"}, (1 / 400) ** 0.5),
}


@pytest.mark.parametrize("name", INITS)
def test_initial_weights_have_the_deviation_of_their_definition(name: str) -> None:
    init, deviation = INITS[name]
    weight = build(tiny(model={"kind": "mlp", "hidden": [300], "init": init}), (400,), 3).state_dict()[
        "hidden1.linear.weight"
    ]
    assert weight.std().item() == pytest.approx(deviation, rel=0.02)  # 120,000 weights: 0.2 % standard error
    assert weight.mean().item() == pytest.approx(0, abs=5 * deviation / 120_000**0.5)


def test_orthogonal_rows_are_orthonormal() -> None:
    init = {"kind": "mlp", "hidden": [30], "init": {"kind": "orthogonal"}}
    weight = build(tiny(model=init, norm={"kind": "none"}), (40,), 3).state_dict()["hidden1.linear.weight"]
    torch.testing.assert_close(weight @ weight.T, torch.eye(30), atol=1e-5, rtol=0)


def test_lsuv_gives_every_layer_unit_output_variance_and_counts_no_batch() -> None:
    examples = 3 * torch.randn(200, 40, generator=torch.Generator().manual_seed(0))
    recipe = tiny(model={"kind": "mlp", "hidden": [30, 30, 30], "activation": "tanh", "init": {"kind": "lsuv"}})
    model = build(recipe, (40,), 3, lambda: examples)
    variances: list[float] = []
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_hook(lambda module, inputs, output: variances.append(output.var().item()))
    assert all(buffer.sum() in (0, 30) for buffer in model.buffers())  # as they began: means 0, variances 1, no batches
    model(examples)
    assert variances == pytest.approx([1, 1, 1, 1], abs=0.11)


def own(folder: Path, monkeypatch: pytest.MonkeyPatch, code: str, **arguments: Any) -> nn.Module:
    (folder / "mine.py").write_text("from torch import nn\n" + code)
    monkeypatch.chdir(folder)
    sys.modules.pop("mine", None)
    model = {"kind": "module", "module": "mine:make", "arguments": arguments}
    return build(tiny(model=model, norm={"kind": "batch"}), (8,), 3)


def test_the_users_own_model_is_called_with_shape_classes_and_norm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (
        "def make(shape, classes, norm, width):\n"
        "    return nn.Sequential(nn.Linear(shape[0], width), norm(width), nn.Linear(width, classes))"
    )
    assert own(tmp_path, monkeypatch, code, width=5)(torch.randn(4, 8)).shape == (4, 3)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def made(shape, classes, norm): ...", "model.module: mine:make: module 'mine' has no attribute 'make'"),
        ("def make(shape): ...", r"mine:make raised TypeError: .*It is called with shape=\(8,\), classes=3, norm="),
        ("def make(shape, classes, norm): return 3", r"mine:make returned a int; expected a torch.nn.Module"),
    ],
)
def test_a_model_of_the_users_that_cannot_be_made_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        own(tmp_path, monkeypatch, code)
