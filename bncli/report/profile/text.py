"""Words and figures of a profile, for its tables, Markdown and CSV: cells, notes, errors, remarks. No rich here."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

from bncli.report.text import UNKNOWN, Cell, Column, busy_mark, busy_words, count, figure, finding_text, interval_figure
from bncli.results.environment import Interval
from bncli.results.profile import (
    FOLDED,
    Case,
    Ceilings,
    KernelCost,
    NormLayers,
    NormRemark,
    Note,
    Profile,
    Speedup,
    StepCost,
    StepDifference,
    StepProfile,
    Times,
)

NATIVE = "native"
VS_NATIVE = f"vs {NATIVE}"  # header of the speedups
NAMED_CHANNELS = 4  # of a remark; the others are counted
MEDIAN = "median of the samples ± half the interquartile range"
T = TypeVar("T")


class Quartiles(NamedTuple):
    low: float
    median: float
    high: float


def quartiles(samples: Sequence[float]) -> Quartiles | None:
    """None without samples; a single one stands for all three."""
    if len(samples) < 2:
        return Quartiles(samples[0], samples[0], samples[0]) if samples else None
    return Quartiles(*statistics.quantiles(samples, n=4, method="inclusive"))


def gb_per_s(times: Times | None) -> float | None:
    """10^9 bytes of the floor a second, by the median."""
    found = quartiles(times.samples_ms) if times else None
    return times.floor_bytes / found.median / 1e6 if times and found and found.median else None


def of_copy(row: KernelCost, ceilings: Ceilings) -> float | None:
    """GB/s of both directions as a share of the largest copy's."""
    found = gb_per_s(row.both)
    return found / ceilings.copy_gb_per_s if found is not None and ceilings.copies else None


def samples_per_s(row: StepCost) -> float | None:
    found = quartiles(row.samples_ms)
    return 1e3 * row.batch_size / found.median if found and found.median else None


# --- cells --------------------------------------------------------------------------------------------------------


def samples_cell(samples: Sequence[float], cores_lacked: float | None = None) -> Cell:
    """`1.23` and `±2%`: the median, marked if other programs disturbed it, and half the interquartile range."""
    found = quartiles(samples)
    if found is None:
        return Cell(UNKNOWN)
    spread = (found.high - found.low) / 2 / found.median if found.median else 0.0
    return Cell(figure(found.median) + busy_mark(cores_lacked), f"±{spread:.0%}" if len(samples) > 1 else "")


def ratio_cell(ratio: Speedup) -> Cell:
    """`2.31x` and `2.25–2.36`."""
    return Cell(f"{figure(ratio.value)}x", interval_figure(ratio.interval) or "unbounded")


def speedup_cell(speedup: Speedup | None, kernel: str | None = None, cores_lacked: float | None = None) -> Cell:
    """Green above 1, red below, plain if other programs disturbed it; marked if they did or the medians contradict."""
    if speedup is None:
        return Cell("1x" if kernel == NATIVE else UNKNOWN)
    low, high = speedup.interval.low, speedup.interval.high
    colour = " green" if low is not None and low > 1 else " red" if high is not None and high < 1 else ""
    cell, busy = ratio_cell(speedup), busy_mark(cores_lacked)
    return cell._replace(main=cell.main + "*" * speedup.contradicted + busy, style="bold" if busy else f"bold{colour}")


def of_native(speedup: Speedup, cores_lacked: float | None = None) -> str:
    """`2.31 times faster than native (2.24–2.38)`, marked like its cell where other programs disturbed it."""
    low, high, busy = speedup.interval.low, speedup.interval.high, busy_mark(cores_lacked)
    if low is None or high is None or low <= 1 <= high or speedup.contradicted:
        main, aside, _ = speedup_cell(speedup, None, cores_lacked)
        return f"not distinguishable from native ({main}, {aside})"
    span, word = (speedup.interval, "faster") if low > 1 else (Interval(1 / high, 1 / low), "slower")
    size = figure(max(speedup.value, 1 / speedup.value))
    return f"{size}{busy} times {word} than native ({interval_figure(span)})"


def speedup_legend(reference: str) -> str:
    words = "the median of the rounds' ratios with its 95% interval; above 1x is faster"
    return f"{VS_NATIVE}: speedup over {reference}, {words}."


def percent(share: float | None) -> str:
    """A share in whole percent; what is above none but rounds to it is < 1%."""
    if share is None or not math.isfinite(share):
        return UNKNOWN
    return "< 1%" if 0 < share < 0.005 else f"{share:.0%}"


def memory_column(name: str, values_mib: Sequence[float | None], short: str = "") -> Column:
    """Sizes in MiB; in KiB where none of them has one."""
    known = [value for value in values_mib if value is not None]
    unit, factor = ("KiB", 1024) if known and max(known) < 1 else ("MiB", 1)
    cells = [figure(None if value is None else value * factor) for value in values_mib]
    return Column(f"{name}\n{unit}", cells, optional=True, short=f"{short or name}\n{unit}")


def without_asides(column: Column) -> Column:
    return replace(column, values=[cell._replace(aside="") for cell in column.cells])


def shape_words(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape))


def size_words(size_bytes: float) -> str:
    unit, name = (2**20, "MiB") if size_bytes >= 2**20 else (2**10, "KiB")
    return f"{figure(size_bytes / unit) if size_bytes % unit else int(size_bytes) // unit} {name}"


def cache_words(cold: bool) -> str:
    return "cold cache (flushed before each sample)" if cold else "warm cache (not flushed)"


def measured_words(profile: Profile) -> str:
    """How many rows there are of those planned, and how many of them have figures."""
    rows, time = len(profile.rows), f"measured in {figure(profile.seconds)} s"
    if rows < profile.planned:
        return f"interrupted: {rows} of {profile.planned} rows {time}"
    measured = sum(row.error is None for row in profile.rows)
    return f"{f'{measured} of ' * (measured < rows)}{count(rows, 'row')} {time}"


# --- groups of rows -----------------------------------------------------------------------------------------------


def grouped(rows: Iterable[T], heading: Callable[[T], str], then: Callable[[T], Any]) -> dict[str, list[T]]:
    """Heading -> its rows, those that `then` calls the same together, all in the order in which they first appear."""
    groups: dict[str, dict[Any, list[T]]] = {}
    for row in rows:
        groups.setdefault(heading(row), {}).setdefault(then(row), []).append(row)
    return {name: [row for members in parts.values() for row in members] for name, parts in groups.items()}


def case_groups(rows: Iterable[KernelCost]) -> dict[str, list[KernelCost]]:
    return grouped(rows, lambda row: _case_words(row.case), lambda row: row.case.shape)


def _case_words(case: Case) -> str:
    """All of a case but its shape."""
    words = [case.operation, case.dtype, case.layout, "" if case.training else "evaluation"]
    words += ["" if case.affine == "wide" else f"affine {case.affine}", "" if case.tracked else "untracked"]
    return ", ".join(filter(None, words))


# --- notes --------------------------------------------------------------------------------------------------------


def note_lines(profile: Profile) -> list[str]:
    """What a reader of the figures must know, a sentence each."""
    return [*mark_lines(profile), *map(note_words, profile.notes)]


def mark_lines(profile: Profile) -> list[str]:
    """What the marks beside times and speedups mean, as far as there are any."""
    speedups = {row.key: row.faster for row in profile.rows if row.faster is not None and row.faster.contradicted}
    contradicted = "; ".join(f"{key}: {figure(speedup.of_medians)}x" for key, speedup in speedups.items())
    words = (
        f"*: the two medians give another ratio ({contradicted}). Trust the marked one: what slows a whole round down "
        "cancels in the round's ratio, and moves the medians"
    )
    return [*filter(None, (busy_words(row.cores_lacked for row in profile.rows), contradicted and words))]


def note_words(note: Note) -> str:
    more = f" and {len(note.cases) - 1} more" if len(note.cases) > 1 else ""
    return _note_words(note) + (f": {note.cases[0]}{more}" if note.cases else "")


def _note_words(note: Note) -> str:
    match note.kind:
        case "channels sampled":
            return "checked on a sample of the channels, from the first to the last, and timed on all"
        case "peak needs compilation":
            return f"{note.kernel}: no peak memory, which would need another compilation in a separate process"
        case "peak unknown":
            return f"{note.kernel}: peak memory unknown: {note.reason}"
        case "few rounds":
            return f"fewer than the {note.count} rounds that an interval needs"
        case "compilation":
            return f"{note.kernel}: {note.seconds:.1f} s of compilation, not included in any row"
        case "host bound":
            return f"the device waited for the host in {note.count} of {note.of} samples"
        case "same work":
            return f"{note.arm} also represents {', '.join(note.others)}, whose steps do the same work"
        case "model compiled":
            return f"{note.arm} is compiled: everything that torch.compile fused counts as other"
        case "random data":
            return f"{note.arm} is trained on random inputs; its loss is the mean square of its output"
        case "memory unknown":
            return f"{note.arm}, {note.kernel or 'no kernel'}: memory unknown: {note.reason}"
        case "norms not watched":
            return f"{note.arm}: the norm layers could not be observed: {note.reason}"
        case "not folded":
            return f"{note.arm}: evaluation is not shown with the batch norms folded: {note.reason}"
        case "layers not traced":
            return f"{note.arm} is compiled: the trace cannot name its layers"
        case "norms watched":
            judged = f"; running statistics are judged after {note.of}" if (note.count or 0) < (note.of or 0) else ""
            return f"{note.arm}: the norm layers were observed for {count(note.count or 0, 'training step')}{judged}"


# --- errors of rows -----------------------------------------------------------------------------------------------


def error_words(row: KernelCost | StepCost) -> str | None:
    """Why a row has no times, on one line; None where it has."""
    if isinstance(row, StepCost) and row.difference is not None:
        return _difference_words(row.difference)
    if isinstance(row, KernelCost) and row.finding is not None:
        where = "" if row.wrong_case is None else f", in the case {row.wrong_case}"
        return finding_text(row.finding) + where
    return None if row.error is None else " ".join(row.error.split())


def _difference_words(found: StepDifference) -> str:
    what = (
        f"the {found.kind}{f' of {found.tensor}' * bool(found.tensor)}{f' (and {found.more} more)' * bool(found.more)}"
    )
    native = f"native's{' in float64' * found.in_float64}"
    return f"wrong: {what} differs from {native}: relative error {found.error:.1e}, allowed {found.allowed:.1e}"


# --- norm layers --------------------------------------------------------------------------------------------------


def norms_words(norms: Sequence[NormLayers]) -> str:
    """`2 batch norms (1 fused with relu, 1 not fused), 3 LayerNorm`; empty without any."""
    batch = [layers for layers in norms if layers.kind == "batch norm"]
    words = [f"{layers.count} {layers.kind}" for layers in norms if layers.kind != "batch norm"]
    if batch:
        norms_count = count(sum(layers.count for layers in batch), "batch norm")
        converted = ", ".join(f"{layers.count} {_calls_words(layers)}" for layers in batch if layers.converted)
        others = [layers for layers in batch if not layers.converted and layers.kernel not in (NATIVE, FOLDED)]
        folded = [f"{layers.count} folded into the layer before" for layers in batch if layers.kernel == FOLDED]
        words = [
            f"{norms_count}{f' ({converted})' * bool(converted)}",
            *folded,
            *(f"{layers.count} on the {layers.kernel} kernel" for layers in others),
            *words,
        ]
    return ", ".join(words)


def _calls_words(layers: NormLayers) -> str:
    """What a norm is fused with."""
    calls = [f"fused with {' + '.join(operations)}" if operations else "not fused" for operations in layers.calls]
    return " or ".join(calls) + ", depending on the call" * (len(calls) > 1) or "not converted"


class RemarkWords(NamedTuple):
    layer: str
    finding: str
    advice: str


def remark_words(remark: NormRemark) -> RemarkWords:
    """Where something is wrong with norm layers, what it is, and what to do about it."""
    more = f" and {remark.more_layers} more" if remark.more_layers else ""
    layer = _layer_words(remark.layer, remark.layer_class) or "(the model)"
    return RemarkWords(layer + more, *_finding_and_advice(remark))


def remark_lines(profile: StepProfile) -> list[str]:
    """A line for each remark, with its arm."""
    return [f"{remark.arm}, {': '.join(remark_words(remark))}" for remark in profile.remarks]


def _layer_words(name: str, kind: str) -> str:
    """`blocks.0.norm1`; a module that has a mere index for its name with its class: `layer 0 (Conv2d)`."""
    return f"layer {name} ({kind})" if kind and name.rpartition(".")[2].isdigit() else name


def _finding_and_advice(remark: NormRemark) -> tuple[str, str]:
    figures = remark.figures
    match remark.kind:
        case "one value":
            return (
                "one value per channel: a batch of 1 without spatial positions",
                "the output does not depend on the input, and torch raises in training: use batches of 2 or more, or a "
                "norm that averages over channels",
            )
        case "constant channels":
            factor = 1 / math.sqrt(figures["eps"])
            return (
                f"constant within a batch: {_channels_words(remark)}",
                f"their output is the norm's bias, and gradients are multiplied by 1/sqrt(eps) = {factor:,.0f}: remove "
                "these inputs, or look for a dead activation in front",
            )
        case "large mean":
            return (
                f"a mean of {figures['deviations']:,.0f} standard deviations in {_channels_words(remark)}",
                f"above {figures['limit']:,.0f} the variance loses digits in {remark.dtype}: center the input first, "
                "in the data or in the layer before",
            )
        case "cumulative average":
            return (
                "momentum None: the running statistics are the cumulative average of all steps",
                "the first batches count as much as the last: set a momentum, or reset the statistics before "
                "evaluation and run some batches",
            )
        case "short half-life":
            momentum = figures["momentum"]
            meant = f"{1 - momentum:.3g}" if momentum < 1 else "0.1"
            return (
                f"momentum {momentum:g}: the running average has a half-life of {figures['half_life_steps']:.2g} steps",
                "evaluation uses little more than the last batch; momentum is the weight of the new batch, and "
                f"{meant} may be what was meant",
            )
        case "long half-life":
            budget = f", and training has {figures['budget_steps']:,.0f}" if "budget_steps" in figures else ""
            steps = f"{figures['half_life_steps']:,.0f} steps{budget}"
            return (
                f"momentum {figures['momentum']:g}: the running average has a half-life of {steps}",
                f"at the end {figures.get('kept', 1.0):.0%} of it is still its initial 0 and 1: raise the momentum, or "
                "estimate the statistics again over some batches before evaluation",
            )
        case "running mean off":
            return (
                f"after {figures['steps']:,.0f} steps the running mean is {figures['deviations']:.2g} standard "
                f"deviations off the batches' in {_channels_words(remark)}",
                "evaluation normalizes differently from training: raise the momentum, lower the learning rate, or "
                "estimate the statistics again over some batches before evaluation",
            )
        case "bias without effect":
            source = _layer_words(remark.source or "", remark.source_class)
            return (
                f"the bias of {source} has no effect, since the norm subtracts it "
                f"({figures['parameters']:.0f} unused parameters)",
                f"set bias=False in {source}: the norm has a bias of its own",
            )
        case "last batch of one":
            raises = "torch raises in training" if figures["raises"] else "its statistics are those of one example"
            return (
                f"the last batch of an epoch would have 1 example: {raises}",
                "bncli leaves that batch out; in a DataLoader set drop_last=True, or choose another batch size",
            )


def _channels_words(remark: NormRemark) -> str:
    """`5 of 16 channels: 0, 3, 4, 9, ... (1 more)`."""
    left = len(remark.channels) - NAMED_CHANNELS
    names = [*map(str, remark.channels[:NAMED_CHANNELS]), *[f"... ({left} more)"] * (left > 0)]
    return f"{len(remark.channels)} of {remark.figures['of_channels']:.0f} channels: {', '.join(names)}"
