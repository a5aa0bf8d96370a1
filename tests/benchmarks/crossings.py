"""How far steps to target depend on how often one evaluates, and how far they are from a known crossing.

    python -m tests.benchmarks.crossings               all tables, about 5 minutes on 2 cores
    python -m tests.benchmarks.crossings --runs 100    the simulated ones coarser
    python -m tests.benchmarks.crossings --only real   or --only simulated

Real: 12 runs an arm of recipes/digits-small-weights.yaml, evaluated after every step; each cadence is then read off the
same runs in all of its phases (every 8th evaluation: from the 1st to the 8th), so that the mean over phases shows what
the cadence does and not what chance does. A cadence counts where it has 10 evaluations in the fast arm before its
target.

Simulated: an error that falls as a power of the step, as steeply as in those runs about the target, so that the true
crossing is known, with noise of a given deviation and correlation in every evaluation.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bncli.engine.target import evaluation_steps
from bncli.recipe.sections import LogSpaced

Floats = npt.NDArray[np.float64]
Estimate = Callable[
    [Floats, Floats, float], float
]  # steps and values of a curve, from step 0 on, and a target -> steps
Curves = dict[str, list[Floats]]  # arm -> the metric of each run after 0, 1, 2, ... steps

ARMS = {"plain": (3.0, 3000), "batch norm": (0.3, 800)}  # learning rate, steps
SEEDS = 12
RECIPE = Path(__file__).parents[2] / "recipes" / "digits-small-weights.yaml"
CADENCES = ("every 1", "every 2", "every 5", "every 8", "log 6", "log 8", "log 12", "log 16")
TARGETS = (0.90, 0.93, 0.95, 0.96)
FEWEST = 10  # evaluations of the fast arm before its target


# --- estimators ---------------------------------------------------------------------------------------------------


def time_below(ahead: float) -> Estimate:
    """Steps below the target until the run is 1 + `ahead` times as long; with 0.3 that of `bncli.engine.target`."""

    def estimate(steps: Floats, values: Floats, target: float) -> float:
        gap = target - values
        low, high = np.minimum(gap[:-1], gap[1:]), np.maximum(gap[:-1], gap[1:])
        share = np.where(low > 0, 1.0, np.where(high <= 0, 0.0, high / np.where(high > low, high - low, 1.0)))
        below = np.r_[0.0, np.cumsum(share * np.diff(steps))]
        done = np.flatnonzero(steps >= (1 + ahead) * below)[1:]  # step 0 is not done unless it is at the target
        return 0.0 if gap[0] <= 0 else float(below[done[0]]) if len(done) else math.nan

    return estimate


def median_of_three(steps: Floats, values: Floats, target: float) -> float:
    """The first crossing of the centred median of three evaluations, interpolated."""
    middle = np.r_[values[:1], np.median(np.stack([values[:-2], values[1:-1], values[2:]]), axis=0)]
    return _first_crossing(steps, middle, target)


def first_evaluation(steps: Floats, values: Floats, target: float) -> float:
    reached = np.flatnonzero(values >= target)
    return float(steps[reached[0]]) if len(reached) else math.nan


def window(share: float) -> Estimate:
    """The first crossing of the mean over evaluations within `share` of the step on either side."""

    def estimate(steps: Floats, values: Floats, target: float) -> float:
        steps, values = steps[1:], values[1:]
        low, high = np.searchsorted(steps, steps / (1 + share)), np.searchsorted(steps, steps * (1 + share), "right")
        whole = steps * (1 + share) <= steps[-1]
        sums = np.r_[0.0, np.cumsum(values)]
        return _first_crossing(steps, ((sums[high] - sums[low]) / (high - low))[whole], target)

    return estimate


def _first_crossing(steps: Floats, values: Floats, target: float) -> float:
    reached = np.flatnonzero(values >= target)
    if len(reached) == 0:
        return math.nan
    k = int(reached[0])
    if k == 0:
        return float(steps[0])
    rise = (target - values[k - 1]) / (values[k] - values[k - 1])
    return float(steps[k - 1] + rise * (steps[k] - steps[k - 1]))


ESTIMATORS: dict[str, Estimate] = {
    "first evaluation at the target": first_evaluation,
    "median of three, interpolated": median_of_three,
    "mean of +-20 %, first crossing": window(0.2),
    "steps below, +20 %": time_below(0.2),
    "steps below, +30 % (bncli)": time_below(0.3),
    "steps below, +50 %": time_below(0.5),
}
BNCLI = "steps below, +30 % (bncli)"


# --- cadences -----------------------------------------------------------------------------------------------------


def phases(cadence: str, last: int) -> Iterator[Floats]:
    """The steps of a cadence in each of its phases, step 0 before them."""
    kind, number = cadence.split()
    count = int(number)
    if kind == "every":
        for first in range(1, count + 1):
            yield np.r_[0, np.arange(first, last + 1, count)].astype(float)
        return
    for phase in range(4):
        exponents = np.arange(0, count * math.log2(last) + 1e-9) + phase / 4
        steps = np.unique(np.rint(2 ** (exponents / count)))
        yield np.r_[0.0, steps[steps <= last]]


def mean_log(curves: list[Floats], cadence: str, target: float, estimate: Estimate) -> float:
    """Mean over runs and phases of the log of the steps; NaN where a run has none."""
    found = [
        estimate(steps, curve[steps.astype(int)], target)
        for curve in curves
        for steps in phases(cadence, len(curve) - 1)
    ]
    return float(np.mean(np.log(np.maximum(found, 1e-9))))


def phase_deviation(curves: list[Floats], cadence: str, target: float, estimate: Estimate) -> float:
    """In per cent: the deviation over phases of the arm's geometric mean, which is what chance does to one of them."""
    last = len(curves[0]) - 1
    means = [
        float(np.mean([math.log(estimate(steps, curve[steps.astype(int)], target)) for curve in curves]))
        for steps in phases(cadence, last)
    ]
    return 100 * float(np.std(means, ddof=1))


def usable(fast: list[Floats], cadence: str, target: float) -> bool:
    """Whether the fast arm is evaluated often enough before its target."""
    steps = math.exp(mean_log(fast, "every 1", target, ESTIMATORS[BNCLI]))
    return float(np.mean([np.sum(grid <= steps) - 1 for grid in phases(cadence, len(fast[0]) - 1)])) >= FEWEST


def half_range(logs: list[float]) -> float:
    """In per cent: half of the way from the least to the largest."""
    return 100 * math.expm1((max(logs) - min(logs)) / 2) if logs and all(map(math.isfinite, logs)) else math.nan


# --- real runs ----------------------------------------------------------------------------------------------------


def real_curves() -> Curves:
    """Held-out accuracy after every step of 12 runs an arm, trained now."""
    from concurrent.futures import ProcessPoolExecutor

    asked = [(arm, seed) for arm in ARMS for seed in range(100, 100 + SEEDS)]
    with ProcessPoolExecutor(2) as pool:
        found = list(pool.map(_real_curve, *zip(*asked, strict=True)))
    return {name: [curve for (arm, _), curve in zip(asked, found, strict=True) if arm == name] for name in ARMS}


def _real_curve(arm: str, seed: int) -> Floats:
    import bncli
    from bncli.results.train import RunFinished

    rate, steps = ARMS[arm]
    every = {"train.evaluate_every": 1, "train.stop_at_target": "false", "train.steps": steps, "train.seed": seed}
    loaded = bncli.load_recipe(
        str(RECIPE), [f"{key}={value}" for key, value in {**every, "optimizer.lr": rate}.items()]
    )
    recipe = next(each.recipe for each in loaded.arms if each.name == arm)
    for event in bncli.train(recipe, "cpu", threads=1):
        if isinstance(event, RunFinished):
            return np.array([each.accuracy for each in event.result.evaluations])
    raise AssertionError("a run ends with its result")


def show_real(curves: Curves) -> None:
    plain, fast = curves["plain"], curves["batch norm"]
    print(f"Half range over cadences, in %: plain, batch norm, ratio; {SEEDS} real runs an arm, means over phases")
    print(f"{'':34s}" + "".join(f"{target:^21.2f}" for target in TARGETS))
    for name, estimate in ESTIMATORS.items():
        cells = []
        for target in TARGETS:
            kept = [each for each in CADENCES if usable(fast, each, target)]
            logs = [[mean_log(arm, each, target, estimate) for each in kept] for arm in (plain, fast)]
            ratios = [one - other for one, other in zip(*logs, strict=True)]
            cells.append(" ".join(f"{half_range(each):5.1f}" for each in (*logs, ratios)))
        print(f"{name:34s}" + "    ".join(cells), flush=True)
    print("\nRatio plain / batch norm by cadence, means over phases (- : under 10 evaluations in the fast arm)")
    for name in ("median of three, interpolated", BNCLI):
        print(f"{name:34s}" + "".join(f"{each:>9s}" for each in CADENCES))
        for target in TARGETS:
            cells = []
            for cadence in CADENCES:
                ratio = math.exp(
                    mean_log(plain, cadence, target, ESTIMATORS[name])
                    - mean_log(fast, cadence, target, ESTIMATORS[name])
                )
                cells.append(f"{ratio:9.2f}" if usable(fast, cadence, target) else f"{'-':>9s}")
            print(f"{target:34.2f}" + "".join(cells), flush=True)
    print(f"\nDeviation over phases, in %, batch norm, {BNCLI}")
    print(f"{'':34s}" + "".join(f"{target:9.2f}" for target in TARGETS))
    for cadence in ("every 5", "every 8", "log 8"):
        cells = [f"{phase_deviation(fast, cadence, target, ESTIMATORS[BNCLI]):9.1f}" for target in TARGETS]
        print(f"{cadence:34s}" + "".join(cells), flush=True)


# --- simulated runs -----------------------------------------------------------------------------------------------

FAST, TRUE_RATIO = 100.0, 14.0  # steps of the fast arm to 0.95, and how many times more the slow arm takes
POWERS = {"slow": 2.6, "fast": 0.65}  # of the step, with which the error falls about the target, as in the real runs
SPREADS = {"slow": 0.09, "fast": 0.18}  # deviation of a run's log steps


def simulated(arm: str, runs: int, noise: float, tau: float, rng: np.random.Generator) -> tuple[list[Floats], float]:
    """Curves of one arm after every step, and the mean of the logs of their true crossings of 0.95."""
    logs = rng.normal(math.log(FAST * (TRUE_RATIO if arm == "slow" else 1)), SPREADS[arm], runs)
    curves = []
    for log in logs:
        steps = np.arange(1.0, 2 * math.exp(log) + 20)
        error = np.minimum(0.9, 0.05 * (steps / math.exp(log)) ** -POWERS[arm])
        curves.append(np.r_[0.1, 1 - error + _noise(len(steps), noise, tau, rng)])
    return curves, float(logs.mean())


def _noise(count: int, deviation: float, tau: float, rng: np.random.Generator) -> Floats:
    """Gaussian, with a correlation of exp(-1 / tau) from a step to the next; independent for a tau of 0."""
    if tau == 0:
        return deviation * rng.standard_normal(count)
    from scipy.signal import lfilter

    keep = math.exp(-1 / tau)
    start = rng.standard_normal(1)
    drawn, _ = lfilter([math.sqrt(1 - keep**2)], [1, -keep], rng.standard_normal(count), zi=keep * start)
    return deviation * np.asarray(drawn)


def bias_of_14x(
    noise: float, cadence: str, runs: int, seed: int, tau: float = 0.0, estimate: Estimate = ESTIMATORS[BNCLI]
) -> float:
    """By how much the ratio of geometric means is off, as a share; read off one phase, as a user has it."""
    rng = np.random.default_rng(seed)
    logs = {}
    for arm in POWERS:
        curves, truth = simulated(arm, runs, noise, tau, rng)
        kind, number = cadence.split()
        every = int(number) if kind == "every" else LogSpaced(points_per_doubling=int(number))
        found = []
        for curve in curves:
            steps = np.array([0, *evaluation_steps(every, len(curve) - 1)], dtype=float)
            found.append(estimate(steps, curve[steps.astype(int)], 0.95))
        logs[arm] = float(np.nanmean(np.log(found))) - truth
    return math.expm1(logs["slow"] - logs["fast"])


def ratio_by_cadence(target: float, noise: float, runs: int, seed: int) -> list[float]:
    """Of the same simulated runs, over the cadences that are fine enough, each a mean over its phases."""
    rng = np.random.default_rng(seed)
    slow, fast = (simulated(arm, runs, noise, 1.0, rng)[0] for arm in POWERS)
    estimate = ESTIMATORS[BNCLI]
    return [
        math.exp(mean_log(slow, each, target, estimate) - mean_log(fast, each, target, estimate))
        for each in CADENCES
        if usable(fast, each, target)
    ]


def show_simulated(runs: int) -> None:
    cadences = ("every 1", "every 5", "every 8", "log 6", "log 8", "log 16")
    print(
        f"\nBias for a true 14x at target .95, in %: least and most over cadences and correlations; {runs} runs an arm"
    )
    print(f"{'':34s}{'noise .01':^18s}{'noise .017':^18s}")
    for name, estimate in ESTIMATORS.items():
        cells = []
        for noise in (0.01, 0.017):
            found = [100 * bias_of_14x(noise, each, runs, 3, tau, estimate) for each in cadences for tau in (0, 1, 3)]
            cells.append(f"{min(found):+6.1f} to {max(found):+6.1f}")
        print(f"{name:34s}" + "    ".join(cells), flush=True)
    print("\nBias for a true 14x by the number of evaluations in the fast arm before its target, in %; noise .01")
    for count in (100, 20, 10, 7, 5, 4, 3):
        bias = 100 * bias_of_14x(0.01, f"every {round(FAST / count)}", runs, 3, 1.0)
        print(f"{count:4d}  {bias:+5.1f}", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1000, help="simulated runs an arm")
    parser.add_argument("--only", choices=["real", "simulated"])
    options = parser.parse_args(arguments)
    if options.only != "simulated":
        show_real(real_curves())
    if options.only != "real":
        show_simulated(options.runs)


if __name__ == "__main__":
    main()
