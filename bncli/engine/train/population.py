"""Population statistics of batch norms with frozen weights (Ioffe & Szegedy 2015, algorithm 2; "precise BN").

A layer's variance is that of all its inputs over all batches, M/(M-1) times their mean square distance from their mean
over M values. Algorithm 2 takes m/(m-1) E_B[var_B], the mean of the batches' variances. Both have the same expectation
where the m values of a batch are independent, as in the first layer. Elsewhere the mean of the batches' variances is
off, as it leaves out the variance of the batches' means (Wu & Johnson 2021, arXiv 2105.07576, section 3): positions of
one image are alike, and the outputs of a normalized layer below have the same mean in every batch.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bncli.engine.data.splits import Batch, order
from bncli.engine.device import autocast
from bncli.engine.models.init import global_generators, restore_global_generators, stream
from bncli.engine.models.variants import BatchRenorm, GhostBatchNorm, NoisyBatchNorm
from bncli.engine.train.state import TrainState
from bncli.results.train import RunningStatistics

# Layers that evaluate with the mean and variance of (N, C, *S) over N and *S.
ESTIMATED = (_BatchNorm, GhostBatchNorm, BatchRenorm, NoisyBatchNorm)


class GivenUp(Exception):
    """An evaluation was given up since the run is to stop."""


def unless(stop: Callable[[], bool], batches: Iterable[Batch]) -> Iterator[Batch]:
    """The batches; raises GivenUp between two of them once `stop()` is true."""
    for number, batch in enumerate(batches):
        if number and stop():
            raise GivenUp
        yield batch


class Moments:
    """Mean and variance over all inputs (N, C, *S) so far, a value a channel, in float32 or wider on their device."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = self.squares = torch.zeros(())  # of the distances from the mean, their sum

    def add(self, x: Tensor) -> None:
        """Combine with those of a batch (Chan, Golub & LeVeque 1983), which loses no digits to a large mean."""
        wide, around = torch.promote_types(x.dtype, torch.float32), [0, *range(2, x.dim())]
        variance, mean = torch.var_mean(x.to(wide), around, correction=0)
        new, old = x.numel() // x.shape[1], self.count
        if not old:
            self.mean, self.squares = torch.zeros_like(mean), torch.zeros_like(mean)
        self.count = old + new
        distance = mean - self.mean
        self.mean = self.mean + distance * (new / self.count)
        self.squares = self.squares + variance * new + distance.square() * (old * new / self.count)

    @property
    def variance(self) -> Tensor:
        return self.squares / (self.count - 1)


@contextlib.contextmanager
def precise(state: TrainState, stop: Callable[[], bool] = lambda: False) -> Iterator[tuple[RunningStatistics, ...]]:
    """A context in which the running statistics are those of the population; afterwards the model is as it was before.

    `train.population_batches` (micro-)batches of the training set, at most an epoch, pass the network in training mode:
    each layer sees its inputs as they are in training, batch statistics in the layers below included, so one forward
    pass of each batch serves all layers. They are the same batches, augmented alike, every time. A batch norm that is
    in evaluation mode keeps its statistics. Raises GivenUp between two batches once `stop()` is true.

    Yields how far the running statistics of each layer that was called are from those of the population.
    """
    train, split, model, device = state.recipe.train, state.dataset.train, state.model, state.device
    size = train.micro_batch_size
    indices = order(len(split), size, stream(train.seed, "population order"), split.index_device)
    count = min(train.population_batches, len(split) // size)
    batches = split.batches(islice(indices, count), stream(train.seed, "population augment"))
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    generators = global_generators(device)
    try:
        with autocast(device, train.precision), _uncompiled():
            found = moments(model, (x for x, _ in unless(stop, batches)))
    finally:
        restore_global_generators(generators, device)
        _restore(buffers)
    try:
        distances = tuple(_distances(found))
        for _, layer, population in found:
            layer.running_mean.copy_(population.mean)
            layer.running_var.copy_(population.variance)
        yield distances
    finally:
        _restore(buffers)


@torch.no_grad()
def moments(model: nn.Module, batches: Iterable[Tensor]) -> list[tuple[str, Any, Moments]]:
    """Each batch norm with running statistics that batches (B, *shape) meet in training mode: name, layer, moments.

    The layers' running statistics move.
    """
    layers = [(name, module, Moments()) for name, module in model.named_modules() if isinstance(module, ESTIMATED)]

    def note(population: Moments, layer: Any, inputs: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        if layer.training and layer.running_mean is not None:
            population.add(inputs[0] if inputs else named["input"])

    handles = [
        layer.register_forward_pre_hook(partial(note, population), with_kwargs=True) for _, layer, population in layers
    ]
    try:
        for x in batches:
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    return [found for found in layers if found[2].count > 1]


def _uncompiled() -> contextlib.AbstractContextManager[Any]:
    """A context in which what torch.compile made runs as it was written, so that hooks are called."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled; its import takes a second
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")


def _restore(buffers: list[tuple[nn.Module, str, Tensor, Tensor]]) -> None:
    for module, name, buffer, before in buffers:
        buffer.copy_(before)
        if getattr(module, name) is not buffer:  # a forward put another in its place
            setattr(module, name, buffer)


def _distances(found: list[tuple[str, Any, Moments]]) -> Iterator[RunningStatistics]:
    for name, layer, population in found:
        variance = population.variance + layer.eps
        mean = ((layer.running_mean - population.mean).abs() / variance.sqrt()).max()
        ratios = (layer.running_var + layer.eps) / variance
        ratio = ratios[ratios.log().abs().argmax()]
        yield RunningStatistics(name, *torch.stack([mean, ratio]).tolist())
