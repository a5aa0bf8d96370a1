"""Report of a profile's comparison with a baseline: each row's slowdown, rows of one side alone, the exit code."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult

from bncli.report.export import JunitCase, Outcome, junit_text
from bncli.report.profile.text import error_words, grouped, ratio_cell, without_asides
from bncli.report.table import AlignedTable, BulletList, Paragraph, ResponsiveTable, Row
from bncli.report.text import Cell, Column
from bncli.results.profile import Change, Gate, KernelProfile, Profile, Speedup

STYLES = {"ok": "green", "regressed": "bold red", "cannot tell": "yellow"}
NARROWER = "For narrower intervals measure this run and the baseline for longer, or with more rounds."


@dataclass(frozen=True)
class GateReport:
    """What a comparison with a baseline shows. With both profiles it also says how their machines and caches differ."""

    gate: Gate
    now: Profile | None = None
    baseline: Profile | None = None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        gate = self.gate
        yield gate_table(gate)
        yield BulletList("Not in the baseline:", [str(row) for row in gate.only_now])
        yield BulletList("In the baseline, but without a speedup now:", [str(row) for row in gate.only_baseline])
        if self.now and self.baseline:
            yield from (Paragraph(words, "dim") for words in _differences(self.now, self.baseline))
        yield Paragraph(closing(gate), STYLES["regressed" if gate.failed else "ok"])


def gate_table(gate: Gate) -> ResponsiveTable:
    table, *narrower = _tables(gate.changes)
    return ResponsiveTable("Comparison with the baseline", table, narrower, gate_words(gate))


def gate_words(gate: Gate) -> str:
    return f"speedup over native, each measured within its own run; a slowdown above {gate.fail_above:g}x fails"


def gate_columns(changes: Sequence[Change]) -> list[Column]:
    """A row a change: its speedup over native now and then, and the slowdown."""
    slowdowns = [ratio_cell(Speedup(change.slower, change.interval)) for change in changes]
    verdicts = [Cell(change.verdict, style=STYLES[change.verdict]) for change in changes]
    return [
        Column("", [", ".join(change.row.words[1:]) for change in changes], words=True),
        Column("now", [ratio_cell(change.now) for change in changes], optional=True),
        Column("baseline", [ratio_cell(change.baseline) for change in changes], optional=True),
        Column("slowdown", slowdowns, style="bold"),
        Column("verdict", verdicts, words=True),
    ]


def _tables(changes: Sequence[Change]) -> Iterator[AlignedTable]:
    """From the widest to the narrowest."""
    groups = grouped(changes, lambda change: change.row.words[0], lambda change: None)
    rows = [Row(name * (not place)) for name, members in groups.items() for place, _ in enumerate(members)]
    columns = gate_columns([change for members in groups.values() for change in members])
    yield AlignedTable(columns, rows)
    yield AlignedTable([without_asides(column) if column.optional else column for column in columns], rows)
    yield AlignedTable([column for column in columns if not column.optional], rows)


def to_junit(result: Profile, gate: Gate) -> str:
    """A test for each row: a regression fails, a wrong result is an error; strict, what it cannot tell fails."""
    found: dict[Any, tuple[str, str]] = {change.row: (change.verdict, _words(change)) for change in gate.changes}
    found |= dict.fromkeys(gate.only_baseline, ("cannot tell", "in the baseline, but without a speedup now"))
    found |= {row.key: ("wrong", error_words(row) or "") for row in result.rows if row.wrong}
    outcomes: dict[str, Outcome] = {
        "regressed": "failure",
        "cannot tell": "failure" if gate.strict else "passed",
        "wrong": "error",
    }
    cases = [
        JunitCase(row.words[0], ", ".join(row.words[1:]), 0.0, outcomes.get(verdict, "passed"), words)
        for row, (verdict, words) in found.items()
    ]
    return junit_text("bncli.profile", cases, result.environment.date)


def _words(change: Change) -> str:
    now, before, slowdown, verdict = (column.cells[0].line for column in gate_columns([change])[1:])
    return f"{verdict}: {slowdown} slower than in the baseline; speedup over native {now}, in the baseline {before}"


def closing(gate: Gate) -> str:
    """The last line: how many rows have which verdict, and the exit code that follows."""
    verdicts = [change.verdict for change in gate.changes]
    where = " and in ".join(gate.disturbed)
    busy = f"Other programs used the cores in {where}: no row measured then is called regressed, measure it again. "
    counts = ", ".join(f"{verdicts.count(word):,} {word}" for word in STYLES if word in verdicts)
    counts = busy * bool(where) + counts
    if gate.regressed:
        return f"{counts}: FAILED, the whole interval of a slowdown is above {gate.fail_above:g}x (exit 1)."
    if gate.failed:
        return f"{counts}: FAILED, {gate.undecided:,} of the baseline's rows are undecided (strict, exit 1). {NARROWER}"
    undecided = f" Undecided rows fail a strict comparison only. {NARROWER}" * ("cannot tell" in verdicts)
    return f"{counts}: passed (exit 0).{undecided}"


def _differences(now: Profile, baseline: Profile) -> Iterator[str]:
    """What differs between the two runs that speedups over native do not wholly take out."""
    for what in ("device", "processor", "torch", "threads", "freed_memory"):
        here, there = (getattr(profile.environment, what) or "not recorded" for profile in (now, baseline))
        if here != there:
            differ = f"Different {what.replace('_', ' ')}: {here} now, {there} in the baseline"
            yield f"{differ}; only speedups over native are compared."
    if isinstance(now, KernelProfile) and isinstance(baseline, KernelProfile) and now.cold != baseline.cold:
        here, there = (("warm", "cold")[profile.cold] for profile in (now, baseline))
        yield f"Different cache: {here} now, {there} in the baseline; measure both with the same."
