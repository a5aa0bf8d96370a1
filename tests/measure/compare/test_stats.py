"""Means, ratios, the choice of a point and their intervals: by hand, against tables, by properties, by simulation."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.special import stdtrit

from bncli.measure.compare.stats import (
    Sample,
    doubt,
    holm,
    kept_points,
    log_spread,
    paired,
    pairs_needed,
    ratio,
    seeds_needed,
    typical,
    welch_power,
)
from bncli.results.compare import Ratio, Steps
from bncli.results.environment import Interval
from tests.benchmarks.intervals import FIELDS, FLAT, Cell, Choice, Grid, wrong_claims

Runs = Sequence[float | None]
OPEN = Interval(None, None)


def runs(*points: Runs, most: float = 1000) -> Sample:
    """A row a point: its steps by seed, None for a miss of `most` steps."""
    steps = np.array([[most if step is None else step for step in point] for point in points], dtype=float)
    with np.errstate(divide="ignore"):
        return Sample(np.log(steps), np.array([[step is not None for step in point] for point in points]))


def exp(*logs: float) -> list[float]:
    return [math.exp(log) for log in logs]


def near(value: float, abs: float | None = None) -> Any:
    """`pytest.approx`, also where a field is declared a float."""
    return pytest.approx(value, abs=abs)


def about(interval: Interval, low: float | None, high: float | None) -> bool:
    return interval == Interval(*(None if side is None else near(side) for side in (low, high)))


# -- Steps of one arm ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seeds", "quantile"), [(2, 12.706), (3, 4.303), (4, 3.182), (5, 2.776), (10, 2.262), (20, 2.093), (31, 2.042)]
)
def test_the_interval_of_a_geometric_mean_uses_the_printed_t_table(seeds: int, quantile: float) -> None:
    logs = np.random.default_rng(seeds).normal(5, 1, seeds)
    steps = typical(runs(np.exp(logs).tolist()))
    assert (steps.method, steps.value) == ("geometric mean", near(math.exp(logs.mean())))
    standard_error = logs.std(ddof=1) / math.sqrt(seeds)
    assert (logs.mean() - math.log(steps.interval.low)) / standard_error == near(quantile, abs=6e-4)
    assert (math.log(steps.interval.high) - logs.mean()) / standard_error == near(quantile, abs=6e-4)


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ([250.0], Steps(near(250), OPEN, "geometric mean")),  # one run has no interval
        # A miss makes it the median between order statistics. binomial(10, 1/2): at most 1 in 0.0107 of samples, at
        # most 2 in 0.0547, so the 2nd from either end. An upper side that falls on a miss is open.
        ([900, None, 100, 200, 300, 400, 500, 600, 700, 800],
         Steps(near(math.sqrt(500 * 600)), Interval(near(200), near(900)), "median")),
        ([100, 200, 300, 400, 500, None], Steps(near(math.sqrt(300 * 400)), Interval(near(100), None), "median")),
        ([100, 200, 300, 400, 500, 600, 700, 800, None, None],
         Steps(near(math.sqrt(500 * 600)), Interval(near(200), None), "median")),
        # Five runs with a miss have a lower side, and four have none.
        ([100, 200, 300, 400, None], Steps(near(300), Interval(near(100), None), "median")),
        ([100, 200, 300, None], Steps(near(math.sqrt(200 * 300)), OPEN, "median")),
        # Half or more missed: a bound and no value, which stands where misses do only where enough runs missed.
        ([100, None, 300, None, 500, None], Steps(None, Interval(near(100), None), "bound")),
        ([100, *[None] * 8], Steps(None, Interval(near(1000), None), "bound")),
        ([None] * 5, Steps(None, Interval(near(1000), None), "bound")),
        ([None] * 4, Steps(None, OPEN, "bound")),
        ([], Steps(None, OPEN, "bound")),
        ([0.0, 100.0], Steps(0.0, OPEN, "geometric mean")),  # a target held before training
    ],
)  # fmt: skip
def test_typical_steps_of_runs_with_and_without_misses(steps: Runs, expected: Steps) -> None:
    assert typical(runs(steps)) == expected


def test_a_target_held_before_training_gives_no_ratio() -> None:
    assert ratio(runs([100.0, 100.0]), runs([0.0, 100.0])) == Ratio(None, OPEN, "none", None)


# -- The best point of the grid --------------------------------------------------------------------------------------


def test_the_best_point_has_the_most_hits_before_the_fewest_steps() -> None:
    assert runs([900, 900, 900], [500, 400, 450], [50, 50, None]).best == 1


def test_means_are_geometric() -> None:
    assert runs([10, 10, 800], [100, 100, 100]).best == 0  # 43 against 100; the arithmetic means are 273 and 100


def kept(sample: Sample) -> list[bool]:
    return kept_points(sample.logs, sample.hit).tolist()


def test_a_point_is_kept_until_a_paired_interval_tells_it_from_the_best() -> None:
    # three differences with a deviation of 0.1 have a standard error of 0.0577, times 4.303 (Student's t): 0.2484
    best, spread = [0.0, 1.0, 2.0], (-0.1, 0.0, 0.1)
    near_by, far = ([0.24 + b + s for b, s in zip(best, spread, strict=True)],
                    [0.26 + b + s for b, s in zip(best, spread, strict=True)])  # fmt: skip
    assert kept(runs(exp(*best), exp(*near_by), exp(*far))) == [True, True, False]
    # unpaired, the spread of 1 between seeds would keep all of them
    assert kept(runs(exp(*best), exp(*(b + 0.2 for b in best)))) == [True, False]


def test_points_without_a_hit_are_kept_only_where_none_has_one() -> None:
    assert kept(runs([500, 600, 400], [300, None, 350], [None] * 3)) == [True, True, False]
    assert kept(runs([900, None, None], [None] * 3)) == [True, False]
    assert kept(runs([None] * 3, [None] * 3)) == [True, True]


def test_doubt_is_the_share_of_leave_one_out_samples_that_disagree() -> None:
    # sums 9 and 10: without the fourth seed they are 9 and 6, without another 8 and 9 or less
    assert doubt(runs(exp(3, 3, 3, 0), exp(2, 2, 2, 4))) == 0.25
    assert doubt(runs([100, 200], [50, 60])) == 0
    assert doubt(runs([100])) is None


# -- The ratio without a miss ----------------------------------------------------------------------------------------


def test_with_one_point_an_arm_the_interval_is_the_paired_t_of_log_steps() -> None:
    result = ratio(runs(exp(1, 2, 4)), runs(exp(-1, 0, 1)))  # differences 2, 2, 3: mean 7/3, standard error 1/3
    half = 4.302653 / 3
    assert (result.method, result.value) == ("means", near(math.exp(7 / 3)))
    assert about(result.interval, math.exp(7 / 3 - half), math.exp(7 / 3 + half))
    assert result.p_value == near(1 - 7 / math.sqrt(51))  # t = 7; with 2 degrees of freedom p is 1 - t / sqrt(2 + t^2)


def test_equal_runs_are_a_ratio_of_exactly_one() -> None:
    assert ratio(runs([64.0, 81.0]), runs([64.0, 81.0])) == Ratio(1.0, Interval(1.0, 1.0), "means", 1.0)
    assert ratio(runs([64.0, 64.0]), runs([1.0, 1.0])).p_value == 0.0


def test_a_single_seed_gives_a_ratio_without_an_interval() -> None:
    assert ratio(runs([300.0]), runs([100.0])) == Ratio(near(3), OPEN, "means", None)


def by_definition(reference: np.ndarray, arm: np.ndarray, quantile: float) -> tuple[float, float, float]:
    """Log ratio and limits from (points, seeds) of log steps, in plain loops."""
    seeds = range(reference.shape[1])

    def smallest(logs: np.ndarray, left_out: int | None = None) -> float:
        return min(sum(row[s] for s in seeds if s != left_out) / (len(seeds) - (left_out is not None)) for row in logs)

    def optimism(logs: np.ndarray) -> float:
        total = 0.0
        for seed in seeds:
            others = [s for s in seeds if s % 5 != seed % 5]
            total += min(logs.tolist(), key=lambda row: sum(row[s] for s in others))[seed]
        return max(0.0, total / len(seeds) - smallest(logs))

    left = [smallest(reference, seed) - smallest(arm, seed) for seed in seeds]
    mean = sum(left) / len(left)
    half = quantile * math.sqrt((len(left) - 1) / len(left) * sum((each - mean) ** 2 for each in left))
    value = smallest(reference) - smallest(arm)
    return value, value - optimism(arm) - half, value + optimism(reference) + half


@pytest.mark.parametrize("seed", range(5))
def test_over_a_grid_the_jackknife_repeats_the_choice(seed: int) -> None:
    rng = np.random.default_rng(seed)
    reference, arm = rng.normal(5, 0.2, (3, 10)), rng.normal(3, 0.2, (4, 10))
    result = ratio(*(Sample(logs, np.ones_like(logs, dtype=bool)) for logs in (reference, arm)))
    value, low, high = by_definition(reference, arm, 2.262157)
    assert (result.method, result.value) == ("means", near(math.exp(value)))
    assert about(result.interval, math.exp(low), math.exp(high))


def test_seconds_and_examples_are_those_of_the_point_with_the_fewest_steps() -> None:
    steps = runs([100, 110, 90], [50, 55, 45])
    seconds = Sample(np.log([[1.0, 1.1, 0.9], [5.0, 5.5, 4.5]]), steps.hit, by=steps.logs)
    assert typical(seconds).value == near(5 * math.prod((1, 1.1, 0.9)) ** (1 / 3))
    reference = Sample(np.log([[10.0, 11.0, 9.0]]), np.ones((1, 3), dtype=bool), by=np.zeros((1, 3)))
    assert ratio(reference, seconds).value == near(2)


# -- The ratio with misses -------------------------------------------------------------------------------------------


def test_misses_give_the_ratio_of_medians() -> None:
    # six runs: the 1st and the 6th bound a median; the reference's 6th is a miss, so the ratio is open above
    result = ratio(runs([800, 820, 840, 860, 880, None]), runs([80, 82, 84, 86, 88, 90]))
    middle = math.log(math.sqrt(840 * 860) / math.sqrt(84 * 86))
    down = math.hypot(math.log(math.sqrt(840 * 860) / 800), math.log(90 / math.sqrt(84 * 86)))
    assert (result.method, result.value, result.p_value) == ("medians", near(math.exp(middle)), None)
    assert about(result.interval, math.exp(middle - down), None)
    turned = ratio(runs([80, 82, 84, 86, 88, 90]), runs([800, 820, 840, 860, 880, None]))
    assert about(turned.interval, None, math.exp(down - middle))


def test_a_reference_that_missed_half_gives_a_lower_bound_and_no_value() -> None:
    result = ratio(runs([*[900] * 3, *[None] * 3]), runs([90.0] * 6))
    assert (result.method, result.value) == ("bound", None)
    middle = math.log(math.sqrt(900 * 1000) / 90)
    assert about(result.interval, math.exp(middle - math.log(math.sqrt(900 * 1000) / 900)), None)


def test_an_arm_that_never_hit_is_bounded_from_above() -> None:
    result = ratio(runs([100.0] * 6), runs([None] * 6))
    assert (result.method, result.value) == ("bound", None)
    assert about(result.interval, None, 0.1)


def test_with_a_miss_and_fewer_than_six_runs_there_is_no_interval() -> None:
    result = ratio(runs([100, 110, 120, 130, None]), runs([10, 11, 12, 13, 14]))
    assert result == Ratio(near(10), OPEN, "medians", None)
    assert ratio(runs([None] * 5), runs([10.0] * 5)) == Ratio(None, OPEN, "bound", None)


def test_half_missed_in_both_arms_compares_their_hits() -> None:
    result = ratio(runs([None] * 20), runs([*[100.0] * 9, *[None] * 11]))
    assert result == Ratio(None, OPEN, "hits", near(0.0012, abs=5e-5))
    assert ratio(runs([]), runs([])) == Ratio(None, OPEN, "none", None)


# -- What must not matter --------------------------------------------------------------------------------------------

some_runs = st.lists(st.tuples(*[st.none() | st.floats(1, 999)] * 2), min_size=1, max_size=8)
some_points = st.integers(2, 8).flatmap(
    lambda seeds: st.lists(st.lists(st.floats(1, 999), min_size=seeds, max_size=seeds), min_size=1, max_size=3)
)


def inverse(side: float | None) -> float | None:
    return None if side is None else 1 / side


def bounded(found: Ratio) -> bool:
    """Not so wide that logs of it lose their digits: 1 degree of freedom and a wide spread."""
    return found.interval.high is None or found.interval.high < 1e100


@given(some_runs)
def test_the_ratio_of_swapped_arms_is_the_inverse(pairs: list[tuple[float | None, float | None]]) -> None:
    reference, arm = (runs([pair[side] for pair in pairs]) for side in (0, 1))
    one, other = ratio(reference, arm), ratio(arm, reference)
    assume(bounded(one) and bounded(other))
    assert one.method == other.method
    assert one.value == (None if other.value is None else near(1 / other.value))
    assert about(one.interval, inverse(other.interval.high), inverse(other.interval.low))
    assert one.p_value == (None if other.p_value is None else near(other.p_value))


@given(some_points, some_points, st.integers(2, 50))
def test_the_unit_of_steps_cancels_out_of_the_ratio(
    reference: list[list[float]], arm: list[list[float]], unit: int
) -> None:
    seeds = min(len(reference[0]), len(arm[0]))
    points = [[row[:seeds] for row in rows] for rows in (reference, arm)]
    one = ratio(*(runs(*rows) for rows in points))
    assume(bounded(one))
    other = ratio(*(runs(*[[unit * step for step in row] for row in rows], most=unit * 1000) for rows in points))
    assert one.value is not None
    assert other.value == near(one.value)
    assert about(other.interval, one.interval.low, one.interval.high)


@given(some_runs, st.randoms())
def test_the_order_of_the_seeds_does_not_matter(pairs: list[tuple[float | None, float | None]], shuffler: Any) -> None:
    shuffled = shuffler.sample(pairs, len(pairs))
    one, other = (ratio(*(runs([pair[side] for pair in found]) for side in (0, 1))) for found in (pairs, shuffled))
    assume(bounded(one))
    assert one.method == other.method
    assert one.value == (None if other.value is None else near(other.value))
    assert about(one.interval, other.interval.low, other.interval.high)


@given(some_points, some_points)
def test_p_is_under_5_percent_just_where_the_interval_excludes_one(
    reference: list[list[float]], arm: list[list[float]]
) -> None:
    seeds = min(len(reference[0]), len(arm[0]))
    result = ratio(*(runs(*(row[:seeds] for row in rows)) for rows in (reference, arm)))
    low, high = result.interval.low or 0.0, result.interval.high or math.inf
    assume(min(abs(math.log(low or 1e-300)), abs(math.log(min(high, 1e300)))) > 1e-9)
    assert result.p_value is not None
    assert (result.p_value < 0.05) == (low > 1 or high < 1)


# -- Several arms, and how many seeds --------------------------------------------------------------------------------


def test_holm_multiplies_the_smallest_most_and_never_reorders() -> None:
    corrected = holm([0.01, 0.04, None, 0.03, 0.005])
    assert corrected == [near(0.03), near(0.06), None, near(0.06), near(0.02)]


def test_holm_stops_at_one_and_leaves_a_single_test_alone() -> None:
    assert holm([0.6, 0.5]) == [1.0, 1.0]
    assert holm([0.03, None]) == [0.03, None]
    assert holm([]) == []


def test_the_spread_is_that_of_log_steps_and_unknown_once_a_run_missed() -> None:
    assert log_spread(runs(exp(1, 2, 3))) == near(1)
    assert log_spread(runs([100.0])) is None
    assert log_spread(runs([100.0, 200.0, None])) is None
    assert log_spread(runs([0.0, 100.0])) is None


@pytest.mark.parametrize(
    ("seeds", "cv", "true_ratio", "power"),
    [
        (5, 0.05, 1.1, 0.71), (10, 0.05, 1.1, 0.98), (3, 0.10, 1.5, 0.90), (5, 0.10, 1.25, 0.85),
        (10, 0.10, 1.1, 0.52), (5, 0.20, 1.5, 0.79), (10, 0.20, 1.25, 0.65),
    ],
)  # fmt: skip
def test_the_power_is_the_one_simulated_before(seeds: int, cv: float, true_ratio: float, power: float) -> None:
    # those figures came from 1,500 repeats or more and are rounded: two standard errors are 0.025
    assert welch_power(seeds, cv, true_ratio) == near(power, abs=0.03)
    assert welch_power(seeds, cv, 1 / true_ratio) == near(welch_power(seeds, cv, true_ratio))


@pytest.mark.parametrize(
    ("cv", "true_ratio", "seeds"),
    [
        (0.05, 1.25, 3), (0.05, 1.1, 6), (0.10, 1.5, 3), (0.10, 1.25, 5), (0.10, 1.1, 19), (0.20, 1.5, 6),
        (0.20, 1.25, 14),
    ],
)  # fmt: skip
def test_seeds_needed_is_the_first_number_with_the_power(cv: float, true_ratio: float, seeds: int) -> None:
    assert seeds_needed(cv, true_ratio) == seeds
    assert welch_power(seeds - 1, cv, true_ratio) < 0.8 <= welch_power(seeds, cv, true_ratio)


def test_seeds_needed_at_the_edges() -> None:
    assert seeds_needed(0.0, 1.01) == 2
    assert seeds_needed(0.1, 14) == 2
    with pytest.raises(ValueError, match="ratio of 1"):
        seeds_needed(0.1, 1.0)


def test_without_a_difference_the_power_is_the_level_of_the_test() -> None:
    assert welch_power(1000, 0.2, 1.0) == near(0.05, abs=1e-4)


# -- Coverage: a sample of `python -m tests.benchmarks.intervals` -----------------------------------------------------


def test_the_interval_covers_where_spreads_differ_and_most_runs_miss() -> None:
    """600 repeats: the standard error is 0.9 %. Gehan's rank test, inverted, held it in 6 % here."""
    found = Cell("normal", 20, (0.60, 0.05), 0.6, "none", 600).run()
    assert sum(missed for _, missed in found) / 600 <= 0.07
    assert {"medians", "bound"} <= {method for method, _ in found}


@pytest.mark.parametrize("arm", ["none", "late", "diverging"])
@pytest.mark.parametrize(("seeds", "kind"), [(10, "normal"), (20, "t3")])
def test_the_interval_holds_the_ratio_with_misses_in_either_arm(seeds: int, kind: str, arm: str) -> None:
    for spreads, missed in itertools.product([(0.30, 0.05), (0.05, 0.30)], (0.1, 0.6)):
        found = Cell(kind, seeds, spreads, missed, arm, 400).run()
        assert sum(outside for _, outside in found) / 400 <= 0.085  # 5 % and three standard errors


@pytest.mark.parametrize(
    ("name", "seeds"), [("three within 5 %", (5, 20)), ("three within 15 %", (3, 50)), ("two 3 % apart", (3, 10))]
)
def test_equal_arms_that_are_tuned_alike_seldom_differ(name: str, seeds: tuple[int, int]) -> None:
    """400 A/A comparisons: at most 5 % and three standard errors; more where the interval takes the point as given."""
    missed, blind, *_ = Choice("A/A", (Grid(FLAT[name], 0.1),) * 2, 0.0, seeds, 400).run()
    assert missed <= 8.5
    assert blind > missed + 3


def test_the_interval_covers_the_choice_among_15_points() -> None:
    missed, _, _, _, kept_of_15 = Choice("A/A", (Grid(FIELDS, 0.2, budget=3.0),) * 2, 0.0, (5, 20), 400).run()
    assert missed <= 8.5
    assert 2 < kept_of_15 < 8


# -- Another level, and pairs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tail", [0.025, 0.00625])
def test_a_ratios_p_value_is_of_the_bound_and_under_the_level_where_the_interval_leaves_it_out(tail: float) -> None:
    reference, arm = runs([900, 800, 1000, 950, 870]), runs([300, 310, 280, 330, 310])
    interval = ratio(reference, arm, tail).interval
    assert interval.low is not None
    for bound, out in ((0.999 * interval.low, True), (1.001 * interval.low, False), (3.0, False)):
        p_value = ratio(reference, arm, tail, bound).p_value
        assert p_value is not None
        assert (p_value < 2 * tail) == out
    assert ratio(reference, arm, tail, 2.0).interval == interval


def test_medians_need_more_runs_at_a_stricter_level() -> None:
    reference = runs([*range(900, 907), None])
    arm = runs(range(300, 308))
    assert ratio(reference, arm, 2.0**-8).interval.low is not None
    assert ratio(reference, arm, 2.0**-8 * 0.99).interval == OPEN


def test_a_bound_within_which_pairs_may_be_off_widens_the_interval_and_weakens_the_p_value() -> None:
    differences = np.array([1.0, 1.2, 1.4, 1.1])
    exact, loose = paired(differences, 0.025, 0.5), paired(differences, 0.025, 0.5, within=0.18)
    assert (loose.low, loose.high) == (near(exact.low - 0.18), near(exact.high + 0.18))
    assert loose.value == exact.value == near(1.175)
    for each in (exact, loose):
        p_value = paired(differences, 0.025, each.low, within=0.18 if each is loose else 0).p_value
        assert p_value == near(0.05)


def test_equal_differences_are_certain_and_a_single_one_is_not() -> None:
    assert (paired(np.array([1.0, 1.0])).p_value, paired(np.array([1.0, 1.0]), bound=1.0).p_value) == (0, 1)
    single = paired(np.array([1.0]))
    assert (single.p_value, single.low, single.high) == (None, -math.inf, math.inf)


@pytest.mark.parametrize(
    ("effect", "tail", "needed"), [(0.5, 0.025, 34), (1.0, 0.025, 10), (0.2, 0.025, 199), (0.5, 0.005, 51)]
)
def test_pairs_needed_are_those_of_the_printed_power_tables(effect: float, tail: float, needed: int) -> None:
    """Cohen's d of a paired t test, power 0.8; the scatter is read from the interval of 5 pairs."""
    half_width = float(stdtrit(4, 1 - tail)) / math.sqrt(5)
    assert pairs_needed(effect, half_width, 5, tail) == needed


def test_no_number_of_pairs_tells_an_effect_of_nothing_or_an_unknown_scatter() -> None:
    assert pairs_needed(0.0, 1.5, 5, 0.025) is None
    assert pairs_needed(1e-6, 1.5, 5, 0.025) is None
    assert pairs_needed(1.0, math.inf, 1, 0.025) is None


@pytest.mark.parametrize("factor", [1.0, 1.2])
@pytest.mark.parametrize("claims", [1, 4])
def test_verdicts_on_claims_at_their_bound_are_wrong_in_5_percent_of_comparisons(claims: int, factor: float) -> None:
    wrong, missed = wrong_claims("normal", 0.3, claims, 5, 2000, factor)
    assert wrong <= missed
    assert wrong / 2000 < 0.065
    assert missed / 2000 / claims < 0.065 / claims
    if factor == 1:
        assert wrong / 2000 > 0.03
