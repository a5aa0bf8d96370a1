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
from functools import partial
from operator import attrgetter
from statistics import median
from typing import Any

import numpy as np

from bncli.measure.compare import rates, samples, stats
from bncli.measure.compare.samples import ArmRuns, tuned_point
from bncli.measure.compare.stats import Floats
from bncli.names import MEASURES
from bncli.results.compare import Claim, ComparisonPlan, JudgedClaim, NoInterval, Verdict
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
    found = replace(_untold(claim, tail), seeds=len(values), of_seeds=len(known))
    scale, back = SCALES[found.compared]
    if found.compared == "ratio" and (values <= 0).any():
        return replace(found, no_interval="not positive")
    if len(values) == 0 or "rate not bounded" in reasons:
        return replace(found, no_interval=next(iter(reasons), "no pairs"))
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


def _untold(claim: Claim, tail: float) -> JudgedClaim:
    """A claim of which nothing is known yet."""
    compared = MEASURES[claim.measure].compared
    return JudgedClaim(
        **vars(claim), compared=compared, value=None, interval=stats.OPEN, level=1 - 2 * tail, p_value=None,
        verdict="cannot tell", seeds=0, of_seeds=0,
    )  # fmt: skip


def _with_verdict(claim: JudgedClaim, interval: Interval, tail: float, within: float = 0.0) -> JudgedClaim:
    """The claim with its interval, the verdict that follows, and the seeds that would decide it where none does."""
    beyond = interval.low is not None and interval.low > claim.bound
    short = interval.high is not None and interval.high < claim.bound
    if claim.side == "at most":
        beyond, short = short, beyond
    verdict: Verdict = "shown" if beyond else "refuted" if short else "cannot tell"
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
    told = replace(_untold(claim, tail), value=found.value, p_value=found.p_value, of_arm=of_arm, of_over=of_over)
    told = replace(told, seeds=len(seeds), of_seeds=of_seeds)
    if found.interval == stats.OPEN or len(seeds) < 2:  # arms of one recipe have a ratio of 1 without any run
        reasons: dict[int, NoInterval] = {0: "no pairs", 1: "one pair"}
        return replace(told, no_interval=reasons.get(len(seeds), "too few hits"))
    return _with_verdict(told, found.interval, tail)


# --- values of single runs ----------------------------------------------------------------------------------------


def _pairs(claim: Claim, arm: ArmRuns, over: ArmRuns) -> tuple[list[Pair | NoInterval], float]:
    """For each report seed the values of both arms, or why there are none; how much the log of a ratio may be off."""
    plan = arm.plan
    if claim.measure == "largest_learning_rate":
        found = [(_largest_rate(arm, seed), _largest_rate(over, seed)) for seed in plan.report_seeds]
        factor = (plan.largest_learning_rate or {}).get("factor", 1.0)
        return [_finite_pair(*pair, "rate not bounded") for pair in found], math.log(factor)
    return [_of_runs(claim, *pair) for pair in zip(_best_runs(arm), _best_runs(over), strict=True)], 0.0


def _best_runs(arm: ArmRuns) -> list[RunResult | None]:
    """The runs of the report seeds at the arm's best point."""
    best = arm.best(samples.steps(arm.plan.target))
    results = next((results for point, results in arm.results if point == best), {})
    return [results.get(seed) for seed in arm.plan.report_seeds]


def _finite_pair(of_arm: float | None, of_over: float | None, reason: NoInterval = "no pairs") -> Pair | NoInterval:
    if of_arm is None or of_over is None or math.isnan(of_arm) or math.isnan(of_over):
        return "no pairs"
    return (of_arm, of_over) if math.isfinite(of_arm) and math.isfinite(of_over) else reason


def _largest_rate(arm: ArmRuns, seed: int) -> float | None:
    """The largest learning rate of one seed; infinite where the search has found none so far up or down."""
    point = tuned_point(arm.plan, arm.name, arm.records) if arm.plan.tune_seeds else next(iter(arm.kept), None)
    by_rate = {record.point[rates.FIELD]: record.result for record in arm.searched if record.seed == seed}
    if point is None or not by_rate:
        return None
    try:
        found = rates.search(arm.plan, arm.name, point, by_rate.get)
    except rates.UnknownOutcome:
        return None
    return math.inf if found.trains is None or found.fails is None else found.trains


def _of_runs(claim: Claim, of_arm: RunResult | None, of_over: RunResult | None) -> Pair | NoInterval:
    if of_arm is None or of_over is None:
        return "no pairs"
    if MEASURES[claim.measure].probe is None:
        value = _final if claim.measure == "final" else attrgetter("best")
        return _finite_pair(value(of_arm), value(of_over))
    sides = [_series(run, claim.measure, claim.layer) for run in (of_arm, of_over)]
    if not all(sides):
        layers = {point.layer for run in (of_arm, of_over) for point in run.probes}
        return "unknown layer" if claim.layer is not None and claim.layer not in layers else "no pairs"
    if claim.when == "equal loss":
        losses = [next(iter(_series(run, "loss.training", None)), {}) for run in (of_arm, of_over)]
        levels = _common_losses(*losses)
        if levels is None:
            return "no common loss"
        reductions: list[Callable[[Line], float | None]] = [
            partial(_mean_at_losses, losses=loss, levels=levels) for loss in losses
        ]
    else:
        reductions = [_at_end if claim.when == "end" else _mean_over_log_steps] * 2
    mine, others = (_mean_over_layers(list(map(*each))) for each in zip(reductions, sides, strict=True))
    return _finite_pair(mine, others)


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


def _mean_over_layers(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def _at_end(line: Line) -> float:
    return line[max(line)]


def _mean_over_log_steps(line: Line) -> float | None:
    """The integral over the log of the step by trapezoids, over its length; step 0, which has no log, is left out."""
    steps = [step for step in sorted(line) if step > 0]
    values = [line[step] for step in steps]
    if len(steps) < 2:
        return values[0] if values else None
    logs = np.log(steps)
    return float(np.trapezoid(values, logs) / (logs[-1] - logs[0]))


def _common_losses(first: Line, second: Line) -> Floats | None:
    """Losses that both runs pass: from the smaller of their first to the larger of their smallest, even in the log."""
    if not (first and second):
        return None
    high = min(loss[min(loss)] for loss in (first, second))
    low = max(min(loss.values()) for loss in (first, second))
    return np.geomspace(high, low, LOSS_LEVELS) if 0 < low < high < math.inf else None


def _mean_at_losses(line: Line, losses: Line, levels: Floats) -> float | None:
    """The mean of a probe's values where the run first passes each loss, interpolated in the loss's log."""
    passed: list[tuple[float, float]] = []  # log loss, from the smallest, and value
    for step in sorted(line.keys() & losses.keys()):
        if losses[step] > 0 and (not passed or math.log(losses[step]) < passed[0][0]):
            passed.insert(0, (math.log(losses[step]), line[step]))
    if not passed:
        return None
    logs, values = np.array(passed).T
    return float(np.interp(np.log(levels), logs, values).mean())
