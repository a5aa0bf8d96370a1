"""Cores that a measurement lacked: how many of its process's threads waited for one that was in use, on average.

Linux counts how long each thread was ready to run and waited (schedstat's second number, in ns: the kernel's
Documentation/scheduler/sched-stats.rst), which takes no figures of other processes, as a container may lack them.
Elsewhere (macOS, Windows) it is estimated: the threads that compute, less the cores that this process had, less those
that were idle. With 1 and 2 threads on 2 cores beside busy programs, both differed by at most 0.1 (2026-12-01).
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path


class CoreWait:
    """The cores lacked from here on. threads: that compute. tasks: where Linux has its counters."""

    def __init__(self, threads: int, tasks: Path = Path("/proc/self/task")) -> None:
        self._threads, self._tasks, self._waited_s = threads, tasks, _waited_s(tasks)
        self._had_s = 0.0 if self._waited_s else _had_s()
        self._began_s = time.perf_counter()

    def cores(self) -> float | None:
        """The mean so far; None where it is unknown."""
        elapsed_s = time.perf_counter() - self._began_s
        if self._waited_s:
            return sum(s - self._waited_s.get(task, 0.0) for task, s in _waited_s(self._tasks).items()) / elapsed_s
        if not self._had_s or elapsed_s < 0.2:  # its counters have steps of 10 ms
            return None
        return max(0.0, self._threads - (_had_s() - self._had_s) / elapsed_s)


def _waited_s(tasks: Path) -> dict[str, float]:
    """Thread -> seconds that it has waited for a core so far; empty where the kernel does not count."""
    found: dict[str, float] = {}
    for task in tasks.glob("*/schedstat"):
        with contextlib.suppress(OSError):  # its thread has ended
            _, waited_ns, slices = map(int, task.read_bytes().split())
            found |= {task.parent.name: waited_ns / 1e9} if slices else {}  # all are 0 in a kernel that does not count
    return found


def _had_s() -> float:
    """Seconds of cores that this process had so far, or could have had as they were idle; 0 where these are unknown."""
    import psutil  # 10 ms that a training run can save

    times = psutil.cpu_times()
    return times.idle + getattr(times, "iowait", 0.0) + time.process_time() if times.idle else 0.0
