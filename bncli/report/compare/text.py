"""Columns, cells and footnotes of a comparison, shared by the terminal, Markdown, HTML and the figure."""

from __future__ import annotations

import itertools
import math
import string
from collections.abc import Iterator
from typing import Any

from bncli.report.compare.notes import sentence
from bncli.report.text import (
    UNKNOWN,
    Cell,
    Column,
    busy_mark,
    count,
    environment_words,
    figure,
    interval_figure,
    metric_figure,
    setting,
    short_names,
    target_words,
)
from bncli.results.compare import (
    ArmSummary,
    AtTarget,
    Choice,
    Comparison,
    ComparisonPlan,
    Cost,
    Ratio,
    Steps,
    TuningCell,
)
from bncli.results.train import Target

LETTERS = string.ascii_lowercase + string.ascii_uppercase  # one for each arm, on its curve
METHODS = {
    "geometric mean": "Steps to target: steps spent below it; geometric mean over seeds at the best point (jackknife).",
    "median": "median: some runs missed the target (order statistics).",
    "bound": "> {most}: at least half of the runs missed the target; a budget of {budget} steps shows up to {most}.",
    "means": "Fewer steps: the steps of {reference} divided by the arm's; jackknife over paired seeds{chosen}.",
    "medians": "Fewer steps where runs missed: ratio of medians (order statistics of both).",
    "bounded ratio": "Fewer steps as > or <: a bound, because at least half of an arm's runs missed.",
}


# --- cells and columns --------------------------------------------------------------------------------------------


def steps_cell(arm: ArmSummary, most_steps: float) -> Cell:
    """The steps to target. `most_steps`: the most that the budget can show; runs that missed took more."""
    return amount_cell(arm, arm.steps, most_steps)


def amount_cell(arm: ArmSummary, steps: Steps, most_steps: float | None) -> Cell:
    """Steps, seconds or examples to target; None for `most_steps` where the budget is in another unit."""
    if arm.runs == 0:
        return Cell(UNKNOWN)
    if arm.diverged == arm.runs:
        return Cell("diverged")
    span = interval_figure(steps.interval)
    if steps.value is not None:
        return Cell("median " * (steps.method == "median") + figure(steps.value), span)
    low = steps.interval.low
    if most_steps is None:
        return Cell(span or UNKNOWN)
    return Cell(f"> {figure(most_steps)}", span if low is not None and low < 0.999 * most_steps else "")


def ratio_cell(ratio: Ratio | None) -> Cell:
    if ratio is None:
        return Cell("1", "reference")
    span = interval_figure(ratio.interval)
    if ratio.value is None:
        return Cell(f"{span}x" if span else UNKNOWN)
    return Cell(f"{figure(ratio.value)}x", span)


def best_point_cell(arm: ArmSummary, field: str) -> Cell:
    if field not in arm.point:
        return Cell(UNKNOWN)
    return Cell(setting(arm.point[field]) + "*" * (field in arm.at_edge), "fixed" * (field in arm.fixed))


def p_figure(value: float | None) -> str:
    return "< 0.0001" if value is not None and value < 1e-4 else figure(value, 2)


def comparison_columns(comparison: Comparison, grid_below_arm: bool = False) -> list[Column]:
    """The comparison's table, one row per arm; the best grid values in columns or below the arm's name."""
    plan, arms, metric = comparison.plan, comparison.arms, comparison.plan.target.metric
    grid = [
        Column(name, [best_point_cell(arm, field) for arm in arms]) for field, name in short_names(plan.grid).items()
    ]
    names = [Cell(arm.arm) for arm in arms]
    if grid_below_arm:
        for index, arm in enumerate(arms):
            values = [f"{each.name} {each.cells[index].main} {each.cells[index].aside}".strip() for each in grid]
            names[index] = Cell(arm.arm, ", ".join(values))
        grid = []
    return [
        Column("arm", names, words=True, style="bold"),
        *grid,
        Column("hits", [f"{arm.hits}/{arm.runs}" for arm in arms]),
        Column("steps to\ntarget", [steps_cell(arm, plan.most_steps) for arm in arms]),
        Column("first hit", [figure(arm.first_hit) for arm in arms], optional=True),
        Column("fewer\nsteps", [ratio_cell(arm.ratio) for arm in arms], style="bold"),
        Column("p\n(Holm)", [p_figure(arm.ratio.holm_p_value if arm.ratio else None) for arm in arms], optional=True),
        Column(f"best\n{metric}", [metric_figure(arm.best, metric) for arm in arms]),
        Column("samples\n/s", [figure(arm.samples_per_s) + busy_mark(arm.cores_lacked) for arm in arms]),
        Column("ms/step", [figure(arm.ms_per_step) + busy_mark(arm.cores_lacked) for arm in arms], optional=True),
        Column("memory\nMiB", [figure(arm.peak_memory_mib) for arm in arms]),
        Column("parameters", [figure(arm.parameters) for arm in arms], optional=True),
    ]


def cost_columns(comparison: Comparison) -> list[Column]:
    """Seconds and examples to target, one row per arm: steps of different arms may differ in time and batch size."""
    columns = [Column("arm", [arm.arm for arm in comparison.arms], words=True, style="bold")]
    for unit, less in (("seconds", "less\ntime"), ("examples", "fewer\nexamples")):
        found: list[tuple[ArmSummary, Cost | None]] = [(arm, getattr(arm, unit)) for arm in comparison.arms]
        amounts = [amount_cell(arm, cost.typical, None) if cost else Cell(UNKNOWN) for arm, cost in found]
        ratios = [ratio_cell(cost.ratio) if cost else Cell(UNKNOWN) for _, cost in found]
        if unit == "seconds":
            marks = [busy_mark(arm.cores_lacked) for arm in comparison.arms]
            amounts = [cell._replace(main=cell.main + mark) for cell, mark in zip(amounts, marks, strict=True)]
        columns += [Column(f"{unit} to\ntarget", amounts), Column(less, ratios, style="bold")]
    return columns


def target_columns(comparison: Comparison) -> list[Column]:
    """One row per target, the hardest last: each arm's steps, and their ratio to the reference's."""
    plan = comparison.plan
    order = targets_in_order(plan)
    columns = [Column(f"held-out {plan.target.metric}", [setting(each.value) for each in order])]
    for arm in comparison.arms:
        found = {each.target: each for each in all_targets(plan, arm)}
        runs = [found[each] for each in order]
        steps = [amount_cell(arm, each.steps, plan.most_steps) if each.runs else Cell(UNKNOWN) for each in runs]
        columns.append(Column(f"{arm.arm}\nsteps", steps))
        if arm.ratio is not None:
            columns.append(Column("fewer\nsteps", [ratio_cell(each.ratio) for each in runs], style="bold"))
    return columns


def side_tables(comparison: Comparison) -> list[tuple[str, list[Column]]]:
    """The tables below the comparison's own, each with its heading."""
    found = [("what it costs to reach the target", cost_columns(comparison))]
    return found + [("steps to each target", target_columns(comparison))] * bool(comparison.plan.also)


def targets_in_order(plan: ComparisonPlan) -> list[Target]:
    """All targets, the easiest first."""
    found = [plan.target, *plan.also]
    return sorted(found, key=lambda target: target.value, reverse=plan.target.metric == "loss")


def all_targets(plan: ComparisonPlan, arm: ArmSummary) -> list[AtTarget]:
    """The results of an arm at each target, the main one first."""
    return [AtTarget(plan.target, arm.hits, arm.runs, arm.steps, arm.ratio), *arm.also]


# --- tuning runs --------------------------------------------------------------------------------------------------


def tuning_columns(comparison: Comparison) -> list[Column]:
    """Rows: arms and values of the other grid fields; columns: values of the field with the most values."""
    plan = comparison.plan
    if not plan.grid:
        return []
    across = max(plan.grid, key=lambda field: len(plan.grid[field]))
    rows = [(arm, others) for arm in comparison.arms for others in _other_values(arm, plan, across)]
    reference = next((arm for arm in comparison.arms if arm.arm == plan.reference), None)
    names = [Cell(arm.arm, _row_words(arm, others, across, plan)) for arm, others in rows]
    columns = [Column("arm", names, words=True, style="bold")]
    for value in plan.grid[across]:
        points = [(arm, {**others, across: value}) for arm, others in rows]
        cells = [_tuning_cell(arm, point, reference, plan.most_steps) for arm, point in points]
        columns.append(Column(f"{short_names(plan.grid)[across]} {setting(value)}", cells))
    return columns


def _other_values(arm: ArmSummary, plan: ComparisonPlan, across: str) -> list[dict[str, Any]]:
    values = {
        f: (arm.point[f],) if f in arm.fixed and f in arm.point else plan.grid[f] for f in plan.grid if f != across
    }
    return [dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())]


def _row_words(arm: ArmSummary, others: dict[str, Any], across: str, plan: ComparisonPlan) -> str:
    shown = {**others, across: arm.point[across]} if across in arm.fixed and across in arm.point else others
    names = short_names(plan.grid)
    return ", ".join(f"{names[f]} {setting(v)}{' fixed' * (f in arm.fixed)}" for f, v in shown.items())


def _at(arm: ArmSummary | None, point: dict[str, Any]) -> TuningCell | None:
    if arm is None:
        return None
    return next((cell for cell in arm.tuning if {**arm.point, **cell.point} == point), None)


def _tuning_cell(arm: ArmSummary, point: dict[str, Any], reference: ArmSummary | None, most_steps: float) -> Cell:
    cell, other = _at(arm, point), _at(reference, point)
    if cell is None or cell.runs == 0:
        return Cell(UNKNOWN)
    words = figure(cell.steps) if cell.hits else "diverged" if cell.diverged == cell.runs else "never"
    best = f"[{words}]" if point == arm.point else f"({words})" if cell.kept else words
    shown = best if words == "diverged" else f"{best} {cell.hits}/{cell.runs}"
    return Cell(shown, "" if other is None or arm is reference else common_ratio(cell, other, most_steps))


def common_ratio(cell: TuningCell, reference: TuningCell, most_steps: float) -> str:
    """The ratio of steps at one grid value; unknown where runs missed the target on both sides.

    On one side a miss counts as the most steps that the budget can show, which is less than it would have taken: the
    ratio is then a bound.
    """

    def log_mean(of: TuningCell) -> float | None:
        if of.runs == 0 or (of.hits and not of.steps):  # no geometric mean: a run was at the target before training
            return None
        return (of.hits * math.log(of.steps or 1) + (of.runs - of.hits) * math.log(most_steps)) / of.runs

    mine, its = log_mean(cell), log_mean(reference)
    missed, reference_missed = cell.hits < cell.runs, reference.hits < reference.runs
    if mine is None or its is None or (missed and reference_missed):
        return UNKNOWN
    sign = "< " if missed else "> " if reference_missed else ""
    return f"{sign}{figure(math.exp(its - mine))}x"


def tuning_notes(comparison: Comparison) -> list[str]:
    seeds = count(len(comparison.plan.tune_seeds), "tuning seed")
    choices = [f"{arm.arm}: {choice_words(arm.choice)}" for arm in comparison.arms if arm.choice]
    return [
        f"Geometric mean of the steps of the runs that hit the target, hits/runs over {seeds};"
        f" below it the steps of {comparison.plan.reference} at the same value divided by these (no interval).",
        "[ ]: the arm's best point over all of its seeds; ( ): trained with further seeds too, since the tuning seeds "
        "could not distinguish it from the best. > and <: bounds, where runs missed.",
        *([f"Kept: {'; '.join(choices)}."] if choices else []),
    ]


def choice_words(choice: Choice) -> str:
    """How many points were kept, and how clear the choice was where there are several."""
    kept = f"{choice.kept} of {choice.points} points"
    if choice.kept < 2 or choice.doubt is None:
        return kept
    return f"{kept}, {choice.doubt:.0%} of the samples with one seed left out choose another"


# --- titles and footnotes -----------------------------------------------------------------------------------------


def title(comparison: Comparison) -> str:
    return f"{comparison.plan.name}: optimizer steps to {target_words(comparison.plan.target)}"


def subtitle(plan: ComparisonPlan) -> str:
    tune, more = len(plan.tune_seeds), len(plan.report_seeds)
    seeds = f"{count(more, 'seed')} per arm"
    if tune:
        seeds = f"{count(tune, 'seed')} at every point of the grid, {more} more at points that may be the best"
    return f"{plan.data}; {seeds}; budget {figure(plan.budget)} steps"


def environments(comparison: Comparison) -> list[str]:
    """Each machine and set of versions, once."""
    found = [run.result.environment for run in comparison.runs if run.result is not None]
    return list(dict.fromkeys(environment_words(environment) for environment in found))


def footnotes(comparison: Comparison) -> list[str]:
    """The comparison's notes, then marks, methods and machines."""
    lines = [sentence(note) for note in comparison.notes]
    if any(arm.at_edge for arm in comparison.arms):
        lines.append("*: the best value is at the edge of its grid.")
    if any(arm.fixed for arm in comparison.arms):
        lines.append("fixed: set by the arm itself, so not tuned.")
    if any(arm.runs for arm in comparison.arms):
        lines.append(" ".join(_methods(comparison)))
    probed = {run.key: run.result for run in comparison.runs if run.result and run.result.probes_s}.values()
    if probed:
        probes_s, rest_s = sum(r.probes_s for r in probed), sum(r.training_s + r.evaluation_s for r in probed)
        runs = f"{figure(rest_s)} s of training and evaluations in {count(len(probed), 'run')}"
        lines.append(f"Probes took {figure(probes_s)} s beside {runs}; no figure of time includes them.")
    return [*lines, *(f"Made on {words}." for words in environments(comparison))]


def _methods(comparison: Comparison) -> Iterator[str]:
    plan = comparison.plan
    started = [arm for arm in comparison.arms if arm.runs]
    used: set[str] = {arm.steps.method for arm in started if arm.steps.method != "bound"}
    used |= {"bound" for arm in started if arm.steps.value is None and arm.diverged < arm.runs}
    ratios = [arm.ratio for arm in started if arm.ratio]
    used |= {ratio.method for ratio in ratios if ratio.method in ("means", "medians")}
    used |= {"bounded ratio" for ratio in ratios if ratio.value is None and interval_figure(ratio.interval)}
    for method, words in METHODS.items():
        if method in used:
            chosen = ", repeating the choice of each arm's best point" if plan.tune_seeds else ""
            named = {"budget": figure(plan.budget), "most": figure(plan.most_steps)}
            yield words.format(**named, reference=plan.reference, chosen=chosen)
    best = f"Best {plan.target.metric} (a run may stop at its target) and samples/s"
    yield f"Intervals are 95%. {best} are medians over seeds; memory is the maximum, on a CPU of the whole process."
    yield "Seconds are training time, without evaluations."


# --- curves -------------------------------------------------------------------------------------------------------


def curve_points(arm: ArmSummary) -> list[tuple[float, float, float, float]]:
    """The points (step, median, lower, upper quartile) that a log axis can show: finite and after step 0."""
    return [point for point in arm.curve if point[0] > 0 and all(map(math.isfinite, point))]


def metric_range(comparison: Comparison) -> tuple[float, float] | None:
    """The range of the metric's axis: all medians and the target, but no loss far above the arms' first values."""
    curves = [points for points in map(curve_points, comparison.arms) if points]
    if not curves:
        return None
    target = comparison.plan.target
    values = [point[1] for points in curves for point in points] + [target.value]
    low, high = min(values), max(values)
    if target.metric == "loss":
        high = min(high, 1.2 * max(target.value, *(points[0][1] for points in curves)))
    margin = 0.04 * ((high - low) or abs(high) or 1.0)
    return low - margin, high + margin
