"""The step view of `bncli profile`: a model's training step and forward pass, native and other kernels side by side.

Each model is made once for each kernel, with the same initial weights, and these take their steps in rounds,
interleaved. A training step fetches its batch, as training does. Evaluation is a forward pass of one held-out batch, as
large as a training batch where there are as many examples; it is also that of the model with its batch norms folded.
After the timing come a profiled pass for the classes of time, a model made to measure its memory, and training steps in
which the norms are watched.
"""

from __future__ import annotations

import contextlib
import math
import random
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.profiler import record_function

from bncli import kernels
from bncli.engine.convert.fold import fold
from bncli.engine.data.splits import Dataset
from bncli.engine.device import environment, tf32_allowed
from bncli.engine.load import CoreWait
from bncli.errors import BncliError, DataError, RecipeError, RunFailed, UsageError, by_arm
from bncli.measure.profile import memory, norm_diagnostics, step_check, step_time
from bncli.measure.profile.step_models import StepModel, Trainable, norms_of
from bncli.measure.timing.clock import Deadline, LoopClock, in_a_row, rounds
from bncli.measure.timing.fresh_process import FreshProcesses
from bncli.measure.timing.speedup import faster
from bncli.names import RECIPE_KERNELS
from bncli.results.environment import FEWEST_ROUNDS
from bncli.results.profile import (
    FOLDED,
    Measuring,
    Mode,
    NormLayers,
    NormRemark,
    Note,
    ProfileEvent,
    ProfileStarted,
    RowDone,
    StepCost,
    StepDifference,
    StepMemory,
    StepProfile,
)

MODES: tuple[Mode, ...] = ("training", "evaluation")
EVALUATION = MODES[1:]
WARM_UP_CALLS = 2  # after the checked step
DEFAULT_S = 40.0
MOST_ROUNDS = 100
LEAST_SAMPLE_MS, MOST_CALLS = 20.0, 50  # of a sample, which holds several steps where one is shorter
PROFILED_MS, MOST_PROFILED = 1000.0, 5  # of the profiled pass, and its steps
UNTIL = {"training": 0.5, "evaluation": 0.7}  # of a model's seconds; the rest is for what is not timed
WATCHED = 0.15  # of a model's seconds, at least, in which its norms are watched

Samples = dict[Mode, dict[str | None, tuple[float, ...]]]  # ms of a step, by mode and kernel
Lacked = dict[Mode, float | None]  # cores, as in StepCost


class StepRun:
    """One run of the step view. `result()` holds at any time what is finished so far.

    models: of `step_models`. kernels: each model with a batch norm gets all of them. seconds: a target; every step is
    measured `least_rounds` times even if it takes longer. trace: where to write the Chrome trace of a training step
    of each kernel of the first model. now_ns and step_memory can be replaced in tests. Raises UsageError and RunFailed
    if a user's module cannot be built.
    """

    def __init__(
        self,
        name: str,
        models: Sequence[StepModel],
        device: torch.device,
        kernels: Sequence[str] = RECIPE_KERNELS,
        *,
        seconds: float = DEFAULT_S,
        least_rounds: int = FEWEST_ROUNDS,
        trace: Path | None = None,
        now_ns: Callable[[], int] = time.perf_counter_ns,
        step_memory: Callable[..., StepMemory] = memory.step_memory,
    ) -> None:
        self._name, self._models, self._device = name, tuple(models), device
        self._kernels = [tuple(kernels) if model.has_kernels else (None,) for model in self._models]
        self._seconds, self._least_rounds = seconds, least_rounds
        self._share_s, self._trace, self._step_memory = seconds / max(1, len(self._models)), trace, step_memory
        self._processes = FreshProcesses(memory.prepare_for_steps)
        self._clock, self._now_s = LoopClock(device, now_ns), lambda: now_ns() / 1e9
        self._began_s = self._now_s()
        self._order = random.Random(0)
        self._rows: list[StepCost] = []
        self._remarks: list[NormRemark] = []
        self._notes: list[Note] = []
        self._least_s = 0.0  # of the whole, as far as it is known
        self._folded = 0  # rows of models with folded batch norms

    @property
    def planned(self) -> int:
        """Rows, where nothing interrupts."""
        return sum(len(MODES) * len(kernels) for kernels in self._kernels) + self._folded

    def events(self) -> Iterator[ProfileEvent]:
        """Measure. Raises DataError and UsageError for what cannot be measured at all."""
        yield ProfileStarted(self._name, self.planned, self._seconds)
        self._check()
        with contextlib.closing(self._processes):
            for place, model in enumerate(self._models):
                deadline = Deadline(self._share_s, self._now_s)
                with tf32_allowed(model.tf32):
                    for event in self._measure(model, place, deadline):
                        if isinstance(event, Measuring):
                            done = (place + min(1.0, 1 - deadline.left_s / self._share_s)) / len(self._models)
                            event = replace(event, fraction=done, least_s=self._least_s)
                        yield event

    def result(self) -> StepProfile:
        tf32 = self._device.type == "cuda" and any(model.tf32 for model in self._models)
        return StepProfile(
            name=self._name,
            environment=environment(self._device, tf32),
            seconds=self._now_s() - self._began_s,
            rows=tuple(self._rows),
            remarks=tuple(self._remarks),
            notes=tuple(self._notes),
            planned=self.planned,
        )

    def _check(self) -> None:
        """Raises RecipeError with the mistakes of all models, and DataError, before any is measured."""
        wrong = []
        for model in self._models:
            try:
                model.check(model.dataset(self._device), self._device)
            except (RecipeError, RunFailed) as error:
                wrong.append((model.name, str(error)))
        if wrong:
            raise RecipeError(*by_arm(wrong))

    # --- one model ------------------------------------------------------------------------------------------------

    def _measure(self, model: StepModel, place: int, deadline: Deadline) -> Iterator[Measuring | RowDone]:
        """Progress without its fraction, and finished rows."""
        yield Measuring(model.name, phase="check")
        dataset = model.dataset(self._device)
        timed = [prepared(model, kernel, dataset, self._device) for kernel in self._kernels[place]]
        self._notes += model.notes
        timed += self._after_folding(model, timed)
        samples: Samples = {mode: {each.kernel: () for each in timed} for mode in MODES}
        lacked: Lacked = {}
        first = len(self._rows)
        for mode in MODES:
            until = Deadline(deadline.left_s - (1 - UNTIL[mode]) * self._share_s, self._now_s)
            load = CoreWait(torch.get_num_threads())
            first_s, later_s = 0.0, (len(self._models) - place - UNTIL[mode]) * self._share_s
            for done, times in enumerate(self._rounds(timed, mode, until), 1):
                now_s = self._now_s()
                first_s = now_s if done == 1 else first_s  # its end: how many steps a sample has was found before it
                round_s = (now_s - first_s) / max(1, done - 1)
                left_s = max(until.left_s, (self._least_rounds - done) * round_s)
                self._least_s = now_s - self._began_s + left_s + later_s
                for kernel, ms in times.items():
                    samples[mode][kernel] += (ms,)
                lacked[mode] = load.cores()
                self._rows[first:] = _rows(model, timed, samples, lacked)
                yield Measuring(model.name, phase="round", mode=mode, round=done)
        self._rows[first:] = _rows(model, timed, samples, lacked)
        of_rows = [each for mode in MODES for each in timed if mode in each.modes]
        for number, (row, each) in enumerate(zip(self._rows[first:], of_rows, strict=True), first):
            yield Measuring(model.name, phase="parts", mode=row.mode)
            self._rows[number] = self._with_parts(row, model, each, dataset)
            yield RowDone(self._rows[number])
        if self._trace is not None and place == 0:
            self._write_trace(self._trace, model, timed)
        del timed
        yield Measuring(model.name, phase="norms")
        self._watch_norms(model, dataset, Deadline(max(deadline.left_s, WATCHED * self._share_s), self._now_s))

    def _after_folding(self, model: StepModel, timed: Sequence[TimedModel]) -> list[TimedModel]:
        """The model with its batch norms folded, where there are any that can be."""
        made = next((each.trainable for each in timed if each.trainable is not None), None)
        try:
            found = [] if made is None or not model.has_kernels else folded(made)
        except Exception as error:  # a model that torch.fx cannot hold: its steps are measured all the same
            self._notes.append(Note("not folded", arm=model.name, reason=reason(error)))
            return []
        self._folded += len(found)
        return found

    def _rounds(self, timed: Sequence[TimedModel], mode: Mode, deadline: Deadline) -> Iterator[dict[str | None, float]]:
        """Milliseconds of a step of every model, a round at a time; a sample is the mean of some steps in a row."""
        steps = {
            each.kernel: step_of(each.trainable, mode)
            for each in timed
            if each.trainable is not None and mode in each.modes
        }
        if not steps:
            return iter(())
        once = {kernel: in_a_row(step, 1) for kernel, step in steps.items()}
        shortest_ms = min(next(rounds(self._clock, once, 1)).values())
        calls = min(MOST_CALLS, max(1, math.ceil(LEAST_SAMPLE_MS / max(shortest_ms, 1e-3))))
        works = {kernel: in_a_row(step, calls) for kernel, step in steps.items()}
        most, fewest = max(MOST_ROUNDS, self._least_rounds), self._least_rounds
        return rounds(self._clock, works, most, deadline=deadline, fewest=fewest, order=self._order)

    def _with_parts(self, row: StepCost, model: StepModel, timed: TimedModel, dataset: Dataset) -> StepCost:
        """The row with its classes of time and, for training, its memory."""
        if timed.trainable is None:
            return row
        median_ms = statistics.median(row.samples_ms)
        steps = min(MOST_PROFILED, max(1, round(PROFILED_MS / max(median_ms, 1e-3))))
        step = step_of(timed.trainable, row.mode, marked=True)
        shares_ms = step_time.shares_ms(step, steps, median_ms, self._device)
        row = replace(row, shares_ms=shares_ms)
        if row.mode == "evaluation":
            return row
        try:
            batch = timed.trainable.batch()
            found = self._step_memory(self._processes, model, timed.kernel, batch, dataset.classes)
            return replace(row, memory=found)
        except RuntimeError as error:
            self._notes.append(Note("memory unknown", timed.kernel, arm=model.name, reason=reason(error)))
            return row

    def _write_trace(self, path: Path, model: StepModel, timed: Sequence[TimedModel]) -> None:
        runs = {
            f"{model.name}, {each.kernel or 'no batch norm'}": step_of(each.trainable, "training", marked=True)
            for each in timed
            if each.trainable is not None and "training" in each.modes
        }
        models = [each.trainable.model for each in timed if each.trainable is not None]
        if runs:
            step_time.write_trace(path, runs, self._device, models)
        if runs and not all(map(step_time.has_layers, models)):
            self._notes.append(Note("layers not traced", arm=model.name))

    def _watch_norms(self, model: StepModel, dataset: Dataset, deadline: Deadline) -> None:
        try:
            learner = model.trainable("native" if model.has_kernels else None, dataset, self._device, learns=True)
            watched = norm_diagnostics.watch(
                learner.model, lambda: learner.step(*learner.batch()), enough=lambda: deadline.passed
            )
        except Exception as error:
            self._notes.append(Note("norms not watched", arm=model.name, reason=reason(error)))
            return
        if watched.norms:
            self._notes.append(Note("norms watched", arm=model.name, count=watched.steps, of=watched.wanted))
        self._remarks += norm_diagnostics.remarks(model.name, watched, learner.plan)


def _rows(model: StepModel, timed: Sequence[TimedModel], samples: Samples, lacked: Lacked) -> list[StepCost]:
    """A row for each kernel in every mode that has times, or an error instead."""
    rows = []
    for mode in MODES:
        native = samples[mode].get("native", ())
        for each in timed:
            samples_ms = samples[mode][each.kernel]
            if mode not in each.modes or (not samples_ms and each.error is None):
                continue
            evaluated = each.trainable.evaluation_x if each.trainable is not None and mode == "evaluation" else None
            rows.append(
                StepCost(
                    arm=model.name,
                    kernel=each.kernel,
                    mode=mode,
                    batch_size=model.batch_size if evaluated is None else len(evaluated),
                    samples_ms=samples_ms,
                    shares_ms={},
                    memory=None,
                    faster=faster(native, samples_ms) if samples_ms and native and each.kernel != "native" else None,
                    norms=each.norms,
                    error=each.error,
                    wrong=each.difference is not None,
                    difference=each.difference,
                    cores_lacked=lacked.get(mode) if samples_ms else None,
                )
            )
    return rows


# --- a model with each kernel -----------------------------------------------------------------------------------------


@dataclass
class TimedModel:
    """A model with one kernel, or folded. `trainable` is None if `error` is set."""

    kernel: str | None
    trainable: Trainable | None = None
    norms: tuple[NormLayers, ...] = ()
    error: str | None = None
    difference: StepDifference | None = None  # from the native step, of a wrong one
    modes: tuple[Mode, ...] = MODES


def prepared(model: StepModel, kernel: str | None, dataset: Dataset, device: torch.device) -> TimedModel:
    """The model with that kernel, its step checked; for one that cannot run, raises, or is wrong, the reason instead.

    Raises DataError and UsageError, which are no fault of a kernel.
    """
    try:
        if kernel is not None:
            kernels.get(kernel, device)
        trainable = model.trainable(kernel, dataset, device)
        norms = norms_of(trainable.model)
        if kernel is not None and kernel != "native":
            difference = step_check.difference(model, kernel, trainable, dataset, device)
            if difference is not None:
                return TimedModel(kernel, norms=norms, error="wrong result", difference=difference)
        for mode in MODES:
            step = step_of(trainable, mode)
            for _ in range(WARM_UP_CALLS):
                step()
    except (DataError, UsageError):
        raise
    except Exception as error:  # a kernel that does not compile, a model that does not fit: the others go on
        return TimedModel(kernel, error=reason(error))
    return TimedModel(kernel, trainable, norms)


def folded(trainable: Trainable) -> list[TimedModel]:
    """The model with its batch norms folded, its outputs checked, for evaluation; none where no batch norm can be.

    Raises what `bncli.fold` raises.
    """
    model = fold(trainable.model)
    norms = norms_of(model)
    if not any(layers.kernel == FOLDED for layers in norms):
        return []
    difference = step_check.folding_difference(trainable)
    if difference is not None:
        return [TimedModel(FOLDED, None, norms, "wrong result", difference, EVALUATION)]
    if trainable.model._compiled_call_impl is not None:
        model.compile()
    trainable = replace(trainable, model=model)
    step = step_of(trainable, "evaluation")
    for _ in range(WARM_UP_CALLS):
        step()
    return [TimedModel(FOLDED, trainable, norms, modes=EVALUATION)]


def reason(error: Exception) -> str:
    """The error in one line, with the place where it was raised unless it is bncli's own."""
    text = " ".join(str(error).split()) or "no message"
    if isinstance(error, BncliError):
        return text
    frames = traceback.extract_tb(error.__traceback__)
    return f"{type(error).__name__}: {text}" + (f", in {frames[-1].filename}:{frames[-1].lineno}" if frames else "")


def step_of(trainable: Trainable, mode: Mode, marked: bool = False) -> Callable[[], object]:
    """A training step with the fetching of its batch, or a forward pass; the model is put in that mode now.

    marked: for the profiler, which finds the fetching in a range.
    """
    trainable.model.train(mode == "training")
    fetching = record_function if marked else contextlib.nullcontext

    def train() -> None:
        with fetching(step_time.DATA):
            x, y = trainable.batch()
        trainable.step(x, y)

    def evaluate() -> None:
        with torch.inference_mode():
            trainable.forward(trainable.model, trainable.evaluation_x)

    return train if mode == "training" else evaluate
