"""The values section: every quantity of every case against the definition in float64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from bncli.measure.reference.gradient_cases import DTYPES, Case, cases
from bncli.measure.reference.observe import Check, Finding, Setting, Stage, compare, fresh
from bncli.measure.reference.quantities import observe, quantities
from bncli.names import FUSED_ACTIVATIONS

PROBE = Case("train", "float32", "contiguous", (4, 4, 3))


def stages(setting: Setting, refused: dict[str, str]) -> Iterator[Stage]:
    """A stage for each mode, whose rows are its quantities. `refused` names the dtypes that are left out."""
    subject = setting.subject
    found = cases(setting.effort, subject.norm, subject.fuses, subject.evaluates, setting.subject.interpreted)
    for mode in dict.fromkeys(case.mode for case in found):
        checks = [_check(setting, case) for case in found if case.mode == mode and not case.needs & set(refused)]
        names = dict.fromkeys(name for check in checks for name in check.quantities)
        yield Stage("values", checks, setting.tolerance, rows={name: f"{mode} {name}" for name in names})


def _check(setting: Setting, case: Case) -> Check:
    def run() -> list[Finding]:
        return compare(setting, *fresh(setting, case))

    return Check(case.identifier, quantities(case), run)


def refusals(setting: Setting) -> dict[str, str]:
    """What the subject refuses by raising, though it takes a plain float32 input: name -> its reason.

    The name of a dtype: any exception counts. Of a fused operation, or `eval`: NotImplementedError alone, which says
    that it was never offered; any other is a bug.
    """
    reasons: dict[str, str] = {}
    if setting.device.type == "mps":
        reasons["float64"] = "Metal has no float64"
    if _why_not(setting, PROBE) is not None:
        return reasons
    more = (*FUSED_ACTIVATIONS, "residual") if setting.subject.fuses else ()
    probes = {name: replace(PROBE, dtype=name) for name in DTYPES if name not in reasons}
    probes |= {name: replace(PROBE, fusion=name) for name in more}
    if setting.subject.evaluates:
        probes["eval"] = replace(PROBE, mode="eval")
    for name, case in probes.items():
        why = _why_not(setting, case)
        if why is not None and (name in DTYPES or why.startswith("raised NotImplementedError")):
            reasons[name] = f"the kernel refuses it: {why}"
    return reasons


def _why_not(setting: Setting, case: Case) -> str | None:
    """The message with which the forward pass of a plain case was refused."""
    case, given = fresh(setting, case)
    seen = observe(setting.subject.call, case, given, second=False)
    return seen.problems["forward"] if seen.problems.get("forward", "").startswith("raised") else None
