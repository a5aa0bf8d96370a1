"""Shapes that models call batch norm on: sets of known models, typed in, or read from a CSV file. No torch.

Shape letters: N batch, C channels, *S positions.
"""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from bncli.errors import FileError, UsageError, UsageErrors
from bncli.storage import read_plain

Shape = tuple[int, ...]
MOST_MISTAKES = 5  # of a file, shown
MOST_SIZE, SIZE = 10**9 - 1, r"0*[1-9][0-9]{0,8}"


class Calls(NamedTuple):
    """A shape (N, C, *S) that a model calls batch norm on, and how often in a forward pass.

    operations: (operation, how often) of what the model does there; empty where nothing says so.
    """

    shape: Shape
    calls: int
    operations: tuple[tuple[str, int], ...] = ()


# --- models -----------------------------------------------------------------------------------------------------------


class ShapeSet(NamedTuple):
    """The batch norms of a model: the shapes (C, *S) of one example, each with the calls of its operations there."""

    batch: int  # of training
    batch_on_cuda: int
    table: str


SETS = {
    # He et al. 2015, section 4.2, at 32x32; projections in the two shortcuts that change the shape.
    "resnet20": ShapeSet(
        128,
        128,
        "16x32x32: bn+relu 4, bn+add+relu 3; 32x16x16: bn+relu 3, bn 1, bn+add+relu 3; "
        "64x8x8: bn+relu 3, bn 1, bn+add+relu 3",
    ),
    # He et al. 2015, table 1, at 224x224, with the stride in the 3x3 convolution as torchvision has it (v1.5). Its
    # section 3.4 trains with a batch of 256.
    "resnet50": ShapeSet(
        16,
        256,
        "64x112x112: bn+relu 1; 64x56x56: bn+relu 6; 256x56x56: bn 1, bn+add+relu 3; 128x56x56: bn+relu 1; "
        "128x28x28: bn+relu 7; 512x28x28: bn 1, bn+add+relu 4; 256x28x28: bn+relu 1; "
        "256x14x14: bn+relu 11; 1024x14x14: bn 1, bn+add+relu 6; 512x14x14: bn+relu 1; "
        "512x7x7: bn+relu 5; 2048x7x7: bn 1, bn+add+relu 3",
    ),
    # BN-Inception (Ioffe & Szegedy 2015, figure 5) at 224x224, with the paper's batch. The figure gives the outputs of
    # 4c, 4d and 4e 576, 576 and 1024 channels, where its filters, which count here, add up to 608, 608 and 1056.
    "inception": ShapeSet(
        32,
        32,
        "64x112x112: bn+relu 1; 64x56x56: bn+relu 1; 192x56x56: bn+relu 1; "
        "64x28x28: bn+relu 9; 96x28x28: bn+relu 6; 32x28x28: bn+relu 1; 128x28x28: bn+relu 1; "
        "160x14x14: bn+relu 6; 96x14x14: bn+relu 6; 224x14x14: bn+relu 1; 64x14x14: bn+relu 1; "
        "128x14x14: bn+relu 13; 192x14x14: bn+relu 5; 192x7x7: bn+relu 4; 256x14x14: bn+relu 1; "
        "256x7x7: bn+relu 1; 352x7x7: bn+relu 2; 320x7x7: bn+relu 2; 160x7x7: bn+relu 1; "
        "224x7x7: bn+relu 4; 128x7x7: bn+relu 2",
    ),
    # Ioffe & Szegedy 2015, section 4.1: three hidden layers of 100 sigmoids, which no kernel fuses, on 28x28 digits.
    "mlp": ShapeSet(60, 60, "100: bn 3"),
}


def shape_set(name: str, *, cuda: bool = False, batch: int | None = None) -> tuple[Calls, ...]:
    """The distinct shapes of one of SETS in the model's order, with their calls and operations.

    batch: N, instead of the set's own. Raises UsageError for an unknown name.
    """
    if name not in SETS:
        raise UsageError(f"expected one of {', '.join(SETS)}, or a CSV file", field="shapes", value=name)
    if batch is not None and batch < 1:
        raise UsageError("expected a whole number above 0", field="batch", value=batch)
    model = SETS[name]
    examples = batch or (model.batch_on_cuda if cuda else model.batch)
    found = []
    for entry in model.table.split("; "):
        sizes, _, counts = entry.partition(": ")
        pairs = [pair.split() for pair in counts.split(", ")]
        operations = tuple((operation, int(calls)) for operation, calls in pairs)
        found.append(Calls((examples, *map(int, sizes.split("x"))), sum(calls for _, calls in operations), operations))
    return tuple(found)


# --- typed in, or in a file -------------------------------------------------------------------------------------------


def chosen(name: str | None, typed: Sequence[str], batch: int | None, *, cuda: bool) -> tuple[Calls, ...]:
    """The shapes typed in, then those of a set or a CSV file; without either, those of the device's ResNet.

    Raises UsageError for what is no shape, set or file, and for a batch of shapes that have one.
    """
    found = tuple(Calls(parse(text), 1) for text in typed)
    if name is None and found:
        if batch:
            raise UsageError("a shape holds its own batch, its first number", field="batch")
        return found
    name = name or ("resnet50" if cuda else "resnet20")
    if not name.endswith(".csv"):
        return found + shape_set(name, cuda=cuda, batch=batch)
    if batch:
        raise UsageError(f"{name} holds its own", field="batch")
    return found + read_csv(Path(name))


def parse(text: str, field: str = "shape") -> Shape:
    """256x64x56x56 -> (256, 64, 56, 56). Raises UsageError for what is no (N, C, *S) of two to five sizes."""
    if not re.fullmatch(rf"{SIZE}(x{SIZE}){{1,4}}", text.lower()):
        expected = "expected the batch, the channels and up to three sides, whole numbers above 0 of at most 9 digits"
        raise UsageError(f"{expected}, as in 256x64x56x56 or 60x100", field=field, value=text)
    return tuple(map(int, text.lower().split("x")))


def read_csv(file: Path) -> tuple[Calls, ...]:
    """The distinct shapes of a CSV file, the most called first; the calls of lines with the same shape add up.

    Columns n, c, spatial (like 14x14, or empty), or a column shape (like 32x64x56x56); and calls, 1 if there is no such
    column. Others are ignored. Raises UsageError with the file, the line and what was expected there.
    """
    calls: Counter[Shape] = Counter()
    mistakes = []
    try:
        lines = io.StringIO(read_plain(file, 1 << 24, follow=True).decode("utf-8-sig"), newline="")
        for row in _rows(csv.DictReader(lines), file):
            if isinstance(row, UsageError):
                mistakes.append(row)
            else:
                calls[row.shape] += row.calls
    except (OSError, ValueError, csv.Error, FileError) as error:
        why = "there is no such file" if isinstance(error, FileNotFoundError) else getattr(error, "strerror", error)
        raise UsageError(str(why), field="shapes", value=file) from error
    if mistakes:
        more = len(mistakes) - MOST_MISTAKES
        raise UsageErrors(mistakes[:MOST_MISTAKES] + [UsageError(f"and {more} more")] * (more > 0))
    if not calls:
        raise UsageError("it has no line of a shape under its first line", field="shapes", value=file)
    return tuple(Calls(shape, count) for shape, count in calls.most_common())


def _rows(lines: csv.DictReader[str], file: Path) -> Iterator[Calls | UsageError]:
    columns = {(name or "").strip().lower(): name for name in lines.fieldnames or ()}
    missing = [name for name in ("n", "c", "spatial") if name not in columns]
    if missing and "shape" not in columns:
        lacks = f"it lacks the columns {', '.join(missing)}; expected n, c, spatial and calls, or shape and calls"
        raise UsageError(lacks, field="shapes", value=f"{file}, line 1")
    expected = (
        "shape is sizes like 32x64x56x56, and calls a whole number above 0"
        if "shape" in columns
        else "n, c and calls are whole numbers above 0, and spatial is sizes like 14x14, or empty"
    )
    for line in lines:
        row = {name: (line[column] or "").strip() for name, column in columns.items()}
        try:
            sides = [row["spatial"]] if row.get("spatial") else []
            shape = row["shape"] if "shape" in row else "x".join([row["n"], row["c"], *sides])
            if not re.fullmatch(SIZE, calls := row.get("calls", "1")):
                raise UsageError(calls)
            yield Calls(parse(shape), int(calls))
        except UsageError:
            mistake = f"{', '.join(row.values())[:80]}; expected: {expected}"
            yield UsageError(mistake, field="shapes", value=f"{file}, line {lines.line_num}")
