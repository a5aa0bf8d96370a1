"""Steps to target: where a run's held-out metric crosses its target, as a batch function and as it goes along.

A first hit read off the raw curve is late by up to one evaluation interval, and early the finer and the noisier the
evaluations are. The crossing of the centred median of three evaluations, interpolated between them, is neither: of a
true 14x between two arms that share one interval it keeps the most.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from bncli.results import Evaluation, Target


def crossing(evaluations: Sequence[Evaluation], target: Target) -> tuple[float | None, int | None]:
    """Steps to target and raw first hit, both in optimizer steps, each None where the curve does not get there.

    With v_k the metric at step s_k, m_0 = v_0 and m_k = median(v_{k-1}, v_k, v_{k+1}), steps to target is where the
    line from (s_{k-1}, m_{k-1}) to (s_k, m_k) meets the target, k being the first with m_k at or past it; s_0 if k is
    0. The last evaluation has no right neighbour and is no centre, so a run goes on for one evaluation past its hit.
    The first hit is the first s_k whose v_k is at or past the target. NaN ranks as the worst value.
    """
    steps = [evaluation.step for evaluation in evaluations]
    values = [_value(evaluation, target) for evaluation in evaluations]
    medians = values[:1] + [_median_of_three(values[k - 1 : k + 2]) for k in range(1, len(values) - 1)]
    first_hit = next((step for step, value in zip(steps, values, strict=True) if target.reached_by(value)), None)
    for k, median in enumerate(medians):
        if target.reached_by(median):
            before = max(k - 1, 0)
            return _interpolated((steps[before], medians[before]), (steps[k], median), target), first_hit
    return None, first_hit


class StepsToTarget:
    """`crossing`, one evaluation at a time and in constant time and memory: tells a training loop when to stop."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.steps: float | None = None  # to target, as `crossing` defines it
        self.first_hit: int | None = None
        self._values: list[tuple[int, float]] = []  # the last two evaluations, (step, metric)
        self._median: tuple[int, float] | None = None  # the last centre, (step, median)

    def add(self, evaluation: Evaluation) -> bool:
        """Take the next evaluation in order of steps; True once the crossing is confirmed, and from then on."""
        latest = (evaluation.step, _value(evaluation, self.target))
        if self.first_hit is None and self.target.reached_by(latest[1]):
            self.first_hit = evaluation.step
        if self.steps is None:
            if self._median is None:
                self._move_to(latest)
            elif len(self._values) == 2:
                centre = self._values[1][0]
                self._move_to((centre, _median_of_three([value for _, value in (*self._values, latest)])))
        self._values = [*self._values[-1:], latest]
        return self.steps is not None

    def _move_to(self, centre: tuple[int, float]) -> None:
        if self.target.reached_by(centre[1]):
            self.steps = _interpolated(self._median or centre, centre, self.target)
        self._median = centre


def _value(evaluation: Evaluation, target: Target) -> float:
    value = evaluation.value(target.metric)
    if math.isnan(value):
        return -math.inf if target.metric == "accuracy" else math.inf
    return value


def _median_of_three(values: Sequence[float]) -> float:
    return sorted(values)[1]


def _interpolated(before: tuple[int, float], after: tuple[int, float], target: Target) -> float:
    """The step at which the line through two (step, metric) points meets the target; `after` is at or past it."""
    (start, low), (end, high) = before, after
    rise = high - low
    if rise == 0 or not math.isfinite(rise):  # the same point twice, or a line from an infinite loss
        return float(end)
    return start + (end - start) * (target.value - low) / rise
