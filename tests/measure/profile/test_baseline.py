"""Comparison with a baseline: speedups against those of an earlier run, judged by their intervals alone."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bncli.errors import USAGE, UsageError
from bncli.measure.profile.baseline import change, gate
from bncli.measure.profile.timed_kernels import Source, TimedKernel
from bncli.measure.reference import case as cases
from bncli.results.environment import Interval
from bncli.results.profile import Case, KernelProfile, KernelRow, Speedup, StepRow
from tests.measure.profile.fake_machine import NATIVE, Machine, Spent, profile
from tests.report.made_up_costs import kernel_profile, one_case, step_profile, with_errors

POSITIVE = st.floats(0.01, 100.0)
ROW = StepRow("arm", "training", "fused")


def ratio(value: float, low: float | None, high: float | None) -> Speedup:
    return Speedup(value, Interval(low, high))


def slowed(profile, times: float):
    """The profile with every ratio to native that many times smaller."""

    def one(found: Speedup) -> Speedup:
        low, high = found.interval.low, found.interval.high
        return Speedup(found.value / times, Interval(low and low / times, high and high / times))

    return replace(profile, rows=tuple(replace(row, faster=row.faster and one(row.faster)) for row in profile.rows))


def test_a_profile_compared_with_itself_is_ok():
    found = gate(kernel_profile(), kernel_profile(), 1.1)
    assert {each.verdict for each in found.changes} == {"ok"}
    assert {each.slower for each in found.changes} == {1.0}
    assert not found.regressed


def test_a_kernel_that_is_slower_by_its_whole_interval_has_regressed():
    found = gate(slowed(kernel_profile(), 1.5), kernel_profile(), 1.1)
    assert {each.verdict for each in found.changes} == {"regressed"}
    assert found.regressed
    assert found.changes[0].slower == pytest.approx(1.5)


@pytest.mark.parametrize("make", [kernel_profile, step_profile])
def test_no_row_that_other_programs_disturbed_regressed(make):
    slow, good = slowed(make(), 1.5), make()
    assert gate(slow, good, 1.1).disturbed == ()
    for now, before, where in ((beside_others(slow), good, "this run"), (slow, beside_others(good), "the baseline")):
        found = gate(now, before, 1.1)
        assert ({each.verdict for each in found.changes}, found.disturbed) == ({"cannot tell"}, (where,))
        assert not found.failed
        assert gate(now, before, 1.1, strict=True).failed
    # The other rows are judged as ever.
    first, *others = gate(replace(slow, rows=(*beside_others(slow).rows[:2], *slow.rows[2:])), good, 1.1).changes
    assert first.verdict == "cannot tell"
    assert {each.verdict for each in others} == {"regressed"}


def beside_others(profile):
    """The profile measured while other programs used half a core."""
    return replace(profile, rows=tuple(replace(row, cores_lacked=0.5) for row in profile.rows))


def test_an_interval_around_the_bound_cannot_tell_and_does_not_fail():
    found = gate(slowed(kernel_profile(), 1.1), kernel_profile(), 1.1)  # the intervals are 3 % wide on each side
    assert {each.verdict for each in found.changes} == {"cannot tell"}
    assert not found.regressed


def test_strictly_undecided_rows_and_rows_without_a_speedup_fail():
    unsure = slowed(kernel_profile(), 1.1)
    assert not gate(unsure, kernel_profile(), 1.1).failed
    assert gate(unsure, kernel_profile(), 1.1, strict=True).failed
    assert not gate(kernel_profile(), kernel_profile(), 1.1, strict=True).failed
    assert gate(one_case(), kernel_profile(2, ("bn",)), 1.1, strict=True).failed
    assert not gate(kernel_profile(2, ("bn",)), one_case(), 1.1, strict=True).failed  # more than the baseline has
    assert gate(slowed(kernel_profile(), 1.5), kernel_profile(), 1.1).failed


def test_the_interval_reaches_as_far_as_both_intervals_allow():
    found = change(ROW, ratio(2.0, 1.6, 2.5), ratio(3.0, 2.0, 4.0), 1.1)
    assert found.slower == 1.5
    assert found.interval == Interval(2.0 / 2.5, 4.0 / 1.6)


@pytest.mark.parametrize(
    ("now", "then", "verdict"),
    [
        (ratio(1.0, None, 1.1), ratio(2.0, 1.9, 2.1), "regressed"),  # at least 1.9 / 1.1 times slower
        (ratio(1.0, 0.9, None), ratio(2.0, 1.9, 2.1), "cannot tell"),
        (ratio(2.0, 1.9, None), ratio(2.0, None, 2.05), "ok"),  # at most 2.05 / 1.9 times slower
        (ratio(1.0, None, None), ratio(9.0, 8.9, 9.1), "cannot tell"),
        (ratio(1.0, 0.9, 1.1), ratio(9.0, None, None), "cannot tell"),
    ],
)
def test_an_open_side_stays_open(now, then, verdict):
    found = change(ROW, now, then, 1.1)
    assert found.verdict == verdict
    assert found.interval.low is None or found.interval.high is None


@given(st.tuples(POSITIVE, POSITIVE, POSITIVE), st.tuples(POSITIVE, POSITIVE, POSITIVE), st.floats(1.001, 10))
def test_no_speedups_within_their_intervals_contradict_the_verdict(ours, theirs, fail_above):
    (a, now, b), (c, then, d) = sorted(ours), sorted(theirs)
    found = change(ROW, ratio(now, a, b), ratio(then, c, d), fail_above)
    extremes = [c / b, c / a, d / b, d / a]
    if found.verdict == "regressed":
        assert min(extremes) > fail_above
    elif found.verdict == "ok":
        assert max(extremes) <= fail_above
    else:
        assert min(extremes) <= fail_above < max(extremes)


def test_rows_without_a_speedup_are_not_compared():
    found = gate(with_errors(), with_errors(), 1.1)
    assert found.changes
    rows = [each.row for each in found.changes] + [*found.only_now, *found.only_baseline]
    assert not {row.kernel for row in rows} & {"native", "mine:norm", "apex"}


def test_what_only_one_side_has_is_listed_and_does_not_fail():
    found = gate(one_case(), kernel_profile(2, ("bn",)), 1.1)
    assert [each.row for each in found.changes] == [KernelRow(Case((256, 64, 56, 56), "bn", "fp32"), "fused")]
    assert found.only_now == ()
    assert KernelRow(Case((256, 128, 28, 28), "bn", "fp32"), "fused") in found.only_baseline
    assert gate(kernel_profile(2, ("bn",)), one_case(), 1.1).only_now == found.only_baseline


def test_rows_of_another_dtype_layout_mode_or_affine_are_other_rows():
    (row,) = (row for row in one_case().rows if row.kernel == "fused")
    others = [
        {"dtype": "bf16"},
        {"layout": "channels_last"},
        {"training": False},
        {"affine": "none"},
        {"tracked": False},
    ]
    rows = [replace(row, case=replace(row.case, **changed)).key for changed in [{}, *others]]
    assert len(set(rows)) == len({str(row) for row in rows}) == 6


def test_another_machine_s_baseline_is_compared_by_its_ratios():
    there = replace(kernel_profile(), environment=replace(kernel_profile().environment, device="NVIDIA X", threads=64))
    assert not gate(kernel_profile(), there, 1.1).regressed


def test_steps_are_matched_by_arm_kernel_and_mode():
    found = gate(slowed(step_profile(), 2.0), step_profile(), 1.1)
    assert [each.row for each in found.changes] == [
        StepRow("batch norm", "training", "fused"),
        StepRow("batch norm", "evaluation", "fused"),
    ]
    assert found.regressed


def test_kernels_are_not_compared_with_a_step():
    with pytest.raises(UsageError, match="it holds the profile of a step, and this is one of kernels") as refused:
        gate(kernel_profile(), step_profile(), 1.1)
    assert refused.value.exit_code == USAGE


def test_profiles_without_a_common_row_are_refused_with_examples():
    with pytest.raises(UsageError, match="no row is in both") as refused:
        gate(one_case(), kernel_profile(dtype="bf16"), 1.1)
    assert "bn fp32 contiguous, 256x64x56x56, fused" in str(refused.value)
    assert "bn bf16 contiguous, 256x64x56x56, fused" in str(refused.value)


def test_without_native_in_the_run_the_message_asks_for_it():
    alone = kernel_profile(kernels=("native",))
    with pytest.raises(UsageError, match="this profile has no ratio to native"):
        gate(alone, kernel_profile(), 1.1)
    with pytest.raises(UsageError, match="the baseline has no ratio to native"):
        gate(kernel_profile(), alone, 1.1)


@pytest.mark.parametrize("bound", [1.0, 0.9, -1.0, float("nan"), float("inf")])
def test_a_bound_that_is_no_number_above_1_is_refused(bound):
    with pytest.raises(UsageError, match=r"^fail_above .*: expected more than 1"):
        gate(one_case(), one_case(), bound)


# --- whole profiles, quick ones, of a machine whose rounds are noisy --------------------------------------------------

SHAPES = tuple(((4, 3, 5, side), 1) for side in range(2, 8))


def noisy(machine: Machine, noise: random.Random, slowed: float) -> Source:
    """Native's kernel; each of its times is off by 3 %, and one in 100 twice as long.

    It passes for a compiled one, which is not judged on small cases, so that a profile takes a fraction of a second.
    """

    def source(case: cases.Case) -> TimedKernel:
        def call(*given: object) -> object:
            forward_ms, backward_ms = (
                10 * slowed * math.exp(noise.gauss(0, 0.03)) * (2 if noise.random() < 0.01 else 1) for _ in range(2)
            )
            return Spent.apply(NATIVE(*given), machine, forward_ms, backward_ms)

        return TimedKernel(case, call, compiles=True)  # type: ignore[arg-type]

    return source


def quick(seed: int, slowed: float = 1.0) -> KernelProfile:
    """A profile with so little time that every row has the fewest rounds."""
    machine, noise = Machine(), random.Random(seed)
    sources = {"native": noisy(machine, noise, 1.0), "mine": noisy(machine, noise, slowed)}
    return profile(machine, sources, shapes=SHAPES, seconds=0.001)


@pytest.fixture(scope="module")
def baseline() -> KernelProfile:
    return quick(0)


@pytest.mark.parametrize("slowed", [1.5, 3.0, 8.0])
def test_a_slower_kernel_fails_against_a_quick_baseline(baseline: KernelProfile, slowed: float) -> None:
    for seed in range(1, 6):
        assert gate(quick(seed, slowed), baseline, 1.1).failed


def test_the_same_code_passes_nineteen_times_of_twenty(baseline: KernelProfile) -> None:
    assert sum(gate(quick(seed), baseline, 1.1).failed for seed in range(1, 21)) <= 1
