"""A model as plain data: its layers in order, its parameters, and what it keeps for the backward pass. No torch.

`engine.models` builds modules from the same layers that `size` counts here, so a dry run cannot disagree with a run.
Shapes: C channels (or features), H, W height and width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice, pairwise
from typing import Any

from bncli.names import NORMS
from bncli.names import Norm as NormRow
from bncli.recipe import mnist, npz
from bncli.recipe.sections import (
    DIGITS,
    MNIST_5K,
    MNIST_5K_EXAMPLES,
    Cnn,
    DataSection,
    Digits,
    Inception,
    Mlp,
    Mnist,
    Npz,
    OwnModel,
    Recipe,
    ResNet,
)

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Linear:
    inputs: int
    outputs: int
    bias: bool = True


@dataclass(frozen=True)
class Conv:
    inputs: int
    outputs: int
    kernel: int = 3
    stride: int = 1
    bias: bool = False
    groups: int = 1


@dataclass(frozen=True)
class Norm:
    channels: int
    parameters: int
    zero_weight: bool = False  # it starts at 0


@dataclass(frozen=True)
class Activation:
    pass


@dataclass(frozen=True)
class Dropout:
    probability: float


@dataclass(frozen=True)
class MaxPool:
    kernel: int
    stride: int
    padding: int = 0


@dataclass(frozen=True)
class AveragePool:
    kernel: int
    stride: int
    padding: int = 0  # whose zeros count


@dataclass(frozen=True)
class GlobalAverage:
    """(C, H, W) -> (C)"""


@dataclass(frozen=True)
class Sequence:
    layers: tuple[tuple[str, Layer], ...]


@dataclass(frozen=True)
class Residual:
    """activation(body(x) + shortcut(x)); an empty shortcut is the identity."""

    body: Sequence
    shortcut: Sequence = Sequence(())


@dataclass(frozen=True)
class Branches:
    """Several layers of the same input, whose outputs are concatenated along the channels."""

    layers: tuple[tuple[str, Layer], ...]


Layer = (
    Linear | Conv | Norm | Activation | Dropout | MaxPool | AveragePool | GlobalAverage | Sequence | Residual | Branches
)
Parts = list[tuple[str, Layer]]
Unit = Callable[..., Sequence]  # a linear layer or a convolution -> with the norm and the activation that follow it


def layers(recipe: Recipe, shape: Shape, classes: int) -> Sequence | None:
    """The model's layers for inputs of `shape` (C,) or (C, H, W); None for the user's own model."""
    model, norm = recipe.model, NORMS.get(recipe.norm.kind)
    if isinstance(model, OwnModel):
        return None
    # A bias right before a norm that subtracts each channel's mean is dead (paper, section 3.2). It is not where the
    # gradient takes the mean for a constant. He et al. leave the biases of convolutions out in any case.
    position = getattr(model, "norm_position", "before")
    ignored = getattr(recipe.norm, "backward", "full") == "ignore_statistics"
    dead_bias = norm and norm.bias_is_dead and position == "before" and not ignored
    unit = partial(
        _unit,
        bias=not (dead_bias or (norm and isinstance(model, ResNet))),
        norm=partial(_norm, norm, getattr(recipe.norm, "affine", False)) if norm else None,
        position=position,
        dropout=model.dropout if isinstance(model, Mlp | Cnn) else 0.0,
        zero_gamma=getattr(model, "zero_gamma", False),
    )
    if isinstance(model, Mlp):
        widths = (math.prod(shape), *model.hidden)
        body: Parts = [(f"hidden{i}", unit(Linear(a, b))) for i, (a, b) in enumerate(pairwise(widths), 1)]
        return Sequence((*body, ("output", Linear(widths[-1], classes))))
    if isinstance(model, Cnn):
        body, width = _cnn(shape, model.channels, unit)
    elif isinstance(model, Inception):
        body, width = _inception(shape[0], unit)
    else:
        body, width = _resnet(shape[0], model.depth, unit)
    body.append(("average", GlobalAverage()))
    if isinstance(model, Inception) and model.dropout > 0:
        body.append(("dropout", Dropout(model.dropout)))
    return Sequence((*body, ("output", Linear(width, classes))))


def _unit(
    weight: Linear | Conv,
    bias: bool,
    norm: Callable[..., Norm] | None,
    position: str,
    dropout: float,
    zero_gamma: bool,
    activation: bool = True,
    ends_block: bool = False,
) -> Sequence:
    """A weight, then norm and activation in the order that `position` says, then dropout."""
    normed: Parts = [("norm", norm(weight.outputs, zero_gamma and ends_block))] if norm else []
    activated: Parts = [("activation", Activation())] if activation else []
    parts: Parts = [("linear" if isinstance(weight, Linear) else "conv", replace(weight, bias=bias))]
    parts += normed + activated if position == "before" else activated + normed
    if dropout > 0:
        parts.append(("dropout", Dropout(dropout)))
    return Sequence(tuple(parts))


def _norm(row: NormRow, affine: bool, channels: int, zero_weight: bool) -> Norm:
    return Norm(channels, row.vectors * channels * affine + row.scalars, zero_weight)


def _cnn(shape: Shape, channels: tuple[int, ...], unit: Unit) -> tuple[Parts, int]:
    """The stages and the channels of the last."""
    body: Parts = []
    side = min(shape[1:])
    for index, (inputs, outputs) in enumerate(pairwise((shape[0], *channels)), 1):
        body.append((f"stage{index}", unit(Conv(inputs, outputs))))
        if side >= 4:  # a map under 4 wide is pooled no further
            body.append((f"pool{index}", MaxPool(2, 2)))
            side //= 2
    return body, channels[-1]


def _resnet(channels: int, depth: int, unit: Unit) -> tuple[Parts, int]:
    """The stem and the blocks, and the channels of the last. Table 1 of He et al., or 6n + 2 layers of section 4.2."""
    counts = IMAGENET_BLOCKS.get(depth, ((depth - 2) // 6,) * 3)
    if depth in IMAGENET_BLOCKS:
        widths = [64, 128, 256, 512]
        body: Parts = [("stem", unit(Conv(channels, 64, kernel=7, stride=2))), ("pool", MaxPool(3, 2, padding=1))]
    else:
        widths, body = [16, 32, 64], [("stem", unit(Conv(channels, 16)))]
    inputs = widths[0]
    for stage, (count, width) in enumerate(zip(counts, widths, strict=True), 1):
        for index in range(count):
            stride = 2 if stage > 1 and index == 0 else 1
            block, outputs = _block(inputs, width, stride, depth == 50, unit)
            body.append((f"stage{stage}_{index + 1}", block))
            inputs = outputs
    return body, inputs


IMAGENET_BLOCKS: dict[int, tuple[int, ...]] = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}


def _block(inputs: int, width: int, stride: int, bottleneck: bool, unit: Unit) -> tuple[Residual, int]:
    """A residual block and its output channels."""
    outputs = 4 * width if bottleneck else width
    if bottleneck:
        # The stride is on the 3x3 convolution, as in torchvision and unlike the paper's 1x1 (known as ResNet v1.5).
        *most, last = (
            ("reduce", Conv(inputs, width, kernel=1)),
            ("middle", Conv(width, width, stride=stride)),
            ("expand", Conv(width, outputs, kernel=1)),
        )
    else:
        *most, last = ("first", Conv(inputs, width, stride=stride)), ("second", Conv(width, width))
    end = unit(last[1], activation=False, ends_block=True)
    body = [*((name, unit(conv)) for name, conv in most), (last[0], end)]
    if stride == 1 and inputs == outputs:
        return Residual(Sequence(tuple(body))), outputs
    # A projection where the shape changes (He et al., option B).
    shortcut = unit(Conv(inputs, outputs, kernel=1, stride=stride), activation=False)
    return Residual(Sequence(tuple(body)), shortcut), outputs


# Outputs of a module's branches (Ioffe & Szegedy 2015, appendix, figure 5): 1x1; 3x3 and double 3x3, each after its 1x1
# reduction; 1x1 after pooling. Modules without a 1x1 branch have stride 2 and pass the pooled input on. The paper's
# table prints 128 for the last figure of 4c and 4d, which does not add up to its own 576 channels; 96 does.
INCEPTION_MODULES = {
    "3a": (64, (64, 64), (64, 96), 32),
    "3b": (64, (64, 96), (64, 96), 64),
    "3c": (0, (128, 160), (64, 96), 0),
    "4a": (224, (64, 96), (96, 128), 128),
    "4b": (192, (96, 128), (96, 128), 128),
    "4c": (160, (128, 160), (128, 160), 96),
    "4d": (96, (128, 192), (160, 192), 96),
    "4e": (0, (128, 192), (192, 256), 0),
    "5a": (352, (192, 320), (160, 224), 128),
    "5b": (352, (192, 320), (192, 224), 128),
}
MAX_POOLED = ("3c", "4e", "5b")  # the others average


def _inception(channels: int, unit: Unit) -> tuple[Parts, int]:
    """The stem and the modules of BN-Inception, and the channels of the last."""
    # The first convolution is separable, with depth multiplier 8: no norm or activation between its halves.
    depthwise = Conv(channels, 8 * channels, kernel=7, stride=2, groups=channels)
    first = Sequence((("depthwise", depthwise), *unit(Conv(8 * channels, 64, kernel=1)).layers))
    body: Parts = [("stem1", first), ("pool1", MaxPool(3, 2, padding=1))]
    body += [("stem2", _chain(unit, Conv(64, 64, kernel=1), Conv(64, 192))), ("pool2", MaxPool(3, 2, padding=1))]
    inputs = 192
    for name, (single, (reduce, outputs), (reduce2, outputs2), projection) in INCEPTION_MODULES.items():
        stride = 1 if single else 2
        pool = (MaxPool if name in MAX_POOLED else AveragePool)(3, stride, padding=1)
        projected = _chain(unit, Conv(inputs, projection, kernel=1)).layers if projection else ()
        convs = [Conv(inputs, reduce2, kernel=1), Conv(reduce2, outputs2), Conv(outputs2, outputs2, stride=stride)]
        branches: Parts = [("conv1x1", _chain(unit, Conv(inputs, single, kernel=1)))] if single else []
        branches += [
            ("conv3x3", _chain(unit, Conv(inputs, reduce, kernel=1), Conv(reduce, outputs, stride=stride))),
            ("double3x3", _chain(unit, *convs)),
            ("pool", Sequence((("pool", pool), *projected))),
        ]
        body.append((f"inception{name}", Branches(tuple(branches))))
        inputs = single + outputs + outputs2 + (projection or inputs)
    return body, inputs


def _chain(unit: Unit, *convs: Conv) -> Sequence:
    return Sequence(tuple((f"unit{place}", unit(conv)) for place, conv in enumerate(convs, 1)))


# --- counting -----------------------------------------------------------------------------------------------------


def walk(model: Layer, shape: Shape) -> Iterator[tuple[Layer, Shape, Shape]]:
    """The layers in order, each with its input's and its output's shape for one example; a block after its parts."""
    if isinstance(model, Sequence):
        for _, part in model.layers:
            for layer, before, after in walk(part, shape):
                yield layer, before, after
            shape = after
    elif isinstance(model, Residual):
        yield from walk(model.shortcut, shape)
        for layer, before, after in walk(model.body, shape):
            yield layer, before, after
        yield model, shape, after
    elif isinstance(model, Branches):
        channels = 0
        for _, part in model.layers:
            for layer, before, after in walk(part, shape):
                yield layer, before, after
            channels += after[0]
        yield model, shape, (channels, *after[1:])
    else:
        yield model, shape, _output(model, shape)


def module_names(model: Layer, name: str = "") -> Iterator[str]:
    """The names of the layers in the module that is built from them, as in its state_dict."""
    if isinstance(model, Sequence | Branches):
        for part, layer in model.layers:
            yield from module_names(layer, f"{name}.{part}".lstrip("."))
    elif isinstance(model, Residual):
        yield from module_names(model.body, f"{name}.body")
        yield from module_names(model.shortcut, f"{name}.shortcut")
        yield f"{name}.activation"
    else:
        yield name


@dataclass(frozen=True)
class Size:
    parameters: int
    activations: int  # elements per example that the forward pass makes and the backward pass may need
    multiply_adds: int = 0  # of linear layers and convolutions per example, in the forward pass


def size(model: Layer, shape: Shape) -> tuple[Size, Shape]:
    """Parameters, activations and multiply-adds per example, and the shape of the output, for one of `shape`."""
    parameters = activations = multiply_adds = 0
    after = shape
    for layer, _, after in walk(model, shape):
        parameters += _parameters(layer)
        if isinstance(layer, Linear | Conv):  # every weight once at each position of the output
            multiply_adds += (_parameters(layer) - layer.outputs * layer.bias) * math.prod(after[1:])
        activations += math.prod(after) * (2 if isinstance(layer, Residual) else 1)  # the sum and its activation
    return Size(parameters, activations, multiply_adds), after


def _parameters(layer: Layer) -> int:
    if isinstance(layer, Linear):
        return layer.outputs * (layer.inputs + layer.bias)
    if isinstance(layer, Conv):
        return layer.outputs * (layer.inputs // layer.groups * layer.kernel**2 + layer.bias)
    return layer.parameters if isinstance(layer, Norm) else 0


def _output(layer: Layer, shape: Shape) -> Shape:
    if isinstance(layer, Linear):
        return (layer.outputs,)
    if isinstance(layer, GlobalAverage):
        return shape[:1]
    if isinstance(layer, Conv | MaxPool | AveragePool):
        padding = layer.kernel // 2 if isinstance(layer, Conv) else layer.padding
        sides = tuple((side + 2 * padding - layer.kernel) // layer.stride + 1 for side in shape[1:])
        return (layer.outputs if isinstance(layer, Conv) else shape[0], *sides)
    return shape


def estimated_memory_mib(recipe: Recipe, found: Size) -> float:
    """Training memory in MiB without the framework itself: parameters, gradients, optimizer state and activations.

    The optimizer's state is one copy of the parameters for momentum, two for Adam; activations are those of one
    micro-batch in the training precision. An estimate for planning: the activations are 0.8 to 2.5 times what autograd
    keeps, depending on the activation (a ReLU keeps its output alone, a GELU its input too) and the norm.
    """
    momentum = getattr(recipe.optimizer, "momentum", None)
    state = 2 if momentum is None else int(momentum > 0)
    width = 4 if recipe.train.precision == "fp32" else 2  # bytes
    total = found.parameters * 4 * (2 + state) + found.activations * width * recipe.train.micro_batch_size
    return total / 2**20


def input_of(recipe: Recipe) -> tuple[Shape, int]:
    """The shape of one example and the number of classes. For npz this reads the file's headers and labels."""
    data = recipe.data
    if isinstance(data, Npz):
        (_, *shape), classes, _ = npz.header(data.path)
        return tuple(shape), classes
    if isinstance(data, Digits | Mnist):
        side, classes = (8, 10) if isinstance(data, Digits) else (mnist.SIDE, mnist.CLASSES)
        return ((1, side, side) if data.images else (side * side,)), classes
    return tuple(data.shape), data.classes


def training_examples(data: DataSection) -> int | None:
    """The number of training examples, or None where the recipe does not tell. Reads headers of files.

    Raises DataError for a file that is missing or damaged.
    """
    if isinstance(data, Mnist) and data.path != MNIST_5K:
        return mnist.images_in(data.path)
    if isinstance(data, Npz):
        (examples, *_), _, has_test = npz.header(data.path)
        return examples if has_test else max(0, examples - (data.held_out or 0))
    return known_examples(data)


def known_examples(data: DataSection) -> int | None:
    """The number of training examples, or None where only a file tells. Opens no file."""
    if isinstance(data, Digits):
        return DIGITS - data.held_out
    if isinstance(data, Mnist):
        return MNIST_5K_EXAMPLES - (data.held_out or 0) if data.path == MNIST_5K else None
    return getattr(data, "examples", None)


# --- contradictions -----------------------------------------------------------------------------------------------


Contradiction = tuple[tuple[str, ...], str]  # the field to change, and why


def contradictions(recipe: Recipe) -> Iterator[Contradiction]:
    """What a recipe's sections are wrong about together. Opens no file."""
    train, data = recipe.train, recipe.data
    if isinstance(train.evaluate_every, int) and train.evaluate_every > train.steps:
        why = f"is larger than the budget of {train.steps} steps: no evaluation would happen"
        yield ("train", "evaluate_every"), why
    milestones: Any = getattr(recipe.schedule, "milestones", ())
    if list(milestones) != sorted(set(milestones)):
        yield ("schedule", "milestones"), "expected steps in increasing order"
    if recipe.probes and len(set(recipe.probes.measure)) < len(recipe.probes.measure):
        yield ("probes", "measure"), "names the same probe twice"
    examples = known_examples(data)
    if examples is not None and train.batch_size > examples:
        yield ("train", "batch_size"), f"is larger than the {examples} training examples"
    yield from _field_contradictions(recipe)
    if train.population_statistics == "precise":
        kind = recipe.norm.kind
        if not getattr(recipe.norm, "track_running_stats", True):
            why = "precise replaces running statistics, and with track_running_stats: false there are none"
            yield ("train", "population_statistics"), why
        elif kind in ("frozen", "whiten", "iternorm"):
            why = "trains with its running statistics too" if kind == "frozen" else "evaluates with a covariance too"
            yield ("train", "population_statistics"), f"precise estimates mean and variance alone, and {kind} {why}"
    elif train.population_batches != type(train).model_fields["population_batches"].default:
        yield ("train", "population_batches"), "has no effect without population_statistics: precise"
    if not isinstance(data, Npz):
        yield from shape_contradictions(recipe, *input_of(recipe))


def _field_contradictions(recipe: Recipe) -> Iterator[Contradiction]:
    """Fields of the norm, and of the model about its norms, that do not fit the other fields or have no effect."""
    norm, batch = recipe.norm, recipe.train.micro_batch_size
    batches = recipe.train.steps * recipe.train.accumulate
    no_weight = not getattr(norm, "affine", False)
    if no_weight and getattr(norm, "init_weight", 1.0) != 1:
        yield ("norm", "init_weight"), "has no effect: with affine: false there is no weight"
    if no_weight and getattr(recipe.model, "zero_gamma", False):
        yield ("model", "zero_gamma"), "the norm has no weight that could start at 0; it takes a norm with affine: true"
    if norm.kind == "batch" and norm.backward == "ignore_statistics" and norm.kernel != "native":
        yield ("norm", "backward"), f"ignore_statistics is for kernel native; {norm.kernel} has the full gradient only"
    if norm.kind == "batch" and norm.backward == "ignore_statistics" and norm.sync:
        yield ("norm", "sync"), "has the gradient of the statistics of all ranks, which ignore_statistics leaves out"
    if norm.kind == "ghost" and batch % norm.size:
        yield ("norm", "size"), f"slices of {norm.size} examples do not divide the batch of {batch}"
    if norm.kind == "renorm" and norm.warmup >= batches:
        why = f"all {batches} batches of the budget would be plain batch norm"
        yield ("norm", "warmup"), f"{norm.warmup}: {why}; set warmup, and r_steps and d_steps, to less"
    if norm.kind == "frozen" and norm.after >= batches:
        yield ("norm", "after"), f"{norm.after}: nothing would be frozen in the {batches} batches of the budget"


def shape_contradictions(recipe: Recipe, shape: Shape, classes: int) -> Iterator[Contradiction]:
    """What a recipe is wrong about together with its data, whose examples have `shape`."""
    vectors, kind = len(shape) == 1, recipe.model.kind
    if len(shape) not in (1, 3):
        yield ("data", "shape"), "expected [features] or [channels, height, width]"
        return
    if recipe.train.batch_size % recipe.train.accumulate:
        why = f"a batch of {recipe.train.batch_size} does not split into {recipe.train.accumulate} equal micro-batches"
        yield ("train", "accumulate"), why
        return
    if vectors and recipe.train.memory_format == "channels_last":
        yield ("train", "memory_format"), "channels_last is for images and the data are vectors"
    if vectors and kind in ("cnn", "resnet", "inception"):
        hints = dict.fromkeys(("digits", "mnist"), "set data.images: true") | {
            "npz": "give x as (examples, channels, height, width)"
        }
        hint = hints.get(recipe.data.source, "give data.shape as [channels, height, width]")
        a = "an" if kind == "inception" else "a"
        yield ("model", "kind"), f"{a} {kind} needs images and the data are vectors; {hint}"
    elif model := layers(recipe, shape, classes):
        norm_shapes = {before for layer, before, _ in walk(model, shape) if isinstance(layer, Norm)}
        yield from islice(_norm_contradictions(recipe, norm_shapes), 1)


def _norm_contradictions(recipe: Recipe, shapes: set[Shape]) -> Iterator[Contradiction]:
    """Groups that do not divide the channels, means over a single value, which leave nothing of the input, and
    covariances of no more values than channels, which have no inverse.
    """
    kind, groups, size = recipe.norm.kind, getattr(recipe.norm, "groups", 1), getattr(recipe.norm, "group_size", 1)
    examples = recipe.norm.size if recipe.norm.kind == "ghost" else recipe.train.micro_batch_size
    for channels, *sides in sorted(shapes):
        layer = f"a layer of {channels} channels"
        if channels % groups:
            yield ("norm", "groups"), f"{groups} groups do not divide {layer}"
            continue
        if channels % size:
            yield ("norm", "group_size"), f"groups of {size} channels do not divide {layer}"
            continue
        values = NORMS[kind].values_per_mean((examples, channels, *sides), groups)
        if 1 < values <= size:
            why = f"the covariance of {size} channels needs more than {size} values a channel to have an inverse"
            yield ("norm", "group_size"), f"{why}; a batch has {values} in {layer}"
        elif values == 1:
            batch = ("train", "batch_size" if recipe.train.accumulate == 1 else "accumulate")
            over_batch = ("norm", "size") if kind == "ghost" else batch
            at = over_batch if NORMS[kind].over_batch else ("norm", "kind")
            yield at, f"{kind} norm has one value to average over in {layer}: constant output"
