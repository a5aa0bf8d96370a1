"""How many times faster, from samples paired by round, and how sure that is. No torch.

Sample k of two kernels was taken in round k, side by side, so what slows a round down cancels in its ratio. The
interval is that of the median between two order statistics, whose coverage is binomial whatever the distribution
(Thompson 1936; David & Nagaraja, Order Statistics, section 7.1); it supposes that the rounds are independent.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence

from bncli.results.environment import Interval
from bncli.results.profile import Speedup

TAIL = 0.025  # of each side of a 95 % interval
FEWEST_ROUNDS = 6  # with an interval: five samples all lie above their median once in 32 times, more often than TAIL


def faster(reference_ms: Sequence[float], ms: Sequence[float]) -> Speedup:
    """Median of the rounds' ratios reference / own, above 1 is faster, with its 95 % interval.

    Times of the same rounds in ms, as many of one as of the other. An even number of rounds has the geometric mean of
    its middle two, so that swapping the two sides gives the reciprocal. Under FEWEST_ROUNDS rounds both sides of the
    interval are open. Raises ValueError for no rounds, or for numbers of rounds that differ.
    """
    return of_ratios([base / own for base, own in zip(reference_ms, ms, strict=True)])


def faster_over(pairs: Iterable[tuple[Sequence[float], Sequence[float]]]) -> Speedup:
    """The same of the geometric mean over several cases, each (reference's times, own times) in ms.

    Round k's ratio is the geometric mean of the cases' ratios k, over as many rounds as every case has. Raises
    ValueError for no cases, or for one without rounds.
    """
    ratios = [[base / own for base, own in zip(reference, own_ms, strict=True)] for reference, own_ms in pairs]
    if not ratios:
        raise ValueError("a mean over cases needs at least one")
    return of_ratios([geometric_mean(one_round) for one_round in zip(*ratios, strict=False)])


def of_ratios(ratios: Sequence[float]) -> Speedup:
    """The median of one or more ratios above 0, and its 95 % interval."""
    if not ratios:
        raise ValueError("a ratio needs at least one round")
    ordered = sorted(ratios)
    middle = ordered[(len(ordered) - 1) // 2 : len(ordered) // 2 + 1]
    rank = interval_rank(len(ordered))
    interval = Interval(None, None) if rank == 0 else Interval(ordered[rank - 1], ordered[-rank])
    return Speedup(middle[0] if len(middle) == 1 else geometric_mean(middle), interval)


@functools.lru_cache(maxsize=1024)
def interval_rank(count: int) -> int:
    """Which of `count` ordered samples, from either end and counted from 1, bounds the median; 0 where none does.

    The largest r for which fewer than r of the samples lie below the median with a probability of at most TAIL.
    """
    rank, ways = 0, 0
    while True:
        ways += math.comb(count, rank)
        if ways / 2**count > TAIL:
            return rank
        rank += 1


def geometric_mean(values: Sequence[float]) -> float:
    """Of one or more values above 0."""
    return math.exp(math.fsum(map(math.log, values)) / len(values))
