"""The arithmetic of batch norm's definition, which a kernel's own may exceed."""

from __future__ import annotations

from bncli.measure.reference import case as cases
from bncli.results.profile import Case, Direction

# An element's operations (an addition, a multiplication, a comparison, an exponential or a division: 1 each).
STATISTICS = 4  # the sum; the deviation from the mean, its square, their sum
NORMALIZE = 2  # the deviation, over the standard deviation
AFFINE = 2  # times weight, plus bias
SUMS = 3  # dbias: a sum; dweight: a product with xhat and a sum
GRADIENT = {True: 5, False: 1}  # dy - dbias / m - xhat dweight / m, times weight / deviation; evaluation: that alone
ACTIVATION = {None: 0, "relu": 1, "leaky_relu": 2, "silu": 4}  # silu: exp(-z), 1 + it, z over it, and a sign
DERIVATIVE = {None: 0, "relu": 1, "leaky_relu": 2, "silu": 9}  # silu: the sigmoid (4), s (1 + z (1 - s)), times dy


def flops(case: Case, direction: Direction) -> float:
    """Of one call: what each element takes; what a channel takes once is left out. Backward computes xhat anew."""
    added, activation = cases.OPERATIONS[case.operation]
    affine = AFFINE if case.affine != "none" else 0
    forward = (STATISTICS if case.training else 0) + NORMALIZE + affine + added + ACTIVATION[activation]
    sums = SUMS if case.training or affine else 0
    backward = NORMALIZE + sums + GRADIENT[case.training] + DERIVATIVE[activation]
    each = {"forward": forward, "backward": backward, "both": forward + backward}[direction]
    return float(each * case.elements)
