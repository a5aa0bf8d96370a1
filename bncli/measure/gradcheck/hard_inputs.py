"""Inputs on which kernels break: most judged like any case, against the definition, some by a rule of their own."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bncli.kernels.layout import over_channels, per_channel
from bncli.measure.gradcheck.invariants import grouped, judge
from bncli.measure.reference import tolerance as tolerances
from bncli.measure.reference.candidate import KernelFailed, native_in_the_same_dtype
from bncli.measure.reference.case import Case, Inputs, away_from_the_kink, unit_roundoff
from bncli.measure.reference.judge import Check, CheckContext, CheckGroupPlan, Outcome, compare, difference
from bncli.measure.reference.observe import GRADIENTS, RUNNING, finding_of, observe, unlike
from bncli.results.finding import Finding

Change = Callable[[Inputs, Case], Inputs]
BOTH = ("train", "eval")
HALF = ("float16", "bfloat16")


@dataclass(frozen=True)
class Input:
    """One hard input: a plain case, the change that makes it hard, and what the case's identifier ends in."""

    name: str
    change: Change
    modes: tuple[str, ...] = ("train",)
    dtypes: tuple[str, ...] = ("float32",)
    shape: tuple[int, ...] = (4, 3, 5, 7)
    fusion: str = "plain"
    eps: float = 1e-3
    momentum: float = 0.3
    layout: str = "contiguous"


def given_x(change: Callable[[Tensor], Tensor]) -> Change:
    """Only x is changed, in float64 on the CPU, and rounded back."""
    return lambda given, case: replace(given, x=change(given.x.cpu().double()).to(given.x))


def far_from_zero(ratio: float) -> Change:
    """Every channel with deviation 1 and a mean of `ratio`."""

    def change(x: Tensor) -> Tensor:
        over = over_channels(x)
        centred = x - x.mean(over, keepdim=True)
        return centred / centred.square().mean(over, keepdim=True).sqrt() + ratio

    return given_x(change)


def constant_channel(x: Tensor) -> Tensor:
    x = x.clone()
    x[:, 1] = 1.37
    return x


def scaled(by: float) -> Change:
    return given_x(lambda x: x * by)


def between(low: float, high: float) -> Change:
    """Spread evenly over [low, high], in no order."""

    def change(x: Tensor) -> Tensor:
        places = x.flatten().argsort().argsort().reshape(x.shape).double()
        return low + (high - low) * places / (x.numel() - 1)

    return given_x(change)


# --- strides ----------------------------------------------------------------------------------------------------------


def transposed(tensor: Tensor) -> Tensor:
    """The same numbers, the last dimension outermost in memory."""
    return tensor.movedim(-1, 0).contiguous().movedim(0, -1)


def stepped(tensor: Tensor) -> Tensor:
    """The same numbers, every other place of a larger memory."""
    wide = tensor.new_full([2 * size for size in tensor.shape], math.nan)
    part = wide[tuple(slice(None, None, 2) for _ in tensor.shape)]
    return part.copy_(tensor)


def strides(x: Callable[[Tensor], Tensor] | None, g: Callable[[Tensor], Tensor] | None) -> Change:
    def change(given: Inputs, case: Case) -> Inputs:
        residual = given.residual
        if x is not None:
            given = replace(given, x=x(given.x), residual=None if residual is None else x(residual))
        return given if g is None else replace(given, g=g(given.g))

    return change


def last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


def broadcast(given: Inputs, case: Case) -> Inputs:
    """x with stride 0 over the examples, g with stride 0 over examples and positions."""
    return replace(given, x=given.x[:1].expand(case.shape), g=given.g[:1, :, :1, :1].expand(case.shape))


def broadcast_g(given: Inputs, case: Case) -> Inputs:
    return replace(given, g=given.g[:, :1, :1, :1].expand(case.shape))


def strided_vectors(given: Inputs, case: Case) -> Inputs:
    assert given.weight is not None
    assert given.bias is not None
    return replace(given, weight=stepped(given.weight), bias=stepped(given.bias))


def without(*names: str) -> Change:
    missing: dict[str, Any] = dict.fromkeys(names)
    return lambda given, case: replace(given, **missing)


def vectors_like_x(given: Inputs, case: Case) -> Inputs:
    """Weight, bias and running statistics in x's half precision, as after model.half()."""
    names = [name for name in ("weight", "bias", "running_mean", "running_var") if getattr(given, name) is not None]
    halved: dict[str, Any] = {name: getattr(given, name).to(given.x.dtype) for name in names}
    return replace(given, **halved)


def not_finite(value: float, name: str = "x") -> Change:
    """One value of one channel of x, or of the residual, whose other values then have statistics that are finite."""

    def change(given: Inputs, case: Case) -> Inputs:
        changed = getattr(given, name).clone()
        changed[1, 1, 0, 3] = value
        return replace(given, **{name: changed})

    return change


def nan_before(fusion: str, name: str = "x", layout: str = "contiguous") -> Input:
    """A NaN for the activation, whose derivative there is torch's too."""
    of = fusion if name == "x" else f"{fusion}-in-{name}"
    words = f"nan+{of}" + ("-channels_last" if layout == "channels_last" else "")
    return Input(words, not_finite(math.nan, name), modes=BOTH, fusion=fusion, layout=layout)


NOT_FINITE = "NaN and infinity stay in their channel"
STRIDED_X, STRIDED_G = "x not contiguous", "upstream gradient not contiguous"
ROWS: dict[str, tuple[Input, ...]] = {
    "large mean over deviation": (
        *(Input(f"{ratio:g}", far_from_zero(ratio)) for ratio in (1e2, 1e3, 1e4)),
        Input("100", far_from_zero(100.0), dtypes=HALF),
    ),
    "constant channel": (Input("one", given_x(constant_channel), dtypes=("float32", "bfloat16"), modes=BOTH),),
    "tiny values": (
        Input("1e-20", scaled(1e-20)),
        Input("1e-4", scaled(1e-4), eps=1e-8),
    ),
    "huge values": (Input("1e9", scaled(1e9), dtypes=("float32", "bfloat16")),),
    "squares past float16": (
        Input("300-1000", between(300.0, 1000.0), dtypes=("float16",)),
        Input("-60000-60000", between(-6e4, 6e4), dtypes=("float16",)),
    ),
    NOT_FINITE: (
        Input("nan", not_finite(math.nan), modes=BOTH),
        nan_before("relu"),
        nan_before("leaky_relu"),
        nan_before("relu+residual", "residual"),
        Input("inf", not_finite(math.inf), modes=BOTH),
        *(nan_before(fusion, "x", "channels_last") for fusion in ("relu", "leaky_relu", "silu")),
        *(
            nan_before(f"{activation}+residual", "residual", layout)
            for activation in ("relu", "leaky_relu", "silu")
            for layout in ("contiguous", "channels_last")
            if (activation, layout) != ("relu", "contiguous")
        ),
    ),
    STRIDED_X: (
        Input("transposed", strides(transposed, None), modes=BOTH),
        Input("stepped", strides(stepped, None), modes=BOTH),
        Input("stepped+residual", strides(stepped, None), fusion="relu+residual"),
        Input("broadcast", broadcast),
        Input("vectors", strided_vectors),
    ),
    STRIDED_G: (
        Input("transposed", strides(None, transposed), modes=BOTH),
        Input("expanded", broadcast_g, modes=BOTH),
        Input("channels_last-for-contiguous", strides(None, last), modes=BOTH),
        Input(
            "contiguous-for-channels_last", strides(None, torch.Tensor.contiguous), modes=BOTH, layout="channels_last"
        ),
    ),
    "half-precision x and vectors": (Input("all-half", vectors_like_x, modes=BOTH, dtypes=HALF),),
    "no weight, no bias": (
        Input("no-weight", without("weight"), modes=BOTH),
        Input("no-bias", without("bias")),
        Input("neither", without("weight", "bias"), modes=BOTH),
        Input("no-running-statistics", without("running_mean", "running_var")),
    ),
    "large eps": (Input("0.5", given_x(lambda x: x), eps=0.5, modes=BOTH),),
}
FOR_ANY_NORM = ("constant channel", "tiny values", "huge values", "squares past float16", "large eps")


# --- as checks --------------------------------------------------------------------------------------------------------


def plans(context: CheckContext, refused: Collection[str]) -> Iterator[CheckGroupPlan]:
    """A row for each kind of hard input."""
    batch = context.candidate.tracks
    for name, members in ROWS.items():
        if batch or name in FOR_ANY_NORM:
            chosen = members if context.effort != "quick" else members[:4]
            checks = [check for member in chosen for check in _checks(context, name, member, refused)]
            yield CheckGroupPlan("hard inputs", checks, "values and their NaN", row=name)
    if batch:
        variances = [_variance(context, ratio) for ratio in LIMITS]
        yield CheckGroupPlan("hard inputs", variances, "variance", row="variance far from zero")
        yield CheckGroupPlan("hard inputs", [_huge(context)], "overflowing variance", row="values of 1e30")
        refusing = [_one_value(context, shape) for shape in ((1, 3), (1, 3, 1, 1))]
        yield CheckGroupPlan("hard inputs", refusing, "ValueError", row="one value per channel is refused")
        empty = [_empty(context, mode) for mode in BOTH if mode == "train" or context.candidate.evaluates]
        yield CheckGroupPlan("hard inputs", empty, "empty", row="empty batch")


def _slug(row: str) -> str:
    return row.replace(",", "").replace(" ", "-")


def _checks(context: CheckContext, row: str, member: Input, refused: Collection[str]) -> Iterator[Check]:
    channels = 3 if context.candidate.tracks else 4
    shape = (member.shape[0], channels, *member.shape[2:])
    for mode in member.modes:
        for dtype in member.dtypes:
            fused = member.fusion != "plain" and not context.candidate.fuses
            if fused or (mode == "eval" and not context.candidate.evaluates):
                continue
            case = Case(mode, dtype, member.layout, shape, member.fusion, member.eps, member.momentum)
            if case.needs & set(refused):
                continue
            slug, run = _slug(row), _compared(context, case, member)
            identifier = f"hard/{slug}/{member.name}/{mode}/{dtype}"
            yield Check("hard inputs", identifier, run, slug, case, variant=member.name)


def _compared(context: CheckContext, case: Case, member: Input) -> Callable[[], Outcome]:
    """The worst of the case's quantities."""

    def run() -> Outcome:
        own, given = context.fresh(case)
        given = member.change(given, own)
        if member.fusion != "plain":
            given = away_from_the_kink(given, own)
        # Second derivatives at such inputs are left out: the values section has them, and torch's own overflow here.
        outcome = compare(context, own, given, second=False)
        quantity, worst = max(outcome.findings.items(), key=lambda item: item[1].error)
        return Outcome({"": replace(worst, quantity=quantity)}, outcome.evidence)

    return run


# --- the variance -----------------------------------------------------------------------------------------------------

LIMITS = {1e2: 1e-6, 1e3: 1e-6, 1e4: 5e-6}  # relative error of the float32 variance at mean / deviation


def _variance(context: CheckContext, ratio: float) -> Check:
    def run() -> Outcome:
        case, given = context.fresh(Case("train", "float32", "contiguous", (8, 3, 16, 16), momentum=1.0))
        given = far_from_zero(ratio)(given, case)
        seen = observe(context.candidate.call, case, given, second=False)
        return Outcome({"": seen.problem or _variance_error(context, case, given, seen.wide(), LIMITS[ratio])})

    return Check("hard inputs", f"hard/variance/{ratio:g}", run, "variance", parameter=ratio)


def _variance_error(context: CheckContext, case: Case, given: Inputs, seen: dict[str, Tensor], limit: float) -> Finding:
    native = observe(native_in_the_same_dtype(), case, given, second=False).wide()
    exact = _far_variances(given.wide(), case)
    allowed = {"running_var": limit * exact["running_var"], "the variance of y": 2 * limit * exact["the variance of y"]}
    if context.candidate.own:
        more = _more_for_the_user(context, case, given, exact)
        allowed = {name: torch.maximum(value, more[name]) for name, value in allowed.items()}
    findings = []
    for name, value in _measured(seen).items():
        own = (_measured(native)[name] - exact[name]).abs()
        error = (value - exact[name]).abs()
        tolerance = torch.maximum(allowed[name], 2 * own) if context.candidate.own else allowed[name]
        found = judge(name, value, exact[name], tolerance)
        relative = float((error / exact[name]).nan_to_num(math.inf).max())
        times = float(error.max() / own.max()) if not context.native and own.max() > 0 else None
        findings.append(replace(found, relative=relative, of_native=times))
    return max(findings, key=lambda finding: finding.error)


def _more_for_the_user(context: CheckContext, case: Case, given: Inputs, exact: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a sum in order moves the variance by; and y = s x + t, with t large, is right but moves that of y."""
    truth = tolerances.reference(case, given)
    floor = grouped(context.floors(case, given, truth)["forward"], "batch").mean(1)
    roundings = math.sqrt(case.m) * unit_roundoff(torch.float32)
    of_y = exact["the variance of y"]
    return {"running_var": roundings * exact["running_var"], "the variance of y": 2 * of_y.sqrt() * floor}


def _measured(seen: dict[str, Tensor]) -> dict[str, Tensor]:
    """The variances that a kernel gives away, (C): its running one, where it has one, and that of its output."""
    kept = {"running_var": seen["running_var"]} if "running_var" in seen else {}
    return {**kept, "the variance of y": seen["forward"].var([0, 2, 3], correction=0)}


def _far_variances(given: Inputs, case: Case) -> dict[str, Tensor]:
    """What they should be with a momentum of 1."""
    assert given.weight is not None
    over = [0, 2, 3]
    var = given.x.var(over, correction=0)
    expected = given.weight**2 * var / (var + case.eps)
    return {"running_var": given.x.var(over, correction=1), "the variance of y": expected}


def _huge(context: CheckContext) -> Check:
    """y is right, or the bias (an infinite variance), or NaN where the variance overflows; other channels as ever."""

    def run() -> Outcome:
        case, given = context.fresh(Case("train", "float32", "contiguous", (4, 3, 5, 7)))
        x = given.x.clone()
        x[:, 1] *= 1e30
        given = replace(given, x=x)
        truth = tolerances.reference(case, given)
        floors = context.floors(case, given, truth)
        seen = observe(context.candidate.call, case, given, second=False)
        if seen.problem:
            return Outcome({"": seen.problem})
        y, exact, floor = seen.wide()["forward"], truth["forward"], floors["forward"]
        assert given.bias is not None
        bias = per_channel(given.wide().bias, y).expand_as(y)  # type: ignore[arg-type]
        with_bias = [tolerances.in_floors(y[:, 1], other[:, 1], floor[:, 1]) for other in (exact, bias)]
        overflowed = 0.0 if y[:, 1].isnan().all() else min(with_bias)
        others = max(tolerances.in_floors(y[:, c], exact[:, c], floor[:, c]) for c in (0, 2))
        error = max(overflowed, others)
        return Outcome({"": Finding("right", "y", error) if error <= 1 else difference("y", y, exact, error)})

    return Check("hard inputs", "hard/huge/1e30", run, "huge")


# --- too few values ---------------------------------------------------------------------------------------------------


def _one_value(context: CheckContext, shape: tuple[int, ...]) -> Check:
    def run() -> Outcome:
        case, given = context.fresh(Case("train", "float32", "contiguous", shape))
        arguments = (given.x, given.running_mean, given.running_var, given.weight, given.bias, True, 0.1, case.eps)
        try:
            context.candidate.call(*arguments, None, None)
        except ValueError:
            return Outcome({"": Finding("right", error=0.0)})
        except KernelFailed as failed:
            return Outcome({"": failed.finding})
        except (Exception, SystemExit) as error:
            return Outcome({"": replace(finding_of(error), kind="wrong_exception")})
        return Outcome({"": Finding("accepted", given=str(shape))})

    return Check("hard inputs", f"hard/one-value/{'x'.join(map(str, shape))}", run, "one-value")


def _empty(context: CheckContext, mode: str) -> Check:
    def run() -> Outcome:
        case, given = context.fresh(Case(mode, "float32", "contiguous", (0, 3, 4, 4)))
        seen = observe(context.candidate.call, case, given, second=False)
        problem = seen.problem or unlike(seen.values["forward"], given.x)
        for name, value in seen.values.items():
            if problem is None and name in GRADIENTS and not bool((value == 0).all()):
                problem = Finding("not_zero", name)
            if problem is None and name in RUNNING and not torch.equal(value, getattr(given, name)):
                problem = Finding("running_moved_by_nothing", names=(name,))
        return Outcome({"": problem or Finding("right", error=0.0)})

    return Check("hard inputs", f"hard/empty/{mode}", run, "empty")
