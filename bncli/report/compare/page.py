"""Page of a comparison: see report.page."""

from __future__ import annotations

from bncli.report import layers
from bncli.report.compare import figure
from bncli.report.compare.notes import warnings
from bncli.report.compare.table import claims_table, tuning_table
from bncli.report.compare.text import comparison_columns, footnotes, headline, side_tables, subtitle, title
from bncli.report.page import Page, Section, figure_section, render, table_section
from bncli.report.table import AlignedTable
from bncli.results.compare import Comparison


def to_html(comparison: Comparison, command: str, recipe: str) -> str:
    """A self-contained page; with figures where matplotlib is installed."""
    plan = comparison.plan
    sections = [
        Section("Comparison", tables=[AlignedTable(comparison_columns(comparison))]),
        figure_section("Curves and runs", figure.draw, comparison, figure.key(comparison)),
        *(Section(heading.capitalize(), tables=[AlignedTable(found)]) for heading, found in side_tables(comparison)),
    ]
    if comparison.claims:
        sections.append(table_section(claims_table(comparison), "Claims"))
    if layers.has_layers(comparison):
        sections.append(figure_section("Inside the layers", layers.draw, comparison))
    sections.append(Section("Notes", notes=footnotes(comparison)))
    if plan.grid and plan.tune_seeds:
        sections.append(table_section(tuning_table(comparison), "Tuning runs", folded=True))
    made = [run.result.environment for run in comparison.runs if run.result is not None]
    answer, warned = headline(comparison), warnings(comparison)
    return render(Page(title(comparison), subtitle(plan), answer, sections, made, warned), command, recipe)
