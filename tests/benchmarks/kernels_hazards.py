"""What can go wrong with a right kernel: in a CUDA graph, on two streams at once, under torch.compile and autocast, and
beyond 2^31 elements. Each function checks one case in a process of its own, which is killed when it hangs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bncli.engine import device as devices
from bncli.errors import BncliError
from bncli.measure.profile import candidates
from bncli.measure.reference import case as cases
from bncli.measure.reference.case import Inputs
from bncli.measure.reference.judge import large
from bncli.report.text import finding_text
from bncli.results.profile import Case
from tests.benchmarks.kernels_check import (
    Apply,
    Check,
    apply,
    call_of,
    judged,
    make,
    outputs,
    repeated,
    rule,
    within,
)


def compiled(case: Case, kernel: str, device_name: str) -> list[Check]:
    """torch.compile(fullgraph=True), forward and backward, within the bounds of the kernel called by itself."""
    shape = large(cases.timed(case), torch.device(device_name))
    return [judged(shape, kernel, "torch.compile(fullgraph=True)", case, candidates.compiled(call_of(kernel)))]


def under_autocast(case: Case, kernel: str, device_name: str) -> list[Check]:
    """Under autocast to bfloat16: native's dtype, and within the bounds. Batch norm is on none of autocast's lists."""
    device = torch.device(device_name)
    shape = large(cases.timed(case), device)

    def call(*given: Any) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return call_of(kernel)(*given)

    with torch.autocast(device.type, torch.bfloat16):
        found, native = (outputs(case, call_of(name), shape.given)["forward"].dtype for name in (kernel, "native"))
    return [
        judged(shape, kernel, "autocast", case, call),
        Check("autocast's dtype", str(case), found == native, f"y is {found}, native's {native}"),
    ]


@dataclass(frozen=True)
class Captured:
    """One training step, forward and backward, in a CUDA graph; a replay reads `inputs` and writes `outputs`."""

    replay: Callable[[], object]
    inputs: Inputs
    outputs: dict[str, Tensor]


def step(forward: Apply, inputs: Inputs) -> dict[str, Tensor]:
    leaves = inputs.leaves()
    y = forward(inputs)
    gradients = torch.autograd.grad(y, list(leaves.values()), inputs.g)
    return {"forward": y.detach(), **dict(zip(leaves, gradients, strict=True))}


def capture(case: Case, kernel: str, device: torch.device, seed: int) -> Captured:
    """As torch's notes on CUDA graphs have it: warmed up on a side stream, then captured."""
    forward, inputs = apply(case, kernel), make(case, device, seed)
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(3):
            step(forward, inputs)
    torch.cuda.current_stream(device).wait_stream(side)
    devices.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step(forward, inputs)
    return Captured(graph.replay, inputs, found)


def _overwrite(inputs: Inputs, others: Inputs) -> None:
    """The values of `others` in the memory of `inputs`, which a graph reads."""
    with torch.no_grad():
        for name, t in vars(inputs).items():
            if t is not None:
                t.copy_(getattr(others, name))


def _running(inputs: Inputs) -> dict[str, Tensor]:
    found = {"running_mean": inputs.running_mean, "running_var": inputs.running_var}
    return {name: t for name, t in found.items() if t is not None}


def graph_replays(
    case: Case,
    kernel: str,
    device_name: str,
    replays: int,
    captured_by: Callable[[Case, str, torch.device, int], Captured] = capture,
) -> list[Check]:
    """Many replays on new values give the bits of eager calls each time; the running statistics move once a replay."""
    device = torch.device(device_name)
    captured = captured_by(case, kernel, device, 1)
    others = [make(case, device, seed=2 + k) for k in range(3)]
    eager = [outputs(case, call_of(kernel), other) for other in others]
    wrong: list[str] = []
    for replay in range(replays):
        k = replay % len(others)
        _overwrite(captured.inputs, others[k])
        captured.replay()
        found = {**captured.outputs, **_running(captured.inputs)}
        wrong += [f"{name} in replay {replay}" for name in eager[k] if not torch.equal(found[name], eager[k][name])]
        if wrong:
            break
    for _ in range(replays):  # back to back, with nothing between: the barrier's counter must find its way by itself
        captured.replay()
    devices.synchronize(device)
    k = (replays - 1) % len(others)
    last = captured.outputs
    wrong += [f"{name} back to back" for name in last if not torch.equal(last[name], eager[k][name])]
    claim = f"{2 * replays} CUDA graph replays"
    return [Check(claim, str(case), not wrong, f"other bits than eager: {', '.join(wrong[:4])}" if wrong else "")]


def two_streams(case: Case, kernel: str, device_name: str, repeats: int) -> list[Check]:
    """Two streams at once, eager and then as graphs: no hang, and both get what each gets alone."""
    device = torch.device(device_name)
    forward = apply(case, kernel)
    both = [make(case, device, seed) for seed in (1, 2)]
    alone = [step(forward, inputs) for inputs in both]
    streams = [torch.cuda.Stream(device) for _ in both]
    devices.synchronize(device)
    last: list[dict[str, Tensor]] = [{}, {}]
    for _ in range(repeats):
        for k, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                last[k] = step(forward, both[k])
    devices.synchronize(device)
    checks = [repeated(alone[k], last[k], f"stream {k + 1} of 2 at once, eager", case) for k in (0, 1)]
    graphs = [capture(case, kernel, device, seed) for seed in (1, 2)]
    devices.synchronize(device)
    for _ in range(repeats):
        for captured, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                captured.replay()
    devices.synchronize(device)
    for k in (0, 1):
        claim = f"stream {k + 1} of 2 at once, graphs"
        checks.append(repeated(alone[k], graphs[k].outputs, claim, case))
    return checks


def beyond_32_bits(case: Case, kernel: str, device_name: str) -> list[Check]:
    """More than 2^31 elements: refused with an error, or right in the first, a middle and the last channel."""
    device = torch.device(device_name)
    assert case.elements > 2**31
    inputs = _large(case, device)
    try:
        found = step(apply(case, kernel), inputs)
        devices.synchronize(device)
    except (ValueError, RuntimeError, BncliError) as error:
        if "illegal" in str(error) or "out of memory" in str(error):
            return [Check("beyond 2^31 elements", str(case), False, f"{type(error).__name__}: {error}")]
        return [Check("beyond 2^31 elements", str(case), True, f"refused: {error}")]
    checks = []
    for channel in (0, case.shape[1] // 2, case.shape[1] - 1):
        one = Case((case.shape[0], 1, *case.shape[2:]), case.operation, case.dtype, affine=case.affine, tracked=False)
        part = inputs.each(lambda t, channel=channel: _channel(t, channel))  # type: ignore[misc]
        cut = {name: _channel(t, channel) for name, t in found.items()}
        wrong = within(cases.timed(one), part, cut, outputs(one, call_of("native"), part), rule(kernel))
        detail = "" if wrong is None else f"{wrong.quantity}: {finding_text(wrong)}"
        checks.append(Check(f"beyond 2^31 elements, channel {channel}", str(case), wrong is None, detail))
    return checks


def _large(case: Case, device: torch.device) -> Inputs:
    """As `make`, with no second copy in float32 of tensors that are gigabytes."""
    source = torch.Generator(device).manual_seed(0)
    x, dy = (
        torch.empty(case.shape, dtype=cases.timed(case).stored, device=device).normal_(0.5, 1.0, generator=source)
        for _ in range(2)
    )
    weight, bias = (torch.randn(case.shape[1], generator=source, device=device) for _ in range(2))
    return Inputs(x, weight, bias, None, None, None, dy)


def _channel(t: Tensor, channel: int) -> Tensor:
    return (t[channel : channel + 1] if t.dim() == 1 else t[:, channel : channel + 1]).detach().contiguous()
