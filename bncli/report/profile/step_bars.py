"""Steps as stacked bars: the milliseconds of each class of work, a bar an arm, mode and kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bncli.report.figure import COLOURS, INK, PALE
from bncli.report.profile.text import quartiles
from bncli.report.text import figure
from bncli.results.profile import STEP_CLASSES, StepCost, StepProfile

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Normalization stands out; what is left over is grey.
CLASS_COLOURS = dict(
    zip(STEP_CLASSES, (COLOURS[1], COLOURS[0], COLOURS[4], COLOURS[2], COLOURS[3], "#b5b5b5", "#e3e3e3"), strict=True)
)
BAR, FRAME = 0.42, 1.9  # inches


def step_height(profile: StepProfile) -> float:
    """Of the picture, in inches."""
    return FRAME + BAR * max(2, len(_timed(profile))) + 0.3 * len({row.arm for row in profile.rows})


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
