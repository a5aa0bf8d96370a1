"""Figure of what the probes measured: a row of panels for each layer, with the arms, or a run, as curves over steps."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Collection, Sequence
from pathlib import Path
from statistics import quantiles
from typing import TYPE_CHECKING, Any, NamedTuple

from bncli.report import figure as figures
from bncli.report.figure import DEFAULT_STYLE, INK, PALE, FigureStyle, check_path, line_style, rendered, write_caption
from bncli.report.files import write_atomically
from bncli.report.text import count
from bncli.report.train import rows_of
from bncli.results.compare import Comparison
from bncli.results.train import RunResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

MOST_ROWS, MOST_BANDS = 6, 3  # layers, and arms whose percentiles are drawn
ARMS_PER_LINE = 5  # of the legend
# Measure, its value, the panel's title, and whether its axis is logarithmic.
CURVES = (
    ("saturation", "share", "saturated outputs (share)", False),
    ("saturation", "dead", "dead units (share)", False),
    ("gradients", "norm", "norm of the weight gradient", True),
    ("shift", "distance", "covariate shift |G−G′|/|G|", True),
)
DRAWN = {"inputs", *(measure for measure, *_ in CURVES)}


class Arm(NamedTuple):
    """An arm of a comparison, or one run by itself."""

    place: int  # in the comparison, for its colour
    name: str
    seeds: list[int]
    runs: list[RunResult]  # that were probed, at the arm's best point


class Column(NamedTuple):
    """A column of panels: the percentiles of one arm's inputs, or one value of a measure for all arms."""

    title: str
    arm: Arm | None  # whose percentiles it shows; None: a curve for each arm
    arms: Sequence[Arm] = ()
    measure: str = "inputs"
    value: str = "unit_p50"
    log: bool = False


def has_layers(shown: Comparison | Arm) -> bool:
    """Whether there is something to draw."""
    arms = _arms(shown)
    return bool(_columns(arms) and _rows(arms))


def plot(shown: Comparison | Arm, path: Path, style: FigureStyle = DEFAULT_STYLE) -> Path:
    """Write the figure beside `path`, as NAME-layers with its suffix, and return where it is. Raises FileError."""
    beside = path.with_name(f"{path.stem}-layers{path.suffix}")
    write_atomically(beside, render(shown, check_path(path), style=style))
    return beside


def render(shown: Comparison | Arm, kind: str, transparent: bool = False, style: FigureStyle = DEFAULT_STYLE) -> bytes:
    """The figure as the bytes of a file of that kind. Raises FileError without matplotlib."""
    return rendered(lambda figure: draw(figure, shown, style), kind, 160, transparent)


def draw(figure: Figure, shown: Comparison | Arm, style: FigureStyle = DEFAULT_STYLE) -> None:
    """Put a row of panels for each layer on an empty figure: percentiles of inputs, saturation, gradients, shift."""
    arms = _arms(shown)
    name = shown.name if isinstance(shown, Arm) else shown.plan.name
    rows, columns = _rows(arms), _columns(arms)
    height = 1.25 + 1.55 * len(rows)
    named = not isinstance(shown, Arm) and any(column.arm is None for column in columns)
    legend_height = 0.3 * math.ceil(len(arms) / ARMS_PER_LINE) if named else 0
    figure.set_size_inches(11, height + legend_height)
    below: Figure | SubFigure = figure
    if legend_height:
        parts: Any = figure.subfigures(2, 1, height_ratios=[legend_height, height])
        above, below = parts
        _legend(above, arms)
    panels = below.subplots(len(rows), len(columns), sharex=True, squeeze=False)
    write_caption(figure, style, f"{name}: inside the layers", _key(columns, arms, rows))
    for at, (row, layers) in enumerate(rows.items()):
        drawn = [_drawn(panel, column, layers) for panel, column in zip(panels[at], columns, strict=True)]
        _share_range([panel for panel, column in zip(drawn, columns, strict=True) if panel and column.arm])
        panels[at][0].set_ylabel(row, fontweight="bold", parse_math=False)
    for column, (top, *_), each in zip(columns, panels.T[:, :1], panels.T, strict=True):
        colour = INK if column.arm is None else line_style(column.arm.place)["color"]
        lines = textwrap.wrap(column.title, 120 // len(columns))
        top.set_title("\n".join(lines), fontsize=9, color=colour, parse_math=False)
        lowest = [panel for panel in each if panel.lines][-1]
        lowest.set_xlabel("optimizer steps")
        lowest.tick_params(labelbottom=True)
        figures.plain_ticks(lowest, 1 if len(columns) > 2 else 3)
    below.align_ylabels(panels[:, 0])


# --- what there is to draw ----------------------------------------------------------------------------------------


def _arms(shown: Comparison | Arm) -> list[Arm]:
    """The arms with something to draw, the reference first; a run by itself is one."""
    if isinstance(shown, Arm):
        return [shown]
    found = []
    for index, arm in enumerate(shown.arms):
        results = shown.results_by_seed(arm)
        probed = {s: run for s, run in results.items() if any(point.measure in DRAWN for point in run.probes)}
        if probed:
            found.append(Arm(index, arm.arm, list(probed), list(probed.values())))
    return sorted(found, key=lambda arm: arm.name != shown.plan.reference)


def _columns(arms: Sequence[Arm]) -> list[Column]:
    known = {(point.measure, name) for arm in arms for point in arm.runs[0].probes for name in point.values}
    bands = [
        Column(f"inputs of one unit: {arm.name}", arm) for arm in arms[:MOST_BANDS] if ("inputs", "unit_p50") in known
    ]
    curves = [Column(title, None, arms, measure, value, log) for measure, value, title, log in CURVES]
    return [*bands, *(each for each in curves if (each.measure, each.value) in known)]


def _rows(arms: Sequence[Arm]) -> dict[str, set[str]]:
    """The rows in the layers' order, each with the modules whose values it shows; of many rows some, evenly chosen."""
    points = [point for arm in arms for point in arm.runs[0].probes if point.measure in DRAWN]
    rows: dict[str, set[str]] = {}
    for layer, row in rows_of(points).items():
        rows.setdefault(row, set()).add(layer)
    if len(rows) <= MOST_ROWS:
        return rows
    names = list(rows)
    return {
        name: rows[name] for name in (names[round(k * (len(names) - 1) / (MOST_ROWS - 1))] for k in range(MOST_ROWS))
    }


def _series(run: RunResult, measure: str, names: Sequence[str], layers: set[str]) -> list[tuple[float, ...]]:
    """The steps after the first with the named values there, where all of these are finite."""
    found = [
        (point.step, *(point.values.get(name, math.nan) for name in names))
        for point in run.probes
        if point.measure == measure and point.layer in layers and point.step > 0
    ]
    return [each for each in found if all(map(math.isfinite, each))]


# --- panels -------------------------------------------------------------------------------------------------------


def _drawn(axes: Axes, column: Column, layers: set[str]) -> Axes | None:
    """The panel of a layer, or None where nothing was measured there: it is then left empty."""
    if column.arm is None:
        _curves(axes, column, layers)
    else:
        _percentiles(axes, column.arm, layers)
    if axes.lines:
        axes.set_xscale("log")
        axes.grid(axis="y", color=PALE, alpha=0.25, linewidth=0.8)
        return axes
    axes.spines[:].set_visible(False)
    axes.tick_params(which="both", length=0, labelleft=False, labelbottom=False)
    return None


def _percentiles(axes: Axes, arm: Arm, layers: set[str]) -> None:
    """The inputs of one unit in the arm's first run."""
    found = _series(arm.runs[0], "inputs", ("unit_p15", "unit_p50", "unit_p85"), layers)
    if not found:
        return
    steps, low, middle, high = zip(*found, strict=True)
    colour = line_style(arm.place)["color"]
    axes.fill_between(steps, low, high, color=colour, alpha=0.18, linewidth=0)
    for values, width in ((low, 0.9), (middle, 1.6), (high, 0.9)):
        axes.plot(steps, values, color=colour, linewidth=width)


def _curves(axes: Axes, column: Column, layers: set[str]) -> None:
    """Median and quartiles over the seeds of each arm, at the steps that at least half of its runs have."""
    for arm in column.arms:
        at: dict[float, list[float]] = {}
        for run in arm.runs:
            for step, value in _series(run, column.measure, (column.value,), layers):
                if value > 0 or not column.log:
                    at.setdefault(step, []).append(value)
        steps = sorted(step for step, values in at.items() if 2 * len(values) >= len(arm.runs))
        if steps:
            parts = [
                quantiles(at[step], n=4, method="inclusive") if len(at[step]) > 1 else at[step] * 3 for step in steps
            ]
            lows, middles, highs = zip(*parts, strict=True)
            axes.fill_between(steps, lows, highs, color=line_style(arm.place)["color"], alpha=0.18, linewidth=0)
            axes.plot(steps, middles, linewidth=1.4, **line_style(arm.place))
    if axes.lines and column.log:
        axes.set_yscale("log")
        figures.plain_numbers(axes.yaxis, *axes.get_ylim())
    elif axes.lines:
        axes.set_ylim(0, max(0.1, axes.get_ylim()[1]))


def _share_range(panels: Sequence[Axes]) -> None:
    """One range for the percentiles of a layer, so that the arms can be compared by eye."""
    for panel in panels:
        panel.set_ylim(*(pick(each.get_ylim()[k] for each in panels) for k, pick in ((0, min), (1, max))))


# --- words --------------------------------------------------------------------------------------------------------


def _key(columns: Sequence[Column], arms: Sequence[Arm], rows: Collection[str]) -> str:
    parts = []
    if any(column.arm for column in columns):
        unit = (
            "Inputs of one unit: 15th, 50th and 85th percentile over a fixed sample of training examples, in training"
        )
        parts.append(f"{unit} mode; the first unit of the layer, seed {arms[0].seeds[0]}.")
    if any(column.arm is None for column in columns) and max(len(arm.runs) for arm in arms) > 1:
        parts.append(f"Curves: median over {count(max(len(arm.runs) for arm in arms), 'seed')}, band: quartiles.")
    if len(rows) == MOST_ROWS:
        parts.append(f"At most {MOST_ROWS} layers are drawn.")
    return " ".join(parts)


def _legend(figure: SubFigure, arms: Sequence[Arm]) -> None:
    from matplotlib.lines import Line2D

    lines = [Line2D([], [], linewidth=2, **line_style(arm.place)) for arm in arms]
    names = [arm.name for arm in arms]
    shown = figure.legend(lines, names, loc="upper left", ncols=ARMS_PER_LINE, frameon=False, fontsize=9)
    for text in shown.get_texts():
        text.set_parse_math(False)
