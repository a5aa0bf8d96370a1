"""The values section: every quantity of every case against the definition in float64."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace

from bncli.measure.reference.gradient_cases import DTYPES, Case, cases
from bncli.measure.reference.judge import Check, CheckContext, CheckGroupPlan, Outcome, compare
from bncli.measure.reference.observe import observe, quantities
from bncli.names import FUSED_ACTIVATIONS
from bncli.results.finding import Finding
from bncli.results.gradcheck import NotChecked

PROBE = Case("train", "float32", "contiguous", (4, 4, 3))


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


def refusals(context: CheckContext) -> dict[str, NotChecked]:
    """What the candidate refuses by raising, though it takes a plain float32 input: name -> its reason.

    The name of a dtype: any exception counts. Of a fused operation, or `eval`: NotImplementedError alone, which says
    that it was never offered; any other is a bug.
    """
    reasons: dict[str, NotChecked] = {}
    if context.device.type == "mps":
        reasons["float64"] = NotChecked("no float64 on the device")
    if _raised(context, PROBE):
        return reasons
    more = (*FUSED_ACTIVATIONS, "residual") if context.candidate.fuses else ()
    probes = {name: replace(PROBE, dtype=name) for name in DTYPES if name not in reasons}
    probes |= {name: replace(PROBE, fusion=name) for name in more}
    if context.candidate.evaluates:
        probes["eval"] = replace(PROBE, mode="eval")
    for name, case in probes.items():
        raised = _raised(context, case)
        if raised and (name in DTYPES or raised.exception == "NotImplementedError"):
            reasons[name] = NotChecked("refused", raised)
    return reasons


def _raised(context: CheckContext, case: Case) -> Finding | None:
    """What the forward pass of a plain case raised."""
    case, given = context.fresh(case)
    problem = observe(context.candidate.call, case, given, second=False).problems.get("forward")
    return problem if problem and problem.exception else None
