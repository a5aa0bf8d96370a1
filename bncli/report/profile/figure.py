"""Figures of a profile: a roofline beside bars of GB/s for kernels, stacked bars of a step's time by class of work.

The roofline has bandwidth on its y axis, so that the memory limit is a horizontal line (Williams, Waterman and
Patterson 2009 have the product of bandwidth and intensity there). A batch norm's intensity depends on its operation and
dtype alone and is about 1 flop a byte: these are the places of its axis, each with a column for every kernel.
"""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Mapping, Sequence
from statistics import geometric_mean
from typing import TYPE_CHECKING, Any, NamedTuple

from bncli.report import figure as figures
from bncli.report.figure import COLOURS, DEFAULT_STYLE, INK, NARROW, PALE, FigureStyle, legend_above, write_caption
from bncli.report.profile.text import cache_words, case_groups, gb_per_s, grouped, quartiles, shape_words, size_words
from bncli.report.text import busy_mark, busy_words, count, figure
from bncli.results.profile import STEP_CLASSES, Ceilings, KernelCost, KernelProfile, Profile, StepCost, StepProfile

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

# Inches.
WIDTH, ROOFLINE = 11.0, 3.6
LEAST_BESIDE, MOST_BESIDE = 9.0, 6.8  # bars stand beside the roofline from that width on, up to that height of theirs
PANEL, PANEL_FRAME, BAR = 3.2, 0.85, 0.17
STEP_WIDTH, STEP_FRAME, STEP_BAR = 11.0, 0.6, 0.42
NAME, CHARACTER = 0.8, 0.075  # widths: of an operation's name in the roofline, of a character
LONGEST = 24  # characters of a name beside bars, on a line
GAP = 0.5  # bars' heights between two shapes
LEAST_BARS = 10  # a column of panels has room for so many, so that few bars are not thick
MOST_BARS, BARS_PER_INCH = 40, 12  # in a panel, in a figure by its width; of more, geometric means over shapes
MOST_COPY = 8  # times the longest bar: a larger copy is named and not drawn, so that bars of small shapes can be seen
LABEL_SHARE = 0.13  # the height of three lines of text as a share of the roofline's
KEY = (
    "Roofline: a dot is a shape in a layout, the large marker the geometric mean over all of them; flop/B: arithmetic "
    "intensity. Black line on a bar: quartiles of the samples, no confidence interval."
)
# Normalization stands out; what remains is grey.
_SHADES = (*(COLOURS[k] for k in (1, 0, 4, 5, 2, 3)), "#b5b5b5", "#e3e3e3")
CLASS_COLOURS = dict(zip(STEP_CLASSES, _SHADES, strict=True))
SMALL: dict[str, Any] = {"fontsize": 8, "textcoords": "offset points"}


def draw(picture: Figure, profile: Profile, style: FigureStyle = DEFAULT_STYLE) -> None:
    """Draw the profile on an empty figure."""
    drawn = _kernels(picture, profile, style) if isinstance(profile, KernelProfile) else _steps(picture, profile, style)
    if not drawn:
        picture.set_size_inches(style.width_inches or WIDTH, 2)
        picture.text(0.5, 0.5, "nothing was measured", ha="center", color=PALE)


def _machine(profile: Profile, *more: str) -> str:
    made = profile.environment
    machine = [f"{made.device} ({made.processor})", count(made.threads, "thread")]
    return "; ".join([*machine, *more, f"torch {made.torch}", made.date[:10]])


def _bars(colours: Mapping[str, str], *lines: str) -> list[Artist]:
    """Of a legend: coloured bars by name, then black lines."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    bars = [Patch(color=colour, label=name) for name, colour in colours.items()]
    return [*bars, *(Line2D([], [], color=INK, linewidth=1.3, label=words) for words in lines)]


# --- kernels ------------------------------------------------------------------------------------------------------


def _kernels(picture: Figure, profile: KernelProfile, style: FigureStyle) -> bool:
    """False where no row was timed, and nothing is drawn."""
    timed = [row for row in profile.rows if gb_per_s(row.both)]
    if not timed:
        return False
    width = style.width_inches or WIDTH
    colours = dict(zip(dict.fromkeys(row.kernel for row in profile.rows), itertools.cycle(COLOURS), strict=False))
    panels = bar_panels(timed, int(BARS_PER_INCH * width))
    beside = width > LEAST_BESIDE and sum(row_heights(panels, 1)) <= MOST_BESIDE
    across = 1 if beside else max(1, min(3, len(panels), int(width / PANEL)))
    height = sum(row_heights(panels, across))
    picture.set_size_inches(width, max(ROOFLINE, height) if beside else ROOFLINE + height)
    used = {row.kernel: colours[row.kernel] for row in timed}
    copies = [f"copy at {size_words(size)}: {figure(speed)} GB/s" for size, speed in profile.ceilings.copies[-1:]]
    part = legend_above(picture, _bars(used, *copies))
    shape: dict[str, Any] = {"ncols": 2} if beside else {"nrows": 2, "height_ratios": (ROOFLINE, height)}
    first, second = part.subfigures(**shape, squeeze=False).flat
    roofline(first.subplots(), timed, profile.ceilings, colours)
    _bar_panels(second, panels, across, profile.ceilings, colours)
    words = [", ".join(dict.fromkeys(row.case.dtype for row in profile.rows)), cache_words(profile.cold)]
    if (limit := profile.ceilings.gflop_per_s) and profile.ceilings.copies:
        ridge = figure(limit / profile.ceilings.copy_gb_per_s)
        words.append(f"compute limit: {figure(limit)} GFLOP/s (fp32 multiply-adds), beyond {ridge} flop per byte")
    write_caption(picture, style, "Batch norm kernels and the machine's limits", _machine(profile, *words), KEY)
    return True


class Bar(NamedTuple):
    """10^9 bytes a second of one kernel, and how far its line reaches down and up."""

    kernel: str
    low: float
    value: float
    high: float


Panels = dict[str, dict[str, list[Bar]]]  # title -> name beside the bars -> its bars


def bar_panels(rows: Sequence[KernelCost], most: int) -> Panels:
    """The timed rows: a panel of shapes for each operation, dtype and layout; with too many bars one of their means."""
    cases = case_groups(rows)
    if len(rows) > most or any(len(members) > MOST_BARS for members in cases.values()):
        means = {
            title: [Bar(kernel, min(it), geometric_mean(it), max(it)) for kernel, it in _speeds(members).items()]
            for title, members in cases.items()
        }
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
    """All panels on one scale, with the largest copy as a line where bars are not too short beside it."""
    heights, inches = row_heights(panels, across), part.bbox.width / part.dpi / across
    grid = list(part.subplots(len(heights), across, squeeze=False, height_ratios=heights).flat)
    copy = ceilings.copy_gb_per_s if ceilings.copies else 0.0
    longest = max(bar.high for panel in panels.values() for bars in panel.values() for bar in bars)
    near = 0 < copy <= MOST_COPY * longest
    label = f"GB/s of the minimum bytes to move{f' (copy: {figure(copy)}, beyond the axis)' * (copy > 0 and not near)}"
    for index, (axes, (title, panel)) in enumerate(zip(grid, panels.items(), strict=False)):
        # Characters of a line above or below the bars.
        room = int(12.4 * (inches - 0.28 - 0.06 * min(LONGEST, max(map(len, panel)))))
        axes.set_title(textwrap.fill(title, room), parse_math=False)
        _panel(axes, panel, LEAST_BARS / len(heights), colours)
        axes.set_xlim(0, 1.02 * max(longest, copy if near else 0))
        if near:
            axes.axvline(copy, color=INK, linewidth=1.3, zorder=2)
        if index >= len(panels) - across:
            axes.set_xlabel(textwrap.fill(label, room))
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
    figures.name_rows(axes, middles, [textwrap.fill(name, LONGEST) for name in panel], fontsize=8)


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


def roofline(axes: Axes, rows: Sequence[KernelCost], ceilings: Ceilings, colours: Mapping[str, str]) -> None:
    """A column of dots for each kernel, grouped by operation and dtype, below the copies and the compute limit."""
    axes.set_title("roofline, forward and backward")
    axes.set_ylabel("GB/s of the minimum bytes to move")
    axes.set_yscale("log")
    found = clusters(rows)
    speeds = [speed for cluster in found for each in cluster.speeds.values() for speed in each]
    speeds += [speed for _, speed in ceilings.copies]
    bottom, top = min(speeds) / 1.3, max(speeds) * 1.3
    axes.set_ylim(bottom, top)
    left, middles = 0, []
    for cluster in found:
        kernels = [kernel for kernel in colours if kernel in cluster.speeds]
        for place, kernel in enumerate(kernels):
            _column(axes, left + place, cluster.speeds[kernel], colours[kernel])
        limit = (ceilings.gflop_per_s or 0.0) / cluster.intensity
        if bottom < limit < top:
            axes.hlines(limit, left - 0.5, left + len(kernels) - 0.5, color=INK, linewidth=1.3, linestyle="--")
            axes.annotate("compute limit", (left - 0.5, limit), (0, 2), va="bottom", **SMALL)
        middles.append(left + (len(kernels) - 1) / 2)
        left += len(kernels) + 1
    axes.set_xlim(-1, left - 1)
    names = [f"{cluster.name}\n{figure(cluster.intensity, 2)} flop/B" for cluster in found]
    crowded = NAME * len(found) > axes.bbox.width / axes.figure.dpi
    axes.set_xticks(middles, names, fontsize=8, rotation=90 * crowded, parse_math=False)
    axes.tick_params(axis="x", length=0)
    _copies(axes, ceilings)
    figures.plain_numbers(axes.yaxis, bottom, top)


def _column(axes: Axes, place: float, speeds: Sequence[float], colour: str) -> None:
    """A dot for each shape and layout, and their geometric mean."""
    if len(speeds) > 1:
        axes.plot([place] * len(speeds), speeds, ".", color=colour, alpha=0.55, markersize=6, mec="none")
    axes.plot(place, geometric_mean(speeds), "o", color=colour, markersize=7, mec="white", mew=0.7, zorder=3)


def _copies(axes: Axes, ceilings: Ceilings) -> None:
    """Copies by size as horizontal lines with their names, the largest in ink; only those that there is room for."""
    bottom, top = axes.get_ylim()
    named: list[float] = []
    for size, speed in reversed(ceilings.copies):
        colour, width = (PALE, 0.9) if named else (INK, 1.3)
        if all(max(speed / other, other / speed) > (top / bottom) ** LABEL_SHARE for other in named):
            axes.axhline(speed, color=colour, linewidth=width, zorder=1)
            words = f"copy at\n{size_words(size)}:\n{figure(speed)} GB/s"
            place = (1, speed), (4, 0)
            axes.annotate(words, *place, xycoords=axes.get_yaxis_transform(), va="center", color=colour, **SMALL)
            named.append(speed)


# --- steps --------------------------------------------------------------------------------------------------------


def _steps(picture: Figure, profile: StepProfile, style: FigureStyle) -> bool:
    """A bar for each row that was timed, as long as its median step. False where there is none."""
    rows = [row for row in profile.rows if row.samples_ms]
    if not rows:
        return False
    width = style.width_inches or STEP_WIDTH
    picture.set_size_inches(width, STEP_FRAME + STEP_BAR * max(3.0, (1 + (width < NARROW)) * (len(rows) + 0.5)))
    used = [name for name in STEP_CLASSES if any(row.shares_ms.get(name) for row in rows)]
    part = legend_above(picture, _bars({name: CLASS_COLOURS[name] for name in used})) if used else picture
    step_bars(part.subplots(), rows, width)
    busy = busy_words(row.cores_lacked for row in rows)
    write_caption(picture, style, f"{profile.name}: where the time of a step goes", _machine(profile), busy)
    return True


def step_bars(axes: Axes, rows: Sequence[StepCost], width: float) -> None:
    """The rows' bars by arm, each named at its left, or above it in a figure whose width (inches) has no room."""
    arms, narrow = grouped(rows, lambda row: row.arm, lambda row: row.mode), width < NARROW
    rows = [row for members in arms.values() for row in members]
    apart = 2 if narrow else 1  # bars' heights
    heights = [apart * place + 0.4 * list(arms).index(row.arm) for place, row in enumerate(rows)]  # a gap between arms
    names = [f"{f'{row.arm}: ' * (len(arms) > 1)}{', '.join(filter(None, (row.mode, row.kernel)))}" for row in rows]
    found = [_stacked_bar(axes, height, row) for height, row in zip(heights, rows, strict=True)]
    for height, name, (median, words) in zip(heights, names, found, strict=True):
        if narrow:
            lines = textwrap.fill(f"{name}: {words}", int(14.5 * width))
            axes.annotate(lines, (0, height - 0.4), (0, 2), va="bottom", parse_math=False, **SMALL)
        else:
            axes.annotate(words, (median, height), (4, 0), va="center", **SMALL)
    free = width - 0.4 - CHARACTER * max(map(len, names))  # inches for a bar and its words
    share = 0.0 if narrow else CHARACTER * max(len(words) for _, words in found) / free
    axes.set_xlim(0, max(median for median, _ in found) / max(0.3, 1 - share))
    axes.set_ylim(heights[-1] + 0.5, 0.5 - apart)
    axes.set_xlabel("ms per step")
    figures.name_rows(axes, heights, [""] * len(rows) if narrow else names)


def _stacked_bar(axes: Axes, height: float, row: StepCost) -> tuple[float, str]:
    """Its classes one after the other, scaled to the median step; white where unknown. Returns the median and words."""
    times = quartiles(row.samples_ms)
    median, whole = times.median if times else 0.0, sum(row.shares_ms.values())
    left = 0.0
    for name in STEP_CLASSES:
        length = median * row.shares_ms.get(name, 0.0) / whole if whole > 0 else 0.0
        axes.barh(height, length, 0.72, left=left, color=CLASS_COLOURS[name], edgecolor="white", linewidth=0.6)
        left += length
    if whole <= 0:
        axes.barh(height, median, 0.72, color="white", edgecolor=PALE, linewidth=0.8)
    gain, mark = row.faster, busy_mark(row.cores_lacked)
    told = gain and not (mark or gain.contradicted or (gain.interval.low or 0) <= 1 <= (gain.interval.high or math.inf))
    return median, f"{figure(median)} ms{mark}" + (f" ({figure(gain.value)}x vs native)" if gain and told else "")
