"""Steps to target: the number of steps that a run spends below its target, updated at each evaluation.

The first evaluation at or past the target, and every crossing of a smoothed curve, depend on the evaluation interval:
more evaluations give a noisy curve more chances to cross early. The number of steps below the target is a sum over all
intervals between evaluations, so its expectation hardly depends on their number (`tests/benchmarks/crossings.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from bncli.recipe.sections import LogSpaced
from bncli.results.train import AHEAD, Evaluation, Target


class StepsToTarget:
    """The steps to one target of one run.

    They are the optimizer steps that the run spends below its target, with linear interpolation of the metric between
    evaluations. They are final once the run is 1 + AHEAD times as long: a run has to continue for 30 % of its steps to
    target, and a budget of B steps can show at most B / 1.3. NaN ranks as the worst value.

    steps: None until they are final. below: the steps below the target so far. first_hit: the step of the first
    evaluation at or past the target.
    """

    def __init__(self, target: Target) -> None:
        self.target = target
        self.steps: float | None = None
        self.first_hit: int | None = None
        self.below = 0.0
        self._last: tuple[int, float] | None = None  # step and gap

    def add(self, evaluation: Evaluation) -> bool:
        """Add the next evaluation, in order of steps. Returns whether the steps are final."""
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
    """The distance of the metric to the target; 0 or less if it is reached."""
    value = evaluation.value(target.metric)
    if math.isnan(value):
        return math.inf
    return target.value - value if target.metric == "accuracy" else value - target.value


def _share_below(before: float, after: float) -> float:
    """The fraction of an interval below the target (gap above 0), by linear interpolation of the gap."""
    low, high = min(before, after), max(before, after)
    if low > 0 or high == math.inf:  # an infinite loss cannot be interpolated: the whole interval counts
        return 1.0
    return 0.0 if high <= 0 else high / (high - low)


def evaluation_steps(every: int | LogSpaced, budget: int) -> Iterator[int]:
    """The optimizer steps after which a run is evaluated, ascending, from above 0 to the budget, always the last.

    An int is the interval between them. LogSpaced: the integers nearest to 2 ** (k / points_per_doubling).
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
