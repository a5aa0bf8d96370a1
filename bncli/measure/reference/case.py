"""What is checked and timed of a kernel: cases, their tensors, their results, and the bytes that they must move.

Shape letters: N batch, C channels, *S positions, m values per channel (N times the positions).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bncli import kernels
from bncli.kernels import native
from bncli.kernels.api import batch_norm
from bncli.names import GRADCHECK_KERNELS
from bncli.results.profile import Case

# Name -> (whether a residual is added, the activation).
OPERATIONS: dict[str, tuple[bool, str | None]] = {
    "bn": (False, None),
    "bn+relu": (False, "relu"),
    "bn+add+relu": (True, "relu"),
    "bn+silu": (False, "silu"),
    "bn+leaky_relu": (False, "leaky_relu"),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
CANDIDATES: dict[str, str | kernels.Kernel] = {**{name: name for name in GRADCHECK_KERNELS}, "seam": native.batch_norm}
EPS, MOMENTUM = 1e-5, 0.1


def floor_bytes(case: Case, direction: str) -> float:
    """The fewest bytes to move with each tensor read once: the floor of one on-chip pass (C-sized vectors ignored).

    Forward: x, y; backward: x, dy, dx. With the residual a tensor more in each direction, and one bit an element that
    says where ReLU was open.
    """
    added = OPERATIONS[case.operation][0]
    bits = case.elements / 8 if added else 0.0
    forward, backward = (2 + added) * case.tensor_bytes + bits, (3 + added) * case.tensor_bytes + bits
    return {"forward": forward, "backward": backward, "both": forward + backward}[direction]


@dataclass(frozen=True)
class Inputs:
    x: Tensor
    residual: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    dy: Tensor

    def to(self, dtype: torch.dtype) -> Inputs:
        """The same values, all in that dtype."""
        moved = {name: None if t is None else t.to(dtype) for name, t in vars(self).items()}
        return Inputs(**moved)  # type: ignore[arg-type]

    def leaves(self) -> dict[str, Tensor]:
        """What gradients are asked for, made to require them."""
        found = {"dx": self.x, "dresidual": self.residual, "dweight": self.weight, "dbias": self.bias}
        return {name: t.requires_grad_() for name, t in found.items() if t is not None}


def make(case: Case, device: torch.device, seed: int = 0) -> Inputs:
    """Tensors of a case: each channel with its own mean within about 1 and its own deviation between 0.5 and 2."""
    source = torch.Generator(device).manual_seed(seed)
    channels, ones = case.shape[1], (1, -1, *[1] * (len(case.shape) - 2))
    wide = torch.float64 if case.dtype == "fp64" else torch.float32

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=source, device=device, dtype=wide)

    def uniform() -> Tensor:
        return torch.rand(channels, generator=source, device=device, dtype=wide) * 1.5 + 0.5

    x = normal(*case.shape).mul_(uniform().view(ones)).add_(normal(channels).view(ones))
    narrow = DTYPES[case.dtype] if case.affine == "same" else wide
    affine, tracked = case.affine != "none", case.tracked or not case.training
    added = OPERATIONS[case.operation][0]
    return Inputs(
        laid_out(x.to(DTYPES[case.dtype]), case.layout),
        laid_out(normal(*case.shape).to(DTYPES[case.dtype]), case.layout) if added else None,
        (uniform() * normal(channels).sign()).to(narrow) if affine else None,
        normal(channels).to(narrow) if affine else None,
        normal(channels).to(narrow) if tracked else None,
        uniform().to(narrow) if tracked else None,
        laid_out(normal(*case.shape).to(DTYPES[case.dtype]), case.layout),
    )


def laid_out(t: Tensor, layout: str) -> Tensor:
    """The same values in another memory layout."""
    if layout == "channels_last":
        return t.contiguous(memory_format=torch.channels_last if t.dim() == 4 else torch.channels_last_3d)
    if layout == "strided":
        return torch.stack([t, t], dim=-1).flatten(-2)[..., ::2]
    return t.contiguous()


Apply = Callable[[Inputs], Tensor]  # the forward pass; moves the running statistics of what it is given


def apply(case: Case, kernel: str) -> Apply:
    """The forward pass of a case by one of CANDIDATES."""
    activation, chosen = OPERATIONS[case.operation][1], CANDIDATES[kernel]

    def forward(given: Inputs) -> Tensor:
        return batch_norm(
            given.x,
            given.running_mean,
            given.running_var,
            given.weight,
            given.bias,
            case.training,
            MOMENTUM,
            EPS,
            residual=given.residual,
            activation=activation,
            kernel=chosen,
        )

    return forward


def compiled(forward: Apply) -> Apply:
    """The same, compiled anew for the next shape that it meets, with nothing left outside the graph."""
    import torch._inductor.config

    # Each process picks its own launch settings: those picked while others were at work would be a weaker opponent.
    if hasattr(torch._inductor.config, "autotune_local_cache"):
        torch._inductor.config.autotune_local_cache = False
    torch.compiler.reset()  # or a second shape would be compiled as a dynamic one, which is slower
    return torch.compile(forward, fullgraph=True, dynamic=False)


def outputs(forward: Apply, inputs: Inputs) -> dict[str, Tensor]:
    """y, every gradient, and the running statistics after one step; the inputs are left as they were."""
    fresh = {
        name: t.clone() if t is not None and name.startswith("running") else None if t is None else t.detach()
        for name, t in vars(inputs).items()
    }
    given = Inputs(**fresh)  # type: ignore[arg-type]
    leaves = given.leaves()
    y = forward(given)
    gradients = torch.autograd.grad(y, list(leaves.values()), given.dy)
    found = {"y": y.detach(), **dict(zip(leaves, gradients, strict=True))}
    for name in ("running_mean", "running_var"):
        statistic = getattr(given, name)
        if statistic is not None:
            found[name] = statistic
    return found


def with_dy(inputs: Inputs, dy: Tensor) -> Inputs:
    return replace(inputs, dy=dy)
