"""Words and figures of a profile, for its tables, Markdown and CSV: cells, notes, errors, remarks. No rich here."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from bncli.report.text import UNKNOWN, Cell, Column, figure, finding_text, interval_figure
from bncli.results.profile import (
    STEP_CLASSES,
    Case,
    Ceilings,
    Change,
    KernelCost,
    KernelMean,
    KernelProfile,
    NormLayers,
    NormRemark,
    Note,
    Profile,
    Speedup,
    StepCost,
    StepDifference,
    Times,
)

NATIVE = "native"
VS_NATIVE = f"vs {NATIVE}"  # header of the speedups
VERDICT_STYLES = {"ok": "green", "regressed": "bold red", "cannot tell": "yellow"}
MIB = 2**20
NAMED_CHANNELS = 4  # of a remark; the others are counted


class Quartiles(NamedTuple):
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
        return Cell(UNKNOWN)
    return Cell(figure(found.median), f"±{found.spread:.0%}" if len(samples) > 1 else "")


def speedup_cell(speedup: Speedup | None, kernel: str | None = None) -> Cell:
    """`2.31x` and `2.25–2.36`, green where it is surely faster, red where surely slower; native itself is 1."""
    if speedup is None:
        return Cell("1" if kernel == NATIVE else UNKNOWN)
    low, high = speedup.interval.low, speedup.interval.high
    colour = " green" if low is not None and low > 1 else " red" if high is not None and high < 1 else ""
    return Cell(speedup_figure(speedup.value), interval_figure(speedup.interval) or "unbounded", f"bold{colour}")


def speedup_figure(value: float) -> str:
    return f"{figure(value)}x"


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

    def times(direction: str) -> list[Cell]:
        found = [samples_cell(part.samples_ms if (part := getattr(row, direction)) else ()) for row in rows]
        return found if spreads in ("all", direction) else [Cell(cell.main) for cell in found]

    return {
        "shape": Column("shape", [shape_words(row.case.shape) for row in rows], words=True, once=True),
        "kernel": Column("kernel", [row.kernel for row in rows], words=True),
        "forward": Column("forward\nms", times("forward"), optional=True, short="fwd\nms"),
        "backward": Column("backward\nms", times("backward"), optional=True, short="bwd\nms"),
        "both": Column("both\nms", times("both")),
        "gb_per_s": Column("GB/s", [gb_figure(gb_per_s(row.both)) for row in rows], optional=True),
        "of_copy": Column("of\ncopy", [percent(of_copy(row, ceilings)) for row in rows]),
        "faster": Column(VS_NATIVE, [speedup_cell(row.faster, row.kernel) for row in rows]),
        "peak": memory_column("peak", [row.peak_memory_mib for row in rows]),
        "saved": memory_column("saved", [row.saved_mib for row in rows]),
        "ran": Column("ran", [row.ran or UNKNOWN for row in rows], words=True),
    }


def memory_column(name: str, values_mib: Sequence[float | None]) -> Column:
    """Sizes in MiB; in KiB where none of them has one."""
    known = [value for value in values_mib if value is not None]
    unit, factor = ("KiB", 1024) if known and max(known) < 1 else ("MiB", 1)
    return Column(f"{name}\n{unit}", [figure(None if v is None else v * factor) for v in values_mib], optional=True)


def mean_columns(means: Sequence[KernelMean]) -> list[Column]:
    """A row a kernel and operation: its geometric mean speedup over its shapes, and its worst shape."""
    return [
        Column("operation", [mean.operation for mean in means], words=True, once=True),
        Column("kernel", [mean.kernel for mean in means], words=True),
        Column("shapes", [figure(mean.shapes) for mean in means]),
        Column(VS_NATIVE, [speedup_cell(mean.faster) for mean in means]),
        Column("worst", [speedup_figure(mean.least) for mean in means]),
        Column("at", [shape_words(mean.least_shape) for mean in means], words=True),
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
    """A row a change: its speedup over native now and then, and the slowdown."""
    slower = [speedup_cell(Speedup(change.slower, change.interval)) for change in changes]
    return [
        Column("", [", ".join(change.row.words[1:]) for change in changes], words=True),
        Column("now", [_without_style(speedup_cell(change.now)) for change in changes]),
        Column("baseline", [_without_style(speedup_cell(change.baseline)) for change in changes]),
        Column("slowdown", [_without_style(cell) for cell in slower], style="bold"),
        Column(
            "verdict", [Cell(change.verdict, style=VERDICT_STYLES[change.verdict]) for change in changes], words=True
        ),
    ]


def _without_style(cell: Cell) -> Cell:
    return cell._replace(style="")


BROKEN = {"normalization": "normal-\nization", "activation": "acti-\nvation", "optimizer": "opti-\nmizer"}


def samples_per_s(row: StepCost) -> float | None:
    found = quartiles(row.samples_ms)
    return 1e3 * row.batch_size / found.median if found and found.median else None


def step_columns(rows: Sequence[StepCost]) -> list[Column]:
    """A row an arm, mode and kernel: how long a step takes."""
    return [
        *_step_names(rows),
        Column("ms/step", [samples_cell(row.samples_ms) for row in rows]),
        Column("samples/s", [figure(samples_per_s(row)) for row in rows]),
        Column(VS_NATIVE, [speedup_cell(row.faster, row.kernel) for row in rows]),
    ]


def share_columns(rows: Sequence[StepCost], *, ms: bool = False) -> list[Column]:
    """The same rows: the share of each class of work in a step, with its milliseconds beside it or not."""

    def cell(row: StepCost, name: str) -> Cell:
        value, whole = row.shares_ms.get(name), sum(row.shares_ms.values())
        if value is None or whole <= 0:
            return Cell(UNKNOWN)
        return Cell(percent(value / whole), f"{figure(value, 2 if value < 10 else 3)} ms" if ms and value else "")

    headers = {name: name.replace(" ", "\n", 1) for name in STEP_CLASSES}
    shares = [
        Column(header, [cell(row, name) for row in rows], short=BROKEN.get(name, ""))
        for name, header in headers.items()
    ]
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
        Column("mode", [row.mode for row in rows], words=True, once=True),
        Column("kernel", [row.kernel or UNKNOWN for row in rows], words=True),
    ]


# --- notes --------------------------------------------------------------------------------------------------------


def note_lines(profile: Profile) -> list[str]:
    """What a reader of the figures must know, a sentence each."""
    busy = busy_words(profile) if isinstance(profile, KernelProfile) else None
    return [*([] if busy is None else [busy]), *map(note_words, profile.notes)]


def busy_words(profile: KernelProfile) -> str | None:
    """That other programs seem to have used a CPU's cores; None where the copies do not show it."""
    if not profile.cores_shared:
        return None
    size, reached = profile.ceilings.copies[0]
    return (
        f"other programs seem to be using these cores: a copy of {size_words(size)} reached {reached:.2g} GB/s, the "
        f"largest {profile.ceilings.copy_gb_per_s:.2g} GB/s; threads wait for each other, so the times are not reliable"
    )


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
            return f"{note.arm} stands for {', '.join(note.others)} as well: their steps do the same work"
        case "model compiled":
            return f"{note.arm} is compiled: everything that torch.compile fused counts as other"
        case "random data":
            return f"{note.arm} is trained on random inputs; its loss is the mean square of its output"
        case "memory unknown":
            return f"{note.arm}, {note.kernel or 'no kernel'}: memory unknown: {note.reason}"
        case "norms not watched":
            return f"{note.arm}: the norm layers could not be observed: {note.reason}"
        case "norms watched":
            judged = f"; running statistics are judged after {note.of}" if (note.count or 0) < (note.of or 0) else ""
            return f"{note.arm}: the norm layers were observed for {note.count} training steps{judged}"


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
    """`2 batch norms (1 with relu, 1 alone), 3 LayerNorm`; empty without any."""
    batch = [layers for layers in norms if layers.kind == "batch norm"]
    words = [f"{layers.count} {layers.kind}" for layers in norms if layers.kind != "batch norm"]
    if batch:
        count = sum(layers.count for layers in batch)
        converted = ", ".join(f"{layers.count} {_calls_words(layers)}" for layers in batch if layers.converted)
        others = [layers for layers in batch if not layers.converted and layers.kernel != NATIVE]
        words = [
            f"{count} batch norm{'s' * (count > 1)}{f' ({converted})' * bool(converted)}",
            *(f"{layers.count} on the {layers.kernel} kernel" for layers in others),
            *words,
        ]
    return ", ".join(words)


def _calls_words(layers: NormLayers) -> str:
    """What a converted norm is one call with."""
    calls = [f"with {' + '.join(operations)}" if operations else "alone" for operations in layers.calls]
    return ", ".join(calls) or "unchanged"


class RemarkWords(NamedTuple):
    layer: str
    finding: str
    advice: str


def remark_words(remark: NormRemark) -> RemarkWords:
    """Where something is wrong with norm layers, what it is, and what to do about it."""
    more = f" and {remark.more_layers} more" if remark.more_layers else ""
    return RemarkWords((remark.layer or "(the model)") + more, *_finding_and_advice(remark))


def _finding_and_advice(remark: NormRemark) -> tuple[str, str]:
    figures = remark.figures
    match remark.kind:
        case "one value":
            return (
                "one value per channel: a batch of 1 without positions",
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
                "evaluation sees other inputs than training: raise the momentum, lower the learning rate, or "
                "estimate the statistics again over some batches before evaluation",
            )
        case "bias without effect":
            return (
                f"the bias of {remark.source} has no effect, since the norm subtracts it "
                f"({figures['parameters']:.0f} unused parameters)",
                f"set bias=False in {remark.source}: the norm has a bias of its own",
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
