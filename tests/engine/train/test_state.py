"""The state of training: a run saved after any step and loaded goes on as if uninterrupted; its clock."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bncli.engine import data
from bncli.engine.train import optimizer_step, training_loop
from bncli.engine.train.state import Clock, TrainState, sample
from bncli.recipe.sections import Recipe
from bncli.results.train import Evaluated, Evaluation, RunFinished, RunResult, StepDone
from tests.conftest import TINY, tiny
from tests.engine.conftest import OwnRecipe

CPU = torch.device("cpu")
STEPS = 20  # of batches of 20, with 6 batches an epoch and an evaluation every 5 steps
IMAGES = {**TINY["data"], "shape": [3, 8, 8], "held_out": 33}

NOT_COMPARED = {"evaluation_s", "checkpoint_s", "probes_s", "intervals", "warm_ups", "peak_memory_mib"}

# A model of the user's own that draws from each of the global generators in its forward pass.
NOISY = """
class Noisy(nn.Sequential):
    def __init__(self, *layers):
        super().__init__(*layers)
        self.register_buffer("passes", torch.tensor(0), persistent=False)
    def forward(self, x):
        self.passes += 1
        self[0].bias.requires_grad_(bool(self.passes < 12))
        if self.training:
            x = x * (1 + self.passes / 100) + 0.1 * random.gauss(0, 1)
            x = x + 0.1 * numpy.random.standard_normal() + 0.1 * torch.randn_like(x)
        return super().forward(x)
def make(shape, classes, norm):
    return Noisy(nn.Linear(shape[0], 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, classes))
"""

RUNS: dict[str, dict[str, Any]] = {
    "momentum": {"optimizer": {"kind": "sgd", "lr": 0.1, "momentum": 0.9}},
    "adam": {"optimizer": {"kind": "adam", "lr": 0.01}},
    "adamw": {"optimizer": {"kind": "adamw", "lr": 0.01, "weight_decay": 0.1}},
    "schedule": {
        "optimizer": {"kind": "sgd", "lr": 0.1, "momentum": 0.9},
        "schedule": {"kind": "cosine", "warmup": 3, "final": 0.1},
    },
    "bf16": {"train": {"precision": "bf16"}},
    "micro-batches, clipped gradients": {"train": {"accumulate": 2, "clip_gradients": 0.1, "label_smoothing": 0.1}},
    "probes": {"probes": {"at": 3, "measure": ["all"]}},
    "precise statistics": {"train": {"population_statistics": "precise", "keep": "both"}},
    "fp16 with skipped steps": {
        "data": {**TINY["data"], "noise": 50.0},
        "norm": {"kind": "none"},
        "optimizer": {"kind": "sgd", "lr": 1e-4, "momentum": 0.9},
        "train": {"precision": "fp16"},
    },
    "fused": {"norm": {"kind": "batch", "kernel": "fused"}},
    "fused, channels last": {
        "data": IMAGES,
        "model": {"kind": "cnn", "channels": [8, 12]},
        "norm": {"kind": "batch", "kernel": "fused"},
        "train": {"memory_format": "channels_last"},
    },
    "augmentation": {"data": {"source": "npz", "path": "images.npz", "held_out": 40, "augment": "crop-flip"},
                     "model": {"kind": "cnn", "channels": [8]}},
    "dropout": {"model": {"kind": "mlp", "hidden": [16], "dropout": 0.5}, "norm": {"kind": "none"}},
    "ghost batch norm": {"norm": {"kind": "ghost", "size": 5}},
    "noisy batch norm": {"norm": {"kind": "noisy"}},
    "batch renorm": {"norm": {"kind": "renorm", "warmup": 4, "r_steps": 16, "d_steps": 10}},
    "frozen batch norm": {"norm": {"kind": "frozen", "after": 9}},
    "whitening": {"norm": {"kind": "whiten"}},
    "a model of the user's own": {"model": {"kind": "module", "module": "mine:make"}, "norm": {"kind": "none"}},
    "probes and precise statistics of such a model": {
        "model": {"kind": "module", "module": "mine:make"},
        "norm": {"kind": "none"},
        "probes": {"at": 3},
        "train": {"population_statistics": "precise"},
    },
}  # fmt: skip


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, byte_images: str, own_recipe: OwnRecipe) -> Path:
    """The current folder, with images.npz and mine.py, which the recipes name."""
    own_recipe(NOISY)
    return tmp_path


def recipe_of(name: str) -> Recipe:
    sections = dict(RUNS[name])
    train = {"steps": STEPS, "evaluate_every": 5, "target": {"value": 1.0}, "stop_at_target": False}
    return tiny(**sections | {"train": train | sections.get("train", {})})


def new_state(recipe: Recipe) -> TrainState:
    memory_format = data.MEMORY_FORMATS[recipe.train.memory_format]
    return TrainState(recipe, data.load(recipe.data, CPU, memory_format), CPU)


def trained(state: TrainState, until: int = STEPS) -> tuple[list[Evaluation], RunResult]:
    """The evaluations of a run on to that step, and its result."""
    events = [event for _, event in training_loop(state, stop=lambda: state.step == until < STEPS)]
    assert isinstance(events[-1], RunFinished)
    return [event.evaluation for event in events if isinstance(event, Evaluated)], events[-1].result


def saved_and_loaded(state: TrainState, file: Path) -> dict[str, Any]:
    torch.save(state.state_dict(), file)
    found: dict[str, Any] = torch.load(file, weights_only=True)
    return found


def assert_same_bits(one: Any, other: Any, where: str = "state") -> None:
    """Of nested dicts, lists and tuples of tensors and numbers, whose times and memory are left out."""
    assert type(one) is type(other), where
    if isinstance(one, torch.Tensor):
        assert (one.dtype, one.shape, one.stride()) == (other.dtype, other.shape, other.stride()), where
        assert one.numpy().tobytes() == other.numpy().tobytes(), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one.keys() - NOT_COMPARED:
            assert_same_bits(one[key], other[key], f"{where}[{key!r}]")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for k, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same_bits(a, b, f"{where}[{k}]")
    else:
        assert repr(one) == repr(other), where  # of NaN too


@pytest.mark.parametrize("name", ["dropout", "noisy batch norm"])
def test_what_the_forward_pass_draws_depends_on_the_seed_alone(name: str) -> None:
    finals = []
    for seed, drawn_before in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(drawn_before)
        recipe = recipe_of(name)
        state = new_state(recipe.model_copy(update={"train": recipe.train.model_copy(update={"seed": seed})}))
        trained(state)
        finals.append(state.state_dict()["model"])
    assert_same_bits(finals[0], finals[1])
    assert not torch.equal(finals[0]["output.weight"], finals[2]["output.weight"])


@pytest.mark.parametrize("step", [10, STEPS])
def test_a_state_saved_between_an_update_and_its_evaluation_loses_nothing(step: int, folder: Path) -> None:
    recipe = recipe_of("momentum")
    whole = new_state(recipe)
    evaluations, result = trained(whole)
    first = new_state(recipe)
    events = (event for _, event in training_loop(first))
    before = []
    for event in events:
        if isinstance(event, Evaluated):
            before.append(event.evaluation)
        if isinstance(event, StepDone) and event.step == step:
            saved = saved_and_loaded(first, folder / "state.pt")
            break
    second = new_state(recipe)
    second.load_state_dict(saved)
    after, resumed = trained(second)
    assert before + after == evaluations
    assert (resumed.final, resumed.steps_to_target) == (result.final, result.steps_to_target)
    assert_same_bits(second.state_dict(), whole.state_dict())


def test_a_run_that_has_ended_trains_no_further(folder: Path) -> None:
    train = {"steps": STEPS, "evaluate_every": 1, "target": {"value": 0.01}, "stop_at_target": True}
    recipe = tiny(train=train)
    first, second = new_state(recipe), new_state(recipe)
    _, result = trained(first)
    assert result.status == "reached"
    second.load_state_dict(saved_and_loaded(first, folder / "state.pt"))
    evaluations, again = trained(second)
    assert evaluations == []
    assert (again.status, again.steps_run, again.final) == ("reached", result.steps_run, result.final)


def test_the_time_since_the_last_evaluation_is_saved_too() -> None:
    times = iter([0.0, 5.0, 100.0, 103.0])
    first = Clock(batch_size=60, device=CPU, now=lambda: next(times))
    first.start()
    saved = first.so_far(10)
    second = Clock(batch_size=60, device=CPU, now=lambda: next(times), intervals=saved)
    second.start()
    second.pause(13)
    assert second.intervals == [(10, 5.0), (3, 3.0)]


def test_the_runs_above_use_the_features_in_their_names() -> None:
    skipping, drawing = new_state(recipe_of("fp16 with skipped steps")), new_state(recipe_of("augmentation"))
    began = drawing.augmentation.get_state()
    for state in (skipping, drawing):
        while state.step < 3:
            optimizer_step(state, *state.next_batch())
    assert skipping.batches > skipping.step
    assert skipping.scaler.get_scale() < 2.0**16
    assert not torch.equal(drawing.augmentation.get_state(), began)


def test_batches_that_are_decoded_ahead_count_only_when_they_are_taken(folder: Path) -> None:
    """A worker process has drawn more of the order than the run has trained on."""
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("datasets")
    random = np.random.default_rng(0)
    for number in range(48):
        place = folder / ("train", "test")[number % 2] / ("a", "b")[number // 2 % 2]
        place.mkdir(parents=True, exist_ok=True)
        image.fromarray(random.integers(0, 256, (8, 8), np.uint8)).save(place / f"{number}.png")
    hub = {"source": "hub", "name": str(folder), "shape": [1, 8, 8], "classes": 2, "in_memory_gib": 0.0, "workers": 1}
    recipe = tiny(data=hub | {"augment": "crop-flip"}, train={"batch_size": 5, "target": None})
    whole = new_state(recipe)
    expected = [whole.next_batch() for _ in range(9)]
    first, second = new_state(recipe), new_state(recipe)
    for _ in range(6):
        first.next_batch()
    second.load_state_dict(saved_and_loaded(first, folder / "state.pt"))
    assert_same_bits([second.next_batch() for _ in range(3)], expected[6:])


def test_seconds_and_peaks_of_memory_add_up_over_the_parts_of_a_run(folder: Path) -> None:
    recipe = recipe_of("momentum")
    first, second = new_state(recipe), new_state(recipe)
    _, part = trained(first, 10)
    second.load_state_dict(saved_and_loaded(first, folder / "state.pt"))
    _, result = trained(second)
    assert result.training_s > part.training_s
    assert result.evaluation_s > part.evaluation_s
    assert part.peak_memory_mib is not None
    assert result.peak_memory_mib is not None
    assert result.peak_memory_mib >= part.peak_memory_mib


# --- the examples that initial weights are fitted to ----------------------------------------------------------------


def test_lsuv_sees_examples_of_every_class_even_of_a_sorted_file(tmp_path: Path) -> None:
    y = np.arange(3).repeat(400)
    np.savez(tmp_path / "sorted.npz", x=np.eye(3, dtype=np.float32)[y], y=y)
    npz = {"source": "npz", "path": str(tmp_path / "sorted.npz"), "held_out": 10}
    recipe = tiny(data=npz, model={"kind": "mlp", "hidden": [4], "init": {"kind": "lsuv"}})
    examples = sample(data.load(recipe.data, CPU), 0, 500)
    assert examples.shape == (500, 3)
    assert (examples.sum(0) > 100).all()


# --- the clock ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("times", "steps", "training_s", "ms_per_step"),
    [
        ([0, 9, 100, 102, 200, 204], [10, 20, 30], 9 + 2 + 4, 1e3 * 6 / 20),  # the first interval is warm-up
        ([0, 1], [4], 1, 250),  # and better than no figure
        ([], [], 0, None),
    ],
)
def test_throughput_leaves_out_evaluations_and_the_first_interval(
    times: list[float], steps: list[int], training_s: float, ms_per_step: float | None
) -> None:
    clock = Clock(batch_size=60, device=CPU, now=lambda: times.pop(0))
    for step in steps:
        clock.start()
        clock.pause(step)
    assert (clock.training_s, clock.ms_per_step()) == (training_s, ms_per_step)
