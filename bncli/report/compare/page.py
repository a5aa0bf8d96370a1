"""A comparison as one HTML page that needs nothing else: tables, notes, and the figure as inline SVG."""

from __future__ import annotations

import html

from bncli.errors import FileError
from bncli.report.compare.export import side_tables
from bncli.report.compare.text import comparison_columns, footnotes, subtitle, title, tuning_columns, tuning_notes
from bncli.report.figure import INK
from bncli.report.text import Column
from bncli.results.compare import Comparison

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --line: #8886; --quiet: #6b6b6b; }}
@media (prefers-color-scheme: dark) {{ :root {{ --quiet: #a5a5a5; }} }}
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }}
h1 {{ font-size: 1.4rem; margin: 0; }}
h2 {{ font-size: 1.1rem; margin: 2rem 0 .5rem; }}
p.quiet, ul {{ color: var(--quiet); }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .35rem .7rem; text-align: right; vertical-align: top; border-bottom: 1px solid var(--line); }}
th.words, td.words {{ text-align: left; }}
td, th {{ white-space: nowrap; }}
td small {{ display: block; color: var(--quiet); white-space: nowrap; }}
svg {{ width: 100%; height: auto; margin: 1.5rem 0; }}
</style>
</head>
<body>
<h1>{title}</h1>
<p class="quiet">{subtitle}</p>
<div class="wide">{table}</div>
{picture}
{side}
<ul>{notes}</ul>
{tuning}
</body>
</html>
"""
TUNING = """<h2>Tuning runs</h2>
<div class="wide">{table}</div>
<ul>{notes}</ul>"""


def to_html(comparison: Comparison) -> str:
    """One page that needs nothing else: tables, notes, and the figure as inline SVG where matplotlib is installed."""
    tuned = tuning_columns(comparison) if comparison.plan.tune_seeds else []
    return PAGE.format(
        title=html.escape(title(comparison)),
        subtitle=html.escape(subtitle(comparison.plan)),
        table=_html_table(comparison_columns(comparison)),
        picture=_picture(comparison),
        side="\n".join(
            f'<h2>{html.escape(heading)}</h2>\n<div class="wide">{_html_table(columns)}</div>'
            for heading, columns in side_tables(comparison)
        ),
        notes=_html_items(footnotes(comparison)),
        tuning=TUNING.format(table=_html_table(tuned), notes=_html_items(tuning_notes(comparison))) if tuned else "",
    )


def _picture(comparison: Comparison) -> str:
    from bncli.report.compare import figure

    try:
        svg = figure.render(comparison, "svg", transparent=True).decode()
    except FileError as error:
        return f'<p class="quiet">No figure: {html.escape(str(error))}</p>'
    label = html.escape(f"Figure: {title(comparison)}; its figures are in the table above")
    return (
        svg[svg.index("<svg") :]
        .replace(INK, "currentColor")
        .replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
    )


def _html_items(notes: list[str]) -> str:
    return "".join(f"<li>{html.escape(note)}</li>\n" for note in notes)


def _html_table(columns: list[Column]) -> str:
    sides = [' class="words"' * column.words for column in columns]
    head = "".join(f"<th{side}>{html.escape(c.name)}</th>" for c, side in zip(columns, sides, strict=True))
    rows = []
    for row in zip(*(column.cells for column in columns), strict=True):
        cells = [
            f"<td{side}>{html.escape(main)}{f'<small>{html.escape(aside)}</small>' if aside else ''}</td>"
            for (main, aside, _), side in zip(row, sides, strict=True)
        ]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n" + "\n".join(rows) + "\n</tbody>\n</table>"
