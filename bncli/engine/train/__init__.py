"""One run: a recipe in, events out. No printing, no hooks, no callbacks."""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bncli import kernels
from bncli.engine import data
from bncli.engine.data.splits import Dataset
from bncli.engine.data.splits import order as in_order
from bncli.engine.device import PeakMemory, environment, in_tf32, resolve, synchronize, tf32_allowed
from bncli.engine.models import build, stream
from bncli.engine.target import StepsToTarget, evaluation_steps
from bncli.errors import BncliError, DataError, RunFailed
from bncli.recipe.layers import shape_contradictions
from bncli.recipe.sections import Adam, AdamW, BatchNorm, Cosine, Exponential, OwnModel, Recipe, Sgd, StepDecay
from bncli.recipe.yaml import dotted
from bncli.results.train import (
    Evaluated,
    Evaluation,
    Event,
    RunFinished,
    RunResult,
    RunStarted,
    Status,
    StepDone,
    Target,
    TargetReached,
)

HERE = str(Path(__file__).parents[2])  # bncli's own code
EVALUATED_VALUES = 2**17  # of the examples evaluated at once, 512 KiB of float32
LSUV_EXAMPLES = 500
SKIPPED_AT_MOST = 50  # fp16 steps in a row; each halves the scale of the loss, which begins at 2^16
LOG_EVERY = 20  # steps at most between two looks at the loss; each is a host sync


def run(
    recipe: Recipe,
    device: str = "auto",
    *,
    threads: int | None = None,
    name: str = "run",
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[Event]:
    """`train` with the recipe's own data on a device by name. Raises DataError and Unavailable besides.

    `threads` is for a CPU; None leaves torch's choice, which is one a core.
    """
    on = resolve(device)
    if recipe.norm.kind == "batch":
        kernels.get(recipe.norm.kernel, on)
    if threads is not None:
        torch.set_num_threads(threads)
    dataset = data.load(recipe.data, on, data.MEMORY_FORMATS[recipe.train.memory_format])
    yield from train(recipe, dataset, on, name=name, stop=stop)


def train(
    recipe: Recipe,
    dataset: Dataset,
    device: torch.device,
    *,
    name: str = "run",
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[Event]:
    """Train until the target, the budget, a loss that is not finite, or `stop()`; the last event holds the result.

    `stop` is asked after every step. Raises DataError and RecipeError for what cannot be built.
    """
    check_fit(recipe, dataset)
    with blaming_own_code(recipe), tf32_allowed(recipe.train.tf32):
        yield from _train(recipe, dataset, device, name, stop)


def check_fit(recipe: Recipe, dataset: Dataset) -> None:
    """Raises DataError for what only the data's file could tell; the rest of a recipe is checked before."""
    for keys, text in shape_contradictions(recipe, dataset.shape, dataset.classes):
        raise DataError(f"{dotted(keys)}: {text}")


@contextlib.contextmanager
def blaming_own_code(recipe: Recipe) -> Iterator[None]:
    """Turn what the user's own model raises into one sentence with the line that raised it. Raises RunFailed."""
    try:
        yield
    except (Exception, SystemExit) as error:
        if not isinstance(recipe.model, OwnModel) or isinstance(error, BncliError):
            raise
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "site-packages" not in frame.filename]
        where = [f", in {frame.filename}:{frame.lineno}" for frame in frames if not frame.filename.startswith(HERE)]
        text = " ".join(str(error).split())
        raise RunFailed(
            f"model.module: {recipe.model.module} raised {type(error).__name__}{': ' * bool(text)}{text}"
            f"{where[-1] if where else ''}. It is given batches (N, *shape) and returns logits (N, classes)"
        ) from error


def _train(
    recipe: Recipe, dataset: Dataset, device: torch.device, name: str, stop: Callable[[], bool]
) -> Iterator[Event]:
    run = Training(recipe, dataset, device)
    budget = recipe.train.steps
    evaluations = evaluation_steps(recipe.train.evaluate_every, budget)
    next_evaluation = next(evaluations)
    yield RunStarted(name, run.device_name, run.parameters, budget, recipe.train.batch_size, run.target)
    yield run.evaluate(0, None)
    run.clock.start()
    status: Status = "budget"
    step, reason = 0, None
    for step, loss in enumerate(islice(run.losses(), budget), 1):
        due = step == next_evaluation
        if due or step % LOG_EVERY == 0:
            value = loss.item()
            if not math.isfinite(value):
                status, reason = "diverged", f"the training loss is {value} at step {step}"
                break
            yield StepDone(step, value, run.learning_rate, run.clock.samples_per_s(step), run.memory_mib)
        if due:
            run.clock.pause(step)
            yield run.evaluate(step, value)
            next_evaluation = next(evaluations, budget)
            if recipe.train.stop_at_target and run.reached:
                status = "reached"
                break
            run.clock.start()
        if stop():
            status = "interrupted"
            break
    if run.skipped == SKIPPED_AT_MOST:
        status = "diverged"
        reason = f"after step {step} the fp16 gradients of {SKIPPED_AT_MOST} batches in a row were not finite"
    run.clock.pause(step)
    yield RunFinished(run.result(status, step, reason))


@dataclass
class Clock:
    """Training time without evaluations. The first interval is warm-up (lazy initialization, compilation)."""

    batch_size: int
    device: torch.device
    now: Callable[[], float] = perf_counter
    intervals: list[tuple[int, float]] = field(default_factory=list)  # steps, seconds
    _started: float | None = None
    _step: int = 0

    def start(self) -> None:
        self._started = self.now()

    def pause(self, step: int) -> None:
        if self._started is not None and step > self._step:
            synchronize(self.device)
            self.intervals.append((step - self._step, self.now() - self._started))
            self._step = step
        self._started = None

    @property
    def training_s(self) -> float:
        return sum(seconds for _, seconds in self.intervals)

    def ms_per_step(self) -> float | None:
        measured = self.intervals[1:] or self.intervals
        steps = sum(count for count, _ in measured)
        return 1e3 * sum(seconds for _, seconds in measured) / steps if steps else None

    def samples_per_s(self, step: int) -> float:
        """Of the interval that is open, for the bar."""
        seconds = self.now() - self._started if self._started is not None else 0.0
        return (step - self._step) * self.batch_size / seconds if seconds > 0 else 0.0


class Training:
    """What one run holds: model, optimizer, data in order, and what it has seen so far."""

    def __init__(self, recipe: Recipe, dataset: Dataset, device: torch.device) -> None:
        train = recipe.train
        self.recipe, self.dataset, self.device = recipe, dataset, device
        self.target = Target(train.target.metric, train.target.value) if train.target else None
        values = (train.target.value, *train.target.also) if train.target else ()
        self._reach = [StepsToTarget(Target(train.target.metric, value)) for value in values if train.target]
        self.evaluations: list[Evaluation] = []
        self.evaluation_s = 0.0
        self.evaluation_size = evaluation_size(recipe, dataset.shape)
        self.memory = PeakMemory(device)  # looked at in evaluations, which are outside the throughput
        self.clock = Clock(train.batch_size, device)
        split = dataset.train
        order = in_order(len(split), train.batch_size, stream(train.seed, "order"), split.index_device)
        self.batches = split.batches(order, stream(train.seed, "augment"))
        model = build(recipe, dataset.shape, dataset.classes, lambda: self._sample(LSUV_EXAMPLES), device)
        model = model.to(device, memory_format=data.MEMORY_FORMATS[train.memory_format])  # type: ignore[call-overload]
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        self.optimizer = optimizer(recipe, model)
        self.scheduler = scheduler(recipe, self.optimizer)
        if train.compile:
            torch.compiler.reset()  # past runs of this process count towards a limit, beyond which a model runs eager
        self.model: nn.Module = torch.compile(model) if train.compile else model  # type: ignore[assignment]
        _begin_training(model)
        self.learning_rate = float(self.optimizer.param_groups[0]["lr"])  # of the last update, or of the first to come
        self.skipped = 0  # batches in a row for which the optimizer took no step
        self.step = self._make_step()
        environment_of_run = environment(device, in_tf32(device))
        self.environment, self.device_name = environment_of_run, environment_of_run.device

    def losses(self) -> Iterator[Tensor]:
        """The training loss of each optimizer step. Ends where the fp16 scaler has skipped too many in a row.

        A batch whose step is skipped is consumed; it counts neither for the budget nor for the schedule.
        """
        for x, y in self.batches:
            loss = self.step(x, y)
            if not self.skipped:
                yield loss
            elif self.skipped == SKIPPED_AT_MOST:
                return

    def _sample(self, count: int) -> Tensor:
        """Some training examples of every kind, on the CPU: a file may hold them sorted by class."""
        split, seed = self.dataset.train, self.recipe.train.seed
        some = torch.randperm(len(split), generator=stream(seed, "sample"))[:count].to(split.index_device)
        return next(split.batches(iter([some]), stream(seed, "sample augment")))[0].cpu()

    def _make_step(self) -> Callable[[Tensor, Tensor], Tensor]:
        model, optimizer, scheduler = self.model, self.optimizer, self.scheduler
        if self.recipe.train.precision == "fp32" and scheduler is None:

            def plain(x: Tensor, y: Tensor) -> Tensor:
                loss = F.cross_entropy(model(x), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                return loss.detach()

            return plain
        scaler = torch.amp.GradScaler(self.device.type, enabled=self.recipe.train.precision == "fp16")

        def general(x: Tensor, y: Tensor) -> Tensor:
            with self.autocast():
                loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            self.skipped += 1  # unless the scaler lets the optimizer take its step, which sets it back
            scaler.step(optimizer)
            scaler.update()
            if not self.skipped:
                self.learning_rate = float(optimizer.param_groups[0]["lr"])
                if scheduler is not None:
                    scheduler.step()
            return loss.detach()

        optimizer.register_step_post_hook(lambda *_: setattr(self, "skipped", 0))
        return general

    def autocast(self) -> Any:
        """The context in which the recipe's precision holds."""
        precision = self.recipe.train.precision
        if precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16 if precision == "bf16" else torch.float16)

    @torch.no_grad()  # not inference_mode: what a model keeps from its first pass may have to serve in training
    def evaluate(self, step: int, train_loss: float | None) -> Evaluated:
        """All held-out examples in evaluation mode. NaN or +inf among the logits is wrong; -inf may mask a class."""
        began = perf_counter()
        self.memory.end("training" if step else "preparation")
        flags = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        right = loss = torch.zeros((), device=self.device)
        count = 0
        for x, y in self.dataset.held_out_batches(self.evaluation_size):
            with self.autocast():
                logits = self.model(x)
            highest, predicted = logits.max(1)  # NaN where any of an example's logits is
            right = right + ((predicted == y) & highest.isfinite()).sum()
            loss = loss + F.cross_entropy(logits.float(), y, reduction="sum")
            count += len(y)
        found = Evaluation(step, right.item() / count, loss.item() / count, train_loss)
        for module, training in flags:  # parents come first; a class may do more in `train` than to set the flag
            if module.training != training:
                module.train(training)
        self.evaluations.append(found)
        self.memory.end("evaluation")
        for each in self._reach:
            each.add(found)
        self.evaluation_s += perf_counter() - began
        return Evaluated(found, self.learning_rate)

    @property
    def memory_mib(self) -> float | None:
        """Peak of training, as of the last evaluation."""
        return self.memory.mib.get("training")

    @property
    def reached(self) -> bool:
        """Whether the steps to every target are settled."""
        return bool(self._reach) and all(each.steps is not None for each in self._reach)

    def result(self, status: Status, step: int, reason: str | None) -> RunResult:
        if step > self.evaluations[-1].step:
            self.memory.end("training")
        target = self.target or Target("accuracy", 1.0)
        values = [found.value(target.metric) for found in self.evaluations]
        finite = [value for value in values if math.isfinite(value)]
        best = (max if target.metric == "accuracy" else min)(finite, default=None)
        reach = [TargetReached(each.target, each.steps, each.first_hit) for each in self._reach]
        ms = self.clock.ms_per_step()
        return RunResult(
            status=status,
            steps_run=step,
            budget=self.recipe.train.steps,
            target=self.target,
            steps_to_target=reach[0].steps if reach else None,
            first_hit=reach[0].first_hit if reach else None,
            final=values[-1] if values else None,
            best=best,
            evaluations=tuple(self.evaluations),
            ms_per_step=ms,
            samples_per_s=1e3 * self.recipe.train.batch_size / ms if ms else None,
            training_s=self.clock.training_s,
            evaluation_s=self.evaluation_s,
            peak_memory_mib=self.memory_mib,
            parameters=self.parameters,
            environment=self.environment,
            reason=reason,
            also=tuple(reach[1:]),
            evaluation_peak_memory_mib=self.memory.mib.get("evaluation"),
        )


def _begin_training(model: nn.Module) -> None:
    """Call `train` where a class of the user's own does more in it than to set the flag, such as keep norms frozen.

    What was in evaluation mode before, by its maker's will, stays so.
    """
    flags = [(module, module.training) for module in model.modules()]
    for module, training in flags:
        if training and type(module).train is not nn.Module.train:
            module.train()
    for module, training in flags:
        if not training and module.training:
            module.eval()


def evaluation_size(recipe: Recipe, shape: tuple[int, ...]) -> int:
    """How many held-out examples of that shape are evaluated at once: about a training batch.

    Where no example's logits depend on the others', and that is known, small examples come in larger numbers: a tiny
    net's pass over 60 takes half as long as one over 500.
    """
    norm = recipe.norm
    by_batch = isinstance(norm, BatchNorm) and not norm.track_running_stats
    if by_batch or isinstance(recipe.model, OwnModel):
        return recipe.train.batch_size
    return max(recipe.train.batch_size, EVALUATED_VALUES // math.prod(shape))


# --- optimizer and schedule ---------------------------------------------------------------------------------------


def optimizer(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    """torch's optimizer over two groups: what weight decay applies to, and what it leaves out."""
    section = recipe.optimizer
    everything = section.weight_decay_on == "all"
    decayed = [p for p in model.parameters() if everything or p.dim() > 1]
    spared = [p for p in model.parameters() if not everything and p.dim() <= 1]
    groups: list[dict[str, Any]] = [{"params": decayed}]
    if spared:
        groups.append({"params": spared, "weight_decay": 0.0})
    arguments = section.model_dump(exclude={"kind", "weight_decay_on"})
    kinds: dict[type, type] = {Sgd: torch.optim.SGD, Adam: torch.optim.Adam, AdamW: torch.optim.AdamW}
    made: torch.optim.Optimizer = uncompiled(kinds[type(section)])(groups, **arguments)
    return made


@functools.cache
def uncompiled(kind: type) -> type:
    """The same optimizer without wrappers that serve only to compile the optimizer itself.

    torch 2.13's import torch._dynamo at the first call, which took 0.75 s beside 1.1 s for torch: `_use_grad` around
    step, `_disable_dynamo` around the others. What they wrap is torch's own; step runs without gradients as there.
    """
    plain: dict[str, Any] = {name: inspect.unwrap(getattr(kind, name)) for name in ("add_param_group", "zero_grad")}
    return type(kind.__name__, (kind,), {**plain, "step": torch.no_grad()(inspect.unwrap(getattr(kind, "step")))})  # noqa: B009


def learning_rate_factor(recipe: Recipe, step: int) -> float:
    """What the learning rate is multiplied by for the update after `step` earlier ones."""
    schedule = recipe.schedule
    factor = min(1.0, (step + 1) / (schedule.warmup + 1))
    if isinstance(schedule, Exponential):
        factor *= schedule.gamma ** (step / schedule.every)
    elif isinstance(schedule, StepDecay):
        factor *= schedule.gamma ** sum(step >= milestone for milestone in schedule.milestones)
    elif isinstance(schedule, Cosine):
        share = min(1.0, max(0, step - schedule.warmup) / max(1, recipe.train.steps - schedule.warmup))
        factor *= schedule.final + (1 - schedule.final) * (1 + math.cos(math.pi * share)) / 2
    return factor


def scheduler(recipe: Recipe, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR | None:
    """torch's LambdaLR over the closed form above; None for a constant rate, which then costs nothing a step."""
    if recipe.schedule.kind == "constant" and recipe.schedule.warmup == 0:
        return None
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(recipe, step))
