"""Memory of a call: the bytes that it saves for backward, and the peak that it reaches."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from bncli.engine.device import peak_memory_mib, reset_peak_memory, synchronize
from bncli.engine.memory import M_MMAP_THRESHOLD

MIB = 2**20
MAPPED_BYTES = 2**16  # tensors of this size or more get their own mapping, which is returned when they are freed


def saved_mib(run: Callable[[], object], leave_out: Iterable[Tensor] = ()) -> float:
    """MiB of the storages that the operators in `run` save for backward, each storage counted once."""
    left_out = {tensor.untyped_storage().data_ptr() for tensor in leave_out}
    saved: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = run()  # kept alive, so that no later tensor reuses the address of a saved one
    del result
    return sum(size for address, size in saved.items() if address not in left_out) / MIB


def peak_mib(run: Callable[[], object], device: torch.device) -> float | None:
    """The peak memory of `run` above that in use before it, in MiB: the allocator's on CUDA, else resident memory.

    None if the device has neither.
    """
    synchronize(device)
    reset_peak_memory(device)
    before = peak_memory_mib(device)
    run()
    synchronize(device)
    after = peak_memory_mib(device)
    return None if before is None or after is None else after - before


def give_back_free_pages() -> None:
    """Return free pages of the heap, so that a small tensor uses new ones. Only with glibc."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim") and hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, MAPPED_BYTES)
        libc.malloc_trim(0)
