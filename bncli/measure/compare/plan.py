"""Plan of a comparison: the runs of every arm over the grid and the seeds. No torch.

Every arm gets the same grid and the same seeds. Each point of the grid is run with the tuning seeds; the points that
these cannot tell from the best are kept and get the further seeds too. All of an arm's seeds serve both the choice of
its best point and the estimate (`measure.compare.stats`).
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Any

from bncli.errors import RecipeError
from bncli.measure.compare import rates
from bncli.measure.dry_run import planned_arm
from bncli.names import MEASURES
from bncli.recipe import batches
from bncli.recipe.check import SAME_FOR_ALL_RUNS
from bncli.recipe.layers import input_of, shape_contradictions
from bncli.recipe.load import Arm, Loaded, digest, plain, what_is_trained, with_values
from bncli.recipe.mnist import name_of
from bncli.recipe.overrides import value_at
from bncli.recipe.sections import Claim as ClaimSection
from bncli.recipe.sections import Digits, Mnist, Npz, Recipe
from bncli.results.compare import COST_STEPS, RATE, Claim, ComparisonPlan, Phase, Planned, RunRecord
from bncli.results.train import RunResult, Target

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
    check: bool = False  # only whether its first step can be made
    company: str = ""  # what runs that train together have in common; empty: the run trains alone

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
            recipe = with_values(arm.recipe, run_values(self.plan, phase, point, seed))
            recipe_key = digest(what_is_trained(recipe))
            key = digest({"recipe": recipe_key, **self.identity})
            alone = phase == "cost" or batches.alone(recipe)
            company = "" if alone else f"{arm.name} {phase} {batches.common(point)}"
            self._jobs[name] = Job(key, arm.name, point, seed, phase, recipe, recipe_key, company=company)
        return self._jobs[name]

    def out(self, arm: Arm, records: Mapping[str, RunRecord], below: Mapping[str, float]) -> set[str]:
        """Keys of the tuning runs at those points of the grid that are out (`measure.compare.racing`), done or not.

        below: key -> steps below the target so far, of runs in progress.
        """
        points = self.points(arm)
        jobs = self.jobs(arm, "tune", points)
        known = [record for job in jobs if (record := records.get(job.key))]
        raced = len(known) < len(jobs) or any(record.given_up for record in known)
        if not raced or not any(record.result and record.result.steps_to_target for record in known):
            return set()
        from bncli.measure.compare.racing import points_out  # imports scipy: not before a run has hit

        rows = [jobs[row :: len(points)] for row in range(len(points))]
        out = points_out(self.plan, [[records.get(job.key, below.get(job.key, 0.0)) for job in row] for row in rows])
        return {job.key for row, is_out in zip(rows, out, strict=True) if is_out for job in row}

    def points(self, arm: Arm) -> list[dict[str, Any]]:
        """The grid's points for an arm; a field that the arm fixes keeps its value."""
        free = {path: values for path, values in self.plan.grid.items() if path not in arm.fixed}
        fixed = {path: value_at(self.plan.recipes[arm.name], path.split(".")) for path in arm.fixed}
        return [{**dict(zip(free, values, strict=True)), **fixed} for values in itertools.product(*free.values())]

    def middle_out(self, arm: Arm) -> list[int]:
        """The places of an arm's points of the grid, from its middle outwards: the best point is seldom at an edge."""
        free = [len(values) for path, values in self.plan.grid.items() if path not in arm.fixed]
        places = list(itertools.product(*map(range, free)))
        away = [sum(abs(2 * k + 1 - n) / n for k, n in zip(place, free, strict=True)) for place in places]
        return sorted(range(len(places)), key=away.__getitem__)


def run_values(plan: ComparisonPlan, phase: Phase, point: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """The fields in which a run differs from its arm's recipe: only the report seeds' runs are probed.

    A run of the search for the largest learning rate or of a step's cost goes on to the end of its own budget.
    """
    values = {**point, "train.seed": seed} | ({"probes": None} if phase != "report" else {})
    if phase in ("rate", "cost"):
        values |= {"train.steps": plan.budget_of(phase), "train.stop_at_target": False}
    if phase == "cost":  # the first interval between evaluations is a warm-up
        every = max(1, min(plan.budget, COST_STEPS) // 5)
        values |= {"train.evaluate_every": every, "schedule": {"kind": "constant"}}
    return values


def study(recipes: Sequence[Loaded], identity: Mapping[str, str] | None = None, full_grid: bool = False) -> Study:
    """The study that one or more recipes ask for. Raises RecipeError for recipes that cannot be compared.

    full_grid: whether runs go on whose point of the grid can no longer win.
    """
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
    searches = [each.file.largest_learning_rate for each in recipes if each.file.largest_learning_rate]
    plan = ComparisonPlan(
        name="+".join(dict.fromkeys(each.name for each in recipes)),
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
        claims=tuple(_claims(recipes, arms)),
        largest_learning_rate=plain(searches[0]) if searches else None,
        full_grid=full_grid,
    )
    return Study(plan, tuple(arms), dict(identity or {}))


def planned_comparison(asked: Study, first: Loaded, records: Mapping[str, RunRecord] | None = None) -> Planned:
    """All runs of a comparison, without training any. first: its first recipe; records: those that are done."""
    records = records or {}
    plan, named = asked.plan, named_runs(asked, records)
    arms = [
        replace(
            planned_arm(first.base, arm, len(asked.points(arm)) * len(plan.tune_seeds), len(plan.report_seeds)),
            alone=batches.alone(arm.recipe),
        )
        for arm in asked.arms
    ]
    keys, to_do = ({job.key: job.phase for job in jobs} for jobs in (named.jobs, named.to_do))
    runs = sum(phase in ("tune", "report") for phase in keys.values()) + named.later
    done = sum(phase in ("tune", "report") for key, phase in keys.items() if key not in to_do)
    searches = sum(phase == "rate" for phase in to_do.values())
    return Planned(
        plan.name,
        tuple(first.provenance(Arm("", first.base))),
        tuple(arms),
        dict(plan.grid),
        runs,
        (runs - done) * plan.budget,
        plan.claims,
        searches + named.later_searches,
        (plan.largest_learning_rate or {}).get("steps", 0),
        done,
        raced=bool(plan.tune_seeds) and not plan.full_grid,
        open_choices=named.later > 0,
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


def _claims(recipes: Sequence[Loaded], arms: Sequence[Arm]) -> Iterator[Claim]:
    """The claims of every recipe, about its own arms under the names that they have in the comparison."""
    names = iter(arms)
    for loaded in recipes:
        named = {arm.name: next(names).name for arm in loaded.arms or [Arm(loaded.name, loaded.base)]}
        for claim in loaded.file.claims:
            yield _claim(claim, named[claim.arm], named[claim.over])


def _claim(claim: ClaimSection, arm: str, over: str) -> Claim:
    none = 1.0 if MEASURES[claim.measure].compared == "ratio" else 0.0  # no difference
    low = claim.at_least is not None or claim.expect == "more"
    given = claim.at_least if claim.at_least is not None else claim.at_most
    return Claim(
        claim.say,
        claim.measure,
        arm,
        over,
        bound=none if given is None else given,
        side="at least" if low else "at most",
        bounded=given is not None,
        when=claim.when,
        layer=claim.layer,
    )


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
    searches = [loaded for loaded in recipes if loaded.file.largest_learning_rate]
    for loaded in searches[1:]:
        if loaded.file.largest_learning_rate != searches[0].file.largest_learning_rate:
            yield f"{loaded.source}: largest_learning_rate differs from {searches[0].source}'s"
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
            f"{first.where.get(('seeds', 'tune'), first.source)}: seeds.tune: {tune} cannot show how sure the choice "
            f"among the grid's points is; write {FEWEST_TUNE_SEEDS} or more"
        )
    points = math.prod(len(values) for values in first.file.grid.values())
    if (runs := arms * (points * tune + first.file.seeds.report)) > MOST_RUNS:
        raise RecipeError(
            f"{first.source}: {arms} arms at {points:,} points of the grid make {runs:,} runs; "
            f"a comparison has at most {MOST_RUNS:,}: shorten the lists of grid"
        )


# --- the runs to be done ------------------------------------------------------------------------------------------


Find = Callable[[set[str]], Mapping[str, RunRecord]]  # keys -> those of them that were done before


@dataclass(frozen=True)
class KnownRuns:
    """The runs that can be named now, done or not, and how many more there will be, as far as that is known.

    A run that was given up is done as long as its point of the grid is out; one that was not begun is then not named.
    """

    jobs: list[Job]
    to_do: list[Job]  # those of them that are not done
    later: int  # of arms whose tuning is not complete
    later_searches: int  # of the searches for the largest learning rate

    @property
    def planned(self) -> int:
        return len({job.key for job in self.jobs}) + self.later + self.later_searches


def named_runs(study: Study, records: Mapping[str, RunRecord]) -> KnownRuns:
    """All tuning runs, and an arm's further runs once it is tuned; then searches, which name one run after the other.

    Last a short run for each company of runs, since times and memory of runs that train together are of all of them.

    It is not known yet how many points of the grid an arm keeps whose tuning is not complete: one is counted. A search
    for the largest learning rate counts as USUAL_RUNS runs until it has ended.
    """
    tuning, report, searches, costs, again = [], [], [], [], set[str]()
    untuned, later = set(), 0
    claims = [claim for claim in study.plan.claims if claim.measure == "largest_learning_rate"]
    searched = {name for claim in claims for name in (claim.arm, claim.over)}
    for arm in study.arms:
        points = study.points(arm)
        jobs, out = study.jobs(arm, "tune", points), study.out(arm, records, {})
        again |= {job.key for job in jobs if job.key in records and records[job.key].given_up} - out
        in_order = (jobs[seed + at] for seed in range(0, len(jobs), len(points)) for at in study.middle_out(arm))
        tuning += [job for job in in_order if job.key in records or job.key not in out]
        start: dict[str, Any] | None = points[0]
        if tuned := all(job.key in out or (job.key in records and job.key not in again) for job in jobs):
            if jobs:
                from bncli.measure.compare.samples import ArmRuns, steps  # import scipy: not before

                arm_runs = ArmRuns.of(study.plan, arm.name, _records(jobs, records))
                points, start = list(arm_runs.kept), arm_runs.best(steps(study.plan.target))
            report += (of_arm := study.jobs(arm, "report", points))
            companies = {""}  # and those that have a run for their costs
            for job in of_arm:
                if job.company not in companies:
                    companies.add(job.company)
                    costs.append(study._job(arm, job.point, job.seed, "cost"))
        else:
            untuned.add(tuple(job.key for job in jobs))
        if arm.name not in searched or start is None:  # None: no tuning run ended
            continue
        for seed in study.plan.report_seeds:
            search = _search(study, arm, start, seed, records) if tuned else []
            searches += search
            if not search or search[-1].key not in records:
                later += max(0, rates.USUAL_RUNS - len(search))
    jobs = costs + report + tuning + searches
    to_do = [job for job in jobs if job.key not in records or job.key in again]
    return KnownRuns(jobs, to_do, len(untuned) * len(study.plan.report_seeds), later)


def known_runs(study: Study, records: dict[str, RunRecord], find: Find) -> KnownRuns:
    """As `named_runs`, after the runs that `find` has by their keys are added to the records."""
    while True:
        named = named_runs(study, records)
        more = {job.key for job in named.jobs} - records.keys()
        found = find(more)
        records.update((key, found[key]) for key in more & found.keys())  # no run that was done again meanwhile
        if records.keys().isdisjoint(more):
            return named


def _search(study: Study, arm: Arm, point: dict[str, Any], seed: int, records: Mapping[str, RunRecord]) -> list[Job]:
    """The runs of a search that can be named now, in order."""
    jobs: dict[float, Job] = {}

    def result_of(rate: float) -> RunResult | None:
        jobs[rate] = study._job(arm, {**point, RATE: rate}, seed, "rate")
        record = records.get(jobs[rate].key)
        return record.result if record else None

    with contextlib.suppress(rates.UnknownOutcome):
        rates.search(study.plan, arm.name, point, result_of)
    return list(jobs.values())


def collect(study: Study, records: Mapping[str, RunRecord]) -> list[RunRecord]:
    """The records of this study's runs, each under its own arm, point, seed and phase."""
    return _records(named_runs(study, records).jobs, records)


def _records(jobs: Sequence[Job], records: Mapping[str, RunRecord]) -> list[RunRecord]:
    found = [(job, records[job.key]) for job in jobs if job.key in records]
    return [replace(r, arm=job.arm, point=job.point, seed=job.seed, phase=job.phase) for job, r in found]
