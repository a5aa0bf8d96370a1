"""The kernels that a profile compares, each called alike: by name, a peer's, or the user's own function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bncli import kernels
from bncli.errors import RecipeError
from bncli.kernels import native
from bncli.kernels.fused import cpu
from bncli.kernels.fused.tiling import Plan
from bncli.kernels.layout import dense
from bncli.measure.profile import peers
from bncli.measure.reference import case as cases
from bncli.measure.reference.candidate import Subject, subject
from bncli.measure.reference.case import Apply, Inputs
from bncli.measure.timing.clock import Work
from bncli.names import PROFILE_KERNELS
from bncli.results.profile import Case, Direction


@dataclass(frozen=True)
class Candidate:
    """One kernel on one case. `ran`: the implementation behind it, None where unknown."""

    forward: Apply
    ran: str | None = None
    overwrites: bool = False  # x, so that each call needs a copy of it
    positive_weight: bool = False  # it means another operation where a weight is not above 0
    compiles: bool = False  # on its first call

    def given(self, inputs: Inputs) -> Inputs:
        """What one call is given: these inputs, and where it writes over x, a copy of that."""
        return replace(inputs, x=inputs.x.clone()) if self.overwrites else inputs

    def run(self, inputs: Inputs) -> Tensor:
        """The forward pass, whatever it does to x."""
        return self.forward(self.given(inputs))

    def step(self, inputs: Inputs) -> Callable[[], object]:
        """One forward and backward pass, ready to run; the gradients are returned, not accumulated."""
        leaves = list(inputs.leaves().values())
        given = self.given(inputs)
        return lambda: torch.autograd.grad(self.forward(given), leaves, inputs.dy)

    def works(self, inputs: Inputs) -> dict[Direction, Work]:
        """Direction -> what a sample runs, all on the same tensors, which require gradients from here on."""
        leaves = list(inputs.leaves().values())

        def backward(y: Tensor) -> object:
            return torch.autograd.grad(y, leaves, inputs.dy)

        return {
            "both": Work(lambda given: backward(self.forward(given)), lambda: self.given(inputs)),
            "forward": Work(self.forward, lambda: self.given(inputs)),
            "backward": Work(backward, lambda: self.run(inputs)),
        }


Source = Callable[[Case], Candidate]  # raises Unavailable, with the reason, where the kernel does not take the case


def sources(names: Sequence[str], device: torch.device, allow_code: bool) -> dict[str, Source]:
    """Where each kernel's candidates come from. Raises RecipeError for an unknown name or a function that is missing.

    Names: those of PROFILE_KERNELS, or the user's package.module:function (with allow_code). Whether
    a kernel can run is found out case by case, so that the others' rows stand.
    """
    mistakes = [
        f"--kernel {name}: expected some of {', '.join(PROFILE_KERNELS)}, or your own as package.module:function"
        for name in dict.fromkeys(names)
        if name not in PROFILE_KERNELS and ":" not in name
    ]
    if mistakes:
        raise RecipeError(*mistakes)
    return {name: _source(name, device, allow_code) for name in dict.fromkeys(names)}


def _source(name: str, device: torch.device, allow_code: bool) -> Source:
    if ":" in name:
        own = subject(name, "batch", device, allow_code)
        return lambda case: Candidate(_own(own, case))
    if name in peers.PEERS:
        return lambda case: _peer(name, case, device)
    if name == "compiled":
        return lambda case: Candidate(
            cases.compiled(cases.apply(case, "native")), ran(case, name, device), compiles=True
        )

    def by_name(case: Case) -> Candidate:
        kernels.get(name, device)
        return Candidate(cases.apply(case, name), ran(case, name, device))

    return by_name


def _peer(name: str, case: Case, device: torch.device) -> Candidate:
    found = peers.PEERS[name](case, device)
    return Candidate(found.forward, found.ran, overwrites=found.overwrites, positive_weight=found.positive_weight)


def _own(own: Subject, case: Case) -> Apply:
    activation = cases.OPERATIONS[case.operation][1]

    def forward(given: Inputs) -> Tensor:
        inside = (given.residual, activation) if own.fuses else (None, None)
        y = own.call(
            given.x,
            given.running_mean,
            given.running_var,
            given.weight,
            given.bias,
            case.training,
            cases.MOMENTUM,
            cases.EPS,
            *inside,
        )
        return y if own.fuses else native.finish(y, given.residual, activation)

    return forward


# --- the implementation that runs behind a kernel's name --------------------------------------------------------------

NATIVE_NAMES = {"Native": "ATen", "Cudnn": "cuDNN", "Miopen": "MIOpen"}  # torch's names of its backends


def ran(case: Case, kernel: str, device: torch.device) -> str | None:
    """What runs as `kernel` on that case: cuDNN, ATen, on-chip, cooperative, two launches, C; None where unknown."""
    if kernel == "native":
        backend = native_backend(case, device) if device.type == "cuda" else "Native"
        return NATIVE_NAMES.get(backend)
    if kernel == "compiled":
        return "Triton of inductor" if device.type == "cuda" else "C++ of inductor"
    if kernel != "fused":
        return None
    return _fused_on_cuda(case, device) if device.type == "cuda" else _fused_on_cpu(case)


def native_backend(case: Case, device: torch.device) -> str:
    """Which of torch's batch norms runs as `native` on that case, in torch's word: Native, Cudnn, ..., or unknown."""
    select = getattr(torch._C, "_select_batch_norm_backend", None)
    if select is None or case.affine == "none" or not (case.tracked or not case.training):
        return "unknown"  # it asks for all of the vectors
    dtype = cases.DTYPES[case.dtype]
    wide = torch.float64 if case.dtype == "fp64" else torch.float32
    x = cases.laid_out(torch.empty(case.shape, dtype=dtype, device=device), case.layout)
    vector = torch.empty(case.shape[1], dtype=dtype if case.affine == "same" else wide, device=device)
    return str(select(x, *[vector] * 4, case.training, cases.EPS)).rsplit(".", 1)[-1]


def plan_words(case: Case, device: torch.device) -> str:
    """How the fused kernel cuts the case on a GPU, forward and backward; `unknown` where there is no plan to ask."""
    if device.type != "cuda" or case.layout == "strided":
        return "unknown"
    try:
        forward, backward = plans(case, device)
    except (ImportError, ValueError) as error:  # a word beside a figure; the figure stands
        return f"unknown ({error})"
    return f"forward: {forward}; backward: {backward}"


def plans(case: Case, device: torch.device) -> tuple[Plan, Plan]:
    """The fused kernel's plans for a case on a GPU, forward and backward. Raises ValueError where there is none."""
    from bncli.kernels.fused.triton_launch import plan_for, processors

    x = torch.empty(case.shape, dtype=cases.DTYPES[case.dtype], device="meta")
    x = cases.laid_out(x, "contiguous" if case.layout == "strided" else case.layout)
    on, given = processors(device), not case.training
    return plan_for(x, on, given=given), plan_for(x, on, backward=True, given=given)


def way(plan: Plan, given: bool = False) -> str:
    """A plan in a word: each tensor read once by one program or by a team of them, or read again."""
    if given:
        return "streaming"
    if plan.barrier == "none":
        return "on-chip"
    if plan.barrier == "launch":
        return "two launches"
    share = f", {plan.resident_share:.0%} on-chip" if plan.overflow else ""
    return f"cooperative ({plan.team}{share})"


def _fused_on_cuda(case: Case, device: torch.device) -> str | None:
    try:
        forward, backward = (way(plan, not case.training) for plan in plans(case, device))
    except (ImportError, ValueError):
        return None
    words = forward if forward == backward else f"{forward}; backward {backward}"
    return f"copied, {words}" if case.layout == "strided" else words


def _fused_on_cpu(case: Case) -> str:
    x = cases.laid_out(torch.empty(case.shape, dtype=cases.DTYPES[case.dtype], device="meta"), case.layout)
    return ("C, copied, " if case.layout == "strided" else "C, ") + cpu.way(dense(x))
