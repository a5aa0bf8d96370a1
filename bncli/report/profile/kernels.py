"""Report of `bncli profile` on kernels: times, GB/s, speedups and memory shape by shape, and means over shapes."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from rich.console import Console, ConsoleOptions, RenderResult

from bncli.report.profile import text
from bncli.report.table import AlignedTable, BulletList, Paragraph, ResponsiveTable, Row
from bncli.report.text import UNKNOWN, Column, count, environment_words, figure
from bncli.results.profile import Case, Ceilings, KernelCost, KernelMean, KernelProfile, StepCost

TIMES = ("forward", "backward", "both")
HIDDEN_FIRST = ("implementation", "peak", "saved", "new_memory", "gb_per_s", "backward", "forward")
NEW_MEMORY = f"{text.VS_NATIVE},\nnew memory"
AnyRow = TypeVar("AnyRow", KernelCost, KernelMean, StepCost)


@dataclass(frozen=True)
class KernelReport:
    """All that `bncli profile` shows of kernels: rows, means over shapes, ceilings, notes, and how to read them."""

    profile: KernelProfile

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        profile = self.profile
        yield from kernel_tables(profile)
        yield Paragraph(f"Measured ceilings: {ceilings_words(profile.ceilings)}")
        yield BulletList("", (*without_empty_cases(profile.rows)[1], *text.note_lines(profile)))
        made = f"Made on {environment_words(profile.environment)}; {text.cache_words(profile.cold)}."
        yield from (Paragraph(line, "dim") for line in (made, *legend(profile)))


def kernel_tables(profile: KernelProfile) -> Iterator[ResponsiveTable]:
    """The rows, then their means over shapes."""
    rows, _ = without_empty_cases(profile.rows)
    tables = _kernel_tables(text.case_groups(rows), profile.ceilings)
    yield ResponsiveTable(kernel_title(profile), next(tables), list(tables), text.measured_words(profile))
    if profile.means:
        yield ResponsiveTable("Geometric mean over all shapes", *_mean_tables(profile.means))


def legend(profile: KernelProfile) -> Iterator[str]:
    """How to read the table of kernels, in a few lines."""
    if not profile.rows:
        return
    yield f"ms: {text.MEDIAN}. both: forward and backward together."
    speed = "GB/s: the minimum bytes of both (each tensor read or written once) divided by their time."
    if profile.ceilings.copies:
        above = "" if profile.cold else "; what fits in a cache can exceed 100%"
        speed += f" % of copy: relative to a copy of {text.size_words(profile.ceilings.copies[-1][0])}{above}."
    yield speed
    if any(row.faster for row in profile.rows):
        yield text.speedup_legend("the native kernel")
    if any(row.faster_new_memory for row in profile.rows):
        yield (
            "new memory: where tensors of 32 MiB or more take new pages from the system, as programs get them by "
            "default. All else is in memory that the process keeps, as in bncli train."
        )
    yield "peak: memory of forward and backward, without the inputs. saved: what forward keeps for backward."


def kernel_title(profile: KernelProfile) -> str:
    kernels = ", ".join(dict.fromkeys(row.kernel for row in profile.rows))
    return "Batch norm kernels" + f": {kernels}" * bool(kernels)


def ceilings_words(ceilings: Ceilings) -> str:
    """What the machine reached in the same run, the largest copy first."""
    flops = f"multiply-adds {figure(ceilings.gflop_per_s)} GFLOP/s in fp32" if ceilings.gflop_per_s else ""
    copies = [f"{figure(speed)} GB/s at {text.size_words(size)}" for size, speed in reversed(ceilings.copies)]
    return "; ".join(filter(None, [f"copy {', '.join(copies)}" * bool(copies), flops])) or "none measured"


def without_empty_cases(rows: Sequence[KernelCost]) -> tuple[list[KernelCost], list[str]]:
    """The rows to show, and in a line the cases that nothing was measured of, all kernels for the same reason.

    A wrong result is always shown, and so is everything where there would be nothing else.
    """
    reasons: dict[Case, set[str | None]] = {}
    for row in rows:
        reasons.setdefault(row.case, set()).add(None if row.wrong else text.error_words(row))
    empty = {case: next(iter(errors)) for case, errors in reasons.items() if len(errors) == 1 and None not in errors}
    if len(empty) == len(reasons):
        return list(rows), []
    counts = Counter(empty.values())
    lines = [f"{number} of {count(len(reasons), 'case')} not shown ({error})" for error, number in counts.items()]
    return [row for row in rows if row.case not in empty], lines


# --- tables -------------------------------------------------------------------------------------------------------


def kernel_columns(rows: Sequence[KernelCost], ceilings: Ceilings) -> dict[str, Column]:
    """A column's key -> its cells, one a row."""
    samples = {name: [times.samples_ms if (times := getattr(row, name)) else () for row in rows] for name in TIMES}
    cells = {name: [text.samples_cell(each) for each in found] for name, found in samples.items()}
    new = [text.speedup_cell(r.faster_new_memory, r.kernel if r.new_memory else None, r.cores_lacked) for r in rows]
    in_new_memory = {"new_memory": Column(NEW_MEMORY, new, optional=True)} if any(r.new_memory for r in rows) else {}
    return {
        "shape": Column("shape", [text.shape_words(row.case.shape) for row in rows], words=True, once=True),
        "kernel": Column("kernel", [row.kernel for row in rows], words=True),
        "forward": Column("forward\nms", cells["forward"], optional=True, short="fwd\nms"),
        "backward": Column("backward\nms", cells["backward"], optional=True, short="bwd\nms"),
        "both": Column("both\nms", list(map(text.samples_cell, samples["both"], (row.cores_lacked for row in rows)))),
        "gb_per_s": Column("GB/s", [figure(text.gb_per_s(row.both)) for row in rows], optional=True),
        "of_copy": Column("% of\ncopy", [text.percent(text.of_copy(row, ceilings)) for row in rows]),
        "speedup": Column(text.VS_NATIVE, [text.speedup_cell(r.faster, r.kernel, r.cores_lacked) for r in rows]),
        **in_new_memory,
        "peak": text.memory_column("peak", [row.peak_memory_mib for row in rows]),
        "saved": text.memory_column("saved", [row.saved_mib for row in rows]),
        "implementation": Column("implementation", [row.ran or UNKNOWN for row in rows], words=True),
    }


def _kernel_tables(groups: Mapping[str, list[KernelCost]], ceilings: Ceilings) -> Iterator[AlignedTable]:
    """From the widest table, with the spread of each time, to the narrowest, with none."""
    rows = [row for members in groups.values() for row in members]
    lines = table_rows(groups, _message)
    columns = kernel_columns(rows, ceilings)
    yield AlignedTable(list(columns.values()), lines)
    spread = columns | {name: text.without_asides(columns[name]) for name in ("forward", "backward")}
    yield AlignedTable(list(spread.values()), lines)
    plain = spread | {"both": text.without_asides(columns["both"])}
    implementations = " | ".join(_implementations(rows))
    # backward and forward are hidden together.
    for hidden, found in itertools.product((0, 1, 2, 3, 4, 5, 7), (spread, plain)):
        shown = [column for name, column in found.items() if name not in HIDDEN_FIRST[:hidden]]
        notes = [f"Implementations: {implementations}"] * bool(hidden and implementations)
        yield AlignedTable(shown, lines, short_headers=True, notes=notes)


def table_rows(groups: Mapping[str, list[AnyRow]], message: Callable[[AnyRow], str]) -> list[Row]:
    """A heading above each group, the native kernel's rows dim, and messages in place of figures."""
    return [
        Row(heading if not place else "", "dim" if row.kernel == text.NATIVE else "", message(row))
        for heading, members in groups.items()
        for place, row in enumerate(members)
    ]


def _message(row: KernelCost) -> str:
    words = text.error_words(row)
    return "" if words is None else f"{'WRONG: ' * row.wrong}{words}"


def _implementations(rows: Sequence[KernelCost]) -> Iterator[str]:
    """`fused: in cache (two passes at 8x64x32x32)`: what ran most, then what else did and where."""
    for kernel in dict.fromkeys(row.kernel for row in rows if row.ran):
        found = [(row.ran, text.shape_words(row.case.shape)) for row in rows if row.kernel == kernel and row.ran]
        (most, _), *others = Counter(ran for ran, _ in found).most_common()
        places = [
            f"{other} at {', '.join(dict.fromkeys(shape for ran, shape in found if ran == other))}"
            for other, _ in others
        ]
        yield f"{kernel}: {most}" + f" ({'; '.join(places)})" * bool(places)


def mean_columns(means: Sequence[KernelMean]) -> list[Column]:
    """A row a kernel and operation: its geometric mean speedup over its shapes, and its worst shape."""
    new = [text.speedup_cell(mean.faster_new_memory, None, mean.cores_lacked) for mean in means]
    return [
        Column("operation", [mean.operation for mean in means], words=True, once=True),
        Column("kernel", [mean.kernel for mean in means], words=True),
        Column("shapes", [figure(mean.shapes) for mean in means], optional=True),
        Column(text.VS_NATIVE, [text.speedup_cell(mean.faster, None, mean.cores_lacked) for mean in means]),
        *[Column(NEW_MEMORY, new, optional=True)] * any(mean.faster_new_memory for mean in means),
        Column("worst", [f"{figure(mean.least)}x" for mean in means]),
        Column("at shape", [text.shape_words(mean.least_shape) for mean in means], words=True, optional=True),
    ]


def mean_groups(means: Sequence[KernelMean]) -> dict[str, list[KernelMean]]:
    return text.grouped(means, lambda mean: f"{mean.dtype}, {mean.layout}", lambda mean: mean.operation)


def _mean_tables(means: Sequence[KernelMean]) -> tuple[AlignedTable, list[AlignedTable]]:
    groups = mean_groups(means)
    columns = mean_columns([mean for members in groups.values() for mean in members])
    rows = table_rows(groups, lambda mean: "")
    narrow = [column for column in columns if not column.optional]
    return AlignedTable(columns, rows), [AlignedTable(narrow, rows)]
