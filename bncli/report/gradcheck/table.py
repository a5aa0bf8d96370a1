"""The outcome of `bncli gradcheck` on the screen, its progress, and the demonstration of section 2."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.padding import Padding
from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from bncli.report.gradcheck.text import (
    FAILED,
    NOT_CHECKED,
    OK,
    agreement,
    closing,
    count,
    derivations,
    evidence_text,
    failure_text,
    in_tolerances,
    reasons,
    shell_lines,
    verdict,
)
from bncli.report.progress import _Sink
from bncli.report.table import NAME_WIDTH, Fitted, Layout
from bncli.report.text import UNKNOWN, encodable, environment_words, figure
from bncli.results.gradcheck import BiasStep, CheckGroup, Gradcheck, GradientPaths

STYLES = {OK: "green", FAILED: "bold red", NOT_CHECKED: "yellow"}


# --- the report ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GradcheckReport:
    """All that `bncli gradcheck` shows: groups, the gradient's three parts, what failed and what it looks like."""

    result: Gradcheck
    commands: Sequence[Sequence[str]]  # for each failure, the words of the command that runs it again

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        result = self.result
        yield groups_table(result.groups, *_heading(result))
        yield Listed("Not checked:", reasons(result.groups))
        tolerances = derivations(result)
        more = ". How tolerances are derived:" if tolerances else " (the full effort tells how it is derived)."
        yield Text(f"Each error is in units of its case's own tolerance: 1 or less passes{more}", "dim")
        yield Listed("", tolerances)
        yield Text(encodable(f"Made on {environment_words(result.environment)}.", options.encoding), "dim")
        yield ""
        if result.paths:
            yield paths_table(result.paths)
            yield ""
        for label, words, indent in _failure_lines(result, self.commands, options.max_width):
            text = Text.assemble((label, "bold"), encodable(words, options.encoding))
            yield Padding(text, (0, 0, 0, indent), expand=False) if indent else text
        yield Text(encodable(closing(result), options.encoding), STYLES[OK] if result.passed else STYLES[FAILED])


def _heading(result: Gradcheck) -> tuple[str, str]:
    cases = count(sum(group.cases for group in result.groups), "case")
    groups = count(len(result.groups), "group")
    title = f"Gradients of {result.norm} norm, kernel {result.kernel}"
    return title, (
        f"Ran: {result.ran}; on {result.environment.device}\n"
        f"Checked: {cases} in {groups}, effort {result.effort}, in {figure(result.seconds)} s"
    )


def _failure_lines(result: Gradcheck, commands: Sequence[Sequence[str]], width: int) -> Iterator[tuple[str, str, int]]:
    """The first failing case with the command that runs it again, then the kinds of bug that the failures look like.

    Each line as its label, the words after it and its indent.
    """
    for first, command in list(zip(result.failures, commands, strict=True))[:1]:
        yield "First failing case: ", first.case, 0
        yield "", failure_text(first), 2
        yield "Run it again:", "", 0
        yield from (("", line, 2) for line in shell_lines(command, width - 2))
        yield "", "", 0
    for each in result.diagnoses:
        yield "Looks like: ", f"{each.bug}, because {evidence_text(each)}", 0
    if result.diagnoses:
        yield "", "", 0


# --- tables -------------------------------------------------------------------------------------------------------


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
            styles=["" if each.passed else STYLES[FAILED] for each in paths],
        ),
        _Column("its\nbound", [f"{each.bound:.1e}" for each in paths]),
        _Column("lost by\nignoring", [f"{each.lost:.0%}" for each in paths], styles=["bold"] * len(paths)),
    ]
    span = " to ".join(dict.fromkeys(f"{pick(each.lost for each in paths):.0%}" for pick in (min, max)))
    notes = [
        "Each value moves the others of its set too, through their mean and variance: a gradient that ignores those "
        f"two paths (the direct part alone) is off by {span} of the true one's length.",
        f"Error: the kernel's dL/dx against float64 central differences of the loss, relative. {agreement(paths)}",
    ]
    return Fitted("dL/dx in its three parts (l2 norms)", "", _layouts(columns), notes)


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


# --- progress -----------------------------------------------------------------------------------------------------


class GradcheckProgress(_Sink):
    """How many cases are done, the last group, and the time; off a terminal a line now and then."""

    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())

    def __enter__(self) -> GradcheckProgress:
        super().__enter__()
        self.groups, self.cases, self.failed = 0, 0, 0
        self.task = self.bar.add_task("checking", total=None)
        return self

    def __call__(self, group: CheckGroup) -> None:
        self.groups, self.cases, self.failed = self.groups + 1, self.cases + group.cases, self.failed + group.failed
        failed = f", {self.failed:,} failed" if self.failed else ""
        text = f"{count(self.cases, 'case')} in {count(self.groups, 'group')}{failed}; last: {group.name}"
        self.bar.update(self.task, description=text)
        self.line(f"gradcheck: {text}", at_once=bool(group.failed))
