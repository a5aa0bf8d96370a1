"""Report of a profile's comparison with a baseline: each row's slowdown, rows of one side alone, the exit code."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from rich.console import Console, ConsoleOptions, RenderResult

from bncli.report.profile.text import VERDICT_STYLES, gate_columns
from bncli.report.table import AlignedTable, BulletList, Paragraph, ResponsiveTable, Row
from bncli.results.profile import Change, Gate, KernelProfile, Profile

NARROWER = "More rounds narrow the intervals: give this run and the baseline more time or more rounds."


@dataclass(frozen=True)
class GateReport:
    """What a comparison with a baseline shows. With both profiles it also says how their machines and caches differ."""

    gate: Gate
    now: Profile | None = None
    baseline: Profile | None = None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        gate = self.gate
        fails = f"speedup over native, each within its own run; a slowdown above {gate.fail_above:g} fails"
        table, *narrower = _tables(gate.changes)
        yield ResponsiveTable("Compared with the baseline", table, narrower, fails)
        yield BulletList("Not in the baseline:", [str(row) for row in gate.only_now])
        yield BulletList("In the baseline, but without a ratio now:", [str(row) for row in gate.only_baseline])
        if self.now and self.baseline:
            yield from (Paragraph(words, "dim") for words in differences(self.now, self.baseline))
        yield Paragraph(closing(gate), VERDICT_STYLES["regressed" if gate.failed else "ok"])


def closing(gate: Gate) -> str:
    """The last line: how many rows have which verdict, and the exit code that follows."""
    verdicts = [change.verdict for change in gate.changes]
    if gate.disturbed:
        where = " and in ".join(gate.disturbed)
        return (
            f"Other programs used the cores in {where}: no row is called regressed. Measure again on idle cores "
            f"(exit {int(gate.failed)})."
        )
    counts = ", ".join(f"{verdicts.count(word):,} {word}" for word in VERDICT_STYLES if word in verdicts)
    if gate.regressed:
        return f"{counts}: FAILED, more than {gate.fail_above:g} times slower by the whole interval (exit 1)."
    if gate.failed:
        return f"{counts}: FAILED, {gate.undecided:,} of the baseline's rows are undecided (strict, exit 1). {NARROWER}"
    unsure = f" What it cannot tell fails a strict comparison only. {NARROWER}" * ("cannot tell" in verdicts)
    return f"{counts}: passed (exit 0).{unsure}"


def differences(now: Profile, baseline: Profile) -> Iterator[str]:
    """What differs between the two runs that ratios to native do not wholly take out."""
    mine, theirs = now.environment, baseline.environment
    for what, here, there in (
        ("device", mine.device, theirs.device),
        ("processor", mine.processor, theirs.processor),
        ("torch", mine.torch, theirs.torch),
        ("threads", mine.threads, theirs.threads),
    ):
        if here != there:
            yield f"Another {what} than the baseline's: {here} now, {there} then; only ratios to native are compared."
    if isinstance(now, KernelProfile) and isinstance(baseline, KernelProfile) and now.cold != baseline.cold:
        states = [("warm", "cold")[each.cold] for each in (now, baseline)]
        yield f"Another cache than the baseline's: {states[0]} now, {states[1]} then; measure both alike."


def _tables(changes: Sequence[Change]) -> list[AlignedTable]:
    headings = [change.row.words[0] for change in changes]
    order = sorted(range(len(changes)), key=lambda index: headings.index(headings[index]))
    names = [headings[index] for index in order]
    rows = [Row(heading=name if not i or names[i - 1] != name else "") for i, name in enumerate(names)]
    columns = gate_columns([changes[index] for index in order])
    narrow = [
        replace(column, values=[cell.main for cell in column.cells]) if column.header in ("now", "baseline") else column
        for column in columns
    ]
    return [AlignedTable(columns, rows), AlignedTable(narrow, rows)]
