"""Arms x grid x seeds: which runs answer "how many times fewer steps?". Pure: plans runs, no torch.

Every arm gets the same grid and the same seeds. Each point of the grid is run with the tuning seeds; those that these
cannot tell from the best are kept and get the further seeds too. All of an arm's seeds serve both the choice of its
best point and the estimate (`measure.statistics`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Any

from bncli.errors import RecipeError
from bncli.measure.dry_run import available_memory_mib, planned_arm
from bncli.recipe.check import SAME_FOR_ALL_RUNS
from bncli.recipe.layers import input_of, shape_contradictions
from bncli.recipe.load import Arm, Loaded, digest, plain, with_values
from bncli.recipe.overrides import value_at
from bncli.recipe.sections import Digits, Npz, Recipe, TargetSection
from bncli.results.compare import ComparisonPlan, Phase, Planned, RunRecord
from bncli.results.train import Target

MOST_RUNS = 20_000  # each is planned in memory; a longer list of values is a slip, or several comparisons
FEWEST_TUNE_SEEDS = 3  # with two, a single difference decides how sure the choice of a point is


@dataclass(frozen=True)
class Job:
    """One run to be done: its key, what it is for, and its resolved recipe."""

    key: str
    arm: str
    point: dict[str, Any]
    seed: int
    phase: Phase
    recipe: Recipe
    recipe_key: str = ""

    @property
    def label(self) -> str:
        return f"{self.arm}, {point_and_seed(self.point, self.seed)}"


def point_and_seed(point: Mapping[str, Any], seed: int) -> str:
    """Which run of an arm: `lr 0.3, seed 5`."""

    def word(value: Any) -> str:
        return f"{value:g}" if isinstance(value, int | float) else str(value)

    words = [f"{path.rsplit('.', 1)[-1]} {word(value)}" for path, value in point.items()]
    return ", ".join([*words, f"seed {seed}"])


@dataclass(frozen=True)
class Study:
    """A comparison's plan with the recipes that it is made of, and what else a run's key depends on."""

    plan: ComparisonPlan
    arms: tuple[Arm, ...]
    identity: dict[str, str]  # versions, device and data: a change of these makes every run a new one
    _jobs: dict[str, Job] = field(default_factory=dict, repr=False, compare=False)  # made once: checking takes time

    def jobs(self, arm: Arm, phase: Phase, points: Sequence[dict[str, Any]]) -> list[Job]:
        """Seed by seed, so that a comparison that is interrupted has the same seeds at every point."""
        seeds = self.plan.tune_seeds if phase == "tune" else self.plan.report_seeds
        return [self._job(arm, point, seed, phase) for seed in seeds for point in points]

    def _job(self, arm: Arm, point: dict[str, Any], seed: int, phase: Phase) -> Job:
        name = f"{arm.name} {point} {seed} {phase}"
        if name not in self._jobs:
            recipe = with_values(arm.recipe, {**point, "train.seed": seed})
            recipe_key = digest(plain(recipe))
            key = digest({"recipe": recipe_key, **self.identity})
            self._jobs[name] = Job(key, arm.name, point, seed, phase, recipe, recipe_key)
        return self._jobs[name]

    def points(self, arm: Arm) -> list[dict[str, Any]]:
        """The grid's points for an arm; a field that the arm fixes keeps its value."""
        free = {path: values for path, values in self.plan.grid.items() if path not in arm.fixed}
        fixed = {path: value_at(self.plan.recipes[arm.name], path.split(".")) for path in arm.fixed}
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
    if tuned and tune < FEWEST_TUNE_SEEDS:
        raise RecipeError(
            f"{first.source}: seeds.tune: {tune} cannot show how sure the choice among the grid's points is; "
            f"write {FEWEST_TUNE_SEEDS} or more"
        )
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
        data=describe_data(first.base),
        recipes={arm.name: plain(arm.recipe) for arm in arms},
        also=tuple(Target(target.metric, value) for value in target.also),
    )
    return Study(plan, tuple(arms), dict(identity or {}))


def planned_comparison(recipes: Sequence[Loaded]) -> Planned:
    """All runs of a comparison, without training any. Raises RecipeError for recipes that cannot be compared."""
    asked = study(recipes)
    first = recipes[0]
    arms = []
    for arm in asked.arms:
        tuning = len(asked.points(arm)) * len(asked.plan.tune_seeds)
        arms.append(planned_arm(first.base, arm, tuning, len(asked.plan.report_seeds)))
    runs = planned_runs(asked)
    fields = tuple(first.provenance(Arm("", first.base)))
    steps = runs * asked.plan.budget
    return Planned(first.name, fields, tuple(arms), dict(asked.plan.grid), runs, steps, available_memory_mib())


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
    for arm in arms:
        for path in SAME_FOR_ALL_RUNS:
            if attrgetter(path)(arm.recipe) != attrgetter(path)(arms[0].recipe):
                wrong.append(f"arm {arm.name}: {path} differs from arm {arms[0].name}'s; steps would not be comparable")
        if isinstance(arm.recipe.data, Npz):  # what only the file can tell; the rest was checked with the recipe
            found = shape_contradictions(arm.recipe, *input_of(arm.recipe))
            wrong += [f"arm {arm.name}: {'.'.join(keys)}: {text}" for keys, text in found]
    if not isinstance(arms[0].recipe.train.target, TargetSection):
        wrong.append(f"{first.source}: train.target is missing; a comparison counts the steps to it")
    if wrong:
        raise RecipeError(*wrong)


# --- what is to be done -------------------------------------------------------------------------------------------


def planned_runs(study: Study, records: Mapping[str, RunRecord] | None = None) -> int:
    """How many runs the comparison rests on in all, each once.

    Of an arm whose tuning is not complete it is not known yet how many points of the grid it keeps: one is counted.
    """
    records = records or {}
    found = {job.key for job in wanted(study, records)}
    tuning = [_tuning(study, arm) for arm in study.arms]
    untuned = {tuple(job.key for job in jobs) for jobs in tuning if not _tuned(jobs, records)}
    return len(found) + len(untuned) * len(study.plan.report_seeds)


def wanted(study: Study, records: Mapping[str, RunRecord]) -> list[Job]:
    """The runs that can be named now, done or not: all tuning runs, and an arm's further runs once it is tuned."""
    tuning, report = [], []
    for arm in study.arms:
        jobs = _tuning(study, arm)
        tuning += jobs
        if _tuned(jobs, records):
            kept = _kept(study, _records(jobs, records)) if jobs else study.points(arm)
            report += study.jobs(arm, "report", kept)
    return report + tuning


def _kept(study: Study, tuning: Sequence[RunRecord]) -> list[dict[str, Any]]:
    from bncli.measure.compare.samples import kept_points  # imports scipy: not before something is tuned

    return kept_points(study.plan, tuning)


def _tuning(study: Study, arm: Arm) -> list[Job]:
    return study.jobs(arm, "tune", study.points(arm))


def _tuned(jobs: Sequence[Job], records: Mapping[str, RunRecord]) -> bool:
    return all(job.key in records for job in jobs)


def collect(study: Study, records: Mapping[str, RunRecord]) -> list[RunRecord]:
    """The records of this study's runs, each under its own arm, point, seed and phase."""
    return _records(wanted(study, records), records)


def _records(jobs: Sequence[Job], records: Mapping[str, RunRecord]) -> list[RunRecord]:
    found = [(job, records[job.key]) for job in jobs if job.key in records]
    return [replace(r, arm=job.arm, point=job.point, seed=job.seed, phase=job.phase) for job, r in found]
