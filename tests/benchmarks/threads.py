"""Where a second CPU thread begins to pay: a training step with one and with two threads, by its multiply-adds.

`python -m tests.benchmarks.threads`. Both are timed in turn, a step at a time, and the shortest of each is taken; on
Linux only steps whose threads did not wait for a core count (engine.load), so that other programs change nothing.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator
from time import perf_counter

import torch

from bncli.engine import data
from bncli.engine.load import CoreWait
from bncli.engine.train import optimizer_step
from bncli.engine.train.state import TrainState
from bncli.engine.train.threads import multiply_adds
from bncli.recipe.sections import Recipe

SECONDS = 3.0  # for each net
BUSY = 0.05  # threads that waited, on average over a step, above which it is left out
BATCH = 60
CPU = torch.device("cpu")


def nets() -> Iterator[tuple[str, Recipe]]:
    """Nets from far below the rule's bound to far above it."""
    for width in (200, 300, 400, 800):
        yield f"mlp 2x{width}", _recipe([64], {"kind": "mlp", "hidden": [width, width]})
    for channels, side in itertools.product((4, 8, 16, 32), (8, 16)):
        yield f"cnn {channels}, {side}x{side}", _recipe([3, side, side], {"kind": "cnn", "channels": [channels] * 2})


def _recipe(shape: list[int], model: dict[str, object]) -> Recipe:
    return Recipe.model_validate(
        {
            "data": {"source": "synthetic", "shape": shape, "classes": 10, "examples": 300, "held_out": 60},
            "model": model,
            "norm": {"kind": "batch"},
            "optimizer": {"kind": "sgd", "lr": 0.1},
            "train": {"steps": 10, "batch_size": BATCH},
        }
    )


def shortest_ms(state: TrainState, seconds: float) -> dict[int, float]:
    """Threads -> milliseconds of the shortest step, infinite where every step was disturbed."""
    found = {1: float("inf"), 2: float("inf")}
    end = perf_counter() + seconds
    while perf_counter() < end:
        for threads in found:
            torch.set_num_threads(threads)
            for warm in (True, False, False, False):  # the pool is made anew for another number of threads
                batch = state.next_batch()
                load, began = CoreWait(threads), perf_counter()
                optimizer_step(state, *batch)
                elapsed_ms = 1e3 * (perf_counter() - began)
                if not warm and (load.cores() or 0.0) < BUSY:
                    found[threads] = min(found[threads], elapsed_ms)
    return found


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for each net")
    seconds = parser.parse_args(arguments).seconds
    print(f"{'net':16} {'multiply-adds':>14} {'1 thread ms':>12} {'2 threads ms':>12} {'1 over 2':>9}")
    for name, recipe in nets():
        state = TrainState(recipe, data.load(recipe.data, CPU), CPU)
        ms = shortest_ms(state, seconds)
        print(
            f"{name:16} {multiply_adds(recipe, state.dataset):14,.0f} {ms[1]:12.3f} {ms[2]:12.3f} {ms[1] / ms[2]:9.2f}",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
