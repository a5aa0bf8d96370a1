"""A model as plain data: its layers in order, its parameters, and what it keeps for the backward pass. No torch.

`engine.model` builds modules from the same layers that `size` counts here, so a dry run cannot disagree with a run.
Shapes: C channels (or features), H, W height and width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bncli.errors import DataError
from bncli.names import NORMS
from bncli.recipe.sections import BatchNorm, Cnn, Digits, Hub, InstanceNorm, Mlp, Npz, Recipe, ResNet, Synthetic

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


@dataclass(frozen=True)
class Norm:
    channels: int


@dataclass(frozen=True)
class Activation:
    pass


@dataclass(frozen=True)
class MaxPool:
    kernel: int
    stride: int
    padding: int = 0


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
    shortcut: Sequence = field(default_factory=lambda: Sequence(()))


Layer = Linear | Conv | Norm | Activation | MaxPool | GlobalAverage | Sequence | Residual


def layers(recipe: Recipe, shape: Shape, classes: int) -> Sequence | None:
    """The model's layers for inputs of `shape` (C,) or (C, H, W); None for the user's own model."""
    model = recipe.model
    # Batch and instance norm subtract each channel's mean: a bias before them is dead (paper, section 3.2).
    bias = not isinstance(recipe.norm, BatchNorm | InstanceNorm)
    norm = recipe.norm.kind != "none"
    if isinstance(model, Mlp):
        return _mlp(math.prod(shape), model.hidden, classes, bias, norm)
    if isinstance(model, Cnn):
        return _cnn(shape, model.channels, classes, bias, norm)
    if isinstance(model, ResNet):
        family = _imagenet if model.depth in (18, 34, 50) else _cifar
        return family(shape[0], model.depth, classes, norm)
    return None


def _unit(weight: Linear | Conv, norm: bool, activation: bool = True) -> Sequence:
    parts: list[tuple[str, Layer]] = [("linear" if isinstance(weight, Linear) else "conv", weight)]
    if norm:
        parts.append(("norm", Norm(weight.outputs)))
    if activation:
        parts.append(("activation", Activation()))
    return Sequence(tuple(parts))


def _mlp(features: int, hidden: tuple[int, ...], classes: int, bias: bool, norm: bool) -> Sequence:
    widths = (features, *hidden)
    pairs = zip(widths, hidden, strict=False)
    body = [(f"hidden{i}", _unit(Linear(a, b, bias), norm)) for i, (a, b) in enumerate(pairs, 1)]
    return Sequence((*body, ("output", Linear(widths[-1], classes))))


def _cnn(shape: Shape, channels: tuple[int, ...], classes: int, bias: bool, norm: bool) -> Sequence:
    body: list[tuple[str, Layer]] = []
    inputs, side = shape[0], min(shape[1:])
    for index, outputs in enumerate(channels, 1):
        body.append((f"stage{index}", _unit(Conv(inputs, outputs, bias=bias), norm)))
        if side >= 4:  # a map under 4 wide is pooled no further
            body.append((f"pool{index}", MaxPool(2, 2)))
            side //= 2
        inputs = outputs
    return Sequence((*body, ("average", GlobalAverage()), ("output", Linear(inputs, classes))))


def _basic(inputs: int, outputs: int, stride: int, norm: bool) -> Residual:
    body = Sequence(
        (
            ("first", _unit(Conv(inputs, outputs, stride=stride, bias=not norm), norm)),
            ("second", _unit(Conv(outputs, outputs, bias=not norm), norm, activation=False)),
        )
    )
    return Residual(body, _shortcut(inputs, outputs, stride, norm))


def _bottleneck(inputs: int, width: int, stride: int, norm: bool) -> Residual:
    # The stride is on the 3x3 convolution, as in torchvision and unlike the paper's 1x1 (known as ResNet v1.5).
    body = Sequence(
        (
            ("reduce", _unit(Conv(inputs, width, kernel=1, bias=not norm), norm)),
            ("middle", _unit(Conv(width, width, stride=stride, bias=not norm), norm)),
            ("expand", _unit(Conv(width, 4 * width, kernel=1, bias=not norm), norm, activation=False)),
        )
    )
    return Residual(body, _shortcut(inputs, 4 * width, stride, norm))


def _shortcut(inputs: int, outputs: int, stride: int, norm: bool) -> Sequence:
    """A projection where the shape changes (He et al., option B)."""
    if stride == 1 and inputs == outputs:
        return Sequence(())
    return _unit(Conv(inputs, outputs, kernel=1, stride=stride, bias=not norm), norm, activation=False)


def _cifar(channels: int, depth: int, classes: int, norm: bool) -> Sequence:
    """6n + 2 layers: a 3x3 convolution, three stages of n blocks of 16, 32, 64 channels, and a linear layer."""
    body: list[tuple[str, Layer]] = [("stem", _unit(Conv(channels, 16, bias=not norm), norm))]
    inputs = 16
    for stage, width in enumerate((16, 32, 64), 1):
        for index in range((depth - 2) // 6):
            stride = 2 if stage > 1 and index == 0 else 1
            body.append((f"stage{stage}_{index + 1}", _basic(inputs, width, stride, norm)))
            inputs = width
    return Sequence((*body, ("average", GlobalAverage()), ("output", Linear(inputs, classes))))


def _imagenet(channels: int, depth: int, classes: int, norm: bool) -> Sequence:
    blocks = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}[depth]
    block, expansion = (_bottleneck, 4) if depth == 50 else (_basic, 1)
    stem = _unit(Conv(channels, 64, kernel=7, stride=2, bias=not norm), norm)
    body: list[tuple[str, Layer]] = [("stem", stem), ("pool", MaxPool(3, 2, padding=1))]
    inputs = 64
    for stage, (count, width) in enumerate(zip(blocks, (64, 128, 256, 512), strict=True), 1):
        for index in range(count):
            stride = 2 if stage > 1 and index == 0 else 1
            body.append((f"stage{stage}_{index + 1}", block(inputs, width, stride, norm)))
            inputs = expansion * width
    return Sequence((*body, ("average", GlobalAverage()), ("output", Linear(inputs, classes))))


# --- counting -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Size:
    parameters: int
    activations: int  # elements per example that the forward pass makes and the backward pass may need


def size(model: Layer, shape: Shape, affine: bool = True) -> tuple[Size, Shape]:
    """Parameters, activations per example, and the shape of the output, for one example of `shape`."""
    if isinstance(model, Sequence):
        return _chain([layer for _, layer in model.layers], shape, affine)
    if isinstance(model, Residual):
        body, after = size(model.body, shape, affine)
        shortcut, _ = size(model.shortcut, shape, affine)
        total = body.parameters + shortcut.parameters
        return Size(total, body.activations + shortcut.activations + 2 * math.prod(after)), after
    after = _output(model, shape)
    return Size(_parameters(model, affine), math.prod(after)), after


def _chain(parts: list[Layer], shape: Shape, affine: bool) -> tuple[Size, Shape]:
    parameters = activations = 0
    for part in parts:
        found, shape = size(part, shape, affine)
        parameters += found.parameters
        activations += found.activations
    return Size(parameters, activations), shape


def _parameters(layer: Layer, affine: bool) -> int:
    if isinstance(layer, Linear):
        return layer.outputs * (layer.inputs + layer.bias)
    if isinstance(layer, Conv):
        return layer.outputs * (layer.inputs * layer.kernel**2 + layer.bias)
    return 2 * layer.channels if isinstance(layer, Norm) and affine else 0


def _output(layer: Layer, shape: Shape) -> Shape:
    if isinstance(layer, Linear):
        return (layer.outputs,)
    if isinstance(layer, GlobalAverage):
        return shape[:1]
    if isinstance(layer, Conv | MaxPool):
        padding = layer.kernel // 2 if isinstance(layer, Conv) else layer.padding
        sides = tuple((side + 2 * padding - layer.kernel) // layer.stride + 1 for side in shape[1:])
        return (layer.outputs if isinstance(layer, Conv) else shape[0], *sides)
    return shape


def estimated_memory_mib(recipe: Recipe, found: Size) -> float:
    """Training memory in MiB without the framework itself: parameters, gradients, optimizer state and activations.

    The optimizer's state is one copy of the parameters for momentum, two for Adam; activations are those of one batch
    in the training precision. An estimate for planning: the activations are 0.8 to 2.5 times what autograd keeps,
    depending on the activation (a ReLU keeps its output alone, a GELU its input too) and the norm.
    """
    momentum = getattr(recipe.optimizer, "momentum", None)
    state = 2 if momentum is None else int(momentum > 0)
    width = 4 if recipe.train.precision == "fp32" else 2  # bytes
    total = found.parameters * 4 * (2 + state) + found.activations * width * recipe.train.batch_size
    return total / 2**20


def input_of(recipe: Recipe) -> tuple[Shape, int]:
    """The shape of one example and the number of classes. For npz this reads the file's headers and labels."""
    data = recipe.data
    if isinstance(data, Digits):
        return ((1, 8, 8) if data.images else (64,)), 10
    if isinstance(data, Synthetic | Hub):
        return tuple(data.shape), data.classes
    return _npz_header(data)


def _npz_header(data: Npz) -> tuple[Shape, int]:
    import zipfile

    import numpy as np

    path = Path(data.path).expanduser()
    if not path.is_file():
        raise DataError(f"data.path: there is no file {data.path}; it should hold the arrays x and y")
    try:
        with zipfile.ZipFile(path) as archive, archive.open("x.npy") as header:
            version = np.lib.format.read_magic(header)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape: Shape = tuple(read(header)[0][1:])
        with np.load(path, allow_pickle=False) as arrays:
            return shape, int(arrays["y"].max()) + 1
    except (zipfile.BadZipFile, KeyError, TypeError, ValueError, OSError) as error:
        raise DataError(f"data.path: {data.path} cannot be read as a .npz file with x and y: {error}") from error


# --- contradictions -----------------------------------------------------------------------------------------------


Contradiction = tuple[tuple[str, ...], str]  # the field to change, and why


def contradictions(recipe: Recipe) -> Iterator[Contradiction]:
    """What a recipe's sections are wrong about together. Opens no file."""
    train = recipe.train
    if isinstance(train.evaluate_every, int) and train.evaluate_every > train.steps:
        why = f"is larger than the budget of {train.steps} steps: no evaluation would happen"
        yield ("train", "evaluate_every"), why
    milestones: Any = getattr(recipe.schedule, "milestones", ())
    if list(milestones) != sorted(set(milestones)):
        yield ("schedule", "milestones"), "expected steps in rising order"
    examples = _training_examples(recipe)
    if examples is not None and train.batch_size > examples:
        yield ("train", "batch_size"), f"is larger than the {examples} training examples"
    if not isinstance(recipe.data, Npz):
        yield from shape_contradictions(recipe, *input_of(recipe))


def _training_examples(recipe: Recipe) -> int | None:
    if isinstance(recipe.data, Digits):
        return 1797 - recipe.data.held_out
    return recipe.data.examples if isinstance(recipe.data, Synthetic) else None


def shape_contradictions(recipe: Recipe, shape: Shape, classes: int) -> Iterator[Contradiction]:
    """What a recipe is wrong about together with its data, whose examples have `shape`."""
    vectors, kind = len(shape) == 1, recipe.model.kind
    if len(shape) not in (1, 3):
        yield ("data", "shape"), "expected [features] or [channels, height, width]"
        return
    if vectors and recipe.train.memory_format == "channels_last":
        yield ("train", "memory_format"), "channels_last is for images and the data are vectors"
    if vectors and kind in ("cnn", "resnet"):
        hint = {"digits": "set data.images: true", "npz": "give x as (examples, channels, height, width)"}.get(
            recipe.data.source, "give data.shape as [channels, height, width]"
        )
        yield ("model", "kind"), f"a {kind} needs images and the data are vectors; {hint}"
        return
    model = layers(recipe, shape, classes)
    if model is not None:
        yield from _norm_contradictions(recipe, set(_norm_shapes(model, shape)))


def _norm_contradictions(recipe: Recipe, shapes: set[Shape]) -> Iterator[Contradiction]:
    """Groups that do not divide the channels, and means over a single value, which leave nothing of the input."""
    kind, groups = recipe.norm.kind, getattr(recipe.norm, "groups", 1)
    row = NORMS.get(kind)  # none of no norm
    for channels, *sides in sorted(shapes):
        if channels % groups:
            yield ("norm", "groups"), f"{groups} groups do not divide a layer of {channels} channels"
            return
        if row and row.values_per_mean((recipe.train.batch_size, channels, *sides), groups) == 1:
            field = ("train", "batch_size") if row.over_batch else ("norm", "kind")
            yield (
                field,
                f"{kind} norm has one value to average over in a layer of {channels} channels, so nothing is left",
            )
            return


def _norm_shapes(layer: Layer, shape: Shape) -> Iterator[Shape]:
    """The shapes (C,) or (C, H, W) of one example at each norm."""
    if isinstance(layer, Norm):
        yield shape
    elif isinstance(layer, Residual):
        yield from _norm_shapes(layer.body, shape)
        yield from _norm_shapes(layer.shortcut, shape)
    elif isinstance(layer, Sequence):
        for _, part in layer.layers:
            yield from _norm_shapes(part, shape)
            _, shape = size(part, shape)
