"""How the arms did over the grid: the cells of the tuning table, and the ratio at each value that two arms share."""

from __future__ import annotations

import itertools
import math
from typing import Any

from bncli.report.text import UNKNOWN, Cell, Column, figure, setting, short_names
from bncli.results.compare import ArmSummary, Choice, Comparison, ComparisonPlan, TuningCell


def tuning_columns(comparison: Comparison) -> list[Column]:
    """Arms down, the values of the grid's longest field across; other fields' values make further rows."""
    plan = comparison.plan
    if not plan.grid:
        return []
    across = max(plan.grid, key=lambda field: len(plan.grid[field]))
    rows = [(arm, others) for arm in comparison.arms for others in _other_values(arm, plan, across)]
    reference = next((arm for arm in comparison.arms if arm.arm == plan.reference), None)
    columns = [
        Column(("arm", ""), tuple((arm.arm, _words(arm, others, across, plan)) for arm, others in rows), words=True)
    ]
    for value in plan.grid[across]:
        points = [(arm, {**others, across: value}) for arm, others in rows]
        cells = tuple(_tuning_cell(arm, point, reference, plan.most_steps) for arm, point in points)
        columns.append(Column((f"{short_names(plan.grid)[across]} {setting(value)}", ""), cells))
    return columns


def _other_values(arm: ArmSummary, plan: ComparisonPlan, across: str) -> list[dict[str, Any]]:
    values = {
        f: (arm.point[f],) if f in arm.fixed and f in arm.point else plan.grid[f] for f in plan.grid if f != across
    }
    return [dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())]


def _words(arm: ArmSummary, others: dict[str, Any], across: str, plan: ComparisonPlan) -> str:
    shown = {**others, across: arm.point[across]} if across in arm.fixed and across in arm.point else others
    names = short_names(plan.grid)
    return ", ".join(f"{names[f]} {setting(v)}{' fixed' * (f in arm.fixed)}" for f, v in shown.items())


def _at(arm: ArmSummary | None, point: dict[str, Any]) -> TuningCell | None:
    if arm is None:
        return None
    return next((cell for cell in arm.tuning if {**arm.point, **cell.point} == point), None)


def _tuning_cell(arm: ArmSummary, point: dict[str, Any], reference: ArmSummary | None, most_steps: float) -> Cell:
    cell, other = _at(arm, point), _at(reference, point)
    if cell is None or cell.runs == 0:
        return UNKNOWN, ""
    words = figure(cell.steps) if cell.hits else "diverged" if cell.diverged == cell.runs else "never"
    best = f"[{words}]" if point == arm.point else f"({words})" if cell.kept else words
    shown = best if words == "diverged" else f"{best} {cell.hits}/{cell.runs}"
    return shown, "" if other is None or arm is reference else common_ratio(cell, other, most_steps)


def common_ratio(cell: TuningCell, reference: TuningCell, most_steps: float) -> str:
    """Times fewer steps at one grid value; unknown where runs missed the target on both sides.

    On one side a miss counts as the most steps that the budget can show, which is less than it would have taken: the
    ratio is then a bound.
    """

    def log_mean(of: TuningCell) -> float | None:
        if of.runs == 0 or (of.hits and not of.steps):  # no geometric mean: a run was at the target before training
            return None
        return (of.hits * math.log(of.steps or 1) + (of.runs - of.hits) * math.log(most_steps)) / of.runs

    mine, its = log_mean(cell), log_mean(reference)
    missed, reference_missed = cell.hits < cell.runs, reference.hits < reference.runs
    if mine is None or its is None or (missed and reference_missed):
        return UNKNOWN
    sign = "< " if missed else "> " if reference_missed else ""
    return f"{sign}{figure(math.exp(its - mine))}x"


def tuning_notes(comparison: Comparison) -> list[str]:
    seeds = len(comparison.plan.tune_seeds)
    choices = [f"{arm.arm}: {choice_words(arm.choice)}" for arm in comparison.arms if arm.choice]
    return [
        f"Geometric mean of the steps of the runs that hit, hits/runs over {seeds} tuning seed{'s' * (seeds != 1)};"
        f" below it how many times fewer than {comparison.plan.reference} at the same value (no interval).",
        "[ ]: the arm's best, by all of its seeds; ( ): kept beside it with further seeds, since the tuning seeds "
        "could not tell them apart. > and <: bounds, where runs missed.",
        *([f"Kept: {'; '.join(choices)}."] if choices else []),
    ]


def choice_words(choice: Choice) -> str:
    """How many points were kept, and where there are several how clear the choice among them was."""
    kept = f"{choice.kept} of {choice.points} points"
    if choice.kept < 2 or choice.doubt is None:
        return kept
    return f"{kept}, {choice.doubt:.0%} of the samples with one seed left out choose another"
