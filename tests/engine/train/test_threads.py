"""The arithmetic of a step, and the threads that it chooses."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from bncli.engine import data
from bncli.engine.device import cpu_threads
from bncli.engine.train import train
from bncli.engine.train.state import TrainState
from bncli.engine.train.threads import PASSES, multiply_adds
from bncli.recipe.sections import Recipe
from bncli.results.train import RunFinished, RunResult
from tests.conftest import OWN, tiny
from tests.engine.conftest import OwnRecipe

CPU = torch.device("cpu")
IMAGES = {"source": "synthetic", "shape": [3, 8, 8], "classes": 3, "examples": 120, "held_out": 60}


def state(recipe: Recipe) -> TrainState:
    return TrainState(recipe, data.load(recipe.data, CPU), CPU)


def counted(recipe: Recipe) -> float:
    return multiply_adds(recipe, data.load(recipe.data, CPU))


def finished(recipe: Recipe, **options: Any) -> RunResult:
    *_, last = train(recipe, "cpu", **options)
    assert isinstance(last, RunFinished)
    return last.result


def test_every_weight_counts_once_for_an_example_and_each_place_in_an_image() -> None:
    assert counted(tiny()) == PASSES * 20 * (8 * 16 + 16 * 3)
    cnn = tiny(data=IMAGES, model={"kind": "cnn", "channels": [4, 6]})
    assert counted(cnn) == PASSES * 20 * (9 * 3 * 4 * 64 + 9 * 4 * 6 * 16 + 6 * 3)
    halves = tiny(train={"accumulate": 2})
    assert counted(halves) == PASSES * 10 * (8 * 16 + 16 * 3)


@pytest.mark.parametrize("model", [{"kind": "cnn", "channels": [4, 6]}, {"kind": "resnet", "depth": 20}])
def test_a_model_of_the_users_own_is_counted_like_a_recipes(model: dict[str, Any], own_recipe: OwnRecipe) -> None:
    known = state(tiny(data=IMAGES, model=model))
    own = state(own_recipe(OWN.format(act="pass")))
    assert multiply_adds(own.recipe, known.dataset, known.model) == counted(known.recipe)


def test_counting_leaves_random_generators_and_statistics_as_they_were(own_recipe: OwnRecipe) -> None:
    made = state(own_recipe(OWN.format(act="import random, torch; random.random(); torch.rand(1)")))
    made.model.norm = nn.BatchNorm1d(3)
    before = random.getstate(), torch.get_rng_state()
    assert multiply_adds(made.recipe, made.dataset, made.model)
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


@pytest.fixture
def two_threads() -> Iterator[None]:
    with cpu_threads(2):
        yield


@pytest.mark.usefixtures("two_threads")
def test_a_small_step_takes_one_thread_and_the_number_is_restored(own_recipe: OwnRecipe) -> None:
    for recipe in (tiny(), own_recipe(OWN.format(act="pass"))):
        result = finished(recipe)
        assert result.environment.threads == 1
        assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_threads")
def test_a_large_step_and_one_that_cannot_be_counted_take_torchs_choice(
    own_recipe: OwnRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    branching = finished(own_recipe(OWN.format(act="assert x.sum() < 1e9")))
    assert branching.environment.threads == 2
    monkeypatch.setattr("bncli.engine.train.FEWEST", 1000)
    assert finished(tiny()).environment.threads == 2


@pytest.mark.usefixtures("two_threads")
def test_the_same_threads_give_the_same_initial_weights_whether_chosen_or_asked_for() -> None:
    model = {"kind": "cnn", "channels": [64, 256], "init": {"kind": "orthogonal"}}
    recipe = tiny(data=IMAGES, model=model, train={"steps": 5})
    chosen, asked = finished(recipe), finished(recipe, threads=2)
    assert chosen.environment.threads == 2
    assert chosen.evaluations == asked.evaluations


def test_threads_that_are_asked_for_are_taken() -> None:
    result = finished(tiny(), threads=2)
    assert result.environment.threads == 2
    assert result.cores_lacked is not None
    assert result.cores_lacked >= 0
