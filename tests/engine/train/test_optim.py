"""Optimizers are torch's, and schedules their closed forms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from bncli.engine.train import train
from bncli.engine.train.optim import learning_rate_factor, optimizer, set_learning_rate
from bncli.results.train import RunFinished
from tests.conftest import tiny


def factors(schedule: dict[str, Any], steps: int = 10) -> list[float]:
    recipe = tiny(schedule=schedule, train={"steps": steps})
    return [learning_rate_factor(recipe, step) for step in range(steps + 1)]


def test_schedules_are_their_closed_forms() -> None:
    assert factors({"kind": "constant"}) == [1.0] * 11
    assert factors({"kind": "exponential", "gamma": 0.5, "every": 2})[:5] == pytest.approx(
        [1, 2**-0.5, 0.5, 2**-1.5, 0.25]
    )
    assert factors({"kind": "step", "milestones": [3, 6], "gamma": 0.1})[2:8] == pytest.approx(
        [1, 0.1, 0.1, 0.1, 0.01, 0.01]
    )
    cosine = factors({"kind": "cosine", "final": 0.2})
    assert [cosine[0], cosine[5], cosine[10]] == pytest.approx([1, 0.6, 0.2])


def test_warm_up_rises_linearly_to_the_whole_rate() -> None:
    assert factors({"kind": "constant", "warmup": 4})[:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1])


@pytest.mark.parametrize(
    ("section", "kind"),
    [
        ({"kind": "sgd", "lr": 0.1, "momentum": 0.9, "nesterov": True}, torch.optim.SGD),
        ({"kind": "adam", "lr": 0.01}, torch.optim.Adam),
        ({"kind": "adamw", "lr": 0.01}, torch.optim.AdamW),
    ],
)
def test_optimizers_are_torchs_and_train(section: dict[str, Any], kind: type) -> None:
    assert isinstance(optimizer(tiny(optimizer=section), nn.Linear(2, 2)), kind)
    *_, last = train(tiny(optimizer=section), "cpu")
    assert isinstance(last, RunFinished)
    assert last.result.status == "reached"


def test_weight_decay_can_leave_out_norms_and_biases() -> None:
    section = {"kind": "sgd", "lr": 0.1, "weight_decay": 0.5, "weight_decay_on": "weights"}
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    decayed, spared = optimizer(tiny(optimizer=section), model).param_groups
    assert [parameter.shape for parameter in decayed["params"]] == [(4, 3)]
    assert len(spared["params"]) == 3
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.5, 0.0)
    (everything,) = optimizer(tiny(optimizer={**section, "weight_decay_on": "all"}), model).param_groups
    assert len(everything["params"]) == 4


@pytest.mark.parametrize("schedule", [{"kind": "constant"}, {"kind": "constant", "warmup": 3}, {"kind": "cosine"}])
def test_the_rate_of_an_update_does_not_depend_on_earlier_ones(schedule: dict[str, Any]) -> None:
    recipe = tiny(schedule=schedule, train={"steps": 10})
    sgd = optimizer(recipe, nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))
    for step in range(10):
        set_learning_rate(sgd, recipe, step)
        expected = recipe.optimizer.lr * learning_rate_factor(recipe, step)
        assert [group["lr"] for group in sgd.param_groups] == [expected] * len(sgd.param_groups)
