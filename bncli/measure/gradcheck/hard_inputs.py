"""Numerically hard inputs: large means, constant channels, NaN, odd strides, missing vectors, an empty batch.

Most are compared with the definition like any case; large means, values of 1e30, one value per channel and an empty
batch have special rules.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from bncli.kernels.layout import over_channels, per_channel
from bncli.measure.gradcheck.invariants import grouped, judge
from bncli.measure.gradcheck.invariants import run as observed
from bncli.measure.reference import tolerance as tolerances
from bncli.measure.reference.case import Case, Inputs, arguments, away_from_the_kink, divisible, unit_roundoff
from bncli.measure.reference.judge import Check, CheckContext, CheckGroupPlan, Outcome, compare, difference, single
from bncli.measure.reference.observe import GRADIENTS, RUNNING, finding_of, observe
from bncli.names import NORMS
from bncli.results.finding import Finding

Change = Callable[[Tensor], Tensor | None]
Judge = Callable[[CheckContext, Case, Inputs], Finding]
Variances = dict[str, Tensor]  # each (C)
BOTH = ("train", "eval")
HALF = ("float16", "bfloat16")


@dataclass(frozen=True)
class Input:
    """A hard input: the changes to the tensors of a plain case, and the end of the case's identifier."""

    name: str
    changes: Mapping[str, Change] = field(default_factory=dict)  # by name of the tensor
    modes: tuple[str, ...] = ("train",)
    dtypes: tuple[str, ...] = ("float32",)
    fusion: str = "plain"
    eps: float = 1e-3
    layout: str = "contiguous"
    affine: str = "wide"

    def case(self, mode: str, dtype: str, channels: int = 3) -> Case:
        """The plain case."""
        shape = (4, channels, 5, 7)
        return Case(mode, dtype, self.layout, shape, self.fusion, self.eps, affine=self.affine)

    def of(self, given: Inputs) -> Inputs:
        """The plain case's inputs, changed."""
        tensors = {name: getattr(given, name) for name in self.changes}
        changed: dict[str, Any] = {name: self.changes[name](t) for name, t in tensors.items() if t is not None}
        return replace(given, **changed)


def precisely(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The change computed in float64 on the CPU, and rounded back."""
    return lambda x: change(x.cpu().double()).to(x)


def far_from_zero(ratio: float) -> Callable[[Tensor], Tensor]:
    """Every channel gets deviation 1 and mean `ratio`."""

    @precisely
    def change(x: Tensor) -> Tensor:
        over = over_channels(x)
        centred = x - x.mean(over, keepdim=True)
        return centred / centred.square().mean(over, keepdim=True).sqrt() + ratio

    return change


@precisely
def constant_channel(x: Tensor) -> Tensor:
    x = x.clone()
    x[:, 1] = 1.37
    return x


def scaled(by: float) -> Change:
    return precisely(lambda x: x * by)


def between(low: float, high: float) -> Change:
    """Values spread evenly over [low, high], in the order of the original values."""

    @precisely
    def change(x: Tensor) -> Tensor:
        places = x.flatten().argsort().argsort().reshape(x.shape).double()
        return low + (high - low) * places / (x.numel() - 1)

    return change


def transposed(tensor: Tensor) -> Tensor:
    """The same values, with the last dimension outermost in memory."""
    return tensor.movedim(-1, 0).contiguous().movedim(0, -1)


def stepped(tensor: Tensor) -> Tensor:
    """The same values, at every second position of a larger tensor."""
    wide = tensor.new_full([2 * size for size in tensor.shape], math.nan)
    part = wide[tuple(slice(None, None, 2) for _ in tensor.shape)]
    return part.copy_(tensor)


def channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


def like_the_first(*dims: int) -> Change:
    """A tensor broadcast along those dimensions (stride 0)."""
    return lambda t: t[tuple(slice(1) if d in dims else slice(None) for d in range(t.dim()))].expand(t.shape)


def missing(tensor: Tensor) -> None:
    return None


def one_value(value: float) -> Change:
    """Replace one value of one channel; the statistics of other channels stay finite."""

    def change(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor[1, 1, 0, 3] = value
        return tensor

    return change


def nan_before(fusion: str, name: str = "x", layout: str = "contiguous") -> Input:
    """A NaN at the input of an activation, whose derivative must be torch's."""
    of = fusion if name == "x" else f"{fusion}-in-{name}"
    words = f"nan+{of}" + ("-channels_last" if layout == "channels_last" else "")
    return Input(words, {name: one_value(math.nan)}, BOTH, fusion=fusion, layout=layout)


NOT_FINITE = "NaN and infinity do not spread"  # to another channel, or group of channels that are whitened together
WITHOUT_VECTORS = "no weight, no bias"
STRIDED_X, STRIDED_G = "x not contiguous", "upstream gradient not contiguous"
ROWS: dict[str, tuple[Input, ...]] = {
    "large mean over deviation": (
        *(Input(f"{ratio:g}", {"x": far_from_zero(ratio)}) for ratio in (1e2, 1e3, 1e4)),
        Input("100", {"x": far_from_zero(100.0)}, dtypes=HALF),
    ),
    "constant channel": (Input("one", {"x": constant_channel}, BOTH, ("float32", "bfloat16")),),
    "tiny values": (Input("1e-20", {"x": scaled(1e-20)}), Input("1e-4", {"x": scaled(1e-4)}, eps=1e-8)),
    "huge values": (Input("1e9", {"x": scaled(1e9)}, dtypes=("float32", "bfloat16")),),
    "squares past float16": (
        Input("300-1000", {"x": between(300.0, 1000.0)}, dtypes=("float16",)),
        Input("-60000-60000", {"x": between(-6e4, 6e4)}, dtypes=("float16",)),
    ),
    NOT_FINITE: (
        Input("nan", {"x": one_value(math.nan)}, BOTH),
        nan_before("relu"),
        nan_before("leaky_relu"),
        nan_before("relu+residual", "residual"),
        Input("inf", {"x": one_value(math.inf)}, BOTH),
        *(nan_before(fusion, "x", "channels_last") for fusion in ("relu", "leaky_relu", "silu")),
        nan_before("relu+residual", "residual", "channels_last"),
        *(
            nan_before(f"{activation}+residual", "residual", layout)
            for activation in ("leaky_relu", "silu")
            for layout in ("contiguous", "channels_last")
        ),
    ),
    STRIDED_X: (
        Input("transposed", {"x": transposed}, BOTH),
        Input("stepped", {"x": stepped}, BOTH),
        Input("stepped+residual", {"x": stepped, "residual": stepped}, fusion="relu+residual"),
        Input("broadcast", {"x": like_the_first(0), "g": like_the_first(0, 2, 3)}),
        Input("vectors", {"weight": stepped, "bias": stepped}),
    ),
    STRIDED_G: (
        Input("transposed", {"g": transposed}, BOTH),
        Input("expanded", {"g": like_the_first(1, 2, 3)}, BOTH),
        Input("channels_last-for-contiguous", {"g": channels_last}, BOTH),
        Input("contiguous-for-channels_last", {"g": Tensor.contiguous}, BOTH, layout="channels_last"),
    ),
    # Weight, bias and running statistics too, as after model.half().
    "half-precision x and vectors": (Input("all-half", modes=BOTH, dtypes=HALF, affine="same"),),
    WITHOUT_VECTORS: (
        Input("no-weight", {"weight": missing}, BOTH),
        Input("no-bias", {"bias": missing}),
        Input("neither", {"weight": missing, "bias": missing}, BOTH),
        Input("no-running-statistics", {"running_mean": missing, "running_var": missing}),
    ),
    "large eps": (Input("0.5", modes=BOTH, eps=0.5),),
}
PLAIN = Case("train", "float32", "contiguous", (4, 3, 5, 7))
FAR_FROM_ZERO = replace(PLAIN, shape=(8, 3, 16, 16), momentum=1.0)
ONE_VALUE: dict[str, tuple[int, ...]] = {"vectors": (), "images": (1, 1)}  # the positions of one example
FOR_ANY_NORM = ("constant channel", "tiny values", "huge values", "squares past float16", "large eps")


# --- as checks --------------------------------------------------------------------------------------------------------


def plans(context: CheckContext, refused: Collection[str]) -> Iterator[CheckGroupPlan]:
    """One row per kind of hard input."""
    norm, channels = NORMS[context.candidate.norm], divisible(3, context.candidate.norm)
    for row, members in ROWS.items():
        # A module has both vectors or none.
        if row in FOR_ANY_NORM or (norm.over_batch and (norm.has_kernels or row != WITHOUT_VECTORS)):
            chosen = members if context.effort != "quick" else members[:4]
            checks = [check for member in chosen for check in _checks(context, row, member, refused)]
            yield CheckGroupPlan("hard inputs", checks, "values and their NaN", {"": row})
    one_value = {f"one-value/{name}": replace(PLAIN, shape=(1, channels, *s)) for name, s in ONE_VALUE.items()}
    refusing = [_special(context, name, case, _one_value) for name, case in one_value.items()]
    refusal = CheckGroupPlan("hard inputs", refusing, "ValueError", {"": "one value per channel is refused"})
    if not norm.has_running_variance:
        yield from [refusal] if norm.over_batch else []
        return
    modes = BOTH if context.candidate.evaluates else BOTH[:1]
    empty = {f"empty/{mode}": replace(PLAIN, mode=mode, shape=(0, 3, 4, 4)) for mode in modes}
    variances = [
        _special(context, f"variance/{ratio:g}", FAR_FROM_ZERO, partial(_variance, ratio), ratio) for ratio in LIMITS
    ]
    huge = _special(context, "huge/1e30", PLAIN, _huge)
    unmoved = [_special(context, name, case, _empty) for name, case in empty.items()]
    yield CheckGroupPlan("hard inputs", variances, "variance", {"": "variance far from zero"})
    yield CheckGroupPlan("hard inputs", [huge], "overflowing variance", {"": "values of 1e30"})
    yield refusal
    yield CheckGroupPlan("hard inputs", unmoved, "empty", {"": "empty batch"})


def _checks(context: CheckContext, row: str, member: Input, refused: Collection[str]) -> Iterator[Check]:
    candidate, slug = context.candidate, row.replace(",", "").replace(" ", "-")
    for mode, dtype in product(member.modes, member.dtypes):
        case = member.case(mode, dtype, divisible(3, candidate.norm))
        offered = (candidate.fuses or member.fusion == "plain") and (candidate.evaluates or mode == "train")
        if offered and not case.needs & set(refused):
            run = partial(_worst_quantity, context, case, member)
            identifier = f"hard/{slug}/{member.name}/{mode}/{dtype}"
            yield Check("hard inputs", identifier, run, slug, case, variant=member.name)


def _worst_quantity(context: CheckContext, case: Case, member: Input) -> Outcome:
    case, given = context.fresh(case)
    given = member.of(given)
    if member.fusion != "plain":
        given = away_from_the_kink(given, case)
    # Second derivatives at such inputs are left out: the values section has them, and torch's own overflow here.
    outcome = compare(context, case, given, second=False)
    quantity, worst = max(outcome.findings.items(), key=lambda item: item[1].error)
    return Outcome({"": replace(worst, quantity=quantity)}, outcome.evidence)


def _special(context: CheckContext, name: str, case: Case, judge: Judge, parameter: float | None = None) -> Check:
    """A check with a special rule."""
    run = partial(single, context, case, judge)
    return Check("hard inputs", f"hard/{name}", run, name.partition("/")[0], parameter=parameter)


# --- the variance -----------------------------------------------------------------------------------------------------

LIMITS = {1e2: 1e-6, 1e3: 1e-6, 1e4: 5e-6}  # relative error of the float32 variance at mean / deviation


def _variance(ratio: float, context: CheckContext, case: Case, given: Inputs) -> Finding:
    """The worse of two variances that reveal the kernel's: running_var and the variance of y."""
    given = replace(given, x=far_from_zero(ratio)(given.x))
    seen = observe(context.candidate.call, case, given, second=False)
    if seen.problem:
        return seen.problem
    native = _variances(tolerances.native_results(case, given, second=False))
    exact, any_order = _exact_variances(given.wide(), case), context.candidate.rule == "own function"
    allowed = {"running_var": LIMITS[ratio], "the variance of y": 2 * LIMITS[ratio]}
    rounding = _rounding_of_variances(context, case, given, exact) if any_order else {}
    findings = []
    for name, value in _variances(seen.wide()).items():
        error, of_native = (value - exact[name]).abs(), (native[name] - exact[name]).abs()
        tolerance = allowed[name] * exact[name]
        if any_order:
            tolerance = torch.maximum(torch.maximum(tolerance, rounding[name]), 2 * of_native)
        known = context.candidate.rule != "native" and of_native.max() > 0
        findings.append(
            replace(
                judge(name, value, exact[name], tolerance),
                relative=float((error / exact[name]).nan_to_num(math.inf).max()),
                of_native=float(error.max() / of_native.max()) if known else None,
            )
        )
    return max(findings, key=attrgetter("error"))


def _rounding_of_variances(context: CheckContext, case: Case, given: Inputs, exact: Variances) -> Variances:
    """Rounding errors of the variance for sequential sums, and of the variance of y = s x + t with a large t."""
    floor = context.floors(tolerances.expected(case, given))["forward"]
    roundings = math.sqrt(case.m) * unit_roundoff(torch.float32)
    of_y = 2 * exact["the variance of y"].sqrt() * grouped(floor, "batch").mean(1)
    return {"running_var": roundings * exact["running_var"], "the variance of y": of_y}


def _variances(seen: dict[str, Tensor]) -> Variances:
    kept = {"running_var": seen["running_var"]} if "running_var" in seen else {}
    return {**kept, "the variance of y": seen["forward"].var([0, 2, 3], correction=0)}


def _exact_variances(given: Inputs, case: Case) -> Variances:
    """The correct variances for a momentum of 1."""
    assert given.weight is not None
    over = [0, 2, 3]
    var = given.x.var(over, correction=0)
    of_y = given.weight**2 * var / (var + case.eps)
    return {"running_var": given.x.var(over, correction=1), "the variance of y": of_y}


def _huge(context: CheckContext, case: Case, given: Inputs) -> Finding:
    """y is right, or the bias (infinite variance), or NaN (the variance overflows); other channels must be right."""
    x = given.x.clone()
    x[:, 1] *= 1e30
    found = observed(context, case, replace(given, x=x))
    y, exact, floor, bias = found.seen["forward"], found.truth["forward"], found.floors["forward"], found.given.bias
    assert bias is not None
    with_bias = per_channel(bias, y).expand_as(y)
    errors = [tolerances.in_floors(y[:, 1], right[:, 1], floor[:, 1]) for right in (exact, with_bias)]
    overflowed = 0.0 if y[:, 1].isnan().all() else min(errors)
    error = max(overflowed, *(tolerances.in_floors(y[:, c], exact[:, c], floor[:, c]) for c in (0, 2)))
    return Finding("right", "y", error) if error <= 1 else difference("y", y, exact, error)


# --- too few values ---------------------------------------------------------------------------------------------------


def _one_value(context: CheckContext, case: Case, given: Inputs) -> Finding:
    try:
        context.candidate.call(*arguments(case, given))
    except (Exception, SystemExit) as error:
        if isinstance(error, ValueError) or "got ValueError(" in str(error):  # the latter is torch.compile's
            return Finding("right", error=0.0)
        return replace(finding_of(error), kind="wrong_exception")
    return Finding("accepted", given=str(case.shape))


def _empty(context: CheckContext, case: Case, given: Inputs) -> Finding:
    seen = observe(context.candidate.call, case, given, second=False)
    if seen.problem:
        return seen.problem
    for name, value in seen.values.items():
        if name in GRADIENTS and not bool((value == 0).all()):
            return Finding("not_zero", name)
        if name in RUNNING and not torch.equal(value, getattr(given, name)):
            return Finding("running_moved_by_nothing", names=(name,))
    return Finding("right", error=0.0)
