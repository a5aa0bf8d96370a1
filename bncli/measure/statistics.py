"""Steps to target over seeds: means, ratios of two arms, and how far either can be trusted when runs miss the target.

A run's steps are None where it missed: censored at its budget. Means, medians and spreads are those of log steps, since
what is asked is a ratio: so `ratio(a, b)` is 1 / `ratio(b, a)`, and a unit of steps cancels out. Every two-sided 95 %
interval here leaves 2.5 % to each tail, also where one side stays open: to spend the whole 5 % on the other side after
having seen which one is open would let up to 7.5 % of the intervals miss.

Sources: Welch 1947 for two spreads; Holm 1979; `ranks` for what is censored.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
from scipy.special import betaincinv, nctdtr, stdtr, stdtrit

from bncli.measure.ranks import OPEN, TAIL, rank_interval
from bncli.results import Interval, Ratio, Steps


def geometric_mean_steps(steps: Sequence[float | None], budget: int) -> Steps:
    """The typical steps to target of one arm's runs, each in optimizer steps or None for a miss of `budget` steps.

    No miss: the geometric mean with Student's t interval on log steps (open for one run). More hits than misses: the
    median, a miss ranking above every hit, between the order statistics that enclose it in 95 % of samples (binomial;
    from 6 runs on), the upper side open where it falls on a miss. Five runs have no such pair, whatever their values,
    so their interval is one-sided: the smallest of five exceeds the median in 1 of 32 samples. Fewer have none.
    Half or more missed: no value; the same interval, which is a lower bound, and is `budget` where its order statistic
    is itself a miss. A step of 0 (the target held before training) makes the geometric mean 0, without an interval.
    """
    hits = sorted(step for step in steps if step is not None)
    if steps and len(hits) == len(steps):
        return Steps(_geometric_mean(hits), _t_interval(hits), "geometric mean")
    interval = _order_statistic_interval(hits, len(steps), budget)
    if _half_missed(steps):
        return Steps(None, interval, "bound")
    return Steps(_median(steps), interval, "median")


def ratio(
    reference: Sequence[float | None], arm: Sequence[float | None], reference_budget: int, arm_budget: int
) -> Ratio:
    """How many times fewer steps `arm` takes than `reference`: runs' steps, None for a miss, and budgets in steps.

    No miss: the ratio of geometric means, Welch's t interval and p-value on log steps (from 2 runs an arm). More hits
    than misses in both arms: the ratio of medians, method "rank", with the interval of `rank_interval`. Half or more
    missed in one arm: no value, method "bound", the same interval, which then has one side at most as a rule. In both
    arms, or an arm without runs, or a hit at step 0: method "none".

    The intervals hold the truth in 95 % of all samples. Where misses are likely, the few samples without one are the
    lucky ones: with 4 runs that miss 2 times in 5, those with no miss (1 in 8) hold it in 87 %.
    """
    hits = [step for step in (*reference, *arm) if step is not None]
    half_missed = [_half_missed(reference), _half_missed(arm)]
    if not (reference and arm) or all(half_missed) or min(hits) <= 0:
        return Ratio(None, OPEN, "none", None)
    if len(hits) == len(reference) + len(arm):
        return _welch([math.log(step) for step in hits], len(reference))
    interval, p_value = rank_interval(reference, arm, reference_budget, arm_budget)
    if any(half_missed):
        return Ratio(None, interval, "bound", p_value)
    return Ratio(_median(reference) / _median(arm), interval, "rank", p_value)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """P-values after Holm's step-down correction, in their order; None stays None and is not counted as a test."""
    known = sorted((p_value, k) for k, p_value in enumerate(p_values) if p_value is not None)
    corrected: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p_value, k) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * p_value))
        corrected[k] = largest
    return corrected


def log_spread(steps: Sequence[float | None]) -> float | None:
    """Standard deviation of log steps, about their coefficient of variation.

    None for fewer than two runs, for a step of 0, and once a run missed: the hits alone would look too much alike.
    """
    logs = [math.log(step) for step in steps if step is not None and step > 0]
    if len(logs) < max(2, len(steps)):
        return None
    return math.sqrt(_mean_and_variance(logs)[1])


def seeds_needed(cv: float, ratio: float, power: float = 0.8) -> int:
    """Seeds an arm, at least 2, for Welch's test at 5 % to tell `ratio` from 1 with probability `power`.

    `cv` is the coefficient of variation of each arm's log-normal steps. Raises ValueError for a ratio of 1, which no
    number of seeds tells from 1.
    """
    if ratio == 1:
        raise ValueError("no number of seeds tells a ratio of 1 from 1: give the ratio that has to be seen")
    enough = 2
    while welch_power(enough, cv, ratio) < power:
        enough *= 2
    too_few = max(1, enough // 2)
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        too_few, enough = (too_few, middle) if welch_power(middle, cv, ratio) >= power else (middle, enough)
    return enough


def welch_power(seeds: int, cv: float, ratio: float) -> float:
    """Probability that Welch's test at 5 % refuses a ratio of 1, with `seeds` runs an arm of equal spread `cv`.

    Its t is a noncentral Student t with 2 (seeds - 1) degrees of freedom, independent of the share u of one arm in the
    sum of the two sample variances; u is a Beta variable and sets the degrees of freedom of the critical value. The
    mean over u is taken at 200 equally likely values.
    """
    sigma = math.sqrt(math.log1p(cv**2))
    if sigma == 0:
        return 1.0
    share = betaincinv((seeds - 1) / 2, (seeds - 1) / 2, (np.arange(200) + 0.5) / 200)
    critical = stdtrit((seeds - 1) / (share**2 + (1 - share) ** 2), 1 - TAIL)
    shift = abs(math.log(ratio)) / (sigma * math.sqrt(2 / seeds))
    freedom = 2 * (seeds - 1)
    return float(np.mean(1 - nctdtr(freedom, shift, critical) + nctdtr(freedom, shift, -critical)))


def _half_missed(steps: Sequence[float | None]) -> bool:
    return 2 * sum(step is not None for step in steps) <= len(steps)


def _geometric_mean(hits: Sequence[float]) -> float:
    return 0.0 if min(hits) <= 0 else math.exp(math.fsum(map(math.log, hits)) / len(hits))


def _median(steps: Sequence[float | None]) -> float:
    """Of log steps, with the misses above every hit; more than half of the runs hit."""
    hits = sorted(step for step in steps if step is not None)
    return _geometric_mean(hits[(len(steps) - 1) // 2 : len(steps) // 2 + 1])


def _mean_and_variance(values: Sequence[float]) -> tuple[float, float]:
    mean = math.fsum(values) / len(values)
    return mean, math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)


def _t_interval(hits: Sequence[float]) -> Interval:
    if len(hits) < 2 or min(hits) <= 0:
        return OPEN
    mean, variance = _mean_and_variance([math.log(step) for step in hits])
    half = stdtrit(len(hits) - 1, 1 - TAIL) * math.sqrt(variance / len(hits))
    return Interval(math.exp(mean - half), math.exp(mean + half))


def _order_statistic_interval(hits: Sequence[float], runs: int, budget: int) -> Interval:
    """Of the median of `runs` runs with these sorted hits. One-sided at 5 % where two sides exist for no sample."""
    counts = itertools.accumulate(math.comb(runs, k) for k in range(runs))
    at_most = [count / 2**runs for count in counts]  # binomial(runs, 1/2): k or fewer
    two_sided = sum(share <= TAIL for share in at_most)
    rank = two_sided or sum(share <= 2 * TAIL for share in at_most)  # from either end, counted from 1; 0: none
    if rank == 0:
        return OPEN
    low = hits[rank - 1] if rank <= len(hits) else float(budget)
    return Interval(low, hits[runs - rank] if two_sided and runs - rank < len(hits) else None)


def _welch(logs: Sequence[float], of_reference: int) -> Ratio:
    reference, arm = logs[:of_reference], logs[of_reference:]
    difference = math.fsum(reference) / len(reference) - math.fsum(arm) / len(arm)
    if min(len(reference), len(arm)) < 2:
        return Ratio(math.exp(difference), OPEN, "welch", None)
    one, other = (_mean_and_variance(side)[1] / len(side) for side in (reference, arm))
    error = math.sqrt(one + other)
    if error == 0:
        value = math.exp(difference)
        return Ratio(value, Interval(value, value), "welch", float(difference == 0))
    share = one / (one + other)
    freedom = 1 / (share**2 / (len(reference) - 1) + (1 - share) ** 2 / (len(arm) - 1))
    half = stdtrit(freedom, 1 - TAIL) * error
    interval = Interval(math.exp(difference - half), math.exp(difference + half))
    return Ratio(math.exp(difference), interval, "welch", float(2 * stdtr(freedom, -abs(difference) / error)))
