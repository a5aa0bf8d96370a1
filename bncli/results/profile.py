"""`bncli profile`: time and memory of batch norm, compared with what the machine reaches.

Samples are kept raw, one a round. A round measures every kernel of a case, so that sample k of two kernels were taken
side by side, and their ratio is one of round k.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from bncli.results.environment import PROFILE_VERSION, Environment, Interval
from bncli.results.finding import Finding

Direction = Literal["forward", "backward", "both"]
Mode = Literal["training", "evaluation"]
Verdict = Literal["ok", "regressed", "cannot tell"]

ITEM_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8}


@dataclass(frozen=True)
class Case:
    """One batch norm: plain data, so that it can be sent to another process and named in one line."""

    shape: tuple[int, ...]  # (N, C, *S)
    operation: str = "bn"  # bn, bn+relu, bn+add+relu, bn+silu, bn+leaky_relu
    dtype: str = "bf16"
    layout: str = "contiguous"  # or channels_last (2d or 3d), or strided: every second position of a larger tensor
    training: bool = True
    affine: str = "wide"  # weight and bias in float32 or wider; same: in the input's dtype; none
    tracked: bool = True  # with running statistics

    def __str__(self) -> str:
        words = [self.dtype, self.layout, self.operation, "x".join(map(str, self.shape))]
        words += ["" if self.training else "eval", "" if self.affine == "wide" else f"affine={self.affine}"]
        return " ".join(word for word in [*words, "" if self.tracked else "untracked"] if word)

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def tensor_bytes(self) -> int:
        return self.elements * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class Speedup:
    """Native's time over a kernel's: the median of the rounds' ratios; above 1 the kernel is faster than native."""

    value: float
    interval: Interval  # of the median, from order statistics: it supposes no distribution
    of_medians: float | None = None  # native's median time over the kernel's, which are shown beside it

    @property
    def contradicted(self) -> bool:
        """Whether the medians' ratio is outside the interval or across 1, by more than 5 %, as times are spread."""
        other, low, high = self.of_medians or self.value, self.interval.low or 0.0, self.interval.high or math.inf
        within = low <= other <= high and (other - 1) * (self.value - 1) >= 0
        return not within and abs(math.log(other / self.value)) > math.log(1.05)


@dataclass(frozen=True)
class Times:
    """One direction of one case with one kernel."""

    samples_ms: tuple[float, ...]
    floor_bytes: float  # the fewest bytes to move: each tensor of this direction read or written once
    flops: float  # what the definition's arithmetic takes, whatever the kernel does


@dataclass(frozen=True)
class KernelRow:
    """The identity of a row of the kernel view across runs."""

    case: Case
    kernel: str

    @property
    def words(self) -> tuple[str, str, str]:
        """All of the case but its shape, the shape, and the kernel."""
        case = self.case
        words = [case.operation, case.dtype, case.layout, "" if case.training else "evaluation"]
        words += ["" if case.affine == "wide" else f"affine={case.affine}", "" if case.tracked else "untracked"]
        return " ".join(filter(None, words)), "x".join(map(str, case.shape)), self.kernel

    def __str__(self) -> str:
        return ", ".join(self.words)


@dataclass(frozen=True)
class KernelCost:
    """A row of the kernel view. There are no times where `error` tells why."""

    case: Case
    kernel: str
    calls: int  # how often the model that the shape comes from calls it in a forward pass
    ran: str | None  # the implementation that really ran: cuDNN, ATen, on-chip, in cache, two passes, ...
    forward: Times | None = None
    backward: Times | None = None
    both: Times | None = None
    faster: Speedup | None = None  # of both directions; None for native itself, and without native in the run
    # Of both directions where each tensor takes new pages; None where that is what the times above are of, or where
    # tensors are too small to be mapped alone.
    new_memory: Times | None = None
    faster_new_memory: Speedup | None = None
    peak_memory_mib: float | None = None  # of forward and backward, beyond the inputs
    saved_mib: float | None = None  # kept for backward: the storages of its saved tensors, each once
    error: str | None = None
    wrong: bool = False  # whether the error is a wrong result, not something that is missing here
    finding: Finding | None = None  # the wrong result
    wrong_case: str | None = None  # the identifier of the small case that gives it; None: this row's own case
    judged_on_cases: bool = True  # False: on this row's case alone, since a compilation for each would take minutes
    cores_lacked: float | None = None  # that other programs had meanwhile, on average (engine.load); None: unknown

    @property
    def key(self) -> KernelRow:
        return KernelRow(self.case, self.kernel)


@dataclass(frozen=True)
class KernelMean:
    """One kernel, operation, dtype and layout over all of its shapes that were timed: geometric mean, and the worst."""

    kernel: str
    operation: str
    dtype: str
    layout: str
    shapes: int
    faster: Speedup
    least: float  # of the shapes' own values
    least_shape: tuple[int, ...]
    cores_lacked: float | None = None  # the most of its rows
    faster_new_memory: Speedup | None = None  # with the rows' in new memory, where any of them has been measured there


@dataclass(frozen=True)
class Ceilings:
    """What the machine reached in this run: copies by size, read once and written once, and multiply-adds in fp32."""

    copies: tuple[tuple[int, float], ...]  # bytes of the tensor, GB/s (10^9 bytes a second); the largest size last
    gflop_per_s: float | None

    @property
    def copy_gb_per_s(self) -> float:
        """Of the largest copy."""
        return self.copies[-1][1]


NoteKind = Literal[
    # Of the kernel view.
    "channels sampled",  # cases that ran whole, and were judged on some of their channels
    "peak needs compilation",  # kernel: a fresh process would have to compile it again
    "peak unknown",  # kernel, cases, reason
    "few rounds",  # cases: fewer than `count`, which an interval takes
    "compilation",  # kernel: `seconds`, which are in no row
    "host bound",  # in `count` samples of `of` the device waited for the host
    # Of the step view, each of an arm.
    "same work",  # others: the arms whose step takes the same work
    "model compiled",  # what torch.compile fused is other in the classes of time
    "random data",  # trained on random numbers
    "memory unknown",  # kernel, reason
    "norms not watched",  # reason
    "not folded",  # reason
    "layers not traced",  # torch.compile merged them
    "norms watched",  # for `count` training steps; `of`: those after which running statistics are judged
]


@dataclass(frozen=True)
class Note:
    """What a reader of the figures must know; the fields that its kind names are set."""

    kind: NoteKind
    kernel: str | None = None
    cases: tuple[Case, ...] = ()
    arm: str | None = None
    others: tuple[str, ...] = ()
    count: int | None = None
    of: int | None = None
    seconds: float | None = None
    reason: str | None = None  # an error's own text


@dataclass(frozen=True)
class KernelProfile:
    environment: Environment
    cold: bool  # whether the last cache was flushed before each sample
    seconds: float
    ceilings: Ceilings
    rows: tuple[KernelCost, ...]
    means: tuple[KernelMean, ...]
    notes: tuple[Note, ...]
    planned: int  # rows; fewer than that are there where it was interrupted
    format_version: int = PROFILE_VERSION


# --- the step view ------------------------------------------------------------------------------------------------

FOLDED = "folded"  # in place of a kernel: the batch norms are part of the layers before them; evaluation alone

STEP_CLASSES = ("normalization", "convolution, linear", "activation", "loss", "optimizer", "data", "other", "gaps")


@dataclass(frozen=True)
class StepMemory:
    """Parts of the peak of a training step, in MiB; None where unknown."""

    parameters_mib: float
    gradients_mib: float
    optimizer_mib: float
    activations_mib: float  # storages of tensors saved for backward that are no parameters
    peak_mib: float | None  # the allocator's on a GPU; on a CPU the resident set of a fresh process that trains


@dataclass(frozen=True)
class NormLayers:
    """Norm layers of a model that are alike.

    kind: "batch norm", or the class of another norm of torch. kernel: of a batch norm, or FOLDED. converted: whether
    the model went through `bncli.convert`; then `calls` has the operations that follow the norm in one call, for each
    different call, and is empty for a norm that was left as it was.
    """

    kind: str
    count: int
    kernel: str | None = None
    converted: bool = False
    calls: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True)
class StepDifference:
    """What of a training step is farthest off the native kernel's step, as a relative error in the 2-norm."""

    kind: Literal["loss", "gradient", "running statistic", "output"]
    tensor: str  # qualified name of a parameter or a buffer; empty for the loss and for the output in evaluation
    more: int  # further tensors that are off
    error: float
    allowed: float
    in_float64: bool  # whether both steps were taken in float64, or in the recipe's precision


@dataclass(frozen=True)
class StepRow:
    """The identity of a row of the step view across runs."""

    arm: str
    mode: Mode
    kernel: str | None

    @property
    def words(self) -> tuple[str, str, str]:
        return self.arm, self.mode, str(self.kernel)

    def __str__(self) -> str:
        return ", ".join(self.words)


@dataclass(frozen=True)
class StepCost:
    """A row of the step view: one model with one kernel, training or evaluation."""

    arm: str
    kernel: str | None  # or FOLDED; None: the model has no batch norm to choose a kernel for
    mode: Mode
    batch_size: int
    samples_ms: tuple[float, ...]  # a step each; in evaluation a forward pass of one batch
    shares_ms: dict[
        str, float
    ]  # one of STEP_CLASSES -> ms of a step, from a separate profiled pass, scaled to the median
    memory: StepMemory | None  # None in evaluation
    faster: Speedup | None  # over the same arm and mode with the native kernel
    norms: tuple[NormLayers, ...]
    error: str | None = None
    wrong: bool = False  # whether the error is a wrong result, not something that is missing here
    difference: StepDifference | None = None  # the wrong result
    cores_lacked: float | None = None  # as of KernelCost

    @property
    def key(self) -> StepRow:
        return StepRow(self.arm, self.mode, self.kernel)


RemarkKind = Literal[  # with the figures that it has
    "one value",  # a channel, so that nothing is left of the input
    "constant channels",  # channels, of_channels; eps
    "large mean",  # channels, of_channels; deviations: the largest; limit: beyond which digits of the variance are lost
    "cumulative average",  # no momentum
    "short half-life",  # momentum, half_life_steps
    "long half-life",  # momentum, half_life_steps, and where it is known budget_steps and kept: the share of the start
    "running mean off",  # channels, of_channels; steps; deviations: the largest
    "bias without effect",  # source: the layer with the bias; parameters
    "last batch of one",  # raises: 1 where torch refuses that batch, else 0
]


@dataclass(frozen=True)
class NormRemark:
    """Something wrong with norm layers of a model, quoted from the layer where it is worst."""

    arm: str
    kind: RemarkKind
    layer: str  # its qualified name; empty where the model itself is the norm
    more_layers: int = 0  # with the same
    figures: dict[str, float] = field(default_factory=dict)
    channels: tuple[int, ...] = ()
    dtype: str | None = None  # of the input
    source: str | None = None  # qualified name of another layer
    source_class: str = ""  # of its module, as is the next
    layer_class: str = ""


@dataclass(frozen=True)
class StepProfile:
    name: str
    environment: Environment
    seconds: float
    rows: tuple[StepCost, ...]
    remarks: tuple[NormRemark, ...]
    notes: tuple[Note, ...]
    planned: int
    format_version: int = PROFILE_VERSION


Profile = KernelProfile | StepProfile
Row = KernelRow | StepRow


# --- held to a baseline -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Change:
    """A row compared with the same row of a baseline, each by its ratio to native in its own run.

    slower: how many times slower than in the baseline, relative to native; its interval from the ends of both.
    """

    row: Row
    now: Speedup
    baseline: Speedup
    slower: float
    interval: Interval
    verdict: Verdict


@dataclass(frozen=True)
class Gate:
    fail_above: float
    changes: tuple[Change, ...]
    only_now: tuple[Row, ...]  # rows without a counterpart in the baseline
    only_baseline: tuple[Row, ...]
    strict: bool = False  # what it cannot tell fails too
    disturbed: tuple[Literal["this run", "the baseline"], ...] = ()  # in which other programs disturbed a row of it
    format_version: int = PROFILE_VERSION

    @property
    def regressed(self) -> bool:
        return any(change.verdict == "regressed" for change in self.changes)

    @property
    def undecided(self) -> int:
        """Rows of the baseline of which it cannot tell, those that came to no ratio now among them."""
        return sum(change.verdict == "cannot tell" for change in self.changes) + len(self.only_baseline)

    @property
    def failed(self) -> bool:
        return self.regressed or (self.strict and self.undecided > 0)


# --- what happens while it measures -------------------------------------------------------------------------------


@dataclass(frozen=True)
class ProfileStarted:
    what: str
    planned: int  # rows
    seconds: float | None = None  # the time budget, if one is set


Phase = Literal[
    "ceilings",  # the machine's copies and multiply-adds
    "case",
    # Of the step view, each of an arm.
    "check",  # its models are made, and their steps compared
    "round",  # mode, round
    "parts",  # mode: the classes of time and the memory
    "norms",  # norm-layer diagnostics
]


@dataclass(frozen=True)
class Measuring:
    """What goes on now: `fraction` of the whole is done, which takes at least `least_s` in all, if known.

    The fields that its phase names are set.
    """

    subject: str  # a case, or an arm; empty for the machine
    fraction: float = 0.0
    least_s: float = 0.0
    phase: Phase = "case"
    mode: Mode | None = None
    round: int | None = None


@dataclass(frozen=True)
class RowDone:
    row: KernelCost | StepCost


ProfileEvent = ProfileStarted | Measuring | RowDone
