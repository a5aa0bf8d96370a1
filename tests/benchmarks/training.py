"""Steps of ResNet-20, `bncli train` beside hand-written loops: `python -m tests.benchmarks.training [--steps N]`.

recipes/cifar10.yaml's network with batch norm, its optimizer and warm-up, batches of 128 synthetic pictures in float32,
in both memory layouts:

    fused, native    the loop of `bncli train` with that kernel and with its metrics file, without its progress bar
    eager            the same network, weights and batches in plain torch
    torch.compile    the same, with its network compiled

All train in one process, which keeps freed memory, and take turns in blocks of 20 steps in random order. Their losses
after the first block, which is not timed, have to agree. Printed: by how many seconds the first block is longer than a
later one, most of which is compilation; the median time of a step, and half the distance of its quartiles; and how many
times faster it is than native's and torch.compile's, paired by turn, with 95 % intervals. Exit status 1: losses differ.
"""

from __future__ import annotations

import argparse
import ctypes
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bncli.engine import data
from bncli.engine.data.splits import Dataset
from bncli.engine.models import build
from bncli.engine.models.init import stream
from bncli.engine.train import LOG_EVERY, train
from bncli.measure.timing import clock
from bncli.measure.timing.speedup import faster
from bncli.recipe.load import load, with_values
from bncli.recipe.sections import Recipe
from bncli.report.folder import RunFolder
from bncli.results.train import StepDone
from tests.benchmarks.comparison import batches, tensors
from tests.benchmarks.kernels import LAYOUTS, ROOT, heading, ms, print_environment, ratio

CPU = torch.device("cpu")
ARMS = ("fused", "native", "eager", "torch.compile")
BLOCK = LOG_EVERY  # steps, after which `train` reads a loss
CLOSE = 0.02  # relative difference of two losses after a block; other rounding makes up to 0.004 of them
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h

Losses = Iterator[float]  # one after every block of steps


def recipe(layout: str, steps: int, batch: int = 128, side: int = 32) -> Recipe:
    pictures = f"{{source: synthetic, shape: [3, {side}, {side}], examples: {4 * batch}, held_out: {batch}}}"
    train = f"batch_size: {batch}, evaluate_every: {steps}, precision: fp32, memory_format: {layout}"
    sets = [f"data={pictures}", f"train={{steps: {steps}, {train}}}"]
    return load(str(ROOT / "recipes/cifar10.yaml"), sets).arm("batch norm").recipe


def by_bncli(recipe: Recipe, dataset: Dataset, kernel: str, folder: Path) -> Losses:
    with RunFolder(folder / f"{recipe.train.memory_format} {kernel}", "benchmark") as written:
        written.begin("")
        for event in train(with_values(recipe, {"norm.kernel": kernel}), "cpu", dataset=dataset):
            written.metrics(event)
            if isinstance(event, StepDone):
                yield event.loss


class Block(nn.Module):
    """A residual block with a projection where the shape changes (He et al. 2015, section 4.2, option B)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride > 1:
            self.shortcut.extend([nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)])

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


def resnet20(classes: int) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    inputs = 16
    for outputs in (16, 32, 64):
        for _ in range(3):
            layers.append(Block(inputs, outputs, outputs // inputs))
            inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))


def by_hand(recipe: Recipe, dataset: Dataset, compiled: bool) -> Losses:
    """The loop that one would write by hand, from the weights and over the batches of bncli's."""
    layout = data.MEMORY_FORMATS[recipe.train.memory_format]
    model = resnet20(dataset.classes)
    initial = build(recipe, dataset.shape, dataset.classes)
    with torch.no_grad():
        for mine, theirs in zip(model.parameters(), initial.parameters(), strict=True):
            mine.copy_(theirs)
    model.to(memory_format=layout)  # type: ignore[call-overload]
    if compiled:
        torch.compiler.reset()
        model.compile()
    weights, vectors = ([p for p in model.parameters() if (p.dim() > 1) == many] for many in (True, False))
    groups: list[dict[str, Any]] = [{"params": weights, "weight_decay": 1e-4}, {"params": vectors}]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    warm_up = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 101))
    coming = batches(*tensors(dataset.train), recipe.train.batch_size, stream(recipe.train.seed, "order"))
    for step, (x, y) in enumerate(coming, 1):
        loss = F.cross_entropy(model(x.contiguous(memory_format=layout)), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        warm_up.step()
        if step % BLOCK == 0:
            yield loss.item()


def arms(recipe: Recipe, folder: Path) -> dict[str, Losses]:
    dataset = data.load(recipe.data, CPU, data.MEMORY_FORMATS[recipe.train.memory_format])
    found = {kernel: by_bncli(recipe, dataset, kernel, folder) for kernel in ARMS[:2]}
    return found | {name: by_hand(recipe, dataset, name == "torch.compile") for name in ARMS[2:]}


def measure(arms: Mapping[str, Losses], blocks: int) -> tuple[dict[str, float], dict[str, tuple[float, ...]]]:
    """Seconds of the first block, and milliseconds a step of each later one. Raises SystemExit if losses differ."""
    first_s, losses = {}, {}
    for name, arm in arms.items():
        began = time.perf_counter()
        losses[name] = next(arm)
        first_s[name] = time.perf_counter() - began
    if not all(abs(loss / losses["native"] - 1) < CLOSE for loss in losses.values()):
        raise SystemExit(f"losses after {BLOCK} steps differ, so times are not comparable: {losses}")
    works = {name: clock.Work(lambda _, arm=arm: next(arm), calls=BLOCK) for name, arm in arms.items()}  # type: ignore[misc]
    return first_s, clock.interleaved(clock.LoopClock(CPU), works, blocks - 1)


def main(arguments: Sequence[str] | None = None, arms: Callable[[Recipe, Path], Mapping[str, Losses]] = arms) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="of each arm and layout, %(default)s")
    blocks = parser.parse_args(arguments).steps // BLOCK
    if blocks < 2:
        parser.error(f"--steps: at least {2 * BLOCK}, of which the first {BLOCK} are not timed")
    print_environment(CPU)
    heading(f"ResNet-20, fp32, batch 128, {blocks * BLOCK} steps")
    print(f"{'layout':14} {'arm':14} {'start-up':>9} {'a step':>13}   {'vs native':20} vs torch.compile")
    for layout in LAYOUTS:
        with tempfile.TemporaryDirectory() as folder:
            first_s, times_ms = measure(arms(recipe(layout, blocks * BLOCK), Path(folder)), blocks)
        for name, samples in times_ms.items():
            found = [faster(times_ms[other], samples) for other in ("native", "torch.compile")]
            ratios = [ratio({"value": each.value, "interval": vars(each.interval)}) for each in found]
            start_s = first_s[name] - BLOCK * median(samples) / 1e3
            print(f"{layout:14} {name:14} {start_s:7.1f} s {ms(samples):>13}   {ratios[0]:20} {ratios[1]}", flush=True)


if __name__ == "__main__":
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        assert mallopt(M_MMAP_THRESHOLD, 1 << 30)
        assert mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    main()
