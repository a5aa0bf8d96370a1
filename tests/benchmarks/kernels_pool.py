"""Checks in processes of their own: a kernel that hangs or crashes ends its process, and the others go on.

The processes also fill the compilers' caches on disk, several kernels at a time, before anything is timed.
"""

from __future__ import annotations

import multiprocessing
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

import torch

from bncli.measure.timing.clock import Deadline
from tests.benchmarks.kernels_check import Check

START_S = 120.0  # for a process to import torch


@dataclass(frozen=True)
class Task:
    """A function of a module and its arguments, the first of which is the case."""

    function: Callable[..., list[Check]]
    arguments: tuple[Any, ...]

    @property
    def name(self) -> str:
        return f"{self.function.__name__}: {self.arguments[0]}"


def done_here(task: Task) -> list[Check]:
    """Its checks; an exception is a check that failed."""
    try:
        return task.function(*task.arguments)
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        return [
            Check(task.function.__name__, str(task.arguments[0]), False, f"{type(error).__name__}: {lines[0][:300]}")
        ]


@dataclass(eq=False)
class _Worker:
    process: SpawnProcess
    connection: Connection
    task: Task | None = None
    began_s: float = 0.0
    ready: bool = False

    def take(self, task: Task) -> None:
        self.task, self.began_s = task, time.monotonic()
        self.connection.send(task)

    @property
    def busy_s(self) -> float:
        return time.monotonic() - self.began_s


def _serve(connection: Connection, device_name: str) -> None:
    """A worker's life: a task, its checks, the next. Ends when its device is lost or nobody asks any more."""
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # the workers are the parallelism
    torch.set_num_threads(1)
    if device_name.startswith("cuda"):
        torch.cuda.set_device(device_name)
    warnings.simplefilter("ignore")
    connection.send(None)  # ready: what it took to start counts towards no task
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        checks, lost = done_here(task), _lost_device()
        if lost:
            checks = [*checks, _failed(task, f"the device was lost to this process: {lost}")]
        connection.send((checks, lost))
        if lost:
            return


def _lost_device() -> str:
    """What CUDA says once a kernel has broken this process's context, or nothing."""
    if not torch.cuda.is_initialized():
        return ""
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return ""


def _hire(device_name: str) -> _Worker:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, device_name), daemon=True)
    process.start()
    theirs.close()
    return _Worker(process, ours)


def _dismiss(worker: _Worker) -> None:
    """End it, whatever it is doing."""
    worker.connection.close()
    worker.process.join(timeout=1.0)
    if worker.process.is_alive():
        worker.process.kill()
        worker.process.join(timeout=20.0)


class Pool:
    """Up to `jobs` processes that check, started when first needed; with none, this process does it itself.

    A worker that takes more than `limit_s` over one task, or dies of it, has failed it, and another takes its place.
    """

    def __init__(self, jobs: int, limit_s: float, device_name: str = "cpu", late_s: float = 30.0) -> None:
        self.jobs, self.limit_s, self.device_name, self.late_s = jobs, limit_s, device_name, late_s
        self._workers: list[_Worker] = []

    def checked(
        self, tasks: Sequence[Task], deadline: Deadline | None = None, most: int | None = None
    ) -> Iterator[tuple[Task, list[Check]]]:
        """Each task with its checks as they end, at most `most` at a time.

        None is begun after the deadline, and one that has then run for `late_s` is ended too.
        """
        waiting = list(reversed(tasks))
        if self.jobs == 0:
            while waiting and not (deadline and deadline.passed):
                one = waiting.pop()
                yield one, done_here(one)
            return
        count = min(self.jobs, most or self.jobs, len(waiting))
        while True:
            late = deadline is not None and deadline.passed
            if waiting and not late:
                self._workers += [_hire(self.device_name) for _ in range(min(count, len(waiting)) - len(self._workers))]
            for worker in self._workers[:count]:
                if worker.task is None and waiting and not late:
                    worker.take(waiting.pop())
            busy = [worker for worker in self._workers if worker.task is not None]
            if not busy:
                return
            answered = wait([worker.connection for worker in busy], timeout=0.5)
            for worker in busy:
                task = worker.task
                assert task is not None
                limit_s = min(self.limit_s, self.late_s) if late else self.limit_s
                if worker.connection in answered:
                    answer = _answer(worker, task)
                    if answer is None:
                        worker.ready, worker.began_s = True, time.monotonic()
                        continue
                    checks, usable = answer
                elif worker.busy_s > (limit_s if worker.ready else START_S):
                    checks = [_failed(task, f"no end in {worker.busy_s:.0f} s (a hang?): its process was killed")]
                    usable = False
                else:
                    continue
                worker.task = None
                if not usable:
                    _dismiss(worker)
                    self._workers.remove(worker)
                yield task, checks

    def close(self) -> None:
        for worker in self._workers:
            _dismiss(worker)
        self._workers = []


def _answer(worker: _Worker, task: Task) -> tuple[list[Check], bool] | None:
    """The checks, and whether the worker can take another task; None from one that has just started."""
    try:
        answer = worker.connection.recv()
        return answer and (answer[0], not answer[1])
    except (EOFError, OSError):
        worker.process.join(timeout=20.0)
        return [_failed(task, f"its process died (exit code {worker.process.exitcode})")], False


def _failed(task: Task, detail: str) -> Check:
    return Check(task.function.__name__, str(task.arguments[0]), False, detail)
