"""Dry run: the resolved recipe and its size, without training. No torch, no data read."""

from __future__ import annotations

import math
from collections.abc import Iterable

from bncli.engine.memory import available_mib
from bncli.errors import DataError, RecipeError
from bncli.recipe import mnist, npz
from bncli.recipe.layers import (
    estimated_memory_mib,
    input_of,
    layers,
    shape_contradictions,
    size,
    training_examples,
)
from bncli.recipe.load import Arm, Loaded, plain
from bncli.recipe.overrides import leaves
from bncli.recipe.sections import MNIST_5K, Hub, Mnist, Npz, Recipe
from bncli.recipe.yaml import dotted
from bncli.results.compare import MemoryNeeded, Planned, PlannedArm

PROCESS_MIB = 170.0  # a worker's own after a small run: PSS of each of 3, Linux, torch 2.13 for CPUs (2026-12-01)


def planned_training(loaded: Loaded, arm: Arm) -> Planned:
    """One run of `bncli train`."""
    one = planned_arm(loaded.base, arm, 0, 1)
    fields, memory = tuple(loaded.provenance(arm)), memory_needed([arm.recipe], 1, shared=False)
    return Planned(arm.name, fields, (one,), {}, 1, arm.recipe.train.steps, memory=memory)


def memory_needed(recipes: Iterable[Recipe], jobs: int, shared: bool) -> MemoryNeeded:
    """What that many processes take to train the recipes, which have the same data. shared: whether once for all."""
    distinct = {(r.norm, r.train.batch_size, r.train.accumulate, repr(r.model)): r for r in recipes}
    training = [sizes(recipe)[1] for recipe in distinct.values()]
    return MemoryNeeded(
        next(map(data_mib, distinct.values()), 0.0),
        shared or jobs == 1,
        PROCESS_MIB,
        None if None in training else max((mib or 0.0 for mib in training), default=0.0),
        jobs,
        available_mib(),
    )


def data_mib(recipe: Recipe) -> float | None:
    """A recipe's data in memory; 0 if they are decoded batch by batch, None if no file here tells."""
    data = recipe.data
    try:
        shape, _ = input_of(recipe)
        as_bytes = len(shape) == 3 and isinstance(data, Hub | Mnist)
        examples = (training_examples(data) or 0) + (getattr(data, "held_out", None) or 0)
        if isinstance(data, Npz):
            found = npz.headers(data.path)
            examples = sum(found[key].shape[0] for key in ("x", "x_test") if key in found)
            as_bytes = len(shape) == 3 and found["x"].dtype == "uint8"
        elif isinstance(data, Mnist) and data.path != MNIST_5K:
            examples += mnist.images_in(data.path, "t10k")
    except DataError:
        return None
    mib = examples * (math.prod(shape) * (1 if as_bytes else 4) + 8) / 2**20
    if isinstance(data, Hub):
        return 0.0 if mib > 1024 * data.in_memory_gib else mib or None
    return mib


def planned_arm(base: Recipe, arm: Arm, tuning_runs: int, report_runs: int) -> PlannedArm:
    """How an arm differs from the base, its size, and its number of runs."""
    before = dict(leaves(plain(base)))
    changes = tuple((dotted(keys), value) for keys, value in leaves(plain(arm.recipe)) if before.get(keys) != value)
    parameters, memory = sizes(arm.recipe)
    return PlannedArm(arm.name, changes, arm.fixed, parameters, memory, tuning_runs, report_runs)


def sizes(recipe: Recipe) -> tuple[int | None, float | None]:
    """Parameters and estimated training memory in MiB; None for a model of the user's own."""
    shape, classes = input_of(recipe)
    unchecked = isinstance(recipe.data, Npz)  # the other sources were checked with the recipe
    contradictions = shape_contradictions(recipe, shape, classes) if unchecked else ()
    wrong = [f"{dotted(keys)}: {text}" for keys, text in contradictions]
    if wrong:
        raise RecipeError(*wrong)
    model = layers(recipe, shape, classes)
    if model is None:
        return None, None
    found, _ = size(model, shape)
    return found.parameters, estimated_memory_mib(recipe, found)
