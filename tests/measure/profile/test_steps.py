"""The step view: times from a faked clock exactly, and whole small runs for everything that is not a time."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bncli import kernels
from bncli.engine.data.splits import Dataset
from bncli.errors import DataError, RecipeError, Unavailable
from bncli.kernels import fused, native
from bncli.measure.profile import step_memory
from bncli.measure.profile.step_check import why_wrong
from bncli.measure.profile.step_models import Trainable, norms_of, one_batch
from bncli.measure.profile.step_own import OwnSubject
from bncli.measure.profile.step_recipes import RecipeSubject, subjects_of
from bncli.measure.profile.steps import StepRun
from bncli.recipe.load import load
from bncli.results.environment import Interval
from bncli.results.profile import STEP_CLASSES, Measuring, ProfileStarted, RowDone, StepCost, StepMemory, StepProfile
from tests.conftest import tiny
from tests.measure.reference import wrong_kernels

CPU = torch.device("cpu")
NO_MEMORY = StepMemory(0.0, 0.0, 0.0, 0.0, None)
CNN = {"kind": "cnn", "channels": [8, 8]}
RESNET = {"kind": "resnet", "depth": 20}
IMAGES = {"source": "synthetic", "shape": [3, 8, 8], "classes": 3, "examples": 40, "held_out": 20}


class Hand:
    """A clock's hand, which steps move by hand."""

    def __init__(self) -> None:
        self.ns = 0
        self.host_bound = self.samples = 0

    def now_ns(self) -> int:
        return self.ns

    def pass_ms(self, ms: float) -> None:
        self.ns += round(ms * 1e6)

    def wait(self) -> None:
        return

    def sample(self, work: Any, cold: bool) -> Callable[[], float]:
        raise AssertionError("a step is measured in a loop")


@dataclass
class Faked:
    """A subject whose steps take the time that is said."""

    hand: Hand
    step_ms: dict[str | None, float]
    name: str = "model"
    batch_size: int = 4
    has_kernels: bool = True
    steps: int | None = None
    real_data: bool = True
    tf32: bool = False
    notes: tuple[str, ...] = ()
    made: list[str | None] = field(default_factory=list)

    def dataset(self, device: torch.device) -> Dataset:
        return self.alone(torch.ones(4, 2), torch.zeros(4, dtype=torch.int64), 2)

    def alone(self, x: Tensor, y: Tensor, classes: int) -> Dataset:
        return one_batch(x, y, classes, "contiguous")

    def trainable(self, kernel: str | None, dataset: Dataset, device: torch.device, learns: bool = False) -> Trainable:
        self.made.append(kernel)
        model, ms = nn.Linear(2, 2), self.step_ms[kernel]
        batch = next(dataset.train.chunks(4))

        def step(x: Tensor, y: Tensor) -> Tensor:
            self.hand.pass_ms(ms)
            return torch.zeros(())

        def forward(x: Tensor) -> None:
            self.hand.pass_ms(ms / 4)

        return Trainable(model, torch.optim.SGD(model.parameters()), lambda: batch, step, forward, batch[0][:3], None)


@pytest.fixture
def other(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused kernel, played by the native one."""
    monkeypatch.setattr(fused, "batch_norm", native.batch_norm)
    monkeypatch.setattr(fused, "unavailable_reason", lambda device: None)


def faked_run(subject: Faked, seconds: float = 10.0, **arguments: Any) -> StepRun:
    hand = subject.hand
    arguments = {"clock": hand, "now_ns": hand.now_ns, "memory": lambda *_: NO_MEMORY, **arguments}
    return StepRun("run", [subject], CPU, seconds=seconds, **arguments)


def finished(run: StepRun) -> StepProfile:
    list(run.events())
    return run.result()


def by_kernel(profile: StepProfile, mode: str = "training") -> dict[str | None, StepCost]:
    return {row.kernel: row for row in profile.rows if row.mode == mode}


# --- times --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("other")
def test_each_ratio_is_over_the_native_step_of_the_same_mode() -> None:
    profile = finished(faked_run(Faked(Hand(), {"native": 8.0, "fused": 4.0})))
    rows = by_kernel(profile)
    assert set(rows["native"].samples_ms) == {8.0}
    assert set(rows["fused"].samples_ms) == {4.0}
    assert rows["native"].faster is None
    assert rows["fused"].faster is not None
    assert rows["fused"].faster.value == 2.0
    evaluated = by_kernel(profile, "evaluation")["native"]
    assert set(evaluated.samples_ms) == {2.0}
    assert (evaluated.batch_size, rows["native"].batch_size) == (3, 4)
    assert len(profile.rows) == profile.planned == 4


@pytest.mark.usefixtures("other")
@pytest.mark.parametrize("tf32", [False, True])
def test_a_subject_is_measured_with_its_own_tf32_and_torchs_setting_comes_back(tf32: bool) -> None:
    seen: set[str] = set()

    class Seen(Faked):
        def trainable(self, *given: Any, **named: Any) -> Trainable:
            seen.add(torch.backends.cudnn.conv.fp32_precision)
            return super().trainable(*given, **named)

    before = torch.backends.cudnn.conv.fp32_precision
    finished(faked_run(Seen(Hand(), {"native": 8.0, "fused": 4.0}, tf32=tf32)))
    assert {found == "tf32" for found in seen} == {tf32}
    assert torch.backends.cudnn.conv.fp32_precision == before


@pytest.mark.usefixtures("other")
def test_the_kernels_have_as_many_rounds_and_as_many_as_fit() -> None:
    times = {"native": 100.0, "fused": 50.0}
    few, many = (by_kernel(finished(faked_run(Faked(Hand(), {**times}), seconds))) for seconds in (4.0, 20.0))
    assert len(few["native"].samples_ms) == len(few["fused"].samples_ms)
    assert 6 <= len(few["native"].samples_ms) < len(many["native"].samples_ms)
    assert len(many["native"].samples_ms) * 0.15 <= 20.0 / 2  # half of the seconds are for training


@pytest.mark.usefixtures("other")
@pytest.mark.parametrize("least", [6, 8])
def test_a_step_far_over_the_time_has_the_fewest_rounds_all_the_same_and_the_bar_tells(least: int) -> None:
    hand, told, at_s = Hand(), dict[str, float](), dict[str, float]()
    run = faked_run(Faked(hand, {"native": 60_000.0, "fused": 60_000.0}), 1.0, least_rounds=least)
    for event in run.events():
        if isinstance(event, Measuring):
            told[event.label], at_s[event.label] = event.least_s, hand.ns / 1e9
    for mode in ("training", "evaluation"):
        native, fused = (by_kernel(run.result(), mode)[kernel] for kernel in ("native", "fused"))
        assert len(native.samples_ms) == len(fused.samples_ms) == least
        assert fused.faster is not None
        assert fused.faster.interval == Interval(1.0, 1.0)
    assert told["model: models, and whether their steps agree"] == 0
    assert told["model: training, round 2"] == pytest.approx(at_s[f"model: training, round {least}"] + 0.5)
    assert told["model: evaluation, round 2"] == pytest.approx(at_s[f"model: evaluation, round {least}"] + 0.3)


@pytest.mark.usefixtures("other")
def test_a_step_within_the_time_is_expected_to_end_in_it() -> None:
    events = list(faked_run(Faked(Hand(), {"native": 8.0, "fused": 4.0}), 10.0).events())
    assert max(event.least_s for event in events if isinstance(event, Measuring)) <= 10.5


@pytest.mark.usefixtures("other")
def test_what_is_left_of_an_interrupted_run_is_what_was_finished() -> None:
    run = faked_run(Faked(Hand(), {"native": 8.0, "fused": 4.0}))
    events = run.events()
    rounds = (event for event in events if isinstance(event, Measuring) and "training, round 3" in event.label)
    assert next(rounds)
    events.close()
    profile = run.result()
    assert [row.kernel for row in profile.rows] == ["native", "fused"]
    assert [len(row.samples_ms) for row in profile.rows] == [3, 3]
    assert profile.planned == 4
    assert profile.rows[1].faster is not None


@pytest.mark.usefixtures("other")
def test_the_bar_only_moves_forward_and_each_row_is_told_once() -> None:
    hand = Hand()
    subjects = [Faked(hand, {"native": 80.0, "fused": 40.0}, name=name) for name in ("one", "two")]
    run = StepRun("run", subjects, CPU, clock=hand, now_ns=hand.now_ns, memory=lambda *_: NO_MEMORY)
    events = list(run.events())
    assert events[0] == ProfileStarted("run", 8, 40.0)
    fractions = [event.fraction for event in events if isinstance(event, Measuring)]
    assert fractions == sorted(fractions)
    assert 0 <= fractions[0] <= fractions[-1] <= 1
    assert tuple(event.row for event in events if isinstance(event, RowDone)) == run.result().rows


# --- what is refused ----------------------------------------------------------------------------------------------


def test_a_kernel_that_is_not_here_has_its_reason_and_the_other_its_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "unavailable_reason", lambda device: "there is no such device")
    subject = Faked(Hand(), {"native": 8.0})
    profile = finished(faked_run(subject))
    rows = by_kernel(profile)
    assert rows["fused"].error is not None
    assert "there is no such device" in rows["fused"].error
    assert rows["fused"].samples_ms == ()
    assert rows["native"].samples_ms
    assert len(profile.rows) == 4
    assert "fused" not in subject.made


@pytest.mark.parametrize("kernel", [wrong_kernels.right_by_the_seam, native.batch_norm])
def test_a_right_kernel_passes(kernel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert checked(kernel, monkeypatch) is None


@pytest.mark.parametrize(("seed", "batch_size"), [(0, 8), (1, 32)])
def test_a_relu_that_a_rounding_opens_is_no_kernels_fault(
    seed: int, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In these one element does so, and a gradient is up to 5 % off that of float64."""
    assert checked(wrong_kernels.right_by_the_seam, monkeypatch, RESNET, seed=seed, batch_size=batch_size) is None


def checked(kernel: Any, monkeypatch: pytest.MonkeyPatch, model: Any = CNN, **train: Any) -> str | None:
    """What the check says of a model with that kernel."""
    monkeypatch.setattr(fused, "batch_norm", kernels.adapted(kernel))
    monkeypatch.setattr(fused, "unavailable_reason", lambda device: None)
    recipe = tiny(data=IMAGES, model=model, train={"batch_size": 8, **train})
    subject = RecipeSubject("resnet", recipe)
    dataset = subject.dataset(CPU)
    return why_wrong(subject, "fused", subject.trainable("fused", dataset, CPU), dataset, CPU)


def constant_statistics(x, weight, bias, eps, residual=None, activation=None, statistics=None):  # type: ignore[no-untyped-def]
    """Right forward; its gradient takes the batch's mean and variance for constants."""
    if statistics is None:
        var, mean = torch.var_mean(wrong_kernels.work(x.detach()), wrong_kernels.over(x), correction=0)
        statistics = (mean, var)
    return native.batch_norm(x, weight, bias, eps, residual, activation, statistics)


def no_bias_gradient(x, weight, bias, eps, residual=None, activation=None, statistics=None):  # type: ignore[no-untyped-def]
    return native.batch_norm(x, weight, bias.detach() + 0 * bias, eps, residual, activation, statistics)


def biased_variance(x, weight, bias, eps, residual=None, activation=None, statistics=None):  # type: ignore[no-untyped-def]
    """Right but for the variance that it says it used, which the running one follows."""
    y, mean, var = native.batch_norm(x, weight, bias, eps, residual, activation, statistics)
    return y, mean, var * 0.99


def wrong_in_float32(x, *arguments):  # type: ignore[no-untyped-def]
    return (native.batch_norm if x.dtype == torch.float64 else constant_statistics)(x, *arguments)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("kernel", "of"),
    [
        (constant_statistics, "gradient"),
        (no_bias_gradient, "gradient"),
        (biased_variance, "running statistic"),
        (wrong_in_float32, "gradient"),
    ],
)
def test_a_wrong_kernel_is_told_by_what_is_wrong(
    kernel: Any, of: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = checked(kernel, monkeypatch, precision=precision)
    assert found is not None
    assert f"wrong: the {of} of " in found


def test_a_wrong_kernel_has_its_error_and_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "batch_norm", kernels.adapted(constant_statistics))
    monkeypatch.setattr(fused, "unavailable_reason", lambda device: None)
    run = StepRun("tiny", [RecipeSubject("tiny", tiny())], CPU, seconds=0.2, memory=lambda *_: NO_MEMORY)
    rows = by_kernel(finished(run))
    assert rows["fused"].error is not None
    assert rows["fused"].error.startswith("wrong: ")
    assert rows["fused"].samples_ms == ()
    assert rows["fused"].faster is None
    assert rows["native"].samples_ms


def test_an_arm_that_is_too_large_for_its_data_is_refused() -> None:
    recipe = tiny(train={"batch_size": 200, "steps": 60})
    with pytest.raises(DataError, match="batch_size"):
        finished(StepRun("tiny", [RecipeSubject("tiny", recipe)], CPU, seconds=0.1, memory=lambda *_: NO_MEMORY))


# --- a recipe -----------------------------------------------------------------------------------------------------


def test_a_recipe_without_batch_norm_has_one_row_a_mode_and_no_kernel() -> None:
    recipe = tiny(norm={"kind": "group"})
    run = StepRun("tiny", [RecipeSubject("tiny", recipe)], CPU, seconds=0.2, memory=lambda *_: NO_MEMORY)
    profile = finished(run)
    assert [(row.kernel, row.mode) for row in profile.rows] == [(None, "training"), (None, "evaluation")]
    assert profile.rows[0].norms == "1 GroupNorm"
    assert profile.planned == 2


def test_the_classes_of_a_row_sum_to_its_median_step() -> None:
    run = StepRun("tiny", [RecipeSubject("tiny", tiny())], CPU, ("native",), seconds=0.2, memory=lambda *_: NO_MEMORY)
    for row in finished(run).rows:
        assert tuple(row.shares_ms) == STEP_CLASSES
        median = torch.tensor(row.samples_ms).double().quantile(0.5).item()
        assert sum(row.shares_ms.values()) == pytest.approx(median, rel=1e-6)
        assert (row.shares_ms["optimizer"] > 0) == (row.mode == "training")
        assert row.shares_ms["normalization"] > 0


def test_the_weights_stay_while_a_recipes_step_is_timed() -> None:
    subject = RecipeSubject("tiny", tiny(optimizer={"kind": "adam", "lr": 0.1}))
    trainable = subject.trainable("native", subject.dataset(CPU), CPU)
    before = [parameter.clone() for parameter in trainable.model.parameters()]
    for _ in range(20):
        trainable.step(*trainable.batch())
    for parameter, start in zip(trainable.model.parameters(), before, strict=True):
        torch.testing.assert_close(parameter, start, rtol=0, atol=1e-10)


def test_a_learner_trains_at_the_recipes_own_rate() -> None:
    subject = RecipeSubject("tiny", tiny())
    trainable = subject.trainable("native", subject.dataset(CPU), CPU, learns=True)
    losses = [float(trainable.step(*trainable.batch())) for _ in range(40)]
    assert losses[-1] < losses[0] / 2


ARMS = """
data: {source: synthetic, shape: [8], examples: 100}
model: {kind: mlp, hidden: [8]}
optimizer: {kind: sgd, lr: 0.1, momentum: 0.9}
train: {steps: 10, batch_size: 20}
arms:
  plain: {}
  faster: {optimizer: {lr: 1.0}}
  other start: {model: {init: xavier}}
  without momentum: {optimizer: {momentum: 0.0}}
  normed: {norm: batch}
  fused: {norm: {kind: batch, kernel: fused, momentum: 0.2}}
  cumulative: {norm: {kind: batch, momentum: null}}
  large: {train: {batch_size: 50}}
"""


@pytest.fixture
def arms(tmp_path: Path) -> str:
    (tmp_path / "arms.yaml").write_text(ARMS)
    return str(tmp_path / "arms.yaml")


@pytest.mark.usefixtures("other")
def test_arms_whose_steps_take_the_same_work_are_one(arms: str) -> None:
    subjects = subjects_of(load(arms))
    assert [subject.name for subject in subjects] == ["plain", "without momentum", "normed", "cumulative", "large"]
    assert subjects[0].stands_for == ("faster", "other start")
    assert subjects[2].stands_for == ("fused",)
    assert "stands for faster, other start" in subjects[0].notes[0]


@pytest.mark.usefixtures("other")
def test_one_arm_can_be_asked_for_by_name(arms: str) -> None:
    (subject,) = subjects_of(load(arms), "faster")
    assert (subject.name, subject.recipe.optimizer.lr) == ("faster", 1.0)
    with pytest.raises(RecipeError, match="no such arm; did you mean faster"):
        subjects_of(load(arms), "fastr")


def test_the_norms_remarks_and_the_steps_behind_them_are_in_the_result() -> None:
    recipe = tiny(norm={"kind": "batch", "momentum": 0.9}, train={"batch_size": 17})
    run = StepRun("tiny", [RecipeSubject("tiny", recipe)], CPU, ("native",), seconds=0.5, memory=lambda *_: NO_MEMORY)
    profile = finished(run)
    assert {remark.finding.split(":")[0] for remark in profile.remarks} == {
        "momentum 0.9",
        "an epoch's last batch would have 1 example",
    }
    assert any("watched for 5 training steps" in note for note in profile.notes)


# --- a module of the user's own -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("other")
@pytest.mark.parametrize("name", ["healthy", "TwoOutputs"])
def test_a_function_and_a_class_are_measured_on_every_kernel(name: str) -> None:
    subject = OwnSubject(f"tests.measure.profile.own_models:{name}", (4, 3, 8, 8))
    profile = finished(StepRun(name, [subject], CPU, seconds=0.3, memory=lambda *_: NO_MEMORY))
    rows = by_kernel(profile)
    assert rows["native"].norms == "1 batch norm"
    assert rows["fused"].norms == "1 batch norm (1 with relu)"
    assert [row.error for row in profile.rows] == [None] * 4
    assert profile.remarks == ()
    assert any("random numbers" in note for note in profile.notes)


def test_the_step_of_a_users_module_leaves_its_weights() -> None:
    subject = OwnSubject("tests.measure.profile.own_models:healthy", (4, 3, 8, 8))
    trainable = subject.trainable("native", subject.dataset(CPU), CPU)
    before = [parameter.clone() for parameter in trainable.model.parameters()]
    loss = trainable.step(*trainable.batch())
    assert all(torch.equal(*pair) for pair in zip(trainable.model.parameters(), before, strict=True))
    assert loss == trainable.step(*trainable.batch())


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (
            "tests.measure.profile.own_models:missing",
            "has no attribute 'missing'; it is looked for in the current folder",
        ),
        ("tests.no_such_module:make", "No module named"),
        ("tests.measure.profile.own_models:no_module", "returned a Tensor; expected a torch.nn.Module"),
    ],
)
def test_a_module_that_is_not_there_is_the_users_mistake(name: str, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        finished(StepRun("own", [OwnSubject(name, (4, 3, 8, 8))], CPU, memory=lambda *_: NO_MEMORY))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("Raising", "raised RuntimeError: no such luck. It is given a batch (4, 3)"),
        ("OnlyWholeNumbers", "holds no floating-point tensor"),
        ("one_value_a_channel", "Expected more than 1 value per channel"),
    ],
)
def test_a_module_that_cannot_be_trained_has_the_reason_in_its_rows(name: str, says: str) -> None:
    shapes = {"Raising": (4, 3), "one_value_a_channel": (1, 4)}
    subject = OwnSubject(f"tests.measure.profile.own_models:{name}", shapes.get(name, (4, 3, 8, 8)))
    profile = finished(StepRun("own", [subject], CPU, ("native",), seconds=0.2, memory=lambda *_: NO_MEMORY))
    errors = [row.error for row in profile.rows if row.kernel in (None, "native")]
    assert len(errors) == 2
    assert all(error is not None and says in error for error in errors)
    if name == "one_value_a_channel":
        assert "one value a channel" in profile.remarks[0].finding


# --- memory and the trace -----------------------------------------------------------------------------------------


def test_the_parts_of_memory_are_those_of_the_definition() -> None:
    recipe = tiny(optimizer={"kind": "adam", "lr": 0.1})
    subject = RecipeSubject("tiny", recipe)
    trainable = subject.trainable("native", subject.dataset(CPU), CPU)
    x, y = trainable.batch()
    trainable.step(x, y)
    parts = step_memory.parts_of(trainable, lambda: trainable.step(x, y))
    values = 8 * 16 + 2 * 16 + 16 * 3 + 3  # linear without bias, norm, output
    batch = 20 * (8 + 16 + 16 + 3)  # x, before the norm, after the relu, log softmax
    saved = 4 * 16  # the batch's statistics and the running ones
    tensors = 5  # each with a step counter of its own
    assert parts["parameters_mib"] == parts["gradients_mib"] == values * 4 / 2**20
    assert parts["optimizer_mib"] == (2 * values + tensors) * 4 / 2**20
    assert parts["activations_mib"] == ((batch + saved + 1) * 4 + 20 * 8) / 2**20  # and y, and a count


def test_the_peak_of_a_fresh_process_holds_the_parts() -> None:
    recipe = tiny(model={"kind": "mlp", "hidden": [1500, 1500]}, optimizer={"kind": "adam", "lr": 0.1})
    subject = RecipeSubject("tiny", recipe)
    dataset = subject.dataset(CPU)
    batch = subject.trainable("native", dataset, CPU).batch()
    found = step_memory.measure(subject, "native", batch, dataset.classes)
    parts = found.parameters_mib + found.gradients_mib + found.optimizer_mib + found.activations_mib
    assert found.parameters_mib > 8
    assert found.peak_mib is not None
    assert parts * 0.9 < found.peak_mib < 5 * parts + 100


def give_up() -> None:
    os._exit(3)


def raise_it() -> None:
    raise Unavailable("not today")


@pytest.mark.parametrize(
    ("function", "says"), [(give_up, "ended with exit code 3"), (raise_it, "Unavailable: not today")]
)
def test_a_process_that_does_not_come_through_says_why(function: Callable[[], None], says: str) -> None:
    with pytest.raises(RuntimeError, match=says):
        step_memory.in_fresh_process(function, (), 60.0)


@pytest.mark.usefixtures("other")
def test_a_memory_that_is_unknown_leaves_the_times() -> None:
    def unknown(*_: object) -> StepMemory:
        raise RuntimeError("its process ended with exit code -9")

    profile = finished(faked_run(Faked(Hand(), {"native": 8.0, "fused": 4.0}), memory=unknown))
    assert by_kernel(profile)["native"].memory is None
    assert by_kernel(profile)["native"].samples_ms
    assert any("exit code -9" in note for note in profile.notes)


@pytest.mark.usefixtures("other")
def test_the_trace_holds_a_step_of_each_kernel(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    finished(faked_run(Faked(Hand(), {"native": 8.0, "fused": 4.0}), trace=path))
    names = {event.get("name") for event in json.loads(path.read_text())["traceEvents"]}
    assert {"model, native", "model, fused"} <= names


# --- the fused kernel itself --------------------------------------------------------------------------------------


def test_a_fused_row_has_its_relus_in_normalization() -> None:
    recipe = tiny(model={"kind": "mlp", "hidden": [2]}, train={"batch_size": 4})
    subject = RecipeSubject("tiny", recipe)
    run = StepRun("tiny", [subject], CPU, ("native", "fused"), seconds=0.3, memory=lambda *_: NO_MEMORY)
    rows = by_kernel(finished(run))
    assert rows["fused"].error is None
    assert rows["fused"].norms == "1 batch norm (1 with relu)"
    assert rows["native"].shares_ms["activation"] > 0
    assert rows["fused"].shares_ms["activation"] == 0
    assert rows["fused"].shares_ms["normalization"] > 0


def test_norms_are_told_by_kind() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2), nn.GroupNorm(1, 2), nn.GroupNorm(1, 2), nn.LayerNorm(2))
    assert norms_of(model) == "1 batch norm, 2 GroupNorm, 1 LayerNorm"
    assert norms_of(nn.Linear(2, 2)) is None
