"""Inputs on which kernels break: most judged like any case, against the definition, some by a rule of their own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bncli.kernels.layout import over_channels, per_channel
from bncli.measure.gradcheck.invariants import grouped, judge
from bncli.measure.reference import tolerance as tolerances
from bncli.measure.reference.candidate import native_in_the_same_dtype
from bncli.measure.reference.gradient_cases import Case, Inputs, away_from_the_kink, unit_roundoff
from bncli.measure.reference.judge import Check, Finding, Setting, Stage, compare, difference, fresh
from bncli.measure.reference.observe import observe, why_not_like

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
    "NaN and infinity stay in their channel": (
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
    "x not contiguous": (
        Input("transposed", strides(transposed, None), modes=BOTH),
        Input("stepped", strides(stepped, None), modes=BOTH),
        Input("stepped+residual", strides(stepped, None), fusion="relu+residual"),
        Input("broadcast", broadcast),
        Input("vectors", strided_vectors),
    ),
    "upstream gradient not contiguous": (
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

WORDS = "as for values: NaN where the definition has NaN, its numbers everywhere else"


def stages(setting: Setting, refused: dict[str, str]) -> Iterator[Stage]:
    """A row for each kind of hard input."""
    batch = setting.subject.tracks
    for name, members in ROWS.items():
        if batch or name in FOR_ANY_NORM:
            chosen = members if setting.effort != "quick" else members[:4]
            checks = [check for member in chosen for check in _checks(setting, name, member, refused)]
            yield Stage("hard inputs", checks, WORDS, row=name)
    if batch:
        yield Stage("hard inputs", list(_variances(setting)), VARIANCE, row="variance far from zero")
        yield Stage("hard inputs", [_huge(setting)], HUGE, row="values of 1e30")
        refusing = [_one_value(setting, shape) for shape in ((1, 3), (1, 3, 1, 1))]
        yield Stage("hard inputs", refusing, "a ValueError, as torch raises", row="one value per channel is refused")
        empty = [_empty(setting, mode) for mode in BOTH if mode == "train" or setting.subject.evaluates]
        words = "an empty output, gradients of 0, running statistics unchanged, as torch"
        yield Stage("hard inputs", empty, words, row="empty batch")


def _slug(row: str) -> str:
    return row.replace(",", "").replace(" ", "-")


def _checks(setting: Setting, row: str, member: Input, refused: dict[str, str]) -> Iterator[Check]:
    channels = 3 if setting.subject.tracks else 4
    shape = (member.shape[0], channels, *member.shape[2:])
    for mode in member.modes:
        for dtype in member.dtypes:
            fused = member.fusion != "plain" and not setting.subject.fuses
            if fused or (mode == "eval" and not setting.subject.evaluates):
                continue
            case = Case(mode, dtype, member.layout, shape, member.fusion, member.eps, member.momentum)
            if case.needs & set(refused):
                continue
            yield Check(f"hard/{_slug(row)}/{member.name}/{mode}/{dtype}", ("",), _compared(setting, case, member))


def _compared(setting: Setting, case: Case, member: Input) -> Callable[[], list[Finding]]:
    """The worst of the case's quantities."""

    def run() -> list[Finding]:
        own, given = fresh(setting, case)
        given = member.change(given, own)
        if member.fusion != "plain":
            given = away_from_the_kink(given, own)
        # Second derivatives at such inputs are left out: the values section has them, and torch's own overflow here.
        found = compare(setting, own, given, second=False)
        worst = max(found, key=lambda finding: finding.error)
        message = f"{worst.quantity}: {worst.message}" if worst.failed else ""
        return [replace(worst, quantity="", message=message)]

    return run


# --- the variance -----------------------------------------------------------------------------------------------------

LIMITS = {1e2: 1e-6, 1e3: 1e-6, 1e4: 5e-6}  # relative error of the float32 variance at mean / deviation
VARIANCE = (
    "relative error of the float32 variance: 1e-6 at mean/deviation 1e2 and 1e3, 5e-6 at 1e4; twice that of the "
    "output's, whose own rounding counts too; of a function of yours, twice native's error and "
    "sqrt(m) roundings, of a sum in order, where these are larger"
)


def _variances(setting: Setting) -> Iterator[Check]:
    for ratio in LIMITS:

        def run(ratio: float = ratio) -> list[Finding]:
            case, given = fresh(setting, Case("train", "float32", "contiguous", (8, 3, 16, 16), momentum=1.0))
            given = far_from_zero(ratio)(given, case)
            seen = observe(setting.subject.call, case, given, second=False)
            if seen.problems:
                return [Finding("", math.inf, next(iter(seen.problems.values())))]
            return [_variance_error(setting, case, given, seen.wide(), LIMITS[ratio])]

        yield Check(f"hard/variance/{ratio:g}", ("",), run)


def _variance_error(setting: Setting, case: Case, given: Inputs, seen: dict[str, Tensor], limit: float) -> Finding:
    native = observe(native_in_the_same_dtype(), case, given, second=False).wide()
    exact = _far_variances(given.wide(), case)
    allowed = {"running_var": limit * exact["running_var"], "the variance of y": 2 * limit * exact["the variance of y"]}
    if setting.subject.own:
        more = _more_for_the_user(setting, case, given, exact)
        allowed = {name: torch.maximum(value, more[name]) for name, value in allowed.items()}
    findings = []
    for name, value in _measured(seen).items():
        own = (_measured(native)[name] - exact[name]).abs()
        error = (value - exact[name]).abs()
        tolerance = torch.maximum(allowed[name], 2 * own) if setting.subject.own else allowed[name]
        found = judge(name, value, exact[name], tolerance)
        relative = float((error / exact[name]).nan_to_num(math.inf).max())
        times = float(error.max() / own.max()) if not setting.native and own.max() > 0 else math.nan
        findings.append(replace(found, relative=relative, of_native=times))
    return max(findings, key=lambda finding: finding.error)


def _more_for_the_user(setting: Setting, case: Case, given: Inputs, exact: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a sum in order moves the variance by; and y = s x + t, with t large, is right but moves that of y."""
    truth = tolerances.reference(case, given)
    floor = grouped(setting.floors(case, given, truth)["forward"], "batch").mean(1)
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


HUGE = "y right, or the bias (an infinite variance), or NaN where the variance overflows; other channels as ever"


def _huge(setting: Setting) -> Check:
    def run() -> list[Finding]:
        case, given = fresh(setting, Case("train", "float32", "contiguous", (4, 3, 5, 7)))
        x = given.x.clone()
        x[:, 1] *= 1e30
        given = replace(given, x=x)
        truth = tolerances.reference(case, given)
        floors = setting.floors(case, given, truth)
        seen = observe(setting.subject.call, case, given, second=False)
        if seen.problems:
            return [Finding("", math.inf, next(iter(seen.problems.values())))]
        y, exact, floor = seen.wide()["forward"], truth["forward"], floors["forward"]
        assert given.bias is not None
        bias = per_channel(given.wide().bias, y).expand_as(y)  # type: ignore[arg-type]
        with_bias = [tolerances.in_floors(y[:, 1], other[:, 1], floor[:, 1]) for other in (exact, bias)]
        overflowed = 0.0 if y[:, 1].isnan().all() else min(with_bias)
        others = max(tolerances.in_floors(y[:, c], exact[:, c], floor[:, c]) for c in (0, 2))
        error = max(overflowed, others)
        return [Finding("", error, difference("y", y, exact) if not error <= 1 else "")]

    return Check("hard/huge/1e30", ("",), run)


# --- too few values ---------------------------------------------------------------------------------------------------


def _one_value(setting: Setting, shape: tuple[int, ...]) -> Check:
    def run() -> list[Finding]:
        case, given = fresh(setting, Case("train", "float32", "contiguous", shape))
        arguments = (given.x, given.running_mean, given.running_var, given.weight, given.bias, True, 0.1, case.eps)
        try:
            setting.subject.call(*arguments, None, None)
        except ValueError:
            return [Finding("", 0.0)]
        except (Exception, SystemExit) as error:
            return [Finding("", math.inf, f"raised {type(error).__name__}: {error}; expected a ValueError")]
        return [Finding("", math.inf, f"an input {shape} has a variance of 0 over one value; expected a ValueError")]

    return Check(f"hard/one-value/{'x'.join(map(str, shape))}", ("",), run)


def _empty(setting: Setting, mode: str) -> Check:
    def run() -> list[Finding]:
        case, given = fresh(setting, Case(mode, "float32", "contiguous", (0, 3, 4, 4)))
        seen = observe(setting.subject.call, case, given, second=False)
        problem = next(iter(seen.problems.values()), None) or why_not_like(seen.values["forward"], given.x)
        for name, value in seen.values.items():
            if problem is None and name.startswith("d") and not bool((value == 0).all()):
                problem = f"{name} is not 0"
            if problem is None and name.startswith("running") and not torch.equal(value, getattr(given, name)):
                problem = f"{name} moved"
        return [Finding("", math.inf if problem else 0.0, problem or "")]

    return Check(f"hard/empty/{mode}", ("",), run)
