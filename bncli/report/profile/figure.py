"""Figures of a profile: a roofline beside bars of GB/s for kernels, stacked bars of a step's time by class of work.

The roofline has bandwidth on its y axis, so that the memory limit is a horizontal line and the compute limit a falling
one (Williams, Waterman and Patterson 2009 have the product of bandwidth and intensity there). A batch norm's intensity
depends on its operation and dtype alone. Kernels of one intensity stand in columns beside each other.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, geometric_mean
from typing import TYPE_CHECKING, Any, NamedTuple

from bncli.report.figure import COLOURS, DEFAULT_STYLE, INK, PALE, FigureStyle, check_path, rendered, write_caption
from bncli.report.files import write_atomically
from bncli.report.profile.text import cache_words, case_groups, gb_per_s, grouped, quartiles, shape_words, size_words
from bncli.report.text import count, figure
from bncli.results.profile import STEP_CLASSES, Ceilings, KernelCost, KernelProfile, Profile, StepCost, StepProfile

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

# Inches.
WIDTH, ROOFLINE, MOST_BESIDE = 13.0, 4.8, 6.8  # bars that need more height than that stand below the roofline
TITLE, PANEL_FRAME, BAR = 0.9, 0.85, 0.17
STEP_WIDTH, STEP_FRAME, STEP_BAR = 11.0, 1.6, 0.42
COLUMN, NAME = 0.2, 0.8  # widths in the roofline: a kernel's column, the name below an operation's columns
GAP = 0.5  # bars' heights between two shapes
LEAST_BARS = 10  # a column of panels has room for so many, so that few bars are not thick
MOST_BARS, MOST_IN_ALL = 40, 160  # in a panel, in a figure; with more, shapes are drawn as their geometric mean
LABEL_SHARE = 0.045  # the height of a line of text as a share of the roofline's
KEY = (
    "Dot: one shape. Large marker: geometric mean over shapes. Line on a bar: quartiles. Columns are moved sideways "
    "where they would overlap; the exact intensity is written below."
)
# Normalization stands out; what remains is grey.
_SHADES = (*(COLOURS[k] for k in (1, 0, 4, 5, 2, 3)), "#b5b5b5", "#e3e3e3")
CLASS_COLOURS = dict(zip(STEP_CLASSES, _SHADES, strict=True))
SMALL: dict[str, Any] = {"fontsize": 8, "textcoords": "offset points"}


def draw(profile: Profile, path: Path, style: FigureStyle = DEFAULT_STYLE) -> list[Path]:
    """Write the figure to `path`. Raises FileError for an unknown suffix or without matplotlib."""
    kind = check_path(path)
    write_atomically(path, rendered(lambda picture: compose(picture, profile, style), kind, 130))
    return [path]


def compose(picture: Figure, profile: Profile, style: FigureStyle = DEFAULT_STYLE) -> None:
    """Draw the profile on an empty figure."""
    drawn = _kernels(picture, profile, style) if isinstance(profile, KernelProfile) else _steps(picture, profile, style)
    if not drawn:
        picture.set_size_inches(WIDTH, 2)
        picture.text(0.5, 0.5, "nothing was measured", ha="center", color=PALE)


def _title(picture: Figure, style: FigureStyle, title: str, profile: Profile, *more: str, key: str = "") -> None:
    made = profile.environment
    machine = [f"{made.device} ({made.processor})", count(made.threads, "thread")]
    words = "; ".join([*machine, *more, f"torch {made.torch}", made.date[:10]])
    write_caption(picture, style, title, words, key)


def _legend(picture: Figure, colours: Mapping[str, str], *lines: str, **style: Any) -> None:
    """Coloured bars by name, then what black lines are."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    bars = [Patch(color=colour, label=name) for name, colour in colours.items()]
    handles = [*bars, *(Line2D([], [], color=INK, linewidth=1.3, label=words) for words in lines)]
    picture.legend(handles=handles, frameon=False, handlelength=1.0, **style)


def _bar_axes(axes: Axes, places: Sequence[float], names: Iterable[str], **style: Any) -> None:
    """Names at the bars' heights in place of an axis, and a grid for their lengths."""
    axes.set_yticks(places, list(names), parse_math=False, **style)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_axisbelow(True)
    axes.grid(axis="x", color=PALE, alpha=0.25, linewidth=0.8)


# --- kernels ------------------------------------------------------------------------------------------------------


def _kernels(picture: Figure, profile: KernelProfile, style: FigureStyle) -> bool:
    """False where no row was timed, and nothing is drawn."""
    timed = [row for row in profile.rows if gb_per_s(row.both)]
    dtypes = ", ".join(dict.fromkeys(row.case.dtype for row in profile.rows))
    more = [*filter(None, [dtypes]), cache_words(profile.cold)]
    _title(picture, style, "Batch norm kernels and the machine's limits", profile, *more, key=KEY * bool(timed))
    if not timed:
        return False
    colours = dict(zip(dict.fromkeys(row.kernel for row in profile.rows), itertools.cycle(COLOURS), strict=False))
    panels = bar_panels(timed)
    beside = sum(row_heights(panels, 1)) <= MOST_BESIDE
    across = 1 if beside else min(3, len(panels))
    height = sum(row_heights(panels, across))
    if beside:
        picture.set_size_inches(WIDTH, TITLE + max(ROOFLINE, height))
        parts = picture.subfigures(1, 2, squeeze=False, width_ratios=(1.0, 1.15))
    else:
        picture.set_size_inches(WIDTH, TITLE + ROOFLINE + height)
        parts = picture.subfigures(2, 1, squeeze=False, height_ratios=(ROOFLINE, height))
    first, second = parts.flat
    _roofline(first.subplots(), timed, profile.ceilings, colours)
    _bar_panels(second, panels, across, profile.ceilings, colours)
    used = {row.kernel: colours[row.kernel] for row in timed}
    copies = [f"copy at {size_words(size)}: {figure(speed)} GB/s" for size, speed in profile.ceilings.copies[-1:]]
    _legend(picture, used, *copies, loc="outside upper right", ncols=len(used) + len(copies), columnspacing=1.4)
    return True


class Bar(NamedTuple):
    """10^9 bytes a second of one kernel, and how far its line reaches down and up."""

    kernel: str
    low: float
    value: float
    high: float


Panels = dict[str, dict[str, list[Bar]]]  # title -> name beside the bars -> its bars


def bar_panels(rows: Sequence[KernelCost]) -> Panels:
    """The timed rows: a panel of shapes for each operation, dtype and layout; with too many bars one of their means."""
    cases = case_groups(rows)
    if len(rows) > MOST_IN_ALL or any(len(members) > MOST_BARS for members in cases.values()):
        means = {title: _mean_bars(members) for title, members in cases.items()}
        return {"geometric mean over shapes (line: slowest to fastest shape)": means}
    panels: Panels = {}
    for title, members in cases.items():
        panel = panels.setdefault(title, {})
        for row in members:
            times = row.both and quartiles(row.both.samples_ms)
            if row.both and times:
                speeds = (row.both.floor_bytes / ms / 1e6 for ms in (times.high, times.median, times.low))
                panel.setdefault(shape_words(row.case.shape), []).append(Bar(row.kernel, *speeds))
    return panels


def _mean_bars(rows: Sequence[KernelCost]) -> list[Bar]:
    return [Bar(kernel, min(found), geometric_mean(found), max(found)) for kernel, found in _speeds(rows).items()]


def _speeds(rows: Sequence[KernelCost]) -> dict[str, list[float]]:
    """Kernel -> its GB/s in each of the timed rows."""
    speeds: dict[str, list[float]] = {}
    for row in rows:
        speeds.setdefault(row.kernel, []).append(gb_per_s(row.both) or math.nan)
    return speeds


def row_heights(panels: Panels, across: int) -> list[float]:
    """Inches of each row of panels, so many beside each other."""
    heights = [PANEL_FRAME + BAR * sum(len(bars) + GAP for bars in panel.values()) for panel in panels.values()]
    return [max(heights[i : i + across]) for i in range(0, len(heights), across)]


def _bar_panels(part: SubFigure, panels: Panels, across: int, ceilings: Ceilings, colours: Mapping[str, str]) -> None:
    """All panels on one scale, with the largest copy as a line."""
    heights = row_heights(panels, across)
    grid = list(part.subplots(len(heights), across, squeeze=False, height_ratios=heights).flat)
    copy = ceilings.copy_gb_per_s if ceilings.copies else 0.0
    longest = max(bar.high for panel in panels.values() for bars in panel.values() for bar in bars)
    for index, (axes, (title, panel)) in enumerate(zip(grid, panels.items(), strict=False)):
        axes.set_title(title, parse_math=False)
        _panel(axes, panel, LEAST_BARS / len(heights), colours)
        axes.set_xlim(0, 1.02 * max(longest, copy))
        if copy:
            axes.axvline(copy, color=INK, linewidth=1.3, zorder=2)
        if index >= len(panels) - across:
            axes.set_xlabel("GB/s of the minimum bytes to move")
    for axes in grid[len(panels) :]:
        axes.set_visible(False)


def _panel(axes: Axes, panel: Mapping[str, Sequence[Bar]], least_bars: float, colours: Mapping[str, str]) -> None:
    """Bars of height 1 from the top, with a gap after each shape's."""
    middles, top = [], 0.0
    for bars in panel.values():
        middles.append(top + len(bars) / 2)
        for place, bar in enumerate(bars):
            height = top + place + 0.5
            axes.barh(height, bar.value, 0.86, color=colours[bar.kernel], linewidth=0)
            axes.plot([bar.low, bar.high], [height] * 2, color=INK, linewidth=0.9, solid_capstyle="butt", zorder=3)
        top += len(bars) + GAP
    margin = max(GAP, least_bars - top) / 2
    axes.set_ylim(top - GAP + margin, -margin)
    _bar_axes(axes, middles, panel, fontsize=8)


# --- the roofline -------------------------------------------------------------------------------------------------


class Cluster(NamedTuple):
    """An operation and dtype: its intensity (flop a byte), and each kernel's speeds over shapes (GB/s)."""

    name: str
    intensity: float
    speeds: dict[str, list[float]]


def clusters(rows: Sequence[KernelCost]) -> list[Cluster]:
    """The timed rows, from the least intensity to the most."""
    made = []
    for name, members in grouped(rows, lambda row: f"{row.case.operation}\n{row.case.dtype}", lambda row: None).items():
        intensity = geometric_mean(row.both.flops / row.both.floor_bytes for row in members if row.both)
        made.append(Cluster(name, intensity, _speeds(members)))
    return sorted(made, key=lambda cluster: cluster.intensity)


def without_overlap(places: Sequence[float], widths: Sequence[float]) -> list[float]:
    """Rising places, moved as little as possible (least squares) until intervals of those widths do not overlap.

    The isotonic regression of the places less the room that is needed before each, by pooling adjacent violators.
    """
    needed = [0.0, *itertools.accumulate((a + b) / 2 for a, b in itertools.pairwise(widths))]
    blocks: list[list[float]] = []
    for place, room in zip(places, needed, strict=True):
        blocks.append([place - room])
        while len(blocks) > 1 and fmean(blocks[-2]) > fmean(blocks[-1]):
            last = blocks.pop()
            blocks[-1] += last
    means = (fmean(block) for block in blocks for _ in block)
    return [mean + room for mean, room in zip(means, needed, strict=True)]


def _roofline(axes: Axes, rows: Sequence[KernelCost], ceilings: Ceilings, colours: Mapping[str, str]) -> None:
    """The clusters below the copies by size, and the compute limit where it comes into sight."""
    axes.set_title("roofline: forward and backward together")
    axes.set_xlabel("arithmetic intensity (flop per byte)")
    axes.set_ylabel("GB/s of the minimum bytes to move")
    axes.set_xscale("log")
    axes.set_yscale("log")
    found = clusters(rows)
    logs = [math.log(cluster.intensity) for cluster in found]
    inch = (logs[-1] - logs[0] + 1.4) / (0.9 * axes.figure.bbox.width / axes.figure.dpi)  # of the axis, in logs
    widths = [max(COLUMN * (len(cluster.speeds) + 1), NAME) * inch for cluster in found]
    middles = without_overlap(logs, widths)
    low = min(logs[0] - 0.7, middles[0] - widths[0] / 2)
    high = max(logs[-1] + 0.7, middles[-1] + widths[-1] / 2)
    axes.set_xlim(math.exp(low), math.exp(high))
    speeds = [speed for cluster in found for each in cluster.speeds.values() for speed in each]
    speeds += [speed for _, speed in ceilings.copies]
    axes.set_ylim(min(speeds) / 3.2, max(speeds) * 2.0)
    _limits(axes, ceilings)
    for cluster, middle in zip(found, middles, strict=True):
        _columns(axes, cluster, math.exp(middle), math.exp(COLUMN * inch), colours)
    _plain_ticks(axes)


def _columns(axes: Axes, cluster: Cluster, middle: float, step: float, colours: Mapping[str, str]) -> None:
    """A column of dots for each kernel, with their geometric mean, and the name below. `step`: a factor."""
    kernels = [kernel for kernel in colours if kernel in cluster.speeds]
    for place, kernel in enumerate(kernels):
        x, speeds = middle * step ** (place - (len(kernels) - 1) / 2), cluster.speeds[kernel]
        if len(speeds) > 1:
            axes.plot([x] * len(speeds), speeds, ".", color=colours[kernel], alpha=0.55, markersize=6, mec="none")
        mean: dict[str, Any] = {"color": colours[kernel], "markersize": 7, "mec": "white", "mew": 0.7, "zorder": 3}
        axes.plot(x, geometric_mean(speeds), "o", **mean)
    name = f"{cluster.name}\n{figure(cluster.intensity, 2)} flop/B"
    below: dict[str, Any] = {"ha": "center", "linespacing": 1.25, "parse_math": False}
    axes.annotate(name, (middle, axes.get_ylim()[0]), (0, 4), **below, **SMALL)


def _limits(axes: Axes, ceilings: Ceilings) -> None:
    """Copies as horizontal lines, the largest in ink; the compute limit as a falling line where it is in sight."""
    low, high = axes.get_xlim()
    bottom, top = axes.get_ylim()
    line = (top / bottom) ** LABEL_SHARE  # the height of a line of text, as a factor
    labelled: list[float] = []
    for size, speed in reversed(ceilings.copies):
        colour, width, order = (PALE, 0.9, 1.0) if labelled else (INK, 1.3, 1.5)
        axes.axhline(speed, color=colour, linewidth=width, zorder=order)
        if all(max(speed / other, other / speed) > line for other in labelled):
            words = f"copy at {size_words(size)}: {figure(speed)} GB/s"
            label = axes.annotate(words, (low, speed), (4, 3), va="bottom", color=colour, **SMALL)
            label.set_bbox({"facecolor": "white", "linewidth": 0, "pad": 0.5})  # other lines end at it
            label.set_in_layout(False)
            labelled.append(speed)
    limit = ceilings.gflop_per_s
    if limit and ceilings.copies:
        ridge = limit / ceilings.copy_gb_per_s
        if ridge < high:
            xs, ys = (max(low, limit / top), high), (min(top, limit / low), limit / high)
            axes.plot(xs, ys, color=INK, linewidth=1.3, zorder=1)
        words = f"compute limit: {figure(limit)} GFLOP/s (fp32 multiply-adds), beyond {figure(ridge)} flop per byte"
        axes.annotate(words, (high, top), (-3, -3), ha="right", va="top", **SMALL)


def _plain_ticks(axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high / low < 300 else (1.0,)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())


# --- steps --------------------------------------------------------------------------------------------------------


def _steps(picture: Figure, profile: StepProfile, style: FigureStyle) -> bool:
    """A bar for each row that was timed, as long as its median step. False where there is none."""
    timed = [row for row in profile.rows if row.samples_ms]
    arms = grouped(timed, lambda row: row.arm, lambda row: row.mode)
    rows = [row for members in arms.values() for row in members]
    _title(picture, style, f"{profile.name}: where the time of a step goes", profile)
    if not rows:
        return False
    heights = [place + 0.4 * list(arms).index(row.arm) for place, row in enumerate(rows)]  # with a gap between arms
    picture.set_size_inches(STEP_WIDTH, STEP_FRAME + STEP_BAR * max(3.0, heights[-1] + 1))
    axes = picture.subplots()
    names = [f"{row.arm}: {', '.join(filter(None, (row.mode, row.kernel)))}" for row in rows]
    medians = [_stacked_bar(axes, height, row) for height, row in zip(heights, rows, strict=True)]
    axes.set_xlim(0, 1.25 * max(medians))
    axes.set_ylim(heights[-1] + 0.5, -0.5)
    axes.set_xlabel("ms per step")
    _bar_axes(axes, heights, names)
    used = [name for name in STEP_CLASSES if any(row.shares_ms.get(name) for row in rows)]
    if used:
        _legend(picture, {name: CLASS_COLOURS[name] for name in used}, loc="outside right upper")
    return True


def _stacked_bar(axes: Axes, height: float, row: StepCost) -> float:
    """Its classes one after the other, scaled to the median step; white where they are unknown. Returns the median."""
    times = quartiles(row.samples_ms)
    median, whole = times.median if times else 0.0, sum(row.shares_ms.values())
    left = 0.0
    for name in STEP_CLASSES:
        length = median * row.shares_ms.get(name, 0.0) / whole if whole > 0 else 0.0
        axes.barh(height, length, 0.72, left=left, color=CLASS_COLOURS[name], edgecolor="white", linewidth=0.6)
        left += length
    if whole <= 0:
        axes.barh(height, median, 0.72, color="white", edgecolor=PALE, linewidth=0.8)
    speedup = f" ({figure(row.faster.value)}x vs native)" if row.faster else ""
    axes.annotate(f"{figure(median)} ms{speedup}", (median, height), (4, 0), va="center", **SMALL)
    return median
