"""The runs of one arm as samples: which points of the grid it kept, and its runs there by point and seed. No torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from bncli.engine.target import StepsToTarget
from bncli.measure.compare import stats
from bncli.measure.compare.stats import Sample
from bncli.results.compare import ComparisonPlan, RunRecord
from bncli.results.train import RunResult, Target

Point = dict[str, Any]
Measure = Callable[[Point, RunResult], tuple[float, bool] | None]  # log of a run's cost, and whether it hit; or unknown


def kept_points(plan: ComparisonPlan, tuning: Sequence[RunRecord]) -> list[Point]:
    """The points of the grid that one arm's tuning runs leave in the race, in the grid's order.

    A single point is kept whatever its runs did. With fewer than two seeds that every point has, since runs failed,
    those where a run hit. Without a hit at any point it is the one with the best median metric, and none at all where
    every run failed.
    """
    points = points_of(tuning)
    if len(points) == 1:
        return points
    runs = Runs.of(tuning, points)
    sample = runs.sample(steps(plan, plan.target))
    if sample.hit.shape[1] >= 2 and sample.hit.any():
        keep = stats.kept_points(sample.logs, sample.hit)
        return [point for point, kept in zip(runs.points, keep, strict=True) if kept]
    hit = [
        point
        for point, results in zip(runs.points, runs.results, strict=True)
        if any(result.steps_to_target is not None for result in results.values())
    ]
    if hit:
        return hit
    bests = [_median_best(results.values(), plan.target) for results in runs.results]
    if not bests:
        return []
    best = (max if plan.target.metric == "accuracy" else min)(bests)
    return [runs.points[bests.index(best)]]


def _median_best(results: Any, target: Target) -> float:
    known = [result.best for result in results if result.best is not None]
    return median(known) if known else -math.inf if target.metric == "accuracy" else math.inf


def points_of(records: Sequence[RunRecord]) -> list[Point]:
    """The different points of some runs, in their order."""
    points: list[Point] = []
    for record in records:
        if record.point not in points:
            points.append(record.point)
    return points


def ended(records: Sequence[RunRecord]) -> list[RunRecord]:
    """Those that ended by themselves: at the target, at the budget, or by diverging."""
    return [record for record in records if record.result is not None and record.result.status != "interrupted"]


@dataclass(frozen=True)
class Runs:
    """One arm's runs that ended, by point and seed, without the points where more runs failed than ended."""

    points: tuple[Point, ...]
    results: tuple[Mapping[int, RunResult], ...]  # of each point: seed -> result

    @staticmethod
    def of(records: Sequence[RunRecord], points: Sequence[Point]) -> Runs:
        at = {index: [record for record in records if record.point == point] for index, point in enumerate(points)}
        failed = {index: sum(record.failure is not None for record in found) for index, found in at.items()}
        results = {
            index: {r.seed: r.result for r in ended(found) if r.result is not None} for index, found in at.items()
        }
        kept = {index: found for index, found in results.items() if len(found) > failed[index]}
        return Runs(tuple(points[index] for index in kept), tuple(kept.values()))

    def seeds(self, measure: Measure) -> frozenset[int]:
        """Those that have run at every point, and of which the measure is known there."""
        found = [
            frozenset(seed for seed, result in results.items() if measure(point, result) is not None)
            for point, results in zip(self.points, self.results, strict=True)
        ]
        return frozenset.intersection(*found) if found else frozenset()

    def sample(
        self,
        measure: Measure,
        by: Measure | None = None,
        seeds: frozenset[int] | None = None,
        best: Point | None = None,
    ) -> Sample:
        """(points, seeds) of a measure, over the seeds given or all. `best`: a point that was chosen before."""
        wanted = sorted(self.seeds(measure) if seeds is None else seeds)
        shape = (len(self.points), len(wanted))

        def table(of: Measure, part: int, kind: type) -> Any:
            cells = [of(p, r[seed]) for p, r in zip(self.points, self.results, strict=True) for seed in wanted]
            return np.array([cell[part] for cell in cells if cell is not None], dtype=kind).reshape(shape)

        return Sample(
            logs=table(measure, 0, float),
            hit=table(measure, 1, bool),
            by=table(by, 0, float) if by else None,
            chosen=self.points.index(best) if best in self.points else None,
        )


# --- measures -----------------------------------------------------------------------------------------------------


def log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf


def steps(plan: ComparisonPlan, target: Target) -> Callable[[Point, RunResult], tuple[float, bool]]:
    """Log of the steps to a target of the plan; a miss took more than the budget can show."""

    def measure(point: Point, result: RunResult) -> tuple[float, bool]:
        found = steps_to(result, target)
        return (log(plan.most_steps), False) if found is None else (log(found), True)

    return measure


def steps_to(result: RunResult, target: Target) -> float | None:
    """A run's steps to its own target or to one of its further ones."""
    if target == result.target:
        return result.steps_to_target
    return next((each.steps for each in result.also if each.target == target), None)


def seconds(plan: ComparisonPlan) -> Measure:
    """Log of the seconds of training to the target, by the run's own time a step."""
    count = steps(plan, plan.target)

    def measure(point: Point, result: RunResult) -> tuple[float, bool] | None:
        if not result.ms_per_step:
            return None
        taken, hit = count(point, result)
        return taken + log(result.ms_per_step / 1e3), hit

    return measure


def examples(plan: ComparisonPlan, arm: str) -> Measure:
    """Log of the training examples seen on the way to the target."""
    count = steps(plan, plan.target)
    batch_size = plan.recipes.get(arm, {}).get("train", {}).get("batch_size")

    def measure(point: Point, result: RunResult) -> tuple[float, bool] | None:
        (taken, hit), each = count(point, result), point.get("train.batch_size", batch_size)
        return None if each is None else (taken + log(each), hit)

    return measure


def thinned_steps(plan: ComparisonPlan, first: int) -> Measure:
    """Log of the steps to target from every second evaluation, beginning with the first or the second after step 0."""

    def measure(point: Point, result: RunResult) -> tuple[float, bool]:
        if result.steps_to_target is None:
            return log(plan.most_steps), False
        count = StepsToTarget(plan.target)
        for evaluation in (*result.evaluations[:1], *result.evaluations[first::2]):
            count.add(evaluation)
        return log(count.below if count.steps is None else count.steps), True  # its last evaluation may be left out

    return measure
