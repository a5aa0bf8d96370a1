"""One standard: what profile's judge and gradcheck each see of the kernels that are wrong in exactly one way."""

from __future__ import annotations

import pytest
import torch

from bncli.measure.profile.sources import sources
from bncli.measure.profile.timed_kernels import judged_case, wrong_on_cases
from bncli.results.profile import Case
from tests.measure.reference import wrong_kernels

HERE = "tests.measure.reference.wrong_kernels"
CPU = torch.device("cpu")
# Those that only gradcheck can see, by the inputs or the second derivatives that only it has.
GRADCHECK_ALONE = {
    "one_pass_variance",  # a mean far from 0
    "second_derivative_zero",
    "second_derivative_refused",
    "relu_swallows_nan",
    "relu_flat_at_nan",
    "leaky_relu_whole_at_nan",
    "one_value_taken",
}


def seen_by_profile(name: str) -> bool:
    kernel = f"{HERE}:{name}"
    (source,) = sources([kernel], CPU, True).values()
    if wrong_on_cases(kernel, source, CPU) is not None:
        return True
    judged = judged_case(Case((4, 3, 5, 7), "bn+relu", "fp32"), 1, {kernel: source}, CPU)
    return any(row.wrong for row in judged.refused.values())


@pytest.mark.parametrize("name", wrong_kernels.BUGS)
def test_profile_finds_the_kernels_that_gradcheck_finds(name: str) -> None:
    """That gradcheck calls each of them wrong is its own test's subject: tests/measure/gradcheck/test_run.py."""
    assert seen_by_profile(name) is (name not in GRADCHECK_ALONE)


@pytest.mark.parametrize(
    "name", [*wrong_kernels.RIGHT, *wrong_kernels.RIGHT_BUT_ROUNDED_OTHERWISE, *wrong_kernels.LESS_ACCURATE]
)
def test_what_is_right_for_gradchecks_values_is_right_for_profile(name: str) -> None:
    assert not seen_by_profile(name)


def test_the_names_are_all_wrong_kernels() -> None:
    assert set(wrong_kernels.BUGS) > GRADCHECK_ALONE
