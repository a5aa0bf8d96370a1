"""Times of a case's arms, and what the issue's targets say of them."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from bncli.measure.profile.candidates import compiled
from bncli.measure.reference.case import arguments, floor_bytes, timed
from bncli.measure.timing import clock as timing
from bncli.measure.timing.clock import Clock, Deadline, Spread, Work
from bncli.results.environment import Interval
from bncli.results.profile import Case
from tests.benchmarks.kernels_check import Apply, Check, accuracy, apply, call_of, make, outputs

DIRECTIONS = ("both", "forward", "backward")
LAYER_SHAPES = (  # (C, H, W) of ResNet-50
    (64, 112, 112),
    (64, 56, 56),
    (256, 56, 56),
    (128, 28, 28),
    (512, 28, 28),
    (256, 14, 14),
    (1024, 14, 14),
    (512, 7, 7),
    (2048, 7, 7),
)
SMALL_SHAPES = ((128, 100), (8, 64, 14, 14), (32, 16, 28, 28), (32, 256, 14, 14), (32, 512, 7, 7), (32, 1024, 7, 7))
LARGE_BYTES = 32e6  # from which on the targets of a large tensor are meant
AGAINST_EAGER = {"bn": 1.4, "bn+relu": 2.2, "bn+add+relu": 1.9}
AGAINST_COMPILE = {"bn": 1.3, "bn+relu": 1.6, "bn+add+relu": 1.4}
AGAINST_CUDNN = {"bn": 1.0, "bn+relu": 1.5, "bn+add+relu": 1.4}
SHARE_OF_COPY, SMALL_AT_LEAST = 0.85, 0.9


@dataclass(frozen=True)
class Timed:
    """Samples of one case, in ms per call: forward, backward, or both; after a flush of the cache or after itself.

    What `what` says: device (between two events), host (to enqueue a call), loop (a call among many, until done).
    """

    case: Case
    direction: str
    what: str
    cold: bool
    samples_ms: dict[str, tuple[float, ...]]

    def median_ms(self, arm: str) -> float:
        return statistics.median(self.samples_ms[arm])

    def over(self, reference: str, arm: str) -> Spread:
        """How many times faster `arm` is than `reference`, paired by round."""
        return timing.times_faster(self.samples_ms[reference], self.samples_ms[arm])

    def floor_gb_per_s(self, arm: str) -> float:
        """Of the bytes that a single read and write of each tensor moves, whatever the arm really moved."""
        return timing.gb_per_s(floor_bytes(self.case, self.direction), self.median_ms(arm))


@dataclass(frozen=True)
class Target:
    """One figure beside what it ought to be. `value` None: not measured. `interval`: 95 %, where there is one."""

    name: str
    value: float | None
    at_least: float
    interval: Interval | None = None

    @property
    def met(self) -> bool:
        return self.value is not None and self.value >= self.at_least

    @property
    def in_doubt(self) -> bool:
        """Whether its interval holds values on both sides."""
        if self.value is None or self.interval is None:
            return False
        low, high = self.interval.low, self.interval.high
        return (low is None or low < self.at_least) and (high is None or high >= self.at_least)


def works(case: Case, device: torch.device, arms: dict[str, Apply]) -> dict[str, dict[str, Work]]:
    """Direction -> arm -> its work. All arms share the same tensors; gradients are returned, not accumulated."""
    inputs = make(case, device)
    leaves = list(inputs.leaves().values())

    def of(forward: Apply) -> dict[str, Work]:
        def both(_: object) -> None:
            torch.autograd.grad(forward(inputs), leaves, inputs.g)

        return {
            "both": Work(both),
            "forward": Work(lambda _: forward(inputs)),
            "backward": Work(lambda y: torch.autograd.grad(y, leaves, inputs.g), lambda: forward(inputs)),
        }

    each = {arm: of(forward) for arm, forward in arms.items()}
    return {direction: {arm: found[direction] for arm, found in each.items()} for direction in DIRECTIONS}


def arms_of(case: Case, candidate: str, with_compile: bool) -> dict[str, Apply]:
    arms = {candidate: apply(case, candidate), "eager": apply(case, "native")}
    if with_compile:
        form, call = timed(case), compiled(call_of("native"))
        arms["compile"] = lambda given: call(*arguments(form, given))
    return arms


def ready(case: Case, candidate: str, device_name: str, with_compile: bool) -> list[Check]:
    """Right, and everything that timing it compiles is in the caches on disk."""
    checks = accuracy(case, candidate, device_name)
    if with_compile:
        outputs(case, compiled(call_of("native")), make(case, torch.device(device_name)))
    return checks


def layer_cases(cuda: bool, quick: bool) -> list[Case]:
    """Batch 256, then 32: the layers that the targets are for come first, so that a deadline cuts off the rest."""
    if not cuda:
        return [Case((2, 8, 6, 6), operation, "fp32") for operation in AGAINST_EAGER]
    shapes = [LAYER_SHAPES[k] for k in (1, 4, 6)] if quick else LAYER_SHAPES
    kinds = (("bf16", "contiguous"), ("fp16", "channels_last"))
    batches = (256,) if quick else (256, 32)
    return [
        Case((batch, *shape), operation, dtype, layout)
        for batch in batches
        for dtype, layout in kinds
        for shape in shapes
        for operation in AGAINST_EAGER
    ]


def time_case(
    case: Case, device: torch.device, clock: Clock, arms: dict[str, Apply], rounds: int, deadline: Deadline
) -> Iterator[Timed]:
    """Cold in both directions and in each, then warm in both."""
    found = works(case, device, arms)
    for work in found["both"].values():
        timing.warm_up(clock, work, least_ms=20.0 if device.type == "cuda" else 1.0)
    for direction, cold in (*((direction, True) for direction in DIRECTIONS), ("both", False)):
        samples = timing.interleaved(clock, found[direction], rounds, cold=cold, deadline=deadline)
        yield Timed(case, direction, "device", cold, samples)


def time_small(
    case: Case, device: torch.device, clock: Clock, arms: dict[str, Apply], rounds: int, calls: int
) -> Iterator[Timed]:
    """Warm on the device, then the host's time a call and a call's time in a loop."""
    found = works(case, device, arms)["both"]
    for work in found.values():
        timing.warm_up(clock, work, least_ms=5.0)
    yield Timed(case, "both", "device", False, timing.interleaved(clock, found, rounds, cold=False))
    host, whole = timing.in_a_loop(clock, found, rounds, calls=calls)
    yield Timed(case, "both", "host", False, host)
    yield Timed(case, "both", "loop", False, whole)


def targets(timed: Timed, candidate: str, copy_gb_per_s: float) -> list[Target]:
    """What the issue asks of that case, for cold samples of both directions and for a small tensor's; else nothing."""
    if timed.direction != "both" or timed.what == "host":
        return []
    case, eager = timed.case, timed.over("eager", candidate).median
    if case.tensor_bytes < LARGE_BYTES:
        return [Target(f"small, {timed.what}, against eager", eager, SMALL_AT_LEAST)]
    if not timed.cold or case.operation not in AGAINST_EAGER:
        return []
    kind = f"{case.dtype} {case.layout} {case.operation}"
    if (case.dtype, case.layout) == ("fp16", "channels_last"):
        return [Target(f"{kind}, against cuDNN", eager, AGAINST_CUDNN[case.operation])]
    share = timed.floor_gb_per_s(candidate) / copy_gb_per_s
    found = [Target(f"{kind}, share of copy", share, SHARE_OF_COPY)]
    found.append(Target(f"{kind}, against eager", eager, AGAINST_EAGER[case.operation]))
    if "compile" in timed.samples_ms:
        compiled = timed.over("compile", candidate).median
        found.append(Target(f"{kind}, against torch.compile", compiled, AGAINST_COMPILE[case.operation]))
    return found
