"""Does the gate decide, on a real kernel: `python -m tests.benchmarks.gate` (about five minutes, on a CPU).

A quick baseline of a kernel that is torch's own batch norm, then the kernel slowed 1.5, 3 and 8 times, and 20 times as
it was. Every profile is a process of its own, as in CI. Targets: every slowed one fails, the same code passes 19 of 20
times.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

ROOT = Path(__file__).parent.parent.parent
SLOWED = "BNCLI_BENCHMARK_SLOWED"  # in the environment: how many times slower the kernel is
FACTORS = (1.5, 3.0, 8.0)


def slowed(work: Callable[[], Any]) -> Any:
    """The result of `work`, returned when SLOWED times its own time has passed."""
    began = time.perf_counter()
    found = work()
    end = began + float(os.environ.get(SLOWED, "1")) * (time.perf_counter() - began)
    while time.perf_counter() < end:
        pass
    return found


class Slowed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, *others: Any) -> Tensor:
        ctx.leaves = [leaf.detach().requires_grad_() for leaf in (x, weight, bias)]

        def forward() -> Tensor:
            with torch.enable_grad():
                return F.batch_norm(ctx.leaves[0], *others[:2], *ctx.leaves[1:], *others[2:])

        ctx.y = slowed(forward)
        return ctx.y.detach()

    @staticmethod
    def backward(ctx: Any, *dy: Tensor) -> Any:
        return (*slowed(lambda: torch.autograd.grad(ctx.y, ctx.leaves, dy)), *[None] * 5)


def batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps):  # type: ignore[no-untyped-def]
    """torch's own, slowed."""
    return Slowed.apply(input, weight, bias, running_mean, running_var, training, momentum, eps)


def profile(options: Sequence[str], factor: float = 1.0) -> tuple[int, str]:
    """Exit code and JSON of `bncli profile` in a process of its own."""
    kernel = ("--kernel", "native,tests.benchmarks.gate:batch_norm", "--allow-code", "--device", "cpu")
    command = [sys.executable, "-m", "bncli", "profile", *kernel, "--json", "--quiet", *options]
    environment = {**os.environ, SLOWED: str(factor)}
    ran = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    return ran.returncode, ran.stdout


def main(arguments: Sequence[str] | None = None, profile: Callable[..., tuple[int, str]] = profile) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20, help="of the same code")
    parser.add_argument("--time", default=None, help="seconds of each profile, in place of --quick")
    parser.add_argument("--threads", default="1", help="one waits for no other on a busy machine")
    parser.add_argument("--shape", action="append", help="default: 32x32x28x28 and 64x16x14x14")
    options = parser.parse_args(arguments)
    given = [f"--shape={shape}" for shape in options.shape or ("32x32x28x28", "64x16x14x14")]
    given += ["--operation=bn", f"--threads={options.threads}"]
    given.append("--quick" if options.time is None else f"--time={options.time}")
    with tempfile.TemporaryDirectory() as folder:
        baseline = Path(folder) / "baseline.json"
        baseline.write_text(profile(given)[1])
        rounds = {len(row["both"]["samples_ms"]) for row in json.loads(baseline.read_text())["rows"]}
        print(f"baseline: {min(rounds)} to {max(rounds)} rounds a row")
        for factor in (*FACTORS, *[1.0] * options.repeats):
            code, printed = profile([*given, f"--baseline={baseline}"], factor)
            changes = json.loads(printed)["gate"]["changes"]
            verdicts = Counter(change["verdict"] for change in changes)
            slower = [change["slower"] for change in changes]
            counts = ", ".join(f"{count} {verdict}" for verdict, count in verdicts.items())
            print(f"{factor:g}x: exit {code}, {counts}; slowdown {min(slower):.2f} to {max(slower):.2f}", flush=True)


if __name__ == "__main__":
    main()
