"""Figure of what the probes measured: a row of panels for each layer, with the arms, or a run, as curves over steps."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from statistics import quantiles
from typing import TYPE_CHECKING, NamedTuple

from bncli.report import figure as figures
from bncli.report.figure import DEFAULT_STYLE, INK, PALE, FigureStyle, line_style, write_caption
from bncli.report.text import count
from bncli.report.train import rows_of
from bncli.results.compare import Comparison
from bncli.results.train import RunResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

MOST_ROWS, MOST_ROWS_NARROW, MOST_BANDS = 6, 3, 3  # layers, in a narrow figure, and arms whose percentiles are drawn
WIDTH, PANEL = 11.0, 1.55  # inches: the figure's width, and a panel's width and height at the least
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


def draw(figure: Figure, shown: Comparison | Arm, style: FigureStyle = DEFAULT_STYLE) -> None:
    """Put a row of panels for each layer on an empty figure: percentiles of inputs, saturation, gradients, shift."""
    from matplotlib.lines import Line2D

    width, arms = style.width_inches or WIDTH, _arms(shown)
    every, columns = _rows(arms), _columns(arms)
    most = min(len(every), MOST_ROWS if width >= figures.NARROW else MOST_ROWS_NARROW)
    rows = dict(list(every.items())[round(k * (len(every) - 1) / max(1, most - 1))] for k in range(most))
    blocks = math.ceil(len(columns) / max(2, int(width / PANEL)))  # of columns, one below the other
    across = math.ceil(len(columns) / blocks)
    figure.set_size_inches(width, blocks * (0.6 + PANEL * len(rows)))
    below: Figure | SubFigure = figure
    if not isinstance(shown, Arm) and any(column.arm is None for column in columns):
        below = figures.legend_above(figure, [Line2D([], [], label=arm.name, **line_style(arm.place)) for arm in arms])
    name = shown.name if isinstance(shown, Arm) else shown.plan.name
    write_caption(figure, style, f"{name}: inside the layers", _key(columns, arms, len(rows), len(every)))
    parts = below.subfigures(blocks, 1, squeeze=False).flat
    grids = [part.subplots(len(rows), across, sharex=True, squeeze=False) for part in parts]
    places = [panels for grid in grids for panels in grid.T]  # of each column: its panels, the first layer's above
    drawn = [
        [_drawn(panel, column, layers) for panel, layers in zip(panels, rows.values(), strict=True)]
        for column, panels in zip(columns, places, strict=False)
    ]
    for row, name in enumerate(rows):
        bands = [each[row] for each, column in zip(drawn, columns, strict=True) if column.arm]
        _share_range([panel for panel in bands if panel])
        for grid in grids:
            grid[row][0].set_ylabel(name, fontweight="bold", parse_math=False)
    for column, panels in zip(columns, places, strict=False):
        colour = INK if column.arm is None else line_style(column.arm.place)["color"]
        lines = textwrap.wrap(column.title, int(9.5 * width / across))
        panels[0].set_title("\n".join(lines), fontsize=9, color=colour, parse_math=False)
        lowest = [panel for panel in panels if panel.lines][-1]
        lowest.set_xlabel("optimizer steps")
        lowest.tick_params(labelbottom=True)
        figures.plain_ticks(lowest, 1 if width / across < 3 else 3)
    for panel in (panel for panels in places[len(columns) :] for panel in panels):
        panel.set_visible(False)
    figure.align_ylabels([panel for grid in grids for panel in grid[:, 0]])


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
    """The rows in the layers' order, each with the modules whose values it shows."""
    points = [point for arm in arms for point in arm.runs[0].probes if point.measure in DRAWN]
    rows: dict[str, set[str]] = {}
    for layer, row in rows_of(points).items():
        rows.setdefault(row, set()).add(layer)
    return rows


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
    steps, low, middle, high = zip(*figures.thinned(found), strict=True)
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
                (step, *(quantiles(at[step], n=4, method="inclusive") if len(at[step]) > 1 else at[step] * 3))
                for step in steps
            ]
            places, lows, middles, highs = zip(*figures.thinned(parts), strict=True)
            axes.fill_between(places, lows, highs, color=line_style(arm.place)["color"], alpha=0.18, linewidth=0)
            axes.plot(places, middles, **line_style(arm.place))
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


def _key(columns: Sequence[Column], arms: Sequence[Arm], drawn: int, layers: int) -> str:
    parts = []
    if any(column.arm for column in columns):
        unit = (
            "Inputs of one unit: 15th, 50th and 85th percentile over a fixed sample of training examples, in training"
        )
        most = f"; the first {MOST_BANDS} of {len(arms)} arms" * (len(arms) > MOST_BANDS)
        parts.append(f"{unit} mode; the first unit of the layer, seed {arms[0].seeds[0]}{most}.")
    if any(column.arm is None for column in columns) and max(len(arm.runs) for arm in arms) > 1:
        parts.append(f"Curves: median over {count(max(len(arm.runs) for arm in arms), 'seed')}, band: quartiles.")
    if any(len({point.step for point in arm.runs[0].probes}) > figures.MOST_PLACES for arm in arms):
        parts.append(figures.THINNED)
    if drawn < layers:
        parts.append(f"{drawn} of {layers} layers are drawn.")
    return " ".join(parts)
