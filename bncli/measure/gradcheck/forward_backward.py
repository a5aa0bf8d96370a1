"""The values section: every quantity of every case against the definition in float64."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from bncli.measure.reference.case import Case, cases
from bncli.measure.reference.judge import Check, CheckContext, CheckGroupPlan, Outcome, compare
from bncli.measure.reference.observe import quantities


def plans(context: CheckContext, refused: Collection[str]) -> Iterator[CheckGroupPlan]:
    """A plan for each mode, whose rows are its quantities. `refused` names the dtypes that are left out."""
    candidate = context.candidate
    found = cases(context.effort, candidate.norm, candidate.fuses, candidate.evaluates, context.interpreted)
    for mode in dict.fromkeys(case.mode for case in found):
        checks = [_check(context, case) for case in found if case.mode == mode and not case.needs & set(refused)]
        names = dict.fromkeys(name for check in checks for name in check.quantities)
        yield CheckGroupPlan("values", checks, context.rule, rows={name: f"{mode} {name}" for name in names})


def _check(context: CheckContext, case: Case) -> Check:
    def run() -> Outcome:
        return compare(context, *context.fresh(case))

    return Check("values", case.identifier, run, case=case, quantities=quantities(case))
