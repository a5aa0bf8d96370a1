"""Several processes in one group of torch.distributed on CPUs, in which tests call functions."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import distributed as dist

TIMEOUT_S = 200.0


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("localhost", 0))
        return int(opened.getsockname()[1])


class Group:
    """Processes that call a function together."""

    def __init__(self, pipes: list[Connection]) -> None:
        self.pipes = pipes

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What a function of a module returns on each rank; AssertionError with the traceback where one raises."""
        for pipe in self.pipes:
            pipe.send((function, arguments))
        found = []
        for rank, pipe in enumerate(self.pipes):
            assert pipe.poll(TIMEOUT_S), f"rank {rank} does not answer"
            failure, result = pipe.recv()
            assert failure is None, f"rank {rank}: {failure}"
            found.append(result)
        return found


def started(target: Callable[..., None], size: int, *arguments: Any) -> tuple[list[Connection], list[Any]]:
    """Processes that call `target` with a pipe and arguments, forked of one that has loaded what they need."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.conftest", "bncli.engine.convert", "bncli.cli", "torch._dynamo"])
    pipes, processes, port = [], [], free_port()
    for rank in range(size):
        ours, theirs = context.Pipe()
        process = context.Process(target=_with_rank, args=(rank, size, port, target, theirs, *arguments), daemon=True)
        process.start()
        pipes.append(ours)
        processes.append(process)
    return pipes, processes


@contextlib.contextmanager
def group(size: int) -> Iterator[Group]:
    """A group of that many processes."""
    pipes, processes = started(_serve, size)
    yield Group(pipes)
    for pipe in pipes:
        pipe.send(None)
    for process in processes:
        process.join(TIMEOUT_S)
        process.kill()


def _with_rank(rank: int, size: int, port: int, target: Callable[..., None], *arguments: Any) -> None:
    """Call a function in the environment that torchrun makes."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size)}
    target(*arguments)


def _serve(pipe: Connection) -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=TIMEOUT_S))
    while job := pipe.recv():
        function, arguments = job
        try:
            pipe.send((None, function(*arguments)))
        except BaseException:
            pipe.send((traceback.format_exc(), None))
    dist.destroy_process_group()
