"""The kernels that a profile sets side by side, each called alike: by name, a peer's, or the user's own function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bncli import kernels
from bncli.errors import RecipeError
from bncli.kernels import native
from bncli.measure.profile import implementation, peers
from bncli.measure.reference import case as cases
from bncli.measure.reference.candidate import Candidate, candidate
from bncli.measure.reference.case import Apply, Inputs
from bncli.measure.timing.clock import Work
from bncli.names import PROFILE_KERNELS
from bncli.results.profile import Case, Direction


@dataclass(frozen=True)
class Arm:
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


Source = Callable[[Case], Arm]  # raises Unavailable, with the reason, where the kernel does not take the case


def sources(names: Sequence[str], device: torch.device, allow_code: bool) -> dict[str, Source]:
    """Where each kernel's arms come from. Raises RecipeError for a name that is none, or a function that is not there.

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
        own = candidate(name, "batch", device, allow_code)
        return lambda case: Arm(_own(own, case))
    if name in peers.PEERS:
        return lambda case: _peer(name, case, device)
    if name == "compiled":
        return lambda case: Arm(
            cases.compiled(cases.apply(case, "native")), implementation.ran(case, name, device), compiles=True
        )

    def by_name(case: Case) -> Arm:
        kernels.get(name, device)
        return Arm(cases.apply(case, name), implementation.ran(case, name, device))

    return by_name


def _peer(name: str, case: Case, device: torch.device) -> Arm:
    found = peers.PEERS[name](case, device)
    return Arm(found.forward, found.ran, overwrites=found.overwrites, positive_weight=found.positive_weight)


def _own(own: Candidate, case: Case) -> Apply:
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
