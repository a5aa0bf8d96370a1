"""First and second derivatives in float64 against finite differences (torch.autograd.gradcheck and gradgradcheck)."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bncli.measure.reference.candidate import KernelFailed
from bncli.measure.reference.case import Case, Inputs, inputs, preactivation
from bncli.measure.reference.judge import Check, CheckContext, CheckGroupPlan, Outcome
from bncli.measure.reference.observe import finding_of
from bncli.results.finding import Finding

RELATIVE, ABSOLUTE, STEP = 1e-4, 1e-6, 1e-6
KINK = 1e-3  # no activation's input closer to 0 than this: a difference across the kink is no derivative

SHAPES: dict[str, tuple[tuple[int, ...], ...]] = {
    "quick": ((4, 2, 3),),
    "default": ((4, 2, 3), (3, 2, 2, 2), (5, 4)),
    "full": ((4, 2, 3), (3, 2, 2, 2), (5, 4)),
}


def plans(context: CheckContext, refused: Collection[str]) -> Iterator[CheckGroupPlan]:
    """A row for each mode and order of derivative."""
    if "float64" in refused:
        return
    for mode in ("train", "eval") if context.candidate.evaluates else ("train",):
        for name in ("gradcheck", "gradgradcheck"):
            cases = [case for case in _cases(context, mode) if not case.needs & set(refused)]
            checks = [_check(context, case, name) for case in cases]
            yield CheckGroupPlan("derivatives", checks, "finite differences", row=f"{mode} {name}")


def _cases(context: CheckContext, mode: str) -> Iterator[Case]:
    fusions: tuple[str, ...] = ("plain",)
    if context.candidate.fuses:
        fusions = ("plain", "silu+residual") if context.effort == "quick" else ("plain", "relu+residual", "silu")
    for shape in SHAPES[context.effort]:
        for fusion in fusions:
            yield Case(mode, "float64", "contiguous", shape, fusion, eps=1e-2, norm=context.candidate.norm)


def _check(context: CheckContext, case: Case, name: str) -> Check:
    def run() -> Outcome:
        return Outcome({"": _differences(context, case, name)})

    shape = "x".join(map(str, case.shape))
    return Check("derivatives", f"derivatives/{case.mode}/{name}/{shape}/{case.fusion}", run, name, case)


def _differences(context: CheckContext, case: Case, name: str) -> Finding:
    given = _off_the_kink(case, context.device)
    names = [name for name in ("x", "weight", "bias", "residual") if getattr(given, name) is not None]
    leaves = [getattr(given, name).detach().requires_grad_() for name in names]

    def function(*tensors: Tensor) -> Tensor:
        now = dict(zip(names, tensors, strict=True))
        running = [None if r is None else r.clone() for r in (given.running_mean, given.running_var)]
        return context.candidate.call(
            *(now["x"], *running, now["weight"], now["bias"], case.training, case.momentum, case.eps),
            *(now.get("residual"), case.activation),
        )

    how: dict[str, Any] = {"eps": STEP, "atol": ABSOLUTE, "rtol": RELATIVE, "check_undefined_grad": False}
    try:
        torch.manual_seed(0)  # fast_mode draws its directions from torch's generator
        if name == "gradcheck":
            torch.autograd.gradcheck(function, leaves, fast_mode=context.effort != "full", **how)
        else:
            g = given.g.detach().requires_grad_()
            torch.autograd.gradgradcheck(function, leaves, g, fast_mode=context.effort != "full", **how)
    except KernelFailed as failed:
        return replace(failed.finding, quantity="derivative")
    except (Exception, SystemExit) as error:  # a mismatch, or whatever the kernel raises
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        kind = finding_of(error).kind
        text = " ".join(lines[:4])[:300]
        return Finding(
            "not_derivative" if kind == "raised" else kind, "derivative", exception=type(error).__name__, text=text
        )
    return Finding("right", "derivative", 0.0)


def _off_the_kink(case: Case, device: torch.device) -> Inputs:
    """The case's inputs, with the residual or the bias moved until no activation's input is near 0."""
    given = inputs(case, device)
    if case.activation is None:
        return given
    z = preactivation(given.wide(), case)
    if case.adds:
        assert given.residual is not None
        push = torch.where(z.abs() < KINK, 2 * KINK * torch.where(z < 0, -1.0, 1.0).double(), 0.0)
        return replace(given, residual=given.residual + push.to(given.residual))
    assert given.bias is not None
    bias = given.bias.clone()
    for channel in range(case.shape[1]):  # at most as many trials as there are values to step over
        values = z[:, channel]
        steps = (4 * KINK * k for k in range(values.numel() + 1))
        bias[channel] += next(step for step in steps if float((values + step).abs().min()) > KINK)
    return replace(given, bias=bias)
