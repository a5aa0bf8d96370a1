"""The kernel view of `bncli profile`: every kernel is judged on each case; the correct ones are timed side by side."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch

from bncli.engine import device as devices
from bncli.errors import Unavailable
from bncli.measure.profile import candidates
from bncli.measure.profile.budget import NATIVE, Asked, Budget, planned
from bncli.measure.profile.candidates import Candidate, Source
from bncli.measure.profile.kernel_memory import KernelPeaks, tiny
from bncli.measure.reference import case as cases
from bncli.measure.reference.candidate import Candidate as Kernel
from bncli.measure.reference.candidate import rule
from bncli.measure.reference.case import Inputs, flops
from bncli.measure.reference.judge import CheckContext, Large, compare, large, refusals
from bncli.measure.reference.observe import finding_of
from bncli.measure.timing import clock as timing
from bncli.measure.timing import memory, speedup
from bncli.measure.timing.ceilings import Ladder
from bncli.measure.timing.clock import Clock, Deadline
from bncli.measure.timing.speedup import faster_over
from bncli.results.finding import Finding
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

ALONE: tuple[Direction, ...] = ("forward", "backward")
Samples = dict[Direction, dict[str, tuple[float, ...]]]  # kernel -> ms a call, a sample a round

CEILING_ROUNDS = 5  # before the cases, and again after them
CASE_BYTES = 8 * 2**20  # what a case costs whatever its size, in bytes of a tensor


class PeakMemory(Protocol):
    """Where a CPU's peaks come from: `KernelPeaks`, or a fake."""

    failure: str | None

    def start(self) -> None: ...

    def peak_mib(self, case: Case, kernel: str) -> float | None: ...

    def close(self) -> None: ...


class KernelRun:
    """One kernel view: iterate over `events`, then ask for `result`, also after an interruption.

    clock, peaks, sources, ladder and now_s stand in for the device's clock, fresh processes, the kernels by name, the
    machine's ceilings and the host's clock. Raises UsageError for what cannot be measured as asked, and Unavailable
    for a device without a clock.
    """

    def __init__(
        self,
        asked: Asked,
        device: torch.device,
        clock: Clock | None = None,
        *,
        peaks: PeakMemory | None = None,
        sources: Mapping[str, Source] | None = None,
        ladder: Ladder | None = None,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        if device.type not in ("cpu", "cuda"):
            raise Unavailable(f"device {device}: kernels are timed on cpu and cuda alone")
        self._asked, self._device, self._now_s = asked, device, now_s
        self._cases = planned(asked)
        self._sources = sources or candidates.sources(asked.kernels, device, asked.allow_code)
        self._clock = clock
        self._peaks: PeakMemory = peaks or KernelPeaks(asked.allow_code)
        self._ladder = ladder
        self._wrong: dict[str, Wrong] = {}  # kernels that are wrong on small cases, found once
        self._rows: list[KernelCost] = []
        self._notes: dict[Note, list[Case]] = {}  # a note without its cases -> those
        self._compile_s: dict[str, float] = {}
        self._began_s, self._seconds = now_s(), 0.0
        self._least_s = 0.0  # of the cases so far, had each had the fewest rounds

    def events(self) -> Iterator[ProfileEvent]:
        """Measure, case by case. A case's rows come together, when all of its kernels are measured."""
        self._began_s = self._now_s()
        clock = self._clock = self._clock or timing.of(self._device)
        ladder = self._ladder = self._ladder or Ladder(clock, self._device, cold=self._asked.cold)
        try:
            yield ProfileStarted("kernels", self._planned, self._asked.seconds)
            yield Measuring("the machine's own copies and multiply-adds", 0.0)
            self._load()
            loaded_s = self._now_s()
            ladder.climb(CEILING_ROUNDS)
            climbed_s = self._now_s() - loaded_s  # it is climbed again at the end
            whole = Deadline(self._asked.seconds - 2 * climbed_s - (loaded_s - self._began_s), self._now_s)
            weights = [CASE_BYTES + case.tensor_bytes for case, _ in self._cases]
            for k, (case, calls) in enumerate(self._cases):
                done, left = sum(weights[:k]), sum(weights[k:])
                later_s = self._least_s * left / done + climbed_s if done else 0.0
                yield Measuring(str(case), done / (done + left), self._now_s() - self._began_s + later_s)
                budget = Budget(whole, weights[k] / left, self._asked.least_rounds, self._now_s)
                rows = self._measured(case, calls, budget)
                self._rows += rows
                yield from map(RowDone, rows)
            yield Measuring("the machine's own copies and multiply-adds, again", 1.0)
            ladder.climb(CEILING_ROUNDS)
        finally:
            self._seconds = self._now_s() - self._began_s
            self._peaks.close()

    def result(self) -> KernelProfile:
        """Of the cases that are finished. Without any, it may have no copies either."""
        ceilings = Ceilings((), None) if self._ladder is None else self._ladder.ceilings()
        return KernelProfile(
            environment=devices.environment(self._device),
            cold=self._asked.cold,
            seconds=self._seconds or self._now_s() - self._began_s,
            ceilings=ceilings,
            rows=tuple(self._rows),
            means=means(self._rows),
            notes=tuple(self._all_notes()),
            planned=self._planned,
        )

    @property
    def _planned(self) -> int:
        return len(self._cases) * len(self._sources)

    def _load(self) -> None:
        """Whatever loads or compiles on first use, on a tiny case, so that no case's time pays for it."""
        small = tiny(self._cases[0][0])
        on_cpu = self._device.type == "cpu"
        if on_cpu:
            self._peaks.start()  # which goes on beside what follows
        enter(small, 0, self._sources, self._device, may_compile=False)
        found = {kernel: wrong_on_cases(kernel, source, self._device) for kernel, source in self._sources.items()}
        self._wrong = {kernel: wrong for kernel, wrong in found.items() if wrong is not None}
        if on_cpu:
            self._peaks.peak_mib(small, NATIVE)

    # --- one case -------------------------------------------------------------------------------------------------

    def _measured(self, case: Case, calls: int, budget: Budget) -> list[KernelCost]:
        entry = enter(case, calls, self._sources, self._device, wrong=self._wrong, now_s=self._now_s)
        for kernel, seconds in entry.compile_s.items():
            self._compile_s[kernel] = self._compile_s.get(kernel, 0.0) + seconds
        if 0 < entry.judged_channels < case.shape[1]:
            self._note(Note("channels sampled"), case)
        rows = {kernel: self._untimed(entry, kernel, candidate) for kernel, candidate in entry.candidates.items()}
        samples = self._sampled(entry, budget)
        rows = {kernel: _timed(row, samples) for kernel, row in rows.items() if kernel in entry.candidates}
        return [(rows | entry.refused)[kernel] for kernel in self._sources]

    def _untimed(self, entry: Entry, kernel: str, candidate: Candidate) -> KernelCost:
        """A row without times: what it saves for backward, and its peak."""
        inputs = entry.inputs
        assert inputs is not None
        inputs.leaves()
        saved = memory.saved_bytes(lambda: candidate.call(*candidate.arguments(inputs))) / memory.MIB
        if self._device.type == "cuda":
            peak: float | None = memory.cuda_peak_mib(candidate.step(inputs), self._device)
        else:
            peak = self._resident_peak_mib(entry.case, kernel, candidate)
        return KernelCost(
            entry.case,
            kernel,
            entry.calls,
            candidate.ran,
            peak_memory_mib=peak,
            saved_mib=saved,
            judged_on_cases=not candidate.compiles,
        )

    def _resident_peak_mib(self, case: Case, kernel: str, candidate: Candidate) -> float | None:
        if candidate.compiles:
            self._note(Note("peak needs compilation", kernel))
            return None
        peak = self._peaks.peak_mib(case, kernel)
        if peak is None:
            self._note(Note("peak unknown", kernel, reason=self._peaks.failure), case)
        return peak

    # --- its samples ----------------------------------------------------------------------------------------------

    def _sampled(self, entry: Entry, budget: Budget) -> Samples:
        """In as many rounds as the case's share of the time takes, or the fewest."""
        works: dict[str, dict[Direction, timing.Work]] = {}
        both_s = 0.0
        for kernel, candidate in list(entry.candidates.items()):
            assert entry.inputs is not None
            try:
                works[kernel] = candidate.works(entry.inputs)
                both_s += self._first_sample_s(works[kernel]["both"])
            except Exception as raised:  # right the first time, and then not able to run again
                works.pop(kernel, None)
                entry.refuse_for(kernel, raised, candidate)
        assert self._clock is not None
        self._least_s += budget.least_s(both_s)
        together, apart = budget.rounds(both_s)
        if together < speedup.FEWEST_ROUNDS and works:
            self._note(Note("few rounds", count=speedup.FEWEST_ROUNDS), entry.case)
        rounds: dict[Direction, tuple[int, int]] = {
            "both": (together, budget.least),
            **dict.fromkeys(ALONE, (apart, budget.least_apart)),
        }
        return {
            way: timing.interleaved(
                self._clock,
                {kernel: of[way] for kernel, of in works.items()},
                most,
                cold=self._asked.cold,
                deadline=budget.own,  # others may have begun to use the machine since the first samples
                fewest=fewest,
            )
            for way, (most, fewest) in rounds.items()
        }

    def _first_sample_s(self, work: timing.Work) -> float:
        """Thrown away: what it allocates is there then, and how long a sample takes, all told, is known."""
        assert self._clock is not None
        began_s = self._now_s()
        timing.interleaved(self._clock, {"": work}, 1, cold=self._asked.cold)
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


def _timed(row: KernelCost, samples: Samples) -> KernelCost:
    """The row with its times, and how many times faster than native it is, where native was timed beside it."""
    forward, backward, both = (
        Times(samples[way][row.kernel], cases.floor_bytes(row.case, way), flops(row.case, way))
        for way in ("forward", "backward", "both")
    )
    native = None if row.kernel == NATIVE else samples["both"].get(NATIVE)
    faster = None if native is None else speedup.faster(native, both.samples_ms)
    return replace(row, forward=forward, backward=backward, both=both, faster=faster)


# --- a case's kernels, judged -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Wrong:
    """A wrong result of a kernel, and the identifier of the small case that gives it; None for the timed shape."""

    finding: Finding
    case: str | None = None


@dataclass
class Entry:
    """The kernels of one case, with the tensors that all of them are timed on."""

    case: Case
    calls: int
    inputs: Inputs | None = None
    candidates: dict[str, Candidate] = field(default_factory=dict)  # those that take part
    refused: dict[str, KernelCost] = field(default_factory=dict)
    compile_s: dict[str, float] = field(default_factory=dict)
    judged_channels: int = 0

    def refuse(self, kernel: str, error: str, *, ran: str | None = None, wrong: Wrong | None = None) -> None:
        self.candidates.pop(kernel, None)
        self.refused[kernel] = KernelCost(
            *(self.case, kernel, self.calls, ran),
            error=error,
            wrong=wrong is not None,
            finding=None if wrong is None else wrong.finding,
            wrong_case=None if wrong is None else wrong.case,
        )

    def refuse_wrong(self, kernel: str, wrong: Wrong, candidate: Candidate | None = None) -> None:
        """A kernel that raises gave no right result, unless the machine had no room, or it could not be compiled."""
        finding, ran = wrong.finding, None if candidate is None else candidate.ran
        if finding.text is None:
            self.refuse(kernel, "wrong result", ran=ran, wrong=wrong)
            return
        compiling = candidate is not None and candidate.compiles
        words = f"{finding.exception}: {finding.text}"
        missing = compiling or finding.kind == "no_memory"
        self.refuse(kernel, f"torch.compile: {words}" if compiling else words, wrong=None if missing else wrong)

    def refuse_for(self, kernel: str, raised: Exception, candidate: Candidate | None) -> None:
        self.refuse_wrong(kernel, Wrong(finding_of(raised)), candidate)


def wrong_on_cases(kernel: str, source: Source, device: torch.device) -> Wrong | None:
    """The first wrong result on gradcheck's quick cases without second derivatives, of those that the kernel takes.

    A kernel that is compiled is left out: each case would be compiled.
    """

    def taken(case: cases.Case) -> Candidate | None:
        try:
            return source(case)
        except Unavailable:
            return None

    def context_of(case: cases.Case) -> CheckContext | None:
        found = taken(case)
        return None if found is None else tested(found)

    def tested(found: Candidate) -> CheckContext:
        return CheckContext(Kernel(kernel, "batch", found.on_a_copy, "", rule(kernel)), device)

    chosen = cases.cases("quick", "batch", fuses=True, evaluates=True)
    first = taken(chosen[0])
    if first is not None and first.compiles:
        return None
    refused = refusals(context_of)
    for case in chosen:
        found = None if case.needs & set(refused) else taken(case)
        if found is None:
            continue
        given = cases.inputs(case, device)
        if found.positive_weight:
            given = cases.with_positive_weight(given, case)
        wrong = compare(tested(found), case, given, second=False).wrong
        if wrong is not None:
            return Wrong(wrong, case.identifier)
    return None


def enter(
    case: Case,
    calls: int,
    sources: Mapping[str, Source],
    device: torch.device,
    *,
    may_compile: bool = True,
    wrong: Mapping[str, Wrong] | None = None,
    now_s: Callable[[], float] = time.monotonic,
) -> Entry:
    """Run each kernel once, forward and backward, and judge what it gives.

    wrong: the kernels that are known to be wrong, which are not run.
    """
    entry = Entry(case, calls)
    larges: dict[bool, Large] = {}  # by whether all weights are above 0
    for kernel, source in sources.items():
        candidate: Candidate | None = None
        if wrong is not None and kernel in wrong:
            entry.refuse_wrong(kernel, wrong[kernel])
            continue
        try:
            candidate = source(cases.timed(case))
            if candidate.compiles and not may_compile:
                continue
            positive = candidate.positive_weight
            if positive not in larges:
                larges[positive] = large(candidate.case, device, positive_weight=positive)
            _judge(entry, kernel, candidate, larges[positive], now_s)
        except Unavailable as reason:
            entry.refuse(kernel, str(reason), ran=None if candidate is None else candidate.ran)
        except Exception as raised:  # a kernel may raise anything, and the others' rows stand
            entry.refuse_for(kernel, raised, candidate)
    return entry


def _judge(entry: Entry, kernel: str, candidate: Candidate, shape: Large, now_s: Callable[[], float]) -> None:
    began_s = now_s()
    wrong = shape.judge(candidate.on_a_copy, rule(kernel), poison=not candidate.compiles).wrong
    if candidate.compiles:
        entry.compile_s[kernel] = now_s() - began_s
    if wrong is not None:
        entry.refuse_wrong(kernel, Wrong(wrong), candidate)
        return
    entry.candidates[kernel] = candidate
    entry.inputs = entry.inputs or shape.given
    entry.judged_channels = len(shape.channels)


# --- means over shapes ------------------------------------------------------------------------------------------------

Key = tuple[str, str, str, str]  # kernel, operation, dtype, layout


def means(rows: Sequence[KernelCost]) -> tuple[KernelMean, ...]:
    """One for each kernel, operation, dtype and layout that has ratios to native, in the rows' order.

    Every shape counts once, however often a model calls it. Round k of a mean is made of the rounds k of its shapes.
    """
    native = {row.case: row.both for row in rows if row.kernel == NATIVE and row.both is not None}
    groups: dict[Key, list[KernelCost]] = {}
    for row in rows:
        if row.faster is not None and row.both is not None and row.case in native:
            groups.setdefault(_group(row.kernel, row.case), []).append(row)
    return tuple(_mean(key, group, native) for key, group in groups.items())


def _group(kernel: str, case: Case) -> Key:
    return kernel, case.operation, case.dtype, case.layout


def _mean(key: Key, rows: Sequence[KernelCost], native: dict[Case, Times]) -> KernelMean:
    pairs = [(native[row.case].samples_ms, row.both.samples_ms) for row in rows if row.both is not None]
    values = [(row.faster.value, row.case.shape) for row in rows if row.faster is not None]
    least, shape = min(values)
    kernel, operation, dtype, layout = key
    return KernelMean(kernel, operation, dtype, layout, len(rows), faster_over(pairs), least, shape)
