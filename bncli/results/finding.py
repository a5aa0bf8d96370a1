"""Judgement of one result of a kernel: right, a wrong number at a place, or no result."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

FindingKind = Literal[
    "right",
    "off",  # a wrong number
    "nan_missing",  # a number where the reference has NaN
    "nan_unexpected",  # NaN or infinity where the reference has a number
    "not_zero",  # gradients of an empty batch
    # no result that could be compared
    "wrong_type",  # of what a kernel returns
    "wrong_shape",
    "wrong_dtype",
    "wrong_device",
    "not_computed",
    "no_gradient",  # of a weight or a bias, where x needs none
    # the kernel raised, or autograd did: `exception` and `text` are its own words
    "raised",
    "no_memory",  # the machine has no room for the case
    "leaf_written",  # autograd's words on an input that is written to
    "saved_written",  # autograd's words on a tensor saved for the backward pass, by its version counter
    "no_graph",  # autograd's words on an output, or gradients, that do not require a gradient
    "no_second_derivative",  # gradients without a graph, under create_graph=True
    "not_derivative",  # torch.autograd.gradcheck's words; or central differences of the loss
    "wrong_exception",  # where a ValueError belongs
    "accepted",  # where a ValueError belongs
    # what a call may not change
    "input_written",
    "running_moved",  # by an evaluation
    "running_moved_by_nothing",  # by an empty batch
    "not_deterministic",  # other bits in a second run
]


@dataclass(frozen=True)
class Finding:
    """One result, judged. `error` is in units of its tolerance: up to 1 passes."""

    kind: FindingKind
    quantity: str = ""  # dx, double backward in x, the sum of dx; empty for a call as a whole
    error: float = math.inf
    at: tuple[int, ...] | None = None  # where the error is largest
    found: float | None = None
    expected: float | None = None
    allowed: float | None = None  # an absolute error, where a sum of elements is judged
    relative: float | None = None  # l2 error over the l2 norm; of a variance, the largest over its channels
    of_native: float | None = None  # the error over native's own in the same dtype
    names: tuple[str, ...] = ()  # the inputs, running statistics or results that are concerned
    given: str | None = None  # the type, shape, dtype or device
    wanted: str | None = None  # in its place
    exception: str | None = None
    text: str | None = None

    @property
    def failed(self) -> bool:
        return not self.error <= 1
