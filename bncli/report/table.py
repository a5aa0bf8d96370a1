"""Tables and lists for the terminal that fit the width and the encoding of the output."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.segment import Segment
from rich.text import Text

from bncli.errors import printable
from bncli.report.text import Cell, Column, encodable

UNBOUNDED = 10_000  # columns: wider than any table
GAP = "  "
LEAST_WORDS = 14  # columns that words get at the least, where they need them; the rest wraps
LEAST_BESIDE = 20  # columns for a text beside its name; with fewer it stands below it
LEAST_BAR, LONGEST_BAR = 12, 40  # columns
# A number whose decimal point stands below the others': its whole part, and the rest.
NUMBER = re.compile(r"((?:[<>] )?-?[\d,]+)((?:\.\d+)?(?:e[+-]\d+)?[x%*]?(?: (?:fewer|less|more))?)")
Bar = Callable[[int, int], Text]  # of a row, in so many columns


@dataclass(frozen=True)
class Visible:
    """What is printed, with visible characters in the place of all control characters but rich's own."""

    renderable: RenderableType

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for segment in console.render(self.renderable, options):
            text, style, control = segment
            yield segment if control or text.isprintable() else Segment(printable(text), style)


@dataclass(frozen=True)
class Paragraph:
    """Text in characters that the output has, behind a bold label, with every line indented by so many columns."""

    text: str
    style: str = ""
    label: str = ""
    indent: int = 0

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        label, words = encodable(self.label, options.encoding), encodable(self.text, options.encoding)
        text = Text.assemble((label, "bold"), words, style=self.style)
        yield from _beside((), text, self.indent, options.max_width, console)


@dataclass(frozen=True)
class Row:
    """What a table's row has besides its cells; a message stands in place of its figures."""

    heading: str = ""
    style: str = ""
    message: str = ""


@dataclass(frozen=True)
class AlignedTable:
    """A table with decimal points below each other, group headings, messages across columns, and bars after its rows.

    `rows` has one for each row of cells, or none at all. `notes` are shown below it by `ResponsiveTable`.
    """

    columns: Sequence[Column]
    rows: Sequence[Row] = ()
    asides_below: bool = False
    wrap: bool = False  # words, never figures
    short_headers: bool = False
    notes: Sequence[str] = ()
    bar: Bar | None = None
    key: Text | None = None  # of the bars

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        drawn = self._drawn(options.encoding)
        gaps = len(GAP) * (len(drawn) - 1)
        return Measurement(gaps + sum(each.least for each in drawn), gaps + sum(each.width for each in drawn))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        drawn = self._drawn(options.encoding)
        widths = _widths(drawn, options.max_width)
        width = sum(widths) + len(GAP) * (len(widths) - 1)
        bar_width = min(LONGEST_BAR, options.max_width - width - len(GAP))
        bar = self.bar if bar_width >= LEAST_BAR else None
        height = max(len(each.header) for each in drawn)
        headers = [[Text()] * (height - len(each.header)) + each.header for each in drawn]
        yield from _joined(drawn, widths, headers, "bold")
        yield Text(encodable("─", options.encoding) * width, no_wrap=True, overflow="ignore")
        for index, row in enumerate(_rows(self.columns, self.rows)):
            if index and (row.heading or self.asides_below):
                yield ""
            if row.heading:
                yield Paragraph(row.heading, "bold")
            cells = [each.lines(index, width, console) for each, width in zip(drawn, widths, strict=True)]
            lines = _joined(drawn, widths, cells, row.style)
            if row.message:
                # The words in front of the first figure, and the message beside them.
                words = next((place for place, column in enumerate(self.columns) if not column.words), len(cells))
                leads = list(_joined(drawn[:words], widths[:words], cells[:words], row.style))
                indent = sum(widths[:words]) + len(GAP) * words
                message = Text(encodable(row.message, options.encoding), "red")
                lines = _beside(leads, message, indent, options.max_width, console)
            elif bar:
                first = next(lines)
                first.pad_right(width - first.cell_len + len(GAP))
                first.append_text(bar(index, bar_width))
                first.rstrip()
                yield first
            yield from lines
        if bar and self.key:
            yield from ("", self.key)

    def _drawn(self, encoding: str) -> list[_Drawn]:
        rows = _rows(self.columns, self.rows)
        return [_draw(self, column, rows, encoding) for column in self.columns]


@dataclass(frozen=True)
class KeyValueList:
    """The rows of a table with a line for each cell."""

    columns: Sequence[Column]
    rows: Sequence[Row] = ()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        encoding = options.encoding
        names = [encodable(column.name, encoding) for column in self.columns]
        indent = max(map(cell_len, names)) + len(GAP)
        for index, row in enumerate(_rows(self.columns, self.rows)):
            if index:
                yield ""
            if row.heading:
                yield Paragraph(row.heading, "bold")
            for name, column in zip(names, self.columns, strict=True):
                cell = column.cells[index]
                if cell.line and (column.words or not row.message):
                    value = Text(encodable(cell.line, encoding), cell.style or column.style or row.style)
                    yield from _beside([Text(name, row.style)], value, indent, options.max_width, console)
            if row.message:
                yield Paragraph(row.message, "red")


@dataclass(frozen=True)
class BulletList:
    """A heading and entries with a dash before each; nothing where there are none."""

    heading: str
    entries: Sequence[str]
    style: str = ""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self.heading and self.entries:
            yield Paragraph(self.heading, "dim")
        for entry in self.entries:
            text = Text(encodable(entry, options.encoding), self.style)
            yield from _beside([Text("-", self.style)], text, len("- "), options.max_width, console)


@dataclass(frozen=True)
class ResponsiveTable:
    """A title, the first of several tables that fits the width, what that one hides, and notes.

    Where none fits it is a list of the first one's rows.
    """

    title: str
    table: AlignedTable
    narrower: Sequence[AlignedTable | Group] = ()
    subtitle: str = ""
    notes: Sequence[str] = ()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Paragraph(self.title, "bold")
        if self.subtitle:
            yield Paragraph(self.subtitle, "dim")
        yield ""
        unbounded = options.update(max_width=UNBOUNDED)
        fitting = (
            table
            for table in (self.table, *self.narrower)
            if Measurement.get(console, unbounded, table).minimum <= options.max_width
        )
        shown = next(fitting, KeyValueList(self.table.columns, self.table.rows))
        yield shown
        yield ""
        if isinstance(shown, AlignedTable):
            names = [column.name for column in shown.columns]
            hidden = [each.name for each in self.table.columns if each.optional and each.name not in names]
            lines = [*shown.notes, *[f"Hidden columns (terminal too narrow): {', '.join(hidden)}"] * bool(hidden)]
            yield from (Paragraph(line, "dim") for line in lines)
            yield from [""] * bool(lines)
        yield from (Paragraph(note, "dim") for note in self.notes)


# --- layout -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Drawn:
    """A column in the characters of an encoding, its figures padded so that their points stand in line."""

    header: list[Text]
    cells: list[Text]  # with a line break where the aside stands below
    right: bool
    wrap: bool

    @cached_property
    def width(self) -> int:
        return max(cell_len(line) for text in (*self.header, *self.cells) for line in text.plain.split("\n"))

    @property
    def least(self) -> int:
        return min(self.width, LEAST_WORDS) if self.wrap else self.width

    def lines(self, index: int, width: int, console: Console) -> list[Text]:
        cell = self.cells[index]
        return list(cell.wrap(console, width) if self.wrap else cell.split("\n", allow_blank=True))


def _draw(table: AlignedTable, column: Column, rows: Sequence[Row], encoding: str) -> _Drawn:
    header = column.short if table.short_headers and column.short else column.header
    shown = []
    for index, (cell, row) in enumerate(zip(column.cells, rows, strict=True)):
        repeated = column.once and index > 0 and not row.heading and cell == column.cells[index - 1]
        shown.append(Cell("") if repeated or (row.message and not column.words) else cell)
    mains = [encodable(cell.main, encoding) for cell in shown]
    cells = []
    for main, cell in zip(mains if column.words else _aligned(mains), shown, strict=True):
        text = Text(main, cell.style or column.style)
        if cell.aside:
            aside = f"\n{cell.aside}" if table.asides_below else f" {cell.aside_in_line}"
            text.append(encodable(aside, encoding), "not bold dim")
        cells.append(text)
    asides_beside = not table.asides_below and any(cell.aside for cell in shown)
    lines = [Text(line) for line in encodable(header, encoding).split("\n")]
    return _Drawn(lines, cells, not column.words and not asides_beside, column.words and table.wrap)


def _aligned(figures: Sequence[str]) -> list[str]:
    """As wide as each other, decimal points below each other.

    What is no number ends where whole numbers do; where it is longer than all of them it is flush right.
    """
    found = [NUMBER.fullmatch(text) for text in figures]
    whole, rest = (max((len(each[side]) for each in found if each), default=0) for side in (1, 2))
    padded = []
    for text, number in zip(figures, found, strict=True):
        left, right = (number[1], number[2]) if number else (text, "")
        padded.append(f"{left:>{whole}}{right:<{rest}}" if len(left) <= whole else text)
    width = max(map(len, padded), default=0)
    return [text.rjust(width) for text in padded]


def _rows(columns: Sequence[Column], rows: Sequence[Row]) -> Sequence[Row]:
    return rows or [Row()] * len(columns[0].cells)


def _widths(drawn: Sequence[_Drawn], most: int) -> list[int]:
    """The columns' widths; where they are wider than `most` columns together, the widest words get narrower."""
    widths = [each.width for each in drawn]
    excess = sum(widths) + len(GAP) * (len(widths) - 1) - most
    for _ in range(excess):
        wide = [place for place, each in enumerate(drawn) if widths[place] > each.least]
        if wide:
            widths[max(wide, key=widths.__getitem__)] -= 1
    return widths


def _joined(
    drawn: Sequence[_Drawn], widths: Sequence[int], cells: Sequence[Sequence[Text]], style: str
) -> Iterator[Text]:
    """The lines of a row of cells."""
    for parts in itertools.zip_longest(*cells, fillvalue=Text()):
        padded = []
        for each, width, part in zip(drawn, widths, parts, strict=True):
            spaces = " " * (width - part.cell_len)
            padded.append(Text.assemble(spaces, part) if each.right else Text.assemble(part, spaces))
        line = Text(GAP, style, no_wrap=True, overflow="ignore").join(padded)
        line.rstrip()
        yield line


def _beside(leads: Sequence[Text], text: Text, indent: int, width: int, console: Console) -> Iterator[Text]:
    """A text in lines of its own beside its name, or below it where there is little room."""
    below = 2 * len(GAP)
    if indent > below and width - indent < min(LEAST_BESIDE, text.cell_len):
        yield from (part for lead in leads for part in _wrapped(lead, width, console))
        leads, indent = (), below
    for lead, part in itertools.zip_longest(leads, _wrapped(text, width - indent, console), fillvalue=Text()):
        line = Text.assemble(lead, " " * (indent - lead.cell_len), part)
        line.rstrip()
        yield line


def _wrapped(text: Text, width: int, console: Console) -> Iterator[Text]:
    for line in text.wrap(console, max(1, width)):
        line.rstrip()
        yield line
