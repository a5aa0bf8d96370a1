"""Timing of short workloads on a device: raw samples, cold or warm cache, interleaved and paired by round.

A sample of a CUDA device is the time between two of its events. So that it holds the device's time alone, the device is
kept busy (it spins) until the host has enqueued all of the work; a sample for which that failed is counted in
`host_bound`. On a CPU a sample is wall time.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from bncli.engine import device as devices

FLUSH_TIMES_L2 = 4  # a buffer this many times the last cache leaves nothing of what was there before
LEAST_FLUSH_BYTES = 64 * 2**20
FIRST_LEAD_MS, LEAST_LEAD_MS = 0.1, 0.02  # of spinning before a sample, then twice what the host took last time
LONGEST_LEAD_MS = 5.0  # work that takes the host longer than this is bound by it
FEWEST_ROUNDS = 3  # even after the deadline: two samples have no useful quartiles


@dataclass(frozen=True, eq=False)
class Work:
    """A timed workload: `run` is timed with the result of the untimed `prepare`, and makes `calls` calls."""

    run: Callable[[Any], object]
    prepare: Callable[[], Any] = lambda: None
    calls: int = 1


def in_a_row(call: Callable[[], object], calls: int) -> Work:
    """Several calls as one sample, after an untimed call that warms the caches."""

    def run(_: object) -> None:
        for _ in range(calls):
            call()

    return Work(run, call if calls > 1 else lambda: None, calls)


class Clock(Protocol):
    host_bound: int  # samples so far in which the device waited for the host
    samples: int  # so far

    def sample(self, work: Work, cold: bool) -> Callable[[], float]:
        """Run the work once. The function returned gives milliseconds per call, after a call of `wait`."""
        ...

    def wait(self) -> None: ...


class CpuClock:
    """Wall time. Cold: a buffer larger than the last-level cache is written before each sample."""

    def __init__(self, flush_bytes: int = LEAST_FLUSH_BYTES, now_ns: Callable[[], int] = time.perf_counter_ns) -> None:
        self._now_ns = now_ns
        self._flush = torch.zeros(flush_bytes // 4)
        self.host_bound = self.samples = 0

    def sample(self, work: Work, cold: bool) -> Callable[[], float]:
        self.samples += 1
        state = _prepared(work, self._flush if cold else None)
        began = self._now_ns()
        work.run(state)
        elapsed_ms = (self._now_ns() - began) / 1e6 / work.calls
        return lambda: elapsed_ms

    def wait(self) -> None:
        return


class CudaClock:
    """Time between two events of a CUDA device, on its current stream. Nothing is waited for between samples.

    event: makes an event with `record()`, `query()` and `elapsed_time(other)` in ms; spin: keeps the device busy for so
    many of its clock's cycles; now_ns: the host's clock.
    """

    def __init__(
        self,
        device: torch.device,
        flush_bytes: int | None = None,
        *,
        event: Callable[[], Any] = lambda: torch.cuda.Event(enable_timing=True),
        spin: Callable[[int], None] = lambda cycles: torch.cuda._sleep(cycles),
        synchronize: Callable[[torch.device], None] = devices.synchronize,
        now_ns: Callable[[], int] = time.perf_counter_ns,
    ) -> None:
        if flush_bytes is None:
            l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
            flush_bytes = max(LEAST_FLUSH_BYTES, FLUSH_TIMES_L2 * l2_bytes)
        self._device, self._event, self._spin = device, event, spin
        self._synchronize, self._now_ns = synchronize, now_ns
        self._flush = torch.zeros(flush_bytes // 4, device=device)
        self._lead_ms: dict[Work, float] = {}
        self._cycles_per_ms = self._calibrate()
        self.host_bound = self.samples = 0

    def _calibrate(self) -> float:
        """Cycles that the device spins through in a millisecond. Its clock frequency rises during the first pass."""
        cycles = 20_000_000
        for _ in range(2):
            start, end = self._event(), self._event()
            start.record()
            self._spin(cycles)
            end.record()
            self.wait()
        return cycles / start.elapsed_time(end)

    def sample(self, work: Work, cold: bool) -> Callable[[], float]:
        self.samples += 1
        state = _prepared(work, self._flush if cold else None)
        lead_ms = self._lead_ms.get(work, FIRST_LEAD_MS)
        start, end = self._event(), self._event()
        self._spin(int(lead_ms * self._cycles_per_ms))
        began = self._now_ns()
        start.record()
        work.run(state)
        end.record()
        host_ms = (self._now_ns() - began) / 1e6
        late = start.query()  # the device began before the host had enqueued it all: part of the time is the host's
        self.host_bound += late
        self._lead_ms[work] = min(LONGEST_LEAD_MS, 2 * max(host_ms, lead_ms if late else LEAST_LEAD_MS))
        return lambda: start.elapsed_time(end) / work.calls

    def wait(self) -> None:
        self._synchronize(self._device)


def _prepared(work: Work, flush: torch.Tensor | None) -> Any:
    """The argument of `work.run`, after flushing the cache, or without `flush` after an untimed run of the work."""
    if flush is None:
        work.run(work.prepare())
    state = work.prepare()
    if flush is not None:
        flush.add_(1.0)
        flush.sum()  # read after it was written, so that what stays in the cache need not be written back later
    return state


class LoopClock:
    """Wall time from an idle device until all is done, as a training loop sees it. Warm and cold are the same."""

    def __init__(
        self,
        device: torch.device,
        now_ns: Callable[[], int] = time.perf_counter_ns,
        synchronize: Callable[[torch.device], None] = devices.synchronize,
    ) -> None:
        self._device, self._now_ns, self._synchronize = device, now_ns, synchronize
        self.host_bound = self.samples = 0

    def sample(self, work: Work, cold: bool) -> Callable[[], float]:
        self.samples += 1
        state = work.prepare()
        self.wait()
        began = self._now_ns()
        work.run(state)
        self.wait()
        elapsed_ms = (self._now_ns() - began) / 1e6 / work.calls
        return lambda: elapsed_ms

    def wait(self) -> None:
        self._synchronize(self._device)


def of(device: torch.device) -> Clock:
    """The clock for a device."""
    return CudaClock(device) if device.type == "cuda" else CpuClock()


class Deadline:
    """A deadline `seconds` after its creation."""

    def __init__(self, seconds: float, now_s: Callable[[], float] = time.monotonic) -> None:
        self._now_s = now_s
        self._end_s = now_s() + seconds

    @property
    def left_s(self) -> float:
        return max(0.0, self._end_s - self._now_s())

    @property
    def passed(self) -> bool:
        return self.left_s == 0


def rounds(
    clock: Clock,
    works: Mapping[Any, Work],
    most: int,
    *,
    cold: bool = True,
    deadline: Deadline | None = None,
    fewest: int = FEWEST_ROUNDS,
    order: random.Random | None = None,
) -> Iterator[dict[Any, float]]:
    """Milliseconds per call of every work, one round at a time; the order within a round is random.

    Fewer rounds than `most`, but at least `fewest`, once `deadline` has passed. Warm up before: the first call of a
    kernel may compile it.
    """
    order = order or random.Random(0)
    for done in range(most):
        if deadline is not None and deadline.passed and done >= fewest:
            return
        read = {name: clock.sample(works[name], cold) for name in order.sample(list(works), len(works))}
        clock.wait()
        yield {name: read[name]() for name in works}


def interleaved(clock: Clock, works: Mapping[str, Work], most: int, **options: Any) -> dict[str, tuple[float, ...]]:
    """The samples of `rounds`, by work."""
    found = list(rounds(clock, works, most, **options))
    return {name: tuple(each[name] for each in found) for name in works}


def copy_work(size_bytes: int, device: torch.device) -> tuple[Work, int]:
    """A copy on the device of a tensor that large, and the bytes that it moves: read once and written once."""
    source = torch.ones(size_bytes // 4, device=device)
    target = torch.empty_like(source)
    return Work(lambda _: target.copy_(source)), 2 * source.numel() * source.element_size()
