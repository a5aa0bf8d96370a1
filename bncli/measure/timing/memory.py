"""What a batch norm keeps for backward, and the peak of its forward and backward pass.

On a CPU the peak is that of a fresh process, from `fresh_processes`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from bncli.engine import device as devices
from bncli.measure.reference import case as cases
from bncli.measure.reference.case import Inputs
from bncli.results.profile import Case

MIB = 2**20


def saved_bytes(run: Callable[[], object]) -> int:
    """Bytes of the storages that the operators in `run` save for backward, each storage counted once."""
    storages: dict[int, tuple[int, Tensor]] = {}  # the tensors are held, or a later one could take an address over

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        storages[storage.data_ptr()] = (storage.nbytes(), t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = run()
    del result
    return sum(size for size, _ in storages.values())


def cuda_peak_mib(step: Callable[[], object], device: torch.device) -> float:
    """The allocator's peak of a step beyond what is allocated before it, in MiB."""
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / MIB


def resident_peak_mib(step: Callable[[], object]) -> float | None:
    """The peak of this process's resident memory in a step beyond what is resident before it, in MiB."""
    cpu = torch.device("cpu")
    devices.reset_peak_memory(cpu)
    before = devices.peak_memory_mib(cpu)
    step()
    after = devices.peak_memory_mib(cpu)
    return None if before is None or after is None else after - before


def tiny(case: Case) -> Case:
    """A case of the same kind whose code is the same, and whose tensors are a few KiB."""
    return replace(case, shape=(2, min(case.shape[1], 16), *[min(side, 2) for side in case.shape[2:]]))


def empty_inputs(case: Case) -> Inputs:
    """Tensors of a case whose pages are all resident; what they hold matters to no memory."""
    zero = cases.timed_inputs(cases.timed(tiny(case)), torch.device("cpu"))
    shape, channels = case.shape, case.shape[1]

    def of(t: Tensor | None) -> Tensor | None:
        if t is None:
            return None
        if t.dim() == 1:
            return torch.ones(channels, dtype=t.dtype)
        return cases.with_layout(torch.ones(shape, dtype=t.dtype), case.layout)

    return Inputs(**{name: of(t) for name, t in vars(zero).items()})  # type: ignore[arg-type]
