"""Where the figures were made: the card, the versions, what a copy reaches and what a launch costs in the same run."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

from bncli.engine import device as devices
from bncli.measure.timing import clock as timing
from bncli.measure.timing.clock import Clock, Spread, Work
from bncli.results.profile import Case
from tests.benchmarks import kernels_speed as speed
from tests.benchmarks.kernels_check import apply


def description(device: torch.device) -> dict[str, str]:
    """Names and versions; `unknown` where a tool does not say."""
    here = devices.environment(device)
    found = {"date": here.date, "processor": here.processor, "device": here.device, "python": here.python}
    found |= {"torch": here.torch, "triton": _version("triton"), "bncli": f"{here.bncli} ({_revision()})"}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["driver"] = _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        found["cuda"] = f"{torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
        found["card"] = (
            f"sm_{properties.major}{properties.minor}, {properties.multi_processor_count} multiprocessors, "
            f"L2 {properties.L2_cache_size / 2**20:.0f} MiB, memory {properties.total_memory / 2**30:.0f} GiB"
        )
    else:
        found["threads"] = f"{torch.get_num_threads()} of {os.cpu_count()} cores"
        cache = last_cache_bytes()
        found["cache"] = "unknown" if cache is None else f"{cache / 2**20:.0f} MiB, the last one"
    return found


def last_cache_bytes(folder: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> int | None:
    """Of the first CPU core's last cache, None where the system does not say (Linux's sysfs: 32K, 480M)."""
    found = []
    for file in folder.glob("index*/size"):
        words = re.fullmatch(r"(\d+)([KMG]?)", file.read_text().strip())
        if words is not None:
            found.append(int(words[1]) * 2 ** {"": 0, "K": 10, "M": 20, "G": 30}[words[2]])
    return max(found, default=None)


def busy_cores(over_s: float = 0.5, times: Callable[[], Any] = psutil.cpu_times) -> float:
    """How many cores other programs use while this one sleeps. times: the seconds of all cores so far, by their use."""
    before, began_s = _busy_s(times()), time.monotonic()
    time.sleep(over_s)
    return (_busy_s(times()) - before) / (time.monotonic() - began_s)


def _busy_s(times: Any) -> float:
    """Seconds that all cores have worked for, or that a hypervisor gave to others. Guests are counted as users too."""
    return sum(times) - sum(getattr(times, name, 0.0) for name in ("idle", "iowait", "guest", "guest_nice"))


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _first_line(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return (done.stdout.strip().splitlines() or ["unknown"])[0]


def _revision() -> str:
    return _first_line("git", "rev-parse", "--short", "HEAD")


def clocks(device: torch.device) -> str:
    """What the card says of its clocks, temperature and power now."""
    if device.type != "cuda":
        return "unknown"
    return _first_line(
        "nvidia-smi", "--query-gpu=clocks.sm,clocks.mem,temperature.gpu,power.draw", "--format=csv,noheader"
    )


def copy_samples(size_bytes: int, device: torch.device, clock: Clock, rounds: int) -> tuple[int, tuple[float, ...]]:
    """Bytes that a copy of a tensor of that size moves, and its times in ms, cold."""
    work, moved_bytes = timing.copy_work(size_bytes, device)
    timing.warm_up(clock, work, least_ms=20.0 if device.type == "cuda" else 1.0)
    return moved_bytes, timing.interleaved(clock, {"copy": work}, rounds)["copy"]


def launch_samples(device: torch.device, clock: Clock, rounds: int, calls: int = 200) -> dict[str, tuple[float, ...]]:
    """Milliseconds per launch of an empty kernel, and of torch's smallest operator: the host's, and in a row."""
    one = torch.zeros(1, device=device)
    works = {"torch's add_ to one element": Work(lambda _: one.add_(1.0))}
    if device.type == "cuda":
        works["an empty kernel"] = Work(lambda _: torch.cuda._sleep(0))
    for work in works.values():
        timing.warm_up(clock, work, least_ms=0.0)
    host, whole = timing.in_a_loop(clock, works, rounds, calls=calls, now_ns=time.perf_counter_ns)
    return {f"{name}, {what}": ms[name] for name in works for what, ms in (("host", host), ("in a row", whole))}


def same_twice(device: torch.device, clock: Clock, rounds: int) -> dict[str, Spread]:
    """Ratios of one work's times to its own, cold and warm: how far from 1 a ratio is that means nothing."""
    case = Case((256, 64, 56, 56) if device.type == "cuda" else (2, 8, 6, 6))
    arms = {name: apply(case, "native") for name in ("once", "again")}
    works = speed.works(case, device, arms)["both"]
    for work in works.values():
        timing.warm_up(clock, work, least_ms=5.0)
    found = {}
    for heat, cold in (("cold", True), ("warm", False)):
        samples = timing.interleaved(clock, works, rounds, cold=cold)
        found[heat] = timing.times_faster(samples["once"], samples["again"])
    return found
