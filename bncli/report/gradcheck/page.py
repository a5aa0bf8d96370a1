"""Page of a gradient check: see report.page."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import replace

from bncli.report.gradcheck.figure import draw_parts
from bncli.report.gradcheck.table import groups_table, paths_table
from bncli.report.gradcheck.text import bug_lines, closing, derivations, failure_text, heading, reasons
from bncli.report.page import Page, Section, figure_section, render, table_section
from bncli.report.table import AlignedTable
from bncli.report.text import Column
from bncli.results.gradcheck import Gradcheck


def to_html(result: Gradcheck, commands: Sequence[Sequence[str]], command: str) -> str:
    """A self-contained page. commands: for each failure, the words of the command that runs it again."""
    title, subtitle = heading(result)
    failures = [
        Column("case", [failure.case for failure in result.failures], words=True),
        Column("found", [failure_text(failure) for failure in result.failures], words=True),
        Column("run it again", list(map(shlex.join, commands)), words=True),
    ]
    groups = table_section(groups_table(result.groups, "Groups of cases"))
    sections = [
        Section("Looks like", notes=bug_lines(result)),
        Section("The first failures", tables=[AlignedTable(failures)] * bool(commands)),
        replace(groups, notes=["Errors are in units of each case's tolerance: 1 or less passes."]),
        Section("Not checked", notes=reasons(result.groups)),
        *([table_section(paths_table(result.paths, result.norm))] if result.paths else []),
        Section("How tolerances are derived", notes=derivations(replace(result, effort="full")), folded=True),
    ]
    if result.paths and result.paths[0].values:
        sections.insert(-1, figure_section("dL/dx value by value", draw_parts, result))
    verdict = "good" if result.passed else "bad"
    headline = [closing(result), *(f"It looks like: {each.bug}." for each in result.diagnoses)]
    return render(Page(title, subtitle, headline, sections, [result.environment], verdict=verdict), command, "")
