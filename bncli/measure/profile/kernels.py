"""`bncli profile`'s kernel view: cases judged first, then timed side by side, in as many rounds as the time allows."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import torch

from bncli.engine import device as devices
from bncli.errors import Unavailable
from bncli.measure.profile import candidates as kernel_arms
from bncli.measure.profile.budget import NATIVE, Asked, Budget, planned
from bncli.measure.profile.candidates import Arm, Source
from bncli.measure.profile.flops import flops
from bncli.measure.profile.kernel_entry import Entry, enter
from bncli.measure.profile.kernel_means import means
from bncli.measure.profile.kernel_memory import KernelPeaks, tiny
from bncli.measure.reference import case as cases
from bncli.measure.timing import clock as timing
from bncli.measure.timing import memory, speedup
from bncli.measure.timing.ceilings import Ladder, busy_cores
from bncli.measure.timing.clock import Clock, Deadline
from bncli.results.profile import (
    Case,
    Ceilings,
    Direction,
    KernelCost,
    KernelProfile,
    Measuring,
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
    machine's ceilings and the host's clock. Raises RecipeError for what cannot be measured as asked, and Unavailable
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
            raise Unavailable(f"--device {device}: kernels are timed on cpu and cuda alone. Use --device cpu")
        self._asked, self._device, self._now_s = asked, device, now_s
        self._cases = planned(asked)
        self._sources = sources or kernel_arms.sources(asked.kernels, device, asked.allow_code)
        self._clock = clock
        self._peaks: PeakMemory = peaks or KernelPeaks(asked.allow_code)
        self._ladder = ladder
        self._rows: list[KernelCost] = []
        self._notes: dict[str, list[str]] = {}  # what it says -> of which cases
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
        busy = busy_cores(ceilings, self._device)
        return KernelProfile(
            environment=devices.environment(self._device),
            cold=self._asked.cold,
            seconds=self._seconds or self._now_s() - self._began_s,
            ceilings=ceilings,
            rows=tuple(self._rows),
            means=means(self._rows),
            notes=(*([] if busy is None else [busy]), *self._all_notes()),
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
        if on_cpu:
            self._peaks.peak_mib(small, NATIVE)

    # --- one case -------------------------------------------------------------------------------------------------

    def _measured(self, case: Case, calls: int, budget: Budget) -> list[KernelCost]:
        entry = enter(case, calls, self._sources, self._device, now_s=self._now_s)
        for kernel, seconds in entry.compile_s.items():
            self._compile_s[kernel] = self._compile_s.get(kernel, 0.0) + seconds
        if 0 < entry.judged_channels < case.shape[1]:
            self._note("run whole, and judged on some of the channels, from the first to the last", case)
        rows = {kernel: self._untimed(entry, kernel, arm) for kernel, arm in entry.arms.items()}
        samples = self._sampled(entry, budget)
        rows = {kernel: _timed(row, samples) for kernel, row in rows.items() if kernel in entry.arms}
        return [(rows | entry.refused)[kernel] for kernel in self._sources]

    def _untimed(self, entry: Entry, kernel: str, arm: Arm) -> KernelCost:
        """A row without times: what it saves for backward, and its peak."""
        inputs = entry.inputs
        assert inputs is not None
        inputs.leaves()
        saved = memory.saved_bytes(lambda: arm.run(inputs)) / memory.MIB
        if self._device.type == "cuda":
            peak: float | None = memory.cuda_peak_mib(arm.step(inputs), self._device)
        else:
            peak = self._resident_peak_mib(entry.case, kernel, arm)
        return KernelCost(entry.case, kernel, entry.calls, arm.ran, peak_memory_mib=peak, saved_mib=saved)

    def _resident_peak_mib(self, case: Case, kernel: str, arm: Arm) -> float | None:
        if arm.compiles:
            self._note(f"{kernel}: no peak of memory, which would take another compilation in a process of its own")
            return None
        peak = self._peaks.peak_mib(case, kernel)
        if peak is None:
            self._note(f"{kernel}: no peak of memory: {self._peaks.failure}", case)
        return peak

    # --- its samples ----------------------------------------------------------------------------------------------

    def _sampled(self, entry: Entry, budget: Budget) -> Samples:
        """In as many rounds as the case's share of the time takes, or the fewest."""
        works: dict[str, dict[Direction, timing.Work]] = {}
        both_s = 0.0
        for kernel, arm in list(entry.arms.items()):
            assert entry.inputs is not None
            try:
                works[kernel] = arm.works(entry.inputs)
                both_s += self._first_sample_s(works[kernel]["both"])
            except Exception as raised:  # right the first time, and then not able to run again
                works.pop(kernel, None)
                entry.refuse_for(kernel, raised, arm)
        assert self._clock is not None
        self._least_s += budget.least_s(both_s)
        together, apart = budget.rounds(both_s)
        if together < speedup.FEWEST_ROUNDS and works:
            self._note(f"fewer rounds than the {speedup.FEWEST_ROUNDS} of an interval", entry.case)
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

    def _note(self, text: str, case: Case | None = None) -> None:
        self._notes.setdefault(text, []).extend([] if case is None else [str(case)])

    def _all_notes(self) -> Iterator[str]:
        for text, of in self._notes.items():
            yield text + _first_of(list(dict.fromkeys(of)))
        for kernel, seconds in self._compile_s.items():
            yield f"{kernel}: {seconds:.1f} s of compilation, which are in no row"
        if self._clock is not None and self._clock.host_bound:
            yield f"in {self._clock.host_bound} of {self._clock.samples} samples the device waited for the host"


def _timed(row: KernelCost, samples: Samples) -> KernelCost:
    """The row with its times, and how many times faster than native it is, where native was timed beside it."""
    forward, backward, both = (
        Times(samples[way][row.kernel], cases.floor_bytes(row.case, way), flops(row.case, way))
        for way in ("forward", "backward", "both")
    )
    native = None if row.kernel == NATIVE else samples["both"].get(NATIVE)
    faster = None if native is None else speedup.faster(native, both.samples_ms)
    return replace(row, forward=forward, backward=backward, both=both, faster=faster)


def _first_of(names: Sequence[str]) -> str:
    if not names:
        return ""
    return f": {names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
