"""Tables for the terminal, each laid out to fit the width that it is given.

`table` and `listing` are rich's own; `Ruled` is a table whose figures stand with their decimal points below each other,
with headings and messages across columns, which rich's own cannot do. Its look (a rule below a bold header, two blanks
between columns) is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from bncli.report.text import Cell, Column, encodable, header_words, in_encoding

UNBOUNDED = 10_000  # columns: wider than any table
NAME_WIDTH = 14  # columns that an arm's name is given at the least, where it needs them; the rest wraps
GAP = "  "
LEAST_ROOM = 12  # columns for a bar; fewer show nothing
LONGEST_BAR = 40
LEAST_MESSAGE = 24  # columns for a message beside its row; with fewer it stands below it
Layout = Callable[[str], RenderableType]  # given the output's encoding
Bar = Callable[[int, int], Text]  # of a row, in so many columns


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


# --- rich's own tables --------------------------------------------------------------------------------------------


def table(columns: list[Column], apart: bool, encoding: str, *, wrap: bool = True) -> Table:
    """A row an arm; `apart` puts a cell's second part on a line of its own; `wrap` lets words, not figures, wrap."""
    drawn = Table(
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
        cells = [_cell_text(cell, column, apart, encoding) for cell in column.cells]
        width = max(cell_len(line) for text in (header, *map(str, cells)) for line in text.split("\n"))
        drawn.add_column(
            header,
            justify="left" if column.words else "right",
            no_wrap=not (wrap and column.words),
            overflow="fold",
            min_width=min(width, NAME_WIDTH) if wrap and column.words else width,
        )
        made.append(cells)
    for row in zip(*made, strict=True):
        drawn.add_row(*row)
    return drawn


def _cell_text(cell: Cell, column: Column, apart: bool, encoding: str) -> Text:
    text = Text(encodable(cell[0], encoding), "bold" if column.words or column.header[0] == "times" else "")
    if cell[1]:
        aside = encodable(cell[1], encoding)
        text.append(f"\n{aside}" if apart else f" ({aside})", "not bold dim")
    return text


def listing(columns: list[Column], encoding: str) -> Table:
    """A line a figure, arm after arm: what is left where no table fits."""
    table = Table.grid(padding=(0, 1))
    for row in zip(*(column.cells for column in columns), strict=True):
        for cell, column in zip(row, columns, strict=True):
            table.add_row(header_words(column), _cell_text(cell, column, False, encoding))
        table.add_row("", "")
    return table


def stacked(tables: list[Table]) -> Table:
    """Tables one below the other, as one that measures as wide as the widest."""
    stack = Table.grid()
    for index, table in enumerate(tables):
        stack.add_row("") if index else None
        stack.add_row(table)
    return stack


# --- figures in line ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """How a row stands: below a heading, in a style, or with a message in place of its figures."""

    heading: str = ""
    style: str = ""
    message: str = ""


@dataclass(frozen=True)
class Ruled:
    """Columns of cells, a Line for each row, styles of cells by (row, column), a bar after each row and its key."""

    columns: Sequence[Column]
    lines: Sequence[Line]
    encoding: str
    styles: Mapping[tuple[int, int], str] = field(default_factory=dict)
    bar: Bar | None = None
    key: Text | None = None

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        width = sum(self._widths()) + len(GAP) * (len(self.columns) - 1)
        return Measurement(width, width)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        shown, widths = [self._shown(column) for column in self.columns], self._widths()
        width = self.__rich_measure__(console, options).maximum
        room = min(LONGEST_BAR, options.max_width - width - len(GAP))
        for part in range(2):
            if any(column.header[part] for column in self.columns):
                yield self._flush(self._header(part, widths), "bold")
        yield Text(encodable("─", self.encoding).replace("?", "-") * width, no_wrap=True, overflow="ignore")
        for index, line in enumerate(self.lines):
            if line.heading:
                yield "" if index else Text("", end="")
                yield Text(encodable(line.heading, self.encoding), "bold")
            if line.message:
                yield from self._message(index, [cells[index] for cells in shown], widths, console, options)
            else:
                text = self._row(index, [cells[index] for cells in shown], widths)
                if self.bar and room >= LEAST_ROOM:
                    text = Text.assemble(text, GAP, self.bar(index, room))
                text.rstrip()
                yield text
        if self.bar and self.key and room >= LEAST_ROOM:
            yield ""
            yield self.key

    def _header(self, part: int, widths: Sequence[int]) -> Iterator[str]:
        """One of the header's two lines: flush left over words and over figures with an aside, else flush right."""
        for column, width in zip(self.columns, widths, strict=True):
            left = column.words or any(aside for _, aside in column.cells)
            words = encodable(column.header[part], self.encoding)
            yield words.ljust(width) if left else words.rjust(width)

    def _flush(self, parts: Iterator[str], style: str) -> Text:
        return Text(GAP.join(parts).rstrip(), style, no_wrap=True, overflow="ignore")

    def _row(self, index: int, cells: Sequence[Cell], widths: Sequence[int]) -> Text:
        text = Text(style=self.lines[index].style, no_wrap=True, overflow="ignore")
        for place, ((main, aside), width) in enumerate(zip(cells, widths, strict=True)):
            text.append(GAP if place else "")
            text.append(main, self.styles.get((index, place), ""))
            text.append(aside, "not bold dim")
            text.append(" " * (width - cell_len(main + aside)))
        return text

    def _message(
        self, index: int, cells: Sequence[Cell], widths: Sequence[int], console: Console, options: ConsoleOptions
    ) -> Iterator[Text]:
        """The row's words, then its message to the end of the output, with further lines below its first."""
        words = next((place for place, column in enumerate(self.columns) if not column.words), len(self.columns))
        lead = self._row(index, cells[:words], widths[:words])
        lead.append(GAP)
        message = Text(encodable(self.lines[index].message, self.encoding), "red")
        indent = len(lead)
        if options.max_width - indent < LEAST_MESSAGE:
            yield lead
            lead, indent = Text(GAP * 2), len(GAP) * 2
        for place, part in enumerate(message.wrap(console, max(1, options.max_width - indent))):
            part.rstrip()
            yield Text.assemble(Text(" " * indent) if place else lead, part)

    def _shown(self, column: Column) -> list[Cell]:
        """Its cells in characters that the output has; figures padded so that points and asides stand in line."""
        cells = [(in_encoding(main, self.encoding), in_encoding(aside, self.encoding)) for main, aside in column.cells]
        cells = [
            ("", "") if line.message and not column.words else cell
            for cell, line in zip(cells, self.lines, strict=True)
        ]
        if column.words:
            return cells
        parts = [(whole, point + rest) for whole, point, rest in (main.partition(".") for main, _ in cells)]
        whole, rest = (max((len(part[side]) for part in parts), default=0) for side in (0, 1))
        asides = max((len(aside) for _, aside in cells), default=0)
        mains = [left.rjust(whole) + right.ljust(rest) for left, right in parts]
        least = 0 if asides else max(len(in_encoding(words, self.encoding)) for words in column.header)
        return [
            (main.rjust(least), f" {aside}".ljust(asides + 1) if asides else "")
            for main, (_, aside) in zip(mains, cells, strict=True)
        ]

    def _widths(self) -> list[int]:
        return [
            max(cell_len(text) for text in (*(encodable(part, self.encoding) for part in column.header), *cells))
            for column, cells in ((c, [main + aside for main, aside in self._shown(c)]) for c in self.columns)
        ]


@dataclass(frozen=True)
class Listing:
    """The same rows with a line for each figure: what is left where no table fits."""

    columns: Sequence[Column]
    lines: Sequence[Line]
    encoding: str

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        headers = [header_words(column) for column in self.columns]
        width = max(map(len, headers))
        for index, line in enumerate(self.lines):
            if line.heading:
                yield Text(encodable(line.heading, self.encoding), "bold")
            for header, column in zip(headers, self.columns, strict=True):
                if column.words or not line.message:
                    words = " ".join(filter(None, column.cells[index]))
                    yield Text(f"{header.ljust(width)}{GAP}{in_encoding(words, self.encoding)}", line.style)
            if line.message:
                yield Text(encodable(line.message, self.encoding), "red")
            yield ""


@dataclass(frozen=True)
class Dashed:
    """A heading with sentences below it, a dash before each; nothing where there are none."""

    heading: str
    entries: Sequence[str]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self.heading and self.entries:
            yield Text(encodable(self.heading, options.encoding), "dim")
        for entry in self.entries:
            words = Text(encodable(entry, options.encoding)).wrap(console, max(1, options.max_width - len(GAP)))
            for place, part in enumerate(words):
                part.rstrip()
                yield Text.assemble(" " * len(GAP) if place else "- ", part)
