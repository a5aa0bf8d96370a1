"""One run of a kernel on a case's inputs: the output, every gradient, the second derivative, the running statistics."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from bncli.kernels.definition import Forward
from bncli.measure.reference.gradient_cases import Case, Inputs
from bncli.names import NORMS

GRADIENTS = ("dx", "dweight", "dbias", "dresidual")
SECOND = ("double backward in x", "double backward in weight", "double backward in g")


@dataclass
class Observation:
    """Quantity -> tensor. What an exception or an impossible result kept from being computed is in `problems`."""

    values: dict[str, Tensor] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)

    def wide(self) -> dict[str, Tensor]:
        return {name: value.detach().cpu().double() for name, value in self.values.items()}


def quantities(case: Case) -> tuple[str, ...]:
    """What a run of the case is judged by, in the order in which it is computed."""
    running = ("running_mean", "running_var") if case.training and NORMS[case.norm].over_batch else ()
    return ("forward", *running, *(GRADIENTS if case.adds else GRADIENTS[:3]), "double backward")


def leaf(tensor: Tensor | None) -> Tensor | None:
    """The same memory and strides as a leaf that wants a gradient."""
    return None if tensor is None else tensor.detach().requires_grad_()


def observe(call: Forward, case: Case, given: Inputs, second: bool = True) -> Observation:
    """The forward pass, the backward pass as a training step runs it, and the backward pass of the backward pass."""
    seen = Observation()
    x, weight, bias, residual = (leaf(t) for t in (given.x, given.weight, given.bias, given.residual))
    running = [None if r is None else r.clone() for r in (given.running_mean, given.running_var)]
    assert x is not None
    leaves = {"dx": x, "dweight": weight, "dbias": bias, "dresidual": residual}
    wanted = {name: tensor for name, tensor in leaves.items() if tensor is not None}
    try:
        y = call(x, *running, weight, bias, case.training, case.momentum, case.eps, residual, case.activation)
    except (Exception, SystemExit) as error:  # the kernel may be anyone's code
        return _failed(seen, quantities(case), error)
    wrong = why_not_like(y, given.x)
    if wrong is not None:
        seen.problems = dict.fromkeys(quantities(case), wrong)
        return seen
    seen.values["forward"] = y.detach()
    if not case.training:
        seen.problems.update(_moved(running, given))
    if case.training and NORMS[case.norm].over_batch:
        for name, value in zip(("running_mean", "running_var"), running, strict=True):
            if value is not None:
                seen.values[name] = value
    try:
        first = torch.autograd.grad(y, list(wanted.values()), given.g, retain_graph=second, allow_unused=True)
    except (Exception, SystemExit) as error:
        return _failed(seen, [*wanted, "double backward"], error)
    for (name, tensor), gradient in zip(wanted.items(), first, strict=True):
        seen.values[name] = torch.zeros_like(tensor) if gradient is None else gradient
        if gradient is not None and gradient.shape != tensor.shape:
            seen.problems[name] = f"shape {tuple(gradient.shape)}; expected {tuple(tensor.shape)}"
    if second:
        try:
            seen.values.update(_second(y, wanted, given))
        except (Exception, SystemExit) as error:
            return _failed(seen, ["double backward"], error)
    return seen


def _moved(running: list[Tensor | None], given: Inputs) -> dict[str, str]:
    """The complaint about running statistics that an evaluation has moved."""
    pairs = zip(("running_mean", "running_var"), running, strict=True)
    names = [name for name, now in pairs if now is not None and not torch.equal(now, getattr(given, name))]
    return {"forward": f"{', '.join(names)} changed during the call, in evaluation"} if names else {}


def _second(y: Tensor, wanted: dict[str, Tensor], given: Inputs) -> dict[str, Tensor]:
    """The gradient in x, weight and g of <dx, v> + <dweight, v_weight> + <dbias, v_bias>."""
    g = given.g.detach().clone().requires_grad_()
    first = torch.autograd.grad(y, list(wanted.values()), g, create_graph=True, allow_unused=True)
    directions = {"dx": given.v, "dweight": given.v_weight, "dbias": given.v_bias}
    pairs = [
        (gradient, directions[name])
        for name, gradient in zip(wanted, first, strict=True)
        if name in directions and gradient is not None and gradient.requires_grad
    ]
    into = [tensor for name, tensor in wanted.items() if name in ("dx", "dweight")] + [g]
    if not pairs:
        raise NoSecondDerivative("the gradients came back without a graph: nothing to differentiate again")
    found = torch.autograd.grad(
        [gradient for gradient, _ in pairs], into, [v.to(gradient) for gradient, v in pairs], allow_unused=True
    )
    names = SECOND if "dweight" in wanted else (SECOND[0], SECOND[2])
    values = {
        name: torch.zeros_like(tensor) if gradient is None else gradient
        for name, tensor, gradient in zip(names, into, found, strict=True)
    }
    values[SECOND[2]] = values[SECOND[2]] * given.smooth  # on a kink either side's value is right
    return values


class NoSecondDerivative(Exception):
    """create_graph=True gave gradients that cannot be differentiated."""


def why_not_like(y: object, x: Tensor) -> str | None:
    """What is impossible about a kernel's output for that input, or None."""
    if not isinstance(y, Tensor):
        return f"returned a {type(y).__name__}; expected a tensor"
    for what, found, expected in (
        ("shape", tuple(y.shape), tuple(x.shape)),
        ("dtype", y.dtype, x.dtype),
        ("device", y.device, x.device),
    ):
        if found != expected:
            return f"y has {what} {found}; expected the input's, {expected}"
    return None


def _failed(seen: Observation, names: tuple[str, ...] | list[str], error: BaseException) -> Observation:
    text = str(error).strip().split("\n")[0][:300]
    seen.problems.update(dict.fromkeys(names, f"raised {type(error).__name__}: {text}"))
    return seen
