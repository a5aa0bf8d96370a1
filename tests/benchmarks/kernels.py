"""Is the fused batch norm right on this device, and how fast is it? `python -m tests.benchmarks.kernels --device cuda`.

First every claim of correctness, in processes that are ended if a case hangs; then times, for right cases only: fused
beside eager native and torch.compile(native), interleaved, ratios paired by round, medians with quartiles, with a cold
and a warm cache, as a share of the copy bandwidth measured in the same run. Bytes are those of the floor, each tensor
read and written once. `--shapes FILE` adds a sweep over a CSV file (n, c, spatial, calls).

A run keeps to `--budget-s` and says what it cut off. On a fresh machine, where every kernel is yet to be compiled, give
`--sections correctness`, `--sections copy,layers` and `--sections copy,small,resnet` a run each.

Exits 1 if anything was wrong (or a target missed under --require-targets), 2 for a wrong option, 3 where the kernel
cannot run. On a CPU the flow is the same on small shapes, with native behind the kernels' seam for the candidate, or,
under TRITON_INTERPRET=1, the fused kernel in Triton's interpreter, which is checked and never timed.

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
from bncli.measure import clock as timing
from bncli.measure.clock import Clock, Deadline
from bncli.measure.shapes import Calls, read_csv
from tests.benchmarks import kernels_correctness, kernels_environment, kernels_sections
from tests.benchmarks.kernels_pool import Pool
from tests.benchmarks.kernels_report import Report
from tests.benchmarks.kernels_sections import Run
from tests.benchmarks.kernels_sweep import sweep

# Section -> its share of the time; what one leaves over goes to those after it.
SHARES = {"correctness": 0.30, "copy": 0.03, "layers": 0.36, "small": 0.06, "resnet": 0.25, "sweep": 0.40}
GRACE_S = 45.0  # past the budget, after which the run ends itself: a hang in a timed kernel


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="auto, cuda, cuda:N or cpu")
    parser.add_argument(
        "--sections", default="", help=f"some of {','.join(SHARES)}; default: all (sweep with --shapes)"
    )
    parser.add_argument("--candidate", choices=["fused", "seam"], help="what is held to native; seam: native itself")
    parser.add_argument("--quick", action="store_true", help="a sample of the cases, fewer rounds")
    parser.add_argument("--budget-s", type=float, default=520.0, help="time for the whole run; says what it cut off")
    parser.add_argument("--jobs", type=int, help="processes that check; 0: this one")
    parser.add_argument("--rounds", type=int, help="samples of each arm")
    parser.add_argument("--shapes", type=Path, help="CSV file with the columns n, c, spatial and calls, to sweep")
    parser.add_argument("--sweep-operation", default="bn", choices=["bn", "bn+relu", "bn+add+relu"])
    parser.add_argument("--sweep-layout", default="contiguous", choices=["contiguous", "channels_last"])
    parser.add_argument("--json", type=Path, help="a file for all raw samples")
    parser.add_argument("--require-targets", action="store_true", help="exit 1 also for a target that is missed")
    return parser.parse_args(given)


def sections_of(options: argparse.Namespace) -> list[str]:
    if not options.sections:
        return [name for name in SHARES if name != "sweep" or options.shapes]
    chosen = options.sections.split(",")
    unknown = set(chosen) - set(SHARES)
    if unknown:
        raise errors.RecipeError(f"--sections {','.join(sorted(unknown))}: expected some of {', '.join(SHARES)}")
    if "sweep" in chosen and not options.shapes:
        raise errors.RecipeError("--sections sweep: name the file of shapes with --shapes FILE")
    return [name for name in SHARES if name in chosen]


@dataclass(frozen=True)
class Candidate:
    name: str
    interpreted: bool


def candidate_of(options: argparse.Namespace, device: torch.device) -> Candidate:
    """What is held to native. Raises Unavailable where it cannot run, RecipeError for an interpreter on a GPU."""
    interpreted = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
    if interpreted and device.type == "cuda":
        raise errors.RecipeError("TRITON_INTERPRET is set: unset it to run on the GPU, or use --device cpu")
    name = options.candidate or ("fused" if device.type == "cuda" or interpreted else "seam")
    if name == "fused":
        kernels.get("fused", device)
    return Candidate(name, interpreted and name == "fused")


def clock_of(device: torch.device) -> Clock:
    return timing.of(device) if device.type == "cuda" else timing.CpuClock(flush_bytes=2**20)


def run_of(options: argparse.Namespace, report: Report) -> tuple[Run, list[str], list[Calls]]:
    """Everything that can be wrong with the options is found here, before anything runs."""
    device = devices.resolve(options.device)
    if device.type not in ("cpu", "cuda"):
        raise errors.Unavailable(f"--device {device}: there is no fused kernel for it; use cuda or cpu")
    names = sections_of(options)
    shapes = list(read_csv(options.shapes)) if options.shapes else []
    candidate = candidate_of(options, device)
    cuda = device.type == "cuda"
    if cuda:
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
    jobs = options.jobs if options.jobs is not None else max(1, min(8, (os.cpu_count() or 2) // 2)) if cuda else 0
    pool = Pool(jobs, kernels_sections.HANG_S, str(device))
    rounds = options.rounds or ((7 if options.quick else 15) if cuda else 3)
    return (
        Run(report, device, clock_of(device), candidate.name, candidate.interpreted, options.quick, pool, rounds),
        names,
        shapes,
    )


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
        run, names, shapes = run_of(options, report)
    except errors.BncliError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    whole, watch = Deadline(options.budget_s), end_if_late(options.budget_s + GRACE_S)
    environment = kernels_environment.description(run.device)
    for name, value in environment.items():
        report.line(f"{name:10} {value}")
    interpreted = " (in Triton's interpreter: checked, not timed)" if run.interpreted else ""
    report.line(f"candidate  {run.candidate}{interpreted}; rounds {run.rounds}, processes that check {run.pool.jobs}")
    bodies: dict[str, Callable[[Run, Deadline], None]] = {
        "correctness": lambda run, end: kernels_sections.correctness(run, kernels_correctness.tasks, end),
        "copy": kernels_sections.copy,
        "layers": kernels_sections.layers,
        "small": kernels_sections.small,
        "resnet": kernels_sections.resnet,
        "sweep": lambda run, end: sweep(run, shapes, options.sweep_operation, options.sweep_layout, end),
    }
    for k, name in enumerate(names):
        if run.interpreted and name != "correctness":
            report.note(f"{name}: the candidate runs in Triton's interpreter, whose speed says nothing")
            continue
        share = SHARES[name] / sum(SHARES[later] for later in names[k:])
        _section(name, bodies[name], run, Deadline(share * whole.left_s))
        report.write(environment)
    run.pool.close()
    watch.cancel()
    report.summary()
    report.write(environment)
    missed = [target for _, target in report.targets if not target.met]
    return errors.CHECK_FAILED if report.failed or (options.require_targets and missed) else errors.OK


def _section(name: str, body: Callable[[Run, Deadline], None], run: Run, deadline: Deadline) -> None:
    """A section that breaks is a check that failed; the others still run."""
    try:
        body(run, deadline)
    except Exception as error:
        import traceback

        from bncli.measure.accuracy import Check

        traceback.print_exc()
        run.report.check([Check(f"section {name}", "", False, f"{type(error).__name__}: {error}"[:300])])


if __name__ == "__main__":
    sys.exit(main())
