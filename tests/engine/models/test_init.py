"""Initial weights have the properties of their definitions, and generators are restored as they were."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from bncli.engine.models import build
from bncli.engine.models.init import global_generators, restore_global_generators
from tests.conftest import tiny

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


def test_the_global_generators_go_on_from_where_they_were() -> None:
    def drawn() -> tuple[float, float, float, float]:
        return random.gauss(0, 1), np.random.standard_normal(), np.random.random(), torch.rand(()).item()

    drawn()  # a normal number leaves a second one for the next call
    states = global_generators(torch.device("cpu"))
    one, again = drawn(), drawn()
    restore_global_generators(states, torch.device("cpu"))
    assert (drawn(), drawn()) == (one, again)
