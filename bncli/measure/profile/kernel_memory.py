"""The peak memory of a kernel's forward and backward pass on a CPU, each in a fresh process.

A process runs a tiny case first, so that neither lazily loaded code nor the heap's free pages count. torch is loaded by
the functions that those processes run: the server may load it while the program does.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import TYPE_CHECKING

from bncli.measure.timing.fresh_process import CallFailed, FreshProcesses, ServerGone
from bncli.results.profile import Case

if TYPE_CHECKING:
    from torch import Tensor

    from bncli.measure.profile.candidates import Source
    from bncli.measure.reference.case import Inputs

LIMIT_S = 20.0  # of one case


class KernelPeaks(FreshProcesses):
    """Peaks of kernels. `failure` says why there is no figure, once one could not be had."""

    def __init__(self, allow_code: bool = False, limit_s: float = LIMIT_S) -> None:
        super().__init__(warm_up)
        self._allow_code, self._limit_s = allow_code, limit_s
        self._never = sys.platform != "linux"
        self.failure = "the peak of resident memory is read on Linux only" if self._never else None

    def __enter__(self) -> KernelPeaks:
        return self

    def start(self) -> None:
        if not self._never:
            super().start()

    def peak_mib(self, case: Case, kernel: str) -> float | None:
        """Of forward and backward beyond the inputs, in MiB; None where `failure` says why."""
        if self._never:
            return None
        self.failure = None
        try:
            found: float | None = self.call(measured_mib, case, kernel, self._allow_code, limit_s=self._limit_s)
        except ServerGone as error:
            self.failure, self._never = str(error), True
            return None
        except CallFailed as error:
            self.failure = str(error).splitlines()[0][:200]
            return None
        return found


def tiny(case: Case) -> Case:
    """A case of the same kind whose code is the same, and whose tensors are a few KiB."""
    return replace(case, shape=(2, min(case.shape[1], 16), *[min(side, 2) for side in case.shape[2:]]))


# --- in the server and its children -------------------------------------------------------------------------------


def warm_up() -> None:
    """Load torch, and run native once, which takes 0.3 s the first time."""
    import torch

    torch.set_num_threads(1)
    _run_tiny(Case((2, 2), dtype="fp32"), "native", allow_code=False)


def measured_mib(case: Case, kernel: str, allow_code: bool) -> float | None:
    """The peak of one case in the process that calls this. Raises what the kernel raises."""
    from bncli.measure.reference.case import timed
    from bncli.measure.timing import memory

    source = _run_tiny(tiny(case), kernel, allow_code)
    step = source(timed(case)).step(_empty_inputs(case))
    memory.give_back_free_pages()
    return memory.resident_peak_mib(step)


def _run_tiny(case: Case, kernel: str, allow_code: bool) -> Source:
    """Load and compile what a kernel needs, by one step on one thread; where its candidates come from."""
    import torch

    from bncli.measure.profile import candidates
    from bncli.measure.reference.case import timed

    source = candidates.sources([kernel], torch.device("cpu"), allow_code)[kernel]
    source(timed(case)).step(_empty_inputs(case))()
    return source


def _empty_inputs(case: Case) -> Inputs:
    """Tensors of a case whose pages are all resident; what they hold matters to no memory."""
    import torch

    from bncli.measure.reference import case as cases

    zero = cases.timed_inputs(cases.timed(tiny(case)), torch.device("cpu"))
    shape, channels = case.shape, case.shape[1]

    def of(t: Tensor | None) -> Tensor | None:
        if t is None:
            return None
        if t.dim() == 1:
            return torch.ones(channels, dtype=t.dtype)
        return cases.with_layout(torch.ones(shape, dtype=t.dtype), case.layout)

    return cases.Inputs(**{name: of(t) for name, t in vars(zero).items()})  # type: ignore[arg-type]
