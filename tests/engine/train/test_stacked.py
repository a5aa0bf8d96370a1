"""Stacked runs: each is trained as it would be alone, whatever trains beside it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bncli.engine import data
from bncli.engine.data.splits import Dataset
from bncli.engine.device import cpu_threads
from bncli.engine.train import training_loop
from bncli.engine.train.stacked import STACKED, cross_entropy
from bncli.engine.train.state import TrainState
from bncli.names import ACTIVATIONS, RECIPE_ACTIVATIONS
from bncli.recipe.batches import alone
from bncli.recipe.sections import Recipe
from bncli.results.train import RunFinished, RunResult
from tests.conftest import tiny

CPU = torch.device("cpu")
SETTINGS: dict[str, dict[str, Any]] = {
    "sigmoid": {"activation": "sigmoid", "norm": {"kind": "none"}},
    "tanh": {"activation": "tanh"},
    "relu": {"activation": "relu"},
    "leaky relu": {"activation": "leaky_relu"},
    "gelu": {"activation": "gelu"},
    "norm after the activation": {"activation": "sigmoid", "norm_position": "after"},
    "norm without weights": {"norm": {"kind": "batch", "affine": False, "momentum": 0.3}},
    "norm without running statistics": {"norm": {"kind": "batch", "track_running_stats": False}},
    "momentum": {"optimizer": {"kind": "sgd", "momentum": 0.9, "weight_decay": 0.01}},
    "nesterov": {"optimizer": {"kind": "sgd", "momentum": 0.9, "nesterov": True, "weight_decay_on": "weights"}},
    "adam": {"optimizer": {"kind": "adam", "weight_decay": 0.01}},
    "adamw": {"optimizer": {"kind": "adamw", "weight_decay": 0.1, "weight_decay_on": "weights"}},
    "schedule": {"schedule": {"kind": "cosine", "warmup": 3}},
    "label smoothing": {"train": {"label_smoothing": 0.1}},
    "images": {"data": {"source": "synthetic", "shape": [2, 3, 3], "classes": 10, "examples": 200, "held_out": 230}},
}  # fmt: skip


def recipes(setting: str, count: int = 5) -> list[Recipe]:
    """Of runs that differ in seed, rate and initial weights.

    A layer has 33 x 20 activations a run, of which 20 are left over where they are taken 32 at a time.
    """
    sections = dict(SETTINGS[setting])
    model = {"kind": "mlp", "hidden": [33, 33]} | {
        key: sections.pop(key) for key in ("activation", "norm_position") if key in sections
    }
    given = {"kind": "sgd"} | sections.pop("optimizer", {})
    shared = {"data": {"source": "synthetic", "shape": [8], "classes": 10, "examples": 200, "held_out": 230}} | sections
    train = {"steps": 12, "batch_size": 20, "evaluate_every": 6, "target": None} | shared.pop("train", {})
    return [
        tiny(
            **shared | {"model": model | {"init": {"kind": "gaussian", "std": 0.1 + 0.1 * index}}},
            optimizer=given | {"lr": 0.01 * 3**index},
            train=train | {"seed": index},
        )
        for index in range(count)
    ]


def dataset_of(recipe: Recipe) -> Dataset:
    """In torch's default type."""
    loaded = data.load(recipe.data, CPU)
    train, held_out = (
        replace(each, x=each.x.to(torch.get_default_dtype())) for each in (loaded.train, loaded.held_out)
    )  # type: ignore[type-var, attr-defined]
    return replace(loaded, train=train, held_out=held_out)


@pytest.fixture
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def trained(recipe: Recipe | Sequence[Recipe], leave: Collection[int] = ()) -> tuple[TrainState, dict[int, RunResult]]:
    """The state after a run, or after runs of which some are given up halfway, and the results."""
    first = recipe if isinstance(recipe, Recipe) else recipe[0]
    with cpu_threads(1):
        state = TrainState(recipe, dataset_of(first), CPU)
        events = list(training_loop(state, leave=lambda: leave if state.step == 5 else ()))
    return state, {index: event.result for index, event in events if isinstance(event, RunFinished)}


def weights(state: TrainState, run: int) -> dict[str, Tensor]:
    """The state_dict of one of the runs that are left in a state."""
    place = [each.index for each in state.runs].index(run)
    held = state.model.state_dict()
    return {name: each[place] for name, each in held.items()} if state.stacked else held


def largest_difference(some: dict[str, Tensor], others: dict[str, Tensor]) -> float:
    """Of two state_dicts, relative to each tensor's largest value."""
    assert some.keys() == others.keys()
    some, others = ({name: each.double() for name, each in held.items()} for held in (some, others))
    each = ((some[name] - others[name]).abs().max() / others[name].abs().max().clamp_min(1e-12) for name in some)
    return max(each).item()


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("setting", SETTINGS)
def test_stacked_runs_are_in_float64_what_they_are_one_by_one(setting: str) -> None:
    together, results = trained(recipes(setting, 3))
    for run, recipe in enumerate(recipes(setting, 3)):
        single, found = trained(recipe)
        assert largest_difference(weights(together, run), weights(single, 0)) < 1e-12
        for one, other in zip(results[run].evaluations, found[0].evaluations, strict=True):
            assert one.accuracy == other.accuracy
            assert (one.train_loss or 0) == pytest.approx(other.train_loss or 0, rel=1e-12)
            assert one.loss == pytest.approx(other.loss, rel=1e-6)  # which is computed in float32 of a run alone


# Where MKL computes a product of a batch as it computes a single one.
SAME_BITS = torch.backends.mkl.is_available() and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_run_is_the_same_alone_in_company_and_after_others_have_left(setting: str) -> None:
    some = recipes(setting)
    together, results = trained(some, leave=(1, 3))
    assert [results[run].status for run in range(5)] == ["budget", "given up"] * 2 + ["budget"]
    for run in (0, 4):
        alone, found = trained([some[run]])
        single, _ = trained(some[run])
        assert largest_difference(weights(together, run), weights(alone, 0)) < (1e-30 if SAME_BITS else 1e-3)
        assert largest_difference(weights(together, run), weights(single, 0)) < 1e-3
        if SAME_BITS:
            assert results[run].evaluations == found[0].evaluations


def test_the_loss_of_stacked_runs_is_that_of_each() -> None:
    logits, y = torch.randn(3, 7, 4), torch.randint(4, (3, 7))
    for options in ({"label_smoothing": 0.2}, {"reduction": "sum"}):
        expected = torch.stack([cross_entropy(*each, **options) for each in zip(logits, y, strict=True)])  # type: ignore[arg-type]
        torch.testing.assert_close(cross_entropy(logits, y, **options), expected)  # type: ignore[arg-type]


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_settings_above_are_among_those_that_train_together(setting: str) -> None:
    assert [alone(recipe) for recipe in recipes(setting)] == [None] * 5


def test_every_activation_of_a_recipe_can_be_stacked() -> None:
    assert {getattr(nn, ACTIVATIONS[name].module) for name in RECIPE_ACTIVATIONS} <= STACKED.keys()
