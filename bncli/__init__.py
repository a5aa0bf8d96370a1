"""bncli: how many steps batch normalization saves, what it costs, and whether its gradients are right."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from bncli.engine.convert import convert as convert
    from bncli.engine.models.norms import BatchNorm as BatchNorm
    from bncli.engine.models.norms import BatchNorm1d as BatchNorm1d
    from bncli.engine.models.norms import BatchNorm2d as BatchNorm2d
    from bncli.engine.models.norms import BatchNorm3d as BatchNorm3d
    from bncli.engine.train import train as train
    from bncli.kernels.api import batch_norm as batch_norm
    from bncli.recipe.load import load as load_recipe  # noqa: F401

# Loaded when first used, so that importing bncli costs nothing: name -> module, and its name there where it differs.
_PUBLIC = {
    "BatchNorm": "bncli.engine.models.norms",
    "BatchNorm1d": "bncli.engine.models.norms",
    "BatchNorm2d": "bncli.engine.models.norms",
    "BatchNorm3d": "bncli.engine.models.norms",
    "batch_norm": "bncli.kernels.api",
    "convert": "bncli.engine.convert",
    "load_recipe": "bncli.recipe.load:load",
    "train": "bncli.engine.train",
}
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'bncli' has no attribute {name!r}")
    module, _, attribute = _PUBLIC[name].partition(":")
    return getattr(importlib.import_module(module), attribute or name)
