"""Probes: what happens inside the network while it trains, measured on a copy of the model.

The run itself is never touched: the copy has its own parameters, buffers and optimizer, and the global generators are
restored. Distributions, gradients and whitening are measured on a random sample of the training set that stays the same
in a run, in training mode, in batches of the size that passes through the model in training, so that each is normalized
as there; shift and landscape on its first batch.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain
from time import perf_counter

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bncli.engine.data import MEMORY_FORMATS
from bncli.engine.data.splits import Batch, Split, chunk_count
from bncli.engine.device import autocast
from bncli.engine.models.init import (
    global_generators,
    restore_global_generators,
    seed_global_generators,
    stream,
    stream_seed,
)
from bncli.engine.target import evaluation_steps
from bncli.engine.train.optim import learning_rate, optimizer
from bncli.engine.train.probes import values
from bncli.engine.train.probes.recorder import Recorder, weights_of
from bncli.engine.train.probes.values import Values
from bncli.engine.train.state import Probes, TrainState
from bncli.errors import RecipeError, RunFailed
from bncli.recipe.sections import OwnModel
from bncli.results.train import Probed, ProbePoint

BATCHES = 8  # of the sample
FIXED_EXAMPLES = 4  # whose logits are compared between random batches
RANDOM_BATCHES = 20

NEEDS = {
    "inputs": "nonlinearities that are modules, such as torch.nn.ReLU",
    "saturation": "modules of torch.nn.Sigmoid, Tanh or ReLU",
    "gradients": "modules with weights that are trained",
    "shift": "two modules with weights that are trained, one after the other",
    "whitening": "norms or nonlinearities that are modules",
    "scale": "modules with weights that are trained",
}

Found = tuple[str | None, Values]  # a layer, or None for the whole network


def probe_steps(state: TrainState) -> Iterator[int]:
    """The steps at which a run is still to be measured, ascending: 0, and those of the recipe."""
    if state.probes:
        steps = evaluation_steps(state.probes.section.at, state.recipe.train.steps)
        yield from (step for step in chain([0], steps) if step > state.probes.last_step)


def probe(state: TrainState) -> Probed:
    """Measure what the recipe asks for after the state's step, without any effect on the run.

    Raises:
        RecipeError: for a measure that is asked for by name and does not exist in this model.
        RunFailed: for a user's model that cannot be copied.
    """
    assert state.probes is not None
    began = perf_counter()
    state.memory.end("training" if state.step else "preparation")
    generators = global_generators(state.device)
    try:
        points = tuple(_points(state, state.probes))
    finally:
        restore_global_generators(generators, state.device)
        if state.probes.copy is not None:
            state.probes.copy.cpu()
    state.memory.end("probes")
    state.probes.points += points
    inputs = {}
    for layer, each in state.probes.last.items():
        ordered = each.flatten().sort().values
        inputs[layer] = ordered[torch.linspace(0, len(ordered) - 1, 101, dtype=torch.float64).long()].tolist()
    seconds = perf_counter() - began
    state.probes.seconds += seconds
    return Probed(points, seconds, inputs)


def _points(state: TrainState, probes: Probes) -> Iterator[ProbePoint]:
    network = Network(state, probes)
    asked = probes.measures
    recorder, loss, moments = _pass_sample(network, "gradients" in asked)
    yield ProbePoint("loss", None, state.step, {"training": loss})
    # Those in evaluation mode come last, since a user's model may not return from it.
    measures = {
        "inputs": lambda: _inputs(recorder, probes),
        "saturation": lambda: _saturation(recorder),
        "gradients": lambda: _gradients(moments),
        "shift": lambda: _shift(network, recorder.executed, state),
        "landscape": lambda: _landscape(network, learning_rate(state.recipe, state.step)),
        "whitening": lambda: _whitening(recorder),
        "scale": lambda: _scale(recorder, learning_rate(state.recipe, state.step)),
        "regularization": lambda: _regularization(network),
    }
    for measure in [name for name in measures if name in asked]:
        found = [(layer, each) for layer, each in measures[measure]() if each]
        if not found and "all" not in probes.section.measure:
            why = f"this model has nothing that it measures, which is {NEEDS[measure]}"
            raise RecipeError(f"probes.measure: {measure}: {why}; leave {measure} out")
        yield from (ProbePoint(measure, layer, state.step, each) for layer, each in found)


# --- the copy and its batches -----------------------------------------------------------------------------------------


class Network:
    """The copy of a run's model at one step, and the batches that it is measured on.

    Each pass begins with the buffers of the run and with global generators that depend on the seed, the step and
    `draw`, so that passes of one `draw` have the same dropout.
    """

    def __init__(self, state: TrainState, probes: Probes) -> None:
        self.recipe, self.device, self.step = state.recipe, state.device, state.step
        self.scale = state.scaler.get_scale()  # 1 without fp16
        self.model = _copied(state, probes)
        self.parameters = [each for each in self.model.parameters() if each.requires_grad]
        self._buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        self.train, self.held_out = state.dataset.train, state.dataset.held_out
        self.seed, self.batch_size = state.recipe.train.seed, state.recipe.train.micro_batch_size

    def logits(self, x: Tensor, draw: str) -> Tensor:
        """x (B, *shape) -> (B, classes)."""
        for name, buffer in self.model.named_buffers():
            if name in self._buffers:
                buffer.data.copy_(self._buffers[name])
        seed_global_generators(stream_seed(self.seed, f"probes {self.step} {draw}"), self.device)
        with autocast(self.device, self.recipe.train.precision):
            logits: Tensor = self.model(x)
        return logits

    def loss(self, batch: Batch, draw: str) -> Tensor:
        """The loss that the run trains with."""
        options, logits = self.recipe.train, self.logits(batch[0], draw)
        with autocast(self.device, options.precision):
            return F.cross_entropy(logits, batch[1], label_smoothing=options.label_smoothing)

    def gradients(self, loss: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Of the loss, zeros for parameters that it does not depend on; scaled meanwhile as fp16 needs it."""
        found = torch.autograd.grad(self.scale * loss, parameters, allow_unused=True, materialize_grads=True)
        return [each / self.scale for each in found] if self.scale != 1 else list(found)

    @torch.no_grad()
    def set_parameters(self, parameters: Sequence[Tensor]) -> None:
        for own, other in zip(self.parameters, parameters, strict=True):
            own.copy_(other)

    def random(self, examples: int, name: str) -> Tensor:
        """A random order of so many examples, always the same in a run."""
        return torch.randperm(examples, generator=stream(self.seed, f"probe {name}"))

    def sample(self) -> Iterator[Batch]:
        """The sample's batches as in training."""
        some = self.random(len(self.train), "sample")[: self.sample_batches * self.batch_size]
        some = some.to(self.train.index_device)
        yield from self.train.batches(iter(some.split(self.batch_size)), stream(self.seed, "probe augment"))

    @property
    def sample_batches(self) -> int:
        return min(BATCHES, len(self.train) // self.batch_size)

    def first_batch(self) -> Batch:
        return next(self.sample())


def _copied(state: TrainState, probes: Probes) -> nn.Module:
    recipe = state.recipe
    if probes.copy is not None:
        memory_format = MEMORY_FORMATS[recipe.train.memory_format]
        probes.copy.to(state.device, memory_format=memory_format)  # type: ignore[call-overload]
        probes.copy.load_state_dict(state.model.state_dict())
        return probes.copy.train()
    try:
        return copy.deepcopy(state.model)
    except Exception as error:
        assert isinstance(recipe.model, OwnModel)
        why = " ".join(str(error).split())
        raise RunFailed(
            f"model.module: {recipe.model.module}: copy.deepcopy cannot copy the model, which probes need "
            f"({type(error).__name__}: {why}); leave out probes, or make the model copyable"
        ) from error


def _pass_sample(network: Network, gradients: bool) -> tuple[Recorder, float, dict[str, values.GradientMoments]]:
    """Pass the sample: what the modules did, the mean loss, and each layer's gradient, in the order of execution."""
    recorder = Recorder(network.model, network.sample_batches)
    losses: list[Tensor] = []
    moments: dict[str, values.GradientMoments] = {}
    try:
        for number, batch in enumerate(network.sample()):
            recorder.begin_pass()
            with torch.set_grad_enabled(gradients):
                loss = network.loss(batch, f"sample {number}")
            losses.append(loss.detach().float())
            layers = _layers(recorder.executed)
            if not gradients or not layers:
                continue
            found = iter(network.gradients(loss, [each for weights in layers.values() for each in weights]))
            for name, weights in layers.items():
                gradient = values.vector([next(found) for _ in weights])
                moments.setdefault(name, values.GradientMoments()).add(gradient)
    finally:
        recorder.remove()
    return recorder, torch.stack(losses).mean().item(), moments


def _layers(executed: dict[str, nn.Module]) -> dict[str, list[Tensor]]:
    """The weights of each module that has some, in the order of execution."""
    return {name: weights for name, module in executed.items() if (weights := weights_of(module))}


# --- the probes -------------------------------------------------------------------------------------------------------


def _inputs(recorder: Recorder, probes: Probes) -> Iterator[Found]:
    """The distribution of the inputs of each nonlinearity, and its change since the first and the last probing."""
    for layer, found in recorder.inputs.items():
        inputs = torch.cat(found).T.contiguous().sort(1).values
        measured = values.percentiles(inputs)
        if layer in probes.last:
            measured |= values.change(probes.last[layer].to(inputs), inputs)
            from_start = values.change(probes.first[layer].to(inputs), inputs)
            measured |= {f"{name}_from_start": from_start[name] for name in ("drift", "drift_absolute")}
        probes.last[layer] = inputs.cpu()
        probes.first.setdefault(layer, probes.last[layer])
        yield layer, measured


def _saturation(recorder: Recorder) -> Iterator[Found]:
    for layer, module in recorder.nonlinearities.items():
        yield layer, values.saturation(module, torch.cat(recorder.inputs[layer]))


def _gradients(moments: dict[str, values.GradientMoments]) -> Iterator[Found]:
    found = {layer: each.values() for layer, each in moments.items()}
    yield from found.items()
    if len(found) > 1:
        first, *_, last = (each["norm"] for each in found.values())
        yield None, {"first_over_last": first / last if last else math.nan}


def _shift(network: Network, executed: dict[str, nn.Module], state: TrainState) -> Iterator[Found]:
    """Internal covariate shift of each layer but the first, on the sample's first batch.

    The layers below are all modules that were executed before it, with their norms; their step is the optimizer's next
    one, at the learning rate of the last, from the run's momentum.
    """
    batch, layers = network.first_batch(), _layers(executed)
    gradients = network.gradients(network.loss(batch, "shift"), network.parameters)
    gradient_of = dict(zip(map(id, network.parameters), gradients, strict=True))
    before = [each.detach().clone() for each in network.parameters]
    after = dict(zip(map(id, network.parameters), _after_step(network, gradients, state), strict=True))
    network.set_parameters(before)
    below = False
    for name, module in executed.items():
        if below and name in layers:
            again = network.gradients(network.loss(batch, "shift"), layers[name])
            yield (
                name,
                values.shift(values.vector([gradient_of[id(each)] for each in layers[name]]), values.vector(again)),
            )
        for each in module.parameters(recurse=False):
            if each.requires_grad:
                each.data.copy_(after[id(each)])
                below = True
    network.set_parameters(before)


def _after_step(network: Network, gradients: Sequence[Tensor], state: TrainState) -> list[Tensor]:
    """The parameters after the optimizer's next step with those gradients."""
    for parameter, gradient in zip(network.parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    if network.recipe.train.clip_gradients is not None:
        nn.utils.clip_grad_norm_(network.parameters, network.recipe.train.clip_gradients)
    stepped = optimizer(network.recipe, network.model)
    stepped.load_state_dict(copy.deepcopy(state.optimizer.state_dict()))
    stepped.step()
    stepped.zero_grad()
    return [each.detach().clone() for each in network.parameters]


def _landscape(network: Network, learning_rate: float) -> Iterator[Found]:
    """Loss and gradient of the sample's first batch along its gradient, whatever the optimizer's direction is."""
    batch = network.first_batch()
    before = [each.detach().clone() for each in network.parameters]
    direction = network.gradients(network.loss(batch, "landscape"), network.parameters)

    def at(size: float) -> tuple[Tensor, Tensor]:
        network.set_parameters([old - size * each for old, each in zip(before, direction, strict=True)])
        loss = network.loss(batch, "landscape")
        return loss.detach(), values.vector(network.gradients(loss, network.parameters))

    yield None, values.landscape(values.vector(direction), at, learning_rate)
    network.set_parameters(before)


def _whitening(recorder: Recorder) -> Iterator[Found]:
    """Of the normalized activations; in a model without norms, of the inputs of its nonlinearities."""
    for layer, found in (recorder.normalized or recorder.inputs).items():
        if found[0].shape[1]:  # all features of a norm may have the weight 0
            yield layer, values.whitening(torch.cat(found))


def _scale(recorder: Recorder, learning_rate: float) -> Iterator[Found]:
    """Norms of the weights; lr / norm^2 (van Laarhoven 2017, arXiv 1706.05350) where a norm makes the scale vanish."""
    for name, weights in _layers(recorder.executed).items():
        found = {"norm": values.norm(values.vector(weights))}
        if name in recorder.followed_by_norm:
            found["effective_learning_rate"] = learning_rate / found["norm"] ** 2 if found["norm"] else math.inf
        yield name, found


@torch.no_grad()
def _regularization(network: Network) -> list[Found]:
    """How far an example's logits depend on its batch, and the losses in evaluation mode, without augmentation.

    The variance is over random batches in training mode, its mean over a few fixed examples and all logits.
    """
    size, train = network.batch_size, replace(network.train, augment=False)  # type: ignore[type-var]
    order = network.random(len(train), "examples")
    fixed, others = order.split([count := min(FIXED_EXAMPLES, max(1, size - 1)), len(train) - count])
    companions = [others[network.random(len(others), f"batch {k}")[: size - count]] for k in range(RANDOM_BATCHES)]
    batches = train.batches(torch.cat([fixed, each]).to(train.index_device) for each in companions)
    logits = [network.logits(x, f"batch {k}")[:count].float() for k, (x, _) in enumerate(batches)]
    network.model.eval()
    examples = network.sample_batches * size
    training = _mean_loss(network, train, network.random(len(train), "sample")[:examples])
    held_out = _mean_loss(network, network.held_out, network.random(len(network.held_out), "held out")[:examples])
    found = {
        "logit_variance": torch.stack(logits).var(0).mean().item(),
        "training_loss": training,
        "held_out_loss": held_out,
        "gap": held_out - training,
    }
    return [(None, found)]


def _mean_loss(network: Network, split: Split, examples: Tensor) -> float:
    """The mean cross-entropy of examples in evaluation mode, without label smoothing."""
    chunks = examples.to(split.index_device).tensor_split(chunk_count(len(examples), network.batch_size))
    losses = [
        F.cross_entropy(network.logits(x, f"evaluation {k}").float(), y, reduction="sum")
        for k, (x, y) in enumerate(split.batches(iter(chunks)))
    ]
    return torch.stack(losses).sum().item() / len(examples)
