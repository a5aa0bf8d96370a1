"""Columns, cells and footnotes of a comparison, shared by the terminal, Markdown, HTML and the figure."""

from __future__ import annotations

import itertools
import math
import string
from collections.abc import Iterator
from typing import Any

from bncli.report.compare.notes import WARNINGS, sentences
from bncli.report.figure import thinned
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
    times,
)
from bncli.results.compare import ArmSummary, AtTarget, Comparison, ComparisonPlan, Cost, Ratio, Steps, TuningCell
from bncli.results.environment import Interval
from bncli.results.train import AHEAD

LETTERS = string.ascii_lowercase + string.ascii_uppercase  # one for each arm, on its curve
MOST_SENTENCES = 4  # of the headline


# --- cells and columns --------------------------------------------------------------------------------------------


def amount_cell(arm: ArmSummary, steps: Steps, most_steps: float | None) -> Cell:
    """Steps, seconds or examples to target.

    most_steps: the most that the budget can show, runs that missed took more; None where it is in another unit.
    """
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


def ratio_cell(ratio: Ratio | None, less: str = "fewer") -> Cell:
    """The ratio to the reference in words, the other way round where it is below 1. less: the word for above 1."""
    if ratio is None or ratio.method == "same recipe":
        return Cell("1", "same recipe" if ratio else "reference")
    low, high = ratio.interval.low, ratio.interval.high
    size = next((each for each in (ratio.value, high, low) if each is not None), 1)
    if size < 1:
        low, high = (1 / end if end else None for end in (high, low))
    span = interval_figure(Interval(low, high))
    if ratio.value is None:
        return Cell(f"{span}x {'more' if size < 1 else less}" if span else UNKNOWN)
    return Cell(times(ratio.value, less), span)


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
        Column("hits", [Cell(f"{a.hits}/{a.runs}", f"{len(a.failures)} failed" * bool(a.failures)) for a in arms]),
        Column("steps to\ntarget", [amount_cell(arm, arm.steps, plan.most_steps) for arm in arms]),
        Column("first hit", [figure(arm.first_hit) for arm in arms], optional=True),
        Column("steps vs\nreference", [ratio_cell(arm.ratio) for arm in arms], style="bold"),
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
    for unit, less in (("seconds", "less"), ("examples", "fewer")):
        found: list[tuple[ArmSummary, Cost | None]] = [(arm, getattr(arm, unit)) for arm in comparison.arms]
        amounts = [amount_cell(arm, cost.typical, None) if cost else Cell(UNKNOWN) for arm, cost in found]
        if unit == "seconds":
            marks = [busy_mark(arm.cores_lacked) for arm in comparison.arms]
            amounts = [cell._replace(main=cell.main + mark) for cell, mark in zip(amounts, marks, strict=True)]
        ratios = [ratio_cell(cost.ratio, less) if cost else Cell(UNKNOWN) for _, cost in found]
        columns += [Column(f"{unit} to\ntarget", amounts), Column(f"{unit} vs\nreference", ratios, style="bold")]
    return columns


def target_columns(comparison: Comparison) -> list[Column]:
    """One row per target, the hardest last: each arm's steps, and their ratio to the reference's."""
    plan = comparison.plan
    values = [setting(each.target.value) for each in all_targets(plan, comparison.arms[0])]
    columns = [Column(f"held-out {plan.target.metric}", values)]
    for arm in comparison.arms:
        runs = all_targets(plan, arm)
        steps = [amount_cell(arm, each.steps, plan.most_steps) if each.runs else Cell(UNKNOWN) for each in runs]
        columns.append(Column(f"{arm.arm}\nsteps", steps))
        if arm.ratio is not None:
            columns.append(Column("steps vs\nreference", [ratio_cell(each.ratio) for each in runs], style="bold"))
    return columns


def side_tables(comparison: Comparison) -> list[tuple[str, list[Column]]]:
    """The tables below the comparison's own, each with its heading."""
    found = [("what it costs to reach the target", cost_columns(comparison))]
    return found + [("steps to each target", target_columns(comparison))] * bool(comparison.plan.also)


def all_targets(plan: ComparisonPlan, arm: ArmSummary) -> list[AtTarget]:
    """The results of an arm at each target, the easiest first."""
    found = [AtTarget(plan.target, arm.hits, arm.runs, arm.steps, arm.ratio), *arm.also]
    return sorted(found, key=lambda each: each.target.value, reverse=plan.target.metric == "loss")


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
    if cell is not None and cell.stopped_at is not None:
        return Cell("stopped", f"at {cell.stopped_at:,}")
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
        if (
            of.runs == 0 or of.stopped_at is not None or (of.hits and not of.steps)
        ):  # no geometric mean: a run was at the target before training
            return None
        return (of.hits * math.log(of.steps or 1) + (of.runs - of.hits) * math.log(most_steps)) / of.runs

    mine, its = log_mean(cell), log_mean(reference)
    missed, reference_missed = cell.hits < cell.runs, reference.hits < reference.runs
    if mine is None or its is None or (missed and reference_missed):
        return UNKNOWN
    sign = "< " if missed else "> " if reference_missed else ""
    ratio = math.exp(its - mine)
    if ratio < 1:
        sign = {"< ": "> ", "> ": "< "}.get(sign, "")
    return f"{sign}{times(ratio, '')}"


def tuning_notes(comparison: Comparison) -> list[str]:
    seeds, reference = count(len(comparison.plan.tune_seeds), "tuning seed"), comparison.plan.reference
    kept, stopped = [], any(cell.stopped_at is not None for arm in comparison.arms for cell in arm.tuning)
    for arm in comparison.arms:
        if arm.choice:
            doubt = arm.choice.doubt if arm.choice.kept > 1 else None
            differ = "" if doubt is None else f" ({doubt:.0%} of samples without one seed choose another)"
            kept.append(f"{arm.arm} {arm.choice.kept} of {arm.choice.points} points{differ}")
    return [
        f"Steps to target (geometric mean of the runs that hit it) and hits over {seeds}; below: how many times "
        f"fewer than {reference}'s at the same value, or more, without an interval.",
        "[ ]: the best point; ( ): not told from it by the tuning seeds, so trained with further ones too.",
        *["stopped: from that step on it could no longer win. The step depends on the machine, and has no ratio below."]
        * stopped,
        *[f"Kept: {'; '.join(kept)}."] * bool(kept),
    ]


# --- the answer in words ------------------------------------------------------------------------------------------


def headline(comparison: Comparison) -> list[str]:
    """The answer in a sentence for each arm but the reference; the first names the target and how arms were tuned."""
    reference = next(arm for arm in comparison.arms if arm.arm == comparison.plan.reference)
    others = [arm for arm in comparison.arms if arm is not reference]
    unfinished = next((note.facts for note in comparison.notes if note.kind == "unfinished"), None)
    so_far = "So far, with {done:,} of {planned:,} runs done, to".format(**unfinished) if unfinished else "To"
    points = {arm.choice.points if arm.choice else 1 for arm in comparison.arms if arm.runs} or {1}
    settings = " to ".join(map(str, sorted({min(points), max(points)})))
    tuned = ", without tuning" if settings == "1" else f", each at its best of {settings} settings"
    answered = [arm for arm in others if arm.runs and reference.runs]
    answers = [_answer(arm, reference, tuned * (arm is answered[0])) for arm in answered[:MOST_SENTENCES]]
    of = "" if reference.runs else f" of {reference.arm}"
    for failed, why in ((False, f"no result{of} yet"), (True, f"runs{of} failed")):
        without = [arm for arm in others if arm not in answered and bool((reference if of else arm).failures) == failed]
        names = ", ".join(arm.arm for arm in without)
        answers += [f"{names} cannot be compared with {reference.arm}: {why}"] * bool(without)
    first, *rest = answers or [f"only {reference.arm} was trained"]
    more = [f"{count(len(answered) - MOST_SENTENCES, 'more arm')} in the table"] * (len(answered) > MOST_SENTENCES)
    return [f"{each}." for each in (f"{so_far} {target_words(comparison.plan.target)}, {first}", *rest, *more)]


def _answer(arm: ArmSummary, reference: ArmSummary, tuned: str) -> str:
    """How an arm with runs compares with the reference, or why nothing can be said."""
    of, to, ratio = arm.arm, reference.arm, arm.ratio
    hits = f"{arm.hits} of {arm.runs} runs reached it in time, {reference.hits} of {reference.runs} of {to}"
    ends = [end for end in (ratio.interval.low, ratio.interval.high) if end] if ratio else []
    if ratio is None or (ratio.value is None and not ends):
        lost = [f"{count(len(each.failures), 'run')} of {each.arm}" for each in (arm, reference) if each.failures]
        few = f"{arm.runs} and {reference.runs} runs are too few" + f", since {' and '.join(lost)} failed" * bool(lost)
        return f"{of} and {to} give no ratio: {hits if ratio and ratio.method == 'hits' else few}"
    if ratio.method == "same recipe":
        return f"{of} is {to} under another name"
    missed = f"; {hits}" * (arm.hits < arm.runs or reference.hits < reference.runs)
    if ends and (ratio.interval.low or 0) <= 1 <= (ratio.interval.high or math.inf):
        span = "at most " * (len(ends) == 1) + " to ".join(times(end, unit=" times") for end in ends)
        return f"{of} cannot be told from {to}: {span} steps (95 %){tuned}{missed}"
    if ratio.value is None:
        return f"{of} needed at least {times(ends[0], unit=' times')} steps than {to} (95 %){tuned}{missed}"
    sizes = " to ".join(map(figure, sorted(max(end, 1 / end) for end in ends)))
    span = f"95 %: {'at least ' * (len(ends) == 1)}{sizes}" if ends else "no interval"
    return f"{of} needed {times(ratio.value, unit=' times')} steps than {to} ({span}){tuned}{missed}"


# --- titles and footnotes -----------------------------------------------------------------------------------------


def title(comparison: Comparison) -> str:
    return f"{comparison.plan.name}: optimizer steps to {target_words(comparison.plan.target)}"


def subtitle(plan: ComparisonPlan) -> str:
    tune, more = len(plan.tune_seeds), len(plan.report_seeds)
    seeds = f"{count(more, 'seed')} per arm"
    if tune:
        seeds = f"{count(tune, 'seed')} at every point of the grid, {more} more at points that may be the best"
    return f"{plan.data}; {seeds}; budget {figure(plan.budget)} steps"


def footnotes(comparison: Comparison) -> list[str]:
    """The notes that are no warnings, then marks, methods and machines."""
    lines = [f"{each.rstrip('.')}." for each in sentences(n for n in comparison.notes if n.kind not in WARNINGS)]
    marks = {"at_edge": "*: at the edge of its grid.", "fixed": "fixed: set by the arm itself, so not tuned."}
    lines += [words for mark, words in marks.items() if any(getattr(arm, mark) for arm in comparison.arms)]
    if any(arm.runs for arm in comparison.arms):
        lines.append(" ".join(_methods(comparison)))
    probed = {run.key: run.result for run in comparison.runs if run.result and run.result.probes_s}.values()
    if probed:
        probes_s, rest_s = sum(r.probes_s for r in probed), sum(r.training_s + r.evaluation_s for r in probed)
        rest = f"{figure(rest_s)} s of training and evaluations in {count(len(probed), 'run')}"
        lines.append(f"Probes took {figure(probes_s)} s beside {rest}; no figure of time includes them.")
    made = [environment_words(run.result.environment) for run in comparison.runs if run.result is not None]
    return [*lines, *(f"Made on {words}." for words in dict.fromkeys(made))]


def _methods(comparison: Comparison) -> Iterator[str]:
    plan, started = comparison.plan, [arm for arm in comparison.arms if arm.runs]
    used = {arm.steps.method for arm in started} | {arm.ratio.method for arm in started if arm.ratio}
    most, chosen = figure(plan.most_steps), " that repeats the choice of each arm's best point" * bool(plan.tune_seeds)
    yield "Steps to target: those spent below it; geometric mean over seeds at the best point."
    if used & {"means", "medians", "bound"}:
        yield f"Steps vs reference: {plan.reference}'s divided by the arm's, paired by seed; more: the other way round."
    if any(arm.steps.value is None and arm.diverged < arm.runs for arm in started):
        yield f"> {most}, > and <: half of the runs or more missed; {figure(plan.budget)} steps show up to {most},"
        yield f"since a run has to go on for {AHEAD:.0%} of its steps to target before these are settled."
    orders = "; where runs missed, medians and order statistics" * bool(used & {"median", "medians", "bound"})
    yield f"Intervals: 95 %, a jackknife over seeds{chosen}{orders}; of a ratio, one with 1 in it shows no difference."
    yield f"Best {plan.target.metric}, samples/s: medians over seeds; seconds: training alone."
    if any(run.phase == "cost" for run in comparison.runs):
        yield "Runs of an arm trained together; samples/s, seconds and memory are of a short run alone."
    yield "Memory: the largest peak in training; on a CPU the process's, with all of the data that the processes share."


# --- curves -------------------------------------------------------------------------------------------------------


def curve_points(arm: ArmSummary) -> list[tuple[float, ...]]:
    """The points (step, median, lower, upper quartile) that a log axis can show: finite, after step 0, not too many."""
    return thinned([point for point in arm.curve if point[0] > 0 and all(map(math.isfinite, point))])


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
