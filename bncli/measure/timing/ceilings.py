"""What the machine reaches in the same run: copies of several sizes, and multiply-adds in float32."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import torch

from bncli.measure.timing import clock as timing
from bncli.measure.timing.clock import Clock, Work
from bncli.results.profile import Ceilings

KIB, MIB = 2**10, 2**20
SIZES = (256 * KIB, MIB, 4 * MIB, 16 * MIB, 64 * MIB)
BEYOND_CACHE = {"cpu": 256 * MIB, "cuda": 1024 * MIB}  # more than a core's or a card's own caches hold
MATRIX_SIDE = {"cpu": 1024, "cuda": 8192}


class Ladder:
    """Copies of every size, up to a large one, and torch.mm of one. All samples count, of every climb."""

    def __init__(
        self,
        clock: Clock,
        device: torch.device,
        *,
        cold: bool,
        sizes: Sequence[int] | None = None,
        matrix_side: int | None = None,
    ) -> None:
        self._clock, self._device, self._cold = clock, device, cold
        self._sizes = sizes or (*SIZES, BEYOND_CACHE[device.type])
        self._copy_ms: dict[int, list[float]] = {}
        self._mm_ms: list[float] = []
        self._side = matrix_side or MATRIX_SIDE[device.type]

    def climb(self, rounds: int) -> None:
        """So many samples more of each."""
        for size in self._sizes:
            work, _ = timing.copy_work(size, self._device)
            self._copy_ms.setdefault(size, []).extend(self._samples(work, rounds, self._cold))
        # TF32 is off, as it is by default: batch norm computes in float32.
        one, other, out = (torch.ones(self._side, self._side, device=self._device) for _ in range(3))
        self._mm_ms += self._samples(Work(lambda _: torch.mm(one, other, out=out)), rounds, cold=False)

    def _samples(self, work: Work, rounds: int, cold: bool) -> tuple[float, ...]:
        work.run(None)  # its pages are there
        return timing.interleaved(self._clock, {"": work}, rounds, cold=cold)[""]

    def ceilings(self) -> Ceilings:
        """Copies by the median of their samples, as kernels are, and the fastest multiply-adds; of those so far."""
        copies = tuple((size, timing.gb_per_s(2 * size, statistics.median(ms))) for size, ms in self._copy_ms.items())
        gflop_per_s = 2 * self._side**3 / min(self._mm_ms) / 1e6 if self._mm_ms else None
        return Ceilings(copies, gflop_per_s)
