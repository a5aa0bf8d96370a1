"""Hard inputs that are judged like any case: each a plain case and the change that makes it hard."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bncli.kernels.layout import over_channels
from bncli.measure.reference.gradient_cases import Case, Inputs

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
