"""The peak memory of a training step, and its parts.

On a GPU the peak is the allocator's. On a CPU it is the resident set's, in a fresh process that does nothing else: the
peak of making the model and training it for two steps, beyond what was resident before the model was made, so torch
itself and the batch are not in it. What torch loads or compiles for the first step is, as in a training run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bncli.engine.data.splits import Batch, Dataset
from bncli.engine.device import peak_memory_mib, reset_peak_memory, resident_mib
from bncli.measure.profile.step_models import StepModel, Trainable
from bncli.measure.timing.fresh_process import FreshProcesses
from bncli.results.profile import StepMemory

STEPS = 2  # the optimizer's state is there from the end of the first on
MIB = 2**20
LIMIT_S = 120.0  # of one model in a process of its own


def measure(
    processes: FreshProcesses, subject: StepModel, kernel: str | None, batch: Batch, classes: int
) -> StepMemory:
    """Of a model made for it, trained on that batch on the device where the batch is.

    processes: prepared by `warm_up`. Raises CallFailed, with the reason, where the fresh process did not come through.
    """
    x, y = batch
    if x.device.type != "cpu":
        return _train(subject, kernel, subject.single_batch(x, y, classes), x.device)
    arguments = (subject, kernel, x.numpy(), y.numpy(), classes, torch.get_num_threads())
    found: StepMemory = processes.call(_train_alone, *arguments, limit_s=LIMIT_S)
    return found


def parts_of(trainable: Trainable, step: Callable[[], object]) -> dict[str, float]:
    """MiB of parameters, gradients, optimizer state and activations, as one more step leaves and makes them.

    Activations are the distinct storages of tensors that autograd saved for backward and that are no parameters: the
    input among them, and under autocast the parameters' copies in the narrower dtype.
    """
    owned = {p.untyped_storage().data_ptr() for p in trainable.model.parameters()}
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        step()
    parameters = list(trainable.model.parameters())
    state = [value for values in trainable.optimizer.state.values() for value in values.values()]
    return {
        "parameters_mib": _mib(parameters),
        "gradients_mib": _mib([p.grad for p in parameters if p.grad is not None]),
        "optimizer_mib": _mib([value for value in state if isinstance(value, Tensor)]),
        "activations_mib": sum(saved.values()) / MIB,
    }


def _mib(tensors: list[Any]) -> float:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) / MIB


def _train(subject: StepModel, kernel: str | None, dataset: Dataset, device: torch.device) -> StepMemory:
    before = _held_mib(device)
    reset_peak_memory(device)
    trainable = subject.trainable(kernel, dataset, device)
    x, y = trainable.batch()
    for _ in range(STEPS - 1):
        trainable.step(x, y)
    parts = parts_of(trainable, lambda: trainable.step(x, y))
    peak = peak_memory_mib(device)
    return StepMemory(**parts, peak_mib=None if peak is None or before is None else max(0.0, peak - before))


def _held_mib(device: torch.device) -> float | None:
    """What is allocated on a GPU now, or resident of this process; None where unknown."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / MIB
    return resident_mib() if device.type == "cpu" else None


# --- in the server and its children -------------------------------------------------------------------------------


def warm_up() -> None:
    """With this module torch is loaded; a thread of the server's would not live on in a child."""
    torch.set_num_threads(1)


def _train_alone(
    subject: StepModel, kernel: str | None, x: np.ndarray, y: np.ndarray, classes: int, threads: int
) -> StepMemory:
    torch.set_num_threads(threads)
    dataset = subject.single_batch(torch.from_numpy(x), torch.from_numpy(y), classes)
    return _train(subject, kernel, dataset, torch.device("cpu"))
