"""Steps to target: by hand, under what must not matter, over cadences of evaluation, and from a known crossing."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bncli.engine.target import StepsToTarget, evaluation_steps
from bncli.recipe.sections import LogSpaced
from bncli.results.train import Evaluation, Target
from tests.benchmarks.crossings import bias_of_14x, ratio_by_cadence
from tests.engine.conftest import steps_to_target

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


NEVER = [math.nan] * 5
RISING_LATE = [0.0] * 10 + [0.5] * 4  # 100 steps below: the line touches the target at the tenth evaluation
SPIKE = [*[0.1] * 8, 0.9, *[0.1] * 4, *[0.9] * 5]  # each change between .1 and .9 is below for half of its 10 steps


@pytest.mark.parametrize(
    ("target", "values", "steps", "first_hit"),
    [
        # below for 10 + 10 steps and a quarter of the next 10: the line from .4 to .8 meets .5 there
        (ACCURACY, [0.0, 0.2, 0.4, 0.8, 0.9], 22.5, 30),
        (LOSS, [2.0, 1.0, 0.75, 0.25, 0.1], 25, 30),
        # a value equal to the target reaches it
        (ACCURACY, [0.0, 0.25, 0.5, 0.75], 20, 20),
        (LOSS, [1.0, 0.75, 0.5, 0.25], 20, 20),
        # a run has to go on until it is 1.3 times as long as its steps to target
        (ACCURACY, RISING_LATE[:13], None, 100),
        (ACCURACY, RISING_LATE, 100, 100),
        # a spike shortens the count by what it is above, and settles nothing
        (ACCURACY, SPIKE, 70 + 5 + 5 + 30 + 5, 80),
        (ACCURACY, [0.6], 0, 0),
        (ACCURACY, [], None, None),
        (ACCURACY, [0.1, 0.2, 0.3, 0.4], None, None),
        # NaN never counts as reached, and an interval from what is not finite is below as a whole
        (ACCURACY, NEVER, None, None),
        (LOSS, NEVER, None, None),
        (LOSS, [math.inf, math.inf, 0.2, 0.2, 0.2], 20, 20),
        (ACCURACY, [math.nan, 0.9, 0.9], 10, 10),
    ],
)
def test_steps_below_the_target_are_counted_on_straight_lines(
    target: Target, values: list[float], steps: float | None, first_hit: int | None
) -> None:
    assert steps_to_target(curve(values), target) == (None if steps is None else pytest.approx(steps), first_hit)


@given(curves, targets)
def test_one_at_a_time_says_after_every_evaluation_what_the_whole_says(values: list[float], target: Target) -> None:
    evaluations = curve(values)
    so_far = StepsToTarget(target)
    for k, evaluation in enumerate(evaluations):
        settled = so_far.add(evaluation)
        assert (so_far.steps, so_far.first_hit) == steps_to_target(evaluations[: k + 1], target)
        assert settled is (so_far.steps is not None)


@given(finite_curves, finite_curves, targets)
def test_final_steps_do_not_change_with_later_evaluations(
    values: list[float], later: list[float], target: Target
) -> None:
    steps, first_hit = steps_to_target(curve(values), target)
    if steps is not None:
        assert steps_to_target(curve(values + later), target) == (steps, first_hit)


@given(finite_curves)
def test_a_mirrored_loss_takes_as_many_steps_as_the_accuracy(values: list[float]) -> None:
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


@pytest.mark.parametrize(("every", "steps"), [(40, [40, 80, 100]), (50, [50, 100]), (100, [100])])
def test_evaluations_at_an_interval_end_with_the_budget(every: int, steps: list[int]) -> None:
    assert list(evaluation_steps(every, 100)) == steps


def test_evaluations_spaced_in_log_step_are_as_many_in_every_doubling() -> None:
    found = list(evaluation_steps(LogSpaced(points_per_doubling=8), 3000))
    assert found[:12] == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]
    assert found[-1] == 3000
    assert found == sorted(set(found))
    for low in (32, 64, 128, 256, 512, 1024):
        assert sum(low < step <= 2 * low for step in found) == 8
    assert list(evaluation_steps(LogSpaced(points_per_doubling=1), 1)) == [1]


# --- how often one evaluates must not matter: a sample of `python -m tests.benchmarks.crossings` --------------------


@pytest.mark.parametrize("target", [0.90, 0.93, 0.95])
def test_the_ratio_of_the_same_runs_varies_by_less_than_3_percent(target: float) -> None:
    """Simulated runs with a known shape and noise; the centred median of three moves by 13 % at .95."""
    found = ratio_by_cadence(target, noise=0.009, runs=60, seed=1)
    assert (max(found) / min(found)) ** 0.5 - 1 < 0.03


def test_a_true_14x_is_measured_within_4_percent_with_10_evaluations() -> None:
    # 400 runs an arm: the standard error is about 0.8 %
    assert abs(bias_of_14x(noise=0.01, cadence="every 10", runs=400, seed=2)) < 0.04
    assert abs(bias_of_14x(noise=0.01, cadence="log 8", runs=400, seed=2)) < 0.04
