"""The report of `bncli profile` on kernels: what each costs, shape by shape, beside what the machine can do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from bncli.report.profile.text import (
    NATIVE,
    cache_words,
    ceilings_words,
    error_words,
    folded,
    grouped,
    kernel_columns,
    kernel_title,
    mean_columns,
    measured_words,
    note_lines,
    shape_words,
    size_words,
)
from bncli.report.table import AlignedTable, BulletList, Paragraph, ResponsiveTable, Row
from bncli.report.text import encodable, environment_words
from bncli.results.profile import Ceilings, KernelCost, KernelMean, KernelProfile

# What shows the spread of its samples, what is left out, and whether headers are short; the first that fits is taken.
KERNEL_LAYOUTS: tuple[tuple[str, tuple[str, ...], bool], ...] = (
    ("all", (), False),
    ("both", (), False),
    ("both", (), True),
    ("both", ("ran",), False),
    ("both", ("ran",), True),
    ("none", ("ran",), True),
    ("none", ("ran", "peak"), True),
    ("both", ("ran", "peak", "saved"), True),
    ("none", ("ran", "peak", "saved"), True),
    ("none", ("ran", "peak", "saved", "gb_per_s"), True),
    ("both", ("ran", "peak", "saved", "gb_per_s", "forward", "backward"), False),
    ("none", ("ran", "peak", "saved", "gb_per_s", "forward", "backward"), False),
)


NOTHING = "Nothing was measured."


@dataclass(frozen=True)
class KernelReport:
    """All that `bncli profile` shows of kernels: rows, means over shapes, ceilings, notes, and how to read them."""

    profile: KernelProfile

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        profile = self.profile
        rows, left_out = folded(profile.rows)
        words = measured_words(profile.rows, profile.planned, profile.seconds)
        if rows:
            table, *narrower = _kernel_tables(rows, profile.ceilings)
            yield ResponsiveTable(kernel_title(profile), table, narrower, words)
        else:
            yield from (Paragraph(kernel_title(profile), "bold"), Paragraph(words, "dim"), "", NOTHING, "")
        if profile.means:
            yield ResponsiveTable("Over all shapes: geometric mean", _mean_table(profile.means))
        ceilings = encodable(ceilings_words(profile.ceilings), options.encoding)
        yield Text.assemble(("Measured ceilings: ", "bold"), ceilings)
        yield BulletList("", (*left_out, *note_lines(profile)))
        made = f"Made on {environment_words(profile.environment)}; {cache_words(profile.cold)}."
        for line in (made, *kernel_legend(profile)):
            yield Paragraph(line, "dim")


def kernel_legend(profile: KernelProfile) -> Iterator[str]:
    """How to read the table of kernels, in a few lines."""
    if not profile.rows:
        return
    yield "ms: median of the samples, ± half the distance of their quartiles; both: forward and backward together."
    copies = profile.ceilings.copies
    copy = f" Of copy: its share of the copy at {size_words(copies[-1][0])}" if copies else ""
    above = "; what fits in a cache may exceed it" if copy and not profile.cold else ""
    yield (
        "GB/s: the bytes that both must move at the least (each tensor read or written once) over their time."
        f"{copy}{above}{'.' * bool(copy)}"
    )
    if any(row.faster for row in profile.rows):
        yield (
            "Vs native: how many times faster than native, the median of the rounds' ratios with its 95% interval; "
            "above 1 is faster. Native is the yardstick."
        )
    yield "Peak: memory of both, beyond the inputs. Saved: what forward keeps for backward."


def _kernel_tables(shown: Sequence[KernelCost], ceilings: Ceilings) -> Iterator[AlignedTable]:
    groups = grouped(shown)
    rows = [row for members in groups.values() for row in members]
    first = {id(members[0]): heading for heading, members in groups.items()}
    lines = [
        Row(
            heading=first.get(id(row), ""),
            style="dim" if row.kernel == NATIVE else "",
            message=f"{'WRONG: ' * row.wrong}{words}" if (words := error_words(row)) is not None else "",
        )
        for row in rows
    ]
    for spreads, without, short in KERNEL_LAYOUTS:
        cells = kernel_columns(rows, ceilings, spreads=spreads)
        columns = [column for key, column in cells.items() if key not in without]
        ran = " | ".join(_ran(rows)) if "ran" in without else ""
        yield AlignedTable(columns, lines, short_headers=short, notes=[f"Ran: {ran}"] * bool(ran))


def _ran(rows: Sequence[KernelCost]) -> Iterator[str]:
    """`fused: in cache; two passes at 8x64x32x32`: what ran most, then what else did and where."""
    for kernel in dict.fromkeys(row.kernel for row in rows):
        mine = [row for row in rows if row.kernel == kernel and row.ran]
        ways = [way for way, _ in Counter(row.ran or "" for row in mine).most_common()]
        places = {way: dict.fromkeys(shape_words(row.case.shape) for row in mine if row.ran == way) for way in ways}
        parts = [f"{way} at {', '.join(places[way])}" if way != ways[0] else way for way in ways]
        if parts:
            yield f"{kernel}: {'; '.join(parts)}"


def _mean_table(means: Sequence[KernelMean]) -> AlignedTable:
    groups: dict[str, list[KernelMean]] = {}
    operations = [mean.operation for mean in means]
    for mean in sorted(means, key=lambda mean: operations.index(mean.operation)):
        groups.setdefault(f"{mean.dtype}, {mean.layout}", []).append(mean)
    rows = [mean for members in groups.values() for mean in members]
    first = {id(members[0]): heading for heading, members in groups.items()}
    lines = [Row(first.get(id(mean), ""), "dim" if mean.kernel == NATIVE else "") for mean in rows]
    return AlignedTable(mean_columns(rows), lines)
