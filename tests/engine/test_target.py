"""Steps to target: by hand, under what must not matter, over cadences of evaluation, and from a known crossing."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bncli.engine.target import StepsToTarget, evaluation_steps, steps_to_target
from bncli.recipe.sections import LogSpaced
from bncli.results.train import Evaluation, Target
from tests.benchmarks.crossings import bias_of_14x, ratio_by_cadence

ACCURACY = Target("accuracy", 0.5)
LOSS = Target("loss", 0.5)


def curve(values: Sequence[float], every: int = 10) -> list[Evaluation]:
    """Evaluations at 0, every, 2 every, ... with the same value for both metrics."""
    return [Evaluation(k * every, value, value, None) for k, value in enumerate(values)]


curves = st.lists(
    st.sampled_from([0.0, 0.1, 0.3, 0.49, 0.5, 0.51, 0.7, 0.9, math.nan, math.inf, -math.inf]), max_size=12
)
finite_curves = st.lists(st.floats(0, 1, width=32), min_size=1, max_size=12)
targets = st.sampled_from([ACCURACY, LOSS])


def test_a_rising_accuracy_counts_the_steps_below_its_target_on_straight_lines() -> None:
    # below for 10 + 10 steps and a quarter of the next 10: the line from .4 to .8 meets .5 there
    assert steps_to_target(curve([0.0, 0.2, 0.4, 0.8, 0.9]), ACCURACY) == (pytest.approx(22.5), 30)


def test_a_falling_loss_counts_from_above() -> None:
    assert steps_to_target(curve([2.0, 1.0, 0.75, 0.25, 0.1]), LOSS) == (pytest.approx(25), 30)


def test_a_value_equal_to_the_target_reaches_it() -> None:
    assert steps_to_target(curve([0.0, 0.25, 0.5, 0.75]), ACCURACY) == (20, 20)
    assert steps_to_target(curve([1.0, 0.75, 0.5, 0.25]), LOSS) == (20, 20)


def test_a_run_goes_on_until_it_is_1_3_times_as_long_as_its_steps_to_target() -> None:
    values = [0.0] * 10 + [0.5] * 4  # 95 or 100 steps below: at the tenth evaluation the line just touches the target
    assert steps_to_target(curve(values[:13]), ACCURACY) == (None, 100)
    assert steps_to_target(curve(values), ACCURACY) == (100, 100)


def test_a_single_spike_shortens_the_count_by_what_it_is_above_and_settles_nothing() -> None:
    # each rise from .1 to .9, and the fall to .1, is below the target for half of its 10 steps
    values = [*[0.1] * 8, 0.9, *[0.1] * 4, *[0.9] * 5]
    steps, first_hit = steps_to_target(curve(values), ACCURACY)
    assert (steps, first_hit) == (pytest.approx(70 + 5 + 5 + 30 + 5), 80)


def test_a_first_evaluation_at_the_target_is_no_steps() -> None:
    assert steps_to_target([Evaluation(0, 0.6, 1.0, None)], ACCURACY) == (0, 0)


def test_no_evaluation_and_a_target_never_met_are_none() -> None:
    assert steps_to_target([], ACCURACY) == (None, None)
    assert steps_to_target(curve([0.1, 0.2, 0.3, 0.4]), ACCURACY) == (None, None)


@pytest.mark.parametrize("target", [ACCURACY, LOSS])
def test_nan_never_counts_as_reached(target: Target) -> None:
    assert steps_to_target(curve([math.nan] * 5), target) == (None, None)


def test_an_interval_from_a_value_that_is_not_finite_is_below_as_a_whole() -> None:
    assert steps_to_target(curve([math.inf, math.inf, 0.2, 0.2, 0.2]), LOSS) == (20, 20)
    assert steps_to_target(curve([math.nan, 0.9, 0.9]), ACCURACY) == (10, 10)


@given(curves, targets)
def test_one_at_a_time_says_after_every_evaluation_what_the_whole_says(values: list[float], target: Target) -> None:
    evaluations = curve(values)
    so_far = StepsToTarget(target)
    for k, evaluation in enumerate(evaluations):
        settled = so_far.add(evaluation)
        assert (so_far.steps, so_far.first_hit) == steps_to_target(evaluations[: k + 1], target)
        assert settled is (so_far.steps is not None)


@given(finite_curves, finite_curves, targets)
def test_settled_steps_are_not_changed_by_what_comes_later(
    values: list[float], later: list[float], target: Target
) -> None:
    steps, first_hit = steps_to_target(curve(values), target)
    if steps is not None:
        assert steps_to_target(curve(values + later), target) == (steps, first_hit)


@given(finite_curves)
def test_a_loss_that_mirrors_an_accuracy_takes_as_many_steps(values: list[float]) -> None:
    mirrored = [1 - value for value in values]
    steps, first_hit = steps_to_target(curve(mirrored), LOSS)
    other_steps, other_first_hit = steps_to_target(curve([1 - value for value in mirrored]), ACCURACY)
    assert first_hit == other_first_hit
    assert steps == (None if other_steps is None else pytest.approx(other_steps))


@given(finite_curves, st.integers(1, 1000), targets)
def test_steps_scale_with_the_evaluation_interval(values: list[float], every: int, target: Target) -> None:
    steps, first_hit = steps_to_target(curve(values, every=1), target)
    scaled_steps, scaled_first_hit = steps_to_target(curve(values, every), target)
    assert scaled_steps == (None if steps is None else pytest.approx(every * steps))
    assert scaled_first_hit == (None if first_hit is None else every * first_hit)


# --- when a run is evaluated --------------------------------------------------------------------------------------


def test_evaluations_at_an_interval_end_with_the_budget() -> None:
    assert list(evaluation_steps(40, 100)) == [40, 80, 100]
    assert list(evaluation_steps(50, 100)) == [50, 100]
    assert list(evaluation_steps(100, 100)) == [100]


def test_evaluations_spaced_in_log_step_are_as_many_in_every_doubling_once_steps_are_finer_than_they() -> None:
    found = list(evaluation_steps(LogSpaced(points_per_doubling=8), 3000))
    assert found[:12] == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]
    assert found[-1] == 3000
    assert found == sorted(set(found))
    for low in (32, 64, 128, 256, 512, 1024):
        assert sum(low < step <= 2 * low for step in found) == 8
    assert list(evaluation_steps(LogSpaced(points_per_doubling=1), 1)) == [1]


# --- how often one evaluates must not matter: a sample of `python -m tests.benchmarks.crossings` --------------------


@pytest.mark.parametrize("target", [0.90, 0.93, 0.95])
def test_the_ratio_of_the_same_runs_moves_by_less_than_3_percent_between_cadences(target: float) -> None:
    """Simulated runs with a known shape and noise; the centred median of three moves by 13 % at .95."""
    found = ratio_by_cadence(target, noise=0.009, runs=60, seed=1)
    assert (max(found) / min(found)) ** 0.5 - 1 < 0.03


def test_a_true_14x_is_read_within_4_percent_with_10_evaluations_in_the_fast_arm() -> None:
    # 400 runs an arm: the standard error is about 0.8 %
    assert abs(bias_of_14x(noise=0.01, cadence="every 10", runs=400, seed=2)) < 0.04
    assert abs(bias_of_14x(noise=0.01, cadence="log 8", runs=400, seed=2)) < 0.04
