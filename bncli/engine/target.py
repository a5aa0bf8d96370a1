"""Steps to target: how many steps a run spends below its target, counted as its evaluations come in.

The first evaluation at or past the target, and every crossing of a smoothed curve, depend on how often one evaluates:
more evaluations give a noisy curve more chances to cross early. The number of steps below the target is a sum over all
intervals between evaluations, so its expectation hardly depends on how many they are (`tests/benchmarks/crossings.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from bncli.recipe.sections import LogSpaced
from bncli.results.train import AHEAD, Evaluation, Target


class StepsToTarget:
    """The steps to one target of one run.

    They are the optimizer steps that the run spends below its target, the metric on a straight line between
    evaluations, counted until the run is 1 + AHEAD times as long: a run has to go on for 30 % of its steps to target,
    and a budget of B steps shows those up to B / 1.3. NaN ranks as the worst value.

    steps: None until they are settled. below: the steps below the target so far. first_hit: the first evaluation at or
    past the target, as it is.
    """

    def __init__(self, target: Target) -> None:
        self.target = target
        self.steps: float | None = None
        self.first_hit: int | None = None
        self.below = 0.0
        self._last: tuple[int, float] | None = None  # step, and how far the metric was from the target

    def add(self, evaluation: Evaluation) -> bool:
        """Take the next evaluation in order of steps; True once the steps are settled, and from then on."""
        gap = _gap(evaluation, self.target)
        if gap <= 0 and self.first_hit is None:
            self.first_hit = evaluation.step
        if self.steps is None:
            if self._last is not None:
                self.below += (evaluation.step - self._last[0]) * _share_below(self._last[1], gap)
            reached = gap <= 0 if self._last is None else evaluation.step >= (1 + AHEAD) * self.below
            self.steps = self.below if reached else None
        self._last = (evaluation.step, gap)
        return self.steps is not None


def _gap(evaluation: Evaluation, target: Target) -> float:
    """How far the metric is from the target; 0 or less where it is reached."""
    value = evaluation.value(target.metric)
    if math.isnan(value):
        return math.inf
    return target.value - value if target.metric == "accuracy" else value - target.value


def _share_below(before: float, after: float) -> float:
    """The share of the straight line between two gaps that lies above 0, which is below the target."""
    low, high = min(before, after), max(before, after)
    if low > 0 or high == math.inf:  # no line leads to an infinite loss: all of the interval counts
        return 1.0
    return 0.0 if high <= 0 else high / (high - low)


def evaluation_steps(every: int | LogSpaced, budget: int) -> Iterator[int]:
    """The optimizer steps after which a run is evaluated, ascending, from above 0 to the budget, always the last.

    A number is the interval between them. LogSpaced: the whole steps nearest to 2 ** (k / points_per_doubling).
    """
    if isinstance(every, int):
        yield from range(every, budget, every)
    else:
        last = 0
        for k in range(math.ceil(every.points_per_doubling * math.log2(budget)) + 1):
            step = round(2 ** (k / every.points_per_doubling))
            if last < step < budget:
                yield step
                last = step
    yield budget
