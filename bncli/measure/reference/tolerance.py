"""Tolerances of a kernel's errors: rounding errors, or twice the error of the native kernel.

The floor of a quantity is the change of its float64 definition when every intermediate value changes by one rounding. A
kernel that adds its m terms in a tree has an error of about log2(m) such changes; a sequential sum has about sqrt(m),
with a probability that grows fast with the factor before it (Higham & Mary 2019, theorem 2.4), and is just as correct.
bncli's kernels and modules must meet the bound of tree sums, torch's operator and user functions that of sequential
sums.
"""

from __future__ import annotations

import functools
import hashlib
import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from bncli.engine.device import cpu_threads
from bncli.kernels.definition import definition
from bncli.kernels.layout import over_channels, per_channel
from bncli.measure.reference.candidate import NATIVE, Rule
from bncli.measure.reference.case import CPU, Case, Inputs, generator, unit_roundoff
from bncli.measure.reference.observe import observe
from bncli.names import NORMS

PERTURBATIONS = 6
REMEMBERED = 512  # cases, of some 100 KiB each
SHIFTS = 4  # roundings of a mean about a value of x: of the differences, their sum's start, and the value added again
FEWEST_VALUES = 512  # of a channel of a large case, that are perturbed
ROUNDINGS = 4  # of each number on its way, besides those of the sums
# Of an algorithm that is not known: torch's differs between devices, and its group norm sums g x without centering.
ROUNDINGS_ANY = 32
INTERMEDIATE = 3  # roundings to half precision between an unfused norm, addition and activation

Values = dict[str, Tensor]


# --- what results are held to -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Expected:
    """The exact results of a case in float64, and how much rounding changes them; the same for every kernel."""

    case: Case
    truth: Values
    moved: Values  # by one rounding in the working dtype of every number on the way
    rounded: Values  # by one rounding in the dtype of x, where that is narrower; else empty
    kept: dict[str, torch.dtype]  # the dtype that a quantity is stored in
    shift: Tensor | None  # (C), one rounding of the largest value of x, in running_mean: of a sum about a value of x
    half_vectors: bool  # weight and bias narrower than the working dtype, where torch folds them with the mean

    def floors(self, rule: Rule, truncates: bool = False) -> Values:
        """The error that rounding alone explains, for each element of each quantity, in float64.

        kernel, module: sums are taken in a tree. The others may add m terms one after the other, an error as sqrt(m);
        native also differentiates twice in the tensors' own dtype. truncates: for Triton's interpreter, which cuts a
        float32 to a bfloat16 where the device rounds it, an error of two roundings.
        """
        case, native = self.case, rule == "native"
        working, stored = unit_roundoff(case.working), unit_roundoff(case.stored)
        tree = math.log2(max(case.m, 1)) + ROUNDINGS
        sums = tree if rule in ("kernel", "module") else math.sqrt(case.m) + ROUNDINGS_ANY
        # torch's group norm of channels_last inputs: 8 times the error in bfloat16 that it has in float16
        group_norm_in_half = native and case.norm != "batch" and case.layout == "channels_last"
        found = {}
        for name, exact in self.truth.items():
            kept, second = self.kept[name], name.startswith("double")
            stored_by = unit_roundoff(kept) * (2 if truncates and kept == torch.bfloat16 else 1)
            floor = sums * (self.moved[name] + working * largest(exact)) + stored_by * exact.abs()
            if name == "running_mean" and self.shift is not None:
                floor = floor + SHIFTS * self.shift
            follows = case.fusion != "plain" and not name.startswith("running")
            in_half = self.half_vectors or second or (group_norm_in_half and name == "dweight")
            if self.rounded and rule not in ("kernel", "module") and (follows or (native and in_half)):
                many = 4 * sums if native and second else INTERMEDIATE  # torch stays in half precision
                floor = floor + many * (self.rounded[name] + stored * largest(exact))
            found[name] = floor + max(torch.finfo(kept).smallest_normal * unit_roundoff(kept), SMALLEST)
        return found


SMALLEST = torch.finfo(torch.float64).smallest_normal  # keeps 0 / 0 out of a channel that an activation cuts off


@dataclass(frozen=True)
class _Question:
    """A case and its inputs as a cache key: the inputs are compared by a digest of their bytes."""

    case: Case
    second: bool
    digest: bytes
    given: Inputs = field(compare=False, repr=False)


def _question(case: Case, given: Inputs, second: bool) -> _Question:
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in vars(given).items():
        if tensor is not None:
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return _Question(case, second, digest.digest(), given)


def expected(case: Case, given: Inputs, second: bool = True) -> Expected:
    """The expected results for these inputs, in float64 on the CPU; cached.

    second: with the second derivative.
    """
    return _expected(_question(case, given, second))


@functools.lru_cache(maxsize=REMEMBERED)
def _expected(question: _Question) -> Expected:
    return computed(question.case, question.given, question.second, CPU)


def native_results(case: Case, given: Inputs, second: bool = True) -> Values:
    """The results of torch's kernel for these inputs in their dtype on their device, as float64; cached."""
    places = tuple((t.device, t.stride()) for t in vars(given).values() if t is not None)
    return _native_results(_question(case, given, second), places)


@functools.lru_cache(maxsize=REMEMBERED)
def _native_results(question: _Question, places: tuple[object, ...]) -> Values:
    seen = observe(NATIVE, question.case, question.given, question.second).wide()
    return {name: value.clone() for name, value in seen.items()}  # dresidual may be g, which a kernel may write to


@cpu_threads(1)  # many short operators, which thread synchronization would slow down
def computed(case: Case, given: Inputs, second: bool, device: torch.device, most: int | None = None) -> Expected:
    """`expected` on a device, not cached. most: elements of x that are perturbed, a sample of every channel."""
    wide = given.wide(device)
    truth = observe(definition(case.norm), case, wide, second).wide(device)
    draw = generator(case.identifier + "/rounding", device)
    sampled, values = (case, wide) if most is None else _sampled(case, wide, most, truth["forward"])
    exact = truth if values is wide else observe(definition(case.norm), sampled, values, second).wide(device)

    def moves(by: float, still: tuple[str, ...] = ()) -> Values:
        found = _moves(sampled, values, exact, by, draw, second, still)
        grow = math.sqrt(case.m / sampled.m)  # of the error of a sum of m terms
        found = {name: t * grow if name in ("dweight", "dbias") else t for name, t in found.items()}
        return found if values is wide else {name: _like(t, truth[name]) for name, t in found.items()}

    moved = moves(unit_roundoff(case.working))
    rounded = moves(unit_roundoff(case.stored), ("x",)) if case.stored != case.working else {}
    kept = {name: _kept_in(name, given) for name in truth}
    shift = case.momentum * unit_roundoff(case.working) * largest(wide.x).flatten() if "running_mean" in truth else None
    half_vectors = given.weight is not None and given.weight.dtype != case.working
    return Expected(case, truth, moved, rounded, kept, shift, half_vectors)


def _sampled(case: Case, wide: Inputs, most: int, y: Tensor) -> tuple[Case, Inputs]:
    """Some values of every channel, as a batch of vectors: up to `most` in all, and at least FEWEST_VALUES per channel.

    They are spread evenly, but for that of the largest output: where an activation cuts off nearly all of a channel,
    the others are 0 however much they are perturbed.
    """
    count = max(FEWEST_VALUES, most // case.shape[1])
    if not NORMS[case.norm].over_batch or count >= case.m:
        return case, wide
    by_channel = y.transpose(0, 1).flatten(1)
    even = torch.linspace(0, case.m - 1, count - 1, dtype=torch.float64, device=y.device).round().long()
    places = torch.cat([even.expand(len(by_channel), -1), by_channel.abs().argmax(1, keepdim=True)], 1)

    def chosen(t: Tensor) -> Tensor:
        return t if t.dim() == 1 else t.transpose(0, 1).flatten(1).gather(1, places).t().contiguous()

    return replace(case, shape=(count, case.shape[1])), wide.each(chosen)


def _like(moved: Tensor, exact: Tensor) -> Tensor:
    """A value per channel, (C) or (1, C), reshaped to the dimensions of the exact values."""
    return moved if exact.dim() < 2 else per_channel(moved.flatten(), exact)


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


def _moves(
    case: Case,
    wide: Inputs,
    truth: Values,
    by: float,
    draw: torch.Generator,
    second: bool,
    still: tuple[str, ...] = (),
) -> Values:
    """Root-mean-square change of each channel when all values are perturbed by a relative N(0, by^2).

    All inputs except `still`, and all intermediates and their gradients, are perturbed (Parker 1997, Monte Carlo
    arithmetic), so that cancellation inside the algorithm counts as well as the condition of the result.
    """

    step = max(by, 2.0**-24)  # float64 itself must not round the step away
    directions = () if second else ("v", "v_weight", "v_bias")

    def noise(tensor: Tensor) -> Tensor:
        # Drawn in float32, which takes a fifth of the time.
        drawn = torch.randn(tensor.shape, generator=draw, device=draw.device)
        return drawn.to(torch.float64).mul_(step)

    def rounding(tensor: Tensor) -> Tensor:
        """Perturb the value and its gradient independently: a consistent change would preserve exact cancellations."""
        value, gradient = noise(tensor), noise(tensor)
        return tensor * (1 + gradient) + (tensor * (value - gradient)).detach()

    total = {name: torch.zeros((), device=draw.device) for name in truth}
    for _ in range(PERTURBATIONS):
        inputs = {
            name: rounding(tensor)
            for name, tensor in vars(wide).items()
            if tensor is not None and name not in ("smooth", *directions, *still)
        }
        moved = observe(definition(case.norm, rounding), case, replace(wide, **inputs), second).wide(draw.device)
        total = {name: total[name] + largest(moved[name] - exact).square() for name, exact in truth.items()}
    return {name: (value / PERTURBATIONS).sqrt() * (by / step) for name, value in total.items()}


def largest(values: Tensor) -> Tensor:
    """The largest finite magnitude per channel, (1, C, 1, ...); for a vector (C), its magnitudes."""
    finite = torch.nan_to_num(values, 0.0, 0.0, 0.0).abs()
    if values.dim() < 2 or not values.numel():
        return finite
    return finite.amax(over_channels(values), keepdim=True)


def in_floors(found: Tensor, exact: Tensor, floor: Tensor) -> float:
    """The largest error in units of its floor; infinite where only one of the two is finite.

    NaN and infinity count as equal, since which of them a sum gives depends on its order.
    """
    if not found.numel():
        return 0.0
    error = torch.nan_to_num((found - exact).abs() / floor, math.inf, math.inf)
    return float(torch.where(found.isfinite() | exact.isfinite(), error, 0.0).max())


def in_tolerances(found: Tensor, exact: Tensor, floor: Tensor, native: Tensor | None) -> tuple[float, float | None]:
    """The error in units of the tolerance, and relative to the native kernel's error if that is known and not 0.

    The tolerance is the floor, or twice the native kernel's error where that is larger. That error is taken in floors.
    For tensors like y it is limited to its maximum in the channel: where native cancels, its error is many floors of a
    small value, which must not apply to the others.
    """
    error = in_floors(found, exact, floor)
    of_native = in_floors(native, exact, floor) if native is not None else 0.0
    if native is None or not 0 < of_native < math.inf:
        return error, None
    times = error / of_native
    if of_native > 0.5:
        allowed = 2 * of_native * floor
        if exact.dim() > 1:
            allowed = torch.minimum(allowed, 2 * largest(native - exact))
        error = in_floors(found, exact, torch.maximum(floor, allowed))
    return error, times
