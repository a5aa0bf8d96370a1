"""Report of a profile's comparison with a baseline: each row's slowdown, rows of one side alone, the exit code."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from bncli.report.profile.text import gate_columns
from bncli.report.table import Dashed, Fitted, Layout, Line, Listing, Ruled
from bncli.report.text import encodable
from bncli.results.profile import Change, Gate, KernelProfile, Profile

STYLES = {"ok": "green", "regressed": "bold red", "cannot tell": "yellow"}
NARROWER = "More rounds narrow the intervals: give this run and the baseline more time or more rounds."


@dataclass(frozen=True)
class GateReport:
    """What a comparison with a baseline shows. With both profiles it also says how their machines and caches differ."""

    gate: Gate
    now: Profile | None = None
    baseline: Profile | None = None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        gate = self.gate
        fails = f"times native in each one's own run; more than {gate.fail_above:g} times slower fails"
        yield Fitted("Held to the baseline", fails, _layouts(gate.changes), ())
        yield Dashed("Not in the baseline:", [str(row) for row in gate.only_now])
        yield Dashed("In the baseline, but without a ratio now:", [str(row) for row in gate.only_baseline])
        if self.now and self.baseline:
            for words in differences(self.now, self.baseline):
                yield Text(encodable(words, options.encoding), "dim")
        verdict = "regressed" if gate.failed else "ok"
        yield Text(encodable(closing(gate), options.encoding), STYLES[verdict])


def closing(gate: Gate) -> str:
    """The last line: how many rows have which verdict, and the exit code that follows."""
    verdicts = [change.verdict for change in gate.changes]
    if gate.disturbed:
        where = " and in ".join(gate.disturbed)
        return (
            f"Other programs used the cores in {where}: no row is called regressed. Measure again on idle cores "
            f"(exit {int(gate.failed)})."
        )
    counts = ", ".join(f"{verdicts.count(word):,} {word}" for word in STYLES if word in verdicts)
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


def _layouts(changes: Sequence[Change]) -> list[Layout]:
    headings = [change.row.words[0] for change in changes]
    order = sorted(range(len(changes)), key=lambda index: headings.index(headings[index]))
    shown = [changes[index] for index in order]
    names = [headings[index] for index in order]
    lines = [Line(heading=name if not i or names[i - 1] != name else "") for i, name in enumerate(names)]
    columns = gate_columns(shown)
    narrow = [
        replace(column, cells=tuple((main, "") for main, _ in column.cells)) if index in (1, 2) else column
        for index, column in enumerate(columns)
    ]
    styles = {(row, 4): STYLES[change.verdict] for row, change in enumerate(shown)}
    styles |= {(row, 3): "bold" for row in range(len(shown))}
    return [
        lambda encoding: Ruled(columns, lines, encoding, styles),
        lambda encoding: Ruled(narrow, lines, encoding, styles),
        lambda encoding: Listing(columns, lines, encoding),
    ]
