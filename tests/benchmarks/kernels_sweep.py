"""A sweep over the shapes that networks really call batch norm on, weighted by their calls."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bncli.measure.profile.shapes import Calls
from bncli.measure.timing import clock as timing
from bncli.measure.timing.clock import Deadline
from bncli.results.profile import Case
from tests.benchmarks import kernels_sections as sections
from tests.benchmarks import kernels_speed as speed
from tests.benchmarks.kernels_sections import Run
from tests.benchmarks.kernels_speed import Target


@dataclass(frozen=True)
class Sweep:
    """Of the calls that were timed: the share at least as fast as eager, the share above 0.9 of it, and the slowest."""

    what: str
    timed_calls: int
    all_calls: int
    not_slower: float
    not_under: float
    slowest: float
    slowest_shape: tuple[int, ...]
    geometric_mean: float


def summed_up(ratios: Sequence[tuple[Calls, float]], what: str, all_calls: int) -> Sweep:
    """Ratios (eager over candidate) weighted by calls."""

    def share(enough: Callable[[float], bool]) -> float:
        return sum(row.calls for row, ratio in ratios if enough(ratio)) / timed

    timed = sum(row.calls for row, _ in ratios)
    slowest, shape = min((ratio, row.shape) for row, ratio in ratios)
    mean = math.exp(sum(row.calls * math.log(ratio) for row, ratio in ratios) / timed)
    return Sweep(
        what,
        timed,
        all_calls,
        share(lambda r: r >= 1.0),
        share(lambda r: r >= speed.SMALL_AT_LEAST),
        slowest,
        shape,
        mean,
    )


def sweep_line(found: Sweep) -> str:
    shape = "x".join(map(str, found.slowest_shape))
    return (
        f"{found.what}: of {found.timed_calls:,} calls timed ({found.timed_calls / found.all_calls:.0%} of all) "
        f"{found.not_slower:.1%} at least as fast as eager, {found.not_under:.1%} at least 0.9x; "
        f"geometric mean {found.geometric_mean:.2f}x, slowest {found.slowest:.2f}x at {shape}"
    )


def sweep(run: Run, shapes: Sequence[Calls], operation: str, layout: str, deadline: Deadline) -> None:
    run.report.heading(f"Sweep: {len(shapes)} shapes, {operation}, bf16, {layout}, forward and backward")
    calls = {Case(row.shape, operation, "bf16", layout if len(row.shape) >= 4 else "contiguous"): row for row in shapes}
    sections.make_right(run, list(calls), False, sections.half(deadline))
    ratios: dict[str, list[tuple[Calls, float]]] = {"device, cold": [], "in a loop": []}
    for case in sections.to_time(run, list(calls)):
        if deadline.passed:
            break
        arms = speed.arms_of(case, run.candidate, with_compile=False)
        works = speed.works(case, run.device, arms)["both"]
        for work in works.values():
            timing.warm_up(run.clock, work, least_ms=1.0)
        device = speed.Timed(case, "both", "device", True, timing.interleaved(run.clock, works, 7, deadline=deadline))
        _, loop = timing.in_a_loop(run.clock, works, 3, calls=10)
        for what, timed in (("device, cold", device), ("in a loop", speed.Timed(case, "both", "loop", False, loop))):
            run.report.timed(timed)
            ratios[what].append((calls[case], timed.over("eager", run.candidate).median))
    all_calls = sum(row.calls for row in shapes)
    for what, found in ratios.items():
        if not found:
            run.report.note(f"sweep, {what}: no shape was right and timed")
            continue
        total = summed_up(found, what, all_calls)
        run.report.line(sweep_line(total))
        run.target(
            f"{len(found)} of {len(shapes)} shapes",
            [
                Target(f"sweep, {what}, share of calls not slower", total.not_slower, 0.95),
                Target(f"sweep, {what}, slowest against eager", total.slowest, speed.SMALL_AT_LEAST),
            ],
        )
