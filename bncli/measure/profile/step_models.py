"""What the step view measures: a model that can be made again with any kernel, and what one step of it takes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bncli.engine import data
from bncli.engine.convert import Conversion
from bncli.engine.data.splits import Batch, Dataset, InMemory


@dataclass(frozen=True, eq=False)
class Trainable:
    """A model ready to train, and what one step of it takes."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    batch: Callable[[], Batch]  # the next training batch, as training fetches it
    step: Callable[[Tensor, Tensor], Tensor]  # a batch -> the loss; forward, backward and optimizer
    forward: Callable[[Tensor], object]  # of the model in evaluation mode
    evaluation_x: Tensor  # (B, *shape), held-out examples
    last_batch: int | None  # examples that an epoch leaves over; None where there is no epoch
    precision: str = "fp32"


class Subject(Protocol):
    """One model and how it is trained. Plain data, so that a fresh process can make it again."""

    @property
    def name(self) -> str: ...

    @property
    def batch_size(self) -> int: ...

    @property
    def has_kernels(self) -> bool:
        """Whether there is a batch norm, whose kernel can be chosen."""
        ...

    @property
    def steps(self) -> int | None:
        """The training budget, where there is one."""
        ...

    @property
    def real_data(self) -> bool:
        """Whether the batches are data that the model is for, not random numbers."""
        ...

    @property
    def tf32(self) -> bool:
        """Whether float32 may be TF32 on an NVIDIA GPU."""
        ...

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of its figures must know."""
        ...

    def dataset(self, device: torch.device) -> Dataset: ...

    def trainable(
        self, kernel: str | None, dataset: Dataset, device: torch.device, learns: bool = False
    ) -> Trainable: ...

    def alone(self, x: Tensor, y: Tensor, classes: int) -> Dataset:
        """A data set of that one batch."""
        ...


def one_batch(x: Tensor, y: Tensor, classes: int, memory_format: str) -> Dataset:
    """x (B, *shape) and y (B,) as a data set, both to train on and to evaluate."""
    split = InMemory(x.contiguous(memory_format=data.MEMORY_FORMATS[memory_format]) if x.dim() == 4 else x, y)
    return Dataset("one batch", split, split, tuple(x.shape[1:]), classes)


def norms_of(model: nn.Module) -> str | None:
    """The norm layers in words: how many, of which kind, what each is one call with; None where there is none."""
    batch = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    others = Counter(
        type(module).__name__
        for module in model.modules()
        if isinstance(module, nn.GroupNorm | nn.LayerNorm | nn.RMSNorm | nn.modules.instancenorm._InstanceNorm)
    )
    words = [f"{count} {kind}" for kind, count in others.items()]
    if batch:
        words.insert(0, f"{len(batch)} batch norm{'s' * (len(batch) > 1)}{_converted(model, batch)}")
    return ", ".join(words) or None


def _converted(model: nn.Module, batch: list[_BatchNorm]) -> str:
    names = Counter(str(getattr(module, "kernel", "native")) for module in batch)
    conversion = getattr(model, "bncli_conversion", None)
    if not isinstance(conversion, Conversion):
        own = {name: count for name, count in names.items() if name != "native"}
        return "".join(f", {count} on the {name} kernel" for name, count in own.items())
    operations = Counter(_beside(line.operation) for line in conversion.norms)
    return f" ({', '.join(f'{n} {words}' for words, n in operations.most_common())})"


def _beside(operation: str | None) -> str:
    """`batch norm + residual add + relu` -> `with residual add + relu`: what it is one call with."""
    if operation is None:
        return "left as it was"
    _, _, rest = operation.partition(" + ")
    return f"with {rest}" if rest else "alone"
