"""The outcome of `bncli gradcheck` on the screen and as JSON, and its progress."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.padding import Padding
from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from bncli.report.gradcheck.tables import (
    FAILED,
    NOT_CHECKED,
    OK,
    STYLES,
    Listed,
    beyond,
    count,
    groups_table,
    names,
    paths_table,
    reasons,
    verdict,
)
from bncli.report.progress import _Sink
from bncli.report.text import encodable, environment_words, figure
from bncli.results.environment import FORMAT_VERSION
from bncli.results.gradcheck import BiasStep, CheckGroup, Gradcheck
from bncli.results.serialize import to_plain


def passed(result: Gradcheck) -> bool:
    """Whether no case failed and every gradient is within its bound of central differences."""
    return result.passed and not beyond(result.paths)


# --- the report ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GradcheckReport:
    """All that `bncli gradcheck` shows: groups, the gradient's three parts, what failed and what it looks like."""

    result: Gradcheck

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        result = self.result
        yield groups_table(result.groups, *_heading(result))
        yield Listed("Not checked:", reasons(result.groups))
        tolerances = _tolerances(result)
        more = ". How tolerances are derived:" if tolerances else " (--full tells how it is derived)."
        yield Text(f"Each error is in units of its case's own tolerance: 1 or less passes{more}", "dim")
        yield Listed("", tolerances)
        yield Text(encodable(f"Made on {environment_words(result.environment)}.", options.encoding), "dim")
        yield ""
        if result.paths:
            yield paths_table(result.paths)
            yield ""
        for label, words, indent in _failure_lines(result, options.max_width):
            text = Text.assemble((label, "bold"), encodable(words, options.encoding))
            yield Padding(text, (0, 0, 0, indent), expand=False) if indent else text
        yield Text(encodable(closing(result), options.encoding), STYLES[OK] if passed(result) else STYLES[FAILED])


def closing(result: Gradcheck) -> str:
    """The last line: how many cases passed, failed or could not run."""
    cases, failed = sum(group.cases for group in result.groups), sum(group.failed for group in result.groups)
    idle = [group for group in result.groups if verdict(group) == NOT_CHECKED]
    left = f"; {count(len(idle), 'group')} not checked" if idle else ""
    if failed:
        return f"{failed:,} of {count(cases, 'case')} FAILED{left}."
    if wrong := beyond(result.paths):
        return f"{count(cases, 'case')} passed, but dL/dx is beyond its bound in {names(wrong)}{left}."
    if not cases:
        return f"Nothing was checked{left}."
    return f"All {count(cases, 'case')} passed{left}." if cases > 1 else f"1 case passed{left}."


def _heading(result: Gradcheck) -> tuple[str, str]:
    cases = count(sum(group.cases for group in result.groups), "case")
    groups = count(len(result.groups), "group")
    title = f"Gradients of {result.norm} norm, kernel {result.kernel}"
    return title, (
        f"Ran: {result.ran}; on {result.environment.device}\n"
        f"Checked: {cases} in {groups}, effort {result.effort}, in {figure(result.seconds)} s"
    )


def _tolerances(result: Gradcheck) -> list[tuple[str, str]]:
    """In words, each derivation once: all of them for a full check, those of the groups that failed otherwise."""
    shown = [group for group in result.groups if group.failed or (result.effort == "full" and group.cases)]
    words = dict.fromkeys(group.tolerance for group in shown if group.tolerance)
    return [(_whose(each, shown, result.groups), each) for each in words]


def _whose(tolerance: str, shown: Sequence[CheckGroup], groups: Sequence[CheckGroup]) -> str:
    """The names of the groups with that tolerance, or their section's, where it is the whole of one."""
    members = [group for group in shown if group.tolerance == tolerance]
    section = [group for group in groups if group.section == members[0].section and group.cases]
    whole = members == section and len(members) > 1
    return f"all {section[0].section}" if whole else ", ".join(group.name for group in members)


def _failure_lines(result: Gradcheck, width: int) -> Iterator[tuple[str, str, int]]:
    """The first failing case with the command that runs it again, then the kinds of bug that the failures look like.

    Each line as its label, the words after it and its indent.
    """
    for first in result.failures[:1]:
        yield "First failing case: ", first.case, 0
        yield "", first.message, 2
        yield "Run it again:", "", 0
        yield from (("", line, 2) for line in shell_lines(first.reproduce, width - 2))
        yield "", "", 0
    for each in result.diagnoses:
        yield "Looks like: ", f"{each.bug}, because {each.evidence}", 0
    if result.diagnoses:
        yield "", "", 0


def shell_lines(command: str, width: int) -> list[str]:
    """The command in lines no wider than `width` where its words allow, continued as a shell takes them."""
    lines = [""]
    for word in shlex.split(command):
        quoted = shlex.quote(word)
        if lines[-1] and len(lines[-1]) + 1 + len(quoted) > width - 2:
            lines.append("")
        lines[-1] += f"{' ' if lines[-1] else '  ' * (len(lines) > 1)}{quoted}"
    return [f"{line} \\" for line in lines[:-1]] + lines[-1:]


# --- JSON ---------------------------------------------------------------------------------------------------------


def to_json(result: Gradcheck) -> str:
    return _to_text({"passed": passed(result), **to_plain(result)})


def interrupted_to_json(groups: Sequence[CheckGroup]) -> str:
    """The groups that were finished before the check was interrupted."""
    return _to_text({"interrupted": True, "groups": [to_plain(group) for group in groups]})


def demo_to_json(steps: Sequence[BiasStep]) -> str:
    return _to_text({"steps": [to_plain(step) for step in steps]})


def _to_text(plain: dict[str, Any]) -> str:
    return json.dumps({"format_version": FORMAT_VERSION, **plain}, allow_nan=False, indent=1) + "\n"


# --- progress -----------------------------------------------------------------------------------------------------


class GradcheckProgress(_Sink):
    """How many cases are done, the last group, and the time; off a terminal a line now and then."""

    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())

    def __enter__(self) -> GradcheckProgress:
        super().__enter__()
        self.groups, self.cases, self.failed = 0, 0, 0
        self.task = self.bar.add_task("checking", total=None)
        return self

    def __call__(self, group: CheckGroup) -> None:
        self.groups, self.cases, self.failed = self.groups + 1, self.cases + group.cases, self.failed + group.failed
        failed = f", {self.failed:,} failed" if self.failed else ""
        text = f"{count(self.cases, 'case')} in {count(self.groups, 'group')}{failed}; last: {group.name}"
        self.bar.update(self.task, description=text)
        self.line(f"gradcheck: {text}", at_once=bool(group.failed))
