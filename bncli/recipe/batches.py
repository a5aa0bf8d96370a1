"""Which runs train together in one batch, as far as their recipes tell. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bncli.recipe.sections import BatchNorm, Mlp, NoNorm, Recipe

# What runs of an arm that train together may differ in: where they start, and a rate for each.
FREE = ("optimizer.lr", "train.seed", "model.init")


def alone(recipe: Recipe) -> str | None:
    """The field for which a run of the recipe trains alone, as `train.compile`; None where it trains with others.

    Their initial weights and orders of the data are each run's own, so what draws random numbers in a step does not
    fit, nor what is an optimizer step's or a file's of a single run.
    """
    model, norm, train = recipe.model, recipe.norm, recipe.train
    native = isinstance(norm, BatchNorm) and norm.kernel == "native" and norm.backward == "full"
    reasons = {
        "model.kind": not isinstance(model, Mlp),
        "model.dropout": getattr(model, "dropout", 0.0) > 0,
        "norm": not (isinstance(norm, NoNorm) or native),
        "norm.momentum": getattr(norm, "momentum", 0.1) is None,
        "data.source": recipe.data.source == "hub",
        "data.augment": getattr(recipe.data, "augment", "none") != "none",
        "train.precision": train.precision != "fp32",
        "train.compile": train.compile,
        "train.accumulate": train.accumulate > 1,
        "train.clip_gradients": train.clip_gradients is not None,
        "train.population_statistics": train.population_statistics == "precise",
        "train.checkpoint": train.checkpoint is not None,
        "probes": recipe.probes is not None,
    }
    return next((field for field, found in reasons.items() if found), None)


def common(point: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a point of the grid that runs which train together have in common."""
    return {path: value for path, value in point.items() if not path.startswith(FREE)}
