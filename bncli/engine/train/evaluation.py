"""Evaluation of all held-out examples, which leaves the run as it was, and which a signal can end early."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from contextlib import nullcontext
from time import perf_counter

import torch
from torch import Tensor

from bncli.engine.device import autocast
from bncli.engine.train.optim import learning_rate
from bncli.engine.train.population import precise, unless
from bncli.engine.train.stacked import cross_entropy
from bncli.engine.train.state import TrainState
from bncli.errors import RunFailed
from bncli.recipe.sections import BatchNorm, OwnModel, Recipe
from bncli.results.train import Evaluated, Evaluation

EVALUATED_VALUES = 2**17  # input values of one evaluation chunk, 512 KiB of float32
STACKED_EXAMPLES = 252  # of one evaluation chunk; of digits, 170 takes 1.2 times as long, and 500 does for 32 runs


@torch.no_grad()  # not inference_mode: a model may cache tensors of its first pass for training
def evaluate(state: TrainState, stop: Callable[[], bool] = lambda: False) -> list[Evaluated]:
    """Evaluate each run on all held-out examples, and keep weights that are the best so far where the best are kept.

    Raises GivenUp, with the state as before, once `stop()` is true. An evaluation of a user's model ends first, since
    its forward pass may draw random numbers and change buffers, and so does one that ranks share.
    """
    began = perf_counter()
    state.memory.end(state.phase)
    if state.ranks.count > 1 or isinstance(state.recipe.model, OwnModel):
        stop = lambda: False  # noqa: E731
    is_precise = state.recipe.train.population_statistics == "precise"
    with precise(state, stop) if is_precise else nullcontext() as running_statistics:
        evaluations = measured(state, stop)
        state.memory.end("evaluation")
        state.evaluation_s += (perf_counter() - began) / len(state.runs)
        state.running_statistics = running_statistics
        for run, evaluation in zip(state.runs, evaluations, strict=True):
            run.record(evaluation)
        state.keep_weights()
    rates = [learning_rate(run.recipe, state.step) for run in state.runs]
    return [Evaluated(*found) for found in zip(evaluations, rates, strict=True)]


@torch.no_grad()
def measured(state: TrainState, stop: Callable[[], bool] = lambda: False) -> list[Evaluation]:
    """Each run on all held-out examples in evaluation mode; then every module is in the mode that it was in.

    A NaN or +inf among the logits counts as wrong; -inf may mask a class. Ranks take turns at the chunks, all with the
    buffers of rank 0.
    """
    ranks, held_out = state.ranks, state.dataset.held_out
    ranks.make_equal(state.model)
    size = evaluation_size(state.recipe, state.dataset.shape, state.stacked, -(-len(held_out) // ranks.count))
    flags = [(module, module.training) for module in state.model.modules()]
    state.model.eval()
    right = loss = torch.zeros((), device=state.device)
    try:
        for x, y in unless(stop, held_out.chunks(size, slice(ranks.rank, None, ranks.count))):
            if state.stacked:
                x = x.expand(len(state.runs), *x.shape)
            with autocast(state.device, state.recipe.train.precision):
                logits = state.model(x)
            expected = (len(y), state.dataset.classes)
            if isinstance(state.recipe.model, OwnModel) and getattr(logits, "shape", None) != expected:
                found = (
                    f"of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
                )
                raise RunFailed(
                    f"model.module: {state.recipe.model.module}: the output for a batch of {len(y)} examples is "
                    f"{found}; expected a tensor of shape {expected}, a logit for each example and class"
                )
            highest, predicted = logits.max(-1)  # NaN where any of an example's logits is
            right = right + ((predicted == y) & highest.isfinite()).sum(-1)
            loss = loss + cross_entropy(logits if state.stacked else logits.float(), y, reduction="sum")
    finally:
        for module, training in flags:  # parents come first; a class may override `train`
            if module.training != training:
                module.train(training)
    both, count = ranks.sum(torch.stack([right, loss])), len(held_out)
    sums = zip(state.runs, *both.view(2, -1).tolist(), strict=True)  # one copy to the host
    return [Evaluation(state.step, right / count, loss / count, run.train_loss) for run, right, loss in sums]


def evaluation_size(recipe: Recipe, shape: tuple[int, ...], stacked: bool = False, most: int = sys.maxsize) -> int:
    """The number of held-out examples of that shape per evaluation chunk: about a training (micro-)batch.

    If the logits of an example are known not to depend on other examples, small examples come in larger chunks, of at
    most `most`: for a tiny net, a pass over 60 takes half as long as one over 500. Those of stacked runs are smaller,
    so that a layer of all runs stays in the cache, whatever their number, on which no bit of a run's sums may depend.
    """
    norm = recipe.norm
    by_batch = isinstance(norm, BatchNorm) and not norm.track_running_stats
    if by_batch or isinstance(recipe.model, OwnModel):
        return recipe.train.micro_batch_size
    size = max(recipe.train.batch_size, EVALUATED_VALUES // math.prod(shape))
    return STACKED_EXAMPLES if stacked else min(size, most)
