"""The search for the largest learning rate: what it finds, in how many runs, and where it is misled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bncli.measure.compare.plan import Study
from bncli.measure.compare.rates import MOST_DOUBLINGS, Found, UnknownOutcome, search, trained
from bncli.results.compare import ComparisonPlan
from bncli.results.train import Evaluation, RunResult
from tests.measure.compare.conftest import result

FACTOR = 1.2


def ending(accuracy: float, loss: float = 0.3, **changes: Any) -> RunResult:
    return replace(
        result(None), evaluations=(Evaluation(0, 0.1, 2.3, None), Evaluation(300, accuracy, loss, 0.2)), **changes
    )


class Searched:
    """A search in which a rate trains if `trains` says so; the rates that were run, in order."""

    def __init__(self, plan: ComparisonPlan, trains: Callable[[float], bool], start: float = 0.1) -> None:
        self.rates: list[float] = []

        def run(rate: float) -> RunResult:
            if rate not in self.rates:
                self.rates.append(rate)
            return ending(0.9 if trains(rate) else 0.1)

        self.found = search(plan, "plain", {"optimizer.lr": start}, run)


@pytest.fixture
def plan(asked: Study) -> ComparisonPlan:
    section = {"steps": 300, "accuracy": 0.8, "factor": FACTOR}
    return replace(asked.plan, largest_learning_rate=section)


@given(limit=st.floats(1e-4, 1e4))
def test_the_rate_found_trains_and_the_next_one_does_not(limit: float) -> None:
    plan = ComparisonPlan("", (), {}, {}, "plain", (), (), None, 1000, "", largest_learning_rate=SECTION)  # type: ignore[arg-type]
    found = Searched(plan, lambda rate: rate <= limit).found
    assert found.trains is not None
    assert found.fails is not None
    assert found.trains <= limit < found.fails
    assert found.fails / found.trains == pytest.approx(FACTOR, rel=1e-4)


SECTION = {"steps": 300, "accuracy": 0.8, "factor": FACTOR}


def test_it_climbs_by_twos_halves_between_and_checks_below(plan: ComparisonPlan) -> None:
    one = Searched(plan, lambda rate: rate < 0.35)
    powers = [0, 4, 8, 6, 7, 5, 2]  # from 0.1 to 0.43, between 0.299 and 0.358, and below it: 4 is known by then
    assert one.rates == [float(f"{0.1 * FACTOR**k:.6g}") for k in powers]
    assert one.found == Found(float(f"{0.1 * FACTOR**6:.6g}"), float(f"{0.1 * FACTOR**7:.6g}"))


def test_it_descends_where_the_start_fails(plan: ComparisonPlan) -> None:
    one = Searched(plan, lambda rate: rate < 0.01)
    assert one.rates[:2] == [0.1, float(f"{0.1 / FACTOR**4:.6g}")]
    assert one.found.trains < 0.01 <= one.found.fails  # type: ignore[operator]


def test_it_climbs_where_the_start_is_too_small_for_the_budget(plan: ComparisonPlan) -> None:
    one = Searched(plan, lambda rate: 0.3 < rate < 3)
    assert one.rates[:4] == [float(f"{0.1 * FACTOR**k:.6g}") for k in (0, -4, 4, -8)]
    assert one.found.trains < 3 <= one.found.fails  # type: ignore[operator]


@pytest.mark.parametrize("below", [1, 2, 4])
def test_a_rate_that_trains_above_one_that_fails_does_not_count(plan: ComparisonPlan, below: int) -> None:
    hole = [float(f"{0.1 * FACTOR ** (6 - below):.6g}")]
    one = Searched(plan, lambda rate: rate < 0.35 and rate not in hole)
    assert one.found.fails == hole[0]
    assert one.found.trains == float(f"{0.1 * FACTOR ** (5 - below):.6g}")


@pytest.mark.parametrize("slow", [0.25, 0.17])
def test_rates_that_are_too_small_for_the_budget_are_no_failures_of_large_ones(
    plan: ComparisonPlan, slow: float
) -> None:
    one = Searched(plan, lambda rate: slow < rate < 0.35, start=0.3)
    assert one.found == Found(0.3, 0.36)
    assert len(one.rates) <= 12


def test_at_a_coarse_factor_no_rate_below_half_has_to_train(plan: ComparisonPlan) -> None:
    coarse = replace(plan, largest_learning_rate={**SECTION, "factor": 2})
    one = Searched(coarse, lambda rate: 0.05 < rate < 0.5)
    assert one.rates == [0.1, 0.2, 0.4, 0.8]
    assert one.found == Found(0.4, 0.8)


@pytest.mark.parametrize("trains", [True, False])
def test_without_a_rate_that_trains_or_one_that_fails_there_is_a_bound(plan: ComparisonPlan, trains: bool) -> None:
    one = Searched(plan, lambda rate: trains)
    assert (one.found.trains is None, one.found.fails is None) == (not trains, trains)
    assert len(one.rates) <= MOST_DOUBLINGS + 2


def test_a_run_that_is_missing_ends_the_search_for_now(plan: ComparisonPlan) -> None:
    runs: list[float] = []
    with pytest.raises(UnknownOutcome):
        search(plan, "plain", {"optimizer.lr": 0.1}, lambda rate: runs.append(rate))  # type: ignore[func-returns-value]
    assert runs == [0.1]


def test_the_start_is_the_recipes_rate_where_the_grid_has_none(plan: ComparisonPlan) -> None:
    runs: list[float] = []
    with pytest.raises(UnknownOutcome):
        search(plan, "plain", {}, lambda rate: runs.append(rate))  # type: ignore[func-returns-value]
    assert runs == [1.0]


@pytest.mark.parametrize(
    ("run", "accuracy", "expected"),
    [
        (ending(0.8), 0.8, True),
        (ending(0.79), 0.8, False),
        (ending(0.9, loss=float("nan")), 0.8, False),
        (ending(0.9, status="diverged"), 0.8, False),
        (ending(0.9, status="interrupted"), 0.8, None),
        (ending(0.11, constant_guess=0.1), None, True),
        (ending(0.1, constant_guess=0.1), None, False),
        (ending(0.9), None, None),
    ],
)
def test_a_run_has_trained_if_it_ends_finite_and_above_the_bar(
    run: RunResult, accuracy: float | None, expected: bool | None
) -> None:
    assert trained(run, accuracy) is expected
