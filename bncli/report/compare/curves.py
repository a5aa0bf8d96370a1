"""Median curves in the terminal: the metric against optimizer steps on a log axis.

Written here because plotext (6.1, tried) needs box-drawing characters, tells braille curves apart by colour alone,
puts its legend over the curves and its log ticks at odd numbers (21.5, 46.3).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from rich.text import Text

from bncli.report.compare.text import LETTERS, curve_points, metric_range
from bncli.report.text import encodable, figure, setting
from bncli.results.compare import Comparison

COLOURS = ("cyan", "yellow", "magenta", "green", "blue", "red")
LETTER_EVERY = 14  # characters along a curve
BRAILLE = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))  # the bit of a dot, by its column and row in its cell
FANCY = {"wall": "│", "mark": "┤", "floor": "─", "tick": "┬", "corner": "└", "dash": "╌"}
ASCII = {"wall": "|", "mark": "+", "floor": "-", "tick": "+", "corner": "+", "dash": "-"}

Point = tuple[float, float]  # optimizer steps, metric
Cells = list[list[tuple[str, str]]]  # rows from the top, of (character, style)


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
    drawn_with = "⠿" + "".join(FANCY.values())
    fancy = encodable(drawn_with, encoding) == drawn_with
    signs = FANCY if fancy else ASCII
    values = metric_range(comparison)
    if values is None:
        return Text("No curves yet: no run has been evaluated.\n")
    target = comparison.plan.target
    legend = _legend([encodable(arm.arm, encoding) for arm in comparison.arms], width)
    low, high = values
    curves = [[(s, min(max(m, low), high)) for s, m, *_ in curve_points(arm)] for arm in comparison.arms]
    steps = [step for curve in curves for step, _ in curve]
    ends = (min(steps), max(*steps, 1.1 * min(steps)))
    frame = Frame(ends, values, 0, max(height - 3 - len(legend), 4))
    labels = _row_labels(frame, target.value)
    margin = max(6, *map(len, labels.values())) + 2
    frame = replace(frame, columns=max(width - margin, 20))
    cells: Cells = [[(" ", "")] * frame.columns for _ in range(frame.rows)]
    dashed = frame.row(target.value)
    cells[dashed] = [(" " if column % 2 else signs["dash"], "dim") for column in range(frame.columns)]
    paths = [_draw(cells, frame, curve, *_look(index), fancy) for index, curve in enumerate(curves)]
    if fancy:
        _write_letters(cells, paths)
    heading = Text(f"held-out {target.metric}, median (dashed: target {setting(target.value)})", "dim")
    lines = [heading, *_with_axes(cells, frame, labels, margin, signs), *legend]
    return Text("\n").join(lines) + Text("\n")


def _look(index: int) -> tuple[str, str]:
    return LETTERS[index % len(LETTERS)], COLOURS[index % len(COLOURS)]


def _draw(
    cells: Cells, frame: Frame, curve: Sequence[Point], letter: str, style: str, fancy: bool
) -> list[tuple[int, int]]:
    """Draw straight lines between the points in braille, or in the letter. Returns the cells, from left to right."""
    wide, tall = (2, 4) if fancy else (1, 1)
    dots: dict[tuple[int, int], int] = {}
    at = [(frame.column(step, wide), frame.row(value, tall)) for step, value in curve]
    for start, stop in zip(at, [*at[1:], *at[-1:]], strict=True):
        length = max(abs(stop[0] - start[0]), abs(stop[1] - start[1]), 1)
        for part in range(length + 1):
            x, y = (round(a + (b - a) * part / length) for a, b in zip(start, stop, strict=True))
            cell = (y // tall, x // wide)
            dots[cell] = dots.get(cell, 0) | BRAILLE[x % wide][y % tall]
    for row, column in dots:
        old = ord(cells[row][column][0]) - 0x2800
        bits = dots[row, column] | (old if 0 <= old < 256 else 0)
        cells[row][column] = (chr(0x2800 + bits) if fancy else letter, style)
    return sorted(dots, key=lambda cell: (cell[1], -cell[0]))


def _write_letters(cells: Cells, paths: Sequence[Sequence[tuple[int, int]]]) -> None:
    """At each curve's end and at intervals along it, shifted so that curves on top of each other show both letters."""
    for index, path in enumerate(paths):
        letter, style = _look(index)
        shift = index * 5 % LETTER_EVERY
        for row, column in [*path[-1:], *path[-LETTER_EVERY - shift :: -LETTER_EVERY]]:
            if cells[row][column][0] not in LETTERS:
                cells[row][column] = (letter, f"bold {style}")


def _with_axes(cells: Cells, frame: Frame, labels: dict[int, str], margin: int, signs: dict[str, str]) -> list[Text]:
    lines = []
    for index, row in enumerate(cells):
        edge = signs["mark"] if index in labels else signs["wall"]
        lines.append(Text.assemble((f"{labels.get(index, ''):>{margin - 2}} {edge}", "dim"), *row))
    floor, words = [signs["floor"]] * frame.columns, [" "] * (frame.columns + margin)
    for step, place in _step_ticks(frame):
        floor[place] = signs["tick"]
        label = figure(step)
        start = min(place + margin - len(label) // 2, len(words) - len(label))
        words[start : start + len(label)] = label
    lines.append(Text(" " * (margin - 1) + signs["corner"] + "".join(floor), "dim"))
    return [*lines, Text("".join(words).rstrip(), "dim")]


def _row_labels(frame: Frame, target: float) -> dict[int, str]:
    """The target's value at its row, and round values at least two rows from it and from each other."""
    low, high = frame.values
    rough = (high - low) / max(2, frame.rows / 3)
    power = 10.0 ** math.floor(math.log10(rough))
    each = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough)
    labels = {frame.row(target): setting(target)}
    for k in range(math.ceil(low / each), math.floor(high / each) + 1):
        row = frame.row(k * each)
        if all(abs(row - other) >= 2 for other in labels):
            labels[row] = f"{k * each:.6g}"
    return labels


def _step_ticks(frame: Frame) -> list[tuple[int, int]]:
    """Round numbers of steps and their columns: three, two or one per decade, as labels have room."""
    low, high = frame.steps
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks: list[tuple[int, int]] = []
    for factors in ((1, 2, 5), (1, 3), (1,)):
        steps = [factor * 10**decade for decade in decades if decade >= 0 for factor in factors]
        ticks = [(step, frame.column(step)) for step in steps if low <= step <= high]
        if all(b - a > len(figure(step)) + 3 for (_, a), (step, b) in itertools.pairwise(ticks)):
            break
    return ticks if len(ticks) > 1 else [(round(low), 0), (round(high), frame.columns - 1)]


def _legend(arms: Sequence[str], width: int) -> list[Text]:
    lines = [Text.assemble(("optimizer steps (log scale)", "dim"))]
    for index, arm in enumerate(arms):
        letter, style = _look(index)
        entry = Text(f"{letter} {arm}", f"bold {style}")
        if lines[-1].cell_len + entry.cell_len + 3 > width:
            lines.append(Text())
        if lines[-1]:
            lines[-1].append("   ")
        lines[-1].append_text(entry)
    return lines
