"""Words and figures of a profile: the cells that its tables, Markdown and CSV share. No rich here."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from bncli.report.text import UNKNOWN, Cell, Column, figure, interval_figure
from bncli.results.profile import (
    STEP_CLASSES,
    Case,
    Ceilings,
    Change,
    KernelCost,
    KernelMean,
    KernelProfile,
    Speedup,
    StepCost,
    Times,
)

NATIVE = "native"
MIB = 2**20


@dataclass(frozen=True)
class Quartiles:
    low: float
    median: float
    high: float

    @property
    def spread(self) -> float:
        """Half the distance of the quartiles, as a share of the median."""
        return (self.high - self.low) / 2 / self.median if self.median else 0.0


def quartiles(samples: Sequence[float]) -> Quartiles | None:
    """None of no samples; a single one stands for all three."""
    if len(samples) < 2:
        return Quartiles(samples[0], samples[0], samples[0]) if samples else None
    return Quartiles(*statistics.quantiles(samples, n=4, method="inclusive"))


def gb_per_s(times: Times | None) -> float | None:
    """10^9 bytes of the floor a second, by the median."""
    found = quartiles(times.samples_ms) if times else None
    return times.floor_bytes / found.median / 1e6 if times and found and found.median else None


def of_copy(row: KernelCost, ceilings: Ceilings) -> float | None:
    """The share that its GB/s, of both directions, have of the largest copy's."""
    found = gb_per_s(row.both)
    return found / ceilings.copy_gb_per_s if found is not None and ceilings.copies else None


# --- cells --------------------------------------------------------------------------------------------------------


def samples_cell(samples: Sequence[float]) -> Cell:
    """`1.23` and `±2%`: the median and half the distance of the quartiles."""
    found = quartiles(samples)
    if found is None:
        return UNKNOWN, ""
    return figure(found.median), f"±{found.spread:.0%}" if len(samples) > 1 else ""


def speedup_cell(speedup: Speedup | None, kernel: str | None = None) -> Cell:
    """`2.31` and `(2.25–2.36)`; native itself is 1, and no measurement."""
    if speedup is None:
        return ("1" if kernel == NATIVE else UNKNOWN), ""
    return speedup_figure(speedup.value), span(speedup)


def span(speedup: Speedup) -> str:
    words = interval_figure(speedup.interval)
    return f"({words})" if words else "(unbounded)"


def speedup_figure(value: float) -> str:
    return figure(value, 3)


def gb_figure(value: float | None) -> str:
    return figure(value, 3)


def percent(share: float | None) -> str:
    """A share in whole percent; what is above none but rounds to it is < 1%."""
    if share is None or not math.isfinite(share):
        return UNKNOWN
    return "< 1%" if 0 < share < 0.005 else f"{share:.0%}"


def shape_words(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape))


def case_words(case: Case) -> str:
    """All of a case but its shape: what its group of rows is headed by."""
    words = [case.operation, case.dtype, case.layout, "" if case.training else "evaluation"]
    words += ["" if case.affine == "wide" else f"affine {case.affine}", "" if case.tracked else "untracked"]
    return ", ".join(filter(None, words))


# --- kernels ------------------------------------------------------------------------------------------------------


def grouped(rows: Iterable[KernelCost]) -> dict[str, list[KernelCost]]:
    """Heading -> its rows, those of a shape together, all in the order in which they first appear."""
    shapes: dict[str, dict[tuple[int, ...], list[KernelCost]]] = {}
    for row in rows:
        shapes.setdefault(case_words(row.case), {}).setdefault(row.case.shape, []).append(row)
    return {heading: [row for each in found.values() for row in each] for heading, found in shapes.items()}


def kernel_columns(rows: Sequence[KernelCost], ceilings: Ceilings, *, spreads: str = "all") -> dict[str, Column]:
    """A column's key -> its cells, one a row. `spreads`: of all three directions, of both together, or none."""

    def column(first: str, second: str, cell: Callable[[KernelCost], Cell | str], words: bool = False) -> Column:
        made = [cell(row) for row in rows]
        return Column((first, second), tuple(c if isinstance(c, tuple) else (c, "") for c in made), words=words)

    def times(direction: str) -> Callable[[KernelCost], Cell]:
        def cell(row: KernelCost) -> Cell:
            found: Times | None = getattr(row, direction)
            main, aside = samples_cell(found.samples_ms) if found else (UNKNOWN, "")
            return main, aside if spreads == "all" or spreads == direction else ""

        return cell

    return {
        "shape": column("shape", "", lambda row: shape_words(row.case.shape), words=True),
        "kernel": column("kernel", "", lambda row: row.kernel, words=True),
        "forward": column("forward", "ms", times("forward")),
        "backward": column("backward", "ms", times("backward")),
        "both": column("both", "ms", times("both")),
        "gb_per_s": column("GB/s", "", lambda row: gb_figure(gb_per_s(row.both))),
        "of_copy": column("of", "copy", lambda row: percent(of_copy(row, ceilings))),
        "faster": column(f"times {NATIVE}", "", lambda row: speedup_cell(row.faster, row.kernel)),
        "peak": memory_column("peak", [row.peak_memory_mib for row in rows]),
        "saved": memory_column("saved", [row.saved_mib for row in rows]),
        "ran": column("ran", "", lambda row: row.ran or UNKNOWN, words=True),
    }


def memory_column(name: str, values_mib: Sequence[float | None]) -> Column:
    """Sizes in MiB; in KiB where none of them has one."""
    known = [value for value in values_mib if value is not None]
    unit, factor = ("KiB", 1024) if known and max(known) < 1 else ("MiB", 1)
    return Column((name, unit), tuple((figure(None if v is None else v * factor), "") for v in values_mib))


def mean_columns(means: Sequence[KernelMean]) -> list[Column]:
    """A row a kernel and operation: its geometric mean times native over its shapes, and its worst shape."""
    return [
        Column(("operation", ""), tuple((mean.operation, "") for mean in means), words=True),
        Column(("kernel", ""), tuple((mean.kernel, "") for mean in means), words=True),
        Column(("shapes", ""), tuple((figure(mean.shapes), "") for mean in means)),
        Column((f"times {NATIVE}", ""), tuple(speedup_cell(mean.faster) for mean in means)),
        Column(("worst", ""), tuple((speedup_figure(mean.least), "") for mean in means)),
        Column(("at", ""), tuple((shape_words(mean.least_shape), "") for mean in means), words=True),
    ]


def ceilings_words(ceilings: Ceilings) -> str:
    """What the machine reached in the same run, the largest copy first."""
    flops = f"multiply-adds {figure(ceilings.gflop_per_s)} GFLOP/s in fp32" if ceilings.gflop_per_s else ""
    copies = [f"{gb_figure(speed)} GB/s at {size_words(size)}" for size, speed in reversed(ceilings.copies)]
    words = [f"copy {', '.join(copies)}" if copies else "", flops]
    return "; ".join(filter(None, words)) or "none measured"


def size_words(size_bytes: float) -> str:
    unit, name = (MIB, "MiB") if size_bytes >= MIB else (2**10, "KiB")
    return f"{figure(size_bytes / unit) if size_bytes % unit else int(size_bytes) // unit} {name}"


def kernel_title(profile: KernelProfile) -> str:
    kernels = dict.fromkeys(row.kernel for row in profile.rows)
    return f"Batch norm kernels: {', '.join(kernels)}" if kernels else "Batch norm kernels"


def measured_words(rows: Sequence[KernelCost | StepCost], planned: int, seconds: float) -> str:
    """How many rows there are of those planned, and how many of them have figures."""
    if len(rows) < planned:
        return f"interrupted: {len(rows)} of {planned} rows were measured, in {figure(seconds)} s"
    measured = sum(row.error is None for row in rows)
    of = f" of {len(rows)}" if measured < len(rows) else ""
    return f"{measured}{of} row{'s' * (len(rows) != 1)} measured in {figure(seconds)} s"


def folded(rows: Sequence[KernelCost]) -> tuple[list[KernelCost], list[str]]:
    """The rows to show, and in a line the cases that nothing was measured of, all kernels for the same reason.

    A wrong result is always shown, and so is everything where there would be nothing else.
    """
    reasons: dict[Case, set[str | None]] = {}
    for row in rows:
        reasons.setdefault(row.case, set()).add(None if row.wrong else row.error)
    empty = {case: errors.copy().pop() for case, errors in reasons.items() if len(errors) == 1 and None not in errors}
    if len(empty) == len(reasons):
        return list(rows), []
    counts = Counter(empty.values())
    lines = [f"{count} of {len(reasons)} cases are left out, {error}" for error, count in counts.items()]
    return [row for row in rows if row.case not in empty], lines


def cache_words(cold: bool) -> str:
    return "cold cache (flushed before each sample)" if cold else "warm cache (not flushed)"


# --- gate ---------------------------------------------------------------------------------------------------------


def gate_columns(changes: Sequence[Change]) -> list[Column]:
    """A row a change: how many times faster than native it is and was, and how many times slower that makes it."""
    slower = [Speedup(change.slower, change.interval) for change in changes]
    return [
        Column(("", ""), tuple((", ".join(change.row.words[1:]), "") for change in changes), words=True),
        Column(("now", ""), tuple(speedup_cell(change.now) for change in changes)),
        Column(("baseline", ""), tuple(speedup_cell(change.baseline) for change in changes)),
        Column(("times slower", ""), tuple(speedup_cell(each) for each in slower)),
        Column(("verdict", ""), tuple((change.verdict, "") for change in changes), words=True),
    ]


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
        Column((f"times {NATIVE}", ""), tuple(speedup_cell(row.faster, row.kernel) for row in rows)),
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
