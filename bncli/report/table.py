"""The results as rich tables, each laid out to fit the width that it is given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from bncli.report.compare.curves import sketch
from bncli.report.compare.tuning import tuning_columns, tuning_notes
from bncli.report.text import (
    UNKNOWN,
    Cell,
    Column,
    comparison_columns,
    cost_columns,
    encodable,
    environment_words,
    figure,
    footnotes,
    header_words,
    metric_figure,
    setting,
    subtitle,
    target_columns,
    target_words,
    title,
)
from bncli.results.compare import Comparison
from bncli.results.train import RunResult, most_steps_to_target

UNBOUNDED = 10_000  # columns: wider than any table
NAME_WIDTH = 14  # columns that an arm's name is given at the least, where it needs them; the rest wraps
SKETCH_WIDTH = 100  # columns at the most
Layout = Callable[[str], RenderableType]  # given the output's encoding


@dataclass(frozen=True)
class Fitted:
    """A title, the first of several layouts that fits the width (else the last), and notes below it."""

    title: str
    subtitle: str
    layouts: Sequence[Layout]
    notes: Sequence[str]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        encoding = options.encoding
        yield Text(encodable(self.title, encoding), "bold")
        if self.subtitle:
            yield Text(encodable(self.subtitle, encoding), "dim")
        yield ""
        for layout in self.layouts:
            table = layout(encoding)
            if Measurement.get(console, options.update(max_width=UNBOUNDED), table).minimum <= options.max_width:
                break
        yield table
        yield ""
        for note in self.notes:
            yield Text(encodable(note, encoding), "dim")


def comparison_table(comparison: Comparison) -> RenderableType:
    """An arm a row: best grid values, hits, steps to target, times fewer than the reference, best metric, cost.

    On a wide terminal each interval stands beside its figure and further columns appear; in 80 columns it stands below.
    """
    columns = comparison_columns(comparison)
    short = [column for column in columns if not column.extra]
    layouts: list[Layout] = [
        lambda encoding: _table(columns, False, encoding, wrap=False),
        lambda encoding: _table(short, False, encoding, wrap=False),
        lambda encoding: _table(short, True, encoding),
        lambda encoding: _table(_grid_under_arm(short), True, encoding),
        lambda encoding: _list(short, encoding),
    ]
    return Fitted(title(comparison), subtitle(comparison.plan), layouts, footnotes(comparison))


@dataclass(frozen=True)
class Report:
    """All that `bncli compare` shows: the table, the sketch of the curves and the tuning runs below each other."""

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
        lambda encoding: _table(columns, False, encoding, wrap=False),
        lambda encoding: _table(columns, True, encoding),
        lambda encoding: _list(columns, encoding),
    ]
    return Fitted(heading, "", layouts, ())


def comparison_report(comparison: Comparison) -> RenderableType:
    """The table, below it the sketch of the curves, and how the arms did over the grid."""
    return Report(comparison)


def tuning_table(comparison: Comparison) -> RenderableType:
    """Arms down, grid values across: steps and hits over the tuning seeds, and times fewer at the same value below."""
    columns = tuning_columns(comparison)
    if not columns:
        return Text("Nothing was tuned: the recipe has no grid.")
    values = columns[1:]

    def blocks(size: int) -> Layout:
        parts = [[columns[0], *values[i : i + size]] for i in range(0, len(values), size)]
        return lambda encoding: _stacked([_table(part, True, encoding) for part in parts])

    layouts = [blocks(size) for size in range(len(values), 0, -1)]
    return Fitted(f"{comparison.plan.name}: tuning runs", "", layouts, tuning_notes(comparison))


def run_table(result: RunResult, name: str) -> RenderableType:
    """One run, for the end of `bncli train`: a figure a line, with its unit."""
    metric = result.target.metric if result.target else "accuracy"
    hit = f"{figure(result.first_hit)} (the first evaluation at or past the target)"
    most = figure(most_steps_to_target(result.budget))

    def steps(found: float | None) -> str:
        missed = found is None and result.status == "budget"
        return f"> {most}, as many as the budget can show" if missed else figure(found)

    speed = f"{figure(result.samples_per_s)} samples/s, {figure(result.ms_per_step)} ms/step"
    rows = [
        ("status", _status(result)),
        ("steps run", f"{figure(result.steps_run)} of {figure(result.budget)}"),
        ("steps to target", steps(result.steps_to_target)),
        ("first hit", hit if result.first_hit is not None else UNKNOWN),
        *((f"steps to {setting(each.target.value)}", steps(each.steps)) for each in result.also),
        (f"final {metric}", metric_figure(result.final, metric)),
        (f"best {metric}", metric_figure(result.best, metric)),
        ("throughput", f"{speed} (training alone)"),
        ("time", f"{figure(result.training_s)} s training, {figure(result.evaluation_s)} s evaluating"),
        ("peak memory", _memory(result)),
        ("parameters", figure(result.parameters)),
    ]
    if result.target is None:
        rows = [row for row in rows if row[0] not in ("steps to target", "first hit")]

    def layout(encoding: str) -> RenderableType:
        table = Table.grid(padding=(0, 2))
        for row in rows:
            table.add_row(
                *(Text(encodable(part, encoding), style) for part, style in zip(row, ("", "bold"), strict=True))
            )
        return table

    return Fitted(name, "", [layout], [f"Made on {environment_words(result.environment)}."])


def _memory(result: RunResult) -> str:
    found = ((result.peak_memory_mib, "training"), (result.evaluation_peak_memory_mib, "evaluating"))
    return ", ".join(f"{figure(peak)} MiB {phase}" for peak, phase in found if peak is not None) or UNKNOWN


def _status(result: RunResult) -> str:
    if result.status == "diverged":
        return f"diverged: {result.reason or 'the loss stopped being finite'}"
    if result.status == "interrupted":
        return "interrupted before its end"
    target = f"its target {target_words(result.target)}" if result.target else "no target set"
    if result.status == "reached":
        return f"reached {target}"
    if result.target is None:
        return "used up its budget, no target set"
    if result.steps_to_target is not None:
        return f"used up its budget after it reached {target}"
    if result.first_hit is not None:
        return f"used up its budget before the steps to {target} were settled"
    return f"used up its budget without reaching {target}"


# --- layouts ------------------------------------------------------------------------------------------------------


def _text(cell: Cell, column: Column, apart: bool, encoding: str) -> Text:
    text = Text(encodable(cell[0], encoding), "bold" if column.words or column.header[0] == "times" else "")
    if cell[1]:
        aside = encodable(cell[1], encoding)
        text.append(f"\n{aside}" if apart else f" ({aside})", "not bold dim")
    return text


def _table(columns: list[Column], apart: bool, encoding: str, *, wrap: bool = True) -> Table:
    """A row an arm; `apart` puts a cell's second part on a line of its own; `wrap` lets words, not figures, wrap."""
    table = Table(
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 0, 0, 1),
        leading=int(apart),
        header_style="bold",
    )
    made = []
    for column in columns:
        header = "\n".join(filter(None, column.header)) if apart else header_words(column)
        cells = [_text(cell, column, apart, encoding) for cell in column.cells]
        width = max(cell_len(line) for text in (header, *map(str, cells)) for line in text.split("\n"))
        table.add_column(
            header,
            justify="left" if column.words else "right",
            no_wrap=not (wrap and column.words),
            overflow="fold",
            min_width=min(width, NAME_WIDTH) if wrap and column.words else width,
        )
        made.append(cells)
    for row in zip(*made, strict=True):
        table.add_row(*row)
    return table


def _grid_under_arm(columns: list[Column]) -> list[Column]:
    """The same columns with the grid's values as the arm's second line: for narrow screens and several fields."""
    names = columns[0].cells
    grid = [column for column in columns if column.grid]
    asides = [", ".join(f"{c.header[0]} {' '.join(filter(None, c.cells[i]))}" for c in grid) for i in range(len(names))]
    arms = replace(columns[0], cells=tuple((name, aside) for (name, _), aside in zip(names, asides, strict=True)))
    return [arms, *(column for column in columns[1:] if not column.grid)]


def _list(columns: list[Column], encoding: str) -> Table:
    """A line a figure, arm after arm: what is left where no table fits."""
    table = Table.grid(padding=(0, 1))
    for row in zip(*(column.cells for column in columns), strict=True):
        for cell, column in zip(row, columns, strict=True):
            table.add_row(header_words(column), _text(cell, column, False, encoding))
        table.add_row("", "")
    return table


def _stacked(tables: list[Table]) -> Table:
    """Tables one below the other, as one that measures as wide as the widest."""
    stack = Table.grid()
    for index, table in enumerate(tables):
        stack.add_row("") if index else None
        stack.add_row(table)
    return stack
