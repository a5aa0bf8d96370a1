"""The tables of `bncli gradcheck`: the case groups, the gradient's three parts, the demonstration of section 2."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from bncli.report.table import NAME_WIDTH, Fitted, Layout
from bncli.report.text import UNKNOWN, encodable, figure
from bncli.results.gradcheck import BiasStep, CheckGroup, GradientPaths

OK, FAILED, NOT_CHECKED = "ok", "FAILED", "not checked"
STYLES = {OK: "green", FAILED: "bold red", NOT_CHECKED: "yellow"}
LONGEST = 1e4  # from here on an error in tolerances is written with an exponent


def groups_table(groups: Sequence[CheckGroup], title: str, subtitle: str = "") -> RenderableType:
    """A row a case group: its cases, its worst error in units of the tolerance, its verdict."""
    sections = [group.section for group in groups]
    groups = sorted(groups, key=lambda group: sections.index(group.section))
    beside, below = _group_columns(groups), _group_columns(_with_headings(groups))
    layouts: list[Layout] = [
        lambda encoding: _table(beside, encoding),
        lambda encoding: _table(beside[:-1], encoding),
        lambda encoding: _table(below[1:-1], encoding),
        lambda encoding: _table(below[1:-1], encoding, wrap=True),
        lambda encoding: _list(beside[:-1], encoding),
    ]
    return Fitted(title, subtitle, layouts, ())


def reasons(groups: Sequence[CheckGroup]) -> list[tuple[str, str]]:
    """Each group that could not run, and why."""
    return [
        (group.name, group.not_checked or "no case ran") for group in groups if group.not_checked or not group.cases
    ]


@dataclass(frozen=True)
class Listed:
    """A heading with entries below it, a dash before each; nothing where there are none."""

    heading: str
    entries: Sequence[tuple[str, str]]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if not self.entries:
            return
        if self.heading:
            yield Text(encodable(self.heading, options.encoding), "dim")
        table = Table.grid(padding=(0, 1, 0, 0))
        for name, words in self.entries:
            table.add_row(Text("-", "dim"), Text(encodable(f"{name}: {words}", options.encoding), "dim"))
        yield table


def _with_headings(groups: Sequence[CheckGroup]) -> list[CheckGroup | str]:
    """The groups with their section above them, where it begins."""
    rows: list[CheckGroup | str] = []
    for index, group in enumerate(groups):
        if index == 0 or group.section != groups[index - 1].section:
            rows.append(group.section)
        rows.append(group)
    return rows


def _group_columns(rows: Sequence[CheckGroup | str]) -> list[_Column]:
    """Section, group, cases, worst error, verdict and worst case; a row that is text is a heading."""
    headed = any(isinstance(row, str) for row in rows)
    sections = ["" if isinstance(row, str) else row.section for row in rows]
    first = ["" if i and section == sections[i - 1] else section for i, section in enumerate(sections)]
    words = ["" if isinstance(row, str) else verdict(row) for row in rows]

    def cells(text: Callable[[CheckGroup], str]) -> list[str]:
        return ["" if isinstance(row, str) else text(row) for row in rows]

    return [
        _Column("section", first, words=True, styles=["bold"] * len(rows)),
        _Column(
            "group",
            [row if isinstance(row, str) else row.name for row in rows],
            words=True,
            styles=["bold" if isinstance(row, str) else "" for row in rows],
            indents=[0 if isinstance(row, str) or not headed else 2 for row in rows],
        ),
        _Column("cases", cells(lambda group: figure(group.cases) if group.cases else UNKNOWN)),
        _Column("worst error\nin tolerances", cells(lambda group: in_tolerances(group.worst))),
        _Column(
            "verdict",
            cells(lambda group: f"{group.failed:,} {FAILED}" if group.failed else verdict(group)),
            words=True,
            styles=[STYLES.get(word, "") for word in words],
        ),
        _Column("worst case", cells(lambda group: group.worst_case or UNKNOWN), words=True),
    ]


def interrupted_table(groups: Sequence[CheckGroup], kernel: str) -> RenderableType:
    """The groups that were finished before the check was interrupted."""
    title = f"Gradients of kernel {kernel}: interrupted"
    if not groups:
        return Text(f"{title} before a group of cases was finished", "bold")
    worst = [(group.name, group.worst_case or UNKNOWN) for group in groups if group.failed]
    table = groups_table(groups, title, "The groups that were finished")
    return Group(table, Listed("Not checked:", reasons(groups)), Listed("Worst cases:", worst))


def paths_table(paths: Sequence[GradientPaths]) -> RenderableType:
    """dL/dx case by case in its three parts, the kernel's error with its bound, and what ignoring two parts loses."""
    columns = [
        _Column("case", [each.case for each in paths], words=True),
        _Column("direct", [figure(each.direct) for each in paths]),
        _Column("through\nmean", [figure(each.through_mean) for each in paths]),
        _Column("through\nvariance", [figure(each.through_variance) for each in paths]),
        _Column("full", [figure(each.full) for each in paths]),
        _Column(
            "error",
            [f"{each.error:.1e}" for each in paths],
            styles=["" if each.error <= each.bound else STYLES[FAILED] for each in paths],
        ),
        _Column("its\nbound", [f"{each.bound:.1e}" for each in paths]),
        _Column("lost by\nignoring", [f"{each.lost:.0%}" for each in paths], styles=["bold"] * len(paths)),
    ]
    span = " to ".join(dict.fromkeys(f"{pick(each.lost for each in paths):.0%}" for pick in (min, max)))
    notes = [
        "Each value moves the others of its set too, through their mean and variance: a gradient that ignores those "
        f"two paths (the direct part alone) is off by {span} of the true one's length.",
        f"Error: the kernel's dL/dx against float64 central differences of the loss, relative. {_agreement(paths)}",
    ]
    return Fitted("dL/dx in its three parts (l2 norms)", "", _layouts(columns), notes)


def _agreement(paths: Sequence[GradientPaths]) -> str:
    wrong = beyond(paths)
    if not wrong:
        return "It is within its bound in every case."
    direct = all(math.isclose(each.error, each.lost, rel_tol=1e-3) for each in wrong)
    place = "any case" if len(wrong) == len(paths) > 1 else names(wrong)
    loss = ", and off by just what ignoring those two paths loses" if direct else ""
    return f"It is NOT the true gradient in {place}{loss}."


def demo_table(steps: Sequence[BiasStep]) -> RenderableType:
    """Section 2's two descents side by side, and what to see in them."""
    columns = [
        _Column("step", [figure(each.step) for each in steps]),
        _Column("E[x] held constant\nbias b", [figure(each.bias_ignoring, 4) for each in steps]),
        _Column("\nloss", [figure(each.loss_ignoring, 6) for each in steps]),
        _Column("full gradient\nbias b", [figure(each.bias_full, 2) for each in steps]),
        _Column("\nloss", [figure(each.loss_full, 6) for each in steps]),
    ]
    first, last = steps[0], steps[-1]
    before, after = (figure(each.loss_ignoring, 6) for each in (first, last))
    loss = f"stands still at {after}" if before == after else f"goes from {before} to {after}"
    note = (
        f"Ignoring that E[x] contains b, {count(last.step, 'step')} drive b from {figure(first.bias_ignoring, 4)} to "
        f"{figure(last.bias_ignoring, 4)} while the loss {loss}: the mean takes b off again. "
        f"With the full gradient, which is zero but for rounding, b ends at {figure(last.bias_full, 2)}."
    )
    title = "A learned bias b, then the mean taken off: xhat = u + b - E[u + b]"
    return Fitted(title, "Ioffe & Szegedy 2015, section 2", _layouts(columns), [note])


# --- words --------------------------------------------------------------------------------------------------------


def verdict(group: CheckGroup) -> str:
    return FAILED if group.failed else OK if group.cases else NOT_CHECKED


def beyond(paths: Sequence[GradientPaths]) -> list[GradientPaths]:
    return [each for each in paths if not each.error <= each.bound]


def names(paths: Sequence[GradientPaths]) -> str:
    return ", ".join(each.case for each in paths)


def count(number: int, word: str) -> str:
    return f"{number:,} {word}{'s' * (number != 1)}"


def in_tolerances(error: float | None) -> str:
    """An error in units of its tolerance, to two decimals: 0.31, < 0.01, 1.2e+06."""
    if error is None or error == 0:
        return UNKNOWN if error is None else "0"
    if error < 0.01:
        return "< 0.01"
    return f"{error:.1e}" if LONGEST <= error < math.inf else f"{error:,.2f}"


# --- layouts ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Column:
    header: str
    cells: Sequence[str]
    words: bool = False  # flush left, and may wrap where there is no room
    styles: Sequence[str] = ()  # one a cell, or none
    indents: Sequence[int] = ()  # one a cell, or none

    def cell(self, index: int, encoding: str) -> RenderableType:
        text = Text(encodable(self.cells[index], encoding), self.styles[index] if self.styles else "")
        return Padding(text, (0, 0, 0, self.indents[index])) if self.indents else text

    def width(self) -> int:
        """Of the widest line, with its indent."""
        indents = self.indents or [0] * len(self.cells)
        cells = [" " * indent + cell for indent, cell in zip(indents, self.cells, strict=True)]
        return max(cell_len(line) for text in (self.header, *cells) for line in text.split("\n"))


def _table(columns: Sequence[_Column], encoding: str, wrap: bool = False) -> Table:
    """A row an entry; `wrap` lets words, not figures, wrap. The same box and spacing as the tables of a comparison."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 0, 0, 1), header_style="bold")
    for column in columns:
        width, wraps = column.width(), wrap and column.words
        table.add_column(
            Text(column.header),
            justify="left" if column.words else "right",
            no_wrap=not wraps,
            overflow="fold",
            min_width=min(width, NAME_WIDTH) if wraps else width,
        )
    for index in range(len(columns[0].cells)):
        table.add_row(*(column.cell(index, encoding) for column in columns))
    return table


def _list(columns: Sequence[_Column], encoding: str) -> Table:
    """A line a figure, row after row: what is left where no table fits."""
    table = Table.grid(padding=(0, 1))
    for index in range(len(columns[0].cells)):
        for column in columns:
            if column.cells[index]:
                table.add_row(Text(" ".join(column.header.split())), column.cell(index, encoding))
        table.add_row("", "")
    return table


def _layouts(columns: Sequence[_Column]) -> list[Layout]:
    return [
        lambda encoding: _table(columns, encoding),
        lambda encoding: _table(columns, encoding, wrap=True),
        lambda encoding: _list(columns, encoding),
    ]
