"""bncli: how many steps batch normalization saves, what it costs, and whether its gradients are right."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from bncli.engine.norm import BatchNorm as BatchNorm
    from bncli.engine.train import run as train
    from bncli.recipe.file import load as load_recipe

__all__ = ["BatchNorm", "__version__", "load_recipe", "train"]

# Loaded when first used, so that importing bncli costs nothing.
_PUBLIC = {
    "BatchNorm": ("bncli.engine.norm", "BatchNorm"),
    "load_recipe": ("bncli.recipe.file", "load"),
    "train": ("bncli.engine.train", "run"),
}


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'bncli' has no attribute {name!r}")
    module, attribute = _PUBLIC[name]
    return getattr(importlib.import_module(module), attribute)
