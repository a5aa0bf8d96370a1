"""Speedup from samples paired by round, with its 95 % interval. No torch.

Sample k of two kernels was taken in the same round k, so a slowdown of the whole round cancels in its ratio. The
interval is that of the median between two order statistics, whose coverage is binomial whatever the distribution
(Thompson 1936; David & Nagaraja, Order Statistics, section 7.1); it assumes independent rounds.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import accumulate
from statistics import geometric_mean, median

from bncli.results.environment import Interval
from bncli.results.profile import Speedup

TAIL = 0.025  # probability in each tail of a 95 % interval


def faster(reference_ms: Sequence[float], ms: Sequence[float]) -> Speedup:
    """Median of the rounds' ratios reference / other, above 1 is faster, with its 95 % interval.

    Both hold the times of the same rounds in ms. An even number of rounds has the geometric mean of its middle two, so
    that swapping the two sides gives the reciprocal. Under FEWEST_ROUNDS rounds both sides of the interval are open.
    Raises ValueError for no rounds, or for numbers of rounds that differ.
    """
    found = of_ratios([reference / other for reference, other in zip(reference_ms, ms, strict=True)])
    return replace(found, of_medians=median(reference_ms) / median(ms))


def faster_over(pairs: Iterable[tuple[Sequence[float], Sequence[float]]]) -> Speedup:
    """The speedup over several cases, each (reference's times, the other's) in ms.

    Round k's ratio is the geometric mean of the cases' ratios k, over as many rounds as every case has. Raises
    ValueError for no cases, or for one without rounds.
    """
    ratios = [[reference / other for reference, other in zip(*pair, strict=True)] for pair in pairs]
    return of_ratios([geometric_mean(each_round) for each_round in zip(*ratios, strict=False)])


def of_ratios(ratios: Sequence[float]) -> Speedup:
    """The median of one or more ratios above 0, and its 95 % interval."""
    if not ratios:
        raise ValueError("a speedup needs at least one case and one round")
    ordered, rank = sorted(ratios), interval_rank(len(ratios))
    middle = ordered[(len(ordered) - 1) // 2 : len(ordered) // 2 + 1]
    interval = Interval(ordered[rank - 1], ordered[-rank]) if rank else Interval(None, None)
    return Speedup(middle[0] if len(middle) == 1 else geometric_mean(middle), interval)


@functools.lru_cache(maxsize=1024)
def interval_rank(count: int) -> int:
    """Which of `count` ordered samples, from either end and counted from 1, bounds the median; 0 where none does.

    The largest r for which fewer than r of the samples lie below the median with a probability of at most TAIL.
    """
    below = accumulate(math.comb(count, k) for k in range(count))
    return sum(ways / 2**count <= TAIL for ways in below)
