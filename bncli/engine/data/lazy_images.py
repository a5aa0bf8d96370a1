"""Encoded images decoded to bytes on demand, and the split that decodes them batch by batch in worker processes.

N examples, B examples of a batch, C channels, H height, W width.
"""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor
from torch.utils import data as torch_data

from bncli.engine.data.preprocess import Conversion, crop_flip
from bncli.engine.data.splits import Batch, chunk_count
from bncli.errors import DataError


@dataclass(frozen=True)
class Pictures(torch_data.Dataset[Batch]):
    """N labelled images of a table of the `datasets` library, as the files' own bytes until they are asked for."""

    table: Any  # datasets.Dataset, its image column not decoded
    column: str
    rows: Tensor  # (N,) int64, into the table
    labels: Tensor  # (N,) int64
    shape: tuple[int, int, int]  # (C, H, W)
    origin: str  # data set and split, for messages

    def __len__(self) -> int:
        return len(self.rows)

    def at(self, positions: Tensor) -> Pictures:
        """Those of the positions (M,), in their order."""
        return replace(self, rows=self.rows[positions], labels=self.labels[positions])

    def decode(self, positions: list[int]) -> Batch:
        """x (B, C, H, W) uint8 and y (B,) of these positions. Raises DataError for an image that cannot be read."""
        from datasets import Image

        rows = self.rows[positions].tolist()
        x = torch.empty(len(rows), *self.shape, dtype=torch.uint8)
        for place, (row, encoded) in enumerate(zip(rows, self.table[rows][self.column], strict=True)):
            try:
                x[place] = to_pixels(Image().decode_example(encoded), self.shape)
            except Exception as error:  # Pillow raises many kinds for a damaged file
                raise DataError(f"{self.origin}: image {row} cannot be used: {error}; repair or remove it") from None
        return x, self.labels[positions]

    def __getitems__(self, positions: list[int]) -> Batch | DataError:
        """What a worker sends: an error as it is, since one raised there would arrive as the text of a traceback."""
        try:
            return self.decode(positions)
        except DataError as error:
            return error


def to_pixels(image: Any, shape: tuple[int, int, int]) -> Tensor:
    """A Pillow image as (C, H, W) uint8: grey or RGB, and bilinear, averaging as it shrinks, where its size differs."""
    from PIL.Image import Resampling

    if image.mode.startswith(("I", "F")):
        raise ValueError(f"its pixels (mode {image.mode}) have more than 8 bits a channel")
    channels, height, width = shape
    image = image.convert("L" if channels == 1 else "RGB")
    if image.size != (width, height):
        image = image.resize((width, height), Resampling.BILINEAR)
    return torch.from_numpy(np.array(image)).view(height, width, channels).permute(2, 0, 1)


def loaded(pictures: Pictures, order: Iterable[Tensor], workers: int, pin_memory: bool = False) -> Iterator[Batch]:
    """Decoded batches on the CPU in the given order; `workers` processes decode ahead (0: none, in this process)."""
    loader = torch_data.DataLoader(
        pictures,
        batch_sampler=(index.tolist() for index in order),
        num_workers=workers,
        collate_fn=_as_it_is,
        pin_memory=pin_memory,
        worker_init_fn=_leave_interrupts_to_the_parent,
        generator=Generator(),  # its own: the global generator must not depend on where the data lie
    )
    for batch in loader:
        if isinstance(batch, DataError):
            raise batch
        yield batch


def _as_it_is(batch: Any) -> Any:
    return batch


def _leave_interrupts_to_the_parent(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@dataclass(frozen=True)
class Streamed:
    """A split that is larger than memory should hold: as InMemory, but decoded anew for each batch."""

    pictures: Pictures
    convert: Conversion
    device: torch.device
    workers: int
    augment: bool = False

    @property
    def index_device(self) -> torch.device:
        return torch.device("cpu")

    def __len__(self) -> int:
        return len(self.pictures)

    def batches(self, order: Iterable[Tensor], generator: Generator | None = None) -> Iterator[Batch]:
        for x, y in self._on_device(order):
            yield self.convert(crop_flip(x, generator) if self.augment else x), y

    def chunks(self, size: int) -> Iterator[Batch]:
        for x, y in self._on_device(torch.arange(len(self)).tensor_split(chunk_count(len(self), size))):
            yield self.convert(x), y

    def _on_device(self, order: Iterable[Tensor]) -> Iterator[Batch]:
        for x, y in loaded(self.pictures, order, self.workers, pin_memory=self.device.type == "cuda"):
            yield x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)
