"""A machine whose times are known exactly, and a kernel view that is measured on it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bncli.measure.profile.kernels import KernelRun, KernelSettings
from bncli.measure.profile.timed_kernels import Source, TimedKernel
from bncli.measure.reference import case as cases
from bncli.measure.reference.candidate import by_name
from bncli.measure.reference.case import EPS
from bncli.measure.timing.ceilings import CeilingBenchmark
from bncli.measure.timing.clock import CpuClock
from bncli.measure.timing.fresh_process import CallFailed
from bncli.results.profile import Case, KernelCost, KernelProfile

CPU = torch.device("cpu")
NATIVE = by_name("native")
SMALL = ((4, 3, 5, 7), 2)
TICK_NS = 1000  # that reading the clock takes
OVERHEAD_MS = TICK_NS / 1e6


class Machine:
    """A host whose clock moves when it is read, and when a kernel says so; all times in ms."""

    def __init__(self) -> None:
        self.passed_ns = 0

    def now_ns(self) -> int:
        self.passed_ns += TICK_NS
        return self.passed_ns

    def now_s(self) -> float:
        return self.passed_ns / 1e9

    def takes(self, forward_ms: float, backward_ms: float) -> Source:
        """Native's kernel, for that long on the cases that are timed."""

        def source(case: cases.Case) -> TimedKernel:
            if case.eps != EPS:
                return TimedKernel(case, NATIVE)
            return TimedKernel(
                case, lambda *given: Spent.apply(NATIVE(*given), self, forward_ms, backward_ms), "a fake"
            )

        return source


class Spent(torch.autograd.Function):
    """The identity, which takes time on a machine, forward and backward."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, machine: Machine, forward_ms: float, backward_ms: float) -> Tensor:
        machine.passed_ns += round(forward_ms * 1e6)
        ctx.machine, ctx.backward_ms = machine, backward_ms
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        ctx.machine.passed_ns += round(ctx.backward_ms * 1e6)
        return gradients[0], None, None, None


class Processes:
    """Fresh processes and the peaks that they measure, without any process."""

    def __init__(self, mib: float | None = 1.5) -> None:
        self.mib, self.closed = mib, False

    def peak_mib(self, processes: object, case: Case, kernel: str, allow_code: bool) -> float:
        assert not self.closed
        if self.mib is None:
            raise CallFailed("it hung\nin detail")
        return self.mib

    def close(self) -> None:
        self.closed = True


def run_of(machine: Machine, sources: dict[str, Source], processes: Processes | None = None, **set_: Any) -> KernelRun:
    clock, processes = CpuClock(flush_bytes=64, now_ns=machine.now_ns), processes or Processes()
    return KernelRun(
        KernelSettings(**{"kernels": tuple(sources), "operations": ("bn+relu",), "shapes": (SMALL,), **set_}),
        CPU,
        clock,
        processes=processes,  # type: ignore[arg-type]
        peak_mib=processes.peak_mib,
        sources_of=sources,
        ceilings=CeilingBenchmark(clock, CPU, cold=True, sizes=(4096, 8192), matrix_side=4),
        now_s=machine.now_s,
    )


def profile(
    machine: Machine, sources: dict[str, Source], processes: Processes | None = None, **set_: Any
) -> KernelProfile:
    run = run_of(machine, sources, processes, **set_)
    for _ in run.events():
        pass
    return run.result()


def row_of(found: KernelProfile, kernel: str) -> KernelCost:
    return next(row for row in found.rows if row.kernel == kernel)
