"""Calls on small tensors, where a call's own cost shows: microseconds of the function and of the module, in a loop."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bncli
from bncli.measure.timing import clock
from bncli.measure.timing.speedup import faster
from bncli.results.profile import Speedup

SHAPES = ((60, 100), (60, 1000), (32, 64, 7, 7))  # of an MLP's hidden layers, and a narrow last stage of a ResNet
SAMPLE_MS = 5.0  # of calls in a row
MOST_CALLS = 500
ROUNDS = 21

Call = Callable[[], object]


class NativeThenReLU(nn.Module):
    """What a model without bncli has."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(x))


def function(x: Tensor, kernel: str) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """bncli.batch_norm with ReLU on x (N, C, *S), ready to be called, and what its gradients are taken in."""
    weight, bias = (torch.full((x.size(1),), value, device=x.device, requires_grad=True) for value in (1.5, 0.1))
    mean, var = torch.zeros(x.size(1), device=x.device), torch.ones(x.size(1), device=x.device)
    call = bncli.batch_norm
    return (
        lambda: call(x, mean, var, weight, bias, training=True, activation="relu", kernel=kernel),
        [x, weight, bias],
    )


def module(x: Tensor, kernel: str) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """The same by the modules."""
    if kernel == "native":
        model: nn.Module = NativeThenReLU((nn.BatchNorm1d if x.dim() == 2 else nn.BatchNorm2d)(x.size(1)))
    else:
        model = (bncli.BatchNorm1d if x.dim() == 2 else bncli.BatchNorm2d)(x.size(1), activation="relu", kernel=kernel)
    model.to(x.device)
    return lambda: model(x), [x, *model.parameters()]


def measure(
    device: torch.device, *, kernel: str = "fused", shapes: Sequence[tuple[int, ...]] = SHAPES, rounds: int = ROUNDS
) -> Iterator[tuple[tuple[int, ...], str, dict[str, float], Speedup]]:
    """Shape, what was called, microseconds a call of native and of the kernel, and the ratio.

    Raises AssertionError where the kernel's results are not native's: a wrong one is not timed.
    """
    for shape in shapes:
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()
        dy = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device)
        for form in (function, module):
            made = {name: form(x, name) for name in ("native", kernel)}
            forward: dict[str, Call] = {name: call for name, (call, _) in made.items()}
            both = {name: _forward_and_backward(*each, dy) for name, each in made.items()}
            for way, calls in (("forward", forward), ("forward + backward", both)):
                torch.testing.assert_close(calls[kernel](), calls["native"](), rtol=1e-4, atol=1e-4)
                yield (shape, f"{form.__name__}, {way}", *_timed(device, calls, kernel, rounds))


def _forward_and_backward(call: Callable[[], Tensor], leaves: list[Tensor], dy: Tensor) -> Call:
    return lambda: torch.autograd.grad(call(), leaves, dy)


def _timed(device: torch.device, calls: dict[str, Call], kernel: str, rounds: int) -> tuple[dict[str, float], Speedup]:
    timer = clock.LoopClock(device)
    few = {name: clock.in_a_row(call, 5) for name, call in calls.items()}
    first_ms = clock.interleaved(timer, few, 2)["native"][-1]
    count = max(5, min(MOST_CALLS, round(SAMPLE_MS / max(first_ms, 1e-3))))
    ms = clock.interleaved(timer, {name: clock.in_a_row(call, count) for name, call in calls.items()}, rounds)
    return {name: 1e3 * statistics.median(samples) for name, samples in ms.items()}, faster(ms["native"], ms[kernel])
