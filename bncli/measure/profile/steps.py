"""The step view of `bncli profile`: a whole model's training step and forward pass, native beside other kernels.

Of each subject a model a kernel, all with the same initial weights, takes its steps in rounds, interleaved. A training
step fetches its batch, as training does. Evaluation is a forward pass of one held-out batch, as large as a training
batch where there are as many examples. Apart from the timing come a profiled pass for the classes of time, a model made
for its memory alone, and training steps in which the norms are watched.
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
from bncli.measure.profile.step_models import Subject, Trainable, norms_of
from bncli.measure.profile.step_time import DATA
from bncli.measure.timing import clock as clocks
from bncli.measure.timing.clock import Clock, Deadline, Work
from bncli.measure.timing.speedup import FEWEST_ROUNDS, faster
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
UNTIL = {"training": 0.5, "evaluation": 0.7}  # of a subject's seconds; the rest is for what is not timed
WATCHED = 0.15  # of a subject's seconds, at least, in which its norms are watched

Samples = dict[Mode, dict[str | None, tuple[float, ...]]]  # ms of a step, by mode and kernel


class StepRun:
    """One run of the step view. `result()` holds at any time what is finished so far.

    subjects: from `step_subjects`. kernels: each subject with a batch norm gets all of them. seconds: a wish, beyond
    which every step is still measured `least_rounds` times. trace: where to write the Chrome trace of a training step
    of each kernel of the first subject. clock, now_ns and memory are seams for tests. Raises UsageError and RunFailed
    for a module of the user's own that cannot be made.
    """

    def __init__(
        self,
        name: str,
        subjects: Sequence[Subject],
        device: torch.device,
        kernels: Sequence[str] = ("native", "fused"),
        *,
        seconds: float = DEFAULT_S,
        least_rounds: int = FEWEST_ROUNDS,
        trace: Path | None = None,
        clock: Clock | None = None,
        now_ns: Callable[[], int] = time.perf_counter_ns,
        memory: Callable[..., StepMemory] = step_memory.measure,
    ) -> None:
        self._name, self._subjects, self._device = name, tuple(subjects), device
        self._kernels = [tuple(kernels) if subject.has_kernels else (None,) for subject in self._subjects]
        self._seconds, self._least_rounds = seconds, least_rounds
        self._share_s, self._trace, self._memory = seconds / max(1, len(self._subjects)), trace, memory
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
        for place, subject in enumerate(self._subjects):
            deadline = Deadline(self._share_s, self._now_s)
            with tf32_allowed(subject.tf32):
                for event in self._measure(subject, place, deadline):
                    if isinstance(event, str):
                        done = min(1.0, 1 - deadline.left_s / self._share_s)
                        yield Measuring(f"{subject.name}: {event}", (place + done) / len(self._subjects), self._least_s)
                    else:
                        yield event

    def result(self) -> StepProfile:
        return StepProfile(
            name=self._name,
            environment=environment(
                self._device, self._device.type == "cuda" and any(subject.tf32 for subject in self._subjects)
            ),
            seconds=self._now_s() - self._began_s,
            rows=tuple(self._rows),
            remarks=tuple(self._remarks),
            notes=tuple(self._notes),
            planned=self.planned,
        )

    def _now_s(self) -> float:
        return self._now_ns() / 1e9

    # --- one subject ----------------------------------------------------------------------------------------------

    def _measure(self, subject: Subject, place: int, deadline: Deadline) -> Iterator[str | RowDone]:
        """What goes on, in words, and the rows that are done."""
        yield "models, and whether their steps agree"
        dataset = subject.dataset(self._device)
        arms = made(subject, self._kernels[place], dataset, self._device)
        self._notes += subject.notes
        samples: Samples = {mode: {arm.kernel: () for arm in arms} for mode in MODES}
        first = len(self._rows)
        for mode in MODES:
            until = Deadline(deadline.left_s - (1 - UNTIL[mode]) * self._share_s, self._now_s)
            first_s, later_s = 0.0, (len(self._subjects) - place - UNTIL[mode]) * self._share_s
            for rounds, times in enumerate(self._rounds(arms, mode, until), 1):
                now_s = self._now_s()
                first_s = now_s if rounds == 1 else first_s  # its end: how many steps a sample has was found before it
                round_s = (now_s - first_s) / max(1, rounds - 1)
                left_s = max(until.left_s, (self._least_rounds - rounds) * round_s)
                self._least_s = now_s - self._began_s + left_s + later_s
                for kernel, ms in times.items():
                    samples[mode][kernel] += (ms,)
                self._rows[first:] = _rows(subject, arms, samples)
                yield f"{mode}, round {rounds}"
        for number, (row, arm) in enumerate(zip(_rows(subject, arms, samples), arms * len(MODES), strict=True), first):
            yield f"{row.mode}, where the time{' and memory' * (row.mode == 'training')} of {row.kernel or 'it'} goes"
            self._rows[number:] = [self._with_parts(row, subject, arm, dataset)]
            yield RowDone(self._rows[number])
        if self._trace is not None and place == 0:
            self._write_trace(self._trace, subject, arms)
        del arms
        yield "what its norms suffer from"
        self._watch_norms(subject, dataset, Deadline(max(deadline.left_s, WATCHED * self._share_s), self._now_s))

    def _with_parts(self, row: StepCost, subject: Subject, arm: Arm, dataset: Dataset) -> StepCost:
        """The row with its classes of time and, for training, its memory."""
        if arm.trainable is None:
            return row
        step = step_of(arm.trainable, row.mode, self._device, marked=True)
        median_ms = statistics.median(row.samples_ms)
        steps = min(MOST_PROFILED, max(1, round(PROFILED_MS / max(median_ms, 1e-3))))
        row = replace(row, shares_ms=step_time.shares_ms(step, steps, median_ms, self._device))
        if row.mode == "evaluation":
            return row
        try:
            return replace(row, memory=self._memory(subject, arm.kernel, arm.trainable.batch(), dataset.classes))
        except RuntimeError as error:
            self._notes.append(Note("memory unknown", arm.kernel, arm=subject.name, reason=reason(error)))
            return row

    def _write_trace(self, path: Path, subject: Subject, arms: Sequence[Arm]) -> None:
        runs = {
            f"{subject.name}, {arm.kernel or 'no batch norm'}": step_of(arm.trainable, "training", self._device, True)
            for arm in arms
            if arm.trainable is not None
        }
        if runs:
            step_time.write_trace(path, runs, self._device)

    def _watch_norms(self, subject: Subject, dataset: Dataset, deadline: Deadline) -> None:
        try:
            learner = subject.trainable("native" if subject.has_kernels else None, dataset, self._device, learns=True)
            watched = norm_diagnostics.watch(
                learner.model, lambda: learner.step(*learner.batch()), enough=lambda: deadline.passed
            )
        except Exception as error:
            self._notes.append(Note("norms not watched", arm=subject.name, reason=reason(error)))
            return
        if watched.norms:
            self._notes.append(Note("norms watched", arm=subject.name, count=watched.steps, of=watched.wanted))
        training = norm_diagnostics.Training(subject.steps, learner.last_batch, subject.real_data)
        self._remarks += norm_diagnostics.remarks(subject.name, watched, training)

    # --- times ----------------------------------------------------------------------------------------------------

    def _rounds(self, arms: Sequence[Arm], mode: Mode, deadline: Deadline) -> Iterator[dict[str | None, float]]:
        """Milliseconds of a step of every arm, a round at a time; a sample is the mean of some steps in a row."""
        steps = {arm.kernel: step_of(arm.trainable, mode, self._device) for arm in arms if arm.trainable is not None}
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


def _rows(subject: Subject, arms: Sequence[Arm], samples: Samples) -> list[StepCost]:
    """Of every arm in every mode that has times, or an error instead."""
    rows = []
    for mode in MODES:
        for arm in arms:
            own, native = samples[mode][arm.kernel], samples[mode].get("native", ())
            if not own and arm.error is None:
                continue
            batch = arm.trainable.evaluation_x if arm.trainable is not None and mode == "evaluation" else None
            rows.append(
                StepCost(
                    arm=subject.name,
                    kernel=arm.kernel,
                    mode=mode,
                    batch_size=subject.batch_size if batch is None else len(batch),
                    samples_ms=own,
                    shares_ms={},
                    memory=None,
                    faster=faster(native, own) if own and native and arm.kernel != "native" else None,
                    norms=arm.norms,
                    error=arm.error,
                    wrong=arm.difference is not None,
                    difference=arm.difference,
                )
            )
    return rows


@dataclass
class Arm:
    """A subject with one kernel. There is no trainable where `error` tells why."""

    kernel: str | None
    trainable: Trainable | None = None
    norms: tuple[NormLayers, ...] = ()
    error: str | None = None
    difference: StepDifference | None = None  # from the native step, of a wrong one


def made(subject: Subject, names: Sequence[str | None], dataset: Dataset, device: torch.device) -> tuple[Arm, ...]:
    """An arm for each kernel; one that cannot run, raises, or is wrong has the reason instead of a model.

    Raises DataError and UsageError, which no kernel is to blame for.
    """
    return tuple(_arm(subject, name, dataset, device) for name in names)


def _arm(subject: Subject, kernel: str | None, dataset: Dataset, device: torch.device) -> Arm:
    try:
        if kernel is not None:
            kernels.get(kernel, device)
        trainable = subject.trainable(kernel, dataset, device)
        norms = norms_of(trainable.model)
        if kernel is not None and kernel != "native":
            difference = step_check.difference(subject, kernel, trainable, dataset, device)
            if difference is not None:
                return Arm(kernel, norms=norms, error="wrong result", difference=difference)
        for mode in MODES:
            step = step_of(trainable, mode, device)
            for _ in range(WARM_UP_CALLS):
                step()
    except (DataError, UsageError):
        raise
    except Exception as error:  # a kernel that does not compile, a model that does not fit: the others go on
        return Arm(kernel, error=reason(error))
    return Arm(kernel, trainable, norms)


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
