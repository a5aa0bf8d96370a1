"""Cost of a step of `bncli train`, compared with a plain loop: `python -m tests.benchmarks.step_overhead`.

The network of section 4.1 of the paper with batch norm, batches of 60 from tensors, SGD, one thread. Both loops
evaluate 500 held-out examples every 100 steps; ours has its bar, its metrics file and its target on. A round runs both
in random order; the ratio is that of their CPU times within a round, and what is printed is the median over the rounds
with the third lowest and third highest. The target is 1.05.

Notes: 2026-11-23, 2 cores of an Intel Xeon, torch 2.13.0: see README, "Speed". What helped: index_select instead of
x[index] (half its cost), no scheduler object for a constant rate, a look at the loss every 20 steps.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from time import process_time

import torch
from rich.console import Console
from torch import nn
from torch.nn import functional as F

from bncli.engine import data
from bncli.engine.data.splits import Dataset
from bncli.engine.train import train
from bncli.recipe.sections import Recipe
from bncli.report.folder import RunFolder
from bncli.report.progress import TrainProgress

BATCH, EVERY = 60, 100


def recipe(steps: int) -> Recipe:
    return Recipe.model_validate(
        {
            "data": {"source": "digits"},
            "model": {"kind": "mlp", "hidden": [100, 100, 100], "activation": "sigmoid"},
            "norm": {"kind": "batch"},
            "optimizer": {"kind": "sgd", "lr": 0.1},
            "train": {
                "steps": steps,
                "batch_size": BATCH,
                "evaluate_every": EVERY,
                "target": {"value": 0.99},
                "stop_at_target": False,
            },
        }
    )


def hand_written(dataset: Dataset, steps: int) -> float:
    """CPU seconds of the loop that one would write by hand."""
    x, y = dataset.train.x, dataset.train.y  # type: ignore[attr-defined]
    held_x, held_y = dataset.held_out.x, dataset.held_out.y  # type: ignore[attr-defined]
    layers: list[nn.Module] = []
    for inputs in (64, 100, 100):
        layers += [nn.Linear(inputs, 100, bias=False), nn.BatchNorm1d(100), nn.Sigmoid()]
    model = nn.Sequential(*layers, nn.Linear(100, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    began = process_time()
    step = 0
    while step < steps:
        order = torch.randperm(len(x))
        for start in range(0, len(x) - BATCH + 1, BATCH):
            index = order[start : start + BATCH]
            loss = F.cross_entropy(model(x[index]), y[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            if step % EVERY == 0:
                model.eval()
                with torch.inference_mode():
                    (model(held_x).argmax(1) == held_y).float().mean().item()
                model.train()
            if step == steps:
                break
    return process_time() - began


def ours(dataset: Dataset, steps: int, folder: Path) -> float:
    """CPU seconds of `bncli train`'s loop, from its first event to its last, with everything on."""
    with open("/dev/null", "w") as nowhere:
        console = Console(file=nowhere, force_terminal=True, width=100)
        with RunFolder(folder, "benchmark", overwrite=True) as run_folder, TrainProgress(console=console) as progress:
            assert progress.live
            run_folder.begin("")
            events = train(recipe(steps), "cpu", dataset=dataset)
            first = next(events)
            run_folder.metrics(first)
            began = process_time()
            progress(first)
            for event in events:
                run_folder.metrics(event)
                progress(event)
            return process_time() - began


def measure(rounds: int, steps: int) -> dict[str, list[float]]:
    """CPU seconds of both loops, a value a round, in the same order."""
    torch.set_num_threads(1)
    dataset = data.load(recipe(1).data, torch.device("cpu"))
    times: dict[str, list[float]] = {"hand-written": [], "bncli train": []}
    with tempfile.TemporaryDirectory() as folder:
        loops = {
            "hand-written": lambda: hand_written(dataset, steps),
            "bncli train": lambda: ours(dataset, steps, Path(folder)),
        }
        for loop in loops.values():
            loop()
        for _ in range(rounds):
            for name in random.sample(list(loops), len(loops)):
                times[name].append(loops[name]())
    return times


def paired_ratios(times: dict[str, list[float]]) -> list[float]:
    return sorted(a / b for a, b in zip(times["bncli train"], times["hand-written"], strict=True))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=1000)
    options = parser.parse_args(arguments)
    times = measure(options.rounds, options.steps)
    for name, found in times.items():
        print(f"{name:14} {1e6 * min(found) / options.steps:7.0f} us of CPU a step at least, "
              f"{1e6 * median(found) / options.steps:7.0f} median")  # fmt: skip
    ratios = paired_ratios(times)
    print(f"ratio bncli train / hand-written, paired over {options.rounds} rounds: {median(ratios):.3f} "
          f"[{ratios[2]:.3f}, {ratios[-3]:.3f}]  (target: at most 1.05)")  # fmt: skip


if __name__ == "__main__":
    main()
