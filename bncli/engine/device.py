"""Devices: lookup by name, peak memory, precision (autocast, TF32), and the environment of a result."""

from __future__ import annotations

import contextlib
import datetime
import math
import os
import platform
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import bncli
from bncli.engine.memory import freed_memory, give_back_freed_memory
from bncli.errors import Unavailable, UsageError
from bncli.results.environment import Environment

FEW_MIB = 32.0  # of freed memory, which count in a peak: to give them back before each phase would slow small nets down


def resolve(name: str) -> torch.device:
    """The device of that name; `auto` is the first available of cuda, mps, cpu. Raises Unavailable with the reason.

    Raises UsageError for an invalid name.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,2})?|mps", name):
        raise UsageError("expected one of auto, cpu, cuda, cuda:N, mps", field="device", value=name)
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name == "auto":
        return torch.device("cuda" if cuda else "mps" if mps else "cpu")
    device, reason = torch.device(name), None
    if device.type == "cuda" and not cuda:
        built = torch.version.cuda is not None
        why = "no NVIDIA GPU is visible to it" if built else "it is built for the CPU only"
        reason = f"this torch ({torch.__version__}) cannot use CUDA: {why}. The CPU can be used"
    elif device.type == "mps" and not mps:
        reason = f"this torch ({torch.__version__}) has no Metal device here. The CPU can be used"
    elif device.type == "cuda" and device.index is not None and device.index >= torch.cuda.device_count():
        reason = f"there are {torch.cuda.device_count()} CUDA devices here, counted from 0"
    if reason:
        raise Unavailable(reason, field="device", value=name)
    return device


def synchronize(device: torch.device) -> None:
    """Wait for the work queued on the device, before the host's clock is read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def reset_peak_memory(device: torch.device) -> None:
    """Reset the peak. On Linux the high-water mark of the resident set is reset (man 5 proc, clear_refs).

    psutil can neither reset nor read it on Linux.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        try:
            with open("/proc/self/clear_refs", "wb", buffering=0) as file:
                file.write(b"5")
        except OSError:  # not permitted in some containers: the peak then counts from the process's start
            return


def peak_memory_mib(device: torch.device) -> float | None:
    """Peak since the last reset: the allocator's on CUDA, the process's resident set on a CPU; None where unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if device.type == "mps":
        return None
    if sys.platform == "linux":
        with open("/proc/self/status", "rb", buffering=0) as file:  # bytes for speed: read twice per evaluation
            found = re.search(rb"VmHWM:\s+(\d+) kB", file.read())
        return int(found[1]) / 1024 if found else None
    if sys.platform == "win32":
        import psutil

        return float(psutil.Process().memory_info().peak_wset) / 2**20
    import resource  # psutil has no peak here

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 1024)


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[Any]:
    """A context in which operators compute in that precision: fp32, bf16 or fp16."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16 if precision == "bf16" else torch.float16)


@contextlib.contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """A context in which torch uses that many CPU threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def tf32_allowed(allowed: bool) -> Iterator[None]:
    """A context in which float32 matrix products and convolutions on an NVIDIA GPU may, or may not, use TF32.

    By default torch allows it for convolutions. `allow_tf32` is set too, since after setting only the newer
    `fp32_precision`, reading the older one raises, which a user's model may do.
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    settings = _tf32_settings()
    before = [setting.fp32_precision for setting in settings]
    matmul.allow_tf32 = cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before[0] == "tf32", before[1] == "tf32"
        for setting, precision in zip(settings, before, strict=True):
            setting.fp32_precision = precision


@contextlib.contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """A context in which torch takes only algorithms on CUDA that give the same bits every time, if that is wanted.

    Raises Unavailable for an operator that has none.
    """
    if not wanted:
        yield
        return
    cudnn, name = torch.backends.cudnn, "CUBLAS_WORKSPACE_CONFIG"  # which torch and cuBLAS read at their first product
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark, workspace = cudnn.benchmark, os.environ.get(name)
    os.environ[name] = workspace or ":4096:8"
    torch.use_deterministic_algorithms(True)
    cudnn.benchmark = False
    try:
        yield
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        raise Unavailable(f"train.deterministic: {' '.join(str(error).split('. ')[0].split())}") from error
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        cudnn.benchmark = benchmark
        if workspace is None:
            del os.environ[name]


def in_tf32(device: torch.device) -> bool:
    """Whether float32 convolutions or matrix products on that device may use TF32 now."""
    return device.type == "cuda" and any(setting.fp32_precision == "tf32" for setting in _tf32_settings())


def _tf32_settings() -> list[Any]:
    cudnn: Any = torch.backends.cudnn
    return [torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn]


class PeakMemory:
    """The peak memory of alternating phases such as training and evaluation, in MiB; None if unknown.

    The resident set of a CPU's process includes freed memory that the allocator keeps. It is given back before a phase,
    so that what one has freed does not count in the next. What a phase itself has freed before its peak is used again
    for the peak, except for gaps in the heap, which the process does need.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.mib: dict[str, float | None] = {}
        self._least_mib = -math.inf  # resident when freed memory was last given back

    def end(self, phase: str) -> None:
        """Attribute the peak since the last call to `phase`."""
        peak = peak_memory_mib(self.device)
        self.mib[phase] = max((each for each in (self.mib.get(phase), peak) if each is not None), default=None)
        if self.device.type == "cpu" and freed_memory() == "kept" and (peak or 0.0) > self._least_mib + FEW_MIB:
            give_back_freed_memory()
            reset_peak_memory(self.device)
            self._least_mib = peak_memory_mib(self.device) or 0.0
        else:
            reset_peak_memory(self.device)


def environment(device: torch.device, tf32: bool | None = None) -> Environment:
    """The machine and the versions that a result depends on, and whether TF32 was on."""
    cuda = device.type == "cuda"
    return Environment(
        bncli=bncli.__version__,
        python=platform.python_version(),
        torch=torch.__version__,
        platform=f"{platform.system()} {platform.machine()}",
        processor=_processor(),
        device=torch.cuda.get_device_name(device) if cuda else device.type,
        driver=f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}" if cuda else None,
        threads=torch.get_num_threads(),
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        tf32=tf32,
        freed_memory=freed_memory(),
    )


def _processor() -> str:
    if sys.platform == "linux":
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        if found:
            return found[1]
    return platform.processor() or platform.machine()
