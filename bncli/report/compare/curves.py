"""Median curves in the terminal: the metric against optimizer steps on a log axis.

Written here because plotext (6.1, tried) needs box-drawing characters, tells braille curves apart by colour alone,
puts its legend over the curves and its log ticks at odd numbers (21.5, 46.3).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from rich.text import Text

from bncli.report.compare.text import LETTERS, curve_points, metric_range
from bncli.report.text import encodable, figure, setting
from bncli.results.compare import Comparison

COLOURS = ("cyan", "yellow", "magenta", "green", "blue", "red")
LETTER_EVERY = 14  # characters along a curve
BRAILLE = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))  # the bit of a dot, by its column and row in its cell
LINES, ASCII_LINES = "│┤─┬└╌", "|+-++-"  # left axis and its marks, lower axis and its marks, corner, target


@dataclass(frozen=True)
class Frame:
    """What the drawing area shows, and its size in characters: steps on a log axis, the metric on a linear one."""

    steps: tuple[float, float]
    values: tuple[float, float]
    columns: int
    rows: int

    def column(self, step: float, each: int = 1) -> int:
        """The place of a step, counted from the left in 1/`each` characters."""
        low, high = map(math.log, self.steps)
        return round((math.log(step) - low) / (high - low) * (self.columns * each - 1))

    def row(self, value: float, each: int = 1) -> int:
        low, high = self.values
        return round((high - value) / (high - low) * (self.rows * each - 1))


def sketch(comparison: Comparison, width: int = 80, height: int = 18, encoding: str = "utf-8") -> Text:
    """The median curves in `width` x `height` characters: the target dashed, each arm's letter along its curve.

    Braille where `encoding` has it, ASCII otherwise. Step 0 has no place on a log axis and is left out.
    """
    braille = encodable(f"⠿{LINES}", encoding) == f"⠿{LINES}"
    wall, mark, floor, tick, corner, dash = list(LINES if braille else ASCII_LINES)
    values = metric_range(comparison)
    if values is None:
        return Text("No curves yet: no run has been evaluated.\n")
    target = comparison.plan.target
    legend = _legend([encodable(arm.arm, encoding) for arm in comparison.arms], width)
    curves = [[(s, min(max(m, values[0]), values[1])) for s, m, *_ in curve_points(arm)] for arm in comparison.arms]
    steps = [step for curve in curves for step, _ in curve]
    rows = max(height - 3 - len(legend), 4)
    labels = _row_labels(values, rows, target.value)
    margin = max(6, *map(len, labels.values())) + 2
    frame = Frame((min(steps), max(*steps, 1.1 * min(steps))), values, max(width - margin, 8), rows)

    # Cells by (row, column): a character and its style. Later ones cover earlier ones.
    cells = {(frame.row(target.value), column): (dash, "dim") for column in range(0, frame.columns, 2)}
    paths = []
    for index, curve in enumerate(curves):
        letter, style = _style(index)
        dots = _dots(frame, curve, 2, 4) if braille else _dots(frame, curve, 1, 1)
        for place, bits in dots.items():
            old = ord(cells.get(place, " ")[0][0]) - 0x2800
            cells[place] = (chr(0x2800 + (bits | old if 0 <= old < 256 else bits)) if braille else letter, style)
        paths.append(sorted(dots, key=lambda place: (place[1], -place[0])))
    if braille:
        cells |= _letters(paths)

    lines = [Text(f"held-out {target.metric}, median (dashed: target {setting(target.value)})", "dim")]
    for row in range(frame.rows):
        edge = (f"{labels.get(row, ''):>{margin - 2}} {mark if row in labels else wall}", "dim")
        lines.append(Text.assemble(edge, *(cells.get((row, column), " ") for column in range(frame.columns))))
    ticks = {column: figure(step) for step, column in _step_ticks(frame)}
    axis = "".join(tick if column in ticks else floor for column in range(frame.columns))
    words = [" "] * (frame.columns + margin)
    for column, label in ticks.items():
        start = min(column + margin - len(label) // 2, len(words) - len(label))
        words[start : start + len(label)] = label
    lines += [Text(" " * (margin - 1) + corner + axis, "dim"), Text("".join(words).rstrip(), "dim"), *legend]
    return Text("\n").join(lines) + Text("\n")


def _style(index: int) -> tuple[str, str]:
    """An arm's letter and colour."""
    return LETTERS[index % len(LETTERS)], COLOURS[index % len(COLOURS)]


def _dots(frame: Frame, curve: Sequence[tuple[float, float]], wide: int, tall: int) -> dict[tuple[int, int], int]:
    """Straight lines between the points: (row, column) of a cell -> bits of its `wide` x `tall` dots."""
    dots: dict[tuple[int, int], int] = {}
    at = [(frame.column(step, wide), frame.row(value, tall)) for step, value in curve]
    for start, stop in zip(at, [*at[1:], *at[-1:]], strict=True):
        length = max(abs(stop[0] - start[0]), abs(stop[1] - start[1]), 1)
        for part in range(length + 1):
            x, y = (round(a + (b - a) * part / length) for a, b in zip(start, stop, strict=True))
            cell = (y // tall, x // wide)
            dots[cell] = dots.get(cell, 0) | BRAILLE[x % wide][y % tall]
    return dots


def _letters(paths: Sequence[Sequence[tuple[int, int]]]) -> dict[tuple[int, int], tuple[str, str]]:
    """At each curve's end, and at intervals along it where no other letter is near; shifted where curves coincide."""
    cells: dict[tuple[int, int], tuple[str, str]] = {}
    for index, path in enumerate(paths):
        letter, style = _style(index)
        shift = index * 5 % LETTER_EVERY
        for place in [*path[-1:], *path[-LETTER_EVERY - shift :: -LETTER_EVERY]]:
            if place == path[-1] or not any(abs(place[0] - row) < 3 and abs(place[1] - at) < 5 for row, at in cells):
                cells.setdefault(place, (letter, f"bold {style}"))
    return cells


def _row_labels(values: tuple[float, float], rows: int, target: float) -> dict[int, str]:
    """The target's value at its row, and round values at least two rows from it and from each other."""
    low, high = values
    frame = Frame((1, 2), values, 0, rows)
    rough = (high - low) / max(2, rows / 3)
    power = 10.0 ** math.floor(math.log10(rough))
    each = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough)
    labels = {frame.row(target): setting(target)}
    for k in range(math.ceil(low / each), math.floor(high / each) + 1):
        row = frame.row(k * each)
        if all(abs(row - other) >= 2 for other in labels):
            labels[row] = f"{k * each:.6g}"
    return labels


def _step_ticks(frame: Frame) -> list[tuple[float, int]]:
    """Round numbers of steps and their columns: three, two or one per decade, as labels have room."""
    low, high = frame.steps
    decades = range(max(0, math.floor(math.log10(low))), math.ceil(math.log10(high)) + 1)
    ticks: list[tuple[float, int]] = []
    for factors in ((1, 2, 5), (1, 3), (1,)):
        steps = [factor * 10**decade for decade in decades for factor in factors]
        ticks = [(step, frame.column(step)) for step in steps if low <= step <= high]
        if all(b - a > len(figure(step)) + 3 for (_, a), (step, b) in itertools.pairwise(ticks)):
            break
    return ticks if len(ticks) > 1 else [(round(low), 0), (round(high), frame.columns - 1)]


def _legend(arms: Sequence[str], width: int) -> list[Text]:
    lines = [Text("optimizer steps (log scale)", "dim")]
    for index, arm in enumerate(arms):
        letter, style = _style(index)
        entry = Text(f"{letter} {arm}", f"bold {style}")
        if lines[-1].cell_len + entry.cell_len + 3 > width:
            lines.append(entry)
        else:
            lines[-1] = Text.assemble(lines[-1], "   ", entry)
    return lines
