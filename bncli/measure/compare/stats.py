"""Statistics of steps to target over seeds and grid points: the best point, the ratio of two arms, their intervals.

Everything is computed from log steps, since the result is a ratio: so the ratio of two arms is the inverse of the
ratio the other way round, and a unit of steps cancels out. Each limit of an interval leaves 2.5 % beyond it, or the
`tail` that it is given.

The choice of the best grid point is part of the result. All seeds serve both the choice and the estimate; the interval
repeats the choice with one seed left out at a time, and is widened by what the smallest of several means flatters.

Sources: the jackknife, Tukey 1958; limits from order statistics, Thompson 1936; squares of two distances added for the
difference of two estimates, Zou and Donner 2008 (MOVER); Holm 1979. `python -m tests.benchmarks.intervals` simulates
the coverage of all of it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import betaincinv, nctdtr, stdtr, stdtrit

from bncli.results.compare import Ratio, Steps
from bncli.results.environment import Interval

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

TAIL = 0.025
OPEN = Interval(None, None)
FOLDS = 5
FEWEST_WITH_A_MISS = 6  # runs per arm: in fewer no order statistic bounds a median at 2.5 % on both sides (2^-6)
MOST_PAIRS = 10_000


@dataclass(frozen=True)
class Sample:
    """One arm's runs: a row for each point of the grid, a column for each seed; (points, seeds) throughout.

    logs: log of the steps to target, or of the seconds or examples. For a run that missed, the log of the most that its
    budget can show, which is a lower bound. hit: whether the run reached the target. by: the logs that decide which
    point is best, where those are not `logs` themselves: seconds and examples are taken at the point with the fewest
    steps. chosen: the row of the point that was found best over more seeds than these.
    """

    logs: Floats
    hit: Bools
    by: Floats | None = None
    chosen: int | None = None

    @property
    def deciding(self) -> Floats:
        return self.logs if self.by is None else self.by

    @property
    def best(self) -> int:
        """The row with the most hits, and among those with the smallest mean, unless it was chosen before."""
        if self.chosen is not None:
            return self.chosen
        rows = self.candidates
        return int(rows[self.deciding[rows].mean(1).argmin()])

    @property
    def candidates(self) -> npt.NDArray[np.intp]:
        """The rows with the most hits."""
        hits = self.hit.sum(1)
        return np.flatnonzero(hits == hits.max())

    @property
    def complete(self) -> bool:
        """Whether every run at the best point reached the target."""
        return bool(self.hit[self.best].all())

    @property
    def half_missed(self) -> bool:
        return 2 * self.hits <= self.hit.shape[1]

    @property
    def hits(self) -> int:
        """The runs at the best point that reached the target."""
        return int(self.hit[self.best].sum()) if self.hit.shape[1] else 0


def kept_points(logs: Floats, hit: Bools) -> Bools:
    """Which points of the grid get further seeds after the tuning seeds, from (points, seeds) as in `Sample`.

    Those that a 95 % interval (Student's t, paired by seed) does not tell from the one with the smallest mean; it takes
    2 seeds or more. A miss stands at its bound. A point without a hit is kept only where no point has one, and the
    caller then chooses among them. A fixed 2 standard errors drops the best point too often after 3 seeds: with 50
    further ones the interval then missed in 9 % of simulated comparisons of equal arms, 5 % with this.
    """
    logs, seeds = np.maximum(logs, 0.0), logs.shape[1]  # a target held before training counts as a step
    excess = logs - logs[logs.mean(1).argmin()]
    error = excess.std(1, ddof=1) / math.sqrt(seeds)
    near = excess.mean(1) <= float(stdtrit(seeds - 1, 1 - TAIL)) * error + 1e-12
    return near & (hit.any(1) | ~hit.any())


def typical(sample: Sample) -> Steps:
    """The steps to target of one arm at its best point, with what bounds them.

    If every run there hit, the value is the geometric mean. Its interval is a jackknife over seeds that repeats the
    choice of the point, the upper limit raised by the optimism of that choice; one seed has none. A step of 0 (the
    target held before training) makes the mean 0, without an interval.

    If more runs hit than missed, the value is the median, a miss ranking above every hit. Its interval lies between the
    order statistics that enclose the median in 95 % of samples (binomial; from 6 runs on), the upper side open where it
    falls on a miss. Five runs have no such pair, whatever their values, so their interval is one-sided: the smallest of
    five exceeds the median in 1 of 32 samples. Fewer runs have no interval.

    If half or more missed, there is no value. The interval is the same, which is then a lower bound.
    """
    if sample.hit.shape[1] == 0:
        return Steps(None, OPEN, "bound")
    logs, hit = sample.logs[sample.best], sample.hit[sample.best]
    if sample.complete:
        if not np.isfinite(logs).all():
            return Steps(0.0, OPEN, "geometric mean")
        mean = _Mean.of(sample)
        half = _half_width(mean.left)
        return Steps(math.exp(mean.value), _exp(mean.value - half, mean.value + half + mean.optimism), "geometric mean")
    low, high = _order_statistics(logs, hit)
    interval = _exp(low, high)
    if sample.half_missed:
        return Steps(None, interval, "bound")
    return Steps(math.exp(_median(logs, hit)), interval, "median")


def ratio(reference: Sample, arm: Sample, tail: float = TAIL, bound: float = 1.0) -> Ratio:
    """The steps of `reference` over those of `arm`, each at its best point, over the same seeds. By method:

    - "means", no miss at either best point: the ratio of geometric means. Its interval is a jackknife over seeds,
      paired across the arms since they train on the same batches from the same weights, with Student's t; each arm's
      optimism widens the limit that it would make too narrow. With one point per arm this is the paired t interval of
      log steps. Where points differ in hits the choice is repeated among those with the most.
    - "medians", some misses but fewer than half in each arm: the ratio of medians, its limits from the order statistics
      of both, distances added as squares; a miss counts as its budget from below and is open from above. With fewer
      than 6 runs per arm there is no interval.
    - "bound", half or more missed in one arm: the same formula, which then has one side, and no value.
    - "hits", half or more missed in both arms: no ratio; the p-value is Fisher's exact test of their hits.
    - "none": an arm has no runs, or held the target before training.

    tail: the probability beyond each limit. bound: the ratio that the p-value is of.
    """
    if reference.hit.shape[1] == 0 or not all(np.isfinite(one.logs[one.best]).all() for one in (reference, arm)):
        return Ratio(None, OPEN, "none", None)
    if reference.complete and arm.complete:
        return _ratio_of_means(_Mean.of(reference), _Mean.of(arm), tail, bound)
    if reference.half_missed and arm.half_missed:
        from scipy.stats import fisher_exact  # which takes a while to load

        runs = reference.hit.shape[1]
        p_value = fisher_exact([[one.hits, runs - one.hits] for one in (reference, arm)]).pvalue
        return Ratio(None, OPEN, "hits", float(p_value))
    return _ratio_of_medians(reference, arm, tail)


def doubt(sample: Sample) -> float | None:
    """The share of leave-one-out samples that choose another point than the whole one; None below two seeds."""
    seeds = sample.hit.shape[1]
    if seeds < 2:
        return None
    logs, hit = sample.deciding, sample.hit
    left = (Sample(np.delete(logs, seed, 1), np.delete(hit, seed, 1)).best for seed in range(seeds))
    return sum(best != sample.best for best in left) / seeds


# --- means --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Mean:
    """The mean log steps at an arm's best point.

    left: (seeds), the same with each seed left out, the choice repeated. optimism: by how much the smallest of several
    means is expected to be too small: the mean over folds of the point that is best without the fold, less the
    smallest mean; 0 with one point.
    """

    value: float
    left: Floats
    optimism: float

    @staticmethod
    def of(sample: Sample) -> _Mean:
        rows = sample.candidates
        logs, by = sample.logs[rows], sample.deciding[rows]
        value = float(sample.logs[sample.best].mean())
        seeds = logs.shape[1]
        if seeds < 2:
            return _Mean(value, np.empty(0), 0.0)
        chosen = _without_each(by).argmin(0)
        left = _without_each(logs)[chosen, np.arange(seeds)]
        return _Mean(value, left, max(0.0, _cross_fitted(by) - float(by.mean(1).min())))


def _without_each(logs: Floats) -> Floats:
    """(points, seeds) -> the means over all seeds but one, for each of them."""
    return (logs.sum(1, keepdims=True) - logs) / (logs.shape[1] - 1)


def _standard_error(left: Floats) -> float:
    """The jackknife's standard error, from leave-one-out values (seeds)."""
    return math.sqrt((len(left) - 1) / len(left) * float(((left - left.mean()) ** 2).sum()))


def _half_width(left: Floats, tail: float = TAIL) -> float:
    """Half the width of the jackknife's interval; infinite below two seeds."""
    return float(stdtrit(len(left) - 1, 1 - tail)) * _standard_error(left) if len(left) > 1 else math.inf


def _cross_fitted(logs: Floats) -> float:
    """Mean over seeds at the point that is best without the seed's fold."""
    seeds = logs.shape[1]
    fold = np.arange(seeds) % min(FOLDS, seeds)
    parts = [logs[logs[:, fold != out].mean(1).argmin(), fold == out] for out in range(fold.max() + 1)]
    return float(np.concatenate(parts).mean())


def _ratio_of_means(reference: _Mean, arm: _Mean, tail: float, bound: float) -> Ratio:
    value = reference.value - arm.value
    left = reference.left - arm.left
    half = _half_width(left, tail)
    interval = _exp(value - arm.optimism - half, value + reference.optimism + half)
    distance = value - math.log(bound)
    optimism = arm.optimism if distance > 0 else reference.optimism
    return Ratio(math.exp(value), interval, "means", _p_value(abs(distance) - optimism, left))


def _p_value(beyond: float, left: Floats) -> float | None:
    """Two-sided p-value of a mean's being so far beyond a bound, from the values with each seed left out.

    It is under twice the tail just where the interval of that tail leaves the bound out. None below two seeds.
    """
    if len(left) < 2:
        return None
    error = _standard_error(left)
    if error == 0:
        return float(beyond <= 0)
    return float(2 * stdtr(len(left) - 1, -max(0.0, beyond) / error))


def paired(differences: Floats, tail: float = TAIL, bound: float = 0.0, within: float = 0.0) -> Paired:
    """The mean of the differences of pairs (seeds), with Student's t interval.

    within: by how much each pair may be off, in the same direction for all of them; it widens the interval.
    """
    value, seeds = float(differences.mean()), len(differences)
    left = _without_each(differences[None])[0] if seeds > 1 else np.empty(0)
    half = _half_width(left, tail) + within
    return Paired(value, value - half, value + half, _p_value(abs(value - bound) - within, left))


@dataclass(frozen=True)
class Paired:
    """A mean with its limits, infinite below two seeds, and the two-sided p-value of a bound."""

    value: float
    low: float
    high: float
    p_value: float | None


# --- medians ------------------------------------------------------------------------------------------------------


def _ratio_of_medians(reference: Sample, arm: Sample, tail: float) -> Ratio:
    sides = []
    for one in (reference, arm):
        logs, hit = one.logs[one.best], one.hit[one.best]
        sides.append((_median(logs, hit), *_order_statistics(logs, hit, tail)))
    (m1, l1, u1), (m2, l2, u2) = sides
    value = None if reference.half_missed or arm.half_missed else math.exp(m1 - m2)
    interval = OPEN
    if 2.0 ** -reference.hit.shape[1] <= tail:
        interval = _exp(m1 - m2 - math.hypot(m1 - l1, u2 - m2), m1 - m2 + math.hypot(u1 - m1, m2 - l2))
    return Ratio(value, interval, "bound" if value is None else "medians", None)


def _median(logs: Floats, hit: Bools) -> float:
    """The median of runs (seeds), a miss ranking above every hit; where half or more missed, a lower bound of it."""
    ranked = float(np.median(np.where(hit, logs, np.inf)))
    return ranked if math.isfinite(ranked) else float(np.median(logs))


def _order_statistics(logs: Floats, hit: Bools, tail: float = TAIL) -> tuple[float, float]:
    """Limits of the median of runs (seeds); -inf and inf where nothing bounds it.

    A miss counts as its budget in the lower limit and leaves the upper one open. One-sided at twice the tail where two
    sides exist for no sample.
    """
    runs = len(logs)
    counts = itertools.accumulate(math.comb(runs, k) for k in range(runs))
    at_most = [count / 2**runs for count in counts]  # binomial(runs, 1/2): k or fewer
    two_sided = sum(share <= tail for share in at_most)
    rank = two_sided or sum(share <= 2 * tail for share in at_most)  # from either end, counted from 1; 0: none
    if rank == 0:
        return -math.inf, math.inf
    low = float(np.sort(logs)[rank - 1])
    high = float(np.sort(np.where(hit, logs, np.inf))[runs - rank]) if two_sided else math.inf
    return low, high


def _exp(low: float, high: float) -> Interval:
    """The interval of a ratio from that of its log; a limit that is not finite is open."""
    return Interval(*(math.exp(side) if math.isfinite(side) and side < 700 else None for side in (low, high)))


# --- several arms, and how many seeds -----------------------------------------------------------------------------


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """P-values after Holm's step-down correction, in their order; None stays None and is not counted as a test."""
    known = sorted((p_value, k) for k, p_value in enumerate(p_values) if p_value is not None)
    steps = itertools.accumulate((min(1.0, (len(known) - rank) * p) for rank, (p, _) in enumerate(known)), max)
    corrected = {k: p_value for (_, k), p_value in zip(known, steps, strict=True)}
    return [corrected.get(k) for k in range(len(p_values))]


def log_spread(sample: Sample) -> float | None:
    """Standard deviation of log steps at the best point, about their coefficient of variation.

    None for fewer than two runs, for a step of 0, and once a run missed: the hits alone would show too small a spread.
    """
    if sample.hit.shape[1] < 2 or not sample.complete or not np.isfinite(sample.logs[sample.best]).all():
        return None
    return float(sample.logs[sample.best].std(ddof=1))


def seeds_needed(cv: float, ratio: float, power: float = 0.8) -> int:
    """Seeds per arm, at least 2, for Welch's test at 5 % to tell `ratio` from 1 with probability `power`.

    `cv` is the coefficient of variation of each arm's log-normal steps; arms that share their seeds need fewer where
    their runs are correlated. Raises ValueError for a ratio of 1, which no number of seeds tells from 1.
    """
    if ratio == 1:
        raise ValueError("no number of seeds tells a ratio of 1 from 1: give the ratio that has to be seen")
    return next(seeds for seeds in itertools.count(2) if welch_power(seeds, cv, ratio) >= power)


def welch_power(seeds: int, cv: float, ratio: float) -> float:
    """Probability that Welch's test at 5 % rejects a ratio of 1, with `seeds` runs per arm of equal spread `cv`.

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
    other_side = np.nan_to_num(nctdtr(freedom, shift, -critical))  # SciPy gives NaN for some tails below 1e-16
    return float(np.mean(1 - nctdtr(freedom, shift, critical) + other_side))


def pairs_needed(distance: float, half_width: float, pairs: int, tail: float, power: float = 0.8) -> int | None:
    """Pairs of runs with which Student's t interval leaves a bound out with probability `power`.

    If the mean is as far from the bound as was seen, `distance`, and pairs scatter as much: `half_width` is that of the
    interval of so many pairs. None for a distance of 0, without an interval, and beyond MOST_PAIRS.
    """
    if distance <= 0 or not 0 < half_width < math.inf:
        return None
    spread = half_width * math.sqrt(pairs) / float(stdtrit(pairs - 1, 1 - tail))

    def decide(seeds: int) -> bool:
        shift, freedom = distance / spread * math.sqrt(seeds), seeds - 1
        # SciPy gives NaN for a probability below 1e-16.
        return not nctdtr(freedom, shift, stdtrit(freedom, 1 - tail)) > 1 - power

    low, high = pairs, 2 * pairs  # power rises with the number of pairs
    while not decide(high):
        low, high = high, 2 * high
        if low > MOST_PAIRS:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if decide(middle) else (middle, high)
    return high
