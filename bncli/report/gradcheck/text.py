"""The outcome of `bncli gradcheck` in sentences and as JSON. Does not use rich."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from typing import Any

from bncli.report.export import (
    JunitCase,
    csv_text,
    json_text,
    junit_text,
    latex_text,
    markdown,
    markdown_section,
    markdown_table,
)
from bncli.report.text import UNKNOWN, Cell, Column, count, environment_words, figure, finding_text
from bncli.results.environment import FORMAT_VERSION
from bncli.results.gradcheck import (
    BiasStep,
    CheckFailure,
    CheckGroup,
    Diagnosis,
    Facet,
    FailureSummary,
    Gradcheck,
    GradientPaths,
    NotChecked,
    ToleranceRule,
)
from bncli.results.serialize import to_plain

OK, FAILED, NOT_CHECKED = "ok", "FAILED", "not checked"
STYLES = {OK: "green", FAILED: "bold red", NOT_CHECKED: "yellow"}
Commands = Sequence[Sequence[str]]  # for each failure, the words of the command that runs it again
LONGEST = 1e4  # larger errors (in tolerances) are written with an exponent
FEW = 6  # names that are listed; further ones are counted

_ROUNDING = (
    "the change of the float64 result when every intermediate value changes by one rounding, plus the output's rounding"
)
_FUSED = "3 half-precision roundings in addition for y and the gradients where a residual or an activation follows"
TOLERANCES: dict[ToleranceRule, str] = {
    "kernel": f"the larger of twice native's own error in the dtype and (log2 m + 4) times {_ROUNDING}",
    "native": (
        f"(sqrt m + 32) times {_ROUNDING}; {_FUSED}, in the second derivative, which torch computes in the dtype "
        "itself, and in dweight of channels_last inputs to its group norm"
    ),
    "module": f"(log2 m + 4) times {_ROUNDING}",
    "own function": (
        f"the larger of twice native's own error in the dtype and (sqrt m + 32) times {_ROUNDING}, so that sums may "
        f"be taken in any order; {_FUSED}"
    ),
    "finite differences": (
        "relative 0.0001 plus absolute 1e-06: central differences with step 1e-06 are good to step^2 and roundoff / "
        "step, about 1e-9; random directions, random upstream gradient"
    ),
    "central differences of the loss": "the rounding of central differences of the loss in float64",
    "summed floors": "the sum of the elements' rounding bounds",
    "no error": "none: every bit is the same",
    "floor of dx": "the rounding bound of dx",
    "mean floor of y": "the mean rounding bound of y",
    "floors of running statistics": "their rounding bounds",
    "floors of y, dweight and dbias": "the rounding bounds of y, dweight and dbias",
    "values and their NaN": "as for values, with NaN exactly where the definition has NaN",
    "variance": (
        "relative error of the float32 variance: 1e-6 at mean/deviation 1e2 and 1e3, 5e-6 at 1e4; twice that of the "
        "output's, whose own rounding counts too; of your own function, twice native's error and "
        "sqrt(m) roundings, of a sum in order, where these are larger"
    ),
    "overflowing variance": (
        "y right, or the bias (an infinite variance), or NaN where the variance overflows; other channels as usual"
    ),
    "ValueError": "a ValueError, as torch raises",
    "empty": "an empty output, gradients of 0, running statistics unchanged, as torch",
}
NOT_CHECKED_REASONS = {
    "no fused operations": "the function takes no residual and no activation",
    "no evaluation": "the function takes no statistics, so it has no evaluation mode",
    "running covariance": "it takes a running covariance, for which a kernel's signature has no place",
    "slow in the interpreter": "Triton's interpreter would take minutes",
    "no float64 on the device": "Metal has no float64",
    "refused": "the kernel refuses it: ",
    "missing inputs": "the kernel takes none of the inputs that these cases need",
    "compiled once": "the backward pass of torch.compile cannot be differentiated: ",
    "left out": "left out, since other dtypes were asked for",
    "nothing ran": "no case could run",
}
# Bug -> the evidence for it. Most bugs have `{first}` alone: the first failure that shows it.
EVIDENCE = {
    "the kernel raises an exception": "{alike} of {of} calls; {first}",
    "no second derivative": "in that case dx is right; {first}",
    "a wrong second derivative": "in that case dx is right; {first}",
    "one-pass variance, E[x^2] - E[x]^2": "relative errors by mean/deviation: {errors}; {message}",
    "less accurate than native": (
        "{alike} of {of} cases barely exceed their tolerance{by}; the worst, {tolerances:.2g} tolerances, is {first}. "
        "A sequential sum or variance can lose as much"
    ),
    "half-precision statistics": "every failure is in half precision; {first}",
    "NaN disappears": "a number where torch has NaN: {first}",
    "the activation's derivative at NaN is not torch's": (
        "torch takes 1 for relu, whose result is not <= 0, and the slope for leaky_relu, whose input is not > 0; "
        "{first}"
    ),
}


def not_checked_text(skipped: NotChecked | None) -> str | None:
    """Why no case of a group could run; None where some did."""
    if skipped is None:
        return None
    return NOT_CHECKED_REASONS[skipped.reason] + (finding_text(skipped.finding) if skipped.finding else "")


def failure_text(failure: CheckFailure) -> str:
    """What was found. A case with a hard input has several results: the worst one is named."""
    worst = f"{failure.finding.quantity}: " if failure.section == "hard inputs" and failure.call else ""
    return f"{worst}{finding_text(failure.finding)}"


def evidence_text(diagnosis: Diagnosis) -> str:
    """Why the failures look like the bug."""
    if diagnosis.summary:
        return _summary_text(diagnosis.summary)
    if match := diagnosis.match:
        return (
            f"{match.quantity} of {match.case} equals {match.equals} to {match.from_wrong:.1g} and differs from "
            f"the true one by {match.from_truth:.2g} (relative); the bug explains {match.alike} of {match.failing} "
            "failing results that were examined"
        )
    assert diagnosis.first
    errors = (diagnosis.relative_errors or {}).items()
    message, native = failure_text(diagnosis.first), diagnosis.of_native
    return EVIDENCE.get(diagnosis.bug, "{first}").format(
        first=f"{diagnosis.first.case}: {message}",
        message=message,
        alike=diagnosis.alike,
        of=diagnosis.of,
        errors=", ".join(f"{error:.2g} at {ratio}" for ratio, error in errors),
        by=f", up to {native:.2g} times native's error" if native is not None else "",
        tolerances=diagnosis.first.finding.error,
    )


def bug_lines(result: Gradcheck) -> list[str]:
    """The bugs that the failures look like."""
    return [f"{each.bug}, because {evidence_text(each)}" for each in result.diagnoses]


def _summary_text(summary: FailureSummary) -> str:
    """What fails and what does not."""
    parts = []
    if summary.quantities:
        clean = f" (clean: {_listed(summary.clean)})" if summary.clean else ""
        parts = [f"what fails: {_listed(summary.quantities)}{clean}"]
        parts.append(f"{summary.failing} of {summary.cases} plain cases")
        parts += map(_facet_text, summary.facets)
    if summary.groups:
        head = "what else fails" if summary.quantities else "every plain case passes; what fails"
        parts.append(f"{head}: {_listed(summary.groups)}")
    return "; ".join(parts)


def _facet_text(facet: Facet) -> str:
    if len(facet.failing) <= len(facet.clean):
        return f"only {facet.name} {_listed(facet.failing)}"
    return f"every {facet.name} except {_listed(facet.clean)}"


def _listed(names: Sequence[str]) -> str:
    more = len(names) - FEW
    return ", ".join(names) if more <= 0 else f"{', '.join(names[:FEW])} and {more} more"


def shell_lines(command: Sequence[str], width: int) -> list[str]:
    """The command in lines of at most `width` columns where its words allow it, with shell continuations."""
    lines = [""]
    for word in command:
        quoted = shlex.quote(word)
        if lines[-1] and len(lines[-1]) + 1 + len(quoted) > width - 2:
            lines.append("")
        lines[-1] += f"{' ' if lines[-1] else '  ' * (len(lines) > 1)}{quoted}"
    return [f"{line} \\" for line in lines[:-1]] + lines[-1:]


def reasons(groups: Sequence[CheckGroup]) -> list[str]:
    """Why groups could not run, each reason once."""
    found: dict[str, list[str]] = {}
    for group in groups:
        if group.skipped or not group.cases:
            found.setdefault(not_checked_text(group.skipped) or "no case ran", []).append(group.name)
    return [f"{'; '.join(names)}: {reason}" for reason, names in found.items()]


def counts(groups: Sequence[CheckGroup]) -> dict[str, int]:
    """How many cases there are and failed, and how many groups could not run."""
    cases, failed = sum(group.cases for group in groups), sum(group.failed for group in groups)
    return {"cases": cases, "failed": failed, "skipped_groups": [*map(verdict, groups)].count(NOT_CHECKED)}


def closing(result: Gradcheck) -> str:
    """The last line: how many cases passed, failed or could not run."""
    cases, failed, idle = counts(result.groups).values()
    left = f"; {count(idle, 'group')} not checked" if idle else ""
    if failed:
        return f"{failed:,} of {count(cases, 'case')} FAILED{left}."
    if wrong := beyond(result.paths):
        return f"{count(cases, 'case')} passed, but dL/dx is beyond its bound in {names(wrong)}{left}."
    if not cases:
        return f"Nothing was checked{left}."
    return f"All {count(cases, 'case')} passed{left}." if cases > 1 else f"1 case passed{left}."


def derivations(result: Gradcheck) -> list[str]:
    """How tolerances are derived, each rule once: all of a full check, else those of the groups that failed."""
    shown = [group for group in result.groups if group.failed or (result.effort == "full" and group.cases)]
    rules = dict.fromkeys(group.rule for group in shown if group.rule)
    return [f"{_whose(each, shown, result.groups)}: {TOLERANCES[each]}" for each in rules]


def _whose(rule: ToleranceRule, shown: Sequence[CheckGroup], groups: Sequence[CheckGroup]) -> str:
    """The groups with that rule, or their section where all of its groups have it."""
    members = [group for group in shown if group.rule == rule]
    section = [group for group in groups if group.section == members[0].section and group.cases]
    whole = members == section and len(members) > 1
    return f"all {section[0].section}" if whole else ", ".join(group.name for group in members)


def agreement(paths: Sequence[GradientPaths]) -> str:
    wrong = beyond(paths)
    if not wrong:
        return "It is within its bound in every case."
    direct = all(math.isclose(each.error, each.lost, rel_tol=1e-3) for each in wrong)
    place = "any case" if len(wrong) == len(paths) > 1 else names(wrong)
    loss = ", and its error is exactly that of ignoring those two paths" if direct else ""
    return f"It is NOT the true gradient in {place}{loss}."


def verdict(group: CheckGroup) -> str:
    return FAILED if group.failed else OK if group.cases else NOT_CHECKED


def beyond(paths: Sequence[GradientPaths]) -> list[GradientPaths]:
    return [each for each in paths if not each.passed]


def names(paths: Sequence[GradientPaths]) -> str:
    return ", ".join(each.case for each in paths)


def in_tolerances(error: float | None) -> str:
    """An error in units of its tolerance, to two decimals: 0.31, < 0.01, 1.2e+06."""
    if error is None or error == 0:
        return UNKNOWN if error is None else "0"
    if error < 0.01:
        return "< 0.01"
    return f"{error:.1e}" if LONGEST <= error < math.inf else f"{error:,.2f}"


# --- for the terminal and for pages -------------------------------------------------------------------------------


def to_latex(result: Gradcheck) -> str:
    """The table of the groups for a paper."""
    title, subtitle = heading(result)
    notes = [closing(result), subtitle, f"Made on {environment_words(result.environment)}."]
    return latex_text([(title, _export_columns(result))], notes)


def _export_columns(result: Gradcheck) -> list[Column]:
    return [Column("section", [group.section for group in result.groups], words=True), *group_columns(result.groups)]


def heading(result: Gradcheck) -> tuple[str, str]:
    """The title, and what ran and was checked."""
    dtypes = f", {', '.join(result.dtypes)} only" if result.dtypes else ""
    checked = f"{count(counts(result.groups)['cases'], 'case')} in {count(len(result.groups), 'group')}"
    title = f"Gradients of {result.norm} norm, kernel {result.kernel}"
    return title, (
        f"Ran: {result.ran}; on {result.environment.device}\n"
        f"Checked: {checked}, effort {result.effort}{dtypes}, in {figure(result.seconds)} s"
    )


def group_columns(groups: Sequence[CheckGroup]) -> list[Column]:
    return [
        Column("group", [group.name for group in groups], words=True),
        Column("cases", [figure(group.cases) if group.cases else UNKNOWN for group in groups]),
        Column("worst error\nin tolerances", [in_tolerances(group.worst) for group in groups]),
        Column("verdict", [_verdict_cell(group) for group in groups], words=True),
        Column("worst case", [group.worst_case or UNKNOWN for group in groups], words=True, optional=True),
    ]


def _verdict_cell(group: CheckGroup) -> Cell:
    found = verdict(group)
    return Cell(f"{group.failed:,} {FAILED}" if group.failed else found, style=STYLES[found])


def to_markdown(result: Gradcheck, commands: Commands) -> str:
    """The groups, the failures, the bugs that they look like, and what was not checked, for a GitHub page."""
    title, subtitle = heading(result)
    lines = [f"### {markdown(title)}", "", f"**{markdown(closing(result))}** {markdown(subtitle)}", ""]
    lines += [*markdown_table(_export_columns(result)), ""]
    failures = [
        f"{markdown(f'{failure.case}: {failure_text(failure)}')}\n  `{shlex.join(command)}`"
        for failure, command in zip(result.failures, commands, strict=True)
    ]
    lines += ["#### Failures", "", *(f"- {entry}" for entry in failures), ""] if failures else []
    for name, notes in (("Looks like", bug_lines(result)), ("Not checked", reasons(result.groups))):
        lines += markdown_section(name, (), (), notes)
    return "\n".join([*lines, *markdown_section("", [f"Made on {environment_words(result.environment)}."])])


# --- for other programs -----------------------------------------------------------------------------------------------


def to_csv(result: Gradcheck) -> str:
    """A line a group; errors in units of each case's tolerance."""
    rows = [{**to_plain(each), "skipped": not_checked_text(each.skipped)} for each in result.groups]
    return csv_text(rows, "section")


def to_junit(result: Gradcheck, commands: Commands) -> str:
    """A test for each group; the text of a failure has the first failing case and the command that runs it again."""
    cases = [_junit_case(group, result, commands) for group in result.groups]
    return junit_text(f"bncli.gradcheck.{result.kernel}", cases, result.environment.date)


def _junit_case(group: CheckGroup, result: Gradcheck, commands: Commands) -> JunitCase:
    passed = JunitCase(group.section, group.name, group.seconds)
    if not group.failed:
        reason = not_checked_text(group.skipped) or "no case ran"
        return passed if group.cases else passed._replace(outcome="skipped", text=reason)
    lines = [f"{group.failed:,} of {count(group.cases, 'case')} FAILED, by {in_tolerances(group.worst)} tolerances"]
    for failure, command in zip(result.failures, commands, strict=True):
        if (failure.section, failure.group) == (group.section, group.name):
            lines += [f"{failure.case}: {failure_text(failure)}", shlex.join(command)]
    return passed._replace(outcome="failure", text="\n".join(lines))


def to_json(result: Gradcheck, commands: Commands) -> str:
    """The whole result with sentences beside its fields."""
    failures = [
        {**to_plain(failure), "message": failure_text(failure), "reproduce": shlex.join(command)}
        for failure, command in zip(result.failures, commands, strict=True)
    ]
    diagnoses = [{**to_plain(diagnosis), "evidence": evidence_text(diagnosis)} for diagnosis in result.diagnoses]
    lists = {"groups": list(map(_group, result.groups)), "failures": failures, "diagnoses": diagnoses}
    return _versioned({"passed": result.passed, **counts(result.groups), **to_plain(result), **lists})


def interrupted_to_json(groups: Sequence[CheckGroup]) -> str:
    """The groups that were finished before the check was interrupted."""
    return _versioned({"interrupted": True, "groups": [_group(group) for group in groups]})


def _group(group: CheckGroup) -> dict[str, Any]:
    tolerance = TOLERANCES[group.rule] if group.rule else ""
    return {**to_plain(group), "tolerance": tolerance, "not_checked": not_checked_text(group.skipped)}


def demo_to_json(steps: Sequence[BiasStep]) -> str:
    return _versioned({"steps": list(map(to_plain, steps))})


def _versioned(plain: dict[str, Any]) -> str:
    return json_text({"format_version": FORMAT_VERSION, **plain})
