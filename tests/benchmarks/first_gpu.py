"""The first session on a GPU: whether teams work there, and which plans are the fastest. At most ten minutes.

    python -m tests.benchmarks.first_gpu [--json first_gpu.json]

Each part is a process with a time limit of its own, so that one that hangs ends alone: the tests of teams; plans beside
a copy; loads ahead of use (num_stages) for rows; frozen statistics; host time. The file is written after each part.

Exit status: 0 every part is done, 1 one is not, 3 there is no GPU.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

import bncli
from bncli.engine.device import synchronize
from bncli.kernels.fused.tiling import Plan
from bncli.measure.timing import clock

Result = dict[str, Any]
EPS = 1e-5
SHAPES = ((256, 64, 56, 56), (256, 256, 56, 56))  # of ResNet-50
SMALL = (32, 16, 28, 28)  # a call is shorter than its launch
LIMITS_S = {"teams": 150, "plans": 180, "stages": 90, "frozen": 60, "host": 60}  # 9 minutes in all
ROUNDS = 30
HELD = 12  # tiles of 16 bytes a thread, in 48 of its registers


class NarrowPlan(Plan):
    """A plan of at most 128 registers a thread."""

    @property
    def registers(self) -> int:
        return min(128, super().registers)


def resident(cut: Plan, programs: int, processors: int) -> Plan:
    """Teams with so many programs on each multiprocessor, which share 16 warps."""
    warps = 16 // programs
    rows = cut.rows * warps // cut.warps
    tiles, most = -(-cut.lines // rows), programs * processors
    team = min(-(-tiles // HELD), most)
    changed = {
        "rows": rows, "warps": warps, "team": team, "teams": min(cut.slices, most // team),
        "held": min(HELD, -(-tiles // team)), "barrier": "grid",
    }  # fmt: skip
    return NarrowPlan(**vars(cut) | changed)


def tensors(shape: Sequence[int], device: torch.device, channels_last: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """x, in bfloat16, weight and bias."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(*shape, device=device).bfloat16().contiguous(memory_format=layout)
    return x, torch.rand(shape[1], device=device), torch.rand(shape[1], device=device)


def timed(calls: Mapping[str, Callable[[], object]], device: torch.device) -> dict[str, float]:
    """Medians of interleaved samples, in milliseconds."""
    works = {name: clock.in_a_row(call, 1) for name, call in calls.items()}
    return {name: median(ms) for name, ms in clock.interleaved(clock.of(device), works, ROUNDS).items()}


def compared(x: Tensor, calls: Mapping[str, Callable[[], Tensor]], expected: Tensor) -> Result:
    """Milliseconds of those that run and are right, beside a copy; the fastest; and what is wrong with the others."""
    ran, failed = {}, {}
    for name, call in calls.items():
        try:
            torch.testing.assert_close(call(), expected, rtol=2e-2, atol=2e-2)
            ran[name] = call
        except (RuntimeError, AssertionError, ValueError) as error:
            failed[name] = str(error).splitlines()[0]
    ms = timed({**ran, "copy": x.clone}, x.device)
    share = {name: round(ms["copy"] / ms[name], 3) for name in ran}
    return {
        "ms": ms,
        "share_of_copy": share,
        "fastest": max(share, key=lambda name: share[name], default=None),
        "failed": failed,
    }


def plans(device: torch.device, shapes: Sequence[Sequence[int]] = SHAPES) -> Result:
    """forward by the plan as chosen, with one and two programs a multiprocessor, and in two launches."""
    from bncli.kernels.fused import triton_launch

    found: Result = {}
    for shape in shapes:
        x, weight, bias = tensors(shape, device)
        on = triton_launch.processors(device)
        chosen = triton_launch.plan_for(x, on)
        split = triton_launch.plan_for(x, replace(on, cooperative=False))
        arms = {"as chosen": chosen, "two launches": split}
        if on.cooperative:
            arms |= {f"{number} a multiprocessor": resident(chosen, number, on.count) for number in (1, 2)}

        def call(plan: Plan, x: Tensor = x, weight: Tensor = weight, bias: Tensor = bias) -> Tensor:
            return triton_launch.forward(x, weight, bias, None, None, EPS, "relu", False, plan=plan)[0]

        expected = bncli.batch_norm(x, None, None, weight, bias, True, activation="relu", kernel="native")
        calls = {name: partial(call, plan) for name, plan in arms.items()}
        described = {name: str(plan) for name, plan in arms.items()}
        found["x".join(map(str, shape))] = compared(x, calls, expected) | {"plans": described}
    return found


def stages(device: torch.device, shape: Sequence[int] = SHAPES[0]) -> Result:
    """forward of rows, with the loads ahead of use that the kernel's loops ask for, and without."""
    from bncli.kernels.fused import triton, triton_launch

    text, count = re.subn(r"num_stages=\d+", "num_stages=1", Path(triton.__file__).read_text())
    if not count:
        return {"note": "the kernel's loops do not ask for num_stages"}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "without_stages.py")
        path.write_text(text)
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        without = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(without)
        x, weight, bias = tensors(shape, device, channels_last=True)
        cut = triton_launch.plan_for(x, triton_launch.processors(device))
        other = replace(cut, cost_ns=cut.cost_ns + 1)  # the same plan, but of another cache entry

        def call(kernels: Any, plan: Plan) -> Tensor:
            vars(triton_launch)["triton"] = kernels
            return triton_launch.forward(x, weight, bias, None, None, EPS, "relu", False, plan=plan)[0]

        calls = {"with num_stages": lambda: call(triton, cut), "without": lambda: call(without, other)}
        expected = bncli.batch_norm(x, None, None, weight, bias, True, activation="relu", kernel="native")
        return compared(x, calls, expected) | {"plan": str(cut), "loops": count}


def frozen(device: torch.device, shapes: Sequence[Sequence[int]] = SHAPES, kernel: str = "fused") -> Result:
    """Evaluation, by running statistics."""
    found: Result = {}
    for shape in shapes:
        x, weight, bias = tensors(shape, device)
        mean, var = torch.zeros_like(bias), torch.ones_like(weight)

        def call(
            name: str, x: Tensor = x, rest: tuple[Tensor, Tensor, Tensor, Tensor] = (mean, var, weight, bias)
        ) -> Tensor:
            with torch.no_grad():
                return bncli.batch_norm(x, *rest, False, activation="relu", kernel=name)

        calls = {name: partial(call, name) for name in (kernel, "native")}
        found["x".join(map(str, shape))] = compared(x, calls, call("native"))
    return found


def host(
    device: torch.device, shape: Sequence[int] = SMALL, kernel: str = "fused", calls: int = 50, loops: int = 10
) -> Result:
    """Microseconds of host time a call, without waiting for the device: the lowest of some loops."""
    x, weight, bias = tensors(shape, device)
    leaves = [each.requires_grad_() for each in (x, weight, bias)]
    dy, found = torch.ones_like(x), {}
    for name in (kernel, "native"):

        def forward(name: str = name) -> Tensor:
            return bncli.batch_norm(x, None, None, weight, bias, True, activation="relu", kernel=name)

        def both(forward: Callable[[], Tensor] = forward) -> object:
            return torch.autograd.grad(forward(), leaves, dy)

        for way, call in (("forward", forward), ("forward + backward", both)):
            samples = []
            for _ in range(loops):
                synchronize(device)
                start = time.perf_counter()
                for _ in range(calls):
                    call()
                samples.append((time.perf_counter() - start) / calls * 1e6)
            found[f"{name}, {way}"] = min(samples)
    return {"host_us": found}


PARTS: dict[str, Callable[[torch.device], Result]] = {
    "plans": plans, "stages": stages, "frozen": frozen, "host": host
}  # fmt: skip


def command(part: str) -> list[str]:
    if part == "teams":
        return [sys.executable, "-m", "pytest", "-x", "-q", "-n0", "-m", "cuda", "tests/kernels/fused/test_team.py"]
    return [sys.executable, "-m", "tests.benchmarks.first_gpu", "--part", part]


def run_part(arguments: Sequence[str], limit_s: float) -> Result:
    """How a process ended, and the JSON in its last line, or its last words."""
    began = time.monotonic()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(arguments, stdout=output, stderr=subprocess.STDOUT, text=True)
        try:
            outcome = "done" if process.wait(limit_s) == 0 else f"failed with status {process.returncode}"
        except subprocess.TimeoutExpired:
            process.kill()  # without waiting: a process that the driver holds does not end
            outcome = f"ended after {limit_s:g} s"
        output.seek(0)
        lines = output.read().strip().splitlines() or [""]
    try:
        result = json.loads(lines[-1])
    except ValueError:
        result = lines[-20:]
    return {"outcome": outcome, "seconds": round(time.monotonic() - began, 1), "result": result}


def session(
    path: Path, card: str, limits_s: Mapping[str, float] = LIMITS_S, commands: Callable[[str], list[str]] = command
) -> bool:
    """Run the parts and write what they found. Returns whether every part is done."""
    versions = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    if importlib.util.find_spec("triton"):
        versions["triton"] = version("triton")
    found: Result = {"date": datetime.datetime.now().isoformat(timespec="seconds"), "card": card, "versions": versions}
    found["parts"] = {}
    for part, limit_s in limits_s.items():
        found["parts"][part] = run_part(commands(part), limit_s)
        print(f"{part}: {found['parts'][part]['outcome']}", flush=True)
        path.write_text(json.dumps(found, indent=2) + "\n")
    return all(part["outcome"] == "done" for part in found["parts"].values())


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("first_gpu.json"), help="the file to write")
    parser.add_argument("--part", choices=PARTS, help="one part, in this process; its result is printed")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("There is no GPU that PyTorch can use, so nothing was run.")
        return 3
    if options.part:
        print(json.dumps(PARTS[options.part](torch.device("cuda"))))
        return 0
    return 0 if session(options.json, torch.cuda.get_device_name()) else 1


if __name__ == "__main__":
    sys.exit(main())
