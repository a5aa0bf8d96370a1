"""Probes of a training run: they change nothing of it, and measure what they say on models computed by hand."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bncli.engine import data
from bncli.engine.models.init import seed_global_generators
from bncli.engine.train import train, training_loop
from bncli.engine.train.probes import Network, probe
from bncli.engine.train.state import TrainState
from bncli.errors import RecipeError, RunFailed
from bncli.names import MEASURES, NORMS, PROBES
from bncli.recipe.load import with_values
from bncli.recipe.sections import Recipe
from bncli.report.files import event_line
from bncli.results.train import Evaluated, Probed, ProbePoint, RunFinished, RunResult
from tests.conftest import TINY, tiny
from tests.engine.conftest import OwnRecipe
from tests.engine.train.test_state import NOISY, RUNS, assert_same_bits

CPU = torch.device("cpu")
ALL = {"measure": "all", "at": 3}
IMAGES = {**TINY["data"], "shape": [3, 8, 8]}
DEEP = {"model": {"kind": "mlp", "hidden": [16, 12], "activation": "sigmoid"}}
LAYERS = ["hidden1.linear", "hidden2.linear", "output"]

NORM = {name: {"kind": name, **({"after": 3} if name == "frozen" else {})} for name in NORMS}
ANY_RUN: dict[str, dict[str, Any]] = {
    **RUNS,
    **{f"{name} norm": {"norm": NORM[name], "model": {"kind": "mlp", "hidden": [16, 12]}} for name in NORMS},
    **{
        f"{name} norm of images": {"norm": NORM[name], "data": IMAGES, "model": {"kind": "cnn", "channels": [8]}}
        for name in NORMS
    },
    "fused resnet": {
        "data": {**IMAGES, "examples": 40, "held_out": 20},
        "model": {"kind": "resnet", "depth": 20},
        "norm": {"kind": "batch", "kernel": "fused"},
        "optimizer": {"kind": "adam", "lr": 0.01},
    },
}
del ANY_RUN["instance norm"]  # has one value for each mean of a vector


@pytest.fixture(autouse=True)
def user_files(byte_images: str, own_recipe: OwnRecipe) -> None:
    """The current folder has images.npz and mine.py, which some of the runs name."""
    own_recipe(NOISY)


def recipe_of(sections: dict[str, Any], **changes: Any) -> Recipe:
    few = {"steps": 7, "evaluate_every": 2, "target": None}
    return tiny(**sections | {"train": few | sections.get("train", {})} | changes)


def new_state(recipe: Recipe) -> TrainState:
    memory_format = data.MEMORY_FORMATS[recipe.train.memory_format]
    return TrainState(recipe, data.load(recipe.data, CPU, memory_format), CPU)


def seeded_state(recipe: Recipe) -> TrainState:
    seed_global_generators(0)
    return new_state(recipe)


def finished(state: TrainState) -> RunResult:
    *_, (_, last) = training_loop(state)
    assert isinstance(last, RunFinished)
    return last.result


def values_of(points: tuple[ProbePoint, ...], measure: str) -> dict[str | None, dict[str, float]]:
    """layer -> values at the last step."""
    last = max(point.step for point in points)
    return {point.layer: point.values for point in points if (point.measure, point.step) == (measure, last)}


# --- without any effect on the run ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ANY_RUN)
def test_a_run_goes_bit_for_bit_as_it_does_without_probes(name: str) -> None:
    recipe = with_values(recipe_of(ANY_RUN[name]), {"train.steps": 5})  # after 4 of which batch renorm corrects
    without = seeded_state(recipe.model_copy(update={"probes": None}))
    plain, ours = finished(without), without.state_dict()
    probed = seeded_state(with_values(recipe, {"probes": ALL}))
    result, theirs = finished(probed), probed.state_dict()
    assert theirs.pop("probes")["points"]
    assert ours.pop("probes") is None
    assert_same_bits(theirs, ours)
    assert result.evaluations == plain.evaluations
    flags = [[module.training for module in state.model.modules()] for state in (without, probed)]
    assert flags[0] == flags[1]
    for one, other in zip(probed.model.parameters(), without.model.parameters(), strict=True):
        assert_same_bits(one.grad, other.grad)


def test_modules_that_a_user_holds_in_evaluation_mode_stay_in_it(own_recipe: OwnRecipe) -> None:
    code = (
        "def make(shape, classes, norm):\n"
        "    net = nn.Sequential(nn.Linear(shape[0], 8), norm(8), nn.ReLU(), nn.Linear(8, classes))\n"
        "    net[1].eval()\n"
        "    return net"
    )
    recipe = own_recipe(code, norm="batch", probes=ALL, train={"steps": 4})
    state = new_state(recipe)
    assert finished(state).probes
    assert [module.training for module in state.model.modules()] == [True, True, False, True, True]
    assert state.model[1].num_batches_tracked == 0


# --- when, and where the values go ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("at", "steps"),
    [(3, [0, 3, 6, 7]), ({"points_per_doubling": 1}, [0, 1, 2, 4, 7]), (7, [0, 7])],
)
def test_a_run_is_measured_before_the_first_step_at_the_recipes_and_at_the_last(at: Any, steps: list[int]) -> None:
    events = list(train(recipe_of({}, probes={"measure": ["scale"], "at": at}), "cpu", threads=1))
    probed = [event for event in events if isinstance(event, Probed)]
    assert [event.points[0].step for event in probed] == steps
    result = events[-1].result
    assert result.probes == tuple(point for event in probed for point in event.points)
    assert result.probes_s == pytest.approx(sum(event.seconds for event in probed))
    assert {point.measure for point in result.probes} == {"loss", "scale"}


def test_a_run_that_ends_early_is_measured_at_its_end() -> None:
    reached = recipe_of({"train": {"steps": 500, "target": {"value": 0.5}, "stop_at_target": True}}, probes={"at": 400})
    result = finished(new_state(reached))
    assert result.status == "reached"
    assert sorted({point.step for point in result.probes}) == [0, result.steps_run]


def test_a_run_that_diverges_is_measured_at_its_end_too_and_its_values_are_kept_as_they_are() -> None:
    sections = {"norm": {"kind": "none"}, "optimizer": {"kind": "sgd", "lr": 1e30}}
    events = list(train(recipe_of(sections, probes=ALL), "cpu", threads=1))
    result = events[-1].result
    assert result.status == "diverged"
    assert result.probes[-1].step == result.steps_run
    assert math.isnan(values_of(result.probes, "loss")[None]["training"])
    assert math.isnan(values_of(result.probes, "gradients")["output"]["norm"])
    lines = [json.loads(event_line(event)) for event in events]
    assert any(line["event"] == "probed" for line in lines)
    assert "probes" not in lines[-1]


def test_time_of_probes_is_no_time_of_training() -> None:
    state = new_state(recipe_of({}, probes={"at": 1}))
    hours = [0.0]
    state.clock.now = lambda: hours[0]
    for _, event in training_loop(state):
        if isinstance(event, Probed):
            hours[0] += 1.0
    assert isinstance(event, RunFinished)
    assert hours[0] == 8
    assert event.result.training_s == 0
    assert event.result.probes_s > 0


def test_every_measure_of_the_table_is_given_by_some_model() -> None:
    found: dict[str, set[str | None]] = {}
    for activation in ("sigmoid", "relu"):
        recipe = recipe_of({"model": {"kind": "mlp", "hidden": [16, 12], "activation": activation}}, probes=ALL)
        for point in finished(new_state(recipe)).probes:
            for name in point.values:
                found.setdefault(f"{point.measure}.{name}", set()).add(point.layer)
    for name, measure in MEASURES.items():
        if measure.probe:
            assert name in found
            assert (None in found[name]) is not measure.per_layer


def test_what_is_asked_for_by_name_and_cannot_be_measured_is_refused(own_recipe: OwnRecipe) -> None:
    code = (
        "class Own(nn.Linear):\n"
        "    def forward(self, x):\n"
        "        return super().forward(x).sigmoid()\n"
        "def make(shape, classes, norm):\n"
        "    return Own(shape[0], classes)"
    )
    for measure in ("inputs", "saturation", "shift", "whitening"):
        state = new_state(own_recipe(code, probes={"measure": [measure]}))
        with pytest.raises(RecipeError, match=rf"^probes.measure: {measure}: this model has nothing .*leave {measure}"):
            finished(state)
    result = finished(new_state(own_recipe(code, probes={"measure": "all"}, train={"steps": 2})))
    assert {point.measure for point in result.probes} == {"loss", "gradients", "landscape", "regularization", "scale"}


def test_a_model_that_cannot_be_copied_is_refused_with_the_reason(own_recipe: OwnRecipe) -> None:
    code = (
        "class Own(nn.Linear):\n"
        "    def __deepcopy__(self, memo):\n"
        "        raise TypeError('it holds a lock')\n"
        "def make(shape, classes, norm):\n"
        "    return Own(shape[0], classes)"
    )
    with pytest.raises(RunFailed, match=r"^model.module: mine:make: copy.deepcopy .*TypeError: it holds a lock"):
        finished(new_state(own_recipe(code, probes=ALL)))


# --- against the same by hand -----------------------------------------------------------------------------------------


def probed(recipe: Recipe, steps: int = 0) -> tuple[TrainState, tuple[ProbePoint, ...]]:
    """A state after so many steps, and what a probing finds then."""
    state = new_state(recipe)
    for _, event in training_loop(state, stop=lambda: state.step >= steps):
        if isinstance(event, Evaluated) and not steps:
            break
    return state, probe(state).points


@pytest.mark.parametrize(
    "optimizer",
    [
        {"kind": "sgd", "lr": 0.5},
        {"kind": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "weight_decay_on": "weights"},
        {"kind": "adam", "lr": 0.01},
    ],
)
@pytest.mark.parametrize("norm", ["none", "batch"])
@pytest.mark.parametrize("train", [{}, {"clip_gradients": 0.05, "label_smoothing": 0.2}], ids=["", "clipped, smoothed"])
def test_shift_is_the_change_of_a_gradient_once_the_layers_below_took_the_runs_next_step(
    optimizer: dict[str, Any], norm: str, train: dict[str, Any]
) -> None:
    sections = {**DEEP, "optimizer": optimizer, "norm": {"kind": norm}, "train": {**DEEP.get("train", {}), **train}}
    recipe = recipe_of(sections, probes={"measure": ["shift"]})
    state, points = probed(recipe, steps=5)
    x, y = Network(state, state.probes).first_batch()  # type: ignore[arg-type]
    named = dict(state.model.named_parameters())

    def gradients() -> dict[str, torch.Tensor]:
        loss = F.cross_entropy(state.model(x), y, label_smoothing=train.get("label_smoothing", 0.0))
        return dict(zip(named, torch.autograd.grad(loss, named.values()), strict=True))

    before, old = gradients(), {name: each.detach().clone() for name, each in named.items()}
    for name, each in named.items():
        each.grad = before[name].clone()
    if train:
        torch.nn.utils.clip_grad_norm_(named.values(), train["clip_gradients"])
    state.optimizer.step()  # the run itself takes the step here
    new = {name: each.detach().clone() for name, each in named.items()}
    assert list(found := values_of(points, "shift")) == LAYERS[1:]
    for layer in LAYERS[1:]:
        below = [f"{part}." for part in LAYERS[: LAYERS.index(layer)]]
        below += [part.replace("linear", "norm") for part in below]
        for name, each in named.items():
            each.data.copy_(new[name] if name.startswith(tuple(below)) else old[name])
        g, after = before[f"{layer}.weight"], gradients()[f"{layer}.weight"]
        assert found[layer]["distance"] == pytest.approx((g - after).norm().item() / g.norm().item(), rel=1e-4)
        assert found[layer]["distance"] > 1e-4
        cosine = F.cosine_similarity(g.flatten(), after.flatten(), dim=0).item()
        assert found[layer]["cosine"] == pytest.approx(cosine, rel=1e-5)


def test_shift_of_two_linear_layers_is_the_formula(own_recipe: OwnRecipe) -> None:
    """y = V W x: dL/dV = E^T (W x)^T with E = softmax(y) - target over the batch."""
    code = (
        "def make(shape, classes, norm):\n"
        "    return nn.Sequential(nn.Linear(shape[0], 5, False), nn.Linear(5, classes, False))"
    )
    state, points = probed(own_recipe(code, probes={"measure": ["shift"]}, optimizer={"kind": "sgd", "lr": 0.25}))
    x, y = (each.double() for each in Network(state, state.probes).first_batch())  # type: ignore[arg-type]
    w, v = (each.detach().double() for each in state.model.parameters())

    def errors(w: torch.Tensor) -> torch.Tensor:
        return ((x @ w.T @ v.T).softmax(1) - F.one_hot(y.long(), len(v))) / len(x)

    g = errors(w).T @ (x @ w.T)
    stepped = w - 0.25 * (errors(w) @ v).T @ x
    after = errors(stepped).T @ (x @ stepped.T)
    found = values_of(points, "shift")
    assert list(found) == ["1"]
    assert found["1"]["distance"] == pytest.approx(((g - after).norm() / g.norm()).item(), rel=1e-5)
    assert found["1"]["cosine"] == pytest.approx(((g * after).sum() / g.norm() / after.norm()).item(), rel=1e-6)


def test_landscape_is_that_of_a_slow_loop() -> None:
    sections = {**DEEP, "optimizer": {"kind": "sgd", "lr": 0.5}}
    state, points = probed(recipe_of(sections, probes={"measure": ["landscape"]}), steps=5)
    x, y = Network(state, state.probes).first_batch()  # type: ignore[arg-type]
    parameters = list(state.model.parameters())
    start = [each.detach().clone() for each in parameters]

    def loss_and_gradient() -> tuple[torch.Tensor, torch.Tensor]:
        loss = F.cross_entropy(state.model(x), y)
        return loss, torch.cat([each.flatten() for each in torch.autograd.grad(loss, parameters)])

    _, g = loss_and_gradient()
    losses, distances, slopes = [], [], []
    for size in (0.25, 0.5, 1.0, 2.0):
        for each, old, part in zip(parameters, start, g.split([p.numel() for p in parameters]), strict=True):
            each.data.copy_(old - size * part.view_as(old))
        loss, there = loss_and_gradient()
        losses.append(loss.item())
        distances.append((there - g).norm().item())
        slopes.append(distances[-1] / (size * g.norm().item()))
    found = values_of(points, "landscape")[None]
    assert found["loss_range"] == pytest.approx(max(losses) - min(losses), rel=1e-4)
    assert found["predictiveness"] == pytest.approx(max(distances), rel=1e-4)
    assert found["smoothness"] == pytest.approx(max(slopes), rel=1e-4)


def test_gradients_are_those_of_the_samples_batches() -> None:
    state, points = probed(recipe_of(DEEP, probes={"measure": ["gradients"]}), steps=5)
    found = values_of(points, "gradients")
    each = []
    for x, y in Network(state, state.probes).sample():  # type: ignore[arg-type]
        loss = F.cross_entropy(state.model(x), y)
        each.append(torch.autograd.grad(loss, [state.model.get_parameter(f"{layer}.weight") for layer in LAYERS]))
    assert len(each) == 6  # of 120 examples in batches of 20
    for layer, batches in zip(LAYERS, zip(*each, strict=True), strict=True):
        g = torch.stack(batches).double()
        noise = ((g - g.mean(0)) ** 2).sum() / (g**2).sum()
        assert found[layer]["norm"] == pytest.approx(g.mean(0).norm().item(), rel=1e-5)
        assert found[layer]["noise"] == pytest.approx(noise.item(), rel=1e-5)
    ratio = found["hidden1.linear"]["norm"] / found["output"]["norm"]
    assert found[None]["first_over_last"] == pytest.approx(ratio)


def test_inputs_are_those_of_the_nonlinearity_in_training_mode() -> None:
    state, points = probed(recipe_of(DEEP, probes={"measure": ["inputs", "saturation"]}), steps=5)
    hidden = nn.Sequential(state.model.hidden1.linear, state.model.hidden1.norm)
    seen = torch.cat([hidden(x) for x, _ in Network(state, state.probes).sample()])  # type: ignore[arg-type]
    found = values_of(points, "inputs")["hidden1.activation"]
    for percent in (15, 50, 85):
        each = seen.quantile(percent / 100, dim=0)
        assert found[f"unit_p{percent}"] == pytest.approx(each[0].item(), abs=1e-6)
        assert found[f"p{percent}"] == pytest.approx(each.median().item(), abs=1e-6)


def test_an_event_has_the_percentiles_of_all_inputs_of_each_nonlinearity() -> None:
    state = new_state(recipe_of(DEEP, probes={"measure": "inputs", "at": 3}))
    found = probe(state).inputs
    assert state.probes is not None
    assert list(found) == ["hidden1.activation", "hidden2.activation"]
    inputs = state.probes.last["hidden2.activation"].flatten()
    quantiles = inputs.quantile(torch.linspace(0, 1, 101), interpolation="lower")
    assert found["hidden2.activation"][0] == inputs.min().item()
    assert found["hidden2.activation"][-1] == inputs.max().item()
    torch.testing.assert_close(torch.tensor(found["hidden2.activation"]), quantiles, rtol=0.05, atol=0.05)
    assert probe(new_state(recipe_of(DEEP, probes={"measure": "gradients", "at": 3}))).inputs == {}


def test_the_scale_counts_as_a_rate_only_where_a_norm_follows() -> None:
    recipe = recipe_of({**DEEP, "optimizer": {"kind": "sgd", "lr": 0.5}}, probes={"measure": ["scale"]})
    state, points = probed(recipe)
    found = values_of(points, "scale")
    for layer in LAYERS:
        assert found[layer]["norm"] == pytest.approx(state.model.get_parameter(f"{layer}.weight").norm().item())
    assert found["hidden1.linear"]["effective_learning_rate"] == pytest.approx(
        0.5 / found["hidden1.linear"]["norm"] ** 2
    )
    assert "effective_learning_rate" not in found["output"]


@pytest.mark.parametrize(
    ("norm", "cancels"),
    [
        ({"kind": "rms"}, True),
        ({"kind": "noisy"}, True),
        ({"kind": "dyt"}, False),
        ({"kind": "frozen", "after": 1}, False),
    ],
)
def test_a_norm_that_keeps_the_scale_of_its_input_makes_no_weight_a_rate(norm: dict[str, Any], cancels: bool) -> None:
    _, points = probed(recipe_of({**DEEP, "norm": norm}, probes={"measure": ["scale"]}))
    assert ("effective_learning_rate" in values_of(points, "scale")["hidden1.linear"]) is cancels


@pytest.mark.parametrize(("norm", "varies"), [("none", False), ("layer", False), ("batch", True)])
def test_an_examples_logits_depend_on_its_batch_under_batch_norm_alone(norm: str, varies: bool) -> None:
    recipe = recipe_of({**DEEP, "norm": {"kind": norm}}, probes={"measure": ["regularization"]})
    state, points = probed(recipe, steps=5)
    found = values_of(points, "regularization")[None]
    assert (found["logit_variance"] > 1e-6) is varies
    assert found["gap"] == found["held_out_loss"] - found["training_loss"]
    held_out = next(state.dataset.held_out.chunks(1000))
    state.model.eval()
    loss = F.cross_entropy(state.model(held_out[0]), held_out[1])
    assert found["held_out_loss"] == pytest.approx(loss.item(), rel=1e-5)  # all 60 of them


def test_probes_are_the_same_for_the_fused_kernel() -> None:
    """The fused model has no activation modules; its copy has, so that inputs can be seen."""
    found = []
    for kernel in ("native", "fused"):
        recipe = recipe_of({"norm": {"kind": "batch", "kernel": kernel}}, probes=ALL)
        found.append(finished(new_state(recipe)).probes)
    native, fused = found
    assert [(point.measure, point.layer) for point in native] == [(point.measure, point.layer) for point in fused]
    for one, other in zip(native, fused, strict=True):
        if one.step == 0 and one.measure != "whitening":
            assert other.values == pytest.approx(one.values, rel=1e-3, abs=1e-5), one


def test_the_sample_is_the_same_at_every_probing_and_noise_is_not(own_recipe: OwnRecipe) -> None:
    code = (
        "class Own(nn.Sequential):\n"
        "    def forward(self, x):\n"
        "        return super().forward(x + torch.randn(1))\n"
        "def make(shape, classes, norm):\n"
        "    return Own(nn.Linear(shape[0], 8), nn.Sigmoid(), nn.Linear(8, classes))"
    )
    for code_, moves in ((code, True), (code.replace("x + torch.randn(1)", "x"), False)):
        recipe = own_recipe(code_, probes={"measure": ["inputs"]}, optimizer={"kind": "sgd", "lr": 1e-30})
        _, points = probed(recipe, steps=3)
        assert (values_of(points, "inputs")["1"]["drift"] > 0.01) is moves


def test_the_probes_of_the_table_are_all_measured() -> None:
    result = finished(new_state(recipe_of(DEEP, probes=ALL)))
    assert {point.measure for point in result.probes} == {"loss", *PROBES}
