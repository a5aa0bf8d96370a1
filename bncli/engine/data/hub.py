"""Image classification data sets through the `datasets` library: from the Hub, a folder of class folders, or Parquet.

Letters: N examples, B batch size, C channels, H height, W width.
"""

from __future__ import annotations

import importlib
import logging
import math
import multiprocessing
import os
import re
import signal
import ssl
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Generator, Tensor
from torch.utils import data as torch_data

from bncli.engine.data.arrays import Arrays, Place, arrays
from bncli.engine.data.splits import (
    ALL,
    Batch,
    Conversion,
    Split,
    byte_counts,
    byte_statistics,
    chunk_count,
    crop_flip,
    evaluation_order,
    holdout_split,
    normalization,
    parts,
)
from bncli.errors import DataError

if TYPE_CHECKING:
    from bncli.recipe.sections import Hub

Tables = Mapping[str, Any]  # split -> datasets.Dataset

PROBE_TIMEOUT_S = 5.0  # without internet, the retries of the libraries take half a minute
DECODED_AT_ONCE = 256  # images per call
SAMPLE = 4096  # training images for the mean and deviation of a set that is not held in memory


def read_images(spec: Hub, place: Place) -> Arrays | tuple[EncodedImages, EncodedImages]:
    """The image data set that `spec` names, its images as (C, H, W) of `spec.shape`; as they are if larger than memory.

    Images are converted to grey (C = 1) or RGB (C = 3) and resized to H x W if their size differs, by Pillow's bilinear
    filter, which averages when it shrinks; the aspect ratio is not kept. The held-out ones are in the order of their
    evaluation. Raises DataError for a library, a data set, a split or a column that is missing or contradicts `spec`.
    """
    if spec.shape[0] not in (1, 3):
        raise DataError(f"data.shape: images have 1 (grey) or 3 (red, green, blue) channels, not {spec.shape[0]}")
    train, in_order = image_splits(open_tables(spec.name, spec.config, spec.train_split), spec)
    if spec.examples not in (None, len(train)):
        raise DataError(
            f"data.examples: {spec.name} has {len(train)} training examples, the recipe says {spec.examples}"
        )
    held_out = in_order.at(evaluation_order(len(in_order), spec.split_seed))
    if (len(train) + len(held_out)) * math.prod(spec.shape) > spec.in_memory_gib * 2**30:
        return train, held_out
    made = arrays(place, spec.shape, len(train), len(held_out), spec.classes, as_bytes=True)
    for part, first in ((train, 0), (held_out, made.held_out)):
        for at in parts(len(part), DECODED_AT_ONCE):
            index = torch.arange(at.start, at.stop)
            made.put(first + index, *part.decode(index.tolist()))
    return made


def streamed(
    spec: Hub, images: tuple[EncodedImages, ...], device: torch.device, memory_format: torch.memory_format
) -> tuple[Split, Split]:
    """The training and the held-out images, decoded batch by batch; `standard` is over a seeded sample of SAMPLE."""
    workers = 0 if multiprocessing.current_process().daemon else spec.workers  # a daemon may not have children
    train, held_out = images
    if spec.normalize == "unit":
        mean, std = normalization(torch.empty(0, *spec.shape, dtype=torch.uint8), "unit")
    else:
        sample = torch.randperm(len(train), generator=Generator().manual_seed(spec.split_seed))[:SAMPLE].sort().values
        decoded = loaded(train, sample.split(DECODED_AT_ONCE), workers)
        mean, std = byte_statistics(torch.stack([byte_counts(x) for x, _ in decoded]).sum(0))
    convert = Conversion(mean.to(device), std.to(device), memory_format)
    augment = spec.augment == "crop-flip"
    return Streamed(train, convert, device, workers, augment), Streamed(held_out, convert, device, workers)


# --- opening ------------------------------------------------------------------------------------------------------


def reachable(endpoint: str, timeout_s: float = PROBE_TIMEOUT_S) -> bool:
    """Whether the address answers, through the system's proxy if there is one."""
    try:
        urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=timeout_s).close()
    except (urllib.error.HTTPError, HTTPException, ValueError):
        return True
    except OSError as error:  # an unknown certificate is left to the library
        return isinstance(getattr(error, "reason", error), ssl.SSLError)
    return True


def open_tables(
    name: str, config: str | None, train_split: str, is_reachable: Callable[[str], bool] = reachable
) -> Tables:
    """The splits of the data set: a local file or folder of that name, else a data set of the Hub.

    A single Parquet file is the training split. If the Hub cannot be reached, the library's cache is used. Raises
    DataError if there is no such data set, and for any exception of the library, with its last line.
    """
    library, path = _library(), Path(os.path.expanduser(name))
    if path.is_dir():
        return _tables(name, LOCAL, partial(library.load_dataset, str(path), name=config))
    if path.suffix == ".parquet" and path.is_file():
        return _tables(name, LOCAL, partial(library.load_dataset, "parquet", data_files={train_split: str(path)}))
    if path.exists():
        raise DataError(f"data.name: {name} is neither a folder nor a Parquet file. {LOCAL}")
    if path.suffix == ".parquet" or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        raise DataError(f"data.name: {name} does not exist. {LOCAL}")
    if name in getattr(library.packaged_modules, "_PACKAGED_DATASETS_MODULES", ()):  # would read all below the cwd
        raise DataError(f"data.name: {name} is a file format, not a data set. {LOCAL}")
    constants = importlib.import_module("huggingface_hub.constants")
    from_hub = partial(library.load_dataset, name, name=config)
    if constants.HF_HUB_OFFLINE or is_reachable(constants.ENDPOINT):
        return _tables(name, f"Without internet, use local files. {LOCAL}", from_hub)
    with _offline():
        return _tables(name, f"{constants.ENDPOINT} cannot be reached; use local files. {LOCAL}", from_hub)


LOCAL = "Name a Parquet file, or a folder of the form folder/train/<class>/*.png, folder/test/<class>/*.png"


def _library() -> Any:
    try:
        datasets, _, hub = (
            importlib.import_module(name) for name in ("datasets", "PIL.Image", "huggingface_hub.utils")
        )
    except ImportError as error:
        raise DataError(
            f"data.source: hub needs the packages datasets and pillow ({error}); run: pip install datasets pillow"
        ) from None
    for library in (datasets, hub):
        library.disable_progress_bars()
        library.logging.set_verbosity(logging.CRITICAL)  # failures are raised
    return datasets


def _tables(name: str, hint: str, load_dataset: Callable[[], Tables]) -> Tables:
    try:
        return load_dataset()
    except Exception as error:  # the library documents no common class
        lines = [str(part).strip().splitlines()[-1] for part in (error, error.__cause__) if str(part or "").strip()]
        summary = ": ".join(line.rstrip(".!") for line in lines) or type(error).__name__
        raise DataError(f"data.name: {name} could not be loaded: {summary}. {hint}") from None


@contextmanager
def _offline() -> Iterator[None]:
    """The library's offline mode. The library reads its environment variable only at import, so its modules are set."""
    import datasets.config
    from huggingface_hub import constants

    before = datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before


# --- splits, columns, labels --------------------------------------------------------------------------------------


def image_splits(tables: Tables, spec: Hub) -> tuple[EncodedImages, EncodedImages]:
    """The training and the held-out images, both in the order of the tables."""
    if spec.train_split not in tables:
        raise DataError(f"data.train_split: {spec.name} has no split {spec.train_split!r}; it has {', '.join(tables)}")
    if spec.held_out_split == spec.train_split:
        raise DataError(f"data.held_out_split: {spec.held_out_split!r} is the training split; name another")
    train = tables[spec.train_split]
    if spec.held_out_split not in tables:
        if spec.held_out is None:
            raise DataError(
                f"data.held_out_split: {spec.name} has no split {spec.held_out_split!r}; it has {', '.join(tables)}. "
                "Name one of these, or set data.held_out to the number of training examples to hold out"
            )
        whole, parts = _part(train, spec.train_split, spec), holdout_split(len(train), spec.held_out, spec.split_seed)
        return whole.at(parts[0]), whole.at(parts[1])
    if spec.held_out is not None:
        raise DataError(f"data.held_out: {spec.name} has a split {spec.held_out_split!r} to hold out; remove held_out")
    return _part(train, spec.train_split, spec), _part(tables[spec.held_out_split], spec.held_out_split, spec)


def _part(table: Any, split: str, spec: Hub) -> EncodedImages:
    from datasets import Image

    origin = f"{spec.name}, split {split!r}"
    if not len(table):
        raise DataError(f"data.name: {origin} is empty")
    image = _column(table.features, spec.image_column, "Image", "image_column", origin)
    label = _column(table.features, spec.label_column, "ClassLabel", "label_column", origin)
    labels = _labels(table, label, spec, origin)
    try:
        undecoded = table.select_columns([image]).cast_column(image, Image(decode=False))
    except Exception as error:  # classes of pyarrow and of the library
        raise DataError(
            f"data.image_column: {origin}: column {image!r} holds no images ({type(error).__name__}); "
            f"the columns are {_columns(table.features)}"
        ) from None
    return EncodedImages(undecoded, image, torch.arange(len(table)), labels, spec.shape, origin)


def _column(features: Mapping[str, Any], name: str | None, kind: str, key: str, origin: str) -> str:
    if name is not None:
        if name not in features:
            raise DataError(f"data.{key}: {origin} has no column {name!r}; it has {_columns(features)}")
        return name
    found = [column for column, feature in features.items() if type(feature).__name__ == kind]
    if len(found) != 1:
        raise DataError(
            f"data.{key}: {origin} has {len(found) or 'no'} columns of type {kind}; "
            f"name one of its columns: {_columns(features)}"
        )
    return found[0]


def _columns(features: Mapping[str, Any]) -> str:
    kinds = {name: type(feature).__name__ for name, feature in features.items()}
    return ", ".join(f"{name} ({features[name].dtype if kind == 'Value' else kind})" for name, kind in kinds.items())


def _labels(table: Any, column: str, spec: Hub, origin: str) -> Tensor:
    """(rows,) int64 of 0 to classes - 1."""
    feature = table.features[column]
    whole = str(getattr(feature, "dtype", "")).startswith(("int", "uint"))
    y = np.asarray(table[column][:] if whole else ())
    if y.dtype.kind not in "iu":  # missing labels make it an array of objects
        raise DataError(f"data.label_column: {origin}: column {column!r} does not hold a whole number for each image")
    names = getattr(feature, "names", None) or []
    if names and len(names) != spec.classes:
        some = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        raise DataError(f"data.classes: {origin} has {len(names)} classes ({some}), the recipe says {spec.classes}")
    if y.min() < 0 or y.max() >= spec.classes:
        raise DataError(
            f"data.classes: {origin} has labels from {y.min()} to {y.max()}, the recipe's go from 0 to "
            f"{spec.classes - 1}. If all labels of a test split are -1, name a split that has labels"
        )
    return torch.from_numpy(y.astype(np.int64))


# --- images decoded on demand -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EncodedImages(torch_data.Dataset[Batch]):
    """N labelled images of a table of the `datasets` library, kept as encoded bytes until they are decoded."""

    table: Any  # datasets.Dataset, its image column not decoded
    column: str
    rows: Tensor  # (N,) int64, row numbers in the table
    labels: Tensor  # (N,) int64
    shape: tuple[int, int, int]  # (C, H, W)
    origin: str  # data set and split, for messages

    def __len__(self) -> int:
        return len(self.rows)

    def at(self, positions: Tensor) -> EncodedImages:
        """The images at the positions (M,), in that order."""
        return replace(self, rows=self.rows[positions], labels=self.labels[positions])

    def decode(self, positions: list[int]) -> Batch:
        """x (B, C, H, W) uint8 and y (B,) at these positions. Raises DataError for an image that cannot be read."""
        from datasets import Image

        rows = self.rows[positions].tolist()
        x = torch.empty(len(rows), *self.shape, dtype=torch.uint8)
        for place, (row, encoded) in enumerate(zip(rows, self.table[rows][self.column], strict=True)):
            try:
                x[place] = to_pixels(Image().decode_example(encoded), self.shape)
            except Exception as error:  # Pillow raises many classes for a damaged file
                raise DataError(f"{self.origin}: image {row} cannot be used: {error}; repair or remove it") from None
        return x, self.labels[positions]

    def __getitems__(self, positions: list[int]) -> Batch | DataError:
        """For a DataLoader worker. Errors are returned, since a raised one would arrive as the text of a traceback."""
        try:
            return self.decode(positions)
        except DataError as error:
            return error


def to_pixels(image: Any, shape: tuple[int, int, int]) -> Tensor:
    """A Pillow image as (C, H, W) uint8, converted to grey or RGB and resized if its size differs."""
    from PIL.Image import Resampling

    if image.mode.startswith(("I", "F")):
        raise ValueError(f"its pixels (mode {image.mode}) have more than 8 bits per channel")
    channels, height, width = shape
    image = image.convert("L" if channels == 1 else "RGB")
    if image.size != (width, height):
        image = image.resize((width, height), Resampling.BILINEAR)
    return torch.from_numpy(np.array(image)).view(height, width, channels).permute(2, 0, 1)


def loaded(images: EncodedImages, order: Iterable[Tensor], workers: int, pin_memory: bool = False) -> Iterator[Batch]:
    """Decoded batches on the CPU in that order; `workers` processes decode ahead (0: this process decodes)."""
    loader = torch_data.DataLoader(
        images,
        batch_sampler=(index.tolist() for index in order),
        num_workers=workers,
        collate_fn=torch_data.default_convert,  # leaves tensors as they are
        pin_memory=pin_memory,
        worker_init_fn=_leave_interrupts_to_the_parent,
        generator=Generator(),  # so that the global generator does not depend on where the data are stored
    )
    for batch in loader:
        if isinstance(batch, DataError):
            raise batch
        yield batch


def _leave_interrupts_to_the_parent(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@dataclass(frozen=True)
class Streamed:
    """A split that is decoded batch by batch instead of being held in memory."""

    images: EncodedImages
    convert: Conversion
    device: torch.device
    workers: int
    augment: bool = False
    index_device = torch.device("cpu")

    @property
    def labels(self) -> Tensor:
        return self.images.labels

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, order: Iterable[Tensor], generator: Generator | None = None) -> Iterator[Batch]:
        for x, y in self._on_device(order):
            yield self.convert(crop_flip(x, generator) if self.augment else x), y

    def chunks(self, size: int, which: slice = ALL) -> Iterator[Batch]:
        for x, y in self._on_device(torch.arange(len(self)).tensor_split(chunk_count(len(self), size))[which]):
            yield self.convert(x), y

    def _on_device(self, order: Iterable[Tensor]) -> Iterator[Batch]:
        for x, y in loaded(self.images, order, self.workers, pin_memory=self.device.type == "cuda"):
            yield x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)
