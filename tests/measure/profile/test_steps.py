"""The step view: times from a faked clock exactly, and whole small runs for everything that is not a time."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bncli import kernels
from bncli.engine.data.splits import Dataset
from bncli.errors import DataError
from bncli.kernels import fused
from bncli.measure.profile.step_models import RecipeModel, Trainable, UserModel, one_batch
from bncli.measure.profile.steps import StepRun
from bncli.measure.timing.fresh_process import CallFailed
from bncli.results.environment import Interval
from bncli.results.profile import (
    STEP_CLASSES,
    Measuring,
    NormLayers,
    Note,
    ProfileStarted,
    RowDone,
    StepCost,
    StepMemory,
    StepProfile,
)
from tests.conftest import tiny
from tests.measure.profile.test_step_check import constant_statistics

OWN_MODELS = Path(__file__).with_name("own_models.py")

CPU = torch.device("cpu")
NO_MEMORY = StepMemory(0.0, 0.0, 0.0, 0.0, None)
WITH_RELU = (NormLayers("batch norm", 1, "fused", True, (("relu",),)),)


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
    notes: tuple[Note, ...] = ()
    made: list[str | None] = field(default_factory=list)

    def dataset(self, device: torch.device) -> Dataset:
        return self.single_batch(torch.ones(4, 2), torch.zeros(4, dtype=torch.int64), 2)

    def single_batch(self, x: Tensor, y: Tensor, classes: int) -> Dataset:
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


def test_a_wrong_kernel_has_its_error_and_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "batch_norm", kernels.adapted(constant_statistics))
    monkeypatch.setattr(fused, "unavailable_reason", lambda device: None)
    run = StepRun("tiny", [RecipeModel("tiny", tiny())], CPU, seconds=0.2, memory=lambda *_: NO_MEMORY)
    rows = by_kernel(finished(run))
    assert (rows["fused"].error, rows["fused"].wrong) == ("wrong result", True)
    assert rows["fused"].difference is not None
    assert rows["fused"].difference.kind == "gradient"
    assert rows["fused"].samples_ms == ()
    assert rows["fused"].faster is None
    assert rows["native"].samples_ms


def test_an_arm_that_is_too_large_for_its_data_is_refused() -> None:
    recipe = tiny(train={"batch_size": 200, "steps": 60})
    with pytest.raises(DataError, match="batch_size"):
        finished(StepRun("tiny", [RecipeModel("tiny", recipe)], CPU, seconds=0.1, memory=lambda *_: NO_MEMORY))


# --- a recipe -----------------------------------------------------------------------------------------------------


def test_a_recipe_without_batch_norm_has_one_row_a_mode_and_no_kernel() -> None:
    recipe = tiny(norm={"kind": "group"})
    run = StepRun("tiny", [RecipeModel("tiny", recipe)], CPU, seconds=0.2, memory=lambda *_: NO_MEMORY)
    profile = finished(run)
    assert [(row.kernel, row.mode) for row in profile.rows] == [(None, "training"), (None, "evaluation")]
    assert profile.rows[0].norms == (NormLayers("GroupNorm", 1),)
    assert profile.planned == 2


def test_the_classes_of_a_row_sum_to_its_median_step() -> None:
    run = StepRun("tiny", [RecipeModel("tiny", tiny())], CPU, ("native",), seconds=0.2, memory=lambda *_: NO_MEMORY)
    for row in finished(run).rows:
        assert tuple(row.shares_ms) == STEP_CLASSES
        median = torch.tensor(row.samples_ms).double().quantile(0.5).item()
        assert sum(row.shares_ms.values()) == pytest.approx(median, rel=1e-6)
        assert (row.shares_ms["optimizer"] > 0) == (row.mode == "training")
        assert row.shares_ms["normalization"] > 0


def test_the_norms_remarks_and_the_steps_behind_them_are_in_the_result() -> None:
    recipe = tiny(norm={"kind": "batch", "momentum": 0.9}, train={"batch_size": 17})
    a_ms_later = itertools.count(step=1_000_000).__next__  # whenever it is read, however busy the machine is
    settings = {"seconds": 0.5, "memory": lambda *_: NO_MEMORY, "now_ns": a_ms_later}
    run = StepRun("tiny", [RecipeModel("tiny", recipe)], CPU, ("native",), **settings)
    profile = finished(run)
    assert {remark.kind for remark in profile.remarks} == {"short half-life", "last batch of one"}
    assert [(note.kind, note.count) for note in profile.notes] == [("norms watched", 5)]


# --- a module of the user's own -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("other")
@pytest.mark.parametrize("name", ["healthy", "TwoOutputs"])
def test_a_function_and_a_class_are_measured_on_every_kernel(name: str) -> None:
    subject = UserModel(f"tests.measure.profile.own_models:{name}", (4, 3, 8, 8))
    profile = finished(StepRun(name, [subject], CPU, seconds=0.3, memory=lambda *_: NO_MEMORY))
    rows = by_kernel(profile)
    assert rows["native"].norms == (NormLayers("batch norm", 1, "native"),)
    assert rows["fused"].norms == WITH_RELU
    assert [row.error for row in profile.rows] == [None] * 4
    assert profile.remarks == ()
    assert profile.notes[0] == Note("random data", arm=subject.name)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("Raising", f"raised RuntimeError: no such luck, in {OWN_MODELS}:38. It is given a batch (4, 3)"),
        ("OnlyWholeNumbers", "holds no floating-point tensor"),
        ("one_value_a_channel", "Expected more than 1 value per channel"),
    ],
)
def test_a_module_that_cannot_be_trained_has_the_reason_in_its_rows(name: str, says: str) -> None:
    shapes = {"Raising": (4, 3), "one_value_a_channel": (1, 4)}
    subject = UserModel(f"tests.measure.profile.own_models:{name}", shapes.get(name, (4, 3, 8, 8)))
    profile = finished(StepRun("own", [subject], CPU, ("native",), seconds=0.2, memory=lambda *_: NO_MEMORY))
    errors = [row.error for row in profile.rows if row.kernel in (None, "native")]
    assert len(errors) == 2
    assert all(error is not None and says in error for error in errors)
    if name == "one_value_a_channel":
        assert profile.remarks[0].kind == "one value"


# --- memory and the trace -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("other")
def test_a_memory_that_is_unknown_leaves_the_times() -> None:
    def unknown(*_: object) -> StepMemory:
        raise CallFailed("its process ended with exit code -9")

    profile = finished(faked_run(Faked(Hand(), {"native": 8.0, "fused": 4.0}), memory=unknown))
    assert by_kernel(profile)["native"].memory is None
    assert by_kernel(profile)["native"].samples_ms
    reason = "CallFailed: its process ended with exit code -9"
    unknown_to = [note.kernel for note in profile.notes if note.kind == "memory unknown" and reason in str(note.reason)]
    assert unknown_to == ["native", "fused"]


@pytest.mark.usefixtures("other")
def test_the_trace_holds_a_step_of_each_kernel(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    finished(faked_run(Faked(Hand(), {"native": 8.0, "fused": 4.0}), trace=path))
    names = {event.get("name") for event in json.loads(path.read_text())["traceEvents"]}
    assert {"model, native", "model, fused"} <= names


# --- the fused kernel itself --------------------------------------------------------------------------------------


def test_a_fused_row_has_its_relus_in_normalization() -> None:
    recipe = tiny(model={"kind": "mlp", "hidden": [2]}, train={"batch_size": 4})
    subject = RecipeModel("tiny", recipe)
    run = StepRun("tiny", [subject], CPU, ("native", "fused"), seconds=0.3, memory=lambda *_: NO_MEMORY)
    rows = by_kernel(finished(run))
    assert rows["fused"].error is None
    assert rows["fused"].norms == WITH_RELU
    assert rows["native"].shares_ms["activation"] > 0
    assert rows["fused"].shares_ms["activation"] == 0
    assert rows["fused"].shares_ms["normalization"] > 0
