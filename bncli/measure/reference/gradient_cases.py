"""The cases of gradcheck: their short identifiers, and the inputs that an identifier stands for.

Letters: N examples, C channels, S positions, m = N prod(S) values per channel; g the gradient of the loss in y.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from bncli.kernels.definition import definition
from bncli.kernels.layout import per_channel
from bncli.names import CHECKED_GROUPS, FUSED_ACTIVATIONS, KINKED_ACTIVATIONS, NORMS
from bncli.results.gradcheck import Effort

DTYPES = {name: getattr(torch, name) for name in ("float32", "float16", "bfloat16", "float64")}
FUSIONS = ("plain", *FUSED_ACTIVATIONS, "residual", *(f"{name}+residual" for name in FUSED_ACTIVATIONS))

# (layout, shape without channels): each layout has its shape; sizes are odd and prime, so that no tile fits.
SHAPES = (
    ("contiguous", (4, 5, 7)),
    ("channels_last", (4, 5, 7)),
    ("contiguous", (11,)),
    ("contiguous", (5, 7)),
    ("contiguous", (2, 3, 5, 2)),
    ("channels_last", (2, 3, 5, 2)),
)
MORE_SHAPES = (
    ("contiguous", 1, (5, 3, 3)),  # C = 1
    ("contiguous", 5, (1, 3, 7)),  # N = 1
    ("contiguous", 3, (2,)),  # m = 2, the fewest
    ("contiguous", 7, (3, 17, 13)),
    ("channels_last", 5, (1, 13, 11)),
    ("channels_last", 1, (5, 3, 3)),
    ("channels_last", 8, (2, 1, 1)),
    ("contiguous", 2, (2, 31, 33)),  # m = 2046
)
MOST_VALUES = (1, 141, 143)  # m = 20163; not in float16, in which torch sums its second derivative and overflows
# More channels than one block of a kernel takes, and more values than one pass; the first ones in the quick run too.
LARGE_SHAPES = (
    ("channels_last", 67, (2, 5, 3)),
    ("contiguous", 2, (1, 71, 71)),  # m = 5041
    ("contiguous", 67, (2, 5, 3)),
    ("contiguous", 130, (2, 3, 3)),
    ("channels_last", 130, (2, 3, 3)),
    ("channels_last", 2, (1, 71, 71)),
    ("contiguous", 2, (257, 3)),  # many examples
    ("contiguous", 2, MOST_VALUES),
)
INTERPRETED_CHANNELS = 64  # a contiguous channel is a program of its own, which Triton's interpreter takes long over


@dataclass(frozen=True)
class Case:
    """One call of the kernel. Its identifier is a path, and the seed of its inputs."""

    mode: str
    dtype: str
    layout: str
    shape: tuple[int, ...]
    fusion: str = "plain"
    eps: float = 1e-3
    momentum: float = 0.3
    repeat: int = 1
    norm: str = "batch"

    @property
    def identifier(self) -> str:
        parts = (self.mode, self.dtype, self.layout, "x".join(map(str, self.shape)), self.fusion)
        return "/".join(parts) + (f"~{self.repeat}" if self.repeat > 1 else "")

    @property
    def activation(self) -> str | None:
        name = self.fusion.removesuffix("+residual")
        return None if name in ("plain", "residual") else name

    @property
    def adds(self) -> bool:
        return "residual" in self.fusion

    @property
    def training(self) -> bool:
        return self.mode == "train"

    @property
    def needs(self) -> set[str]:
        """What a kernel has to take for this case: its mode, dtype and fused operations."""
        return {self.mode, self.dtype, *self.fusion.split("+")}

    @property
    def m(self) -> int:
        """Values that one mean is taken over."""
        return NORMS[self.norm].values_per_mean(self.shape, CHECKED_GROUPS)


@dataclass(frozen=True)
class Inputs:
    """What a kernel is called with. g, and the directions v of the second derivative, belong to y and to (dx, ...)."""

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    residual: Tensor | None
    g: Tensor
    v: Tensor  # like x
    v_weight: Tensor  # (C)
    v_bias: Tensor  # (C)
    smooth: Tensor  # like x: 0 where the activation's derivative jumps within rounding, else 1

    def wide(self) -> Inputs:
        """The same numbers in float64 on the CPU."""
        copies: dict[str, Any] = {
            name: None if t is None else t.cpu().to(torch.float64, copy=True) for name, t in vars(self).items()
        }
        return replace(self, **copies)


def divisible(channels: int, norm: str) -> int:
    """So many channels, or one more where the norm's groups are of one example and would not divide them."""
    return channels if NORMS[norm].over_batch else channels + channels % CHECKED_GROUPS


def cases(effort: Effort, norm: str, fuses: bool, evaluates: bool, interpreted: bool = False) -> list[Case]:
    """The cases of the values section.

    quick: every mode, dtype and layout, the fused operations in turn; default: all of these on 4-D inputs, two in turn
    elsewhere; full: the whole product over all but the large shapes, three times. The large ones take the fused
    operations in turn. interpreted: without those that Triton's interpreter would need minutes for.
    """
    modes = NORMS[norm].modes if evaluates else ("train",)
    fusions = FUSIONS if fuses else FUSIONS[:1]
    channels = divisible(3, norm)
    found = []
    for turn, (mode, dtype, (layout, shape)) in enumerate(product(modes, DTYPES, SHAPES)):
        for fusion in _fusions(effort, fusions, len(shape), turn):
            found.append(Case(mode, dtype, layout, (shape[0], channels, *shape[1:]), fusion, norm=norm))
    odd = MORE_SHAPES if effort != "quick" else MORE_SHAPES[:4]
    dtypes = tuple(DTYPES) if effort == "full" else ("float32",)
    for turn, (mode, dtype, (layout, c, shape)) in enumerate(product(modes, dtypes, odd)):
        c = divisible(c, norm)
        for fusion in _fusions("full" if effort == "full" else "quick", fusions, len(shape), turn):
            found.append(Case(mode, dtype, layout, (shape[0], c, *shape[1:]), fusion, norm=norm))
    found = [case for case in found if case.m > 1]
    if effort == "full":
        found += [replace(case, repeat=repeat) for repeat in (2, 3) for case in found]
    return found + _large(effort, modes, fusions, norm, interpreted)


def _large(
    effort: Effort, modes: tuple[str, ...], fusions: tuple[str, ...], norm: str, interpreted: bool
) -> list[Case]:
    dtypes = {"quick": ("float32",), "default": ("float32", "bfloat16"), "full": tuple(DTYPES)}[effort]
    found = []
    shapes = LARGE_SHAPES[:3] if effort == "quick" else LARGE_SHAPES
    for turn, (mode, dtype, (layout, c, shape)) in enumerate(product(modes, dtypes, shapes)):
        overflows = dtype == "float16" and shape == MOST_VALUES
        if overflows or (interpreted and layout == "contiguous" and c > INTERPRETED_CHANNELS):
            continue
        c = divisible(c, norm)
        for fusion in _fusions("quick", fusions, len(shape), turn):
            found.append(Case(mode, dtype, layout, (shape[0], c, *shape[1:]), fusion, norm=norm))
    return found


def _fusions(effort: Effort, fusions: tuple[str, ...], spatial: int, turn: int) -> tuple[str, ...]:
    if effort == "full" or (effort == "default" and spatial == 3):
        return fusions
    count = 1 if effort == "quick" else 2
    # A stride of 3 visits all eight; the row's own offset keeps a dtype from always meeting the same operations.
    return tuple(dict.fromkeys(fusions[(3 * (turn + turn // 6) + 5 * k) % len(fusions)] for k in range(count)))


def generator(identifier: str) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(identifier.encode()))


def inputs(case: Case, device: torch.device) -> Inputs:
    """The inputs of a case, drawn from its identifier. Deviations 0.1 to 3 and means of up to 3 deviations a channel;
    x, residual and g in the case's dtype, the vectors in float32 or wider, as under autocast.
    """
    draw = generator(case.identifier)
    dtype = DTYPES[case.dtype]
    vectors = torch.promote_types(dtype, torch.float32)
    c, tracked = case.shape[1], NORMS[case.norm].over_batch

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    deviation = 10 ** (torch.rand(c, generator=draw, dtype=torch.float64) * 1.5 - 1)
    mean = deviation * (torch.rand(c, generator=draw, dtype=torch.float64) * 6 - 3)
    x = normal(*case.shape) * per_channel(deviation, torch.empty(case.shape)) + per_channel(
        mean, torch.empty(case.shape)
    )
    weight = (0.5 + torch.rand(c, generator=draw, dtype=torch.float64)) * normal(c).sign()
    found = Inputs(
        x=x.to(dtype),
        weight=weight.to(vectors),
        bias=(normal(c) / 2).to(vectors),
        running_mean=(mean + deviation * normal(c) / 3).to(vectors) if tracked else None,
        running_var=(deviation**2 * (0.5 + torch.rand(c, generator=draw))).to(vectors) if tracked else None,
        residual=normal(*case.shape).to(dtype) if case.adds else None,
        g=normal(*case.shape).to(dtype),
        v=normal(*case.shape).to(dtype),
        v_weight=normal(c).to(vectors),
        v_bias=normal(c).to(vectors),
        smooth=torch.ones(case.shape, dtype=dtype),
    )
    return laid_out(away_from_the_kink(found, case), case.layout, device)


def away_from_the_kink(given: Inputs, case: Case) -> Inputs:
    """g = 0 where the activation's input is within rounding of 0: there either side's derivative is right.

    At NaN it is the one that torch takes: 1 for relu, the slope for leaky_relu.
    """
    if case.activation not in KINKED_ACTIVATIONS:
        return given
    z = preactivation(given.wide(), case)
    stored = DTYPES[case.dtype]
    working = torch.promote_types(stored, torch.float32)
    rounding = max(8 * unit_roundoff(stored), 64 * unit_roundoff(working))  # more than any sum or store is off by
    margin = rounding * (1 + torch.nan_to_num(z, 0.0, 0.0, 0.0).abs().max())
    smooth = (~(z.abs() <= margin)).to(given.g)
    return replace(given, g=given.g * smooth, smooth=smooth)


def preactivation(given: Inputs, case: Case) -> Tensor:
    """What the activation is applied to, in float64."""
    running = [None if r is None else r.clone() for r in (given.running_mean, given.running_var)]
    arguments = (given.x, *running, given.weight, given.bias, case.training, case.momentum, case.eps, given.residual)
    return definition(case.norm)(*arguments, None)


def unit_roundoff(dtype: torch.dtype) -> float:
    """Half the distance from 1 to the next number, the largest relative error of one rounding."""
    return torch.finfo(dtype).eps / 2


def laid_out(given: Inputs, layout: str, device: torch.device) -> Inputs:
    """The same inputs on the device, those like x in the layout."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}

    def place(tensor: Tensor | None) -> Any:
        if tensor is None:
            return None
        if layout == "channels_last" and tensor.dim() in formats:
            return tensor.to(device).contiguous(memory_format=formats[tensor.dim()])
        return tensor.to(device)

    return replace(given, **{name: place(tensor) for name, tensor in vars(given).items()})
