"""The peak memory of a training step, and its parts.

On a GPU the peak is the allocator's. On a CPU it is the resident set's, in a fresh process that does nothing else: the
peak of making the model and training it for two steps, beyond what was resident before the model was made, so torch
itself and the batch are not in it. What torch loads or compiles for the first step is, as in a training run.
"""

from __future__ import annotations

import multiprocessing
import re
import signal
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bncli.engine.data.splits import Batch, Dataset
from bncli.engine.device import peak_memory_mib, reset_peak_memory
from bncli.measure.profile.step_models import StepModel, Trainable
from bncli.results.profile import StepMemory

STEPS = 2  # the optimizer's state is there from the end of the first on
MIB = 2**20
LONGEST_END_S = 5.0  # of a process that has answered; a compiler's own workers end with it


def measure(subject: StepModel, kernel: str | None, batch: Batch, classes: int, longest_s: float = 120.0) -> StepMemory:
    """Of a model made for it, trained on that batch on the device where the batch is.

    Raises RuntimeError, with the reason, where the fresh process did not come through.
    """
    x, y = batch
    if x.device.type != "cpu":
        return _train(subject, kernel, subject.single_batch(x, y, classes), x.device)
    arguments = (subject, kernel, x.numpy(), y.numpy(), classes, torch.get_num_threads())
    found: StepMemory = in_fresh_process(_train_alone, arguments, longest_s)
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
    if device.type == "cpu" and sys.platform == "linux":
        found = re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())
        return int(found[1]) / 1024 if found else None
    return None


# --- a fresh process ----------------------------------------------------------------------------------------------


def in_fresh_process(function: Callable[..., Any], arguments: tuple[Any, ...], longest_s: float) -> Any:
    """What a module's function returns in a process that has loaded this module and done nothing else.

    Processes are forked from a server that did the loading once. Raises RuntimeError with the reason where it raised,
    died or took too long.
    """
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload([__name__])
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_report, args=(theirs, function, arguments), daemon=True)  # type: ignore[attr-defined]
    process.start()
    theirs.close()
    try:
        if not ours.poll(longest_s):
            raise RuntimeError(f"it took more than {longest_s:.0f} s")
        found, error = ours.recv()
        process.join(LONGEST_END_S)
    except EOFError:
        process.join()
        raise RuntimeError(f"its process ended with exit code {process.exitcode}") from None
    finally:
        process.kill()
        process.join()
        ours.close()
    if error is not None:
        raise RuntimeError(error)
    return found


def _report(connection: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer, which ends this process
    try:
        connection.send((function(*arguments), None))
    except Exception as error:
        connection.send((None, f"{type(error).__name__}: {error}"))


def _train_alone(
    subject: StepModel, kernel: str | None, x: np.ndarray, y: np.ndarray, classes: int, threads: int
) -> StepMemory:
    torch.set_num_threads(threads)
    dataset = subject.single_batch(torch.from_numpy(x), torch.from_numpy(y), classes)
    return _train(subject, kernel, dataset, torch.device("cpu"))
