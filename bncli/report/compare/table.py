"""Report of `bncli compare` on the terminal: table, costs, targets, curves and tuning runs."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult

from bncli.report.compare import text
from bncli.report.compare.claims import HEADING, claim_columns, claim_notes
from bncli.report.compare.curves import sketch
from bncli.report.compare.notes import warnings
from bncli.report.table import AlignedTable, BulletList, Paragraph, ResponsiveTable, Row
from bncli.results.compare import Comparison

SKETCH_WIDTH = 100  # at most, in columns


@dataclass(frozen=True)
class ComparisonReport:
    """All tables and curves of a comparison."""

    comparison: Comparison

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        found = self.comparison
        yield from (Paragraph(sentence, "bold") for sentence in text.headline(found))
        yield ""
        yield comparison_table(found)
        yield ""
        for heading, columns in text.side_tables(found):
            narrower = [AlignedTable(columns, asides_below=True, wrap=True)]
            yield ResponsiveTable(f"{found.plan.name}: {heading}", AlignedTable(columns), narrower)
        yield sketch(found, min(options.max_width, SKETCH_WIDTH), encoding=options.encoding)
        if found.plan.grid and found.plan.tune_seeds:
            yield tuning_table(found)
        if found.claims:
            yield ""
            yield claims_table(found)


def comparison_table(comparison: Comparison) -> RenderableType:
    """One row per arm: best grid values, hits, steps to target, their ratio to the reference's, best metric, cost."""
    columns = text.comparison_columns(comparison)
    short, shortest = (
        [column for column in found if not column.optional]
        for found in (columns, text.comparison_columns(comparison, grid_below_arm=True))
    )
    narrower = [
        AlignedTable(short),
        AlignedTable(short, asides_below=True, wrap=True),
        AlignedTable(shortest, asides_below=True, wrap=True),
    ]
    found, notes = warnings(comparison), [Paragraph(note, "dim") for note in text.footnotes(comparison)]
    warned: list[RenderableType] = [Paragraph("Warnings", "bold yellow"), BulletList("", found), ""]
    table = ResponsiveTable(text.title(comparison), AlignedTable(columns), narrower, text.subtitle(comparison.plan))
    return Group(table, *warned * bool(found), *notes)


def tuning_table(comparison: Comparison) -> ResponsiveTable:
    """Arms down, grid values across: steps and hits over the tuning seeds, and the ratio at the same value below."""
    columns = text.tuning_columns(comparison)
    arms, *values = columns

    def blocks(size: int) -> Group:
        """Tables of so many values, one below the other."""
        parts = [values[start : start + size] for start in range(0, len(values), size)]
        tables = [AlignedTable([arms, *part], asides_below=True, wrap=True) for part in parts]
        return Group(tables[0], *(each for table in tables[1:] for each in ("", table)))

    whole = AlignedTable(columns, asides_below=True, wrap=True)
    narrower = [blocks(size) for size in range(len(values) - 1, 0, -1)]
    return ResponsiveTable(f"{comparison.plan.name}: tuning runs", whole, narrower, notes=text.tuning_notes(comparison))


def claims_table(comparison: Comparison) -> ResponsiveTable:
    """Each claim as it is said, and below it what was measured, its bound, and the verdict."""
    said, *columns = claim_columns(comparison)
    rows = [Row(heading=cell.main) for cell in said.cells]
    narrower = [AlignedTable(columns, rows, asides_below=True, wrap=True)]
    heading, notes = f"{comparison.plan.name}: {HEADING}", list(claim_notes(comparison))
    return ResponsiveTable(heading, AlignedTable(columns, rows), narrower, notes=notes)
