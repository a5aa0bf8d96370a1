"""Every compilation of the fused kernel that the plan can ask for, in the types and layouts that networks train in."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from bncli.kernels.fused.tiling import ACCESS_BYTES, SPLIT_TILINGS, STREAMING, THREADS_A_WARP, registers, tilings
from tests.kernels.fused.ahead_of_time import Named, Specialisation

SIZES = {"bf16": 2, "fp16": 2, "fp32": 4}
INTEGERS = ("shift", "nothing", "L", "H", "P", "teams", "slices")
TENSORS = {
    "forward": (
        "x", "residual", "weight", "bias", "y", "mean", "var", "signs", "running_mean", "running_var", "partial",
        "arrived",
    ),
    "backward": (
        "dy", "x", "residual", "weight", "bias", "mean", "var", "signs", "dx", "dr", "dweight", "dbias", "partial",
        "arrived",
    ),
}  # fmt: skip
LIKE_X = {"x", "y", "dy", "dx", "dr", "residual"}
VECTORS = {"weight", "bias", "mean", "var", "partial", "dweight", "dbias", "running_mean", "running_var"}
# (activation, residual): what is fused; the residual itself is read back only for silu.
FUSED = (("none", False), ("relu", False), ("silu", False), ("none", True), ("relu", True), ("silu", True))
WIDE_ACCESS = {"forward": ("x", "y"), "backward": ("x", "dy", "dx")}


@dataclass(frozen=True)
class Choice:
    """What distinguishes one compilation from another."""

    direction: str
    dtype: str
    planes: bool
    unit: int
    columns: int
    warps: int
    held: int
    stage: str
    activation: str
    residual: bool
    overflow: bool = False
    wide: bool = False  # of more than 2**31 elements: 64-bit addresses

    def __str__(self) -> str:
        layout = f"planes{self.unit}" if self.planes else f"rows{self.columns}by{self.unit}"
        stage = self.stage + ("+overflow" if self.overflow else "")
        stage += "+wide" if self.wide else ""
        fused = self.activation + ("+residual" if self.residual else "")
        return f"{self.direction}/{self.dtype}/{layout}/{stage}/{fused}/{self.warps}x{self.held}"


def specialisations() -> Iterator[Specialisation]:
    """All that training in these types asks for. Left out as less of the same: no weight, no bias, leaky_relu for relu.

    Left out because it may spill: float64, which is for checks, and more than 2**31 elements.
    """
    return map(specialisation, choices())


def choices() -> Iterator[Choice]:
    for direction, (dtype, size), (activation, residual) in itertools.product(TENSORS, SIZES.items(), FUSED):
        streams = 2 if direction == "backward" else 1
        units = [unit for unit in (8, 4, 2, 1) if unit * size <= ACCESS_BYTES]
        rows = [(unit, line // size) for unit in units for line in (64, 128)]
        for planes, unit, columns in [*((True, unit, 1) for unit in units), *((False, *each) for each in rows)]:
            kind = (direction, dtype, planes, unit, columns)
            line_bytes = (unit if planes else columns) * size
            sizes = tilings(planes=planes, unit_bytes=unit * size, line_bytes=line_bytes, streams=streams)
            for (warps, held), stage in itertools.product(sizes, ("alone", "team")):
                yield Choice(*kind, warps, held, stage, activation, residual)
            yield Choice(*kind, *sizes[-1], "team", activation, residual, overflow=True)
            for (warps, held), stage in itertools.product(SPLIT_TILINGS, ("statistics", "normalize")):
                yield Choice(*kind, warps, held // streams, stage, activation, residual)
                if (warps, held) == SPLIT_TILINGS[-1]:
                    yield Choice(*kind, warps, held // streams, stage, activation, residual, overflow=True)
            yield Choice(*kind, *STREAMING, "given", activation, residual)


def specialisation(choice: Choice) -> Specialisation:
    size = SIZES[choice.dtype]
    line_bytes = (choice.unit if choice.planes else choice.columns) * size
    constants: dict[str, object] = {
        "EPS": 1e-5,
        "R": choice.warps * THREADS_A_WARP * ACCESS_BYTES // line_bytes,
        "B": choice.columns,
        "K": choice.held,
        "UNIT": choice.unit,
        "PLANES": choice.planes,
        "WIDE": choice.wide,
        "OVERFLOW": choice.overflow,
        "STAGE": choice.stage,
        "ACTIVATION": choice.activation,
        "RESIDUAL": choice.residual and (choice.direction == "forward" or choice.activation == "silu"),
        "WEIGHT": True,
        "BIAS": True,
        "SIGNS": choice.residual and choice.activation == "relu",
    }
    if choice.direction == "forward":
        constants["TRACK"] = choice.stage in ("alone", "team", "normalize")
    else:
        constants["RESIDUAL_GRADIENT"] = choice.residual and choice.activation != "none"
    constants["ACC"] = Named("triton.language:float32")
    names = TENSORS[choice.direction]
    types = dict.fromkeys(LIKE_X, f"*{choice.dtype}") | dict.fromkeys(VECTORS, "*fp32")
    types |= {"signs": "*u8", "arrived": "*i32"}
    signature = {name: types[name] for name in names}
    if choice.direction == "forward":
        signature |= {"momentum": "fp32", "unbiased": "fp32"}
    signature |= {"channels": "i32", "units": "i32", "magic": "i64"} | dict.fromkeys(INTEGERS, "i32")
    signature |= dict.fromkeys(constants, "constexpr")
    wide = [each for each in WIDE_ACCESS[choice.direction] if choice.stage != "statistics" or each in ("x", "dy")]
    return Specialisation(
        str(choice),
        f"bncli.kernels.fused.triton:{choice.direction}",
        signature,
        constants,
        divisible_by_16=frozenset(names),
        num_warps=choice.warps,
        maxnreg=registers(choice.warps),
        cooperative=choice.stage == "team",
        vector_bits=dict.fromkeys(wide, choice.unit * size * 8),
    )
