"""Report of `bncli profile` on a training step: how long it takes, where time and memory go, norm-layer diagnostics."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from bncli.report.profile import text
from bncli.report.profile.kernels import table_rows
from bncli.report.table import AlignedTable, Bar, BulletList, Paragraph, ResponsiveTable, Row
from bncli.report.text import UNKNOWN, Cell, Column, environment_words, figure
from bncli.results.profile import FOLDED, STEP_CLASSES, NormRemark, StepCost, StepProfile

COLOURS = dict(zip(STEP_CLASSES, ("magenta", "cyan", "yellow", "red", "green", "blue", "", "dim"), strict=True))
LETTERS = dict(zip(STEP_CLASSES, "NCALOD.-", strict=True))  # of a bar, so that it needs no colour
SHORT = {
    "normalization": "normal-\nization",
    "convolution, linear": "conv,\nlinear",
    "activation": "acti-\nvation",
    "optimizer": "opti-\nmizer",
}


@dataclass(frozen=True)
class StepReport:
    """All that `bncli profile recipe.yaml` shows: steps, shares, memory, and what to change in the norm layers."""

    profile: StepProfile

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        profile, rows = self.profile, self.profile.rows
        yield from step_tables(profile)
        yield BulletList("Norm layers:", norm_lines(rows))
        yield from _remarks(profile.remarks)
        yield BulletList("", text.note_lines(profile))
        made = f"Made on {environment_words(profile.environment)}."
        yield from (Paragraph(line, "dim") for line in (made, *legend(rows)))


def step_tables(profile: StepProfile) -> Iterator[ResponsiveTable]:
    """How long a step takes, the share of each class of work, and its memory."""
    rows = [row for members in _arms(profile.rows).values() for row in members]
    bar = _bars(rows) if any(row.shares_ms for row in rows) else None
    table = AlignedTable(step_columns(rows), _lines(rows, messages=True), bar=bar, key=_key(rows))
    yield ResponsiveTable(f"{profile.name}: one step of the whole model", table, subtitle=text.measured_words(profile))
    if shared := [row for row in rows if row.shares_ms and row.error is None]:
        table = AlignedTable(share_columns(shared), _lines(shared))
        plain = replace(table, columns=[text.without_asides(column) for column in table.columns])
        short = replace(plain, short_headers=True)
        least = replace(short, columns=[column for column in short.columns if not column.optional])
        yield ResponsiveTable("Share of a step", table, [plain, short, least])
    if split := [row for row in rows if row.memory is not None]:
        table = AlignedTable(memory_columns(split), _lines(split))
        yield ResponsiveTable("Memory of a training step", table, [replace(table, short_headers=True)])


def legend(rows: Sequence[StepCost]) -> list[str]:
    """How to read the tables of a step, in a few lines."""
    lines = [f"ms/step: {text.MEDIAN}; in evaluation, of a forward pass."] * bool(rows)
    if any(row.faster for row in rows):
        lines.append(text.speedup_legend("the same arm with the native kernel"))
    if any(row.kernel == FOLDED for row in rows):
        lines.append("folded: evaluation after bncli.fold made the batch norms part of the layers before them.")
    if any(row.shares_ms for row in rows):
        lines.append("Share of a step: from a separate profiled pass. gaps: the device waits for the host.")
        lines.append("other: what is in no class, such as additions, pooling, reshaping and the summing of gradients.")
    if any(row.shares_ms and layers.kind == "Whitening" for row in rows for layers in row.norms):
        lines.append("Of a norm that whitens, matrix products count as linear and its other operators as other.")
    if any(row.memory for row in rows):
        lines.append("activations: saved for backward. peak: of the whole process on a CPU, of the allocator on a GPU.")
    return lines


def norm_lines(rows: Sequence[StepCost]) -> list[str]:
    """What each arm's norm layers are with each kernel, said once for training and evaluation."""
    found = dict.fromkeys((row.arm, row.kernel or "", text.norms_words(row.norms)) for row in rows if row.norms)
    return [f"{', '.join(filter(None, (arm, kernel)))}: {words}" for arm, kernel, words in found]


def _remarks(remarks: Sequence[NormRemark]) -> RenderResult:
    if not remarks:
        return
    yield from ("", Paragraph("Norm layers: what to change", "bold"))
    several = len({remark.arm for remark in remarks}) > 1
    for remark in remarks:
        layer, finding, advice = text.remark_words(remark)
        yield Paragraph(f"{f'{remark.arm}, ' * several}{layer}: {finding}", "yellow")
        yield BulletList("", [advice])
    yield ""


# --- tables -------------------------------------------------------------------------------------------------------


def step_columns(rows: Sequence[StepCost]) -> list[Column]:
    """A row an arm, mode and kernel: how long a step takes."""
    return [
        *_step_names(rows),
        Column("ms/step", [text.samples_cell(row.samples_ms, row.cores_lacked) for row in rows]),
        Column("samples/s", [figure(text.samples_per_s(row)) for row in rows]),
        Column(text.VS_NATIVE, [text.speedup_cell(row.faster, row.kernel, row.cores_lacked) for row in rows]),
    ]


def share_columns(rows: Sequence[StepCost]) -> list[Column]:
    """The same rows: the share of each class of work in a step, and its milliseconds."""

    def cell(row: StepCost, name: str) -> Cell:
        value, whole = row.shares_ms.get(name), sum(row.shares_ms.values())
        if value is None or whole <= 0:
            return Cell(UNKNOWN)
        return Cell(text.percent(value / whole), f"{figure(value, 2 if value < 10 else 3)} ms" if value else "")

    shares = [
        Column(
            header=name.replace(" ", "\n", 1),
            values=[cell(row, name) for row in rows],
            short=SHORT.get(name, ""),
            optional=name in ("loss", "data", "other"),
        )
        for name in STEP_CLASSES
    ]
    return [*_step_names(rows), *shares]


def memory_columns(rows: Sequence[StepCost]) -> list[Column]:
    """The rows that have them: parts of the peak of a step, in MiB or KiB."""
    parts = {"parameters": "params", "gradients": "grads", "optimizer": "optim", "activations": "activ", "peak": "peak"}
    columns = [
        text.memory_column(name, [getattr(row.memory, f"{name}_mib", None) for row in rows], short)
        for name, short in parts.items()
    ]
    return [*_step_names(rows), *columns]


def _step_names(rows: Sequence[StepCost]) -> list[Column]:
    return [
        Column("mode", [row.mode for row in rows], words=True, once=True),
        Column("kernel", [row.kernel or UNKNOWN for row in rows], words=True),
    ]


def _lines(rows: Sequence[StepCost], messages: bool = False) -> list[Row]:
    """messages: with the errors, each once an arm."""
    errors = {id(row): (row.arm, text.error_words(row) or "") for row in rows if messages}
    first = {error: key for key, error in reversed(errors.items())}
    shown = {key: error[1] and (error[1] if first[error] == key else "the same error") for key, error in errors.items()}
    return table_rows(_arms(rows), lambda row: shown.get(id(row), ""))


def _arms(rows: Sequence[StepCost]) -> dict[str, list[StepCost]]:
    return text.grouped(rows, lambda row: row.arm, lambda row: row.mode)


def _bars(rows: Sequence[StepCost]) -> Bar:
    """A step as a bar of its classes' letters; the longest step takes the whole width."""
    medians = [found.median if (found := text.quartiles(row.samples_ms)) else 0.0 for row in rows]
    longest = max(medians)

    def bar(index: int, width: int) -> Text:
        row, drawn, done = rows[index], Text(), 0.0
        whole = sum(row.shares_ms.values())
        if whole <= 0 or longest <= 0:
            return drawn
        each = width * medians[index] / longest / whole  # characters for each millisecond
        for name in STEP_CLASSES:
            begin, done = round(done * each), done + row.shares_ms.get(name, 0.0)
            drawn.append(LETTERS[name] * (round(done * each) - begin), COLOURS[name])
        return drawn

    return bar


def _key(rows: Sequence[StepCost]) -> Text:
    """What a bar's letters stand for, of the classes that a step has."""
    used = [name for name in STEP_CLASSES if any(row.shares_ms.get(name) for row in rows)]
    names = [Text.assemble((LETTERS[name], f"not dim {COLOURS[name]}".strip()), f" {name}") for name in used]
    return Text("Bars: ", "dim").append_text(Text("; ").join(names))
