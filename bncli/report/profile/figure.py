"""Figures of a profile: the roofline beside bars of GB/s for kernels, or a step's time by class of work.

The roofline has bandwidth on its y axis, so that what memory allows is a level line and what arithmetic allows a
falling one (Williams, Waterman and Patterson 2009 have its product with the intensity there; the figure is the same,
turned). A batch norm's intensity depends on its operation and dtype alone: each such pair has a column for each kernel,
moved apart where they would overlap, which changes no height; a dot is a shape, the larger mark their geometric mean.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bncli.report.figure import COLOURS, INK, PALE, check_path, rendered
from bncli.report.files import write_atomically
from bncli.report.profile.bars import draw_facets, facets, facets_height, step_bars, step_height
from bncli.report.profile.text import cache_words, gb_per_s, size_words
from bncli.report.text import figure
from bncli.results.environment import Environment
from bncli.results.profile import Ceilings, KernelCost, KernelProfile, StepProfile

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, BESIDE = 13.0, 6.8  # inches; bars higher than that stand below the roofline, not beside it
ROOF_HEIGHT = 4.8
KEY = "Dot: a shape; larger mark: geometric mean; line on a bar: quartiles; a column's own intensity stands below it"
MARKERS = ("o", "s", "^", "D", "v", "P", "X")  # one an operation
COLUMN_INCHES, NAME_INCHES = 0.2, 0.8  # a kernel's column, the name below them
LABEL_SHARE = 0.045  # a line of text, of the roofline's height
Ends = tuple[float, float]


def draw(profile: KernelProfile | StepProfile, path: Path) -> None:
    """Write the figure to `path`, an .svg or a .png. Raises FileError for another suffix or without matplotlib."""
    write_atomically(path, render(profile, check_path(path)))


def render(profile: KernelProfile | StepProfile, kind: str) -> bytes:
    """The figure as the bytes of a "svg" or "png" file, the same for the same profile. Raises FileError."""
    if isinstance(profile, KernelProfile):
        return rendered(lambda picture: _draw_kernels(picture, profile), kind, 130)
    return rendered(lambda picture: _draw_steps(picture, profile), kind, 130)


def _draw_steps(picture: Figure, profile: StepProfile) -> None:
    picture.set_size_inches(11, step_height(profile))
    _title(picture, f"{profile.name}: where the time of a step goes", profile.environment, "")
    step_bars(picture.subplots(), profile)


def _draw_kernels(picture: Figure, profile: KernelProfile) -> None:
    timed = [row for row in profile.rows if gb_per_s(row.both)]
    kernels = {kernel: index for index, kernel in enumerate(dict.fromkeys(row.kernel for row in profile.rows))}
    groups = facets(timed)
    across = 1 if sum(group.bars for group in groups) <= 30 and len(groups) <= 4 else min(3, len(groups))
    height = facets_height(groups, across)
    below = height > BESIDE or across > 1
    picture.set_size_inches(WIDTH, 0.9 + (ROOF_HEIGHT + height if below else max(ROOF_HEIGHT, height)))
    dtypes = ", ".join(dict.fromkeys(row.case.dtype for row in profile.rows))
    _title(
        picture,
        "Batch norm under the roofs of its machine",
        profile.environment,
        f"{dtypes}; {cache_words(profile.cold)}" if dtypes else cache_words(profile.cold),
        KEY,
    )
    parts: Any = (
        picture.subfigures(2, 1, height_ratios=(ROOF_HEIGHT, height))
        if below
        else picture.subfigures(1, 2, width_ratios=(1.0, 1.15))
    )
    roofline(parts[0].subplots(), timed, profile.ceilings, kernels)
    stretch = 1.0 if below else max(1.0, ROOF_HEIGHT / max(height, 1.0))
    draw_facets(parts[1], groups, across, profile.ceilings, kernels, stretch)
    _legend(picture, {row.kernel: kernels[row.kernel] for row in timed})


def _title(picture: Figure, title: str, made: Environment, more: str, key: str = "") -> None:
    words: dict[str, Any] = {"ha": "left", "x": 0.008, "parse_math": False}
    picture.suptitle(title, fontsize=12, fontweight="bold", **words)
    threads = f"{made.threads} thread{'s' * (made.threads != 1)}"
    parts = [f"{made.device} ({made.processor}), {threads}", more, f"torch {made.torch}", made.date[:10]]
    lines = [*textwrap.wrap("; ".join(filter(None, parts)), 170), key]
    picture.supxlabel("\n".join(filter(None, lines)), fontsize=8, **words)


def _legend(picture: Figure, kernels: dict[str, int]) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(color=COLOURS[index % len(COLOURS)], label=kernel) for kernel, index in kernels.items()]
    if handles:
        style: dict[str, Any] = {"ncols": len(handles), "frameon": False, "handlelength": 1.0, "columnspacing": 1.4}
        picture.legend(handles=handles, loc="outside upper right", **style)


# --- the roofline -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cluster:
    """An operation and dtype: its intensity (flop a byte), and each kernel's speeds over shapes (GB/s)."""

    name: str
    marker: str
    intensity: float
    speeds: dict[str, list[float]]


def clusters(rows: Sequence[KernelCost]) -> list[Cluster]:
    """Of the rows that were timed, from the least intensity to the most."""
    found: dict[tuple[str, str], list[KernelCost]] = {}
    for row in rows:
        if row.both and row.both.flops > 0:
            found.setdefault((row.case.operation, row.case.dtype), []).append(row)
    operations = list(dict.fromkeys(operation for operation, _ in found))
    made = []
    for (operation, dtype), members in found.items():
        speeds: dict[str, list[float]] = {}
        for row in members:
            speeds.setdefault(row.kernel, []).append(gb_per_s(row.both) or math.nan)
        middle = _geometric_mean([row.both.flops / row.both.floor_bytes for row in members if row.both])
        marker = MARKERS[operations.index(operation) % len(MARKERS)]
        made.append(Cluster(f"{operation}\n{dtype}\n{figure(middle, 2)} flop/B", marker, middle, speeds))
    return sorted(made, key=lambda cluster: cluster.intensity)


def apart(places: Sequence[float], widths: Sequence[float]) -> list[float]:
    """Rising places moved as little as need be for intervals of those widths around them not to overlap.

    Where some would, they stand side by side around the mean of their places.
    """
    blocks: list[tuple[list[int], float, float]] = []  # members, middle, width
    for index, (place, width) in enumerate(zip(places, widths, strict=True)):
        members, middle, wide = [index], place, width
        while blocks and blocks[-1][1] + blocks[-1][2] / 2 > middle - wide / 2:
            others, _, more = blocks.pop()
            members, wide = [*others, *members], wide + more
            middle = sum(places[each] for each in members) / len(members)
        blocks.append((members, middle, wide))
    moved = [0.0] * len(places)
    for members, middle, wide in blocks:
        left = middle - wide / 2
        for each in members:
            moved[each] = left + widths[each] / 2
            left += widths[each]
    return moved


def roofline(axes: Axes, rows: Sequence[KernelCost], ceilings: Ceilings, kernels: dict[str, int]) -> None:
    """Draw the clusters under the copies by size, and the multiply-adds where they come into sight."""
    axes.set_title("roofline: forward and backward together")
    axes.set_xlabel("arithmetic intensity: flop for each byte that must be moved")
    axes.set_ylabel("GB/s of the bytes that must be moved")
    found = clusters(rows)
    if not found:
        axes.set(xticks=[], yticks=[])
        axes.text(0.5, 0.5, "nothing was measured", ha="center", transform=axes.transAxes, color=PALE)
        return
    inches = 0.9 * axes.figure.bbox.width / axes.figure.dpi
    middles, column, (low, high) = _across([c.intensity for c in found], [len(c.speeds) for c in found], inches)
    speeds = [speed for cluster in found for each in cluster.speeds.values() for speed in each]
    tops = [speed for _, speed in ceilings.copies]
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(low, high)
    axes.set_ylim(min([*speeds, *tops]) / 3.2, max([*speeds, *tops]) * 2.0)
    _ceilings(axes, ceilings)
    for cluster, middle in zip(found, middles, strict=True):
        _cluster(axes, cluster, middle, column, kernels)
    _plain(axes)


def _across(intensities: Sequence[float], columns: Sequence[int], inches: float) -> tuple[list[float], float, Ends]:
    """Where clusters stand, the factor from a column to the next, and the axis' ends."""
    logs = [math.log(value) for value in intensities]
    low, high = logs[0] - 0.7, logs[-1] + 0.7
    for _ in range(20):  # the columns' width is a share of the axis, and the axis grows with the columns
        column = COLUMN_INCHES / inches * (high - low)
        widths = [max(column * (count + 1), NAME_INCHES / inches * (high - low)) for count in columns]
        middles = apart(logs, widths)
        ends = middles[0] - widths[0] / 2 - 0.1, middles[-1] + widths[-1] / 2 + 0.1
        if low <= ends[0] and ends[1] <= high:
            break
        low, high = min(low, ends[0]), max(high, ends[1])
    return [math.exp(middle) for middle in middles], math.exp(column), (math.exp(low), math.exp(high))


def _cluster(axes: Axes, cluster: Cluster, middle: float, column: float, kernels: dict[str, int]) -> None:
    """A column of dots a kernel, with their geometric mean, and the names below."""
    for place, (kernel, speeds) in enumerate(sorted(cluster.speeds.items(), key=lambda item: kernels[item[0]])):
        x = middle * column ** (place - (len(cluster.speeds) - 1) / 2)
        colour = COLOURS[kernels[kernel] % len(COLOURS)]
        if len(speeds) > 1:
            axes.plot([x] * len(speeds), speeds, ".", color=colour, alpha=0.55, markersize=6, mec="none")
        mean: dict[str, Any] = {"color": colour, "markersize": 7, "mec": "white", "mew": 0.7, "zorder": 3}
        axes.plot(x, _geometric_mean(speeds), cluster.marker, **mean)
    below: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "fontsize": 8, "linespacing": 1.25}
    axes.annotate(cluster.name, (middle, axes.get_ylim()[0]), (0, 4), parse_math=False, **below)


def _ceilings(axes: Axes, ceilings: Ceilings) -> None:
    """Copies as level lines, the largest in ink; multiply-adds as a falling line where it is in sight."""
    low, high = axes.get_xlim()
    bottom, top = axes.get_ylim()
    line = (top / bottom) ** LABEL_SHARE  # the factor that a line of text is high
    near: list[list[tuple[int, float]]] = []  # copies too near to each other for a label each
    for size, speed in sorted(ceilings.copies, key=lambda copy: copy[1]):
        largest = size == ceilings.copies[-1][0]
        axes.axhline(speed, color=INK if largest else PALE, linewidth=1.3 if largest else 0.9, zorder=1)
        if not near or speed > near[-1][-1][1] * line:
            near.append([])
        near[-1].append((size, speed))
    for copies in near:
        words = copy_words(copies)
        colour = INK if ceilings.copies[-1] in copies else PALE
        place: dict[str, Any] = {"textcoords": "offset points", "va": "bottom", "fontsize": 8, "color": colour}
        axes.annotate(words, (low, copies[-1][1]), (4, 3), **place).set_in_layout(False)
    roof = ceilings.gflop_per_s
    if roof and ceilings.copies:
        ridge = roof / ceilings.copy_gb_per_s
        if ridge < high:
            axes.plot(
                [max(low, roof / top), high], [min(top, roof / low), roof / high], color=INK, linewidth=1.3, zorder=1
            )
        beyond = f"multiply-adds, {figure(roof)} GFLOP/s in fp32: the limit beyond {figure(ridge)} flop a byte"
        axes.annotate(beyond, (high, top), (-3, -3), textcoords="offset points", ha="right", va="top", fontsize=8)


def copy_words(copies: Sequence[tuple[int, float]]) -> str:
    """Each of one or two, (bytes, GB/s) ordered by speed; of more the largest, and how fast the smaller are."""
    if len(copies) < 3:
        return "copy: " + ", ".join(f"{figure(speed)} GB/s of {size_words(size)}" for size, speed in copies)
    (size, speed), *smaller = sorted(copies, reverse=True)
    speeds = [each for _, each in smaller]
    span = f"{figure(min(speeds))} to {figure(max(speeds))} of {len(smaller)} smaller sizes"
    return f"copy: {figure(speed)} GB/s of {size_words(size)}, {span}"


def _plain(axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high / low < 300 else (1.0,)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())


def _geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))
