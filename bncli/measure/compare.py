"""Arms x grid x seeds -> "how many times fewer steps?". Pure: plans runs and reads their records, no torch.

Every arm gets the same grid and the same seeds. The best point of the grid is chosen on the tuning seeds, and the
figures come from fresh ones, because the best of several single runs flatters (by 8 to 17 % at a spread of 10 %).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

from bncli.errors import RecipeError
from bncli.recipe.architecture import input_of, shape_contradictions
from bncli.recipe.file import Arm, Loaded, digest, outside, plain, with_values
from bncli.recipe.sections import Digits, Npz, Recipe, TargetSection
from bncli.results import ArmSummary, Comparison, ComparisonPlan, Phase, RunRecord, Target, TuningCell

MOST_RUNS = 20_000  # each is planned in memory; a longer list of values is a slip, or several comparisons
FEWEST_EVALUATIONS = 10  # within an arm's steps to target; with fewer a ratio of 14 is read as 12.3 to 13.4


@dataclass(frozen=True)
class Job:
    """One run to be done: its key, what it is for, and its resolved recipe."""

    key: str
    arm: str
    point: dict[str, Any]
    seed: int
    phase: Phase
    recipe: Recipe

    @property
    def label(self) -> str:
        values = ", ".join(f"{path.rsplit('.', 1)[-1]} {_short(value)}" for path, value in self.point.items())
        return ", ".join(part for part in (self.arm, values, f"seed {self.seed}") if part)


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, int | float) else str(value)


@dataclass(frozen=True)
class Study:
    """A comparison's plan with the recipes that it is made of, and what else a run's key depends on."""

    plan: ComparisonPlan
    arms: tuple[Arm, ...]
    identity: dict[str, str]  # versions and device: a change of these makes every run a new one
    _jobs: dict[str, Job] = field(default_factory=dict, repr=False, compare=False)  # made once: checking takes time
    _outside: dict[str, dict[str, Any]] = field(default_factory=dict, repr=False, compare=False)  # arm -> files, code

    def jobs(self, arm: Arm, phase: Phase, points: Sequence[dict[str, Any]]) -> list[Job]:
        seeds = self.plan.tune_seeds if phase == "tune" else self.plan.report_seeds
        return [self._job(arm, point, seed, phase) for point in points for seed in seeds]

    def _job(self, arm: Arm, point: dict[str, Any], seed: int, phase: Phase) -> Job:
        name = f"{arm.name} {point} {seed} {phase}"
        if name not in self._jobs:
            recipe = with_values(arm.recipe, {**point, "train.seed": seed})
            if arm.name not in self._outside:
                self._outside[arm.name] = outside(arm.recipe)
            key = digest({"recipe": plain(recipe), **self.identity, **self._outside[arm.name]})
            self._jobs[name] = Job(key, arm.name, point, seed, phase, recipe)
        return self._jobs[name]

    def points(self, arm: Arm) -> list[dict[str, Any]]:
        """The grid's points for an arm; a field that the arm fixes keeps its value."""
        free = {path: values for path, values in self.plan.grid.items() if path not in arm.fixed}
        fixed = {path: _field(arm.recipe, path) for path in arm.fixed}
        return [{**dict(zip(free, values, strict=True)), **fixed} for values in itertools.product(*free.values())]


def study(recipes: Sequence[Loaded], identity: Mapping[str, str] | None = None) -> Study:
    """The study that one or more recipes ask for. Raises RecipeError for recipes that cannot be compared."""
    first = recipes[0]
    arms = [replace(arm, name=name) for name, arm in _named_arms(recipes)]
    _refuse_unlike(recipes, arms)
    target = arms[0].recipe.train.target
    assert target is not None
    seeds, base = first.file.seeds, first.base.train.seed
    tuned = any(len(values) > 1 for values in first.file.grid.values())
    tune = seeds.tune if tuned else 0
    names = [arm.name for arm in first.arms] or [first.name]  # as the file has them, before any clash
    points = math.prod(len(values) for values in first.file.grid.values())
    if (runs := len(arms) * (points * tune + seeds.report)) > MOST_RUNS:
        raise RecipeError(
            f"{first.source}: {len(arms)} arms at {points:,} points of the grid make {runs:,} runs; "
            f"a comparison has at most {MOST_RUNS:,}: shorten the lists of grid"
        )
    reference = arms[names.index(first.reference)].name
    plan = ComparisonPlan(
        name=first.name,
        arms=tuple(arm.name for arm in arms),
        fixed={arm.name: arm.fixed for arm in arms},
        grid={path: tuple(values) for path, values in first.file.grid.items()},
        reference=reference,
        tune_seeds=tuple(range(base, base + tune)),
        report_seeds=tuple(range(base + tune, base + tune + seeds.report)),
        target=Target(target.metric, target.value),
        budget=first.base.train.steps,
        evaluate_every=first.base.train.evaluate_every,
        data=describe_data(first.base),
        recipes={arm.name: plain(arm.recipe) for arm in arms},
    )
    return Study(plan, tuple(arms), dict(identity or {}))


def describe_data(recipe: Recipe) -> str:
    """What the runs are trained on, for titles."""
    data = recipe.data
    if isinstance(data, Digits):
        return "scikit-learn's digits"
    name = getattr(data, "name", getattr(data, "path", None))
    return f"{data.source} {name}" if name else f"{data.source} data"


def _named_arms(recipes: Sequence[Loaded]) -> list[tuple[str, Arm]]:
    """Every recipe's arms; a recipe without arms is one arm of its own name. A name that clashes gets its file's."""
    arms = [(loaded, arm) for loaded in recipes for arm in (loaded.arms or (Arm(loaded.name, loaded.base),))]
    names = [arm.name for _, arm in arms]
    return [(arm.name if names.count(arm.name) == 1 else f"{loaded.name} {arm.name}", arm) for loaded, arm in arms]


def _refuse_unlike(recipes: Sequence[Loaded], arms: Sequence[Arm]) -> None:
    first = recipes[0]
    if len(arms) < 2:
        raise RecipeError(
            f"{first.source}: has {'one arm' if first.arms else 'no arms'}; a comparison needs two: "
            "add one under arms, or name another recipe"
        )
    names = [arm.name for arm in arms]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise RecipeError(
            f"two recipes have the same name and arm: {', '.join(sorted(twice))}; rename a file or an arm"
        )
    wrong = []
    for loaded in recipes[1:]:
        for part in ("grid", "seeds"):
            if getattr(loaded.file, part) != getattr(first.file, part):
                wrong.append(f"{loaded.source}: {part} differs from {first.source}'s; every arm gets the same {part}")
    alike = ("data", "train.target", "train.steps", "train.evaluate_every", "train.stop_at_target", "train.seed")
    for arm in arms:
        for path in alike:
            if _field(arm.recipe, path) != _field(arms[0].recipe, path):
                wrong.append(f"arm {arm.name}: {path} differs from arm {arms[0].name}'s; steps would not be comparable")
        if isinstance(arm.recipe.data, Npz):  # what only the file can tell; the rest was checked with the recipe
            found = shape_contradictions(arm.recipe, *input_of(arm.recipe))
            wrong += [f"arm {arm.name}: {'.'.join(keys)}: {text}" for keys, text in found]
    if not isinstance(arms[0].recipe.train.target, TargetSection):
        wrong.append(f"{first.source}: train.target is missing; a comparison counts the steps to it")
    if wrong:
        raise RecipeError(*wrong)


def _field(recipe: Recipe, path: str) -> Any:
    value: Any = plain(recipe)
    for key in path.split("."):
        value = value[key]
    return value


# --- what is to be done -------------------------------------------------------------------------------------------


def planned_runs(study: Study) -> int:
    """How many runs the comparison rests on in all."""
    tuned = [len(study.points(arm)) for arm in study.arms]
    tune = sum(points for points in tuned if points > 1) * len(study.plan.tune_seeds)
    return tune + len(study.arms) * len(study.plan.report_seeds)


def wanted(study: Study, records: Mapping[str, RunRecord]) -> list[Job]:
    """The runs that can be named now, done or not: all tuning runs, and an arm's report runs once it is tuned."""
    tuning, report = [], []
    for arm in study.arms:
        points = study.points(arm)
        jobs = study.jobs(arm, "tune", points) if len(points) > 1 else []
        tuning += jobs
        if all(job.key in records for job in jobs):
            best = points[0] if len(points) == 1 else best_point(study.plan, _records(jobs, records))
            report += study.jobs(arm, "report", [best])
    return report + tuning


def collect(study: Study, records: Mapping[str, RunRecord]) -> list[RunRecord]:
    """The records of this study's runs, each under its own arm, point, seed and phase."""
    return _records(wanted(study, records), records)


def _records(jobs: Sequence[Job], records: Mapping[str, RunRecord]) -> list[RunRecord]:
    found = [(job, records[job.key]) for job in jobs if job.key in records]
    return [replace(r, arm=job.arm, point=job.point, seed=job.seed, phase=job.phase) for job, r in found]


# --- what was found -----------------------------------------------------------------------------------------------


def best_point(plan: ComparisonPlan, tuning: Sequence[RunRecord]) -> dict[str, Any]:
    """The grid's best point for one arm: most hits, then fewest steps (geometric mean), then best median metric."""

    def order(point: dict[str, Any]) -> tuple[float, float, float]:
        runs = [record for record in tuning if record.point == point]
        cell = _cell(point, runs)
        bests = [record.result.best for record in runs if record.result and record.result.best is not None]
        typical = median(bests) if bests else -math.inf
        return (
            -cell.hits,
            math.inf if cell.steps is None else cell.steps,
            -typical if plan.target.metric == "accuracy" else typical,
        )

    return min(_points(tuning), key=order)


def _points(records: Sequence[RunRecord]) -> list[dict[str, Any]]:
    points: list[dict[str, Any]] = []
    for record in records:
        if record.point not in points:
            points.append(record.point)
    return points


def _cell(point: dict[str, Any], records: Sequence[RunRecord]) -> TuningCell:
    results = [record.result for record in records if record.result is not None]
    hits = [result.steps_to_target for result in results if result.steps_to_target is not None]
    steps = (math.exp(math.fsum(map(math.log, hits)) / len(hits)) if min(hits) > 0 else 0.0) if hits else None
    diverged = sum(result.status == "diverged" for result in results)
    return TuningCell(point, len(hits), len(results), steps, diverged)


def summarise(plan: ComparisonPlan, records: Sequence[RunRecord], planned: int) -> Comparison:
    """The whole answer from the runs' records alone."""
    from bncli.measure import statistics  # imports scipy: not before something is to be summed up

    records = sorted(records, key=lambda record: _place(plan, record))
    steps = {arm: [r.result.steps_to_target for r in _ended(records, arm)] for arm in plan.arms}  # type: ignore[union-attr]
    ratios = {
        arm: statistics.ratio(steps[plan.reference], steps[arm], plan.budget, plan.budget)
        for arm in plan.arms
        if arm != plan.reference
    }
    for arm, holm in zip(ratios, statistics.holm([ratio.p_value for ratio in ratios.values()]), strict=True):
        ratios[arm] = replace(ratios[arm], holm_p_value=holm)
    summaries = tuple(
        replace(
            _arm_summary(plan, arm, [record for record in records if record.arm == arm]),
            steps=statistics.geometric_mean_steps(steps[arm], plan.budget),
            ratio=ratios.get(arm),
        )
        for arm in plan.arms
    )
    notes = tuple(_notes(plan, summaries, records, planned, steps))
    return Comparison(plan, summaries, notes, tuple(records), planned)


def _place(plan: ComparisonPlan, record: RunRecord) -> tuple[Any, ...]:
    """The plan's order, so that a report does not depend on which run happened to end first."""
    point = [values.index(record.point[path]) for path, values in plan.grid.items() if record.point.get(path) in values]
    return plan.arms.index(record.arm), record.phase != "tune", point, record.seed


def _ended(records: Sequence[RunRecord], arm: str) -> list[RunRecord]:
    """An arm's report runs that ended by themselves: at the target, at the budget, or by diverging."""
    mine = [record for record in records if record.arm == arm and record.phase == "report"]
    return [record for record in mine if record.result is not None and record.result.status != "interrupted"]


def _arm_summary(plan: ComparisonPlan, arm: str, records: Sequence[RunRecord]) -> ArmSummary:
    from bncli.measure import statistics

    tuning = [record for record in records if record.phase == "tune"]
    results = [record.result for record in _ended(records, arm) if record.result is not None]
    report = [record for record in records if record.phase == "report"]
    point = report[0].point if report else {}  # none is chosen before the tuning is complete
    cells = tuple(_cell(one, [r for r in tuning if r.point == one]) for one in _points(tuning))
    firsts = [result.first_hit for result in results if result.first_hit]

    def typical(values: Sequence[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return median(known) if known else None

    memory = [result.peak_memory_mib for result in results if result.peak_memory_mib is not None]
    return ArmSummary(
        arm=arm,
        point=point,
        fixed=plan.fixed.get(arm, ()),
        at_edge=_at_edge(plan, arm, point) if any(cell.hits for cell in cells) else (),
        hits=sum(result.steps_to_target is not None for result in results),
        runs=len(results),
        steps=statistics.geometric_mean_steps([], plan.budget),
        first_hit=math.exp(math.fsum(map(math.log, firsts)) / len(firsts))
        if firsts and len(firsts) == len(results)
        else None,
        ratio=None,
        best=typical([result.best for result in results]),
        samples_per_s=typical([result.samples_per_s for result in results]),
        ms_per_step=typical([result.ms_per_step for result in results]),
        peak_memory_mib=max(memory, default=None),
        parameters=results[0].parameters if results else None,
        diverged=sum(result.status == "diverged" and result.steps_to_target is None for result in results),
        failures=tuple(f"seed {record.seed}: {record.failure}" for record in records if record.failure),
        tuning=cells,
        curve=_curve(plan, report),
    )


def _at_edge(plan: ComparisonPlan, arm: str, point: Mapping[str, Any]) -> tuple[str, ...]:
    """The tuned numeric fields whose best value is the smallest or the largest that was tried."""
    edges = []
    for path, values in plan.grid.items():
        numbers = all(isinstance(value, int | float) for value in values)
        tuned = path not in plan.fixed.get(arm, ()) and numbers and len(values) > 1
        if tuned and path in point and point[path] in (min(values), max(values)):
            edges.append(path)
    return tuple(edges)


def _curve(plan: ComparisonPlan, records: Sequence[RunRecord]) -> tuple[tuple[float, float, float, float], ...]:
    """Median and quartiles of the metric over the report's runs; a run that has stopped keeps its last value."""
    runs = [record.result.evaluations for record in records if record.result and record.result.evaluations]
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


def _notes(
    plan: ComparisonPlan,
    arms: Sequence[ArmSummary],
    records: Sequence[RunRecord],
    planned: int,
    steps: Mapping[str, Sequence[float | None]],
) -> list[str]:
    """What a reader must know before quoting the table, the most important first."""
    from bncli.measure import statistics

    notes = []
    done = sum(record.result is not None and record.result.status != "interrupted" for record in records)
    failed = sum(record.failure is not None for record in records)
    if done < planned:
        notes.append(
            f"{done} of {planned} runs are done{f', {failed} failed' if failed else ''}; the figures rest on those"
        )
    for arm in arms:
        if arm.tuning and not any(cell.hits for cell in arm.tuning):
            notes.append(f"{arm.arm}: no value of the grid reached the target in {plan.budget:,} steps")
        for path in arm.at_edge:
            wider = "smaller" if arm.point[path] == min(plan.grid[path]) else "larger"
            notes.append(
                f"{arm.arm}: the best {path}, {_short(arm.point[path])}, is at the edge of the grid; add {wider} values"
            )
        if arm.steps.value is not None and arm.steps.value < FEWEST_EVALUATIONS * plan.evaluate_every:
            notes.append(f"{arm.arm}: {_too_coarse(arm.steps.value, plan.evaluate_every)}")
        notes += [f"{arm.arm}: failed: {failure}" for failure in arm.failures]
        if arm.diverged:
            notes.append(f"{arm.arm}: {arm.diverged} of {arm.runs} runs diverged and count as misses")
    spreads = [spread for arm in plan.arms if (spread := statistics.log_spread(steps[arm])) is not None]
    seeds = len(plan.report_seeds)
    if seeds < 5:
        needed = max((statistics.seeds_needed(spread, 1.5) for spread in spreads), default=0)
        more = f": at the spread seen here a ratio of 1.5 needs {needed}" if needed > seeds else ""
        notes.append(f"{seeds} seed{'s' * (seeds > 1)} an arm {'are' if seeds > 1 else 'is'} few{more}")
    unsure = [
        arm.arm for arm in arms if arm.ratio and arm.ratio.holm_p_value is not None and arm.ratio.holm_p_value > 0.05
    ]
    if unsure:
        compared = len(arms) - 1
        corrected = (
            f" once corrected for {compared} comparisons (Holm), as the intervals are not" if compared > 1 else ""
        )
        notes.append(f"not told apart from {plan.reference} at 5 %{corrected}: {', '.join(unsure)}")
    machines = {(r.result.environment.processor, r.result.environment.device) for r in records if r.result}
    if len(machines) > 1:
        notes.append("the runs come from different machines: compare their steps, not their samples/s")
    if any(recipe.get("norm", {}).get("kind") == "batch" for recipe in plan.recipes.values()):
        notes.append(
            "these are this task's figures; the paper's 14x is BN-x5 on ImageNet with seven changes, "
            "batch norm alone gave 2.33x there"
        )
    return notes


def _too_coarse(steps: float, evaluate_every: int) -> str:
    """What to do about an arm that reached its target before it was evaluated often enough."""
    if steps == 0:
        return "it has reached the target before the first step; choose a harder one"
    if evaluate_every == 1:
        return f"fewer than {FEWEST_EVALUATIONS} steps to its target; choose a harder one"
    every = max(1, int(steps / FEWEST_EVALUATIONS))
    return f"fewer than {FEWEST_EVALUATIONS} evaluations before its target; set train.evaluate_every to {every}" + (
        " or less" if every > 1 else ""
    )
