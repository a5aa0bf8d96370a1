"""Figure of a comparison: median curves with quartile bands, and each run's steps to target with intervals."""

from __future__ import annotations

import math
import textwrap
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from bncli.report import figure as figures
from bncli.report.compare import text
from bncli.report.figure import COLOURS, DEFAULT_STYLE, INK, PALE, FigureStyle, line_style
from bncli.report.text import Cell, setting
from bncli.results.compare import ArmSummary, Comparison
from bncli.results.train import RunResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Inches: the figure's width, and that below which arms are named above their runs; heights of panels and their frames.
WIDTH, NAMES_ABOVE = 11.0, 9.0
CURVES, TARGETS, FRAME = 2.9, 2.4, 0.75
NAME = 25, 44  # characters of an arm's name on a line: beside its runs, above them


def draw(figure: Figure, comparison: Comparison, style: FigureStyle = DEFAULT_STYLE) -> None:
    """Put the curves, the runs and, with several targets, the ratios by target on an empty figure."""
    width = style.width_inches or WIDTH
    above = width < NAMES_ABOVE
    lines = [name.count("\n") + 1 for name in _names(comparison, above)]
    runs = len(lines) * (0.7 + 0.19 * max(lines)) if above else sum(0.19 * max(2.6, each) for each in lines)
    heights = {"steps": FRAME + runs, **({"targets": TARGETS} if _has_ratios_by_target(comparison) else {})}
    if width < figures.NARROW:
        heights = {"curves": CURVES, **heights}
        mosaic: Any = [[name] for name in heights]
    else:
        mosaic = [["curves", name] for name in heights]
        heights["steps"] = max(heights["steps"], CURVES + 0.3 - heights.get("targets", 0))
    figure.set_size_inches(width, sum(heights.values()))
    figures.write_caption(figure, style, text.title(comparison), f"{text.subtitle(comparison.plan)}. {key(comparison)}")
    panels = figure.subplot_mosaic(mosaic, height_ratios=list(heights.values()))
    _curves(panels["curves"], comparison)
    _steps(panels["steps"], comparison, above)
    if "targets" in panels:
        _targets(panels["targets"], comparison)


def _has_ratios_by_target(comparison: Comparison) -> bool:
    found = (each.ratio for arm in comparison.arms for each in text.all_targets(comparison.plan, arm) if arm.also)
    return any(ratio is not None and ratio.value is not None for ratio in found)


def _targets(axes: Axes, comparison: Comparison) -> None:
    """The ratio at each target of the runs."""
    axes.set_title("times fewer steps, by target")
    axes.set_xlabel(f"target: held-out {comparison.plan.target.metric}")
    order = [each.target.value for each in text.all_targets(comparison.plan, comparison.arms[0])]
    axes.set_xticks(order, list(map(setting, order)))
    for index, arm in enumerate(comparison.arms):
        points = [
            (each.target.value, ratio.value, ratio.interval.low or ratio.value, ratio.interval.high or ratio.value)
            for each in text.all_targets(comparison.plan, arm)
            if (ratio := each.ratio) and ratio.value is not None
        ]
        if points:
            places, values, low, high = zip(*points, strict=True)
            axes.plot(places, values, marker="o", ms=4, **line_style(index))
            axes.vlines(places, low, high, color=line_style(index)["color"], linewidth=1)
    axes.axhline(1, **figures.DASHED)
    if comparison.plan.target.metric == "loss":
        axes.invert_xaxis()
    axes.set_ylim(bottom=0)


def key(comparison: Comparison) -> str:
    """How to read the figure."""
    results = [result for arm in comparison.arms for result in comparison.results_of(arm)]
    missed = [result for result in results if result.steps_to_target is None]
    parts = ["Line: median, band: quartiles over seeds."]
    if any(len(arm.curve) > figures.MOST_PLACES for arm in comparison.arms):
        parts.append(figures.THINNED)
    if len(missed) < len(results):
        parts.append("Dot: a run; diamond: geometric mean (median where runs missed) with its 95% interval.")
    if any(result.status != "diverged" for result in missed):
        parts.append("Open triangle: runs that missed, at the most steps that their budget can show.")
    if any(result.status == "diverged" for result in missed):
        parts.append("Cross: runs that diverged.")
    return " ".join(parts)


# --- left: curves -------------------------------------------------------------------------------------------------


def _curves(axes: Axes, comparison: Comparison) -> None:
    """The median curves on a log axis of steps, each with its arm's letter, and the target as a dashed line."""
    target, bounds = comparison.plan.target, text.metric_range(comparison)
    curves = {index: points for index, arm in enumerate(comparison.arms) if (points := text.curve_points(arm))}
    axes.set_title(f"held-out {target.metric}")
    axes.set_xlabel("optimizer steps")
    if bounds is None:
        axes.set(xticks=[], yticks=[])
        axes.text(0.5, 0.5, "no run has been evaluated yet", ha="center", transform=axes.transAxes, color=PALE)
        return
    axes.axhline(target.value, **figures.DASHED)
    for index, points in curves.items():
        steps, medians, lows, highs = zip(*points, strict=True)
        axes.fill_between(steps, lows, highs, color=line_style(index)["color"], alpha=0.18, linewidth=0)
        axes.plot(steps, medians, **line_style(index))
    ends = [step for points in curves.values() for step in (points[0][0], points[-1][0])]
    axes.set_xscale("log")
    axes.set_xlim(min(ends), max(*ends, 1.5 * min(ends)) * 1.1)
    axes.set_ylim(bounds[0], bounds[1] + 0.03 * (bounds[1] - bounds[0]))
    figures.plain_ticks(axes)
    words: dict[str, Any] = {"xycoords": axes.get_yaxis_transform(), "textcoords": "offset points", "color": PALE}
    axes.annotate(f"target {setting(target.value)}", (0.02, target.value), (0, 3), **words)
    to_axes = axes.transData - axes.transAxes
    _letters(
        axes, {index: [tuple(to_axes.transform(point[:2])) for point in points] for index, points in curves.items()}
    )


def _letters(axes: Axes, paths: dict[int, list[tuple[float, float]]]) -> None:
    """A letter on each curve, away from the other curves and letters. Places are (x, y) in axes coordinates."""
    taken: list[tuple[float, float]] = []
    for index, path in paths.items():
        others = [place for other in paths if other != index for place in paths[other]]

        def clearance(at: tuple[float, float], others: list[tuple[float, float]] = others) -> float:
            edge = min(at[0], 1 - at[0], at[1], 1 - at[1])
            curve, letter = (min((math.dist(at, place) for place in places), default=1.0) for places in (others, taken))
            return min(edge, 0.06) + min(curve, 0.06) + min(letter, 0.12)

        taken.append(max(reversed(path), key=clearance))
        colour = COLOURS[index % len(COLOURS)]
        badge = {"boxstyle": "circle,pad=0.2", "facecolor": "white", "edgecolor": colour}
        style: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 8, "fontweight": "bold", "bbox": badge}
        axes.text(*taken[-1], _letter(index), color=colour, transform=axes.transAxes, **style)


def _letter(index: int) -> str:
    return text.LETTERS[index % len(text.LETTERS)]


# --- right: steps to target ---------------------------------------------------------------------------------------


def _names(comparison: Comparison, above: bool) -> list[str]:
    return [textwrap.fill(f"{_letter(index)}  {arm.arm}", NAME[above]) for index, arm in enumerate(comparison.arms)]


def _steps(axes: Axes, comparison: Comparison, above: bool = False) -> None:
    """Each run and the mean of an arm's; its name and figures beside its row, or above it where there is no room."""
    arms, most, names = comparison.arms, comparison.plan.most_steps, _names(comparison, above)
    steps = [text.amount_cell(arm, arm.steps, most) for arm in arms]
    ratios = [text.ratio_cell(arm.ratio) for arm in arms]
    axes.set_title("steps to target, and vs reference" if above else "steps to target")
    axes.set_xlabel("optimizer steps")
    axes.set_xscale("log")
    for row, arm in enumerate(arms):
        _arm_runs(axes, row, 0.2 * above, comparison.results_of(arm), most)
        _average(axes, row + 0.2 * above, arm, most)
    margin = 0.0 if above else max(0.0, (4 - len(arms)) / 4)  # two arms are not moved to the ends of the axis
    axes.set_ylim(len(arms) - 0.45 + margin, -0.5 - margin)
    figures.name_rows(axes, range(len(arms)), [""] * len(arms) if above else names)
    for index, label in enumerate(axes.get_yticklabels()):
        label.set(color=COLOURS[index % len(COLOURS)], fontweight="bold")
    if any(arm.runs for arm in arms):
        low, high = axes.get_xlim()
        axes.set_xlim(low / 1.1, max(high * 1.1, low * 2))
        figures.plain_ticks(axes)
    else:
        axes.set_xticks([])
        axes.minorticks_off()
    if above:
        _words_above(axes, names, [f"{step.line}     {ratio.line}" for step, ratio in zip(steps, ratios, strict=True)])
        return
    _side_column(axes, 8, "steps", steps)
    _side_column(axes, 18 + 6.2 * max(5, *(len(part) for cell in steps for part in cell)), "vs reference", ratios)


def _words_above(axes: Axes, names: Sequence[str], figures: Sequence[str]) -> None:
    for row, (name, below) in enumerate(zip(names, figures, strict=True)):
        place: dict[str, Any] = {"xycoords": axes.get_yaxis_transform(), "textcoords": "offset points", "va": "top"}
        place["bbox"] = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # no grid runs through the words
        colour, lines = COLOURS[row % len(COLOURS)], name.count("\n") + 1
        axes.annotate(
            name, (0, row - 0.5), (0, -3), color=colour, fontweight="bold", fontsize=8, parse_math=False, **place
        )
        axes.annotate(below, (0, row - 0.5), (0, -4 - 10.5 * lines), fontsize=8, **place)


def _side_column(axes: Axes, left: float, header: str, cells: list[Cell]) -> None:
    """Words beside the rows, `left` points right of the axes."""
    style: dict[str, Any] = {"textcoords": "offset points", "va": "center", "linespacing": 1.3}
    axes.annotate(header, (1, 1), (left, 6), xycoords="axes fraction", textcoords="offset points", fontsize=10)
    for row, (main, aside, _) in enumerate(cells):
        for words, size, weight in ((main + "\n" * bool(aside), 9, "bold"), ("\n" * bool(aside) + aside, 8, "normal")):
            place = (1, row), (left, 0)
            axes.annotate(words, *place, xycoords=axes.get_yaxis_transform(), fontsize=size, fontweight=weight, **style)


def _arm_runs(axes: Axes, row: int, lower: float, results: list[RunResult], most: float) -> None:
    colour = COLOURS[row % len(COLOURS)]
    for index, result in enumerate(results):
        height = row + lower + 0.3 * ((index + 0.5) / len(results) - 0.5) - 0.12
        if result.steps_to_target is not None:
            axes.plot(max(result.steps_to_target, 1), height, "o", color=colour, alpha=0.65, markersize=4.5, mec="none")
    missed = Counter("x" if each.status == "diverged" else ">" for each in results if each.steps_to_target is None)
    for place, (marker, count) in enumerate(missed.items()):
        height = row + lower + 0.09 - 0.18 * place
        axes.plot(most, height, marker, mec=colour, mfc="none", markersize=5, clip_on=False)
        words: dict[str, Any] = {"ha": "right", "va": "center", "color": colour, "fontsize": 8}
        axes.annotate(f"{count}×", (most, height), (-5, 0), textcoords="offset points", **words)


def _average(axes: Axes, row: float, arm: ArmSummary, most: float) -> None:
    if arm.steps.value is None or arm.steps.value <= 0:
        return
    value, low, high = arm.steps.value, arm.steps.interval.low, arm.steps.interval.high
    height = row + 0.25
    axes.hlines(height, low or value, high or (most if low else value), color=INK, linewidth=1.4)
    axes.plot(value, height, "D", color=INK, markersize=5)
    ends = [end for end in (low, high) if end is not None]
    axes.plot(ends, [height] * len(ends), "|", color=INK, markersize=7)
