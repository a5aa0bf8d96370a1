"""A training step's arithmetic, which chooses its CPU threads. No clock does: bits must not depend on the load."""

from __future__ import annotations

import copy
import math

import torch
from torch import nn

from bncli.engine.data.splits import Dataset
from bncli.engine.models.init import global_generators, restore_global_generators
from bncli.recipe.layers import layers, size
from bncli.recipe.sections import Recipe

PASSES = 3  # of a layer's products: its output, and the gradients of its weights and of its input
# Up to here a second thread gains little on idle cores, where the shortest steps with one over two are 0.93 to 1.07 for
# mlps and 1.02 to 1.38 for cnns; above, 1.05 to 1.67 (tests.benchmarks.threads, two cores, 2026-12-01). On busy cores a
# step with two can take 70 times as long.
FEWEST = 25_000_000


def multiply_adds(recipe: Recipe, dataset: Dataset, model: nn.Module | None = None) -> float:
    """Of linear layers and convolutions for a (micro-)batch, forward and backward.

    model: the user's own, which is counted in a pass of a copy without data; infinite where there is no such pass.
    """
    batch, shape = recipe.train.micro_batch_size, dataset.shape
    if model is None:
        planned = layers(recipe, shape, dataset.classes)
        return PASSES * batch * size(planned, shape)[0].multiply_adds if planned else math.inf
    from torch.utils.flop_counter import FlopCounterMode  # loads Triton: 70 MiB that a recipe's own nets can do without

    cpu = torch.device("cpu")
    before = global_generators(cpu)
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            copy.deepcopy(model).to("meta").forward(torch.empty(batch, *shape, device="meta"))
    except Exception:  # an operator that needs data, or a branch on a value
        return math.inf
    finally:
        restore_global_generators(before, cpu)
    return PASSES * counter.get_total_flops() // 2  # which are two for a multiply-add
