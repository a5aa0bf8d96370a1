"""Dry run: the resolved recipe and its size, without training. No torch, no data read."""

from __future__ import annotations

from bncli.errors import RecipeError
from bncli.recipe.layers import estimated_memory_mib, input_of, layers, shape_contradictions, size
from bncli.recipe.load import Arm, Loaded, plain
from bncli.recipe.overrides import leaves
from bncli.recipe.sections import Npz, Recipe
from bncli.recipe.yaml import dotted
from bncli.results.compare import Planned, PlannedArm


def planned_training(loaded: Loaded, arm: Arm) -> Planned:
    """One run of `bncli train`."""
    one = planned_arm(loaded.base, arm, 0, 1)
    fields = tuple(loaded.provenance(arm))
    return Planned(arm.name, fields, (one,), {}, 1, arm.recipe.train.steps, available_memory_mib())


def available_memory_mib() -> float:
    """Memory of this machine that is available without swapping."""
    import psutil  # here, since other commands do not need it

    return float(psutil.virtual_memory().available) / 2**20


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
