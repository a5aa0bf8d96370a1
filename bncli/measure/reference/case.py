"""Test cases of a kernel, their inputs, and the bytes and operations of a case.

Letters: N examples, C channels, S positions, m = N prod(S) values per channel; g the gradient of the loss in y.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from bncli.kernels.definition import definition
from bncli.kernels.layout import per_channel
from bncli.names import CHECKED_GROUP_SIZE, CHECKED_GROUPS, FUSED_ACTIVATIONS, KINKED_ACTIVATIONS, NORMS
from bncli.results import profile
from bncli.results.gradcheck import Effort
from bncli.results.profile import Direction

CPU = torch.device("cpu")
Shape = tuple[str, int, tuple[int, ...]]  # layout, C, shape without channels
DTYPES = {name: getattr(torch, name) for name in ("float32", "float16", "bfloat16", "float64")}
FUSIONS = ("plain", *FUSED_ACTIVATIONS, "residual", *(f"{name}+residual" for name in FUSED_ACTIVATIONS))

# (layout, C, shape without channels). Sizes are odd or prime, so that tiles do not divide them.
SHAPES = (
    ("contiguous", 3, (4, 5, 7)),
    ("channels_last", 3, (4, 5, 7)),
    ("contiguous", 3, (11,)),
    ("contiguous", 3, (5, 7)),
    ("contiguous", 3, (2, 3, 5, 2)),
    ("channels_last", 3, (2, 3, 5, 2)),
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
# More channels than one block of a kernel, and more values than one pass; the quick run uses the first three.
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
INTERPRETED_CHANNELS = 64  # each contiguous channel is one program, which is slow in Triton's interpreter


@dataclass(frozen=True)
class Case:
    """One call of a kernel. Its identifier is also the seed of its inputs."""

    mode: str
    dtype: str
    layout: str
    shape: tuple[int, ...]
    fusion: str = "plain"
    eps: float = 1e-3
    momentum: float = 0.3
    repeat: int = 1
    norm: str = "batch"
    affine: str = "wide"  # weight and bias in float32 or wider; same: in the input's dtype; none
    tracked: bool = True  # with running statistics

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
    def stored(self) -> torch.dtype:
        """The dtype of x and y."""
        dtype: torch.dtype = DTYPES[self.dtype]
        return dtype

    @property
    def working(self) -> torch.dtype:
        """The dtype of statistics and sums: float32, of float64 itself."""
        return torch.promote_types(self.stored, torch.float32)

    @property
    def needs(self) -> set[str]:
        """What a kernel has to support for this case: mode, dtype and fused operations."""
        return {self.mode, self.dtype, *self.fusion.split("+")}

    @property
    def m(self) -> int:
        """Values per mean."""
        return NORMS[self.norm].values_per_mean(self.shape, CHECKED_GROUPS)

    @property
    def too_few_values(self) -> bool:
        """Whether a mean has one value, or a covariance no more values per channel than channels."""
        return self.m <= NORMS[self.norm].covariance_channels(CHECKED_GROUP_SIZE)


@dataclass(frozen=True)
class Inputs:
    """Inputs of a kernel, the gradient g of the loss in y, and the directions v of the second derivative.

    Timed shapes have no v, since their second derivative is not checked.
    """

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    residual: Tensor | None
    g: Tensor
    v: Tensor | None = None  # like x
    v_weight: Tensor | None = None  # (C)
    v_bias: Tensor | None = None  # (C)
    smooth: Tensor | None = None  # like x: 0 where the activation's derivative jumps within rounding, else 1

    def wide(self, device: torch.device = CPU) -> Inputs:
        """Copies of the same numbers in float64 on the device, which must have that dtype."""
        return self.each(lambda t: t.detach().to(device).to(torch.float64, copy=True))

    def of_channels(self, channels: Tensor, layout: str) -> Inputs:
        """Every tensor restricted to the channels, (k) indices, in that layout."""
        return self.each(lambda t: with_layout(channels_of(t, channels), layout))

    def leaves(self) -> dict[str, Tensor]:
        """The tensors to differentiate, with requires_grad set."""
        found = {"dx": self.x, "dweight": self.weight, "dbias": self.bias, "dresidual": self.residual}
        return {name: t.requires_grad_() for name, t in found.items() if t is not None}

    def for_one_call(self) -> Inputs:
        """The same tensors, with copies of the running statistics, which training updates."""
        copies = [None if running is None else running.clone() for running in (self.running_mean, self.running_var)]
        return replace(self, running_mean=copies[0], running_var=copies[1])

    def each(self, change: Callable[[Tensor], Tensor]) -> Inputs:
        """The inputs with `change` applied to every tensor."""
        changed: dict[str, Any] = {name: None if t is None else change(t) for name, t in vars(self).items()}
        return replace(self, **changed)


def arguments(case: Case, given: Inputs) -> tuple[Any, ...]:
    """The positional arguments of a kernel, in the order of bncli.batch_norm's parameters."""
    return (
        *(given.x, given.running_mean, given.running_var, given.weight, given.bias),
        *(case.training, case.momentum, case.eps, given.residual, case.activation),
    )


def divisible(channels: int, norm: str) -> int:
    """The number of channels, increased until the groups of the norm divide it."""
    row = NORMS[norm]
    size = row.covariance_channels(CHECKED_GROUP_SIZE) if row.over_batch else CHECKED_GROUPS
    return channels + -channels % size


def cases(effort: Effort, norm: str, fuses: bool, evaluates: bool, interpreted: bool = False) -> list[Case]:
    """The cases of the values section.

    quick: every mode, dtype and layout, the fused operations in turn; default: all of these on 4-D inputs, two in turn
    elsewhere; full: the whole product over all but the large shapes, three times. The large ones take the fused
    operations in turn. interpreted: without those that Triton's interpreter would need minutes for.
    """
    modes = NORMS[norm].modes if evaluates else ("train",)
    fusions = FUSIONS if fuses else FUSIONS[:1]

    def product_of(dtypes: Sequence[str], shapes: Sequence[Shape], operations: Effort) -> list[Case]:
        found = []
        for turn, (mode, dtype, (layout, c, (n, *positions))) in enumerate(product(modes, dtypes, shapes)):
            shape = (n, divisible(c, norm), *positions)
            for fusion in _fusions(operations, fusions, len(positions) + 1, turn):
                found.append(Case(mode, dtype, layout, shape, fusion, norm=norm))
        return [case for case in found if not case.too_few_values]

    full = effort == "full"
    found = product_of(tuple(DTYPES), SHAPES, effort)
    more_shapes = MORE_SHAPES[:4] if effort == "quick" else MORE_SHAPES
    found += product_of(tuple(DTYPES) if full else ("float32",), more_shapes, "full" if full else "quick")
    if full:
        found += [replace(case, repeat=repeat) for repeat in (2, 3) for case in found]
    dtypes = {"quick": ("float32",), "default": ("float32", "bfloat16"), "full": tuple(DTYPES)}[effort]
    large = product_of(dtypes, LARGE_SHAPES[:3] if effort == "quick" else LARGE_SHAPES, "quick")
    for case in large:
        overflows = case.dtype == "float16" and (case.shape[0], *case.shape[2:]) == MOST_VALUES
        takes_minutes = interpreted and case.layout == "contiguous" and case.shape[1] > INTERPRETED_CHANNELS
        found += [] if overflows or takes_minutes else [case]
    return found


def _fusions(effort: Effort, fusions: tuple[str, ...], spatial: int, turn: int) -> tuple[str, ...]:
    if effort == "full" or (effort == "default" and spatial == 3):
        return fusions
    count = 1 if effort == "quick" else 2
    # A stride of 3 visits all eight; the offset per row varies the operations of a dtype.
    return tuple(dict.fromkeys(fusions[(3 * (turn + turn // 6) + 5 * k) % len(fusions)] for k in range(count)))


def generator(identifier: str, device: torch.device = CPU) -> torch.Generator:
    return torch.Generator(device).manual_seed(zlib.crc32(identifier.encode()))


def inputs(case: Case, device: torch.device) -> Inputs:
    """The inputs of a case, drawn from its identifier. Deviations 0.1 to 3 and means of up to 3 deviations a channel;
    x, residual and g in the case's dtype, the vectors in float32 or wider, as under autocast.
    """
    draw = generator(case.identifier)
    dtype, c = case.stored, case.shape[1]
    vectors = dtype if case.affine == "same" else case.working
    affine, tracked = case.affine != "none", case.tracked and NORMS[case.norm].has_running_variance

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
        weight=weight.to(vectors) if affine else None,
        bias=(normal(c) / 2).to(vectors) if affine else None,
        running_mean=(mean + deviation * normal(c) / 3).to(vectors) if tracked else None,
        running_var=(deviation**2 * (0.5 + torch.rand(c, generator=draw))).to(vectors) if tracked else None,
        residual=normal(*case.shape).to(dtype) if case.adds else None,
        g=normal(*case.shape).to(dtype),
        v=normal(*case.shape).to(dtype),
        v_weight=normal(c).to(vectors),
        v_bias=normal(c).to(vectors),
        smooth=torch.ones(case.shape, dtype=dtype),
    )
    return away_from_the_kink(found, case).each(lambda t: with_layout(t.to(device), case.layout))


def away_from_the_kink(given: Inputs, case: Case, device: torch.device = CPU) -> Inputs:
    """Set g = 0 where the activation's input is within rounding of 0, since either derivative is right there.

    At NaN g is kept; torch's derivative is 1 for relu and the slope for leaky_relu. device: for that computation.
    """
    if case.activation not in KINKED_ACTIVATIONS:
        return given
    z = preactivation(given.wide(device), case)
    # An upper bound of the error of a sum in any order, and of a store.
    rounding = 8 * max(unit_roundoff(case.stored), (32 + math.sqrt(case.m)) * unit_roundoff(case.working))
    margin = rounding * (1 + torch.nan_to_num(z, 0.0, 0.0, 0.0).abs().max())
    smooth = (~(z.abs() <= margin)).to(given.g)
    return replace(given, g=given.g * smooth, smooth=smooth)


def with_positive_weight(given: Inputs, case: Case) -> Inputs:
    """The inputs with the magnitudes of the weights, and g adapted to them."""
    return given if given.weight is None else away_from_the_kink(replace(given, weight=given.weight.abs()), case)


def preactivation(given: Inputs, case: Case) -> Tensor:
    """The input of the activation, in float64."""
    plain = replace(case, fusion="residual" if case.adds else "plain")
    return definition(case.norm)(*arguments(plain, given.for_one_call()))


def unit_roundoff(dtype: torch.dtype) -> float:
    """Half the distance from 1 to the next number, the largest relative error of one rounding."""
    return torch.finfo(dtype).eps / 2


def channels_of(t: Tensor, channels: Tensor) -> Tensor:
    """(N, C, *S) or (C) at those indices of channels."""
    return t.index_select(0 if t.dim() == 1 else 1, channels)


def with_layout(t: Tensor, layout: str) -> Tensor:
    """The same values, contiguous, channels_last where the rank has it, or strided: every second position in memory."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    if layout == "strided" and t.dim() > 1:
        return torch.stack([t, t], dim=-1).flatten(-2)[..., ::2]
    if layout == "channels_last" and t.dim() in formats:
        return t.contiguous(memory_format=formats[t.dim()])
    return t.contiguous()


# --- shapes that are timed --------------------------------------------------------------------------------------------

# Name -> (whether a residual is added, the activation).
OPERATIONS: dict[str, tuple[bool, str | None]] = {
    "bn": (False, None),
    "bn+relu": (False, "relu"),
    "bn+add+relu": (True, "relu"),
    "bn+silu": (False, "silu"),
    "bn+leaky_relu": (False, "leaky_relu"),
}
DTYPE_NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64"}
EPS, MOMENTUM = 1e-5, 0.1


def timed(case: profile.Case) -> Case:
    """The test case of a timed shape."""
    added, activation = OPERATIONS[case.operation]
    fusion = "+".join(name for name in (activation, "residual" if added else None) if name) or "plain"
    mode, dtype = "train" if case.training else "eval", DTYPE_NAMES[case.dtype]
    found = Case(mode, dtype, case.layout, case.shape, fusion, EPS, MOMENTUM)
    return replace(found, affine=case.affine, tracked=case.tracked or not case.training)


def timed_inputs(case: Case, device: torch.device, seed: int = 0) -> Inputs:
    """Inputs of a large case, drawn on the device: means within about 1, deviations between 0.5 and 2 a channel."""
    source = torch.Generator(device).manual_seed(seed)
    channels = case.shape[1]

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=source, device=device, dtype=case.working)

    def uniform() -> Tensor:
        return torch.rand(channels, generator=source, device=device, dtype=case.working) * 1.5 + 0.5

    def like_x(values: Tensor) -> Tensor:
        return with_layout(values.to(case.stored), case.layout)

    x = normal(*case.shape)
    x = x.mul_(per_channel(uniform(), x)).add_(per_channel(normal(channels), x))
    narrow = case.stored if case.affine == "same" else case.working
    affine = case.affine != "none"
    return Inputs(
        x=like_x(x),
        residual=like_x(normal(*case.shape)) if case.adds else None,
        weight=(uniform() * normal(channels).sign()).to(narrow) if affine else None,
        bias=normal(channels).to(narrow) if affine else None,
        running_mean=normal(channels).to(narrow) if case.tracked else None,
        running_var=uniform().to(narrow) if case.tracked else None,
        g=like_x(normal(*case.shape)),
    )


def floor_bytes(case: profile.Case, direction: Direction) -> float:
    """The minimum memory traffic in bytes, with each tensor read once (C-sized vectors ignored).

    Forward: x, y; backward: x, dy, dx. A residual adds one tensor in each direction, and one bit per element for the
    sign of the ReLU's input.
    """
    added = OPERATIONS[case.operation][0]
    bits = case.elements / 8 if added else 0.0
    forward, backward = (2 + added) * case.tensor_bytes + bits, (3 + added) * case.tensor_bytes + bits
    return {"forward": forward, "backward": backward, "both": forward + backward}[direction]


# Operations per element (an addition, a multiplication, a comparison, an exponential or a division: 1 each).
STATISTICS = 4  # the sum; the deviation from the mean, its square, their sum
NORMALIZE = 2  # the deviation, over the standard deviation
AFFINE = 2  # times weight, plus bias
SUMS = 3  # dbias: a sum; dweight: a product with xhat and a sum
GRADIENT = {True: 5, False: 1}  # dy - dbias / m - xhat dweight / m, times weight / deviation; evaluation: that alone
ACTIVATION = {None: 0, "relu": 1, "leaky_relu": 2, "silu": 4}  # silu: exp(-z), 1 + it, z over it, and a sign
DERIVATIVE = {None: 0, "relu": 1, "leaky_relu": 2, "silu": 9}  # silu: the sigmoid (4), s (1 + z (1 - s)), times dy


def flops(case: profile.Case, direction: Direction) -> float:
    """The operations of the definition in one call; a kernel may do more. Backward recomputes xhat."""
    added, activation = OPERATIONS[case.operation]
    affine = AFFINE if case.affine != "none" else 0
    forward = (STATISTICS if case.training else 0) + NORMALIZE + affine + added + ACTIVATION[activation]
    sums = SUMS if case.training or affine else 0
    backward = NORMALIZE + sums + GRADIENT[case.training] + DERIVATIVE[activation]
    each = {"forward": forward, "backward": backward, "both": forward + backward}[direction]
    return float(each * case.elements)
