"""Which implementation really ran behind a kernel's name: a word or two beside its figures."""

from __future__ import annotations

import torch

from bncli.kernels.fused import cpu
from bncli.kernels.fused.tiling import Plan
from bncli.kernels.layout import dense
from bncli.measure.reference import case as cases
from bncli.results.profile import Case

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
