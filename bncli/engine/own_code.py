"""Code of the user's own, by name: what a recipe's model.module and gradcheck's --kernel point at."""

from __future__ import annotations

import importlib
import sys
from typing import Any


def imported(name: str) -> Any:
    """What package.module:function names, from the current folder or the environment.

    Raises what the import raises, which runs the user's code, and AttributeError where the module has no such name.
    """
    if "" not in sys.path:
        sys.path.insert(0, "")  # a console script's path lacks the current folder, where the user's code stands
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)
