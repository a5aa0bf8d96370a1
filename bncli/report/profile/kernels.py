"""The report of `bncli profile` on kernels: what each costs, shape by shape, beside what the machine can do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from rich.console import Console, ConsoleOptions, Group, RenderResult
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
from bncli.report.table import Dashed, Fitted, Layout, Line, Listing, Ruled
from bncli.report.text import Column, encodable, environment_words, in_encoding
from bncli.results.profile import Ceilings, KernelCost, KernelMean, KernelProfile, Speedup

SHORT = {"forward": "fwd", "backward": "bwd"}
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
LEFT_OUT = {"forward": "forward", "backward": "backward", "gb_per_s": "GB/s", "peak": "peak", "saved": "saved"}


@dataclass(frozen=True)
class KernelReport:
    """All that `bncli profile` shows of kernels: rows, means over shapes, ceilings, notes, and how to read them."""

    profile: KernelProfile

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        profile = self.profile
        rows, left_out = folded(profile.rows)
        words = measured_words(profile.rows, profile.planned, profile.seconds)
        yield Fitted(kernel_title(profile), words, _kernel_layouts(rows, profile.ceilings) if rows else (_nothing,), ())
        if profile.means:
            yield Fitted("Over all shapes: geometric mean", "", _mean_layouts(profile.means), ())
        ceilings = encodable(ceilings_words(profile.ceilings), options.encoding)
        yield Text.assemble(("Measured ceilings: ", "bold"), ceilings)
        yield Dashed("", (*left_out, *note_lines(profile)))
        made = f"Made on {environment_words(profile.environment)}; {cache_words(profile.cold)}."
        for line in (made, *kernel_legend(profile)):
            yield Text(in_encoding(line, options.encoding), "dim")


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
            "Times native: how many times faster than native, the median of the rounds' ratios with its 95% interval; "
            "above 1 is faster. Native is the yardstick."
        )
    yield "Peak: memory of both, beyond the inputs. Saved: what forward keeps for backward."


def speedup_styles(ratios: Iterable[Speedup | None], place: int) -> dict[tuple[int, int], str]:
    """Bold for each ratio of that column, green where its interval is above 1, red where it is below."""
    styles = {}
    for index, faster in enumerate(ratios):
        if faster is not None:
            low, high = faster.interval.low, faster.interval.high
            colour = " green" if low is not None and low > 1 else " red" if high is not None and high < 1 else ""
            styles[index, place] = f"bold{colour}"
    return styles


def once(column: Column, lines: Sequence[Line]) -> Column:
    """Each of its words where they begin, and nothing where they go on below the same heading."""
    cells = [
        ("", "") if i and cell == column.cells[i - 1] and not lines[i].heading else cell
        for i, cell in enumerate(column.cells)
    ]
    return replace(column, cells=tuple(cells))


def _nothing(encoding: str) -> Text:
    return Text("Nothing was measured.")


def _kernel_layouts(shown: Sequence[KernelCost], ceilings: Ceilings) -> list[Layout]:
    groups = grouped(shown)
    rows = [row for members in groups.values() for row in members]
    first = {id(members[0]): heading for heading, members in groups.items()}
    lines = [
        Line(
            heading=first.get(id(row), ""),
            style="dim" if row.kernel == NATIVE else "",
            message=f"{'WRONG: ' * row.wrong}{words}" if (words := error_words(row)) is not None else "",
        )
        for row in rows
    ]

    def layout(spreads: str, without: Sequence[str], short: bool) -> Layout:
        cells = kernel_columns(rows, ceilings, spreads=spreads)
        cells["shape"] = once(cells["shape"], lines)
        if short:
            cells |= {key: replace(cells[key], header=(word, "ms")) for key, word in SHORT.items()}
        kept = [key for key in cells if key not in without]
        styles = speedup_styles((row.faster for row in rows), kept.index("faster"))
        tail = list(_below(rows, without))
        return lambda encoding: Group(
            Ruled([cells[key] for key in kept], lines, encoding, styles),
            *(Text(encodable(words, encoding), "dim") for words in ["", *tail] if tail),
        )

    whole = list(kernel_columns(rows, ceilings).values())
    return [*(layout(*how) for how in KERNEL_LAYOUTS), lambda encoding: Listing(whole, lines, encoding)]


def _below(rows: Sequence[KernelCost], without: Sequence[str]) -> Iterator[str]:
    """What a narrow table leaves out: what really ran in words, the rest by name."""
    if "ran" in without and (ran := list(_ran(rows))):
        yield f"Ran: {' | '.join(ran)}"
    if names := [words for key, words in LEFT_OUT.items() if key in without]:
        yield f"Left out for want of room: {', '.join(names)} (a wider output and the CSV have them)"


def _ran(rows: Sequence[KernelCost]) -> Iterator[str]:
    """`fused: in cache; two passes at 8x64x32x32`: what ran most, then what else did and where."""
    for kernel in dict.fromkeys(row.kernel for row in rows):
        mine = [row for row in rows if row.kernel == kernel and row.ran]
        ways = [way for way, _ in Counter(row.ran or "" for row in mine).most_common()]
        places = {way: dict.fromkeys(shape_words(row.case.shape) for row in mine if row.ran == way) for way in ways}
        parts = [f"{way} at {', '.join(places[way])}" if way != ways[0] else way for way in ways]
        if parts:
            yield f"{kernel}: {'; '.join(parts)}"


def _mean_layouts(means: Sequence[KernelMean]) -> list[Layout]:
    groups: dict[str, list[KernelMean]] = {}
    operations = [mean.operation for mean in means]
    for mean in sorted(means, key=lambda mean: operations.index(mean.operation)):
        groups.setdefault(f"{mean.dtype}, {mean.layout}", []).append(mean)
    rows = [mean for members in groups.values() for mean in members]
    first = {id(members[0]): heading for heading, members in groups.items()}
    lines = [Line(first.get(id(mean), ""), "dim" if mean.kernel == NATIVE else "") for mean in rows]
    columns = mean_columns(rows)
    styles = speedup_styles((mean.faster for mean in rows), 3)
    shown = [once(columns[0], lines), *columns[1:]]
    return [
        lambda encoding: Ruled(shown, lines, encoding, styles),
        lambda encoding: Listing(columns, lines, encoding),
    ]
