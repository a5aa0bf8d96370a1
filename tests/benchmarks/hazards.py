"""What can go wrong with a right kernel on a GPU: CUDA graphs, two streams at once, torch.compile with inductor.

    python -m tests.benchmarks.hazards --device cuda

Each check holds the fused kernel to its own eager calls, bit for bit. Exit status 1 if one fails.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import bncli
from bncli.engine.device import synchronize

Values = dict[str, Tensor]
REPEATS = 1000


@dataclass(frozen=True)
class Case:
    """A training step of batch norm and ReLU, with a residual or without."""

    shape: tuple[int, ...]  # (N, C, H, W)
    dtype: torch.dtype = torch.bfloat16
    channels_last: bool = False
    residual: bool = False
    kernel: str = "fused"

    def inputs(self, device: torch.device, seed: int) -> Values:
        source = torch.Generator(device).manual_seed(seed)
        layout = torch.channels_last if self.channels_last else torch.contiguous_format

        def normal(dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.randn(shape, generator=source, device=device).to(dtype)

        names = ("x", "dy", "residual") if self.residual else ("x", "dy")
        found = {name: normal(self.dtype, *self.shape).contiguous(memory_format=layout) for name in names}
        vectors = ("weight", "bias", "running_mean", "running_var")
        found |= {name: normal(torch.float32, self.shape[1]).abs() for name in vectors}
        return {name: t.requires_grad_(name in ("x", "weight", "bias", "residual")) for name, t in found.items()}

    def forward(self, inputs: Values) -> Tensor:
        named: dict[str, Any] = {name: t for name, t in inputs.items() if name not in ("x", "dy")}
        return bncli.batch_norm(inputs["x"], training=True, activation="relu", kernel=self.kernel, **named)

    def step(self, inputs: Values, forward: Callable[[Values], Tensor] | None = None) -> Values:
        """y and the gradients; the running statistics among the inputs move."""
        leaves = {name: t for name, t in inputs.items() if t.requires_grad}
        y = (forward or self.forward)(inputs)
        gradients = torch.autograd.grad(y, list(leaves.values()), inputs["dy"])
        return {"y": y.detach(), **{f"d{name}": t for name, t in zip(leaves, gradients, strict=True)}}


# Some need one program for a channel and some several, contiguous and channels last.
CASES = [
    Case((32, 64, 56, 56)),
    Case((32, 64, 56, 56), torch.float16, channels_last=True, residual=True),
    Case((32, 256, 14, 14), residual=True),
    Case((8, 16, 7, 7)),
]


@dataclass(frozen=True)
class Captured:
    """One training step in a CUDA graph: a replay reads `inputs` and writes `outputs`."""

    replay: Callable[[], object]
    inputs: Values
    outputs: Values


def capture(case: Case, device: torch.device, seed: int) -> Captured:
    """As torch's notes on CUDA graphs have it: warmed up on a side stream, then captured."""
    inputs, side = case.inputs(device, seed), torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(3):
            case.step(inputs)
    torch.cuda.current_stream(device).wait_stream(side)
    synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = case.step(inputs)
    return Captured(graph.replay, inputs, outputs)


def different(found: Values, expected: Values) -> list[str]:
    """The names of the results that have other bits."""
    return [name for name, t in expected.items() if not torch.equal(found[name], t)]


def graph_replays(
    case: Case, device: torch.device, repeats: int, captured_by: Callable[..., Captured] = capture
) -> list[str]:
    """Replays on new values give what eager calls give, running statistics included; then replays without a pause."""
    captured = captured_by(case, device, 1)
    others = [case.inputs(device, seed) for seed in (2, 3, 4)]
    before = [{name: t.detach().clone() for name, t in other.items()} for other in others]
    moved = ("running_mean", "running_var")
    eager = [{**case.step(other), **{name: other[name] for name in moved}} for other in others]
    for number in range(repeats):
        with torch.no_grad():
            for name, t in before[number % 3].items():
                captured.inputs[name].copy_(t)
        captured.replay()
        wrong = different({**captured.inputs, **captured.outputs}, eager[number % 3])
        if wrong:
            return [f"{name} in replay {number}" for name in wrong]
    for _ in range(repeats):  # the barrier's counter must be 0 again by itself
        captured.replay()
    synchronize(device)
    last = {name: t for name, t in eager[(repeats - 1) % 3].items() if name in captured.outputs}
    return [f"{name} in replays without a pause" for name in different(captured.outputs, last)]


def two_streams(case: Case, device: torch.device, repeats: int) -> list[str]:
    """Two streams at once, in eager calls and then in graphs, give what each gives alone."""
    both = [case.inputs(device, seed) for seed in (1, 2)]
    expected = [case.step(inputs) for inputs in both]
    streams = [torch.cuda.Stream(device) for _ in both]
    graphs = [capture(case, device, seed) for seed in (1, 2)]
    synchronize(device)
    found: list[Values] = [{}, {}]
    for _ in range(repeats):
        for k, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                found[k] = case.step(both[k])
    synchronize(device)
    wrong = [f"{name} in eager calls" for k in (0, 1) for name in different(found[k], expected[k])]
    for _ in range(repeats):
        for captured, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                captured.replay()
    synchronize(device)
    return wrong + [f"{name} in graphs" for k in (0, 1) for name in different(graphs[k].outputs, expected[k])]


def compiled(case: Case, device: torch.device, backend: str = "inductor") -> list[str]:
    """torch.compile takes the whole of it, and gives the same."""
    forward = torch.compile(case.forward, fullgraph=True, dynamic=False, backend=backend)
    expected = case.step(case.inputs(device, 1))
    return different(case.step(case.inputs(device, 1), forward), expected)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--repeats", type=int, default=REPEATS, help="calls and replays of each check")
    options = parser.parse_args(arguments)
    device, failed = torch.device(options.device), False
    for case in CASES:
        checks = {
            f"{2 * options.repeats} graph replays": lambda: graph_replays(case, device, options.repeats),  # noqa: B023
            "two streams at once": lambda: two_streams(case, device, options.repeats),  # noqa: B023
            "torch.compile": lambda: compiled(case, device),  # noqa: B023
        }
        for name, check in checks.items():
            wrong = check()
            failed = failed or bool(wrong)
            print(f"{'WRONG' if wrong else 'right'}  {name}: {case} {', '.join(wrong[:4])}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
