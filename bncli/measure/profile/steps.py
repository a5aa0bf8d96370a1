"""The step view of `bncli profile`: a whole model's training step and forward pass, native beside other kernels.

Each model is made once for each kernel, with the same initial weights, and these take their steps in rounds,
interleaved. A training step fetches its batch, as training does. Evaluation is a forward pass of one held-out batch, as
large as a training batch where there are as many examples. After the timing come a profiled pass for the classes of
time, a model made to measure its memory, and training steps in which the norms are watched.
"""

from __future__ import annotations

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
from bncli.engine.data.splits import Dataset
from bncli.engine.device import environment, synchronize, tf32_allowed
from bncli.errors import BncliError, DataError, UsageError
from bncli.measure.profile import norm_diagnostics, step_check, step_memory, step_time
from bncli.measure.profile.step_models import StepModel, Trainable, norms_of
from bncli.measure.profile.step_time import DATA
from bncli.measure.timing import clock as clocks
from bncli.measure.timing.clock import Clock, Deadline, Work
from bncli.measure.timing.fresh_process import FreshProcesses
from bncli.measure.timing.speedup import FEWEST_ROUNDS, faster
from bncli.names import RECIPE_KERNELS
from bncli.results.profile import (
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
WARM_UP_CALLS = 2  # beside the checked step
DEFAULT_S = 40.0
MOST_ROUNDS = 100
LEAST_SAMPLE_MS, MOST_CALLS = 20.0, 50  # of a sample, which holds several steps where one is shorter
PROFILED_MS, MOST_PROFILED = 1000.0, 5  # of the profiled pass, and its steps
UNTIL = {"training": 0.5, "evaluation": 0.7}  # of a model's seconds; the rest is for what is not timed
WATCHED = 0.15  # of a model's seconds, at least, in which its norms are watched

Samples = dict[Mode, dict[str | None, tuple[float, ...]]]  # ms of a step, by mode and kernel


class StepRun:
    """One run of the step view. `result()` holds at any time what is finished so far.

    models: of `step_models`. kernels: each model with a batch norm gets all of them. seconds: a wish, beyond which
    every step is still measured `least_rounds` times. trace: where to write the Chrome trace of a training step of each
    kernel of the first model. clock, now_ns and memory can be faked. Raises UsageError and RunFailed for a module of
    the user's own that cannot be made.
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
        clock: Clock | None = None,
        now_ns: Callable[[], int] = time.perf_counter_ns,
        memory: Callable[..., StepMemory] = step_memory.measure,
    ) -> None:
        self._name, self._models, self._device = name, tuple(models), device
        self._kernels = [tuple(kernels) if model.has_kernels else (None,) for model in self._models]
        self._seconds, self._least_rounds = seconds, least_rounds
        self._share_s, self._trace, self._memory = seconds / max(1, len(self._models)), trace, memory
        self._processes = FreshProcesses(step_memory.warm_up)
        self._clock, self._now_ns = clock or clocks.of(device), now_ns
        self._began_s = self._now_s()
        self._order = random.Random(0)
        self._rows: list[StepCost] = []
        self._remarks: list[NormRemark] = []
        self._notes: list[Note] = []
        self._least_s = 0.0  # of the whole, as far as it is known

    @property
    def planned(self) -> int:
        """Rows, where nothing interrupts."""
        return sum(len(MODES) * len(kernels) for kernels in self._kernels)

    def events(self) -> Iterator[ProfileEvent]:
        """Measure. Raises DataError and UsageError for what cannot be measured at all."""
        yield ProfileStarted(self._name, self.planned, self._seconds)
        with self._processes:
            for place, model in enumerate(self._models):
                deadline = Deadline(self._share_s, self._now_s)
                with tf32_allowed(model.tf32):
                    for event in self._measure(model, place, deadline):
                        if isinstance(event, str):
                            done = (place + min(1.0, 1 - deadline.left_s / self._share_s)) / len(self._models)
                            yield Measuring(f"{model.name}: {event}", done, self._least_s)
                        else:
                            yield event

    def result(self) -> StepProfile:
        return StepProfile(
            name=self._name,
            environment=environment(
                self._device, self._device.type == "cuda" and any(model.tf32 for model in self._models)
            ),
            seconds=self._now_s() - self._began_s,
            rows=tuple(self._rows),
            remarks=tuple(self._remarks),
            notes=tuple(self._notes),
            planned=self.planned,
        )

    def _now_s(self) -> float:
        return self._now_ns() / 1e9

    # --- one model ------------------------------------------------------------------------------------------------

    def _measure(self, model: StepModel, place: int, deadline: Deadline) -> Iterator[str | RowDone]:
        """What goes on, in words, and the rows that are done."""
        yield "models, and whether their steps agree"
        dataset = model.dataset(self._device)
        candidates = prepare(model, self._kernels[place], dataset, self._device)
        self._notes += model.notes
        samples: Samples = {mode: {candidate.kernel: () for candidate in candidates} for mode in MODES}
        first = len(self._rows)
        for mode in MODES:
            until = Deadline(deadline.left_s - (1 - UNTIL[mode]) * self._share_s, self._now_s)
            first_s, later_s = 0.0, (len(self._models) - place - UNTIL[mode]) * self._share_s
            for rounds, times in enumerate(self._rounds(candidates, mode, until), 1):
                now_s = self._now_s()
                first_s = now_s if rounds == 1 else first_s  # its end: how many steps a sample has was found before it
                round_s = (now_s - first_s) / max(1, rounds - 1)
                left_s = max(until.left_s, (self._least_rounds - rounds) * round_s)
                self._least_s = now_s - self._began_s + left_s + later_s
                for kernel, ms in times.items():
                    samples[mode][kernel] += (ms,)
                self._rows[first:] = _rows(model, candidates, samples)
                yield f"{mode}, round {rounds}"
        for number, (row, candidate) in enumerate(
            zip(_rows(model, candidates, samples), candidates * len(MODES), strict=True), first
        ):
            yield f"{row.mode}, where the time{' and memory' * (row.mode == 'training')} of {row.kernel or 'it'} goes"
            self._rows[number:] = [self._with_parts(row, model, candidate, dataset)]
            yield RowDone(self._rows[number])
        if self._trace is not None and place == 0:
            self._write_trace(self._trace, model, candidates)
        del candidates
        yield "what its norms suffer from"
        self._watch_norms(model, dataset, Deadline(max(deadline.left_s, WATCHED * self._share_s), self._now_s))

    def _with_parts(self, row: StepCost, model: StepModel, candidate: ModelCandidate, dataset: Dataset) -> StepCost:
        """The row with its classes of time and, for training, its memory."""
        if candidate.trainable is None:
            return row
        step = step_of(candidate.trainable, row.mode, self._device, marked=True)
        median_ms = statistics.median(row.samples_ms)
        steps = min(MOST_PROFILED, max(1, round(PROFILED_MS / max(median_ms, 1e-3))))
        row = replace(row, shares_ms=step_time.shares_ms(step, steps, median_ms, self._device))
        if row.mode == "evaluation":
            return row
        try:
            batch = candidate.trainable.batch()
            return replace(row, memory=self._memory(self._processes, model, candidate.kernel, batch, dataset.classes))
        except RuntimeError as error:
            self._notes.append(Note("memory unknown", candidate.kernel, arm=model.name, reason=reason(error)))
            return row

    def _write_trace(self, path: Path, model: StepModel, candidates: Sequence[ModelCandidate]) -> None:
        runs = {
            f"{model.name}, {candidate.kernel or 'no batch norm'}": step_of(
                candidate.trainable, "training", self._device, True
            )
            for candidate in candidates
            if candidate.trainable is not None
        }
        if runs:
            step_time.write_trace(path, runs, self._device)

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
        training = norm_diagnostics.TrainingPlan(model.steps, learner.last_batch, model.real_data)
        self._remarks += norm_diagnostics.remarks(model.name, watched, training)

    # --- times ----------------------------------------------------------------------------------------------------

    def _rounds(
        self, candidates: Sequence[ModelCandidate], mode: Mode, deadline: Deadline
    ) -> Iterator[dict[str | None, float]]:
        """Milliseconds of a step of every candidate, a round at a time; a sample is the mean of some steps in a row."""
        steps = {
            candidate.kernel: step_of(candidate.trainable, mode, self._device)
            for candidate in candidates
            if candidate.trainable is not None
        }
        if not steps:
            return
        shortest_ms = min(self._sample_ms(step, 1) for step in steps.values())
        calls = min(MOST_CALLS, max(1, math.ceil(LEAST_SAMPLE_MS / max(shortest_ms, 1e-3))))
        for done in range(max(MOST_ROUNDS, self._least_rounds)):
            if deadline.passed and done >= self._least_rounds:
                return
            yield {kernel: self._sample_ms(steps[kernel], calls) for kernel in self._order.sample([*steps], len(steps))}

    def _sample_ms(self, step: Callable[[], object], calls: int) -> float:
        if calls > 1:  # a short step begins with what the one before it left in the caches
            step()
        work = Work(lambda _: step())
        _, whole = clocks.in_a_loop(self._clock, {"step": work}, 1, calls=calls, now_ns=self._now_ns)
        return whole["step"][0]


def _rows(model: StepModel, candidates: Sequence[ModelCandidate], samples: Samples) -> list[StepCost]:
    """Of every candidate in every mode that has times, or an error instead."""
    rows = []
    for mode in MODES:
        for candidate in candidates:
            own, native = samples[mode][candidate.kernel], samples[mode].get("native", ())
            if not own and candidate.error is None:
                continue
            batch = (
                candidate.trainable.evaluation_x if candidate.trainable is not None and mode == "evaluation" else None
            )
            rows.append(
                StepCost(
                    arm=model.name,
                    kernel=candidate.kernel,
                    mode=mode,
                    batch_size=model.batch_size if batch is None else len(batch),
                    samples_ms=own,
                    shares_ms={},
                    memory=None,
                    faster=faster(native, own) if own and native and candidate.kernel != "native" else None,
                    norms=candidate.norms,
                    error=candidate.error,
                    wrong=candidate.wrong,
                    difference=candidate.difference,
                )
            )
    return rows


# --- a model with each kernel -----------------------------------------------------------------------------------------


@dataclass
class ModelCandidate:
    """A model with one kernel. There is no trainable where `error` tells why."""

    kernel: str | None
    trainable: Trainable | None = None
    norms: tuple[NormLayers, ...] = ()
    error: str | None = None
    difference: StepDifference | None = None  # from the native step, of a wrong one

    @property
    def wrong(self) -> bool:
        return self.difference is not None


def prepare(
    model: StepModel, names: Sequence[str | None], dataset: Dataset, device: torch.device
) -> tuple[ModelCandidate, ...]:
    """A candidate for each kernel; one that cannot run, raises, or is wrong has the reason instead of a model.

    Raises DataError and UsageError, which no kernel is to blame for.
    """
    return tuple(_prepare(model, name, dataset, device) for name in names)


def _prepare(model: StepModel, kernel: str | None, dataset: Dataset, device: torch.device) -> ModelCandidate:
    try:
        if kernel is not None:
            kernels.get(kernel, device)
        trainable = model.trainable(kernel, dataset, device)
        norms = norms_of(trainable.model)
        if kernel is not None and kernel != "native":
            difference = step_check.difference(model, kernel, trainable, dataset, device)
            if difference is not None:
                return ModelCandidate(kernel, norms=norms, error="wrong result", difference=difference)
        for mode in MODES:
            step = step_of(trainable, mode, device)
            for _ in range(WARM_UP_CALLS):
                step()
    except (DataError, UsageError):
        raise
    except Exception as error:  # a kernel that does not compile, a model that does not fit: the others go on
        return ModelCandidate(kernel, error=reason(error))
    return ModelCandidate(kernel, trainable, norms)


def reason(error: Exception) -> str:
    """In one line, with the place it was raised at if it is not one of ours, whose text says what to do."""
    text = " ".join(str(error).split()) or "no message"
    if isinstance(error, BncliError):
        return text
    frames = traceback.extract_tb(error.__traceback__)
    return f"{type(error).__name__}: {text}" + (f", in {frames[-1].filename}:{frames[-1].lineno}" if frames else "")


def step_of(trainable: Trainable, mode: Mode, device: torch.device, marked: bool = False) -> Callable[[], object]:
    """A training step with the fetching of its batch, or a forward pass; the model is put in that mode now.

    marked: for the profiler, which finds the fetching in a range of its own.
    """
    trainable.model.train(mode == "training")

    def train() -> None:
        x, y = trainable.batch()
        trainable.step(x, y)

    def train_marked() -> None:
        with record_function(DATA):
            x, y = trainable.batch()
        trainable.step(x, y)

    def evaluate() -> None:
        with torch.inference_mode():
            trainable.forward(trainable.evaluation_x)

    chosen = evaluate if mode == "evaluation" else train_marked if marked else train
    if device.type in ("cpu", "cuda"):  # whose clock waits
        return chosen

    def waited_for() -> None:
        chosen()
        synchronize(device)

    return waited_for
