"""Plan of a comparison: the runs of every arm over the grid and the seeds. No torch.

Every arm gets the same grid and the same seeds. Each point of the grid is run with the tuning seeds; the points that
these cannot tell from the best are kept and get the further seeds too. All of an arm's seeds serve both the choice of
its best point and the estimate (`measure.compare.stats`).
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Any

from bncli.errors import RecipeError
from bncli.measure.dry_run import available_memory_mib, planned_arm
from bncli.recipe.check import SAME_FOR_ALL_RUNS
from bncli.recipe.layers import input_of, shape_contradictions
from bncli.recipe.load import Arm, Loaded, digest, plain, with_values
from bncli.recipe.mnist import name_of
from bncli.recipe.overrides import value_at
from bncli.recipe.sections import Digits, Mnist, Npz, Recipe
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
    values = {**point, "seed": seed}
    return ", ".join(
        f"{path.rsplit('.', 1)[-1]} {f'{value:g}' if isinstance(value, int | float) else value}"
        for path, value in values.items()
    )


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
    seeds, base, grid = first.file.seeds, first.base.train.seed, first.file.grid
    tune = seeds.tune if any(len(values) > 1 for values in grid.values()) else 0
    arms = _named_arms(recipes)
    if wrong := list(_differences(recipes, arms)):
        raise RecipeError(*wrong)
    _check_size(first, len(arms), tune)
    target = arms[0].recipe.train.target
    assert target is not None
    names = [arm.name for arm in first.arms] or [first.name]  # as the file has them, before any clash
    plan = ComparisonPlan(
        name=first.name,
        arms=tuple(arm.name for arm in arms),
        fixed={arm.name: arm.fixed for arm in arms},
        grid={path: tuple(values) for path, values in grid.items()},
        reference=arms[names.index(first.reference)].name,
        tune_seeds=tuple(range(base, base + tune)),
        report_seeds=tuple(range(base + tune, base + tune + seeds.report)),
        target=Target(target.metric, target.value),
        budget=first.base.train.steps,
        data=_data_words(first.base),
        recipes={arm.name: plain(arm.recipe) for arm in arms},
        also=tuple(Target(target.metric, value) for value in target.also),
    )
    return Study(plan, tuple(arms), dict(identity or {}))


def planned_comparison(recipes: Sequence[Loaded]) -> Planned:
    """All runs of a comparison, without training any. Raises RecipeError for recipes that cannot be compared."""
    asked, first = study(recipes), recipes[0]
    plan = asked.plan
    arms = [
        planned_arm(first.base, arm, len(asked.points(arm)) * len(plan.tune_seeds), len(plan.report_seeds))
        for arm in asked.arms
    ]
    runs, fields = planned_runs(asked), first.provenance(Arm("", first.base))
    return Planned(
        first.name, tuple(fields), tuple(arms), dict(plan.grid), runs, runs * plan.budget, available_memory_mib()
    )


def _data_words(recipe: Recipe) -> str:
    """What the runs are trained on, for titles."""
    data = recipe.data
    if isinstance(data, Digits):
        return "scikit-learn's digits"
    if isinstance(data, Mnist):
        return name_of(data)
    name = getattr(data, "name", getattr(data, "path", None))
    return f"{data.source} {name}" if name else f"{data.source} data"


def _named_arms(recipes: Sequence[Loaded]) -> list[Arm]:
    """Every recipe's arms; a recipe without arms is one arm. A name that clashes gets its file's name in front."""
    arms = [(loaded.name, arm) for loaded in recipes for arm in (loaded.arms or (Arm(loaded.name, loaded.base),))]
    count = Counter(arm.name for _, arm in arms)
    return [arm if count[arm.name] == 1 else replace(arm, name=f"{file} {arm.name}") for file, arm in arms]


def _differences(recipes: Sequence[Loaded], arms: Sequence[Arm]) -> Iterator[str]:
    """Why the arms cannot be compared."""
    first, *others = recipes
    if len(arms) < 2:
        raise RecipeError(
            f"{first.source}: has {'one arm' if first.arms else 'no arms'}; a comparison needs two: "
            "add one under arms, or name another recipe"
        )
    twice = sorted(name for name, count in Counter(arm.name for arm in arms).items() if count > 1)
    if twice:
        raise RecipeError(f"two recipes have the same name and arm: {', '.join(twice)}; rename a file or an arm")
    for loaded in others:
        for part in ("grid", "seeds"):
            if getattr(loaded.file, part) != getattr(first.file, part):
                yield f"{loaded.source}: {part} differs from {first.source}'s; every arm gets the same {part}"
    for arm in arms:
        for path in SAME_FOR_ALL_RUNS:
            if attrgetter(path)(arm.recipe) != attrgetter(path)(arms[0].recipe):
                yield f"arm {arm.name}: {path} differs from arm {arms[0].name}'s; {_why_alike(recipes, path)}"
        if isinstance(arm.recipe.data, Npz):  # what only the file can tell; the rest was checked with the recipe
            for keys, text in shape_contradictions(arm.recipe, *input_of(arm.recipe)):
                yield f"arm {arm.name}: {'.'.join(keys)}: {text}"
    if arms[0].recipe.train.target is None:
        yield f"{first.source}: train.target is missing; a comparison counts the steps to it"


def _why_alike(recipes: Sequence[Loaded], path: str) -> str:
    """Why a field of SAME_FOR_ALL_RUNS has to be the same for all arms, and what to do."""
    fields = {keys[-2:] for loaded in recipes for keys in loaded.in_epochs}
    if tuple(path.split(".")) in fields:
        return "epochs are another number of steps at another batch size: write steps, which are the same for every arm"
    return "steps would not be comparable"


def _check_size(first: Loaded, arms: int, tune: int) -> None:
    """Refuse too few seeds for the choice of a point, and too many runs."""
    if 0 < tune < FEWEST_TUNE_SEEDS:
        raise RecipeError(
            f"{first.source}: seeds.tune: {tune} cannot show how sure the choice among the grid's points is; "
            f"write {FEWEST_TUNE_SEEDS} or more"
        )
    points = math.prod(len(values) for values in first.file.grid.values())
    if (runs := arms * (points * tune + first.file.seeds.report)) > MOST_RUNS:
        raise RecipeError(
            f"{first.source}: {arms} arms at {points:,} points of the grid make {runs:,} runs; "
            f"a comparison has at most {MOST_RUNS:,}: shorten the lists of grid"
        )


# --- the runs to be done ------------------------------------------------------------------------------------------


def planned_runs(study: Study, records: Mapping[str, RunRecord] | None = None) -> int:
    """How many runs the comparison rests on in all, each once.

    For an arm whose tuning is not complete it is not known yet how many points of the grid it keeps: one is counted.
    """
    records = records or {}
    named = {job.key for job in wanted(study, records)}
    untuned = {keys for arm in study.arms if not records.keys() >= set(keys := _tuning_keys(study, arm))}
    return len(named) + len(untuned) * len(study.plan.report_seeds)


def _tuning_keys(study: Study, arm: Arm) -> tuple[str, ...]:
    return tuple(job.key for job in study.jobs(arm, "tune", study.points(arm)))


def wanted(study: Study, records: Mapping[str, RunRecord]) -> list[Job]:
    """The runs that can be named now, done or not: all tuning runs, and an arm's further runs once it is tuned."""
    tuning, report = [], []
    for arm in study.arms:
        points = study.points(arm)
        jobs = study.jobs(arm, "tune", points)
        tuning += jobs
        if all(job.key in records for job in jobs):
            if jobs:
                from bncli.measure.compare.samples import kept_points  # imports scipy: not before something is tuned

                points = kept_points(study.plan, _records(jobs, records))
            report += study.jobs(arm, "report", points)
    return report + tuning


def collect(study: Study, records: Mapping[str, RunRecord]) -> list[RunRecord]:
    """The records of this study's runs, each under its own arm, point, seed and phase."""
    return _records(wanted(study, records), records)


def _records(jobs: Sequence[Job], records: Mapping[str, RunRecord]) -> list[RunRecord]:
    found = [(job, records[job.key]) for job in jobs if job.key in records]
    return [replace(r, arm=job.arm, point=job.point, seed=job.seed, phase=job.phase) for job, r in found]
