"""Training loop: a generator of events. No printing, no hooks, no callbacks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from time import perf_counter

import torch
from torch import Tensor
from torch.nn import functional as F

from bncli import kernels
from bncli.engine import data
from bncli.engine.data.splits import Dataset, InMemory
from bncli.engine.device import autocast, cpu_threads, environment, in_tf32, resolve, tf32_allowed
from bncli.engine.load import CoreWait
from bncli.engine.models import blame_own_model
from bncli.engine.target import evaluation_steps
from bncli.engine.train.optim import set_learning_rate
from bncli.engine.train.population import precise
from bncli.engine.train.probes import probe, probe_steps
from bncli.engine.train.state import TrainState, check_fit
from bncli.engine.train.threads import FEWEST, multiply_adds
from bncli.errors import RunFailed, memory_errors
from bncli.recipe.sections import BatchNorm, OwnModel, Recipe
from bncli.results.environment import Environment
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

EVALUATED_VALUES = 2**17  # input values of one evaluation chunk, 512 KiB of float32
SKIPPED_AT_MOST = 50  # consecutive fp16 steps; each halves the loss scale, which starts at 2^16
LOG_EVERY = 20  # steps between two readings of the loss, at most; each is a host sync


def train(
    recipe: Recipe,
    device: str = "auto",
    *,
    dataset: Dataset | None = None,
    threads: int | None = None,
    name: str = "run",
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[Event]:
    """Train a recipe until its target, its budget, a loss that is not finite, or `stop()`.

    Args:
        recipe: what to train, from `load_recipe`.
        device: auto, cpu, cuda, cuda:N or mps.
        dataset: the recipe's data if they are already loaded on that device.
        threads: CPU threads; None for torch's default, one per core, or on a CPU one if a step is too small for more.
        name: the run's name in its first event.
        stop: called after every optimizer step; True ends the run.

    Yields:
        The events of the run as they happen (`bncli.results.train.Event`); the last, a RunFinished, holds the result.

    Raises:
        DataError, RecipeError: for missing data or a model that cannot be built, at the first event.
        RunFailed: for an exception of the user's model.
        Unavailable: for a device or a kernel that cannot run here.
    """
    on = resolve(device)
    if recipe.norm.kind == "batch":
        kernels.get(recipe.norm.kernel, on)
    if dataset is None:
        dataset = data.load(recipe.data, on, data.MEMORY_FORMATS[recipe.train.memory_format])
    check_fit(recipe, dataset)
    own, by_size = isinstance(recipe.model, OwnModel), threads is None and on.type == "cpu"
    most = threads or torch.get_num_threads()
    # Initial weights depend on the threads in their last bits, so these are set before, or are 1 where unknown yet.
    first = 1 if own or (by_size and multiply_adds(recipe, dataset) < FEWEST) else most
    advised = memory_errors(f"try train.batch_size {max(1, recipe.train.batch_size // 2)}, or a smaller model")
    with blame_own_model(recipe), advised, tf32_allowed(recipe.train.tf32), cpu_threads(first):
        state = TrainState(recipe, dataset, on)
        if own and not (by_size and multiply_adds(recipe, dataset, state.model) < FEWEST):
            torch.set_num_threads(most)
        yield from training_loop(state, name, stop)


def trial(
    recipe: Recipe, device: str, *, dataset: Dataset, threads: int | None = None, name: str = "trial"
) -> Iterator[Event]:
    """The first step of a run, after an evaluation of one chunk of the held-out examples; nothing is compiled.

    It raises what would end every run of the recipe. Arguments and events as in `train`.
    """
    held_out = InMemory(*next(dataset.held_out.chunks(evaluation_size(recipe, dataset.shape))))
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"compile": False})})
    dataset = replace(dataset, held_out=held_out)
    return train(recipe, device, dataset=dataset, threads=threads, name=name, stop=lambda: True)


def training_loop(state: TrainState, name: str = "run", stop: Callable[[], bool] = lambda: False) -> Iterator[Event]:
    """Train from the state's step until the run ends; see `train`."""
    options, budget = state.recipe.train, state.recipe.train.steps
    last = state.evaluations[-1].step if state.evaluations else 0
    to_evaluate = (step for step in evaluation_steps(options.evaluate_every, budget) if step > last)
    next_evaluation = next(to_evaluate, budget)
    machine = environment(state.device, in_tf32(state.device))
    load = CoreWait(machine.threads if state.device.type == "cpu" else 1)
    parameters = sum(parameter.numel() for parameter in state.model.parameters())
    target = state.targets[0].target if state.targets else None
    yield RunStarted(name, machine.device, parameters, budget, options.batch_size, target)
    if not state.evaluations:
        yield evaluate(state)
    elif last < state.step == next_evaluation:  # the state was saved between an update and its evaluation
        yield evaluate(state, state.train_loss)
        next_evaluation = next(to_evaluate, budget)
    to_probe = probe_steps(state)
    next_probe = next(to_probe, None)
    if next_probe == state.step:
        yield probe(state)
        next_probe = next(to_probe, None)
    status: Status = "reached" if options.stop_at_target and state.reached else "budget"
    reason = None
    state.clock.start()
    while state.step < budget and status == "budget":
        loss = optimizer_step(state, *state.next_batch())
        step = state.step
        if state.skipped == SKIPPED_AT_MOST:
            status = "diverged"
            reason = f"after step {step} the fp16 gradients of {SKIPPED_AT_MOST} batches in a row were not finite"
            break
        if state.skipped:
            continue
        due = step == next_evaluation
        if due or step % LOG_EVERY == 0:
            state.train_loss = value = loss.item()
            if not math.isfinite(value):
                status, reason = "diverged", f"the training loss is {value} at step {step}"
                break
            peak_mib = state.memory.mib.get("training")
            yield StepDone(step, value, state.learning_rate, state.clock.samples_per_s(step), peak_mib)
        if due or step == next_probe:
            state.clock.pause(step)
            if due:
                yield evaluate(state, value)
                next_evaluation = next(to_evaluate, budget)
            if step == next_probe:
                yield probe(state)
                next_probe = next(to_probe, None)
            if options.stop_at_target and state.reached:
                status = "reached"
                break
            state.clock.start()
        if stop():
            status = "interrupted"
            break
    state.clock.pause(state.step)
    # An interrupted run has not ended: loaded again, it would have one point more than without the interruption.
    if state.probes and state.probes.last_step < state.step and status != "interrupted":
        yield probe(state)
    yield RunFinished(replace(result(state, status, reason, parameters, machine), cores_lacked=load.cores()))


def optimizer_step(state: TrainState, x: Tensor, y: Tensor) -> Tensor:
    """Update the weights by one batch, x (B, *shape) and y (B,), and return its loss, on the device.

    An update that the fp16 scaler skips because of non-finite gradients counts neither for the budget nor for the
    schedule. `bncli profile` times this function.
    """
    optimizer, scaler, options = state.optimizer, state.scaler, state.recipe.train
    set_learning_rate(optimizer, state.recipe, state.step)
    optimizer.zero_grad()
    if options.accumulate == 1:
        loss = add_gradients(state, x, y)
    else:
        parts = zip(x.chunk(options.accumulate), y.chunk(options.accumulate), strict=True)
        loss = torch.stack([add_gradients(state, *part) for part in parts]).sum()
    if options.clip_gradients is not None:
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(state.model.parameters(), options.clip_gradients)
    state.skipped += 1  # until the update is made
    scaler.step(optimizer)
    scaler.update()
    return loss


def add_gradients(state: TrainState, x: Tensor, y: Tensor) -> Tensor:
    """Add a micro-batch's share of the batch's gradients to the parameters', and return its share of the loss."""
    options = state.recipe.train
    with autocast(state.device, options.precision):
        loss = F.cross_entropy(state.model(x), y, label_smoothing=options.label_smoothing)
    if options.accumulate > 1:
        loss = loss / options.accumulate
    state.scaler.scale(loss).backward()
    return loss.detach()


@torch.no_grad()  # not inference_mode: a model may cache tensors of its first pass for training
def evaluate(state: TrainState, train_loss: float | None = None) -> Evaluated:
    """Evaluate all held-out examples. A NaN or +inf among the logits counts as wrong; -inf may mask a class."""
    began = perf_counter()
    state.memory.end("training" if state.step else "preparation")
    is_precise = state.recipe.train.population_statistics == "precise"
    with (
        precise(state.model, state.recipe, state.dataset, state.device) if is_precise else nullcontext()
    ) as state.running_statistics:
        found = _evaluation(state, train_loss)
    state.memory.end("evaluation")
    state.record(found)
    state.evaluation_s += perf_counter() - began
    return Evaluated(found, state.learning_rate)


def _evaluation(state: TrainState, train_loss: float | None) -> Evaluation:
    """The model on all held-out examples in evaluation mode; then every module is in the mode that it was in."""
    flags = [(module, module.training) for module in state.model.modules()]
    state.model.eval()
    right = loss = torch.zeros((), device=state.device)
    count = 0
    for x, y in state.dataset.held_out.chunks(evaluation_size(state.recipe, state.dataset.shape)):
        with autocast(state.device, state.recipe.train.precision):
            logits = state.model(x)
        expected = (len(y), state.dataset.classes)
        if isinstance(state.recipe.model, OwnModel) and getattr(logits, "shape", None) != expected:
            found = f"of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
            raise RunFailed(
                f"model.module: {state.recipe.model.module}: the output for a batch of {len(y)} examples is {found}; "
                f"expected a tensor of shape {expected}, a logit for each example and class"
            )
        highest, predicted = logits.max(1)  # NaN where any of an example's logits is
        right = right + ((predicted == y) & highest.isfinite()).sum()
        loss = loss + F.cross_entropy(logits.float(), y, reduction="sum")
        count += len(y)
    for module, training in flags:  # parents come first; a class may override `train`
        if module.training != training:
            module.train(training)
    return Evaluation(state.step, right.item() / count, loss.item() / count, train_loss)


def evaluation_size(recipe: Recipe, shape: tuple[int, ...]) -> int:
    """The number of held-out examples of that shape per evaluation chunk: about a training (micro-)batch.

    If the logits of an example are known not to depend on other examples, small examples come in larger chunks: for a
    tiny net, a pass over 60 takes half as long as one over 500.
    """
    norm = recipe.norm
    by_batch = isinstance(norm, BatchNorm) and not norm.track_running_stats
    if by_batch or isinstance(recipe.model, OwnModel):
        return recipe.train.micro_batch_size
    return max(recipe.train.batch_size, EVALUATED_VALUES // math.prod(shape))


def result(state: TrainState, status: Status, reason: str | None, parameters: int, machine: Environment) -> RunResult:
    """The result of a run that has ended."""
    if state.step > state.evaluations[-1].step:
        state.memory.end("training")
    reached = [TargetReached(each.target, each.steps, each.first_hit) for each in state.targets]
    target = reached[0].target if reached else Target("accuracy", 1.0)
    values = [evaluation.value(target.metric) for evaluation in state.evaluations]
    finite = [value for value in values if math.isfinite(value)]
    labels = state.dataset.held_out.labels
    ms = state.clock.ms_per_step()
    return RunResult(
        status=status,
        steps_run=state.step,
        budget=state.recipe.train.steps,
        target=target if reached else None,
        steps_to_target=reached[0].steps if reached else None,
        first_hit=reached[0].first_hit if reached else None,
        final=values[-1] if values else None,
        best=(max if target.metric == "accuracy" else min)(finite, default=None),
        evaluations=tuple(state.evaluations),
        ms_per_step=ms,
        samples_per_s=1e3 * state.recipe.train.batch_size / ms if ms else None,
        training_s=state.clock.training_s,
        evaluation_s=state.evaluation_s,
        peak_memory_mib=state.memory.mib.get("training"),
        parameters=parameters,
        environment=machine,
        reason=reason,
        also=tuple(reached[1:]),
        evaluation_peak_memory_mib=state.memory.mib.get("evaluation"),
        probes=tuple(state.probes.points) if state.probes else (),
        probes_s=state.probes.seconds if state.probes else 0.0,
        constant_guess=labels.bincount().max().item() / len(labels),
        running_statistics=state.running_statistics,
    )
