"""Small tensors on a CPU, where a call's own cost shows: microseconds a call, of the function and of the module."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bncli
from bncli.measure.reference.case import Inputs, timed
from bncli.measure.reference.judge import large
from bncli.measure.timing import clock as timing
from bncli.measure.timing import speedup
from bncli.measure.timing.clock import Deadline, Work
from bncli.results.profile import Case
from tests.benchmarks.kernels_check import CANDIDATES, apply, judged
from tests.benchmarks.kernels_report import faster
from tests.benchmarks.kernels_sections import Run
from tests.benchmarks.kernels_speed import Target

SHAPES = ((60, 100), (60, 1000), (32, 64, 7, 7))  # of an MLP's hidden layers, and a ResNet's last stage, narrow
AT_LEAST = 1.0
SAMPLE_MS = 5.0  # of calls in a row
MOST_CALLS = 500
ROUNDS = 21

Forward = Callable[[Tensor], Tensor]


class NativeThenReLU(nn.Module):
    """What a model without bncli has."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(x))


def module_of(case: Case, kernel: str) -> nn.Module:
    """The batch norm with ReLU of a case as a module: torch's own for native, or bncli's with that kernel."""
    flat, channels = len(case.shape) == 2, case.shape[1]
    if kernel == "native":
        return NativeThenReLU((nn.BatchNorm1d if flat else nn.BatchNorm2d)(channels))
    own = bncli.BatchNorm1d if flat else bncli.BatchNorm2d
    return own(channels, activation="relu", kernel=CANDIDATES[kernel])


def call_of_module(module: nn.Module) -> Callable[..., Tensor]:
    """The module, called like bncli.batch_norm, with the parameters and statistics of each call in place of its own."""

    def call(x: Tensor, running_mean: Tensor, running_var: Tensor, weight: Tensor, bias: Tensor, *_: Any) -> Tensor:
        given = {"running_mean": running_mean, "running_var": running_var, "weight": weight, "bias": bias}
        named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        own = {name: given.get(name.rpartition(".")[2], t) for name, t in named.items()}
        y: Tensor = torch.func.functional_call(module, own, (x,))
        return y

    return call


def small(run: Run, deadline: Deadline, shapes: Sequence[tuple[int, ...]] = SHAPES) -> None:
    run.report.heading("Small tensors, fp32, bn+relu, training: microseconds a call, in a loop")
    for case in (Case(shape, "bn+relu", "fp32") for shape in shapes):
        if deadline.passed:
            run.report.note(f"small, {case}: for lack of time")
            continue
        shape = large(timed(case), run.device)
        modules = {name: module_of(case, name) for name in ("native", run.candidate)}
        in_module = call_of_module(modules[run.candidate])
        checks = [judged(shape, run.candidate, "small", case), judged(shape, run.candidate, "small", case, in_module)]
        run.report.check(checks)
        if not all(check.passed for check in checks):
            continue
        functions = {name: function_arm(case, name, shape.given) for name in modules}
        inside = {name: module_arm(module, shape.given) for name, module in modules.items()}
        for form, arms in (("function", functions), ("module", inside)):
            for way in ("forward", "forward + backward"):
                _time(run, case, f"{form}, {way}", {name: arm[way] for name, arm in arms.items()}, deadline)


def function_arm(case: Case, kernel: str, inputs: Inputs) -> dict[str, Callable[[], object]]:
    forward = apply(case, kernel)
    leaves = list(inputs.leaves().values())
    return {
        "forward": lambda: forward(inputs),
        "forward + backward": lambda: torch.autograd.grad(forward(inputs), leaves, inputs.g),
    }


def module_arm(module: nn.Module, inputs: Inputs) -> dict[str, Callable[[], object]]:
    x, dy = inputs.x, inputs.g
    leaves = [x, *module.parameters()]
    return {
        "forward": lambda: module(x),
        "forward + backward": lambda: torch.autograd.grad(module(x), leaves, dy),
    }


def _time(run: Run, case: Case, what: str, calls: dict[str, Callable[[], object]], deadline: Deadline) -> None:
    count = _calls(run, calls["native"])
    works = {name: Work(_repeated(call, count), calls=count) for name, call in calls.items()}
    rounds = min(run.rounds, ROUNDS)
    samples = timing.interleaved(run.clock, works, rounds, cold=False, deadline=deadline, fewest=speedup.FEWEST_ROUNDS)
    found = speedup.faster(samples["native"], samples[run.candidate])
    us = {name: 1e3 * statistics.median(ms) for name, ms in samples.items()}
    shape = "x".join(map(str, case.shape))
    run.report.record("small", case=str(case), what=what, samples_ms=samples)
    run.report.line(
        f"{shape:10} {what:28} native {us['native']:7.1f} us  {run.candidate} {us[run.candidate]:7.1f} us a call  "
        f"{faster(found)}"
    )
    run.report.target("", [Target(f"small, {shape}, {what}", found.value, AT_LEAST, found.interval)])


def _repeated(call: Callable[[], object], count: int) -> Callable[[object], None]:
    def run(_: object) -> None:
        for _ in range(count):
            call()

    return run


def _calls(run: Run, call: Callable[[], object]) -> int:
    """As many as a sample of SAMPLE_MS holds."""
    timed = timing.interleaved(run.clock, {"": Work(_repeated(call, 5), calls=5)}, 3, cold=False)[""]
    return max(5, min(MOST_CALLS, round(SAMPLE_MS / max(min(timed), 1e-3))))
