"""Rounds that a case has time for, and every mistake in what is asked for, each with its argument."""

from __future__ import annotations

import pytest

from bncli.errors import UsageError
from bncli.measure.profile.budget import MOST_ROUNDS, Asked, Budget, planned
from bncli.measure.timing import clock
from bncli.measure.timing.clock import Deadline


def test_all_mistakes_are_found_at_once_each_with_its_argument() -> None:
    asked = Asked(operations=("bn", "relu"), dtypes=("fp8",), layouts=("nhwc",), shapes=(((1, 8), 1), ((2, 8), 1)))
    with pytest.raises(UsageError) as refused:
        planned(asked)
    assert [(error.field, error.value) for error in refused.value.errors] == [
        ("operations", "relu"), ("dtypes", "fp8"), ("layouts", "nhwc"), ("shape", "1x8"),
    ]  # fmt: skip
    assert str(refused.value).startswith("operations relu: expected some of bn, bn+relu")


def test_one_value_a_channel_is_fine_in_evaluation() -> None:
    assert len(planned(Asked(operations=("bn",), shapes=(((1, 8), 1),), training=False))) == 1


def test_a_case_has_as_many_rounds_as_fit_in_its_share_between_the_fewest_and_the_most() -> None:
    now = [0.0]
    budget = Budget(Deadline(100.0, lambda: now[0]), 0.5, 6, lambda: now[0])
    apart = min(clock.FEWEST_ROUNDS, 6)
    assert budget.rounds(1.0) == (20, 20)  # 50 s, and a round by itself takes half as long again
    assert budget.rounds(0.0) == budget.rounds(1e-6) == (MOST_ROUNDS, MOST_ROUNDS)
    assert budget.rounds(30.0) == (6, apart)
    now[0] = 10.0
    assert budget.rounds(1.0) == (16, 16)
    assert budget.least_s(2.0) == 10.0 + (6 + 1.5 * apart) * 2.0
