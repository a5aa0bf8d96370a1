"""The gate on whole profiles, quick ones, of a machine whose rounds are noisy: it decides, and seldom wrongly."""

from __future__ import annotations

import math
import random

import pytest

from bncli.measure.profile.baseline import gate
from bncli.measure.profile.candidates import Candidate, Source
from bncli.measure.reference import case as cases
from bncli.measure.reference.case import Inputs
from bncli.results.profile import Case, KernelProfile
from tests.measure.profile.test_kernels import Machine, Spent, profile

SHAPES = tuple(((4, 3, 5, side), 1) for side in range(2, 8))


def noisy(machine: Machine, noise: random.Random, slowed: float) -> Source:
    """Native's kernel; each of its times is off by 3 %, and one in 100 twice as long."""

    def source(case: Case) -> Candidate:
        native = cases.apply(case, "native")

        def forward(given: Inputs) -> object:
            forward_ms, backward_ms = (
                10 * slowed * math.exp(noise.gauss(0, 0.03)) * (2 if noise.random() < 0.01 else 1) for _ in range(2)
            )
            return Spent.apply(native(given), machine, forward_ms, backward_ms)

        return Candidate(forward)  # type: ignore[arg-type]

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
def test_a_kernel_that_became_slower_fails_against_a_quick_baseline(baseline: KernelProfile, slowed: float) -> None:
    for seed in range(1, 6):
        assert gate(quick(seed, slowed), baseline, 1.1).failed


def test_the_same_code_passes_nineteen_times_of_twenty(baseline: KernelProfile) -> None:
    assert sum(gate(quick(seed), baseline, 1.1).failed for seed in range(1, 21)) <= 1
