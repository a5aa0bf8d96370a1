"""Training steps of a run on 1 and on 2 processes: examples a second, alone and for each rank, and how it scales.

`python -m tests.benchmarks.ranks`. Each process has one thread, so 2 have twice the cores of 1. The batch is the same
one, of which a rank has its part. 1 and 2 take turns; times are the best of all rounds of steps, and include the
exchange of gradients, statistics and stop signals. Ratio: throughput of 2 over that of 1; 2.00 would be perfect.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from time import perf_counter
from typing import Any

import torch
from torch import distributed as dist

from bncli.engine import data
from bncli.engine.distributed import ALONE, Ranks
from bncli.engine.train import optimizer_step
from bncli.engine.train.state import TrainState
from bncli.recipe.sections import Recipe
from tests.ranks import group

CPU = torch.device("cpu")
TURNS = 4


def nets() -> Iterator[tuple[str, Recipe]]:
    """Each with batch norm by rank and over all ranks: from a step that is all overhead to one that is all work."""
    mlp, wide = {"kind": "mlp", "hidden": [100, 100, 100]}, {"kind": "mlp", "hidden": [800, 800, 800]}
    shapes: list[tuple[str, list[int], dict[str, Any], int]] = [
        ("mlp 3x100", [64], mlp, 60),
        ("mlp 3x800", [64], wide, 256),
        ("resnet 20, 16x16", [3, 16, 16], {"kind": "resnet", "depth": 20}, 128),
    ]
    for name, shape, model, batch in shapes:
        for sync in (False, True):
            sections = {
                "data": {"source": "synthetic", "shape": shape, "classes": 10, "examples": 600, "held_out": 60},
                "model": model,
                "norm": {"kind": "batch", "sync": sync},
                "optimizer": {"kind": "sgd", "lr": 0.01},
                "train": {"steps": 10, "batch_size": batch},
            }
            yield f"{name}, {'all' if sync else 'each'}", Recipe.model_validate(sections)


def shortest_step_s(recipe: Recipe, seconds: float) -> float:
    """The mean step of the shortest round, on this rank."""
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), CPU) if dist.is_initialized() else ALONE
    state = TrainState(recipe, data.load(recipe.data, CPU), CPU, ranks)
    state.parallel = ranks.parallel(state.model, any_graph=False)
    best, steps, end = float("inf"), 1, perf_counter() + seconds
    while not ranks.any(lambda: perf_counter() > end):
        began = perf_counter()
        for _ in range(steps):
            optimizer_step(state, *state.next_batch())
            ranks.any(lambda: False)
        elapsed_s = perf_counter() - began
        best = min(best, elapsed_s / steps)
        steps = max(1, int(ranks.sum(torch.tensor(0.1 / best)).item() / ranks.count))  # alike on all ranks
    return best


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=10.0, help="for each net and number of processes")
    seconds = parser.parse_args(arguments).seconds
    torch.set_num_threads(1)
    heads = ("net, statistics of", "1 process", "ms a step", "2 processes", "each rank", "ms a step", "ratio")
    print(f"{heads[0]:24}" + "".join(f"{head:>13}" for head in heads[1:]) + "   (examples a second)")
    with group(2) as together:
        for name, recipe in nets():
            turns_s = [
                (shortest_step_s(recipe, seconds / TURNS), max(together(shortest_step_s, recipe, seconds / TURNS)))
                for _ in range(TURNS)
            ]
            alone_s, pair_s = map(min, zip(*turns_s, strict=True))
            alone, pair = (recipe.train.batch_size / step_s for step_s in (alone_s, pair_s))
            figures = (
                f"{alone:,.0f}",
                f"{1e3 * alone_s:.2f}",
                f"{pair:,.0f}",
                f"{pair / 2:,.0f}",
                f"{1e3 * pair_s:.2f}",
            )
            print(f"{name:24}" + "".join(f"{each:>13}" for each in (*figures, f"{pair / alone:.2f}")), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
