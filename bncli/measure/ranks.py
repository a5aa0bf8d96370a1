"""The ratio of two arms when some runs missed the target: an exact permutation test of ranks, turned into an interval.

Sources: Gehan 1965 for ranks of censored times; Streitberg and Röhmel 1986 for the exact distribution of their sum.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr

from bncli.results import Interval

Integers = npt.NDArray[np.int64]

TAIL = 0.025
SEEDS_FOR_RANKS = 4  # an arm; below it no outcome of a rank test is as rare as a tail
EXACT_PAIRS = 400  # of a run from each arm; past it a normal approximation, off by 0.002 (0.01 for unlike arms)
TICKS = 2 * 10**9  # integers to a unit of log steps: equal is equal, and between two even numbers lies an odd one
BREAKS = 2000  # at most, where the rank interval may end: with more, every other, every third, ...
OPEN = Interval(None, None)


def rank_interval(
    reference: Sequence[float | None], arm: Sequence[float | None], reference_budget: int, arm_budget: int
) -> tuple[Interval, float | None]:
    """The ratios that a permutation test of Gehan's scores does not refuse, and its p-value for a ratio of 1.

    For a ratio R the arm's steps and budget are multiplied by R and both arms censored at the smaller budget, which
    makes them two samples of one distribution if R is true, whatever that distribution is: the test is exact. Its
    outcome changes only where two runs, a run and a budget or the budgets trade places, so that it is enough to try
    those R and one between each two. From 4 runs an arm; open and None below. Two arms of unlike spread are no two
    samples of one distribution at any R: simulated 95 % intervals hold the truth in 94 to 97 % at coefficients of
    variation of .18 and .29, but with 10 runs an arm and 60 % missed at .05 and .30 in 71 to 86 % only.
    """
    if min(len(reference), len(arm)) < SEEDS_FOR_RANKS:
        return OPEN, None
    times, hit = _in_ticks((*reference, *arm), len(reference), reference_budget, arm_budget)
    breaks = _breaks(times, hit, len(reference))
    between = (breaks[:-1] + breaks[1:]) // 2
    candidates = np.empty(2 * len(breaks) + 1, dtype=np.int64)
    candidates[1::2] = breaks
    candidates[::2] = np.concatenate([breaks[:1] - 2, between, breaks[-1:] + 2])
    tails = [_tails(*row) for row in _gehan(times, hit, len(reference), candidates)]
    kept = [k for k, both in enumerate(tails) if min(both) > TAIL]
    at_one = _tails(*_gehan(times, hit, len(reference), np.zeros(1, dtype=np.int64))[0])
    low = None if not kept or kept[0] == 0 else math.exp(breaks[(kept[0] - 1) // 2] / TICKS)
    high = None if not kept or kept[-1] == len(candidates) - 1 else math.exp(breaks[kept[-1] // 2] / TICKS)
    return Interval(low, high), min(1.0, 2 * min(at_one))


def _in_ticks(
    steps: Sequence[float | None], of_reference: int, reference_budget: int, arm_budget: int
) -> tuple[Integers, npt.NDArray[np.bool_]]:
    """Log times (runs + 2) in even ticks, the two budgets last, and which of them are hits; a miss has its budget."""
    budgets = [reference_budget] * of_reference + [arm_budget] * (len(steps) - of_reference)
    times = [budget if step is None else step for step, budget in zip(steps, budgets, strict=True)]
    logs = np.log(np.array([*times, reference_budget, arm_budget], dtype=np.float64))
    return 2 * np.rint(logs * (TICKS / 2)).astype(np.int64), np.array(
        [step is not None for step in steps] + [False] * 2
    )


def _breaks(times: Integers, hit: npt.NDArray[np.bool_], of_reference: int) -> Integers:
    """Log ratios (ticks, ascending) at which the order of the runs changes."""
    reference = np.append(times[:of_reference][hit[:of_reference]], times[-2])
    arm = np.append(times[of_reference:][hit[of_reference:]], times[-1])
    breaks = np.unique(reference[:, None] - arm)
    return breaks[:: 1 + len(breaks) // BREAKS]


def _gehan(
    times: Integers, hit: npt.NDArray[np.bool_], of_reference: int, log_ratios: Integers
) -> list[tuple[tuple[int, ...], int, int]]:
    """For each log ratio (ticks): the pooled runs' scores (ascending), the arm's runs, and the sum of their scores.

    A score is the number of runs that are certainly shorter, less those certainly longer, plus runs - 1: twice the
    rank from 0, ties sharing their mean. Runs past the common budget are all tied, above every other.
    """
    runs = len(times) - 2
    is_arm = np.arange(runs + 2) >= of_reference
    is_arm[-2] = False
    shifted = times + np.where(is_arm, log_ratios[:, None], 0)
    budget = shifted[:, -2:].min(axis=1, keepdims=True)
    keys = np.where(hit & (shifted <= budget), shifted, budget + 1)[:, :runs]
    order = np.argsort(keys, axis=1, kind="stable")
    ordered = np.take_along_axis(keys, order, axis=1)
    place = np.arange(runs)
    rises = ordered[:, 1:] > ordered[:, :-1]
    edge = np.ones((len(log_ratios), 1), dtype=bool)
    first = np.maximum.accumulate(np.where(np.hstack([edge, rises]), place, 0), axis=1)
    last = np.minimum.accumulate(np.where(np.hstack([rises, edge]), place, runs)[:, ::-1], axis=1)[:, ::-1]
    sums = ((first + last) * is_arm[order]).sum(axis=1)
    return [
        (tuple(row), runs - of_reference, int(total)) for row, total in zip((first + last).tolist(), sums, strict=True)
    ]


def _tails(scores: tuple[int, ...], chosen: int, total: int) -> tuple[float, float]:
    """P(sum <= total) and P(sum >= total) for the sum of `chosen` of the scores drawn without replacement."""
    others = len(scores) - chosen
    if others < chosen:  # the smaller arm is counted faster, and its sum gives the other's
        below, above = _tails(scores, others, sum(scores) - total)
        return above, below
    if chosen * others > EXACT_PAIRS:
        deviation = math.sqrt(float(np.var(scores, ddof=1)) * chosen * others / len(scores)) or 1.0
        above_mean = total - chosen * sum(scores) / len(scores)
        return float(ndtr((1 + above_mean) / deviation)), float(ndtr((1 - above_mean) / deviation))
    at_most, at_least = _sums_of_scores(scores, chosen)
    return float(at_most[total]), float(at_least[total])


@functools.lru_cache(maxsize=256)
def _sums_of_scores(scores: tuple[int, ...], chosen: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """P(sum <= s) and P(sum >= s) for s = 0, 1, ...: all subsets, counted by adding one score at a time."""
    subsets = np.zeros((chosen + 1, sum(scores[-chosen:]) + 1))  # by size and sum
    subsets[0, 0] = 1
    for score in scores:
        subsets[1:, score:] += subsets[:-1, : subsets.shape[1] - score]
    share = subsets[chosen] / subsets[chosen].sum()
    return np.cumsum(share), np.cumsum(share[::-1])[::-1]
