"""`bncli gradcheck`: is a kernel's gradient right, in all of its parts? And if not, what kind of bug is it?"""

from __future__ import annotations

import difflib
import fnmatch
import math
import shlex
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from bncli.engine import device as devices
from bncli.errors import RecipeError
from bncli.measure.gradcheck import derivatives, forward_backward, hard_inputs, invariant_rows
from bncli.measure.gradcheck.chain_rule import paths
from bncli.measure.gradcheck.diagnose import diagnose
from bncli.measure.reference.candidate import Subject, subject
from bncli.measure.reference.gradient_cases import INTERPRETED_CHANNELS
from bncli.measure.reference.judge import Verdict
from bncli.measure.reference.observe import Check, Finding, Setting, Stage
from bncli.names import NORMS
from bncli.results.gradcheck import CheckFailure, CheckGroup, Effort, Gradcheck, GradientPaths

SHOWN = 8  # failures kept, one a row of the table
PATHS = "train dx in its three parts"


def run(
    kernel: str = "native",
    norm: str = "batch",
    device: str = "auto",
    effort: Effort = "default",
    only: str | None = None,
    allow_code: bool = False,
) -> Iterator[CheckGroup | Gradcheck]:
    """Check a kernel's output, gradients and running statistics; yields each group when finished, the result last.

    kernel: native, fused, or the user's package.module:function (with allow_code). norm: batch, layer, group, instance.
    only: an identifier or a shell glob; just the cases that match it are run.

    Raises RecipeError for a name that is none or an `only` that matches nothing, and Unavailable, with the reason,
    where the device or the kernel cannot run here. What the kernel itself does wrong is a failure in the result.
    """
    began = time.perf_counter()
    place = devices.resolve(device)
    setting = Setting(subject(kernel, norm, place, allow_code), place, effort)
    refused = forward_backward.refusals(setting)
    if "eval" in refused:
        setting = replace(setting, subject=replace(setting.subject, evaluates=False))
    stages = _selected(setting, refused, only)
    again = _again(kernel, norm, device, allow_code)
    groups: list[CheckGroup] = []
    verdicts: list[Verdict] = []
    for group in [] if only else _not_checked(setting, refused):
        groups.append(group)
        yield group
    for stage in stages:
        for group in _finish(stage, verdicts):
            groups.append(group)
            yield group
    parts: tuple[GradientPaths, ...] = ()
    if only is None:
        parts = paths(_forward(setting.subject), place, norm)
        groups.append(_of_paths(parts))
        verdicts += [Verdict("derivatives", PATHS, f"paths/{part.case}", _of_path(part)) for part in parts]
        yield groups[-1]
    if not any(group.cases for group in groups):
        groups.append(CheckGroup("values", "anything at all", 1, 1, None, None, "", "no case could run"))
        yield groups[-1]
    yield Gradcheck(
        kernel=kernel,
        norm=norm,
        effort=effort,
        environment=devices.environment(place),
        ran=setting.subject.ran,
        seconds=time.perf_counter() - began,
        groups=tuple(groups),
        paths=parts,
        failures=_failures(verdicts, again),
        diagnoses=diagnose(verdicts, norm),
    )


# --- which checks -----------------------------------------------------------------------------------------------------


def _stages(setting: Setting, refused: dict[str, str]) -> list[Stage]:
    return [
        *forward_backward.stages(setting, refused),
        *derivatives.stages(setting, refused),
        *invariant_rows.stages(setting, refused),
        *hard_inputs.stages(setting, refused),
    ]


def _selected(setting: Setting, refused: dict[str, str], only: str | None) -> list[Stage]:
    stages = _stages(setting, refused)
    if only is None:
        return stages
    every = _stages(replace(setting, effort="full"), refused)
    for candidates in (stages, every):
        kept = [replace(stage, checks=_matching(stage.checks, only)) for stage in candidates]
        kept = [stage for stage in kept if stage.checks]
        if kept:
            return kept
    known = [check.named(name) for stage in every for check in stage.checks for name in check.quantities]
    near = difflib.get_close_matches(only, known, n=3, cutoff=0.3) or known[:3]
    left_out = f" Left out: {', '.join(refused)}." if refused else ""
    raise RecipeError(f"--only {only}: no case of that name. The nearest are {', '.join(near)}.{left_out}")


def _matching(checks: list[Check], only: str) -> list[Check]:
    """The checks that a glob names as a whole, and those of which it names some quantities, with only these."""
    kept = []
    for check in checks:
        names = check.quantities
        if not (fnmatch.fnmatchcase(check.identifier, only) or check.identifier == only):
            names = tuple(name for name in names if fnmatch.fnmatchcase(check.named(name), only))
        if names:
            kept.append(replace(check, quantities=names))
    return kept


def _again(kernel: str, norm: str, device: str, allow_code: bool) -> str:
    """The command that a failure's identifier is put behind."""
    parts = ["bncli", "gradcheck", "--kernel", kernel]
    parts += ["--norm", norm] if norm != "batch" else []
    parts += ["--device", device] if device != "auto" else []
    parts += ["--allow-code"] if allow_code else []
    return shlex.join([*parts, "--only"])


# --- groups -----------------------------------------------------------------------------------------------------------


def _not_checked(setting: Setting, refused: dict[str, str]) -> Iterator[CheckGroup]:
    checked = setting.subject

    def group(name: str, reason: str) -> CheckGroup:
        return CheckGroup("values", name, 0, 0, None, None, "", reason)

    if NORMS[checked.norm].has_kernels and not checked.fuses:
        yield group("residual and activation", "the function takes no residual and no activation")
    if "eval" in NORMS[checked.norm].modes and not checked.evaluates and "eval" not in refused:
        yield group("evaluation", "the function takes no statistics, so it has no evaluation mode")
    if setting.subject.interpreted:
        yield group(f"over {INTERPRETED_CHANNELS} contiguous channels", "Triton's interpreter would take minutes")
    for name, reason in refused.items():
        yield group(name, reason)


def _finish(stage: Stage, verdicts: list[Verdict]) -> Iterator[CheckGroup]:
    """Run the stage's checks; its rows, in the order of their first case."""
    found: dict[str, list[Verdict]] = {}
    for check in stage.checks:
        for finding in _run(check):
            row = stage.rows.get(finding.quantity, stage.row)
            verdict = Verdict(stage.section, row, check.named(finding.quantity), finding)
            verdicts.append(verdict)
            found.setdefault(row, []).append(verdict)
    for row, members in found.items():
        worst = max(members, key=lambda verdict: verdict.finding.error)
        failed = sum(verdict.finding.failed for verdict in members)
        yield CheckGroup(
            stage.section, row, len(members), failed, worst.finding.error, worst.identifier, stage.tolerance
        )
    if not found:
        why = "the kernel takes none of the inputs that it needs"
        for row in filter(None, stage.rows.values() or [stage.row]):
            yield CheckGroup(stage.section, row, 0, 0, None, None, stage.tolerance, why)


def _run(check: Check) -> list[Finding]:
    return [finding for finding in check.run() if finding.quantity in check.quantities]


def _of_path(part: GradientPaths) -> Finding:
    error = part.error / part.bound if math.isfinite(part.error) else math.inf
    return Finding("", error, f"dx misses central differences of the loss by {part.error:.2g} (relative)")


def _of_paths(parts: tuple[GradientPaths, ...]) -> CheckGroup:
    errors = [_of_path(part).error for part in parts]
    failed = sum(not error <= 1 for error in errors)
    words = "the rounding of central differences of the loss in float64"
    return CheckGroup("derivatives", PATHS, len(parts), failed, max(errors, default=None), None, words)


def _failures(verdicts: list[Verdict], again: str) -> tuple[CheckFailure, ...]:
    """The first failing case of each row of the table, but one call's only complaint once."""
    first: dict[tuple[str, str], Verdict] = {}
    told: set[str] = set()
    for verdict in verdicts:
        row = (verdict.section, verdict.row)
        if verdict.failed and row not in first and verdict.finding.message not in told:
            first[row] = verdict
            told.add(verdict.finding.message)

    def command(verdict: Verdict) -> str:
        if verdict.row == PATHS:  # which is computed by a whole run alone
            return again.removesuffix(" --only")
        return f"{again} {shlex.quote(verdict.identifier)}"

    shown = list(first.values())[:SHOWN]
    return tuple(CheckFailure(verdict.identifier, verdict.finding.message, command(verdict)) for verdict in shown)


def _forward(checked: Subject) -> Callable[[Tensor, Tensor, Tensor, float], Tensor]:
    def call(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        zeros = torch.zeros(x.size(1), dtype=x.dtype, device=x.device)
        return checked.call(x, zeros, zeros + 1, weight, bias, True, 0.1, eps, None, None)

    return call
