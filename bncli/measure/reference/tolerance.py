"""How large an error may be: derived from roundings, or twice the native kernel's own.

The floor of a quantity is what its definition in float64 moves by when every number on the way moves by one rounding. A
kernel that adds its m terms in a tree loses about log2(m) such moves; one that adds them one after the other about
sqrt(m), with a probability that grows fast with the factor before it (Higham & Mary 2019, theorem 2.4), and is no less
right. bncli's own kernels are held to the tree, torch's operator and the user's functions to any order.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from bncli.kernels.definition import definition
from bncli.kernels.layout import over_channels
from bncli.measure.reference.gradient_cases import DTYPES, Case, Inputs, generator, unit_roundoff
from bncli.measure.reference.quantities import observe

PERTURBATIONS = 6
ROUNDINGS = 4  # of each number on its way, besides those of the sums
ROUNDINGS_ANY = (
    32  # of an algorithm that is not known: torch's differs between devices, its group norm sums g x uncentred
)
INTERMEDIATE = 3  # roundings to half precision between an unfused norm, addition and activation

_OWN = "what float64 moves by when every number on the way moves by one rounding, plus the output's own rounding"
WORDS = (
    f"the larger of twice native's own error in the dtype and (log2 m + {ROUNDINGS}) times {_OWN}; {INTERMEDIATE} half-"
    "precision roundings more where a residual or an activation follows"
)
WORDS_NATIVE = (
    f"(sqrt m + {ROUNDINGS_ANY}) times {_OWN}; {INTERMEDIATE} half-precision roundings more where a residual or an "
    "activation follows, in the second derivative, which torch computes in the dtype itself, and in dweight of "
    "channels_last inputs to its group norm"
)
WORDS_USER = (
    f"the larger of twice native's own error in the dtype and (sqrt m + {ROUNDINGS_ANY}) times {_OWN}, so that "
    f"sums may be taken in any order; {INTERMEDIATE} half-precision roundings more where a residual or an activation "
    "follows"
)

Values = dict[str, Tensor]


def reference(case: Case, given: Inputs) -> Values:
    """Every quantity of the case by the definition, in float64 on the CPU from the same, rounded inputs."""
    return observe(definition(case.norm), case, given.wide()).wide()


def floors(
    case: Case,
    given: Inputs,
    truth: Values,
    native: bool = False,
    truncates: bool = False,
    any_order: bool = False,
) -> Values:
    """The error that rounding alone explains, for each element of each quantity, in float64.

    any_order: m terms may be added one after the other, an error as sqrt(m). native: for torch's own operator, which
    may do so and differentiates twice in the tensors' own dtype. truncates: for Triton's interpreter, which cuts a
    float32 to a bfloat16 where the device rounds it, an error of two roundings.
    """
    stored = DTYPES[case.dtype]
    working = torch.promote_types(stored, torch.float32)
    draw = generator(case.identifier + "/rounding")
    wide = given.wide()
    moved = _moves(case, wide, truth, unit_roundoff(working), draw)
    half_vectors = given.weight is not None and given.weight.dtype != working  # where torch folds them with the mean
    composed = stored != working and (case.fusion != "plain" or native)
    # torch's group norm of channels_last inputs: 8 times the error in bfloat16 that it has in float16
    group_norm_in_half = native and case.norm != "batch" and case.layout == "channels_last"
    rounded = _moves(case, wide, truth, unit_roundoff(stored), draw, ("x",)) if composed else {}
    sequential = native or any_order
    sums = math.sqrt(case.m) + ROUNDINGS_ANY if sequential else math.log2(max(case.m, 1)) + ROUNDINGS
    found = {}
    for name, exact in truth.items():
        kept = _kept_in(name, given)
        stored_by = unit_roundoff(kept) * (2 if truncates and kept == torch.bfloat16 else 1)
        floor = sums * (moved[name] + unit_roundoff(working) * largest(exact)) + stored_by * exact.abs()
        in_half = group_norm_in_half and name == "dweight"
        if composed and (case.fusion != "plain" or half_vectors or in_half or name.startswith("double")):
            many = 4 * sums if native and name.startswith("double") else INTERMEDIATE  # torch stays in half precision
            floor = floor + many * (rounded[name] + unit_roundoff(stored) * largest(exact))
        found[name] = floor + max(torch.finfo(kept).smallest_normal * unit_roundoff(kept), SMALLEST)
    return found


def _kept_in(quantity: str, given: Inputs) -> torch.dtype:
    """The dtype that a quantity is stored in."""
    like = {
        "dweight": given.weight,
        "dbias": given.bias,
        "double backward in weight": given.weight,
        "running_mean": given.running_mean,
        "running_var": given.running_var,
    }.get(quantity, given.x)
    assert like is not None
    return like.dtype


SMALLEST = torch.finfo(torch.float64).smallest_normal  # keeps 0 / 0 out of a channel that an activation cuts off


def _moves(
    case: Case, wide: Inputs, truth: Values, by: float, draw: torch.Generator, still: tuple[str, ...] = ()
) -> Values:
    """How far each channel moves, root mean square over perturbations, when all numbers move by a relative N(0, by^2).

    All inputs but those that stand still, and all intermediates with their gradients (Parker 1997, Monte Carlo
    arithmetic): the cancellation inside an algorithm counts as much as the condition of its result.
    """

    step = max(by, 2.0**-24)  # float64 itself must not round the step away

    def noise(tensor: Tensor) -> Tensor:
        return step * torch.randn(tensor.shape, generator=draw, dtype=torch.float64)

    def rounding(tensor: Tensor) -> Tensor:
        """The number and its gradient move apart: a consistent function would keep its cancellations exact."""
        value, gradient = noise(tensor), noise(tensor)
        return tensor * (1 + gradient) + (tensor * (value - gradient)).detach()

    total = {name: torch.zeros(()) for name in truth}
    for _ in range(PERTURBATIONS):
        inputs = {
            name: rounding(tensor)
            for name, tensor in vars(wide).items()
            if tensor is not None and name != "smooth" and name not in still
        }
        moved = observe(definition(case.norm, rounding), case, replace(wide, **inputs)).wide()
        total = {name: total[name] + largest(moved[name] - exact).square() for name, exact in truth.items()}
    return {name: (value / PERTURBATIONS).sqrt() * (by / step) for name, value in total.items()}


def largest(values: Tensor) -> Tensor:
    """The largest finite magnitude in each channel, (1, C, 1, ...); of a vector (C), its own."""
    finite = torch.nan_to_num(values, 0.0, 0.0, 0.0).abs()
    if values.dim() < 2 or not values.numel():
        return finite
    return finite.amax(over_channels(values), keepdim=True)


def in_floors(found: Tensor, exact: Tensor, floor: Tensor) -> float:
    """The largest error in units of its floor; infinite where one of the two is a number and the other is not.

    Where neither is a number, NaN and infinity count as the same: which of them a sum gives depends on its order.
    """
    if not found.numel():
        return 0.0
    error = torch.nan_to_num((found - exact).abs() / floor, math.inf, math.inf)
    return float(torch.where(found.isfinite() | exact.isfinite(), error, 0.0).max())


def in_tolerances(found: Tensor, exact: Tensor, floor: Tensor, native: Tensor | None) -> float:
    """The error in units of the tolerance: the floor, or twice the native kernel's error where that is larger."""
    own = in_floors(native, exact, floor) if native is not None else 0.0
    return in_floors(found, exact, floor) / max(1.0, 2 * own if math.isfinite(own) else 1.0)


def of_native(found: Tensor, exact: Tensor, floor: Tensor, native: Tensor | None) -> float:
    """The error over the native kernel's own; NaN where that is not known or none."""
    own = in_floors(native, exact, floor) if native is not None else 0.0
    return in_floors(found, exact, floor) / own if own > 0 else math.nan
