"""The report of `bncli profile` on a training step: how long it takes, where the time and the memory go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.padding import Padding
from rich.text import Text

from bncli.report.profile.kernels import NOTHING
from bncli.report.profile.text import (
    NATIVE,
    error_words,
    measured_words,
    memory_columns,
    norms_words,
    note_lines,
    quartiles,
    remark_words,
    share_columns,
    step_columns,
)
from bncli.report.table import AlignedTable, Bar, BulletList, Paragraph, ResponsiveTable, Row
from bncli.report.text import encodable, environment_words
from bncli.results.profile import STEP_CLASSES, NormRemark, StepCost, StepProfile

COLOURS = dict(zip(STEP_CLASSES, ("magenta", "cyan", "yellow", "green", "blue", "", "dim"), strict=True))
LETTERS = dict(zip(STEP_CLASSES, "NCAOD.-", strict=True))  # of a bar, so that it needs no colour


@dataclass(frozen=True)
class StepReport:
    """All that `bncli profile recipe.yaml` shows: steps, shares, memory, and what to change in the norm layers."""

    profile: StepProfile

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        profile, encoding = self.profile, options.encoding
        words = measured_words(profile.rows, profile.planned, profile.seconds)
        title = f"{profile.name}: one step of the whole model"
        if profile.rows:
            yield ResponsiveTable(title, _step_table(profile.rows), subtitle=words)
        else:
            yield from (Paragraph(title, "bold"), Paragraph(words, "dim"), "", NOTHING, "")
        shared = [row for row in profile.rows if row.shares_ms and row.error is None]
        if shared:
            lines = _lines(shared, messages=False)
            narrower = [AlignedTable(share_columns(shared), lines, short_headers=short) for short in (False, True)]
            yield ResponsiveTable("Share of a step", AlignedTable(share_columns(shared, ms=True), lines), narrower)
        split = [row for row in profile.rows if row.memory is not None]
        if split:
            table = AlignedTable(memory_columns(split), _lines(split, messages=False))
            yield ResponsiveTable("Memory of a training step", table)
        yield BulletList("Norm layers:", _norms(profile.rows))
        yield from _remarks(profile.remarks, encoding)
        yield BulletList("", note_lines(profile))
        for line in (f"Made on {environment_words(profile.environment)}.", *step_legend(profile)):
            yield Paragraph(line, "dim")


def step_legend(profile: StepProfile) -> list[str]:
    """How to read the tables of a step, in a few lines."""
    lines = ["ms/step: median of the samples, ± half the distance of their quartiles; evaluation: a forward pass."]
    if any(row.faster for row in profile.rows):
        lines.append(
            "Vs native: how many times faster than the same arm with the native kernel, the median of the rounds' "
            "ratios with its 95% interval; above 1 is faster."
        )
    if any(row.shares_ms for row in profile.rows):
        lines.append("Shares are from a profiled pass apart. Gaps: the device waits for the host.")
    if any(row.memory for row in profile.rows):
        lines.append(
            "Activations: tensors saved for backward. Peak: the whole process on a CPU, the allocator on a GPU."
        )
    return lines if profile.rows else []


def _lines(rows: Sequence[StepCost], messages: bool) -> list[Row]:
    arms = [row.arm for row in rows]
    return [
        Row(
            heading=row.arm if not index or arms[index - 1] != row.arm else "",
            style="dim" if row.kernel == NATIVE else "",
            message=(error_words(row) or "") if messages else "",
        )
        for index, row in enumerate(rows)
    ]


def _step_table(rows: Sequence[StepCost]) -> AlignedTable:
    bar = _bars(rows) if any(row.shares_ms for row in rows) else None
    return AlignedTable(step_columns(rows), _lines(rows, messages=True), bar=bar, key=_key(rows))


def _bars(rows: Sequence[StepCost]) -> Bar:
    """A step as a bar of its classes' letters; the longest step is as long as the room."""
    medians = [found.median if (found := quartiles(row.samples_ms)) else 0.0 for row in rows]
    longest = max(medians)

    def bar(index: int, room: int) -> Text:
        row, text, done = rows[index], Text(), 0.0
        whole = sum(row.shares_ms.values())
        if whole <= 0 or longest <= 0:
            return text
        each = room * medians[index] / longest / whole  # columns a millisecond
        for name in STEP_CLASSES:
            begin, done = round(done * each), done + row.shares_ms.get(name, 0.0)
            text.append(LETTERS[name] * (round(done * each) - begin), COLOURS[name])
        return text

    return bar


def _key(rows: Sequence[StepCost]) -> Text:
    """What a bar's letters stand for, of the classes that a step has."""
    key = Text("Bars: ", "dim")
    used = [name for name in STEP_CLASSES if any(row.shares_ms.get(name) for row in rows)]
    for index, name in enumerate(used):
        key.append("; " * bool(index))
        key.append(LETTERS[name], f"not dim {COLOURS[name]}".strip())
        key.append(f" {name}")
    return key


def _norms(rows: Sequence[StepCost]) -> list[str]:
    """What each arm's norm layers are with each kernel, said once for training and evaluation."""
    found = dict.fromkeys((row.arm, row.kernel or "", norms_words(row.norms)) for row in rows if row.norms)
    return [f"{', '.join(filter(None, (arm, kernel)))}: {words}" for arm, kernel, words in found]


def _remarks(remarks: Sequence[NormRemark], encoding: str) -> RenderResult:
    if not remarks:
        return
    yield ""
    yield Text("Norm layers: what to change", "bold")
    several = len({remark.arm for remark in remarks}) > 1
    for remark in remarks:
        words = remark_words(remark)
        where = f"{remark.arm}, {words.layer}" if several else words.layer
        yield Text.assemble((encodable(where, encoding), "bold yellow"), ": ", encodable(words.finding, encoding))
        yield Padding(Text(encodable(words.advice, encoding)), (0, 0, 0, 2), expand=False)
    yield ""
