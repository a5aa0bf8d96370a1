"""Gradcheck run: checks of a kernel's output, gradients and running statistics, and the diagnosis of failures."""

from __future__ import annotations

import difflib
import fnmatch
import itertools
import math
import re
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from bncli.engine import device as devices
from bncli.errors import UsageError
from bncli.measure.gradcheck import derivatives, hard_inputs, invariants
from bncli.measure.gradcheck.chain_rule import cases_of, paths
from bncli.measure.gradcheck.diagnose import diagnose
from bncli.measure.reference.candidate import Candidate, candidate
from bncli.measure.reference.case import DTYPE_NAMES, DTYPES, INTERPRETED_CHANNELS, Case, cases
from bncli.measure.reference.judge import Check, CheckContext, CheckGroupPlan, Outcome, Verdict, compare, supported
from bncli.measure.reference.observe import quantities
from bncli.names import NORMS
from bncli.results.finding import Finding, FindingKind
from bncli.results.gradcheck import (
    CheckFailure,
    CheckGroup,
    CheckProgress,
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
    only: Sequence[str] = (),
    allow_code: bool = False,
    dtypes: Sequence[str] = (),
    threads: int | None = None,
) -> Iterator[CheckProgress | CheckGroup | Gradcheck]:
    """Check a kernel's output, gradients and running statistics; yields progress, finished groups, then the result.

    kernel: one of names.GRADCHECK_KERNELS, or the user's package.module:function (with allow_code). norm: one of
    names.CHECKED_NORMS. only: identifiers or shell globs; only the cases that match one are run. dtypes: fp32, ...;
    only their cases are run, or all without any. threads: of the CPU; None for torch's choice.

    Raises UsageError for an unknown name or an `only` that matches nothing, and Unavailable, with the reason, if the
    device or the kernel cannot be used here. Errors of the kernel itself are failures in the result.
    """
    began = time.perf_counter()
    if unknown := [name for name in dtypes if name not in DTYPE_NAMES]:
        raise UsageError(f"expected some of {', '.join(DTYPE_NAMES)}", field="dtypes", value=unknown[0])
    asked = [DTYPE_NAMES[name] for name in dtypes] or list(DTYPES)
    place = devices.resolve(device)
    if threads is not None:
        torch.set_num_threads(threads)
    context, refused = supported(CheckContext(candidate(kernel, norm, place, allow_code), place, effort), asked)
    left_out = [name for name in DTYPES if name not in asked]
    plans = _selected(context, {*refused, *left_out}, only)
    in_parts = not only and {"float64", "float32"}.intersection(asked)  # the dtypes for dL/dx in its parts
    planned = sum(len(check.quantities) for plan in plans for check in plan.checks)
    planned += len(cases_of(norm)) if in_parts else 0
    yield CheckProgress(0, planned)
    groups: list[CheckGroup] = []
    verdicts: list[Verdict] = []
    idle = NotChecked("left out" if left_out else "missing inputs")
    skipped = [] if only else _not_checked(context, refused, left_out)
    for event in itertools.chain(skipped, *(_finish(plan, verdicts, idle) for plan in plans)):
        groups += [event] if isinstance(event, CheckGroup) else []
        yield event
    parts: tuple[GradientPaths, ...] = ()
    if in_parts:
        parts = paths(_forward(context.candidate, asked), place, norm)
        judged = [_of_path(part) for part in parts]
        groups.append(_group("derivatives", PATHS, judged, "central differences of the loss", named=False))
        verdicts += judged
        yield CheckProgress(len(parts))
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
        dtypes=tuple(dtypes),
        threads=threads,
    )


# --- which checks -----------------------------------------------------------------------------------------------------


def _plans(context: CheckContext, refused: Collection[str]) -> list[CheckGroupPlan]:
    parts = (values_plans, derivatives.plans, invariants.plans, hard_inputs.plans)
    plans = [plan for part in parts for plan in part(context, refused)]
    wide = "float32" not in refused  # the dtype of those checks of hard inputs that have no case
    return [replace(plan, checks=[check for check in plan.checks if check.case or wide]) for plan in plans]


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
        lambda: compare(context, *context.fresh(case), context.candidate.differentiates_twice),
        case=case,
        quantities=quantities(case)[: None if context.candidate.differentiates_twice else -1],
    )


def _selected(context: CheckContext, refused: Collection[str], only: Sequence[str]) -> list[CheckGroupPlan]:
    """The plans with the checks that `only` names. A name that this effort does not have stands for the full run's."""
    plans = _plans(context, refused)
    if not only:
        return plans
    every = _plans(replace(context, effort="full"), refused)
    for pattern in only:
        if not any(_matching(plan, [pattern]).checks for plan in every):
            known = [check.named(name) for plan in every for check in plan.checks for name in check.quantities]
            begun = sum(name.startswith(pattern) for name in known)
            parts = dict.fromkeys(f"{name.split('/')[0]}/*" for name in known)
            near = difflib.get_close_matches(pattern, known, n=3, cutoff=0.6) or parts
            hint = f"{begun:,} begin with it: {pattern}*" if begun else f"The nearest are {', '.join(near)}"
            others = _plans(replace(context, effort="full"), ())
            if not begun and any(_matching(plan, [f"{pattern}*"]).checks for plan in others):
                hint = "The cases of that name have other dtypes"
            left_out = f" Left out: {', '.join(sorted(refused))}." if refused else ""
            raise UsageError(f"no case of that name. {hint}.{left_out}", field="only", value=pattern)
        if not any(_matching(plan, [pattern]).checks for plan in plans):
            plans = every
    return [kept for plan in plans if (kept := _matching(plan, only)).checks]


def _matching(plan: CheckGroupPlan, only: Sequence[str]) -> CheckGroupPlan:
    """The checks that a glob matches; where it matches only some quantities, the check is restricted to these."""
    matched, kept = re.compile("|".join(map(fnmatch.translate, only))).match, []
    for check in plan.checks:
        names = check.quantities
        if not matched(check.identifier):
            names = tuple(name for name in names if matched(check.named(name)))
        if names:
            kept.append(replace(check, quantities=names))
    return replace(plan, checks=kept)


# --- groups -----------------------------------------------------------------------------------------------------------


def _not_checked(context: CheckContext, refused: dict[str, NotChecked], left_out: list[str]) -> Iterator[CheckGroup]:
    checked, reasons = context.candidate, dict[str, NotChecked]()
    if left_out:
        reasons[", ".join(left_out)] = NotChecked("left out")
    if NORMS[checked.norm].has_kernels and not checked.fuses:
        reasons["residual and activation"] = NotChecked("no fused operations")
    if "eval" in NORMS[checked.norm].modes and not checked.evaluates and "eval" not in refused:
        by_variance = NORMS[checked.norm].has_running_variance
        reasons["evaluation"] = NotChecked("no evaluation" if by_variance else "running covariance")
    if checked.interpreted:
        reasons[f"over {INTERPRETED_CHANNELS} contiguous channels"] = NotChecked("slow in the interpreter")
    for name, reason in {**reasons, **refused}.items():
        yield CheckGroup("values", name, 0, 0, None, None, skipped=reason)


def _finish(plan: CheckGroupPlan, verdicts: list[Verdict], idle: NotChecked) -> Iterator[CheckProgress | CheckGroup]:
    """Run the checks of the plan; yields progress, then its rows in the order of their first case, `idle` without."""
    began, found = time.perf_counter(), dict[str, list[Verdict]]()
    for check in plan.checks:
        outcome = check.run()
        for quantity, finding in outcome.findings.items():
            if quantity in check.quantities:
                row = plan.rows[quantity]
                evidence = outcome.evidence if finding.failed else None
                verdicts.append(Verdict(check, row, quantity, finding, evidence))
                found.setdefault(row, []).append(verdicts[-1])
        yield CheckProgress(len(check.quantities))
    seconds = (time.perf_counter() - began) / max(1, sum(map(len, found.values())))
    for row, members in found.items():
        yield replace(_group(plan.section, row, members, plan.rule), seconds=seconds * len(members))
    if not found:
        for row in plan.rows.values():
            yield CheckGroup(plan.section, row, 0, 0, None, None, plan.rule, idle)


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


def _forward(checked: Candidate, dtypes: Sequence[str]) -> Callable[[Tensor, Tensor, Tensor, float], Tensor]:
    def call(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        if x.dtype not in [DTYPES[name] for name in dtypes]:
            raise NotImplementedError("this dtype was not asked for")
        zeros = torch.zeros(x.size(1), dtype=x.dtype, device=x.device)
        return checked.call(x, zeros, zeros + 1, weight, bias, True, 0.1, eps, None, None)

    return call
