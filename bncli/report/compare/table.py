"""A comparison for the terminal: its table, costs, targets, curves and tuning runs below each other."""

from __future__ import annotations

from dataclasses import dataclass, replace

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.text import Text

from bncli.report.compare.curves import sketch
from bncli.report.compare.text import (
    comparison_columns,
    cost_columns,
    footnotes,
    subtitle,
    target_columns,
    title,
    tuning_columns,
    tuning_notes,
)
from bncli.report.table import Fitted, Layout, listing, stacked, table
from bncli.report.text import Column
from bncli.results.compare import Comparison

SKETCH_WIDTH = 100  # columns at the most


def comparison_table(comparison: Comparison) -> RenderableType:
    """An arm a row: best grid values, hits, steps to target, times fewer than the reference, best metric, cost.

    On a wide terminal each interval stands beside its figure and further columns appear; in 80 columns it stands below.
    """
    columns = comparison_columns(comparison)
    short = [column for column in columns if not column.extra]
    layouts: list[Layout] = [
        lambda encoding: table(columns, False, encoding, wrap=False),
        lambda encoding: table(short, False, encoding, wrap=False),
        lambda encoding: table(short, True, encoding),
        lambda encoding: table(_grid_under_arm(short), True, encoding),
        lambda encoding: listing(short, encoding),
    ]
    return Fitted(title(comparison), subtitle(comparison.plan), layouts, footnotes(comparison))


def _grid_under_arm(columns: list[Column]) -> list[Column]:
    """The same columns with the grid's values as the arm's second line: for narrow screens and several fields."""
    names = columns[0].cells
    grid = [column for column in columns if column.grid]
    asides = [", ".join(f"{c.header[0]} {' '.join(filter(None, c.cells[i]))}" for c in grid) for i in range(len(names))]
    arms = replace(columns[0], cells=tuple((name, aside) for (name, _), aside in zip(names, asides, strict=True)))
    return [arms, *(column for column in columns[1:] if not column.grid)]


@dataclass(frozen=True)
class ComparisonReport:
    """All that `bncli compare` shows."""

    comparison: Comparison

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield comparison_table(self.comparison)
        yield ""
        yield side_table(
            f"{self.comparison.plan.name}: what it costs to reach the target", cost_columns(self.comparison)
        )
        if self.comparison.plan.also:
            yield side_table(f"{self.comparison.plan.name}: steps to each target", target_columns(self.comparison))
        yield sketch(self.comparison, min(options.max_width, SKETCH_WIDTH), encoding=options.encoding)
        if self.comparison.plan.grid and self.comparison.plan.tune_seeds:
            yield tuning_table(self.comparison)


def side_table(heading: str, columns: list[Column]) -> RenderableType:
    """A smaller table below the comparison's own."""
    layouts: list[Layout] = [
        lambda encoding: table(columns, False, encoding, wrap=False),
        lambda encoding: table(columns, True, encoding),
        lambda encoding: listing(columns, encoding),
    ]
    return Fitted(heading, "", layouts, ())


def tuning_table(comparison: Comparison) -> RenderableType:
    """Arms down, grid values across: steps and hits over the tuning seeds, and times fewer at the same value below."""
    columns = tuning_columns(comparison)
    if not columns:
        return Text("Nothing was tuned: the recipe has no grid.")
    values = columns[1:]

    def blocks(size: int) -> Layout:
        parts = [[columns[0], *values[i : i + size]] for i in range(0, len(values), size)]
        return lambda encoding: stacked([table(part, True, encoding) for part in parts])

    layouts = [blocks(size) for size in range(len(values), 0, -1)]
    return Fitted(f"{comparison.plan.name}: tuning runs", "", layouts, tuning_notes(comparison))
