"""Precise population statistics: what they are, and that a run does not notice them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bncli.engine import data
from bncli.engine.models.init import global_generators
from bncli.engine.models.norms import BatchNorm
from bncli.engine.models.variants import GhostBatchNorm
from bncli.engine.train import evaluate, training_loop
from bncli.engine.train.population import Moments, moments, precise
from bncli.engine.train.state import TrainState
from bncli.recipe.layers import contradictions
from bncli.recipe.sections import Recipe
from bncli.results.train import RunFinished, RunResult
from tests.conftest import TINY, tiny
from tests.engine.conftest import OwnRecipe

CPU = torch.device("cpu")
IMAGES = {**TINY["data"], "shape": [3, 8, 8]}
PRECISE = {"population_statistics": "precise"}

# A model of the user's own that draws random numbers, and replaces a buffer in its forward pass.
OWN = """
class Noisy(nn.Sequential):
    def __init__(self, *layers):
        super().__init__(*layers)
        self.register_buffer("calls", torch.zeros(()))
    def forward(self, x):
        if self.training:
            self.calls = self.calls + 1
            x = x + 0.1 * random.gauss(0, 1) + 0.1 * numpy.random.standard_normal() + 0.01 * self.calls
        return super().forward(x)
def make(shape, classes, norm):
    return Noisy(nn.Linear(shape[0], 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, classes))
"""
RUNS: dict[str, dict[str, Any]] = {
    "native": {},
    "cumulative average": {"norm": {"kind": "batch", "momentum": None}},
    "bf16": {"train": {"precision": "bf16"}},
    "fused": {"norm": {"kind": "batch", "kernel": "fused"}},
    "a resnet": {"data": IMAGES, "model": {"kind": "resnet", "depth": 20},
                 "norm": {"kind": "batch", "kernel": "fused"}},
    "augmentation": {"data": {"source": "npz", "path": "images.npz", "held_out": 40, "augment": "crop-flip"},
                     "model": {"kind": "cnn", "channels": [8]}},
    "ghost": {"norm": {"kind": "ghost", "size": 10}},
    "renorm": {"norm": {"kind": "renorm"}},
    "noisy": {"norm": {"kind": "noisy"}},
    "layer norm": {"norm": {"kind": "layer"}},
    "a model of the user's own": {"model": {"kind": "module", "module": "mine:make"}, "norm": {"kind": "none"}},
}  # fmt: skip


def run(sections: dict[str, Any], **train: Any) -> tuple[dict[str, Tensor], RunResult]:
    """The state_dict and the result of a short run."""
    options = {"steps": 12, "evaluate_every": 4, "stop_at_target": False, **sections.get("train", {}), **train}
    state = state_of(tiny(**{**sections, "train": options}))
    *_, (_, last) = training_loop(state)
    assert isinstance(last, RunFinished)
    return state.model.state_dict(), last.result


def state_of(recipe: Recipe) -> TrainState:
    return TrainState(recipe, data.load(recipe.data, CPU), CPU)


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.usefixtures("byte_images")
def test_training_is_bit_for_bit_the_same(name: str, own_recipe: OwnRecipe) -> None:
    own_recipe(OWN)
    (running, _), (found, result) = run(RUNS[name]), run(RUNS[name], **PRECISE)
    assert found.keys() == running.keys()
    assert all(torch.equal(found[each], running[each]) for each in found)
    assert (result.running_statistics == ()) is (name == "layer norm")


@pytest.mark.slow
def test_training_is_the_same_where_the_model_is_compiled() -> None:
    (running, _), (found, result) = run({}, compile=True), run({}, compile=True, **PRECISE)
    assert all(torch.equal(found[each], running[each]) for each in found)
    assert result.running_statistics


def test_the_moments_are_those_of_all_inputs_together() -> None:
    """Of images, in batches of unequal size, about a mean that is large against the deviation."""
    batches = [1e4 + torch.randn(size, 3, 2, 2, dtype=torch.float64) for size in (5, 1, 8)]
    population, rounded = Moments(), Moments()
    for x in batches:
        population.add(x)
        rounded.add(x.float())
    variance, mean = torch.var_mean(torch.cat(batches), (0, 2, 3))
    torch.testing.assert_close(population.mean, mean, rtol=1e-14, atol=0)
    torch.testing.assert_close(population.variance, variance, rtol=1e-11, atol=0)
    # A float32 at 1e4 has a spacing of 1e-3.
    torch.testing.assert_close(rounded.variance.double(), variance, rtol=1e-2, atol=0)


def test_layers_evaluate_with_the_statistics_of_the_batches_of_an_epoch() -> None:
    state = state_of(tiny(train={"batch_size": 40, **PRECISE}))
    layer = state.model.get_submodule("hidden1.norm")
    linear: Any = state.model.get_submodule("hidden1.linear")
    with torch.no_grad(), precise(state):
        every = linear(state.dataset.train.x)  # type: ignore[attr-defined]
        torch.testing.assert_close(layer.running_mean, every.mean(0))
        torch.testing.assert_close(layer.running_var, every.var(0))
    assert torch.equal(layer.running_mean, torch.zeros(16))


def test_as_many_batches_are_taken_as_the_recipe_says_and_an_epoch_has() -> None:
    for batches, taken in ((2, 2), (200, 6)):
        state = state_of(tiny(train={"population_batches": batches, **PRECISE}))
        seen = []
        state.model.register_forward_hook(lambda module, inputs, y, seen=seen: seen.append(len(y)))
        with torch.no_grad(), precise(state):
            assert seen == [20] * taken


def test_micro_batches_are_taken_as_in_training() -> None:
    state = state_of(tiny(train={"accumulate": 4, **PRECISE}))
    seen: list[int] = []
    state.model.register_forward_hook(lambda module, inputs, y: seen.append(len(y)))
    with torch.no_grad(), precise(state):
        assert seen == [5] * 24


def test_the_pooled_variance_is_that_of_the_evaluated_net_where_the_mean_of_the_variances_is_not() -> None:
    """The inputs of a second layer, in batches of 4: what the first one normalizes has one mean in every batch."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.BatchNorm1d(50), nn.Linear(50, 50), nn.BatchNorm1d(50, momentum=None)).double()
    x = torch.randn(4000, 50, dtype=torch.float64)
    (_, first, below), (_, second, pooled) = moments(net, x.split(4))
    of_the_paper = second.running_var / pooled.variance  # torch keeps m/(m-1) var_B, here averaged over the batches
    first.running_mean.copy_(below.mean)
    first.running_var.copy_(below.variance)
    first.eval()
    inputs = net[1](first(x)).detach()
    assert float((pooled.variance / inputs.var(0)).mean()) == pytest.approx(1, abs=0.02)
    assert float(of_the_paper.mean()) == pytest.approx(4 / 3, abs=0.02)


def test_norms_that_no_batch_meets_are_left_out_and_an_input_may_be_named() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.unused = BatchNorm(2), GhostBatchNorm(2, 3), nn.BatchNorm1d(2)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.second(input=self.first(residual=x, input=x))
            return y

    x = torch.randn(6, 2, generator=torch.Generator().manual_seed(0))
    (name, _, population), (other, *_) = moments(Named(), [x])
    assert (name, other) == ("first", "second")
    torch.testing.assert_close(population.mean, x.mean(0))


def test_the_evaluation_does_not_depend_on_the_running_statistics() -> None:
    state = state_of(tiny(train=PRECISE))
    before = evaluate(state)[0].evaluation
    layer: Any = state.model.get_submodule("hidden1.norm")
    layer.running_mean.fill_(math.nan)
    assert evaluate(state)[0].evaluation == before
    assert layer.running_mean.isnan().all()
    assert state.running_statistics is not None
    assert math.isnan(state.running_statistics[0].mean_deviations)


def test_the_distance_is_that_of_the_worst_channel() -> None:
    state = state_of(tiny(train=PRECISE))
    layer: Any = state.model.get_submodule("hidden1.norm")
    with torch.no_grad():
        with precise(state):
            mean, variance = layer.running_mean.clone(), layer.running_var.clone()
        layer.running_mean.copy_(mean)
        layer.running_mean[3] += 0.5 * (variance[3] + layer.eps).sqrt()
        layer.running_var.copy_(variance)
        layer.running_var[5] = 0.25 * (variance[5] + layer.eps) - layer.eps
        with precise(state) as (distance,):
            assert distance.layer == "hidden1.norm"
            assert distance.mean_deviations == pytest.approx(0.5, rel=1e-5)
            assert distance.variance_ratio == pytest.approx(0.25, rel=1e-5)


def test_flags_and_random_streams_are_as_before_also_after_an_error(own_recipe: OwnRecipe) -> None:
    recipe = own_recipe(OWN, train=PRECISE)
    state = state_of(recipe)
    state.model.get_submodule("1").eval()

    def observed() -> list[Any]:
        return [[module.training for module in state.model.modules()], repr(global_generators(CPU))]

    before = observed()
    evaluate(state)
    assert state.running_statistics == ()  # the only batch norm keeps its own statistics
    assert observed() == before
    state.model.register_forward_pre_hook(lambda module, inputs: (_ for _ in ()).throw(RuntimeError("stop")))
    with pytest.raises(RuntimeError, match="stop"), precise(state):
        pass
    assert observed() == before


def test_precise_statistics_are_refused_for_a_norm_that_evaluates_by_batches() -> None:
    recipe = tiny(norm={"kind": "batch", "track_running_stats": False}, train=PRECISE)
    assert [keys for keys, _ in contradictions(recipe)] == [("train", "population_statistics")]
    assert not list(contradictions(tiny(norm={"kind": "none"}, train=PRECISE)))


@pytest.mark.parametrize("norm", [{"kind": "frozen", "after": 5}, {"kind": "whiten"}, {"kind": "iternorm"}])
def test_precise_statistics_are_refused_for_norms_that_use_others(norm: dict[str, Any]) -> None:
    found = dict(contradictions(tiny(norm=norm, train=PRECISE)))
    assert f"precise estimates mean and variance alone, and {norm['kind']}" in found["train", "population_statistics"]
