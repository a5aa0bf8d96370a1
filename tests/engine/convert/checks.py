"""What the tests of convert share: a converted copy, its report, changes to both, and their equality."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from bncli.engine.convert import Conversion, convert
from bncli.engine.models.norms import BatchNorm, BatchNorm2d
from bncli.kernels import native

SEAM: Any = native.batch_norm  # native as a function, which takes the way of every other kernel
FUSED_ADD = "batch norm + residual add + relu"


def converted(model: nn.Module, kernel: Any = SEAM, **options: Any) -> Any:
    return convert(copy.deepcopy(model), kernel, **options)


def report(model: nn.Module) -> Conversion:
    found = model.bncli_conversion
    assert isinstance(found, Conversion)
    return found


def operations(model: nn.Module) -> dict[str, str | None]:
    return {norm.name: norm.operation for norm in report(model).norms}


def reason(model: nn.Module, name: str) -> str:
    found = next(norm.reason for norm in report(model).norms if norm.name == name)
    assert found is not None
    return found


def fused(model: nn.Module) -> int:
    return sum("+" in (norm.operation or "") for norm in report(model).norms)


def same(one: nn.Module, other: nn.Module, *inputs: Any, steps: int = 3) -> None:
    """Losses, gradients of weights and inputs, and state of two models over some steps of training, then evaluation."""
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.05) for model in (one, other)]
    for step in range(steps):
        found = []
        for model, optimizer in zip((one, other), optimizers, strict=True):
            torch.manual_seed(step)  # of dropout
            given = [copy.deepcopy(x).requires_grad_() if isinstance(x, Tensor) else x for x in inputs]
            optimizer.zero_grad()
            loss = model.train()(*given).square().mean()
            loss.backward()
            gradients = [parameter.grad for parameter in model.parameters()]
            found.append((loss.detach(), gradients, [x.grad for x in given if isinstance(x, Tensor)]))
            optimizer.step()
        torch.testing.assert_close(found[1], found[0])
    assert list(one.state_dict()) == list(other.state_dict())
    torch.testing.assert_close(other.state_dict(), one.state_dict())
    results = []
    for model in (one, other):
        torch.manual_seed(steps)
        results.append(model.eval()(*inputs))
    torch.testing.assert_close(results[1], results[0])
    one.train(), other.train()


class LeafNorms(fx.Tracer):
    """A user's own tracer, to which batch norms are leaves."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, BatchNorm) or super().is_leaf_module(m, module_qualified_name)


def replace_the_forward_of_the_norm(m: Any) -> None:
    m.norm.forward = lambda x: 2 * x


# Changes to a model whose `norm`, of 3 channels, is followed by `act`, a LeakyReLU.
CHANGES: dict[str, Callable[[Any], Any]] = {
    "another activation": lambda m: setattr(m, "act", nn.Tanh()),
    "another LeakyReLU": lambda m: setattr(m, "act", nn.LeakyReLU(0.5)),  # finding 5 of the review
    "another slope": lambda m: setattr(m.act, "negative_slope", 0.5),
    "a norm with an activation": lambda m: setattr(m, "norm", BatchNorm2d(3, activation="silu")),
    "no norm": lambda m: setattr(m, "norm", nn.Identity()),
    "the norm's forward": replace_the_forward_of_the_norm,
    "evaluation": lambda m: m.norm.eval(),
    "a hook on the norm": lambda m: m.norm.register_forward_hook(lambda module, inputs, output: output - 1),
    "a hook on the activation": lambda m: m.act.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,)),
}
