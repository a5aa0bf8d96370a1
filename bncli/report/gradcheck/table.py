"""Report of `bncli gradcheck` on the terminal, and the demonstration of the paper's section 2."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.text import Text

from bncli.names import NORMS
from bncli.report.gradcheck.text import (
    FAILED,
    NOT_CHECKED,
    OK,
    agreement,
    closing,
    derivations,
    evidence_text,
    failure_text,
    in_tolerances,
    reasons,
    shell_lines,
    verdict,
)
from bncli.report.table import AlignedTable, BulletList, Paragraph, ResponsiveTable, Row
from bncli.report.text import UNKNOWN, Cell, Column, count, encodable, environment_words, figure
from bncli.results.gradcheck import BiasStep, CheckFailure, CheckGroup, Gradcheck, GradientPaths

STYLES = {OK: "green", FAILED: "bold red", NOT_CHECKED: "yellow"}


# --- the report ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GradcheckReport:
    """Case groups, the gradient's three parts, the first failure and the likely bugs."""

    result: Gradcheck
    commands: Sequence[Sequence[str]]  # for each failure, the words of the command that runs it again

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        result = self.result
        yield groups_table(result.groups, *heading(result))
        yield BulletList("Not checked:", reasons(result.groups), "dim")
        tolerances = derivations(result)
        more = (
            ". How tolerances are derived:" if tolerances else " (a check with effort full explains how it is derived)."
        )
        yield Paragraph(f"Errors are in units of each case's tolerance: 1 or less passes{more}", "dim")
        yield BulletList("", tolerances, "dim")
        yield Paragraph(f"Made on {environment_words(result.environment)}.", "dim")
        yield ""
        if result.paths:
            yield paths_table(result.paths, result.norm)
            yield ""
        if result.failures:
            yield from _first_failure(result.failures[0], self.commands[0], options)
        if result.diagnoses:
            for each in result.diagnoses:
                yield Paragraph(f"{each.bug}, because {evidence_text(each)}", label="Looks like: ")
            yield ""
        yield Paragraph(closing(result), STYLES[OK] if result.passed else STYLES[FAILED])


def heading(result: Gradcheck) -> tuple[str, str]:
    cases = count(sum(group.cases for group in result.groups), "case")
    groups = count(len(result.groups), "group")
    title = f"Gradients of {result.norm} norm, kernel {result.kernel}"
    return title, (
        f"Ran: {result.ran}; on {result.environment.device}\n"
        f"Checked: {cases} in {groups}, effort {result.effort}, in {figure(result.seconds)} s"
    )


def _first_failure(failure: CheckFailure, command: Sequence[str], options: ConsoleOptions) -> Iterator[RenderableType]:
    """The first failing case with the command that runs it again."""
    yield Paragraph(failure.case, label="First failing case: ")
    yield Paragraph(failure_text(failure), indent=2)
    yield Paragraph("Run it again:", "bold")
    lines = shell_lines(command, options.max_width - 2)
    yield from (Text(encodable(f"  {line}", options.encoding)) for line in lines)
    yield ""


# --- tables -------------------------------------------------------------------------------------------------------


def groups_table(groups: Sequence[CheckGroup], title: str, subtitle: str = "") -> ResponsiveTable:
    """One row per case group, below its section: cases, worst error in units of the tolerance, verdict."""
    sections = [group.section for group in groups]
    groups = sorted(groups, key=lambda group: sections.index(group.section))
    columns = [
        Column("group", [group.name for group in groups], words=True),
        Column("cases", [figure(group.cases) if group.cases else UNKNOWN for group in groups]),
        Column("worst error\nin tolerances", [in_tolerances(group.worst) for group in groups]),
        Column("verdict", [_verdict_cell(group) for group in groups], words=True),
        Column("worst case", [group.worst_case or UNKNOWN for group in groups], words=True, optional=True),
    ]
    rows = [
        Row(heading=group.section if not index or groups[index - 1].section != group.section else "")
        for index, group in enumerate(groups)
    ]
    narrower = [AlignedTable(columns[:-1], rows), AlignedTable(columns[:-1], rows, wrap=True)]
    return ResponsiveTable(title, AlignedTable(columns, rows), narrower, subtitle)


def _verdict_cell(group: CheckGroup) -> Cell:
    found = verdict(group)
    return Cell(f"{group.failed:,} {FAILED}" if group.failed else found, style=STYLES[found])


def interrupted_table(groups: Sequence[CheckGroup], kernel: str) -> RenderableType:
    """The groups that were finished before the check was interrupted."""
    title = f"Gradients of kernel {kernel}: interrupted"
    if not groups:
        return Paragraph(f"{title} before a group of cases was finished", "bold")
    worst = [f"{group.name}: {group.worst_case or UNKNOWN}" for group in groups if group.failed]
    table = groups_table(groups, title, "The groups that were finished")
    lists = (("Not checked:", reasons(groups)), ("Worst cases:", worst))
    return Group(table, *(BulletList(heading, entries, "dim") for heading, entries in lists))


def paths_table(paths: Sequence[GradientPaths], norm: str = "batch") -> ResponsiveTable:
    """The three parts of dL/dx, the kernel's error with its bound, and what ignoring two parts loses, case by case."""
    spread = "covariance" if NORMS[norm].whitens else "variance"
    failed = ["" if each.passed else STYLES[FAILED] for each in paths]
    columns = [
        Column("case", [each.case for each in paths], words=True),
        Column("direct", [figure(each.direct) for each in paths]),
        Column("through\nmean", [figure(each.through_mean) for each in paths]),
        Column(f"through\n{spread}", [figure(each.through_variance) for each in paths]),
        Column("full", [figure(each.full) for each in paths]),
        Column("error", [Cell(f"{each.error:.1e}", style=style) for each, style in zip(paths, failed, strict=True)]),
        Column("its\nbound", [f"{each.bound:.1e}" for each in paths]),
        Column("error if\nignored", [f"{each.lost:.0%}" for each in paths], style="bold"),
    ]
    span = " to ".join(dict.fromkeys(f"{pick(each.lost for each in paths):.0%}" for pick in (min, max)))
    notes = [
        f"Each value also affects the others that share its mean and {spread}: a gradient that ignores those two "
        f"paths (only the direct part) differs from the true one by {span} of its norm.",
        f"Error: the kernel's dL/dx against float64 central differences of the loss, relative. {agreement(paths)}",
    ]
    narrower = [AlignedTable(columns, wrap=True)]
    return ResponsiveTable("dL/dx in its three parts (l2 norms)", AlignedTable(columns), narrower, notes=notes)


def demo_table(steps: Sequence[BiasStep]) -> ResponsiveTable:
    """The two descents of section 2, with E[x] held constant and with the full gradient."""
    columns = [
        Column("step", [figure(each.step) for each in steps]),
        Column("E[x] held constant\nbias b", [figure(each.bias_ignoring, 4) for each in steps]),
        Column("loss", [figure(each.loss_ignoring, 6) for each in steps]),
        Column("full gradient\nbias b", [figure(each.bias_full, 2) for each in steps]),
        Column("loss", [figure(each.loss_full, 6) for each in steps]),
    ]
    first, last = steps[0], steps[-1]
    before, after = (figure(each.loss_ignoring, 6) for each in (first, last))
    loss = f"stays at {after}" if before == after else f"goes from {before} to {after}"
    note = (
        f"Ignoring that E[x] contains b, {count(last.step, 'step')} drive b from {figure(first.bias_ignoring, 4)} to "
        f"{figure(last.bias_ignoring, 4)} while the loss {loss}: subtracting the mean removes b. "
        f"With the full gradient, which is zero but for rounding, b ends at {figure(last.bias_full, 2)}."
    )
    title = "A learned bias b, then the mean subtracted: xhat = u + b - E[u + b]"
    return ResponsiveTable(title, AlignedTable(columns), subtitle="Ioffe & Szegedy 2015, section 2", notes=[note])
