"""Speedups and their intervals: exact where it is arithmetic, simulated where it is a promise."""

from __future__ import annotations

import math
import random
import statistics

import pytest

from bncli.measure.timing.speedup import faster, faster_over, interval_rank, of_ratios
from bncli.results.environment import FEWEST_ROUNDS, Interval
from bncli.results.profile import Speedup


def test_it_is_the_median_of_ratios_and_not_the_ratio_of_medians() -> None:
    found = faster([2.0, 30.0, 8.0], [1.0, 10.0, 2.0])
    assert found == Speedup(3.0, Interval(None, None), of_medians=4.0)


@pytest.mark.parametrize(
    ("value", "low", "high", "of_medians", "contradicted"),
    [
        (0.895, 0.85, 0.95, 1.386, True),  # a kernel that is slower by its rounds and faster by its medians
        (0.895, 0.5, 1.5, 1.386, True),
        (2.0, 1.9, 2.1, 2.5, True),
        (2.0, 1.5, 2.6, 2.5, False),
        (2.0, 1.99, 2.01, 2.05, False),  # within the spread of times
        (0.99, 0.98, 1.0, 1.01, False),
        (1.3, None, None, 0.8, True),
        (1.3, None, None, 2.8, False),
        (1.3, 1.2, 1.4, None, False),  # read from an earlier file
    ],
)
def test_medians_contradict_a_ratio_from_outside_its_interval_or_across_1(
    value: float, low: float | None, high: float | None, of_medians: float | None, contradicted: bool
) -> None:
    assert Speedup(value, Interval(low, high), of_medians).contradicted == contradicted


def test_a_round_that_is_slow_for_both_changes_nothing() -> None:
    quiet = faster([2.0] * 9, [1.0] * 9)
    assert faster([2.0, 2.0, 200.0, *[2.0] * 6], [1.0, 1.0, 100.0, *[1.0] * 6]) == quiet


def test_the_interval_lies_between_order_statistics() -> None:
    ratios = [float(k) for k in range(1, 16)]
    random.Random(3).shuffle(ratios)
    assert of_ratios(ratios) == Speedup(8.0, Interval(4.0, 12.0))  # 15 samples: the 4th from either end (1.8 % a side)
    assert of_ratios(sorted(ratios)[:6]).interval == Interval(1.0, 6.0)


@pytest.mark.parametrize("count", [*range(1, 60), 200, 1001])
def test_the_rank_is_the_last_whose_tail_holds_at_most_a_fortieth(count: int) -> None:
    def tail(rank: int) -> float:
        """P(fewer than `rank` of the samples lie below the median)."""
        return sum(math.comb(count, k) for k in range(rank)) / 2**count

    rank = interval_rank(count)
    assert tail(rank) <= 0.025 < tail(rank + 1)
    assert (rank == 0) == (count < FEWEST_ROUNDS)


def test_too_few_rounds_leave_both_sides_open() -> None:
    assert faster([2.0] * 5, [1.0] * 5) == Speedup(2.0, Interval(None, None), 2.0)
    assert faster([2.0] * 6, [1.0] * 6) == Speedup(2.0, Interval(2.0, 2.0), 2.0)


def test_swapping_the_sides_gives_the_reciprocal() -> None:
    source = random.Random(0)
    for rounds in (1, 2, 7, 10):
        one, other = ([source.uniform(0.5, 2.0) for _ in range(rounds)] for _ in range(2))
        there, back = faster(one, other), faster(other, one)
        assert there.value == pytest.approx(1 / back.value)
        if rounds >= FEWEST_ROUNDS:
            assert there.interval.low == pytest.approx(1 / (back.interval.high or 0))


def test_the_interval_holds_the_true_ratio_of_skewed_samples() -> None:
    """Log-normal rounds with rare outliers; a coverage of 0.95 within three deviations of 4,000 trials."""
    source = random.Random(20)
    for rounds in (6, 9, 20):
        inside, trials = 0, 4000
        for _ in range(trials):
            noise = [math.exp(abs(source.gauss(0, 0.3)) + source.gauss(0, 0.1)) for _ in range(rounds)]
            reference = [2.5 * math.exp(source.gauss(0, 0.05)) * slow for slow in noise]
            own = [slow * (20.0 if source.random() < 0.02 else 1.0) for slow in noise]
            interval = faster(reference, own).interval
            assert interval.low is not None
            assert interval.high is not None
            inside += interval.low <= TRUE_MEDIAN <= interval.high
        assert inside / trials >= 0.95 - 3 * math.sqrt(0.05 * 0.95 / trials)


def _true_median() -> float:
    """Of 2.5 exp(0.05 z), a fiftieth of them divided by 20, so that 0.48 of the other 0.98 lie below it."""
    return 2.5 * math.exp(0.05 * statistics.NormalDist().inv_cdf(0.48 / 0.98))


TRUE_MEDIAN = _true_median()


def test_a_mean_over_cases_is_geometric_and_made_round_by_round() -> None:
    one = ([2.0, 4.0, 8.0] * 3, [1.0] * 9)
    other = ([8.0, 4.0, 2.0] * 3, [1.0] * 9)
    found = faster_over([one, other])  # each round: sqrt(2 8) = sqrt(4 4) = 4
    assert found.value == pytest.approx(4.0)
    assert found.interval.low == pytest.approx(4.0)
    assert found.interval.high == pytest.approx(4.0)


def test_a_mean_has_as_many_rounds_as_every_case_has() -> None:
    long, short = ([2.0] * 40, [1.0] * 40), ([8.0] * 5, [1.0] * 5)
    assert faster_over([long, short]).interval == Interval(None, None)
    assert faster_over([long, short]).value == pytest.approx(4.0)
    assert faster_over([long, long]).interval.low == pytest.approx(2.0)


def test_no_rounds_and_rounds_without_a_partner_are_refused() -> None:
    for refused in (lambda: faster([], []), lambda: faster_over([]), lambda: faster_over([([], [])])):
        with pytest.raises(ValueError, match="at least one"):
            refused()
    with pytest.raises(ValueError, match="shorter"):
        faster([1.0, 2.0], [1.0])
