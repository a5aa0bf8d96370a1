"""Memory of a comparison's processes with and without its data, and the speed of batches from shared memory.

`python -m tests.benchmarks.data_memory --gb 1 --jobs 2`. The memory is the sum of the proportional set sizes (PSS: a
page that n processes share counts 1/n in each) of bncli and its workers, from /proc/PID/smaps_rollup, sampled; the peak
of a comparison on the whole file less that on a file of 1,000 of its examples. Linux only.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import numpy as np
import psutil

FEATURES, CLASSES, BATCH = 250, 10, 256
SAMPLED_EVERY_S = 0.02
RECIPE = """
data: {{source: npz, path: {path}, held_out: {held_out}, normalize: standard}}
model: {{kind: mlp, hidden: [100, 100], activation: relu}}
optimizer: {{kind: sgd, lr: 0.1}}
train: {{steps: {steps}, batch_size: 256, evaluate_every: {steps}, target: {{value: 0.99}}}}
arms:
  plain: {{}}
  batch norm: {{norm: {{kind: batch}}}}
seeds: {{report: 2}}
"""


def write(path: Path, examples: int) -> None:
    """An .npz file with random examples, written a part at a time."""
    random, shape = np.random.default_rng(0), (examples, FEATURES)
    raw = path.with_suffix(".npy")
    x = np.lib.format.open_memmap(raw, "w+", np.float32, shape)
    for start in range(0, examples, 10_000):
        x[start : start + 10_000] = random.normal(3, 2, (min(10_000, examples - start), FEATURES))
    np.savez(path, x=x, y=np.arange(examples) % CLASSES)
    del x
    raw.unlink()


def pss_mib(root: psutil.Process) -> float:
    """Of a process and all that it started."""
    total = 0
    try:
        pids = [root.pid, *(child.pid for child in root.children(recursive=True))]
    except psutil.NoSuchProcess:
        return 0.0
    for pid in pids:
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:  # it has ended
            continue
        total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total / 1024


def peak_mib(recipe: Path, jobs: int) -> float:
    """The peak while a comparison runs. Raises RuntimeError where it fails."""
    command = [sys.executable, "-m", "bncli", "compare", str(recipe), "--device", "cpu", "--jobs", str(jobs)]
    command += ["--out", str(recipe.with_suffix("")), "--quiet"]
    peak = 0.0
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        root = psutil.Process(process.pid)
        while process.poll() is None:
            peak = max(peak, pss_mib(root))
            time.sleep(SAMPLED_EVERY_S)
        assert process.stdout is not None
        if process.returncode:
            raise RuntimeError(process.stdout.read())
    return peak


def seconds_a_batch(path: Path, held_out: int, batches: int, rounds: int = 9) -> Iterator[tuple[float, float]]:
    """Of training batches from shared and from plain memory, in turn, by CPU time, one pair a round."""
    import torch

    from bncli.engine.data import load
    from bncli.recipe.sections import Npz

    spec, cpu = Npz(source="npz", path=str(path), held_out=held_out), torch.device("cpu")
    torch.set_num_threads(1)
    memory = os.memfd_create("benchmark")
    splits = [load(spec, cpu, memory=memory).train, load(spec, cpu).train]
    layer = torch.nn.Linear(FEATURES, 100)
    for turn in range(rounds):
        order = torch.randperm(len(splits[0]), generator=torch.Generator().manual_seed(turn))[: batches * BATCH]
        taken = [0.0, 0.0]
        for which in (0, 1) if turn % 2 else (1, 0):
            began = time.process_time()
            for x, _ in splits[which].batches(order.split(BATCH)):
                layer(x).sum().backward()
            taken[which] = (time.process_time() - began) / batches
        yield taken[0], taken[1]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gb", type=float, default=1.0, help="10^9 bytes of examples")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--steps", type=int, default=300)
    asked = parser.parse_args(arguments)
    examples = max(2000, int(asked.gb * 1e9 / (4 * FEATURES)))
    with tempfile.TemporaryDirectory() as made:
        folder, peaks = Path(made), {}
        for name, count in (("without", 1000), ("with", examples)):
            write(folder / f"{name}.npz", count)
            recipe = folder / f"{name}.yaml"
            text = RECIPE.format(path=folder / f"{name}.npz", held_out=count // 10, steps=asked.steps)
            recipe.write_text(text)
            peaks[name] = peak_mib(recipe, asked.jobs)
        mib = 4 * FEATURES * examples / 2**20
        beyond = peaks["with"] - peaks["without"]
        print(f"data {mib:,.0f} MiB; PSS peak of all processes, {asked.jobs} workers:")
        print(f"without the data {peaks['without']:,.0f} MiB, with the data {peaks['with']:,.0f} MiB")
        print(f"beyond: {beyond:,.0f} MiB, {beyond / mib:.2f} of the data")
        if hasattr(os, "memfd_create"):
            batches = min(2000, (examples - examples // 10) // BATCH)
            pairs = list(seconds_a_batch(folder / "with.npz", examples // 10, batches))
            ratio = median(shared / plain for shared, plain in pairs)
            shared, plain = (1e6 * min(times) for times in zip(*pairs, strict=True))
            print(f"a batch from shared memory {shared:,.1f} us of CPU, from plain {plain:,.1f} us (the fastest of 9)")
            print(f"shared over plain, the median of 9 pairs: {ratio:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
