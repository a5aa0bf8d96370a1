"""Cost of checkpoints: `python -m tests.benchmarks.checkpoints`.

What one takes (ms, MB) without the disk, for the digits' mlp and ResNet-18 with momentum; then the throughput of
training the mlp with a checkpoint every few steps and without, in turn, so that both see the same machine. Printed are
the least, the median and the most over the rounds.

Notes: 2026-12-01, 2 busy cores of an Intel Xeon, torch 2.13.0: the mlp (0.26 MB) 2.2 ms, ResNet-18 (90 MB) 132 ms of
CPU; the throughput with a checkpoint every 50 steps is 0.99 to 1.12 times that without, as they are outside its clock.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from statistics import median
from time import perf_counter, process_time
from typing import Any

import torch

from bncli.engine import data
from bncli.engine.train import train
from bncli.engine.train.checkpoint import Saving, unpacked
from bncli.engine.train.state import TrainState
from bncli.engine.user_code import LoadedFiles
from bncli.recipe.sections import Recipe
from bncli.results.train import RunFinished, RunResult

IMAGES = {"source": "synthetic", "shape": [3, 32, 32], "classes": 10, "examples": 256, "held_out": 64}
MODELS: dict[str, dict[str, Any]] = {
    "mlp": {"data": {"source": "digits"}, "model": {"kind": "mlp", "hidden": [100, 100, 100]}},
    "ResNet-18": {"data": IMAGES, "model": {"kind": "resnet", "depth": 18}},
}


def recipe(name: str, steps: int, **train_fields: Any) -> Recipe:
    fields = {"steps": steps, "batch_size": 60, "evaluate_every": steps, "target": None, **train_fields}
    sgd = {"kind": "sgd", "lr": 0.05, "momentum": 0.9}
    return Recipe.model_validate({**MODELS[name], "norm": {"kind": "batch"}, "optimizer": sgd, "train": fields})


def cost(name: str, rounds: int) -> None:
    """Print what a checkpoint of a network takes after a step, in CPU time, and what reading it takes."""
    described = recipe(name, 1)
    state = TrainState(described, data.load(described.data, torch.device("cpu")), torch.device("cpu"))
    for parameter in state.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    state.optimizer.step()
    contents: list[bytes] = []
    saving = Saving(state, {"checkpoint": contents.append}, LoadedFiles())
    saved, read = list[float](), list[float]()
    for _ in range(rounds):
        contents.clear()
        began = process_time()
        saving.checkpoint()
        between = process_time()
        unpacked(contents[0])
        saved.append(1e3 * (between - began))
        read.append(1e3 * (process_time() - between))
    parameters = sum(parameter.numel() for parameter in state.model.parameters())
    print(f"{name:10} {parameters:>10,} parameters  {len(contents[0]) / 1e6:8.2f} MB  "
          f"saved {spread(saved)} ms  read {spread(read)} ms of CPU")  # fmt: skip


def throughput(rounds: int, steps: int, every: int) -> None:
    """Print steps per second of training, and the wall time of whole runs, with checkpoints and without."""
    dataset = data.load(recipe("mlp", 1).data, torch.device("cpu"))
    rates: dict[str, list[float]] = {"without": [], "with": []}
    walls: dict[str, list[float]] = {"without": [], "with": []}
    for _ in range(rounds):
        for name in random.sample(list(rates), 2):
            asked = recipe("mlp", steps, checkpoint={"every": every} if name == "with" else None)
            save: Any = {"checkpoint": len} if name == "with" else {}
            began = perf_counter()
            *_, last = train(asked, "cpu", dataset=dataset, threads=1, save=save)
            walls[name].append(perf_counter() - began)
            rates[name].append(steps_per_s(last))
    for name in rates:
        print(f"{name:8} checkpoints: {spread(rates[name])} steps/s of training, {spread(walls[name])} s a run")
    ratios = [b / a for a, b in zip(rates["without"], rates["with"], strict=True)]
    print(f"throughput with / without, paired: {spread(ratios)}")


def steps_per_s(event: Any) -> float:
    assert isinstance(event, RunFinished)
    result: RunResult = event.result
    return result.steps_run / result.training_s


def spread(found: Sequence[float]) -> str:
    return f"{min(found):.4g} [{median(found):.4g}, {max(found):.4g}]"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--every", type=int, default=100)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    for name in MODELS:
        cost(name, options.rounds)
    throughput(options.rounds, options.steps, options.every)


if __name__ == "__main__":
    main()
