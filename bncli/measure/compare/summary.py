"""The answer of a comparison from its runs' records: a row an arm, ratios to the reference, and notes. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import geometric_mean, median
from typing import Any

from bncli.measure.compare import samples, stats
from bncli.measure.compare.plan import point_and_seed
from bncli.measure.compare.samples import Measure, Runs, ended, kept_points, points_of
from bncli.results.compare import (
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
from bncli.results.environment import Interval
from bncli.results.train import RunResult, Target

FEWEST_EVALUATIONS = 10  # within an arm's steps to target; 5 would do for the bias, 10 keep single runs from scattering
MOVED = 0.05  # by how much every second evaluation may move the ratio before a note says so


@dataclass(frozen=True)
class _Arm:
    """One arm's records, and its ended runs at the points that it kept."""

    name: str
    records: Sequence[RunRecord]
    kept: Sequence[samples.Point]
    runs: Runs

    @staticmethod
    def of(plan: ComparisonPlan, name: str, records: Sequence[RunRecord]) -> _Arm:
        mine = [record for record in records if record.arm == name]
        tuning = [record for record in mine if record.phase == "tune"]
        if plan.tune_seeds:
            whole = len(tuning) == _points(plan, name) * len(plan.tune_seeds)
            kept = kept_points(plan, tuning) if whole else []
        else:
            kept = points_of(mine)
        return _Arm(name, mine, kept, Runs.of([record for record in mine if record.point in kept], kept))

    def best(self, measure: Measure) -> samples.Point | None:
        """The best of the points kept; None before the tuning is complete, or where no run ended."""
        sample = self.runs.sample(measure)
        if sample.hit.shape[1]:
            return self.runs.points[sample.best]
        return self.kept[0] if self.kept else None


def summarise(
    plan: ComparisonPlan,
    records: Sequence[RunRecord],
    planned: int,
    threads: int | None = None,
    remarks: tuple[Note, ...] = (),
) -> Comparison:
    """The whole answer from the runs' records alone.

    With `threads`, what runs cost is taken from those that had as many. `remarks` are added to the notes.
    """
    records = sorted(records, key=lambda record: _place(plan, record))
    shown = [_without_other_costs(record, threads) for record in records]
    arms = {name: _Arm.of(plan, name, shown) for name in plan.arms}
    reference = arms[plan.reference]
    summaries = [_row(plan, arm, reference) for arm in arms.values()]
    corrected = stats.holm([arm.ratio.p_value if arm.ratio else None for arm in summaries])
    summaries = [
        replace(arm, ratio=replace(arm.ratio, holm_p_value=p_value)) if arm.ratio else arm
        for arm, p_value in zip(summaries, corrected, strict=True)
    ]
    comparison = Comparison(plan, tuple(summaries), (), tuple(records), planned, threads=threads, remarks=remarks)
    return replace(comparison, notes=(*_notes(comparison, arms), *remarks, *_other_threads(records, threads)))


def _without_other_costs(record: RunRecord, threads: int | None) -> RunRecord:
    """A run with another number of threads took as many steps, and other seconds and memory."""
    if record.result is None or threads in (None, record.result.environment.threads):
        return record
    result = replace(record.result, ms_per_step=None, samples_per_s=None, peak_memory_mib=None)
    return replace(record, result=result)


def _other_threads(records: Sequence[RunRecord], threads: int | None) -> Iterator[Note]:
    """Whose cost is not shown since they had another number of threads."""
    found = {record.key: record.result.environment.threads for record in records if record.result is not None}
    others = [each for each in found.values() if threads not in (None, each)]
    if others:
        yield Note.of("other threads", runs=len(others), of=len(found), had=sorted(set(others)), asked=threads)


def _place(plan: ComparisonPlan, record: RunRecord) -> tuple[Any, ...]:
    """The plan's order, so that a report does not depend on which run happened to end first."""
    point = [values.index(record.point[path]) for path, values in plan.grid.items() if record.point.get(path) in values]
    return plan.arms.index(record.arm), record.phase != "tune", point, record.seed


def _points(plan: ComparisonPlan, arm: str) -> int:
    """How many points of the grid an arm has."""
    return math.prod(len(values) for path, values in plan.grid.items() if path not in plan.fixed.get(arm, ()))


def _row(plan: ComparisonPlan, arm: _Arm, reference: _Arm) -> ArmSummary:
    count = samples.steps(plan, plan.target)
    sample, point, seeds = arm.runs.sample(count), arm.best(count) or {}, arm.runs.seeds(count)
    mine = [record for record in ended(arm.records) if record.point == point and record.seed in seeds]
    results = [record.result for record in mine if record.result is not None]
    firsts = [result.first_hit for result in results if result.first_hit]
    memory = [result.peak_memory_mib for result in results if result.peak_memory_mib is not None]
    cells = _cells(plan, arm)
    tuned = len(cells) > 1 and bool(arm.kept)
    return ArmSummary(
        arm=arm.name,
        point=point,
        fixed=plan.fixed.get(arm.name, ()),
        at_edge=_at_edge(plan, arm.name, point) if any(cell.steps for cell in cells) else (),
        hits=sum(result.steps_to_target is not None for result in results),
        runs=len(results),
        steps=stats.typical(sample),
        first_hit=geometric_mean(firsts) if firsts and len(firsts) == len(results) else None,
        ratio=_ratio(plan, arm, reference, count),
        best=_typical([result.best for result in results]),
        samples_per_s=_typical([result.samples_per_s for result in results]),
        ms_per_step=_typical([result.ms_per_step for result in results]),
        peak_memory_mib=max(memory, default=None),
        parameters=results[0].parameters if results else None,
        diverged=sum(result.status == "diverged" and result.steps_to_target is None for result in results),
        failures=tuple(f"{point_and_seed(r.point, r.seed)}: {r.failure}" for r in arm.records if r.failure),
        tuning=cells if len(cells) > 1 else (),
        curve=_curve(plan, results),
        choice=Choice(len(cells), len(arm.kept), stats.doubt(sample)) if tuned else None,
        seconds=_cost(plan, arm, reference, lambda name: samples.seconds(plan)),
        examples=_cost(plan, arm, reference, lambda name: samples.examples(plan, name)),
        also=tuple(_at_target(plan, arm, reference, target) for target in plan.also),
        thinned=_thinned(plan, arm, reference),
    )


def _cells(plan: ComparisonPlan, arm: _Arm) -> tuple[TuningCell, ...]:
    tuning = [record for record in arm.records if record.phase == "tune"]
    return tuple(
        _cell(point, [r for r in tuning if r.point == point], point in arm.kept) for point in points_of(tuning)
    )


def _cell(point: samples.Point, records: Sequence[RunRecord], kept: bool) -> TuningCell:
    results = [record.result for record in records if record.result is not None]
    hits = [result.steps_to_target for result in results if result.steps_to_target is not None]
    diverged = sum(result.status == "diverged" for result in results)
    mean = None if not hits else geometric_mean(hits) if min(hits) > 0 else 0.0
    return TuningCell(point, len(hits), len(results), mean, diverged, kept)


def _typical(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None


def _at_edge(plan: ComparisonPlan, arm: str, point: Mapping[str, Any]) -> tuple[str, ...]:
    """The tuned numeric fields whose best value is the smallest or the largest that was tried, and is not 0."""
    edges = []
    for path, values in plan.grid.items():
        numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
        tuned = path not in plan.fixed.get(arm, ()) and numbers and len(values) > 1
        if tuned and path in point and point[path] in (min(values), max(values)) and point[path] != 0:
            edges.append(path)
    return tuple(edges)


def _curve(plan: ComparisonPlan, results: Sequence[RunResult]) -> tuple[tuple[float, float, float, float], ...]:
    """Median and quartiles of the metric over an arm's runs; a run that has stopped keeps its last value."""
    runs = [result.evaluations for result in results if result.evaluations]
    steps = sorted({evaluation.step for run in runs for evaluation in run})
    worst = 0.0 if plan.target.metric == "accuracy" else math.inf  # a loss that is not finite ranks last
    curve = []
    position = [0] * len(runs)
    for step in steps:
        values = []
        for index, run in enumerate(runs):
            while position[index] + 1 < len(run) and run[position[index] + 1].step <= step:
                position[index] += 1
            value = run[position[index]].value(plan.target.metric)
            values.append(value if math.isfinite(value) else worst)
        ordered = sorted(values)
        curve.append((float(step), median(ordered), _quantile(ordered, 0.25), _quantile(ordered, 0.75)))
    return tuple(curve)


def _quantile(ordered: Sequence[float], share: float) -> float:
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


# --- ratios -------------------------------------------------------------------------------------------------------


def _ratio(
    plan: ComparisonPlan,
    arm: _Arm,
    reference: _Arm,
    measure: Measure,
    of_reference: Measure | None = None,
    by: Measure | None = None,
) -> Ratio | None:
    """How many times fewer than the reference; None for the reference itself.

    Over the seeds that both have, at the points that are best over each one's own.
    """
    if arm is reference:
        return None
    if _same_recipe(plan, arm.name):
        return Ratio(1.0, Interval(1.0, 1.0), "same recipe", None)
    sides = ((reference, of_reference or measure), (arm, measure))
    seeds = frozenset.intersection(*(side.runs.seeds(each) for side, each in sides))
    one, other = (side.runs.sample(each, by, seeds, side.best(by or each)) for side, each in sides)
    return stats.ratio(one, other)


def _same_recipe(plan: ComparisonPlan, arm: str) -> bool:
    """Whether an arm is the reference under another name: it then shares the reference's runs."""
    same_values = arm in plan.recipes and plan.recipes[arm] == plan.recipes.get(plan.reference)
    return same_values and plan.fixed.get(arm, ()) == plan.fixed.get(plan.reference, ())


def _cost(plan: ComparisonPlan, arm: _Arm, reference: _Arm, measure: Any) -> Cost | None:
    """Seconds or examples to target, at the point with the fewest steps; None where no run tells them."""
    by = samples.steps(plan, plan.target)
    sample = arm.runs.sample(measure(arm.name), by, best=arm.best(by))
    if sample.hit.shape[1] == 0:
        return None
    ratio = _ratio(plan, arm, reference, measure(arm.name), measure(reference.name), by)
    return Cost(stats.typical(sample), ratio)


def _at_target(plan: ComparisonPlan, arm: _Arm, reference: _Arm, target: Target) -> AtTarget:
    count = samples.steps(plan, target)
    sample = arm.runs.sample(count)
    runs = sample.hit.shape[1]
    hits = int(sample.hit[sample.best].sum()) if runs else 0
    return AtTarget(target, hits, runs, stats.typical(sample), _ratio(plan, arm, reference, count))


def _thinned(plan: ComparisonPlan, arm: _Arm, reference: _Arm) -> float | None:
    """The ratio at the same points from every second evaluation: the mean of that of the odd and of the even ones."""
    by = samples.steps(plan, plan.target)
    found = [_ratio(plan, arm, reference, samples.thinned_steps(plan, first), by=by) for first in (1, 2)]
    values = [ratio.value for ratio in found if ratio and ratio.value and ratio.method != "same recipe"]
    return geometric_mean(values) if len(values) == 2 else None


# --- notes --------------------------------------------------------------------------------------------------------


def _notes(comparison: Comparison, arms: Mapping[str, _Arm]) -> Iterator[Note]:
    """What a reader must know before quoting the table, the most important first."""
    plan, records = comparison.plan, comparison.runs
    keys = {record.key: record for record in records}
    done = sum(record.result is not None and record.result.status != "interrupted" for record in keys.values())
    failed = sum(record.failure is not None for record in keys.values())
    if done < comparison.planned_runs:
        yield Note.of("unfinished", done=done, planned=comparison.planned_runs, failed=failed)
    for arm in comparison.arms:
        yield from _arm_notes(comparison, arm)
    yield from _seed_notes(plan, arms)
    yield from _ratio_notes(comparison, arms)
    yield from _unlike_notes(comparison)
    if any(arm.samples_per_s is not None for arm in comparison.arms):
        yield from _disturbance(records)
    if any(recipe.get("norm", {}).get("kind") == "batch" for recipe in plan.recipes.values()):
        yield Note.of("paper")


def _arm_notes(comparison: Comparison, arm: ArmSummary) -> Iterator[Note]:
    plan = comparison.plan
    if arm.runs and arm.tuning and not any(cell.hits for cell in arm.tuning) and not arm.hits:
        yield Note.of("no hit", arm.arm, most_steps=plan.most_steps)
    for path in arm.at_edge:
        value = arm.point[path]
        yield Note.of("at edge", arm.arm, field=path, value=value, smallest=value == min(plan.grid[path]))
    coarse = _too_coarse(comparison, arm)
    if coarse:
        yield coarse
    yield from (Note.of("failed", arm.arm, failure=failure) for failure in dict.fromkeys(arm.failures))
    if arm.diverged:
        yield Note.of("diverged", arm.arm, diverged=arm.diverged, runs=arm.runs)
    ratio = arm.ratio.value if arm.ratio else None
    if not coarse and arm.thinned and ratio and abs(math.log(arm.thinned / ratio)) > MOVED:
        yield Note.of("every second evaluation", arm.arm, thinned=arm.thinned, ratio=ratio)


def _too_coarse(comparison: Comparison, arm: ArmSummary) -> Note | None:
    """Whether an arm reached its target before it was evaluated often enough."""
    steps = arm.steps.value
    if steps is None:
        return None
    results = comparison.results_of(arm)
    at_once = sum(result.steps_to_target == 0 for result in results)
    if at_once:
        return Note.of("held before training", arm.arm, at_once=at_once, runs=len(results))
    if steps < FEWEST_EVALUATIONS:
        return Note.of("few steps", arm.arm, fewest=FEWEST_EVALUATIONS)
    evaluated = [sum(0 < each.step <= steps for each in result.evaluations) for result in results]
    if median(evaluated) >= FEWEST_EVALUATIONS:
        return None
    every = comparison.plan.recipes.get(arm.arm, {}).get("train", {}).get("evaluate_every", 1)
    most = None if isinstance(every, dict) else max(1, int(steps / FEWEST_EVALUATIONS))  # None: spaced by doublings
    return Note.of("few evaluations", arm.arm, fewest=FEWEST_EVALUATIONS, evaluate_every=most)


def _seed_notes(plan: ComparisonPlan, arms: Mapping[str, _Arm]) -> Iterator[Note]:
    seeds = len(plan.tune_seeds) + len(plan.report_seeds)
    if seeds < 5:
        found = [stats.log_spread(arm.runs.sample(samples.steps(plan, plan.target))) for arm in arms.values()]
        needed = max((stats.seeds_needed(spread, 1.5) for spread in found if spread is not None), default=0)
        yield Note.of("few seeds", seeds=seeds, ratio=1.5, needed=needed if needed > seeds else None)


def _ratio_notes(comparison: Comparison, arms: Mapping[str, _Arm]) -> Iterator[Note]:
    plan, reference = comparison.plan, arms[comparison.plan.reference]
    count = samples.steps(plan, plan.target)
    ratios = {arm.arm: arm.ratio for arm in comparison.arms if arm.ratio and arm.runs}
    same = [name for name, ratio in ratios.items() if ratio.method == "same recipe"]
    if same:
        yield Note.of("same recipe", arms=same, reference=plan.reference)
    measured = {name: ratio for name, ratio in ratios.items() if ratio.method != "same recipe"}
    bounded = {name: ratio for name, ratio in measured.items() if ratio.interval != stats.OPEN}
    unsure = [name for name, ratio in bounded.items() if not _tells_apart(ratio)]
    if unsure:
        yield Note.of("not told apart", arms=unsure, reference=plan.reference, comparisons=len(plan.arms) - 1)
    for name, ratio in measured.items():
        seeds = arms[name].runs.seeds(count), reference.runs.seeds(count)
        common = seeds[0] & seeds[1]
        if seeds[0] != common or seeds[1] != common:
            yield Note.of("common seeds", name, seeds=len(common), reference=plan.reference)
        if ratio.method in ("means", "medians", "bound") and ratio.interval == stats.OPEN:
            needed = stats.FEWEST_WITH_A_MISS if ratio.method != "means" else 2
            yield Note.of("no interval", name, seeds=len(common), needed=needed, missed=ratio.method != "means")
        if ratio.method == "hits" and ratio.p_value is not None and ratio.p_value < 1:
            both = [side.runs.sample(count, None, common, side.best(count)) for side in (arms[name], reference)]
            mine, its = (int(sample.hit[sample.best].sum()) for sample in both)
            hits = {"hits": mine, "reference_hits": its, "runs": len(common)}
            yield Note.of("hits", name, **hits, reference=plan.reference, p_value=ratio.p_value)


def _tells_apart(ratio: Ratio) -> bool:
    low, high = ratio.interval.low, ratio.interval.high
    return (low is not None and low > 1) or (high is not None and high < 1)


def _unlike_notes(comparison: Comparison) -> Iterator[Note]:
    """Fields in which arms differ so that a step of one is another amount of work, or another kind."""
    recipes = comparison.plan.recipes
    for path in ("train.batch_size", "train.precision", "train.tf32", "schedule"):
        found = {arm.arm: arm.point.get(path, _value(recipes.get(arm.arm, {}), path)) for arm in comparison.arms}
        if len({str(value) for value in found.values()}) > 1:
            yield Note.of("arms differ", field=path, values=found)


def _value(recipe: Mapping[str, Any], path: str) -> Any:
    value: Any = recipe
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _disturbance(records: Sequence[RunRecord]) -> Iterator[Note]:
    """What to know of seconds and samples/s."""
    machines = {(r.result.environment.processor, r.result.environment.device) for r in records if r.result}
    if len(machines) > 1:
        yield Note.of("machines")
    most = max((record.at_a_time or 1 for record in records), default=1)
    if most > 1:
        yield Note.of("runs at a time", most=most)
