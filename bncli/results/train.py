"""`bncli train`: events during a run, and its result."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from bncli.results.environment import Environment

Status = Literal["reached", "budget", "diverged", "interrupted", "given up"]  # given up: it could no longer win
AHEAD = 0.3  # of its steps to target, how much longer a run has to go on before they are settled


def most_steps_to_target(budget: int) -> float:
    """The most steps to target that a budget in optimizer steps can show; a run that misses took more."""
    return budget / (1 + AHEAD)


@dataclass(frozen=True)
class Target:
    """The value of a held-out metric that ends a run: accuracy rises to it, loss falls to it."""

    metric: Literal["accuracy", "loss"]
    value: float


@dataclass(frozen=True)
class TargetReached:
    """When a run reached one target. steps: as `RunResult.steps_to_target`; both are None for a miss."""

    target: Target
    steps: float | None
    first_hit: int | None


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
    initial_weights: str | None = None  # as of a result


@dataclass(frozen=True)
class StepDone:
    step: int
    loss: float
    learning_rate: float
    samples_per_s: float
    memory_mib: float | None


@dataclass(frozen=True)
class ProbePoint:
    """The values of one probe after `step` optimizer steps (names.MEASURES without the probe's name, and more).

    layer: of the model's module, as in its state_dict; None for the whole network.
    """

    measure: str
    layer: str | None
    step: int
    values: dict[str, float]


@dataclass(frozen=True)
class Probed:
    points: tuple[ProbePoint, ...]
    seconds: float  # that measuring them took
    inputs: dict[str, list[float]] = field(default_factory=dict)  # nonlinearity -> percentiles 0 to 100 over all units


@dataclass(frozen=True)
class RunningStatistics:
    """How far a batch norm's running statistics are from the population's, in the channel where it is most."""

    layer: str  # qualified name, as in the state_dict
    mean_deviations: float  # |running mean - population mean|, in the population's standard deviations
    variance_ratio: float  # running variance over population variance


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
    steps_to_target: float | None  # the optimizer steps spent below the target (engine.target); None for a miss
    first_hit: int | None  # the first evaluation at or past the target, as it is
    final: float | None  # the target's metric (accuracy without a target) at the last evaluation
    best: float | None
    evaluations: tuple[Evaluation, ...]
    ms_per_step: float | None  # training alone: evaluation and the first interval (warm-up) are left out
    samples_per_s: float | None
    training_s: float
    evaluation_s: float
    peak_memory_mib: float | None  # in training: resident set of the process on a CPU, the allocator's peak on a GPU
    parameters: int
    environment: Environment
    reason: str | None = None  # for `diverged`: what was not finite, and where
    also: tuple[TargetReached, ...] = ()  # further targets of the same run, in the recipe's order
    evaluation_peak_memory_mib: float | None = None
    probes: tuple[ProbePoint, ...] = ()
    probes_s: float = 0.0
    checkpoint_s: float = 0.0  # saving its state and its weights, which is not part of the training's time
    initial_weights: str | None = None  # the file that it started from, with its SHA-256; None: the recipe's init
    constant_guess: float | None = None  # held-out accuracy of always naming the most frequent class
    # At the last evaluation with precise population statistics; None: with the running ones.
    running_statistics: tuple[RunningStatistics, ...] | None = None
    ranks: int = 1  # processes that trained it together
    synchronized: bool | None = None  # whether batch statistics were those of all ranks; None: of one process, or none
    cores_lacked: float | None = None  # that other programs had meanwhile, on average (engine.load); None: unknown

    def steps_to(self, target: Target) -> float | None:
        """The steps to one of the run's targets; None for a miss."""
        if target == self.target:
            return self.steps_to_target
        return next((each.steps for each in self.also if each.target == target), None)


@dataclass(frozen=True)
class RunFinished:
    result: RunResult


Event = RunStarted | StepDone | Evaluated | Probed | RunFinished
