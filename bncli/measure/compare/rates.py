"""Search for the largest learning rate at which an arm trains: the rates to try, and what their runs say. No torch.

Rates are start * factor^k. The search begins with a rate that trains, the start or one around it, since the start can
be too large, or too small for the budget; it climbs by about a factor of 2 until a rate fails, then halves the distance
in k between the two. Far above the largest usable rate a run can look trained again: a rate counts as found only where
rates down to half of it train too, and where one of them fails the search goes on below that one. Where none trains
there, down to an eighth of it, these are too small for the budget and the first one stands.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from bncli.recipe.overrides import value_at
from bncli.recipe.sections import LargestLearningRate
from bncli.results.compare import RATE, ComparisonPlan
from bncli.results.train import RunResult

DOUBLINGS_AROUND = 10  # of the start, in either direction, for a first rate that trains
MOST_DOUBLINGS = 20  # above the start
DOUBLINGS_BELOW = 3  # a rate that fails: without one that trains there the rate was too small, not too large
USUAL_RUNS = 9  # of a search, for the number of planned runs
ResultOf = Callable[[float], RunResult | None]  # of the run at a rate; None where there is none


class UnknownOutcome(Exception):
    """A rate of the search has no run, or its run does not say whether it trained."""


@dataclass(frozen=True)
class Found:
    """The largest rate that trains and the next one, which fails; None where the search has found none so far away."""

    trains: float | None
    fails: float | None


def search(plan: ComparisonPlan, arm: str, point: Mapping[str, Any], result_of: ResultOf) -> Found:
    """The largest learning rate of an arm, from its runs at each rate. `point`: of the grid; its rate is the start.

    Raises UnknownOutcome at the first run that is missing.
    """
    asked = LargestLearningRate.model_validate(plan.largest_learning_rate)
    start = point.get(RATE, value_at(plan.recipes, (arm, *RATE.split("."))))

    def rate(k: int) -> float:
        return float(f"{start * asked.factor**k:.6g}")

    def trains(k: int) -> bool:
        result = result_of(rate(k))
        found = None if result is None else trained(result, asked.accuracy)
        if found is None:
            raise UnknownOutcome
        return found

    stride = max(1, round(math.log(2, asked.factor)))
    below = sorted({1, stride // 2, stride} - {0})
    around = (sign * doublings * stride for doublings in range(DOUBLINGS_AROUND + 1) for sign in (-1, 1))
    low = next((k for k in around if trains(k)), None)
    if low is None:
        return Found(None, rate(0))
    while trains(low + stride):
        low += stride
        if low > MOST_DOUBLINGS * stride:
            return Found(rate(low), None)
    found = Found(rate(low), rate(low + stride))
    while low is not None:
        high = low + stride
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if trains(middle) else (low, middle)
        found = Found(rate(low), rate(high))
        hole = next((low - factors for factors in below if not trains(low - factors)), None)
        if hole is None:
            return found
        low = next((k for n in range(1, DOUBLINGS_BELOW + 1) if trains(k := hole - n * stride)), None)
    return found


def trained(result: RunResult, accuracy: float | None) -> bool | None:
    """Whether a run ended with a finite loss and at least that held-out accuracy.

    Without an accuracy it has to be above that of the best constant guess. None where that is not known, and for a run
    that was interrupted.
    """
    if result.status == "interrupted" or not result.evaluations:
        return None
    last = result.evaluations[-1]
    if result.status == "diverged" or not math.isfinite(last.loss):
        return False
    if accuracy is not None:
        return last.accuracy >= accuracy
    return None if result.constant_guess is None else last.accuracy > result.constant_guess
