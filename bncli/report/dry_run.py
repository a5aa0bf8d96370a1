"""A dry run on the screen: every field with where it came from, then the arms and the runs."""

from __future__ import annotations

import json
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from bncli.results.compare import Planned, PlannedArm
from bncli.results.serialize import to_plain


def render(planned: Planned) -> Group:
    """The resolved recipe, the arms with their sizes, and how many runs there would be."""
    fields = Table(title=f"{planned.name}: the resolved recipe", box=box.SIMPLE_HEAD)
    for heading in ("field", "value", "from"):
        fields.add_column(heading, overflow="fold")
    for path, value, source in planned.fields:
        style = "dim" if source == "default" else ""
        fields.add_row(path, _value(value), Text(source), style=style)
    arms = Table(title="what would be trained", box=box.SIMPLE_HEAD)
    for heading, justify in (("arm", "left"), ("differs from the base", "left"), ("parameters", "right"),
                             ("memory, estimated", "right"), ("runs", "right")):  # fmt: skip
        arms.add_column(heading, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for arm in planned.arms:
        arms.add_row(Text(arm.name), _changes(arm), _count(arm.parameters), _memory(arm.memory_mib), _runs(arm))
    parts: list[Any] = [fields, arms]
    if any(arm.memory_mib is not None for arm in planned.arms):
        parts.append(Text("memory: parameters, gradients, optimizer state and activations; torch itself comes on top"))
        if planned.available_memory_mib is not None:
            parts.append(Text(f"available on this machine (CPU): {_memory(planned.available_memory_mib)}"))
    for path, values in planned.grid.items():
        parts.append(Text(f"grid: {path} in {', '.join(f'{v:g}' if isinstance(v, float) else str(v) for v in values)}"))
    runs = f"{planned.runs:,} runs" if planned.runs != 1 else "1 run"
    more = ", more where an arm keeps several points of the grid" if planned.grid else ""
    parts.append(Text(f"{runs}, {planned.steps_at_most:,} optimizer steps at most{more}. Nothing was trained."))
    return Group(*parts)


def to_json(planned: Planned) -> str:
    return json.dumps(to_plain(planned), indent=1, ensure_ascii=False)


def _value(value: Any) -> Text:
    return Text(value if isinstance(value, str) else json.dumps(value))


def _changes(arm: PlannedArm) -> Text:
    lines = [f"{path}: {_value(value)}" for path, value in arm.changes]
    lines += [f"({path} is fixed: not tuned)" for path in arm.fixed]
    return Text("\n".join(lines) or "nothing")


def _count(parameters: int | None) -> str:
    return "–" if parameters is None else f"{parameters:,}"


def _memory(mib: float | None) -> str:
    return "–" if mib is None else f"{mib:,.1f} MiB"


def _runs(arm: PlannedArm) -> str:
    return f"{arm.tuning_runs} + {arm.report_runs}" if arm.tuning_runs else str(arm.report_runs)
