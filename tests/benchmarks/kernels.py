"""Is the fused batch norm right on this device, and how fast is it? `python -m tests.benchmarks.kernels --device cpu`.

    correctness  `bncli gradcheck`: every case of the definition in float64
    hazards      on a GPU: CUDA graphs, streams and torch.compile (tests.benchmarks.hazards); more than 2^31 elements
    layers       `bncli profile` over the shapes of ResNet-20 and ResNet-50 with every operation, warm, then cold
    small        a call's own cost: microseconds of the function and of the module (tests.benchmarks.small_calls)
    step         `bncli profile` of a training step: ResNet-20 in fp32, on a GPU ResNet-50 in bf16
    large        on a CPU: a tensor beyond the last cache, compared with a copy (tests.benchmarks.large_tensor)

The commands run as processes of their own, so that a kernel that hangs or breaks its device ends its section alone.
Ratios are native's time over the kernel's, above 1 is faster, with 95 % intervals. On a CPU they are in memory that the
process keeps; "new memory" is where tensors of 32 MiB or more take new pages from the system, as by default. Exit
status: 0 everything is right, 1 a check failed, 2 a wrong option, 3 the kernel cannot run here.

Notes: not yet run on a GPU (2026-11-30).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

from bncli import errors, kernels
from bncli.engine import device as devices
from tests.benchmarks import large_tensor, small_calls

ROOT = Path(__file__).parents[2]
OPERATIONS = ("bn", "bn+relu", "bn+add+relu")
LAYOUTS = ("contiguous", "channels_last")
RESNET20 = ("128x16x32x32", "128x32x16x16", "128x64x8x8")
QUICK = ("128x16x32x32", "32x256x14x14", "32x64x56x56")
LAYERS_S, STEP_S = {True: 40.0, False: 110.0}, {True: 10.0, False: 25.0}  # of each run of profile; True: --quick
LONGEST_S = 1200.0  # of a command, after which it hangs
BUSY_PERCENT = 5.0  # of all cores, above which times mean less
BEYOND_32_BITS = "33x64x1024x1024"  # elements: more than 2^31

Run = Callable[[Sequence[str]], tuple[int, str]]  # a command of Python's -m -> exit status and standard output
Json = dict[str, Any]


def run(arguments: Sequence[str]) -> tuple[int, str]:
    """`python -m ...` in the repository. Raises TimeoutExpired where it hangs."""
    command = [sys.executable, "-m", *arguments]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=LONGEST_S, check=False)
    return done.returncode, done.stdout


@dataclass
class Benchmark:
    """What every section needs; `wrong` collects what failed."""

    device: torch.device
    quick: bool
    run: Run = run
    wrong: list[str] = field(default_factory=list)

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def profile(self, *arguments: str) -> Json:
        """The result of `bncli profile` of native and fused. A row that is wrong or missing is printed."""
        given = ("--device", str(self.device), "--kernel", "native,fused", *arguments, "--json")
        code, out = self.run(("bncli", "profile", *given))
        if not out:
            raise RuntimeError(f"bncli profile {' '.join(given)} ended with exit status {code}")
        found: Json = json.loads(out)
        for row in found["rows"]:
            if row["error"] is not None:
                what = f"{row['kernel']} on {row.get('case') or row.get('arm')}: {row['error']}"
                print(f"{'WRONG' if row['wrong'] else 'not timed'}  {what}")
                self.wrong += [what] * row["wrong"]
        return found


# --- what is printed ----------------------------------------------------------------------------------------------


def ratio(faster: Json) -> str:
    """1.80x [1.46, 2.02]: the median and its interval, `unknown` for a side that too few rounds leave open."""
    low, high = ("unknown" if side is None else f"{side:.2f}" for side in faster["interval"].values())
    return f"{faster['value']:.2f}x [{low}, {high}]"


def ms(samples: Sequence[float]) -> str:
    """242 ms ±9%: the median, and half the distance of the quartiles as a share of it."""
    if len(samples) < 2:
        return f"{samples[0]:.3g} ms"
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
    return f"{middle:.3g} ms ±{(high - low) / 2 / middle:.0%}"


def heading(text: str) -> None:
    print(f"\n## {text}", flush=True)


def print_environment(device: torch.device) -> None:
    for name, value in vars(devices.environment(device)).items():
        print(f"{name:10} {value}")
    busy = psutil.cpu_percent(interval=0.5)  # while this process sleeps
    if device.type == "cpu" and busy > BUSY_PERCENT:
        print(f"WARNING    other programs use {busy:.0f} % of the cores: times and ratios mean less")


# --- the sections -------------------------------------------------------------------------------------------------


def correctness(benchmark: Benchmark) -> None:
    heading("Correctness")
    quick = ["--quick"] if benchmark.quick else []
    code, out = benchmark.run(("bncli", "gradcheck", "--kernel", "fused", "--device", str(benchmark.device), *quick))
    print(out, end="")
    benchmark.wrong += [f"gradcheck ended with exit status {code}"] * (code != 0)


def hazards(benchmark: Benchmark) -> None:
    if not benchmark.cuda:
        return
    heading("Hazards: graphs, streams, torch.compile, more than 2^31 elements")
    device, repeats = str(benchmark.device), "100" if benchmark.quick else "1000"
    code, out = benchmark.run(("tests.benchmarks.hazards", "--device", device, "--repeats", repeats))
    print(out, end="")
    benchmark.wrong += [f"the hazards ended with exit status {code}"] * (code != 0)
    shape = ("--shape", BEYOND_32_BITS, "--dtype", "bf16", "--layout", "contiguous", "--operation", "bn")
    found = benchmark.profile(*shape, "--time", "5")
    right = sum(row["error"] is None for row in found["rows"])
    print(f"{right} of {len(found['rows'])} kernels are right on {BEYOND_32_BITS}")


def layers(benchmark: Benchmark) -> None:
    """Geometric means over the shapes for each operation and layout, on a GPU also of torch.compile."""
    shapes = [word for shape in (QUICK if benchmark.quick else RESNET20) for word in ("--shape", shape)]
    shapes += [] if benchmark.quick else ["--shapes", "resnet50"]
    kinds = [("bf16", "contiguous"), ("fp16", "channels_last")] if benchmark.cuda else [("fp32", ",".join(LAYOUTS))]
    for dtype, layouts in kinds:
        chosen = [*shapes, "--dtype", dtype, "--layout", layouts]
        if benchmark.cuda:
            compile_first(benchmark, chosen)
        peer = ["--kernel", "compiled"] * (dtype == "bf16" and not benchmark.quick)
        for heat in ("warm", "cold"):
            heading(f"Layers of ResNet-20 and ResNet-50, {dtype}, training, forward + backward, {heat}")
            options = ["--operation", ",".join(OPERATIONS), *peer, "--time", str(LAYERS_S[benchmark.quick])]
            found = benchmark.profile(*chosen, *options, *["--warm"] * (heat == "warm"))
            for mean in found["means"]:
                print(
                    f"{mean['kernel'] + ' ' if peer else ''}{mean['operation']:12} {mean['layout']:14} geometric mean "
                    f"of {mean['shapes']} shapes {ratio(mean['faster'])}, "
                    f"{f'new memory {ratio(new)}, ' if (new := mean['faster_new_memory']) else ''}"
                    f"worst {mean['least']:.2f}x at {'x'.join(map(str, mean['least_shape']))}"
                )
            copies = ", ".join(f"{size / 2**20:g} MiB {speed:.1f}" for size, speed in found["ceilings"]["copies"])
            print(f"copies, GB/s read and written: {copies}", flush=True)


def compile_first(benchmark: Benchmark, cases: Sequence[str]) -> None:
    """Fill Triton's cache on disk from a process for each operation, so that no timed run waits for the compiler."""
    once = ("--device", str(benchmark.device), "--kernel", "fused", *cases, "--time", "0.01", "--min-rounds", "1")
    commands = [("bncli", "profile", *once, "--operation", operation, "--json", "--quiet") for operation in OPERATIONS]
    with ThreadPoolExecutor(len(commands)) as threads:
        list(threads.map(benchmark.run, commands))


def small(benchmark: Benchmark) -> None:
    heading("Small tensors, fp32, bn+relu, training: microseconds a call, in a loop")
    rounds = 9 if benchmark.quick else small_calls.ROUNDS
    for shape, what, us, faster in small_calls.measure(benchmark.device, rounds=rounds):
        print(
            f"{'x'.join(map(str, shape)):10} {what:28} native {us['native']:7.1f} us  fused {us['fused']:7.1f} us "
            f"a call  {ratio({'value': faster.value, 'interval': vars(faster.interval)})}",
            flush=True,
        )


def step(benchmark: Benchmark) -> None:
    """A recipe's model, optimizer and batch, on random images."""
    depth, side, batch = (50, 224, 256) if benchmark.cuda else (20, 32, 128)
    precision = "bf16" if benchmark.cuda else "fp32"
    heading(f"A training step of ResNet-{depth}, {precision}: recipes/cifar10.yaml on random images")
    data = f"{{source: synthetic, shape: [3, {side}, {side}], examples: {4 * batch}, held_out: {batch}}}"
    values = {"data": data, "model.depth": depth, "train.batch_size": batch, "train.precision": precision}
    for layout in LAYOUTS:
        sets = [word for key, value in values.items() for word in ("--set", f"{key}={value}")]
        sets += ["--set", f"train.memory_format={layout}", "--arm", "batch norm"]
        found = benchmark.profile("recipes/cifar10.yaml", *sets, "--time", str(STEP_S[benchmark.quick]))
        rows = {row["kernel"]: row for row in found["rows"] if row["mode"] == "training" and row["error"] is None}
        if len(rows) == 2:
            times = ", ".join(f"{kernel} {ms(row['samples_ms'])}" for kernel, row in rows.items())
            print(f"{layout:14} batch {batch}: {times}  {ratio(rows['fused']['faster'])}", flush=True)


def large(benchmark: Benchmark) -> None:
    if benchmark.cuda:
        return
    shape = large_tensor.shape_beyond(large_tensor.last_cache_bytes() or large_tensor.UNKNOWN_CACHE_BYTES)
    heading(f"A tensor {'x'.join(map(str, shape))} beyond the last cache, fp32, bn+relu, forward + backward")
    for layout in LAYOUTS[: 1 if benchmark.quick else 2]:
        for memory, share, faults in large_tensor.measure(shape, layout == "channels_last"):
            print(f"{layout:14} {memory:11} {share:.2f} of a copy's speed, {faults:,} page faults a call", flush=True)


SECTIONS: dict[str, Callable[[Benchmark], None]] = {
    each.__name__: each for each in (correctness, hazards, layers, small, step, large)
}


def main(arguments: Sequence[str] | None = None, run: Run = run) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="auto, cuda, cuda:N or cpu")
    parser.add_argument("--sections", default=",".join(SECTIONS), help="some of %(default)s")
    parser.add_argument("--quick", action="store_true", help="fewer cases and rounds")
    options = parser.parse_args(arguments)
    names = options.sections.split(",")
    if unknown := set(names) - set(SECTIONS):
        parser.error(f"--sections {','.join(sorted(unknown))}: expected some of {', '.join(SECTIONS)}")
    try:
        device = devices.resolve(options.device)
        kernels.get("fused", device)
    except errors.BncliError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    benchmark = Benchmark(device, options.quick, run)
    print_environment(device)
    for name in names:
        try:
            SECTIONS[name](benchmark)
        except Exception as error:  # the other sections still run
            benchmark.wrong.append(f"section {name}: {type(error).__name__}: {error}")
    heading("Summary")
    print("\n".join(f"WRONG  {what}" for what in benchmark.wrong) or "everything checked is right")
    return errors.CHECK_FAILED if benchmark.wrong else errors.OK


if __name__ == "__main__":
    sys.exit(main())
