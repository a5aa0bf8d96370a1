"""Training loop: a generator of events. No printing, no hooks, no callbacks."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from types import MappingProxyType

import torch
from torch import Tensor

from bncli import kernels
from bncli.engine import data
from bncli.engine.data.splits import Dataset, InMemory
from bncli.engine.device import autocast, cpu_threads, deterministic, environment, in_tf32, resolve, tf32_allowed
from bncli.engine.distributed import ALONE, Ranks
from bncli.engine.load import CoreWait
from bncli.engine.models import blame_own_model
from bncli.engine.target import evaluation_steps
from bncli.engine.train.checkpoint import Saving, check_belongs, origin, restore, unpacked
from bncli.engine.train.evaluation import evaluate, evaluation_size
from bncli.engine.train.optim import learning_rate, set_learning_rate
from bncli.engine.train.population import GivenUp
from bncli.engine.train.probes import probe, probe_steps
from bncli.engine.train.stacked import cross_entropy
from bncli.engine.train.state import Run, TrainState, check_fit
from bncli.engine.train.threads import FEWEST, multiply_adds
from bncli.engine.train.weights import put
from bncli.engine.user_code import LoadedFiles
from bncli.errors import RecipeError, RunFailed, out_of_memory_is
from bncli.names import NORMS
from bncli.recipe.layers import contradictions, shape_contradictions
from bncli.recipe.sections import OwnModel, Recipe
from bncli.recipe.yaml import dotted
from bncli.results.environment import Environment
from bncli.results.train import Event, RunFinished, RunResult, RunStarted, StepDone, Target, TargetReached

SKIPPED_AT_MOST = 50  # consecutive fp16 steps; each halves the loss scale, which starts at 2^16
OVER_BATCH = [row.name for row in NORMS.values() if row.over_batch]
LOG_EVERY = 20  # steps between two readings of the loss, at most; each is a host sync


def train(
    recipe: Recipe,
    device: str = "auto",
    *,
    dataset: Dataset | None = None,
    threads: int | None = None,
    name: str = "run",
    stop: Callable[[], bool] = lambda: False,
    weights: Mapping[str, Tensor] | None = None,
    checkpoint: bytes | None = None,
    save: Mapping[str, Callable[[bytes], None]] = MappingProxyType({}),
    ranks: Ranks = ALONE,
) -> Iterator[Event]:
    """Train a recipe until its target, its budget, a loss that is not finite, or `stop()`.

    A run that goes on from a checkpoint ends, on the same machine, with the same bits as one that was not interrupted.
    With more train.steps than before, it is also evaluated where it ended at first.

    Args:
        recipe: what to train, from `load_recipe`.
        device: auto, cpu, cuda, cuda:N or mps.
        dataset: the recipe's data if they are already loaded on that device.
        threads: CPU threads; None for torch's default, one per core, or on a CPU one if a step is too small for more.
        name: the run's name in its first event.
        stop: called after every optimizer step and during evaluations; True ends the run.
        weights: a state_dict to start from, instead of the recipe's initial weights.
        checkpoint: the content of one of the same run, to go on from; no code in it is run.
        save: what takes the contents of files. `checkpoint`: each checkpoint, and one at the end. `model`, unless the
            run was stopped: the last weights, or the best with train.keep: best. `best`: those, with keep: both.
        ranks: of `bncli.engine.distributed.joined`, where processes train the run together: each takes its part of each
            batch. Recipe and checkpoint are the same on each, `weights` rank 0's, which alone saves.

    Yields:
        The events of the run as they happen (`bncli.results.train.Event`), or those after the checkpoint; the last, a
        RunFinished, holds the result.

    Raises:
        DataError, RecipeError: for missing data or a model that cannot be built, at the first event.
        UsageError: for a checkpoint of another run, or weights of another model.
        FileError: for a checkpoint that is damaged.
        RunFailed: for an exception of the user's model, or too little memory.
        Unavailable: for a device or a kernel that cannot run here.
    """
    on, code = ranks.device or resolve(device), LoadedFiles()
    if recipe.norm.kind == "batch":
        kernels.get(recipe.norm.kernel, on)
    saved = None if checkpoint is None else unpacked(checkpoint)
    with deterministic(recipe.train.deterministic and on.type == "cuda"):
        if dataset is None:
            dataset = data.load(recipe.data, on, data.MEMORY_FORMATS[recipe.train.memory_format])
        check_fit(recipe, dataset)
        check_parts(recipe, dataset, ranks.count)
        if saved:
            threads = threads or saved["origin"]["threads"]
            check_belongs(saved, origin(recipe, dataset, on, threads, ranks.count))
        own, by_size = isinstance(recipe.model, OwnModel), threads is None and on.type == "cpu"
        most = threads or torch.get_num_threads()
        # Initial weights depend on the threads in their last bits, so these are set before, or are 1 where unknown yet.
        first = 1 if own or (by_size and multiply_adds(recipe, dataset) < FEWEST) else most
        no_memory = out_of_memory_is(RunFailed(smaller_batches(recipe, on)))
        with blame_own_model(recipe), no_memory, tf32_allowed(recipe.train.tf32), cpu_threads(first):
            state = TrainState(recipe, dataset, on, ranks)
            if own and not (by_size and multiply_adds(recipe, dataset, state.model) < FEWEST):
                torch.set_num_threads(most)
            if saved:
                restore(state, saved)
            elif weights is not None:
                put(weights, state.model)
            saving = Saving(state, save, code) if save else None
            with ranks.connected():
                state.parallel = ranks.parallel(state.model, any_graph=own)
                yield from (event for _, event in training_loop(state, name, partial(ranks.any, stop), saving))


def train_together(
    recipes: Sequence[Recipe],
    device: str = "auto",
    *,
    dataset: Dataset,
    threads: int | None = None,
    stop: Callable[[], bool] = lambda: False,
    leave: Callable[[], Collection[int]] = lambda: (),
) -> Iterator[tuple[int, Event]]:
    """Train runs that differ only in seed, learning rate and initial weights, each as in `train`, in one pass a step.

    Runs that end leave the others. On one thread of a CPU with Intel's MKL and batches of a multiple of 4 examples, a
    run's bits do not depend on its company; elsewhere they are close.

    Args:
        recipes: R of `train`, for none of which `recipe.batches` finds a reason to train alone.
        device, dataset, threads, stop: as in `train`; stop ends all runs.
        leave: called after every optimizer step, for the places in `recipes` of runs to be given up.

    Yields:
        The place of a run in `recipes`, and one of its events. Its result has no throughput, memory or lack of cores;
        its seconds are its share of those of all runs.

    Raises:
        DataError, RunFailed, Unavailable: as `train`.
    """
    on, recipe = resolve(device), recipes[0]
    by_size = threads is None and on.type == "cpu"
    chosen = 1 if by_size and multiply_adds(recipe, dataset) < FEWEST else threads or torch.get_num_threads()
    no_memory = out_of_memory_is(RunFailed(smaller_batches(recipe, on)))
    deterministically = deterministic(recipe.train.deterministic and on.type == "cuda")
    with deterministically, no_memory, tf32_allowed(recipe.train.tf32), cpu_threads(chosen):
        yield from training_loop(TrainState(recipes, dataset, on), stop=stop, leave=leave)


def check_parts(recipe: Recipe, dataset: Dataset, ranks: int) -> None:
    """Raises RecipeError for a batch whose part for a rank is empty, or does not fit the norm."""
    train, micro, sync = recipe.train, recipe.train.micro_batch_size, getattr(recipe.norm, "sync", False)
    if micro < ranks:
        raise RecipeError(f"train.batch_size: has no example for each of {ranks} ranks")
    for size in {micro // ranks, -(-micro // ranks)} if ranks > 1 and not sync else ():
        part = recipe.model_copy(update={"train": train.model_copy(update={"batch_size": size * train.accumulate})})
        wrong = chain(contradictions(part), shape_contradictions(part, dataset.shape, dataset.classes))
        for keys, text in wrong:
            mend = "use fewer ranks, a larger batch, or norm.sync"
            raise RecipeError(f"{dotted(keys)}: {text}; of {micro} examples, a rank has {size}: {mend}")


def smaller_batches(recipe: Recipe, device: torch.device) -> str:
    """What to do where the memory of the device is too small for a step: smaller batches, or more parts of a batch."""
    batch, micro, parts = recipe.train.batch_size, recipe.train.micro_batch_size, recipe.train.accumulate
    advice = [f"train.batch_size: {micro // 2 * parts}"] * (micro > 3)
    if split := next((count for count in range(2 * parts, batch // 2 + 1) if batch % count == 0), None):
        keeps = f"which keeps the batch of {batch} in parts of {batch // split}"
        advice.append(f"train.accumulate: {split}, {keeps}, of each of which batch norm takes its statistics")
    what = f"try {', or '.join(advice)}" if advice else "use a smaller model, or free memory"
    return f"out of memory on {device.type} with {micro} examples at a time; {what}"


def trial(
    recipe: Recipe, device: str, *, dataset: Dataset, threads: int | None = None, name: str = "trial"
) -> Iterator[Event]:
    """The first step of a run, after an evaluation of one chunk of the held-out examples; nothing is compiled.

    It raises what would end every run of the recipe. Arguments and events as in `train`.
    """
    held_out = InMemory(*next(dataset.held_out.chunks(evaluation_size(recipe, dataset.shape))))
    once = {"compile": False, "population_batches": 1}
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update=once)})
    dataset = replace(dataset, held_out=held_out)
    return train(recipe, device, dataset=dataset, threads=threads, name=name, stop=lambda: True)


def training_loop(
    state: TrainState,
    name: str = "run",
    stop: Callable[[], bool] = lambda: False,
    saving: Saving | None = None,
    leave: Callable[[], Collection[int]] = lambda: (),
) -> Iterator[tuple[int, Event]]:
    """Train from the state's step until its runs end, and yield their events with their indices; see `train`.

    A run that ends leaves the others. saving: of one run alone.
    """
    options, budget, began = state.recipe.train, state.recipe.train.steps, state.step
    last = state.runs[0].evaluations[-1].step if state.runs[0].evaluations else -1
    to_evaluate = (step for step in chain([0], evaluation_steps(options.evaluate_every, budget)) if step > last)
    to_probe = probe_steps(state)
    next_evaluation, next_probe = next(to_evaluate, None), next(to_probe, None)
    machine = environment(state.device, in_tf32(state.device))
    load = CoreWait(machine.threads if state.device.type == "cpu" else 1)
    parameters = sum(parameter.numel() for parameter in state.model.parameters()) // len(state.runs)
    for run in state.runs:
        target = run.targets[0].target if run.targets else None
        yield run.index, RunStarted(name, machine.device, parameters, budget, options.batch_size, target)
        check_end(state, run)
    while True:
        step = state.step
        if ended := [run for run in state.runs if run.status]:
            state.clock.pause(step)
            # An interrupted run has not ended: loaded again, it would have one point more than without it.
            if state.probes and state.probes.last_step < step and ended[0].status != "interrupted":
                yield ended[0].index, probe(state)
            if saving:
                saving.end()
            for run in ended:
                yield run.index, RunFinished(result(state, run, parameters, machine, load))
            if ended == state.runs:
                return
            state.keep([run for run in state.runs if not run.status])
        elif step == next_evaluation:
            state.clock.pause(step)
            try:
                found = evaluate(state, stop)
            except GivenUp:
                state.end("interrupted")
                continue
            next_evaluation = next(to_evaluate, None)
            for run, evaluated in zip(state.runs, found, strict=True):
                yield run.index, evaluated
                check_end(state, run)
        elif step == next_probe:
            state.clock.pause(step)
            yield state.runs[0].index, probe(state)
            next_probe = next(to_probe, None)
        elif step == budget:
            state.end("budget")
        elif step > began and stop():
            state.end("interrupted")
        elif step > began and (given_up := {run.index for run in state.runs}.intersection(leave())):
            state.end("given up", given_up)
        else:
            if saving and saving.due(step):
                saving.checkpoint()
            state.clock.start()
            losses = optimizer_step(state, *state.next_batch())
            if state.skipped:
                check_end(state, state.runs[0])
            elif (step := state.step) == next_evaluation or step % LOG_EVERY == 0:
                losses = state.ranks.sum(losses).view(-1) / state.ranks.count
                for run, loss in zip(state.runs, losses.tolist(), strict=True):
                    run.train_loss = loss
                    check_end(state, run)
                    if run.status is None:
                        rate, samples_per_s = learning_rate(run.recipe, step), state.clock.samples_per_s(step)
                        peak_mib = state.memory.mib.get("training")
                        yield run.index, StepDone(step, loss, rate, samples_per_s, peak_mib)


def check_end(state: TrainState, run: Run) -> None:
    """End the run if it has diverged, with the reason, or reached its targets, where that ends it."""
    if state.skipped >= SKIPPED_AT_MOST:
        run.reason = f"after step {state.step} the fp16 gradients of {SKIPPED_AT_MOST} batches in a row were not finite"
    elif run.train_loss is not None and not math.isfinite(run.train_loss):
        run.reason = f"the training loss is {run.train_loss} at step {state.step}"
    reached = state.recipe.train.stop_at_target and run.reached
    run.status = "diverged" if run.reason else "reached" if reached else None


def optimizer_step(state: TrainState, x: Tensor, y: Tensor) -> Tensor:
    """Update the weights by one batch, x (B, *shape) and y (B,), and return its loss, on the device.

    Of stacked runs, it is a batch each, x (R, B, *shape) and y (R, B), and a loss each, (R,).

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
        loss = cross_entropy(state.parallel(x), y, label_smoothing=options.label_smoothing)
    if state.ranks.count > 1:  # whose mean it is to be; their parts need not be equal
        loss = loss * (state.ranks.count * len(y) / options.micro_batch_size)
    if options.accumulate > 1:
        loss = loss / options.accumulate
    scaled = state.scaler.scale(loss)
    (scaled.sum() if scaled.dim() else scaled).backward()  # a gradient for each run would make torch import sympy
    return loss.detach()


def result(state: TrainState, run: Run, parameters: int, machine: Environment, load: CoreWait) -> RunResult:
    """The result of a run that has ended."""
    assert run.status is not None
    if not run.evaluations or state.step > run.evaluations[-1].step:
        state.memory.end(state.phase)
    reached = [TargetReached(each.target, each.steps, each.first_hit) for each in run.targets]
    target = reached[0].target if reached else Target("accuracy", 1.0)
    values = [evaluation.value(target.metric) for evaluation in run.evaluations]
    finite = [value for value in values if math.isfinite(value)]
    labels, norm = state.dataset.held_out.labels, state.recipe.norm
    ms = None if state.stacked else state.clock.ms_per_step()
    memory_mib = {} if state.stacked else state.memory.mib
    return RunResult(
        status=run.status,
        steps_run=state.step,
        budget=state.recipe.train.steps,
        target=target if reached else None,
        steps_to_target=reached[0].steps if reached else None,
        first_hit=reached[0].first_hit if reached else None,
        final=values[-1] if values else None,
        best=(max if target.metric == "accuracy" else min)(finite, default=None),
        evaluations=tuple(run.evaluations),
        ms_per_step=ms,
        samples_per_s=1e3 * state.recipe.train.batch_size / ms if ms else None,
        training_s=state.clock.training_s,
        evaluation_s=state.evaluation_s,
        peak_memory_mib=memory_mib.get("training"),
        parameters=parameters,
        environment=machine,
        reason=run.reason,
        also=tuple(reached[1:]),
        evaluation_peak_memory_mib=memory_mib.get("evaluation"),
        probes=tuple(state.probes.points) if state.probes else (),
        probes_s=state.probes.seconds if state.probes else 0.0,
        checkpoint_s=state.checkpoint_s,
        constant_guess=labels.bincount().max().item() / len(labels),
        running_statistics=state.running_statistics,
        cores_lacked=None if state.stacked else load.cores(),
        ranks=state.ranks.count,
        synchronized=getattr(norm, "sync", False) if state.ranks.count > 1 and norm.kind in OVER_BATCH else None,
    )
