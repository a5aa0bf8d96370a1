"""The kernel view of `bncli profile`: every kernel is judged on each case; the correct ones are timed side by side."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch

from bncli.engine import device as devices
from bncli.engine.load import CoreWait
from bncli.engine.memory import MAPPED_FROM_BYTES, freed_memory, new_memory
from bncli.errors import Unavailable, UsageError, UsageErrors
from bncli.measure.profile import sources
from bncli.measure.profile.memory import kernel_peak_mib, kernel_processes, tiny
from bncli.measure.profile.shapes import Calls, Shape
from bncli.measure.profile.timed_kernels import JudgedCase, Source, TimedKernel, Wrong, judged_case, wrong_on_cases
from bncli.measure.reference import case as cases
from bncli.measure.reference.observe import finding_of
from bncli.measure.timing import clock as timing
from bncli.measure.timing import memory, speedup
from bncli.measure.timing.ceilings import CeilingBenchmark
from bncli.measure.timing.clock import Clock, Deadline, Work, interleaved
from bncli.measure.timing.fresh_process import CallFailed, FreshProcesses
from bncli.names import RECIPE_KERNELS
from bncli.results.environment import FEWEST_ROUNDS
from bncli.results.profile import (
    Case,
    Ceilings,
    Direction,
    KernelCost,
    KernelMean,
    KernelProfile,
    Measuring,
    Note,
    ProfileEvent,
    ProfileStarted,
    RowDone,
    Times,
)

NATIVE = "native"
LAYOUTS = ("contiguous", "channels_last", "strided")
OPERATIONS = ("bn", "bn+relu", "bn+add+relu")  # for shapes whose operations in the model are unknown
DIRECTIONS: tuple[Direction, ...] = ("both", "forward", "backward")
MOST_ROUNDS = 40
ALONE = 1.5  # cost of one forward and one backward round (with an untimed forward), in rounds of both directions
NEW_MEMORY = 2.5  # cost of a round of both directions in new memory, in rounds of both directions
CEILING_ROUNDS = 5  # before the cases, and again after them
CASE_BYTES = 8 * 2**20  # fixed cost of a case, as bytes of a tensor

# new_memory: of both directions. Kernel -> ms per call, one sample per round.
Samples = dict[Direction | Literal["new_memory"], dict[str, tuple[float, ...]]]


# --- what is measured -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class KernelSettings:
    """What to measure: every kernel on every operation, dtype, layout and shape.

    operations: empty for those of the model on each shape, or OPERATIONS if these are unknown. shapes:
    (shape, calls) pairs, or `shapes.Calls`. seconds: target for the whole run with compilations; every case is
    measured even if it takes longer. least_rounds: minimum rounds of both directions together.
    """

    kernels: tuple[str, ...] = RECIPE_KERNELS
    operations: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ("fp32",)
    layouts: tuple[str, ...] = ("contiguous",)
    shapes: tuple[Calls | tuple[Shape, int], ...] = ()
    training: bool = True
    cold: bool = True
    seconds: float = 40.0
    least_rounds: int = FEWEST_ROUNDS
    allow_code: bool = False

    def cases(self) -> tuple[tuple[Case, int], ...]:
        """The cases and how often the model calls each, shape by shape; 0: the model has another operation there.

        Raises UsageError for unknown names, and if there is nothing to measure.
        """
        self._check()
        found: dict[Case, int] = {}
        for calls in (Calls(*entry) for entry in self.shapes):
            done = dict(calls.operations)
            for operation in self.operations or tuple(done) or OPERATIONS:
                for dtype in self.dtypes:
                    for layout in self.layouts:
                        if layout == "channels_last" and len(calls.shape) not in (4, 5):
                            layout = "contiguous"  # 2-D and 3-D inputs
                        case = Case(calls.shape, operation, dtype, layout, self.training)
                        found.setdefault(case, done.get(operation, 0) if done else calls.calls)
        return tuple(found.items())

    def _check(self) -> None:
        errors = []
        if not self.kernels:
            errors.append(UsageError("name at least one", field="kernels"))
        if not self.shapes:
            errors.append(UsageError("name a set of shapes, a shape or a file of shapes", field="shapes"))
        for field, names, known in (
            ("operations", self.operations, tuple(cases.OPERATIONS)),
            ("dtypes", self.dtypes, tuple(cases.DTYPE_NAMES)),
            ("layouts", self.layouts, LAYOUTS),
        ):
            expected = f"expected some of {', '.join(known)}"
            errors += [UsageError(expected, field=field, value=name) for name in names if name not in known]
        for shape, *_ in self.shapes:
            if self.training and math.prod(shape) == shape[1]:
                needs = "training needs more than one value per channel, and it has one"
                errors.append(UsageError(needs, field="shape", value="x".join(map(str, shape))))
        if errors:
            raise UsageErrors(errors)


class Budget:
    """The time budget of one case: a fraction `share` of the time left when it starts."""

    def __init__(self, whole: Deadline, share: float, least_rounds: int, now_s: Callable[[], float]) -> None:
        self.least, self.least_alone = least_rounds, min(timing.FEWEST_ROUNDS, least_rounds)
        self._now_s, self._began_s = now_s, now_s()
        self.deadline = Deadline(share * whole.left_s, now_s)

    def rounds(self, both_s: float) -> tuple[int, int]:
        """(rounds of both directions together, rounds of each one), where a round of both takes `both_s`."""
        most = max(MOST_ROUNDS, self.least)
        fitting = most if both_s <= 0 else min(most, math.floor(self.deadline.left_s / ((1 + ALONE) * both_s)))
        return (fitting, fitting) if fitting >= self.least else (self.least, self.least_alone)

    def least_s(self, both_s: float) -> float:
        """Time of the case with the fewest rounds, including its checks. Call it before the rounds."""
        return self._now_s() - self._began_s + (self.least + ALONE * self.least_alone) * both_s


# --- the run ----------------------------------------------------------------------------------------------------------


class KernelRun:
    """A run of the kernel view: iterate over `events`, then call `result`, also after an interruption.

    clock, peak_mib, sources_of, ceilings and now_s replace the device's clock, the peak measurement in a fresh process,
    the kernels by name, the machine's ceilings and the host's clock. Raises UsageError for settings that cannot be
    measured, and Unavailable for a device without a clock.
    """

    def __init__(
        self,
        settings: KernelSettings,
        device: torch.device,
        clock: Clock | None = None,
        *,
        processes: FreshProcesses | None = None,
        peak_mib: Callable[[FreshProcesses, Case, str, bool], float | None] = kernel_peak_mib,
        sources_of: Mapping[str, Source] | None = None,
        ceilings: CeilingBenchmark | None = None,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        if device.type not in ("cpu", "cuda"):
            raise Unavailable(f"device {device}: kernels are timed only on cpu and cuda")
        self._settings, self._device, self._now_s = settings, device, now_s
        self._cases = settings.cases()
        self._sources = sources_of or sources.sources(settings.kernels, device, settings.allow_code)
        self._clock, self._ceilings = clock, ceilings
        self._processes, self._measured_peak_mib = processes or kernel_processes(), peak_mib
        self._wrong: dict[str, Wrong] = {}  # kernels that are wrong on small cases, found once
        self._rows: list[KernelCost] = []
        self._notes: dict[Note, list[Case]] = {}  # a note without its cases -> those
        self._compile_s: dict[str, float] = {}
        self._began_s, self._seconds = now_s(), 0.0
        self._least_s = 0.0  # of the cases so far, had each had the fewest rounds

    def events(self) -> Iterator[ProfileEvent]:
        """Measure, case by case. A case's rows come together, when all of its kernels are measured."""
        self._began_s = self._now_s()
        settings, clock = self._settings, self._clock or timing.of(self._device)
        self._clock = clock
        ceilings = self._ceilings = self._ceilings or CeilingBenchmark(clock, self._device, cold=settings.cold)
        try:
            yield ProfileStarted("kernels", self._planned, settings.seconds)
            yield Measuring("", phase="ceilings")
            self._load()
            loaded_s = self._now_s()
            ceilings.measure(CEILING_ROUNDS)
            ceilings_s = self._now_s() - loaded_s  # they are measured again at the end
            whole = Deadline(settings.seconds - 2 * ceilings_s - (loaded_s - self._began_s), self._now_s)
            weights = [CASE_BYTES + case.tensor_bytes for case, _ in self._cases]
            for k, (case, calls) in enumerate(self._cases):
                done, left = sum(weights[:k]), sum(weights[k:])
                later_s = self._least_s * left / done + ceilings_s if done else 0.0
                least_s = self._now_s() - self._began_s + later_s
                yield Measuring(str(case), done / (done + left), least_s)
                rows = self._measured(case, calls, Budget(whole, weights[k] / left, settings.least_rounds, self._now_s))
                self._rows += rows
                yield from map(RowDone, rows)
            yield Measuring("", 1.0, phase="ceilings")
            ceilings.measure(CEILING_ROUNDS)
        finally:
            self._seconds = self._now_s() - self._began_s
            self._processes.close()

    def result(self) -> KernelProfile:
        """The finished part of the result. Before the first case it may lack ceilings too."""
        return KernelProfile(
            environment=devices.environment(self._device),
            cold=self._settings.cold,
            seconds=self._seconds or self._now_s() - self._began_s,
            ceilings=Ceilings((), None) if self._ceilings is None else self._ceilings.ceilings(),
            rows=tuple(self._rows),
            means=means(self._rows),
            notes=tuple(self._all_notes()),
            planned=self._planned,
        )

    @property
    def _planned(self) -> int:
        return len(self._cases) * len(self._sources)

    def _load(self) -> None:
        """Run a tiny case, so that loading and compiling on first use is not timed."""
        small = tiny(self._cases[0][0])
        judged_case(small, 0, self._sources, self._device, may_compile=False)
        found = {kernel: wrong_on_cases(kernel, source, self._device) for kernel, source in self._sources.items()}
        self._wrong = {kernel: wrong for kernel, wrong in found.items() if wrong is not None}
        if self._device.type == "cpu":  # the server has loaded before anything is timed
            with contextlib.suppress(CallFailed):
                self._measured_peak_mib(self._processes, small, NATIVE, False)

    # --- one case -------------------------------------------------------------------------------------------------

    def _measured(self, case: Case, calls: int, budget: Budget) -> list[KernelCost]:
        judged = judged_case(case, calls, self._sources, self._device, wrong=self._wrong, now_s=self._now_s)
        for kernel, seconds in judged.compile_s.items():
            self._compile_s[kernel] = self._compile_s.get(kernel, 0.0) + seconds
        if 0 < judged.judged_channels < case.shape[1]:
            self._note(Note("channels sampled"), case)
        rows = {kernel: self._untimed(judged, kernel, timed) for kernel, timed in judged.correct.items()}
        load = CoreWait(torch.get_num_threads())
        samples = self._sampled(judged, budget)
        lacked = load.cores()
        timed = {kernel: _timed(row, samples) for kernel, row in rows.items() if kernel in judged.correct}
        rows = {kernel: replace(row, cores_lacked=lacked) for kernel, row in timed.items()}
        return [(rows | judged.refused)[kernel] for kernel in self._sources]

    def _untimed(self, judged: JudgedCase, kernel: str, timed: TimedKernel) -> KernelCost:
        """A row without times, with the memory saved for backward and the peak."""
        inputs = judged.inputs
        assert inputs is not None
        inputs.leaves()
        saved_mib = memory.saved_mib(lambda: timed.call(*timed.arguments(inputs)))
        if self._device.type == "cuda":
            peak_mib = memory.peak_mib(timed.step(inputs), self._device)
        else:
            peak_mib = self._resident_peak_mib(judged.case, kernel, timed)
        return KernelCost(
            judged.case,
            kernel,
            judged.calls,
            timed.ran,
            peak_memory_mib=peak_mib,
            saved_mib=saved_mib,
            judged_on_cases=not timed.compiles,
        )

    def _resident_peak_mib(self, case: Case, kernel: str, timed: TimedKernel) -> float | None:
        if timed.compiles:
            self._note(Note("peak needs compilation", kernel))
            return None
        try:
            return self._measured_peak_mib(self._processes, case, kernel, self._settings.allow_code)
        except CallFailed as error:
            self._note(Note("peak unknown", kernel, reason=str(error).splitlines()[0][:200]), case)
            return None

    def _sampled(self, judged: JudgedCase, budget: Budget) -> Samples:
        """Samples in as many rounds as fit in the case's budget, or the minimum."""
        works: dict[str, dict[Direction, Work]] = {}
        both_s = 0.0
        for kernel, timed in list(judged.correct.items()):
            assert judged.inputs is not None
            try:
                works[kernel] = timed.works(judged.inputs)
                both_s += self._first_sample_s(works[kernel]["both"])
            except Exception as raised:  # it was right the first time, and cannot run a second time
                works.pop(kernel, None)
                judged.refuse(kernel, Wrong(finding_of(raised)), timed)
        large = self._device.type == "cpu" and judged.case.tensor_bytes >= MAPPED_FROM_BYTES
        in_new_memory = large and freed_memory() == "kept"
        both_s += NEW_MEMORY * both_s * in_new_memory
        self._least_s += budget.least_s(both_s)
        together, alone = budget.rounds(both_s)
        if together < FEWEST_ROUNDS and works:
            self._note(Note("few rounds", count=FEWEST_ROUNDS), judged.case)

        def sampled(works: Mapping[str, Work], most: int, fewest: int) -> dict[str, tuple[float, ...]]:
            assert self._clock is not None
            # Others may have begun to use the machine since the first samples, hence the deadline.
            options: Any = {"cold": self._settings.cold, "deadline": budget.deadline, "fewest": fewest}
            return interleaved(self._clock, works, most, **options)

        samples: Samples = {}
        for direction in DIRECTIONS:
            rounds = (together, budget.least) if direction == "both" else (alone, budget.least_alone)
            samples[direction] = sampled({kernel: of[direction] for kernel, of in works.items()}, *rounds)
        if in_new_memory:
            with new_memory() as give_back:
                after = {
                    kernel: replace(of["both"], prepare=partial(_second, give_back, of["both"].prepare))
                    for kernel, of in works.items()
                }
                samples["new_memory"] = sampled(after, together, budget.least)
        return samples

    def _first_sample_s(self, work: Work) -> float:
        """Seconds of a sample with its preparation. It is discarded, since it allocates memory that is reused."""
        assert self._clock is not None
        began_s = self._now_s()
        interleaved(self._clock, {"": work}, 1, cold=self._settings.cold)
        return self._now_s() - began_s

    # --- notes ----------------------------------------------------------------------------------------------------

    def _note(self, note: Note, case: Case | None = None) -> None:
        self._notes.setdefault(note, []).extend([] if case is None else [case])

    def _all_notes(self) -> Iterator[Note]:
        for note, of in self._notes.items():
            yield replace(note, cases=tuple(dict.fromkeys(of)))
        for kernel, seconds in self._compile_s.items():
            yield Note("compilation", kernel, seconds=seconds)
        if self._clock is not None and self._clock.host_bound:
            yield Note("host bound", count=self._clock.host_bound, of=self._clock.samples)


def _second(first: Callable[[], object], second: Callable[[], Any]) -> Any:
    """What the second gives, after the first."""
    first()
    return second()


def _timed(row: KernelCost, samples: Samples) -> KernelCost:
    """The row with its times, and its speedup over native, where native was timed too."""
    fields: dict[str, Any] = {}
    for name, found in samples.items():
        direction: Direction = "both" if name == "new_memory" else name
        times = Times(found[row.kernel], cases.floor_bytes(row.case, direction), cases.flops(row.case, direction))
        fields[name] = times
        native = found.get(NATIVE)
        if direction == "both" and native and row.kernel != NATIVE:
            fields["faster" + "_new_memory" * (name != "both")] = speedup.faster(native, times.samples_ms)
    return replace(row, **fields)


# --- means over shapes ------------------------------------------------------------------------------------------------


def means(rows: Sequence[KernelCost]) -> tuple[KernelMean, ...]:
    """One for each kernel, operation, dtype and layout that has speedups over native, in the rows' order.

    Every shape counts once, however often a model calls it. Round k of a mean is made of the rounds k of its shapes.
    """
    native = {row.case: row for row in rows if row.kernel == NATIVE and row.both is not None}
    groups: dict[tuple[str, str, str, str], list[KernelCost]] = {}
    for row in rows:
        if row.faster is not None and row.case in native:
            key = (row.kernel, row.case.operation, row.case.dtype, row.case.layout)
            groups.setdefault(key, []).append(row)
    found = []
    for key, group in groups.items():
        faster, new = (
            speedup.faster_over([(_both_ms(native[row.case], new), _both_ms(row, new)) for row in group])
            for new in (False, True)
        )
        least, shape = min((row.faster.value, row.case.shape) for row in group if row.faster is not None)
        lacked = max((row.cores_lacked for row in group if row.cores_lacked is not None), default=None)
        mean = KernelMean(*key, len(group), faster, least, shape, lacked)
        found.append(replace(mean, faster_new_memory=new) if any(row.new_memory for row in group) else mean)
    return tuple(found)


def _both_ms(row: KernelCost, new: bool) -> tuple[float, ...]:
    """Samples of both directions; those in new memory where these are wanted and were taken."""
    times = (row.new_memory if new else None) or row.both
    return times.samples_ms if times else ()
