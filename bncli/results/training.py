"""`bncli train`: events during a run, and its result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bncli.results.shared import Environment

Status = Literal["reached", "budget", "diverged", "interrupted"]


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
