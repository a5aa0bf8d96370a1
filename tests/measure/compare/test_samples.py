"""Which points of the grid an arm keeps after its tuning runs."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from bncli.measure.compare.plan import Study
from bncli.measure.compare.samples import kept_points
from bncli.results.compare import RunRecord
from tests.measure.compare.conftest import failed, record


def tuning(
    asked: Study, steps: dict[float, list[float | None]], best: dict[float, float] | None = None
) -> list[RunRecord]:
    jobs = asked.jobs(asked.arms[0], "tune", asked.points(asked.arms[0]))
    return [
        record(job, steps[lr][job.seed - 7], best=(best or {}).get(lr, 0.95))
        for job in jobs
        for lr in [job.point["optimizer.lr"]]
    ]


def kept(asked: Study, found: Sequence[RunRecord]) -> list[float]:
    return [point["optimizer.lr"] for point in kept_points(asked.plan, found)]


def test_a_miss_stands_at_the_most_that_the_budget_can_show(asked: Study) -> None:
    assert asked.plan.most_steps == pytest.approx(1000 / 1.3)  # 769
    assert kept(asked, tuning(asked, {0.1: [700, 720, 710], 1: [700, 710, None], 10: [600, 620, 605]})) == [10]
    assert kept(asked, tuning(asked, {0.1: [700, 760, 740], 1: [750, 740, None], 10: [None] * 3})) == [0.1, 1]


def test_without_a_hit_the_best_metric_decides(asked: Study) -> None:
    never: list[float | None] = [None, None, None]
    assert kept(asked, tuning(asked, {0.1: never, 1: never, 10: never}, {0.1: 0.3, 1: 0.5, 10: 0.8})) == [10]


def test_a_failed_run_costs_its_seed_and_a_mostly_failed_point_is_dropped(asked: Study) -> None:
    found = tuning(asked, {0.1: [100, 110, 105], 1: [300, 290, 310], 10: [400, 400, 410]})

    def without(*lost: tuple[float, int]) -> list[RunRecord]:
        return failed(found, lambda one: (one.point["optimizer.lr"], one.seed) in lost)

    assert kept(asked, found) == kept(asked, without((0.1, 8))) == [0.1]
    assert kept(asked, without((0.1, 8), (0.1, 9))) == [1]
    # no two seeds that every point has: too few to tell, so that all points with a hit are kept
    assert kept(asked, without((0.1, 7), (1, 8), (10, 9))) == [0.1, 1, 10]
    assert kept(asked, without(*((lr, seed) for lr in (0.1, 1, 10) for seed in (7, 8, 9)))) == []
