"""Is the fused batch norm right on this device, and how fast is it? `python -m tests.benchmarks.kernels --device cpu`.

First every claim of correctness, then times, for right cases only, of fused beside native, interleaved, ratios paired
by round. Bytes are those of the floor, each tensor read and written once, as a share of the copy bandwidth of the same
run. A run keeps to `--budget-s` and says what it cut off.

On a CPU (the kernel in C): `layers`, every shape of ResNet-20 and ResNet-50 with every operation, measured by
`bncli profile`'s own run, warm and cold; `small`, a call's own cost; `resnet20`, a training step; `large`, tensors
beyond the last cache. Intervals are 95 %, of medians.

On a GPU: beside eager native and torch.compile(native), medians with quartiles, cold and warm. `--shapes FILE` adds a
sweep over a CSV file (n, c, spatial, calls). On a fresh machine, where every kernel is yet to be compiled, give
`--sections correctness`, `--sections copy,layers` and `--sections copy,small,resnet` a run each. The GPU's sections run
on a CPU too, on small shapes, where they only show that they work: with `--candidate seam`, native behind the kernels'
contract, or `fused-interpreted`, the GPU's kernel in Triton's interpreter, which is checked and never timed.

Exits 1 if anything was wrong (or a target missed under --require-targets), 2 for a wrong option, 3 where the kernel
cannot run.

Notes: not yet run on a GPU (2026-11-23).
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bncli import errors, kernels
from bncli.engine import device as devices
from bncli.measure.profile.shapes import Calls, read_csv
from bncli.measure.timing import clock as timing
from bncli.measure.timing.clock import Clock, Deadline
from bncli.names import GRADCHECK_KERNELS
from tests.benchmarks import (
    kernels_correctness,
    kernels_cpu_large,
    kernels_cpu_layers,
    kernels_cpu_small,
    kernels_cpu_step,
    kernels_environment,
    kernels_sections,
)
from tests.benchmarks.kernels_pool import Pool
from tests.benchmarks.kernels_report import Report
from tests.benchmarks.kernels_sections import Run
from tests.benchmarks.kernels_sweep import sweep

# Section -> its share of the time; what one leaves over goes to those after it.
SHARES = {"correctness": 0.30, "copy": 0.03, "layers": 0.36, "small": 0.06, "resnet": 0.25, "sweep": 0.40}
# The same for the kernel in C. The last one changes how the C library keeps its memory, which no other is to notice.
CPU_SHARES = {"correctness": 0.10, "layers": 0.56, "small": 0.04, "resnet20": 0.14, "large": 0.16}
BUDGET_S = 520.0
# In full, and quick.
CPU_BUDGET_S = (345.0, 60.0)
CANDIDATES = ("fused", "fused-interpreted", "seam")
ROUNDS, CPU_ROUNDS, DRY_ROUNDS = (15, 7), (30, 9), (3, 3)
BUSY_CORES = 0.1  # that other programs use, above which times mean less
GRACE_S = 45.0  # past the budget, after which the run ends itself: a hang in a timed kernel
CPU_GRACE = 2.0  # times the budget, beyond that: a CPU that others use too takes longer over the fewest rounds


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="auto, cuda, cuda:N or cpu")
    parser.add_argument(
        "--sections",
        default="",
        help=f"on a CPU some of {','.join(CPU_SHARES)}; on a GPU of {','.join(SHARES)}, sweep with --shapes; all",
    )
    parser.add_argument(
        "--candidate",
        choices=CANDIDATES,
        help="what is held to native; seam: native itself",
    )
    parser.add_argument("--quick", action="store_true", help="a sample of the cases, fewer rounds")
    parser.add_argument("--budget-s", type=float, help="time for the whole run, which says what it cut off")
    parser.add_argument("--jobs", type=int, help="processes that check; 0: this one")
    parser.add_argument("--rounds", type=int, help="samples of each arm")
    parser.add_argument("--shapes", type=Path, help="CSV file with the columns n, c, spatial and calls, to sweep")
    parser.add_argument("--sweep-operation", default="bn", choices=["bn", "bn+relu", "bn+add+relu"])
    parser.add_argument("--sweep-layout", default="contiguous", choices=["contiguous", "channels_last"])
    parser.add_argument("--json", type=Path, help="a file for all raw samples")
    parser.add_argument("--require-targets", action="store_true", help="exit 1 also for a target that is missed")
    return parser.parse_args(given)


def sections_of(options: argparse.Namespace, shares: dict[str, float]) -> list[str]:
    """In the order of `shares`. Raises RecipeError for one that is not among them, and for a sweep over nothing."""
    if options.shapes and "sweep" not in shares:
        raise errors.RecipeError(f"--shapes: on a CPU use bncli profile --shapes {options.shapes}")
    if not options.sections:
        return [name for name in shares if name != "sweep" or options.shapes]
    chosen = options.sections.split(",")
    unknown = set(chosen) - set(shares)
    if unknown:
        raise errors.RecipeError(f"--sections {','.join(sorted(unknown))}: expected some of {', '.join(shares)}")
    if "sweep" in chosen and not options.shapes:
        raise errors.RecipeError("--sections sweep: name the file of shapes with --shapes FILE")
    return [name for name in shares if name in chosen]


@dataclass(frozen=True)
class Candidate:
    name: str
    interpreted: bool

    def in_c(self, device: torch.device) -> bool:
        """Whether it is the kernel in C, whose sections a CPU has."""
        return device.type == "cpu" and self.name == "fused" and not self.interpreted


def candidate_of(options: argparse.Namespace, device: torch.device) -> Candidate:
    """What is held to native. Raises Unavailable where it cannot run, RecipeError for an interpreter on a GPU."""
    name = options.candidate or "fused"
    if name in GRADCHECK_KERNELS:
        kernels.get(name, device)
    return Candidate(name, name == "fused-interpreted")


def clock_of(device: torch.device, in_c: bool) -> Clock:
    return timing.of(device) if device.type == "cuda" or in_c else timing.CpuClock(flush_bytes=2**20)


@dataclass(frozen=True)
class Planned:
    """What was asked for, checked."""

    run: Run
    sections: list[str]
    shares: dict[str, float]
    shapes: list[Calls]
    budget_s: float
    in_c: bool

    @property
    def limit_s(self) -> float:
        return (CPU_GRACE if self.in_c else 0.0) * self.budget_s + self.budget_s + GRACE_S


def planned(options: argparse.Namespace, report: Report) -> Planned:
    """Everything that can be wrong with the options is found here, before anything runs."""
    device = devices.resolve(options.device)
    if device.type not in ("cpu", "cuda"):
        raise errors.Unavailable(f"--device {device}: there is no fused kernel for it; use cuda or cpu")
    candidate = candidate_of(options, device)
    in_c, cuda = candidate.in_c(device), device.type == "cuda"
    shares = CPU_SHARES if in_c else SHARES
    names = sections_of(options, shares)
    shapes = list(read_csv(options.shapes)) if options.shapes else []
    if cuda:
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
    jobs = options.jobs if options.jobs is not None else max(1, min(8, (os.cpu_count() or 2) // 2)) if cuda else 0
    pool = Pool(jobs, kernels_sections.HANG_S, str(device))
    rounds = options.rounds or (CPU_ROUNDS if in_c else ROUNDS if cuda else DRY_ROUNDS)[options.quick]
    budget_s = options.budget_s or (CPU_BUDGET_S[options.quick] if in_c else BUDGET_S)
    clock = clock_of(device, in_c)
    run = Run(report, device, clock, candidate.name, candidate.interpreted, options.quick, pool, rounds)
    return Planned(run, names, shares, shapes, budget_s, in_c)


def end_if_late(limit_s: float, leave: Callable[[int], object] = os._exit) -> threading.Timer:
    """A watch over this process: a timed kernel that hangs would keep it for ever. Cancel it when all is done."""

    def end() -> None:
        why = "a timed kernel hangs, or the budget was too small"
        said = f"\nABORTED: not through after {limit_s:.0f} s: {why}. Where it stood:"
        print(said, file=sys.stderr, flush=True)
        faulthandler.dump_traceback(file=sys.__stderr__ or 2)
        leave(errors.CHECK_FAILED)

    timer = threading.Timer(limit_s, end)
    timer.daemon = True
    timer.start()
    return timer


def main(given: Sequence[str] | None = None) -> int:
    options = arguments(given)
    report = Report(options.json)
    try:
        asked = planned(options, report)
    except errors.BncliError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    run, whole, watch = asked.run, Deadline(asked.budget_s), end_if_late(asked.limit_s)
    environment = header(run)
    bodies = bodies_of(asked, options)
    for k, name in enumerate(asked.sections):
        if run.interpreted and name != "correctness":
            report.note(f"{name}: the candidate runs in Triton's interpreter, whose speed says nothing")
            continue
        share = asked.shares[name] / sum(asked.shares[later] for later in asked.sections[k:])
        _section(name, bodies[name], run, Deadline(share * whole.left_s))
        report.write(environment)
    run.pool.close()
    watch.cancel()
    report.summary()
    report.write(environment)
    missed = [target for _, target in report.targets if not target.met]
    return errors.CHECK_FAILED if report.failed or (options.require_targets and missed) else errors.OK


def header(run: Run) -> dict[str, str]:
    """Where the figures are made, printed and returned; on a CPU with a warning where it is not idle."""
    environment = kernels_environment.description(run.device)
    for name, value in environment.items():
        run.report.line(f"{name:10} {value}")
    interpreted = " (in Triton's interpreter: checked, not timed)" if run.interpreted else ""
    at_most = "up to " if not run.cuda else ""
    run.report.line(
        f"candidate  {run.candidate}{interpreted}; rounds {at_most}{run.rounds}, processes that check {run.pool.jobs}"
    )
    busy = None if run.cuda else kernels_environment.busy_cores()
    if busy is not None and busy > BUSY_CORES:
        run.report.line(
            f"WARNING    other programs use {busy:.1f} of the {os.cpu_count()} cores: threads wait for each other, and "
            "times and ratios mean less"
        )
    return environment


def bodies_of(asked: Planned, options: argparse.Namespace) -> dict[str, Callable[[Run, Deadline], None]]:
    def correctness(run: Run, end: Deadline) -> None:
        kernels_sections.correctness(run, kernels_correctness.tasks, end)

    if asked.in_c:
        return {
            "correctness": correctness,
            "layers": kernels_cpu_layers.layers,
            "small": kernels_cpu_small.small,
            "resnet20": kernels_cpu_step.step,
            "large": kernels_cpu_large.large,
        }
    return {
        "correctness": correctness,
        "copy": kernels_sections.copy,
        "layers": kernels_sections.layers,
        "small": kernels_sections.small,
        "resnet": kernels_sections.resnet,
        "sweep": lambda run, end: sweep(run, asked.shapes, options.sweep_operation, options.sweep_layout, end),
    }


def _section(name: str, body: Callable[[Run, Deadline], None], run: Run, deadline: Deadline) -> None:
    """A section that breaks is a check that failed; the others still run."""
    try:
        body(run, deadline)
    except Exception as error:
        import traceback

        from tests.benchmarks.kernels_check import Check

        traceback.print_exc()
        run.report.check([Check(f"section {name}", "", False, f"{type(error).__name__}: {error}"[:300])])


if __name__ == "__main__":
    sys.exit(main())
