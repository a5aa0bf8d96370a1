"""A comparison for other programs: CSV with all digits, Markdown, LaTeX."""

from __future__ import annotations

from typing import Any

from bncli.report.compare.claims import HEADING, claim_columns, claim_notes, csv_row
from bncli.report.compare.notes import warnings
from bncli.report.compare.text import comparison_columns, footnotes, headline, side_tables, subtitle, title
from bncli.report.export import csv_text, latex_text, markdown_section
from bncli.report.text import setting
from bncli.results.compare import ArmSummary, AtTarget, Comparison, Cost, Ratio

SPEED_AND_SIZE = ("samples_per_s", "ms_per_step", "cores_lacked", "peak_memory_mib", "parameters")

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
        **{name: getattr(arm, name) for name in SPEED_AND_SIZE},
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
    lines = markdown_section(title(comparison), headline(comparison), level=3)
    lines += markdown_section("", [subtitle(comparison.plan)], comparison_columns(comparison))
    lines += markdown_section("Warnings", (), (), warnings(comparison))
    for heading, columns in side_tables(comparison):
        lines += markdown_section(heading.capitalize(), (), columns)
    lines += markdown_section("", (), (), footnotes(comparison))
    if comparison.claims:
        lines += markdown_section(HEADING.capitalize(), (), claim_columns(comparison), claim_notes(comparison))
    return "\n".join(lines)


def to_latex(comparison: Comparison) -> str:
    """The same tables for a paper, without the claims."""
    tables = [(title(comparison), comparison_columns(comparison)), *side_tables(comparison)]
    return latex_text(tables, [subtitle(comparison.plan) + ".", *footnotes(comparison)])
