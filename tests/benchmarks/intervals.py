"""Coverage of the intervals that `bncli compare` prints, simulated with the code that prints them.

    python -m tests.benchmarks.intervals                 all tables, about 14 minutes on 2 cores
    python -m tests.benchmarks.intervals --repeats 200   the same, coarser
    python -m tests.benchmarks.intervals --make-runs     train the digits runs again that one of the tables resamples

Every figure is a share of simulated comparisons in per cent, with `--repeats` of them in each cell: with 2,000 a share
near 5 % has a standard error of 0.5. A comparison without an interval, or with an open side, cannot miss there.
"""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

import numpy as np

from bncli.measure.compare.stats import Floats, Sample, kept_points, paired, ratio
from bncli.results.compare import Ratio

RUNS = Path(__file__).with_name("digits_steps_by_rate.csv")
RECIPE = Path(__file__).parents[2] / "recipes" / "digits-small-weights.yaml"
JOBS = 2
Draw = Callable[[np.random.Generator, int], Floats]  # seeds -> log steps (points, seeds), inf for a run that never ends


def sample(logs: Floats, budget: float = math.inf) -> Sample:
    """Runs of which those past the budget (a log) are misses."""
    return Sample(np.minimum(logs, budget), logs <= budget)


def outside(found: Ratio, truth: float) -> bool:
    """Whether the interval leaves out the true ratio."""
    low, high = found.interval.low, found.interval.high
    return (low is not None and low > truth) or (high is not None and high < truth)


def noise(rng: np.random.Generator, kind: str, cv: float, shape: tuple[int, ...]) -> Floats:
    """Log noise with the spread of a coefficient of variation and median 0: normal, Student's t with 3, exponential."""
    deviation = math.sqrt(math.log1p(cv**2))
    if kind == "normal":
        return deviation * rng.standard_normal(shape)
    if kind == "t3":
        return deviation * rng.standard_t(3, shape) / math.sqrt(3)
    return deviation * (rng.exponential(1.0, shape) - math.log(2))


# --- one point an arm: misses and unlike spreads ------------------------------------------------------------------

SPREADS = [(one, other) for one in (0.05, 0.15, 0.30, 0.60) for other in (0.05, 0.15, 0.30)]
MISSED = (0.1, 0.3, 0.6, 0.8)  # of the reference
ARMS = ("none", "late", "diverging")  # of the arm: no run missed; 30 % past their budget; 30 % that never get there
TRUE_RATIO = 10.0


@dataclass(frozen=True)
class Cell:
    kind: str
    seeds: int
    spreads: tuple[float, float]
    missed: float
    arm: str
    repeats: int

    def run(self) -> list[tuple[str, bool]]:
        """(method, missed the truth) of every simulated comparison."""
        rng = np.random.default_rng(abs(hash((self.seeds, *self.spreads, self.missed))) % 2**32)
        budgets = []
        for cv, missed in zip(self.spreads, (self.missed, 0.3 if self.arm == "late" else 0.0), strict=True):
            budgets.append(_quantile(self.kind, cv, 1 - missed))
        found: list[tuple[str, bool]] = []
        for _ in range(self.repeats):
            reference = noise(rng, self.kind, self.spreads[0], (1, self.seeds)) + math.log(TRUE_RATIO)
            arm = noise(rng, self.kind, self.spreads[1], (1, self.seeds))
            budget = budgets[0] + math.log(TRUE_RATIO)
            if self.arm == "diverging":
                # Of the runs that count, the median is then that of all runs, those that never end above the rest.
                arm = arm - _quantile(self.kind, self.spreads[1], 0.5 / 0.7)
                arm[rng.random(arm.shape) < 0.3] = math.inf
            arm_budget = budgets[1] if self.arm == "late" else 50.0
            result = ratio(sample(reference, budget), sample(arm, arm_budget))
            found.append((result.method, outside(result, TRUE_RATIO)))
        return found


def _quantile(kind: str, cv: float, share: float) -> float:
    if share >= 1:
        return math.inf
    deviation = math.sqrt(math.log1p(cv**2))
    if kind == "normal":
        return deviation * NormalDist().inv_cdf(share)
    if kind == "t3":
        from scipy.special import stdtrit

        return deviation * float(stdtrit(3, share)) / math.sqrt(3)
    return deviation * (-math.log(1 - share) - math.log(2))


def misses_and_spreads(repeats: int, pool: ProcessPoolExecutor) -> None:
    print("Coverage with misses and unlike spreads, one point an arm, in %: least over 144 cells (spreads x misses)")
    print("noise    seeds   all   means  medians  bound   (the last three: over all cells together, where printed)")
    for kind in ("normal", "t3", "exponential"):
        for seeds in (4, 5, 10, 20):
            cells = [Cell(kind, seeds, s, m, a, repeats) for s in SPREADS for m in MISSED for a in ARMS]
            results = list(pool.map(Cell.run, cells, chunksize=8))
            least = min(1 - sum(miss for _, miss in found) / repeats for found in results)
            together = [each for found in results for each in found]
            columns = []
            for method in ("means", "medians", "bound"):
                missed = [miss for how, miss in together if how == method]
                columns.append(f"{100 * (1 - sum(missed) / len(missed)):.1f}" if missed else "-")
            print(
                f"{kind:11s} {seeds:2d}  {100 * least:5.1f}  {columns[0]:>6s} {columns[1]:>7s} {columns[2]:>7s}",
                flush=True,
            )


# --- a grid: the choice of its best point -------------------------------------------------------------------------


@dataclass(frozen=True)
class Grid:
    """Log steps of each point above the best one, the runs' spread, and the budget (a log) where runs miss."""

    offsets: tuple[float, ...]
    cv: float
    kind: str = "normal"
    budget: float = math.inf

    def draw(self, rng: np.random.Generator, seeds: int) -> Floats:
        return np.array(self.offsets)[:, None] + noise(rng, self.kind, self.cv, (len(self.offsets), seeds))


@dataclass(frozen=True)
class Resampled:
    """Runs of one arm drawn anew, seed by seed, all points of a seed together."""

    logs: Floats
    budget: float = math.inf

    def draw(self, rng: np.random.Generator, seeds: int) -> Floats:
        return self.logs[:, rng.integers(self.logs.shape[1], size=seeds)]


Arm = Grid | Resampled


@dataclass(frozen=True)
class Race:
    """One arm. kept: its runs at the points kept; blind: the further ones at the point that the tuning found best."""

    kept: Sample
    blind: Sample
    runs: int

    @staticmethod
    def of(arm: Arm, rng: np.random.Generator, tune: int, report: int, shared: Floats | None) -> Race:
        logs = arm.draw(rng, tune + report)
        if shared is not None:
            logs = logs + shared
        first = sample(logs[:, :tune], arm.budget)
        keep = kept_points(first.logs, first.hit)
        if not first.hit.any():
            keep &= np.arange(len(keep)) == 0
        blind = sample(logs[first.best : first.best + 1, tune:], arm.budget)
        return Race(sample(logs[keep], arm.budget), blind, logs.shape[0] * tune + int(keep.sum()) * report)


@dataclass(frozen=True)
class Choice:
    name: str
    arms: tuple[Arm, Arm]
    truth: float  # log ratio at the best points
    seeds: tuple[int, int]
    repeats: int
    correlation: float = 0.0  # of log steps at one seed, over arms and points

    def run(self) -> tuple[float, float, float, float, float]:
        """% missed, the same if blind to the choice, median half width of the log ratio, runs an arm, points kept."""
        rng = np.random.default_rng(7)
        missed, blind, widths, runs, kept = 0, 0, [], 0.0, 0.0
        for _ in range(self.repeats):
            shared = None
            if self.correlation:
                deviation = math.sqrt(math.log1p(getattr(self.arms[0], "cv", 0.2) ** 2))
                rest = math.sqrt(1 - self.correlation)
                shared = math.sqrt(self.correlation) / rest * deviation * rng.standard_normal((1, sum(self.seeds)))
            sides = [Race.of(arm, rng, *self.seeds, shared) for arm in self.arms]
            found = ratio(sides[0].kept, sides[1].kept)
            missed += outside(found, math.exp(self.truth))
            blind += outside(ratio(sides[0].blind, sides[1].blind), math.exp(self.truth))
            low, high = found.interval.low, found.interval.high
            widths.append(math.log(high / low) / 2 if low and high else math.inf)
            kept += sum(len(side.kept.logs) for side in sides) / 2
            runs += sum(side.runs for side in sides) / 2
        share = 100 / self.repeats
        return share * missed, share * blind, float(np.median(widths)), runs / self.repeats, kept / self.repeats


FLAT = {
    "sharp": (1.5, 0.5, 0.0, 0.45, 1.6),
    "two 3 % apart": (1.0, 0.03, 0.0, 0.8, 2.0),
    "three within 5 %": (0.05, 0.03, 0.0, 0.05, 0.6),
    "three within 15 %": (0.15, 0.08, 0.0, 0.15, 0.6),
    "five within 20 %": (0.2, 0.1, 0.0, 0.1, 0.2),
}
# Two fields, 3 x 5: a third of the points never reaches the target, others lie close to the best.
FIELDS = (0.3, 0.1, 0.0, 0.6, 9.0, 0.35, 0.12, 0.04, 9.0, 9.0, 0.8, 0.2, 0.1, 9.0, 9.0)
EQUAL, SHARP = (0.0,) * 5, (1.5, 0.5, 0.0, 0.5, 1.5)


def choices(seeds: tuple[int, int], repeats: int) -> Iterator[Choice]:
    for name, offsets in FLAT.items():
        for cv in (0.1, 0.2):
            yield Choice(f"A/A, {name}, cv {cv}", (Grid(offsets, cv),) * 2, 0.0, seeds, repeats)
    for name, offsets in FLAT.items():
        arms = (Grid(SHARP, 0.2), Grid(tuple(o - math.log(1.2) for o in offsets), 0.1))
        yield Choice(f"unlike, sharp against {name}", arms, math.log(1.2), seeds, repeats)
    fields = Grid(FIELDS, 0.2, budget=3.0)
    yield Choice("A/A, 15 points of two fields", (fields,) * 2, 0.0, seeds, repeats)
    yield Choice("A/A, 15 points, seeds shared .4", (fields,) * 2, 0.0, seeds, repeats, 0.4)
    unlike = (fields, Grid(tuple(o - math.log(14) for o in (*FLAT["five within 20 %"], *SHARP, *EQUAL)), 0.1))
    yield Choice("unlike, 15 points against 15, 14x", unlike, math.log(14), seeds, repeats)
    for correlation in (0.0, 0.4):
        arms = (Grid(FLAT["three within 15 %"], 0.2),) * 2
        yield Choice(f"A/A, three within 15 %, shared {correlation:g}", arms, 0.0, seeds, repeats, correlation)
    for missed in (0.1, 0.3, 0.6):
        for name in ("three within 5 %", "sharp"):
            budget = _quantile("normal", 0.2, 1 - missed)
            arm = Grid(FLAT[name], 0.2, budget=budget)
            yield Choice(f"A/A, {name}, {missed:.0%} miss at the best", (arm,) * 2, 0.0, seeds, repeats)
    for missed in (0.1, 0.3):
        arm = Grid(FIELDS, 0.2, budget=_quantile("normal", 0.2, 1 - missed))
        yield Choice(f"A/A, 15 points, {missed:.0%} miss at the best", (arm,) * 2, 0.0, seeds, repeats)
    for cvs in ((0.2, 0.2), (0.2, 0.05)):
        arms = (Grid(EQUAL, cvs[0]), Grid(SHARP, cvs[1]))
        yield Choice(f"hard: five equal against sharp, cv {cvs[0]} {cvs[1]}", arms, 0.0, seeds, repeats)
    rates, logs = real_runs()
    for name, rows in (("all rates", slice(None)), ("three", [rates.index(rate) for rate in (0.1, 0.3, 1.0)])):
        yield Choice(f"real, A/A, {name}", (Resampled(logs[rows]),) * 2, 0.0, seeds, repeats)
    for factor in (1.2, 3, 14):
        one, other = Resampled(logs[1:3]), Resampled(logs - math.log(factor))
        truth = float(one.logs.mean(1).min() - other.logs.mean(1).min())
        yield Choice(f"real, unlike grids, about {factor:g}x", (one, other), truth, seeds, repeats)


def the_choice(repeats: int, pool: ProcessPoolExecutor, seeds: Sequence[tuple[int, int]]) -> None:
    for tune, report in seeds:
        print(
            f"\n{tune} seeds at every point, {report} more at the points kept: % of 95 % intervals that miss the truth;"
        )
        print(f"blind: {report} fresh seeds at the best point by the {tune}, the interval taking the point as given")
        print(f"{'':50s}  missed  blind  half width  runs an arm  points kept")
        asked = list(choices((tune, report), repeats))
        for choice, found in zip(asked, pool.map(Choice.run, asked), strict=True):
            missed, blind, width, runs, kept = found
            print(
                f"{choice.name:50s}  {missed:5.1f}  {blind:5.1f}  {width:9.3f}  {runs:10.1f}  {kept:10.1f}", flush=True
            )


# --- real runs ----------------------------------------------------------------------------------------------------

RATES = (0.1, 0.2, 0.3, 0.45, 0.7, 1.0)
REAL_SEEDS = 44


def real_runs() -> tuple[list[float], Floats]:
    """Rates, and log steps (rates, seeds) of the batch norm arm of recipes/digits-small-weights.yaml."""
    with RUNS.open() as file:
        rows = [(float(row["lr"]), float(row["steps_to_target"])) for row in csv.DictReader(file)]
    rates = sorted({rate for rate, _ in rows})
    return rates, np.log(np.array([[steps for rate, steps in rows if rate == each] for each in rates]))


def make_runs(pool: ProcessPoolExecutor) -> None:
    """Train them again: 264 runs, about two minutes on 2 cores."""
    asked = [(rate, seed) for seed in range(500, 500 + REAL_SEEDS) for rate in RATES]
    with RUNS.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["lr", "seed", "steps_to_target"])
        for (rate, seed), steps in zip(asked, pool.map(_real_steps, *zip(*asked, strict=True)), strict=True):
            writer.writerow([rate, seed, f"{steps:.3f}"])


def _real_steps(rate: float, seed: int) -> float:
    import bncli
    from bncli.results.train import RunFinished

    sets = [f"optimizer.lr={rate}", f"train.seed={seed}", "train.target.also=[]"]
    loaded = bncli.load_recipe(str(RECIPE), sets)
    recipe = next(arm.recipe for arm in loaded.arms if arm.name == "batch norm")
    for event in bncli.train(recipe, "cpu", threads=1):
        if isinstance(event, RunFinished) and event.result.steps_to_target is not None:
            return event.result.steps_to_target
    raise AssertionError(f"the run at {rate} with seed {seed} missed its target")


# --- claims -------------------------------------------------------------------------------------------------------

CLAIMS, PAIRS, FACTOR = (1, 4, 10), (3, 5, 10), 1.2


def wrong_claims(kind: str, cv: float, claims: int, pairs: int, repeats: int, factor: float = 1.0) -> tuple[int, int]:
    """Of so many comparisons: those with a wrong verdict, and the intervals that leave out the true ratio.

    Every true ratio is 3, which is the bound too: the verdicts shown and refuted are both wrong. factor: of the grid on
    which both values of a pair are known, as those of a search for the largest learning rate are.
    """
    rng, truth, tail = np.random.default_rng(pairs), math.log(3), 0.025 / claims
    wrong = missed = 0
    for _ in range(repeats):
        logs = noise(rng, kind, cv, (2, claims, pairs)) + np.array([truth, 0])[:, None, None]
        if factor > 1:
            start = rng.uniform(0, math.log(factor), (2, claims, 1))  # each arm's grid begins at its own tuned rate
            logs = np.floor((logs - start) / math.log(factor)) * math.log(factor) + start
        found = [paired(differences, tail, truth, math.log(factor)) for differences in logs[0] - logs[1]]
        out = [not each.low <= truth <= each.high for each in found]
        assert out == [each.p_value is not None and each.p_value < 2 * tail for each in found]
        wrong, missed = wrong + any(out), missed + sum(out)
    return wrong, missed


def the_claims(repeats: int) -> None:
    print(
        "\nClaims with a true ratio at their bound, %: comparisons with a wrong verdict (ratios outside the interval)"
    )
    print("noise        cv   pairs   1 claim      4 claims     10 claims    4 claims, known to a factor of 1.2")
    for kind in ("normal", "t3", "exponential"):
        for cv in (0.05, 0.3):
            for pairs in PAIRS:
                cells = [wrong_claims(kind, cv, claims, pairs, repeats) for claims in CLAIMS]
                cells.append(wrong_claims(kind, cv, 4, pairs, repeats, FACTOR))
                shares = [
                    f"{100 * wrong / repeats:4.1f} ({100 * missed / repeats / claims:4.2f})"
                    for (wrong, missed), claims in zip(cells, (*CLAIMS, 4), strict=True)
                ]
                print(f"{kind:11s} {cv:4.2f}   {pairs:2d}   {'  '.join(shares)}", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=2000)
    parser.add_argument("--seeds", default="5+20,3+10", help="tuning + further seeds of the tables of the choice")
    parser.add_argument("--only", choices=["misses", "choice", "claims"])
    parser.add_argument("--make-runs", action="store_true")
    options = parser.parse_args(arguments)
    seeds = [(int(one), int(other)) for one, other in (pair.split("+") for pair in options.seeds.split(","))]
    with ProcessPoolExecutor(JOBS) as pool:
        if options.make_runs:
            make_runs(pool)
            return
        if options.only in (None, "misses"):
            misses_and_spreads(options.repeats, pool)
        if options.only in (None, "choice"):
            the_choice(options.repeats, pool, seeds)
        if options.only in (None, "claims"):
            the_claims(options.repeats)


if __name__ == "__main__":
    main()
