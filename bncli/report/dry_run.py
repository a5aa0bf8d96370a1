"""A dry run on the terminal: every field with its source, then the arms and the number of runs."""

from __future__ import annotations

import json
from math import ceil
from typing import Any

from rich.console import Group

from bncli.report.export import json_text
from bncli.report.table import AlignedTable, Paragraph, ResponsiveTable, Row
from bncli.report.text import UNKNOWN, Cell, Column, bound_words, count, figure, measure_words, setting
from bncli.results.compare import MemoryNeeded, Planned, PlannedArm
from bncli.results.serialize import to_plain


def render(planned: Planned) -> Group:
    """The resolved recipe, the arms with their sizes, and how many runs there would be."""
    lines = []
    if any(arm.memory_mib is not None for arm in planned.arms):
        lines.append("memory: parameters, gradients, optimizer state and activations of one run")
    if planned.memory is not None:
        lines.append(f"On a CPU {memory_words(planned.memory)}.")
    lines += [f"grid: {path} in {', '.join(map(setting, values))}" for path, values in planned.grid.items()]
    lines += ["Checked: the data were read, and each model made its first step."] * planned.checked
    if any(path == "data.source" and value in ("hub", "mnist") for path, value, _ in planned.fields):
        lines.append("The data were not read; a comparison reads them, and tries each model, before its first run.")
    runs, to_do = count(planned.runs, "run"), planned.runs - planned.done
    if not to_do:
        lines.append(f"{runs}, all of them done already: nothing would be trained.")
    else:
        runs += f", {planned.done:,} of them done already; {to_do:,} to do" * bool(planned.done)
        more = ", more where an arm keeps several points of the grid" * planned.open_choices
        lines.append(f"{runs}, {planned.steps_at_most:,} optimizer steps at most{more}. Nothing was trained.")
        lines += [
            "Points of the grid that can no longer be the best are given up, which leaves fewer steps."
        ] * planned.raced
    if len(planned.arms) > 1:  # a comparison
        together = ", ".join(arm.name for arm in planned.arms if not arm.alone)
        alone = ", ".join(f"{arm.name} ({arm.alone})" for arm in planned.arms if arm.alone)
        what = "differ in seed, learning rate and initial weights train together"
        lines += [f"Runs of an arm that {what}: {together}."] * bool(together)
        lines += [f"Runs train one by one, for the field in brackets, in arm {alone}."] * bool(alone)
    if planned.search_runs:
        runs = f"about {count(planned.search_runs, 'run')} of {planned.search_steps:,} steps"
        lines.append(f"In addition, the searches for the largest learning rate take {runs}.")
    return Group(_fields_table(planned), _arms_table(planned), *_claims_table(planned), *map(Paragraph, lines))


def _fields_table(planned: Planned) -> ResponsiveTable:
    styles = ["dim" if source == "default" else "" for _, _, source in planned.fields]
    columns = [
        Column(name, [Cell(text, style=style) for text, style in zip(texts, styles, strict=True)], words=True)
        for name, texts in (
            ("field", [path for path, _, _ in planned.fields]),
            ("value", [_value(value) for _, value, _ in planned.fields]),
            ("from", [source for _, _, source in planned.fields]),
        )
    ]
    title = f"{planned.name}: the resolved recipe"
    return ResponsiveTable(title, AlignedTable(columns), [AlignedTable(columns, wrap=True)])


def _arms_table(planned: Planned) -> ResponsiveTable:
    arms = planned.arms
    columns = [
        Column("arm", [arm.name for arm in arms], words=True),
        Column("differs from the base", [_changes(arm) for arm in arms], words=True),
        Column("parameters", [figure(arm.parameters) for arm in arms]),
        Column("memory,\nestimated", [_memory(arm.memory_mib) for arm in arms]),
        Column("runs", [f"{arm.tuning_runs} + " * bool(arm.tuning_runs) + f"{arm.report_runs}" for arm in arms]),
    ]
    return ResponsiveTable("What would be trained", AlignedTable(columns), [AlignedTable(columns, wrap=True)])


def _claims_table(planned: Planned) -> list[ResponsiveTable]:
    if not planned.claims:
        return []
    claims = planned.claims
    rows = [Row(heading=f"{number}. {claim.say}") for number, claim in enumerate(claims, 1)]
    columns = [
        Column("measure", [measure_words(claim) for claim in claims], words=True),
        Column("of", [f"{claim.arm} over {claim.over}" for claim in claims], words=True),
        Column("bound", [bound_words(claim) for claim in claims]),
    ]
    table = AlignedTable(columns, rows)
    return [ResponsiveTable("What would be judged", table, [AlignedTable(columns, rows, wrap=True)])]


def to_json(planned: Planned) -> str:
    return json_text(to_plain(planned))


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _changes(arm: PlannedArm) -> str:
    lines = [f"{path}: {_value(value)}" for path, value in arm.changes]
    lines += [f"({path} is fixed: not tuned)" for path in arm.fixed]
    return "\n".join(lines) or "nothing"


def memory_words(needed: MemoryNeeded) -> str:
    """What a number of processes need, and for what."""
    data = "data" if needed.shared else "data in each"
    sizes = {data: needed.data_mib, "each with torch": needed.process_mib, "its training": needed.training_mib}
    parts = ", ".join(f"{name} {'unknown' if mib is None else f'{ceil(mib):,} MiB'}" for name, mib in sizes.items())
    subject = f"{needed.jobs} processes need" if needed.jobs > 1 else "one process needs"
    return f"{subject} about {ceil(needed.total_mib):,} of {needed.available_mib:,.0f} MiB available ({parts})"


def _memory(mib: float | None) -> str:
    return UNKNOWN if mib is None else f"{mib:,.1f} MiB"
