"""The machine's own bandwidth and arithmetic, by a clock whose times are known exactly."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from bncli.measure.timing.ceilings import BEYOND_CACHE, MATRIX_SIDE, SIZES, CeilingBenchmark
from bncli.measure.timing.clock import Work
from bncli.results.profile import Ceilings

CPU = torch.device("cpu")
SIDE = 4


class Scripted:
    """A clock whose samples take the given milliseconds, in order; it keeps what each sample computed."""

    host_bound = samples = 0

    def __init__(self, *ms: float) -> None:
        self.left = list(ms)
        self.seen: list[tuple[torch.Tensor, bool]] = []  # the result of each sample, and whether it was cold

    def sample(self, work: Work, cold: bool) -> Callable[[], float]:
        result = work.run(work.prepare())
        assert isinstance(result, torch.Tensor)
        self.seen.append((result, cold))
        ms = self.left.pop(0)
        return lambda: ms

    def wait(self) -> None:
        return


def benchmark(clock: Scripted, cold: bool = True) -> CeilingBenchmark:
    return CeilingBenchmark(clock, CPU, cold=cold, sizes=(4096, 8192), matrix_side=SIDE)


def test_copies_are_medians_and_the_arithmetic_is_the_fastest() -> None:
    found = benchmark(Scripted(1.0, 2.0, 9.0, 4.0, 5.0, 6.0, 3.0, 2.0, 8.0))
    found.measure(3)
    ceilings = found.ceilings()
    # read once and written once; bytes a millisecond / 1e6 are GB/s
    assert ceilings.copies == ((4096, pytest.approx(2 * 4096 / 2.0 / 1e6)), (8192, pytest.approx(2 * 8192 / 5.0 / 1e6)))
    # a multiplication and an addition for each of SIDE^3 products
    assert ceilings.gflop_per_s == pytest.approx(2 * SIDE**3 / 2.0 / 1e6)


def test_the_samples_of_every_measurement_count() -> None:
    found = benchmark(Scripted(1.0, 1.0, 1.0, 3.0, 3.0, 0.5))
    found.measure(1)
    assert found.ceilings().gflop_per_s == pytest.approx(2 * SIDE**3 / 1.0 / 1e6)
    found.measure(1)
    ceilings = found.ceilings()
    assert [rate for _, rate in ceilings.copies] == pytest.approx([2 * 4096 / 2.0 / 1e6, 2 * 8192 / 2.0 / 1e6])
    assert ceilings.gflop_per_s == pytest.approx(2 * SIDE**3 / 0.5 / 1e6)


def test_before_the_first_measurement_nothing_is_known() -> None:
    assert benchmark(Scripted()).ceilings() == Ceilings((), None)


@pytest.mark.parametrize("cold", [True, False])
def test_copies_are_as_cold_as_the_kernels_and_the_matrices_are_warm(cold: bool) -> None:
    clock = Scripted(1.0, 1.0, 1.0)
    benchmark(clock, cold).measure(1)
    assert [(result.nbytes, was_cold) for result, was_cold in clock.seen] == [
        (4096, cold),
        (8192, cold),
        (4 * SIDE**2, False),
    ]
    copy, _, product = (result for result, _ in clock.seen)
    assert bool((copy == 1).all())
    assert bool((product == SIDE).all())


def test_the_largest_copy_is_beyond_the_cache_of_either_device() -> None:
    assert BEYOND_CACHE.keys() == MATRIX_SIDE.keys() == {"cpu", "cuda"}
    assert list(SIZES) == sorted(SIZES)
    assert all(size > 2 * SIZES[-1] for size in BEYOND_CACHE.values())
