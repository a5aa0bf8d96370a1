"""What a training step's profile says, as the cells that its tables and Markdown share. No rich here."""

from __future__ import annotations

from collections.abc import Sequence

from bncli.report.profile.text import NATIVE, faster_cell, memory_column, percent, quartiles, samples_cell
from bncli.report.text import UNKNOWN, Cell, Column, figure
from bncli.results.profile import STEP_CLASSES, StepCost

BROKEN = {"normalization": ("normal-", "ization"), "activation": ("acti-", "vation"), "optimizer": ("opti-", "mizer")}


def samples_per_s(row: StepCost) -> float | None:
    found = quartiles(row.samples_ms)
    return 1e3 * row.batch_size / found.median if found and found.median else None


def step_columns(rows: Sequence[StepCost]) -> list[Column]:
    """A row an arm, mode and kernel: how long a step takes."""
    return [
        *_step_names(rows),
        Column(("ms/step", ""), tuple(samples_cell(row.samples_ms) for row in rows)),
        Column(("samples/s", ""), tuple((figure(samples_per_s(row)), "") for row in rows)),
        Column((f"times {NATIVE}", ""), tuple(faster_cell(row.faster, row.kernel) for row in rows)),
    ]


def share_columns(rows: Sequence[StepCost], *, ms: bool = False, short: bool = False) -> list[Column]:
    """The same rows: the share of each class of work in a step, with its milliseconds or under broken headers."""

    def cell(row: StepCost, name: str) -> Cell:
        value, whole = row.shares_ms.get(name), sum(row.shares_ms.values())
        if value is None or whole <= 0:
            return UNKNOWN, ""
        return percent(value / whole), f"{figure(value, 2 if value < 10 else 3)} ms" if ms and value else ""

    def header(name: str) -> Cell:
        first, _, second = name.partition(" ")
        return BROKEN.get(name, (first, second)) if short else (first, second)

    shares = [Column(header(name), tuple(cell(row, name) for row in rows)) for name in STEP_CLASSES]
    return [*_step_names(rows), *shares]


def memory_columns(rows: Sequence[StepCost]) -> list[Column]:
    """The rows that have them: parts of the peak of a step, in MiB or KiB."""
    parts = [row.memory for row in rows]
    fields = ("parameters", "gradients", "optimizer", "activations", "peak")
    return [
        *_step_names(rows),
        *(memory_column(name, [getattr(part, f"{name}_mib", None) for part in parts]) for name in fields),
    ]


def _step_names(rows: Sequence[StepCost]) -> list[Column]:
    return [
        Column(("mode", ""), tuple((row.mode, "") for row in rows), words=True),
        Column(("kernel", ""), tuple((row.kernel or UNKNOWN, "") for row in rows), words=True),
    ]
