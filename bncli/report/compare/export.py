"""A comparison for other programs: CSV with all digits, Markdown, LaTeX, and a self-contained HTML page."""

from __future__ import annotations

import html
from collections.abc import Iterable
from typing import Any

from bncli.errors import FileError
from bncli.report.compare.claims import HEADING, claim_columns, claim_notes, csv_row
from bncli.report.compare.notes import warnings
from bncli.report.compare.text import (
    comparison_columns,
    footnotes,
    headline,
    side_tables,
    subtitle,
    title,
    tuning_columns,
    tuning_notes,
)
from bncli.report.export import csv_text, latex_text, markdown, markdown_table
from bncli.report.figure import INK
from bncli.report.text import Column, setting
from bncli.results.compare import ArmSummary, AtTarget, Comparison, Cost, Ratio

# --- CSV ----------------------------------------------------------------------------------------------------------


def to_csv(comparison: Comparison) -> str:
    """One row per arm with all digits; an empty cell is an unknown value.

    Claims follow after an empty line, in a table with a header of its own: one row per claim.
    """
    plan, metric = comparison.plan, comparison.plan.target.metric
    rows = [_csv_row(arm, list(plan.grid), metric) for arm in comparison.arms]
    claims = [csv_row(claim) for claim in comparison.claims]
    return csv_text(rows, "arm") + ("\n" + csv_text(claims, "say") if claims else "")


def _csv_row(arm: ArmSummary, fields: list[str], metric: str) -> dict[str, Any]:
    ratio = arm.ratio
    return {
        "arm": arm.arm,
        **{field: setting(arm.point[field]) if field in arm.point else None for field in fields},
        "fixed": " ".join(arm.fixed),
        "at_edge": " ".join(arm.at_edge),
        "hits": arm.hits,
        "runs": arm.runs,
        "diverged_runs": arm.diverged,
        "failed_runs": len(arm.failures),
        "steps_to_target": arm.steps.value,
        "steps_low_95": arm.steps.interval.low,
        "steps_high_95": arm.steps.interval.high,
        "steps_method": arm.steps.method,
        "first_hit_steps": arm.first_hit,
        **_csv_ratio("times_fewer{}", ratio),
        "times_fewer_method": ratio.method if ratio else "reference",
        "p_value": ratio.p_value if ratio else None,
        "holm_p_value": ratio.holm_p_value if ratio else None,
        "times_fewer_every_second_evaluation": arm.thinned,
        "grid_points": arm.choice.points if arm.choice else None,
        "grid_points_kept": arm.choice.kept if arm.choice else None,
        "choice_doubt": arm.choice.doubt if arm.choice else None,
        **_csv_cost("seconds", arm.seconds),
        **_csv_cost("examples", arm.examples),
        **{key: value for each in arm.also for key, value in _csv_target(each).items()},
        f"best_{metric}": arm.best,
        "samples_per_s": arm.samples_per_s,
        "ms_per_step": arm.ms_per_step,
        "peak_memory_mib": arm.peak_memory_mib,
        "parameters": arm.parameters,
    }


def _csv_cost(unit: str, cost: Cost | None) -> dict[str, Any]:
    return {
        f"{unit}_to_target": cost.typical.value if cost else None,
        f"{unit}_low_95": cost.typical.interval.low if cost else None,
        f"{unit}_high_95": cost.typical.interval.high if cost else None,
        **_csv_ratio(f"times_fewer_{unit}{{}}", cost.ratio if cost else None, 1 if cost else None),
    }


def _csv_target(found: AtTarget) -> dict[str, Any]:
    at = f"at_{setting(found.target.value)}"
    return {
        f"hits_{at}": found.hits,
        f"steps_to_target_{at}": found.steps.value,
        **_csv_ratio(f"times_fewer{{}}_{at}", found.ratio),
    }


def _csv_ratio(name: str, ratio: Ratio | None, of_reference: int | None = 1) -> dict[str, Any]:
    """The ratio and its interval; `name` has a place for the suffixes `_low_95` and `_high_95`."""
    value, low, high = (ratio.value, ratio.interval.low, ratio.interval.high) if ratio else (of_reference, None, None)
    return {name.format(""): value, name.format("_low_95"): low, name.format("_high_95"): high}


# --- Markdown -----------------------------------------------------------------------------------------------------


def to_markdown(comparison: Comparison) -> str:
    """The comparison's table and its notes for a GitHub page."""
    lines = [f"### {markdown(title(comparison))}", "", *map(markdown, headline(comparison)), ""]
    lines += [markdown(subtitle(comparison.plan)), "", *markdown_table(comparison_columns(comparison)), ""]
    if found := warnings(comparison):
        lines += ["#### Warnings", "", *(f"- {markdown(each)}" for each in found), ""]
    for heading, columns in side_tables(comparison):
        lines += [f"#### {heading.capitalize()}", "", *markdown_table(columns), ""]
    lines += [f"- {markdown(note)}" for note in footnotes(comparison)]
    if comparison.claims:
        lines += ["", f"#### {HEADING.capitalize()}", "", *markdown_table(claim_columns(comparison)), ""]
        lines += [f"- {markdown(note)}" for note in claim_notes(comparison)]
    return "\n".join(lines) + "\n"


def to_latex(comparison: Comparison) -> str:
    """The same tables for a paper, without the claims."""
    tables = [(title(comparison), comparison_columns(comparison)), *side_tables(comparison)]
    return latex_text(tables, [subtitle(comparison.plan) + ".", *footnotes(comparison)])


# --- HTML ---------------------------------------------------------------------------------------------------------


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
{figure}
{side}
<ul>{notes}</ul>
{claims}
{tuning}
</body>
</html>
"""
SECTION = """<h2>{heading}</h2>
<div class="wide">{table}</div>
<ul>{notes}</ul>"""


def to_html(comparison: Comparison) -> str:
    """A self-contained page: tables, notes, and the figure as inline SVG where matplotlib is installed."""
    tuned = tuning_columns(comparison) if comparison.plan.tune_seeds else []
    side = [
        f'<h2>{heading.capitalize()}</h2>\n<div class="wide">{_html_table(columns)}</div>'
        for heading, columns in side_tables(comparison)
    ]
    return PAGE.format(
        title=html.escape(title(comparison)),
        subtitle=html.escape(subtitle(comparison.plan)),
        table=_html_table(comparison_columns(comparison)),
        figure=_html_figures(comparison),
        side="\n".join(side),
        notes=_html_items([*headline(comparison), *warnings(comparison), *footnotes(comparison)]),
        claims=_html_section(HEADING.capitalize(), claim_columns(comparison), claim_notes(comparison))
        if comparison.claims
        else "",
        tuning=_html_section("Tuning runs", tuned, tuning_notes(comparison)) if tuned else "",
    )


def _html_section(heading: str, columns: list[Column], notes: Iterable[str]) -> str:
    return SECTION.format(heading=heading, table=_html_table(columns), notes=_html_items(notes))


def _html_figures(comparison: Comparison) -> str:
    from bncli.report.compare import figure, layers

    try:
        found = [_inline(figure.render(comparison, "svg", transparent=True), f"Figure: {title(comparison)}")]
        if layers.has_layers(comparison):
            label = f"Figure: inside the layers of {comparison.plan.name}"
            found.append(_inline(layers.render(comparison, "svg", transparent=True), label))
    except FileError as error:
        return f'<p class="quiet">No figure: {html.escape(str(error))}</p>'
    return "\n".join(found)


def _inline(svg: bytes, label: str) -> str:
    """A figure as an element of the page, in the page's own text colour."""
    text = svg.decode()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    return text.replace("<svg", f'<svg role="img" aria-label="{html.escape(label)}"', 1)


def _html_items(notes: Iterable[str]) -> str:
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
