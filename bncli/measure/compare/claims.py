"""Verdicts on a recipe's claims: the ratio or difference of two arms, paired by seed, against a bound. No torch.

Interval and verdict have one level, 1 - 0.05 / number of claims. A claim is shown where the whole interval lies beyond
its bound, and refuted where the whole interval falls short of it. Steps, seconds and examples to target are compared as
in the comparison's table (`measure.compare.stats.ratio`), over all of its seeds. Every other measure is taken at each
arm's best point over the report seeds: the logs of a ratio, and differences as they are, by Student's t for pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from operator import attrgetter
from statistics import fmean, median
from typing import Any

import numpy as np

from bncli.measure.compare import rates, samples, stats
from bncli.measure.compare.samples import ArmRuns, tuned_point
from bncli.measure.compare.stats import Floats
from bncli.names import MEASURES, Compared
from bncli.results.compare import RATE, Claim, ComparisonPlan, JudgedClaim, NoInterval, Verdict
from bncli.results.environment import Interval
from bncli.results.train import RunResult

LAST_EVALUATIONS = 5  # of a run, whose median is its final metric: single late evaluations may be far below it
LOSS_LEVELS = 20  # at which two runs of a pair are compared, evenly spaced in the log of the loss

Pair = tuple[float, float]


def judged(plan: ComparisonPlan, arms: Mapping[str, ArmRuns]) -> tuple[JudgedClaim, ...]:
    """Each claim of a comparison's plan with its verdict. arms: the runs of each, by its name."""
    tail = 0.025 / max(1, len(plan.claims))
    return tuple(
        (_judged_cost if claim.measure in COSTS else _judged_pairs)(claim, arms[claim.arm], arms[claim.over], tail)
        for claim in plan.claims
    )


def _judged_pairs(claim: Claim, arm: ArmRuns, over: ArmRuns, tail: float) -> JudgedClaim:
    """By Student's t for pairs of runs; those without a value on both sides are left out and counted."""
    known, within = _pairs(claim, arm, over)
    values = np.array([pair for pair in known if isinstance(pair, tuple)], dtype=float).reshape(-1, 2)
    reasons: list[NoInterval] = [pair for pair in known if isinstance(pair, str)]
    # A search that met no bound is not left out: the other seeds alone, those with a bound, would be a biased sample.
    unbounded = [reason for reason in reasons if reason in ("no rate trains", "no rate fails")]
    found = replace(_unjudged(claim, tail), seeds=len(values), of_seeds=len(known))
    scale, back = SCALES[found.compared]
    if found.compared == "ratio" and (values <= 0).any():
        return replace(found, no_interval="not positive")
    if len(values) == 0 or unbounded:
        return replace(found, no_interval=next(iter(unbounded or reasons), "no pairs"))
    scaled = scale(values)  # (pairs, arm and over)
    mean = stats.paired(scaled[:, 0] - scaled[:, 1], tail, float(scale(claim.bound)), within)
    of_arm, of_over = map(float, back(scaled.mean(0)))
    found = replace(found, value=float(back(mean.value)), of_arm=of_arm, of_over=of_over, p_value=mean.p_value)
    if mean.p_value is None:
        return replace(found, no_interval="one pair")
    return _with_verdict(found, Interval(float(back(mean.low)), float(back(mean.high))), tail, within)


# How a comparison's values are averaged: to the scale on which they are, and back.
SCALES: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "ratio": (np.log, np.exp),
    "difference": (np.asarray, np.asarray),
}


def _unjudged(claim: Claim, tail: float) -> JudgedClaim:
    """A claim of which nothing is known yet."""
    compared = MEASURES[claim.measure].compared
    return JudgedClaim(
        **vars(claim), compared=compared, value=None, interval=stats.OPEN, level=1 - 2 * tail, p_value=None,
        verdict="cannot tell", seeds=0, of_seeds=0,
    )  # fmt: skip


def _with_verdict(claim: JudgedClaim, interval: Interval, tail: float, within: float = 0.0) -> JudgedClaim:
    """The claim with its interval, the verdict that follows, and the seeds that would decide it where none does.

    A bound that the recipe states fulfils the claim; no difference does not fulfil one that expects a difference.
    """
    sign = 1 if claim.side == "at least" else -1
    ends = (-math.inf if interval.low is None else interval.low, math.inf if interval.high is None else interval.high)
    (low, high), bound = sorted(sign * end for end in ends), sign * claim.bound
    shown, refuted = (low >= bound, high < bound) if claim.bounded else (low > bound, high <= bound)
    verdict: Verdict = "shown" if shown else "refuted" if refuted else "cannot tell"
    claim = replace(claim, interval=interval, verdict=verdict)
    if verdict != "cannot tell" or claim.value is None or None in (interval.low, interval.high):
        return claim
    low, value, bound, high = SCALES[claim.compared][0]([interval.low, claim.value, claim.bound, interval.high])
    needed = stats.pairs_needed(abs(value - bound) - within, (high - low) / 2 - within, claim.seeds, tail)
    return replace(claim, seeds_needed=needed)


# --- costs to the target ------------------------------------------------------------------------------------------

COSTS = {"steps_to_target": None, "seconds_to_target": samples.seconds, "examples_to_target": samples.examples}


def _judged_cost(claim: Claim, arm: ArmRuns, over: ArmRuns, tail: float) -> JudgedClaim:
    """As in the table: over all seeds, the choice of each arm's best point repeated; runs that missed leave a bound."""
    steps = samples.steps(arm.plan.target)
    measure = COSTS[claim.measure] or steps
    by = None if measure is steps else steps
    found = samples.ratio(over, arm, measure, by, tail, claim.bound)
    seeds = arm.seeds(measure) & over.seeds(measure)
    both = (each.sample(measure, by, seeds, each.best(by or measure)) for each in (arm, over))
    of_arm, of_over = (stats.typical(sample).value for sample in both)
    of_seeds = len(arm.plan.tune_seeds) + len(arm.plan.report_seeds)
    p_value = found.p_value if found.method == "means" else None  # that of "hits" is not of the bound
    unjudged = replace(_unjudged(claim, tail), value=found.value, p_value=p_value, of_arm=of_arm, of_over=of_over)
    unjudged = replace(unjudged, seeds=len(seeds), of_seeds=of_seeds)
    if len(seeds) < 2:  # arms of one recipe have a ratio of 1 without any run
        return replace(unjudged, no_interval="one pair" if seeds else "no pairs")
    if found.interval == stats.OPEN:  # "none": the target was held before training, after 0 steps
        return replace(unjudged, no_interval="not positive" if found.method == "none" else "too few hits")
    return _with_verdict(unjudged, found.interval, tail)


# --- values of single runs ----------------------------------------------------------------------------------------


def _pairs(claim: Claim, arm: ArmRuns, over: ArmRuns) -> tuple[list[Pair | NoInterval], float]:
    """For each report seed the values of both arms, or why there are none; how much the log of a ratio may be off."""
    plan = arm.plan
    if claim.measure == "largest_learning_rate":
        found = [(_largest_rate(arm, seed), _largest_rate(over, seed)) for seed in plan.report_seeds]
        factor = (plan.largest_learning_rate or {}).get("factor", 1.0)
        return [_pair(*each) for each in found], math.log(factor)
    return [_of_runs(claim, *pair) for pair in zip(_best_runs(arm), _best_runs(over), strict=True)], 0.0


def _best_runs(arm: ArmRuns) -> list[RunResult | None]:
    """The runs of the report seeds at the arm's best point."""
    best = arm.best(samples.steps(arm.plan.target))
    results = next((results for point, results in arm.results if point == best), {})
    return [results.get(seed) for seed in arm.plan.report_seeds]


def _pair(*values: float | NoInterval | None) -> Pair | NoInterval:
    """The values of both arms, or why one of them is not a finite number."""
    known = [value for value in values if isinstance(value, int | float) and math.isfinite(value)]
    return (known[0], known[1]) if len(known) == 2 else next((v for v in values if isinstance(v, str)), "no pairs")


def _largest_rate(arm: ArmRuns, seed: int) -> float | NoInterval | None:
    """The largest learning rate of one seed, or why its search has none; None where runs are missing."""
    point = tuned_point(arm.plan, arm.name, arm.records) if arm.plan.tune_seeds else next(iter(arm.kept), None)
    by_rate = {record.point[RATE]: record.result for record in arm.searched if record.seed == seed}
    if point is None or not by_rate:
        return None
    try:
        found = rates.search(arm.plan, arm.name, point, by_rate.get)
    except (
        rates.UnknownOutcome,
        TypeError,
        ValueError,
    ):  # or a saved plan has no search, or no start of one
        return None
    return "no rate trains" if found.trains is None else "no rate fails" if found.fails is None else found.trains


def _of_runs(claim: Claim, of_arm: RunResult | None, of_over: RunResult | None) -> Pair | NoInterval:
    if of_arm is None or of_over is None:
        return "no pairs"
    if MEASURES[claim.measure].probe is None:
        value = _final if claim.measure == "final" else attrgetter("best")
        return _pair(value(of_arm), value(of_over))
    runs = (of_arm, of_over)
    sides = [_series(run, claim.measure, claim.layer) for run in runs]
    if not all(sides):
        layers = {point.layer for run in runs for point in run.probes}
        return "unknown layer" if claim.layer is not None and claim.layer not in layers else "no pairs"
    if claim.when == "end":
        values = [[line[max(line)] for line in side] for side in sides]
    elif claim.when == "mean":
        values = _means_over_log_steps(sides)
    else:
        # Held-out loss is of evaluation mode, in which running statistics lag behind the first steps; so is its match.
        loss = "regularization.training_loss" if claim.measure.startswith("regularization.") else "loss.training"
        losses = [next(iter(_series(run, loss, None)), {}) for run in runs]
        values = _means_at_equal_losses(sides, losses, MEASURES[claim.measure].compared)
    if not values:
        return "no common steps" if claim.when == "mean" else "no common loss"
    return _pair(*map(fmean, values))


def _final(run: RunResult) -> float | None:
    metric = run.target.metric if run.target else "accuracy"
    last = run.evaluations[-LAST_EVALUATIONS:]
    return median(evaluation.value(metric) for evaluation in last) if last else None


# --- values of a probe over a run ---------------------------------------------------------------------------------

Line = dict[int, float]  # step -> value, at one layer


def _series(run: RunResult, measure: str, layer: str | None) -> list[Line]:
    """A probe's values at each layer, or at the layer named, in the order of the steps."""
    probe, name = measure.split(".")
    found: dict[str | None, Line] = {}
    for point in sorted(run.probes, key=lambda point: point.step):
        if point.measure == probe and name in point.values and layer in (None, point.layer):
            found.setdefault(point.layer, {})[point.step] = point.values[name]
    return list(found.values())


def _means_over_log_steps(sides: Sequence[Sequence[Line]]) -> list[list[float]]:
    """For each side the mean of each layer, over the log of the steps at which both runs were measured.

    Integrals by trapezoids over their length, from the later of the first steps above 0 to the earlier of the last, so
    that a run is not judged by steps that the other never took. Empty where there is no such step.
    """
    known = [[[step for step in line if step > 0] for line in side] for side in sides]
    steps = [each for side in known for each in side]
    if not all(steps) or (first := max(each[0] for each in steps)) > (last := min(each[-1] for each in steps)):
        return []

    def mean(line: Line, steps: list[int]) -> float:
        places = np.log([first, *(step for step in steps if first < step < last), last])
        values = np.interp(places, np.log(steps), [line[step] for step in steps])
        return float(np.trapezoid(values, places) / (places[-1] - places[0]) if first < last else values[0])

    return [list(map(mean, *each)) for each in zip(sides, known, strict=True)]


def _means_at_equal_losses(
    sides: Sequence[Sequence[Line]], losses: Sequence[Line], compared: Compared
) -> list[list[float]]:
    """For each side the mean of each layer at losses that both runs pass, evenly spaced in the loss's log.

    From the smaller of their first losses to the larger of their smallest, among the steps at which the layers were
    measured; empty where there are none. A run has a loss's value where it first passes it. Values that are compared as
    a ratio have a geometric mean: a held-out loss falls with the training loss, and the first ones would outweigh all.
    """
    scale, back = SCALES[compared]
    passed = [[_by_log_loss(line, loss) for line in side] for side, loss in zip(sides, losses, strict=True)]
    logs = [logs for side in passed for logs, _ in side]
    if not all(map(len, logs)) or (low := max(each[0] for each in logs)) >= (high := min(each[-1] for each in logs)):
        return []
    levels = np.linspace(low, high, LOSS_LEVELS)
    with np.errstate(divide="ignore", invalid="ignore"):  # a value of 0 makes the mean 0
        return [[float(back(np.interp(levels, x, scale(y)).mean())) for x, y in side] for side in passed]


def _by_log_loss(line: Line, losses: Line) -> tuple[Floats, Floats]:
    """The logs of the losses that are below all earlier ones, ascending, and a layer's values there."""
    passed: list[tuple[float, float]] = []
    for step in sorted(line.keys() & losses.keys()):
        if 0 < losses[step] < (passed[0][0] if passed else math.inf):
            passed.insert(0, (losses[step], line[step]))
    found, values = np.array(passed, dtype=float).reshape(-1, 2).T
    return np.log(found), values
