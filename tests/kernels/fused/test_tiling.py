"""The dispatch: which way a shape takes, as a pure function of sizes."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bncli.kernels.fused.tiling import (
    MOST_LINES,
    MOST_VALUES,
    TILINGS,
    Plan,
    Processors,
    plan,
)
from bncli.kernels.fused.triton_launch import reciprocal

H200 = Processors(132, cooperative=True)
A100 = Processors(108, cooperative=False)

# (N, C, side of the plane, how many batch norms of a ResNet-50 have it), one of batch 32 and one of batch 256.
RESNET_50 = [
    (n, c, side, calls)
    for n in (32, 256)
    for c, side, calls in (
        (64, 112, 1), (64, 56, 6), (256, 56, 4), (128, 56, 1), (128, 28, 7), (512, 28, 5), (256, 28, 1), (256, 14, 11),
        (1024, 14, 7), (512, 14, 1), (512, 7, 5), (2048, 7, 4),
    )
]  # fmt: skip


def of(n: int, c: int, s: int, contiguous: bool = True, backward: bool = False, on: Processors = H200, **more) -> Plan:
    return plan((n, c, s), contiguous=contiguous, itemsize=2, backward=backward, processors=on, **more)


def share_read_once(*, contiguous: bool, backward: bool) -> float:
    """Of the batch norm calls of a ResNet-50."""
    calls: Counter[bool] = Counter()
    for n, c, side, count in RESNET_50:
        found = of(n, c, side * side, contiguous, backward)
        calls[found.single_read] += count
        assert found.single_read == (found.resident_share == 1)
    return calls[True] / calls.total()


@pytest.mark.parametrize("backward", [False, True])
def test_nine_of_ten_planes_of_a_resnet_50_are_read_once(backward: bool) -> None:
    assert share_read_once(contiguous=True, backward=backward) >= 0.9


@pytest.mark.parametrize("backward", [False, True])
def test_most_channels_last_calls_of_a_resnet_50_are_read_once(backward: bool) -> None:
    """65 % of them: its large layers do not fit. Of recorded networks' calls 80 % do (tests/benchmarks/coverage.py)."""
    assert share_read_once(contiguous=False, backward=backward) >= 0.6


def test_a_small_slice_has_one_program_and_no_barrier() -> None:
    found = of(32, 1024, 7 * 7)
    assert (found.barrier, found.team, found.teams) == ("none", 1, 1024)


def test_few_channels_are_shared_by_teams_that_fill_the_device() -> None:
    found = of(256, 64, 56 * 56)
    assert found.barrier == "grid"
    assert 0.9 <= found.team * found.teams / (H200.count * found.resident) <= 1


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("backward", [False, True])
def test_without_a_cooperative_launch_no_program_waits_for_another(contiguous: bool, backward: bool) -> None:
    for n, c, side, _ in RESNET_50:
        assert of(n, c, side * side, contiguous, backward, A100).barrier in ("none", "launch")


def test_frozen_statistics_need_no_barrier() -> None:
    assert of(256, 64, 56 * 56, frozen=True).barrier == "none"


def test_a_slice_too_long_to_count_is_refused() -> None:
    for n, s in ((MOST_LINES, 3), (MOST_VALUES + 8, 1), (2**20, 2**11)):
        with pytest.raises(ValueError, match="takes up to 2,080,374,784 values per channel"):
            of(n, 2, s)
    assert of(2**20, 2, 2**11 - 64).lines == 2**20 * (2**11 - 64) / 8


def test_a_plan_is_described_in_words() -> None:
    assert str(of(256, 64, 56 * 56)) == (
        "5 teams of 49 programs, a channel a team, a barrier in memory, read once; 8 warps, 8 tiles in registers"
    )


sizes = st.integers(1, 4096)


@settings(max_examples=300, deadline=None)
@given(
    n=st.integers(1, 300), c=sizes, s=sizes, contiguous=st.booleans(), itemsize=st.sampled_from([2, 4, 8]),
    backward=st.booleans(), processors=st.sampled_from([H200, A100, Processors(1, False), Processors(20, True)]),
    evaluate=st.booleans(),
)  # fmt: skip
def test_a_plan_covers_every_element_once_within_what_the_device_has(
    n: int, c: int, s: int, contiguous: bool, itemsize: int, backward: bool, processors: Processors, evaluate: bool
) -> None:
    found = plan(
        (n, c, s), contiguous=contiguous, itemsize=itemsize, backward=backward, processors=processors, frozen=evaluate
    )
    assert found.tiles_each * found.team >= found.tiles
    assert (found.tiles - 1) * found.rows < found.lines <= found.tiles * found.rows
    assert found.lines * (found.unit if contiguous else 1) == n * s
    assert found.slices * found.columns >= c > (found.slices - 1) * found.columns
    assert math.gcd(s if contiguous else c, 16 // itemsize) == found.unit
    assert evaluate or found.team <= (1 if contiguous else 8) * found.rows
    if found.barrier == "grid":
        assert processors.cooperative
        assert 2 <= found.team <= found.team * found.teams <= processors.count * found.resident
    else:
        assert found.teams == found.slices
    if found.barrier == "none" and not evaluate:
        assert found.team == 1
        assert not found.overflow
    bytes_a_tile = found.rows * (found.unit if contiguous else found.columns) * itemsize
    assert bytes_a_tile == found.warps * 32 * 16
    streams = 1 if evaluate else 1 + backward
    assert (found.warps, found.held) in {(warps, held // streams) for warps, held in TILINGS}
    assert found.warps * 32 * found.registers * found.resident <= 65_536


@settings(max_examples=500, deadline=None)
@given(divisor=st.integers(1, 2**22), i=st.integers(0, 2**30 - 1))
def test_the_reciprocal_divides_exactly(divisor: int, i: int) -> None:
    magic, shift = reciprocal(divisor)
    for each in (i, i - i % divisor, max(i - i % divisor - 1, 0)):
        assert ((2 * each * magic) >> 32) >> shift == each // divisor
    assert 2**31 <= magic < 2**32
