"""The kernels that a profile compares, each called alike: by name, a peer's, or the user's own function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bncli import kernels
from bncli.errors import Unavailable
from bncli.kernels import native
from bncli.kernels.definition import Forward
from bncli.kernels.fused import cpu
from bncli.kernels.fused.tiling import Plan
from bncli.kernels.layout import dense
from bncli.measure.profile import peers
from bncli.measure.reference import candidate as kernel_of
from bncli.measure.reference.candidate import by_name
from bncli.measure.reference.case import Case, Inputs, arguments, with_layout
from bncli.measure.timing.clock import Work
from bncli.names import PROFILE_KERNELS, check_kernel
from bncli.results.profile import Direction


@dataclass(frozen=True)
class Candidate:
    """One kernel on one case. `ran`: the implementation behind it, None where unknown."""

    case: Case
    call: Forward
    ran: str | None = None
    overwrites: bool = False  # x, so that each call needs a copy of it
    positive_weight: bool = False  # it means another operation where a weight is not above 0
    compiles: bool = False  # on its first call

    def arguments(self, inputs: Inputs) -> tuple[Any, ...]:
        """What one call is given: these inputs, and where it writes over x, a copy of that."""
        given = arguments(self.case, inputs)
        return (given[0].clone(), *given[1:]) if self.overwrites else given

    def on_a_copy(self, x: Tensor, *others: Any) -> Tensor:
        """The same call, which leaves x as it is."""
        return self.call(x.clone() if self.overwrites else x, *others)

    def step(self, inputs: Inputs) -> Callable[[], object]:
        """One forward and backward pass, ready to run; the gradients are returned, not accumulated."""
        leaves = list(inputs.leaves().values())
        given = self.arguments(inputs)
        return lambda: torch.autograd.grad(self.call(*given), leaves, inputs.g)

    def works(self, inputs: Inputs) -> dict[Direction, Work]:
        """Direction -> what a sample runs, all on the same tensors, which require gradients from here on."""
        leaves = list(inputs.leaves().values())
        once = None if self.overwrites else self.arguments(inputs)

        def given() -> tuple[Any, ...]:
            return once or self.arguments(inputs)

        def backward(y: Tensor) -> object:
            return torch.autograd.grad(y, leaves, inputs.g)

        return {
            "both": Work(lambda now: backward(self.call(*now)), given),
            "forward": Work(lambda now: self.call(*now), given),
            "backward": Work(backward, lambda: self.call(*given())),
        }


Source = Callable[[Case], Candidate]  # raises Unavailable, with the reason, where the kernel does not take the case


def sources(names: Sequence[str], device: torch.device, allow_code: bool) -> dict[str, Source]:
    """Where each kernel's candidates come from. Raises UsageError for an unknown name or a function that is missing.

    Names: those of PROFILE_KERNELS, or the user's package.module:function (with allow_code). Whether a kernel can run
    is found out case by case, so that the others' rows stand.
    """
    for name in names:
        check_kernel(name, PROFILE_KERNELS, allow_code)
    return {name: _source(name, device, allow_code) for name in dict.fromkeys(names)}


def _source(name: str, device: torch.device, allow_code: bool) -> Source:
    if ":" in name:
        own = kernel_of.candidate(name, "batch", device, allow_code)
        return lambda case: Candidate(case, _own(own, case))
    if name in peers.PEERS:
        return lambda case: _peer(name, case, device)
    if name == "compiled":
        return lambda case: Candidate(case, compiled(by_name("native")), ran(case, name, device), compiles=True)

    def run_by_name(case: Case) -> Candidate:
        kernels.get(name, device)
        return Candidate(case, by_name(name), ran(case, name, device))

    return run_by_name


def compiled(call: Forward) -> Forward:
    """The same, compiled anew for the next shape that it meets, with nothing left outside the graph."""
    import torch._inductor.config

    # Each process picks its own launch settings: those picked while others were at work would be a weaker opponent.
    if hasattr(torch._inductor.config, "autotune_local_cache"):
        torch._inductor.config.autotune_local_cache = False
    torch.compiler.reset()  # or a second shape would be compiled as a dynamic one, which is slower
    return torch.compile(call, fullgraph=True, dynamic=False)


def _peer(name: str, case: Case, device: torch.device) -> Candidate:
    found = peers.PEERS[name](case, device)
    return Candidate(case, found.call, found.ran, overwrites=found.overwrites, positive_weight=found.positive_weight)


def _own(own: kernel_of.Candidate, case: Case) -> Forward:
    """The user's function; where it takes no residual and no activation, torch's operators follow it."""
    if case.mode == "eval" and not own.evaluates:
        raise Unavailable("the function takes no statistics, so it has no evaluation mode")
    if own.fuses:
        return own.call

    def call(*arguments: Any) -> Tensor:
        *others, residual, activation = arguments
        return native.finish(own.call(*others, None, None), residual, activation)

    return call


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
    x = with_layout(torch.empty(case.shape, dtype=case.stored, device=device), case.layout)
    vector = torch.empty(case.shape[1], dtype=case.stored if case.affine == "same" else case.working, device=device)
    return str(select(x, *[vector] * 4, case.training, case.eps)).rsplit(".", 1)[-1]


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

    x = torch.empty(case.shape, dtype=case.stored, device="meta")
    x = with_layout(x, "contiguous" if case.layout == "strided" else case.layout)
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
    x = with_layout(torch.empty(case.shape, dtype=case.stored, device="meta"), case.layout)
    return ("C, copied, " if case.layout == "strided" else "C, ") + cpu.way(dense(x))
