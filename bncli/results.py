"""What was found: events during a run, results after it. Frozen plain data, no torch, readable back from JSON.

Units are in the names: `_s` seconds, `_ms` milliseconds, `_mib` mebibytes (2**20 bytes). `None` means unknown or never,
and is never replaced by a zero.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

FORMAT_VERSION = 1  # of every JSON file that holds these; raised when a field changes its meaning

Status = Literal["reached", "budget", "diverged", "interrupted"]
Phase = Literal["tune", "report"]


@dataclass(frozen=True)
class Target:
    """The value of a held-out metric that ends a run: accuracy rises to it, loss falls to it."""

    metric: Literal["accuracy", "loss"]
    value: float

    def reached_by(self, value: float) -> bool:
        return value >= self.value if self.metric == "accuracy" else value <= self.value


@dataclass(frozen=True)
class Evaluation:
    """The held-out examples, all of them, after `step` optimizer steps (step 0: before the first)."""

    step: int
    accuracy: float
    loss: float
    train_loss: float | None  # of the last batch before this evaluation; None at step 0

    def value(self, metric: str) -> float:
        return self.accuracy if metric == "accuracy" else self.loss


@dataclass(frozen=True)
class RunStarted:
    name: str
    device: str
    parameters: int
    budget: int  # optimizer steps
    batch_size: int
    target: Target | None


@dataclass(frozen=True)
class StepDone:
    step: int
    loss: float
    learning_rate: float
    samples_per_s: float
    memory_mib: float | None


@dataclass(frozen=True)
class Evaluated:
    evaluation: Evaluation
    learning_rate: float


@dataclass(frozen=True)
class Environment:
    """Where a run was made, so that two figures can be told apart later."""

    bncli: str
    python: str
    torch: str
    platform: str
    processor: str
    device: str
    driver: str | None
    threads: int
    date: str  # ISO 8601, UTC


@dataclass(frozen=True)
class RunResult:
    """One run from its first step to its target, its budget, or its end for another reason."""

    status: Status
    steps_run: int
    budget: int
    target: Target | None
    steps_to_target: float | None  # interpolated crossing of the centred median of three evaluations
    first_hit: int | None  # the first evaluation at or past the target, unsmoothed
    final: float | None  # the target's metric (accuracy without a target) at the last evaluation
    best: float | None
    evaluations: tuple[Evaluation, ...]
    ms_per_step: float | None  # training alone: evaluation and the first interval (warm-up) are left out
    samples_per_s: float | None
    training_s: float
    evaluation_s: float
    peak_memory_mib: float | None  # resident set of the process on a CPU, the allocator's peak on a GPU
    parameters: int
    environment: Environment
    reason: str | None = None  # for `diverged`: what was not finite, and where


@dataclass(frozen=True)
class RunFinished:
    result: RunResult


Event = RunStarted | StepDone | Evaluated | RunFinished


@dataclass(frozen=True)
class RunRecord:
    """One run of a comparison: what was asked, and its result or the reason why there is none."""

    key: str  # of the resolved recipe, the device and the versions: the name of the run's file
    arm: str
    point: dict[str, Any]  # dotted recipe field -> the value of the grid that this run used
    seed: int
    phase: Phase
    result: RunResult | None
    failure: str | None = None


@dataclass(frozen=True)
class Interval:
    """A 95 % confidence interval. A missing side is open: nothing in the data bounds it."""

    low: float | None
    high: float | None


@dataclass(frozen=True)
class Ratio:
    """How many times fewer steps than the reference arm. `value` is None where the data allow a bound only."""

    value: float | None
    interval: Interval
    method: Literal["welch", "rank", "bound", "none"]
    p_value: float | None  # two-sided, of the hypothesis that the ratio is 1
    holm_p_value: float | None = None  # the same after Holm's correction over all arms of the table


@dataclass(frozen=True)
class Steps:
    """Steps to target over seeds. `value` is the geometric mean, the median once a run is censored, None past half."""

    value: float | None
    interval: Interval
    method: Literal["geometric mean", "median", "bound"]


@dataclass(frozen=True)
class TuningCell:
    """One arm at one point of the grid, over the tuning seeds."""

    point: dict[str, Any]
    hits: int
    runs: int
    steps: float | None  # geometric mean over the runs that hit; None without one
    diverged: int = 0


@dataclass(frozen=True)
class ArmSummary:
    """One row of the comparison's table."""

    arm: str
    point: dict[str, Any]  # the grid's fields at the values that the report's runs used
    fixed: tuple[str, ...]  # fields of the grid that the arm fixes and that were therefore not tuned
    at_edge: tuple[str, ...]  # fields whose best value is the first or the last of its list
    hits: int
    runs: int  # report runs that ended by themselves (failed and interrupted ones are not counted)
    steps: Steps
    first_hit: float | None  # geometric mean of the raw first hits
    ratio: Ratio | None  # None for the reference arm
    best: float | None  # median over the report's runs of each run's best metric
    samples_per_s: float | None  # median
    ms_per_step: float | None  # median
    peak_memory_mib: float | None  # largest
    parameters: int | None
    diverged: int
    failures: tuple[str, ...]
    tuning: tuple[TuningCell, ...]
    curve: tuple[tuple[float, float, float, float], ...]  # step, median metric, lower and upper quartile over seeds


@dataclass(frozen=True)
class ComparisonPlan:
    """What a comparison asked for, without the recipes themselves: enough to make the table again from the runs."""

    name: str
    arms: tuple[str, ...]
    fixed: dict[str, tuple[str, ...]]  # arm -> grid fields that it fixes
    grid: dict[str, tuple[Any, ...]]
    reference: str
    tune_seeds: tuple[int, ...]
    report_seeds: tuple[int, ...]
    target: Target
    budget: int
    evaluate_every: int
    data: str
    recipes: dict[str, Any] = field(default_factory=dict)  # arm -> its resolved recipe, as plain data


@dataclass(frozen=True)
class Comparison:
    """The answer to "how many times fewer steps?": the plan, a row an arm, remarks, and every run that it rests on."""

    plan: ComparisonPlan
    arms: tuple[ArmSummary, ...]
    notes: tuple[str, ...]
    runs: tuple[RunRecord, ...]
    planned_runs: int
    format_version: int = FORMAT_VERSION


# --- what happens while a comparison runs -------------------------------------------------------------------------


@dataclass(frozen=True)
class ComparisonStarted:
    name: str
    planned: int
    done: int  # found on disk, made by an earlier call
    metric: str


@dataclass(frozen=True)
class RunBegan:
    worker: int
    label: str
    budget: int


@dataclass(frozen=True)
class RunProgressed:
    worker: int
    step: int
    value: float  # of the target's metric


@dataclass(frozen=True)
class RunEnded:
    worker: int
    label: str
    done: int
    outcome: str


ComparisonEvent = ComparisonStarted | RunBegan | RunProgressed | RunEnded


# --- what would be done -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PlannedArm:
    """One arm before it is trained. Sizes are None where only the user's own code could tell."""

    name: str
    changes: tuple[tuple[str, Any], ...]  # dotted field, value: what differs from the base
    fixed: tuple[str, ...]
    parameters: int | None
    memory_mib: float | None  # estimated: parameters, gradients, optimizer state, activations; without the framework
    tuning_runs: int
    report_runs: int


@dataclass(frozen=True)
class Planned:
    """The outcome of a dry run."""

    name: str
    fields: tuple[tuple[str, Any, str], ...]  # of the base run: dotted field, value, and where the value came from
    arms: tuple[PlannedArm, ...]
    grid: dict[str, tuple[Any, ...]]
    runs: int
    steps_at_most: int


# --- bncli gradcheck ----------------------------------------------------------------------------------------------

Effort = Literal["quick", "default", "full"]


@dataclass(frozen=True)
class CheckGroup:
    """Cases of one kind, finished. Errors are in units of each case's own tolerance: up to 1 passes."""

    section: str  # values, derivatives, invariants, hard inputs
    name: str
    cases: int
    failed: int
    worst: float | None  # the largest error in tolerances, infinite for NaN where a number belongs; None: no case ran
    worst_case: str | None  # that case's identifier, as `--only` takes it
    tolerance: str  # how it was derived, in words
    not_checked: str | None = None  # why no case of this group could run


@dataclass(frozen=True)
class CheckFailure:
    """A case that failed: what was expected, what was found, and the one line that runs it again."""

    case: str
    message: str
    reproduce: str


@dataclass(frozen=True)
class Diagnosis:
    """A kind of bug that the failures look like, with the evidence for it."""

    bug: str
    evidence: str


@dataclass(frozen=True)
class GradientPaths:
    """dL/dx of one case in its three parts (Ioffe & Szegedy 2015, section 3; the l2 norms over all elements)."""

    case: str
    direct: float  # through xhat_i alone, mean and variance held constant: dNorm(x, X)/dx
    through_mean: float  # with the next, dNorm(x, X)/dX
    through_variance: float
    full: float
    error: float  # of the kernel's dL/dx against float64 central differences, relative l2
    bound: float  # what that error may be
    lost: float  # the relative l2 error of the direct part alone, taken for the gradient


@dataclass(frozen=True)
class Gradcheck:
    kernel: str
    norm: str
    effort: Effort
    environment: Environment
    ran: str  # what really ran: torch's operator, a Triton kernel on a GPU, Triton's interpreter, the user's function
    seconds: float
    groups: tuple[CheckGroup, ...]
    paths: tuple[GradientPaths, ...]
    failures: tuple[CheckFailure, ...]  # at most the first few
    diagnoses: tuple[Diagnosis, ...]

    @property
    def passed(self) -> bool:
        return not any(group.failed for group in self.groups)


@dataclass(frozen=True)
class BiasStep:
    """After `step` steps of the two descents of Ioffe & Szegedy 2015, section 2."""

    step: int
    bias_ignoring: float  # the step takes E[x] for a constant
    loss_ignoring: float
    bias_full: float  # the step follows the whole gradient
    loss_full: float
