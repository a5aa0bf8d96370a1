"""One run: its events, its result, what ends it, and that nothing but the recipe decides it."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from bncli.engine import data
from bncli.engine.data.splits import order
from bncli.engine.device import cpu_threads
from bncli.engine.models import build
from bncli.engine.models.init import stream
from bncli.engine.train import evaluate, evaluation_size, optimizer_step, smaller_batches, train, train_together
from bncli.engine.train.state import TrainState
from bncli.errors import CHECK_FAILED, DataError, RunFailed
from bncli.recipe.load import plain
from bncli.recipe.sections import Recipe
from bncli.results.train import Evaluated, Event, RunFinished, RunResult, RunStarted, StepDone
from tests.conftest import OWN, TINY, tiny
from tests.engine.conftest import OwnRecipe, steps_to_target

CPU = torch.device("cpu")


def events(recipe: Recipe, **arguments: Any) -> list[Event]:
    return list(train(recipe, "cpu", **arguments))


def run(recipe: Recipe, **arguments: Any) -> RunResult:
    last = events(recipe, **arguments)[-1]
    assert isinstance(last, RunFinished)
    return last.result


def state(recipe: Recipe) -> TrainState:
    return TrainState(recipe, data.load(recipe.data, CPU), CPU)


def losses(recipe: Recipe) -> list[float]:
    return [event.loss for event in events(recipe) if isinstance(event, StepDone)]


# --- what a run loads ---------------------------------------------------------------------------------------------


def test_a_run_loads_neither_scikit_learn_nor_triton_nor_the_compiler(own_recipe: OwnRecipe) -> None:
    """Digits are read without the first. A copied optimizer's `load_state_dict`, as torch has it, would load the last
    where a run is probed: a second, and 140 MiB of its memory."""
    deep = {"kind": "mlp", "hidden": [16, 12], "activation": "sigmoid"}
    few = {"steps": 7, "target": None}
    recipes = [
        tiny(data={"source": "digits"}, model=deep, probes={"at": 7}, train=few),
        own_recipe(OWN.format(act="pass")),
    ]
    code = (
        "import sys; from bncli.engine.models import build\n"
        "from bncli.engine.train import data, train, train_together\n"
        "print('triton' in sys.modules)\n"
        "from bncli.recipe.sections import Recipe\n"
        "probed, own = map(Recipe.model_validate_json, sys.argv[1:])\n"
        "build(own, (8,), 3)\n"
        "*_, last = train(probed, 'cpu')\n"
        "print(*sorted({point.step for point in last.result.probes}))\n"
        "two = [probed.model_copy(update={'probes': None})] * 2\n"
        "list(train_together(two, 'cpu', dataset=data.load(probed.data, 'cpu')))\n"
        "print(*{'sklearn', 'torch._dynamo', 'sympy'} & sys.modules.keys())"
    )
    command = [sys.executable, "-c", code, *(recipe.model_dump_json() for recipe in recipes)]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines() == ["False", "0 7", ""]


# --- events and results -------------------------------------------------------------------------------------------


def test_a_run_starts_evaluates_steps_and_finishes_in_that_order() -> None:
    found = events(tiny(train={"steps": 13, "target": None}))
    first, second, *_, last = found
    assert isinstance(first, RunStarted)
    assert isinstance(second, Evaluated)
    assert isinstance(last, RunFinished)
    steps = [event.evaluation.step for event in found if isinstance(event, Evaluated)]
    assert steps == [evaluation.step for evaluation in last.result.evaluations] == [0, 5, 10, 13]
    assert (last.result.status, last.result.steps_to_target) == ("budget", None)


def test_a_run_stops_once_its_steps_to_target_are_final() -> None:
    result = run(tiny())
    assert result.status == "reached"
    assert result.target is not None
    assert (result.steps_to_target, result.first_hit) == steps_to_target(result.evaluations, result.target)
    assert steps_to_target(result.evaluations[:-1], result.target)[0] is None
    assert result.steps_run < result.budget


def test_a_run_with_several_targets_continues_to_the_hardest() -> None:
    alone, both = run(tiny()), run(tiny(train={"target": {"value": 0.8, "also": [0.9, 0.7]}}))
    assert both.evaluations == alone.evaluations
    assert [each.target.value for each in both.also] == [0.9, 0.7]
    assert (both.also[0].steps, both.also[0].first_hit) == (alone.steps_to_target, alone.first_hit)
    assert both.steps_to_target is not None
    assert both.also[1].steps is not None
    assert alone.steps_to_target is not None
    assert both.also[1].steps < both.steps_to_target < alone.steps_to_target
    loss = {"metric": "loss", "value": 0.5, "also": [1e-9]}
    never = run(tiny(train={"target": loss, "steps": 40}))
    assert (never.status, never.steps_run, never.also[0].steps) == ("budget", 40, None)


def test_the_constant_guess_is_the_share_of_the_most_frequent_class_among_the_held_out_examples(tmp_path: Path) -> None:
    y, y_test = np.arange(60) % 3, np.array([0, 1, 2, 2])
    x = np.random.default_rng(0).standard_normal((64, 8)).astype(np.float32)
    np.savez(tmp_path / "uneven.npz", x=x[:60], y=y, x_test=x[60:], y_test=y_test)
    npz = {"source": "npz", "path": str(tmp_path / "uneven.npz")}
    assert run(tiny(data=npz, train={"steps": 5, "target": None})).constant_guess == 0.5


def test_evaluations_can_be_spaced_evenly_in_log_step() -> None:
    result = run(tiny(train={"evaluate_every": {"points_per_doubling": 1}, "target": None}))
    assert [evaluation.step for evaluation in result.evaluations] == [0, 1, 2, 4, 8, 16, 32, 60]


def test_a_run_that_goes_on_uses_its_budget_and_has_the_same_steps_to_target() -> None:
    stopped, whole = run(tiny()), run(tiny(train={"stop_at_target": False}))
    assert whole.steps_run == 60
    assert whole.steps_to_target == stopped.steps_to_target


def test_a_loss_target_is_reached_from_above() -> None:
    result = run(tiny(train={"target": {"metric": "loss", "value": 0.5}}))
    assert result.status == "reached"
    assert result.best == min(evaluation.loss for evaluation in result.evaluations)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_loss_that_is_not_finite_ends_the_run_as_diverged_with_the_step(momentum: float) -> None:
    sgd = {"kind": "sgd", "lr": 1e30, "momentum": momentum}
    result = run(tiny(optimizer=sgd, norm={"kind": "none"}))
    assert result.status == "diverged"
    assert result.steps_to_target is None
    assert result.reason is not None
    assert result.reason.startswith("the training loss is ")
    assert result.reason.endswith(f"at step {result.steps_run}")
    assert result.best is not None
    assert math.isfinite(result.best)


def test_stop_is_obeyed_after_the_step_in_progress() -> None:
    answers = iter([False] * 6 + [True] * 100)
    result = run(tiny(), stop=lambda: next(answers))
    assert result.status == "interrupted"
    assert result.steps_run == 7


def test_vectors_from_a_file_are_refused_by_a_model_for_images(tmp_path: Path) -> None:
    np.savez(tmp_path / "vectors.npz", x=np.zeros((40, 8), np.float32), y=np.arange(40) % 3)
    npz = {"source": "npz", "path": str(tmp_path / "vectors.npz"), "held_out": 10}
    with pytest.raises(DataError, match=r"model.kind: a cnn needs images and the data are vectors; give x as"):
        run(tiny(data=npz, model={"kind": "cnn"}))


# --- what decides a run -------------------------------------------------------------------------------------------


def test_losses_follow_from_the_recipe_and_not_from_global_generators() -> None:
    torch.manual_seed(1)
    one = losses(tiny())
    torch.manual_seed(2)
    assert losses(tiny()) == one
    assert losses(tiny(train={"seed": 1})) != one


def test_arms_of_one_seed_see_the_same_batches_in_the_same_order() -> None:
    one, other = (state(tiny(norm={"kind": kind})) for kind in ("none", "batch"))
    for _ in range(20):
        assert all(map(torch.equal, one.next_batch(), other.next_batch()))


def test_the_loop_computes_what_a_hand_written_loop_computes() -> None:
    recipe = tiny(train={"steps": 20, "target": None})
    dataset = data.load(recipe.data, CPU)
    model = build(recipe, dataset.shape, dataset.classes)
    sgd = torch.optim.SGD(model.parameters(), lr=0.5)
    indices = order(len(dataset.train), 20, stream(0, "order"))
    expected = []
    with cpu_threads(1):  # as the loop takes for a net so small; sums over several threads are rounded otherwise
        for _, (x, y) in zip(range(20), dataset.train.batches(indices), strict=False):
            loss = nn.functional.cross_entropy(model(x), y)
            sgd.zero_grad()
            loss.backward()
            sgd.step()
            expected.append(loss.item())
    assert losses(recipe) == expected[4::5]


def test_evaluation_uses_the_running_statistics_and_changes_no_buffer() -> None:
    one = state(tiny())
    for _ in range(3):
        optimizer_step(one, *one.next_batch())
    before = {name: value.clone() for name, value in one.model.state_dict().items()}
    found = evaluate(one)[0].evaluation
    assert one.model.training
    assert all(torch.equal(value, before[name]) for name, value in one.model.state_dict().items())
    (x, y), *rest = one.dataset.held_out.chunks(1000)
    assert not rest
    right = (one.model.eval()(x).argmax(1) == y).float().mean().item()
    assert found.accuracy == pytest.approx(right)


def test_logits_that_are_not_finite_are_wrong_and_not_the_first_class(tmp_path: Path) -> None:
    y = (np.arange(400) % 20 == 0).astype(np.int64)  # 95 % are of class 0
    np.savez(tmp_path / "mostly.npz", x=np.random.default_rng(0).standard_normal((400, 8)), y=y)
    npz = {"source": "npz", "path": str(tmp_path / "mostly.npz"), "held_out": 200}
    sgd = {"kind": "sgd", "lr": 1e30}
    target = {"value": 0.94}
    recipe = tiny(data=npz, norm={"kind": "none"}, optimizer=sgd, train={"evaluate_every": 1, "target": target})
    result = run(recipe)
    dead = [evaluation for evaluation in result.evaluations if math.isnan(evaluation.loss)]
    assert len(dead) == 1
    assert all(evaluation.accuracy == 0 for evaluation in dead)
    assert (result.status, result.first_hit) == ("diverged", None)


def test_evaluation_by_batch_statistics_ignores_the_order_of_the_file(tmp_path: Path) -> None:
    """A chunk of one class only, whose mean the norm takes away, could not be told from one of another class."""
    random = np.random.default_rng(0)
    y = random.permutation(np.arange(3).repeat(1000))
    x = (np.eye(3)[y] + 0.1 * random.standard_normal((3000, 3))).astype(np.float32)
    found = []
    for name, rows in (("shuffled", np.arange(3000)), ("sorted", np.argsort(y, kind="stable"))):
        np.savez(tmp_path / f"{name}.npz", x=x, y=y, x_test=x[rows], y_test=y[rows])
        recipe = tiny(
            data={"source": "npz", "path": str(tmp_path / f"{name}.npz")},
            norm={"kind": "batch", "track_running_stats": False},
            train={"target": None},
        )
        found.append(run(recipe).final)
    assert found == pytest.approx([1, 1], abs=0.03)


def test_a_held_out_set_of_a_batch_and_one_is_evaluated_by_batch_statistics() -> None:
    data = {**TINY["data"], "held_out": 1001}
    recipe = tiny(data=data, norm={"kind": "batch", "track_running_stats": False}, train={"steps": 5})
    assert run(recipe).steps_run == 5


def test_a_batch_is_evaluated_at_once_where_examples_depend_on_each_other() -> None:
    own = {"kind": "module", "module": "mine:make"}
    alone, together = {"kind": "batch"}, {"kind": "batch", "track_running_stats": False}
    assert evaluation_size(tiny(norm=together), (64,)) == evaluation_size(tiny(model=own), (64,)) == 20
    assert evaluation_size(tiny(norm=alone), (64,)) == 2**17 // 64
    assert evaluation_size(tiny(norm=alone), (3, 224, 224)) == 20


def test_evaluation_leaves_weights_and_running_statistics_alone() -> None:
    often, rarely = (tiny(train={"evaluate_every": every, "target": None}) for every in (5, 60))
    assert losses(often)[-1] == losses(rarely)[-1]


# --- models of the user's own ---------------------------------------------------------------------------------------

CACHING = """
class Caching(nn.Linear):
    table = None
    def forward(self, x):
        if self.table is None:
            self.table = torch.arange(3.0).cos()
        return super().forward(x) * self.table
def make(shape, classes, norm):
    return Caching(shape[0], classes)
"""

FROZEN = """
class Frozen(nn.Sequential):
    def train(self, mode=True):
        calls.append(mode)
        return super().train(mode)
class FixedNorm(nn.Sequential):
    def train(self, mode=True):
        super().train(mode)
        self[0].eval()
        return self
calls = []
def make(shape, classes, norm):
    frozen = Frozen(nn.BatchNorm1d(shape[0]), nn.Dropout(0.0)).eval()
    frozen[1].train()
    calls.clear()
    return nn.Sequential(
        frozen, nn.BatchNorm1d(shape[0]), FixedNorm(nn.BatchNorm1d(shape[0])), nn.Linear(shape[0], classes)
    )
"""


def test_a_model_may_cache_tensors_of_its_first_evaluation(own_recipe: OwnRecipe) -> None:
    assert run(own_recipe(CACHING)).steps_run > 0


def test_frozen_modules_stay_frozen(own_recipe: OwnRecipe) -> None:
    one = state(own_recipe(FROZEN))
    for _ in range(3):
        evaluate(one)
        optimizer_step(one, *one.next_batch())
    parts: list[Any] = list(one.model.children())
    frozen, norm, fixed, _ = parts
    training = [part.training for part in (one.model, frozen, *frozen.children(), norm, fixed, fixed[0])]
    assert training == [True, False, False, True, True, True, False]
    for module, batches in ((frozen[0], 0), (norm, 3), (fixed[0], 0)):
        assert module.num_batches_tracked == batches
        assert bool(module.running_mean.any()) == bool(batches)
    assert set(sys.modules["mine"].calls) == {False, True}  # what a class does in its own `train` is done


@pytest.mark.skipif(sys.platform != "linux", reason="the peak cannot be set back here")
@pytest.mark.parametrize("phase", ["training", "evaluation"])
def test_peak_memory_is_that_of_training_and_of_evaluations_separately(own_recipe: OwnRecipe, phase: str) -> None:
    act = f"import torch; self.training == {phase == 'training'} and torch.ones(256 * 2**20 // 4).sum()"
    result = run(own_recipe(OWN.format(act=act), train={"steps": 12, "target": None}))
    assert result.peak_memory_mib is not None
    assert result.evaluation_peak_memory_mib is not None
    more = result.peak_memory_mib - result.evaluation_peak_memory_mib
    assert (more if phase == "training" else -more) > 64


# --- precision, layout, schedules ---------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_autocast_trains_to_the_target(precision: str) -> None:
    assert run(tiny(train={"precision": precision})).status == "reached"


def overflowing(noise: float) -> Recipe:
    """In fp16, on examples so large that the gradients times the scaler's first scale, 65,536, are infinite."""
    return tiny(
        data={**TINY["data"], "noise": noise},
        norm={"kind": "none"},
        optimizer={"kind": "sgd", "lr": 1e-4},
        schedule={"kind": "step", "milestones": [3], "gamma": 0.1},
        train={"precision": "fp16", "steps": 10, "evaluate_every": 1, "target": None},
    )


def test_a_step_that_the_fp16_scaler_skips_is_no_step_of_the_schedule() -> None:
    recipe = overflowing(50.0)
    one = state(recipe)
    rates, weights = [], []
    while one.step < 10:
        before = one.step
        optimizer_step(one, *one.next_batch())
        assert one.step == before + (one.skipped == 0)
        if not one.skipped:
            rates.append(one.optimizer.param_groups[0]["lr"])
            weights.append(one.model.output.weight.detach().clone())
    assert one.batches > 10
    assert rates == pytest.approx([1e-4] * 3 + [1e-5] * 7)
    assert not any(torch.equal(before, after) for before, after in itertools.pairwise(weights))
    result = run(recipe)
    assert (result.status, result.steps_run) == ("budget", 10)
    assert [evaluation.step for evaluation in result.evaluations] == list(range(11))


def test_a_run_whose_fp16_steps_are_all_skipped_has_diverged_with_the_reason() -> None:
    result = run(overflowing(1e6))  # infinite in fp16 already
    assert (result.status, result.steps_run) == ("diverged", 0)
    assert result.reason == "after step 0 the fp16 gradients of 50 batches in a row were not finite"


def allowed() -> tuple[bool, ...]:
    """Whether TF32 is, by torch's older settings and by its newer ones."""
    new = [torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn]
    old = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    return *old, *(setting.fp32_precision == "tf32" for setting in new)


@pytest.mark.parametrize("wanted", [True, False])
@pytest.mark.parametrize("broken_off", [True, False])
def test_tf32_is_as_the_recipe_says_during_a_run_and_as_before_after_it(wanted: bool, broken_off: bool) -> None:
    before, found = allowed(), train(tiny(train={"tf32": wanted}), "cpu")
    for _ in itertools.islice(found, 1 if broken_off else None):
        assert allowed() == (wanted,) * 5
    found.close()  # type: ignore[attr-defined]
    assert allowed() == before


@pytest.mark.parametrize(
    "change", [{"memory_format": "channels_last"}, pytest.param({"compile": True}, marks=pytest.mark.slow)]
)
def test_channels_last_and_compiled_models_train_as_contiguous_and_eager_ones(change: dict[str, Any]) -> None:
    images = {**TINY["data"], "shape": [2, 6, 6], "examples": 60, "held_out": 30}
    model = {"kind": "cnn", "channels": [8]}
    one, other = (losses(tiny(data=images, model=model, train={"target": None, **each})) for each in ({}, change))
    assert other == pytest.approx(one, rel=1e-3)


def test_the_schedule_reaches_the_optimizer() -> None:
    recipe = tiny(schedule={"kind": "step", "milestones": [5], "gamma": 0.1}, train={"steps": 10, "target": None})
    rates = [event.learning_rate for event in events(recipe) if isinstance(event, Evaluated)]
    assert rates == pytest.approx([0.5, 0.5, 0.05])  # that of the last update


def test_results_say_where_they_were_made() -> None:
    result = run(tiny())
    assert result.environment.torch == torch.__version__
    assert result.environment.tf32 is False
    assert result.parameters == 8 * 16 + 2 * 16 + 16 * 3 + 3
    assert result.peak_memory_mib is not None
    assert result.peak_memory_mib > 50
    assert replace(result, evaluations=()).samples_per_s is not None


# --- devices ------------------------------------------------------------------------------------------------------


@pytest.mark.cuda
def test_a_run_on_cuda_reaches_the_target_of_the_cpu_run() -> None:
    *_, last = train(tiny(), "cuda")
    assert isinstance(last, RunFinished)
    assert last.result.status == "reached"
    assert last.result.steps_to_target == pytest.approx(run(tiny()).steps_to_target, rel=0.2)


@pytest.mark.cuda
def test_steps_between_two_looks_at_the_loss_do_not_wait_for_the_gpu() -> None:
    found = train(tiny(train={"evaluate_every": 60, "target": None, "steps": 60}), "cuda")
    for event in found:
        if isinstance(event, Evaluated):
            break
    with warnings.catch_warnings(record=True) as waits:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            list(found)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    # Three looks at the loss and the figures of one evaluation, in 60 steps.
    assert len([wait for wait in waits if "synchroniz" in str(wait.message)]) < 12


# --- memory -------------------------------------------------------------------------------------------------------


def test_a_device_without_memory_for_a_step_is_told_with_what_to_try(own_recipe: OwnRecipe) -> None:
    recipe = own_recipe(OWN.format(act="import torch; raise torch.OutOfMemoryError('CUDA out of memory.')"))
    with pytest.raises(RunFailed) as caught:
        run(recipe)
    assert str(caught.value) == (
        "out of memory on cpu with 20 examples at a time; try train.batch_size: 10, or train.accumulate: 2, which "
        "keeps the batch of 20 in parts of 10, of each of which batch norm takes its statistics"
    )


@pytest.mark.parametrize(
    ("batch", "parts", "advice"),
    [
        (60, 2, "with 30 examples at a time; try train.batch_size: 30, or train.accumulate: 4, which keeps the batch"),
        (7, 1, "with 7 examples at a time; try train.batch_size: 3"),
        (3, 1, "with 3 examples at a time; use a smaller model"),
        (9, 1, "train.batch_size: 4, or train.accumulate: 3, which keeps the batch of 9 in parts of 3"),
    ],
)
def test_a_batch_is_split_into_equal_parts_of_two_or_more(batch: int, parts: int, advice: str) -> None:
    assert advice in smaller_batches(tiny(train={"batch_size": batch, "accumulate": parts}), CPU)


LIMITED = """
import resource, sys, torch
from bncli.engine import train
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + 2**29,) * 2)
sys.argv = ["bncli", "train", "-", "--quiet", "--device", "cpu", "--threads", "1", "-o", sys.argv[1]]
from bncli.cli import main
main()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="no such limit, or no /proc")
def test_a_cpu_without_memory_for_a_step_ends_train_with_a_sentence(tmp_path: Path) -> None:
    data_section = {**TINY["data"], "examples": 40_000}
    recipe = tiny(data=data_section, model={"kind": "mlp", "hidden": [4000]}, train={"batch_size": 40_000})
    ended = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path / "run")],
        input=json.dumps(plain(recipe)),
        capture_output=True,
        text=True,
    )
    assert (ended.returncode, ended.stdout) == (CHECK_FAILED, "")
    assert ended.stderr.startswith(
        "bncli: out of memory on cpu with 40000 examples at a time; try train.batch_size: 20000"
    )


# --- runs that train together ---------------------------------------------------------------------------------------


def several(*rates: float, **train: Any) -> list[Recipe]:
    """Of runs without norm, with the seeds 0, 1, ..."""
    sections = [
        {"optimizer": {"kind": "sgd", "lr": rate}, "train": train | {"seed": k}} for k, rate in enumerate(rates)
    ]
    return [tiny(norm={"kind": "none"}, **each) for each in sections]


def together(recipes: list[Recipe], **arguments: Any) -> list[list[Event]]:
    """The events of each run."""
    dataset, found = data.load(recipes[0].data, CPU), [[] for _ in recipes]  # type: ignore[var-annotated]
    for run, event in train_together(recipes, "cpu", dataset=dataset, **arguments):
        found[run].append(event)
    return found


def test_runs_that_train_together_have_the_events_of_each_alone() -> None:
    recipes = several(0.1, 0.2, 0.4)
    for found, recipe in zip(together(recipes), recipes, strict=True):
        expected = events(recipe)
        assert [type(event) for event in found] == [type(event) for event in expected]
        assert found[0] == expected[0]
        assert [event.learning_rate for event in found if isinstance(event, StepDone)] == [recipe.optimizer.lr] * (
            len([event for event in expected if isinstance(event, StepDone)])
        )
        assert isinstance(found[-1], RunFinished)
        assert isinstance(expected[-1], RunFinished)
        one, other = found[-1].result, expected[-1].result
        assert (one.status, one.steps_run, one.first_hit) == ("reached", other.steps_run, other.first_hit)
        assert one.steps_to_target == pytest.approx(other.steps_to_target, rel=1e-3)
        assert one.parameters == other.parameters
        costs = (one.ms_per_step, one.samples_per_s, one.peak_memory_mib, one.evaluation_peak_memory_mib)
        assert (*costs, one.cores_lacked) == (None,) * 5
    assert len({found[-1].result.steps_run for found in together(recipes)}) > 1  # type: ignore[union-attr]


def test_a_run_that_diverges_leaves_the_others_as_they_are() -> None:
    recipes = several(0.1, 1e30, 0.2, evaluate_every=1, target=None)
    found = together(recipes)
    results = [each[-1].result for each in found]  # type: ignore[union-attr]
    assert [result.status for result in results] == ["budget", "diverged", "budget"]
    assert results[1].reason == "the training loss is nan at step 2"
    without = together([recipes[0], recipes[2]])
    for one, other in zip((found[0], found[2]), without, strict=True):
        assert one[-1].result.final == pytest.approx(other[-1].result.final)  # type: ignore[union-attr]


def test_runs_can_be_given_up_and_interrupted() -> None:
    recipes, looks = several(0.1, 0.2, 0.4, target=None), itertools.count(1)
    leave = lambda: [0, 2] if next(looks) >= 3 else []  # noqa: E731
    results = [each[-1].result for each in together(recipes, leave=leave)]  # type: ignore[union-attr]
    assert [(result.status, result.steps_run) for result in results] == [
        ("given up", 3),
        ("budget", 60),
        ("given up", 3),
    ]
    steps = itertools.count(1)
    results = [each[-1].result for each in together(recipes, stop=lambda: next(steps) > 7)]  # type: ignore[union-attr]
    assert [(result.status, result.steps_run) for result in results] == [("interrupted", 8)] * 3


def test_runs_that_train_together_share_the_time() -> None:
    began = perf_counter()
    found = together(several(*[0.1] * 8, target=None))
    seconds = perf_counter() - began
    shares = [each[-1].result.training_s + each[-1].result.evaluation_s for each in found]  # type: ignore[union-attr]
    assert 0 < sum(shares) <= seconds
