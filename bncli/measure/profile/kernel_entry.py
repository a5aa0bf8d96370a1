"""Who takes part in a case's timing: the kernels that run here and are right. Others get a row that says why not."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from bncli.errors import Unavailable
from bncli.measure.profile.candidates import Arm, Source
from bncli.measure.reference.case import Inputs
from bncli.measure.reference.channel_accuracy import Judge, judge
from bncli.results.profile import Case, KernelCost


@dataclass
class Entry:
    """The kernels of one case, with the tensors that all of them are timed on."""

    case: Case
    calls: int
    inputs: Inputs | None = None
    arms: dict[str, Arm] = field(default_factory=dict)  # those that take part
    refused: dict[str, KernelCost] = field(default_factory=dict)
    compile_s: dict[str, float] = field(default_factory=dict)
    judged_channels: int = 0

    def refuse(self, kernel: str, error: str, *, ran: str | None = None, wrong: bool = False) -> None:
        self.arms.pop(kernel, None)
        self.refused[kernel] = KernelCost(self.case, kernel, self.calls, ran, error=error, wrong=wrong)

    def refuse_for(self, kernel: str, raised: Exception, arm: Arm | None) -> None:
        """A kernel that raises gave no right result, unless the machine had no room, or it could not be compiled."""
        said = f"{type(raised).__name__}: {(str(raised).splitlines() or [''])[0][:200]}"
        compiling = arm is not None and arm.compiles
        missing = compiling or isinstance(raised, (torch.OutOfMemoryError, MemoryError))
        self.refuse(kernel, f"torch.compile: {said}" if compiling else said, wrong=not missing)


def enter(
    case: Case,
    calls: int,
    sources: Mapping[str, Source],
    device: torch.device,
    *,
    may_compile: bool = True,
    now_s: Callable[[], float] = time.monotonic,
) -> Entry:
    """Run each kernel once, forward and backward, and judge what it gives."""
    entry = Entry(case, calls)
    judges: dict[bool, Judge] = {}  # by whether all weights are above 0
    for kernel, source in sources.items():
        arm: Arm | None = None
        try:
            arm = source(case)
            if arm.compiles and not may_compile:
                continue
            if arm.positive_weight not in judges:
                judges[arm.positive_weight] = judge(case, device, positive_weight=arm.positive_weight)
            _judge(entry, kernel, arm, judges[arm.positive_weight], now_s)
        except Unavailable as reason:
            entry.refuse(kernel, str(reason), ran=None if arm is None else arm.ran)
        except Exception as raised:  # a kernel may raise anything, and the others' rows stand
            entry.refuse_for(kernel, raised, arm)
    return entry


def _judge(entry: Entry, kernel: str, arm: Arm, held_to: Judge, now_s: Callable[[], float]) -> None:
    began_s = now_s()
    error = held_to.error(arm.run, poison=not arm.compiles)
    if arm.compiles:
        entry.compile_s[kernel] = now_s() - began_s
    if error is not None:
        entry.refuse(kernel, error, ran=arm.ran, wrong=True)
        return
    entry.arms[kernel] = arm
    entry.inputs = entry.inputs or held_to.inputs
    entry.judged_channels = len(held_to.channels)
