"""Models from recipes, and that arms begin alike."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from bncli.engine.models import build
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


def own(
    folder: Path, monkeypatch: pytest.MonkeyPatch, code: str, norm: str = "batch", seed: int = 0, **arguments: Any
) -> nn.Module:
    (folder / "mine.py").write_text("import random, numpy, torch\nfrom torch import nn\n" + code)
    monkeypatch.chdir(folder)
    sys.modules.pop("mine", None)
    model = {"kind": "module", "module": "mine:make", "arguments": arguments}
    return build(tiny(model=model, norm={"kind": norm}, train={"seed": seed}), (8,), 3)


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


# As bncli's own models: no bias in front of a norm. The output's bias is of the hidden layers' shape.
WITHOUT_DEAD_BIASES = """
def make(shape, classes, norm):
    layers, inputs = [], shape[0]
    for _ in range(3):
        layers += [nn.Linear(inputs, 16, bias=norm is None), *([norm(16)] if norm else []), nn.ReLU()]
        inputs = 16
    return nn.Sequential(*layers, nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, classes))
"""


def test_arms_of_the_users_own_model_begin_alike_also_where_one_has_no_bias(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (plain, plain_after), (normed, normed_after), (other, _) = (
        (
            own(tmp_path, monkeypatch, WITHOUT_DEAD_BIASES, norm, seed),
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


def seven() -> torch.Generator:
    return torch.Generator().manual_seed(7)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("nn.init.zeros_(layer.weight)", lambda: torch.zeros(3, 8)),
        ("layer.load_state_dict({'weight': torch.ones(3, 8), 'bias': torch.zeros(3)})", lambda: torch.ones(3, 8)),
        ("torch.manual_seed(7); nn.init.normal_(layer.weight)", lambda: torch.randn(3, 8, generator=seven())),
        (
            "nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(7))",
            lambda: torch.randn(3, 8, generator=seven()),
        ),
    ],
)
def test_what_the_users_own_constructor_does_to_its_weights_stays_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, expected: Callable[[], torch.Tensor]
) -> None:
    code = f"def make(shape, classes, norm):\n    layer = nn.Linear(8, 3)\n    {line}\n    return layer"
    assert torch.equal(own(tmp_path, monkeypatch, code).weight, expected())


def test_orthogonal_weights_of_the_users_own_model_are_orthogonal_and_alike_in_arms(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (
        "def make(shape, classes, norm):\n"
        "    layer = nn.Sequential(nn.Linear(8, 8, bias=norm is None), nn.Linear(8, 3))\n"
        "    nn.init.orthogonal_(layer[1].weight)\n"
        "    return layer"
    )
    plain, normed = (own(tmp_path, monkeypatch, code, norm)[1].weight.detach() for norm in ("none", "batch"))
    assert torch.equal(plain, normed)
    torch.testing.assert_close(plain @ plain.T, torch.eye(3), atol=1e-5, rtol=0)


def test_building_a_model_of_the_users_own_does_not_load_the_compiler(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("from torch import nn\ndef make(shape, classes, norm): return nn.Linear(8, 3)")
    code = (
        "import sys; from bncli.engine.models import build; from tests.conftest import tiny\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "build(tiny(model={'kind': 'module', 'module': 'mine:make'}), (8,), 3); print('torch._dynamo' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_the_users_own_constructor_may_run_what_is_compiled_and_higher_order_operators(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (
        "def make(shape, classes, norm):\n"
        "    layer, x = nn.Linear(8, 3), torch.ones(2, 8)\n"
        "    torch.compile(layer, backend='eager', fullgraph=True)(x)\n"
        "    torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,))\n"
        "    return layer"
    )
    assert own(tmp_path, monkeypatch, code)(torch.ones(2, 8)).shape == (2, 3)


def test_the_users_own_model_may_draw_from_numpy_and_random_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (
        "def make(shape, classes, norm):\n"
        "    layer = nn.Linear(8, 3)\n"
        "    layer.drawn = numpy.random.rand(), random.random(), torch.rand(2).tolist()\n"
        "    return layer"
    )
    first, again, other = (own(tmp_path, monkeypatch, code, seed=seed).drawn for seed in (0, 0, 1))
    assert first == again
    assert all(one != another for one, another in zip(first, other, strict=True))
