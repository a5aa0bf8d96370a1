"""Cost of a step of a run that trains with others, beside a run alone: `python -m tests.benchmarks.stacked_runs`.

Both arms of recipes/digits.yaml, one thread. A turn takes some steps, each with its batch, and some evaluations of a
run alone and of each number of stacked runs, one after the other. A run's CPU time for a step includes its share of an
evaluation, of which there are 88 in 2,000 steps. Printed: the 10th percentile of the turns, and the median of their
ratios to the run alone, since other programs disturb single turns.

Notes: 2026-12-01, 2 busy cores of an AMD EPYC (1 MiB of L2 a core, load 5 to 12), torch 2.13.0: the speedup of 24 runs
was 2.3 to 2.4 without batch norm and 2.3 to 2.8 with it. A prototype with none of the loop's features was as fast.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from statistics import median
from time import process_time

import torch

from bncli.engine import data
from bncli.engine.train import optimizer_step
from bncli.engine.train.evaluation import evaluate
from bncli.engine.train.state import TrainState
from bncli.recipe.load import load, with_values
from bncli.recipe.sections import Recipe

EVALUATIONS = 88 / 2000  # for each step
CPU = torch.device("cpu")


def cpu_us(state: TrainState, steps: int) -> float:
    """CPU microseconds of a run for a step and its share of an evaluation."""
    began = process_time()
    for _ in range(steps):
        optimizer_step(state, *state.next_batch())
    of_steps, began = process_time() - began, process_time()
    evaluations = max(1, steps // 4)
    for _ in range(evaluations):
        evaluate(state)
    share = EVALUATIONS * (process_time() - began) / evaluations
    return 1e6 * (of_steps / steps + share) / len(state.runs)


def measure(recipe: Recipe, numbers: Sequence[int], turns: int) -> dict[int, list[float]]:
    """Number of stacked runs, 0 for a run alone -> CPU microseconds, a value a turn."""
    dataset = data.load(recipe.data, CPU)
    states = {0: TrainState(recipe, dataset, CPU)}
    for number in numbers:
        runs = [with_values(recipe, {"train.seed": seed}) for seed in range(number)]
        states[number] = TrainState(runs, dataset, CPU)
    found: dict[int, list[float]] = {number: [] for number in states}
    for _ in range(turns):
        for number, state in states.items():
            found[number].append(cpu_us(state, max(2, 24 // max(1, number))))
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=40)
    parser.add_argument("--runs", type=int, nargs="+", default=[1, 4, 8, 24, 48], help="numbers of stacked runs")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    print(f"{'arm':12} {'stacked runs':>12} {'us a run-step':>14} {'speedup':>8}")
    for arm in load("recipes/digits.yaml").arms:
        found = measure(with_values(arm.recipe, {"optimizer.lr": 0.3}), options.runs, options.turns)
        for number, us in found.items():
            ratio = median(alone / each for alone, each in zip(found[0], us, strict=True))
            low = sorted(us)[len(us) // 10]
            print(f"{arm.name:12} {number or 'none':>12} {low:14.0f} {ratio:8.2f}", flush=True)


if __name__ == "__main__":
    main()
