"""Bar charts of a profile: GB/s of kernels, with the copy bandwidth as a line, and steps stacked by class of work."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bncli.report.figure import COLOURS, INK, PALE
from bncli.report.profile.text import gb_per_s, grouped, quartiles, shape_words
from bncli.report.text import figure
from bncli.results.profile import STEP_CLASSES, Ceilings, KernelCost, StepCost, StepProfile

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure


MOST_BARS, MOST_IN_ALL = 40, 160  # of a facet, of a picture: with more, shapes are drawn as their geometric mean
BAR, GAP, FRAME = 0.17, 0.09, 0.85  # inches: a bar, between two groups of them, a facet's title and axis
THICKEST = 1.8  # times BAR, where there is room
# Normalization stands out; what is left over is grey.
CLASS_COLOURS = dict(
    zip(STEP_CLASSES, (COLOURS[1], COLOURS[0], COLOURS[4], COLOURS[2], COLOURS[3], "#b5b5b5", "#e3e3e3"), strict=True)
)
STEP_BAR, STEP_FRAME = 0.42, 1.9  # inches: a bar, the title and axis


@dataclass(frozen=True)
class Measured:
    """A bar: 10^9 bytes a second, and how far it reaches down and up."""

    kernel: str
    low: float
    value: float
    high: float


@dataclass(frozen=True)
class Facet:
    title: str
    groups: dict[str, list[Measured]]  # name beside the bars -> its bars

    @property
    def height(self) -> float:
        """In inches."""
        return FRAME + sum(BAR * len(group) + GAP for group in self.groups.values())

    @property
    def bars(self) -> int:
        return sum(map(len, self.groups.values()))


def facets(rows: Sequence[KernelCost]) -> list[Facet]:
    """A facet an operation, dtype and layout with the shapes' bars; one facet of means where that would be too many."""
    cases = grouped(rows)
    if len(rows) > MOST_IN_ALL or any(len(members) > MOST_BARS for members in cases.values()):
        return [Facet("geometric mean over shapes (line: least to most)", {k: _means(v) for k, v in cases.items()})]
    return [Facet(title, _shapes(members)) for title, members in cases.items()]


def facets_height(found: Sequence[Facet], across: int) -> float:
    """Of all, in inches, so many beside each other."""
    return sum(max(facet.height for facet in found[i : i + across]) for i in range(0, len(found), across))


def draw_facets(
    part: SubFigure,
    found: Sequence[Facet],
    across: int,
    ceilings: Ceilings,
    kernels: dict[str, int],
    stretch: float = 1.0,
) -> None:
    """All facets on one scale. `stretch`: how many times higher than they ask for the room is."""
    if not found:
        return
    heights = [max(facet.height for facet in found[i : i + across]) for i in range(0, len(found), across)]
    grid = part.subplots(len(heights), across, squeeze=False, height_ratios=heights)
    places = list(grid.flat)
    longest = max(bar.high for facet in found for group in facet.groups.values() for bar in group)
    scale = max(longest, ceilings.copy_gb_per_s if ceilings.copies else 0.0) * 1.02
    for index, (axes, facet) in enumerate(zip(places, found, strict=False)):
        _facet(axes, facet, ceilings, kernels, max(1.0, stretch / THICKEST))
        axes.set_xlim(0, scale)
        if index >= len(found) - across:
            axes.set_xlabel("GB/s of the bytes that must be moved")
    for axes in places[len(found) :]:
        axes.set_visible(False)


def _shapes(rows: Sequence[KernelCost]) -> dict[str, list[Measured]]:
    """A shape's bars: the speed at the median time, and at its quartiles."""
    found: dict[str, list[Measured]] = {}
    for row in rows:
        times = row.both and quartiles(row.both.samples_ms)
        if row.both and times:
            low, value, high = (row.both.floor_bytes / ms / 1e6 for ms in (times.high, times.median, times.low))
            found.setdefault(shape_words(row.case.shape), []).append(Measured(row.kernel, low, value, high))
    return found


def _means(rows: Sequence[KernelCost]) -> list[Measured]:
    """A kernel's bar: the geometric mean over its shapes, from its slowest to its fastest."""
    found = []
    for kernel in dict.fromkeys(row.kernel for row in rows):
        speeds = [speed for row in rows if row.kernel == kernel and (speed := gb_per_s(row.both))]
        mean = math.exp(sum(map(math.log, speeds)) / len(speeds))
        found.append(Measured(kernel, min(speeds), mean, max(speeds)))
    return found


def _facet(axes: Axes, facet: Facet, ceilings: Ceilings, kernels: dict[str, int], spare: float) -> None:
    axes.set_title(facet.title, parse_math=False)
    middles, top = [], 0.0
    for group in facet.groups.values():
        middles.append(top + BAR * len(group) / 2)
        for place, bar in enumerate(group):
            _bar(axes, top + BAR * (place + 0.5), bar, COLOURS[kernels[bar.kernel] % len(COLOURS)])
        top += BAR * len(group) + GAP
    margin = GAP / 2 + top * (spare - 1) / 2
    axes.set_ylim(top - GAP + margin, -margin)
    axes.set_yticks(middles, list(facet.groups), parse_math=False, fontsize=8)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_axisbelow(True)
    axes.grid(axis="x", color=PALE, alpha=0.25, linewidth=0.8)
    if ceilings.copies:
        axes.axvline(ceilings.copy_gb_per_s, color=INK, linewidth=1.3, zorder=2)
        words = f"copy {figure(ceilings.copy_gb_per_s)}"
        axes.annotate(
            words, (ceilings.copy_gb_per_s, 1), (0, 2), ha="right", fontsize=8,
            xycoords=axes.get_xaxis_transform(), textcoords="offset points",
        )  # fmt: skip


def _bar(axes: Axes, height: float, bar: Measured, colour: str) -> None:
    axes.barh(height, bar.value, 0.86 * BAR, color=colour, linewidth=0)
    whisker: dict[str, Any] = {"color": INK, "linewidth": 0.9, "solid_capstyle": "butt", "zorder": 3}
    axes.plot([bar.low, bar.high], [height] * 2, **whisker)


# --- steps ------------------------------------------------------------------------------------------------------------


def step_height(profile: StepProfile) -> float:
    """Of the picture, in inches."""
    return STEP_FRAME + STEP_BAR * max(2, len(_timed(profile))) + 0.3 * len({row.arm for row in profile.rows})


def step_bars(axes: Axes, profile: StepProfile) -> None:
    """One bar a row that was timed, as long as its median step, with what it is beside it."""
    rows = _timed(profile)
    axes.set_xlabel("ms a step")
    if not rows:
        axes.set(xticks=[], yticks=[])
        axes.text(0.5, 0.5, "nothing was measured", ha="center", transform=axes.transAxes, color=PALE)
        return
    places, names, top, arm = [], [], 0.0, rows[0].arm
    for row in rows:
        top, arm = top + 0.4 * (row.arm != arm), row.arm
        places.append(top)
        names.append(f"{row.arm}: {row.mode}{f', {row.kernel}' if row.kernel else ''}")
        _stack(axes, top, row)
        top += 1
    axes.set_ylim(top - 0.5, -0.5)
    axes.set_yticks(places, names, parse_math=False)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_axisbelow(True)
    axes.grid(axis="x", color=PALE, alpha=0.25, linewidth=0.8)
    axes.set_xlim(0, 1.1 * max(_median(row) for row in rows))
    _legend(axes, rows)


def _timed(profile: StepProfile) -> list[StepCost]:
    """The rows that have times, an arm's together."""
    arms = list(dict.fromkeys(row.arm for row in profile.rows))
    return sorted((row for row in profile.rows if row.samples_ms), key=lambda row: arms.index(row.arm))


def _median(row: StepCost) -> float:
    found = quartiles(row.samples_ms)
    return found.median if found else 0.0


def _stack(axes: Axes, height: float, row: StepCost) -> None:
    """Its classes one after the other, scaled to the median step; all grey where its shares are unknown."""
    median, whole = _median(row), sum(row.shares_ms.values())
    left = 0.0
    for name in STEP_CLASSES:
        length = median * row.shares_ms.get(name, 0.0) / whole if whole > 0 else 0.0
        axes.barh(height, length, 0.72, left=left, color=CLASS_COLOURS[name], edgecolor="white", linewidth=0.6)
        left += length
    if whole <= 0:
        axes.barh(height, median, 0.72, color="white", edgecolor=PALE, linewidth=0.8)
    faster = f"  {figure(row.faster.value)}x native" if row.faster else ""
    axes.annotate(
        f"{figure(median)} ms{faster}", (median, height), (4, 0), textcoords="offset points", va="center", fontsize=8
    )


def _legend(axes: Axes, rows: list[StepCost]) -> None:
    from matplotlib.patches import Patch

    used = [name for name in STEP_CLASSES if any(row.shares_ms.get(name) for row in rows)]
    style: dict[str, Any] = {
        "ncols": len(used),
        "frameon": False,
        "fontsize": 8,
        "handlelength": 1.0,
        "columnspacing": 1.2,
    }
    handles = [Patch(facecolor=CLASS_COLOURS[name], edgecolor=INK, linewidth=0.3, label=name) for name in used]
    if handles:
        axes.legend(handles=handles, loc="lower left", bbox_to_anchor=(-0.01, 1.0), **style)
