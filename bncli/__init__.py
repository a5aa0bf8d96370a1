"""bncli: how many steps batch normalization saves, what it costs, and whether its gradients are right."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from bncli.engine.convert import convert
    from bncli.engine.convert.fold import fold
    from bncli.engine.models.norms import BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d
    from bncli.engine.train import train
    from bncli.engine.train.weights import load_model
    from bncli.kernels.api import batch_norm
    from bncli.recipe.load import load as load_recipe

__all__ = [
    "BatchNorm",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "__version__",
    "batch_norm",
    "convert",
    "fold",
    "load_model",
    "load_recipe",
    "train",
]

# Loaded when first used, so that importing bncli costs nothing: name -> module, and its name there where it differs.
_PUBLIC = {
    "BatchNorm": "bncli.engine.models.norms",
    "BatchNorm1d": "bncli.engine.models.norms",
    "BatchNorm2d": "bncli.engine.models.norms",
    "BatchNorm3d": "bncli.engine.models.norms",
    "batch_norm": "bncli.kernels.api",
    "convert": "bncli.engine.convert",
    "fold": "bncli.engine.convert.fold",
    "load_model": "bncli.engine.train.weights",
    "load_recipe": "bncli.recipe.load:load",
    "train": "bncli.engine.train",
}


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'bncli' has no attribute {name!r}")
    module, _, attribute = _PUBLIC[name].partition(":")
    globals()[name] = value = getattr(
        importlib.import_module(module), attribute or name
    )  # the next look-up is a dict's
    return value


def __dir__() -> list[str]:
    return list(__all__)
