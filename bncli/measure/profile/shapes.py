"""The shapes that models call batch norm on: from the models' definitions, typed in, or read from a file. No torch.

Shape letters: N batch, C channels, H, W height and width, *S positions.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from bncli.errors import UsageError, UsageErrors
from bncli.recipe import layers
from bncli.recipe.layers import Layer, Linear, Norm, Residual
from bncli.recipe.sections import BatchNorm, Mlp, Recipe, ResNet

Shape = tuple[int, ...]
MOST_MISTAKES = 5  # of a file, shown


class Calls(NamedTuple):
    """A shape (N, C, *S) that a model calls batch norm on, and how often in a forward pass.

    operations: (operation, how often) of what the model does there; empty where nothing says so.
    """

    shape: Shape
    calls: int
    operations: tuple[tuple[str, int], ...] = ()


class Unit(NamedTuple):
    """One batch norm of a model: the shape (C, *S) of one example, and what is done with its result."""

    shape: Shape
    operation: str


# --- the models -------------------------------------------------------------------------------------------------------


def _in_layers(layer: Layer, shape: Shape) -> Iterator[Unit]:
    """The norms of a model in order; the last of a residual block's body takes the shortcut in."""
    if isinstance(layer, Norm):
        yield Unit(shape, "bn")
    elif isinstance(layer, Residual):
        body = list(_in_layers(layer.body, shape))
        yield from body[:-1]
        yield from _in_layers(layer.shortcut, shape)
        yield Unit(body[-1].shape, "bn+add+relu")
    elif isinstance(layer, layers.Sequence):
        parts = [part for _, part in layer.layers]
        for part, after in zip(parts, [*parts, None][1:], strict=True):
            activated = isinstance(part, Norm) and isinstance(after, layers.Activation)
            yield from [Unit(shape, "bn+relu")] if activated else _in_layers(part, shape)
            shape = layers.size(part, shape)[1]


def _of_recipe_model(model: Mlp | ResNet, shape: Shape, classes: int) -> Layer:
    """The layers that a recipe with this model and batch norm trains, for one example of `shape`."""
    found = layers.layers(Recipe.model_validate({**_ANY_RECIPE, "model": model}), shape, classes)
    assert found is not None
    return found


_ANY_RECIPE = {
    "data": {"source": "digits"},
    "norm": BatchNorm(kind="batch"),
    "optimizer": {"kind": "sgd", "lr": 0.1},
    "train": {"steps": 1, "batch_size": 1, "evaluate_every": 1, "target": {"value": 0.9}},
}


def _resnet50() -> Iterator[Unit]:
    """He et al. 2015, table 1, at 224x224, with the stride in the 3x3 convolution as torchvision has it (v1.5)."""
    return _in_layers(_of_recipe_model(ResNet(kind="resnet", depth=50), (3, 224, 224), 1000), (3, 224, 224))


def _resnet20() -> Iterator[Unit]:
    """He et al. 2015, section 4.2, at 32x32."""
    return _in_layers(_of_recipe_model(ResNet(kind="resnet", depth=20), (3, 32, 32), 10), (3, 32, 32))


def _inception() -> Iterator[Unit]:
    return (Unit((one.outputs, one.side, one.side), "bn+relu") for one in convolutions())


def _mlp() -> Iterator[Unit]:
    """Ioffe & Szegedy 2015, section 4.1: three hidden layers of 100 sigmoids on 28x28 digits."""
    model = _of_recipe_model(Mlp(kind="mlp", hidden=(100, 100, 100), activation="sigmoid"), (784,), 10)
    assert isinstance(model, layers.Sequence)
    assert all(isinstance(part, Linear | layers.Sequence) for _, part in model.layers)
    return (Unit(unit.shape, "bn") for unit in _in_layers(model, (784,)))  # a sigmoid is fused by no kernel


SETS: dict[str, Callable[[], Iterator[Unit]]] = {
    "resnet50": _resnet50,
    "resnet20": _resnet20,
    "inception": _inception,
    "mlp": _mlp,
}
BATCHES = {"resnet50": 16, "resnet20": 128, "inception": 32, "mlp": 60}  # of training; the last two are the paper's
BATCHES_ON_CUDA = {**BATCHES, "resnet50": 256}  # He et al. 2015, section 3.4


def shape_set(name: str, *, cuda: bool = False, batch: int | None = None) -> tuple[Calls, ...]:
    """The distinct shapes of one of SETS in the model's order, with their calls and operations.

    batch: N, instead of BATCHES. Raises UsageError for a name that is none.
    """
    if name not in SETS:
        raise UsageError(f"expected one of {', '.join(SETS)}, or a CSV file", field="shapes", value=name)
    if batch is not None and batch < 1:
        raise UsageError("expected a whole number above 0", field="batch", value=batch)
    examples = batch if batch is not None else (BATCHES_ON_CUDA if cuda else BATCHES)[name]
    found: dict[Shape, dict[str, int]] = {}
    for unit in SETS[name]():
        counts = found.setdefault((examples, *unit.shape), {})
        counts[unit.operation] = counts.get(unit.operation, 0) + 1
    return tuple(Calls(shape, sum(counts.values()), tuple(counts.items())) for shape, counts in found.items())


# --- typed in, or in a file -------------------------------------------------------------------------------------------


def parse(text: str, field: str = "shape") -> Shape:
    """256x64x56x56 -> (256, 64, 56, 56). Raises UsageError for what is no (N, C, *S) of two to five sizes."""
    sizes = text.lower().split("x")
    if not (2 <= len(sizes) <= 5 and all(size.isascii() and size.isdigit() and int(size) > 0 for size in sizes)):
        raise UsageError(
            "expected the batch, the channels and up to three sides, whole numbers above 0, as in 256x64x56x56 or "
            "60x100",
            field=field,
            value=text,
        )
    return tuple(int(size) for size in sizes)


def read_csv(file: Path) -> tuple[Calls, ...]:
    """The distinct shapes of a CSV file, the most called first; the calls of lines with the same shape add up.

    Columns n, c, spatial (like 14x14, or empty), or a column shape (like 32x64x56x56); and calls, 1 if there is no such
    column. Others are ignored. Raises UsageError with the file, the line and what was expected there.
    """
    try:
        with file.open(newline="", encoding="utf-8-sig") as lines:
            found, mistakes = _rows(csv.DictReader(lines), file)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        why = "there is no such file" if isinstance(error, FileNotFoundError) else str(error)
        raise UsageError(why, field="shapes", value=file) from error
    if mistakes:
        more = len(mistakes) - MOST_MISTAKES
        raise UsageErrors(mistakes[:MOST_MISTAKES] + [UsageError(f"and {more} more")] * (more > 0))
    if not found:
        raise UsageError("it has no line of a shape under its first line", field="shapes", value=file)
    calls: Counter[Shape] = Counter()
    for row in found:
        calls[row.shape] += row.calls
    return tuple(Calls(shape, count) for shape, count in calls.most_common())


def _rows(rows: csv.DictReader[str], file: Path) -> tuple[list[Calls], list[UsageError]]:
    columns = {(name or "").strip().lower(): name for name in rows.fieldnames or ()}
    missing = [name for name in ("n", "c", "spatial") if name not in columns]
    if missing and "shape" not in columns:
        lacks = f"it lacks the columns {', '.join(missing)}; expected n, c, spatial and calls, or shape and calls"
        raise UsageError(lacks, field="shapes", value=f"{file}, line 1")
    found, mistakes = [], []
    for row in rows:
        of_row = {name: (row[column] or "").strip() for name, column in columns.items()}
        try:
            found.append(Calls(_shape(of_row), _whole(of_row.get("calls", "1"))))
        except (ValueError, UsageError):
            expected = (
                "shape is sizes like 32x64x56x56, and calls a whole number above 0"
                if "shape" in columns
                else "n, c and calls are whole numbers above 0, and spatial is sizes like 14x14, or empty"
            )
            mistake = f"{', '.join(of_row.values())}; expected: {expected}"
            mistakes.append(UsageError(mistake, field="shapes", value=f"{file}, line {rows.line_num}"))
    return found, mistakes


def _shape(row: Mapping[str, str]) -> Shape:
    if "shape" in row:
        return parse(row["shape"])
    sides: Sequence[str] = row["spatial"].lower().split("x") if row["spatial"] else ()
    return parse("x".join([row["n"], row["c"], *sides]))


def _whole(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


class Block(NamedTuple):
    """A row of figure 5 of arXiv 1502.03167: the filters of an Inception block; 0: it has no such branch."""

    single: int  # 1x1
    reduce: int  # 1x1 before the 3x3
    three: int
    double_reduce: int  # 1x1 before the two 3x3
    double: int
    projection: int  # 1x1 after the pool; 0: the pool passes its input through, and the block has stride 2

    def outputs(self, inputs: int) -> int:
        return self.single + self.three + self.double + (self.projection or inputs)


# The filters are figure 5's. Its column of output sizes gives 4c, 4d and 4e 576, 576 and 1024 channels, where its
# filters add up to 608, 608 and 1056.
BLOCKS = {
    "3a": Block(64, 64, 64, 64, 96, 32),
    "3b": Block(64, 64, 96, 64, 96, 64),
    "3c": Block(0, 128, 160, 64, 96, 0),
    "4a": Block(224, 64, 96, 96, 128, 128),
    "4b": Block(192, 96, 128, 96, 128, 128),
    "4c": Block(160, 128, 160, 128, 160, 128),
    "4d": Block(96, 128, 192, 160, 192, 128),
    "4e": Block(0, 128, 192, 192, 256, 0),
    "5a": Block(352, 192, 320, 160, 224, 128),
    "5b": Block(352, 192, 320, 192, 224, 128),
}


class Convolution(NamedTuple):
    """A convolution, always followed by batch norm and ReLU; `side` is that of its square output."""

    inputs: int
    outputs: int
    kernel: int
    side: int


def convolutions(pixels: int = 224) -> Iterator[Convolution]:
    """Those of BN-Inception, the network of Ioffe & Szegedy 2015 (figure 5), for square images."""
    side = pixels // 2
    yield Convolution(3, 64, 7, side)
    side //= 2  # a max pool
    yield Convolution(64, 64, 1, side)
    yield Convolution(64, 192, 3, side)
    side //= 2  # a max pool
    inputs = 192
    for block in BLOCKS.values():
        strided = block.projection == 0
        after = side // 2 if strided else side
        if block.single:
            yield Convolution(inputs, block.single, 1, side)
        yield Convolution(inputs, block.reduce, 1, side)
        yield Convolution(block.reduce, block.three, 3, after)
        yield Convolution(inputs, block.double_reduce, 1, side)
        yield Convolution(block.double_reduce, block.double, 3, side)
        yield Convolution(block.double, block.double, 3, after)
        if block.projection:
            yield Convolution(inputs, block.projection, 1, side)
        inputs, side = block.outputs(inputs), after
