"""Performance ceilings of the machine, measured in the same run: copy bandwidth by size, and float32 FLOP/s."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import torch

from bncli.measure.timing.clock import Clock, Work, copy_work, interleaved
from bncli.results.profile import Ceilings

KIB, MIB = 2**10, 2**20
SIZES = (256 * KIB, MIB, 4 * MIB, 16 * MIB, 64 * MIB)
BEYOND_CACHE = {"cpu": 256 * MIB, "cuda": 1024 * MIB}  # more than the caches of a core or a GPU hold
MATRIX_SIDE = {"cpu": 1024, "cuda": 8192}


class CeilingBenchmark:
    """Copies of every size, up to a large one, and torch.mm of one size. Samples of all `measure` calls count."""

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
        self._side = matrix_side or MATRIX_SIDE[device.type]
        self._copy_ms: dict[int, list[float]] = {size: [] for size in sizes or (*SIZES, BEYOND_CACHE[device.type])}
        self._mm_ms: list[float] = []

    def measure(self, rounds: int) -> None:
        for size, samples_ms in self._copy_ms.items():
            samples_ms += self._samples(copy_work(size, self._device)[0], rounds, self._cold)
        # TF32 is off, as it is by default: batch norm computes in float32.
        a, b, out = (torch.ones(self._side, self._side, device=self._device) for _ in range(3))
        self._mm_ms += self._samples(Work(lambda _: torch.mm(a, b, out=out)), rounds, cold=False)

    def _samples(self, work: Work, rounds: int, cold: bool) -> tuple[float, ...]:
        work.run(None)  # allocate its pages
        return interleaved(self._clock, {"": work}, rounds, cold=cold)[""]

    def ceilings(self) -> Ceilings:
        """The median of the copies' samples, as for kernels, and the fastest multiply-adds, so far."""
        if not self._mm_ms:
            return Ceilings((), None)
        # A copy reads and writes each byte once; bytes per millisecond / 10^6 are GB/s.
        copies = tuple((size, 2 * size / statistics.median(ms) / 1e6) for size, ms in self._copy_ms.items())
        return Ceilings(copies, 2 * self._side**3 / min(self._mm_ms) / 1e6)
