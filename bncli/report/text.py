"""What the results say, in words and figures: the cells that table, Markdown and HTML share. No rich here."""

from __future__ import annotations

import json
import math
import string
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from bncli.results.compare import ArmSummary, AtTarget, Comparison, ComparisonPlan, Cost, Ratio, Steps
from bncli.results.environment import Environment, Interval
from bncli.results.finding import Finding
from bncli.results.train import Target

UNKNOWN = "–"
LETTERS = string.ascii_lowercase + string.ascii_uppercase  # one an arm, where a curve has no room for its name
METHODS = {
    "geometric mean": "Steps to target: steps spent below it; geometric mean over seeds at the best point (jackknife).",
    "median": "median: with some runs past their budget (order statistics).",
    "bound": "> {most}: at least half of the runs missed; a budget of {budget} steps shows up to {most}.",
    "means": "Times fewer: steps of {reference} over the arm's, by a jackknife over seeds, paired{chosen}.",
    "medians": "Times fewer where runs missed: ratio of medians (order statistics of both).",
    "bounded ratio": "Times fewer as > or <: a bound, as at least half of an arm's runs missed.",
}


# --- figures ------------------------------------------------------------------------------------------------------


def figure(value: float | None, digits: int = 3) -> str:
    """A number to `digits` significant digits, never fewer than its whole part has; an en dash for an unknown one."""
    if value is None:
        return UNKNOWN
    if isinstance(value, int):
        return f"{value:,}"
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    exponent = int(f"{value:.{digits - 1}e}".split("e")[1])
    if exponent < -4:
        return f"{value:.{digits - 1}e}"
    return f"{value:,.{max(0, digits - 1 - exponent)}f}"


def metric_figure(value: float | None, metric: str) -> str:
    """An accuracy as a share of 1 to four decimals; a loss to four significant digits."""
    if value is None or metric != "accuracy" or not math.isfinite(value):
        return figure(value, 4)
    return f"{value:.4f}"


def interval_figure(interval: Interval) -> str:
    """`9.81–14.9`; with one open side `> 9.81` or `< 14.9`; empty when nothing bounds it."""
    if interval.low is not None and interval.high is not None:
        return f"{figure(interval.low)}–{figure(interval.high)}"
    if interval.low is not None:
        return f"> {figure(interval.low)}"
    return f"< {figure(interval.high)}" if interval.high is not None else ""


def setting(value: Any) -> str:
    """A recipe's value as its file would spell it."""
    return f"{value:.12g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)


def encodable(text: str, encoding: str) -> str:
    """The text in characters that an output of this encoding can show: a hyphen for a dash, ? for what it lacks."""
    try:
        text.encode(encoding)
        return text
    except (UnicodeEncodeError, LookupError):
        return text.replace(UNKNOWN, "-").encode("ascii", "replace").decode()


def short_names(fields: Mapping[str, Any] | tuple[str, ...]) -> dict[str, str]:
    """Each dotted field's last part, or all of it where two fields end alike."""
    last = [field.rsplit(".", 1)[-1] for field in fields]
    return {field: name if last.count(name) == 1 else field for field, name in zip(fields, last, strict=True)}


def target_words(target: Target) -> str:
    return f"held-out {target.metric} {setting(target.value)}"


# --- cells: (the figure, what stands under or beside it) ----------------------------------------------------------

Cell = tuple[str, str]


@dataclass(frozen=True)
class Column:
    header: Cell
    cells: tuple[Cell, ...]
    words: bool = False  # flush left, and may wrap
    grid: bool = False  # the arm's value of a grid field: may move under the arm's name
    extra: bool = False  # shown only where there is room


def header_words(column: Column) -> str:
    """A column's header on one line: `steps to target`, `samples/s`."""
    first, second = column.header
    return first + second if second.startswith("/") else f"{first} {second}".strip()


def joined(cell: Cell) -> str:
    """A cell on one line, its second part as an aside."""
    return f"{cell[0]} ({cell[1]})" if cell[1] else cell[0]


def steps_cell(arm: ArmSummary, most_steps: float) -> Cell:
    """The steps to target; `most_steps`: what the budget can show, which runs that missed took more than."""
    return amount_cell(arm, arm.steps, most_steps)


def amount_cell(arm: ArmSummary, steps: Steps, most_steps: float | None) -> Cell:
    """An amount to target, whatever its unit; None for `most_steps` where the budget is none of that unit."""
    if arm.runs == 0:
        return UNKNOWN, ""
    if arm.diverged == arm.runs:
        return "diverged", ""
    span = interval_figure(steps.interval)
    if steps.value is not None:
        return "median " * (steps.method == "median") + figure(steps.value), span
    low = steps.interval.low
    if most_steps is None:
        return span or UNKNOWN, ""
    return f"> {figure(most_steps)}", span if low is not None and low < 0.999 * most_steps else ""


def ratio_cell(ratio: Ratio | None) -> Cell:
    if ratio is None:
        return "1", "reference"
    span = interval_figure(ratio.interval)
    if ratio.value is None:
        return (f"{span}x", "") if span else (UNKNOWN, "")
    return f"{figure(ratio.value)}x", span


def best_point_cell(arm: ArmSummary, field: str) -> Cell:
    if field not in arm.point:
        return UNKNOWN, ""
    return setting(arm.point[field]) + "*" * (field in arm.at_edge), "fixed" * (field in arm.fixed)


def p_figure(value: float | None) -> str:
    return "< 0.0001" if value is not None and value < 1e-4 else figure(value, 2)


def comparison_columns(comparison: Comparison) -> list[Column]:
    """The comparison's table as text, column by column: one cell an arm, in the order of `comparison.arms`."""
    plan, metric = comparison.plan, comparison.plan.target.metric

    def column(first: str, second: str, cell: Callable[[ArmSummary], Cell | str], **flags: bool) -> Column:
        made = [cell(arm) for arm in comparison.arms]
        return Column((first, second), tuple(c if isinstance(c, tuple) else (c, "") for c in made), **flags)

    grid = [
        column(name, "", lambda arm, field=field: best_point_cell(arm, field), grid=True)  # type: ignore[misc]
        for field, name in short_names(plan.grid).items()
    ]
    return [
        column("arm", "", lambda arm: arm.arm, words=True),
        *grid,
        column("hits", "", lambda arm: f"{arm.hits}/{arm.runs}"),
        column("steps to", "target", lambda arm: steps_cell(arm, plan.most_steps)),
        column("first hit", "", lambda arm: figure(arm.first_hit), extra=True),
        column("times", "fewer", lambda arm: ratio_cell(arm.ratio)),
        column("p", "(Holm)", lambda arm: p_figure(arm.ratio.holm_p_value if arm.ratio else None), extra=True),
        column("best", metric, lambda arm: metric_figure(arm.best, metric)),
        column("samples", "/s", lambda arm: figure(arm.samples_per_s)),
        column("ms/step", "", lambda arm: figure(arm.ms_per_step), extra=True),
        column("memory", "MiB", lambda arm: figure(arm.peak_memory_mib)),
        column("parameters", "", lambda arm: figure(arm.parameters), extra=True),
    ]


def cost_columns(comparison: Comparison) -> list[Column]:
    """Seconds and examples to target, an arm a row: a step of one arm may cost more, or see more, than another's."""

    def cells(cost: Callable[[ArmSummary], Cost | None]) -> tuple[tuple[Cell, ...], tuple[Cell, ...]]:
        found = [(arm, cost(arm)) for arm in comparison.arms]
        amounts = tuple((UNKNOWN, "") if one is None else amount_cell(arm, one.typical, None) for arm, one in found)
        return amounts, tuple((UNKNOWN, "") if one is None else ratio_cell(one.ratio) for _, one in found)

    seconds, less_time = cells(lambda arm: arm.seconds)
    examples, fewer = cells(lambda arm: arm.examples)
    return [
        Column(("arm", ""), tuple((arm.arm, "") for arm in comparison.arms), words=True),
        Column(("seconds to", "target"), seconds),
        Column(("times", "less"), less_time),
        Column(("examples to", "target"), examples),
        Column(("times", "fewer"), fewer),
    ]


def target_columns(comparison: Comparison) -> list[Column]:
    """Every target of the runs, the hardest last: each arm's steps, and how many times fewer than the reference's."""
    plan = comparison.plan
    order = targets_in_order(plan)
    columns = [Column((f"held-out {plan.target.metric}", ""), tuple((setting(each.value), "") for each in order))]
    for arm in comparison.arms:
        found = {each.target: each for each in all_targets(plan, arm)}
        runs = [found[each] for each in order]
        steps = [amount_cell(arm, each.steps, plan.most_steps) if each.runs else (UNKNOWN, "") for each in runs]
        columns.append(Column((arm.arm, "steps"), tuple(steps)))
        if arm.ratio is not None:
            columns.append(Column(("times", "fewer"), tuple(ratio_cell(found[each].ratio) for each in order)))
    return columns


def targets_in_order(plan: ComparisonPlan) -> list[Target]:
    """All targets, the easiest first."""
    found = [plan.target, *plan.also]
    return sorted(found, key=lambda target: target.value, reverse=plan.target.metric == "loss")


def all_targets(plan: ComparisonPlan, arm: ArmSummary) -> list[AtTarget]:
    """What an arm did at each target, the plan's own first."""
    return [AtTarget(plan.target, arm.hits, arm.runs, arm.steps, arm.ratio), *arm.also]


def title(comparison: Comparison) -> str:
    return f"{comparison.plan.name}: optimizer steps to {target_words(comparison.plan.target)}"


def subtitle(plan: ComparisonPlan) -> str:
    tune, more = len(plan.tune_seeds), len(plan.report_seeds)
    seeds = f"{more} seed{'s' * (more != 1)} an arm"
    if tune:
        seeds = f"{tune} seeds at every point of the grid, {more} more where it may be the best"
    return f"{plan.data}; {seeds}; budget {figure(plan.budget)} steps"


def environments(comparison: Comparison) -> list[str]:
    """Each machine and set of versions that the runs were made with, once, without the date."""
    found = [run.result.environment for run in comparison.runs if run.result is not None]
    return list(dict.fromkeys(environment_words(environment) for environment in found))


def environment_words(made: Environment) -> str:
    threads = f"{made.threads} thread{'s' * (made.threads != 1)} a run"
    driver = [f"driver {made.driver}"] * bool(made.driver) + ["TF32"] * bool(made.tf32)
    versions = [f"torch {made.torch}", f"Python {made.python}", f"bncli {made.bncli}"]
    return ", ".join([f"{made.device} ({made.processor}, {made.platform})", threads, *driver, *versions])


def footnotes(comparison: Comparison) -> list[str]:
    """What a reader has to know beside the figures: the comparison's own notes, the marks, the methods, the machine."""
    lines = list(comparison.notes)
    if any(arm.at_edge for arm in comparison.arms):
        lines.append("*: the best value is at the edge of its grid.")
    if any(arm.fixed for arm in comparison.arms):
        lines.append("fixed: set by the arm itself, so not tuned.")
    if any(arm.runs for arm in comparison.arms):
        lines.append(" ".join(_methods(comparison)))
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
            chosen = ", that repeats the choice of each arm's best point" if plan.tune_seeds else ""
            named = {"budget": figure(plan.budget), "most": figure(plan.most_steps)}
            yield words.format(**named, reference=plan.reference, chosen=chosen)
    best = f"Best {plan.target.metric} (a run may stop at its target) and samples/s"
    yield f"Intervals are 95%. {best} are medians over seeds; memory is the largest, of the whole process on a CPU."
    yield "Seconds are of training alone, without evaluations."


# --- findings -----------------------------------------------------------------------------------------------------


def finding_text(finding: Finding) -> str:
    """What is wrong with a kernel's result, in words; empty where it is right."""
    quantity, names, given, wanted = finding.quantity, ", ".join(finding.names), finding.given, finding.wanted
    raised = f"raised {finding.exception}: " if finding.exception else ""
    match finding.kind:
        case "right":
            return ""
        case "off" | "nan_missing" | "nan_unexpected":
            return _wrong_number(finding)
        case "not_zero":
            return f"{quantity} is not 0"
        case "wrong_type":
            return f"{raised}returned a {given}; expected {wanted}"
        case "wrong_shape" if finding.exception:  # of the statistics, which a kernel returns beside y
            return f"{raised}returned mean and var of shapes {given}; expected {wanted}"
        case "wrong_shape" | "wrong_dtype" | "wrong_device":
            return f"y has {finding.kind.removeprefix('wrong_')} {given}; expected the input's, {wanted}"
        case "not_computed":
            return f"{quantity} was not computed"
        case "no_gradient":
            return f"{quantity} is missing where x needs no gradient"
        case "no_second_derivative":
            return f"{raised}the gradients came back without a graph: nothing to differentiate again"
        case "not_derivative" if finding.exception:
            return f"{finding.exception}: {finding.text}"
        case "not_derivative":
            return f"{quantity} misses central differences of the loss by {finding.relative:.2g} (relative)"
        case "wrong_exception":
            return f"{raised}{finding.text}; expected a ValueError"
        case "accepted":
            return f"an input {given} has a variance of 0 over one value; expected a ValueError"
        case "input_written":
            return f"{names} changed during the call"
        case "running_moved":
            return f"{names} changed during the call, in evaluation"
        case "running_moved_by_nothing":
            return f"{names} moved"
        case "not_deterministic":
            return f"{names} differ between two runs on the same inputs"
        case "raised" | "leaf_written" | "saved_written":
            return f"{raised}{finding.text}"


def _wrong_number(finding: Finding) -> str:
    if finding.found is None:  # of a tensor too large to look for the place
        return f"{finding.quantity} is not finite everywhere"
    if finding.at is None:
        within = f" within {finding.allowed:.2g}" if finding.allowed is not None else ""
        return f"{finding.quantity} is {finding.found:.6g}; expected {finding.expected:.6g}{within}"
    relative = f"; relative error {finding.relative:.2g}" if finding.relative is not None else ""
    place = ", ".join(map(str, finding.at))
    return f"{finding.quantity}[{place}] is {finding.found:.7g}; expected {finding.expected:.7g}{relative}"


# --- curves -------------------------------------------------------------------------------------------------------


def curve_points(arm: ArmSummary) -> list[tuple[float, float, float, float]]:
    """The curve's (step, median, lower, upper quartile) that a log axis can show: after step 0, and finite."""
    return [point for point in arm.curve if point[0] > 0 and all(map(math.isfinite, point))]


def metric_range(comparison: Comparison) -> tuple[float, float] | None:
    """What a metric axis shows: all medians and the target, but no loss far above where the arms began."""
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
