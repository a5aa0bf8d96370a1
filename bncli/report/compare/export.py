"""A comparison for other programs: CSV with all digits, and Markdown for a GitHub page."""

from __future__ import annotations

from typing import Any

from bncli.report.compare.text import comparison_columns, cost_columns, footnotes, subtitle, target_columns, title
from bncli.report.export import csv_text, markdown, markdown_table
from bncli.report.text import Column, setting
from bncli.results.compare import ArmSummary, AtTarget, Comparison, Cost


def to_csv(comparison: Comparison) -> str:
    """One row an arm, all digits; units and meanings in the header; an empty cell is an unknown one."""
    plan, metric = comparison.plan, comparison.plan.target.metric
    rows = [_csv_row(arm, list(plan.grid), metric) for arm in comparison.arms]
    return csv_text(rows, "arm")


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
        "times_fewer": ratio.value if ratio else 1,
        "times_fewer_low_95": ratio.interval.low if ratio else None,
        "times_fewer_high_95": ratio.interval.high if ratio else None,
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
    ratio = cost.ratio if cost else None
    return {
        f"{unit}_to_target": cost.typical.value if cost else None,
        f"{unit}_low_95": cost.typical.interval.low if cost else None,
        f"{unit}_high_95": cost.typical.interval.high if cost else None,
        f"times_fewer_{unit}": ratio.value if ratio else 1 if cost else None,
        f"times_fewer_{unit}_low_95": ratio.interval.low if ratio else None,
        f"times_fewer_{unit}_high_95": ratio.interval.high if ratio else None,
    }


def _csv_target(found: AtTarget) -> dict[str, Any]:
    at, ratio = f"at_{setting(found.target.value)}", found.ratio
    return {
        f"hits_{at}": found.hits,
        f"steps_to_target_{at}": found.steps.value,
        f"times_fewer_{at}": ratio.value if ratio else 1,
        f"times_fewer_low_95_{at}": ratio.interval.low if ratio else None,
        f"times_fewer_high_95_{at}": ratio.interval.high if ratio else None,
    }


def to_markdown(comparison: Comparison) -> str:
    """The comparison's table and its notes for a GitHub page."""
    lines = [f"### {markdown(title(comparison))}", "", markdown(subtitle(comparison.plan)), ""]
    lines += [*markdown_table(comparison_columns(comparison)), ""]
    for heading, columns in side_tables(comparison):
        lines += [f"#### {heading}", "", *markdown_table(columns), ""]
    lines += [f"- {markdown(note)}" for note in footnotes(comparison)]
    return "\n".join(lines) + "\n"


def side_tables(comparison: Comparison) -> list[tuple[str, list[Column]]]:
    """The tables below the comparison's own, each with its heading."""
    found = [("What it costs to reach the target", cost_columns(comparison))]
    return found + [("Steps to each target", target_columns(comparison))] * bool(comparison.plan.also)
