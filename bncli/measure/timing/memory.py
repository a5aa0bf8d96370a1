"""Memory of a call: the bytes that it saves for backward, and the peak that it reaches."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor

from bncli.engine import device as devices

MIB = 2**20
M_MMAP_THRESHOLD = -3  # mallopt's, of glibc
MAPPED_BYTES = 2**16  # from this size on a tensor has pages of its own, which are given back when it is freed


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


def give_back_free_pages() -> None:
    """So that a small tensor takes new pages and not the heap's; glibc alone has such calls."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim") and hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, MAPPED_BYTES)
        libc.malloc_trim(0)
