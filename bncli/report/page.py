"""Self-contained page of a result: headline, warnings, tables, figures, recipe, command and machine, for any command.

The template `page.html` has the style and the words that all pages share. A page loads nothing and runs no script.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bncli.errors import FileError, printable
from bncli.report.figure import COLOURS, INK, PALE, FigureStyle, rendered
from bncli.report.table import AlignedTable, ResponsiveTable, Row
from bncli.report.text import Cell, Column, environment_words
from bncli.results.environment import Environment

if TYPE_CHECKING:
    from markupsafe import Markup

WIDEST = 104  # characters of a table: as many as A4 has room for
STYLES = FigureStyle(caption=False), FigureStyle(width_inches=4.8, caption=False)  # for wide screens, for phones
# Colours of a figure that differ between a light and a dark page -> the template's variable.
VARIABLES = {INK: "currentColor", PALE: "var(--quiet)", "#ffffff": "var(--paper)"}
VARIABLES |= {"#b5b5b5": "var(--grey)", "#e3e3e3": "var(--pale)"}
VARIABLES |= {colour.lower(): f"var(--c{place})" for place, colour in enumerate(COLOURS)}


@dataclass(frozen=True)
class Section:
    """A part of a page below its heading; left out where there is nothing below it."""

    heading: str
    words: str = ""
    tables: Sequence[AlignedTable] = ()
    figure: tuple[bytes, bytes] | None = None  # SVG files: for wide screens, for phones
    notes: Sequence[str] = ()
    folded: bool = False


@dataclass(frozen=True)
class Page:
    """What a page shows. verdict: good, bad or empty, the colour beside the headline."""

    title: str
    subtitle: str
    headline: Sequence[str]
    sections: Sequence[Section]
    environments: Sequence[Environment]
    warnings: Sequence[str] = ()
    verdict: str = ""


def table_section(table: ResponsiveTable, heading: str = "", folded: bool = False) -> Section:
    """A table of the terminal's report."""
    return Section(heading or table.title, table.subtitle, [table.table], notes=table.notes, folded=folded)


def figure_section(heading: str, draw: Callable[..., None], found: Any, key: str = "") -> Section:
    """What `draw(figure, found, style)` draws, and how to read it; without matplotlib why there is none."""
    try:
        wide, narrow = (rendered(lambda it, s=style: draw(it, found, s), "svg", for_page=True) for style in STYLES)
    except FileError as error:
        return Section(heading, f"No figure: {error}")
    return Section(heading, figure=(wide, narrow), notes=[key] * bool(key))


def render(page: Page, command: str, recipe: str) -> str:
    """The page as HTML, with the command that made it and the recipe as YAML, or empty where there is none."""
    import jinja2

    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    made = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    made.globals |= {"blocks": blocks, "lines": lines, "inline": inline, "naming": naming}
    machines = dict.fromkeys(f"{environment_words(each)}; {each.date[:10]}" for each in page.environments)
    template = made.get_template("page.html")
    return printable(template.render(page=page, command=command, recipe=recipe, machines=machines))


# --- tables -------------------------------------------------------------------------------------------------------


def blocks(table: AlignedTable) -> Iterator[list[Column]]:
    """The columns in tables that fit, each behind those that name a row; optional columns come last."""
    heads, rest = table.columns[: naming(table)], table.columns[naming(table) :]
    needed = [column for column in rest if not column.optional]
    for part in filter(None, (needed or rest, [column for column in rest if column.optional and needed])):
        block = [*heads]
        for column in part:
            if len(block) > len(heads) and sum(map(_width, [*block, column])) > WIDEST:
                yield block
                block = [*heads]
            block.append(column)
        yield block


def naming(table: AlignedTable) -> int:
    """How many columns name a row: the words at the left, one or two."""
    return 2 if all(column.words for column in table.columns[:2]) else 1


def _width(column: Column) -> int:
    """About how many characters a column takes, with its margins; longer words than 22 wrap."""
    longest = max(map(len, [*column.header.split("\n"), *(part for cell in column.cells for part in cell[:2])]))
    return 3 + (min(longest, 22) if column.words else longest)


def lines(table: AlignedTable, columns: Sequence[Column]) -> list[tuple[Row, tuple[Cell, ...]]]:
    """Each row with its cells; a message stands in place of figures."""
    rows, cells = table.rows or [Row()] * len(columns[0].cells), zip(*(column.cells for column in columns), strict=True)
    return [(row, each[: naming(table)] if row.message else each) for row, each in zip(rows, cells, strict=True)]


# --- figures ------------------------------------------------------------------------------------------------------


def inline(svg: bytes, label: str, name: str) -> Markup:
    """A figure as an element of the page, in its colours. name: the beginning of its identifiers."""
    from markupsafe import Markup, escape

    text = re.sub(r"^.*?(?=<svg)|<metadata>.*?</metadata>", "", svg.decode(), flags=re.S)
    text = re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2)
    # matplotlib's own identifiers are hashes of positions, whose last digits can differ from call to call.
    places = {each: place for place, each in enumerate(dict.fromkeys(re.findall(r'\bid="([^"]*)', text)))}
    text = re.sub(r'(\bid="|url\(#|href="#)([^")]*)', lambda it: f"{it[1]}{name}-{places[it[2]]}", text)
    text = re.sub("|".join(VARIABLES), lambda found: VARIABLES[found[0]], text)
    return Markup(text.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1))
