"""`bncli profile`: what batch norm costs in time and memory, beside what the machine can do.

Samples are kept raw, one a round. A round measures every kernel of a case, so that sample k of two kernels were taken
side by side, and their ratio is one of round k.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from bncli.results.environment import FORMAT_VERSION, Environment, Interval
from bncli.results.finding import Finding

Direction = Literal["forward", "backward", "both"]
Verdict = Literal["ok", "regressed", "cannot tell"]


SHARED = 0.1  # of the largest copy's GB/s: on idle cores a small copy, cold, has half or more; waiting threads take ms
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
class Faster:
    """How many times faster than the native kernel: the median of the rounds' ratios, above 1 is faster."""

    value: float
    interval: Interval  # of the median, from order statistics: it supposes no distribution


@dataclass(frozen=True)
class Times:
    """One direction of one case with one kernel."""

    samples_ms: tuple[float, ...]
    floor_bytes: float  # the fewest bytes to move: each tensor of this direction read or written once
    flops: float  # what the definition's arithmetic takes, whatever the kernel does


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
    faster: Faster | None = None  # of both directions; None for native itself, and without native in the run
    peak_memory_mib: float | None = None  # of forward and backward, beyond the inputs
    saved_mib: float | None = None  # kept for backward: the storages of its saved tensors, each once
    error: str | None = None
    wrong: bool = False  # whether the error is a wrong result, not something that is missing here
    finding: Finding | None = None  # the wrong result
    wrong_case: str | None = None  # the identifier of the small case that gives it; None: this row's own case
    judged_on_cases: bool = True  # False: on this row's case alone, since a compilation for each would take minutes


@dataclass(frozen=True)
class KernelMean:
    """One kernel, operation, dtype and layout over all of its shapes that were timed: geometric mean, and the worst."""

    kernel: str
    operation: str
    dtype: str
    layout: str
    shapes: int
    faster: Faster
    least: float  # of the shapes' own values
    least_shape: tuple[int, ...]


@dataclass(frozen=True)
class Ceilings:
    """What the machine reached in this run: copies by size, read once and written once, and multiply-adds in fp32."""

    copies: tuple[tuple[int, float], ...]  # bytes of the tensor, GB/s (10^9 bytes a second); the largest size last
    gflop_per_s: float | None

    @property
    def copy_gb_per_s(self) -> float:
        """Of the largest copy."""
        return self.copies[-1][1]

    @property
    def cores_shared(self) -> bool:
        """Whether a small copy was so slow that threads must have waited for cores that other programs used."""
        return bool(self.copies) and self.copies[0][1] < SHARED * self.copy_gb_per_s


@dataclass(frozen=True)
class KernelProfile:
    environment: Environment
    cold: bool  # whether the last cache was flushed before each sample
    seconds: float
    ceilings: Ceilings
    rows: tuple[KernelCost, ...]
    means: tuple[KernelMean, ...]
    notes: tuple[str, ...]
    planned: int  # rows; fewer than that are there where it was interrupted
    format_version: int = FORMAT_VERSION


# --- the step view ------------------------------------------------------------------------------------------------

STEP_CLASSES = ("normalization", "convolution, linear", "activation", "optimizer", "data", "other", "gaps")


@dataclass(frozen=True)
class StepMemory:
    """Parts of the peak of a training step, in MiB; None where unknown."""

    parameters_mib: float
    gradients_mib: float
    optimizer_mib: float
    activations_mib: float  # storages of tensors saved for backward that are no parameters
    peak_mib: float | None  # the allocator's on a GPU; on a CPU the resident set of a fresh process that trains


@dataclass(frozen=True)
class StepCost:
    """A row of the step view: one model with one kernel, training or evaluation."""

    arm: str
    kernel: str | None  # None: the model has no batch norm to choose a kernel for
    mode: Literal["training", "evaluation"]
    batch_size: int
    samples_ms: tuple[float, ...]  # a step each; in evaluation a forward pass of one batch
    shares_ms: dict[str, float]  # one of STEP_CLASSES -> ms of a step, from a profiled pass apart, scaled to the median
    memory: StepMemory | None  # None in evaluation
    faster: Faster | None  # over the same arm and mode with the native kernel
    norms: str | None  # what the norm layers are: how many, how many fused, with what
    error: str | None = None
    wrong: bool = False  # whether the error is a wrong result, not something that is missing here


@dataclass(frozen=True)
class NormRemark:
    """Something that a norm layer suffers from, with what to do about it."""

    arm: str
    layer: str  # its qualified name in the model; several layers: the first, and how many more
    finding: str
    advice: str


@dataclass(frozen=True)
class StepProfile:
    name: str
    environment: Environment
    seconds: float
    rows: tuple[StepCost, ...]
    remarks: tuple[NormRemark, ...]
    notes: tuple[str, ...]
    planned: int
    format_version: int = FORMAT_VERSION


# --- held to a baseline -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Change:
    """A row beside the same row of a baseline, each by its ratio to native in its own run.

    slower: how many times slower than in the baseline, relative to native; its interval from the ends of both.
    """

    name: str
    now: Faster
    baseline: Faster
    slower: float
    interval: Interval
    verdict: Verdict


@dataclass(frozen=True)
class Gate:
    fail_above: float
    changes: tuple[Change, ...]
    only_now: tuple[str, ...]  # rows without a counterpart in the baseline
    only_baseline: tuple[str, ...]
    strict: bool = False  # what it cannot tell fails too
    disturbed: tuple[str, ...] = ()  # of "this run" and "the baseline"; then no row is called regressed
    format_version: int = FORMAT_VERSION

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
    seconds: float | None = None  # that it may take, by wish


@dataclass(frozen=True)
class Measuring:
    """What goes on now, for a bar: `fraction` of the whole is done, which takes at least `least_s` in all, if known."""

    label: str
    fraction: float
    least_s: float = 0.0


@dataclass(frozen=True)
class RowDone:
    row: KernelCost | StepCost


ProfileEvent = ProfileStarted | Measuring | RowDone
