"""First and second derivatives in float64 against finite differences (torch.autograd.gradcheck and gradgradcheck)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from bncli.measure.reference.candidate import KernelFailed
from bncli.measure.reference.case import Case, Inputs, arguments, divisible, preactivation
from bncli.measure.reference.judge import Check, CheckContext, CheckGroupPlan, single
from bncli.measure.reference.observe import finding_of
from bncli.results.finding import Finding

RELATIVE, ABSOLUTE, STEP = 1e-4, 1e-6, 1e-6
KINK = 1e-3  # minimum distance of activation inputs from 0, since differences across the kink are no derivatives

SHAPES = ((4, 2, 3), (3, 2, 2, 2), (5, 4))  # the quick run uses the first


def plans(context: CheckContext, refused: Collection[str]) -> Iterator[CheckGroupPlan]:
    """One row per mode and order of derivative."""
    if "float64" in refused:
        return
    for mode in ("train", "eval") if context.candidate.evaluates else ("train",):
        cases = [case for case in _cases(context, mode) if not case.needs & set(refused)]
        for name in ("gradcheck", "gradgradcheck")[: 1 + context.candidate.differentiates_twice]:
            checks = [_check(context, case, name) for case in cases]
            yield CheckGroupPlan("derivatives", checks, "finite differences", {"": f"{mode} {name}"})


def _cases(context: CheckContext, mode: str) -> Iterator[Case]:
    fusions: tuple[str, ...] = ("plain",)
    if context.candidate.fuses:
        fusions = ("plain", "silu+residual") if context.effort == "quick" else ("plain", "relu+residual", "silu")
    for (n, c, *positions), fusion in product(SHAPES[:1] if context.effort == "quick" else SHAPES, fusions):
        shape = (n, divisible(c, context.candidate.norm), *positions)
        yield Case(mode, "float64", "contiguous", shape, fusion, eps=1e-2, norm=context.candidate.norm)


def _check(context: CheckContext, case: Case, name: str) -> Check:
    identifier = f"derivatives/{case.mode}/{name}/{'x'.join(map(str, case.shape))}/{case.fusion}"
    run = partial(single, context, case, partial(_differences, name == "gradgradcheck"))
    return Check("derivatives", identifier, run, name, case)


class _FreshForward(torch.autograd.Function):
    """A function whose backward pass runs it again, since gradcheck needs several, and a compiled one allows one."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        ctx.function, ctx.leaves = function, [tensor.detach().requires_grad_() for tensor in tensors]
        with torch.enable_grad():  # a kernel may take another path without
            return function(*ctx.leaves).detach()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        with torch.enable_grad():
            return None, *torch.autograd.grad(ctx.function(*ctx.leaves), ctx.leaves, g, allow_unused=True)


def _differences(second: bool, context: CheckContext, case: Case, given: Inputs) -> Finding:
    given = _off_the_kink(case, given)
    names = [name for name in ("x", "weight", "bias", "residual") if getattr(given, name) is not None]
    leaves = [getattr(given, name).detach().requires_grad_() for name in names]

    def function(*tensors: Tensor) -> Tensor:
        changed: dict[str, Any] = dict(zip(names, tensors, strict=True))
        return context.candidate.call(*arguments(case, replace(given.for_one_call(), **changed)))

    how: dict[str, Any] = {"eps": STEP, "atol": ABSOLUTE, "rtol": RELATIVE, "check_undefined_grad": False}
    how["fast_mode"] = context.effort != "full"
    try:
        torch.manual_seed(0)  # fast_mode draws its directions from torch's generator
        if second:
            torch.autograd.gradgradcheck(function, leaves, given.g.detach().requires_grad_(), **how)
        else:
            torch.autograd.gradcheck(partial(_FreshForward.apply, function), leaves, **how)
    except KernelFailed as failed:
        return replace(failed.finding, quantity="derivative")
    except (Exception, SystemExit) as error:  # a mismatch, or an exception of the kernel
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        kind, text = finding_of(error).kind, " ".join(lines[:4])
        kind = "not_derivative" if kind == "raised" else kind
        return Finding(kind, "derivative", exception=type(error).__name__, text=text)
    return Finding("right", "derivative", 0.0)


def _off_the_kink(case: Case, given: Inputs) -> Inputs:
    """The inputs, with the residual or the bias shifted so that no activation input is near 0."""
    if case.activation is None:
        return given
    z = preactivation(given.wide(), case)
    if case.adds:
        assert given.residual is not None
        push = torch.where(z.abs() < KINK, 2 * KINK * torch.where(z < 0, -1.0, 1.0).double(), 0.0)
        return replace(given, residual=given.residual + push.to(given.residual))
    assert given.bias is not None
    bias = given.bias.clone()
    for channel in range(case.shape[1]):  # at most one step per value
        values = z[:, channel]
        steps = (4 * KINK * k for k in range(values.numel() + 1))
        bias[channel] += next(step for step in steps if float((values + step).abs().min()) > KINK)
    return replace(given, bias=bias)
