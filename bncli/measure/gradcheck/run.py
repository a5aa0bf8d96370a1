"""Gradcheck run: checks of a kernel's output, gradients and running statistics, and the diagnosis of failures."""

from __future__ import annotations

import difflib
import fnmatch
import math
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from bncli.engine import device as devices
from bncli.errors import UsageError
from bncli.measure.gradcheck import derivatives, hard_inputs, invariants
from bncli.measure.gradcheck.chain_rule import paths
from bncli.measure.gradcheck.diagnose import diagnose
from bncli.measure.reference.candidate import Candidate, candidate
from bncli.measure.reference.case import INTERPRETED_CHANNELS, Case, cases
from bncli.measure.reference.judge import Check, CheckContext, CheckGroupPlan, Outcome, Verdict, compare, refusals
from bncli.measure.reference.observe import quantities
from bncli.names import NORMS
from bncli.results.finding import Finding, FindingKind
from bncli.results.gradcheck import (
    CheckFailure,
    CheckGroup,
    Effort,
    Gradcheck,
    GradientPaths,
    NotChecked,
    ToleranceRule,
)

SHOWN = 8  # failures kept, one per row of the table
PATHS = "train dx in its three parts"


def run(
    kernel: str = "native",
    norm: str = "batch",
    device: str = "auto",
    effort: Effort = "default",
    only: str | None = None,
    allow_code: bool = False,
) -> Iterator[CheckGroup | Gradcheck]:
    """Check a kernel's output, gradients and running statistics; yields finished groups, then the result.

    kernel: native, fused, or the user's package.module:function (with allow_code). norm: one of names.CHECKED_NORMS.
    only: an identifier or a shell glob; only the cases that match it are run.

    Raises UsageError for an unknown name or an `only` that matches nothing, and Unavailable, with the reason, if the
    device or the kernel cannot be used here. Errors of the kernel itself are failures in the result.
    """
    began = time.perf_counter()
    place = devices.resolve(device)
    context = CheckContext(candidate(kernel, norm, place, allow_code), place, effort)
    refused = refusals(lambda case: context)
    if "eval" in refused:
        context = replace(context, candidate=replace(context.candidate, evaluates=False))
    plans = _selected(context, refused, only)
    groups: list[CheckGroup] = []
    verdicts: list[Verdict] = []
    for group in [] if only else _not_checked(context, refused):
        groups.append(group)
        yield group
    for plan in plans:
        for group in _finish(plan, verdicts):
            groups.append(group)
            yield group
    parts: tuple[GradientPaths, ...] = ()
    if only is None:
        parts = paths(_forward(context.candidate), place, norm)
        judged = [_of_path(part) for part in parts]
        groups.append(_group("derivatives", PATHS, judged, "central differences of the loss", named=False))
        verdicts += judged
        yield groups[-1]
    if not any(group.cases for group in groups):
        groups.append(CheckGroup("values", "anything at all", 1, 1, None, None, skipped=NotChecked("nothing ran")))
        yield groups[-1]
    yield Gradcheck(
        kernel=kernel,
        norm=norm,
        effort=effort,
        environment=devices.environment(place),
        ran=context.candidate.ran,
        seconds=time.perf_counter() - began,
        groups=tuple(groups),
        paths=parts,
        failures=_failures(verdicts),
        diagnoses=diagnose(verdicts, norm),
        device=device,
        allow_code=allow_code,
    )


# --- which checks -----------------------------------------------------------------------------------------------------


def _plans(context: CheckContext, refused: Collection[str]) -> list[CheckGroupPlan]:
    parts = (values_plans, derivatives.plans, invariants.plans, hard_inputs.plans)
    return [plan for part in parts for plan in part(context, refused)]


def values_plans(context: CheckContext, refused: Collection[str]) -> Iterator[CheckGroupPlan]:
    """The values section: a plan for each mode, whose rows are the quantities that are judged."""
    candidate = context.candidate
    found = cases(context.effort, candidate.norm, candidate.fuses, candidate.evaluates, candidate.interpreted)
    for mode in dict.fromkeys(case.mode for case in found):
        checks = [_value(context, case) for case in found if case.mode == mode and not case.needs & set(refused)]
        rows = {name: f"{mode} {name}" for check in checks for name in check.quantities}
        yield CheckGroupPlan("values", checks, candidate.rule, rows)


def _value(context: CheckContext, case: Case) -> Check:
    return Check(
        "values",
        case.identifier,
        lambda: compare(context, *context.fresh(case)),
        case=case,
        quantities=quantities(case),
    )


def _selected(context: CheckContext, refused: Collection[str], only: str | None) -> list[CheckGroupPlan]:
    plans = _plans(context, refused)
    if only is None:
        return plans
    every = _plans(replace(context, effort="full"), refused)
    for candidates in (plans, every):
        kept = [replace(plan, checks=_matching(plan.checks, only)) for plan in candidates]
        kept = [plan for plan in kept if plan.checks]
        if kept:
            return kept
    known = [check.named(name) for plan in every for check in plan.checks for name in check.quantities]
    near = difflib.get_close_matches(only, known, n=3, cutoff=0.3) or known[:3]
    left_out = f" Left out: {', '.join(refused)}." if refused else ""
    raise UsageError(f"no case of that name. The nearest are {', '.join(near)}.{left_out}", field="only", value=only)


def _matching(checks: list[Check], only: str) -> list[Check]:
    """The checks that a glob matches; where it matches only some quantities, the check is restricted to these."""
    kept = []
    for check in checks:
        names = check.quantities
        if not (fnmatch.fnmatchcase(check.identifier, only) or check.identifier == only):
            names = tuple(name for name in names if fnmatch.fnmatchcase(check.named(name), only))
        if names:
            kept.append(replace(check, quantities=names))
    return kept


# --- groups -----------------------------------------------------------------------------------------------------------


def _not_checked(context: CheckContext, refused: dict[str, NotChecked]) -> Iterator[CheckGroup]:
    checked, reasons = context.candidate, dict[str, NotChecked]()
    if NORMS[checked.norm].has_kernels and not checked.fuses:
        reasons["residual and activation"] = NotChecked("no fused operations")
    if "eval" in NORMS[checked.norm].modes and not checked.evaluates and "eval" not in refused:
        by_variance = NORMS[checked.norm].has_running_variance
        reasons["evaluation"] = NotChecked("no evaluation" if by_variance else "running covariance")
    if checked.interpreted:
        reasons[f"over {INTERPRETED_CHANNELS} contiguous channels"] = NotChecked("slow in the interpreter")
    for name, reason in {**reasons, **refused}.items():
        yield CheckGroup("values", name, 0, 0, None, None, skipped=reason)


def _finish(plan: CheckGroupPlan, verdicts: list[Verdict]) -> Iterator[CheckGroup]:
    """Run the checks of the plan and yield its rows, in the order of their first case."""
    found: dict[str, list[Verdict]] = {}
    for check in plan.checks:
        outcome = check.run()
        for quantity, finding in outcome.findings.items():
            if quantity in check.quantities:
                row = plan.rows[quantity]
                evidence = outcome.evidence if finding.failed else None
                verdicts.append(Verdict(check, row, quantity, finding, evidence))
                found.setdefault(row, []).append(verdicts[-1])
    for row, members in found.items():
        yield _group(plan.section, row, members, plan.rule)
    if not found:
        for row in plan.rows.values():
            yield CheckGroup(plan.section, row, 0, 0, None, None, plan.rule, NotChecked("missing inputs"))


def _group(section: str, row: str, members: list[Verdict], rule: ToleranceRule, named: bool = True) -> CheckGroup:
    """named: the worst case can be selected by its identifier."""
    worst = max(members, key=lambda verdict: verdict.finding.error)
    failed = sum(verdict.failed for verdict in members)
    identifier = worst.identifier if named else None
    return CheckGroup(section, row, len(members), failed, worst.finding.error, identifier, rule)


def _of_path(part: GradientPaths) -> Verdict:
    error = part.error / part.bound if math.isfinite(part.error) else math.inf
    kind: FindingKind = "right" if error <= 1 else "not_derivative"
    finding = Finding(kind, "dx", error, relative=part.error)
    check = Check("derivatives", f"paths/{part.case}", lambda: Outcome({"": finding}), "paths")
    return Verdict(check, PATHS, "", finding)


def _failures(verdicts: list[Verdict]) -> tuple[CheckFailure, ...]:
    """The first failing case of each row of the table, but what is wrong with every call alike once."""
    first: dict[tuple[str, str], Verdict] = {}
    known: set[tuple[Finding, bool]] = set()
    for verdict in verdicts:
        row = (verdict.check.section, verdict.row)
        # dbias is the same number for any x; in another case its tolerance is another
        found = (replace(verdict.finding, error=0.0, relative=None, of_native=None), bool(verdict.check.variant))
        if verdict.failed and row not in first and found not in known:
            first[row] = verdict
            known.add(found)
    return tuple(verdict.failure() for verdict in list(first.values())[:SHOWN])


def _forward(checked: Candidate) -> Callable[[Tensor, Tensor, Tensor, float], Tensor]:
    def call(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        zeros = torch.zeros(x.size(1), dtype=x.dtype, device=x.device)
        return checked.call(x, zeros, zeros + 1, weight, bias, True, 0.1, eps, None, None)

    return call
