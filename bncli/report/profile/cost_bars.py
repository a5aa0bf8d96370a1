"""Bars of GB/s, kernels side by side: a facet an operation, dtype and layout, the machine's copy as a line in each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bncli.report.figure import COLOURS, INK, PALE
from bncli.report.profile.text import gb_per_s, grouped, quartiles, shape_words
from bncli.report.text import figure
from bncli.results.profile import Ceilings, KernelCost

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure

MOST_BARS, MOST_IN_ALL = 40, 160  # of a facet, of a picture: with more, shapes are drawn as their geometric mean
BAR, GAP, FRAME = 0.17, 0.09, 0.85  # inches: a bar, between two groups of them, a facet's title and axis

THICKEST = 1.8  # times BAR, where there is room


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
