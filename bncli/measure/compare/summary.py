"""Result of a comparison from its runs' records: a row for each arm, ratios to the reference, and notes. No torch."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from operator import attrgetter
from statistics import geometric_mean, median
from typing import Any

from bncli.measure.compare import samples, stats
from bncli.measure.compare.claims import judged
from bncli.measure.compare.plan import point_and_seed
from bncli.measure.compare.samples import ArmRuns, Measure, Point, points_of
from bncli.recipe.batches import common
from bncli.recipe.overrides import value_at
from bncli.results.compare import (
    RATE,
    ArmSummary,
    AtTarget,
    Choice,
    Comparison,
    ComparisonPlan,
    Cost,
    Note,
    Ratio,
    RunRecord,
    TuningCell,
)
from bncli.results.environment import disturbed
from bncli.results.train import RunResult, Target

FEWEST_EVALUATIONS = 10  # within an arm's steps to target; 5 would do for the bias, 10 keep single runs from scattering
COSTS = ("ms_per_step", "samples_per_s", "peak_memory_mib", "cores_lacked")  # of a run, by itself alone
MOVED = 0.05  # by how much every second evaluation may move the ratio before a note says so


def summarise(
    plan: ComparisonPlan,
    records: Sequence[RunRecord],
    planned: int,
    threads: int | None = None,
    remarks: tuple[Note, ...] = (),
) -> Comparison:
    """The result of a comparison, from the runs' records alone.

    With `threads`, costs are taken only from runs with that many threads. `remarks` are added to the notes.
    """
    records = sorted(records, key=lambda record: _place(plan, record))
    shown = _with_costs([_without_other_costs(record, threads) for record in records])
    arms = {name: ArmRuns.of(plan, name, shown) for name in plan.arms}
    rows = [_row(arm, arms[plan.reference]) for arm in arms.values()]
    corrected = stats.holm([row.ratio.p_value if row.ratio else None for row in rows])
    rows = [
        replace(row, ratio=replace(row.ratio, holm_p_value=p_value)) if row.ratio else row
        for row, p_value in zip(rows, corrected, strict=True)
    ]
    comparison = Comparison(
        plan, tuple(rows), (), tuple(records), planned, threads=threads, remarks=remarks, claims=judged(plan, arms)
    )
    return replace(comparison, notes=(*_notes(comparison, arms), *remarks, *_other_threads(records, threads)))


def _place(plan: ComparisonPlan, record: RunRecord) -> tuple[Any, ...]:
    """The plan's order, so that a report does not depend on which run happened to end first."""
    point = [values.index(record.point[path]) for path, values in plan.grid.items() if record.point.get(path) in values]
    phase = ("tune", "report", "rate", "cost").index(record.phase)
    return plan.arms.index(record.arm), phase, point, record.seed, record.point.get(RATE)


def _without_other_costs(record: RunRecord, threads: int | None) -> RunRecord:
    """A run with another number of threads took as many steps, and other seconds and memory."""
    if record.result is None or threads in (None, record.result.environment.threads):
        return record
    unknown: dict[str, Any] = dict.fromkeys(COSTS)
    return replace(record, result=replace(record.result, **unknown))


def _with_costs(records: Sequence[RunRecord]) -> list[RunRecord]:
    """The records; runs that trained together have the costs of the run that was made alone for them."""
    alone = {(one.arm, str(common(one.point))): one.result for one in records if one.phase == "cost" and one.result}
    found = []
    for one in records:
        cost = alone.get((one.arm, str(common(one.point))))
        if cost and one.compared and one.result and one.result.ms_per_step is None:
            one = replace(one, result=replace(one.result, **{name: getattr(cost, name) for name in COSTS}))
        found.append(one)
    return found


def _other_threads(records: Sequence[RunRecord], threads: int | None) -> Iterator[Note]:
    """How many runs' costs are not shown since they had another number of threads."""
    had = {record.key: record.result.environment.threads for record in records if record.result is not None}
    others = [each for each in had.values() if threads not in (None, each)]
    if others:
        yield Note.of("other threads", runs=len(others), of=len(had), had=sorted(set(others)), asked=threads)


# --- rows ---------------------------------------------------------------------------------------------------------


def _row(arm: ArmRuns, reference: ArmRuns) -> ArmSummary:
    plan = arm.plan
    count = samples.steps(plan.target)
    sample, seeds, point = arm.sample(count), arm.seeds(count), arm.best(count) or {}
    at_best = next((results for each, results in arm.results if each == point), {})
    results = [result for seed, result in at_best.items() if seed in seeds]
    if not results:  # nothing was chosen
        point = {path: value for path, value in point.items() if path in plan.fixed.get(arm.name, ())}
    firsts = [result.first_hit for result in results if result.first_hit]
    memory = [result.peak_memory_mib for result in results if result.peak_memory_mib is not None]
    cells = _cells(arm)
    tuned = len(cells) > 1 and bool(arm.kept)
    return ArmSummary(
        arm=arm.name,
        point=point,
        fixed=plan.fixed.get(arm.name, ()),
        at_edge=_at_edge(arm, point) if any(cell.steps for cell in cells) else (),
        hits=sum(result.steps_to_target is not None for result in results),
        runs=len(results),
        steps=stats.typical(sample),
        first_hit=geometric_mean(firsts) if firsts and len(firsts) == len(results) else None,
        ratio=_ratio(arm, reference, count),
        best=_typical([result.best for result in results]),
        samples_per_s=_typical([result.samples_per_s for result in results]),
        ms_per_step=_typical([result.ms_per_step for result in results]),
        peak_memory_mib=max(memory, default=None),
        parameters=results[0].parameters if results else None,
        diverged=sum(result.status == "diverged" and result.steps_to_target is None for result in results),
        failures=tuple(
            f"{point_and_seed(r.point, r.seed)}: {r.failure}" for r in (*arm.records, *arm.searched) if r.failure
        ),
        tuning=cells if len(cells) > 1 else (),
        curve=_curve(results, plan.target.metric),
        choice=Choice(len(cells), len(arm.kept), stats.doubt(sample)) if tuned else None,
        seconds=_cost(arm, reference, samples.seconds),
        examples=_cost(arm, reference, samples.examples),
        also=tuple(_at_target(arm, reference, target) for target in plan.also),
        thinned=_thinned(arm, reference),
        cores_lacked=_typical([result.cores_lacked for result in results]),
    )


def _cells(arm: ArmRuns) -> tuple[TuningCell, ...]:
    tuning = [record for record in arm.records if record.phase == "tune"]
    cells = []
    for point in points_of(tuning):
        found = [record.result for record in tuning if record.point == point and record.result is not None]
        results = [result for result in found if result.status != "given up"]
        stopped_at = max((result.steps_run for result in found if result.status == "given up"), default=None)
        hits = [result.steps_to_target for result in results if result.steps_to_target is not None]
        diverged = sum(result.status == "diverged" for result in results)
        mean = None if not hits else geometric_mean(hits) if min(hits) > 0 else 0.0
        cells.append(TuningCell(point, len(hits), len(results), mean, diverged, point in arm.kept, stopped_at))
    return tuple(cells)


def _typical(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None


def _at_edge(arm: ArmRuns, point: Point) -> tuple[str, ...]:
    """The tuned numeric fields whose best value is the smallest or the largest that was tried, and is not 0."""
    edges = []
    for path, values in arm.plan.grid.items():
        numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
        tuned = path not in arm.plan.fixed.get(arm.name, ()) and numbers and len(values) > 1
        if tuned and path in point and point[path] in (min(values), max(values)) and point[path] != 0:
            edges.append(path)
    return tuple(edges)


def _curve(results: Sequence[RunResult], metric: str) -> tuple[tuple[float, float, float, float], ...]:
    """Median and quartiles of the metric over an arm's runs; a run that has stopped keeps its last value."""
    runs = [result.evaluations for result in results if result.evaluations]
    worst = 0.0 if metric == "accuracy" else math.inf  # a loss that is not finite ranks last
    curve = []
    for step in sorted({evaluation.step for run in runs for evaluation in run}):
        latest = [run[max(0, bisect_right(run, step, key=attrgetter("step")) - 1)].value(metric) for run in runs]
        ordered = sorted(value if math.isfinite(value) else worst for value in latest)
        curve.append((float(step), median(ordered), _quantile(ordered, 0.25), _quantile(ordered, 0.75)))
    return tuple(curve)


def _quantile(ordered: Sequence[float], share: float) -> float:
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


# --- ratios -------------------------------------------------------------------------------------------------------


def _ratio(arm: ArmRuns, reference: ArmRuns, measure: Measure, by: Measure | None = None) -> Ratio | None:
    """As `samples.ratio`; None for the reference itself."""
    return None if arm is reference else samples.ratio(arm, reference, measure, by)


def _cost(arm: ArmRuns, reference: ArmRuns, measure: Measure) -> Cost | None:
    """Seconds or examples to target, at the point with the fewest steps; None where no run tells them."""
    by = samples.steps(arm.plan.target)
    sample = arm.sample(measure, by, best=arm.best(by))
    if sample.hit.shape[1] == 0:
        return None
    return Cost(stats.typical(sample), _ratio(arm, reference, measure, by))


def _at_target(arm: ArmRuns, reference: ArmRuns, target: Target) -> AtTarget:
    count = samples.steps(target)
    sample = arm.sample(count)
    typical, ratio = stats.typical(sample), _ratio(arm, reference, count)
    return AtTarget(target, sample.hits, sample.hit.shape[1], typical, ratio)


def _thinned(arm: ArmRuns, reference: ArmRuns) -> float | None:
    """The ratio at the same points from every second evaluation: the mean of that of the odd and of the even ones."""
    by = samples.steps(arm.plan.target)
    ratios = [_ratio(arm, reference, samples.thinned_steps(first), by) for first in (1, 2)]
    values = [ratio.value for ratio in ratios if ratio and ratio.value and ratio.method != "same recipe"]
    return geometric_mean(values) if len(values) == 2 else None


# --- notes --------------------------------------------------------------------------------------------------------


def _notes(comparison: Comparison, arms: Mapping[str, ArmRuns]) -> Iterator[Note]:
    """Caveats for a reader of the table, the most important first."""
    plan, records = comparison.plan, comparison.runs
    keys = {record.key: record for record in records}
    done = sum(record.result is not None and record.result.status != "interrupted" for record in keys.values())
    failed = sum(record.failure is not None for record in keys.values())
    if done < comparison.planned_runs:
        yield Note.of("unfinished", done=done, planned=comparison.planned_runs, failed=failed)
    yield from _failure_notes(records)
    for row in comparison.arms:
        yield from _row_notes(comparison, row)
    yield from _seed_notes(plan, arms)
    yield from _ratio_notes(comparison, arms)
    # Fields in which arms differ so that a step of one is another amount or kind of work, or so that one stops early.
    for path in (
        "train.batch_size",
        "train.accumulate",
        "train.precision",
        "train.tf32",
        "train.stop_at_target",
        "schedule",
    ):
        found = {
            row.arm: row.point.get(path, value_at(plan.recipes, (row.arm, *path.split(".")))) for row in comparison.arms
        }
        if len({str(value) for value in found.values()}) > 1:
            yield Note.of("arms differ", field=path, values=found)
    if any(row.samples_per_s is not None for row in comparison.arms):
        machines = {(r.result.environment.processor, r.result.environment.device) for r in records if r.result}
        if len(machines) > 1:
            yield Note.of("machines")
        most = max((record.at_a_time or 1 for record in records if record.phase != "rate"), default=1)
        if most > 1:
            yield Note.of("runs at a time", most=most)
    if busy := {row.arm: row.cores_lacked for row in comparison.arms if disturbed(row.cores_lacked)}:
        yield Note.of("disturbed", cores_lacked=busy)
    if any(value_at(recipe, ("norm", "kind")) == "batch" for recipe in plan.recipes.values()):
        yield Note.of("paper")


def _failure_notes(records: Sequence[RunRecord]) -> Iterator[Note]:
    """Each reason of failed runs once: how many there are, and of which arms."""
    for failure in dict.fromkeys(record.failure for record in records if record.failure is not None):
        alike = [record for record in records if record.failure == failure]
        arms, runs = list(dict.fromkeys(record.arm for record in alike)), len({record.key for record in alike})
        run = point_and_seed(alike[0].point, alike[0].seed) if runs == 1 else None
        yield Note.of("failed", failure=failure, runs=runs, arms=arms, run=run)


def _row_notes(comparison: Comparison, row: ArmSummary) -> Iterator[Note]:
    plan = comparison.plan
    if row.runs and row.tuning and not any(cell.hits for cell in row.tuning) and not row.hits:
        yield Note.of("no hit", row.arm, most_steps=plan.most_steps)
    for path in row.at_edge:
        value = row.point[path]
        yield Note.of("at edge", row.arm, field=path, value=value, smallest=value == min(plan.grid[path]))
    coarse = _too_coarse(comparison, row)
    if coarse:
        yield coarse
    if row.diverged:
        yield Note.of("diverged", row.arm, diverged=row.diverged, runs=row.runs)
    ratio = row.ratio.value if row.ratio else None
    if not coarse and row.thinned and ratio and abs(math.log(row.thinned / ratio)) > MOVED:
        yield Note.of("every second evaluation", row.arm, thinned=row.thinned, ratio=ratio)


def _too_coarse(comparison: Comparison, row: ArmSummary) -> Note | None:
    """Whether an arm reached its target before it was evaluated often enough."""
    steps = row.steps.value
    if steps is None:
        return None
    results = comparison.results_of(row)
    at_once = sum(result.steps_to_target == 0 for result in results)
    if at_once:
        return Note.of("held before training", row.arm, at_once=at_once, runs=len(results))
    if steps < FEWEST_EVALUATIONS:
        return Note.of("few steps", row.arm, fewest=FEWEST_EVALUATIONS)
    evaluated = [sum(0 < each.step <= steps for each in result.evaluations) for result in results]
    if median(evaluated) >= FEWEST_EVALUATIONS:
        return None
    every = value_at(comparison.plan.recipes, (row.arm, "train", "evaluate_every"), 1)
    most = None if isinstance(every, dict) else max(1, int(steps / FEWEST_EVALUATIONS))  # None: spaced by doublings
    return Note.of("few evaluations", row.arm, fewest=FEWEST_EVALUATIONS, evaluate_every=most)


def _seed_notes(plan: ComparisonPlan, arms: Mapping[str, ArmRuns]) -> Iterator[Note]:
    seeds = len(plan.tune_seeds) + len(plan.report_seeds)
    if seeds < 5:
        spreads = [stats.log_spread(arm.sample(samples.steps(plan.target))) for arm in arms.values()]
        needed = max((stats.seeds_needed(spread, 1.5) for spread in spreads if spread is not None), default=0)
        yield Note.of("few seeds", seeds=seeds, ratio=1.5, needed=needed if needed > seeds else None)


def _ratio_notes(comparison: Comparison, arms: Mapping[str, ArmRuns]) -> Iterator[Note]:
    plan, reference = comparison.plan, arms[comparison.plan.reference]
    count = samples.steps(plan.target)
    ratios = {row.arm: row.ratio for row in comparison.arms if row.ratio and row.runs}
    same = [name for name, ratio in ratios.items() if ratio.method == "same recipe"]
    if same:
        yield Note.of("same recipe", arms=same, reference=plan.reference)
    measured = {name: ratio for name, ratio in ratios.items() if ratio.method != "same recipe"}
    unsure = [
        name
        for name, ratio in measured.items()
        if ratio.interval != stats.OPEN and (ratio.interval.low or 0) <= 1 <= (ratio.interval.high or math.inf)
    ]
    if unsure:
        yield Note.of("not told apart", arms=unsure, reference=plan.reference, comparisons=len(plan.arms) - 1)
    for name, ratio in measured.items():
        of_arm, of_reference = arms[name].seeds(count), reference.seeds(count)
        common = of_arm & of_reference
        if of_arm != of_reference and (ratio.value is not None or ratio.interval != stats.OPEN):
            yield Note.of("common seeds", name, seeds=len(common), reference=plan.reference)
        if ratio.method in ("means", "medians", "bound") and ratio.interval == stats.OPEN:
            needed = stats.FEWEST_WITH_A_MISS if ratio.method != "means" else 2
            yield Note.of("no interval", name, seeds=len(common), needed=needed, missed=ratio.method != "means")
        if ratio.method == "hits" and ratio.p_value is not None and ratio.p_value < 1:
            hits, reference_hits = (
                side.sample(count, None, common, side.best(count)).hits for side in (arms[name], reference)
            )
            found = {"hits": hits, "reference_hits": reference_hits, "runs": len(common)}
            yield Note.of("hits", name, **found, reference=plan.reference, p_value=ratio.p_value)
