"""Times of short pieces of work on a device: raw samples, cold or warm cache, arms interleaved and paired by round.

A sample of a CUDA device is the time between two of its events. So that it holds the device's time alone, the device is
kept busy (it spins) until the host has enqueued all of the work; a sample for which that failed is counted in
`host_bound`. On a CPU a sample is wall time.
"""

from __future__ import annotations

import contextlib
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

FLUSH_TIMES_L2 = 4  # a buffer this many times the last cache leaves nothing of what was there before
LEAST_FLUSH_BYTES = 64 * 2**20
FIRST_LEAD_MS, LEAST_LEAD_MS = 0.1, 0.02  # of spinning before a sample, then twice what the host took last time
LONGEST_LEAD_MS = 5.0  # work that takes the host longer than this is bound by it
FEWEST_ROUNDS = 3  # however late it is: two samples have no quartiles worth the name


@dataclass(frozen=True, eq=False)
class Work:
    """What a sample runs: `run`, timed, takes what `prepare`, untimed, made. It holds `calls` of what is measured."""

    run: Callable[[Any], object]
    prepare: Callable[[], Any] = lambda: None
    calls: int = 1


class Clock(Protocol):
    host_bound: int  # samples so far in which the device waited for the host
    samples: int  # so far

    def sample(self, work: Work, cold: bool) -> Callable[[], float]:
        """Run it once; what is returned gives milliseconds per call, once `wait` has been called."""
        ...

    def wait(self) -> None: ...


class CpuClock:
    """Wall time. Cold: a buffer larger than the last cache is written before."""

    def __init__(self, flush_bytes: int = LEAST_FLUSH_BYTES, now_ns: Callable[[], int] = time.perf_counter_ns) -> None:
        self._now_ns = now_ns
        self._flush = torch.zeros(flush_bytes // 4)
        self.host_bound = self.samples = 0

    def sample(self, work: Work, cold: bool) -> Callable[[], float]:
        self.samples += 1
        _settle(work, self._flush if cold else None)
        state = work.prepare()
        if cold:
            _overwrite(self._flush)
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
        synchronize: Callable[[torch.device], None] = lambda device: torch.cuda.synchronize(device),
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
        """Cycles that the device spins through in a millisecond; the first time around is for its clock to rise."""
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
        _settle(work, self._flush if cold else None)
        state = work.prepare()
        if cold:
            _overwrite(self._flush)
        lead_ms = self._lead_ms.get(work, FIRST_LEAD_MS)
        start, end = self._event(), self._event()
        self._spin(int(lead_ms * self._cycles_per_ms))
        began = self._now_ns()
        start.record()
        work.run(state)
        end.record()
        host_ms = (self._now_ns() - began) / 1e6
        late = start.query()  # the device had begun before the host was through: part of the time is the host's
        self.host_bound += late
        self._lead_ms[work] = min(LONGEST_LEAD_MS, 2 * max(host_ms, lead_ms if late else LEAST_LEAD_MS))
        return lambda: start.elapsed_time(end) / work.calls

    def wait(self) -> None:
        self._synchronize(self._device)


def _settle(work: Work, flush: torch.Tensor | None) -> None:
    """Warm: the same work runs untimed just before, whatever ran before that."""
    if flush is None:
        work.run(work.prepare())


def _overwrite(flush: torch.Tensor) -> None:
    """Evict the last cache: written, then read, so that what stays in it need not be written back by the work timed."""
    flush.add_(1.0)
    flush.sum()


def of(device: torch.device) -> Clock:
    """The clock of that device."""
    return CudaClock(device) if device.type == "cuda" else CpuClock()


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Let torch compute on so many CPU threads inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Deadline:
    """A time to be done by, `seconds` from its making."""

    def __init__(self, seconds: float, now_s: Callable[[], float] = time.monotonic) -> None:
        self._now_s = now_s
        self._end_s = now_s() + seconds

    @property
    def left_s(self) -> float:
        return max(0.0, self._end_s - self._now_s())

    @property
    def passed(self) -> bool:
        return self.left_s == 0


def interleaved(
    clock: Clock,
    works: Mapping[str, Work],
    rounds: int,
    *,
    cold: bool = True,
    deadline: Deadline | None = None,
    fewest: int = FEWEST_ROUNDS,
    order: random.Random | None = None,
) -> dict[str, tuple[float, ...]]:
    """Milliseconds per call, a sample a round of every work, whose order is drawn anew each round.

    Fewer rounds than asked for, but at least `fewest` of them, once `deadline` has passed. Warm up before: the first
    call of a kernel may compile it.
    """
    order = order or random.Random(0)
    found: dict[str, list[float]] = {name: [] for name in works}
    for done in range(rounds):
        if deadline is not None and deadline.passed and done >= fewest:
            break
        read = {name: clock.sample(works[name], cold) for name in order.sample(list(works), len(works))}
        clock.wait()
        for name in works:
            found[name].append(read[name]())
    return {name: tuple(samples) for name, samples in found.items()}


def warm_up(clock: Clock, work: Work, least_ms: float = 50.0, most_calls: int = 50) -> None:
    """Run it three times, and on until `least_ms` of its own time have passed: compiled, allocated, clocks up."""
    passed_ms = 0.0
    for done in range(most_calls):
        read = clock.sample(work, cold=True)
        clock.wait()
        if done > 0:  # the first may hold a compilation
            passed_ms += read() * work.calls
        if done >= 2 and passed_ms >= least_ms:
            return


def in_a_loop(
    clock: Clock,
    works: Mapping[str, Work],
    rounds: int,
    *,
    calls: int = 50,
    now_ns: Callable[[], int] = time.perf_counter_ns,
) -> tuple[dict[str, tuple[float, ...]], dict[str, tuple[float, ...]]]:
    """Milliseconds per call of the host alone, to enqueue `calls` of them on an idle device, and until they are done.

    The second is what a training loop sees: the larger of the host's time and the device's. Keep calls times kernels a
    call under about 1,000, where the queue of a CUDA device is full and the host waits.
    """
    host: dict[str, list[float]] = {name: [] for name in works}
    whole: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            clock.wait()
            began = now_ns()
            for _ in range(calls):
                work.run(work.prepare())
            enqueued = now_ns()
            clock.wait()
            host[name].append((enqueued - began) / 1e6 / calls / work.calls)
            whole[name].append((now_ns() - began) / 1e6 / calls / work.calls)
    return {name: tuple(ms) for name, ms in host.items()}, {name: tuple(ms) for name, ms in whole.items()}


# --- what the samples say -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spread:
    """The median of some samples between their quartiles."""

    low: float
    median: float
    high: float
    count: int


def spread(samples: Sequence[float]) -> Spread:
    """Of one or more samples; a single one has no spread to show and stands for all three."""
    if len(samples) == 1:
        return Spread(samples[0], samples[0], samples[0], 1)
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
    return Spread(low, middle, high, len(samples))


def times_faster(reference_ms: Sequence[float], ms: Sequence[float]) -> Spread:
    """How many times faster than the reference, each ratio within one round; above 1: faster."""
    return spread([base / own for base, own in zip(reference_ms, ms, strict=True)])


def gb_per_s(moved_bytes: float, ms: float) -> float:
    """10^9 bytes a second."""
    return moved_bytes / ms / 1e6


def copy_work(size_bytes: int, device: torch.device) -> tuple[Work, int]:
    """A copy on the device of a tensor that large, and the bytes that it moves: read once and written once."""
    source = torch.ones(size_bytes // 4, device=device)
    target = torch.empty_like(source)
    return Work(lambda _: target.copy_(source)), 2 * source.numel() * source.element_size()
