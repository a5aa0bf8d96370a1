"""Ranks: the processes that torchrun starts for one run, which share its batches, its evaluations and its decisions."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from bncli.engine.device import resolve
from bncli.errors import BncliError, Refused, RunFailed, UsageError

TIMEOUT_S = 600.0  # after which a rank that does not answer ends the others; one that dies ends them at once
DIFFERENT = 1e-5  # relative distance of two ranks' sums of squared weights, far above rounding on unlike processors


class LostRank(RunFailed):
    """Another rank has ended, or does not answer."""


@dataclass(frozen=True)
class Ranks:
    """One of the processes: its rank from 0, their number, and its device. They make all calls in the same order."""

    rank: int = 0
    count: int = 1
    device: torch.device | None = None  # None: of one process that torchrun has not started

    def part(self, batch: Tensor, micro_batches: int = 1) -> Tensor:
        """This rank's of the indices (B,) of a batch: a slice of each micro-batch, the first ones the longer."""
        return batch.view(micro_batches, -1).tensor_split(self.count, 1)[self.rank].flatten()

    def parallel(self, model: nn.Module, any_graph: bool) -> nn.Module:
        """The model with gradients that are the mean over all ranks; its weights and buffers become rank 0's.

        Before each forward pass the buffers become rank 0's too. any_graph: whether a parameter may be left unused.
        """
        if self.count == 1:
            return model
        on = [self.device] if self.device and self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(model, device_ids=on, find_unused_parameters=any_graph)

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all ranks, in float64, the same bits on each; of one process the values themselves."""
        if self.count == 1:
            return values
        total = values.to(torch.float64, copy=True)
        dist.all_reduce(total)
        return total

    def any(self, stop: Callable[[], bool]) -> bool:
        """Whether `stop()` is true on any rank."""
        return stop() if self.count == 1 else bool(self.sum(torch.tensor(stop())))  # on the CPU: no GPU is waited for

    def share(self, value: Any = None) -> Any:
        """Rank 0's value, on every rank."""
        values = [value]
        dist.broadcast_object_list(values, 0, device=torch.device("cpu"))
        return values[0]

    @torch.no_grad()
    def make_equal(self, model: nn.Module) -> None:
        """Give each rank the buffers of rank 0. Raises RunFailed where the ranks' weights differ."""
        if self.count == 1:
            return
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
        squares = torch.stack([weight.square().sum(dtype=torch.float64) for weight in model.parameters()]).sum()
        if (self.sum(squares) / self.count - squares).abs() > DIFFERENT * squares:
            why = "DistributedDataParallel averages the gradients of those weights alone that require one at the start"
            raise RunFailed(f"the ranks have different weights: {why}")

    @contextlib.contextmanager
    def connected(self) -> Iterator[None]:
        """A context in which the error of a connection to a rank that is gone becomes LostRank."""
        try:
            yield
        except RuntimeError as error:
            if "gloo" not in str(error) and not isinstance(error, dist.DistError):
                raise
            why = "another rank has ended, or did not answer; the message of that rank, or of torchrun, says why"
            raise LostRank(why) from error


ALONE = Ranks()


@contextlib.contextmanager
def joined(device: str, timeout_s: float = TIMEOUT_S) -> Iterator[Ranks]:
    """A context in which this process, started by torchrun, is one of its ranks: by gloo on CPUs, by nccl on GPUs.

    Of the ranks whose runs end in an error of the same words, one says it; a loss of another rank is for rank 0 to say.
    """
    on = resolve(device)
    if on.index is not None or on.type == "mps":
        raise UsageError("under torchrun, expected auto, cpu or cuda, of which each rank takes its own", field="device")
    if on.type == "cuda":
        on = resolve(f"cuda:{os.environ['LOCAL_RANK']}")
        torch.cuda.set_device(on)
    limit = timedelta(seconds=timeout_s)
    backend = "cpu:gloo,cuda:nccl" if on.type == "cuda" else "gloo"
    try:
        store, rank, count = next(dist.rendezvous("env://", timeout=limit))
        store = dist.PrefixStore(f"start {restarts()}", store)  # not with the addresses of the ranks before
        dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=limit)
    except (RuntimeError, ValueError) as error:
        raise RunFailed(f"the ranks cannot connect: {' '.join(str(error).split())}") from error
    try:
        yield Ranks(rank, count, on)
    except BncliError as error:
        if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):  # of torchrun's summary
            Path(file).write_text(json.dumps({"message": str(error), "timestamp": int(time.time())}))
        time.sleep(min(rank, 1))  # which leaves it to rank 0, if it is about to say the same
        with contextlib.suppress(dist.DistError):  # the store is gone with its process
            if store.add(str(error), 1) > 1 or (rank and isinstance(error, LostRank)):
                raise SystemExit(error.exit_code) from None
        if rank == 0:
            raise
        raise Refused(f"rank {rank}: {error}", exit_code=error.exit_code) from error
    dist.destroy_process_group()


def restarts() -> int:
    """How many times torchrun has started the ranks again after a failure."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def is_of_earlier_start(folder: Path) -> bool:
    """Whether torchrun has started the ranks before, and the run in that folder was written since then."""
    if not restarts() or not folder.is_dir():
        return False
    import psutil  # 10 ms that other runs can save

    return folder.stat().st_mtime > psutil.Process(os.getppid()).create_time()
