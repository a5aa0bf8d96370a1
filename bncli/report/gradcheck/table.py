"""Report of `bncli gradcheck` on the terminal, and the demonstration of the paper's section 2."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.text import Text

from bncli.names import NORMS
from bncli.report.gradcheck import text
from bncli.report.table import AlignedTable, BulletList, Paragraph, ResponsiveTable, Row
from bncli.report.text import UNKNOWN, Cell, Column, count, encodable, environment_words, figure
from bncli.results.gradcheck import BiasStep, CheckFailure, CheckGroup, Gradcheck, GradientPaths

# --- the report ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GradcheckReport:
    """Case groups, the gradient's three parts, the first failure and the likely bugs."""

    result: Gradcheck
    commands: text.Commands

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        result = self.result
        yield groups_table(result.groups, *text.heading(result))
        yield BulletList("Not checked:", text.reasons(result.groups), "dim")
        tolerances = text.derivations(result)
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
            yield from (Paragraph(line, label="Looks like: ") for line in text.bug_lines(result))
            yield ""
        yield Paragraph(text.closing(result), text.STYLES[text.OK] if result.passed else text.STYLES[text.FAILED])


def _first_failure(failure: CheckFailure, command: Sequence[str], options: ConsoleOptions) -> Iterator[RenderableType]:
    """The first failing case with the command that runs it again."""
    yield Paragraph(failure.case, label="First failing case: ")
    yield Paragraph(text.failure_text(failure), indent=2)
    yield Paragraph("Run it again:", "bold")
    lines = text.shell_lines(command, options.max_width - 2)
    yield from (Text(encodable(f"  {line}", options.encoding)) for line in lines)
    yield ""


# --- tables -------------------------------------------------------------------------------------------------------


def groups_table(groups: Sequence[CheckGroup], title: str, subtitle: str = "") -> ResponsiveTable:
    """One row per case group, below its section: cases, worst error in units of the tolerance, verdict."""
    sections = [group.section for group in groups]
    groups = sorted(groups, key=lambda group: sections.index(group.section))
    columns = text.group_columns(groups)
    rows = [
        Row(heading=group.section if not index or groups[index - 1].section != group.section else "")
        for index, group in enumerate(groups)
    ]
    narrower = [AlignedTable(columns[:-1], rows), AlignedTable(columns[:-1], rows, wrap=True)]
    return ResponsiveTable(title, AlignedTable(columns, rows), narrower, subtitle)


def interrupted_table(groups: Sequence[CheckGroup], kernel: str) -> RenderableType:
    """The groups that were finished before the check was interrupted."""
    title = f"Gradients of kernel {kernel}: interrupted"
    if not groups:
        return Paragraph(f"{title} before a group of cases was finished", "bold")
    worst = [f"{group.name}: {group.worst_case or UNKNOWN}" for group in groups if group.failed]
    table = groups_table(groups, title, "The groups that were finished")
    lists = (("Not checked:", text.reasons(groups)), ("Worst cases:", worst))
    return Group(table, *(BulletList(*each, "dim") for each in lists))


def paths_table(paths: Sequence[GradientPaths], norm: str = "batch") -> ResponsiveTable:
    """The three parts of dL/dx, the kernel's error with its bound, and what ignoring two parts loses, case by case."""
    spread = "covariance" if NORMS[norm].whitens else "variance"
    failed = ["" if each.passed else text.STYLES[text.FAILED] for each in paths]
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
        f"Error: the kernel's dL/dx against float64 central differences of the loss, relative. {text.agreement(paths)}",
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
