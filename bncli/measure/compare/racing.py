"""Racing of an arm's tuning runs: which points of the grid can no longer be kept, whatever their open runs come to.

The rule that decides which points are kept is `stats.kept_points`. The log steps of a run that has ended are known;
those of an open run lie between its steps below the target so far and the most that the budget can show. A point is out
if the rule drops it for all values in these bounds, so a comparison that gives such points up has the same best points,
ratios and intervals as one that trains everything.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
from scipy.special import stdtrit

from bncli.engine.target import StepsToTarget
from bncli.measure.compare.stats import TAIL, Floats
from bncli.results.compare import ComparisonPlan, RunRecord

MARGIN = 1e-9  # of log steps: for rounding
MOST_VALUES = 1 << 16  # of the corners of two points' bounds; with more open runs the points count as not told apart

Runs = Sequence[Sequence[RunRecord | float]]  # (points, seeds)


def points_out(plan: ComparisonPlan, runs: Runs) -> list[bool]:
    """Whether each point of the grid is out.

    runs: for each point and seed the record, or the steps below the target so far where there is none (0: not begun).
    No point is out before a run has hit, nor where a run failed, was interrupted or held the target before training.
    """
    none = [False] * len(runs)
    if plan.full_grid or len(runs) < 2 or len(runs[0]) < 2:
        return none
    if any(isinstance(run, RunRecord) and _is_unusual(plan, run) for row in runs for run in row):
        return none
    bounds = np.array([[_bounds(plan, run) for run in row] for row in runs])  # (points, seeds, low and high)
    low, high = np.log(np.maximum(1.0, np.minimum(bounds, plan.most_steps))).transpose(2, 0, 1)
    hit, can_hit = bounds[..., 1] < math.inf, bounds[..., 0] <= plan.most_steps * (1 + MARGIN)
    if not hit.any():
        return none
    may_be_best = set(np.flatnonzero(low.mean(1) <= high.mean(1).min() + MARGIN))
    return [
        not can_hit[row].any()
        or (
            row not in may_be_best
            and all(_told_apart(low[row] - high[best], high[row] - low[best]) for best in may_be_best)
        )
        for row in range(len(runs))
    ]


def _is_unusual(plan: ComparisonPlan, run: RunRecord) -> bool:
    return run.result is None or run.result.status == "interrupted" or run.result.steps_to(plan.target) == 0


def _bounds(plan: ComparisonPlan, run: RunRecord | float) -> tuple[float, float]:
    """The steps to target that a run takes at least and at most; infinite for a miss."""
    if isinstance(run, float):
        return run, math.inf
    assert run.result is not None
    if (steps := run.result.steps_to(plan.target)) is not None:
        return steps, steps
    if not run.given_up:
        return math.inf, math.inf
    count = StepsToTarget(plan.target)
    for evaluation in run.result.evaluations:
        count.add(evaluation)
    return count.below, math.inf


def _told_apart(low: Floats, high: Floats) -> bool:
    """Whether a point is worse than another by more than chance, for all differences of log steps (seeds) in a box.

    The mean less a multiple of the standard error is a concave function of them, so it is smallest at a corner.
    """
    seeds, open_seeds = len(low), np.flatnonzero(low < high)
    if low.mean() <= MARGIN or seeds << len(open_seeds) > MOST_VALUES:
        return False
    corners = np.tile(low, (1 << len(open_seeds), 1))
    corners[:, open_seeds] = list(itertools.product(*zip(low[open_seeds], high[open_seeds], strict=True)))
    error = corners.std(1, ddof=1) / math.sqrt(seeds)
    return bool((corners.mean(1) - float(stdtrit(seeds - 1, 1 - TAIL)) * error > MARGIN).all())
