"""Names beside curves: where in a figure's axes a word touches no curve, or, for want of room, a letter on each curve.

Places are (x, y) in shares of the axes, boxes (left, bottom, right, top).
"""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from bncli.report.compare.text import LETTERS
from bncli.report.figure import PALE
from bncli.report.text import setting
from bncli.results.train import Target

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Place = tuple[float, float]
Box = tuple[float, float, float, float]
CHARACTER = 0.0215  # width of a bold letter in shares of the axes, about
LINE_INCHES = 0.25  # of the figure's height: a line of text


def name_curves(
    axes: Axes, names: list[str], colours: Sequence[str], paths: dict[int, list[Place]], height: float, target: Target
) -> bool:
    """Write the target beside its dashes and each arm beside its curve; False, and no arm, where one has no room."""
    line = LINE_INCHES / (axes.figure.bbox.height / axes.figure.dpi)
    words = f"target {setting(target.value)}"
    every = list(itertools.chain(*paths.values()))
    starts = itertools.product((k / 50 for k in range(1, 50)), (height + 0.01, height - 0.01 - line))
    boxes = [(left, bottom, left + 0.8 * CHARACTER * len(words), bottom + line) for left, bottom in starts]
    box = max(boxes, key=lambda box: min(_clearance(box, every), 0.05))
    axes.text(box[0], box[1] + line / 2, words, va="center", color=PALE, transform=axes.transAxes)
    taken, found = [box], {}
    for index, path in paths.items():
        lines = textwrap.wrap(names[index], 22)
        size = (CHARACTER * max(map(len, lines)), line * len(lines))
        others = [place for other in paths if other != index for place in paths[other]]
        best = _clearest(path, size, [*others, *dense([(0.0, height), (1.0, height)])], taken)
        if best is None:
            return False
        taken.append(best)
        found[index] = (lines, best)
    style: dict[str, Any] = {"ha": "center", "va": "center", "fontweight": "bold", "parse_math": False}
    for index, (lines, (left, bottom, right, top)) in found.items():
        at = ((left + right) / 2, (bottom + top) / 2)
        axes.text(*at, "\n".join(lines), color=colours[index % len(colours)], transform=axes.transAxes, **style)
    return True


def _clearest(path: list[Place], size: Place, others: list[Place], taken: list[Box]) -> Box | None:
    """The box of this size beside the path that is farthest from all else, near the path's end if there are many."""
    (width, height), best, found = size, 0.015, None
    for x, y in path[::-3]:
        beside = itertools.product((x + 0.02, x - 0.02 - width), (y, y - height / 2, y - height))
        for left, bottom in (*beside, (x - width / 2, y + 0.02), (x - width / 2, y - 0.02 - height)):
            box = (left, bottom, left + width, bottom + height)
            clear = min(_clearance(box, others, taken), 0.08)
            if clear > best and _clearance(box, path) > 0.015:
                best, found = clear, box
    return found


def _clearance(box: Box, points: list[Place], boxes: Sequence[Box] = ()) -> float:
    """Distance from the box to the nearest point; negative outside the axes or over another box."""
    left, bottom, right, top = box
    if left < 0.02 or right > 0.99 or bottom < 0.02 or top > 1:
        return -1.0
    if any(left < b[2] and b[0] < right and bottom < b[3] and b[1] < top for b in boxes):
        return -1.0
    return min((math.hypot(max(left - x, 0, x - right), max(bottom - y, 0, y - top)) for x, y in points), default=1.0)


def dense(path: list[Place]) -> list[Place]:
    """The path with points every 0.02 of the axes, so that nothing fits between two of them."""
    points = path[:1]
    for (x, y), (next_x, next_y) in itertools.pairwise(path):
        parts = max(1, math.ceil(math.hypot(next_x - x, next_y - y) / 0.02))
        points += [(x + (next_x - x) * k / parts, y + (next_y - y) * k / parts) for k in range(1, parts + 1)]
    return points


def tag_curves(axes: Axes, colours: Sequence[str], paths: dict[int, list[Place]]) -> None:
    """A letter on each curve, where it is farthest from the other curves and letters."""
    tags: list[Place] = []
    for index, path in paths.items():
        others = [place for other in paths if other != index for place in paths[other]]

        def room(at: Place, others: list[Place] = others) -> float:
            inside = min(at[0], 1 - at[0], at[1], 1 - at[1])
            curves = min((math.dist(at, other) for other in others), default=1.0)
            return min(inside, 0.06) + min(curves, 0.06) + min([0.12, *(math.dist(at, tag) for tag in tags)])

        tags.append(max(path[::-2], key=room))
        colour = colours[index % len(colours)]
        badge = {"boxstyle": "circle,pad=0.2", "facecolor": "white", "edgecolor": colour}
        style: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 8, "fontweight": "bold", "bbox": badge}
        axes.text(*tags[-1], LETTERS[index % len(LETTERS)], color=colour, transform=axes.transAxes, **style)
