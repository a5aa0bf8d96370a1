"""One arm's runs as samples: the grid points it kept, and the cost of its runs there by point and seed. No torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import median
from typing import Any

import numpy as np

from bncli.engine.target import StepsToTarget
from bncli.measure.compare import stats
from bncli.measure.compare.racing import points_out
from bncli.measure.compare.stats import Sample
from bncli.recipe.overrides import value_at
from bncli.results.compare import ComparisonPlan, Ratio, RunRecord
from bncli.results.environment import Interval
from bncli.results.train import RunResult, Target

Point = dict[str, Any]


@dataclass(frozen=True)
class ArmRuns:
    """One arm's records, and the points of the grid that it kept after tuning."""

    plan: ComparisonPlan
    name: str
    records: Sequence[RunRecord]
    kept: Sequence[Point]
    searched: Sequence[RunRecord] = ()  # of the search for its largest learning rate

    @staticmethod
    def of(plan: ComparisonPlan, name: str, records: Sequence[RunRecord]) -> ArmRuns:
        """The arm's part of a comparison's records. Before its tuning is complete it has kept no point."""
        searched = [record for record in records if record.arm == name and record.phase == "rate"]
        records = [record for record in records if record.arm == name and record.compared]
        if not plan.tune_seeds:
            return ArmRuns(plan, name, records, points_of(records), searched)
        tuning = [record for record in records if record.phase == "tune"]
        tuned = [values for path, values in plan.grid.items() if path not in plan.fixed.get(name, ())]
        left = _still_in(plan, tuning, math.prod(map(len, tuned)))
        return ArmRuns(plan, name, records, kept_points(plan, left), searched)

    @cached_property
    def results(self) -> list[tuple[Point, dict[int, RunResult]]]:
        """For each point kept, its ended runs by seed; without the points where more runs failed than ended."""
        found = []
        for point in self.kept:
            records = [record for record in self.records if record.point == point]
            ended = {
                record.seed: record.result
                for record in records
                if record.result is not None and record.result.status != "interrupted"
            }
            if len(ended) > sum(record.failure is not None for record in records):
                found.append((point, ended))
        return found

    def seeds(self, measure: Measure) -> set[int]:
        """The seeds that have run at every point, and for which the measure is known there."""
        known = [
            {seed for seed, result in results.items() if measure(self, point, result) is not None}
            for point, results in self.results
        ]
        return set.intersection(*known) if known else set()

    def best(self, measure: Measure) -> Point | None:
        """The best of the points kept; None before the tuning is complete, or where no run ended."""
        sample = self.sample(measure)
        if sample.hit.shape[1]:
            return self.results[sample.best][0]
        return self.kept[0] if self.kept else None

    def sample(
        self, measure: Measure, by: Measure | None = None, seeds: set[int] | None = None, best: Point | None = None
    ) -> Sample:
        """The measure at every point and seed, or at those seeds alone.

        by: the measure that decides which point is best, where it is another. best: a point that was chosen before.
        """
        wanted = sorted(self.seeds(measure) if seeds is None else seeds)

        def table(of: Measure) -> stats.Floats:  # (points, seeds, log and hit)
            cells: Any = [[of(self, point, results[seed]) for seed in wanted] for point, results in self.results]
            return np.array(cells, dtype=float).reshape(len(self.results), len(wanted), 2)

        cost, points = table(measure), [point for point, _ in self.results]
        return Sample(
            logs=cost[..., 0],
            hit=cost[..., 1].astype(bool),
            by=table(by)[..., 0] if by else None,
            chosen=points.index(best) if best in points else None,
        )


def _still_in(plan: ComparisonPlan, tuning: Sequence[RunRecord], points: int) -> Sequence[RunRecord]:
    """One arm's tuning runs without those of points that are out; none before all that are left have ended."""
    seeds, found = plan.tune_seeds, points_of(tuning)
    if len(tuning) < points * len(seeds) or any(run.given_up for run in tuning):
        by_place = {(found.index(run.point), run.seed): run for run in tuning}
        runs = [[by_place.get((row, seed), 0.0) for seed in seeds] for row in range(len(found))]
        out = [point for point, out in zip(found, points_out(plan, runs), strict=True) if out]
        tuning, points = [run for run in tuning if run.point not in out and not run.given_up], points - len(out)
    return tuning if len(tuning) == points * len(seeds) else []


def kept_points(plan: ComparisonPlan, tuning: Sequence[RunRecord]) -> list[Point]:
    """The points of the grid that one arm's tuning runs cannot tell from the best, in the grid's order.

    A single point is kept whatever its runs did. With fewer than two seeds that every point has, since runs failed,
    those where a run hit. Without a hit at any point it is the one with the best median metric, and none at all where
    every run failed.
    """
    points = points_of(tuning)
    if len(points) == 1:
        return points
    arm = ArmRuns(plan, "", tuning, points)
    sample = arm.sample(steps(plan.target))
    if sample.hit.shape[1] >= 2 and sample.hit.any():
        keep = stats.kept_points(sample.logs, sample.hit)
        return [point for (point, _), kept in zip(arm.results, keep, strict=True) if kept]
    hit = [point for point, found in arm.results if any(each.steps_to_target is not None for each in found.values())]
    if hit or not arm.results:
        return hit
    highest = plan.target.metric == "accuracy"

    def median_best(results: dict[int, RunResult]) -> float:
        known = [result.best for result in results.values() if result.best is not None]
        return median(known) if known else -math.inf if highest else math.inf

    return [(max if highest else min)(arm.results, key=lambda found: median_best(found[1]))[0]]


def tuned_point(plan: ComparisonPlan, name: str, records: Sequence[RunRecord]) -> Point | None:
    """The best of an arm's points over the tuning seeds alone; None before the tuning is complete."""
    tuning = [record for record in records if record.phase == "tune"]
    return ArmRuns.of(plan, name, tuning).best(steps(plan.target))


def points_of(records: Sequence[RunRecord]) -> list[Point]:
    """The different points of some runs, in their order."""
    points: list[Point] = []
    for record in records:
        if record.point not in points:
            points.append(record.point)
    return points


def ratio(
    arm: ArmRuns,
    reference: ArmRuns,
    measure: Measure,
    by: Measure | None = None,
    tail: float = stats.TAIL,
    bound: float = 1.0,
) -> Ratio:
    """The reference's cost over the arm's, each at the point that is best over all of its seeds.

    Over the seeds that both have. by: as in `ArmRuns.sample`. tail, bound: as in `stats.ratio`.
    """
    if _same_recipe(arm, reference):
        return Ratio(1.0, Interval(1.0, 1.0), "same recipe", None)
    seeds = reference.seeds(measure) & arm.seeds(measure)
    of_reference, of_arm = (side.sample(measure, by, seeds, side.best(by or measure)) for side in (reference, arm))
    return stats.ratio(of_reference, of_arm, tail, bound)


def _same_recipe(arm: ArmRuns, reference: ArmRuns) -> bool:
    """Whether an arm is the reference under another name: it then shares the reference's runs."""
    recipe, fixed = arm.plan.recipes.get, arm.plan.fixed.get
    alike = recipe(arm.name) is not None and recipe(arm.name) == recipe(reference.name)
    return alike and fixed(arm.name, ()) == fixed(reference.name, ())


# --- measures -----------------------------------------------------------------------------------------------------

# Log of the cost of a run, and whether it hit; None if unknown.
Measure = Callable[[ArmRuns, Point, RunResult], tuple[float, bool] | None]


def steps(target: Target) -> Callable[[ArmRuns, Point, RunResult], tuple[float, bool]]:
    """Log of the steps to a target of the plan; a miss took more than the budget can show."""

    def measure(arm: ArmRuns, point: Point, result: RunResult) -> tuple[float, bool]:
        found = result.steps_to(target)
        return (_log(arm.plan.most_steps), False) if found is None else (_log(found), True)

    return measure


def seconds(arm: ArmRuns, point: Point, result: RunResult) -> tuple[float, bool] | None:
    """Log of the seconds of training to the target, by the run's time per step."""
    if not result.ms_per_step:
        return None
    taken, hit = steps(arm.plan.target)(arm, point, result)
    return taken + _log(result.ms_per_step / 1e3), hit


def examples(arm: ArmRuns, point: Point, result: RunResult) -> tuple[float, bool] | None:
    """Log of the training examples seen on the way to the target."""
    batch_size = point.get("train.batch_size", value_at(arm.plan.recipes, (arm.name, "train", "batch_size")))
    if not isinstance(batch_size, int | float):
        return None
    taken, hit = steps(arm.plan.target)(arm, point, result)
    return taken + _log(batch_size), hit


def thinned_steps(first: int) -> Measure:
    """Log of the steps to target from every second evaluation, beginning with the first or the second after step 0."""

    def measure(arm: ArmRuns, point: Point, result: RunResult) -> tuple[float, bool]:
        if result.steps_to_target is None:
            return _log(arm.plan.most_steps), False
        count = StepsToTarget(arm.plan.target)
        for evaluation in (*result.evaluations[:1], *result.evaluations[first::2]):
            count.add(evaluation)
        return _log(count.below if count.steps is None else count.steps), True  # the last evaluation may be left out

    return measure


def _log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf
