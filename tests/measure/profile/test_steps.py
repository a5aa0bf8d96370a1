"""The step view: times from a faked clock exactly, and whole small runs for everything that is not a time."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bncli import kernels
from bncli.engine.data.splits import Dataset
from bncli.engine.load import CoreWait
from bncli.errors import DataError, UsageError
from bncli.kernels import fused
from bncli.measure.profile.norm_diagnostics import TrainingPlan
from bncli.measure.profile.step_models import RecipeModel, StepModel, Trainable, UserModel, one_batch
from bncli.measure.profile.steps import StepRun
from bncli.measure.timing.fresh_process import CallFailed
from bncli.results.environment import Interval
from bncli.results.profile import (
    FOLDED,
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

USER_MODELS = Path(__file__).with_name("user_models.py")

CPU = torch.device("cpu")
NO_MEMORY = StepMemory(0.0, 0.0, 0.0, 0.0, None)
WITH_RELU = (NormLayers("batch norm", 1, "fused", True, (("relu",),)),)


class FakeTime:
    """A host's clock that moves with the steps alone."""

    def __init__(self) -> None:
        self.ns = 0

    def now_ns(self) -> int:
        return self.ns

    def pass_ms(self, ms: float) -> None:
        self.ns += round(ms * 1e6)


@dataclass
class Faked:
    """A model whose steps take the time that is said."""

    time: FakeTime
    step_ms: dict[str | None, float]
    name: str = "model"
    batch_size: int = 4
    has_kernels: bool = True
    tf32: bool = False
    notes: tuple[Note, ...] = ()
    made: list[str | None] = field(default_factory=list)

    def dataset(self, device: torch.device) -> Dataset:
        return one_batch(torch.ones(4, 2), torch.zeros(4, dtype=torch.int64), 2)

    def check(self, dataset: Dataset, device: torch.device) -> None:
        pass

    def trainable(self, kernel: str | None, dataset: Dataset, device: torch.device, learns: bool = False) -> Trainable:
        self.made.append(kernel)
        model, ms = nn.Linear(2, 2), self.step_ms[kernel]
        batch = next(dataset.train.chunks(4))

        def step(x: Tensor, y: Tensor) -> Tensor:
            self.time.pass_ms(ms)
            return torch.zeros(())

        def forward(model: nn.Module, x: Tensor) -> None:
            self.time.pass_ms(ms / 4)

        optimizer = torch.optim.SGD(model.parameters())
        return Trainable(model, optimizer, lambda: batch, step, forward, batch[0][:3], TrainingPlan())


def run_of(*models: StepModel, seconds: float = 0.2, **arguments: Any) -> StepRun:
    return StepRun("run", models, CPU, seconds=seconds, **{"step_memory": lambda *_: NO_MEMORY, **arguments})


def faked_run(*models: Faked, seconds: float = 10.0, **arguments: Any) -> StepRun:
    return run_of(*models, seconds=seconds, now_ns=models[0].time.now_ns, **arguments)


def finished(run: StepRun) -> StepProfile:
    list(run.events())
    return run.result()


def by_kernel(profile: StepProfile, mode: str = "training") -> dict[str | None, StepCost]:
    return {row.kernel: row for row in profile.rows if row.mode == mode}


# --- times --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("other")
def test_each_speedup_is_over_the_native_step_of_the_same_mode() -> None:
    profile = finished(faked_run(Faked(FakeTime(), {"native": 8.0, "fused": 4.0})))
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
def test_each_row_has_the_cores_that_its_rounds_lacked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CoreWait, "cores", lambda self: 0.7)
    profile = finished(faked_run(Faked(FakeTime(), {"native": 8.0, "fused": 4.0})))
    assert [row.cores_lacked for row in profile.rows] == [0.7] * 4


@pytest.mark.usefixtures("other")
@pytest.mark.parametrize("tf32", [False, True])
def test_a_model_is_measured_with_its_tf32_setting_and_torchs_comes_back(tf32: bool) -> None:
    seen: set[str] = set()

    class Seen(Faked):
        def trainable(self, *given: Any, **named: Any) -> Trainable:
            seen.add(torch.backends.cudnn.conv.fp32_precision)
            return super().trainable(*given, **named)

    before = torch.backends.cudnn.conv.fp32_precision
    finished(faked_run(Seen(FakeTime(), {"native": 8.0, "fused": 4.0}, tf32=tf32)))
    assert {found == "tf32" for found in seen} == {tf32}
    assert torch.backends.cudnn.conv.fp32_precision == before


@pytest.mark.usefixtures("other")
def test_the_kernels_have_as_many_rounds_and_as_many_as_fit() -> None:
    models = (Faked(FakeTime(), {"native": 100.0, "fused": 50.0}) for _ in range(2))
    runs = (faked_run(model, seconds=seconds) for model, seconds in zip(models, (4.0, 20.0), strict=True))
    few, many = (by_kernel(finished(run)) for run in runs)
    assert len(few["native"].samples_ms) == len(few["fused"].samples_ms)
    assert 6 <= len(few["native"].samples_ms) < len(many["native"].samples_ms)
    assert len(many["native"].samples_ms) * 0.15 <= 20.0 / 2  # half of the seconds are for training


@pytest.mark.usefixtures("other")
@pytest.mark.parametrize("least", [6, 8])
def test_a_step_far_over_the_time_has_the_fewest_rounds(least: int) -> None:
    fake, least_s, at_s = FakeTime(), dict[Any, float](), dict[Any, float]()
    run = faked_run(Faked(fake, {"native": 60_000.0, "fused": 60_000.0}), seconds=1.0, least_rounds=least)
    for event in run.events():
        if isinstance(event, Measuring):
            key = event.phase if event.round is None else (event.mode, event.round)
            least_s[key], at_s[key] = event.least_s, fake.ns / 1e9
    for mode in ("training", "evaluation"):
        native, fused = (by_kernel(run.result(), mode)[kernel] for kernel in ("native", "fused"))
        assert len(native.samples_ms) == len(fused.samples_ms) == least
        assert fused.faster is not None
        assert fused.faster.interval == Interval(1.0, 1.0)
    assert least_s["check"] == 0
    assert least_s["training", 2] == pytest.approx(at_s["training", least] + 0.5)
    assert least_s["evaluation", 2] == pytest.approx(at_s["evaluation", least] + 0.3)


@pytest.mark.usefixtures("other")
def test_a_step_within_the_time_is_expected_to_end_in_it() -> None:
    events = list(faked_run(Faked(FakeTime(), {"native": 8.0, "fused": 4.0})).events())
    assert max(event.least_s for event in events if isinstance(event, Measuring)) <= 10.5


@pytest.mark.usefixtures("other")
def test_an_interrupted_run_has_the_rounds_that_were_finished() -> None:
    run = faked_run(Faked(FakeTime(), {"native": 8.0, "fused": 4.0}))
    events = run.events()
    assert any(isinstance(event, Measuring) and event.round == 3 for event in events)
    events.close()  # type: ignore[attr-defined]
    profile = run.result()
    assert [row.kernel for row in profile.rows] == ["native", "fused"]
    assert [len(row.samples_ms) for row in profile.rows] == [3, 3]
    assert profile.planned == 4
    assert profile.rows[1].faster is not None


@pytest.mark.usefixtures("other")
def test_a_run_that_is_interrupted_after_the_rounds_has_all_times() -> None:
    run = faked_run(Faked(FakeTime(), {"native": 8.0, "fused": 4.0}))
    events = run.events()
    assert any(isinstance(event, RowDone) for event in events)  # the first, with its classes of time
    events.close()  # type: ignore[attr-defined]
    rows = run.result().rows
    assert len(rows) == 4
    assert all(row.samples_ms for row in rows)
    assert [bool(row.shares_ms) for row in rows] == [True, False, False, False]


@pytest.mark.usefixtures("other")
def test_the_bar_only_moves_forward_and_each_row_is_reported_once() -> None:
    fake = FakeTime()
    run = faked_run(*(Faked(fake, {"native": 80.0, "fused": 40.0}, name=name) for name in ("one", "two")))
    events = list(run.events())
    assert events[0] == ProfileStarted("run", 8, 10.0)
    measuring = [event for event in events if isinstance(event, Measuring)]
    fractions = [event.fraction for event in measuring]
    assert fractions == sorted(fractions)
    assert 0 <= fractions[0] <= fractions[-1] <= 1
    assert {event.subject for event in measuring} == {"one", "two"}
    assert ("two", "evaluation", 1) in {(event.subject, event.mode, event.round) for event in measuring}
    assert tuple(event.row for event in events if isinstance(event, RowDone)) == run.result().rows


# --- what is refused ----------------------------------------------------------------------------------------------


def test_an_unavailable_kernel_has_its_reason_and_the_other_its_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "unavailable_reason", lambda device: "there is no such device")
    model = Faked(FakeTime(), {"native": 8.0})
    profile = finished(faked_run(model))
    rows = by_kernel(profile)
    assert rows["fused"].error is not None
    assert "there is no such device" in rows["fused"].error
    assert rows["fused"].samples_ms == ()
    assert rows["native"].samples_ms
    assert len(profile.rows) == 4
    assert "fused" not in model.made


def test_a_wrong_kernel_has_its_error_and_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "batch_norm", kernels.adapted(constant_statistics))
    monkeypatch.setattr(fused, "unavailable_reason", lambda device: None)
    rows = by_kernel(finished(run_of(RecipeModel("tiny", tiny()))))
    assert (rows["fused"].error, rows["fused"].wrong) == ("wrong result", True)
    assert rows["fused"].difference is not None
    assert rows["fused"].difference.kind == "gradient"
    assert rows["fused"].samples_ms == ()
    assert rows["fused"].faster is None
    assert rows["native"].samples_ms


def test_an_arm_that_is_too_large_for_its_data_is_refused() -> None:
    with pytest.raises(DataError, match="batch_size"):
        finished(run_of(RecipeModel("tiny", tiny(train={"batch_size": 200, "steps": 60}))))


# --- a recipe -----------------------------------------------------------------------------------------------------


def test_a_recipe_without_batch_norm_has_one_row_a_mode_and_no_kernel() -> None:
    profile = finished(run_of(RecipeModel("tiny", tiny(norm={"kind": "group"}))))
    assert [(row.kernel, row.mode) for row in profile.rows] == [(None, "training"), (None, "evaluation")]
    assert profile.rows[0].norms == (NormLayers("GroupNorm", 1),)
    assert profile.planned == 2


@pytest.fixture(scope="module")
def measured() -> StepProfile:
    """The fused kernel itself, beside native, in a recipe with something to remark on."""
    recipe = tiny(
        model={"kind": "mlp", "hidden": [2]}, norm={"kind": "batch", "momentum": 0.9}, train={"batch_size": 17}
    )
    a_ms_later = itertools.count(step=1_000_000).__next__  # whenever it is read, however busy the machine is
    return finished(run_of(RecipeModel("tiny", recipe), seconds=0.5, now_ns=a_ms_later))


def test_the_classes_of_a_row_sum_to_its_median_step(measured: StepProfile) -> None:
    assert [row.error for row in measured.rows] == [None] * 5
    for row in measured.rows:
        assert tuple(row.shares_ms) == STEP_CLASSES
        median = torch.tensor(row.samples_ms).double().quantile(0.5).item()
        assert sum(row.shares_ms.values()) == pytest.approx(median, rel=1e-6)
        assert (row.shares_ms["optimizer"] > 0) == (row.mode == "training")
        assert (row.shares_ms["data"] > 0) == (row.mode == "training")
        assert (row.shares_ms["normalization"] > 0) == (row.kernel != FOLDED)


def test_evaluation_is_measured_with_the_batch_norms_folded_too(measured: StepProfile) -> None:
    assert measured.planned == len(measured.rows) == 5
    assert FOLDED not in by_kernel(measured)
    native, folded = (by_kernel(measured, "evaluation")[kernel] for kernel in ("native", FOLDED))
    assert len(folded.samples_ms) == len(native.samples_ms)
    assert folded.faster is not None
    assert folded.norms == (NormLayers("batch norm", 1, FOLDED),)
    assert folded.memory is None


def test_a_fused_row_has_its_relus_in_normalization(measured: StepProfile) -> None:
    rows = by_kernel(measured)
    assert rows["fused"].norms == WITH_RELU
    assert rows["native"].shares_ms["activation"] > 0
    assert rows["fused"].shares_ms["activation"] == 0


def test_remarks_on_norms_and_the_watched_steps_are_in_the_result(measured: StepProfile) -> None:
    assert {remark.kind for remark in measured.remarks} == {"short half-life", "last batch of one"}
    assert [(note.kind, note.count) for note in measured.notes] == [("norms watched", 5)]


# --- a module of the user's ---------------------------------------------------------------------------------------


@pytest.mark.usefixtures("other")
@pytest.mark.parametrize("name", ["small", "TwoOutputs"])
def test_a_function_and_a_class_are_measured_on_every_kernel(name: str) -> None:
    model = UserModel(f"tests.measure.profile.user_models:{name}", (4, 3, 8, 8))
    profile = finished(run_of(model))
    rows = by_kernel(profile)
    assert rows["native"].norms == (NormLayers("batch norm", 1, "native"),)
    assert rows["fused"].norms == WITH_RELU
    assert [(row.kernel, row.error) for row in profile.rows] == [
        (kernel, None) for kernel in ("native", "fused", "native", "fused", FOLDED)
    ]
    assert profile.remarks == ()
    assert profile.notes[0] == Note("random data", arm=model.name)


@pytest.mark.parametrize(("name", "refused"), [("NormFirst", False), ("ByValue", True)])
def test_a_model_that_cannot_be_folded_has_no_such_row(name: str, refused: bool) -> None:
    """One has nothing to fold; the other's way depends on the values, which torch.fx does not have."""
    profile = finished(run_of(UserModel(f"tests.measure.profile.user_models:{name}", (4, 3)), kernels=("native",)))
    assert [(row.kernel, row.mode, row.error) for row in profile.rows] == [
        ("native", "training", None), ("native", "evaluation", None),
    ]  # fmt: skip
    found = [str(note.reason) for note in profile.notes if note.kind == "not folded"]
    assert len(found) == refused
    assert all("torch.fx cannot hold the forward of this model" in reason for reason in found)


@pytest.mark.parametrize(
    ("name", "shape", "says"),
    [
        ("Raising", (4, 3), f"raised RuntimeError: no such luck, in {USER_MODELS}:38"),
        ("OnlyWholeNumbers", (4, 3, 8, 8), "holds no floating-point tensor"),
        ("one_value_a_channel", (1, 4), "Expected more than 1 value per channel"),
    ],
)
def test_a_module_that_does_not_take_its_input_is_refused_with_the_reason(
    name: str, shape: tuple[int, ...], says: str
) -> None:
    model = UserModel(f"tests.measure.profile.user_models:{name}", shape)
    with pytest.raises(UsageError, match=re.escape(says)) as refused:
        finished(run_of(model, kernels=("native",)))
    assert (refused.value.field, refused.value.value) == ("inputs", "x".join(map(str, shape)))


# --- memory and the trace -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("other")
def test_a_memory_that_is_unknown_leaves_the_times() -> None:
    def unknown(*_: object) -> StepMemory:
        raise CallFailed("its process ended with exit code -9")

    profile = finished(faked_run(Faked(FakeTime(), {"native": 8.0, "fused": 4.0}), step_memory=unknown))
    assert by_kernel(profile)["native"].memory is None
    assert by_kernel(profile)["native"].samples_ms
    reason = "CallFailed: its process ended with exit code -9"
    unknown_to = [note.kernel for note in profile.notes if note.kind == "memory unknown" and reason in str(note.reason)]
    assert unknown_to == ["native", "fused"]


@pytest.mark.usefixtures("other")
def test_the_trace_holds_a_step_of_each_kernel(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    finished(faked_run(Faked(FakeTime(), {"native": 8.0, "fused": 4.0}), trace=path))
    names = {event.get("name") for event in json.loads(path.read_text())["traceEvents"]}
    assert {"model, native", "model, fused"} <= names


@pytest.mark.usefixtures("other")
@pytest.mark.parametrize("compiled", [False, True])
def test_a_note_says_that_a_compiled_models_layers_have_no_names_in_the_trace(compiled: bool, tmp_path: Path) -> None:
    class Compiled(Faked):
        def trainable(self, *given: Any, **named: Any) -> Trainable:
            made = super().trainable(*given, **named)
            if compiled:
                made.model.compile(backend="eager")
            return made

    model = Compiled(FakeTime(), {"native": 8.0, "fused": 4.0})
    profile = finished(faked_run(model, trace=tmp_path / "trace.json"))
    assert (Note("layers not traced", arm="model") in profile.notes) == compiled
